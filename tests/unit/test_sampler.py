"""Token choice: the noise, each option against a plain definition of it, and independence of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from baton.request import SamplingParams
from engine.sampler import NonFiniteLogits, gumbel_noise, sample
from engine.types import Sampled, SampleSpec

VOCAB = 50
FIXED_NOISE = (-0.9691756739926687, 1.9176200974240216, 0.3344406177332057)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def spec(position: int = 0, **params: Any) -> SampleSpec:
    fields = {key: params.pop(key) for key in list(params) if key.endswith("token_ids") and key != "stop_token_ids"}
    return SampleSpec(SamplingParams(**params), position, **fields)


def one(logits: torch.Tensor, wanted: SampleSpec) -> Sampled:
    (sampled,) = sample(logits, [wanted])
    return sampled


def counts(logits: torch.Tensor, draws: int, **params: Any) -> torch.Tensor:
    """How often each token is drawn at `draws` positions."""
    specs = [spec(position, seed=11, **params) for position in range(draws)]
    tokens = [sampled.token_id for sampled in sample(logits.expand(draws, -1), specs)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def chi_square(observed: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())


def limit(degrees: int, sigmas: float = 4.5) -> float:
    """A bound that chance passes about once in a million (Wilson and Hilferty's cube root)."""
    return degrees * (1 - 2 / (9 * degrees) + sigmas * math.sqrt(2 / (9 * degrees))) ** 3


# --- noise ---


def test_noise_is_fixed_for_ever() -> None:
    """A retry may run on a worker of another version: these numbers are part of the protocol between them."""
    noise = gumbel_noise(1, 2, 3, torch.tensor([0, 1, 151_935]))
    expected = torch.tensor(FIXED_NOISE, dtype=torch.float64)
    assert torch.allclose(noise, expected, rtol=1e-12, atol=0)


def test_noise_is_uniform_after_undoing_the_gumbel_transform() -> None:
    for seed, index, position in [(0, 0, 0), (2**63 + 5, 1, 7), (-1, 0, 100_000)]:
        uniform = torch.exp(-torch.exp(-gumbel_noise(seed, index, position, torch.arange(100_000))))
        observed = torch.histc(uniform.float(), bins=200, min=0, max=1)
        assert chi_square(observed, torch.full((200,), 1 / 200)) < limit(199)


@pytest.mark.parametrize("axis", ["seed", "sample_index", "position", "token"])
def test_neighbours_along_every_axis_are_independent(axis: str) -> None:
    """Pairs (u, u of the neighbour) fill a 12 x 12 grid evenly; and u at one token is uniform along the axis."""
    at = torch.arange(40)
    values = []
    for step in range(1000):
        key = {"seed": 5, "sample_index": 0, "position": 9} | ({} if axis == "token" else {axis: step})
        noise = gumbel_noise(key["seed"], key["sample_index"], key["position"], at + 40 * step * (axis == "token"))
        values.append(torch.exp(-torch.exp(-noise)))
    grid = torch.stack(values)  # [steps, tokens]
    first, second = (grid[:, :-1], grid[:, 1:]) if axis == "token" else (grid[:-1], grid[1:])
    cells = (first * 12).long().flatten() * 12 + (second * 12).long().flatten()
    assert chi_square(torch.bincount(cells, minlength=144).float(), torch.full((144,), 1 / 144)) < limit(143)
    along = torch.histc(grid[:, 0].float(), bins=20, min=0, max=1)
    assert chi_square(along, torch.full((20,), 1 / 20)) < limit(19)
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.025


def test_noise_is_finite_even_at_the_ends_of_its_range() -> None:
    noise = gumbel_noise(3, 0, 0, torch.arange(1_000_000))
    assert bool(torch.isfinite(noise).all())
    assert float(noise.min()) > -3.7
    assert float(noise.max()) < 36.8


def test_noise_does_not_depend_on_which_tokens_are_asked_for() -> None:
    whole = gumbel_noise(7, 0, 3, torch.arange(1000))
    some = torch.tensor([999, 5, 500])
    assert torch.equal(gumbel_noise(7, 0, 3, some), whole[some])


# --- choice ---


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(0, vocab=8)
    observed = counts(logits, 6000, temperature=0.7)
    assert chi_square(observed, (logits[0] / 0.7).softmax(0)) < limit(7)


def test_zero_temperature_is_the_argmax() -> None:
    logits = logits_of(1, rows=6)
    tokens = [sampled.token_id for sampled in sample(logits, [spec(temperature=0)] * 6)]
    assert tokens == logits.argmax(-1).tolist()


def kept_by(logits: torch.Tensor, draws: int = 1500, **params: Any) -> set[int]:
    """Which tokens are ever drawn from nearly flat logits."""
    return set(counts(logits, draws, **params).nonzero().flatten().tolist())


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = logits_of(2) * 0.05
    assert kept_by(logits, top_k=5) == set(logits[0].topk(5).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = logits_of(3) * 0.3
    order = logits[0].sort(descending=True)
    before = order.values.double().softmax(0).cumsum(0) - order.values.double().softmax(0)
    assert kept_by(logits, 4000, top_p=0.3) == set(order.indices[before < 0.3].tolist())


def test_top_p_after_top_k_counts_only_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept_by(logits, 300, top_k=2, top_p=0.6) == {0, 1}  # 0.57 of what is left, then 0.43
    assert kept_by(logits, 300, top_p=0.6) == {0, 1}
    assert kept_by(logits, 300, top_k=2, top_p=0.57) == {0}


def test_top_p_of_a_flat_distribution_over_a_large_vocabulary_sorts_all_of_it() -> None:
    """Beyond the first guess of how many tokens the nucleus needs; ties are kept together."""
    logits = torch.linspace(0, 1e-3, 3000)[None]
    threshold = sorted(logits[0].tolist(), reverse=True)
    drawn = kept_by(logits, 200, top_p=0.5)
    assert len(drawn) > 150
    assert min(float(logits[0, token]) for token in drawn) >= threshold[1501]
    assert kept_by(torch.zeros(1, 10), 500, top_p=0.35) == set(range(10))


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept_by(logits, 500, min_p=0.49) == {0, 1, 2}
    assert kept_by(logits, 500, min_p=0.51) == {0, 1}
    assert kept_by(logits, 500, min_p=0.2, temperature=0.5) == {0, 1, 2}  # ratios are squared: 1, 0.56, 0.25, 0.06


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_likeliest_token_is_never_cut(params: dict[str, Any]) -> None:
    logits = logits_of(4)
    assert kept_by(logits, 20, **params) == {int(logits.argmax())}


def test_penalties_are_those_of_their_definitions() -> None:
    logits = logits_of(5)
    prompt, output = (3, 4, 4, 9), (9, 10, 10, 10)
    settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2}
    expected = logits[0].clone()
    for token in {3, 4, 9, 10}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, count in {9: 1, 10: 3}.items():
        expected[token] -= 0.4 * count - 0.2
    # Bring each token into reach of the maximum by a bias: the winner tells the adjusted value.
    for token in range(VOCAB):
        gap = float(expected.max() - expected[token])
        for bias, wins in ((gap + 1e-3, True), (gap - 1e-3, token == int(expected.argmax()))):
            # The bias comes before the penalties, so undo what the repetition penalty makes of it.
            raw = logits.clone()
            target = float(expected[token]) + bias
            if token in {9, 10}:
                target += 0.4 * {9: 1, 10: 3}[token] - 0.2
            if token in {3, 4, 9, 10}:
                target = target * 1.3 if target > 0 else target / 1.3
            wanted = spec(
                temperature=0,
                logit_bias={token: target - float(raw[0, token])},
                prompt_token_ids=prompt,
                output_token_ids=output,
                **settings,
            )
            assert (one(raw, wanted).token_id == token) == wins


def test_a_frequent_token_falls_behind() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    assert one(logits, spec(temperature=0, presence_penalty=0.2, output_token_ids=(0,))).token_id == 1
    assert one(logits, spec(temperature=0, presence_penalty=0.2, prompt_token_ids=(0,))).token_id == 0
    assert one(logits, spec(temperature=0, repetition_penalty=2.0, prompt_token_ids=(0, 1))).token_id == 0
    assert one(logits, spec(temperature=0, frequency_penalty=0.06, output_token_ids=(0, 0))).token_id == 1


def test_bias_and_bans_decide_greedily_too() -> None:
    logits = logits_of(6)
    best, second = logits[0].topk(2).indices.tolist()
    assert one(logits, spec(temperature=0, banned_token_ids=(best,))).token_id == second
    assert one(logits, spec(temperature=0, logit_bias={7: 100.0})).token_id == 7
    assert one(logits, spec(temperature=0, logit_bias={7: 100.0}, banned_token_ids=(7,))).token_id == best
    assert one(logits, spec(temperature=0, logit_bias={VOCAB: 100.0}, banned_token_ids=(VOCAB, -1))).token_id == best
    assert best not in kept_by(logits, 200, temperature=1.0, logit_bias={best: -100.0})


@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-308, 1e-200])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5}])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float, cuts: dict[str, Any]) -> None:
    for scale in (1.0, 1e-30, 1e38 / 8):
        logits = logits_of(7, rows=3) * scale
        assert logits.isfinite().all()
        tokens = [s.token_id for s in sample(logits, [spec(temperature=temperature, seed=9, **cuts)] * 3)]
        assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0, 100.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-46, 1e-39, 100.0, 1e300])
