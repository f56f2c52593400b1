"""A data frame on its way out of the pool by native code: head and pieces in few system calls."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from kvtransfer.native.library import Library
from kvtransfer.pool import Extents


class Departure:
    """Sends one frame from where its bytes lie. Transfer thread only."""

    def __init__(self, native: Library, head: bytes, extents: Extents) -> None:
        self._native = native
        self._head = head
        self._extents = extents
        self._progress = (ctypes.c_uint64 * 4)(0, len(head))
        """Bytes of the head that are sent, and all of them; then which piece comes next, and where in it."""
        self.num_bytes: Final = len(head) + extents.num_bytes
        self.bytes_left = self.num_bytes

    def send(self, fd: int) -> int:
        """Send until the socket is full or all is sent; how many bytes.

        Raises:
            OSError: BlockingIOError if the socket is full and took nothing; or the connection broke.
        """
        count = int(self._native.send(fd, self._head, self._extents.address, self._progress, self.bytes_left))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        self.bytes_left -= count
        return count

    def rest(self) -> bytes:
        """A private copy of what is not sent."""
        head_sent, _, piece, offset = self._progress
        rest = [self._head[head_sent:]]
        for start, length in self._extents.pieces[piece:].tolist():
            rest.append(ctypes.string_at(start + offset, length - offset))
            offset = 0
        return b"".join(rest)
