"""The flags of `baton bench`. Imports nothing slow: `baton --help` reads this."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from baton.command_line import TerseParser
from loadtest.url import server_root

MODES: Final = ("run", "goodput", "compare")
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def add_to(bench: argparse.ArgumentParser) -> None:
    """Add modes and flags to the parser of `baton bench`."""
    modes = bench.add_subparsers(dest="bench_mode", metavar="MODE", required=True, parser_class=TerseParser)
    run = modes.add_parser("run", help="measure one load, or one after another (the default mode)", description=_RUN)
    goodput = modes.add_parser(
        "goodput", help="search the highest rate that keeps the objectives", description=_GOODPUT
    )
    compare = modes.add_parser("compare", help="prefill/decode apart against aggregated serving", description=_COMPARE)
    for parser in (run, goodput):
        _add_server(parser)
        _add_workload(parser)
        _add_measuring(parser)
        _add_output(parser)
    run.add_argument("--rate", type=_rates, metavar="R[,R]", help="requests per second; several make a sweep")
    run.add_argument("--concurrency", type=_count, metavar="N", help="closed loop: so many requests at a time")
    run.add_argument(
        "--compare", type=Path, nargs="+", metavar="JSON", help="measure nothing: put two or more results side by side"
    )
    goodput.add_argument("--rate", type=_positive, default=1.0, metavar="R", help="where the search begins (default 1)")
    goodput.add_argument(
        "--tolerance", type=_positive, default=0.05, metavar="X", help="width of the bracket (default 0.05)"
    )
    _add_compare(compare)


def with_mode(argv: list[str]) -> list[str]:
    """`baton bench --rate 3` means `baton bench run --rate 3`."""
    if argv[:1] == ["bench"] and not (len(argv) > 1 and argv[1] in (*MODES, "-h", "--help")):
        return ["bench", "run", *argv[1:]]
    return argv


def duration(text: str) -> float:
    """Seconds from "250ms", "2s" or "0.5"."""
    match = re.fullmatch(r"([0-9.]+)\s*(us|ms|s)?", text.strip())
    try:
        value = float(match[1]) * _UNITS[match[2] or "s"] if match else -1.0
    except ValueError:
        value = -1.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 250ms or 2s")
    return value


def _cut(text: str) -> float:
    return 0.0 if text == "0" else duration(text)


def slo(text: str) -> dict[str, float]:
    """{"ttft_s", "tpot_s"} from "ttft=200ms,tpot=20ms"."""
    parts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    missing = {"ttft", "tpot"} - set(parts)
    if len(parts) == len(missing) == 1 and "," not in text:
        raise argparse.ArgumentTypeError(f"{text!r} lacks {missing.pop()}: both are needed, as in ttft=200ms,tpot=20ms")
    if missing or len(parts) != 2 or text.count(",") != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ttft=200ms,tpot=20ms")
    for name, value in parts.items():
        if re.fullmatch(r"[0-9.]+", value.strip()):
            raise argparse.ArgumentTypeError(f"{name}={value} has no unit: us, ms or s, as in {name}={value}ms")
    return {f"{name}_s": duration(value) for name, value in parts.items()}


def length(text: str) -> tuple[float, float]:
    """(mean, CV) from "512" or "512:0.8"."""
    mean, _, cv = text.partition(":")
    try:
        values = float(mean), float(cv or 0)
    except ValueError:
        values = (0.0, 0.0)
    if not (1 <= values[0] <= 1e7 and 0 <= values[1] <= 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 512 or 512:0.8 (mean:CV)")
    return values


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 4 or 2,4,8")
    return rates


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _budgets(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _url(text: str) -> str:
    try:
        return server_root(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _field(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, value


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url", type=_url, metavar="URL", help="of any OpenAI-compatible server; none: the Baton that runs here"
    )
    group.add_argument("--port", type=int, metavar="N", help="HTTP port of a Baton that runs here")
    group.add_argument(
        "--endpoint", choices=("completions", "chat", "grpc"), default="completions", help="what is called"
    )
    group.add_argument("--grpc", metavar="HOST:PORT", help="of KServe's gRPC, if it is not a Baton that runs here")
    group.add_argument("--model", metavar="NAME", help="if the server has several")
    group.add_argument(
        "--api-key-file", metavar="F", help="file whose first line is the API key (or set BATON_API_KEY)"
    )
    group.add_argument(
        "--field", type=_field, action="append", metavar="KEY=VALUE", help="one more field of every body"
    )
    group.add_argument("--stop-at-eos", action="store_true", help="let answers end early (default: ignore_eos)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0")
    group.add_argument(
        "--prompts", choices=("auto", "ids", "text"), default="auto", help="token ids have exact lengths"
    )


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--data",
        default="synthetic",
        metavar="KIND:FILE",
        help="azure:FILE (CSV), mooncake:FILE (JSONL), sharegpt:FILE (CSV), prompts:FILE, or synthetic (default)",
    )
    group.add_argument(
        "--arrivals", default=None, metavar="A", help="poisson (default), gamma:CV, constant, trace, or closed"
    )
    group.add_argument("--input-tokens", type=length, default=(256.0, 0.0), metavar="N[:CV]", help="default 256")
    group.add_argument("--output-tokens", type=length, default=(64.0, 0.0), metavar="N[:CV]", help="default 64")
    group.add_argument("--divide", type=_positive, default=1.0, metavar="X", help="divide a trace's lengths by X")
    group.add_argument("--speedup", type=_positive, metavar="X", help="compress a trace's times by X")
    group.add_argument(
        "--requests", type=_count, metavar="N", help="number of requests (default 200 without --duration)"
    )
    group.add_argument("--duration", type=duration, metavar="T", help="length of the load, such as 60s")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random (default 0)")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--slo", type=slo, metavar="ttft=T,tpot=T", help="objectives, such as ttft=200ms,tpot=20ms")
    group.add_argument("--clients", type=_count, default=1, metavar="N", help="client processes (default 1)")
    group.add_argument("--ray-nodes", metavar="ADDRESS", help="a client process on every node of this Ray cluster")
    group.add_argument(
        "--warmup", type=_cut, metavar="T", help="not measured at the beginning (default: a tenth; 0: none)"
    )
    group.add_argument("--cooldown", type=_cut, metavar="T", help="not measured at the end (default: a tenth; 0: none)")
    group.add_argument("--timeout", type=duration, default=600.0, metavar="T", help="of each request (default 600s)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result (default bench.json)")
    group.add_argument("--html", type=Path, metavar="FILE", help="write the report (default: beside the JSON)")
    group.add_argument("--label", default="", metavar="TEXT", help="the result's name in reports")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `baton serve`")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="results; a second start goes on there"
    )
    parser.add_argument("--azure", type=Path, metavar="CSV", help="Azure's conversation trace, for its lengths")
    parser.add_argument("--sharegpt", type=Path, metavar="CSV", help="ShareGPT lengths")
    parser.add_argument(
        "--divide", type=_positive, default=8.0, metavar="X", help="divide all lengths by X (default 8)"
    )
    parser.add_argument("--requests", type=_count, default=400, metavar="N", help="of each run (default 400)")
    parser.add_argument(
        "--repetitions", type=_count, default=5, metavar="N", help="of every arm, interleaved (default 5)"
    )
    parser.add_argument("--rates", type=_rates, metavar="R,R", help="default: six shares of the measured capacity")
    parser.add_argument(
        "--budgets", type=_budgets, default=[64, 128, 256, 512], metavar="N,N", help="token budgets of chunked prefill"
    )
    parser.add_argument("--engine", choices=("native", "sim"), default="native", help="default native")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--clients", type=_count, default=1, metavar="N", help="client processes (default 1)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", help="any configuration key, for all servers")


_RUN: Final = (
    "Send a load to a server and measure what its clients see. Open loop unless --concurrency is given: latency counts "
    "from the scheduled time of a request. docs/loadtest.md defines every number."
)
_GOODPUT: Final = (
    "The highest rates at which 90 % and 99 % of requests keep both objectives, by bisection. Needs --slo."
)
_COMPARE: Final = (
    "Serve with --mixed 2, prefill-first and chunked with several token budgets, and with --prefill 1 --decode 1, on "
    "equal cores, and compare goodput on a grid of objectives. Starts and ends the servers itself."
)
