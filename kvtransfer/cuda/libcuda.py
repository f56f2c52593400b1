"""The CudaDriver over NVIDIA's libraries: libcuda (the driver API) and libnvrtc (the compiler of the kernels), by ctypes.

Signatures and rules are those of NVIDIA's CUDA driver API and NVRTC references. Only the primary context is used, which
is the one that torch and the CUDA runtime use. Nothing is loaded before a `LibCuda` is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvtransfer.cuda.driver import HANDLE_BYTES, UNIT_BYTES, UUID_BYTES, CudaError, digest_of, table
from kvtransfer.pool import Pieces, address_of

_SOURCE: Final = Path(__file__).parent / "kernels.cu"
_THREADS: Final = 256
_TILE_UNITS: Final = 1024
_MAX_BLOCKS: Final = 2**31 - 1

_SUCCESS: Final = 0
_NOT_READY: Final = 600
_STREAM_NON_BLOCKING: Final = 0x1
_EVENT_DISABLE_TIMING: Final = 0x2
_IPC_LAZY_PEER_ACCESS: Final = 0x1
_COMPUTE_MAJOR: Final = 75
_COMPUTE_MINOR: Final = 76
_IS_IPC_CAPABLE: Final = 10
_RANGE_START: Final = 11
_RANGE_SIZE: Final = 12

_PIECE_BYTES: Final = 24
_SUMS_BYTES: Final = 16
_FIRST_TABLE: Final = 1024
"""Pieces that a slot can take at first; it grows."""
_FIRST_SLOTS: Final = 8
"""Made at the start, for allocating may wait for the device."""


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle: opaque, passed by value."""

    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


