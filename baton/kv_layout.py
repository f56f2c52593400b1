"""How the bytes of a KV pool are laid out, and which pools may exchange them. Knows no tensors.

A rank's pool is one flat buffer in the canonical layout

    [layer][block][K|V][kv_head][token][dim]

so the bytes of one block of one layer are contiguous, and so are the heads of one half of it.
`UNIT_TOKENS` tokens are the smallest thing that is hashed for the prefix cache, marked in a bitmap of
received ranges, or sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UNIT_TOKENS: Final = 16
_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer stores per token, over all ranks."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class ModelKV:
    """Identity: both ends of a transfer must agree on every field."""

    layers: tuple[LayerSpec, ...]
    dtype: str
    fingerprint: str
    """Hex digest over the model's config and weights (or the simulated model's parameters)."""
    hash_version: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(f"KV dtype must be one of {sorted(_DTYPE_BYTES)}, not {self.dtype!r}")

    @property
    def itemsize_bytes(self) -> int:
        """Bytes per stored element."""
        return _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Geometry: may differ between the ends as long as a copy plan exists."""

    tp_size: int
    block_size: int
    num_blocks: int

    def __post_init__(self) -> None:
        if self.block_size % UNIT_TOKENS or self.block_size <= 0:
            raise ValueError(f"block_size must be a positive multiple of {UNIT_TOKENS}, not {self.block_size}")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One rank's pool: identity + geometry + rank. All offsets and sizes are bytes in that rank's buffer.

    KV heads are split over ranks as evenly sharded contiguous runs; with fewer heads than ranks each head
    is replicated on `tp_size / num_kv_heads` consecutive ranks.
    """

    model: ModelKV
    geometry: KVGeometry
    tp_rank: int

    def __post_init__(self) -> None:
        for spec in self.model.layers:
            kv_head_range(spec.num_kv_heads, self.geometry.tp_size, self.tp_rank)

    def heads(self, layer: int) -> range:
        """Global KV-head indices that this rank stores for `layer`."""
        return kv_head_range(self.model.layers[layer].num_kv_heads, self.geometry.tp_size, self.tp_rank)

    def head_bytes(self, layer: int) -> int:
        """Bytes of one head of one half (K or V) of one block."""
        return self.geometry.block_size * self.model.layers[layer].head_dim * self.model.itemsize_bytes

    def block_bytes(self, layer: int) -> int:
        """Bytes of one block of one layer: K and V, all of this rank's heads."""
        return 2 * len(self.heads(layer)) * self.head_bytes(layer)

    def layer_offset(self, layer: int) -> int:
        """Where the layer's first block starts."""
        return sum(self.block_bytes(i) for i in range(layer)) * self.geometry.num_blocks

    def block_offset(self, layer: int, block: int) -> int:
        """Where one block of one layer starts."""
        assert 0 <= block < self.geometry.num_blocks
        return self.layer_offset(layer) + block * self.block_bytes(layer)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return sum(self.block_bytes(i) for i in range(len(self.model.layers)))

    @property
    def pool_bytes(self) -> int:
        """Size of this rank's whole buffer."""
        return self.bytes_per_block * self.geometry.num_blocks


def stored_dtype(kv_dtype: str, dtype: str) -> str:
    """What KV is stored as, where `engine.kv_dtype` and the model's dtype are these."""
    return {"auto": dtype, "fp8": "float8_e4m3fn"}[kv_dtype]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A rank's pool in the memory of a CUDA device, in one allocation of cudaMalloc, freed by the process's end only."""

    address: int
    num_bytes: int
    ordinal: int
    """Of the device, as this process counts those that it sees."""


def kv_head_range(num_kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """Global KV heads that `tp_rank` of `tp_size` stores; replicated when there are fewer heads than ranks.

    Raises:
        ValueError: heads and ranks do not divide each other.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank {tp_rank} is not in 0..{tp_size - 1}")
    if num_kv_heads % tp_size == 0:
        per_rank = num_kv_heads // tp_size
        return range(tp_rank * per_rank, (tp_rank + 1) * per_rank)
    if tp_size % num_kv_heads == 0:
        head = tp_rank // (tp_size // num_kv_heads)
        return range(head, head + 1)
    raise ValueError(f"{num_kv_heads} KV heads can not be split over {tp_size} ranks")
