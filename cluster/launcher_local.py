"""Units as plain child processes of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from cluster.host import HostedProcess, LogLine, Report
from cluster.run_dir import RunDir
from cluster.site import Site
from cluster.unit import StartFailed, UnitOrder, UnitState

_ADDRESS: Final = "127.0.0.1"


class LocalUnit:
    """Implements `Unit`."""

    def __init__(self, state: UnitState, site: Site) -> None:
        self._state = state
        self._site = site
        self._processes: dict[str, HostedProcess] = {}

    @property
    def state(self) -> UnitState:
        """What its processes said so far."""
        return self._state

    async def start(self) -> None:
        """Start every process.

        Raises:
            OSError: one can not be started; call `stop`.
        """
        if self._state.order.private_dir is not None:
            self._site.make_private_dir(self._state.order.private_dir)
        for order in map(self._site.localize, self._state.order.processes):
            self._processes[order.name] = await HostedProcess.start(order, self._site.run.logs, self._state.on_event)

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process."""
        self._processes[process].tell(message)

    async def stop(self, grace_s: float) -> None:
        """End all processes."""
        async with asyncio.TaskGroup() as group:
            for process in self._processes.values():
                group.create_task(process.stop(grace_s))
        if self._state.order.private_dir is not None:
            self._site.remove_private_dir(self._state.order.private_dir)


class LocalLauncher:
    """Implements `Launcher`."""

    def __init__(self, run: RunDir) -> None:
        self._site = Site(_ADDRESS, run, model_path=None)

    @property
    def address(self) -> str:
        """Loopback."""
        return _ADDRESS

    async def open(self) -> None:
        """Nothing to do."""

    async def start_unit(
        self, order: UnitOrder, on_report: Callable[[Report], None], on_log: Callable[[str, LogLine], None]
    ) -> LocalUnit:
        """Start a unit here."""
        unit = LocalUnit(UnitState(order, on_report, on_log), self._site)
        try:
            await unit.start()
        except BaseException as error:
            await unit.stop(0.0)
            if isinstance(error, OSError):
                raise StartFailed(f"{order.name} could not start: {error}") from error
            raise
        return unit

    async def close(self) -> None:
        """Nothing to do."""
