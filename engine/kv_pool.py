"""One rank's paged KV pool: a flat buffer in the canonical layout of baton.kv_layout, and torch views of its layers."""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from baton.kv_layout import KVLayout
from engine.kv_memory import KVMemory

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of weights, activations and KV."""
FP8: Final = torch.float8_e4m3fn
"""Of KV on a device, and of weights and inputs of its products. Its largest number is 448; it has NaN, no infinity."""
STORED_DTYPES: Final = TORCH_DTYPES | {"float8_e4m3fn": FP8}
"""Of KV, as baton.kv_layout names what is stored."""


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
    """A pool in a sealed memfd (engine.kv_memory): peers on this host may map it, and can only read it. Zero-filled."""

    def __init__(self, layout: KVLayout) -> None:
        """Raises OSError: the pool does not fit in memory."""
        self._memory = KVMemory(layout.pool_bytes, commit=True)
        flat = torch.frombuffer(self._memory.view, dtype=TORCH_DTYPES[layout.model.dtype])
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
        return self._memory.view

    def fd(self) -> int | None:
        """See KVPool."""
        return self._memory.fd

    def close(self) -> None:
        """See KVPool."""
        self._layers.clear()
        self._memory.close()
