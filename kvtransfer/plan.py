"""The copy plan: which bytes of a source pool become which bytes of a destination pool. Pure; knows no sockets.

For one pair of ranks the plan names, per layer, the KV heads that travel. The bytes of tokens [first, end) of a layer
cross the wire in one canonical order

    [group][K|V][head][token][dim]

where a *group* is the largest run of tokens that is whole in a block of both pools (gcd of the block sizes), cut at
`first` and `end`. With equal geometries a whole group is a whole block, so a frame is one run per block and
neighbouring blocks melt into one run.

            source, block 32                          destination, block 16, second of two ranks
    block 7 |K h0 t0..31|K h1 t0..31|V h0|V h1|       block 2 |K h1 t0..15|V h1 t0..15|   block 5 |K h1 t16..31|..
                         ~~~~~~~~~~       ~~~~   ->            ~~~~~~~~~~~ ~~~~~~~~~~~             ~~~~~~~~~~~~
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from baton.errors import LayoutMismatch
from baton.kv_layout import UNIT_TOKENS, KVLayout, ModelKV, kv_head_range

FRAME_BYTES: Final = 16 * 1024 * 1024
"""Most payload bytes of one frame on a stream or in shared memory, unless a single unit is larger or the link is fast."""

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""The same on a stream, however fast."""

FETCHED_FRAME_BYTES: Final = 4 * 1024 * 1024
"""The same where a device or NIXL fetches the bytes."""

HASH_BYTES: Final = 256 * 1024
"""Where there is no native code, bytes are copied and hashed in pieces that stay in a core's own cache in between."""

_MAX_CACHED_RANGES: Final = 256

Runs: TypeAlias = npt.NDArray[np.uint64]
"""[num_runs, 2]: (start, length) in bytes, relative to the first byte of the layer in its pool. Shared: never changed."""

Part: TypeAlias = tuple[int, Runs]
"""A layer, and bytes of it in canonical order."""

Copy: TypeAlias = tuple[int, int, int, int]
"""(destination start, destination end, source start, source end) in bytes, relative to the layer in each pool."""


