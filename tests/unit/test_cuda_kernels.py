"""Each Triton kernel agrees with the plain torch reference, in the interpreter where there is no CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.triton_device import DEVICE  # isort: skip  (before the kernels)

from baton.request import AttemptId, SamplingParams
from engine.attention.reference import ReferenceAttention
from engine.cuda.kernels.attention import decode_attention, prefill_attention, prefill_rows
from engine.cuda.kernels.fused import add_rms_norm, silu_mul, write_qkv
from engine.cuda.kernels.sampling import choose_tokens
from engine.kv_pool import FP8
from engine.layers.norm import rms_norm
from engine.layers.rope import rotate
from engine.sampler import noise_key, sample
from engine.types import BatchEntry, SampleSpec

DTYPES = (torch.float32, torch.bfloat16)
POOL_DTYPES = (*DTYPES, FP8)  # queries of a pool in fp8 are bfloat16


class TensorPool:
    """One layer of random KV; slots that no sequence owns hold NaN."""

    def __init__(self, num_blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype) -> None:
        self.kv = torch.full((num_blocks, 2, kv_heads, block_size, dim), float("nan")).to(dtype)

    def layer(self, layer: int) -> Tensor:
        """See KVPool."""
        return self.kv


@dataclass
class Batch:
    """Sequences with `lengths` tokens each, of which the last `new` are this step's."""

    kv_scales: tuple[float, float]
    pool: TensorPool
    entries: list[BatchEntry]
    query: Tensor
    tables: Tensor
    table_begin: Tensor

    @staticmethod
    def make(
        spans: list[tuple[int, int]], *, heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
    ) -> Batch:
        """`spans`: (tokens before the step, new tokens) of each sequence."""
        torch.manual_seed(sum(start * 7 + new for start, new in spans) + heads + dim + block_size)
        counts = [-(-(start + new) // block_size) for start, new in spans]
        order = (torch.randperm(sum(counts)) + 1).tolist()  # block 0 is nobody's
        pool = TensorPool(sum(counts) + 1, kv_heads, block_size, dim, dtype)
        entries, begins, begin = [], [], 0
        for index, ((start, new), count) in enumerate(zip(spans, counts, strict=True)):
            table = order[begin : begin + count]
            for position in range(start + new):
                slot = pool.kv[table[position // block_size], :, :, position % block_size]
                slot.copy_(torch.randn(slot.shape))
            entries.append(BatchEntry(AttemptId(str(index)), start, [0] * new, table))
            begins.append(begin)
            begin += count
        is_fp8 = dtype == FP8
        query = torch.randn(sum(new for _, new in spans), heads, dim).to(torch.bfloat16 if is_fp8 else dtype)
        return Batch((0.6, 1.7) if is_fp8 else (1.0, 1.0), pool, entries, query, ints(order), ints(begins))

    def expected(self, window: int | None) -> Tensor:
        pool = self.pool
        if pool.kv.dtype == FP8:
            pool = TensorPool(0, 0, 0, 0, torch.float32)
            pool.kv = self.pool.kv.float() * torch.tensor(self.kv_scales).view(2, 1, 1, 1)
        reference = ReferenceAttention(pool, (window,))
        reference.begin_step(self.entries)
        return reference.attend(0, self.query.to(pool.kv.dtype)).to(self.query.dtype)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "num_splits", "window"),
    [
        (4, 4, 64, 16, 1, None),
        (4, 2, 128, 16, 4, None),
        (6, 2, 64, 64, 2, None),  # a group of three
        (8, 1, 128, 64, 8, None),
        (4, 2, 64, 16, 4, 40),
        (2, 1, 96, 16, 2, None),  # a head size that is no power of two
    ],
)
def test_decode_attention_is_the_references(
    heads: int, kv_heads: int, dim: int, block_size: int, num_splits: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 200]  # around edges of blocks, of tiles and of splits
    batch = Batch.make(
        [(length - 1, 1) for length in lengths],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        block_size=block_size,
        dtype=dtype,
    )
    starts = ints([*(entry.start for entry in batch.entries), -1])  # the last row is padding
    query = torch.cat((batch.query, batch.query[:1])).to(DEVICE)
    actual = torch.full_like(query, float("nan"))
    decode_attention(
        query,
        batch.pool.kv.to(DEVICE),
        starts,
        batch.tables,
        torch.cat((batch.table_begin, batch.table_begin[:1])),
        window=window,
        num_splits=num_splits,
        out=actual,
        kv_scales=batch.kv_scales,
    )
    close(actual[:-1], batch.expected(window))
    assert not actual[-1].any()


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "window"),
    [(2, 2, 64, 16, None), (6, 2, 64, 16, None), (8, 2, 128, 64, None), (4, 1, 64, 16, 30), (2, 1, 96, 64, None)],
)
def test_prefill_attention_is_the_references(
    heads: int, kv_heads: int, dim: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    spans = [(0, 17), (16, 40), (63, 2), (100, 33)]  # fresh, behind a whole block, over an edge, behind a long prefix
    batch = Batch.make(spans, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype)
    each = prefill_rows(heads // kv_heads, dim, batch.query.dtype) // (heads // kv_heads)
    tiles = [(seq, first) for seq, (_, new) in enumerate(spans) for first in range(0, new, each)]
    rows = [sum(new for _, new in spans[:seq]) for seq in range(len(spans))]
    out = torch.full_like(batch.query, float("nan")).to(DEVICE)
    prefill_attention(
        batch.query.to(DEVICE),
        batch.pool.kv.to(DEVICE),
        (ints([seq for seq, _ in tiles]), ints([first for _, first in tiles])),
        (ints(rows), ints([start for start, _ in spans]), ints([new for _, new in spans])),
        batch.tables,
        batch.table_begin,
        window=window,
        out=out,
        kv_scales=batch.kv_scales,
    )
    close(out, batch.expected(window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "has_norm"),
    [(4, 4, 64, 16, False), (6, 2, 128, 64, True), (5, 1, 64, 16, True), (2, 2, 96, 16, False)],
)
def test_qkv_is_normed_rotated_and_written_as_the_reference_does(
    heads: int, kv_heads: int, dim: int, block_size: int, has_norm: bool, dtype: torch.dtype
) -> None:
    spans = [(0, 5), (14, 4), (block_size, 1)]
    batch = Batch.make(spans, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype)
    num_tokens = len(batch.query)
    qkv = torch.randn(num_tokens + 1, (heads + 2 * kv_heads) * dim).to(dtype)  # the last token is padding
    norms = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if has_norm else None
    angles = torch.rand(200, dim // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1).to(dtype)
    positions = [p for start, new in spans for p in range(start, start + new)]
    pool = batch.pool.kv.to(DEVICE, copy=True)
    keys = torch.full((num_tokens + 1, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    query = write_qkv(
        qkv.to(DEVICE),
        pool,
        None if norms is None else (norms[0].to(DEVICE), norms[1].to(DEVICE)),
        cos_sin.to(DEVICE),
        ints([*positions, -1]),
        ints([*(seq for seq, (_, new) in enumerate(spans) for _ in range(new)), 0]),
        batch.tables,
        batch.table_begin,
        eps=1e-6,
        keys=keys,
    )

    split = qkv[:num_tokens].view(num_tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    expected_query, key, value = split
    if norms is not None:
        expected_query, key = rms_norm(expected_query, norms[0], 1e-6), rms_norm(key, norms[1], 1e-6)
    cos, sin = (torch.cat((half, half), -1)[:, None] for half in cos_sin[torch.tensor(positions)].unbind(1))
    reference = ReferenceAttention(batch.pool, (None,))
    reference.begin_step(batch.entries)
    reference.write_kv(0, rotate(key, cos, sin), value)
    close(query[:num_tokens], rotate(expected_query, cos, sin))
    close(keys[:num_tokens], rotate(key, cos, sin))
    assert torch.equal(pool.cpu().isnan(), batch.pool.kv.isnan())  # nothing else was written
    close(pool.nan_to_num(), batch.pool.kv.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 96, 300])
def test_residual_and_norm_are_the_references(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    hidden, delta, weight = (torch.randn(3, size).to(dtype), torch.randn(3, size).to(dtype), torch.rand(size).to(dtype))
    on_device = hidden.to(DEVICE, copy=True)
    actual = add_rms_norm(on_device, delta.to(DEVICE), weight.to(DEVICE), 1e-5)
    close(on_device, hidden + delta)  # the interpreter cuts bfloat16 off instead of rounding it
    close(actual, rms_norm(hidden + delta, weight, 1e-5))
    close(add_rms_norm(hidden.to(DEVICE), None, weight.to(DEVICE), 1e-5), rms_norm(hidden, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [48, 1100])
def test_silu_mul_is_the_references(size: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(2, 2 * size).to(dtype)
    gate, up = gate_up.chunk(2, -1)
    close(silu_mul(gate_up.to(DEVICE)), torch.nn.functional.silu(gate) * up)


def chosen(logits: Tensor, specs: list[SampleSpec]) -> tuple[list[int], list[float]]:
    keys = [noise_key(spec.params.seed, spec.params.sample_index, spec.position) for spec in specs]
    temperatures = [spec.params.temperature for spec in specs]
    tokens = torch.full((len(specs),), -1, dtype=torch.int32, device=DEVICE)
    highest = torch.empty(len(specs), device=DEVICE)
    choose_tokens(
        logits.to(DEVICE),
        torch.tensor(keys, device=DEVICE),
        torch.tensor(temperatures, dtype=torch.float64, device=DEVICE),
        tokens,
        highest,
    )
    return tokens.tolist(), highest.tolist()


@pytest.mark.parametrize("vocab", [300, 2048, 5000])
def test_tokens_chosen_on_the_device_are_the_samplers(vocab: int) -> None:
    torch.manual_seed(vocab)
    specs = [
        SampleSpec(SamplingParams(temperature=temperature, seed=seed), position)
        for temperature, seed, position in [(0.0, 0, 5), (1.0, 1, 7), (0.7, 2**63 + 9, 0), (3.0, 4, 1000), (0.0, 1, 1)]
    ]
    logits = torch.randn(len(specs), vocab) * 3
    logits[4, 3] = logits[4, vocab - 2] = 50.0  # of equals the first
    tokens, highest = chosen(logits, specs)
    assert tokens == [sampled.token_id for sampled in sample(logits, specs)]
    assert highest == logits.max(-1).values.tolist()


def test_rows_that_are_not_finite_are_told_apart_and_name_a_token_that_exists() -> None:
    logits = torch.randn(5, 3000)
    logits[0, 2999] = float("nan")
    logits[1, 1] = float("inf")
    logits[2] = float("-inf")
    logits[3, 7] = float("-inf")
    tokens, highest = chosen(logits, [SampleSpec(SamplingParams(temperature=t), 1) for t in (0, 0, 0, 0, 1.0)])
    assert [torch.isfinite(torch.tensor(value)).item() for value in highest] == [False, False, False, True, True]
    assert all(0 <= token < 3000 for token in tokens)
