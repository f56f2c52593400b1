"""The bytes of a pool: scattered runs of them, and copies between pools. Knows no digests, peers or transfers.

Natively, where there is a compiler (kvtransfer.native), else by numpy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from baton.kv_layout import KVLayout
from kvtransfer.native.library import library
from kvtransfer.plan import HASH_BYTES, Part, Runs, zip_runs

Bytes: TypeAlias = npt.NDArray[np.uint8]
Addresses: TypeAlias = npt.NDArray[np.uint64]
"""Of the first byte of each layer."""
Pieces: TypeAlias = npt.NDArray[np.uint64]
"""[num_pieces, 2]: (address, length in bytes), in order."""
_MAX_SPREADS: Final = 16
"""Transfers whose pieces are remembered."""
_MAX_SPREAD_PIECES: Final = 65536
"""Of one transfer: 1 MiB."""


class Pool:
    """One rank's KV bytes by layer. `buffer` stays the caller's; `release` drops every reference to it."""

    def __init__(self, layout: KVLayout, buffer: memoryview) -> None:
        flat = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        if len(flat) < layout.pool_bytes:
            raise ValueError(f"the pool needs {layout.pool_bytes} bytes, the buffer has {len(flat)}")
        library()  # here, where blocking is allowed
        self._layers: list[memoryview] = []
        start = 0
        for layer in range(len(layout.model.layers)):
            end = start + layout.block_bytes(layer) * layout.geometry.num_blocks
            self._layers.append(flat[start:end])
            start = end
        self._bases = _bases(self._layers)
        self._spreads: dict[int, tuple[Runs, Pieces]] = {}
        """Runs in all layers, by their identity."""

    @classmethod
    def flat(cls, buffer: memoryview) -> Pool:
        """Bytes without a layout, as one layer."""
        pool = cls.__new__(cls)
        pool._layers = [buffer]
        pool._bases = _bases(pool._layers)
        pool._spreads = {}
        return pool

    def views(self, layer: int, runs: Runs) -> list[memoryview]:
        """The bytes of `runs`, in order, without a copy."""
        view = self._layers[layer]
        return [view[start : start + length] for start, length in runs.tolist()]

    def pieces(self, parts: Sequence[Part]) -> Pieces:
        """Where the bytes of `parts` lie; valid until `release`. Shared: never changed.

        Raises:
            ValueError: there is no such layer, or the pool was released.
        """
        first, runs = parts[0]
        found = self._spreads.get(id(runs))
        if found is None or first + len(parts) > len(self._bases) or not _is_alike(parts):
            return _pieces(self._bases, parts)
        return found[1][first * len(runs) : (first + len(parts)) * len(runs)]

    def locate(self, parts: Sequence[Part]) -> None:
        """`pieces` will be asked for some of these layers at a time: compute it for all of them now.

        Only where they have the same bytes in every layer, and not too many. One thread.
        """
        _, runs = parts[0]
        if len(runs) * len(self._bases) > _MAX_SPREAD_PIECES or not _is_alike(parts):
            return
        if len(self._spreads) >= _MAX_SPREADS:
            self._spreads.pop(next(iter(self._spreads)))
        self._spreads[id(runs)] = runs, _spread(self._bases, runs)

    def address(self, layer: int) -> int:
        """Of a layer's first byte; valid until `release`."""
        return int(self._bases[layer])

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
        self._layers, self._bases = [], self._bases[:0]
        self._spreads.clear()


class DevicePool:
    """One rank's KV bytes by layer in the memory of a device: addresses, which mean something to its driver only."""

    def __init__(self, layout: KVLayout, address: int, num_bytes: int) -> None:
        """`num_bytes`: what lies there for certain, whatever the layout says."""
        if num_bytes < layout.pool_bytes:
            raise ValueError(f"the pool needs {layout.pool_bytes} bytes, the device memory has {num_bytes}")
        layers = range(len(layout.model.layers))
        self._bases = np.array([address + layout.layer_offset(layer) for layer in layers], np.uint64)
        self._sizes = [layout.block_bytes(layer) * layout.geometry.num_blocks for layer in layers]

    def pieces(self, parts: Sequence[Part]) -> Pieces:
        """Where the bytes of `parts` lie.

        Raises:
            ValueError: some lie outside of their layer.
        """
        for layer, runs in parts:
            if int((runs[:, 0] + runs[:, 1]).max()) > self._sizes[layer]:
                raise ValueError(f"bytes outside of layer {layer} of a pool on a device")
        return _pieces(self._bases, parts)