@dataclass(frozen=True, slots=True)
class LayerSide:
    """Where the travelling heads of one layer lie in one rank's pool."""

    block_size: int
    token_bytes: int
    """Bytes of one token of one head of one half (K or V)."""
    num_local_heads: int
    first_head: int
    """Local index of the first head that travels."""
    num_heads: int
    """Heads that travel, the same on both sides; 0: this pair exchanges nothing of the layer."""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """All that two ranks need to know about each other's pools. Made once per pair by `plan_copies`."""

    source: KVLayout
    destination: KVLayout
    group_tokens: int
    source_sides: tuple[LayerSide, ...]
    destination_sides: tuple[LayerSide, ...]
    unit_bytes: tuple[int, ...]
    """Per layer: payload bytes of UNIT_TOKENS tokens; 0 where nothing travels."""

    @property
    def max_unit_bytes(self) -> int:
        """Payload bytes of one unit of the largest layer."""
        return max(self.unit_bytes)

    def leaf_bytes(self, layer: int) -> int:
        """Bytes of UNIT_TOKENS tokens of one head of one half: what has a digest of its own."""
        return UNIT_TOKENS * self.source_sides[layer].token_bytes

    def num_bytes(self, layer: int, num_tokens: int) -> int:
        """Payload bytes of `num_tokens` tokens of `layer`."""
        return self.unit_bytes[layer] * num_tokens // UNIT_TOKENS

    def frame_end(self, layer: int, first_token: int, end_token: int, max_bytes: int) -> int:
        """Where a frame that starts at `first_token` ends: within `max_bytes` but at least one unit.

        A cut before `end_token` is made between groups where one is in reach.
        """
        units = max(1, max_bytes // self.unit_bytes[layer])
        end = first_token + units * UNIT_TOKENS
        if end >= end_token:
            return end_token
        aligned = end - end % self.group_tokens
        return aligned if aligned > first_token else end


class TableRuns:
    """One side of a plan bound to the block table of one transfer: where its tokens lie in that pool.

    `first_block` says which block of the sequence `block_table[0]` is. Ranges repeat from layer to layer, so the
    last few are remembered. One thread.
    """

    def __init__(
        self, sides: tuple[LayerSide, ...], group_tokens: int, block_table: Sequence[int], first_block: int = 0
    ) -> None:
        self._sides = sides
        self._group_tokens = group_tokens
        self._block_table = np.array(block_table, np.int64)
        self._first_block = first_block
        self._cache: dict[tuple[int, int, int], Runs] = {}
        self._prepared: tuple[int, int, list[Part]] = (0, 0, [])
        """Tokens [first, end), and where they lie in all layers."""

    def parts(self, layers: range, first_token: int, end_token: int) -> list[Part]:
        """The bytes of tokens [first_token, end_token) of neighbouring layers."""
        first, end, parts = self._prepared
        if (first, end) != (first_token, end_token):
            return [(layer, self.runs(layer, first_token, end_token)) for layer in layers]
        return parts[layers.start : layers.stop]

    def runs(self, layer: int, first_token: int, end_token: int) -> Runs:
        """The bytes of tokens [first_token, end_token) of `layer` in canonical order, neighbours melted together."""
        side = self._sides[layer]
        key = (id(side), first_token, end_token)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _MAX_CACHED_RANGES:
                self._cache.clear()
            found = self._cache[key] = self._compute(side, first_token, end_token)
        return found

    def prepare(self, first_token: int, end_token: int) -> list[Part]:
        """Compute the range that will probably be asked for, while there is time. All layers of it."""
        if first_token < end_token:
            layers = range(len(self._sides))
            self._prepared = first_token, end_token, self.parts(layers, first_token, end_token)
        return self._prepared[2]

    def _compute(self, side: LayerSide, first_token: int, end_token: int) -> Runs:
        head_bytes = side.block_size * side.token_bytes
        half_bytes = side.num_local_heads * head_bytes
        is_whole = self._group_tokens == side.block_size and side.num_heads == side.num_local_heads
        if is_whole and not first_token % side.block_size and not end_token % side.block_size:
            first_block, end_block = first_token // side.block_size, end_token // side.block_size
            blocks = self._block_table[first_block - self._first_block : end_block - self._first_block]
            return _melted(blocks * (2 * half_bytes), 2 * half_bytes)
        edges = np.arange(
            first_token - first_token % self._group_tokens, end_token + self._group_tokens, self._group_tokens
        )
        edges[0], edges[-1] = first_token, end_token
        tokens = edges[:-1]
        blocks, in_block = np.divmod(tokens, side.block_size)
        bases = self._block_table[blocks - self._first_block] * (2 * half_bytes) + in_block * side.token_bytes
        halves = np.arange(2) * half_bytes
        heads = np.arange(side.first_head, side.first_head + side.num_heads) * head_bytes
        starts = bases[:, None] + (halves[:, None] + heads).ravel()  # [group, K|V x head]
        lengths = np.broadcast_to(np.diff(edges)[:, None] * side.token_bytes, starts.shape)
        return _melted(starts.ravel(), lengths.ravel())


def _melted(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64] | int) -> Runs:
    """Runs in which what ends where the next one starts is one."""
    runs = np.empty((len(starts), 2), np.uint64)
    runs[:, 0], runs[:, 1] = starts, lengths
    is_first = np.ones(len(starts), np.bool_)
    np.not_equal(runs[1:, 0], runs[:-1, 0] + runs[:-1, 1], out=is_first[1:])
    firsts = is_first.nonzero()[0]
    if len(firsts) == len(runs):
        return runs
    melted = runs[firsts]
    melted[:, 1] = np.add.reduceat(runs[:, 1], firsts)
    return melted


def zip_runs(destination: Runs, source: Runs, max_bytes: int = FETCHED_FRAME_BYTES) -> list[Copy]:
    """Pair two lists of runs over the same canonical bytes into copies of at most `max_bytes`."""
    copies: list[Copy] = []
    pending = iter(source.tolist())
    at, end = 0, 0
    for start, num_bytes in destination.tolist():
        stop = start + num_bytes
        while start < stop:
            if at == end:
                at, length = next(pending)
                end = at + length
            length = min(stop - start, end - at, max_bytes)
            copies.append((start, start + length, at, at + length))
            start += length
            at += length
    return copies


