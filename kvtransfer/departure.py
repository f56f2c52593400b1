"""A data frame on its way out of the pool by native code: head and pieces in few system calls."""

from __future__ import annotations

import ctypes
import os

import numpy as np

from kvtransfer.native.library import Library
from kvtransfer.pool import Extents, address_of


class Departure:
    """Sends one frame from where its bytes lie. Transfer thread only."""

    def __init__(self, native: Library, head: bytes, extents: Extents) -> None:
        self._native = native
        self._head = np.frombuffer(head, np.uint8)
        first = np.array([[address_of(self._head), len(head)]], np.uint64)
        self._pieces = np.concatenate([first, extents.pieces])
        self._cursor = (ctypes.c_uint64 * 2)()
        self.bytes_left = len(head) + extents.num_bytes

    def send(self, fd: int) -> int:
        """Send until the socket is full or all is sent; how many bytes.

        Raises:
            OSError: BlockingIOError if the socket is full and took nothing; or the connection broke.
        """
        count = int(self._native.send(fd, address_of(self._pieces), self._cursor, self.bytes_left))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        self.bytes_left -= count
        return count

    def rest(self) -> bytes:
        """A private copy of what is not sent."""
        piece, offset = self._cursor
        rest = b"".join(ctypes.string_at(int(start), int(length)) for start, length in self._pieces[piece:])
        return rest[offset:]
