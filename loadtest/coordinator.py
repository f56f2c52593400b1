"""Several client processes driven as one: the schedule dealt out, clocks compared, outcomes merged.

A *link* is a way to one agent (loadtest.agent): its own child process here, or, from cluster/fanout.py, a process on
another node. Latencies are differences of one agent's clock; only where they lie on the common time axis depends on
the clock correction, whose error is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from baton.process import clock_id
from loadtest.outcome import Outcome
from loadtest.target import Target
from loadtest.workload import LoadRequest

_PINGS: Final = 15
_LINE_CHARS: Final = 500_000  # of requests in one line to an agent, which reads at most 4 MiB
_START_S: Final = 60.0  # for a process to start, and for one to prepare
_LEAD_S: Final = 0.25  # from the order to start until the start itself
_SILENCE_S: Final = 30.0  # an agent reports four times a second
_MAX_LINE_BYTES: Final = 256 * 2**20


class AgentLost(Exception):
    """A client process ended or fell silent: the load is not what it was to be, and nothing of it counts."""


class Link(Protocol):
    """A way to one agent."""

    name: str

    async def send(self, message: dict[str, Any]) -> None:
        """One line to the agent; AgentLost if it is gone."""
        ...

    async def receive(self) -> dict[str, Any]:
        """The agent's next line; AgentLost if there will be none."""
        ...

    async def close(self) -> None:
        """End it. Returns once it has ended."""
        ...


class LocalLink:
    """A child process of this one."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.name = name
        self._process = process

    @staticmethod
    async def start(name: str, *, is_ahead: bool = False) -> LocalLink:
        """Start it; `is_ahead`: before all else that wants its core."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.agent", *(("--ahead",) if is_ahead else ())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            process_group=0,  # Ctrl-C is for the parent, which ends its agents; one that still starts would be torn
        )
        return LocalLink(process, name)

    async def send(self, message: dict[str, Any]) -> None:
        """See Link."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise AgentLost(f"{self.name} has ended") from error

    async def receive(self) -> dict[str, Any]:
        """See Link."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise AgentLost(f"{self.name} has ended")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def close(self) -> None:
        """See Link."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@dataclass(slots=True)
class ClientFacts:
    """One client process in one load."""

    name: str
    clock_offset_s: float
    """What is added to its times."""
    clock_error_s: float
    """At most so wrong is the offset; 0 on one host, where the monotonic clock is the same for all processes."""
    cpu_s: float = 0.0
    num_requests: int = 0


@dataclass(slots=True)
class Load:
    """A load that is over. Times are seconds of this process's monotonic clock."""

    requests: Sequence[LoadRequest]
    start: float
    outcomes: list[Outcome]
    clients: list[ClientFacts]
    run_id: str
    """Begins the x-request-id (or gRPC id) of each request: RUN_ID-INDEX."""
    ended: float = 0.0
    in_flight: int = 0
    """While it runs: requests sent and not yet answered."""


@dataclass(slots=True)
class _Member:
    link: Link
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0
    cpu_s: float = 0.0
    in_flight: int = 0
    share: list[LoadRequest] = field(default_factory=list)


