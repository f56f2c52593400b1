"""A data frame on its way into the pool: verified where it lies, each piece right after it got there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Final

from kvtransfer.digests import FrameDigest, LeafDigests, seal
from kvtransfer.faults import FaultHook
from kvtransfer.lanes import Landing
from kvtransfer.messages import Data
from kvtransfer.native.library import library
from kvtransfer.plan import Part
from kvtransfer.pool import Extents, Pool, copy


class DeviceArrival:
    """A data frame whose bytes lie in their place on a device, which has made their digest."""

    def __init__(self, frame: Data, landing: Landing, context: bytes | None, digest: bytes) -> None:
        """`context` None: do not verify."""
        self.frame = frame
        self.landing: Final = landing
        self._context = context
        self._digest = digest

    @property
    def is_verified(self) -> bool:
        """Are the bytes what was sent?"""
        return self._context is None or seal(self._context, self.frame, self._digest) == self.frame.digest

    def seal(self, digest: bytes) -> None:
        """The digest that the frame did not carry."""
        self.frame = self.frame._replace(digest=digest)


class Arrival:
    """Takes the bytes of one frame in canonical order; then `is_verified` says whether its digest is right.

    Transfer thread only.
    """

    def __init__(
        self, frame: Data, landing: Landing, digests: LeafDigests, context: bytes | None, faults: FaultHook | None
    ) -> None:
        """`digests` of the pool where it lands. `context` None: do not verify."""
        self.frame: Final = frame
        self.landing: Final = landing
        self.extents: Final = Extents(digests.pool, landing.parts, landing.num_bytes)
        self._context = context
        self._digest = None if context is None else FrameDigest(digests, self.extents)
        self._faults = faults
        self._landed_bytes = 0
        is_plain = faults is None and (self._digest is None or self._digest.native is not None)
        self._native = library() if is_plain else None
        self._progress = (ctypes.c_uint64 * 4)() if self._digest is None else self._digest.progress

    @property
    def is_verified(self) -> bool:
        """All bytes have landed: are they what was sent?"""
        if self._digest is None or self._context is None:
            return True
        return seal(self._context, self.frame, self._digest.result()) == self.frame.digest

    def views(self) -> list[memoryview]:
        """Where all its bytes go, in order."""
        return self.extents.views()

    @property
    def is_native(self) -> bool:
        """May `receive` be called, instead of filling `views`?"""
        return self._native is not None

    def receive(self, fd: int, num_bytes: int) -> int:
        """Read at most `num_bytes` from a non-blocking socket into their place; how many came, 0 if the peer closed.

        Raises:
            OSError: BlockingIOError if nothing is there; or the connection broke.
        """
        assert self._native is not None
        leaves = None if self._digest is None else self._digest.leaves
        count = int(
            self._native.receive(fd, self.extents.address, self._progress, num_bytes, leaves, self.landing.is_streamed)
        )
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    def landed(self, num_bytes: int) -> None:
        """The next `num_bytes` are in place."""
        if self._faults is not None:
            for piece in self.extents.views(self._landed_bytes, num_bytes):
                self._faults.after_landing(self.frame, piece)
            self._landed_bytes += num_bytes
        if self._digest is not None:
            self._digest.landed(num_bytes)

    def fetch(self, source: Pool, parts: Sequence[Part]) -> None:
        """Copy all bytes from `parts` of another pool."""
        fro = Extents(source, parts, self.landing.num_bytes)
        if self._native is not None and self._digest is not None:
            self._digest.fetch(fro, streams=self.landing.is_streamed)
        else:
            copy(self.extents, fro)
            self.landed(self.landing.num_bytes)
