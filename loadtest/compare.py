"""`baton bench compare`: prefill and decode apart against aggregated serving, on equal cores.

Every arm is a `baton serve` of the same model with two ranks. Repetitions are interleaved: each serves every arm once,
in another order. Each run is stored as it ends, so that a second start goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from loadtest import charts, grid, page, result, target
from loadtest.console import Watch
from loadtest.coordinator import AgentLost, coordinating
from loadtest.grid import PD, PREFILL_FIRST
from loadtest.metrics import WHAT_IS_LATE, Slo
from loadtest.request_traces import RequestTraces
from loadtest.servers import ServerFailed, serving
from loadtest.session import LEVELS, Session
from loadtest.target import TargetError
from loadtest.traces import TraceError
from loadtest.workload import Workload, WorkloadError

FORMAT: Final = "baton-bench-compare/1"
_UNLOADED_REQUESTS: Final = 40
_CAPACITY_REQUESTS: Final = 200
_CAPACITY_CONCURRENCY: Final = 16
_WARM_REQUESTS: Final = 24
_RATE_SHARES: Final = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
_TIMEOUT_S: Final = 120.0
_KEPT: Final = "What is measured so far is kept: the same command goes on."
_PREFILL_FIRST_BUDGET: Final = 8192  # no prompt of these workloads is cut


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve on two cores."""

    name: str
    flags: tuple[str, ...]


def arms(budgets: Sequence[int]) -> list[Arm]:
    """Prefill-first, chunked with every budget, and prefill and decode apart."""

    def budget(tokens: int) -> tuple[str, str]:
        return "--set", f"engine.max_num_batched_tokens={tokens}"

    first = ("--mixed", "2", *budget(_PREFILL_FIRST_BUDGET), "--set", "engine.scheduling=prefill_first")
    chunked = [Arm(f"chunked {tokens}", ("--mixed", "2", *budget(tokens))) for tokens in budgets]
    return [Arm(PREFILL_FIRST, first), *chunked, Arm(PD, ("--prefill", "1", "--decode", "1"))]


def run(arguments: argparse.Namespace, serve: Sequence[str]) -> int:
    """Measure what is not yet stored, then write the report; the exit status. `serve`: the command of a server."""
    watch = Watch()
    try:
        comparison = _Comparison(arguments, serve, watch)
        asyncio.run(comparison.measure())
    except (WorkloadError, TraceError, result.ResultError, ValueError) as error:
        sys.stderr.write(f"baton: {error}\n")
        return 2
    except (TargetError, AgentLost, ServerFailed, OSError) as error:
        watch.say(f"baton: {error}\n{_KEPT}")
        return 1
    except KeyboardInterrupt:
        watch.say(f"baton: interrupted\n{_KEPT}")
        return 130
    return comparison.report()


