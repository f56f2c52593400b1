"""One attempt of one request: everything that its one or two workers say about it, put in order for one consumer.

Knows the worker protocol and no other attempt. Event loop only.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from baton.clock import Clock
from baton.errors import (
    Cancelled,
    DeadlineExceeded,
    LayoutMismatch,
    Overloaded,
    ServeError,
    TransferError,
    Unavailable,
    WorkerLost,
    from_code,
)
from baton.request import AttemptId, RequestId, SamplingParams, TokenEvent
from protos import worker_pb2 as pb
from router.codec import event_from_proto, sampling_to_proto
from router.fleet import Fleet
from router.placement import Group, KVPath, Placement, WorkerKey, redirect
from router.timeline import AttemptRecord, Timeline
from router.worker_link import WorkerLink

LATE_S: Final = 1.0  # how long workers may still send the moments of an attempt that is over
_REDIRECT_BACKOFF_S: Final = (0.02, 0.5)


@dataclass(slots=True)
class Work:
    """What to generate: one sample of one request. `deadline` is on the router's clock."""

    request_id: RequestId
    token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    timeline: Timeline
    tenant: str = "default"
    cache_salt: str = ""
    priority: int = 0


class Attempt:
    """An inbox that sessions fill, in any order, and one consumer empties, by index.

    With two workers the first token comes from the prefill worker and the others from the decode worker, each on its
    own stream. From the decode worker's first token on, the prefill worker is not needed any more. A decode worker
    without room is replaced by another one; without any, the KV stays at the prefill worker until there is room. A
    decode worker that the KV did not reach is not asked again; a prefill worker that reaches none is given up. What an
    attempt learns of this, the fleet remembers for the others.
    """

    def __init__(
        self,
        id: AttemptId,
        work: Work,
        delivered: list[int],
        fleet: Fleet,
        clock: Clock,
        *,
        max_unread_tokens: int,
        avoid: Collection[WorkerKey] = (),
    ) -> None:
        """`delivered`: output tokens that the client already has; they become input. `avoid`: workers that failed earlier attempts."""
        self.id = id
        self._avoid = avoid
        self._work = work
        self._token_ids = work.token_ids + delivered
        self._base = len(delivered)  # index of this attempt's first token
        self._fleet = fleet
        self._clock = clock
        self._max_unread_tokens = max_unread_tokens
        self._start: WorkerLink | None = None  # was sent the attempt
        self._decode: WorkerLink | None = None  # generates; `_start` itself when there is only one worker
        self._from_start = 0  # tokens received, per worker
        self._from_decode = 0
        self._ready: list[TokenEvent] = []
        self._early: list[TokenEvent] = []  # of the decode worker, while the first token is still to come
        self._waiter: asyncio.Future[None] | None = None
        self._error: ServeError | None = None
        self._is_finished = False  # the last token is here
        self._is_aborted = False
        self._is_closed = False
        self._refused: set[WorkerKey] = set()  # had no room; asked again when all others have been asked
        self._num_refusals = 0  # for lack of room
        self._unreachable: set[WorkerKey] = set()  # the KV did not get there; not asked again
        self._record: AttemptRecord | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._speaking: set[WorkerLink] = set()  # whose moments are still to come
        self._on_settled: Callable[[], None] | None = None
        self.blamed: set[WorkerKey] = set()
        """Once it has failed: the workers that a next attempt should avoid."""
        self.is_moved = False
        """It failed before it had begun, and by nothing that was tried for it."""

    # ---- the consumer

    def begin(self, placement: Placement) -> Group:
        """Send it. Returns the group that computes it.

        Raises:
            WorkerLost: a chosen worker went away since.
        """
        start, decode = self._fleet.link(placement.start), self._fleet.link(placement.decode)
        if start is None or decode is None or start.hello is None:
            raise WorkerLost("A worker went away while it was chosen.")
        num_tokens, is_local = len(self._token_ids), start is decode
        self._start, self._decode, self._speaking = start, decode, {start, decode}
        start.open(self.id, self, prefill_tokens=num_tokens, kv_tokens=num_tokens if is_local else 0)
        if not is_local:
            decode.open(self.id, self, prefill_tokens=0, kv_tokens=num_tokens)
            self._fleet.kv_leaves(KVPath(start.key, decode.key))
        now = self._clock.now()
        prefill_worker = "" if is_local else start.worker_id
        self._record = self._work.timeline.attempt(prefill_worker, decode.worker_id, now)
        self._call_later(self._work.deadline - now, self._on_deadline)
        start.send(pb.RouterMessage(start=self._start_message(None if is_local else decode, now)))
        return start.view().group

    async def receive(self) -> list[TokenEvent]:
        """The next tokens in order, at least one. The last one of all carries the finish reason.

        Raises:
            ServeError: the attempt failed; tokens that came before are handed out first.
        """
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    def close(self, cause: ServeError | None = None) -> None:
        """Over: abort what still runs. Synchronous, idempotent. The workers' moments may still come for LATE_S.

        A consumer that waits meanwhile gets `cause`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._error is None:
            self._error = cause or Cancelled("The request was closed.")
        self._wake()
        for timer in self._timers:
            timer.cancel()
        self._abort()
        self._ready, self._early = [], []
        for link in (self._start, self._decode):
            if link is not None:
                link.released(self.id)
        if self._speaking:
            self._call_later(LATE_S, self.settle)
        else:
            self.settle()

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the attempt is closed and no more moments are awaited."""
        if self._is_closed and not self._speaking:
            callback()
        else:
            self._on_settled = callback

    def settle(self) -> None:
        """Await no more moments. Only after `close`."""
        self._speaking.clear()
        for timer in self._timers:
            timer.cancel()
        for link in (self._start, self._decode):
            if link is not None:
                link.close(self.id)
        if self._on_settled is not None:
            callback, self._on_settled = self._on_settled, None
            callback()

    # ---- the sessions' readers (AttemptSink)

    def on_token(self, link: WorkerLink, token: pb.Token) -> None:
        """A token of either worker; a repeated one is dropped, a missing one fails the attempt."""
        if self._is_over:
            return
        if link is self._start:
            expected = self._base + self._from_start
        elif link is self._decode:
            expected = self._base + 1 + self._from_decode
        else:
            return
        if token.index < expected:
            return
        if token.index > expected:
            self.blamed = {link.key}
            self._fail(Unavailable(f"Worker {link.worker_id} skipped token {expected}."))
            return
        event = event_from_proto(token)
        if link is self._start:
            self._from_start += 1
            if self._from_start == 1:
                link.prefilled(self.id)
            self._ready.append(event)
            if self._early:
                self._ready += self._early
                event, self._early = self._early[-1], []
        else:
            self._from_decode += 1
            if self._from_decode == 1 and self._start is not None:
                self._start.released(self.id)
                if (path := self._path) is not None:
                    self._fleet.kv_arrived(path)
            (self._ready if self._from_start else self._early).append(event)
            if not self._from_start:
                return
        if event.finish_reason is not None:
            self._is_finished = True
        elif len(self._ready) > self._max_unread_tokens:
            self._fail(Cancelled("The client reads too slowly: its buffer of generated tokens is full."))
        self._wake()

    def on_failed(self, link: WorkerLink, failed: pb.AttemptFailed) -> None:
        """A worker gave up."""
        self._speaking.discard(link)
        if self._needs(link):
            error = from_code(failed.code, failed.message)
            if isinstance(error, Overloaded) and failed.retry_after_s > 0:
                error.retry_after_s = failed.retry_after_s
            if isinstance(error, TransferError):
                self.blamed = {peer.key for peer in (self._start, self._decode) if peer and peer.hello is not None}
            else:
                self.blamed = {link.key}
            self._fail(error)
            path = self._path
            if isinstance(error, TransferError) and link is self._decode and path is not None:
                self._fleet.kv_did_not_arrive(path, failed.message)
        self._settle_if_silent()

    def on_lost(self, link: WorkerLink, error: WorkerLost) -> None:
        """A worker is dead."""
        self._speaking.discard(link)
        if self._needs(link):
            self.blamed = {link.key}
            self._fail(error)
        self._settle_if_silent()

    def on_refused(self, link: WorkerLink, refused: pb.ReserveRefused) -> None:
        """The decode worker had no room, or the KV did not get there: the next one, if there is one."""
        decode = self._decode
        if decode is None or decode is self._start or refused.worker_id != decode.worker_id or not self._needs(decode):
            return
        if refused.code == LayoutMismatch.code:
            self._fail(LayoutMismatch(refused.message))
            return
        is_unreachable, path = refused.code == TransferError.code, self._path
        if decode.hello is not None:
            (self._unreachable if is_unreachable else self._refused).add(decode.key)
        self._speaking.discard(decode)
        decode.close(self.id)
        self._decode = None
        self._num_refusals += not is_unreachable
        if is_unreachable and path is not None:
            self._fleet.kv_did_not_arrive(path, refused.message)
        self._redirect()

    def on_path_broken(self, path: KVPath) -> None:
        """Another attempt's KV did not get through: one that waits to begin there need not find out by itself."""
        if path == self._path and not self._is_over and not self._from_start and not self._from_decode:
            self.is_moved = True
            self._fail(TransferError(f"KV does not get from {path.prefill.worker_id} to {path.decode.worker_id}."))

    def on_timeline(self, link: WorkerLink, timeline: pb.Timeline) -> None:
        """What a worker measured."""
        assert self._record is not None
        self._record.worker_moments(
            link.worker_id,
            {moment.name: link.to_router_time(moment.at_s) for moment in timeline.moments},
            timeline.kv_bytes,
            timeline.transport,
            timeline.num_cached_tokens,
            link.clock_error_s,
        )
        self._speaking.discard(link)
        self._settle_if_silent()

    # ---- inside

    def _start_message(self, decode: WorkerLink | None, now: float) -> pb.StartAttempt:
        work = self._work
        return pb.StartAttempt(
            attempt_id=self.id,
            token_ids=self._token_ids,
            num_prompt_tokens=len(work.token_ids),
            sampling=sampling_to_proto(work.sampling),
            tenant=work.tenant,
            cache_salt=work.cache_salt,
            priority=work.priority,
            deadline_s=max(0.0, work.deadline - now),
            decode_peer=None if decode is None else _peer(decode),
        )

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._is_finished or self._error is not None

    def _needs(self, link: WorkerLink) -> bool:
        """Can the attempt not end well without `link`?"""
        if self._is_over:
            return False
        if link is self._decode:
            return True
        return link is self._start and not (self._from_start and self._from_decode)

    @property
    def _path(self) -> KVPath | None:
        """What the KV takes; None: it stays where it is, or one of the two is gone."""
        start, decode = self._start, self._decode
        if start is None or decode is None or start is decode or start.hello is None or decode.hello is None:
            return None
        return KVPath(start.key, decode.key)

    def _redirect(self) -> None:
        """Hand the pinned KV to a decode worker that has not refused; wait if all have for lack of room."""
        if self._is_over:
            return
        start, fleet = self._start, self._fleet
        if start is None or start.hello is None:
            return  # on_lost has said so
        found = redirect(
            fleet.views(),
            start.view(),
            refused=self._refused,
            unreachable=self._unreachable,
            broken=fleet.avoided_paths(),
            avoid=self._avoid,
        )
        if found.error is not None:
            self.blamed = set(found.blamed)
            self._fail(found.error)
            return
        link = fleet.link(found.decodes[0]) if found.decodes else None
        if link is None:
            self._refused.clear()
            low, high = _REDIRECT_BACKOFF_S
            delay_s = min(high, low * 2.0 ** min(self._num_refusals, 10))
            self._call_later(delay_s * random.uniform(0.5, 1.0), self._redirect)
            return
        self._decode = link
        self._speaking.add(link)
        link.open(self.id, self, prefill_tokens=0, kv_tokens=len(self._token_ids))
        fleet.kv_leaves(KVPath(start.key, link.key))
        assert self._record is not None
        self._record.decode_worker = link.worker_id
        start.send(pb.RouterMessage(redirect=pb.Redirect(attempt_id=self.id, decode_peer=_peer(link))))

    def _on_deadline(self) -> None:
        if self._is_finished:
            return
        if self._num_refusals and not self._from_decode:
            self._fail(Overloaded("No decode worker had room within the request's time."))
        else:
            self._fail(DeadlineExceeded("The request's time ran out."))

    def _fail(self, error: ServeError) -> None:
        if self._error is None and not self._is_finished and not self._is_closed:
            self._error = error
            assert self._record is not None
            self._record.failure = error.code
            self._early.clear()
            self._abort()
            self._wake()

    def _abort(self) -> None:
        """Tell every worker that may still work on it; a worker that is done ignores it."""
        if self._is_aborted:
            return
        self._is_aborted = True
        for link in {self._start, self._decode} - {None}:
            assert link is not None
            if self._is_finished and (link is self._start or self._from_decode):
                continue  # whoever sent the last token is done, and so is who prefilled for it
            link.send(pb.RouterMessage(abort=pb.AbortAttempt(attempt_id=self.id)))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _settle_if_silent(self) -> None:
        if self._is_closed and not self._speaking:
            self.settle()

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(max(0.0, delay_s), callback))


def _peer(link: WorkerLink) -> pb.DecodePeer:
    assert link.hello is not None
    return pb.DecodePeer(worker_id=link.worker_id, incarnation=link.hello.incarnation, ranks=link.hello.ranks)
