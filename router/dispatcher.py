"""One request from placement to its last token, over as many attempts as it takes. Knows tokens, not text.

The router owns attempts: at most `max_attempts` that fail, one at a time, each fenced by its attempt id. One that met a
lack of room, or was taken back before it had begun, does not count. Tokens are delivered strictly by index, and a new
attempt gets the delivered ones as input: it repeats none and misses none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Final

from baton.clock import Clock
from baton.errors import Cancelled, Overloaded, ServeError, Unavailable
from baton.request import TokenEvent, attempt_id
from router.attempt import Attempt, Work
from router.fleet import Fleet
from router.placement import Group, Placement, WorkerKey, place
from router.timeline import TimelineBook

logger = logging.getLogger("router")

MAX_UNREAD_TOKENS: Final = 8192  # of one client that reads too slowly
RECOVERY_S: Final = 30.0  # how long a request that has begun waits for a worker to come (back)
_OVERLOAD_PAUSE_S: Final = 0.5
_TOO_LATE_S: Final = 0.01  # before the deadline nothing new is begun


class Dispatcher:
    """Starts generations. Event loop only."""

    def __init__(
        self,
        fleet: Fleet,
        book: TimelineBook,
        clock: Clock,
        *,
        max_attempts: int = 3,
        local_prefill_max_tokens: int = 0,
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
    ) -> None:
        self.fleet = fleet
        self.book = book
        self.clock = clock
        self.max_attempts = max_attempts
        self.local_prefill_max_tokens = local_prefill_max_tokens
        self.max_unread_tokens = max_unread_tokens

    def start(self, work: Work) -> Generation:
        """A generation that begins when its tokens are asked for. The caller must `close` it."""
        return Generation(self, work)


class Generation:
    """One sample on its way. Whoever holds it calls `close`, in every case; that never awaits."""

    def __init__(self, dispatcher: Dispatcher, work: Work) -> None:
        self.work = work
        self._dispatcher = dispatcher
        self._delivered: list[int] = []
        self._attempt: Attempt | None = None
        self._is_closed = False
        self._cause: ServeError = Cancelled("The request was closed.")

    async def tokens(self) -> AsyncGenerator[list[TokenEvent], None]:
        """Tokens by index, as many at a time as have arrived; the last one carries the finish reason.

        Raises:
            ServeError: no attempt succeeded; Overloaded: no worker has room; DeadlineExceeded.
        """
        dispatcher, work = self._dispatcher, self.work
        avoid: set[WorkerKey] = set()
        group: Group | None = None
        number = failures = 0
        while True:
            placement = await self._place(avoid, group)
            number += 1
            self._attempt = attempt = Attempt(
                attempt_id(work.request_id, number),
                work,
                self._delivered,
                dispatcher.fleet,
                dispatcher.clock,
                max_unread_tokens=dispatcher.max_unread_tokens,
                avoid=frozenset(avoid),
            )
            try:
                group = attempt.begin(placement)
                while True:
                    events = await attempt.receive()
                    self._delivered.extend(event.token_id for event in events)
                    work.timeline.tokens(dispatcher.clock.now(), len(events), events[0].num_cached_tokens)
                    yield events
                    if events[-1].finish_reason is not None:
                        return
            except ServeError as error:
                is_overloaded = isinstance(error, Overloaded)
                failures += not (is_overloaded or attempt.is_moved)
                is_over = self._is_closed or dispatcher.clock.now() > work.deadline - _TOO_LATE_S
                if is_over or failures >= dispatcher.max_attempts or not (error.retryable or is_overloaded):
                    raise
                avoid |= attempt.blamed
                logger.warning(
                    "attempt failed", extra={"attempt_id": attempt.id, "code": error.code, "reason": error.message}
                )
                if is_overloaded and not self._delivered and avoid.issuperset(v.key for v in dispatcher.fleet.views()):
                    raise  # every worker has said no
            finally:
                attempt.close()
            attempt.settle()  # another one follows: nobody waits for what its workers have yet to tell
            if is_overloaded and self._delivered:
                await asyncio.sleep(_OVERLOAD_PAUSE_S)

    def close(self, finish_reason: str = "abort", error: str = "", cause: ServeError | None = None) -> None:
        """Over, for whatever reason: abort what still runs, end the timeline. Synchronous, idempotent.

        Whoever is waiting for tokens meanwhile gets `cause`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._cause = cause or self._cause
        self._dispatcher.fleet.changed.set()  # it may be waiting for a worker
        timeline, book = self.work.timeline, self._dispatcher.book
        timeline.finish_reason, timeline.error = finish_reason, error
        timeline.finished = self._dispatcher.clock.now()
        if self._attempt is None:
            book.add(timeline)
        else:
            self._attempt.close(self._cause)
            book.expect(timeline, self._attempt.settle)
            self._attempt.when_settled(lambda: book.add(timeline))

    async def _place(self, avoid: set[WorkerKey], group: Group | None) -> Placement:
        """The best workers; a request that has begun waits a while for some to come back.

        Raises:
            Unavailable: there are none.
            ServeError: the request was closed, with that cause.
        """
        dispatcher, work, fleet = self._dispatcher, self.work, self._dispatcher.fleet
        tokens = work.token_ids + self._delivered
        patience = min(work.deadline, dispatcher.clock.now() + RECOVERY_S)
        while True:
            if self._is_closed:
                raise self._cause
            fleet.changed.clear()
            chain = fleet.prefix_chain(tokens, work.tenant, work.cache_salt)
            placement = place(
                fleet.views(),
                len(tokens),
                cached_tokens=fleet.cached_tokens(chain),
                avoid=avoid,
                broken=fleet.avoided_paths(),
                group=group,
                local_prefill_max_tokens=dispatcher.local_prefill_max_tokens,
            )
            if placement is not None:
                fleet.record_prefix(placement, chain)
                return placement
            remaining_s = patience - dispatcher.clock.now()
            if group is None or remaining_s <= 0:
                raise Unavailable("No worker can serve the request.")
            try:
                async with asyncio.timeout(remaining_s):
                    await fleet.changed.wait()
            except TimeoutError:
                continue