class _Comparison:
    def __init__(self, arguments: argparse.Namespace, serve: Sequence[str], watch: Watch) -> None:
        """Open the directory.

        Raises:
            ValueError: it holds another comparison, or no workload is given.
        """
        self._arguments = arguments
        self._watch = watch
        self._serve = [*serve, *([arguments.model] if arguments.model else []), "--engine", arguments.engine]
        for setting in ("router.trace_capacity=20000", *(arguments.set or ())):
            self._serve += ["--set", setting]
        budgets: list[int] = arguments.budgets
        self._arms = arms(budgets)
        paths = {"azure": arguments.azure, "sharegpt": arguments.sharegpt}
        self._data = {kind: f"{kind}:{path}" for kind, path in paths.items() if path is not None}
        if not self._data:
            raise ValueError("nothing to compare on: give --azure FILE, --sharegpt FILE, or both")
        self._runs_dir: Path = arguments.output / "runs"
        self._runs_dir.mkdir(parents=True, exist_ok=True)
        self._plan_path = arguments.output / "plan.json"
        self._plan = self._open_plan(budgets)

    async def measure(self) -> None:
        """All runs that are not stored."""
        for name in self._data:
            if name not in self._plan["workloads"]:
                self._workload(name, concurrency=1, num_requests=1).requests()  # a bad file is found before any server
        for name in self._data:
            if name not in self._plan["workloads"]:
                await self._learn(name)
        for repetition in range(self._arguments.repetitions):
            for name in self._data:
                turn = repetition % len(self._arms)
                for arm in self._arms[turn:] + self._arms[:turn]:
                    await self._measure_arm(name, arm, repetition)

    def report(self) -> int:
        """compare.json, compare.md and compare.html from all stored runs; the exit status (3: runs are invalid)."""
        output: Path = self._arguments.output
        parts: list[tuple[str, grid.Runs]] = [(name, self._stored(name)) for name in self._data]
        (output / "compare.md").write_text(_markdown(self._plan, parts))
        (output / "compare.html").write_text(_html(self._plan, parts))
        result.write(output / "compare.json", _json(self._plan, parts))
        for file in ("compare.md", "compare.html", "compare.json"):
            self._watch.say(f"report: {output / file}")
        late = _invalid(parts)
        if late:
            self._watch.warn(late)
            return 3
        return 0

    # ---- measuring

    async def _learn(self, name: str) -> None:
        """Unloaded latencies and capacity of the aggregated server with the largest budget; the rates follow."""
        arm = self._arms[-2]
        self._watch.say(f"{name}: unloaded latency and capacity, {arm.name}")
        alone = self._workload(name, concurrency=1, num_requests=_UNLOADED_REQUESTS)
        full = self._workload(name, concurrency=_CAPACITY_CONCURRENCY, num_requests=_CAPACITY_REQUESTS)
        async with serving(self._serve, arm.flags) as server:
            found = self._discover(server.url)
            async with coordinating(found, num_clients=self._arguments.clients, are_ahead=True) as coordinator:
                session = Session(coordinator, self._watch)
                unloaded = await session.measure(self._fitted(alone, found), f"{name}, unloaded")
                loaded = await session.measure(self._fitted(full, found), f"{name}, capacity")
        if not (unloaded["num_ok"] and loaded["num_ok"]):
            raise ServerFailed(f"{name}: no request succeeded: {unloaded['failures'] or loaded['failures']}")
        capacity = loaded["requests_per_s"]
        self._plan["workloads"][name] = {
            "unloaded_ttft_s": unloaded["ttft_s"]["p50"],
            "unloaded_tpot_s": unloaded["tpot_s"]["p50"],
            "mean_prompt_tokens": loaded["mean_prompt_tokens"],
            "mean_output_tokens": loaded["mean_output_tokens"],
            "capacity_requests_per_s": capacity,
            "rates": self._arguments.rates or [float(f"{capacity * share:.3g}") for share in _RATE_SHARES],
        }
        self._save_plan()

    async def _measure_arm(self, name: str, arm: Arm, repetition: int) -> None:
        facts = self._plan["workloads"][name]
        missing = [rate for rate in facts["rates"] if not self._run_path(name, arm.name, rate, repetition).exists()]
        if not missing:
            return
        slo = Slo(facts["unloaded_ttft_s"] * grid.TTFT_FACTORS[0], facts["unloaded_tpot_s"] * grid.TPOT_FACTORS[0])
        self._watch.say(f"{name}, {arm.name}, repetition {repetition + 1} of {self._arguments.repetitions}")
        async with serving(self._serve, arm.flags) as server:
            found = self._discover(server.url)
            async with coordinating(found, num_clients=self._arguments.clients, are_ahead=True) as coordinator:
                warm = self._workload(name, concurrency=4, num_requests=_WARM_REQUESTS)
                await coordinator.drive(self._fitted(warm, found).requests(), concurrency=4)
                session = Session(coordinator, self._watch, slo, traces=RequestTraces(server.url, server.token))
                for rate in missing:
                    workload = self._workload(name, rate=rate, num_requests=self._arguments.requests)
                    workload = dataclasses.replace(workload, seed=self._arguments.seed + repetition)
                    entry = await session.measure(self._fitted(workload, found))
                    result.write(self._run_path(name, arm.name, rate, repetition), _kept(entry))

    def _workload(self, name: str, **bounds: Any) -> Workload:
        arrivals = "closed" if "concurrency" in bounds else "poisson"
        divide = self._arguments.divide
        return Workload(data=self._data[name], arrivals=arrivals, divide=divide, seed=self._arguments.seed, **bounds)

    @staticmethod
    def _fitted(workload: Workload, found: target.Target) -> Workload:
        return dataclasses.replace(workload, max_total_tokens=found.max_model_len)

    @staticmethod
    def _discover(url: str) -> target.Target:
        return target.discover(url, timeout_s=_TIMEOUT_S)

    # ---- the directory

    def _open_plan(self, budgets: Sequence[int]) -> dict[str, Any]:
        settings = {
            "model": self._arguments.model,
            "engine": self._arguments.engine,
            "data": self._data,
            "divide": self._arguments.divide,
            "requests": self._arguments.requests,
            "repetitions": self._arguments.repetitions,
            "budgets": list(budgets),
            "rates": self._arguments.rates,
            "seed": self._arguments.seed,
            "set": self._arguments.set or [],
        }
        if self._plan_path.exists():
            plan: dict[str, Any] = json.loads(self._plan_path.read_text())
            if plan["settings"] != settings:
                changed = [key for key in settings if plan["settings"].get(key) != settings[key]]
                raise ValueError(
                    f"{self._arguments.output} holds a comparison with another {', '.join(changed)}: take another --output"
                )
            return plan
        plan = {"format": FORMAT, "settings": settings, "machine": result.machine(), "workloads": {}}
        plan["command"] = "baton " + shlex.join(sys.argv[1:])
        return plan

    def _save_plan(self) -> None:
        result.write(self._plan_path, self._plan)

    def _run_path(self, name: str, arm: str, rate: float, repetition: int) -> Path:
        return self._runs_dir / f"{name}-{arm.replace(' ', '')}-{rate:g}-{repetition}.json"

    def _stored(self, name: str) -> dict[tuple[str, float, int], dict[str, Any]]:
        out = {}
        for arm in self._arms:
            for rate in self._plan["workloads"][name]["rates"]:
                for repetition in range(self._arguments.repetitions):
                    path = self._run_path(name, arm.name, rate, repetition)
                    out[arm.name, rate, repetition] = json.loads(path.read_text())
        return out


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    """A run without what no table of a comparison needs."""
    dropped = ("requests", "timeline", "clients", "slo_scale")
    fields = {name: position for position, name in enumerate(result.REQUEST_FIELDS)}
    rows = [[row[fields[name]] for name in ("ttft_s", "tpot_s", "failure")] for row in entry["requests"]]
    return {**{name: value for name, value in entry.items() if name not in dropped}, "requests": rows}


