"""The bytes of a pool: views of runs, digests over them, copies between pools. Knows no peers and no transfers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from baton.kv_layout import KVLayout
from kvtransfer.messages import Data
from kvtransfer.plan import FRAME_BYTES, Copy, Run

_IDENTITY: Final = struct.Struct("<16s16sIIIII")

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

    def array(self, layer: int) -> Bytes:
        """One layer as an array over the same memory."""
        return np.frombuffer(self._layers[layer], np.uint8)

    def release(self) -> None:
        """Drop the views, so that the memory can be unmapped."""
        for view in self._layers:
            view.release()
        self._layers = []


def copy_and_view(
    destination: Pool, source: Pool, layer: int, copies: Sequence[Copy], runs: Sequence[Run]
) -> list[memoryview]:
    """Copy between pools and return views of what was written. Long copies run without the GIL."""
    to, fro = destination.array(layer), source.array(layer)
    for to_start, from_start, length in copies:
        to[to_start : to_start + length] = fro[from_start : from_start + length]
    return destination.views(layer, runs)


def data_digest(context: bytes, frame: Data, views: Iterable[Any]) -> bytes:
    """xxh3-128 over the identity of a frame (both ends, transfer, ranks, layer, units) and its bytes in canonical order.

    It detects faults, not attackers: those are kept off the link by its authentication.
    """
    identity = _IDENTITY.pack(context, *frame[:6])
    hasher = xxhash.xxh3_128(identity)
    for view in views:
        if len(view) <= FRAME_BYTES:
            hasher.update(view)
        else:
            for start in range(0, len(view), FRAME_BYTES):
                hasher.update(view[start : start + FRAME_BYTES])
    return hasher.digest()
