"""One rank's paged KV pool: a flat buffer in the canonical layout of baton.kv_layout, and torch views of its layers."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final, Protocol

import torch
from torch import Tensor

from baton.kv_layout import KVLayout

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# linux/fcntl.h; Python 3.11's fcntl has no name for it. Linux >= 5.1.
_F_SEAL_FUTURE_WRITE: Final = 0x0010


class KVPool(Protocol):
    """Where the blocks live. Only the engine thread of the owning rank changes blocks that its ledger holds."""

    def layer(self, layer: int) -> Tensor:
        """The blocks of a layer, [num_blocks, 2 (K, V), kv_heads of this rank, block_size, head_dim]; a view."""
        ...

    def buffer(self) -> memoryview:
        """All bytes of the pool, writable; valid until `close`."""
        ...

    def fd(self) -> int | None:
        """A descriptor that peers on this host may map read-only; the pool's own: do not close it."""
        ...

    def close(self) -> None:
        """Give the memory back once the last view of it is gone. Idempotent."""
        ...


class MemfdPool:
    """A pool in a sealed memfd: shared by passing its descriptor, and gone with the last process that holds it.

    After the seals nobody can resize it, and nobody but this mapping can write it. Zero-filled.
    """

    def __init__(self, layout: KVLayout) -> None:
        """Raises OSError: the pool does not fit in memory (or memfd is not available: not Linux)."""
        self._fd: int | None = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, layout.pool_bytes)
            self._map: mmap.mmap | None = mmap.mmap(self._fd, layout.pool_bytes)
            _seal(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        flat = torch.frombuffer(self._map, dtype=TORCH_DTYPES[layout.model.dtype])
        geometry, itemsize = layout.geometry, layout.model.itemsize_bytes
        self._layers: list[Tensor] = []
        for index, spec in enumerate(layout.model.layers):
            shape = (geometry.num_blocks, 2, len(layout.heads(index)), geometry.block_size, spec.head_dim)
            start = layout.layer_offset(index) // itemsize
            size = geometry.num_blocks * layout.block_bytes(index) // itemsize
            self._layers.append(flat[start : start + size].view(shape))

    def layer(self, layer: int) -> Tensor:
        """See KVPool."""
        return self._layers[layer]

    def buffer(self) -> memoryview:
        """See KVPool."""
        assert self._map is not None, "the pool is closed"
        return memoryview(self._map)

    def fd(self) -> int | None:
        """See KVPool."""
        return self._fd

    def close(self) -> None:
        """See KVPool."""
        self._layers.clear()
        self._map = None  # unmapped when the last tensor or memoryview over it goes
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _seal(fd: int) -> None:
    fixed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed | _F_SEAL_FUTURE_WRITE)
    except OSError:  # a kernel before 5.1
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed)
