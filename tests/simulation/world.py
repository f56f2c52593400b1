"""One run: a fleet drawn from a seed, requests, faults, then healing (or not), rest, and the verdict."""

from __future__ import annotations

import logging
import random
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from baton.request import RequestId, SamplingParams
from engine.sim import CostModel
from kvtransfer.api import TransferId
from tests.simulation import history, oracle
from tests.simulation.checker import Checker, Violation
from tests.simulation.corruption import FrameTap, InjectionBook
from tests.simulation.faults import Faults
from tests.simulation.network import Conditions, Network, Pipe, SimSocket
from tests.simulation.router import Request, Router
from tests.simulation.transfer import is_inside_frame
from tests.simulation.virtual_time import Scheduler
from tests.simulation.worker import Known, Shape, SimWorker

SAFETY: Final = "safety"
LIVENESS: Final = "liveness"
CORRUPTION: Final = "corruption"
MODES: Final = (SAFETY, LIVENESS, CORRUPTION)
"""Random faults that heal; permanent faults beside a healthy pair; wrong bytes and nothing else, as many as possible."""

_REST_WITHIN_S: Final = 30.0
_PROMISE_WITHIN_S: Final = 25.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one run came to."""

    seed: int
    mode: str
    num_requests: int
    outcomes: Counter[str]
    faults: Counter[str]
    injections: Counter[str]
    """By "level kind outcome"."""
    num_frames: int
    num_stale: int
    num_events: int
    violations: tuple[Violation, ...]

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for equal runs."""
        counts = tuple(tuple(sorted(c.items())) for c in (self.outcomes, self.faults, self.injections))
        return (self.num_requests, counts, self.num_frames, self.num_stale, self.num_events, self.violations)


@dataclass
class Options:
    """What a test may change."""

    num_requests: int = 30
    verify: bool = True
    keep_history: bool = False
    only_fault: str = ""
    """Of all faults only this one (see tests.simulation.faults); NONE: no fault at all."""


