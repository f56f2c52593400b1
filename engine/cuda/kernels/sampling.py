"""Choosing tokens on the device: the likeliest, or a draw with the counter-based noise of engine.sampler.

The bits of the noise are those of `engine.sampler.gumbel_noise`; its two logarithms are the device's own, in float64,
so a draw can differ from the host's only where two tokens are within some 1e-15 of each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048


@triton.jit
def _best_of_tile_kernel(
    logits,  # [num_rows, vocab], rows `stride` apart
    stride,
    keys,  # [num_rows] int64: the stream of noise
    temperatures,  # [num_rows] float64; 0: the likeliest
    scores,  # [num_rows, num_tiles] float64
    tokens,  # [num_rows, num_tiles] int32
    peaks,  # [num_rows, num_tiles] float32: the largest logit; NaN if any is
    vocab,
    COLUMNS: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_token = column < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + column, mask=is_token, other=float("-inf")).to(tl.float32)
    score = x.to(tl.float64)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        # splitmix64's output number `token` of the stream `key`; 52 of its bits are the middle of a part of (0, 1)
        bits = (column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + tl.load(keys + row).to(tl.uint64)
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
        bits = bits ^ (bits >> 31)
        uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
        score = score / temperature - tl.log(-tl.log(uniform))
        score = tl.where(is_token, score, float("-inf"))
    best = tl.max(score, 0)
    at = row * tl.num_programs(1) + tile
    tl.store(scores + at, best)
    tl.store(tokens + at, tl.min(tl.where(score == best, column, 0x7FFFFFFF), 0))
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(peaks + at, tl.where(is_nan, float("nan"), tl.max(x, 0)))


@triton.jit
def _best_of_row_kernel(
    scores,
    tokens,
    peaks,
    chosen,  # [num_rows] int32
    highest,  # [num_rows] float32
    num_tiles,
    TILES_PAD: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.arange(0, TILES_PAD)
    is_tile = tile < num_tiles
    at = row * num_tiles + tile
    score = tl.load(scores + at, mask=is_tile, other=float("-inf"))
    token = tl.load(tokens + at, mask=is_tile, other=0x7FFFFFFF)
    peak = tl.load(peaks + at, mask=is_tile, other=float("-inf"))
    is_nan = tl.max((peak != peak).to(tl.int32), 0) > 0
    best = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    # A row that is not finite has no token; the step after it needs one that exists.
    tl.store(chosen + row, tl.where(is_nan | (best == 0x7FFFFFFF), 0, best))
    tl.store(highest + row, tl.where(is_nan, float("nan"), tl.max(peak, 0)))


def choose_tokens(logits: Tensor, keys: Tensor, temperatures: Tensor, chosen: Tensor, highest: Tensor) -> None:
    """Fill `chosen` [num_rows] int32 and `highest` [num_rows] float32 from `logits` [num_rows, vocab].

    Row r takes the first of the likeliest tokens if `temperatures[r]` (float64) is 0, else a draw from
    softmax(logits / temperature) with the noise stream `keys[r]` (int64; engine.sampler.noise_key). `highest` is the
    largest logit, NaN if any is NaN: where it is not finite, no token follows from the row.
    """
    num_rows, vocab = logits.shape
    num_tiles = triton.cdiv(vocab, _COLUMNS)
    scores = torch.empty(num_rows, num_tiles, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=logits.device)
    peaks = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    _best_of_tile_kernel[(num_rows, num_tiles)](
        logits, logits.stride(0), keys, temperatures, scores, tokens, peaks, vocab, _COLUMNS, num_warps=8
    )
    _best_of_row_kernel[(num_rows,)](
        scores, tokens, peaks, chosen, highest, num_tiles, triton.next_power_of_2(num_tiles)
    )
