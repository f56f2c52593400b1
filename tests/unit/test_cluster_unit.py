"""A unit is ready when all its processes are, and lost when one of them is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cluster.host import Ended, LogLine, ProcessEvent, ProcessOrder, Report, Started
from cluster.unit import Place, StartFailed, UnitOrder, UnitState

_RANK = ProcessOrder("rank 0", ("m",), {}, "a.log")
_FRONT = ProcessOrder("front", ("m",), {}, "b.log")
_ORDER = UnitOrder("decode-0", "decode", (Place((_RANK, _FRONT)),), "ready")


def feed(check: Callable[[UnitState], Awaitable[None]], *events: ProcessEvent) -> list[str]:
    """Run `check` on a unit after these events; what it handed on."""
    seen: list[str] = []

    async def main() -> None:
        state = UnitState(_ORDER, lambda r: seen.append(r.event), lambda unit, log: seen.append(f"{unit}: {log.text}"))
        for event in events:
            state.on_event(event)
        await check(state)

    asyncio.run(main())
    return seen


def test_ready_waits_for_every_process() -> None:
    async def check(state: UnitState) -> None:
        assert not state.ready.done()
        state.on_event(Report("front", "ready", {"address": "x"}))
        reports = await state.ready
        assert reports["front"].fields == {"address": "x"}
        assert state.pids == {"rank 0": 7}

    feed(check, Started("rank 0", 7), Report("rank 0", "ready", {}))


def test_a_reported_failure_is_the_reason() -> None:
    async def check(state: UnitState) -> None:
        with pytest.raises(StartFailed, match=r"^decode-0 could not start: rank 0 failed: no memory$"):
            await state.ready
        assert await state.ended == "rank 0 failed: no memory"

    feed(check, Report("rank 0", "failed", {"error": "no memory"}), Ended("rank 0", 1, "Traceback"))


@pytest.mark.parametrize(
    ("event", "how"),
    [
        (Ended("front", 3, ""), "front ended with status 3"),
        (Ended("front", 0, "bye"), "front ended with status 0 (bye)"),
        (Ended("front", -11, ""), "front was ended by SIGSEGV"),
    ],
)
def test_an_end_is_put_into_words(event: Ended, how: str) -> None:
    async def check(state: UnitState) -> None:
        assert await state.ended == how

    feed(check, event)


def test_a_unit_that_was_ready_stays_known_as_such_when_it_ends() -> None:
    async def check(state: UnitState) -> None:
        await state.ready
        assert await state.ended == "rank 0 was ended by SIGKILL"

    feed(check, Report("rank 0", "ready", {}), Report("front", "ready", {}), Ended("rank 0", -9, ""))


def test_other_reports_and_log_lines_are_handed_on() -> None:
    async def check(state: UnitState) -> None:
        assert not state.ready.done()

    assert feed(check, Report("front", "serving", {}), LogLine("front", "hot")) == ["serving", "decode-0: hot"]