class World:
    """Everything in one run. `run` may be called once."""

    def __init__(self, seed: int, mode: str, options: Options | None = None) -> None:
        assert mode in MODES
        self.options = options or Options()
        self.seed = seed
        self.mode = mode
        self.rng = random.Random(f"{mode} {seed}")
        self._introductions = random.Random(f"introductions {mode} {seed}")
        self._introduces = self._introductions.random() < 0.5
        rng = self.rng
        self.scheduler = Scheduler()
        self.model = oracle.model(rng.choice((1, 2, 3)), rng.choice((1, 2, 2, 4)))
        self.lease_s = rng.choice((1.0, 2.0, 3.0))
        # Routers that remember broken paths soon send little KV where much is corrupted or reset: some runs have none.
        forgets = mode == CORRUPTION or (mode == SAFETY and random.Random(f"paths {seed}").random() < 0.5)
        self.path_lease_s = 0.0 if forgets else self.lease_s
        self.hold_s = 4.0
        self.verify = self.options.verify
        # Without a collective (the simulated engine has none) nobody notices that one rank of a worker stands still.
        self.is_lockstep = rng.random() < 0.5 or mode == LIVENESS
        self.costs = rng.choice((CostModel(), CostModel(0.00005, 0.001, 0.0002)))
        self.preempt_rate = rng.choice((0.0, 0.0, 0.3))
        self.network = Network(
            self.scheduler,
            rng,
            Conditions(
                latency_s=rng.choice(((0.00005, 0.0005), (0.0001, 0.004), (0.0001, 0.03))),
                capacity_bytes=rng.choice((2000, 9000, 70_000)),
                fragments=rng.random() < 0.7,
            ),
        )
        self.network.connected = self._on_connection
        self.history: list[history.Event] = []
        self.checker = Checker()
        self.known: dict[TransferId, Known] = {}
        self.outcomes: Counter[str] = Counter()
        self.injections: Counter[str] = Counter()
        self.book = InjectionBook(rng, self.tell, self.scheduler.now)
        self.shapes = self._draw_fleet()
        self.faults = Faults(self, self.options.only_fault)
        self.workers: dict[str, SimWorker] = {}
        self.buried: list[SimWorker] = []
        self._num_starts = 0
        self.routers: list[Router] = []
        self._num_routers = 0
        self.requests: list[Request] = []
        self.sequences: list[tuple[str, str, tuple[int, ...]]] = []
        self.num_stale = 0
        self.is_closing = False

    # The fleet.

    def _draw_fleet(self) -> list[Shape]:
        rng = self.rng
        transports = rng.choice((("tcp",), ("tcp",), ("shm", "tcp"), ("shm", "tcp"), ("shm",)))
        roles = ["prefill"] * rng.choice((1, 1, 2)) + ["decode"] * rng.choice((1, 2, 2))
        if rng.random() < 0.3:
            roles.append("mixed")
        if self.mode == LIVENESS:
            roles += ["prefill", "decode"]  # the healthy pair
        tp_sizes = {"prefill": rng.choice((1, 1, 2)), "decode": rng.choice((1, 1, 2)), "mixed": 1}
        shapes = []
        for number, role in enumerate(roles):
            block_size = rng.choice((16, 16, 32, 64))
            least = -(-(oracle.MAX_MODEL_LEN - 32) // block_size)
            shapes.append(
                Shape(
                    name=f"{role}-{number}",
                    role=role,
                    tp_size=tp_sizes[role],
                    block_size=block_size,
                    num_blocks=least + rng.choice((1, 2, 4, 3 * least)),
                    max_num_batched_tokens=rng.choice((16, 48, 128)),
                    transports=transports,
                    credit_bytes=rng.choice((1, 4096, 2**20)),
                )
            )
        return shapes

    def start_worker(self, shape: Shape) -> SimWorker:
        """A new incarnation."""
        self._num_starts += 1
        worker = self.workers[shape.name] = SimWorker(self, shape, self._num_starts)
        if self._introduces:
            for other in self.live_workers:
                self._introduce(worker, other)
                self._introduce(other, worker)
        return worker

    def _introduce(self, source: SimWorker, destination: SimWorker) -> None:
        """As the supervisor does: links are there before the first request."""
        if source is not destination and source.shape.role != "decode" and destination.shape.role != "prefill":
            peer = destination.peer
            self.scheduler.after(self._introductions.uniform(0.0, 0.1), lambda: source.connect(peer))

    def start_router(self) -> Router:
        """A new router process."""
        self._num_routers += 1
        router = Router(self, f"router-{self._num_routers}")
        self.routers.append(router)
        return router

    @property
    def live_workers(self) -> list[SimWorker]:
        """In the order of the fleet."""
        return [worker for worker in self.workers.values() if not worker.is_dead]

    def bury(self, worker: SimWorker, *, silently: bool = False, in_order: bool = False) -> None:
        """All processes of a worker end; its sessions break unless it vanished `silently`."""
        if worker.is_dead:
            return
        self.buried.append(worker)
        stale = worker.num_stale
        if in_order:
            worker.close_in_order()
        else:
            worker.kill(silently=silently)
        self.num_stale += stale
        if not silently:
            for router in self.routers:
                router.lost(worker)

    def crashed(self, worker: SimWorker) -> None:
        """A process ended by itself: the others of the worker follow, and it is started again."""
        self.bury(worker)
        if not self.is_closing:
            shape = worker.shape
            self.scheduler.after(self.rng.uniform(0.1, 1.0), lambda: self.restart(shape))

    def restart(self, shape: Shape) -> None:
        """Start it again, unless that was done already."""
        if self.workers[shape.name].is_dead and not self.is_closing:
            self.start_worker(shape)

    def said(self, worker: SimWorker, message: list[Any]) -> None:
        """What a leader says goes to the routers that it concerns."""
        match message:
            case ["tick", *_]:
                for router in self.routers:
                    router.hear(worker, None)
            case ["events", by_router]:
                for router in self.routers:
                    if router.name in by_router:
                        router.hear(worker, by_router[router.name])
            case _:
                raise AssertionError(message)

    def _on_connection(self, dialler: SimSocket, acceptor: SimSocket) -> None:
        if self.book.wire_rate:
            for sock in (dialler, acceptor):
                if sock.outgoing is not None:
                    sock.outgoing.tap = FrameTap(self.book, sock.outgoing)

    def tell(self, event: history.Event) -> None:
        """Write history; it is judged at once."""
        if self.options.keep_history:
            self.history.append(event)
        if isinstance(event, history.Ended):
            self.outcomes[event.outcome if event.outcome != "error" else f"error {event.code}"] += 1
        elif isinstance(event, history.Injected):
            self.injections[f"{event.level}/{event.kind}/{event.outcome}"] += 1
        elif isinstance(event, history.Mismatch):
            self.injections["tell-tale"] += 1
        self.checker.feed(event)

    # Requests.

    def _submit(self, number: int) -> None:
        rng = self.rng
        router = rng.choice([router for router in self.routers if not router.is_dead])
        family, tenant = rng.randrange(4), rng.choice(("a", "a", "b"))
        salt = rng.choice(("", "", "salt"))
        length = rng.choice((rng.randint(1, 40), rng.randint(30, 100), 16 * rng.randint(1, 6)))
        num_shared = rng.choice((0, 16, 32, 64, length))
        # Prompts of a family share a prefix, so that caches and deltas have something to do.
        prompt = tuple(
            (family * 131 + position * 7 + (length * 31 if position >= num_shared else 0)) % oracle.VOCAB_SIZE
            for position in range(length)
        )
        temperature, seed = (0.0, 0) if rng.random() < 0.7 else (1.0, rng.randrange(3))
        max_tokens = rng.choice((1, 2, 5, 9, oracle.MAX_NEW_TOKENS))
        tokens = oracle.undisturbed(self.model, prompt, tenant, salt, temperature, seed)
        now = self.scheduler.now()
        is_short = rng.random() < self.faults.deadline_rate
        if is_short:
            self.faults.count("short deadline")
        deadline_s = now + (rng.uniform(0.01, 0.5) if is_short else 40.0)
        request = Request(
            RequestId(f"r{number}"),
            prompt,
            SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens),
            tenant,
            salt,
            deadline_s,
            is_local=rng.random() < 0.05,
        )
        self.requests.append(request)
        self.sequences.append((tenant, salt, prompt + tokens[:max_tokens]))
        self.tell(history.Submitted(now, request.request_id, tokens[:max_tokens], max_tokens, deadline_s))
        router.submit(request)
        if rng.random() < self.faults.abort_rate:
            self.faults.count("client leaves")
            self.scheduler.after(rng.expovariate(1 / 0.08), lambda: router.cancel(request))

    # The run.

    def run(self) -> Report:
        """Begin, disturb, heal, rest, judge."""
        try:
            self._play()
        finally:
            self._close()
        return Report(
            self.seed,
            self.mode,
            len(self.requests),
            self.outcomes,
            self.faults.counts,
            self.injections,
            sum(worker.num_landed for worker in [*self.buried, *self.live_workers]),
            self.num_stale,
            self.scheduler.num_events,
            tuple(self.checker.violations),
        )

    def _play(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        for shape in self.shapes:
            self.start_worker(shape)
        for _ in range(rng.choice((1, 1, 2))):
            self.start_router()
        scheduler.run(0.1)
        pace_s = rng.choice((0.004, 0.015, 0.06))
        when = 0.1
        for number in range(self.options.num_requests):
            when += rng.expovariate(1 / pace_s)
            scheduler.at(when, lambda n=number: self._submit(n))  # type: ignore[misc]
        self.faults.begin(when)
        scheduler.run(when)
        if self.mode != LIVENESS:
            self.faults.heal()
        else:
            # What happened until here may have cost attempts; the promise holds for what comes after detection.
            self.tell(history.Promise(scheduler.now(), _PROMISE_WITHIN_S))
        self._run_until(lambda: all(request.is_over for request in self.requests), 45.0)
        self._run_until(lambda: all(worker.is_at_rest for worker in self._judged), _REST_WITHIN_S)
        self.is_closing = True
        for worker in self._judged:
            self.tell(worker.rest(self.sequences))
        self.book.settle(self._is_inside_frame)
        self.tell(history.Over(scheduler.now()))

    def _is_inside_frame(self, pipe: Pipe) -> bool:
        """Is whoever reads this pipe in the middle of a frame (or gone)?"""
        for worker in self.live_workers:
            for rank in worker.ranks:
                for connection in rank.endpoint.thread.connections:
                    if connection._sock is pipe.reader:  # type: ignore[comparison-overlap]
                        return is_inside_frame(connection)
        return True

    @property
    def _judged(self) -> list[SimWorker]:
        """Live workers that can act."""
        return [worker for worker in self.live_workers if not worker.is_stopped]

    def _run_until(self, condition: Callable[[], bool], within_s: float) -> None:
        limit = self.scheduler.now() + within_s
        while not condition() and self.scheduler.now() < limit:
            self.scheduler.run(self.scheduler.now() + 0.25)

    def _close(self) -> None:
        for worker in list(self.workers.values()):
            if not worker.is_dead:
                self.num_stale += worker.num_stale
                worker.kill()
                self.buried.append(worker)
        self.network.close()


def simulate(seed: int, mode: str, options: Options | None = None) -> Report:
    """One run. Deterministic: equal arguments give equal reports, in any process."""
    logging.disable(logging.CRITICAL)
    drawn = random.Random(f"bytes {mode} {seed}")
    token_bytes = secrets.token_bytes
    secrets.token_bytes = drawn.randbytes  # type: ignore[assignment]  # the standard library's, not our own code
    try:
        return World(seed, mode, options).run()
    finally:
        secrets.token_bytes = token_bytes
        logging.disable(logging.NOTSET)
