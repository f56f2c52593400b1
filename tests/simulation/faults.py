"""What goes wrong, and when: each kind is switched on for some seeds, with a rate. Knows the world, not the product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker
    from tests.simulation.world import World

ON_RATE: Final = 0.35
"""Part of the seeds in which a kind of fault is switched on."""

_DELAY_S: Final = 0.25

WIRE: Final = "corruption on the wire"
LANDING: Final = "corruption between digest and verification"
SOURCE: Final = "corruption in a source pool"
ABORT: Final = "client leaves"
DEADLINE: Final = "short deadline"
NONE: Final = "none"
_OTHERS: Final = (WIRE, LANDING, ABORT, DEADLINE)
_PERMANENT: Final = frozenset(
    {
        "one-way partition",
        "partition",
        "router partition",
        "pause",
        "pause of one rank",
        "kill",
        "silent death",
        "orderly stop",
    }
)
"""What may begin and never end, while the rest of the fleet has to do the work."""


class Faults:
    """The enemy of one run."""

    def __init__(self, world: World, only: str = "") -> None:
        self._world = world
        self.counts: Counter[str] = Counter()
        self._actions: dict[str, Callable[[], bool]] = {
            "connection reset": self._reset,
            "one-way partition": self._cut_one_way,
            "partition": self._cut_both_ways,
            "router partition": self._cut_router,
            "delay": self._delay,
            "pause": self._pause,
            "pause of one rank": self._pause_rank,
            "kill": self._kill,
            "silent death": self._vanish,
            "orderly stop": self._stop,
            "router gone": self._kill_router,
            SOURCE: self._spoil,
        }
        self._heals: list[Callable[[], None]] = []
        self._is_on = True
        rng = world.rng
        rates = {name: rng.choice((0.5, 2.0, 8.0)) for name in self._actions}
        rates[SOURCE] = rng.choice((5.0, 40.0))
        possible = {*_PERMANENT, ABORT} if world.mode == "liveness" else {*self._actions, *_OTHERS}
        rate_on = 0.5 if world.mode == "liveness" else ON_RATE
        on = {name: rng.random() < rate_on and name in possible for name in (*self._actions, *_OTHERS)}
        if world.mode == "corruption":
            on = {name: name in (WIRE, LANDING, SOURCE) for name in on}
        if only:
            on = {name: name == only for name in on}
        self.rates = {name: rate for name, rate in rates.items() if on[name]}
        self.abort_rate = rng.choice((0.05, 0.3)) if on[ABORT] else 0.0
        self.deadline_rate = rng.choice((0.05, 0.2)) if on[DEADLINE] else 0.0
        if on[WIRE]:
            world.book.wire_rate = rng.choice((0.003, 0.03)) if world.mode != "corruption" else 0.05
        if on[SOURCE]:
            world.book.source_rate = rng.choice((0.003, 0.03)) if world.mode != "corruption" else 0.06
        if on[LANDING]:
            world.book.landing_rate = rng.choice((0.01, 0.1)) if world.mode != "corruption" else 0.2
        self._victims: list[str] = [shape.name for shape in world.shapes]
        self._is_permanent = world.mode == "liveness"
        if self._is_permanent:
            # Three attempts can meet two bad workers: more would end requests by the limit on attempts.
            self._victims = rng.sample(self._victims[:-2], min(2, len(self._victims) - 2))

    def count(self, name: str) -> None:
        """One more."""
        self.counts[name] += 1

    def begin(self, until: float) -> None:
        """Plan faults from now until then; in liveness mode what begins never ends."""
        world = self._world
        start = world.scheduler.now()
        for name, rate in self.rates.items():
            # Load comes as fast as it comes: rates are per 30 requests, not per second.
            times = 1 if name == "router gone" else int(world.rng.expovariate(1 / rate)) + 1
            for _ in range(times):
                when = world.rng.uniform(start, until + 0.2)
                world.scheduler.at(when, lambda n=name: self._strike(n))  # type: ignore[misc]

    def _strike(self, name: str) -> None:
        if self._is_on and not self._world.is_closing and self._actions[name]():
            self.count(name)

    def heal(self) -> None:
        """Nothing new, and everything that can be mended is."""
        self._is_on = False
        world = self._world
        world.book.is_on = False
        for undo in self._heals:
            undo()
        self._heals.clear()
        for shape in world.shapes:
            if world.workers[shape.name].is_dead:
                world.start_worker(shape)

    # Helpers.

    def _later(self, least_s: float, most_s: float, undo: Callable[[], None]) -> None:
        """Undo after a random time, and on healing at the latest; never in liveness mode."""
        if self._is_permanent:
            return
        is_done = False

        def once() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                undo()

        self._heals.append(once)
        self._world.scheduler.after(self._world.rng.uniform(least_s, most_s), once)

    def _victim(self) -> SimWorker | None:
        workers = [w for w in self._world.live_workers if w.shape.name in self._victims and not w.is_stopped]
        return self._world.rng.choice(workers) if workers else None

    # Faults; each returns whether it did anything.

    def _reset(self) -> bool:
        network = self._world.network
        sockets = network.open_sockets
        if not sockets:
            return False
        network.cut_connection(self._world.rng.choice(sockets))
        return True

    def _pair(self) -> tuple[str, str] | None:
        world = self._world
        names = [shape.name for shape in world.shapes]
        first, second = world.rng.choice(self._victims), world.rng.choice(names)
        if first == second:
            return None
        return (first, second) if world.rng.random() < 0.5 else (second, first)

    def _cut(self, routes: list[tuple[str, str]]) -> bool:
        network = self._world.network
        for source, destination in routes:
            network.cut(source, destination)

        def undo() -> None:
            for source, destination in routes:
                network.heal(source, destination)

        self._later(0.05, 6.0, undo)
        return True

    def _cut_one_way(self) -> bool:
        pair = self._pair()
        return pair is not None and self._cut([pair])

    def _cut_both_ways(self) -> bool:
        pair = self._pair()
        return pair is not None and self._cut([pair, pair[::-1]])

    def _cut_router(self) -> bool:
        worker = self._victim()
        if worker is None:
            return False
        routes = [("router", worker.shape.name), (worker.shape.name, "router")]
        return self._cut(self._world.rng.choice((routes, routes[:1], routes[1:])))

    def _delay(self) -> bool:
        conditions = self._world.network.conditions
        low, high = usual = conditions.latency_s
        if high >= _DELAY_S:
            return False
        conditions.latency_s = (low * 10, _DELAY_S)

        def undo() -> None:
            conditions.latency_s = usual

        self._later(0.05, 1.0, undo)
        return True

    def _pause(self) -> bool:
        worker = self._victim()
        return worker is not None and self._pause_ranks(worker, list(range(len(worker.ranks))))

    def _pause_rank(self) -> bool:
        worker = self._victim()
        if worker is None:
            return False
        return self._pause_ranks(worker, [self._world.rng.randrange(len(worker.ranks))])

    def _pause_ranks(self, worker: SimWorker, ranks: list[int]) -> bool:
        processes = [worker.ranks[rank].process for rank in ranks]
        for process in processes:
            process.stop()

        def undo() -> None:
            for process in processes:
                process.resume()

        self._later(0.01, 7.0, undo)
        return True

    def _end(self, *, silently: bool = False, in_order: bool = False) -> bool:
        world, worker = self._world, self._victim()
        if worker is None:
            return False
        world.bury(worker, silently=silently, in_order=in_order)
        shape = worker.shape
        self._later(0.05, 3.0, lambda: world.restart(shape))
        return True

    def _kill(self) -> bool:
        return self._end()

    def _vanish(self) -> bool:
        return self._end(silently=True)

    def _stop(self) -> bool:
        return self._end(in_order=True)

    def _kill_router(self) -> bool:
        world = self._world
        if self._is_permanent:
            return False
        router = world.rng.choice([router for router in world.routers if not router.is_dead])
        router.die()
        world.routers.remove(router)
        world.start_router()
        return True

    def _spoil(self) -> bool:
        worker = self._victim()
        return worker is not None and worker.spoil_source()
