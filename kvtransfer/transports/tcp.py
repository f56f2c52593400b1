"""TCP: payloads follow their frames on the stream."""

from __future__ import annotations

import errno
import functools
import pathlib
import socket
from typing import Final

NAME: Final = "tcp"
_BUFFER_BYTES: Final = 4 * 1024 * 1024
_BACKLOG: Final = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OSError: the address is in use or not ours.
    """
    family, address = _resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _size_buffers(sock)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def dial(host: str, port: int) -> socket.socket:
    """A socket whose connection is under way: writable once it is there or has failed (SO_ERROR).

    Raises:
        OSError: it failed at once.
    """
    family, address = _resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    _size_buffers(sock)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, "can not connect")
    return sock


def tune(sock: socket.socket, lease_s: float) -> None:
    """Small frames at once; a peer that acknowledges nothing for a lease is gone, also while the link is idle."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(lease_s * 1000)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(lease_s)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


def _size_buffers(sock: socket.socket) -> None:
    """Large buffers where the kernel grants them; a smaller fixed size would be worse than its own tuning."""
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        if _kernel_limit(limit) >= _BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


@functools.cache
def _kernel_limit(name: str) -> int:
    try:
        return int(pathlib.Path("/proc/sys/net/core", name).read_text())
    except OSError:
        return 0


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Names are resolved where addresses are made (cluster), so that the transfer thread never waits for DNS."""
    if host == "localhost":
        host = "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError as error:
        raise OSError(errno.EINVAL, f"the host of a transfer endpoint must be an IP address, not {host!r}") from error
    return family, (host, port)
