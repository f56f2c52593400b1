"""Processes that live and die together (a worker's ranks and its front, or a router), and who starts them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.host import Ended, Hosted, LogLine, ProcessEvent, ProcessOrder, Report, Started


class StartFailed(Exception):
    """A unit can not start; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Place:
    """Processes that share an actor, and what they ask of the cluster."""

    processes: tuple[ProcessOrder, ...]
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class UnitOrder:
    """A unit to start. All its places are on one node."""

    name: str
    role: str
    places: tuple[Place, ...]
    ready_event: str
    """The report that each of its processes makes when it is ready."""
    private_dir: str | None = None
    """To be made in the run directory of the unit's node before any process starts; relative to it."""

    @property
    def processes(self) -> tuple[ProcessOrder, ...]:
        """Of all places."""
        return tuple(process for place in self.places for process in place.processes)


@dataclass(slots=True)
class UnitState:
    """What is known of a unit from its events. Belongs to the supervisor's loop.

    `ready` resolves to the ready reports by process name, or raises StartFailed if a process fails or ends first.
    `ended` resolves to a clause that says which process ended and how, and never raises.
    """

    order: UnitOrder
    on_report: Callable[[Report], None]
    on_log: Callable[[str, LogLine], None]
    ready: asyncio.Future[Mapping[str, Report]] = field(init=False)
    ended: asyncio.Future[str] = field(init=False)
    pids: dict[str, int] = field(init=False, default_factory=dict)
    """By process name; on the unit's node."""
    node: Hosted | None = field(init=False, default=None)
    """Where its first place is, once that is known."""
    _reports: dict[str, Report] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready = loop.create_future()
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())  # may go unread
        self.ended = loop.create_future()

    def on_event(self, event: ProcessEvent) -> None:
        """Take an event of one of the processes."""
        match event:
            case Hosted():
                self.node = self.node or event
            case Report():
                self._take_report(event)
            case LogLine():
                self.on_log(self.order.name, event)
            case Started():
                self.pids[event.process] = event.pid
            case Ended():
                self.lose(f"{event.process} {event.how}")

    def lose(self, how: str) -> None:
        """The unit is broken: `how` is a clause such as "rank 0 was ended by SIGKILL"."""
        if not self.ended.done():
            self.ended.set_result(how)
        if not self.ready.done():
            self.ready.set_exception(StartFailed(f"{self.order.name} could not start: {how}"))

    def _take_report(self, report: Report) -> None:
        if report.event == "failed":
            error = str(report.fields.get("error", "no reason given"))
            self.lose(f"{report.process} failed: {error}")
            return
        if report.event == self.order.ready_event:
            self._reports[report.process] = report
            if not self.ready.done() and len(self._reports) == len(self.order.processes):
                self.ready.set_result(dict(self._reports))
        self.on_report(report)


class Unit(Protocol):
    """A started unit."""

    @property
    def state(self) -> UnitState:
        """What its processes said so far."""
        ...

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process. Never blocks; a process that is gone hears nothing."""
        ...

    async def stop(self, grace_s: float) -> None:
        """End all processes, those that need longer than `grace_s` by force; returns when none is left."""
        ...


class Launcher(Protocol):
    """Starts units somewhere."""

    async def open(self) -> None:
        """Get ready to start units.

        Raises:
            StartFailed: there is nowhere to start them.
        """
        ...

    @property
    def address(self) -> str:
        """Of this node, for the other nodes; only while open."""
        ...

    async def start_unit(
        self, order: UnitOrder, on_report: Callable[[Report], None], on_log: Callable[[str, LogLine], None]
    ) -> Unit:
        """Start all processes of a unit at once; returns before they are ready.

        Raises:
            StartFailed: a process can not be started; nothing is left of the unit.
        """
        ...

    async def close(self) -> None:
        """Release what `open` took. All units are stopped."""
        ...
