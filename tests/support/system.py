"""A whole server for tests: `baton serve` as a user starts it, on free ports, with an audit at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

_START_LIMIT_S = 120.0
_QUIET_LIMIT_S = 10.0
_EVENT_LIMIT_S = 30.0

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, limit_s: float = _EVENT_LIMIT_S) -> T:
    """The first truthy result of `look`: for what another process will do, within a bound."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)  # there is no event to wait for
    return found


@dataclass
class System:
    """A running server. `log` is everything that it wrote to its terminal."""

    process: subprocess.Popen[bytes]
    runtime_dir: Path
    log_path: Path
    state: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.state["http_url"])

    @property
    def grpc(self) -> str:
        return str(self.state["grpc_url"]).removeprefix("grpc://")

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def state_now(self) -> dict[str, Any]:
        """The server's state file: `units` has the pids of every process as they are at this moment."""
        (file,) = self.runtime_dir.glob("*/server.json")
        return dict(json.loads(file.read_text()))

    def finished_requests(self) -> list[dict[str, Any]]:
        """The log lines of all finished requests, oldest first."""
        whole = self.log.rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in whole if '"request finished"' in line]

    def finished(self, request_id: str) -> dict[str, Any]:
        """The one log line of a finished request, by our id or the client's; waits for it."""

        def lines() -> list[dict[str, Any]]:
            return [
                line for line in self.finished_requests() if request_id in (line["request_id"], line["x_request_id"])
            ]

        (line,) = eventually(lines, f"the log line of {request_id}")
        return line

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name and labels as they are written there."""
        with self.client() as client:
            answer = client.get("/metrics")
            answer.raise_for_status()
        samples = (line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, trust_env=False, verify=False)

    def status(self) -> dict[str, Any]:
        """What `baton status --json` shows."""
        with self.client(authorization=str(self.state["token"])) as client:
            answer = client.get("/internal/status")
            answer.raise_for_status()
            return dict(answer.json())

    def trace(self, request_id: str) -> dict[str, Any]:
        with self.client(authorization=str(self.state["token"])) as client:
            answer = client.get(f"/internal/trace/{request_id}")
            answer.raise_for_status()
            return dict(answer.json())

    def worker(self, worker_id: str) -> dict[str, Any]:
        """One worker's part of the status."""
        return next(worker for worker in self.status()["workers"] if worker["worker_id"] == worker_id)

    def audit(self) -> None:
        """Fail unless every block is free or cached and no sequence or transfer is left, within a bound."""
        deadline = time.monotonic() + _QUIET_LIMIT_S
        while leaks := [leak for worker in self.status()["workers"] for leak in _leaks(worker)]:
            assert time.monotonic() < deadline, f"not quiescent after {_QUIET_LIMIT_S} s: {leaks}"
            time.sleep(0.05)  # another process has to act; there is no event to wait for


def _leaks(worker: dict[str, Any]) -> Iterator[str]:
    name = worker["worker_id"]
    if "error" in worker:
        yield f"{name}: {worker['error']}"
        return
    for state, count in worker["blocks"].items():
        if state not in ("free", "cached") and int(count):
            yield f"{name}: {count} blocks {state}"
    for state, count in worker["sequences"].items():
        if int(count):
            yield f"{name}: {count} sequences {state}"
    for kind, count in worker["transfers"].items():
        if kind != "links" and int(count):
            yield f"{name}: {count} {kind}"


@contextlib.contextmanager
def serve(*args: str, launcher: str = "local", env: dict[str, str] | None = None) -> Iterator[System]:
    """Run `baton serve ARGS`; on leaving, audit, stop it with SIGTERM and check that nothing is left."""
    runtime_dir = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    log_path = runtime_dir.with_suffix(".log")
    command = [sys.executable, "-m", "cluster.cli", "serve", *args]
    command += ["--launcher", launcher, "--port", "0", "--grpc-port", "0", "--log-format", "json"]
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "BATON_RUNTIME_DIR": str(runtime_dir), **(env or {})},
        )
    try:
        system = System(process, runtime_dir, log_path, _wait_until_serving(process, runtime_dir, log_path))
        yield system
        if process.poll() is None:
            system.audit()
        request_ids = [line["request_id"] for line in system.finished_requests()]
        assert len(set(request_ids)) == len(request_ids), "a request has left two log lines"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                process.kill()
            left = [path for path in runtime_dir.iterdir() if path.name != "logs"]
            shutil.rmtree(runtime_dir, ignore_errors=True)
            text = log_path.read_text()
            log_path.unlink()
    assert not left, f"left behind: {left}\n{text[-3000:]}"


def _wait_until_serving(process: subprocess.Popen[bytes], runtime_dir: Path, log_path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"baton serve ended with {process.returncode}:\n{log_path.read_text()[-4000:]}"
        for file in runtime_dir.glob("*/server.json"):
            state = json.loads(file.read_text())
            if state.get("ready"):
                return dict(state)
        time.sleep(0.02)  # the server's state file is the event; nothing can be waited on before it exists
    raise AssertionError(f"not serving after {_START_LIMIT_S} s:\n{log_path.read_text()[-4000:]}")


def generate(system: System, token_ids: list[int], max_tokens: int, **params: Any) -> list[int]:
    """Output token ids of one completion over HTTP."""
    body = {
        "model": system.state["model"],
        "prompt": token_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **params,
    }
    with system.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])
