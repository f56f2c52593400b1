"""From outcomes to numbers, as docs/loadtest.md defines them. Pure; knows no server and no files.

Confidence intervals are percentile bootstraps over requests, drawn in blocks of consecutive ones: neighbours share a
queue, and intervals that take them for independent are too narrow. A request's gaps stay together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtest.outcome import Outcome

Floats = npt.NDArray[np.float64]

LAG_SHARE: Final = 0.02
"""A harness whose p99 lag exceeds this share of the TTFT objective measures itself."""
READING_SHARE: Final = 0.5
"""A harness whose median TPOT is below this share of the server's own read tokens long after they had come."""
WHAT_IS_LATE: Final = (
    "the harness itself was late (the p99 of its lag above 2 % of the TTFT objective, or its median TPOT below half of "
    "the server's own)"
)
TOGETHER_SHARE: Final = 0.5
"""Of tokens that came with others at once; from here on the user is told that gaps are not what they seem."""
QUANTILES: Final = (0.5, 0.9, 0.95, 0.99)
_CURVE: Final = tuple([k / 50 for k in range(50)] + [0.985, 0.99, 0.995, 0.999, 1.0])
_REPLICATES: Final = 300
_SCALES: Final = tuple(round(float(x), 4) for x in np.geomspace(0.1, 10, 61))
PHASES: Final = ("route", "queue", "prefill", "transfer_hidden", "transfer_exposed", "handover", "failover", "decode")


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep, both at once."""

    ttft_s: float
    tpot_s: float

    def scaled(self, factor: float) -> Slo:
        """Both objectives multiplied."""
        return Slo(self.ttft_s * factor, self.tpot_s * factor)


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a load, in seconds after its start: requests scheduled in [begin, end)."""

    begin_s: float
    end_s: float


