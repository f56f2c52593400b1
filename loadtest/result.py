"""The result of `baton bench` as JSON: its field names (docs/loadtest.md) are a promise. Makes, writes and reads it."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from loadtest import metrics
from loadtest.coordinator import Load
from loadtest.metrics import Bootstrap, Sample, Slo, Window
from loadtest.target import Target
from loadtest.workload import Workload

FORMAT: Final = "baton-bench/1"
REQUEST_FIELDS: Final = (
    "scheduled_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "handover_s",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_output_tokens",
    "failure",
)
_EXAMPLES: Final = 5
_AUTO_CUT: Final = 0.1
_AUTO_CUT_S: Final = 30.0


class ResultError(ValueError):
    """A file that is no result of `baton bench`, or can not become one; the message names it."""


def window(load: Load, warmup_s: float | None, cooldown_s: float | None) -> Window:
    """What is measured: not the first `warmup_s`, when queues are still filling, nor the last `cooldown_s`, whose
    requests run while the load fades. None: a tenth of the load each, at most 30 s.

    Raises:
        ResultError: nothing would be left.
    """
    times = [outcome.scheduled - load.start for outcome in load.outcomes]
    last = max(times, default=0.0)
    auto = min(_AUTO_CUT_S, last * _AUTO_CUT)
    begin = auto if warmup_s is None else warmup_s
    end = math.nextafter(last, math.inf) - (auto if cooldown_s is None else cooldown_s)
    if not any(begin <= at < end for at in times):
        raise ResultError(f"warm-up and cool-down leave nothing of a load of {last:.1f} s")
    return Window(begin, end)


def run(
    load: Load, workload: Workload, slo: Slo | None, cut: Window, traces: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """One load as a `runs` entry."""
    sample = Sample(load.outcomes, load.start, cut)
    bootstrap = Bootstrap(len(sample))
    lag, reading = metrics.lag(sample, slo), metrics.reading(sample, traces)
    failed = [o for o, ok in zip(sample.outcomes, sample.is_ok, strict=True) if not ok]
    examples = {o.failure or "empty": o.detail for o in failed}
    ok = [o for o, is_ok in zip(sample.outcomes, sample.is_ok, strict=True) if is_ok]
    return {
        "rate": workload.rate,
        "concurrency": workload.concurrency,
        "valid": False if reading["valid"] is False else lag["valid"],
        "window_s": [round(cut.begin_s, 6), round(cut.end_s, 6)],
        "wall_s": round(load.ended - load.start, 6),
        "num_sent": len(load.outcomes),
        "num_measured": len(sample),
        "num_ok": len(ok),
        "num_failed": len(failed),
        "failures": sample.failures(),
        "failure_examples": dict(list(examples.items())[:_EXAMPLES]),
        "mean_prompt_tokens": _mean([o.num_prompt_tokens for o in ok]),
        "mean_cached_tokens": _mean([o.num_cached_tokens for o in ok]),
        "mean_output_tokens": _mean([o.num_output_tokens for o in ok]),
        **{name: round(value, 4) for name, value in sample.throughput().items()},
        "ttft_s": metrics.distribution(sample.ttft_s, bootstrap),
        "tpot_s": metrics.distribution(sample.tpot_s, bootstrap),
        "gap_s": metrics.distribution(sample.gap_s, bootstrap, sample.gap_owner),
        "handover_s": metrics.distribution(sample.handover_s, bootstrap),
        "e2e_s": metrics.distribution(sample.e2e_s, bootstrap),
        "attainment": None if slo is None else metrics.attainment(sample, slo, bootstrap),
        "slo_scale": None if slo is None else metrics.slo_scale(sample, slo),
        "lag": lag,
        "reading": reading,
        "clients": [asdict(client) for client in load.clients],
        "phases": metrics.phases(traces),
        "timeline": _timeline(load),
        "requests": _requests(sample),
    }


def whole(
    runs: Sequence[dict[str, Any]],
    *,
    target: Target,
    workload: Workload,
    slo: Slo | None,
    command: str,
    label: str = "",
    goodput: dict[str, Any] | None = None,
    is_partial: bool = False,
) -> dict[str, Any]:
    """The file. `is_partial`: more loads were wanted than these."""
    if goodput is None:
        validity = [entry["valid"] for entry in runs]
    else:  # steps at which the harness was late are not counted; they matter where the search ended there
        validity = [level["limited_by"] != "late" for level in goodput["levels"]]
    described = {name: value for name, value in target.to_json().items() if name != "alphabet"}
    return {
        "format": FORMAT,
        "label": label,
        "created": now(),
        "command": command,
        "machine": machine(),
        "target": {**described, "prompts": "ids" if target.alphabet else "text"},
        "workload": asdict(workload),
        "slo": None if slo is None else asdict(slo),
        "valid": False if False in validity else None if None in validity else True,
        "partial": is_partial,
        "goodput": goodput,
        "request_fields": list(REQUEST_FIELDS),
        "runs": list(runs),
    }


def now() -> str:
    """The date and time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Where the load came from, and what else ran there."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Atomically; NaN and infinity become null, which JSON has."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_plain(result), allow_nan=False, separators=(",", ":")) + "\n")
    temporary.rename(path)


def check_writable(path: Path) -> None:
    """Before a load that would be lost.

    Raises:
        ResultError: a file can not be written there.
    """
    if not path.parent.is_dir():
        raise ResultError(f"{path}: there is no directory {path.parent}")
    if path.is_dir():
        raise ResultError(f"{path}: is a directory")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ResultError(f"{path}: can not be written: {error.strerror}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise ResultError(f"{path}: can not be written")


def read(path: Path) -> dict[str, Any]:
    """A result that was written before.

    Raises:
        ResultError: it is none.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ResultError(f"{path}: not a bench result ({FORMAT})")
    return value


def _requests(sample: Sample) -> list[list[Any]]:
    columns = (sample.scheduled_s, sample.ttft_s, sample.tpot_s, sample.e2e_s, sample.handover_s)
    numbers = [[None if math.isnan(v) else round(float(v), 6) for v in column] for column in columns]
    facts = [
        (o.num_prompt_tokens, o.num_cached_tokens, o.num_output_tokens, o.failure or ("" if ok else "empty"))
        for o, ok in zip(sample.outcomes, sample.is_ok, strict=True)
    ]
    return [[*moments, *fact] for *moments, fact in zip(*numbers, facts, strict=True)]


def _timeline(load: Load, num_bins: int = 120) -> dict[str, Any]:
    """What came in each of up to 120 bins of the whole load: tokens, and requests in flight at its end."""
    span = max((o.ended or o.scheduled for o in load.outcomes), default=load.start) - load.start
    width = max(0.25, span / num_bins)
    count = max(1, math.ceil(span / width))
    tokens, change = [0] * count, [0] * (count + 1)
    for outcome in load.outcomes:
        for at, number in zip(outcome.times, outcome.counts, strict=True):
            tokens[min(count - 1, max(0, int((at - load.start) / width)))] += number
        change[min(count, max(0, int((outcome.scheduled - load.start) / width)))] += 1
        if outcome.ended is not None:
            change[min(count, max(0, int((outcome.ended - load.start) / width)))] -= 1
    in_flight, number = [], 0
    for delta in change[:count]:
        number += delta
        in_flight.append(number)
    return {
        "bin_s": round(width, 6),
        "output_tokens_per_s": [round(n / width, 3) for n in tokens],
        "in_flight": in_flight,
    }


def _mean(values: Sequence[int]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
