"""How many generations this router runs at once. Knows nothing about them. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.errors import InvalidRequest, Overloaded


class Admission:
    """A bounded count; what does not fit is refused at once, never queued."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_admitted = 0
        self.num_refused = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def idle(self) -> None:
        """Return when nothing runs."""
        await self._is_idle.wait()

    def admit(self, count: int) -> Callable[[], None]:
        """Take `count` places. Returns what gives them back: call it once or more, it counts once.

        Raises:
            Overloaded: there is no room now.
            InvalidRequest: there can never be room for so many.
        """
        if count > self.limit:
            raise InvalidRequest(f"{count} choices are more than this server runs at once, {self.limit}.", param="n")
        if self.num_admitted + count > self.limit:
            self.num_refused += 1
            raise Overloaded(f"The server already runs {self.num_admitted} generations, at most {self.limit}.")
        self.num_admitted += count
        self._is_idle.clear()
        is_held = True

        def release() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self.num_admitted -= count
                if not self.num_admitted:
                    self._is_idle.set()

        return release