# ---- reports

_NOTE: Final = (
    "Goodput in requests/s: pooled over repetitions, in parentheses the lowest and highest repetition. `<` and `>`: "
    "beyond the rates that were measured. The budget of chunked prefill is the best one for each cell."
)


def _invalid(parts: Sequence[tuple[str, grid.Runs]]) -> str:
    """What must be said above all numbers; empty if every harness was on time."""
    runs = [run for _, stored in parts for run in stored.values()]
    late = sum(1 for run in runs if run["valid"] is False)
    if not late:
        return ""
    return f"INVALID: in {late} of {len(runs)} runs {WHAT_IS_LATE}; the numbers are not to be used."


def _tables(facts: dict[str, Any], runs: grid.Runs) -> list[tuple[str, list[grid.Cell]]]:
    times = (facts["unloaded_ttft_s"], facts["unloaded_tpot_s"])
    return [(f"{level * 100:g} %", grid.cells(runs, *times, level)) for level in LEVELS]


def _facts(plan: dict[str, Any], name: str, runs: grid.Runs) -> str:
    facts, settings = plan["workloads"][name], plan["settings"]
    late = sum(1 for run in runs.values() if run["valid"] is False)
    failed = sum(run["num_failed"] for run in runs.values())
    return (
        f"{settings['data'][name]}, lengths / {settings['divide']:g} (mean {facts['mean_prompt_tokens']:.0f} prompt and "
        f"{facts['mean_output_tokens']:.0f} output tokens), Poisson arrivals, {settings['requests']} requests x "
        f"{settings['repetitions']} repetitions per arm and rate. Unloaded: TTFT {charts.seconds(facts['unloaded_ttft_s'])}, "
        f"TPOT {charts.seconds(facts['unloaded_tpot_s'])}. {late} of {len(runs)} runs had a late harness; "
        f"{failed} requests failed."
    )


def _gap_rows(runs: grid.Runs) -> tuple[list[str], list[list[str]]]:
    by_arm = grid.medians(runs, "gap_s", "p99")
    rates = sorted({rate for points in by_arm.values() for rate, *_ in points})
    table = []
    for rate in rates:
        row = [f"{rate:g}"]
        medians = {}
        for arm, points in by_arm.items():
            found = next((p for p in points if p[0] == rate), None)
            medians[arm] = math.nan if found is None else found[1]
            row.append(
                "-"
                if found is None
                else f"{charts.seconds(found[1])} ({charts.seconds(found[2])} to {charts.seconds(found[3])})"
            )
        chunked = min((value for arm, value in medians.items() if arm not in (PD, PREFILL_FIRST)), default=math.nan)
        row += [f"{rival / medians[PD]:.3g}" for rival in (medians[PREFILL_FIRST], chunked)]
        table.append(row)
    return ["rate", *by_arm, "prefill-first / PD", "best chunked / PD"], table


