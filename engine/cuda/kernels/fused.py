"""What a layer does between its products, fused: residual add and norm, QK-norm and RoPE and KV write, SiLU-mul.

Each rounds where engine.models.decoder does, so that the two differ by the order of sums only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kv_pool import FP8

LARGEST = tl.constexpr(448.0)
"""The largest number in fp8 (e4m3)."""
SMALLEST = tl.constexpr(1e-12)
"""A row's largest number is taken for no less, so that a row of zeros has a scale, too."""


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    return value.to(dtype).to(tl.float32)


@triton.jit
def _saturated(value, dtype: tl.constexpr):
    """float32 in fp8: what is too large becomes the largest number, and only NaN becomes NaN."""
    value = tl.where(value > LARGEST, LARGEST, value)
    return tl.where(value < -LARGEST, -LARGEST, value).to(dtype)


@triton.jit
def _quantised(row, dtype: tl.constexpr):
    """A row of float32 in fp8, its largest at 448, and what multiplies it."""
    scale = tl.maximum(tl.max(tl.abs(row), 0), SMALLEST) / LARGEST
    return _saturated(row / scale, dtype), scale


@triton.jit
def _add_norm_kernel(
    hidden,  # [num_tokens, SIZE]
    delta,  # like hidden, where HAS_DELTA
    weight,  # [SIZE]
    out,  # like hidden, or fp8
    scales,  # [num_tokens] float32, where IS_FP8
    eps,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    IS_FP8: tl.constexpr,  # the result
):
    dtype: tl.constexpr = hidden.dtype.element_ty
    column = tl.arange(0, SIZE_PAD)
    is_column = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(hidden + at, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x = _rounded(x + tl.load(delta + at, mask=is_column, other=0.0).to(tl.float32), dtype)
        tl.store(hidden + at, x.to(dtype), mask=is_column)
    x = _rounded(x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps), dtype)
    scaled = x * tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    if IS_FP8:
        in_fp8, scale = _quantised(_rounded(scaled, dtype), out.dtype.element_ty)
        tl.store(out + at, in_fp8, mask=is_column)
        tl.store(scales + tl.program_id(0), scale)
    else:
        tl.store(out + at, scaled.to(dtype), mask=is_column)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `hidden` [num_tokens, size] in place, and return the norm of the sum (engine.layers.norm)."""
    out = torch.empty_like(hidden)
    _add_norm(hidden, delta, weight, eps, out, None)
    return out


def add_rms_norm_fp8(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, then `quantise_rows` of it."""
    out, scales = _fp8_like(hidden)
    _add_norm(hidden, delta, weight, eps, out, scales)
    return out, scales


def _fp8_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=FP8), torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)


def _add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None
) -> None:
    size = hidden.shape[1]
    _add_norm_kernel[(len(hidden),)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        weight if scales is None else scales,
        eps,
        size,
        triton.next_power_of_2(size),
        delta is not None,
        scales is not None,
        num_warps=8 if size > 2048 else 4,
    )


