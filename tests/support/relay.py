"""A man in the middle: passes a TCP connection on, keeps all bytes, and may change, cut up or hold what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

Filter = Callable[[bytes, int], bytes]
"""(bytes, how many went before them) -> what is passed on instead."""


class Relay:
    """Listens on `address` and passes every connection on to `target`. Use as a context manager."""

    def __init__(
        self, target: tuple[str, int], *, to_target: Filter | None = None, piece_bytes: int = 65536, cut_at: int = -1
    ) -> None:
        """`to_target` sees what goes to the target; `cut_at`: after so many bytes of it both ends are closed."""
        self._target = target
        self._filter = to_target
        self._piece_bytes = piece_bytes
        self._cut_at = cut_at
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.seen = {"to target": bytearray(), "back": bytearray()}
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Relay:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def half_close(self) -> None:
        """Tell the target that nothing more comes, and go on passing back what it says."""
        self._sockets[1].shutdown(socket.SHUT_WR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target, timeout=10)
            far.settimeout(None)
            self._sockets += [near, far]
            for source, sink, way in ((near, far, "to target"), (far, near, "back")):
                thread = threading.Thread(target=self._pump, args=(source, sink, way))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        seen = self.seen[way]
        with contextlib.suppress(OSError):
            while data := source.recv(self._piece_bytes):
                if way == "to target":
                    if 0 <= self._cut_at <= len(seen) + len(data):
                        sink.sendall(data[: self._cut_at - len(seen)])
                        break
                    if self._filter is not None:
                        data = self._filter(data, len(seen))
                seen += data
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
