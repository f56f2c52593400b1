"""One server, one set of clients, one measurement after another: a rate, a sweep of rates, a search for goodput."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
_FLAWS: Final = {
    "late": "the load generator was the limit, late",
    "short": "steps were shorter than an answer, so take more --requests,",
}


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

    def announce(self, workload: Workload, rates: Sequence[float | None], more: str = "") -> None:
        """Say how many requests come, and how long they are being sent at each rate; `more` ends the sentence."""
        parts, total_s = [], 0.0
        for each in (dataclasses.replace(workload, rate=rate) for rate in rates):
            requests = each.requests()
            if each.concurrency is None:
                span_s = max(request.at_s for request in requests)
                how = f", sent in {span_s:.3g} s"
                total_s += span_s
            else:
                how = "" if each.duration_s is None else f", for at most {each.duration_s:g} s"
            parts.append(f"{describe(each)}: {len(requests)} requests{how}")
        whole = f"; {total_s:.3g} s in all, and the time of the last answers" if len(parts) > 1 else ""
        self.watch.say("; ".join(parts) + whole + more)

    async def sweep(self, workload: Workload, rates: Sequence[float]) -> None:
        """The workload at each rate."""
        self.announce(workload, rates)
        for rate in rates:
            await self.measure(dataclasses.replace(workload, rate=rate))

    async def goodput(self, workload: Workload, first_rate: float, tolerance: float) -> dict[str, Any]:
        """The highest rates with 90 and with 99 % joint attainment."""

        async def measure(rate: float) -> Step:
            run = await self.measure(dataclasses.replace(workload, rate=rate))
            return step_of(run)

        shorter = "" if workload.duration_s else "; half as long at each doubling, --requests N takes fewer"
        self.announce(workload, [first_rate], f"{shorter}; ten steps or more find the rate")
        levels = await search(measure, LEVELS, first_rate, tolerance)
        return {"levels": levels, "tolerance": tolerance}


@dataclass(frozen=True, slots=True)
class Step:
    """One rate of a search. With a `flaw` ("late" or "short") its attainment says nothing of the server."""

    attainment: float
    flaw: str = ""


def step_of(run: Mapping[str, Any]) -> Step:
    """A `runs` entry as a step: late where the load generator was; short where all requests were sent before half of
    the answers could end, so that the objectives were kept by a burst and not at a rate."""
    attainment = float(run["attainment"]["joint"]["value"])
    begin_s, end_s = run["window_s"]
    if run["valid"] is False:
        return Step(attainment, "late")
    is_burst = run["e2e_s"]["count"] > 0 and end_s - begin_s < run["e2e_s"]["p50"]
    return Step(attainment, "short" if is_burst and attainment >= LEVELS[0] else "")


async def search(
    measure: Callable[[float], Awaitable[Step]], levels: Sequence[float], first_rate: float, tolerance: float
) -> list[dict[str, Any]]:
    """For each level of attainment the crossing, by doubling or halving and then bisection of the rate's logarithm.

    `rate` is interpolated linearly in the last bracket `between`, whose ends differ by at most `tolerance` of the
    lower one, unless a step between them had a flaw. It is None where a 64th of the first rate does not reach the level,
    or every step had a flaw; the upper end is None where 4,096 times that rate still does, or where steps had a flaw,
    `limited_by`, from the rate `limit` on: then `rate` is the highest step without. Steps are shared between levels;
    those with a flaw are not counted, and the search does not go beyond them.
    """
    known: dict[float, float] = {}
    flaws: dict[float, str] = {}

    async def probe(rate: float) -> None:
        if rate in known or rate in flaws:
            return
        step = await measure(rate)
        if step.flaw:
            flaws[rate] = step.flaw
        else:
            known[rate] = step.attainment

    def flaw_above(rate: float) -> float | None:
        return min((other for other in flaws if other > rate), default=None)

    await probe(first_rate)
    while not known and min(flaws) > first_rate * _LOWEST:
        await probe(min(flaws) / 2)
    out = []
    for level in sorted(levels):
        while known and min(known.values()) >= level and (top := max(known)) < first_rate * _HIGHEST:
            if flaw_above(top) is not None:
                break
            await probe(top * 2)
        while known and bracket(known, level)[0] is None and (lowest := min({*known, *flaws})) > first_rate * _LOWEST:
            await probe(lowest / 2)
        low, high = bracket(known, level)
        while low is not None and high is not None and high > low * (1 + tolerance):
            middle = math.sqrt(low * high)
            await probe(middle)
            if middle in flaws:
                break
            low, high = bracket(known, level)
        limit = flaw_above(low or 0.0) if low is None or high is None else None
        out.append(
            {
                "attainment": level,
                "rate": crossing(known, level),
                "between": [low, high],
                "limit": limit,
                "limited_by": None if limit is None else flaws[limit],
            }
        )
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


def headline(level: Mapping[str, Any]) -> str:
    """What a search found for one level of attainment."""
    low, high = level["between"]
    rate, limit = level["rate"], ""
    if level.get("limit") is not None:
        limit = f"{_FLAWS[level['limited_by']]} from {level['limit']:.4g}/s on"
    if low is None and high is None:
        text = f"could not be determined: {limit}"
    elif rate is None:
        text = f"not reached at {high:.4g} requests/s; {limit}" if limit else "not reached at any rate"
    elif high is None:
        text = f"at least {rate:.4g} requests/s ({limit or 'no higher rate was tried'})"
    else:
        text = f"{rate:.4g} requests/s"
    return f"goodput at {level['attainment'] * 100:g} %: {text}"


def describe(workload: Workload) -> str:
    """A load in a few words."""
    if workload.concurrency is not None:
        return f"{workload.concurrency} at a time"
    return workload.arrivals if workload.rate is None else f"{workload.rate:.4g} requests/s"
