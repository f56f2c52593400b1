"""The bytes of one rank's KV pool: anonymous memory that other processes may map, but neither write nor resize."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from typing import Final

_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 0x01
_F_SEAL_SHRINK: Final = 0x02
_F_SEAL_GROW: Final = 0x04
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1: whoever maps it after us can only read (memfd_create(2), fcntl(2))

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14 (madvise(2))
_COMMIT_BYTES: Final = 64 << 20  # per system call, during which no other Python thread runs


class KVMemory:
    """`num_bytes` zeroed bytes in a sealed memfd. They go with the last process that has them open or mapped."""

    def __init__(self, num_bytes: int, *, commit: bool = False) -> None:
        """`commit` takes all pages from the system now: the first step to touch one would wait for the kernel, and on a
        virtual machine for its host.

        Raises:
            OSError: the machine has not that much memory to promise.
        """
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, num_bytes)
        mapped = mmap.mmap(self._fd, num_bytes)
        if commit:
            _commit(mapped)
        self._view: memoryview | None = memoryview(mapped)
        self.is_read_only_to_peers = _seal(self._fd)

    @property
    def view(self) -> memoryview:
        """All bytes, writable; valid until `close`."""
        assert self._view is not None, "the KV memory is closed"
        return self._view

    @property
    def fd(self) -> int:
        """For passing to peers; valid until `close`."""
        return self._fd

    def close(self) -> None:
        """Close the file, and unmap it as soon as the last array or view over it is gone. Idempotent."""
        self._view = None
        self._close_fd()


def _commit(memory: mmap.mmap) -> None:
    """Take all pages from the system. Where the kernel can not, they come when they are touched."""
    for start in range(0, len(memory), _COMMIT_BYTES):
        try:
            memory.madvise(_MADV_POPULATE_WRITE, start, min(_COMMIT_BYTES, len(memory) - start))
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
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
