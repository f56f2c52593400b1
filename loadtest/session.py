"""One server, one set of clients, one measurement after another: a rate, a sweep of rates, a search for goodput."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loadtest import result
from loadtest.console import Watch
from loadtest.coordinator import Coordinator
from loadtest.metrics import Slo
from loadtest.request_traces import RequestTraces
from loadtest.workload import Workload

LEVELS: Final = (0.9, 0.99)
_HIGHEST: Final = 4096.0  # times the first rate
_LOWEST: Final = 1 / 64


@dataclass(frozen=True, slots=True)
class Session:
    """Measures workloads. `traces` is where Baton's timelines come from, if the server is a Baton of ours."""

    coordinator: Coordinator
    watch: Watch
    slo: Slo | None = None
    warmup_s: float | None = None
    cooldown_s: float | None = None
    traces: RequestTraces | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    """All that was measured, as it ended: what remains if the rest is interrupted."""

    async def measure(self, workload: Workload, title: str = "") -> dict[str, Any]:
        """One load as a `runs` entry (docs/loadtest.md).

        Raises:
            WorkloadError, TraceError: nothing can be sent.
            AgentLost: a client process ended.
        """
        requests = workload.requests()
        with self.watch.load(title or describe(workload), len(requests)) as progress:
            load = await self.coordinator.drive(
                requests,
                concurrency=workload.concurrency,
                stop_after_s=workload.duration_s if workload.concurrency else None,
                on_progress=progress,
            )
        cut = result.window(load, self.warmup_s, self.cooldown_s)
        traces = [] if self.traces is None else await asyncio.to_thread(self.traces.of, load, cut)
        entry = result.run(load, workload, self.slo, cut, traces)
        self.watch.result(entry)
        self.runs.append(entry)
        return entry

    async def sweep(self, workload: Workload, rates: Sequence[float]) -> None:
        """The workload at each rate."""
        for rate in rates:
            await self.measure(dataclasses.replace(workload, rate=rate))

    async def goodput(self, workload: Workload, first_rate: float, tolerance: float) -> dict[str, Any]:
        """The highest rates with 90 and with 99 % joint attainment."""

        async def measure(rate: float) -> float:
            run = await self.measure(dataclasses.replace(workload, rate=rate))
            return float(run["attainment"]["joint"]["value"])

        levels = await search(measure, LEVELS, first_rate, tolerance)
        return {"levels": levels, "tolerance": tolerance}


async def search(
    measure: Callable[[float], Awaitable[float]], levels: Sequence[float], first_rate: float, tolerance: float
) -> list[dict[str, Any]]:
    """For each level of attainment the crossing, by doubling or halving and then bisection of the rate's logarithm.

    `rate` is interpolated linearly in the last bracket `between`, whose ends differ by at most `tolerance` of the
    lower one. It is None where a 64th of the first rate does not reach the level; the upper end is None where 4,096
    times that rate still does. Probes are shared between levels.
    """
    known: dict[float, float] = {}

    async def probe(rate: float) -> float:
        if rate not in known:
            known[rate] = await measure(rate)
        return known[rate]

    await probe(first_rate)
    out = []
    for level in sorted(levels):
        while min(known.values()) >= level and max(known) < first_rate * _HIGHEST:
            await probe(max(known) * 2)
        while bracket(known, level)[0] is None and min(known) > first_rate * _LOWEST:
            await probe(min(known) / 2)
        low, high = bracket(known, level)
        while low is not None and high is not None and high > low * (1 + tolerance):
            await probe(math.sqrt(low * high))
            low, high = bracket(known, level)
        out.append({"attainment": level, "rate": crossing(known, level), "between": [low, high]})
    return out


def bracket(known: dict[float, float], level: float) -> tuple[float | None, float | None]:
    """The smallest rate below the level, and the largest one under it that reaches the level."""
    high = min((rate for rate, value in known.items() if value < level), default=None)
    low = max((rate for rate, value in known.items() if value >= level and (high is None or rate < high)), default=None)
    return low, high


def crossing(known: dict[float, float], level: float) -> float | None:
    """Where attainment falls through the level: linear between the two rates of the bracket."""
    low, high = bracket(known, level)
    if low is None or high is None:
        return low
    share = (known[low] - level) / (known[low] - known[high])
    return round(low + share * (high - low), 6)


def describe(workload: Workload) -> str:
    """A load in a few words."""
    if workload.concurrency is not None:
        return f"{workload.concurrency} at a time"
    return workload.arrivals if workload.rate is None else f"{workload.rate:.4g} requests/s"
