"""The kernels on a real GPU at serving sizes, beside the reference in plain torch on the same device.

`tests/unit/test_cuda_kernels.py` runs its own, smaller matrix on the GPU too, where there is one.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from baton.request import AttemptId, SamplingParams
from engine.attention.reference import ReferenceAttention
from engine.cuda.kernels.attention import decode_attention, prefill_attention, prefill_rows
from engine.cuda.kernels.sampling import choose_tokens
from engine.kv_pool import FP8
from engine.sampler import noise_key, sample
from engine.types import BatchEntry, SampleSpec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device("cuda")
POOL_DTYPES = (torch.bfloat16, torch.float32, FP8)  # queries of a pool in fp8 are bfloat16


class Pool:
    """One layer of random KV in shuffled blocks; the rest is NaN."""

    def __init__(self, spans: list[tuple[int, int]], kv_heads: int, block_size: int, dim: int, dtype: torch.dtype):
        counts = [-(-(start + new) // block_size) for start, new in spans]
        order = (torch.randperm(sum(counts)) + 1).tolist()
        self.kv = torch.full((sum(counts) + 1, 2, kv_heads, block_size, dim), float("nan"), device=CUDA).to(dtype)
        self.entries, begins, begin = [], [], 0
        for index, ((start, new), count) in enumerate(zip(spans, counts, strict=True)):
            table = order[begin : begin + count]
            end = start + new
            for place, block in enumerate(table):
                filled = min(block_size, end - place * block_size)
                self.kv[block, :, :, :filled] = torch.randn(2, kv_heads, filled, dim, device=CUDA).to(dtype)
            self.entries.append(BatchEntry(AttemptId(str(index)), start, [0] * new, table))
            begins.append(begin)
            begin += count
        self.tables, self.begins = ints(order), ints(begins)

    def layer(self, layer: int) -> torch.Tensor:
        """See KVPool."""
        return self.kv

    def expected(self, query: torch.Tensor, window: int | None) -> torch.Tensor:
        """What the oracle computes, in float32."""
        pool = Pool.__new__(Pool)
        pool.kv = self.kv.float()
        reference = ReferenceAttention(pool, (window,))
        reference.begin_step(self.entries)
        return reference.attend(0, query.float())


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=CUDA)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by norms; NaN is no number that is less than anything."""
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(32, 8, 128, None), (40, 40, 128, None), (14, 2, 64, None), (32, 8, 128, 512)],
)
@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_decode(
    heads: int, kv_heads: int, dim: int, window: int | None, block_size: int, num_splits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads + num_splits)
    pool = Pool([(length, 1) for length in (0, 1, 63, 64, 65, 511, 640, 1023, 3000)], kv_heads, block_size, dim, dtype)
    query = torch.randn(len(pool.entries), heads, dim, device=CUDA).to(torch.bfloat16 if dtype == FP8 else dtype)
    out = torch.full_like(query, float("nan"))
    starts = ints([entry.start for entry in pool.entries])
    decode_attention(query, pool.kv, starts, pool.tables, pool.begins, window=window, num_splits=num_splits, out=out)
    assert error(out, pool.expected(query, window)) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(32, 8, 128, None), (40, 40, 128, None), (14, 2, 64, None), (32, 8, 128, 300)],
)
def test_prefill(heads: int, kv_heads: int, dim: int, window: int | None, block_size: int, dtype: torch.dtype) -> None:
    spans = [(0, 1000), (512, 513), (777, 2), (2048, 300)]
    pool = Pool(spans, kv_heads, block_size, dim, dtype)
    num_tokens = sum(new for _, new in spans)
    query = torch.randn(num_tokens, heads, dim, device=CUDA).to(torch.bfloat16 if dtype == FP8 else dtype)
    each = prefill_rows(heads // kv_heads, dim, query.dtype) // (heads // kv_heads)
    tiles = [(seq, first) for seq, (_, new) in enumerate(spans) for first in range(0, new, each)]
    rows = [sum(new for _, new in spans[:seq]) for seq in range(len(spans))]
    out = torch.full_like(query, float("nan"))
    prefill_attention(
        query,
        pool.kv,
        (ints([seq for seq, _ in tiles]), ints([first for _, first in tiles])),
        (ints(rows), ints([start for start, _ in spans]), ints([new for _, new in spans])),
        pool.tables,
        pool.begins,
        window=window,
        out=out,
    )
    assert error(out, pool.expected(query, window)) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_draws_over_a_large_vocabulary_are_the_hosts() -> None:
    specs = [SampleSpec(SamplingParams(temperature=0.9, seed=row), row) for row in range(32)]
    logits = torch.randn(32, 151936) * 2
    chosen, highest = torch.empty(32, dtype=torch.int32, device=CUDA), torch.empty(32, device=CUDA)
    keys = [noise_key(spec.params.seed, spec.params.sample_index, spec.position) for spec in specs]
    temperatures = torch.full((32,), 0.9, dtype=torch.float64, device=CUDA)
    choose_tokens(logits.to(CUDA), torch.tensor(keys, device=CUDA), temperatures, chosen, highest)
    assert chosen.tolist() == [sampled.token_id for sampled in sample(logits, specs)]
