"""Frames on a stream: a fixed head, a msgpack body, sometimes a payload. Knows no sockets and no transfers.

    0   2      magic
    2   1      frame format
    3   1      message code
    4   4      body bytes      little-endian
    8   4      payload bytes   little-endian
    12  8      tag: keyed hash over (sequence number, head[0:12], body); zeros during the handshake

The tag authenticates every control body once the handshake has made keys, and the sequence number in it makes a lost,
repeated or reordered frame an error. The digest of a payload is in its body or in a later one.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Final, Protocol

from kvtransfer.messages import (
    UNAUTHENTICATED_BODY_BYTES,
    Data,
    Message,
    ProtocolError,
    body_limit,
    code_of,
    decode_body,
    encode_body,
    is_handshake,
)

FORMAT: Final = 1
_MAGIC: Final = b"BK"
_TLS_HANDSHAKE: Final = 0x16
_HEAD: Final = struct.Struct("<2sBBII")
TAG_BYTES: Final = 8
HEAD_BYTES: Final = _HEAD.size + TAG_BYTES
_NO_TAG: Final = bytes(TAG_BYTES)
_SCRATCH: Final = memoryview(bytearray(256 * 1024))
"""Where the payloads of dropped frames end; its content means nothing."""


class Tagger:
    """Tags of one direction of one link, in order. `key` None: handshake, all zeros."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._next = 0

    def tag(self, head: bytes, body: bytes | bytearray) -> bytes:
        """The tag of the next frame."""
        if self._key is None:
            return _NO_TAG
        sequence = self._next.to_bytes(8, "little")
        self._next += 1
        return hashlib.blake2b(sequence + head + body, key=self._key, digest_size=TAG_BYTES).digest()


def encode_frame(message: Message, tagger: Tagger, payload_bytes: int = 0) -> bytes:
    """Head and body of a frame; the caller sends `payload_bytes` of payload after it."""
    body = encode_body(message)
    head = _HEAD.pack(_MAGIC, FORMAT, code_of(message), len(body), payload_bytes)
    return head + tagger.tag(head, body) + body


class Sink(Protocol):
    """Where a payload goes."""

    def views(self) -> list[memoryview]:
        """As long as the payload, in order; the list is used up."""

    def landed(self, num_bytes: int) -> None:
        """So many bytes more of `views` are filled."""

    @property
    def is_native(self) -> bool:
        """May `receive` be called, instead of filling `views`?"""

    def receive(self, fd: int, num_bytes: int) -> int:
        """Read at most `num_bytes` more from a socket; how many came. Raises as `socket.recv_into`."""


