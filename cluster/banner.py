"""How a start went, and the words that greet the user when it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from baton import __version__
from baton.config import Config, RouterSection
from cluster.site import OWN_ADDRESS
from cluster.status import formats_text
from cluster.topology import FRONT, ROUTER, ModelChoice, WorkerPlan
from cluster.waterfall import size


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a start; times are seconds since the command."""

    name: str
    begin_s: float
    end_s: float


class StartUp:
    """How a start was asked for, and when each of its steps began and ended."""

    def __init__(self, began: float, program: str = "baton") -> None:
        """`program`: how the user called the command."""
        self._began = began
        self.program = program
        self.steps: list[Step] = []
        self.total_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the command."""
        return time.monotonic() - self._began

    @property
    def is_finished(self) -> bool:
        """Whether the server has been ready once."""
        return self.total_s is not None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record what happens inside as a step."""
        begin = self.elapsed_s
        yield
        self.add(name, begin)

    def add(self, name: str, begin_s: float) -> None:
        """Record a step that ends now."""
        self.steps.append(Step(name, begin_s, self.elapsed_s))

    def finish(self) -> None:
        """It is ready."""
        self.total_s = self.elapsed_s


@dataclass(slots=True)
class UnitFacts:
    """What the supervisor knows of a worker or a router, across its starts."""

    state: str = "starting"
    reports: Mapping[str, Mapping[str, Any]] | None = None
    """What its processes said when they were ready, by process name."""
    pids: Mapping[str, int] | None = None
    node: str | None = None
    """Its address in the Ray cluster."""
    incarnation: str | None = None
    restarts: int = 0
    had_failure: bool = False


def banner(
    config: Config,
    model: ModelChoice,
    numbers: Mapping[str, str | None],
    workers: Sequence[WorkerPlan],
    facts: Mapping[str, UnitFacts],
    links: Mapping[tuple[str, str], str],
    start_up: StartUp,
    logs: str,
) -> str:
    """The greeting: what runs, where it listens, what it has, how long the start took, what to try.

    `numbers`: topology.number_formats.
    """
    routers = [dict((facts[name].reports or {}).get(name, {})) for name in facts if name.startswith(ROUTER)]
    http_url = routers[0].get("http_url", "")
    rows = [
        ("", f"Baton {__version__} serves {model.name}, ready after {start_up.total_s or 0.0:.1f} s"),
        ("model", f"{model.path}  ({formats_text(numbers)})" if numbers else "simulated"),
        ("workers", _shape(workers, config)),
        *((plan.worker_id, _worker(plan, facts[plan.worker_id])) for plan in workers),
        *([("kv", _links(links))] if links else []),
        *(("http", f"{router.get('http_url', '')}/v1  (OpenAI-compatible; /health, /metrics)") for router in routers),
        *(("grpc", f"{router.get('grpc_url', '')}  (KServe v2)") for router in routers),
        ("start", _steps(start_up)),
        *(("note", note) for note in _notes(config)),
        ("logs", f"{logs}  (removed at the end unless something fails)"),
        ("try", f"{_commands(start_up.program, http_url)}, or\n{_curl(http_url, model.name, config)}"),
    ]
    width = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, text in rows:
        first, *rest = text.splitlines()
        lines.append(f"  {label:<{width}}{first}" if label else f"\n{first}")
        lines.extend(f"  {'':<{width}}{more}" for more in rest)
    return "\n".join(lines) + "\n"


def _shape(workers: Sequence[WorkerPlan], config: Config) -> str:
    counts: dict[tuple[str, int], int] = {}
    for plan in workers:
        counts[plan.role, plan.tp_size] = counts.get((plan.role, plan.tp_size), 0) + 1
    shape = " + ".join(f"{count} {role} (tp {tp_size})" for (role, tp_size), count in counts.items())
    where = "an embedded Ray" if config.cluster.address is None else f"the Ray cluster {config.cluster.address}"
    text = f"{shape}, started " + (f"by {where}" if config.cluster.launcher == "ray" else "directly")
    if any(plan.role == "prefill" for plan in workers):
        text += f"; KV moves by {', else '.join(config.kv_transports)}"
    if config.is_encrypted:
        text += "; TLS between processes" + (
            ", but for KV on one machine" if {"shm", "cuda_ipc"} & set(config.kv_transports) else ""
        )
    return text


def _worker(plan: WorkerPlan, facts: UnitFacts) -> str:
    reports = facts.reports or {}
    parts = [f"{reports.get(FRONT, {}).get('address', '')}"]
    kv = reports.get("rank 0", {}).get("kv", {})
    if kv:
        tokens = kv["num_blocks"] * kv["block_size"]
        memory = size(kv["pool_bytes"]) + (" per rank" if plan.tp_size > 1 else "")
        parts.append(f"KV {kv['num_blocks']} blocks of {kv['block_size']} = {tokens} tokens, {memory}")
    slowest: dict[str, float] = {}
    for report in reports.values():
        for step, seconds in report.get("timings", {}).items():
            slowest[step] = max(slowest.get(step, 0.0), seconds)
    if slowest:
        parts.append(", ".join(f"{step.removesuffix('_s').replace('_', ' ')} {s:.1f} s" for step, s in slowest.items()))
    return "  ".join(parts)


def _links(links: Mapping[tuple[str, str], str]) -> str:
    """Who sends KV to whom, by what."""
    by_transport: dict[str, list[str]] = {}
    for (sender, receiver), transport in links.items():
        by_transport.setdefault(transport, []).append(f"{sender} to {receiver}")
    return "\n".join(f"{', '.join(pairs)} by {transport}" for transport, pairs in by_transport.items())


def _notes(config: Config) -> list[str]:
    notes = []
    if config.is_encrypted and config.cluster.address is not None and os.environ.get("RAY_USE_TLS") != "1":
        notes.append(
            "Ray's own channels, by which processes get the cluster secret, are not encrypted; see RAY_USE_TLS"
        )
    if "cuda_ipc" in config.kv_transports:
        notes.append("KV by CUDA IPC, verified on the device, was tested without a GPU only")
    is_loopback = config.router.host in ("localhost", "::1") or config.router.host.startswith("127.")
    if not is_loopback and config.router.api_key_file is None:
        where = "the routers' nodes" if config.router.host == OWN_ADDRESS else config.router.host
        notes.append(f"whoever can reach {where} may use this server; see --api-key-file")
    return notes


def _steps(start_up: StartUp) -> str:
    steps = sorted(start_up.steps, key=lambda step: step.end_s)
    return ", ".join(f"{step.name} {step.begin_s:.1f}-{step.end_s:.1f} s" for step in steps)


def _commands(program: str, http_url: str) -> str:
    """They find the server by themselves, unless another runs; the port tells them apart."""
    parts = urlsplit(http_url)
    is_usual = parts.port == RouterSection().port
    is_near = parts.hostname in ("localhost", "0.0.0.0", "::") or str(parts.hostname).startswith("127.")
    which = "" if is_usual else f" --port {parts.port}" if is_near else f" --url {http_url}"
    return ", ".join(f"{program} {command}{which}" for command in ("chat", "status", "trace"))


def _curl(http_url: str, model: str, config: Config) -> str:
    key = "-H 'authorization: Bearer KEY' " if config.router.api_key_file is not None else ""
    question = "What is Baton?" if config.model.path is None else "Hello!"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{question}"}}]}}'
    return f"curl {http_url}/v1/chat/completions {key}-H 'content-type: application/json' -d '{body}'"
