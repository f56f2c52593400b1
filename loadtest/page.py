"""One self-contained HTML page of one result, or of several side by side. Reads result.py's JSON and nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest import charts
from loadtest.charts import Curve, Stack
from loadtest.metrics import WHAT_IS_LATE

Result = dict[str, Any]
Run = dict[str, Any]

_MAX_CURVES: Final = 6
_PHASE_COLOURS: Final = (
    ("route", 5),
    ("queue", 4),
    ("prefill", 0),
    ("delivery of token 1", 6),
    ("hand-over", 1),
    ("decode", 2),
)
_TRANSFER_COLOURS: Final = (("transfer, hidden", 3), ("transfer, exposed", 7))

_STYLE: Final = (
    charts.STYLE
    + """
html { color-scheme:light dark; }
* { box-sizing:border-box; }
body { margin:0 auto; padding:24px; max-width:1240px; background:var(--bg); color:var(--ink);
  font:15px/1.45 system-ui,sans-serif; }
h1 { font-size:24px; margin:0 0 4px; } h2 { font-size:18px; margin:32px 0 10px; }
p, dd { margin:4px 0; } .dim { color:var(--dim); }
.bad { color:var(--bad); } .good { color:var(--good); }
.banner { border:1px solid var(--bad); color:var(--bad); border-radius:6px; padding:10px 14px; margin:14px 0; }
.wide { overflow-x:auto; margin-bottom:14px; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:13.5px; }
th, td { padding:5px 9px; text-align:right; border-bottom:1px solid var(--grid); white-space:nowrap; }
th { color:var(--dim); font-weight:600; vertical-align:bottom; } td:first-child, th:first-child { text-align:left; }
td small { color:var(--dim); display:block; }
.charts { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap:18px; }
figure { margin:0; padding:12px; background:var(--panel); border-radius:8px; }
figcaption { font-weight:600; margin-bottom:6px; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 16px; padding:0; margin:6px 0 0; font-size:13px; }
.legend .key { width:26px; height:10px; display:inline-block; margin-right:6px; vertical-align:middle; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:2px 14px; margin:12px 0; font-size:14px; }
dt { color:var(--dim); } dd { margin:0; overflow-wrap:anywhere; } code { font-size:13px; }
"""
)


@dataclass(frozen=True, slots=True)
class _Named:
    """A run with the name under which it appears."""

    name: str
    run: Run
    colour: int


def page(results: Sequence[Result]) -> str:
    """The whole document."""
    labels = _labels(results)
    title = "Baton bench" if len(results) == 1 else "Baton bench: " + " against ".join(labels)
    runs = [
        _Named(_run_name(label if len(results) > 1 else "", run), run, 0)
        for label, result in zip(labels, results, strict=True)
        for run in result["runs"]
    ]
    chosen = _chosen(results, labels)
    figures = [*_attainment(results, labels), *_scale(chosen), *_distributions(chosen)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(_about(label, result) for label, result in zip(labels, results, strict=True)),
        "<h2>Results</h2>",
        _tables(runs),
        _goodput(results, labels),
        _failures(runs),
        "<h2>Charts</h2>",
        f'<div class="charts">{"".join(figures)}</div>',
    ]
    phases = _phases(chosen)
    if phases:
        parts += ["<h2>Where the time goes</h2>", _PHASES_TEXT, f'<div class="charts">{phases}</div>']
    parts += ["<h2>Timeline</h2>", f'<div class="charts">{"".join(_timelines(chosen))}</div>']
    return document(title, "\n".join(parts))


def document(title: str, body: str) -> str:
    """A page without any reference to another file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


_PHASES_TEXT: Final = (
    '<p class="dim">Means over the traced requests, from Baton\'s own timelines. The thin bar is the KV transfer: its '
    "hidden part runs beside prefill and costs the request nothing, its exposed part is within the hand-over. Time that "
    "attempts lost which failed is left out.</p>"
)


# ---- words and tables


