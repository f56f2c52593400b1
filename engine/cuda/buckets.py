"""Which sizes of a decode step have a CUDA graph, and over how many programs attention splits a context."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

_PROGRAMS_EACH: Final = 4
_MAX_SPLITS: Final = 32


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of 8 up to 256, of 32 up to 512, of 128 beyond; the last one is `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, 513, 32), *range(640, max_num_seqs + 1, 128)]
    return tuple(sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs}))


def bucket_for(num_seqs: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of `sizes` (ascending) that holds `num_seqs`; None if none does."""
    index = bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else None


def num_splits(num_seqs: int, kv_heads: int, num_multiprocessors: int) -> int:
    """A power of two that gives a decode's attention enough programs. Fixed per bucket: a graph can not choose."""
    wanted = -(-_PROGRAMS_EACH * num_multiprocessors // (num_seqs * kv_heads))
    return min(_MAX_SPLITS, 1 << (wanted - 1).bit_length())