def _markdown(plan: dict[str, Any], parts: Sequence[tuple[str, grid.Runs]]) -> str:
    machine = plan["machine"]
    late = _invalid(parts)
    lines = [
        *([f"**{late}**", ""] if late else ()),
        f"{machine['cpu']}, {machine['num_cores']} cores, load {machine['load_average_1min']} at the start. {_NOTE}",
        "",
    ]
    for name, runs in parts:
        lines += [f"### {name}", "", _facts(plan, name, runs), ""]
        for level, found in _tables(plan["workloads"][name], runs):
            lines += [f"Goodput at {level} joint attainment:", ""]
            lines += _markdown_table(grid.HEADS, [grid.rows(cell) for cell in found])
        lines += ["P99 of the gaps between tokens, median over repetitions (lowest to highest):", ""]
        lines += _markdown_table(*_gap_rows(runs))
    return "\n".join(lines)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join("**loses**" if cell == "loses" else cell for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _html(plan: dict[str, Any], parts: Sequence[tuple[str, grid.Runs]]) -> str:
    body = [
        "<h1>Prefill and decode apart, against aggregated serving</h1>",
        *([f'<div class="banner">{escape(late)}</div>'] if (late := _invalid(parts)) else ()),
        f'<p class="dim">{escape(_NOTE)}</p>',
    ]
    for name, runs in parts:
        body += [f"<h2>{escape(name)}</h2>", f"<p>{escape(_facts(plan, name, runs))}</p>"]
        levels = _tables(plan["workloads"][name], runs)
        for level, found in levels:
            body.append(f"<h2>{escape(name)}: goodput at {level} joint attainment</h2>")
            body.append(page.table(grid.HEADS, [_coloured(grid.rows(cell)) for cell in found]))
        body.append('<div class="charts">' + "".join(_cell_chart(cell) for cell in levels[0][1]) + "</div>")
        body.append(f"<h2>{escape(name)}: gaps between tokens</h2>")
        heads, rows = _gap_rows(runs)
        body += [page.table(heads, [[_small_range(cell) for cell in row] for row in rows]), _gap_chart(runs)]
    return page.document("Baton bench compare", "\n".join(body))


def _coloured(row: Sequence[str]) -> list[str]:
    kind = {"loses": "bad", "wins": "good"}.get(row[-1], "dim")
    return [*(_small_range(cell.replace("), ", "; ")) for cell in row[:-1]), f'<span class="{kind}">{row[-1]}</span>']


def _small_range(cell: str) -> str:
    """The range in parentheses below its number."""
    value, separator, rest = cell.partition(" (")
    return f"{escape(value)}<small>{escape(rest.rstrip(')'))}</small>" if separator else escape(cell)


def _cell_chart(cell: grid.Cell) -> str:
    shown = (PREFILL_FIRST, cell.best_chunked, PD)
    curves = [charts.Curve(arm, cell.curves[arm], colour, has_dots=True) for colour, arm in enumerate(shown)]
    x = charts.linear("offered rate, requests/s", [rate for curve in curves for rate, _ in curve.points])
    title = f"TTFT ≤ {charts.seconds(cell.ttft_s)}, TPOT ≤ {charts.seconds(cell.tpot_s)}"
    return charts.line_chart(title, x, charts.percent("joint attainment"), curves, LEVELS)


def _gap_chart(runs: grid.Runs) -> str:
    by_arm = grid.medians(runs, "gap_s", "p99")
    curves = [
        charts.Curve(
            arm,
            [(r, m) for r, m, *_ in points],
            colour % charts.NUM_COLOURS,
            0,
            [(r, lo, hi) for r, _, lo, hi in points],
            True,
        )
        for colour, (arm, points) in enumerate(by_arm.items())
    ]
    x = charts.linear("offered rate, requests/s", [rate for curve in curves for rate, _ in curve.points])
    y = charts.logarithmic("p99 gap", [v for curve in curves for band in curve.band for v in band[1:]], charts.seconds)
    return '<div class="charts">' + charts.line_chart("P99 of the gaps between tokens", x, y, curves) + "</div>"


def _json(plan: dict[str, Any], parts: Sequence[tuple[str, grid.Runs]]) -> dict[str, Any]:
    out: dict[str, Any] = {**plan, "created": result.now(), "valid": not _invalid(parts), "grid": {}, "gap_p99_s": {}}
    for name, runs in parts:
        out["grid"][name] = [
            {
                "attainment": level,
                "ttft_factor": cell.ttft_factor,
                "tpot_factor": cell.tpot_factor,
                "ttft_s": cell.ttft_s,
                "tpot_s": cell.tpot_s,
                "goodput": {arm: [bounds.low, bounds.high] for arm, bounds in cell.goodput.items()},
                "curves": dict(cell.curves),
                "best_chunked": cell.best_chunked,
                "verdict": cell.verdict,
            }
            for level in LEVELS
            for cell in grid.cells(
                runs, plan["workloads"][name]["unloaded_ttft_s"], plan["workloads"][name]["unloaded_tpot_s"], level
            )
        ]
        out["gap_p99_s"][name] = grid.medians(runs, "gap_s", "p99")
    return out