def plan_copies(source: KVLayout, destination: KVLayout) -> CopyPlan:
    """What the rank of `source` sends to the rank of `destination`.

    Raises:
        LayoutMismatch: the models differ (the first differing field is named), or the pair exchanges nothing.
    """
    check_identity(source.model, destination.model)
    model = source.model
    source_sides: list[LayerSide] = []
    destination_sides: list[LayerSide] = []
    for layer, spec in enumerate(model.layers):
        heads = travelling_heads(
            spec.num_kv_heads,
            source.geometry.tp_size,
            source.tp_rank,
            destination.geometry.tp_size,
            destination.tp_rank,
        )
        for layout, sides in ((source, source_sides), (destination, destination_sides)):
            local = layout.heads(layer)
            side = LayerSide(
                block_size=layout.geometry.block_size,
                token_bytes=spec.head_dim * model.itemsize_bytes,
                num_local_heads=len(local),
                first_head=heads.start - local.start if heads else 0,
                num_heads=len(heads),
            )
            sides.append(_same(side, sides))
    unit_bytes = tuple(2 * side.num_heads * side.token_bytes * UNIT_TOKENS for side in source_sides)
    if not any(unit_bytes):
        raise LayoutMismatch(f"source rank {source.tp_rank} has nothing for destination rank {destination.tp_rank}")
    return CopyPlan(
        source=source,
        destination=destination,
        group_tokens=math.gcd(source.geometry.block_size, destination.geometry.block_size),
        source_sides=tuple(source_sides),
        destination_sides=tuple(destination_sides),
        unit_bytes=unit_bytes,
    )


def local_sides(layout: KVLayout) -> tuple[LayerSide, ...]:
    """All heads of all layers of one rank, as if they travelled."""
    sides: list[LayerSide] = []
    for layer, spec in enumerate(layout.model.layers):
        token_bytes, num_heads = spec.head_dim * layout.model.itemsize_bytes, len(layout.heads(layer))
        side = LayerSide(layout.geometry.block_size, token_bytes, num_heads, 0, num_heads)
        sides.append(_same(side, sides))
    return tuple(sides)


def _same(side: LayerSide, seen: list[LayerSide]) -> LayerSide:
    """One object per distinct side, so that layers of one shape share cached runs."""
    return seen[seen.index(side)] if side in seen else side


def check_identity(ours: ModelKV, theirs: ModelKV) -> None:
    """Refuse another model's KV.

    Raises:
        LayoutMismatch: names the first field that differs.
    """
    for field in ("dtype", "fingerprint", "hash_version", "layers"):
        if getattr(ours, field) != getattr(theirs, field):
            raise LayoutMismatch(f"{field} differs: {_shown(ours, field)} here, {_shown(theirs, field)} there")


def _shown(model: ModelKV, field: str) -> str:
    value = getattr(model, field)
    return f"{len(value)} layers of {sorted(set(value), key=repr)}" if field == "layers" else repr(value)


def travelling_heads(
    num_kv_heads: int, source_tp: int, source_rank: int, destination_tp: int, destination_rank: int
) -> range:
    """Global KV heads that one source rank sends to one destination rank.

    Where ranks replicate heads, each destination rank gets a head from one source rank only, and the destination
    ranks that store it take turns among the source ranks that do.
    """
    wanted = kv_head_range(num_kv_heads, destination_tp, destination_rank)
    offered = kv_head_range(num_kv_heads, source_tp, source_rank)
    if num_kv_heads < source_tp:  # `offered` is one head, which several source ranks store
        source_copies = source_tp // num_kv_heads
        turn = destination_rank % max(1, destination_tp // num_kv_heads)
        if source_rank % source_copies != turn % source_copies:
            return range(0)
    start, stop = max(wanted.start, offered.start), min(wanted.stop, offered.stop)
    return range(start, max(start, stop))


def destination_ranks(model: ModelKV, source_tp: int, source_rank: int, destination_tp: int) -> list[int]:
    """Ranks of the receiving worker to which `source_rank` sends something.

    Raises:
        LayoutMismatch: the KV heads can not be split over `destination_tp` ranks.
    """
    pairs = rank_pairs(model, source_tp, destination_tp)
    return [destination for source, destination in pairs if source == source_rank]


def source_ranks(model: ModelKV, source_tp: int, destination_tp: int, destination_rank: int) -> list[int]:
    """Ranks of the sending worker from which `destination_rank` gets something.

    Raises:
        LayoutMismatch: the KV heads can not be split over `source_tp` ranks.
    """
    pairs = rank_pairs(model, source_tp, destination_tp)
    return [source for source, destination in pairs if destination == destination_rank]


@functools.lru_cache(maxsize=64)
def rank_pairs(model: ModelKV, source_tp: int, destination_tp: int) -> tuple[tuple[int, int], ...]:
    """All (source rank, destination rank) that exchange something; (0, 0) is always one of them.

    Raises:
        LayoutMismatch: the KV heads can not be split over that many ranks.
    """
    head_counts = sorted({spec.num_kv_heads for spec in model.layers})
    try:
        return tuple(
            (source, destination)
            for source in range(source_tp)
            for destination in range(destination_tp)
            if any(travelling_heads(count, source_tp, source, destination_tp, destination) for count in head_counts)
        )
    except ValueError as error:
        raise LayoutMismatch(str(error)) from error
