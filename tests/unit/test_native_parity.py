"""The native runner against transformers, token for token in fp32, however the work is cut into steps and ranks.

Exactness here means: greedy tokens are equal, and the fixtures could not hide an error. Their top-2 margins exceed
the numeric spread many times over, and replacing any one KV block changes what comes out.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.request import SamplingParams
from engine.comm import ShmComm
from engine.model_config import ModelUnsupported
from engine.native import NativeRunner
from engine.types import StepFailed, StepPlan
from tests.support.drive import Driven, generate, run_step
from tests.support.rank_threads import run_ranks
from tests.support.tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    load_reference,
    make_model,
    random_prompt,
    reference_greedy,
    reference_logits,
)

NUM_TOKENS = 16
PROMPT_LENGTHS = (133, 150, 141)  # eight full blocks of 16 and a part of another
NUM_BLOCKS = 64
ALL_LOGPROBS = SamplingParams(temperature=0, num_logprobs=VOCAB_SIZE)

Shape = tuple[str, Mapping[str, Any]]
VARIANTS: Mapping[str, Shape] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "no-gqa": ("llama", {"num_key_value_heads": 4}),
    "one-kv-head": ("mistral", {"num_key_value_heads": 1}),
    "all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": ("llama", {"hidden_size": 96, "head_dim": 32}),
    "odd-vocabulary": ("qwen2", {"vocab_size": VOCAB_SIZE + 1}),
    "window": ("mistral", {"sliding_window": 40}),
    "window-in-some-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "rope-theta": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "rope-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "rope-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "rope-yarn-mscale": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "beta_fast": 16.0,
                "truncate": False,
            }
        },
    ),
}


@dataclass(frozen=True)
class Fixture:
    """A model with prompts, what transformers makes of them, and its logits at each generated token."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    logits: list[torch.Tensor]  # [NUM_TOKENS, vocab_size] each

    @property
    def margin(self) -> float:
        """The smallest lead of a chosen token over the runner-up."""
        tops = torch.cat([logits.topk(2).values for logits in self.logits])
        return float((tops[:, 0] - tops[:, 1]).min())