def _about(label: str, result: Result) -> str:
    target, machine, workload, slo = (result[name] for name in ("target", "machine", "workload", "slo"))
    rows = [
        ("server", f"{target['model']} at {target['url']} ({target['owner'] or 'unknown'}), {target['endpoint']}"),
        ("workload", _workload(workload)),
        ("objectives", "none" if slo is None else _slo(slo)),
        (
            "clients' machine",
            f"{machine['cpu']}, {machine['num_cores']} cores, load {machine['load_average_1min']} when this was written",
        ),
        ("measured", result["created"]),
        ("command", result["command"]),
    ]
    terms = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in rows)
    heading = f"<h2>{html.escape(label)}</h2>" if label else ""
    banner = ""
    if result["valid"] is False:
        banner = (
            f'<div class="banner"><b>Invalid.</b> {html.escape(WHAT_IS_LATE[0].upper() + WHAT_IS_LATE[1:])}. '
            "Use more client processes, another machine, or less load.</div>"
        )
    if result.get("partial"):
        banner += '<div class="banner"><b>Partial.</b> It was interrupted: these are the loads that had ended.</div>'
    return f"{heading}<dl>{terms}</dl>{banner}"


def _workload(workload: dict[str, Any]) -> str:
    lengths = ""
    if workload["data"] == "synthetic":
        lengths = ", ".join(
            f"{workload[name]['mean']:g} {word} tokens"
            + (f" (CV {workload[name]['cv']:g})" if workload[name]["cv"] else "")
            for name, word in (("input_tokens", "prompt"), ("output_tokens", "output"))
        )
    elif workload["divide"] != 1:
        lengths = f"lengths divided by {workload['divide']:g}"
    arrivals = workload["arrivals"]
    if arrivals == "gamma":
        arrivals += f" with CV {workload['cv']:g}"
    return ", ".join(
        part for part in (workload["data"], lengths, f"{arrivals} arrivals", f"seed {workload['seed']}") if part
    )


def _slo(slo: dict[str, float]) -> str:
    return f"TTFT ≤ {charts.seconds(slo['ttft_s'])} and TPOT ≤ {charts.seconds(slo['tpot_s'])}, both for each request"


def _tables(runs: Sequence[_Named]) -> str:
    heads = [
        "",
        "measured",
        "failed",
        "attainment",
        "TTFT only",
        "TPOT only",
        "requests/s",
        "output tok/s",
        "total tok/s",
    ]
    lines = []
    lag_unit, lag_size = charts.common_unit(named.run["lag"]["p99_s"] or 0.0 for named in runs)
    for named in runs:
        run = named.run
        cells = [html.escape(named.name), str(run["num_measured"]), _failed(run)]
        cells += [_share((run["attainment"] or {}).get(kind)) for kind in ("joint", "ttft", "tpot")]
        cells += [
            f"{run['requests_per_s']:.2f}",
            f"{run['output_tokens_per_s']:.0f}",
            f"{run['total_tokens_per_s']:.0f}",
        ]
        lines.append([*cells, _lag(run, lag_size)])
    latency_heads, columns = [""], [[html.escape(named.name) for named in runs]]
    for kind, metric in (
        ("TTFT", "ttft_s"),
        ("TPOT", "tpot_s"),
        ("gap", "gap_s"),
        ("hand-over", "handover_s"),
        ("E2E", "e2e_s"),
    ):
        for name in ("p50", "p99"):
            unit, size = charts.common_unit(named.run[metric].get(name, 0.0) for named in runs)
            latency_heads.append(f"{kind} {name}, {unit}")
            columns.append([_quantile(named.run[metric], name, size) for named in runs])
    note = '<p class="dim">Small figures are 95 % intervals (block bootstrap over requests).</p>'
    latencies = list(zip(*columns, strict=True))
    return table([*heads, f"lag p99, {lag_unit}"], lines) + table(latency_heads, latencies) + note


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads are text, cells are HTML."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _goodput(results: Sequence[Result], labels: Sequence[str]) -> str:
    rows = []
    for label, result in zip(labels, results, strict=True):
        for level in (result.get("goodput") or {}).get("levels", ()):
            low, high = level["between"]
            least = "at least " if high is None else ""
            rate = "none" if level["rate"] is None else f"{least}{level['rate']:.3g} req/s"
            between = f"{'0' if low is None else f'{low:.3g}'} to {'?' if high is None else f'{high:.3g}'}"
            if level.get("limit") is not None:
                why = "load generator late" if level["limited_by"] == "late" else "steps too short"
                between += f"; {why} from {level['limit']:.3g} on"
            cells = (html.escape(label or "this server"), f"{level['attainment'] * 100:g} %", rate, between)
            rows.append(cells)
    if not rows:
        return ""
    return "<h2>Goodput</h2>" + table(["", "attainment", "goodput", "bracket, req/s"], rows)


