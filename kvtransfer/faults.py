"""Where tests put faults into a real endpoint. Production passes None."""

from __future__ import annotations

from typing import Protocol

from kvtransfer.messages import Data


class FaultHook(Protocol):
    """Called on the transfer thread around each data frame. May block, change bytes, or call the endpoint."""

    def before_send(self, frame: Data, payload: list[memoryview]) -> list[memoryview]:
        """The digest is made, nothing is sent: what shall go on the wire instead of `payload`.

        On shared memory `payload` is the source pool itself and the answer is ignored.
        """
        ...

    def after_landing(self, frame: Data, piece: memoryview) -> None:
        """A piece of the payload is in place and about to be verified."""
        ...
