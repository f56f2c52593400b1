"""A CudaDriver without a device. Its memory is memfds, which other drivers, in this process or another, open by handle.

Stricter than a device: it notices work outside of an allocation, on what is unmapped or not yet written, and an end of
the mapping or of the driver while work is under way (`violations`).
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np

from kvtransfer.cuda.driver import HANDLE_BYTES, CudaError, reference_digest, table
from kvtransfer.faults import FaultHook
from kvtransfer.pool import Pieces

_HANDLE = struct.Struct("<8s16sqqq")
_MAGIC = b"fakecuda"
_FIRST_ADDRESS = 0x7F00_0000_0000
_numbers = itertools.count(1)


class _Memory:
    """One allocation, or a mapping of another driver's."""

    def __init__(self, fd: int, num_bytes: int, is_mapped: bool) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        self.is_mapped = is_mapped
        self.num_opens = 1
        self.mapping = mmap.mmap(fd, num_bytes)
        self.bytes = np.frombuffer(self.mapping, np.uint8)
        self.inode = os.fstat(fd).st_ino

    def close(self) -> None:
        del self.bytes
        self.mapping.close()
        os.close(self.fd)


class FakeEvent:
    """A torch.cuda.Event as far as `Ready` goes: bytes that appear on the device when the test says so."""

    def __init__(self, driver: FakeCuda, address: int, data: bytes) -> None:
        self._driver, self._address, self._data = driver, address, data
        self._has_fired = False
        memory, start = driver._find(address)
        self._unwritten = memory.inode, address - start, len(data)
        driver._unwritten.append(self._unwritten)

    def fire(self) -> None:
        """The engine's work is over."""
        self._driver._unwritten.remove(self._unwritten)
        self._driver.write(self._address, self._data)
        self._has_fired = True

    def query(self) -> bool:
        """See Ready."""
        return self._has_fired


class FakeJob:
    """Runs in its turn; is seen to be done one look later, or when the driver is let go."""

    def __init__(self, driver: FakeCuda, rows: list[tuple[int, int, int]], has_source: bool) -> None:
        self._driver, self._rows, self._has_source = driver, rows, has_source
        self.has_run = False
        self._looks = 0
        self._digest = b""

    def run(self) -> None:
        """Do the work."""
        driver, self.has_run = self._driver, True
        if self._has_source:
            for to, fro, length in self._rows:
                driver._view(to, length)[:] = driver._view(fro, length, is_read=True)
            for to, _, length in self._rows:
                if driver.faults is not None:
                    driver.faults.after_landing(None, driver._view(to, length).data)  # type: ignore[arg-type]
        views = [driver._view(to, length, is_read=True) for to, _, length in self._rows]
        self._digest = reference_digest(np.concatenate(views))
        if driver.breaks_digests:
            self._digest = bytes(16)
        if not self._has_source and driver.faults is not None:
            driver.faults.before_send(None, [view.data for view in views])  # type: ignore[arg-type]

    def is_done(self) -> bool:
        """See Job."""
        self._driver._check("cuEventQuery")
        self._looks += 1
        if self.has_run and self._looks > 1:
            self._driver._forget(self)
            return True
        return False

    @property
    def digest(self) -> bytes:
        """See Job."""
        assert self._digest, "not done"
        return self._digest

    def addresses(self) -> Iterator[int]:
        """Of all its pieces."""
        for to, fro, _ in self._rows:
            yield to
            if self._has_source:
                yield fro