_DEVICE: Final = c_int
_ADDRESS: Final = c_uint64
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(_DEVICE), c_int),
    "cuDeviceGetUuid_v2": (c_void_p, _DEVICE),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, _DEVICE),
    "cuDeviceCanAccessPeer": (POINTER(c_int), _DEVICE, _DEVICE),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), _DEVICE),
    "cuDevicePrimaryCtxRelease_v2": (_DEVICE,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxGetStreamPriorityRange": (POINTER(c_int), POINTER(c_int)),
    "cuPointerGetAttribute": (c_void_p, c_int, _ADDRESS),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (POINTER(_ADDRESS), _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(_ADDRESS), c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _ADDRESS, c_size_t, c_void_p),
    "cuMemsetD8Async": (_ADDRESS, c_ubyte, c_size_t, c_void_p),
    "cuModuleLoadData": (POINTER(c_void_p), c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class _Calls:
    """The functions of libcuda; `call` turns every result but success into a CudaError. Calls release the GIL."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = c_int, arguments
        except (OSError, AttributeError) as error:
            raise CudaError(f"NVIDIA's driver is not there or too old: {error}") from error

    def call(self, name: str, *arguments: Any) -> None:
        result = self.result(name, *arguments)
        if result != _SUCCESS:
            raise CudaError(f"{name}: {self.name_of(result)}")

    def result(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._library, name)(*arguments))

    def name_of(self, result: int) -> str:
        found = c_char_p()
        self._library.cuGetErrorName(result, byref(found))
        return found.value.decode() if found.value else f"error {result}"


class _Slot:
    """What one job needs: a table and two sums, pinned here and on the device, and an event."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self.event = c_void_p()
        self.host = c_void_p()
        self.device = _ADDRESS()
        self._num_bytes = 0
        calls.call("cuEventCreate", byref(self.event), _EVENT_DISABLE_TIMING)

    def reserve(self, num_pieces: int) -> None:
        """Have room for so many pieces; allocates, so it may wait for the device, but seldom."""
        wanted = _SUMS_BYTES + _PIECE_BYTES * max(_FIRST_TABLE, 1 << (num_pieces - 1).bit_length())
        if self._num_bytes < wanted:
            self._free()
            self._calls.call("cuMemAllocHost_v2", byref(self.host), wanted)
            self._calls.call("cuMemAlloc_v2", byref(self.device), wanted)
            self._num_bytes = wanted

    def sums(self) -> tuple[int, int]:
        words = np.frombuffer(ctypes.string_at(self.host, _SUMS_BYTES), "<u8")
        return int(words[0]), int(words[1])

    def _free(self) -> None:
        self._num_bytes = 0
        host, self.host = self.host, c_void_p()
        device, self.device = self.device, _ADDRESS()
        if host.value:
            self._calls.call("cuMemFreeHost", host)
        if device.value:
            self._calls.call("cuMemFree_v2", device)

    def close(self) -> None:
        self._free()
        self._calls.call("cuEventDestroy_v2", self.event)


class _Job:
    """See Job. Gives its slot back when it is seen to be done."""

    def __init__(self, calls: _Calls, slot: _Slot, num_units: int, free: list[_Slot]) -> None:
        self._calls = calls
        self._slot: _Slot | None = slot
        self._num_units = num_units
        self._free = free
        self._digest = b""

    def is_done(self) -> bool:
        slot = self._slot
        if slot is None:
            return True
        result = self._calls.result("cuEventQuery", slot.event)
        if result == _NOT_READY:
            return False
        if result != _SUCCESS:
            raise CudaError(f"cuEventQuery: {self._calls.name_of(result)}")
        self._digest = digest_of(*slot.sums(), self._num_units)
        self._slot = None
        self._free.append(slot)
        return True

    @property
    def digest(self) -> bytes:
        assert self._digest, "not done"
        return self._digest


class LibCuda:
    """See CudaDriver. Made on the thread that starts the rank, then used by its transfer thread."""

    def __init__(self, ordinal: int, *, libcuda: str = "libcuda.so.1", image: bytes | None = None) -> None:
        """`ordinal` counts the devices that this process sees. `image`: the kernels, compiled; None: compile them.

        Raises:
            CudaError: a library is missing, there is no such device, or the kernels do not compile. Nothing is held.
        """
        calls = self._calls = _Calls(libcuda)
        calls.call("cuInit", 0)
        self._device = _DEVICE()
        calls.call("cuDeviceGet", byref(self._device), ordinal)
        self._uuid = self._uuid_of(self._device)
        self._context, self._stream, self._module = c_void_p(), c_void_p(), c_void_p()
        self._copy, self._digest = c_void_p(), c_void_p()
        self._slots: list[_Slot] = []
        self._free_slots: list[_Slot] = []
        calls.call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        try:
            self.bind()
            least, greatest = c_int(), c_int()
            calls.call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
            calls.call("cuStreamCreateWithPriority", byref(self._stream), _STREAM_NON_BLOCKING, greatest)
            calls.call("cuModuleLoadData", byref(self._module), image or compiled(self._architecture()))
            calls.call("cuModuleGetFunction", byref(self._copy), self._module, b"baton_copy")
            calls.call("cuModuleGetFunction", byref(self._digest), self._module, b"baton_digest")
            for _ in range(_FIRST_SLOTS):
                self._add_slot()
        except BaseException:
            self.close()
            raise

    def _architecture(self) -> str:
        version = [c_int(), c_int()]
        for number, attribute in zip(version, (_COMPUTE_MAJOR, _COMPUTE_MINOR), strict=True):
            self._calls.call("cuDeviceGetAttribute", byref(number), attribute, self._device)
        return f"sm_{version[0].value}{version[1].value}"

    def _uuid_of(self, device: c_int) -> bytes:
        found = (c_ubyte * UUID_BYTES)()
        self._calls.call("cuDeviceGetUuid_v2", found, device)
        return bytes(found)

    @property
    def uuid(self) -> bytes:
        """Of the device."""
        return self._uuid

    def readable(self) -> frozenset[bytes]:
        """UUIDs of devices whose memory this one can read."""
        count, can = c_int(), c_int()
        self._calls.call("cuDeviceGetCount", byref(count))
        found = {self._uuid}
        for ordinal in range(count.value):
            device = _DEVICE()
            self._calls.call("cuDeviceGet", byref(device), ordinal)
            if device.value != self._device.value:
                self._calls.call("cuDeviceCanAccessPeer", byref(can), self._device, device)
                if can.value:
                    found.add(self._uuid_of(device))
        return frozenset(found)

    def bind(self) -> None:
        """Make the device's primary context the calling thread's."""
        self._calls.call("cuCtxSetCurrent", self._context)

    def range_of(self, address: int) -> tuple[int, int]:
        """(start, size) of the allocation; for a mapping, of what is mapped."""
        start, size = c_uint64(), c_size_t()
        self._calls.call("cuPointerGetAttribute", byref(start), _RANGE_START, address)
        self._calls.call("cuPointerGetAttribute", byref(size), _RANGE_SIZE, address)
        return start.value, size.value

    def export(self, start: int) -> bytes:
        """The handle of an allocation of cudaMalloc or cuMemAlloc."""
        capable = c_int()
        self._calls.call("cuPointerGetAttribute", byref(capable), _IS_IPC_CAPABLE, start)
        if not capable.value:
            raise CudaError("this memory can not be exported: it must come from cudaMalloc, not from a VMM allocator")
        handle = _IpcHandle()
        self._calls.call("cuIpcGetMemHandle", byref(handle), start)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation."""
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"an IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        start = _ADDRESS()
        packed = _IpcHandle.from_buffer_copy(handle)
        self._calls.call("cuIpcOpenMemHandle_v2", byref(start), packed, _IPC_LAZY_PEER_ACCESS)
        return start.value

    def close_handle(self, start: int) -> None:
        """Undo one `open`."""
        self._calls.call("cuIpcCloseMemHandle", start)

    def begin(self, to: Pieces, num_bytes: int, source: Pieces | None) -> _Job:
        """Launch the copy and the digest, each once for all pieces."""
        pieces = table(to, source)
        num_units = num_bytes // UNIT_BYTES
        num_blocks = -(-num_units // _TILE_UNITS)
        if not 0 < num_blocks <= _MAX_BLOCKS:
            raise ValueError(f"{num_bytes} bytes are no job")
        slot = self._slot(len(pieces))
        call, stream = self._calls.call, self._stream
        host, device = slot.host.value, slot.device.value
        assert host is not None
        ctypes.memmove(host + _SUMS_BYTES, address_of(pieces), pieces.nbytes)
        try:
            call("cuMemcpyHtoDAsync_v2", device + _SUMS_BYTES, host + _SUMS_BYTES, pieces.nbytes, stream)
            arguments = [c_uint64(device + _SUMS_BYTES), c_uint(len(pieces)), c_uint64(num_units)]
            if source is not None:
                self._launch(self._copy, num_blocks, arguments)
            call("cuMemsetD8Async", device, 0, _SUMS_BYTES, stream)
            self._launch(self._digest, num_blocks, [*arguments, c_uint64(device)])
            call("cuMemcpyDtoHAsync_v2", host, device, _SUMS_BYTES, stream)
            call("cuEventRecord", slot.event, stream)
        except CudaError:
            with contextlib.suppress(CudaError):  # then nothing runs on the device any more
                self.finish()
            self._free_slots.append(slot)
            raise
        return _Job(self._calls, slot, num_units, self._free_slots)

    def _slot(self, num_pieces: int) -> _Slot:
        if not self._free_slots:
            self._add_slot()
        self._free_slots[-1].reserve(num_pieces)
        return self._free_slots.pop()

    def _add_slot(self) -> None:
        slot = _Slot(self._calls)
        self._slots.append(slot)
        slot.reserve(1)
        self._free_slots.append(slot)

    def _launch(self, function: c_void_p, num_blocks: int, arguments: list[Any]) -> None:
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._calls.call("cuLaunchKernel", function, num_blocks, 1, 1, _THREADS, 1, 1, 0, self._stream, pointers, None)

    def finish(self) -> None:
        """Wait for the stream."""
        self._calls.call("cuStreamSynchronize", self._stream)

    def allocate(self, num_bytes: int) -> int:
        """Memory on the device."""
        start = _ADDRESS()
        self._calls.call("cuMemAlloc_v2", byref(start), num_bytes)
        return start.value

    def free(self, start: int) -> None:
        """Give it back."""
        self._calls.call("cuMemFree_v2", start)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes on the device."""
        self._calls.call("cuMemcpyHtoDAsync_v2", address, data, len(data), self._stream)
        self.finish()

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes of the device."""
        data = ctypes.create_string_buffer(num_bytes)
        self._calls.call("cuMemcpyDtoHAsync_v2", data, address, num_bytes, self._stream)
        self.finish()
        return data.raw

    def close(self) -> None:
        """Free the stream, the slots and the kernels; the context stays for who else has it."""
        if not self._context.value:
            return
        with contextlib.suppress(CudaError):  # a device that does not work has nothing to free
            self.bind()
            for slot in self._slots:
                slot.close()
            if self._module.value:
                self._calls.call("cuModuleUnload", self._module)
            if self._stream.value:
                self._calls.call("cuStreamDestroy_v2", self._stream)
            self._calls.call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._slots, self._free_slots, self._context = [], [], c_void_p()


_NVRTC_NAMES: Final = ("libnvrtc.so.13", "libnvrtc.so.12")
_NVRTC_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_void_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_void_p),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
}


def compiled(architecture: str) -> bytes:
    """The kernels for a device ("sm_90"), by NVRTC, which comes with torch for CUDA. Blocks for a second or so.

    Raises:
        CudaError: NVRTC is missing, or does not compile them.
    """
    library = _nvrtc()
    program = c_void_p()

    def call(name: str, *arguments: Any) -> None:
        result = int(getattr(library, name)(*arguments))
        if result:
            raise CudaError(f"{name}: error {result}{_log_of(library, program)}")

    call("nvrtcCreateProgram", byref(program), _SOURCE.read_bytes(), b"kernels.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={architecture}", f"-DTHREADS={_THREADS}", f"-DTILE_UNITS={_TILE_UNITS}"]
        call("nvrtcCompileProgram", program, len(options), (c_char_p * len(options))(*(o.encode() for o in options)))
        size = c_size_t()
        call("nvrtcGetCUBINSize", program, byref(size))
        image = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, image)
        return image.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _nvrtc() -> Any:
    """The compiler's library: the system's, or the one that torch brought along."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    beside_torch = [str(path) for folder in folders for name in _NVRTC_NAMES for path in folder.glob(f"*/lib/{name}")]
    for path in (*beside_torch, *_NVRTC_NAMES):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            for name, arguments in _NVRTC_SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = c_int, arguments
            return library
    raise CudaError(f"NVRTC is missing ({' or '.join(_NVRTC_NAMES)}; it comes with torch for CUDA)")


def _log_of(library: Any, program: c_void_p) -> str:
    size = c_size_t()
    if not program.value or library.nvrtcGetProgramLogSize(program, byref(size)) or size.value <= 1:
        return ""
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return f": {log.value.decode(errors='replace')}"
