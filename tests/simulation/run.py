"""`make simulate`: many seeds over the machine's cores, one line of counts, a reproducer for every failing seed."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from tests.simulation.world import MODES, SAFETY, Options, Report, simulate

SEEDS_FILE: Final = Path(__file__).with_name("seeds.txt")
_SHOWN_VIOLATIONS: Final = 5
_CHUNK: Final = 4


class Totals:
    """Sums over runs."""

    def __init__(self) -> None:
        self.num_seeds = 0
        self.num_requests = 0
        self.num_frames = 0
        self.num_stale = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.injections: Counter[str] = Counter()
        self.failing: list[Report] = []

    def add(self, report: Report) -> None:
        """One more run."""
        self.num_seeds += 1
        self.num_requests += report.num_requests
        self.num_frames += report.num_frames
        self.num_stale += report.num_stale
        self.outcomes.update(report.outcomes)
        self.faults.update(report.faults)
        self.injections.update(report.injections)
        if report.violations:
            self.failing.append(report)

    @property
    def num_violations(self) -> int:
        """Over all runs."""
        return sum(len(report.violations) for report in self.failing)

    def injected(self, outcome: str) -> int:
        """Injections that came to this end."""
        return sum(count for name, count in self.injections.items() if name.endswith(f"/{outcome}"))

    def line(self, seconds: float) -> str:
        """The one line of counts."""
        detected, missed, moot = (self.injected(outcome) for outcome in ("detected", "missed", "moot"))
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())) or "none"
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"seeds {self.num_seeds}, requests {self.num_requests} ({outcomes}), faults {sum(self.faults.values())} "
            f"({faults}), injections {detected + missed} read: {detected} detected, {missed} missed (+{moot} moot), "
            f"frames verified {self.num_frames}, late frames refused {self.num_stale}, "
            f"{self.num_requests / max(seconds, 1e-9):.0f} requests/s, violations {self.num_violations}"
        )

    def table(self) -> str:
        """Injections by level and kind."""
        kinds = sorted({tuple(name.split("/")[:2]) for name in self.injections if "/" in name})
        rows = []
        for level, kind in kinds:
            counts = [self.injections[f"{level}/{kind}/{outcome}"] for outcome in ("detected", "missed", "moot")]
            rows.append(f"  {level} the digest, {kind}: {counts[0]} detected, {counts[1]} missed, {counts[2]} moot")
        if self.injections["tell-tale"]:
            rows.append(f"  tell-tale mismatches, each before a token was chosen: {self.injections['tell-tale']}")
        return "\n".join(rows)


def reproducer(report: Report) -> str:
    """One line that repeats a run."""
    return f"make simulate SEED={report.seed} MODE={report.mode}"


def committed_seeds() -> list[tuple[int, str]]:
    """(seed, mode) of every run that once failed."""
    lines = (line.split("#")[0].split() for line in SEEDS_FILE.read_text().splitlines())
    return [(int(fields[1]), fields[0]) for fields in lines if fields]


def keep(report: Report) -> None:
    """Add a failing run to the regression tests."""
    if (report.seed, report.mode) not in committed_seeds():
        with SEEDS_FILE.open("a") as file:
            file.write(f"{report.mode} {report.seed}  # {report.violations[0].invariant}\n")


def _one(job: tuple[int, str, int]) -> Report:
    seed, mode, num_requests = job
    return simulate(seed, mode, Options(num_requests=num_requests))


def run_all(jobs: Iterable[tuple[int, str, int]], num_processes: int) -> Iterator[Report]:
    """Reports as they come."""
    if num_processes <= 1:
        yield from map(_one, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield from pool.map(_one, jobs, chunksize=_CHUNK)


def main() -> None:
    """Parse, run, report; exit status 1 on a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, help="the first seed; a random one if not given")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--mode", choices=MODES, default=SAFETY)
    parser.add_argument("--requests", type=int, default=Options.num_requests, help="per seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.seed is not None:
        seeds = [args.seed]
    else:
        first = int.from_bytes(os.urandom(4), "little") if args.first is None else args.first
        seeds = list(range(first, first + args.seeds))
        _say(f"{args.mode}: seeds {first}..{seeds[-1]}")
    began, totals = time.monotonic(), Totals()
    jobs = [(seed, args.mode, args.requests) for seed in seeds]
    for report in run_all(jobs, min(args.processes, len(jobs))):
        totals.add(report)
        if report.violations:
            for violation in report.violations[:_SHOWN_VIOLATIONS]:
                _say(f"  {violation}")
            _say(reproducer(report))
            keep(report)
    if totals.injections:
        _say(totals.table())
    _say(totals.line(time.monotonic() - began))
    sys.exit(1 if totals.num_violations else 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