@pytest.mark.parametrize("scale", [1.0, 1e37])
def test_a_banned_token_is_never_chosen(temperature: float, penalty: float, scale: float) -> None:
    """Whatever else pushes it up, or pushes all others down."""
    logits = logits_of(8) * scale - 3 * scale
    everything = tuple(range(VOCAB))
    for others in ({}, {"logit_bias": {0: 100.0}}, {"presence_penalty": -2.0}, {"top_k": 9, "top_p": 0.5}):
        for banned in ((0,), (0, 7), everything[:-1]):
            wanted = [
                spec(
                    position,
                    temperature=temperature,
                    repetition_penalty=penalty,
                    prompt_token_ids=everything,
                    output_token_ids=(0, 0, 3),
                    banned_token_ids=banned,
                    **others,
                )
                for position in range(5)
            ]
            assert not {s.token_id for s in sample(logits.expand(5, -1), wanted)} & set(banned)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = logits_of(7)
    order = logits[0].sort(descending=True).indices.tolist()
    expected = logits[0].log_softmax(0)
    sampled = one(logits, spec(temperature=0, num_logprobs=3, banned_token_ids=tuple(order[:4]), logit_bias={3: 1.0}))
    assert sampled.token_id == order[4] or sampled.token_id == 3
    assert sampled.logprobs is not None
    assert sampled.logprobs.rank == order.index(sampled.token_id) + 1
    assert sampled.logprobs.logprob == pytest.approx(float(expected[sampled.token_id]))
    assert [token for token, _ in sampled.logprobs.top] == order[:3]
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(expected[order[:3]].tolist())
    none = one(logits, spec(num_logprobs=0))
    assert none.logprobs is not None
    assert none.logprobs.top == ()
    everything = one(logits, spec(num_logprobs=1000)).logprobs
    assert everything is not None
    assert len(everything.top) == VOCAB


