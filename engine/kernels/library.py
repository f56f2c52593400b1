"""The kernels as Python sees them: the C structs, one `Library` per instruction set, packed linears, threads, phases.

Every call releases the GIL. Memory that a C struct points to is kept alive by the Python object that made the struct.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from baton import native_build
from engine.kernels.build import Isa, KernelsUnavailable, built, isas

log = logging.getLogger(__name__)

_ABI: Final = 1
ISA_VARIABLE: Final = native_build.VARIABLE
"""Environment: an `Isa` to use instead of the best, or "off"."""
PANEL: Final = 32
"""Outputs that are packed together: see src/base.h."""
PHASES: Final = ("norm", "qkv", "rope+kv", "attention", "output", "gate_up", "down", "sum", "head")

LossCallback = ctypes.CFUNCTYPE(c_int32, c_int32, c_double)


class SharedGroup(Structure):
    """Mirrors src/comm.h."""

    _fields_ = (
        ("memory", c_void_p),
        ("rank", c_int32),
        ("size", c_int32),
        ("slot_bytes", c_int64),
        ("num_pieces", c_uint64),
        ("is_lost", LossCallback),
    )


class LinearDesc(Structure):
    """Mirrors src/decoder.h, as do the structs below."""

    _fields_ = (
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int32),
        ("num_inputs", c_int32),
        ("is_int8", c_int32),
        ("reserved", c_int32),
    )


class LayerDesc(Structure):
    """One layer's weights, and its part of the pool."""

    _fields_ = (
        ("qkv", LinearDesc),
        ("output", LinearDesc),
        ("gate_up", LinearDesc),
        ("down", LinearDesc),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("pool", c_void_p),
        ("window", c_int64),
    )


class ModelDesc(Structure):
    """One rank's model."""

    _fields_ = (
        ("is_bf16", c_int32),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("num_head_outputs", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", LinearDesc),
        ("layers", POINTER(LayerDesc)),
        ("group", POINTER(SharedGroup)),
    )


class StepDesc(Structure):
    """One step's batch, flat, and where its results go."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
        ("num_rows", c_int32),
        ("num_blocks_in_tables", c_int32),
        ("token_ids", c_void_p),
        ("starts", c_void_p),
        ("num_new", c_void_p),
        ("tables", c_void_p),
        ("table_begin", c_void_p),
        ("rows", c_void_p),
        ("cos_sin", c_void_p),
        ("logits", c_void_p),
        ("best_index", c_void_p),
        ("best_value", c_void_p),
    )


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "baton_abi": (c_int32, ()),
    "baton_enable": (c_int32, ()),
    "baton_map": (c_void_p, (c_uint64,)),
    "baton_unmap": (None, (c_void_p, c_uint64)),
    "baton_pool_create": (c_void_p, (c_int32, c_void_p)),
    "baton_pool_destroy": (None, (c_void_p,)),
    "baton_packed_bytes": (c_uint64, (c_int32, c_int64, c_int64)),
    "baton_pack": (None, (c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "baton_linear": (c_double, (c_void_p, c_int32, c_void_p, c_int32, POINTER(LinearDesc), c_void_p, c_int32)),
    "baton_attention": (
        None,
        (
            c_int32,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int32,
            c_int32,
            c_int32,
            c_int32,
            c_int32,
            c_float,
            POINTER(StepDesc),
        ),
    ),
    "baton_model_create": (c_void_p, (POINTER(ModelDesc), c_void_p)),
    "baton_model_destroy": (None, (c_void_p,)),
    "baton_model_run": (c_int32, (c_void_p, POINTER(StepDesc), c_int32, c_int32)),
    "baton_model_phases": (None, (c_void_p, c_int32, c_void_p)),
    "baton_all_reduce": (c_int32, (POINTER(SharedGroup), c_void_p, c_int64, c_int32)),
    "baton_read_s": (c_double, (c_void_p, c_uint64)),
    "baton_tile_peak": (c_double, (c_int32,)),
}


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded kernels of one instruction set. `c` has the functions of src/kernels.cpp."""

    isa: Isa
    path: Path
    c: Any


def load(isa: Isa | None = None) -> Library:
    """The kernels for `isa`; by default what $BATON_KERNELS names, or the best that this machine runs.

    Compiles them the first time. Later calls return the same object.

    Raises:
        KernelsUnavailable: no compiler, the CPU does not run `isa`, or $BATON_KERNELS is "off".
    """
    if isa is not None:
        return _load(isa)
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted == "off":
        raise KernelsUnavailable(f"${ISA_VARIABLE} is off")
    if wanted:
        return _load(Isa(wanted))
    best = isas()[0]
    try:
        return _load(best)
    except _NotPermitted as error:
        log.warning("AMX is not permitted here; using AVX-512", extra={"reason": str(error)})
        return _load(Isa.AVX512)


class _NotPermitted(KernelsUnavailable):
    """The CPU has the feature and the kernel does not let this process use it."""


@functools.cache
def _load(isa: Isa) -> Library:
    if isa not in isas():
        raise KernelsUnavailable(f"this CPU does not run {isa} kernels")
    path = built(isa)
    try:
        c = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} can not be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    assert c.baton_abi() == _ABI, "the kernels are not those of this source"
    if c.baton_enable():
        raise _NotPermitted("arch_prctl(ARCH_REQ_XCOMP_PERM) failed")
    return Library(isa, path, c)


