"""One framed connection: queues of messages and payloads on a non-blocking socket. Knows no transfers' states."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from baton.clock import Clock, SystemClock
from kvtransfer.api import TransferId
from kvtransfer.departure import Departure
from kvtransfer.frames import FrameReader, Sink, Tagger, encode_frame
from kvtransfer.messages import Data, Message, ProtocolError
from kvtransfer.native.library import library
from kvtransfer.plan import FRAME_BYTES, HASH_BYTES
from kvtransfer.pool import Extents
from kvtransfer.transports.tls import TlsSocket

_MAX_IOV: Final = 512
"""Buffers per system call; the kernel's limit is 1024."""
TURN_BYTES: Final = 16 * 1024 * 1024
"""Bytes that one link may read before the others get their turn."""
_WRITTEN_BYTES: Final = 32 * 1024 * 1024
"""The same for writing."""
_LOW_WATER_BYTES: Final = 512 * 1024
MEASURED_BYTES: Final = FRAME_BYTES * 3 // 4
"""Smaller frames may say only how fast the socket's own buffer takes them. Of larger ones it takes up to half, so the speed
may be told twice as high as it is."""
_SYSTEM_CLOCK: Final = SystemClock()
_MAX_FDS: Final = 1


class OutgoingFrame(NamedTuple):
    """A data frame to write: the message, and its payload for a stream."""

    message: Data
    payload: Extents | list[memoryview]
    num_bytes: int
    """Bytes that the frame moves, on the stream or in shared memory."""


class LinkClosed(Exception):
    """The connection is gone."""


