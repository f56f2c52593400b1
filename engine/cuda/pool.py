"""One rank's KV pool in device memory, in the canonical layout of baton.kv_layout."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kv_layout import DeviceMemory, KVLayout
from engine.kv_pool import STORED_DTYPES


class DevicePool:
    """One plain allocation, zero-filled: other processes may map it, for it is no virtual-memory segment."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        """Raises torch.OutOfMemoryError: the pool does not fit on the device."""
        dtype = STORED_DTYPES[layout.model.dtype]
        self._flat = torch.zeros(layout.pool_bytes // layout.model.itemsize_bytes, dtype=dtype, device=device)
        geometry, itemsize = layout.geometry, layout.model.itemsize_bytes
        self._layers: list[Tensor] = []
        for index, spec in enumerate(layout.model.layers):
            shape = (geometry.num_blocks, 2, len(layout.heads(index)), geometry.block_size, spec.head_dim)
            start = layout.layer_offset(index) // itemsize
            size = geometry.num_blocks * layout.block_bytes(index) // itemsize
            self._layers.append(self._flat[start : start + size].view(shape))

    def layer(self, layer: int) -> Tensor:
        """See KVPool."""
        return self._layers[layer]

    @property
    def flat(self) -> Tensor:
        """All of it, one dimension, in the dtype of the KV."""
        return self._flat

    def memory(self) -> DeviceMemory:
        """The same as addresses; valid until `close`."""
        num_bytes = self._flat.numel() * self._flat.element_size()
        return DeviceMemory(self._flat.data_ptr(), num_bytes, self._flat.device.index or 0)

    def buffer(self) -> memoryview:
        """See KVPool. Raises RuntimeError: the host can not address a device's memory."""
        raise RuntimeError("this KV pool lies in device memory: there is no host buffer of it")

    def fd(self) -> int | None:
        """See KVPool: there is none."""
        return None

    def close(self) -> None:
        """See KVPool."""
        self._layers.clear()
        self._flat = self._flat.new_empty(0)
