"""Shared memory: a Unix socket carries the frames, the receiver maps the sender's pool and fetches the bytes itself.

The pool is a memfd, passed with the handshake. Its seals keep it from shrinking under the reader and from being mapped
writable by it; nothing has a name in the file system but the socket, which lives in a private directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
import stat
import struct
from typing import Final

from baton.kv_layout import KVLayout
from kvtransfer.pool import Pool

NAME: Final = "shm"
_BACKLOG: Final = 128
_MAX_PATH_BYTES: Final = 107
"""sockaddr_un holds 108 bytes with the closing NUL."""
_F_SEAL_FUTURE_WRITE: Final = 0x10
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class UnusablePool(Exception):
    """The descriptor that a peer passed is not a sealed pool of its layout."""


def listen(unix_dir: str, tp_rank: int) -> tuple[socket.socket, str]:
    """A listening Unix socket in the private directory, and its path; the caller unlinks it.

    Raises:
        ValueError: the path is too long for a Unix socket, or others may enter the directory.
        OSError: it can not be made.
    """
    path = os.path.join(unix_dir, f"kv{tp_rank}-{secrets.token_hex(4)}.sock")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ValueError(f"a Unix socket path may have {_MAX_PATH_BYTES} bytes, {path!r} has {len(os.fsencode(path))}")
    os.makedirs(unix_dir, mode=0o700, exist_ok=True)
    status = os.stat(unix_dir)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{unix_dir!r} must be a directory of mode 0700 that belongs to this user")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock, path


def dial(path: str) -> socket.socket:
    """A connected socket.

    Raises:
        OSError: nobody listens there, the path is impossible, or it belongs to another user.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, "the peer's Unix socket path is too long")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        check_user(sock)
    except OSError:
        sock.close()
        raise
    return sock


def check_user(sock: socket.socket) -> None:
    """The process at the other end must run as this user.

    Raises:
        PermissionError: it does not.
    """
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the peer runs as another user")


def seal(fd: int, pool_bytes: int) -> str | None:
    """Make this rank's pool safe to pass on; answers what is wrong with it, or None.

    Mappings that exist stay writable; new ones can only read.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    try:
        check(fd, pool_bytes)
    except UnusablePool as error:
        return str(error)
    return None


def check(fd: int, pool_bytes: int) -> None:
    """Is this a memfd that holds `pool_bytes` and can neither shrink nor be written by us?

    Raises:
        UnusablePool: no.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise UnusablePool("the pool is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise UnusablePool(f"the pool's seals are {seals:#x}, not {_SEALS:#x}")
    if size < pool_bytes:
        raise UnusablePool(f"the pool has {size} bytes, its layout needs {pool_bytes}")


class MappedPool:
    """A peer's pool, mapped to be read. `close` unmaps it; no view of it may be left then."""

    def __init__(self, fd: int, layout: KVLayout) -> None:
        """Map it; the descriptor stays the caller's.

        Raises:
            UnusablePool: wrong seals or size, or it can not be mapped.
        """
        check(fd, layout.pool_bytes)
        try:
            self._map = mmap.mmap(fd, layout.pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise UnusablePool(f"the pool can not be mapped: {error}") from error
        self.pool = Pool(layout, memoryview(self._map))

    def close(self) -> None:
        """Unmap."""
        self.pool.release()
        with contextlib.suppress(BufferError):  # a traceback still holds a view: it is unmapped with that
            self._map.close()