class Link:
    """Frames in and out of one socket. One thread.

    `pull` is asked for data whenever nothing is being written. Messages that wait go in front of the frame that it
    gives, so they overtake data between frames, and a frame is made only when the socket can take it.
    """

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        begin: Callable[[Message, int], Sink | None],
        end: Callable[[Message], None],
        pull: Callable[[], OutgoingFrame | None],
        max_control_bytes: int,
        clock: Clock = _SYSTEM_CLOCK,
    ) -> None:
        """`pull` gives the next data frame."""
        sock.setblocking(False)
        self._sock = sock
        self._pull = pull
        self._reader = FrameReader(begin, end, max_control_bytes)
        self._tagger = Tagger()
        self._messages: deque[bytes] = deque()
        self._writing: list[memoryview] = []
        self._departure: Departure | None = None
        self._native = library() if type(sock) is socket.socket else None
        self._written_transfer: TransferId | None = None
        """Whose pool blocks `_writing` or `_departure` still points into."""
        self._wants_fd = False
        self._received_fds: list[int] = []
        self._budget = 0
        self._low_water_bytes = 0
        self._clock = clock
        self._departed_s = 0.0
        self.is_blocked = False
        """The socket took no more: wait until it is writable."""
        self.bytes_per_s = 0.0
        """How fast the last large frame went out; 0: none did."""

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    # Handshake.

    def expect_fd(self) -> None:
        """The peer may pass one file descriptor during the handshake."""
        self._wants_fd = True

    def take_fd(self) -> int | None:
        """The descriptor that the peer passed; the caller closes it."""
        return self._received_fds.pop() if self._received_fds else None

    def post_with_fd(self, message: Message, fd: int) -> None:
        """Send a handshake message and a descriptor with its first byte."""
        assert not self._writing
        assert not self._messages
        frame = encode_frame(message, self._tagger)
        try:
            assert not isinstance(self._sock, TlsSocket)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            sent = self._sock.sendmsg([frame], rights)
        except OSError as error:
            raise LinkClosed(_why(error)) from error
        if sent < len(frame):
            self._writing.append(memoryview(frame)[sent:])

    def open(self, send_key: bytes, receive_key: bytes, max_payload_bytes: int) -> None:
        """The handshake is done, and its last message posted: tag every frame from here on."""
        self._tagger = Tagger(send_key)
        self._reader.open(receive_key, max_payload_bytes)
        self._wants_fd = False
        self._close_fds()

    # Out.

    def post(self, message: Message) -> None:
        """Queue a message; it goes out before any further data."""
        self._messages.append(encode_frame(message, self._tagger))

    @property
    def wants_write(self) -> bool:
        """Is something queued, apart from what `pull` would give?"""
        return bool(self._writing or self._departure or self._messages)

    def write(self) -> bool:
        """Write until the socket is full, nothing is left or the turn is over; True in the last case.

        Raises:
            LinkClosed: the peer is gone.
        """
        budget = _WRITTEN_BYTES
        self.is_blocked = False
        while budget > 0:
            if not self._writing and self._departure is None:
                budget -= self._next_frames()
                if not self._writing and self._departure is None:
                    return False
            try:
                sent = self._send(budget)
            except BlockingIOError:
                self.is_blocked = True
                return False
            except ssl.SSLWantReadError:  # `read` comes first
                return False
            except OSError as error:
                raise LinkClosed(_why(error)) from error
            budget -= sent
        return True

    def _send(self, enough: int) -> int:
        """Write once, of a data frame about `enough` bytes at most; how many the socket took."""
        departure = self._departure
        if departure is None or self._writing:
            sent = self._sock.sendmsg(self._writing[:_MAX_IOV])
            _drop(self._writing, sent)
            return sent
        sent = departure.send(self._sock.fileno(), enough)
        if not departure.bytes_left:
            self._departure = None
            if departure.num_bytes >= MEASURED_BYTES:
                self.bytes_per_s = departure.num_bytes / (self._clock.now() - self._departed_s)
        return sent

    def _next_frames(self) -> int:
        """Fill `_writing` or `_departure`; returns the bytes that move outside the stream."""
        self._written_transfer = None
        messages = b"".join(self._messages)
        self._messages.clear()
        frame = self._pull()
        if frame is None:
            if messages:
                self._writing = [memoryview(messages)]
            return 0
        self._written_transfer = frame.message.transfer_id
        payload = frame.payload
        if isinstance(payload, Extents):
            head = messages + encode_frame(frame.message, self._tagger, payload.num_bytes)
            if self._native is not None:
                self._departure = Departure(self._native, head, payload)
                self._departed_s = self._clock.now()
                return 0
            payload = payload.views()
        else:
            head = messages + encode_frame(frame.message, self._tagger, sum(len(view) for view in payload))
        self._writing = [memoryview(head), *payload]
        return 0 if payload else frame.num_bytes

    # In.

    def read(self) -> bool:
        """Read until nothing is there (True) or the turn is over; calls `begin` and `end` for what came.

        Raises:
            LinkClosed: the peer is gone.
            ProtocolError: the stream can not be understood.
        """
        self._budget = TURN_BYTES
        is_drained = False
        while self._budget > 0:
            try:
                count = self._receive()
            except BlockingIOError:
                is_drained = True
                break
            except OSError as error:
                raise LinkClosed(_why(error)) from error
            if not count:
                raise LinkClosed("the peer closed the connection")
            self._budget -= count
        self._wait_for(min(self._reader.payload_left, _LOW_WATER_BYTES))
        return is_drained

    def _wait_for(self, num_bytes: int) -> None:
        """Be woken only when so many bytes of a payload are there: a wake-up costs as much as copying 64 KiB."""
        if num_bytes != self._low_water_bytes:
            self._low_water_bytes = num_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, num_bytes))

    @property
    def holds_input(self) -> bool:
        """May there be more to read although the socket is not readable?"""
        return isinstance(self._sock, TlsSocket)

    def charge(self, num_bytes: int) -> None:
        """Count bytes that were fetched beside the stream towards this turn of `read`."""
        self._budget -= num_bytes

    def _receive(self) -> int:
        """Read once; how many bytes came."""
        reader, sink = self._reader, self._reader.sink
        if self._native is not None and sink is not None and sink.is_native:
            count = sink.receive(self._sock.fileno(), min(reader.payload_left, self._budget))
            reader.received(count)
            return count
        buffers = reader.buffers()
        count = self._receive_fd(buffers) if self._wants_fd else self._fill(buffers)
        if count:
            reader.filled(count)
        return count

    def _fill(self, buffers: list[memoryview]) -> int:
        """Read about HASH_BYTES, so that they are hashed while they are in cache."""
        first = buffers[0]
        if len(buffers) == 1 or len(first) >= HASH_BYTES // 2:
            return self._sock.recv_into(first, min(len(first), HASH_BYTES))
        return self._sock.recvmsg_into(buffers[: min(_MAX_IOV, HASH_BYTES // len(first) + 1)])[0]

    def _receive_fd(self, buffers: list[memoryview]) -> int:
        """Read, and perhaps a file descriptor beside the bytes."""
        assert not isinstance(self._sock, TlsSocket)
        space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
        count, ancillary, _, _ = self._sock.recvmsg_into(buffers, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._received_fds += fds
        if len(self._received_fds) > _MAX_FDS:
            raise ProtocolError("more than one file descriptor")
        return count

    # Ending.

    def stop_io(self, transfer_id: TransferId) -> bool:
        """Point into the transfer's pool blocks no more; frames under way end with private or scratch bytes.

        True if a payload that was being read is dropped.
        """
        if self._written_transfer == transfer_id:
            self._writing = [memoryview(b"".join(self._writing))] if self._writing else []
            if self._departure is not None:
                self._writing, self._departure = self._departure.rest(), None
            self._written_transfer = None
        message = self._reader.message
        if type(message) is Data and message.transfer_id == transfer_id:
            self._reader.redirect()
            return True
        return False

    def last_words(self, message: Message) -> None:
        """Try to send what is queued and one message more before closing, without waiting."""
        if not self._writing and self._departure is None:
            self.post(message)
            with contextlib.suppress(OSError):
                self._sock.send(b"".join(self._messages))

    def close(self) -> None:
        """Close the socket and drop every reference to pool memory. Idempotent."""
        self._writing, self._departure = [], None
        self._messages.clear()
        self._reader.redirect()
        self._close_fds()
        self._sock.close()

    def _close_fds(self) -> None:
        while self._received_fds:
            os.close(self._received_fds.pop())


def _drop(views: list[memoryview], num_bytes: int) -> None:
    """Remove the first `num_bytes` bytes of a list of views."""
    done = 0
    while done < len(views) and num_bytes >= len(views[done]):
        num_bytes -= len(views[done])
        done += 1
    del views[:done]
    if num_bytes:
        views[0] = views[0][num_bytes:]


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
