"""Virtual time: one heap of what happens next, and actors that take turns in it. Everything else hangs on this."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Final


class Scheduler:
    """Runs callbacks in the order of their virtual time; `now` is a clock (baton.clock.Clock) that only this moves.

    `run` may be called by a callback: a process that computes lets the others go on meanwhile.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.num_events = 0
        self.depth = 0
        """Calls of `run` that are on the stack."""

    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call it then; what was asked for first comes first at equal times."""
        self._number += 1
        heapq.heappush(self._heap, (max(when, self._now), self._number, callback))

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call it so much later."""
        self.at(self._now + delay_s, callback)

    def run(self, until: float) -> None:
        """Everything that happens up to and at `until`."""
        heap = self._heap
        self.depth += 1
        try:
            while heap and heap[0][0] <= until:
                when, _, callback = heapq.heappop(heap)
                self._now = max(self._now, when)
                self.num_events += 1
                callback()
            self._now = max(self._now, until)
        finally:
            self.depth -= 1


class Process:
    """What can be stopped (SIGSTOP), continued and killed: all actors of one operating system process."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.is_dead = False
        self.is_stopped = False
        self.actors: list[Actor] = []

    def stop(self) -> None:
        """No actor takes a turn until `resume`."""
        self.is_stopped = True

    def resume(self) -> None:
        """Go on with what has gathered."""
        self.is_stopped = False
        for actor in self.actors:
            if actor.has_missed:
                actor.has_missed = False
                actor.poke()

    def kill(self) -> None:
        """No actor takes a turn any more."""
        self.is_dead = True


class Actor:
    """A thread: takes a turn a short, random while after it is poked, however often."""

    def __init__(
        self,
        scheduler: Scheduler,
        rng: random.Random,
        process: Process,
        turn: Callable[[], None],
        delay_s: tuple[float, float],
    ) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._process = process
        self._turn = turn
        self._delay_s = delay_s
        self._is_due = False
        self._is_busy = False
        self._timer_s = float("inf")
        self.has_missed = False
        process.actors.append(self)

    def poke(self, delay_s: float = 0.0) -> None:
        """Take a turn soon, `delay_s` from now at the earliest."""
        if not self._is_due:
            self._is_due = True
            low, high = self._delay_s
            self._scheduler.after(delay_s + low + (high - low) * self._rng.random(), self._fire)

    def poke_at(self, when: float) -> None:
        """Take a turn then, too; only the earliest such wish is remembered."""
        if when < self._timer_s:
            self._timer_s = when
            self._scheduler.at(when, lambda: self._timer(when))

    def _timer(self, when: float) -> None:
        if when == self._timer_s:
            self._timer_s = float("inf")
            self.poke()

    def _fire(self) -> None:
        self._is_due = False
        if self._process.is_dead:
            return
        if self._process.is_stopped or self._is_busy:
            self.has_missed = True
            return
        self._is_busy = True
        try:
            self._turn()
        finally:
            self._is_busy = False
        if self.has_missed and not self._process.is_stopped:
            self.has_missed = False
            self.poke()
