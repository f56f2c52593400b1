"""A model of the router: sessions, placement, redirect on refusal, retry with the delivered tokens, deadlines, aborts.

It follows router/attempt.py and router/dispatcher.py in what it sends and when it gives up, without HTTP and gRPC. What
it remembers of broken paths and what it does after a refusal is the product's; among workers that may be chosen it
chooses at random, which makes more schedules.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from baton.errors import Overloaded, TransferError, Unavailable, WorkerLost, from_code
from baton.request import AttemptId, FinishReason, GenerateRequest, RequestId, SamplingParams, TokenEvent, attempt_id
from router.placement import KVPath, WorkerKey, WorkerView, redirect
from router.reachability import Reachability
from tests.simulation import history
from tests.simulation.checker import MAX_FAILED_ATTEMPTS
from tests.simulation.network import Network
from tests.simulation.virtual_time import Scheduler
from tests.simulation.worker import SimWorker
from worker import codec

SILENCE_S: Final = 1.5
_PING_S: Final = 0.25


class Fleet(Protocol):
    """What a router sees of the world."""

    scheduler: Scheduler
    rng: random.Random
    network: Network
    path_lease_s: float
    """What routers take for the lease; 0: they forget at once what did not get through."""

    def tell(self, event: history.Event) -> None:
        """Write history."""

    @property
    def live_workers(self) -> list[SimWorker]:
        """Those that a registry lists: started, and not known to be dead."""


@dataclass(eq=False, slots=True)
class Session:
    """The stream between a router and one start of a worker."""

    worker: SimWorker
    heard_s: float
    is_up: bool = True
    is_draining: bool = False
    sent_until_s: float = 0.0
    heard_until_s: float = 0.0
    outgoing: deque[tuple[Any, ...]] = field(default_factory=deque)
    incoming: deque[list[Any] | None] = field(default_factory=deque)
    attempts: dict[AttemptId, Attempt] = field(default_factory=dict)

    @property
    def key(self) -> WorkerKey:
        """As placement names it."""
        return WorkerKey(self.worker.shape.name, self.worker.incarnation)

    @property
    def view(self) -> WorkerView:
        """For placement: idle, whoever it is."""
        shape = self.worker.shape
        return WorkerView(
            key=self.key,
            role=shape.role,
            fingerprint="",
            kv_dtype="",
            block_size=shape.block_size,
            num_blocks=shape.num_blocks,
            max_num_seqs=1,
            is_draining=self.is_draining,
            num_waiting_tokens=0,
            num_seqs=0,
            num_free_blocks=shape.num_blocks,
        )


@dataclass(eq=False, slots=True)
class Request:
    """One request and what its client has."""

    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    salt: str
    deadline_s: float
    is_local: bool
    """May be prefilled by the decode worker itself."""
    delivered: list[int] = field(default_factory=list)
    number: int = 0
    failures: int = 0
    avoid: set[WorkerKey] = field(default_factory=set)
    attempt: Attempt | None = None
    is_over: bool = False


class Attempt:
    """One attempt: tokens of two workers put in order, refusals answered by redirects."""

    def __init__(self, router: Router, request: Request, start: Session, decode: Session) -> None:
        self.router = router
        self.request = request
        self.id = attempt_id(request.request_id, request.number)
        self.start: Session = start
        self.decode: Session | None = decode
        self.is_closed = False
        self._base = len(request.delivered)
        self._from_start = 0
        self._from_decode = 0
        self._early: list[TokenEvent] = []
        self._refused: set[WorkerKey] = set()
        self._unreachable: set[WorkerKey] = set()
        """Decode workers to which the KV could not be brought: they are not asked again."""
        self._num_refusals = 0
        self.is_moved = False
        """It failed before it had begun, and by nothing that was tried for it."""
        self.blamed: set[WorkerKey] = set()

    def begin(self) -> None:
        """Send it."""
        request, now = self.request, self.router.fleet.scheduler.now()
        is_local = self.start is self.decode
        self.start.attempts[self.id] = self
        assert self.decode is not None
        self.decode.attempts[self.id] = self
        message = GenerateRequest(
            attempt_id=self.id,
            token_ids=(*request.prompt, *request.delivered),
            num_prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            tenant=request.tenant,
            cache_salt=request.salt,
            deadline_s=max(0.0, request.deadline_s - now),
        )
        if not is_local:
            self.router.reachability.trying(now, KVPath(self.start.key, self.decode.key))
        peer = None if is_local else codec.pack_peer(self.decode.worker.peer)
        self.router.send(self.start, "start", self.router.name, codec.pack_request(message), peer)

    def on_token(self, session: Session, event: TokenEvent) -> None:
        """A token of either worker."""
        if self.is_closed:
            return
        if session is self.start:
            expected = self._base + self._from_start
        elif session is self.decode:
            expected = self._base + 1 + self._from_decode
        else:
            return
        if event.index < expected:
            return
        if event.index > expected:
            self.fail(Unavailable.code, {session.key})
            return
        if session is self.start:
            self._from_start += 1
            self._deliver([event, *self._early])
            self._early = []
        else:
            self._from_decode += 1
            if self._from_decode == 1:
                self.router.reachability.worked(KVPath(self.start.key, session.key))
            if self._from_start:
                self._deliver([event])
            else:
                self._early.append(event)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.router.deliver(self, event)
            if event.finish_reason is not None:
                self.close(is_finished=True)
                self.router.end(self.request, str(event.finish_reason))
                return

    def on_failed(self, session: Session, code: str) -> None:
        """A worker gave up."""
        if self._needs(session):
            both = {peer.key for peer in (self.start, self.decode) if peer is not None}
            is_transfer = isinstance(from_code(code, ""), TransferError)
            decode = self.decode
            self.fail(code, both if is_transfer else {session.key})
            if is_transfer and session is decode and session is not self.start:
                self._did_not_arrive(session)

    def on_lost(self, session: Session) -> None:
        """A worker is dead, or seems so."""
        if self._needs(session):
            self.fail(WorkerLost.code, {session.key})

    def on_refused(self, worker_id: str, code: str) -> None:
        """The decode worker had no room, or the KV did not get there."""
        decode = self.decode
        if self.is_closed or decode is None or decode is self.start or decode.worker.shape.name != worker_id:
            return
        if not self._needs(decode):
            return
        is_unreachable = code == TransferError.code
        (self._unreachable if is_unreachable else self._refused).add(decode.key)
        decode.attempts.pop(self.id, None)
        self.decode = None
        self._num_refusals += not is_unreachable
        if is_unreachable:
            self._did_not_arrive(decode)
        self._redirect()

    def _did_not_arrive(self, decode: Session) -> None:
        """Remember it, and take back what waits to take the same path."""
        self.router.reachability.failed(self.router.fleet.scheduler.now(), KVPath(self.start.key, decode.key))
        for attempt in list(self.start.attempts.values()):
            waits = attempt.start is self.start and attempt.decode is decode
            if waits and not attempt._from_start and not attempt._from_decode:
                attempt.is_moved = True
                attempt.fail(TransferError.code, set())

    def _redirect(self) -> None:
        if self.is_closed or self.decode is not None:
            return
        router, now = self.router, self.router.fleet.scheduler.now()
        others = router.usable("decode")
        found = redirect(
            [session.view for session in others],
            self.start.view,
            refused=self._refused,
            unreachable=self._unreachable,
            broken=router.reachability.avoided(now),
            avoid=self.request.avoid,
        )
        if found.error is not None:
            self.fail(found.error.code, set(found.blamed))
            return
        if not found.decodes:
            self._refused.clear()
            delay_s = min(0.5, 0.02 * 2.0 ** min(self._num_refusals, 10))
            router.fleet.scheduler.after(delay_s * router.fleet.rng.uniform(0.5, 1.0), self._redirect)
            return
        self.decode = router.fleet.rng.choice([session for session in others if session.key in found.decodes])
        router.reachability.trying(now, KVPath(self.start.key, self.decode.key))
        self.decode.attempts[self.id] = self
        router.send(self.start, "redirect", self.id, codec.pack_peer(self.decode.worker.peer))

    def _needs(self, session: Session) -> bool:
        if self.is_closed:
            return False
        return session is self.decode or (session is self.start and not (self._from_start and self._from_decode))

    @property
    def out_of_room(self) -> bool:
        """Is it waiting for a decode worker with room?"""
        return bool(self._num_refusals and not self._from_decode)

    def fail(self, code: str, blamed: set[WorkerKey]) -> None:
        """End it; the router decides what follows."""
        if not self.is_closed:
            self.blamed = blamed
            self.close()
            self.router.attempt_failed(self, code)

    def close(self, *, is_finished: bool = False) -> None:
        """Abort what may still run. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        sessions = {id(s): s for s in (self.start, self.decode) if s is not None}
        for session in sessions.values():
            session.attempts.pop(self.id, None)
            if not (is_finished and (session is self.start or self._from_decode)):
                self.router.send(session, "abort", self.id)


