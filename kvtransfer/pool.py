"""The bytes of a pool: views of runs, digests over them, copies between pools. Knows no peers and no transfers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from baton.kv_layout import KVLayout
from kvtransfer.messages import Data
from kvtransfer.plan import HASH_BYTES, Copy, Run

_IDENTITY: Final = struct.Struct("<16s16sIIIIII")

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Pool:
    """One rank's KV bytes by layer. `buffer` stays the caller's; `release` drops every reference to it."""

    def __init__(self, layout: KVLayout, buffer: memoryview) -> None:
        flat = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        if len(flat) < layout.pool_bytes:
            raise ValueError(f"the pool needs {layout.pool_bytes} bytes, the buffer has {len(flat)}")
        self._layers: list[memoryview] = []
        start = 0
        for layer in range(len(layout.model.layers)):
            end = start + layout.block_bytes(layer) * layout.geometry.num_blocks
            self._layers.append(flat[start:end])
            start = end

    def views(self, layer: int, runs: Iterable[Run]) -> list[memoryview]:
        """The bytes of `runs`, in order, without a copy."""
        view = self._layers[layer]
        return [view[start:end] for start, end in runs]

    def layer(self, layer: int) -> memoryview:
        """All bytes of one layer."""
        return self._layers[layer]

    def array(self, layer: int) -> Bytes:
        """One layer as an array over the same memory."""
        return np.frombuffer(self._layers[layer], np.uint8)

    def release(self) -> None:
        """Drop the views, so that the memory can be unmapped."""
        for view in self._layers:
            with contextlib.suppress(BufferError):  # a traceback still holds an array over it
                view.release()
        self._layers = []


def data_hasher(context: bytes, frame: Data) -> xxhash.xxh3_128:
    """xxh3-128, fed with the identity of a frame: both ends, transfer, ranks, layers, units.

    It detects faults, not attackers: those are kept off the link by its authentication.
    """
    return xxhash.xxh3_128(_IDENTITY.pack(context, *frame[:7]))


def data_digest(context: bytes, frame: Data, views: Iterable[memoryview]) -> bytes:
    """The digest over the identity of a frame and its bytes in canonical order."""
    hasher = data_hasher(context, frame)
    update = hasher.update
    for view in views:
        if len(view) <= HASH_BYTES:
            update(view)
        else:
            for start in range(0, len(view), HASH_BYTES):
                update(view[start : start + HASH_BYTES])
    return hasher.digest()


def fetch(
    destination: Pool, source: Pool, layer: int, copies: Iterable[Copy], landed: Callable[[memoryview], None] | None
) -> None:
    """Copy one layer's part of a frame from another pool; `landed` gets each piece (of at most HASH_BYTES) at once.

    The copies do not hold the GIL, but for small ones.
    """
    to, fro = destination.array(layer), source.array(layer)
    if landed is None:
        for start, end, from_start, from_end in copies:
            to[start:end] = fro[from_start:from_end]
        return
    view = destination.layer(layer)
    for start, end, from_start, from_end in copies:
        to[start:end] = fro[from_start:from_end]
        landed(view[start:end])
