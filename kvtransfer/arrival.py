"""A data frame on its way into the pool: verified piece by piece, where it lies, right after each piece got there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvtransfer.faults import FaultHook
from kvtransfer.lanes import Landing
from kvtransfer.messages import Data
from kvtransfer.pool import Pool, data_hasher, fetch


class Arrival:
    """Takes the pieces of one frame in canonical order; then `is_verified` says whether its digest is right.

    A piece is hashed from its final location while it is still in cache. Transfer thread only.
    """

    def __init__(self, frame: Data, landing: Landing, context: bytes | None, faults: FaultHook | None) -> None:
        """`context` None: do not verify."""
        self.frame: Final = frame
        self.landing: Final = landing
        self._hasher = None if context is None else data_hasher(context, frame)
        self._faults = faults
        self.landed: Final[Callable[[memoryview], None] | None] = self._landing_hook()
        """To be called with each piece once it is in place; None: no need."""

    @property
    def is_verified(self) -> bool:
        """All pieces have landed: are they what was sent?"""
        return self._hasher is None or self._hasher.digest() == self.frame.digest

    def fetch(self, destination: Pool, source: Pool) -> None:
        """Copy all pieces from the sender's pool."""
        assert self.landing.copies is not None
        for (layer, _), copies in zip(self.landing.parts, self.landing.copies, strict=True):
            fetch(destination, source, layer, copies, self.landed)

    def _landing_hook(self) -> Callable[[memoryview], None] | None:
        if self._faults is not None:
            return self._landed_with_faults
        return None if self._hasher is None else self._hasher.update

    def _landed_with_faults(self, piece: memoryview) -> None:
        assert self._faults is not None
        self._faults.after_landing(self.frame, piece)
        if self._hasher is not None:
            self._hasher.update(piece)
