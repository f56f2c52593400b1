"""What the terminal shows: a load while it runs, its numbers when it is over. Everything goes to stderr."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from loadtest.charts import seconds
from loadtest.coordinator import Load
from loadtest.metrics import TOGETHER_SHARE

_RECENT: Final = 200
_AT_ONCE: Final = (
    ("bundled", "in one event with others, as the server sent them"),
    ("together", "in one read with the one before, held back by this client, the network or the server"),
)


class Watch:
    """Live on a terminal; a line for each load otherwise."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to stderr, so that stdout stays free."""
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._has_header = False

    @contextlib.contextmanager
    def load(self, title: str, total: int) -> Iterator[Callable[[Load], None]]:
        """Show a load of `total` requests as it is reported."""
        if not self.console.is_terminal:
            yield lambda load: None
            return
        began = time.monotonic()
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            yield lambda load: live.update(_state(title, total, load, began))

    def result(self, run: dict[str, Any], name: str = "") -> None:
        """One line of numbers, after `name`, which is as long each time."""
        if not self._has_header:
            self._has_header = True
            self.console.print(
                f"{'':{len(name)}}{'load':>12} {'ok':>6} {'failed':>6} {'joint':>7} {'TTFT p50':>9} {'p99':>9} {'TPOT p50':>9} {'p99':>9}"
                f" {'gap p99':>9} {'out tok/s':>9} {'lag p99':>9}",
                style="dim",
            )
        joint = "-" if run["attainment"] is None else f"{run['attainment']['joint']['value'] * 100:.1f} %"
        load = (
            f"{run['concurrency']} at once"
            if run["concurrency"]
            else f"{run['rate']:.4g}/s"
            if run["rate"]
            else "trace"
        )
        cells = [name + load.rjust(12), str(run["num_ok"]).rjust(6), str(run["num_failed"]).rjust(6), joint.rjust(7)]
        for metric, name in (
            ("ttft_s", "p50"),
            ("ttft_s", "p99"),
            ("tpot_s", "p50"),
            ("tpot_s", "p99"),
            ("gap_s", "p99"),
        ):
            cells.append((seconds(run[metric][name]) if run[metric]["count"] else "-").rjust(9))
        cells.append(f"{run['output_tokens_per_s']:.0f}".rjust(9))
        lag = run["lag"]["p99_s"]
        cells.append(("-" if lag is None else seconds(lag)).rjust(9))
        self.console.print(escape(" ".join(cells)) + _mark(run))
        for kind, count in run["failures"].items():
            self.console.print(
                f"{'':>12} {count} x {kind}: {run['failure_examples'].get(kind, '')}", style="red", markup=False
            )

    def say(self, text: str) -> None:
        """A line of words."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        self.console.print(text, markup=False, style="bold red")


def _mark(run: dict[str, Any]) -> str:
    """What must be known of the numbers before it."""
    reading = run.get("reading") or {}
    if reading.get("valid") is False:
        here, there = (seconds(reading[name]) for name in ("tpot_s", "server_tpot_s"))
        return f"  [red]INVALID: the client was late, TPOT p50 {here} here, {there} by the server's own timeline[/]"
    if run["valid"] is False:
        return "  [red]INVALID: the harness was late[/]"
    shares = [(reading.get(name) or 0.0, why) for name, why in _AT_ONCE]
    if (largest := max(shares))[0] >= TOGETHER_SHARE:
        return f"  [yellow]{largest[0] * 100:.0f} % of tokens came {largest[1]}: TPOT and gaps are those of bunches[/]"
    return ""


def _state(title: str, total: int, load: Load, began: float) -> Table:
    recent = load.outcomes[-_RECENT:]
    first = [o.times[0] - o.scheduled for o in recent if o.times]
    tokens = sum(sum(o.counts) for o in recent)
    span = max((o.ended or 0.0 for o in recent), default=0.0) - min((o.scheduled for o in recent), default=0.0)
    failed = sum(1 for o in load.outcomes if o.failure)
    table = Table.grid(padding=(0, 2))
    done = len(load.outcomes)
    table.add_row(title, ProgressBar(total=total, completed=done, width=30), f"{done}/{total}")
    facts = [
        f"{time.monotonic() - began:.0f} s",
        f"in flight {load.in_flight}",
        f"TTFT p50 {seconds(statistics.median(first)) if first else '-'}",
        f"{tokens / span if span > 0 else 0:.0f} tok/s",
    ]
    table.add_row("", "  ".join(facts), f"[red]{failed} failed[/]" if failed else "")
    return table
