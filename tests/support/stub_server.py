"""`baton serve` as a user starts it, with stub processes for ranks, fronts and router."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.audit_processes import MachineAudit

ROOT = Path(__file__).resolve().parent.parent.parent
_STUB = "tests.support.stub_process"
_MODULES = f"router={_STUB},prefill={_STUB},decode={_STUB}"


class StubServer:
    """A server under test. On leaving, whatever is left of it is ended and deleted."""

    def __init__(
        self, *flags: str, launcher: str = "local", stub: dict[str, str] | None = None, runtime_dir: Path | None = None
    ) -> None:
        self._is_owner = runtime_dir is None
        self.runtime_dir = runtime_dir or Path(tempfile.mkdtemp(prefix="bl-", dir="/tmp"))
        self.audit = MachineAudit(self.runtime_dir)
        self.work_dir = Path(tempfile.mkdtemp(prefix="bw-", dir="/tmp"))
        self._stderr = self.work_dir / "stderr"
        self._journal = self.work_dir / "journal"
        command = [sys.executable, "-m", "cluster.cli", "serve", "--launcher", launcher, "--engine", "sim"]
        with open(self._stderr, "wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--grpc-port", "0", *flags],
                cwd=self.work_dir,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={
                    **os.environ,
                    **self.audit.environment,
                    "PYTHONPATH": str(ROOT),
                    "BATON_MODULES": _MODULES,
                    "BATON_STUB": json.dumps(stub or {}),
                    "BATON_STUB_JOURNAL": str(self._journal),
                },
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.audit.kill_all()
        self.process.wait(5)
        if error is not None:
            error.add_note(f"the server's stderr: {self.stderr}")
        shutil.rmtree(self.work_dir)
        if self._is_owner:
            shutil.rmtree(self.runtime_dir)

    @property
    def stderr(self) -> str:
        """What the user saw so far."""
        return self._stderr.read_text()

    @property
    def state(self) -> dict[str, Any]:
        """The state file; {} if there is none."""
        for file in self.runtime_dir.glob("*/server.json"):
            try:
                state = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
            if state.get("guardian", [0])[0] == self.process.pid:
                return dict(state)
        return {}

    @property
    def supervisor_pid(self) -> int:
        """Of the process that the guardian guards."""
        return int(self.state["supervisor"][0])

    def unit(self, name: str) -> dict[str, Any]:
        """A worker or the router, as the state file has it."""
        return dict(self.state["units"][name])

    def journal(self, name: str) -> list[dict[str, Any]]:
        """What the stub of this name was told, in order, over all its incarnations."""
        return [entry for entry in self.whole_journal() if entry["name"] == name]

    def whole_journal(self) -> list[dict[str, Any]]:
        """What all stubs were told, in order."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()] if self._journal.exists() else []

    def wait_for(self, what: Callable[[], object], limit_s: float = 20.0) -> None:
        """Until `what()` is true. Other processes have to act, so there is no event to wait for."""
        deadline = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < deadline, f"not within {limit_s} s; stderr: {self.stderr}"
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.stderr}"
            time.sleep(0.01)

    def wait_ready(self, limit_s: float = 40.0) -> Self:
        """Until it has said that it is ready."""
        self.wait_for(lambda: self.state.get("ready"), limit_s)
        return self

    def end(self, signum: int = signal.SIGTERM, limit_s: float = 20.0) -> int:
        """Send the guardian a signal and return its exit status."""
        self.process.send_signal(signum)
        return self.process.wait(limit_s)