class Sample:
    """The measured requests of a load as columns, in order of their schedule. NaN where there is no value.

    A failed request has no latencies here, and violates every objective.
    """

    def __init__(self, outcomes: Sequence[Outcome], start: float, window: Window) -> None:
        """`outcomes` of the whole load; those scheduled outside the window only count for throughput."""
        ordered = sorted(outcomes, key=lambda outcome: outcome.scheduled)
        self.outcomes = [o for o in ordered if window.begin_s <= o.scheduled - start < window.end_s]
        self.window = window
        self.start = start
        self.is_ok = np.array([not o.failure and len(o.times) > 0 for o in self.outcomes], dtype=bool)
        self.scheduled_s = np.array([o.scheduled - start for o in self.outcomes], dtype=np.float64)
        self.ttft_s = self._column(lambda o: o.times[0] - o.scheduled)
        self.e2e_s = self._column(lambda o: o.times[-1] - o.scheduled)
        self.tpot_s = self._column(_tpot)
        self.handover_s = self._column(_handover)
        self.lag_s = np.array([math.nan if o.lag_s is None else o.lag_s for o in self.outcomes], dtype=np.float64)
        gaps = [_gaps(o) for o, ok in zip(self.outcomes, self.is_ok, strict=True) if ok]
        owners = np.flatnonzero(self.is_ok)
        self.gap_s: Floats = np.concatenate(gaps) if gaps else np.empty(0)
        self.gap_owner = np.repeat(owners, [len(part) for part in gaps]) if gaps else np.empty(0, dtype=np.int64)
        self._all = ordered

    def __len__(self) -> int:
        return len(self.outcomes)

    def met(self, slo: Slo) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Per request: was the TTFT kept, was the TPOT kept? An answer of one token keeps any TPOT."""
        ttft = self.is_ok & (self.ttft_s <= slo.ttft_s)
        tpot = self.is_ok & (np.isnan(self.tpot_s) | (self.tpot_s <= slo.tpot_s))
        return ttft, tpot

    def failures(self) -> dict[str, int]:
        """How many measured requests failed, by kind. An answer without any token is an "empty" one."""
        kinds = Counter(o.failure or "empty" for o, ok in zip(self.outcomes, self.is_ok, strict=True) if not ok)
        return dict(kinds.most_common())

    def throughput(self) -> dict[str, float]:
        """Of all that came within the window, whoever asked for it and when; per second.

        Output tokens count as they come; a prompt and its request count when the first token comes.
        """
        begin, end = self.start + self.window.begin_s, self.start + self.window.end_s
        output = prompt = requests = 0
        for outcome in self._all:
            if outcome.failure or not outcome.times:
                continue
            if begin <= outcome.times[0] < end:
                prompt += outcome.num_prompt_tokens
            requests += begin <= outcome.times[-1] < end
            if outcome.times[-1] < begin or outcome.times[0] >= end:
                continue
            times = np.frombuffer(outcome.times, dtype=np.float64)
            counts = np.frombuffer(outcome.counts, dtype=np.dtype("l"))
            output += int(counts[(times >= begin) & (times < end)].sum())
        seconds = max(1e-9, end - begin)
        return {
            "requests_per_s": requests / seconds,
            "output_tokens_per_s": output / seconds,
            "total_tokens_per_s": (output + prompt) / seconds,
        }

    def _column(self, value: Any) -> Floats:
        values = [value(outcome) if ok else math.nan for outcome, ok in zip(self.outcomes, self.is_ok, strict=True)]
        return np.array(values, dtype=np.float64)


class Bootstrap:
    """Weights of requests in each replicate: int [replicate, request]."""

    def __init__(self, num_requests: int, seed: int = 0) -> None:
        block = max(1, round(num_requests ** (1 / 3)))
        rng = np.random.default_rng([seed, num_requests])
        num_blocks = -(-num_requests // block)
        begins = rng.integers(0, max(1, num_requests), (_REPLICATES, num_blocks))
        self.weights = np.zeros((_REPLICATES, num_requests), dtype=np.int32)
        for replicate in range(_REPLICATES if num_requests else 0):
            drawn = (begins[replicate][:, None] + np.arange(block)).ravel()[:num_requests] % num_requests
            self.weights[replicate] = np.bincount(drawn, minlength=num_requests)

    def mean(self, values: npt.NDArray[np.bool_]) -> list[float] | None:
        """95 % interval of the mean of one value per request."""
        if not len(values):
            return None
        return _interval(self.weights @ values / len(values))

    def quantiles(self, values: Floats, owner: npt.NDArray[np.int64], wanted: Sequence[float]) -> list[list[float]]:
        """95 % intervals of quantiles of values that belong to requests."""
        order = np.argsort(values, kind="stable")
        sorted_values, sorted_owner = values[order], owner[order]
        found = np.full((_REPLICATES, len(wanted)), math.nan)
        for replicate in range(_REPLICATES):
            cumulated = np.cumsum(self.weights[replicate][sorted_owner])
            total = cumulated[-1] if len(cumulated) else 0
            if total:
                ranks = np.searchsorted(cumulated, np.ceil(np.array(wanted) * total), side="left")
                found[replicate] = sorted_values[np.minimum(ranks, len(values) - 1)]
        return [_interval(found[:, column]) for column in range(len(wanted))]


def distribution(values: Floats, bootstrap: Bootstrap, owner: npt.NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Count, mean, quantiles with 95 % intervals, and the curve [[quantile, value], ...]; NaNs do not count."""
    owners = np.arange(len(values)) if owner is None else owner
    is_there = ~np.isnan(values)
    values, owners = values[is_there], owners[is_there]
    if not len(values):
        return {"count": 0}
    names = [f"p{quantile * 100:g}" for quantile in QUANTILES]
    intervals = bootstrap.quantiles(values, owners, QUANTILES)
    return {
        "count": len(values),
        "mean": _round(values.mean()),
        "min": _round(values.min()),
        "max": _round(values.max()),
        **{name: _round(np.quantile(values, q)) for name, q in zip(names, QUANTILES, strict=True)},
        "ci95": dict(zip(names, intervals, strict=True)),
        "curve": [[q, _round(np.quantile(values, q))] for q in _CURVE],
    }


def attainment(sample: Sample, slo: Slo, bootstrap: Bootstrap) -> dict[str, Any]:
    """Shares of measured requests that kept both objectives, the TTFT, the TPOT; failures keep none."""
    ttft, tpot = sample.met(slo)
    out = {}
    for name, met in (("joint", ttft & tpot), ("ttft", ttft), ("tpot", tpot)):
        out[name] = {"value": _round(met.mean()) if len(met) else None, "ci95": bootstrap.mean(met)}
    return out


def slo_scale(sample: Sample, slo: Slo) -> dict[str, Any]:
    """Joint attainment with both objectives multiplied by alpha, and the smallest alpha that reaches 90 and 99 %."""
    curve = [[alpha, _round((np.logical_and(*sample.met(slo.scaled(alpha)))).mean())] for alpha in _SCALES]
    # The alpha that a request needs is the larger of its two ratios; failures need infinitely much.
    ratios = np.fmax(sample.ttft_s / slo.ttft_s, sample.tpot_s / slo.tpot_s)
    needed = np.sort(np.where(sample.is_ok, ratios, math.inf))
    smallest = {}
    for percent in (90, 99):
        alpha = needed[max(0, math.ceil(len(needed) * percent / 100) - 1)] if len(needed) else math.inf
        smallest[f"at_{percent}"] = _round(alpha) if math.isfinite(alpha) else None
    return {"curve": curve, **smallest}


