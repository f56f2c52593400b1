"""The bytes of one rank's KV pool: anonymous memory that other processes may map, but neither write nor resize."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Final

_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 0x01
_F_SEAL_SHRINK: Final = 0x02
_F_SEAL_GROW: Final = 0x04
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1: whoever maps it after us can only read (memfd_create(2), fcntl(2))

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14 (madvise(2))
_COMMIT_BYTES: Final = 1 << 20
"""Per system call: the time that unmapping anything in this process may have to wait."""


class KVMemory:
    """`num_bytes` zeroed bytes in a sealed memfd. They go with the last process that has them open or mapped."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError if the machine has not that much memory to promise."""
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, num_bytes)
        self._view: memoryview | None = memoryview(mmap.mmap(self._fd, num_bytes))
        self.is_read_only_to_peers = _seal(self._fd)
        self._is_closing = threading.Event()
        self._committing: threading.Thread | None = None

    @property
    def view(self) -> memoryview:
        """All bytes, writable; valid until `close`."""
        assert self._view is not None, "the KV memory is closed"
        return self._view

    @property
    def fd(self) -> int:
        """For passing to peers; valid until `close`."""
        return self._fd

    def commit(self, regions: Sequence[tuple[int, int]]) -> None:
        """Begin to take the pages of regions (start, bytes) from the system, at the lowest priority; once.

        The first pages of all regions come first. A step that is the first to touch a page waits for the kernel, and
        on a virtual machine for its host. Where the kernel can not do this ahead, pages come when they are touched.
        """
        assert self._committing is None
        arguments = (self.view, tuple(regions), self._is_closing)
        self._committing = threading.Thread(target=_commit, args=arguments, name="kv-commit", daemon=True)
        self._committing.start()

    def close(self) -> None:
        """Close the file, and unmap it as soon as the last array or view over it is gone. Idempotent."""
        self._is_closing.set()
        if self._committing is not None:
            self._committing.join()
        self._view = None
        self._close_fd()


def _commit(view: memoryview, regions: tuple[tuple[int, int], ...], is_closing: threading.Event) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread
    first = ctypes.c_char.from_buffer(view)  # keeps the mapping
    for offset in range(0, max((size for _, size in regions), default=0), _COMMIT_BYTES):
        for start, size in regions:
            begin, end = start + offset, start + min(size, offset + _COMMIT_BYTES)
            begin -= begin % mmap.PAGESIZE
            if begin < end and libc.madvise(ctypes.addressof(first) + begin, end - begin, _MADV_POPULATE_WRITE):
                return
            if is_closing.is_set():
                return


def _seal(fd: int) -> bool:
    """Fix the size; forbid new writable mappings where the kernel can. True if it can."""
    fixed = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, fixed | _F_SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, _F_ADD_SEALS, fixed)
        return False
    return True
