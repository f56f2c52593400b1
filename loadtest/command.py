"""`baton bench` from its arguments to its files. The server, its token and Ray's nodes are found by the caller."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from loadtest import page, result, target
from loadtest.console import Watch
from loadtest.coordinator import AgentLost, Link, coordinating
from loadtest.metrics import WHAT_IS_LATE, Slo
from loadtest.request_traces import RequestTraces
from loadtest.result import ResultError
from loadtest.session import Session, headline
from loadtest.target import TargetError
from loadtest.traces import TraceError
from loadtest.workload import Length, Workload, WorkloadError

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
"""It could not be measured, or in a load no request succeeded."""
EXIT_USAGE: Final = 2
EXIT_INVALID: Final = 3
"""The harness was late: there are files, but their numbers are not to be used."""
EXIT_INTERRUPTED: Final = 130
API_KEY_ENV: Final = "BATON_API_KEY"
_DEFAULT_REQUESTS: Final = 200


@dataclass(frozen=True, slots=True)
class Place:
    """The server to measure. `token` opens its internal paths, if it is a Baton of ours."""

    url: str
    grpc: str | None = None
    token: str | None = None


def check(arguments: argparse.Namespace) -> None:
    """Everything that needs no server: inputs can be read, flags agree, outputs can be written.

    Raises:
        ValueError: one sentence says what can not be used.
    """
    if getattr(arguments, "compare", None):
        if len(arguments.compare) < 2:
            raise ResultError(f"--compare needs at least two results; {arguments.compare[0]} is one")
        result.check_writable(_compare_page(arguments))
        return
    if arguments.bench_mode == "goodput" and arguments.slo is None:
        raise WorkloadError("goodput is the rate that keeps objectives: give them with --slo")
    _api_key(arguments.api_key_file)
    _extra_fields(arguments)
    workload_of(arguments, None).requests()
    json_path, html_path = _outputs(arguments)
    if json_path == html_path:
        raise ResultError(f"{json_path}: can not be result and report at once")
    result.check_writable(json_path)
    result.check_writable(html_path)


def run(arguments: argparse.Namespace, place: Place, links: Sequence[Link] = ()) -> int:
    """`baton bench run` and `goodput`, after `check`; the exit status. `links`: client processes elsewhere, instead of
    local ones. Whatever ends a sweep early, the loads that had ended are written."""
    watch = Watch()
    measured = _Measured()
    status, reason = EXIT_OK, ""
    try:
        _measure(arguments, place, links, watch, measured)
    except KeyboardInterrupt:
        status, reason = EXIT_INTERRUPTED, "interrupted"
    except (WorkloadError, TraceError, ResultError) as error:
        status, reason = EXIT_USAGE, str(error)
    except (TargetError, AgentLost, OSError) as error:
        status, reason = EXIT_FAILED, str(error) or type(error).__name__
    if reason:
        kept = f"; a partial result is written, of loads that had ended: {len(measured.runs)}" if measured.runs else ""
        watch.say(f"baton: {reason}{kept}")
    if measured.target is None or measured.workload is None or not measured.runs:
        return status
    whole = result.whole(
        measured.runs,
        target=measured.target,
        workload=measured.workload,
        slo=_slo(arguments),
        command="baton " + shlex.join(sys.argv[1:]),
        label=arguments.label,
        goodput=measured.goodput,
        is_partial=bool(reason),
    )
    try:
        _write(arguments, whole, watch)
    except OSError as error:
        watch.say(f"baton: {error}")
        return EXIT_FAILED
    return status or _judge(whole, watch)


def put_side_by_side(arguments: argparse.Namespace) -> int:
    """`--compare`, after `check`: a page, and the loads of all results on the terminal; the exit status.

    Raises:
        ResultError: a file is no result.
    """
    watch = Watch()
    paths: list[Path] = arguments.compare
    names = [path.name for path in paths]
    results = []
    for path, name in zip(paths, names, strict=True):
        found = result.read(path)
        found["label"] = found["label"] or (name if names.count(name) == 1 else str(path))
        results.append(found)
    width = max(len(found["label"]) for found in results)
    runs = [(run, found["label"].ljust(width)) for found in results for run in found["runs"]]
    for run, label in sorted(runs, key=lambda pair: (pair[0]["concurrency"] or 0, pair[0]["rate"] or 0.0)):
        watch.result(run, label)
    if any(found["slo"] != results[0]["slo"] for found in results):
        watch.say("Their objectives differ: joint attainment can not be compared.")
    html_path = _compare_page(arguments)
    html_path.write_text(page.page(results))
    watch.say(f"report: {html_path}")
    return EXIT_OK


def workload_of(arguments: argparse.Namespace, max_total_tokens: int | None) -> Workload:
    """The workload that the flags describe, with the first of several rates.

    Raises:
        WorkloadError: flags that contradict each other.
    """
    concurrency = getattr(arguments, "concurrency", None)
    name, _, cv = (arguments.arrivals or ("closed" if concurrency else "poisson")).partition(":")
    rates = arguments.rate if isinstance(arguments.rate, list) else [arguments.rate]
    try:
        arrivals_cv = float(cv or 1)
    except ValueError:
        raise WorkloadError(f"arrivals {arguments.arrivals!r}: the CV is not a number") from None
    if cv and name != "gamma":
        raise WorkloadError(f"arrivals {arguments.arrivals!r}: only gamma has a CV")
    if arguments.speedup is not None and (name != "trace" or rates[0] is not None):
        raise WorkloadError("--speedup is for --arrivals trace without --rate")
    is_bounded = arguments.requests is not None or name == "trace" or (arguments.duration and name != "closed")
    return Workload(
        data=arguments.data,
        arrivals=name,
        rate=rates[0],
        cv=arrivals_cv,
        speedup=arguments.speedup or 1.0,
        concurrency=concurrency,
        num_requests=arguments.requests if is_bounded else _DEFAULT_REQUESTS,
        duration_s=arguments.duration,
        input_tokens=Length(*arguments.input_tokens),
        output_tokens=Length(*arguments.output_tokens),
        divide=arguments.divide,
        max_total_tokens=max_total_tokens,
        seed=arguments.seed,
    )


@dataclass(slots=True)
class _Measured:
    """What is known so far. `runs` grows as loads end."""

    target: target.Target | None = None
    workload: Workload | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    goodput: dict[str, Any] | None = None


def _measure(
    arguments: argparse.Namespace, place: Place, links: Sequence[Link], watch: Watch, measured: _Measured
) -> None:
    api_key = _api_key(arguments.api_key_file)
    measured.target = target.discover(
        place.url,
        endpoint=arguments.endpoint,
        grpc=arguments.grpc or place.grpc,
        model=arguments.model,
        api_key=api_key,
        prompts=arguments.prompts,
        ignore_eos=not arguments.stop_at_eos,
        temperature=arguments.temperature,
        timeout_s=arguments.timeout,
        extra=_extra_fields(arguments),
    )
    measured.workload = workload_of(arguments, measured.target.max_model_len)
    asyncio.run(_drive(arguments, place, links, watch, measured, measured.target, measured.workload))


async def _drive(
    arguments: argparse.Namespace,
    place: Place,
    links: Sequence[Link],
    watch: Watch,
    measured: _Measured,
    found: target.Target,
    workload: Workload,
) -> None:
    api_key = _api_key(arguments.api_key_file)
    async with coordinating(found, links=links, num_clients=arguments.clients, api_key=api_key) as coordinator:
        session = Session(
            coordinator,
            watch,
            _slo(arguments),
            arguments.warmup,
            arguments.cooldown,
            None if place.token is None or found.owner != target.BATON else RequestTraces(place.url, place.token),
            measured.runs,
        )
        if arguments.bench_mode == "goodput":
            measured.goodput = await session.goodput(workload, arguments.rate, arguments.tolerance)
            measured.runs.sort(key=lambda run: float(run["rate"]))
        elif arguments.rate is not None:
            await session.sweep(workload, arguments.rate)
        else:
            session.announce(workload, [workload.rate])
            await session.measure(workload)


def _write(arguments: argparse.Namespace, whole: dict[str, Any], watch: Watch) -> None:
    json_path, html_path = _outputs(arguments)
    result.write(json_path, whole)
    html_path.write_text(page.page([result.read(json_path)]))
    watch.say(f"report: {html_path}")
    watch.say(f"result: {json_path}")


def _judge(whole: dict[str, Any], watch: Watch) -> int:
    """Say what the user must know of the whole; the exit status."""
    for level in (whole["goodput"] or {}).get("levels", ()):
        watch.say(headline(level))
    kinds: Counter[str] = Counter()
    for run in whole["runs"]:
        kinds.update(run["failures"])
    if kinds:
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        num_measured = sum(run["num_measured"] for run in whole["runs"])
        watch.warn(f"FAILED: {kinds.total()} of {num_measured} measured requests: {counts}")
    is_empty = [run["num_ok"] == 0 for run in whole["runs"]]
    # A search for goodput goes to rates at which a server may well refuse everything.
    if all(is_empty) if whole["goodput"] else any(is_empty):
        return EXIT_FAILED
    if whole["valid"] is False:
        watch.warn(f"INVALID: {WHAT_IS_LATE}.")
        return EXIT_INVALID
    return EXIT_OK


def _slo(arguments: argparse.Namespace) -> Slo | None:
    return None if arguments.slo is None else Slo(**arguments.slo)


def _outputs(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """(JSON, HTML)."""
    json_path: Path = arguments.json or Path("bench.json")
    return json_path, arguments.html or json_path.with_suffix(".html")


def _compare_page(arguments: argparse.Namespace) -> Path:
    return arguments.html or Path("bench-compare.html")


def _extra_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = {}
    for name, value in arguments.field or ():
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise WorkloadError(f"--field {name}={value}: the value is not YAML") from None
    return fields


def _api_key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(API_KEY_ENV) or None
    try:
        return Path(file).read_text().split()[0]
    except OSError as error:
        raise WorkloadError(f"{file}: {error.strerror}") from error
    except IndexError:
        raise WorkloadError(f"{file}: there is no API key in it") from None
