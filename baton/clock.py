"""Time, behind an interface so that tests can move it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. Values are comparable within one process only."""

    def now(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()


class ManualClock:
    """A clock that stands still until told otherwise."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """The time that was last set."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` (>= 0)."""
        assert seconds >= 0
        self._now += seconds
