"""`baton status`: a server's workers, what they hold, and what they do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any, Final

from cluster import client

_COLUMNS: Final = ("WORKER", "ROLE", "TP", "STATE", "SEQUENCES", "BLOCKS", "TRANSFERS", "KV BY")


def run(arguments: argparse.Namespace) -> int:
    """Print it; the exit status."""
    connection = client.connect(arguments)
    status = connection.ask("/internal/status")
    if connection.server is not None:
        state = connection.server.state
        status["server"] = {key: value for key, value in state.items() if key != "token"}
    sys.stdout.write((json.dumps(status, indent=2) if arguments.json else describe(status, connection.url)) + "\n")
    return 0


def describe(status: Mapping[str, Any], url: str) -> str:
    """For people."""
    router = status.get("router", {})
    health = "serving" if router.get("serving") else f"not serving ({router.get('why_not_serving')})"
    head = f"{router.get('model', 'a model')} at {url}: {health}"
    if "uptime_s" in router:
        head += f", up {_duration(router['uptime_s'])}, {router.get('requests_in_flight', 0)} requests in flight"
    if "dtype" in (facts := router.get("status", {})):
        head += f"; {formats_text(facts)}"
    workers = {worker["worker_id"]: worker for worker in status.get("workers", ())}
    units = {
        name: unit for name, unit in status.get("server", {}).get("units", {}).items() if not name.startswith("router")
    }
    rows = [_row(name, workers.get(name), units.get(name, {})) for name in sorted({*workers, *units}, key=_natural)]
    return "\n".join([head, "", *_table([_COLUMNS, *rows])])


def formats_text(numbers: Mapping[str, Any]) -> str:
    """What a server computes in, from topology.number_formats."""
    weights = f", weights in {numbers['quantization']}" if numbers["quantization"] else ""
    return f"{numbers['dtype']}{weights}, KV in {numbers['kv_dtype']}"


def _row(name: str, worker: Mapping[str, Any] | None, unit: Mapping[str, Any]) -> tuple[str, ...]:
    restarts = f", {unit['restarts']} restarts" if unit.get("restarts") else ""
    if worker is None:
        return (name, "", "", str(unit.get("state", "unknown")) + restarts, "", "", "", "")
    if "error" in worker:
        return (name, "", "", f"unreachable: {worker['error']}{restarts}", "", "", "", "")
    peers = worker.get("peers", {})
    transfers = {key: count for key, count in worker.get("transfers", {}).items() if key != "links"}
    return (
        name,
        str(worker.get("role", "")),
        str(worker.get("tp_size", "")),
        ("draining" if worker.get("draining") else "ready") + restarts,
        _counts(worker.get("sequences", {})),
        _counts(worker.get("blocks", {})),
        _counts(transfers),
        ", ".join(sorted(set(map(str, peers.values())))) or "-",
    )


def _natural(name: str) -> tuple[str, int]:
    """decode-2 before decode-10."""
    role, _, index = name.rpartition("-")
    return (role, int(index)) if index.isdecimal() else (name, 0)


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(counts.items()) if count) or "-"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
