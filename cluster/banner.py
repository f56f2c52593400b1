"""How a start went, and the words that greet the user when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from baton.config import Config
from cluster.topology import ROUTER, ModelChoice, WorkerPlan


class StartUp:
    """When each step of a start ended, in seconds since the command was given."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.steps: list[tuple[str, float, float]] = []
        self.total_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the command."""
        return time.monotonic() - self._began

    @property
    def is_finished(self) -> bool:
        """Whether the server has been ready once."""
        return self.total_s is not None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record what happens inside as a step."""
        begin = self.elapsed_s
        yield
        self.steps.append((name, begin, self.elapsed_s))

    def mark(self, name: str) -> None:
        """Record everything until now as a step."""
        self.steps.append((name, 0.0, self.elapsed_s))

    def finish(self) -> None:
        """It is ready."""
        self.total_s = self.elapsed_s


def banner(
    config: Config,
    model: ModelChoice,
    workers: Sequence[WorkerPlan],
    facts: Mapping[str, Mapping[str, Any]],
    start_up: StartUp,
) -> str:
    """The greeting."""
    return f"ready in {start_up.total_s}: {facts[ROUTER]}"
