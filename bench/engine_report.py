"""What the engine bench prints and writes: one table per shape and thread count, the JSON, the last line. No clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from bench.engine_rows import Figure, Kind, Row, Spread, Verdict, verdicts
from bench.engine_session import Outcome, Setup

MAX_REGRET: Final = 0.1
"""Largest regret of a bf16 arm, see peers/check_tokens.py; int8 is stated, not bounded."""
_NOISE: Final = 0.15


def table(outcome: Outcome) -> list[str]:
    """Lines of a table with medians, spreads, shares of the roofline and ratios."""
    head = ("row", "unit", "baton (min..max)", "roofline", "rival (min..max)", "roofline", "ratio (min..max)", "pairs")
    lines = [head]
    for figure in outcome.figures.values():
        lines += _lines(figure)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [texts[0], "-" * len(texts[0]), *texts[1:]]


def _lines(figure: Figure) -> list[tuple[str, ...]]:
    row = figure.row
    ours = (row.name, row.unit, _cell(figure, row.subject), _share(figure, row.subject))
    if not row.rivals:
        return [(*ours, "", "", "", str(_count(figure, row.subject)))]
    lines = []
    for rival in row.rivals:
        pairs = str(_count(figure, rival) or "")
        ratio = _spread(figure.ratio(rival), 2)
        lines.append((*ours, f"{rival} {_cell(figure, rival)}", _share(figure, rival), ratio, pairs))
        ours = ("", "", "", "")
    return lines


def _count(figure: Figure, arm: str) -> int:
    return len(figure.values.get(arm, ()))


def _cell(figure: Figure, arm: str) -> str:
    if arm in figure.absent:
        return figure.absent[arm].partition(":")[0]
    return _spread(figure.spread(arm), 1 if figure.row.unit in ("tok/s", "MiB") else 2)


def _spread(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    if spread.count == 1:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def _share(figure: Figure, arm: str) -> str:
    share = figure.share(arm)
    return "" if share is None else f"{share:.0%}"


def notes(setup: Setup, outcome: Outcome) -> list[str]:
    """What a reader must know beside the table: ceilings, memory, tokens, and whatever spoils a measurement."""
    lines = [f"arms on core(s) {', '.join(map(str, setup.cores))}; {setup.num_pairs} pairs"]
    if outcome.ceilings:
        read, big, flops, tiles = (
            Spread.of([each[key] for each in outcome.ceilings if not str(each["row"]).startswith("tp")])
            for key in ("read_bytes_per_s", "read_1gib_bytes_per_s", "flops_per_s", "tile_peak_per_s")
        )
        if read and big and flops and tiles:
            lines.append(
                f"ceilings: reads {read.median / 1e9:.1f} GB/s ({read.low / 1e9:.1f}..{read.high / 1e9:.1f}), 1 GiB at "
                f"{big.median / 1e9:.1f}; bf16 GEMM {flops.median / 1e12:.2f} TFLOP/s ({flops.low / 1e12:.2f}.."
                f"{flops.high / 1e12:.2f}), tiles without memory {tiles.median / 1e12:.2f}"
            )
    for name, found in outcome.memory.items():
        lines.append(
            f"memory of {name}: peak RSS {found['peak_rss']:.0f} MiB, PSS {found['pss']:.0f} MiB "
            f"of which files {found['pss_file']:.0f} MiB"
        )
    for name, facts in outcome.facts.items():
        shown = {key: value for key, value in facts.items() if key != "system"}
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    lines += [
        f"regret of {name}: {value:.3f}" + (" (stated only)" if "int8" in name else f" (limit {MAX_REGRET})")
        for name, value in outcome.regret.items()
    ]
    if outcome.unchecked:
        lines.append(f"WARNING: tokens are not checked: {outcome.unchecked}")
    lines += [
        f"WARNING: {name} burns {share:.2f} cores while it should idle"
        for name, share in outcome.idle_shares.items()
        if share > 0.05
    ]
    for figure in outcome.figures.values():
        others = Spread.of(figure.foreign_cpu)
        if others is not None and others.median > _NOISE:
            lines.append(f"WARNING: {figure.row.name}: others kept {others.median:.2f} cores busy; do not cite it")
    return lines


def wrong_arms(outcome: Outcome) -> list[str]:
    """Arms of Baton in bf16 whose tokens are not the model's."""
    return [
        name
        for name, regret in outcome.regret.items()
        if name.startswith("baton") and "int8" not in name and not regret <= MAX_REGRET
    ]


def judged(setup: Setup, outcome: Outcome) -> list[Verdict]:
    """All targets of issue 4 that these rows can speak to."""
    return verdicts(setup.shape.name, setup.num_threads, outcome.figures)


def ratios_line(setup: Setup, outcome: Outcome) -> str:
    """All ratios on one line."""
    parts = []
    for figure in outcome.figures.values():
        found = [
            f"{ratio.median:.2f}x {rival.removesuffix('-cached')}"
            for rival in figure.row.rivals
            if (ratio := figure.ratio(rival)) is not None
        ]
        if found:
            parts.append(f"{figure.row.name} {' '.join(found)}")
    return f"{setup.shape.name} {setup.num_threads} thread(s): " + ("; ".join(parts) or "no rival was measured")


def as_json(setup: Setup, outcome: Outcome) -> dict[str, Any]:
    """Everything."""
    return {
        "shape": asdict(setup.shape),
        "threads": setup.num_threads,
        "cores": list(setup.cores),
        "pairs": setup.num_pairs,
        "facts": outcome.facts,
        "commands": outcome.commands,
        "ceilings": outcome.ceilings,
        "memory": outcome.memory,
        "idle_shares": outcome.idle_shares,
        "regret": outcome.regret,
        "unchecked": outcome.unchecked,
        "rows": {name: _row_json(figure) for name, figure in outcome.figures.items()},
        "verdicts": [
            {**asdict(verdict.target), "row": verdict.row, "value": verdict.value, "is_met": verdict.is_met}
            for verdict in judged(setup, outcome)
        ],
    }


def _row_json(figure: Figure) -> dict[str, Any]:
    row: Row = figure.row
    return {
        "unit": row.unit,
        "subject": row.subject,
        "values": figure.values,
        "absent": figure.absent,
        "floor_s": figure.floor,
        "spread": _spreads({arm: figure.spread(arm) for arm in row.arms}),
        "ratio": _spreads({arm: figure.ratio(arm) for arm in row.rivals}),
        "share": {arm: share for arm in row.arms if (share := figure.share(arm)) is not None},
        "total_tok_s_per_output_tok_s": 9.0 if row.kind is Kind.MIXED else None,
        "foreign_cores": figure.foreign_cpu,
    }


def _spreads(found: Mapping[str, Spread | None]) -> dict[str, dict[str, float]]:
    return {name: asdict(spread) for name, spread in found.items() if spread is not None}


def broken_rows(outcome: Outcome) -> list[str]:
    """Rows that Baton could not run to the end."""
    return [name for name, figure in outcome.figures.items() if figure.row.subject in figure.absent]


def exit_status(all_verdicts: Sequence[Verdict], faults: Sequence[str]) -> int:
    """1 where a target is missed or something is wrong; what peers did not measure is printed and does not count."""
    return int(bool(faults) or any(verdict.is_met is False for verdict in all_verdicts))
