"""Sends requests at their times and never waits for an answer before the next one. Knows no protocol.

Open loop: a request's time was fixed before the load began, and latency counts from it. Whatever makes its sending
late (a server that stalls, connections that do not open, this process) is in its latency; there is no way to omit it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from loadtest.client import Client
from loadtest.outcome import SHORT_ANSWER, Outcome
from loadtest.workload import LoadRequest

_PREPARED: Final = 256  # requests whose bytes are made before they are due
_SPARE_S: Final = 0.002  # until the next request is due: else it is no time to prepare further ones
_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = os.O_NONBLOCK, os.O_CLOEXEC, 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Alarm:
    """Wakes the event loop at a moment of the monotonic clock, within some 0.1 ms; asyncio's timers are a millisecond
    late, which for tight objectives is more than a harness may be. A Linux timerfd."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._loop = asyncio.get_running_loop()
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(self._fd, self._fired)

    async def until(self, moment: float) -> None:
        """Return at `moment`, at once if it has passed. One waiter at a time."""
        if moment <= time.monotonic():
            return
        seconds = int(moment)
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(seconds, int((moment - seconds) * 1e9)))
        self._waiter = self._loop.create_future()
        self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None)
        await self._waiter

    def close(self) -> None:
        """Free the descriptor."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fired(self) -> None:
        os.read(self._fd, 8)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pacer:
    """One load on one client. Event loop only; used once."""

    def __init__(
        self,
        client: Client,
        requests: Sequence[LoadRequest],
        on_outcome: Callable[[Outcome], None],
        *,
        timeout_s: float,
        expects_all_tokens: bool,
    ) -> None:
        """`on_outcome` sees each outcome once; `expects_all_tokens`: an answer that ends early has failed."""
        self._client = client
        self._timeout_s = timeout_s
        self._expects_all = expects_all_tokens
        self._on_outcome = on_outcome
        self._coming = iter(requests)
        self._prepared: deque[tuple[LoadRequest, Any]] = deque()
        self.num_in_flight = 0
        while len(self._prepared) < _PREPARED and self._prepare_one():
            pass

    async def open_loop(self, start: float) -> None:
        """Send every request at `start` (monotonic) + its `at_s`, and wait for all answers."""
        alarm = Alarm()
        try:
            async with asyncio.TaskGroup() as group:
                for request, prepared in self._ready():
                    due = start + request.at_s
                    await alarm.until(due)
                    group.create_task(self._exchange(request, prepared, due))
                    await asyncio.sleep(0)  # it is sent before anything else is done
                    if self._is_spare(start):
                        self._prepare_one()
        finally:
            alarm.close()

    async def closed_loop(self, start: float, concurrency: int, stop_after_s: float | None) -> None:
        """Keep `concurrency` requests in flight from `start` on; each counts from the end of the one before it."""
        ready = self._ready()
        stop = None if stop_after_s is None else start + stop_after_s

        async def slot() -> None:
            for request, prepared in ready:
                due = max(start, time.monotonic())
                if stop is not None and due >= stop:
                    return
                await self._exchange(request, prepared, due)
                self._prepare_one()

        await asyncio.sleep(max(0.0, start - time.monotonic()))
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(slot())

    def _ready(self) -> Iterator[tuple[LoadRequest, Any]]:
        while self._prepared or self._prepare_one():
            yield self._prepared.popleft()

    def _prepare_one(self) -> bool:
        request = next(self._coming, None)
        if request is not None:
            self._prepared.append((request, self._client.prepare(request)))
        return request is not None

    def _is_spare(self, start: float) -> bool:
        return not self._prepared or start + self._prepared[0][0].at_s - time.monotonic() > _SPARE_S

    async def _exchange(self, request: LoadRequest, prepared: Any, due: float) -> None:
        outcome = Outcome(request.index, due)
        self.num_in_flight += 1
        try:
            await self._client.send(prepared, outcome, due + self._timeout_s)
        finally:
            self.num_in_flight -= 1
        if self._expects_all and not outcome.failure and outcome.num_output_tokens != request.num_output_tokens:
            outcome.fail(SHORT_ANSWER, f"{outcome.num_output_tokens} of {request.num_output_tokens} tokens")
        self._on_outcome(outcome)
