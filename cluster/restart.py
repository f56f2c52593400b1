"""When to start something again that ended, and when to give up. Pure: the time is passed in."""

from __future__ import annotations

from collections import deque
from typing import Final

_FIRST_DELAY_S: Final = 0.5
_MAX_DELAY_S: Final = 30.0
_MAX_FAILURES: Final = 5
_WINDOW_S: Final = 60.0


class RestartPolicy:
    """Back-off of 0.5, 1, 2 .. 30 s, for one thing that is kept running; five failures within a minute are enough."""

    def __init__(self) -> None:
        self._failures: deque[float] = deque(maxlen=_MAX_FAILURES)
        self._in_a_row = 0

    def after_failure(self, now: float, uptime_s: float) -> float | None:
        """How long to wait before the next start; None: give up.

        `uptime_s` is how long it was ready before it failed: after a good minute the back-off begins anew.
        """
        self._in_a_row = 1 if uptime_s >= _WINDOW_S else self._in_a_row + 1
        self._failures.append(now)
        if len(self._failures) == _MAX_FAILURES and now - self._failures[0] < _WINDOW_S:
            return None
        return float(min(_FIRST_DELAY_S * 2 ** (self._in_a_row - 1), _MAX_DELAY_S))
