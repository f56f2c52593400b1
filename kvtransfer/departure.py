"""A data frame on its way out of the pool by native code: head and pieces in few system calls."""

from __future__ import annotations

import ctypes
import os
from typing import Final

import numpy as np

from kvtransfer.native.library import Library
from kvtransfer.pool import Extents, address_of


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

    def send(self, fd: int, enough: int) -> int:
        """Send until the socket is full, `enough` bytes are sent or a few more, or all; how many.

        Raises:
            OSError: BlockingIOError if the socket is full and took nothing; or the connection broke.
        """
        address, left = self._extents.address, self.bytes_left
        count = int(self._native.send(fd, self._head, address, self._progress, left, enough))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        self.bytes_left -= count
        return count

    def rest(self) -> list[memoryview]:
        """A private copy of what is not sent."""
        head_sent, head_bytes, piece, offset = self._progress
        num_bytes = self.bytes_left - (head_bytes - head_sent)
        copy = np.empty(num_bytes, np.uint8)
        if num_bytes:
            pieces = self._extents.pieces[piece:].copy()
            pieces[0] += np.array((offset, -offset), np.int64).view(np.uint64)
            to = np.array([[address_of(copy), num_bytes]], np.uint64)
            self._native.copy(address_of(to), address_of(pieces), num_bytes, None, False)
        return [view for view in (memoryview(self._head)[head_sent:], copy.data) if view]
