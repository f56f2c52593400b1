"""How much one client process can do: `python -m loadtest.selftest --streams 500` keeps 500 streams of 10 tok/s open.

The server is loadtest.fake_server, in a process of its own; client and server are pinned to a core each where there
are two. Prints the harness's lag, how evenly tokens came, and its processor time per token; the status is 1 if a
request failed or the p99 of the lag exceeds --limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import numpy as np

from loadtest import target
from loadtest.coordinator import Load, coordinating
from loadtest.fake_server import FakeServer
from loadtest.metrics import Sample, Window
from loadtest.workload import Length, Workload

_TOKENS_PER_S = 10.0


def measure(num_streams: int, seconds: float, *, pin: bool = False) -> dict[str, Any]:
    """Open `num_streams` streams within the first `seconds` / 2, each of which lasts for `seconds`.

    So all are open for the second half of that time, and requests are sent while many others stream.
    """
    workload = Workload(
        rate=2 * num_streams / seconds,
        num_requests=num_streams,
        input_tokens=Length(64),
        output_tokens=Length(seconds * _TOKENS_PER_S),
    )
    cores = sorted(os.sched_getaffinity(0))
    with FakeServer("--interval", str(1 / _TOKENS_PER_S)) as server:
        try:
            if pin and len(cores) > 1:
                os.sched_setaffinity(server.pid, {cores[0]})
                os.sched_setaffinity(0, {cores[1]})  # the client process inherits it
            load = asyncio.run(_drive(target.discover(server.url), workload))
        finally:
            os.sched_setaffinity(0, cores)
    return _report(load, num_streams)


async def _drive(found: target.Target, workload: Workload) -> Load:
    async with coordinating(found) as coordinator:
        return await coordinator.drive(workload.requests())


def _report(load: Load, num_streams: int) -> dict[str, Any]:
    sample = Sample(load.outcomes, load.start, Window(0.0, float("inf")))
    lag = sample.lag_s[~np.isnan(sample.lag_s)] * 1e3
    gaps = sample.gap_s * 1e3
    num_tokens = sum(sum(outcome.counts) for outcome in load.outcomes)
    return {
        "num_streams": num_streams,
        "most_in_flight": _most_in_flight(load),
        "num_failed": len(sample) - int(sample.is_ok.sum()),
        "lag_p50_ms": round(float(np.quantile(lag, 0.5)), 3),
        "lag_p99_ms": round(float(np.quantile(lag, 0.99)), 3),
        "lag_max_ms": round(float(lag.max()), 3),
        "gap_p1_ms": round(float(np.quantile(gaps, 0.01)), 3),
        "gap_p99_ms": round(float(np.quantile(gaps, 0.99)), 3),
        "cpu_us_per_token": round(load.clients[0].cpu_s / max(1, num_tokens) * 1e6, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def _most_in_flight(load: Load) -> int:
    """At any moment."""
    changes = [(outcome.scheduled, 1) for outcome in load.outcomes]
    changes += [(outcome.ended, -1) for outcome in load.outcomes if outcome.ended is not None]
    most = number = 0
    for _, change in sorted(changes):
        number += change
        most = max(most, number)
    return most


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500, metavar="N")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S")
    parser.add_argument("--limit", type=float, default=10.0, metavar="MS", help="of the p99 of the lag")
    arguments = parser.parse_args()
    report = measure(arguments.streams, arguments.seconds, pin=True)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(report["num_failed"] > 0 or report["lag_p99_ms"] > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
