"""The bytes of one rank's KV pool: anonymous memory that other processes may map, but neither write nor resize."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 0x02
_F_SEAL_GROW: Final = 0x04
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1: whoever maps it after us can only read (memfd_create(2), fcntl(2))


class KVMemory:
    """`num_bytes` zeroed bytes in a sealed memfd. It disappears with the last process that has it open or mapped."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError if the machine has not that much memory to promise."""
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, num_bytes)
            self._map = mmap.mmap(self._fd, num_bytes)
            self.is_read_only_to_peers = _seal(self._fd)
        except OSError:
            os.close(self._fd)
            raise
        self._view: memoryview | None = memoryview(self._map)

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
        """Close the file and unmap. Idempotent.

        Views that are still in use somewhere keep the mapping, and only that, until they go.
        """
        if self._view is None:
            return
        os.close(self._fd)
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass
        self._view = None


def _seal(fd: int) -> bool:
    """Fix the size; forbid new writable mappings where the kernel can. True if it can."""
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
        return False
    return True
