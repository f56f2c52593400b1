"""What the pacer needs of a client, whatever it speaks."""

from __future__ import annotations

from typing import Any, Protocol

from loadtest.outcome import Outcome
from loadtest.workload import LoadRequest


class Client(Protocol):
    """Sends requests to one server. Event loop only."""

    def begin(self, run_id: str) -> None:
        """A load begins. Its contents depend on `run_id`, with which its requests' ids begin."""
        ...

    def prepare(self, request: LoadRequest) -> Any:
        """The request as it will be sent: all work that need not be done at its scheduled time."""
        ...

    async def send(self, prepared: Any, outcome: Outcome, deadline: float) -> None:
        """Send it and fill in the outcome. Every failure ends there, none is raised; `deadline` is loop time."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...