@triton.jit
def _quantise_kernel(
    rows,  # [num_rows, SIZE]
    out,  # the same in fp8
    scales,  # [num_rows] float32
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
):
    column = tl.arange(0, SIZE_PAD)
    is_column = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    row = tl.load(rows + at, mask=is_column, other=0.0).to(tl.float32)
    in_fp8, scale = _quantised(row, out.dtype.element_ty)
    tl.store(out + at, in_fp8, mask=is_column)
    tl.store(scales + tl.program_id(0), scale)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` [num_rows, size], contiguous, in fp8, the largest of each at 448, and their scales [num_rows, 1] float32."""
    out, scales = _fp8_like(rows)
    size = rows.shape[1]
    _quantise_kernel[(len(rows),)](
        rows, out, scales, size, triton.next_power_of_2(size), num_warps=16 if size > 8192 else 8 if size > 2048 else 4
    )
    return out, scales


@triton.jit
def _silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + column, mask=is_column, other=0.0).to(tl.float32)
    value = _rounded(gate / (1.0 + tl.exp(-gate)), dtype) * up
    tl.store(out + row * SIZE + column, value.to(dtype), mask=is_column)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [num_tokens, 2 * size], gate first -> [num_tokens, size]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    columns = min(1024, triton.next_power_of_2(size))
    _silu_mul_kernel[(rows, triton.cdiv(size, columns))](gate_up, out, size, columns)
    return out


@triton.jit
def _write_qkv_kernel(
    qkv,  # [num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM]: queries, keys, values
    query,  # [num_tokens, HEADS, HEAD_DIM]
    keys,  # [num_tokens, KV_HEADS, HEAD_DIM], where KEEPS_KEYS
    pool,  # one layer: [num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    q_norm,  # [HEAD_DIM], where HAS_NORM
    k_norm,
    cos_sin,  # [max_positions, 2, HEAD_DIM / 2]
    positions,  # [num_tokens]; negative: nothing is written for this token
    token_seq,  # [num_tokens]: which sequence
    tables,
    table_begin,  # [num_seqs]
    eps,
    k_inverse,  # what multiplies a key before it is stored, where IS_FP8
    v_inverse,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEEPS_KEYS: tl.constexpr,
    IS_FP8: tl.constexpr,  # the pool
):
    dtype: tl.constexpr = qkv.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    column = tl.arange(0, HALF_PAD)
    is_in = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < HALF)[None, :]
    at = qkv + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head[:, None]) * HEAD_DIM + column[None, :]
    first = tl.load(at, mask=is_in, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=is_in, other=0.0).to(tl.float32)

    is_query = (head < HEADS)[:, None]
    is_rotated = (head < HEADS + KV_HEADS)[:, None]
    one, two = first, second
    if HAS_NORM:
        power = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
        inverse = tl.rsqrt(power + eps)[:, None]
        is_half = (column < HALF)[None, :]
        q_first = tl.load(q_norm + column[None, :], mask=is_half, other=0.0).to(tl.float32)
        q_second = tl.load(q_norm + HALF + column[None, :], mask=is_half, other=0.0).to(tl.float32)
        k_first = tl.load(k_norm + column[None, :], mask=is_half, other=0.0).to(tl.float32)
        k_second = tl.load(k_norm + HALF + column[None, :], mask=is_half, other=0.0).to(tl.float32)
        one = _rounded(_rounded(first * inverse, dtype) * tl.where(is_query, q_first, k_first), dtype)
        two = _rounded(_rounded(second * inverse, dtype) * tl.where(is_query, q_second, k_second), dtype)

    position = tl.load(positions + token)
    angles = cos_sin + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM + column[None, :]
    cos = tl.load(angles, mask=(column < HALF)[None, :], other=0.0).to(tl.float32)
    sin = tl.load(angles + HALF, mask=(column < HALF)[None, :], other=0.0).to(tl.float32)
    left = _rounded(one * cos, dtype) + _rounded(-two * sin, dtype)
    right = _rounded(two * cos, dtype) + _rounded(one * sin, dtype)
    left = tl.where(is_rotated, left, first).to(dtype)
    right = tl.where(is_rotated, right, second).to(dtype)

    to_query = query + (token.to(tl.int64) * HEADS + head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(to_query, left, mask=is_in & is_query)
    tl.store(to_query + HALF, right, mask=is_in & is_query)
    if KEEPS_KEYS:
        is_key = is_rotated & (head >= HEADS)[:, None]
        to_key = keys + (token.to(tl.int64) * KV_HEADS + (head[:, None] - HEADS)) * HEAD_DIM + column[None, :]
        tl.store(to_key, left, mask=is_in & is_key)
        tl.store(to_key + HALF, right, mask=is_in & is_key)

    if IS_FP8:
        inverse = tl.where(head < HEADS + KV_HEADS, k_inverse, v_inverse)[:, None]
        left = _saturated(left.to(tl.float32) * inverse, pool.dtype.element_ty)
        right = _saturated(right.to(tl.float32) * inverse, pool.dtype.element_ty)
    is_written = is_in & (head >= HEADS)[:, None] & (position >= 0)
    table = tables + tl.load(table_begin + tl.load(token_seq + token))
    block = tl.load(table + tl.maximum(position, 0) // BLOCK_SIZE, mask=position >= 0, other=0).to(tl.int64)
    # [block][K|V][kv_head][token][dim], in which K and V heads of a block are one run of 2 * KV_HEADS heads
    slot = (block * (2 * KV_HEADS) + (head[:, None] - HEADS)) * BLOCK_SIZE + tl.maximum(position, 0) % BLOCK_SIZE
    to_pool = pool + slot * HEAD_DIM + column[None, :]
    tl.store(to_pool, left, mask=is_written)
    tl.store(to_pool + HALF, right, mask=is_written)


def write_qkv(
    qkv: Tensor,
    pool: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos_sin: Tensor,
    positions: Tensor,
    token_seq: Tensor,
    tables: Tensor,
    table_begin: Tensor,
    *,
    eps: float,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    keys: Tensor | None = None,
) -> Tensor:
    """Norm (if `norms`: of queries, of keys) and rotate queries and keys, write KV to the pool, return the queries.

    `qkv` is [num_tokens, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values; `cos_sin`
    [max_positions, 2, head_dim / 2] in its dtype. `positions` [num_tokens], negative where nothing is to be written,
    and `token_seq` [num_tokens], the sequence of each, are int32; `tables` and `table_begin` as in `decode_attention`.
    A pool in fp8 gets keys and values divided by `kv_scales`, and the largest number for what is too large for it.
    `keys` [num_tokens, kv_heads, head_dim], if given, gets the keys of every token, in the dtype of `qkv`.
    """
    kv_heads, block_size, dim = pool.shape[2:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query = qkv.new_empty(len(qkv), heads, dim)
    each = min(8, triton.next_power_of_2(heads + 2 * kv_heads))
    q_norm, k_norm = (cos_sin, cos_sin) if norms is None else norms
    _write_qkv_kernel[(len(qkv), triton.cdiv(heads + 2 * kv_heads, each))](
        qkv,
        query,
        query if keys is None else keys,
        pool,
        q_norm,
        k_norm,
        cos_sin,
        positions,
        token_seq,
        tables,
        table_begin,
        eps,
        1.0 / kv_scales[0],
        1.0 / kv_scales[1],
        heads,
        kv_heads,
        dim,
        triton.next_power_of_2(dim // 2),
        block_size,
        each,
        norms is not None,
        keys is not None,
        pool.dtype == FP8,
    )
    return query
