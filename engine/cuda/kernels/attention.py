"""Paged attention over the canonical KV layout: one kernel for decodes (split over the context) and prompt chunks.

Online softmax over tiles of the context (Dao 2023, arXiv:2307.08691); the context of a decode is split over programs
whose parts a second kernel adds up ("Flash-Decoding", Dao et al. 2023). The query heads that share a KV head are rows
of one tile, so that each byte of KV is read once:

    row r of a tile = new token r // GROUP of the tile, query head kv_head * GROUP + r % GROUP
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kv_pool import FP8

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_kernel(
    query,  # [num_tokens, heads, HEAD_DIM]
    pool,  # one layer: [num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    out,  # like query
    sums,  # [num_seqs, NUM_SPLITS, heads, HEAD_DIM] float32: weighted values, where NUM_SPLITS > 1
    scales,  # [2, num_seqs, NUM_SPLITS, heads] float32: the maximum, and the sum of weights relative to it
    tile_seq,  # [num_tiles]: which sequence
    tile_begin,  # [num_tiles]: its first new token in this tile
    seq_begin,  # [num_seqs]: row of the sequence's first new token
    seq_start,  # [num_seqs]: position of its first new token; negative: the sequence does not exist
    seq_new,  # [num_seqs]: how many new tokens
    tables,  # block tables, one after the other
    table_begin,  # [num_seqs]: where in `tables` a sequence's begins
    scale,  # of the scores, for powers of two; that of stored keys included
    value_scale,  # of stored values
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    NUM_SPLITS: tl.constexpr,
    IS_DECODE: tl.constexpr,  # one new token per sequence: tile i is sequence i is row i
    DOT_DTYPE: tl.constexpr,  # of both operands of products
):
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    if IS_DECODE:
        seq = tl.program_id(0)
        first_new, first_row, num_new = 0, seq, 1
    else:
        tile = tl.program_id(0)
        seq = tl.load(tile_seq + tile)
        first_new = tl.load(tile_begin + tile)
        first_row = tl.load(seq_begin + seq) + first_new
        num_new = tl.load(seq_new + seq)
    start = tl.load(seq_start + seq)
    blocks = tables + tl.load(table_begin + seq)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = start + first_new + token
    is_row = (token < TOKENS) & (first_new + token < num_new) & (start >= 0)
    is_dim = dim < HEAD_DIM
    row_of = (first_row + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    at = row_of[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + at, mask=is_row[:, None] & is_dim[None, :], other=0.0)
    q = q.to(DOT_DTYPE)

    # Keys of this tile: [low, high), from which this split takes a run of whole tiles.
    high = tl.minimum(start + num_new, start + first_new + TOKENS)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(start + first_new - WINDOW + 1, 0) // KEYS * KEYS
    run = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), KEYS), NUM_SPLITS) * KEYS
    begin = low + split * run
    end = tl.minimum(begin + run, high)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
    HALF: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM  # values follow a block's keys at this distance
    for first_key in range(begin, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(blocks + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = block * (2 * HALF) + (kv_head * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        # Slots beyond the sequence may hold NaN, which no weight of zero removes: they are not read.
        is_read = is_key[:, None] & is_dim[None, :]
        k = tl.load(pool + slot[:, None] + dim[None, :], mask=is_read, other=0.0)
        v = tl.load(pool + slot[:, None] + (HALF + dim)[None, :], mask=is_read, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee") * scale
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen so far: no difference of infinities
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 1)
        part = tl.dot(weights.to(DOT_DTYPE), v.to(DOT_DTYPE), input_precision="ieee")
        acc = acc * shrink[:, None] + part
        best = new_best

    acc = acc * value_scale
    if NUM_SPLITS == 1:
        value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        keep = (token < TOKENS) & (first_new + token < num_new)  # rows of absent sequences become zeros
        tl.store(out + at, value.to(out.dtype.element_ty), mask=keep[:, None] & is_dim[None, :])
    else:  # decodes only: token 0 is the only one
        part_of = (seq * NUM_SPLITS + split).to(tl.int64) * (KV_HEADS * GROUP) + head
        is_head = token < 1
        tl.store(sums + part_of[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_head[:, None] & is_dim[None, :])
        num_parts = tl.num_programs(0).to(tl.int64) * (NUM_SPLITS * KV_HEADS * GROUP)
        tl.store(scales + part_of, best, mask=is_head)
        tl.store(scales + num_parts + part_of, total, mask=is_head)


@triton.jit
def _reduce_kernel(
    sums,
    scales,
    out,  # [num_seqs, HEADS, HEAD_DIM]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIM_PAD)
    is_dim = dim < HEAD_DIM
    part = (seq * NUM_SPLITS + tl.arange(0, NUM_SPLITS)) * HEADS + head
    best = tl.load(scales + part)
    total = tl.load(scales + tl.num_programs(0).to(tl.int64) * (NUM_SPLITS * HEADS) + part)
    highest = tl.max(best, 0)
    weight = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    acc = tl.load(sums + part[:, None] * HEAD_DIM + dim[None, :], mask=is_dim[None, :], other=0.0)
    whole = tl.sum(weight * total, 0)
    value = tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + (seq * HEADS + head) * HEAD_DIM + dim, value.to(out.dtype.element_ty), mask=is_dim)


_IS_INTERPRETED = not isinstance(_attend_kernel, triton.JITFunction)


def _dot_dtype(query: torch.dtype, pool: torch.dtype) -> tl.dtype:
    """fp8 becomes float16 in one instruction, bfloat16 in three. The interpreter multiplies bfloat16 as integers."""
    if _IS_INTERPRETED or query == torch.float32:
        return tl.float32
    return tl.float16 if pool == FP8 else tl.bfloat16


def decode_attention(
    query: Tensor,
    pool: Tensor,
    starts: Tensor,
    tables: Tensor,
    table_begin: Tensor,
    *,
    window: int | None,
    num_splits: int,
    out: Tensor,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Attention of one new token per sequence, [num_seqs, heads, head_dim], into `out`, which is like it.

    `pool` is a layer, [num_blocks, 2, kv_heads, block_size, head_dim], in the dtype of `query` or in fp8; its keys and
    values are what is stored times `kv_scales`. `starts` [num_seqs] int32 the tokens' positions,
    negative for a row that is only padding, whose result is zero; `tables` int32 all block tables, of which sequence
    s has its own from `table_begin[s]` on. `num_splits` is a power of two; the grid does not depend on the context, so
    a CUDA graph may hold the launch.
    """
    num_seqs, heads, dim = query.shape
    split = (num_seqs, num_splits, heads)
    is_split = num_splits > 1
    sums = torch.empty((*split, dim) if is_split else 0, dtype=torch.float32, device=query.device)
    scales = torch.empty((2, *split) if is_split else 0, dtype=torch.float32, device=query.device)
    group = heads // pool.shape[2]
    _launch(
        (num_seqs, pool.shape[2], num_splits),
        (query, pool, out, sums, scales, starts, starts, starts, starts, starts, tables, table_begin),
        rows=max(16, triton.next_power_of_2(group)),
        keys=min(64, 8192 // triton.next_power_of_2(dim)),
        window=window,
        num_splits=num_splits,
        is_decode=True,
        kv_scales=kv_scales,
        num_warps=4,
    )
    if is_split:
        _reduce_kernel[(num_seqs, heads)](sums, scales, out, heads, dim, triton.next_power_of_2(dim), num_splits)


def prefill_rows(group: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile of `prefill_attention`, which holds `prefill_rows // group` tokens.

    In float32 the products are made without tensor cores, of which each thread can hold few.
    """
    is_small = _IS_INTERPRETED or dtype == torch.float32
    return max(32 if is_small else 64 if head_dim > 128 else 128, triton.next_power_of_2(group))


def prefill_attention(
    query: Tensor,
    pool: Tensor,
    tiles: tuple[Tensor, Tensor],
    seqs: tuple[Tensor, Tensor, Tensor],
    tables: Tensor,
    table_begin: Tensor,
    *,
    window: int | None,
    out: Tensor,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Causal attention of prompt chunks over all KV of their sequences, cached prefixes included, into `out`.

    `query` and `out` are [num_tokens, heads, head_dim]. `tiles`: for each tile of `prefill_rows` rows its sequence and
    the first of the sequence's new tokens in it. `seqs`: per sequence the row of its first new token, that token's
    position, and how many there are. All int32. The rest is as in `decode_attention`.
    """
    heads, dim = query.shape[1:]
    _launch(
        (len(tiles[0]), pool.shape[2], 1),
        (query, pool, out, out, out, *tiles, *seqs, tables, table_begin),
        rows=prefill_rows(heads // pool.shape[2], dim, query.dtype),
        keys=min(64, 8192 // triton.next_power_of_2(dim)),
        window=window,
        num_splits=1,
        is_decode=False,
        kv_scales=kv_scales,
        num_warps=8,
    )


def _launch(
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    *,
    rows: int,
    keys: int,
    window: int | None,
    num_splits: int,
    is_decode: bool,
    kv_scales: tuple[float, float],
    num_warps: int,
) -> None:
    query, pool = tensors[:2]
    kv_heads, block_size, dim = pool.shape[2:]
    _attend_kernel[grid](
        *tensors,
        _LOG2_E / math.sqrt(dim) * kv_scales[0],
        kv_scales[1],
        kv_heads,
        query.shape[1] // kv_heads,
        dim,
        triton.next_power_of_2(dim),
        block_size,
        rows,
        keys,
        window or 0,
        num_splits,
        is_decode,
        _dot_dtype(query.dtype, pool.dtype),
        num_warps=num_warps,
    )