def _failures(runs: Sequence[_Named]) -> str:
    rows = []
    for named in runs:
        for kind, count in named.run["failures"].items():
            example = named.run["failure_examples"].get(kind, "")
            rows.append([html.escape(cell) for cell in (named.name, kind, str(count), example)])
    return "<h2>Failures</h2>" + table(["", "failure", "requests", "for example"], rows) if rows else ""


def _failed(run: Run) -> str:
    return f'<span class="bad">{run["num_failed"]}</span>' if run["num_failed"] else "0"


def _share(value: dict[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "–"
    interval = ""
    if value["ci95"] is not None:
        low, high = value["ci95"]
        interval = f"<small>{low * 100:.1f}–{high * 100:.1f}</small>"
    return f"{value['value'] * 100:.1f} %{interval}"


def _quantile(values: dict[str, Any], name: str, unit_s: float) -> str:
    if not values["count"]:
        return "–"
    shown = charts.plain(values[name] / unit_s)
    low, high = values["ci95"][name]
    if low is None or high is None:
        return shown
    return f"{shown}<small>{charts.plain(low / unit_s)}–{charts.plain(high / unit_s)}</small>"


def _lag(run: Run, unit_s: float) -> str:
    lag = run["lag"]
    if lag["p99_s"] is None:
        return "–"
    text = charts.plain(lag["p99_s"] / unit_s)
    if lag["limit_s"] is None:
        return text
    kind = "good" if lag["valid"] else "bad"
    return f'<span class="{kind}">{text}</span><small>limit {charts.plain(lag["limit_s"] / unit_s)}</small>'


# ---- charts


def _attainment(results: Sequence[Result], labels: Sequence[str]) -> Iterable[str]:
    curves = []
    for colour, (label, result) in enumerate(zip(labels, results, strict=True)):
        runs = sorted((r for r in result["runs"] if r["rate"] and r["attainment"]), key=lambda run: float(run["rate"]))
        if len(runs) < 2:
            continue
        for style, kind in enumerate(("joint", "ttft", "tpot")):
            points = [(run["rate"], run["attainment"][kind]["value"]) for run in runs]
            band = [(run["rate"], *run["attainment"][kind]["ci95"]) for run in runs] if kind == "joint" else ()
            words = {"joint": "joint", "ttft": "TTFT only", "tpot": "TPOT only"}[kind]
            name = f"{label}: {words}" if label else words
            # One result: a colour for each kind; several: a colour for each result, a dash for each kind.
            shade = style if len(results) == 1 else colour
            curves.append(Curve(name, points, shade % charts.NUM_COLOURS, style, band, has_dots=kind == "joint"))
    if curves:
        x = charts.linear("offered rate, requests/s", [at for curve in curves for at, _ in curve.points])
        yield charts.line_chart("SLO attainment against rate", x, charts.percent("requests"), curves, (0.9, 0.99))


def _scale(chosen: Sequence[_Named]) -> Iterable[str]:
    curves = [Curve(n.name, n.run["slo_scale"]["curve"], n.colour) for n in chosen if n.run["slo_scale"]]
    if curves:
        x = charts.logarithmic("both objectives multiplied by", [at for curve in curves for at, _ in curve.points])
        yield charts.line_chart("SLO attainment against SLO scale", x, charts.percent("requests"), curves, (0.9, 0.99))


def _distributions(chosen: Sequence[_Named]) -> Iterable[str]:
    titles = {
        "ttft_s": "Time to first token",
        "tpot_s": "Time per output token (mean of each request)",
        "gap_s": "Gaps between tokens (all of them)",
        "handover_s": "Gap between tokens 1 and 2",
        "e2e_s": "End to end",
    }
    for metric, title in titles.items():
        curves = [
            Curve(n.name, [(value, q) for q, value in n.run[metric]["curve"]], n.colour)
            for n in chosen
            if n.run[metric]["count"]
        ]
        values = [value for curve in curves for value, _ in curve.points]
        if curves and max(values) > 0:
            floor = max(values) * 1e-4  # a gap of 0 has no place on a logarithmic axis: it lies on its left edge
            x = charts.logarithmic("", [max(value, floor) for value in values], charts.seconds)
            yield charts.line_chart(title, x, charts.percent("requests" if metric != "gap_s" else "gaps"), curves)


def _phases(chosen: Sequence[_Named]) -> str:
    stacks, longest = [], 0.0
    for place, named in enumerate(chosen):
        phases = named.run["phases"]
        if phases is None:
            continue
        mean = {name: (value or 0.0) / 1e3 for name, value in phases["mean_ms"].items()}
        before = mean["route"] + mean["queue"] + mean["prefill"]
        parts = [
            ("route", mean["route"]),
            ("queue", mean["queue"]),
            ("prefill", mean["prefill"]),
            ("delivery of token 1", max(0.0, mean["ttft"] - before - mean.get("failover_ttft", 0.0))),
            ("hand-over", mean["handover"]),
            ("decode", max(0.0, mean["decode"] - mean["handover"])),
        ]
        beneath = []
        if mean["transfer"]:
            hidden, exposed = mean["transfer_hidden"], mean["transfer_exposed"]
            beneath = [
                (max(0.0, before - hidden), hidden, _TRANSFER_COLOURS[0][1], "transfer, hidden"),
                (before, exposed, _TRANSFER_COLOURS[1][1], "transfer, exposed"),
            ]
        letter = chr(ord("A") + place)
        stacks.append((letter, named.name, parts, beneath))
        longest = max(longest, sum(length for _, length in parts))
    if not stacks:
        return ""
    names = [*_PHASE_COLOURS, *_TRANSFER_COLOURS]
    key = "; ".join(f"{letter}: {name}" for letter, name, *_ in stacks)

    def chart(title: str, end: float) -> str:
        x = charts.Axis(f"time since arrival ({key})", 0.0, end or 1.0, text=charts.seconds)
        return charts.stacked_bars(title, x, [Stack(letter, p, b) for letter, _, p, b in stacks], names)

    first = max(sum(length for _, length in parts[:5]) for _, _, parts, _ in stacks)
    return chart("The whole request", longest * 1.02) + chart("To the second token", first * 1.1)


def _timelines(chosen: Sequence[_Named]) -> Iterable[str]:
    for title, field in (("Output tokens per second", "output_tokens_per_s"), ("Requests in flight", "in_flight")):
        curves = []
        for named in chosen:
            line = named.run["timeline"]
            points = [((place + 0.5) * line["bin_s"], value) for place, value in enumerate(line[field])]
            curves.append(Curve(named.name, points, named.colour))
        x = charts.linear("seconds since the start", [at for curve in curves for at, _ in curve.points])
        yield charts.line_chart(title, x, charts.linear("", [v for curve in curves for _, v in curve.points]), curves)


# ---- choosing and naming


def _labels(results: Sequence[Result]) -> list[str]:
    """Distinct names of results; none for a single one without a label."""
    labels = [str(result["label"]) for result in results]
    if len(results) == 1:
        return labels
    return [
        label if label and labels.count(label) == 1 else f"{label or result['target']['model']} ({place + 1})"
        for place, (label, result) in enumerate(zip(labels, results, strict=True))
    ]


def _run_name(label: str, run: Run) -> str:
    load = (
        f"{run['concurrency']} at a time"
        if run["concurrency"]
        else "trace"
        if not run["rate"]
        else f"{run['rate']:g} req/s"
    )
    return f"{label}, {load}" if label else load


def _chosen(results: Sequence[Result], labels: Sequence[str]) -> list[_Named]:
    """Runs for curves: of one result up to six; of several one each, at the highest rate that all have."""
    if len(results) == 1:
        runs = results[0]["runs"]
        step = max(1, -(-len(runs) // _MAX_CURVES))
        return [_Named(_run_name("", run), run, place) for place, run in enumerate(runs[::step])]
    common = set.intersection(*({run["rate"] for run in result["runs"]} for result in results)) - {None}
    chosen = []
    for place, (label, result) in enumerate(zip(labels, results, strict=True)):
        runs = result["runs"]
        run = next((r for r in runs if common and r["rate"] == max(common)), runs[-1])
        chosen.append(_Named(_run_name(label, run), run, place % charts.NUM_COLOURS))
    return chosen
