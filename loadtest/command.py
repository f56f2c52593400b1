"""`baton bench` from its arguments to its files. The server, its token and Ray's nodes are found by the caller."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from loadtest import page, result, target
from loadtest.console import Watch
from loadtest.coordinator import AgentLost, Link, coordinating
from loadtest.metrics import Slo
from loadtest.request_traces import RequestTraces
from loadtest.result import ResultError
from loadtest.session import Session
from loadtest.target import TargetError
from loadtest.traces import TraceError
from loadtest.workload import Length, Workload, WorkloadError

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INVALID: Final = 3
"""The harness was late: there are files, but their numbers are not to be used."""
API_KEY_ENV: Final = "BATON_API_KEY"
_DEFAULT_REQUESTS: Final = 200


@dataclass(frozen=True, slots=True)
class Place:
    """The server to measure. `token` opens its internal paths, if it is a Baton of ours."""

    url: str
    grpc: str | None = None
    token: str | None = None


def run(arguments: argparse.Namespace, place: Place | None, links: Sequence[Link] = ()) -> int:
    """`baton bench run` and `goodput`; the exit status. `links`: client processes elsewhere, instead of local ones.

    `place` is None where nothing is measured (`--compare`).
    """
    watch = Watch()
    try:
        if getattr(arguments, "compare", None):
            return _put_side_by_side(arguments, watch)
        assert place is not None
        whole = asyncio.run(_measure(arguments, place, links, watch))
    except (WorkloadError, TraceError, ResultError) as error:
        return _say(error, EXIT_USAGE)
    except (TargetError, AgentLost, OSError) as error:
        return _say(error, EXIT_FAILED)
    json_path = arguments.json or Path("bench.json")
    result.write(json_path, whole)
    _write_page(arguments.html or json_path.with_suffix(".html"), [result.read(json_path)], watch)
    watch.say(f"result: {json_path}")
    for level in (whole["goodput"] or {}).get("levels", ()):
        rate = "not reached at any rate" if level["rate"] is None else f"{level['rate']:.4g} requests/s"
        watch.say(f"goodput at {level['attainment'] * 100:g} %: {rate}")
    if whole["valid"] is False:
        watch.say("INVALID: the harness itself was late (p99 of its lag above 2 % of the TTFT objective).")
        return EXIT_INVALID
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


async def _measure(arguments: argparse.Namespace, place: Place, links: Sequence[Link], watch: Watch) -> dict[str, Any]:
    is_goodput = arguments.bench_mode == "goodput"
    if is_goodput and arguments.slo is None:
        raise WorkloadError("goodput is the rate that keeps objectives: give them with --slo")
    api_key = _api_key(arguments.api_key_file)
    found = await asyncio.to_thread(
        lambda: target.discover(
            place.url,
            endpoint=arguments.endpoint,
            grpc=arguments.grpc or place.grpc,
            model=arguments.model,
            api_key=api_key,
            prompts=arguments.prompts,
            ignore_eos=not arguments.stop_at_eos,
            temperature=arguments.temperature,
            timeout_s=arguments.timeout,
            extra={name: yaml.safe_load(value) for name, value in arguments.field or ()},
        )
    )
    workload = workload_of(arguments, found.max_model_len)
    slo = None if arguments.slo is None else Slo(**arguments.slo)
    goodput = None
    async with coordinating(found, links=links, num_clients=arguments.clients, api_key=api_key) as coordinator:
        session = Session(
            coordinator,
            watch,
            slo,
            arguments.warmup,
            arguments.cooldown,
            None if place.token is None else RequestTraces(place.url, place.token),
        )
        if is_goodput:
            goodput, runs = await session.goodput(workload, arguments.rate, arguments.tolerance)
        elif arguments.rate is not None:
            runs = await session.sweep(workload, arguments.rate)
        else:
            runs = [await session.measure(workload)]
    return result.whole(
        runs,
        target=found,
        workload=workload,
        slo=slo,
        command="baton " + shlex.join(sys.argv[1:]),
        label=arguments.label,
        goodput=goodput,
    )


def _put_side_by_side(arguments: argparse.Namespace, watch: Watch) -> int:
    results = [result.read(path) for path in arguments.compare]
    _write_page(arguments.html or Path("bench-compare.html"), results, watch)
    return EXIT_OK


def _write_page(path: Path, results: Sequence[dict[str, Any]], watch: Watch) -> None:
    path.write_text(page.page(results))
    watch.say(f"report: {path}")


def _api_key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(API_KEY_ENV) or None
    with contextlib.suppress(IndexError):
        return Path(file).read_text().split()[0]
    raise TargetError(f"{file}: there is no API key in it")


def _say(error: BaseException, status: int) -> int:
    sys.stderr.write(f"baton: {str(error) or type(error).__name__}\n")
    return status