def lag(sample: Sample, slo: Slo | None) -> dict[str, Any]:
    """The harness's own delay, and whether it may be believed: `valid` is None without a TTFT objective."""
    values = sample.lag_s[~np.isnan(sample.lag_s)]
    if not len(values):
        return {"p50_s": None, "p99_s": None, "max_s": None, "limit_s": None, "valid": None}
    p99 = float(np.quantile(values, 0.99))
    limit = None if slo is None else slo.ttft_s * LAG_SHARE
    return {
        "p50_s": _round(np.quantile(values, 0.5)),
        "p99_s": _round(p99),
        "max_s": _round(values.max()),
        "limit_s": None if limit is None else _round(limit),
        "valid": None if limit is None else p99 <= limit,
    }


def reading(sample: Sample, traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Did tokens get their time as they came? A process that waits for the processor finds several at once.

    `together`: share of events with tokens, from the second on, that came in one read with the one before; the client,
    the network or the server may have held them back. `bundled`: share of tokens, from the second on, without an event of
    their own; so the server sent them. `tpot_s`: median TPOT of answers whose tokens were all seen, `server_tpot_s`: by
    Baton's own `traces`, which this process can not delay. `valid`: None where one of the two is missing.
    """
    good = [outcome for outcome, ok in zip(sample.outcomes, sample.is_ok, strict=True) if ok]
    gaps = [np.diff(np.frombuffer(outcome.times, dtype=np.float64)) for outcome in good]
    num_gaps = sum(map(len, gaps))
    num_later = sum(_num_tokens(outcome) - 1 for outcome in good)
    ours = [_tpot(outcome) for outcome in good if sum(outcome.counts) == outcome.num_output_tokens > 1]
    theirs = [trace["tpot_ms"] / 1e3 for trace in traces if trace.get("tpot_ms") is not None]
    here, there = (float(np.median(values)) if values else None for values in (ours, theirs))
    return {
        "together": _round(sum(int((part == 0).sum()) for part in gaps) / num_gaps) if num_gaps else None,
        "bundled": _round(1 - num_gaps / num_later) if num_later else None,
        "tpot_s": None if here is None else _round(here),
        "server_tpot_s": None if there is None else _round(there),
        "valid": None if here is None or there is None else here >= READING_SHARE * there,
    }


def phases(traces: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Means and p99 in ms of the phases of Baton's own request traces; None without traces.

    Both are over all requests that got a token, where a phase that one did not have took 0 ms; only `tpot` is over
    those that have one. None: nobody had it. The hidden part of a transfer ran beside prefill and adds nothing to the
    request's time.
    """
    whole = [trace for trace in traces if trace.get("ttft_ms") is not None]
    if not whole:
        return None
    means, p99 = {}, {}
    for name in (*PHASES, "failover_ttft", "transfer", "ttft", "tpot", "total"):
        values = [float(trace[f"{name}_ms"]) for trace in whole if trace.get(f"{name}_ms") is not None]
        if values and name != "tpot":
            values += [0.0] * (len(whole) - len(values))
        means[name] = _round(np.mean(values)) if values else None
        p99[name] = _round(np.quantile(values, 0.99)) if values else None
    return {"num_requests": len(whole), "mean_ms": means, "p99_ms": p99}


def _num_tokens(outcome: Outcome) -> int:
    """As the server says, or as events showed where it says less."""
    return max(outcome.num_output_tokens, sum(outcome.counts))


def _tpot(outcome: Outcome) -> float:
    """Mean time per token after the first event's tokens; NaN for an answer that came in one event."""
    later = _num_tokens(outcome) - 1
    return (outcome.times[-1] - outcome.times[0]) / later if later > 0 else math.nan


def _handover(outcome: Outcome) -> float:
    """The gap between tokens 1 and 2; 0 where they came together."""
    if outcome.counts[0] > 1:
        return 0.0
    return outcome.times[1] - outcome.times[0] if len(outcome.times) > 1 else math.nan


def _gaps(outcome: Outcome) -> Floats:
    """Every gap between neighbouring tokens; within an event they are 0, because a client sees them at once."""
    times = np.frombuffer(outcome.times, dtype=np.float64)
    counts = np.frombuffer(outcome.counts, dtype=np.dtype("l"))
    return np.diff(np.repeat(times, counts))


def _interval(values: Floats) -> list[float]:
    low, high = np.nanquantile(values, (0.025, 0.975)) if not np.isnan(values).all() else (math.nan, math.nan)
    return [_round(low), _round(high)]


def _round(value: Any) -> float:
    """To six decimals: a microsecond, or a millionth."""
    return round(float(value), 6)