# --- independence ---


def mixed_specs(rows: int) -> list[SampleSpec]:
    kinds: Sequence[dict[str, Any]] = (
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.9, "num_logprobs": 2},
        {"temperature": 1.4, "top_k": 9, "min_p": 0.02, "repetition_penalty": 1.2, "output_token_ids": (3, 5, 5)},
        {"temperature": 0, "frequency_penalty": 0.5, "output_token_ids": (1, 2)},
    )
    return [spec(position=row, seed=row // 3, **kinds[row % len(kinds)]) for row in range(rows)]


def test_a_row_gives_the_same_in_any_batch() -> None:
    logits, specs = logits_of(8, rows=15, vocab=3000), mixed_specs(15)
    together = sample(logits, specs)
    assert together == [one(logits[row : row + 1], specs[row]) for row in range(15)]
    backwards = sample(logits.flip(0), specs[::-1])
    assert together == backwards[::-1]


def test_sampling_leaves_the_logits_alone() -> None:
    logits = logits_of(9, rows=15, vocab=300)
    before = logits.clone()
    sample(logits, mixed_specs(15))
    assert torch.equal(logits, before)


def test_seed_sample_index_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 5000)
    base = {"seed": 1, "sample_index": 0, "position": 5}
    tokens = {
        one(logits, spec(**(base | change))).token_id
        for change in ({}, {"seed": 2}, {"sample_index": 1}, {"position": 6})
    }
    assert len(tokens) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    logits = logits_of(10, rows=4)
    logits[1, 3] = logits[3, 0] = value
    with pytest.raises(NonFiniteLogits) as raised:
        sample(logits, mixed_specs(4))
    assert raised.value.rows == (1, 3)
