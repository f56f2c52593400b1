"""The CPU kernels against torch in float64, and the fast decoder against the reference, on every instruction set here.

Tolerances: float32 results are within 1e-5 of the exact ones relative to the largest; those that end in bfloat16 are
within one of its roundings (2**-8) more.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
from ctypes import byref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton import native_build
from baton.request import AttemptId, SamplingParams
from engine.comm import PeerLost, ShmComm
from engine.cpu_fast import _Group, _merged, _TableCache
from engine.kernels import build
from engine.kernels.build import Isa, KernelsUnavailable, isas
from engine.kernels.library import (
    ISA_VARIABLE,
    Library,
    Memory,
    PackedLinear,
    StepDesc,
    ThreadPool,
    linear,
    load,
)
from engine.native import NativeRunner
from engine.sampler import sample
from engine.types import BatchEntry, SampleSpec, StepFailed, StepPlan
from tests.support.drive import Driven, generate, run_step
from tests.support.rank_threads import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, make_model, random_prompt

DEMO_MODEL = Path(__file__).parents[2] / "baton" / "demo_model"
GREEDY = SamplingParams(temperature=0)
ALL_LOGPROBS = SamplingParams(temperature=0, num_logprobs=VOCAB_SIZE + 1)
BF16_STEP = 2.0**-8


def library(isa: Isa | None = None) -> Library:
    try:
        return load(isa)
    except KernelsUnavailable as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture(scope="module", params=isas(), ids=str)
def kernels(request: pytest.FixtureRequest) -> Library:
    """Every instruction set of this machine."""
    return library(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((actual.double() - exact).abs().max() / exact.abs().max())


# ---- Linears --------------------------------------------------------------------------------------------------------

SHAPES = [(1, 64, 32), (1, 576, 70), (2, 40, 50), (7, 100, 33), (15, 33, 64), (16, 576, 96), (17, 1000, 40)]
LARGE_SHAPES = [(31, 96, 200), (33, 64, 32), (64, 640, 64), (127, 576, 33), (130, 1100, 70), (300, 832, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES + LARGE_SHAPES)
def test_linear_equals_a_float64_product(
    kernels: Library, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x, weight, bias = noise(1, rows, inputs, dtype=dtype), noise(2, outputs, inputs, dtype=dtype), noise(3, outputs)
    packed = PackedLinear(kernels, weight, bias)
    for num_threads in (1, 3):
        actual, _ = linear(kernels, ThreadPool(kernels, num_threads), x, packed)
        assert error(actual, x.double() @ weight.double().T + bias) < 1e-5


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (5, 200, 70), (33, 576, 64), (140, 1500, 40)])
def test_int8_linear_equals_the_product_of_its_quantised_operands(
    kernels: Library, rows: int, inputs: int, outputs: int
) -> None:
    x, weight = noise(1, rows, inputs, dtype=torch.bfloat16), noise(2, outputs, inputs)
    actual, _ = linear(kernels, ThreadPool(kernels), x, PackedLinear(kernels, weight, int8=True))

    def quantised(values: Tensor) -> Tensor:
        scale = values.float().abs().amax(dim=1, keepdim=True) / 127
        return (values.float() / scale).round().double() * scale

    # A value that lies on the edge between two steps may fall on either side of it.
    assert error(actual, quantised(x) @ quantised(weight).T) < 3e-3
    assert error(actual, x.double() @ weight.double().T) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_a_row_does_not_depend_on_how_many_rows_there_are(kernels: Library, dtype: torch.dtype, int8: bool) -> None:
    x = noise(1, 300, 832, dtype=dtype)
    packed = PackedLinear(kernels, noise(2, 96, 832, dtype=dtype), noise(3, 96), int8=int8)
    together, _ = linear(kernels, ThreadPool(kernels), x, packed)
    for (row, count), num_threads in itertools.product(((0, 1), (3, 5), (17, 20), (40, 64), (299, 33)), (1, 3)):
        first = min(row, 300 - count)
        alone, _ = linear(kernels, ThreadPool(kernels, num_threads), x[first : first + count], packed)
        assert torch.equal(alone[row - first], together[row])


def test_outputs_can_be_packed_in_another_order_with_gaps(kernels: Library) -> None:
    x, weight = noise(1, 3, 64), noise(2, 4, 64)
    packed = PackedLinear(kernels, weight, order=torch.tensor([40, 0, 17, 3]), num_outputs=48)
    actual, _ = linear(kernels, ThreadPool(kernels), x, packed)
    expected = torch.zeros(3, 48, dtype=torch.float64)
    expected[:, [40, 0, 17, 3]] = x.double() @ weight.double().T
    assert error(actual, expected) < 1e-5


def test_nan_stays_in_its_row(kernels: Library) -> None:
    for int8 in (False, True):
        x = noise(1, 40, 64, dtype=torch.bfloat16)
        x[7, 3] = torch.nan
        packed = PackedLinear(kernels, noise(2, 32, 64, dtype=torch.bfloat16), int8=int8)
        actual, _ = linear(kernels, ThreadPool(kernels), x, packed)
        assert torch.isnan(actual).any(dim=1).nonzero().flatten().tolist() == [7]


# ---- Attention ------------------------------------------------------------------------------------------------------


def attention(
    lib: Library,
    pool: Tensor,
    query: Tensor,
    parts: list[tuple[int, int, list[int]]],
    window: int,
) -> Tensor:
    """The kernel; `parts` are (start, num_new, blocks). `pool` is [blocks, 2, kv_heads, block_size, dim]."""
    _, _, kv_heads, block_size, dim = pool.shape
    tables = np.concatenate([np.array(blocks, np.int32) for *_, blocks in parts])
    begin = np.array([0, *itertools.accumulate(len(blocks) for *_, blocks in parts)][:-1], np.int32)
    starts, num_new = (np.array([part[i] for part in parts], np.int32) for i in (0, 1))
    step = StepDesc(
        num_tokens=len(query),
        num_seqs=len(parts),
        starts=starts.ctypes.data,
        num_new=num_new.ctypes.data,
        tables=tables.ctypes.data,
        table_begin=begin.ctypes.data,
    )
    out = torch.empty_like(query)
    lib.c.baton_attention(
        int(query.dtype == torch.bfloat16),
        pool.data_ptr(),
        query.data_ptr(),
        out.data_ptr(),
        query.shape[1],
        kv_heads,
        dim,
        block_size,
        window,
        1 / math.sqrt(dim),
        byref(step),
    )
    return out


def exact_attention(pool: Tensor, query: Tensor, parts: list[tuple[int, int, list[int]]], window: int) -> Tensor:
    _, _, kv_heads, _, dim = pool.shape
    outs, row = [], 0
    for start, num_new, blocks in parts:
        end = start + num_new
        key, value = (
            pool[blocks, half].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :end].double() for half in (0, 1)
        )
        group = query.shape[1] // kv_heads
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        scores = query[row : row + num_new].double().transpose(0, 1) @ key.transpose(1, 2) / math.sqrt(dim)
        positions, keys = torch.arange(start, end)[:, None], torch.arange(end)
        seen = (keys <= positions) & (keys > positions - (window or 1 << 30))
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
        row += num_new
    return torch.cat(outs)


ATTENTIONS = [
    # block size, dim, KV heads, group, window, (start, num_new) of each sequence
    (16, 64, 3, 3, 0, [(0, 5), (127, 1), (128, 1), (300, 40), (0, 1)]),
    (16, 128, 2, 2, 0, [(0, 130), (1, 1), (700, 1), (255, 2)]),
    (32, 32, 1, 8, 0, [(0, 70), (511, 1), (40, 17)]),
    (64, 64, 2, 1, 0, [(0, 64), (63, 2), (64, 1), (1000, 33)]),
    (256, 128, 1, 5, 0, [(0, 257), (513, 1)]),
    (48, 96, 2, 20, 0, [(3, 30), (95, 1), (96, 1)]),
    (16, 64, 1, 3, 20, [(0, 90), (19, 1), (20, 1), (400, 1), (400, 50)]),
    (32, 32, 2, 2, 300, [(0, 600), (301, 1), (900, 2)]),
    (16, 64, 2, 3, 50, [(100, 300), (1500, 40)]),  # a window much narrower than what is computed at once
    (16, 128, 1, 2, 0, [(1000, 300)]),
    (16, 256, 1, 2, 0, [(1000, 300), (1500, 1)]),
    (32, 160, 1, 3, 100, [(1100, 70), (300, 1)]),
    (16, 32, 64, 1, 0, [(200, 1)]),  # as many keys at once as there is room for
    (16, 128, 8, 2, 0, [(700, 1), (15, 1), (16, 1), (1023, 1)]),  # blocks so large that they are steps of their own
    (48, 128, 4, 2, 40, [(700, 1), (41, 1), (47, 1), (48, 1)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block_size", "dim", "kv_heads", "group", "window", "spans"), ATTENTIONS)
def test_attention_equals_a_float64_softmax_and_reads_only_its_own_tokens(
    kernels: Library,
    dtype: torch.dtype,
    block_size: int,
    dim: int,
    kv_heads: int,
    group: int,
    window: int,
    spans: list[tuple[int, int]],
) -> None:
    if kernels.isa is not isas()[0]:
        spans = spans[:3]
    counts = [-(-(start + num_new) // block_size) for start, num_new in spans]
    ids = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)).tolist()
    parts = [
        (start, num_new, [ids.pop() for _ in range(count)])
        for (start, num_new), count in zip(spans, counts, strict=True)
    ]
    pool = noise(1, sum(counts), 2, kv_heads, block_size, dim, dtype=dtype)
    query = noise(2, sum(n for _, n in spans), kv_heads * group, dim, dtype=dtype)
    for start, num_new, blocks in parts:  # what lies beyond a sequence must not matter, whatever it is
        used = start + num_new - (len(blocks) - 1) * block_size
        pool[blocks[-1], :, :, used:] = torch.nan
    actual = attention(kernels, pool, query, parts, window)
    # Probabilities are rounded to bfloat16 before they meet the values, and so is the result.
    assert error(actual, exact_attention(pool, query, parts, window)) < (
        1e-5 if dtype == torch.float32 else 2 * BF16_STEP
    )


@pytest.mark.parametrize("window", [0, 50, 300])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 2)])
def test_a_prompt_in_pieces_is_that_in_one_bit_for_bit(dim: int, group: int, window: int) -> None:
    kernels, length = library(), 1100
    pool = noise(1, 70, 2, 2, 16, dim, dtype=torch.bfloat16)
    query = noise(2, length, 2 * group, dim, dtype=torch.bfloat16) * 6  # maxima rise often
    blocks = list(range(70))
    whole = attention(kernels, pool, query, [(0, length, blocks)], window)
    for cuts in ((0, 7, 519, 1098, 1100), (0, 1024, 1100), (0, 511, 1026, 1100)):
        pieces = [
            attention(kernels, pool, query[start:end], [(start, end - start, blocks)], window)
            for start, end in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(("half", "number"), [(0, torch.nan), (1, torch.nan), (1, torch.inf)])
def test_a_broken_key_or_value_shows_in_all_that_see_it_and_in_no_other_sequence(half: int, number: float) -> None:
    kernels = library()
    for at in (0, 37, 599):
        pool = noise(1, 80, 2, 1, 16, 64, dtype=torch.bfloat16)
        pool[at // 16, half, 0, at % 16] = number
        query = noise(2, 1200, 2, 64, dtype=torch.bfloat16)
        parts = [(0, 600, list(range(40))), (0, 600, list(range(40, 80)))]
        actual = attention(kernels, pool, query, parts, 0)
        assert not actual[at:600].isfinite().any()
        assert actual[600:].isfinite().all()


def test_large_scores_do_not_overflow(kernels: Library) -> None:
    for dtype, (start, num_new) in itertools.product((torch.float32, torch.bfloat16), ((39, 1), (0, 40))):
        pool, query = noise(1, 3, 2, 1, 16, 64, dtype=dtype) * 40, noise(2, num_new, 2, 64, dtype=dtype) * 40
        parts = [(start, num_new, [2, 0, 1])]
        actual, exact = attention(kernels, pool, query, parts, 0), exact_attention(pool, query, parts, 0)
        assert error(actual, exact) < (1e-3 if dtype == torch.float32 else 4 * BF16_STEP)


# ---- The whole step -------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-odd-sizes": ("llama", {"hidden_size": 88, "intermediate_size": 100, "vocab_size": VOCAB_SIZE + 1}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = MODELS[request.param]
    return make_model(tmp_path_factory.mktemp(request.param), family, seed=4, **overrides)


def runner(directory: Path, backend: str = "fast", **arguments: Any) -> NativeRunner:
    return NativeRunner(directory, **({"num_blocks": 64, "backend": backend} | arguments))


def logprobs(model_runner: NativeRunner, forced: list[list[int]]) -> Tensor:
    """[steps, sequences, vocab_size] of a prefill in chunks and decodes that follow `forced`, all in one batch."""
    width = 64 // len(forced)
    steps = []
    prompts = [tokens[:-4] for tokens in forced]
    batch = [Driven(list(prompt), range(i * width, (i + 1) * width), ALL_LOGPROBS) for i, prompt in enumerate(prompts)]
    for step in range(4):
        while any(len(sequence.sampled) <= step for sequence in batch):
            run_step(model_runner, [sequence for sequence in batch if len(sequence.sampled) <= step], chunk=23)
        rows = torch.zeros(len(batch), VOCAB_SIZE + 1)
        for row, sequence in zip(rows, batch, strict=True):
            best = sequence.sampled[step].logprobs
            assert best is not None
            for token, value in best.top:
                row[token] = value
        steps.append(rows)
        for sequence, tokens in zip(batch, forced, strict=True):
            sequence.tokens[-1] = tokens[len(sequence.tokens) - 1]
    return torch.stack(steps)


FORCED = [random_prompt(seed, length) for seed, length in enumerate((80, 9, 133))]


def test_logits_are_those_of_the_reference(model: Path) -> None:
    library()
    expected = logprobs(runner(model, "reference"), FORCED)
    assert float((logprobs(runner(model), FORCED) - expected).abs().max()) < 1e-4


def test_bf16_logits_are_as_close_to_float32_as_the_references(model: Path) -> None:
    library()
    exact = logprobs(runner(model, "reference"), FORCED)
    fast, reference = (
        (logprobs(runner(model, backend, dtype="bfloat16"), FORCED) - exact).square().mean().sqrt()
        for backend in ("fast", "reference")
    )
    assert float(fast) < 1.2 * float(reference)


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa is not isas()[0]][-1:], ids=str)
def test_greedy_tokens_are_those_of_the_reference_on_another_instruction_set(
    model: Path, isa: Isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(isa)
    prompt = random_prompt(1, 60)
    expected = generate(runner(model, "reference"), prompt, 6)
    monkeypatch.setenv(ISA_VARIABLE, str(isa))
    assert generate(runner(model), prompt, 6) == expected


@pytest.mark.parametrize(("threads", "size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_threads_and_ranks_give_the_tokens_of_the_reference(
    model: Path, threads: int, size: int, tmp_path: Path
) -> None:
    library()
    prompt = random_prompt(2, 70)
    expected = generate(runner(model, "reference"), prompt, 8)
    if size == 1:
        assert generate(runner(model, num_threads=threads), prompt, 8) == expected
        return

    def work(comm: ShmComm) -> list[int] | None:
        mine = runner(model, comm=comm, num_threads=threads)
        if comm.rank:
            mine.follow()
            return None
        tokens = list(prompt)
        for step in range(8):
            done = 0 if step == 0 else len(tokens) - 1
            sample_spec = SampleSpec(GREEDY, len(tokens))
            entry = BatchEntry(AttemptId("a"), done, tokens[done:], range(8), sample_spec)
            (sampled,) = mine.run_all(StepPlan(step, [entry]))
            assert sampled is not None
            tokens.append(sampled.token_id)
        mine.close()
        return tokens[len(prompt) :]

    # Slots smaller than a batch: sums are cut in pieces.
    assert run_ranks(tmp_path, size, work, slot_bytes=4096, leave_together=True)[0] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model_gives_the_tokens_of_the_reference(dtype: str) -> None:
    library()
    prompts = [[token % 1000 + 3 for token in random_prompt(length, length)] for length in (1, 16, 100, 257)]
    reference, fast = (runner(DEMO_MODEL, backend, dtype=dtype) for backend in ("reference", "fast"))
    assert [generate(fast, prompt, 24) for prompt in prompts] == [generate(reference, prompt, 24) for prompt in prompts]


def test_int8_is_close_to_bf16_on_the_demo_model() -> None:
    library()
    prompt = list(range(3, 120))
    exact, int8 = (
        logprobs_of_prompt(runner(DEMO_MODEL, dtype="bfloat16", quantization=quantization), prompt)
        for quantization in (None, "int8")
    )
    assert float((exact.exp() * (exact - int8)).sum(-1).mean()) < 0.02  # Kullback-Leibler divergence, nats per token


def logprobs_of_prompt(model_runner: NativeRunner, prompt: list[int]) -> Tensor:
    """[tokens, vocab_size] after each token of a prompt, fed one by one."""
    vocab = model_runner.config.vocab_size
    params = SamplingParams(temperature=0, num_logprobs=vocab)
    rows = torch.zeros(len(prompt), vocab)
    for position, token in enumerate(prompt):
        entry = BatchEntry(AttemptId("a"), position, [token], range(16), SampleSpec(params, position + 1))
        (sampled,) = model_runner.run(StepPlan(position, [entry]))
        assert sampled is not None
        assert sampled.logprobs is not None
        for candidate, value in sampled.logprobs.top:
            rows[position, candidate] = value
    return rows


def test_a_layers_kv_is_in_the_pool_when_the_hook_is_called(model: Path) -> None:
    library()
    mine = runner(model)
    layers = len(mine.layout.model.layers)
    seen: list[tuple[int, bool]] = []

    class Hook:
        def step_begin(self, plan: StepPlan) -> None:
            seen.append((-1, True))

        def layer_done(self, layer: int, ready: object | None) -> None:
            begin = mine.layout.block_offset(layer, 2)
            written = any(mine.kv_buffer()[begin : begin + mine.layout.block_bytes(layer)])
            after = layer + 1 < layers and any(
                mine.kv_buffer()[(at := mine.layout.block_offset(layer + 1, 2)) : at + mine.layout.block_bytes(layer)]
            )
            seen.append((layer, written and not after and ready is None))

        def step_done(self) -> None:
            seen.append((layers, True))

    entry = BatchEntry(AttemptId("a"), 0, random_prompt(1, 12), [2], SampleSpec(GREEDY, 12))
    mine.run(StepPlan(0, [entry]), Hook())
    assert seen == [(index, True) for index in range(-1, layers + 1)]


def test_a_sequence_whose_numbers_break_down_is_named(model: Path) -> None:
    library()
    mine = runner(model)
    for params in (GREEDY, ALL_LOGPROBS):
        good, bad = (
            BatchEntry(AttemptId(name), 0, random_prompt(1, 20), blocks, SampleSpec(params, 20))
            for name, blocks in (("good", [0, 1]), ("bad", [2, 3]))
        )
        mine.run(StepPlan(0, [good, bad]))
        begin = mine.layout.block_offset(0, 2)
        mine.kv_buffer()[begin : begin + mine.layout.block_bytes(0)] = b"\xff" * mine.layout.block_bytes(0)  # NaN
        decodes = [
            BatchEntry(AttemptId(name), 20, [5], blocks, SampleSpec(params, 21))
            for name, blocks in (("good", [0, 1]), ("bad", [2, 3]))
        ]
        with pytest.raises(StepFailed) as caught:
            mine.run(StepPlan(1, decodes))
        assert caught.value.attempt_ids == ("bad",)
        (sampled,) = mine.run(StepPlan(2, decodes[:1]))
        assert sampled is not None


def test_the_first_of_equal_logits_is_chosen_over_threads_and_ranks() -> None:
    shard = np.array([[3.0, 1.0], [2.5, -np.inf]])  # rows of (index, value)
    best = _merged([np.stack((shard[0], [2.5, -1.0])), np.stack(([0.0, 4.0], [2.5, np.nan]))], rows_per_rank=100)
    assert best.token_ids.tolist() == [3, 104]
    assert best.logits[0] == 2.5
    assert np.isnan(best.logits[1])


def test_greedy_takes_the_first_of_equal_logits(tmp_path: Path) -> None:
    library()
    make_model(tmp_path, "llama", seed=1, dtype="bfloat16")
    fast, reference = runner(tmp_path, dtype="bfloat16"), runner(tmp_path, "reference", dtype="bfloat16")
    prompt = random_prompt(3, 40)
    assert generate(fast, prompt, 12) == generate(reference, prompt, 12)
    row = torch.zeros(1, 50)
    row[0, [7, 20]] = 3.0
    assert sample(row, [SampleSpec(GREEDY, 0)])[0].token_id == 7


# ---- Ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2), (torch.bfloat16, 3)], ids=str)
def test_all_reduce_gives_the_bits_of_the_python_one(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    lib = library()

    def work(comm: ShmComm) -> tuple[list[Tensor], list[Tensor]]:
        group = _Group(comm)
        ours, theirs = [], []
        for index, count in enumerate((1, 15, 16, 1000, 5000)):
            mine = noise(10 * index + comm.rank, count, dtype=dtype)
            theirs.append(mine.clone())
            comm.all_reduce(theirs[-1])
            group.begin()
            assert lib.c.baton_all_reduce(byref(group.desc), mine.data_ptr(), count, int(dtype == torch.bfloat16)) == 0
            group.end()
            ours.append(mine)
        return ours, theirs

    for ours, theirs in run_ranks(tmp_path, size, work, slot_bytes=4096, leave_together=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_rank_that_leaves_ends_the_others_wait(tmp_path: Path) -> None:
    lib = library()

    def work(comm: ShmComm) -> str:
        if comm.rank == 1:
            comm.close()
            return "left"
        group = _Group(comm)
        group.begin()
        data = torch.ones(64)
        status = lib.c.baton_all_reduce(byref(group.desc), data.data_ptr(), 64, 0)
        assert status != 0
        assert isinstance(group.lost, PeerLost)
        return "noticed"

    assert run_ranks(tmp_path, 2, work) == ["noticed", "left"]


# ---- What a process has to live with --------------------------------------------------------------------------------


def test_block_tables_are_read_anew_when_they_change() -> None:
    cache = _TableCache(max_positions=4096, block_size=16, num_blocks=1000)

    def table(entry: BatchEntry, row: int) -> list[int]:
        values = (ctypes.c_int32 * cache.width).from_address(cache.address + 4 * row * cache.width)
        return list(values)[: len(entry.block_table)]

    entries = [BatchEntry(AttemptId(f"a{i}"), 0, [1], [i, i + 1]) for i in range(200)]
    for _ in range(2):
        assert [table(e, row) for e, row in zip(entries, cache.rows(entries), strict=True)] == [
            [i, i + 1] for i in range(200)
        ]
    grown = [BatchEntry(AttemptId("a5"), 0, [1], list(range(150))), BatchEntry(AttemptId("b"), 0, [1], (9,))]
    assert [table(e, row) for e, row in zip(grown, cache.rows(grown), strict=True)] == [list(range(150)), [9]]
    changed = [BatchEntry(AttemptId("a5"), 0, [1], [*range(149), 7])]
    assert table(changed[0], cache.rows(changed)[0]) == [*range(149), 7]
    for name in range(1000):  # sequences come and go
        entry = BatchEntry(AttemptId(f"c{name}"), 0, [1], [name])
        assert table(entry, cache.rows([entry])[0]) == [name]
    with pytest.raises(ValueError, match="outside"):
        cache.rows([BatchEntry(AttemptId("d"), 0, [1], [1000])])


def test_closed_runners_leave_no_memory_mapped_and_no_thread() -> None:
    lib = library()

    def mapped_and_threads() -> tuple[int, int]:
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmSize"].split()[0]), int(status["Threads"])

    def use() -> None:
        mine = runner(DEMO_MODEL, dtype="bfloat16", num_threads=2)
        generate(mine, list(range(3, 60)), 3)
        mine.close()
        mine.close()
        Memory(lib, 2**22)

    use()
    use()
    before = mapped_and_threads()
    for _ in range(5):
        use()
    after = mapped_and_threads()
    assert after[1] == before[1]
    assert after[0] - before[0] < 4096  # KiB; one runner maps more than 8 MiB


def test_without_a_compiler_plain_torch_computes_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native_build.find_compiler.cache_clear()
    try:
        with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler"):
            build.built(Isa.PORTABLE)
    finally:
        native_build.find_compiler.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, "off")
    with caplog.at_level("WARNING"):
        mine = runner(DEMO_MODEL, "auto", dtype="bfloat16")
    assert [record.message for record in caplog.records] == ["no fast CPU kernels; plain torch computes, slower"]
    assert len(generate(mine, [5, 6, 7], 3)) == 3
    with pytest.raises(KernelsUnavailable, match="off"):
        runner(DEMO_MODEL, "fast")


def test_a_source_that_does_not_compile_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "kernels.cpp").write_text("this is no C++")
    with pytest.raises(KernelsUnavailable, match="can not compile"):
        build.built(Isa.PORTABLE)
    assert list((tmp_path / "cache" / "baton" / "kernels").glob("*.so")) == []
