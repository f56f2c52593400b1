"""In-process: endpoints of one process meet through a registry and talk over socket pairs, framed as on TCP."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from collections import deque
from typing import Final

NAME: Final = "local"
HOST: Final = "local"
"""`PeerRank.host` of an endpoint that is reached this way; `PeerRank.port` is its number in the registry."""

_listeners: dict[int, LocalListener] = {}
_numbers = itertools.count(1)
_lock = threading.Lock()


class LocalListener:
    """Where other endpoints of this process connect. `fileno` is readable when `accept` has something."""

    def __init__(self) -> None:
        self._waiting: deque[socket.socket] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        with _lock:
            self.port = next(_numbers)
            _listeners[self.port] = self

    def fileno(self) -> int:
        """For selectors."""
        return self._event_fd

    def accept(self) -> tuple[socket.socket, None]:
        """The next connection.

        Raises:
            BlockingIOError: none waits.
        """
        with _lock:
            if not self._waiting:
                os.eventfd_read(self._event_fd)
                raise BlockingIOError
            return self._waiting.popleft(), None

    def connect(self) -> socket.socket:
        """The other end of a new connection; under the lock."""
        ours, theirs = socket.socketpair()
        self._waiting.append(theirs)
        os.eventfd_write(self._event_fd, 1)
        return ours

    def close(self) -> None:
        """Stop listening; connections that nobody accepted are closed. Idempotent."""
        with _lock:
            if _listeners.pop(self.port, None) is None:
                return
            for sock in self._waiting:
                sock.close()
            os.close(self._event_fd)


def dial(port: int) -> socket.socket:
    """A connected socket.

    Raises:
        OSError: nobody in this process listens there.
    """
    with _lock:
        listener = _listeners.get(port)
        if listener is None:
            raise OSError(errno.ECONNREFUSED, "no such endpoint in this process")
        return listener.connect()
