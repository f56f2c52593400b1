"""Digests of what lies in a pool, one per leaf, and of a frame over those of its leaves. Knows no peers.

A *leaf* is what UNIT_TOKENS tokens have in one head of one half (K or V) of one layer. Its bytes lie together in every
pool, whatever the block sizes and ranks, so sender and receiver agree on every leaf's digest. A leaf's digest is
xxh3-128 over its bytes (the last unit of a sequence may be partial: then as if zeros followed); a frame's is
H(identity, H(digests of its leaves in canonical order)).

    pool            |K h0 unit 0|K h0 unit 1|K h1 unit 0|K h1 unit 1|V h0 ..        16 rows of head_dim elements each
    LeafDigests     |16 bytes   |16 bytes   |16 bytes   |16 bytes   |..

The sender makes them once, on its engine's thread, when the KV is written and still in cache (`SourceDigests`); the
receiver while the bytes land. They detect faults, not attackers: those are kept off the link by its authentication.
Natively, where there is a compiler (kvtransfer.native), else by the xxhash package: the digests are the same.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from baton.kv_layout import UNIT_TOKENS, KVLayout
from kvtransfer.api import CorruptPool, SendRequest, TransferId
from kvtransfer.messages import DIGEST_BYTES, Data
from kvtransfer.native.library import Library, library
from kvtransfer.plan import TableRuns, local_sides
from kvtransfer.pool import Bytes, Extents, Pool, address_of

_IDENTITY: Final = struct.Struct("<16s16sIIIIII")
_MAX_SHORT_BYTES: Final = 240
"""xxh3 treats so few bytes in other ways; native code knows only the longer inputs."""


class LeafDigests:
    """A digest for each leaf of a pool, as far as somebody has made it: by whom the leaf's bytes may be written.

    `FrameDigest` makes and reads them.
    """

    def __init__(self, layout: KVLayout, pool: Pool) -> None:
        self.pool: Final = pool
        self.leaf_bytes: Final = tuple(
            UNIT_TOKENS * spec.head_dim * layout.model.itemsize_bytes for spec in layout.model.layers
        )
        sizes = [
            layout.block_bytes(layer) * layout.geometry.num_blocks // leaf_bytes * DIGEST_BYTES
            for layer, leaf_bytes in enumerate(self.leaf_bytes)
        ]
        starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
        self.table: Final[Bytes] = np.zeros(sum(sizes), np.uint8)
        begin = address_of(self.table)
        self.leaves: Final = tuple(
            (ctypes.c_uint64 * 3)(pool.address(layer), begin + starts[layer], leaf_bytes)
            for layer, leaf_bytes in enumerate(self.leaf_bytes)
        )
        """Per layer, for native code: where its first leaf lies, where that one's digest does, bytes of a leaf. Good for
        the next layers, too, as long as their leaves have the same size."""


class FrameDigest:
    """The digests of one frame's leaves: made as its bytes come into place, or known already; then of the frame.

    All layers of a frame have leaves of one size. One thread.
    """

    def __init__(self, digests: LeafDigests, extents: Extents) -> None:
        self._extents = extents
        self._table = digests.table
        first_layer = extents.parts[0][0]
        self.leaves: Final = digests.leaves[first_layer]
        self.progress: Final = (ctypes.c_uint64 * 4)()
        """What has landed and what is hashed, for native code."""
        self._leaf_bytes = digests.leaf_bytes[first_layer]
        self.native: Final[Library | None] = library() if self._leaf_bytes > _MAX_SHORT_BYTES else None
        """None: native code can not make these digests."""
        self._bytes_left = extents.num_bytes

    def landed(self, num_bytes: int) -> None:
        """The next `num_bytes` are in place: make the digests of the leaves that are complete."""
        if self.native is not None:
            self.native.landed(self._extents.address, self.progress, num_bytes, self.leaves)
            return
        self._bytes_left -= num_bytes
        if not self._bytes_left:
            self._make_by_package()

    def fetch(self, source: Extents, *, streams: bool) -> None:
        """Copy all bytes from another pool, past the caches if `streams`, and make the digests of what then lies here.

        Only where `native`.
        """
        assert self.native is not None
        self.native.copy(self._extents.address, source.address, self._extents.num_bytes, self.leaves, streams)

    def make(self) -> None:
        """All bytes are in place."""
        self.landed(self._extents.num_bytes)

    def result(self) -> bytes:
        """Over the digests of all leaves, which must have been made."""
        if self.native is None:
            digests = [self._table.data[at : at + num_leaves * DIGEST_BYTES] for at, num_leaves in self._places()]
            return xxhash.xxh3_128_digest(b"".join(digests))
        extents, out = self._extents, ctypes.create_string_buffer(_MAX_SHORT_BYTES)
        size = self.native.digest(extents.address, len(extents.pieces), self.leaves, out)
        return xxhash.xxh3_128_digest(out.raw[:size]) if size else out.raw[:DIGEST_BYTES]

    def _make_by_package(self) -> None:
        size = self._leaf_bytes
        for view, (at, num_leaves) in zip(self._extents.views(), self._places(), strict=True):
            for leaf in range(num_leaves):
                padded = bytes(view[leaf * size : (leaf + 1) * size]).ljust(size, b"\0")
                begin = at + leaf * DIGEST_BYTES
                self._table.data[begin : begin + DIGEST_BYTES] = xxhash.xxh3_128_digest(padded)

    def _places(self) -> list[tuple[int, int]]:
        """Of each piece: where in the table the digest of its first leaf lies, and how many leaves it has."""
        origin, first, size = self.leaves
        first -= address_of(self._table)
        return [
            (first + (start - origin) // size * DIGEST_BYTES, -(-length // size))
            for start, length in self._extents.pieces.tolist()
        ]


def seal(context: bytes, frame: Data, digest: bytes) -> bytes:
    """What a frame carries: the digest of its bytes, bound to what it is (both ends, transfer, ranks, layers, units)."""
    sealed: bytes = xxhash.xxh3_128_digest(_IDENTITY.pack(context, *frame[:7]) + digest)
    return sealed


@dataclass(slots=True)
class _Offer:
    runs: TableRuns
    units: npt.NDArray[np.int64]
    """[num_units]: the index in the pool of each unit of the sequence."""
    num_tokens: int
    made: list[int] = field(default_factory=list)
    """Per layer: the digests of tokens [0, n) are there. Empty until KV is announced for the first time."""
    kept: int = 0
    """Tokens [0, n) had their digests before."""
    unchecked: set[int] = field(default_factory=set)
    """Layers in which a step reads those, and nobody has looked whether they are what they were."""


class SourceDigests:
    """What a rank offers to peers has its digests before it is announced. Engine thread only.

    Whole units that were offered once keep them for the next transfer of the same blocks (another decode worker,
    another request with the same prefix), until somebody is about to write there: bytes that have changed since they
    were written will not match. A step that reads a prefix is told before anything is made of it.
    """

    def __init__(self, layout: KVLayout, digests: LeafDigests) -> None:
        self._layout = layout
        self._digests = digests
        self._block_size = layout.geometry.block_size
        self._units_per_block = self._block_size // UNIT_TOKENS
        self._is_known = np.zeros(layout.geometry.num_blocks * self._units_per_block, np.bool_)
        self._has_known = False
        self._anew: LeafDigests | None = None
        """For comparisons: others go on with those that there are."""
        self._offers: dict[TransferId, _Offer] = {}
        self._sides = local_sides(layout)

    def open(self, request: SendRequest) -> None:
        """A transfer begins. The blocks may still be written."""
        self._offers[request.transfer_id] = _Offer(
            TableRuns(self._sides, self._block_size, request.block_table),
            self._units(request.block_table, 0, request.num_tokens),
            request.num_tokens,
        )

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int) -> None:
        """KV of `layer` (None: of every layer) for tokens [0, num_tokens) is in the pool: make its digests.

        Raises:
            CorruptPool: a step reads a prefix that is not what it was when its digests were made.
        """
        offer = self._offers.get(transfer_id)
        if offer is None:
            return
        end = num_tokens - num_tokens % UNIT_TOKENS if num_tokens < offer.num_tokens else offer.num_tokens
        last = len(self._sides) - 1
        if not offer.made:
            offer.kept = self._num_known(offer, end) * UNIT_TOKENS
            offer.made = [offer.kept] * (last + 1)
            offer.unchecked = set() if layer is None else set(range(last + 1))
        if layer in offer.unchecked:
            offer.unchecked.remove(layer)
            if not self._is_right(offer, layer, offer.kept):
                raise CorruptPool("KV of a cached prefix is not what was written there")
        self._make(offer, range(last + 1) if layer is None else (layer,), end)
        if layer in (None, last):
            num_whole = min(offer.made) // UNIT_TOKENS
            self._is_known[offer.units[:num_whole]] = True
            self._has_known = True

    def _num_known(self, offer: _Offer, end: int) -> int:
        """Units at the beginning of tokens [0, end) that have their digests. What follows may still be written: the
        digests that are there are of what the blocks' last owner had.
        """
        is_known = self._is_known[offer.units[: end // UNIT_TOKENS]]
        return len(is_known) if is_known.all() else int(is_known.argmin())

    def _make(self, offer: _Offer, layers: Iterable[int], end: int) -> None:
        for layer in layers:
            first = offer.made[layer]
            if end > first:
                FrameDigest(self._digests, self._extents(offer, layer, first, end)).make()
                offer.made[layer] = end

    def _extents(self, offer: _Offer, layer: int, first: int, end: int) -> Extents:
        runs = offer.runs.runs(layer, first, end)
        return Extents(self._digests.pool, [(layer, runs)], int(runs[:, 1].sum()))

    def is_intact(self, transfer_id: TransferId) -> bool:
        """Is everything that a transfer offered still what its digests say?

        What it offers to others keeps those: digests of what is not intact would make them trust it.
        """
        offer = self._offers.get(transfer_id)
        if offer is None:
            return True
        return all(self._is_right(offer, layer, end) for layer, end in enumerate(offer.made))

    def _is_right(self, offer: _Offer, layer: int, end: int) -> bool:
        """Has a layer's KV of tokens [0, end) the digests that were made of it?"""
        if not end:
            return True
        if self._anew is None:
            self._anew = LeafDigests(self._layout, self._digests.pool)
        extents = self._extents(offer, layer, 0, end)
        anew = FrameDigest(self._anew, extents)
        anew.make()
        return anew.result() == FrameDigest(self._digests, extents).result()

    def close(self, transfer_id: TransferId) -> None:
        """The transfer is over. Unknown ids are ignored."""
        self._offers.pop(transfer_id, None)

    def will_write(self, block_table: Sequence[int], first_token: int, end_token: int) -> None:
        """Tokens [first_token, end_token) of this table are about to be written: forget what was there."""
        if not self._has_known:
            return
        if end_token - first_token == 1:  # a decode
            block, token = divmod(first_token, self._block_size)
            self._is_known[block_table[block] * self._units_per_block + token // UNIT_TOKENS] = False
        else:
            self._is_known[self._units(block_table, first_token, end_token)] = False

    def _units(self, block_table: Sequence[int], first_token: int, end_token: int) -> npt.NDArray[np.int64]:
        """The index in the pool of each unit that holds some of the tokens."""
        units = np.arange(first_token // UNIT_TOKENS, -(-end_token // UNIT_TOKENS))
        blocks, in_block = np.divmod(units, self._units_per_block)
        table = np.asarray(block_table, np.int64)
        return table[blocks] * self._units_per_block + in_block
