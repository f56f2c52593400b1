"""A data frame on its way out of the pool by native code: head and pieces in few system calls, hashed as they go."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import numpy as np

from kvtransfer.native.library import Library
from kvtransfer.pool import Bytes, Digest, Extents, Pieces, address_of


class Departure:
    """Sends one frame from where its bytes lie. Transfer thread only."""

    def __init__(
        self, native: Library, head: bytes, extents: Extents, trailer: Callable[[bytes], bytes] | None
    ) -> None:
        """`head` comes first. `trailer` makes what comes last out of the digest of the bytes; None: nothing does.

        A digest must be native: there are more than 240 bytes.
        """
        self._native = native
        self._trailer = trailer
        self._digest = None if trailer is None else Digest(extents)
        assert self._digest is None or self._digest.state is not None, "few bytes have no native digest"
        self._num_hashed = ctypes.c_uint64(len(head))  # the head is in no digest
        self._ends: list[Bytes] = [np.frombuffer(head, np.uint8)]
        self._pieces = np.concatenate([_piece(self._ends[0]), extents.pieces])
        self._cursor = (ctypes.c_uint64 * 2)()
        self.bytes_left = len(head) + extents.num_bytes

    def send(self, fd: int) -> int:
        """Send until the socket is full or all is sent; how many bytes.

        Raises:
            OSError: BlockingIOError if the socket is full and took nothing; or the connection broke.
        """
        sent = 0
        if self._digest is not None:
            sent = self._send(fd, self._digest.state, ctypes.byref(self._num_hashed))
            if self._num_hashed.value < self.bytes_left:
                return sent
            self._end(self._digest.result())
        try:
            return sent + self._send(fd, None, None)
        except BlockingIOError:
            if not sent:
                raise
            return sent

    def _send(self, fd: int, digest: ctypes.Array[ctypes.c_char] | None, num_hashed: object) -> int:
        count = int(self._native.send(fd, address_of(self._pieces), self._cursor, self.bytes_left, digest, num_hashed))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        self.bytes_left -= count
        return count

    def _end(self, digest: bytes) -> None:
        """All bytes are hashed: the last of them go out together with the trailer."""
        assert self._trailer is not None
        self._digest = None
        trailer = np.frombuffer(self._trailer(digest), np.uint8)
        self._ends.append(trailer)
        self._pieces = np.concatenate([self._pieces, _piece(trailer)])
        self.bytes_left += len(trailer)

    def rest(self) -> bytes:
        """A private copy of what is not sent."""
        piece, offset = self._cursor
        rest = b"".join(ctypes.string_at(int(start), int(length)) for start, length in self._pieces[piece:])
        return rest[offset:]


def _piece(data: Bytes) -> Pieces:
    return np.array([[address_of(data), len(data)]], np.uint64)
