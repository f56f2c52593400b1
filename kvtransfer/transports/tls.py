"""TCP with TLS 1.3 underneath the frames. The handshake of kvtransfer.auth, tags and digests stay as they are inside.

A TLS record can be read only as a whole and may hold more than was asked for, so `TlsSocket` keeps what the kernel
gave it: a link that has not read everything must read on without waiting for its socket.
"""

from __future__ import annotations

import socket
import ssl
from typing import Final, cast

from baton.tls import SERVER_NAME
from kvtransfer.auth import Refusal, RefusalCode
from kvtransfer.messages import ProtocolError

NAME: Final = "tcp+tls"
_BATCH_BYTES: Final = 256 * 1024
_SMALL_BYTES: Final = 16 * 1024
"""A record holds at most so much; smaller pieces share one."""
_RECORD_TYPES: Final = frozenset({0x14, 0x15, 0x16})
"""What a TLS peer may begin with (RFC 8446, 5.1)."""


class TlsSocket:
    """A non-blocking TCP socket as Link uses one, encrypted. One thread.

    Bytes count as sent once all of their ciphertext is the kernel's, so that waiting for room waits for the right
    thing; the caller repeats what was not counted, as with a socket. SSLWantReadError says that the handshake has to
    hear of the peer first: nothing can be written before something has been read.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Takes the socket over."""
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else SERVER_NAME
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=name)
        self._ciphertext = memoryview(bytearray(_BATCH_BYTES))
        self._unsent = memoryview(b"")
        self._staged_bytes = 0
        """Plaintext whose ciphertext waits in `_unsent` and `_outgoing`."""
        self.has_heard = False
        self._is_plain = False
        """The peer does not speak TLS."""
        self._is_shaken = False
        self._failure: Refusal | ProtocolError | None = None
        """Told once what came before it is read."""

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    def setblocking(self, flag: bool, /) -> None:
        """As of the socket."""
        self._sock.setblocking(flag)

    def getsockopt(self, level: int, option: int, /) -> int:
        """As of the socket."""
        return self._sock.getsockopt(level, option)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """As of the socket, but for SO_RCVLOWAT: part of what is waited for may be here already."""
        if (level, option) != (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            self._sock.setsockopt(level, option, value)

    def close(self) -> None:
        """As of the socket."""
        self._sock.close()

    # Out.

    def sendmsg(self, buffers: list[memoryview], /) -> int:
        """Encrypt and send some bytes; how many.

        Raises:
            BlockingIOError: the socket is full.
            ssl.SSLWantReadError: the handshake waits for the peer.
        """
        if not self._is_shaken:
            self._shake()
        if not self._staged_bytes:
            self._staged_bytes = self._tls.write(_batch(buffers))
        self._flush()
        staged_bytes, self._staged_bytes = self._staged_bytes, 0
        return staged_bytes

    def send(self, data: bytes, /) -> int:
        """As `sendmsg`, or in the clear to a peer that does not understand otherwise."""
        return self._sock.send(data) if self._is_plain else self.sendmsg([memoryview(data)])

    def _flush(self) -> None:
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    # In.

    def recv_into(self, buffer: memoryview, num_bytes: int = 0, /) -> int:
        """Read some bytes; 0 at the end of the stream.

        Raises:
            BlockingIOError: no more is here.
            Refusal: the peer is not of this cluster, or does not encrypt.
            ProtocolError: what came is not TLS.
        """
        total, wanted = 0, num_bytes or len(buffer)
        while total < wanted and self._failure is None:
            try:
                if not self._is_shaken:
                    self._shake()
                total += cast(int, self._tls.read(wanted - total, buffer[total:]))
            except ssl.SSLWantReadError:
                if total:
                    break
                self._fill()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                break
            except ssl.SSLError as error:
                self._failure = _named(error)
                break
        if self._failure is not None and not total:
            raise self._failure
        return total

    def recvmsg_into(self, buffers: list[memoryview], /) -> tuple[int, list[tuple[int, int, bytes]], int, None]:
        """As of the socket; raises as `recv_into`."""
        total = 0
        for buffer in buffers:
            if total and not self._tls.pending():
                break
            count = self.recv_into(buffer)
            total += count
            if count < len(buffer):
                break
        return total, [], 0, None

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
            self._is_shaken = True
        finally:
            self._flush()  # an alert says to the peer what is wrong

    def _fill(self) -> None:
        count = self._sock.recv_into(self._ciphertext)
        if not count:
            self._incoming.write_eof()
            return
        if not self.has_heard:
            self.has_heard = True
            self._check_first(self._ciphertext[:count])
        self._incoming.write(self._ciphertext[:count])

    def _check_first(self, data: memoryview) -> None:
        if data[0] not in _RECORD_TYPES:
            self._is_plain = True
            if data[0] == ord("B"):  # a frame's magic
                raise Refusal(RefusalCode.TRANSPORT, "one of the two encrypts (cluster.encryption: tls), one does not")
            raise ProtocolError("not TLS")


def _batch(buffers: list[memoryview]) -> bytes | memoryview:
    """The first bytes of `buffers`: a large piece as it is, small ones together."""
    if len(buffers) == 1 or len(buffers[0]) >= _SMALL_BYTES:
        return buffers[0][:_BATCH_BYTES]
    pieces, room = [], _BATCH_BYTES
    for buffer in buffers:
        pieces.append(buffer[:room])
        room -= len(pieces[-1])
        if not room:
            break
    return b"".join(pieces)


def _named(error: ssl.SSLError) -> Refusal | ProtocolError:
    """A failure of TLS in words of this protocol."""
    reason = error.reason or type(error).__name__
    is_stranger = isinstance(error, ssl.SSLCertVerificationError) or reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    if is_stranger:
        return Refusal(RefusalCode.SECRET, "the peer's certificate is not of this cluster: it holds another secret")
    if reason in ("TLSV1_ALERT_UNKNOWN_CA", "TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_DECRYPT_ERROR"):
        return Refusal(
            RefusalCode.SECRET, "the peer does not accept this cluster's certificate: it holds another secret"
        )
    return ProtocolError(f"TLS: {reason}")
