"""Goodput of several servers on a grid of objectives, from stored runs. Pure; knows neither servers nor files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.charts import seconds
from loadtest.session import bracket, crossing

TTFT_FACTORS: Final = (5.0, 10.0)
TPOT_FACTORS: Final = (1.5, 2.0, 3.0, 5.0)
PREFILL_FIRST: Final = "prefill-first"
PD: Final = "PD"

Runs = Mapping[tuple[str, float, int], Mapping[str, Any]]
"""(arm, rate, repetition) -> the stored run."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A number that may be known from one side only: `low` <= it <= `high`."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.3g}"
        if self.low <= 0 and math.isinf(self.high):
            return "?"
        return f"< {self.high:.3g}" if self.low <= 0 else f"> {self.low:.3g}"

    def over(self, other: Bounds) -> Bounds:
        """The ratio."""
        low = 0.0 if math.isinf(other.high) else self.low / other.high if other.high else math.inf
        high = math.inf if math.isinf(self.high) or other.low <= 0 else self.high / other.low
        return Bounds(low, high)


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair of objectives."""

    ttft_factor: float
    tpot_factor: float
    ttft_s: float
    tpot_s: float
    goodput: Mapping[str, Bounds]
    """Per arm: requests/s with the level's attainment, from all repetitions together."""
    spread: Mapping[str, tuple[Bounds, Bounds]]
    """Per arm: the lowest and the highest of the single repetitions."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Per arm: (rate, joint attainment)."""

    @property
    def best_chunked(self) -> str:
        """The arm of chunked prefill that is best in this very cell: the rival may choose its budget for each."""
        arms = [arm for arm in self.goodput if arm not in (PD, PREFILL_FIRST)]
        return max(arms, key=lambda arm: (self.goodput[arm].low, max(share for _, share in self.curves[arm])))

    def ratio(self, rival: str) -> Bounds:
        """PD over the rival."""
        return self.goodput[PD].over(self.goodput[rival])

    @property
    def verdict(self) -> str:
        """PD against the better rival."""
        ratios = [self.ratio(rival) for rival in (PREFILL_FIRST, self.best_chunked)]
        if any(ratio.high < 1 for ratio in ratios):
            return "loses"
        return "wins" if all(ratio.low > 1 for ratio in ratios) else "undecided"


def cells(runs: Runs, unloaded_ttft_s: float, unloaded_tpot_s: float, level: float) -> list[Cell]:
    """The whole grid."""
    arms = sorted({arm for arm, _, _ in runs}, key=_order)
    repetitions = sorted({repetition for _, _, repetition in runs})
    out = []
    for ttft_factor in TTFT_FACTORS:
        for tpot_factor in TPOT_FACTORS:
            ttft_s, tpot_s = ttft_factor * unloaded_ttft_s, tpot_factor * unloaded_tpot_s
            curves, goodput, spread = {}, {}, {}
            for arm in arms:
                curves[arm] = _curve(runs, arm, repetitions, ttft_s, tpot_s)
                goodput[arm] = _goodput(curves[arm], level)
                single = [_goodput(_curve(runs, arm, [r], ttft_s, tpot_s), level) for r in repetitions]
                spread[arm] = (min(single, key=lambda b: b.low), max(single, key=lambda b: b.low))
            out.append(Cell(ttft_factor, tpot_factor, ttft_s, tpot_s, goodput, spread, curves))
    return out


def medians(runs: Runs, metric: str, quantile: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Per arm: (rate, median, lowest, highest) over repetitions of one quantile of one metric."""
    out: dict[str, list[tuple[float, float, float, float]]] = {}
    for arm in sorted({arm for arm, _, _ in runs}, key=_order):
        for rate in sorted({rate for a, rate, _ in runs if a == arm}):
            values = [
                float(run[metric][quantile])
                for (a, r, _), run in runs.items()
                if (a, r) == (arm, rate) and run[metric]["count"]
            ]
            if values:
                out.setdefault(arm, []).append((rate, statistics.median(values), min(values), max(values)))
    return out


def rows(cell: Cell) -> list[str]:
    """A cell as the tables show it."""
    best = cell.best_chunked

    def shown(arm: str) -> str:
        low, high = cell.spread[arm]
        return f"{cell.goodput[arm]} ({low} to {high})"

    return [
        f"{cell.ttft_factor:g}x = {seconds(cell.ttft_s)}",
        f"{cell.tpot_factor:g}x = {seconds(cell.tpot_s)}",
        shown(PREFILL_FIRST),
        f"{shown(best)}, {best}",
        shown(PD),
        f"{cell.ratio(PREFILL_FIRST)}",
        f"{cell.ratio(best)}",
        cell.verdict,
    ]


HEADS: Final = (
    "TTFT",
    "TPOT",
    "prefill-first",
    "chunked, best budget",
    "PD",
    "PD / prefill-first",
    "PD / chunked",
    "PD",
)


def _curve(runs: Runs, arm: str, repetitions: Sequence[int], ttft_s: float, tpot_s: float) -> list[tuple[float, float]]:
    points = []
    for rate in sorted({rate for a, rate, _ in runs if a == arm}):
        met = total = 0
        for repetition in repetitions:
            run = runs.get((arm, rate, repetition))
            for ttft, tpot, failure in run["requests"] if run is not None else ():
                total += 1
                met += not failure and ttft <= ttft_s and (tpot is None or tpot <= tpot_s)
        if total:
            points.append((rate, met / total))
    return points


def _goodput(curve: Sequence[tuple[float, float]], level: float) -> Bounds:
    known = dict(curve)
    low, high = bracket(known, level)
    if low is None:
        return Bounds(0.0, min(known, default=math.inf))
    if high is None:
        return Bounds(low, math.inf)
    value = crossing(known, level)
    assert value is not None
    return Bounds(value, value)


def _order(arm: str) -> tuple[int, int]:
    if arm == PREFILL_FIRST:
        return 0, 0
    return (2, 0) if arm == PD else (1, int(arm.rpartition(" ")[2]))