def build(directory: Path, family: str, **overrides: Any) -> Fixture:
    make_model(directory, family, seed=3, **overrides)
    model = load_reference(directory)
    prompts = [random_prompt(seed, length) for seed, length in enumerate(PROMPT_LENGTHS)]
    outputs = [reference_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    logits = [
        reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return Fixture(directory, prompts, outputs, logits)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fixture]:
    return {family: build(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def fixture(request: pytest.FixtureRequest, fixtures: dict[str, Fixture]) -> Fixture:
    return fixtures[request.param]


def runner_for(fixture: Fixture, **arguments: Any) -> NativeRunner:
    return NativeRunner(fixture.directory, **({"num_blocks": NUM_BLOCKS} | arguments))


def measured_logprobs(sequence: Driven) -> torch.Tensor:
    """[tokens, vocab_size] of a sequence that was sampled with ALL_LOGPROBS."""
    rows = torch.zeros(len(sequence.sampled), VOCAB_SIZE)
    for row, sampled in zip(rows, sequence.sampled, strict=True):
        assert sampled.logprobs is not None
        for token, logprob in sampled.logprobs.top:
            row[token] = logprob
    return rows


def test_greedy_output_equals_transformers(fixture: Fixture) -> None:
    runner = runner_for(fixture)
    assert fixture.outputs == [generate(runner, prompt, NUM_TOKENS) for prompt in fixture.prompts]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_output_equals_transformers_in_variant(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    fixture = build(tmp_path, family, **overrides)
    runner = runner_for(fixture)
    assert fixture.outputs == [generate(runner, prompt, NUM_TOKENS) for prompt in fixture.prompts]
    assert fixture.outputs == [generate(runner, prompt, NUM_TOKENS, chunk=37) for prompt in fixture.prompts]


def test_margins_exceed_the_numeric_spread(fixture: Fixture) -> None:
    """Logits differ from transformers' by less than a tenth of the closest decision, chunked or not, batched or not."""
    runner = runner_for(fixture)
    spread = 0.0
    for chunk in (1 << 30, 29):
        third = NUM_BLOCKS // 3
        batch = [
            Driven(list(prompt), range(index * third, (index + 1) * third), ALL_LOGPROBS)
            for index, prompt in enumerate(fixture.prompts)
        ]
        while any(len(sequence.sampled) < NUM_TOKENS for sequence in batch):
            run_step(runner, [sequence for sequence in batch if len(sequence.sampled) < NUM_TOKENS], chunk)
        for sequence, logits in zip(batch, fixture.logits, strict=True):
            spread = max(spread, float((measured_logprobs(sequence) - logits.log_softmax(-1)).abs().max()))
    assert spread < 1e-4
    assert fixture.margin > 10 * spread


def test_output_does_not_depend_on_the_chunk_size(fixtures: dict[str, Fixture]) -> None:
    fixture = fixtures["qwen3"]
    runner = runner_for(fixture)
    prompt, expected = fixture.prompts[0], fixture.outputs[0][:6]
    different = [
        chunk for chunk in range(1, len(prompt) + 2, 2) if generate(runner, prompt, 6, chunk=chunk) != expected
    ]
    assert different == []


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_output_does_not_depend_on_block_size_or_on_which_blocks(fixture: Fixture, block_size: int) -> None:
    runner = runner_for(fixture, block_size=block_size)
    blocks = list(range(NUM_BLOCKS))
    random.Random(block_size).shuffle(blocks)
    for prompt, output in zip(fixture.prompts, fixture.outputs, strict=True):
        sequence = Driven(list(prompt), blocks)
        while len(sequence.sampled) < NUM_TOKENS:
            run_step(runner, [sequence], chunk=50)
        assert sequence.output == output


def test_sequences_that_join_a_running_batch_are_not_changed_by_it(fixture: Fixture) -> None:
    """Prefill chunks and decodes in one step, of sequences that begin and end at different times."""
    runner = runner_for(fixture, num_blocks=6 * 11)
    chances = random.Random(0)
    waiting = [Driven(list(fixture.prompts[index % 3]), range(index * 11, (index + 1) * 11)) for index in range(6)]
    everything, running = list(waiting), list[Driven]()
    while waiting or running:
        if waiting and chances.random() < 0.3:
            running.append(waiting.pop())
        if running:
            run_step(runner, running, chunk=chances.choice((7, 16, 40)))
        running = [sequence for sequence in running if len(sequence.sampled) < NUM_TOKENS]
    assert [sequence.output for sequence in everything] == [fixture.outputs[index % 3] for index in range(6)]


def test_replacing_any_one_block_changes_the_output(fixtures: dict[str, Fixture]) -> None:
    """In at least 95 % of cases: otherwise equality of tokens would prove little about KV."""
    for family, fixture in fixtures.items():
        runner = runner_for(fixture, num_blocks=24)
        pool = torch.frombuffer(runner.kv_buffer(), dtype=torch.float32).view(3, 24, -1)
        changed = []
        for index, prompt in enumerate(fixture.prompts):
            other = Driven(list(fixture.prompts[index - 1]), range(12, 24))
            run_step(runner, [other])
            prefilled = Driven(list(prompt), range(12))
            run_step(runner, [prefilled])
            kept = pool.clone()
            for block in range(-(-min(PROMPT_LENGTHS) // 16)):
                pool.copy_(kept)
                pool[:, block] = pool[:, 12 + block]
                sequence = Driven(list(prefilled.tokens), range(12), num_computed=prefilled.num_computed)
                while len(sequence.sampled) < NUM_TOKENS - 1:
                    run_step(runner, [sequence])
                changed.append(sequence.output != fixture.outputs[index][1:])
        assert sum(changed) >= 0.95 * len(changed), f"{family}: {sum(changed)} of {len(changed)}"


def test_what_lies_beyond_a_sequences_tokens_has_no_influence(fixture: Fixture) -> None:
    """Not even NaN, which no mask removes."""
    runner = runner_for(fixture)
    torch.frombuffer(runner.kv_buffer(), dtype=torch.float32).fill_(float("nan"))
    blocks = range(5, 5 + 11)
    sequences = [Driven(list(fixture.prompts[0]), blocks), Driven([5], [20]), Driven([7, 8, 9], [21])]
    while len(sequences[0].sampled) < NUM_TOKENS:
        run_step(runner, sequences[:1] if sequences[0].num_computed > 140 else sequences, chunk=30)
    assert sequences[0].output == fixture.outputs[0]


@pytest.mark.parametrize("size", [2, 4])
def test_output_does_not_depend_on_the_number_of_ranks(fixture: Fixture, tmp_path: Path, size: int) -> None:
    """Four ranks share two KV heads."""

    def work(comm: ShmComm) -> list[list[int]]:
        runner = runner_for(fixture, comm=comm)
        if comm.rank > 0:
            runner.follow()
            return []
        leader = LeaderRunner(runner)
        outputs = [generate(leader, prompt, NUM_TOKENS, chunk=61) for prompt in fixture.prompts]
        runner.close()
        return outputs

    assert run_ranks(tmp_path, size, work)[0] == fixture.outputs


@pytest.mark.parametrize("name", ["all-biases", "odd-vocabulary", "qwen3-bias-tied", "one-kv-head"])
def test_ranks_split_biases_heads_and_vocabulary_of_variant(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    fixture = build(tmp_path, family, **overrides)

    def work(comm: ShmComm) -> list[int]:
        runner = runner_for(fixture, comm=comm)
        if comm.rank > 0:
            runner.follow()
            return []
        return generate(LeaderRunner(runner), fixture.prompts[0], NUM_TOKENS)

    assert run_ranks(tmp_path, 4, work)[0] == fixture.outputs[0]


class LeaderRunner:
    """`run` is the leader's `run_all`."""

    def __init__(self, runner: NativeRunner) -> None:
        self.layout = runner.layout
        self.run = runner.run_all
        self.kv_buffer, self.kv_fd, self.close = runner.kv_buffer, runner.kv_fd, runner.close


def test_ranks_agree_on_fingerprint_and_split_the_pool(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["llama"]
    runners = run_ranks(tmp_path, 2, lambda comm: runner_for(fixture, comm=comm))
    alone = runner_for(fixture)
    assert {runner.layout.model for runner in runners} == {alone.layout.model}
    assert [runner.layout.tp_rank for runner in runners] == [0, 1]
    assert sum(len(runner.kv_buffer()) for runner in runners) == len(alone.kv_buffer())


def test_a_model_that_does_not_split_is_refused(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    def work(comm: ShmComm) -> None:
        with pytest.raises(ModelUnsupported, match="4 attention heads can not be split over 3 ranks"):
            runner_for(fixtures["llama"], comm=comm)

    run_ranks(tmp_path, 3, work)


def test_bfloat16_tokens_are_near_choices_of_the_reference(tmp_path: Path) -> None:
    """Teacher-forced: each token that the runner chooses is within tau of transformers' best at that place."""
    make_model(tmp_path, "qwen3", seed=3, dtype="bfloat16")
    model = load_reference(tmp_path)
    runner = NativeRunner(tmp_path, dtype="auto", num_blocks=NUM_BLOCKS)
    assert runner.layout.model.dtype == "bfloat16"
    for seed in range(3):
        prompt = random_prompt(seed, 60)
        output = generate(runner, prompt, NUM_TOKENS, chunk=25)
        logits = reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.02 * float(logits.std())


class RecordingHook:
    """Notes calls, and how the pool looks at each."""

    def __init__(self, pool: torch.Tensor) -> None:
        self.calls: list[tuple[str, int]] = []
        self.written: list[list[bool]] = []  # per layer_done: which layers have KV in block 3
        self._pool = pool

    def step_begin(self, plan: StepPlan) -> None:
        self.calls.append(("begin", plan.num_tokens))

    def layer_done(self, layer: int, ready: object | None) -> None:
        assert ready is None
        self.calls.append(("layer", layer))
        self.written.append([bool(self._pool[index, 3].any()) for index in range(3)])

    def step_done(self) -> None:
        self.calls.append(("done", 0))


def test_the_hook_hears_of_each_layer_when_its_kv_is_in_the_pool(fixtures: dict[str, Fixture]) -> None:
    runner = runner_for(fixtures["llama"])
    pool = torch.frombuffer(runner.kv_buffer(), dtype=torch.float32).view(3, NUM_BLOCKS, -1)
    hook = RecordingHook(pool)
    run_step(runner, [Driven([5, 6, 7], [3])], hook=hook)
    assert hook.calls == [("begin", 3), ("layer", 0), ("layer", 1), ("layer", 2), ("done", 0)]
    assert hook.written == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_sequence_whose_numbers_break_down_is_named(fixtures: dict[str, Fixture]) -> None:
    """And the same step without it gives what it would have given."""
    fixture = fixtures["llama"]
    runner = runner_for(fixture)
    good = Driven(list(fixture.prompts[0]), range(12))
    bad = Driven(list(fixture.prompts[1]), range(12, 24))
    run_step(runner, [good, bad])
    pool = torch.frombuffer(runner.kv_buffer(), dtype=torch.float32).view(3, NUM_BLOCKS, -1)
    pool[1, 14] = float("nan")
    with pytest.raises(StepFailed, match="not finite") as raised:
        run_step(runner, [good, bad])
    assert raised.value.attempt_ids == ("seq-12/1",)
    while len(good.sampled) < NUM_TOKENS:
        run_step(runner, [good])
    assert good.output == fixture.outputs[0]


@pytest.mark.parametrize(
    ("sequence", "problem"),
    [
        (Driven([2] * 40, [0, 1]), "needs 40 tokens of KV; its block table holds 32"),
        (Driven([2], [NUM_BLOCKS]), "names a block outside"),
        (Driven([2, VOCAB_SIZE], [0]), "outside of the vocabulary"),
        (Driven([2] * 1025, range(NUM_BLOCKS)), "needs 1025 tokens of KV|goes to token 1025"),
    ],
)
def test_a_plan_that_reaches_outside_is_refused(fixtures: dict[str, Fixture], sequence: Driven, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        run_step(runner_for(fixtures["llama"]), [sequence])


def test_a_closed_runner_gives_its_pool_back(fixtures: dict[str, Fixture]) -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("baton-kv")

    gc.collect()
    before = num_mappings()
    runner = runner_for(fixtures["llama"])
    run_step(runner, [Driven([5, 6, 7], [3])])
    assert num_mappings() == before + 1
    runner.close()
    runner.close()
    assert num_mappings() == before
