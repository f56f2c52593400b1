"""Units as plain child processes of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.host import HostedProcess, LogLine, Report
from cluster.unit import StartFailed, UnitOrder, UnitState


class LocalUnit:
    """Implements `Unit`."""

    def __init__(self, state: UnitState) -> None:
        self._state = state
        self._processes: dict[str, HostedProcess] = {}

    @property
    def state(self) -> UnitState:
        """What its processes said so far."""
        return self._state

    async def start(self, log_dir: Path) -> None:
        """Start every process.

        Raises:
            OSError: one can not be started; call `stop`.
        """
        self._make_private_dir()
        for order in self._state.order.processes:
            self._processes[order.name] = await HostedProcess.start(order, log_dir, self._state.on_event)

    def _make_private_dir(self) -> None:
        if self._state.order.private_dir is not None:
            Path(self._state.order.private_dir).mkdir(mode=0o700, parents=True)

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process."""
        self._processes[process].tell(message)

    async def stop(self, grace_s: float) -> None:
        """End all processes."""
        async with asyncio.TaskGroup() as group:
            for process in self._processes.values():
                group.create_task(process.stop(grace_s))


class LocalLauncher:
    """Implements `Launcher`."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir

    async def open(self) -> None:
        """Nothing to do."""

    async def start_unit(
        self, order: UnitOrder, on_report: Callable[[Report], None], on_log: Callable[[str, LogLine], None]
    ) -> LocalUnit:
        """Start a unit here."""
        unit = LocalUnit(UnitState(order, on_report, on_log))
        try:
            await unit.start(self._log_dir)
        except BaseException as error:
            await unit.stop(0.0)
            if isinstance(error, OSError):
                raise StartFailed(f"{order.name} could not start: {error}") from error
            raise
        return unit

    async def close(self) -> None:
        """Nothing to do."""