class FakeCuda:
    """One device as one process sees it: see CudaDriver."""

    violations: list[str] = []  # noqa: RUF012 - of all drivers of the process; a test looks at the end
    _unwritten: list[tuple[int, int, int]] = []  # noqa: RUF012
    """(inode, offset, length) that the owner's engine is still to write."""

    def __init__(self, *, uuid: bytes = b"\x01" * 16, sees: frozenset[bytes] = frozenset()) -> None:
        self._uuid = uuid
        self._sees = sees | {uuid}
        self._number = next(_numbers)
        self._name = os.urandom(16)
        self._next_address = _FIRST_ADDRESS + self._number * 2**36
        self._memory: dict[int, _Memory] = {}
        self._opened: dict[bytes, int] = {}
        self._queue: list[FakeJob] = []
        self.faults: FaultHook | None = None
        self.is_held = False
        """Work waits for `let_go`."""
        self.fails: dict[str, str] = {}
        """Call -> error, until it is removed."""
        self.breaks_digests = False
        self.breaks_copies = False
        self.is_closed = False

    # What tests do.

    def view(self, start: int) -> memoryview:
        """The bytes of an allocation, as the host never sees them."""
        return memoryview(self._memory[start].mapping)

    def write_later(self, address: int, data: bytes) -> FakeEvent:
        """The engine has launched work that will write these bytes; who reads them before it is over is noted."""
        return FakeEvent(self, address, data)

    def let_go(self) -> None:
        """Run what was held."""
        self.is_held = False
        self._run()

    @property
    def num_mapped(self) -> int:
        """Mappings of others' memory."""
        return sum(memory.is_mapped for memory in self._memory.values())

    @property
    def num_queued(self) -> int:
        """Jobs that nobody has seen to be done."""
        return len(self._queue)

    # CudaDriver.

    @property
    def uuid(self) -> bytes:
        """Of the device."""
        return self._uuid

    def readable(self) -> frozenset[bytes]:
        """As the test says."""
        return self._sees

    def bind(self) -> None:
        """Nothing to do."""
        self._check("cuCtxSetCurrent")

    def range_of(self, address: int) -> tuple[int, int]:
        """(start, size)."""
        self._check("cuPointerGetAttribute")
        memory, start = self._find(address)
        return start, memory.num_bytes

    def export(self, start: int) -> bytes:
        """Where the memfd can be opened by processes of this user."""
        self._check("cuIpcGetMemHandle")
        memory = self._memory[start]
        if memory.is_mapped:
            raise CudaError("cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE")
        return _HANDLE.pack(_MAGIC, self._name, os.getpid(), memory.fd, memory.num_bytes).ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        """Map it; the same handle gives the same address."""
        self._check("cuIpcOpenMemHandle_v2")
        if len(handle) != HANDLE_BYTES:
            raise CudaError("an IPC handle has 64 bytes")
        magic, name, pid, fd, num_bytes = _HANDLE.unpack_from(handle)
        if magic != _MAGIC:
            raise CudaError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE")
        if name == self._name:
            raise CudaError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_CONTEXT")
        if handle in self._opened:
            self._memory[self._opened[handle]].num_opens += 1
            return self._opened[handle]
        try:
            mine = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CudaError("cuIpcOpenMemHandle_v2: CUDA_ERROR_MAP_FAILED") from error
        start = self._opened[handle] = self._place(_Memory(mine, num_bytes, is_mapped=True))
        return start

    def close_handle(self, start: int) -> None:
        """Unmap it with its last open."""
        self._check("cuIpcCloseMemHandle")
        memory = self._memory[start]
        if not memory.is_mapped:
            raise CudaError("cuIpcCloseMemHandle: CUDA_ERROR_INVALID_VALUE")
        memory.num_opens -= 1
        if memory.num_opens:
            return
        if any(start <= address < start + memory.num_bytes for job in self._queue for address in job.addresses()):
            self.violations.append("a mapping was closed while work on it was under way")
            self._queue.clear()
        self._opened = {handle: at for handle, at in self._opened.items() if at != start}
        self._memory.pop(start).close()

    def begin(self, to: Pieces, num_bytes: int, source: Pieces | None) -> FakeJob:
        """Queue the work; it runs at once unless it is held."""
        self._check("cuLaunchKernel")
        rows = table(to, source)
        ends = np.append(rows[1:, 2], np.uint64(num_bytes // 16))
        lengths = (ends - rows[:, 2]) * np.uint64(16)
        items = [(int(a), int(b), int(n)) for a, b, n in zip(rows[:, 0], rows[:, 1], lengths, strict=True)]
        job = FakeJob(self, items, source is not None and not self.breaks_copies)
        self._queue.append(job)
        try:
            self._run()
        except CudaError:
            self._queue.remove(job)
            raise
        return job

    def finish(self) -> None:
        """Run everything."""
        self._check("cuStreamSynchronize")
        self.let_go()
        for job in self._queue:
            job._looks += 1

    def allocate(self, num_bytes: int) -> int:
        """A memfd."""
        self._check("cuMemAlloc_v2")
        fd = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return self._place(_Memory(fd, num_bytes, is_mapped=False))

    def free(self, start: int) -> None:
        """Give it back."""
        self._memory.pop(start).close()

    def write(self, address: int, data: bytes) -> None:
        """Put bytes."""
        self._view(address, len(data))[:] = np.frombuffer(data, np.uint8)

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes."""
        return self._view(address, num_bytes).tobytes()

    def close(self) -> None:
        """The driver's end. Allocations stay, as another owner's do."""
        if self._queue and not self.fails:
            self.violations.append("the driver was closed while work was under way")
        if self.num_mapped and not self.fails:
            self.violations.append("a mapping was never closed")
        self.is_closed = True

    def end_process(self) -> None:
        """What is left goes."""
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    # Steps.

    def _check(self, call: str) -> None:
        if call in self.fails:
            raise CudaError(f"{call}: {self.fails[call]}")
        if self.is_closed:
            raise AssertionError(f"{call} after the driver's end")

    def _place(self, memory: _Memory) -> int:
        start = self._next_address
        self._next_address += -(-memory.num_bytes // 2**21) * 2**21 + 2**21  # a gap that nobody owns
        self._memory[start] = memory
        return start

    def _find(self, address: int) -> tuple[_Memory, int]:
        for start, memory in self._memory.items():
            if start <= address < start + memory.num_bytes:
                return memory, start
        self.violations.append(f"address {address:#x} is in no allocation")
        raise CudaError("CUDA_ERROR_ILLEGAL_ADDRESS")

    def _view(self, address: int, length: int, *, is_read: bool = False) -> np.ndarray:
        memory, start = self._find(address)
        offset = address - start
        if offset + length > memory.num_bytes:
            self.violations.append(f"{length} bytes at {address:#x} end outside of their allocation")
            raise CudaError("CUDA_ERROR_ILLEGAL_ADDRESS")
        for inode, begin, num_bytes in self._unwritten if is_read else ():
            if inode == memory.inode and offset < begin + num_bytes and begin < offset + length:
                self.violations.append("bytes were read before the engine had written them")
        return memory.bytes[offset : offset + length]

    def _run(self) -> None:
        if not self.is_held:
            for job in self._queue:
                if not job.has_run:
                    job.run()

    def _forget(self, job: FakeJob) -> None:
        if job in self._queue:
            self._queue.remove(job)