class Router:
    """One router process. `name` is new at each start."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet: Final = fleet
        self.name: Final = name
        self.is_dead = False
        self.requests: dict[RequestId, Request] = {}
        self.reachability: Final = Reachability(fleet.path_lease_s)
        self._sessions: dict[str, Session] = {}
        self._tick()

    # Sessions.

    def usable(self, role: str) -> list[Session]:
        """Sessions to workers that may be asked for more."""
        return [
            session
            for session in self._sessions.values()
            if session.is_up and not session.is_draining and session.worker.shape.role in (role, "mixed")
        ]

    def _tick(self) -> None:
        if self.is_dead:
            return
        now = self.fleet.scheduler.now()
        for session in list(self._sessions.values()):
            if now - session.heard_s > SILENCE_S:
                self._drop(session)
        for worker in self.fleet.live_workers:
            key = worker.key
            if key not in self._sessions and not worker.is_stopped and not self._is_cut(worker):
                session = self._sessions[key] = Session(worker, now)
                self.reachability.keep(lambda old, new=session.key: old.worker_id != new.worker_id or old == new)  # type: ignore[misc]
                self.send(session, "router_here", self.name)
        for request in list(self.requests.values()):
            self._advance(request)
        self.fleet.scheduler.after(_PING_S, self._tick)

    def _is_cut(self, worker: SimWorker) -> bool:
        cuts, name = self.fleet.network.conditions.cuts, worker.shape.name
        return ("router", name) in cuts or (name, "router") in cuts

    def send(self, session: Session, *message: Any) -> None:
        """A message on the session, in order; lost if the session ends before it arrives."""
        scheduler = self.fleet.scheduler
        session.sent_until_s = max(session.sent_until_s, scheduler.now() + self.fleet.network.draw_latency())

        def arrive() -> None:
            if not session.is_up:
                return
            if ("router", session.worker.shape.name) in self.fleet.network.conditions.cuts:
                scheduler.after(0.2, arrive)
            else:
                session.worker.command(*session.outgoing.popleft())

        if session.is_up:
            session.outgoing.append(message)
            scheduler.at(session.sent_until_s, arrive)

    def hear(self, worker: SimWorker, items: list[Any] | None) -> None:
        """The worker's front sends: events, or a sign of life (None)."""
        session = self._sessions.get(worker.key)
        if session is None or not session.is_up or self.is_dead:
            return
        scheduler = self.fleet.scheduler
        session.heard_until_s = max(session.heard_until_s, scheduler.now() + self.fleet.network.draw_latency())

        def arrive() -> None:
            if not session.is_up or self.is_dead:
                return
            if (worker.shape.name, "router") in self.fleet.network.conditions.cuts:
                scheduler.after(0.2, arrive)
                return
            if ("router", worker.shape.name) not in self.fleet.network.conditions.cuts:  # pings are answered
                session.heard_s = scheduler.now()
            for item in session.incoming.popleft() or ():
                self._on_item(session, item)

        session.incoming.append(items)
        scheduler.at(session.heard_until_s, arrive)

    def _on_item(self, session: Session, item: list[Any]) -> None:
        match item:
            case ["token", packed]:
                event = codec.unpack_token(packed)
                attempt = session.attempts.get(event.attempt_id)
                if attempt is not None:
                    attempt.on_token(session, event)
            case ["failed", name, code, _, _]:
                attempt = session.attempts.get(name)
                if attempt is not None:
                    attempt.on_failed(session, code)
            case ["refused", name, worker_id, code, _]:
                attempt = session.attempts.get(name)
                if attempt is not None:
                    attempt.on_refused(worker_id, code)
            case ["timeline", *_]:
                pass
            case _:
                raise AssertionError(item)

    def lost(self, worker: SimWorker) -> None:
        """The stream broke: the worker's process is gone and the kernel said so."""
        session = self._sessions.get(worker.key)
        if session is not None:
            self._drop(session)

    def _drop(self, session: Session) -> None:
        """The session is over for this router; the worker's front notices at once or by its own keepalive."""
        session.is_up = False
        self._sessions.pop(session.worker.key, None)
        delay_s = 2.0 if self._is_cut(session.worker) else self.fleet.network.draw_latency()
        worker = session.worker
        name = self.name

        def gone() -> None:
            if worker.key not in self._sessions or self.is_dead:
                worker.command("router_gone", name)
            else:  # it came back before the front had noticed: one session ends, the other begins
                worker.command("router_gone", name)
                worker.command("router_here", name)

        self.fleet.scheduler.after(delay_s, gone)
        for attempt in list(session.attempts.values()):
            attempt.on_lost(session)

    # Requests.

    def submit(self, request: Request) -> None:
        """A client asks."""
        self.requests[request.request_id] = request
        self.fleet.scheduler.at(request.deadline_s, lambda: self._on_deadline(request))
        self._advance(request)

    def cancel(self, request: Request) -> None:
        """The client leaves."""
        if not request.is_over:
            if request.attempt is not None:
                request.attempt.close()
            self.end(request, "cancelled")

    def die(self) -> None:
        """The process is gone: clients see it, workers see their sessions end."""
        self.is_dead = True
        for request in list(self.requests.values()):
            self.end(request, "router_lost")
        for session in list(self._sessions.values()):
            session.attempts.clear()
            self._drop(session)

    def _advance(self, request: Request) -> None:
        """Place the next attempt, if none runs and workers are there."""
        if request.is_over or (request.attempt is not None and not request.attempt.is_closed):
            return
        rng = self.fleet.rng
        broken = self.reachability.avoided(self.fleet.scheduler.now())
        decodes = self.usable("decode")
        decodes = [s for s in decodes if s.key not in request.avoid] or decodes
        if not decodes:
            return  # the next tick tries again, until the deadline
        fresh = [s for s in self.usable("prefill") if s.key not in request.avoid]
        starts = {
            decode.key: [s for s in fresh if s is not decode and KVPath(s.key, decode.key) not in broken]
            for decode in decodes
        }
        decode = rng.choice([decode for decode in decodes if starts[decode.key]] or decodes)
        start = decode if request.is_local or not starts[decode.key] else rng.choice(starts[decode.key])
        request.number += 1
        request.attempt = Attempt(self, request, start, decode)
        self.fleet.tell(history.AttemptStarted(self.fleet.scheduler.now(), request.request_id, request.number))
        request.attempt.begin()

    def attempt_failed(self, attempt: Attempt, code: str) -> None:
        """Another one, or the end."""
        request, now = attempt.request, self.fleet.scheduler.now()
        error = from_code(code, "")
        is_overloaded = isinstance(error, Overloaded)
        counts = not is_overloaded and not attempt.is_moved
        request.failures += counts
        self.fleet.tell(history.AttemptFailed(now, request.request_id, request.number, code, counts))
        if request.failures >= MAX_FAILED_ATTEMPTS or not (error.retryable or is_overloaded):
            self.end(request, "error", code)
            return
        request.avoid |= attempt.blamed
        self.fleet.scheduler.after(0.5 if is_overloaded else 0.0, lambda: self._advance(request))

    def _on_deadline(self, request: Request) -> None:
        if request.is_over:
            return
        attempt = request.attempt
        code = "deadline_exceeded"
        if attempt is not None and not attempt.is_closed:
            code = "overloaded" if attempt.out_of_room else code
            attempt.close()
        self.end(request, "error", code)

    def deliver(self, attempt: Attempt, event: TokenEvent) -> None:
        """To the client."""
        request = attempt.request
        self.fleet.tell(
            history.Delivered(
                self.fleet.scheduler.now(), request.request_id, request.number, event.index, event.token_id
            )
        )
        request.delivered.append(event.token_id)

    def end(self, request: Request, outcome: str, code: str = "") -> None:
        """Tell the client, once."""
        assert outcome not in (FinishReason.ABORT, FinishReason.ERROR) or code
        if not request.is_over:
            request.is_over = True
            self.requests.pop(request.request_id, None)
            self.fleet.tell(history.Ended(self.fleet.scheduler.now(), request.request_id, outcome, code))