class FrameReader:
    """Turns a byte stream into messages and places payloads, by filling buffers that it asks for.

    The owner reads into `buffers()` and reports how much with `filled`; `begin` is called with each message as soon as
    it is checked and answers where its payload goes (nowhere: None); `end` is called when the payload is there.
    Nothing is allocated or read before its length has been checked. One thread.
    """

    def __init__(
        self,
        begin: Callable[[Message, int], Sink | None],
        end: Callable[[Message], None],
        max_control_bytes: int,
    ) -> None:
        self._begin = begin
        self._end = end
        self._max_control_bytes = max_control_bytes
        self._max_payload_bytes = 0
        self._tagger = Tagger()
        self._is_open = False
        self._head = bytearray(HEAD_BYTES)
        self._body = bytearray()
        self._code = 0
        self._payload_bytes = 0
        self._message: Message | None = None
        self._sink: Sink | None = None
        self._payload_left = 0
        self._pending: list[memoryview] = [memoryview(self._head)]
        self._advance = self._head_read

    def open(self, key: bytes, max_payload_bytes: int) -> None:
        """The handshake is done: expect tagged frames, and payloads up to a limit."""
        self._tagger = Tagger(key)
        self._max_payload_bytes = max_payload_bytes
        self._is_open = True

    def buffers(self) -> list[memoryview]:
        """Where the next bytes of the stream go, in order; never empty. Valid until the next call of any method."""
        if not self._pending and self._sink is not None:
            self._pending = self._sink.views()
        return self._pending

    @property
    def payload_left(self) -> int:
        """Bytes of a payload that are still to come; 0 outside of one."""
        return self._payload_left

    @property
    def sink(self) -> Sink | None:
        """Where a payload is going that is being read. Its `receive`, reported with `received`, replaces `buffers`."""
        return self._sink

    def received(self, num_bytes: int) -> None:
        """`sink.receive` has read so many bytes."""
        self._payload_left -= num_bytes
        if not self._payload_left:
            self._advance()

    @property
    def message(self) -> Message | None:
        """The message whose payload is being read."""
        return self._message

    def filled(self, num_bytes: int) -> None:
        """`num_bytes` of `buffers()` were filled from the start.

        Raises:
            ProtocolError: the stream can not be understood any more.
        """
        pending = self._pending
        if self._message is not None:
            self._payload_left -= num_bytes
        if self._sink is not None:
            self._sink.landed(num_bytes)
        done = 0
        while done < len(pending) and num_bytes >= len(pending[done]):
            num_bytes -= len(pending[done])
            done += 1
        del pending[:done]
        if num_bytes:
            pending[0] = pending[0][num_bytes:]
        if not pending:
            self._advance()

    def redirect(self) -> None:
        """Let the rest of the payload that is being read go nowhere."""
        if self._message is not None:
            self._pending, self._sink = _scratch(self._payload_left), None

    def _head_read(self) -> None:
        magic, form, code, body_bytes, payload_bytes = _HEAD.unpack_from(self._head)
        if self._head[0] == _TLS_HANDSHAKE and not self._is_open:
            raise ProtocolError("one of the two encrypts (cluster.encryption: tls), one does not")
        if magic != _MAGIC or form != FORMAT:
            raise ProtocolError("not a frame of this protocol")
        if is_handshake(code):
            limit = UNAUTHENTICATED_BODY_BYTES
        elif self._is_open:
            limit = body_limit(code, self._max_control_bytes)
        else:
            raise ProtocolError("a transfer frame before the handshake ended")
        if not 0 < body_bytes <= limit:
            raise ProtocolError(f"frame type {code} with a body of {body_bytes} bytes, limit {limit}")
        if payload_bytes > self._max_payload_bytes:
            raise ProtocolError(f"a payload of {payload_bytes} bytes, limit {self._max_payload_bytes}")
        self._code, self._payload_bytes = code, payload_bytes
        self._body = bytearray(body_bytes)
        self._pending = [memoryview(self._body)]
        self._advance = self._body_read

    def _body_read(self) -> None:
        tag = self._tagger.tag(bytes(self._head[: _HEAD.size]), self._body)
        if not hmac.compare_digest(tag, self._head[_HEAD.size :]):
            raise ProtocolError("frame tag does not match")
        message = decode_body(self._code, self._body)
        if self._payload_bytes and type(message) is not Data:
            raise ProtocolError("a payload on a frame that has none")
        self._expect_head()
        sink = self._begin(message, self._payload_bytes)
        if not self._payload_bytes:
            self._end(message)
            return
        self._message = message
        self._sink, self._payload_left = sink, self._payload_bytes
        self._pending = _scratch(self._payload_bytes) if sink is None else []
        self._advance = self._payload_read

    def _payload_read(self) -> None:
        message, self._message, self._sink = self._message, None, None
        assert message is not None
        self._expect_head()
        self._end(message)

    def _expect_head(self) -> None:
        self._pending = [memoryview(self._head)]
        self._advance = self._head_read


def _scratch(num_bytes: int) -> list[memoryview]:
    whole, rest = divmod(num_bytes, len(_SCRATCH))
    return [_SCRATCH] * whole + ([_SCRATCH[:rest]] if rest else [])
