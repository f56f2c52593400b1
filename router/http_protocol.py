"""The HTTP server's connections, with the limits that uvicorn and its parser lack: on a request's head and trailers, on
chunk extensions, on the time that a head takes, on requests that are sent ahead. They hold before any key is asked for.

Knows no paths and no models. Event loop only.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from baton.errors import InvalidRequest
from router.http import error_body, json_response

MAX_HEAD_BYTES: Final = 64 * 1024  # of a head, of trailers, and of what surrounds one piece of a chunked body
MAX_FIELDS: Final = 128  # header fields and trailers of one request
MAX_SENT_AHEAD: Final = 100  # requests of one connection that wait for the answers to those before
HEAD_S: Final = 30.0  # for a connection's first head, and for a later one from its first byte on
_LINGER_S: Final = 1.0
_MAX_LATE_BYTES: Final = 1024 * 1024
_MANY_LINES: Final = 1000
_PIECE_BYTES: Final = 4096
_TOO_LARGE: Final = f"The request's header is too large: at most {MAX_HEAD_BYTES} bytes and {MAX_FIELDS} fields."


class _TooLarge(Exception):
    """Ends the parsing."""


class BoundedHttp(HttpToolsProtocol):  # type: ignore[misc]  # mypy does not follow uvicorn
    """One connection.

    Whoever passes a limit is answered 431 and cut off; where the answer to an earlier request is owed or under way, cut
    off without. The parser keeps an unfinished field to itself and copies it for every piece that arrives, so what it
    has swallowed without a result is counted outside of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_pending_bytes = 0  # since the parser's last result
        self._num_late_bytes: int | None = None  # what came after a refusal
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A first head must come."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing will come."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless this connection has been refused."""
        if data.count(b"\n") <= _MANY_LINES:
            self._feed(data)
        else:  # the parser does not stop between fields, and each costs more than its bytes
            for begin in range(0, len(data), _PIECE_BYTES):
                self._feed(data[begin : begin + _PIECE_BYTES])

    def _feed(self, data: bytes) -> None:
        if self._num_late_bytes is not None:
            self._num_late_bytes += len(data)
            if self._num_late_bytes > _MAX_LATE_BYTES:
                self.transport.close()
            return
        self._num_pending_bytes += len(data)
        super().data_received(data)
        if self._num_late_bytes is not None:
            return
        if self._num_pending_bytes > MAX_HEAD_BYTES or len(self.headers or ()) > MAX_FIELDS:
            self._refuse(431, _TOO_LARGE)
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            # Part of a head, or the rest of a body that nobody wants: either way the next head is awaited.
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """The request can start."""
        is_large = self._num_pending_bytes > MAX_HEAD_BYTES and self._num_head_bytes() > MAX_HEAD_BYTES
        if is_large or len(self.headers) > MAX_FIELDS or len(self.pipeline) >= MAX_SENT_AHEAD:
            self._refuse(431, _TOO_LARGE)
            raise _TooLarge
        self._num_pending_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._num_pending_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses."""
        if self._num_late_bytes is None:
            self._refuse(400, msg)

    def _num_head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _refuse(self, status: int, message: str) -> None:
        """Answer and end the connection: at once, a client that still sends would be reset before it reads the answer."""
        self._num_late_bytes = 0
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or cycle.scope is not self.scope:
                self.transport.close()
                return
            cycle.disconnected = True  # what is too large follows this request's head
            cycle.message_event.set()
        response = json_response(error_body(InvalidRequest(message)), status, {"connection": "close"})
        lines = [b"HTTP/1.1 %d " % status, *(b"\r\n%b: %b" % field for field in response.raw_headers), b"\r\n\r\n"]
        self.transport.write(b"".join([*lines, response.body]))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