class Coordinator:
    """Drives loads, one after another, on the same agents. Made by `coordinating`."""

    def __init__(self, links: Sequence[Link], target: Target) -> None:
        self._members = [_Member(link) for link in links]
        self._target = target
        self._name = f"bench-{os.urandom(4).hex()}"
        self._num_loads = 0

    async def drive(
        self,
        requests: Sequence[LoadRequest],
        *,
        concurrency: int | None = None,
        stop_after_s: float | None = None,
        on_progress: Callable[[Load], None] = lambda load: None,
    ) -> Load:
        """Send all requests and wait for all answers. `concurrency`: a closed loop, of all clients together.

        `on_progress` sees the load as it grows, some four times a second.

        Raises:
            AgentLost: a client process ended or fell silent.
        """
        members = self._members if concurrency is None else self._members[:concurrency]
        for place, member in enumerate(members):
            member.share = list(requests[place :: len(members)])
        self._num_loads += 1
        run_id = f"{self._name}-{self._num_loads}"
        async with _in_time():
            for member in members:
                for part in _lines(member.share):
                    await member.link.send({"load": [request.to_json() for request in part]})
                await member.link.send({"prepare": run_id})
            for member in members:
                await _expect(member.link, "prepared")
        load = Load(requests, time.monotonic() + _LEAD_S, [], [], run_id)
        try:
            async with asyncio.TaskGroup() as group:
                for place, member in enumerate(members):
                    slots = None if concurrency is None else len(range(place, concurrency, len(members)))
                    group.create_task(self._follow(member, load, slots, stop_after_s, on_progress))
        except* AgentLost as lost:
            raise lost.exceptions[0] from None
        load.ended = time.monotonic()
        load.outcomes.sort(key=lambda outcome: outcome.scheduled)
        load.clients = [
            ClientFacts(m.link.name, m.clock_offset_s, m.clock_error_s, m.cpu_s, len(m.share)) for m in members
        ]
        return load

    async def greet(self, api_key: str | None) -> None:
        """Tell every agent its target and learn its clock."""
        first = {"target": self._target.to_json(), "api_key": api_key}
        async with _in_time():
            for member in self._members:
                await member.link.send(first)
            for member in self._members:
                hello = await _expect(member.link, "hello")
                if hello["clock_id"] != clock_id():
                    member.clock_offset_s, member.clock_error_s = await _compare_clocks(member.link)

    async def _follow(
        self,
        member: _Member,
        load: Load,
        slots: int | None,
        stop_after_s: float | None,
        on_progress: Callable[[Load], None],
    ) -> None:
        start = load.start - member.clock_offset_s
        await member.link.send({"start": start, "concurrency": slots, "stop_after_s": stop_after_s})
        cpu_before: float | None = None
        while True:
            try:
                message = await asyncio.wait_for(member.link.receive(), _SILENCE_S)
            except TimeoutError:
                raise AgentLost(f"{member.link.name} says nothing any more") from None
            if message["event"] == "done":
                member.in_flight = 0
                return
            if message["event"] != "outcomes":
                raise AgentLost(f"{member.link.name}: {message.get('error', message['event'])}")
            load.outcomes += [Outcome.from_json(value, member.clock_offset_s) for value in message["outcomes"]]
            cpu_before = message["cpu_s"] if cpu_before is None else cpu_before
            member.cpu_s = message["cpu_s"] - cpu_before
            member.in_flight = message["in_flight"]
            load.in_flight = sum(each.in_flight for each in self._members)
            on_progress(load)


@contextlib.asynccontextmanager
async def coordinating(
    target: Target,
    *,
    links: Sequence[Link] = (),
    num_clients: int = 1,
    api_key: str | None = None,
    are_ahead: bool = False,
) -> AsyncIterator[Coordinator]:
    """Start `num_clients` local agents, or take over `links`; they end on leaving.

    `are_ahead`: they run before all else on their cores, for those who measure a server on the same ones.

    Raises:
        AgentLost: one did not start.
    """
    members: list[Link] = list(links)
    try:
        if not members:
            for place in range(num_clients):
                local = await LocalLink.start(f"client-{place}", is_ahead=are_ahead)
                members.append(local)
        coordinator = Coordinator(members, target)
        await coordinator.greet(api_key)
        yield coordinator
    finally:
        for link in members:
            await link.close()


@contextlib.asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_START_S):
            yield
    except TimeoutError:
        raise AgentLost(f"the client processes were not ready within {_START_S:g} s") from None


def _lines(requests: Sequence[LoadRequest]) -> Iterator[list[LoadRequest]]:
    """Parts whose JSON is not much longer than allowed."""
    part: list[LoadRequest] = []
    size = 0
    for request in requests:
        part.append(request)
        size += 100 + len(request.text) + 32 * len(request.pieces)
        if size > _LINE_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


async def _expect(link: Link, event: str) -> dict[str, Any]:
    message = await link.receive()
    if message.get("event") != event:
        raise AgentLost(f"{link.name}: {message.get('error', message)}")
    return message


async def _compare_clocks(link: Link) -> tuple[float, float]:
    """(offset, error): the agent's clock + offset is ours; from the ping with the shortest way."""
    best = (math.inf, 0.0)
    for number in range(_PINGS):
        sent = time.monotonic()
        await link.send({"ping": number})
        pong = await _expect(link, "pong")
        received = time.monotonic()
        best = min(best, (received - sent, (sent + received) / 2 - pong["now"]))
    return best[1], best[0] / 2