class Memory:
    """Zeroed bytes in huge pages, where the system has them. Freed with the object."""

    def __init__(self, library: Library, num_bytes: int) -> None:
        """Raises MemoryError."""
        self._library, self.num_bytes = library, num_bytes
        self.address: int | None = library.c.baton_map(num_bytes)
        if self.address is None:
            raise MemoryError(f"{num_bytes} bytes for weights")

    def __del__(self) -> None:
        if getattr(self, "address", None) is not None:
            self._library.c.baton_unmap(self.address, self.num_bytes)
            self.address = None


class ThreadPool:
    """Threads that compute together: the caller of a kernel and `num_threads` - 1 others. One kernel at a time.

    `cores`: where to pin them, one each; entry 0, the caller's, is left to the caller. Ends with the object.
    """

    def __init__(self, library: Library, num_threads: int = 1, cores: Sequence[int] | None = None) -> None:
        if num_threads < 1 or (cores is not None and len(cores) < num_threads):
            raise ValueError(f"{num_threads} threads on cores {cores}")
        self._library, self.num_threads = library, num_threads
        pinned = None if cores is None else (c_int32 * len(cores))(*cores)
        self.handle: int | None = library.c.baton_pool_create(num_threads, pinned)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self._library.c.baton_pool_destroy(self.handle)
            self.handle = None


class PackedLinear:
    """One linear's weights in the kernels' layout, in float32, bfloat16 or int8. Immutable."""

    def __init__(
        self,
        library: Library,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
        order: Tensor | None = None,
        num_outputs: int | None = None,
        address: int | None = None,
    ) -> None:
        """Pack `weight` [out_features, in_features], float32 or bfloat16, contiguous rows; nothing of it is kept.

        `int8` quantises each output by its largest weight. Row i becomes packed output `order[i]` (default i) of
        `num_outputs` (default out_features); positions that no row takes compute 0. `address`: zeroed memory of
        `packed_bytes`, which outlives this; default: memory of its own.
        """
        rows, self.num_inputs = weight.shape
        self.num_outputs = rows if num_outputs is None else num_outputs
        padded = -(-self.num_outputs // PANEL) * PANEL
        order = torch.arange(rows, dtype=torch.int32) if order is None else order.to(torch.int32).contiguous()
        self.scales: Tensor | None = None
        if int8:
            amax = weight.float().abs().amax(dim=1)
            scale = amax / 127
            weight = (weight.float() / scale.clamp(min=1e-30)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            self.scales = torch.zeros(padded)
            self.scales[order.long()] = scale
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(padded)
            self.bias[order.long()] = bias.float()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.num_bytes = packed_bytes(library, weight.dtype, self.num_outputs, self.num_inputs)
        self._memory = Memory(library, self.num_bytes) if address is None else None
        self.address = address if self._memory is None else self._memory.address
        library.c.baton_pack(
            weight.element_size(),
            self.address,
            weight.data_ptr(),
            rows,
            self.num_inputs,
            weight.stride(0),
            order.data_ptr(),
        )
        self.desc = LinearDesc(
            self.address,
            None if self.scales is None else self.scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.num_outputs,
            self.num_inputs,
            int(int8),
            0,
        )


def packed_bytes(library: Library, dtype: torch.dtype, num_outputs: int, num_inputs: int) -> int:
    """Size of a packed linear."""
    return int(library.c.baton_packed_bytes(dtype.itemsize, num_outputs, num_inputs))


def linear(
    library: Library, pool: ThreadPool, x: Tensor, packed: PackedLinear, repeats: int = 0
) -> tuple[Tensor, float]:
    """`x` [num_rows, in_features] through `packed`: float32 [num_rows, num_outputs], and the best time of `repeats`, s."""
    x = x.contiguous()
    stride = -(-packed.num_outputs // PANEL) * PANEL
    out = torch.empty(len(x), stride)
    seconds = library.c.baton_linear(
        pool.handle, int(x.dtype == torch.bfloat16), x.data_ptr(), len(x), byref(packed.desc), out.data_ptr(), repeats
    )
    return out[:, : packed.num_outputs], seconds