class Extents:
    """The scattered bytes of a frame in one pool, in canonical order. Valid until the pool is released."""

    def __init__(self, pool: Pool, parts: Sequence[Part], num_bytes: int) -> None:
        self.num_bytes: Final = num_bytes
        self._pool = pool
        self._parts = parts
        self._pieces: Pieces | None = None
        self._address = 0

    @property
    def parts(self) -> Sequence[Part]:
        """What they are, by layer."""
        return self._parts

    def views(self, start: int = 0, num_bytes: int | None = None) -> list[memoryview]:
        """The bytes from `start` on, in order, without a copy; all if `num_bytes` is None."""
        found = [view for layer, runs in self._parts for view in self._pool.views(layer, runs)]
        return found if num_bytes is None else _cut(found, start, num_bytes)

    @property
    def pieces(self) -> Pieces:
        """Where the bytes lie."""
        if self._pieces is None:
            self._pieces = self._pool.pieces(self._parts)
            self._address = address_of(self._pieces)
        return self._pieces

    @property
    def address(self) -> int:
        """Of the list of `pieces`, for native code; valid as long as this object."""
        return self._address or address_of(self.pieces)

    def copies_from(self, source: Extents) -> Iterator[tuple[Bytes, Bytes]]:
        """Pairs of equally long (to, from) pieces of at most HASH_BYTES, in order."""
        for (layer, runs), (source_layer, source_runs) in zip(self._parts, source._parts, strict=True):
            to, fro = self._pool.array(layer), source._pool.array(source_layer)
            for start, end, from_start, from_end in zip_runs(runs, source_runs, HASH_BYTES):
                yield to[start:end], fro[from_start:from_end]


def copy(to: Extents, source: Extents) -> None:
    """Copy the bytes of a frame from another pool. Large copies do not hold the GIL."""
    native = library()
    if native is not None:
        native.copy(to.address, source.address, to.num_bytes, None, False)
        return
    for mine, theirs in to.copies_from(source):
        mine[:] = theirs


def _is_alike(parts: Sequence[Part]) -> bool:
    """Neighbouring layers with the same runs?"""
    first, runs = parts[0]
    return all(part[1] is runs and part[0] == layer for layer, part in enumerate(parts, first))


def _spread(bases: Addresses, runs: Runs) -> Pieces:
    """The same runs in every layer."""
    pieces = np.empty((len(bases), len(runs), 2), np.uint64)
    np.add(bases[:, None], runs[:, 0], out=pieces[:, :, 0])
    pieces[:, :, 1] = runs[:, 1]
    return pieces.reshape(-1, 2)


def _pieces(bases: Addresses, parts: Sequence[Part]) -> Pieces:
    if _is_alike(parts):
        first, runs = parts[0]
        if first + len(parts) > len(bases):
            raise ValueError(f"layers {first}+{len(parts)} of a pool with {len(bases)}")
        return _spread(bases[first : first + len(parts)], runs)
    return np.concatenate([runs + np.array((bases[layer], 0), np.uint64) for layer, runs in parts])


def _bases(layers: Sequence[memoryview]) -> Addresses:
    return np.array([address_of(np.frombuffer(view, np.uint8)) for view in layers], np.uint64)


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Of its first element; valid as long as the array."""
    return int(array.__array_interface__["data"][0])


def _cut(views: list[memoryview], start: int, num_bytes: int) -> list[memoryview]:
    """Bytes [start, start + num_bytes) of a list of views."""
    found: list[memoryview] = []
    for view in views:
        piece = view[start : start + num_bytes]
        start = max(0, start - len(view))
        if piece:
            found.append(piece)
            num_bytes -= len(piece)
    return found
