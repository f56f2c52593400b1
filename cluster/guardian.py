"""`baton serve` as the user sees it: a thin process that outlives the supervisor and leaves nothing behind.

It starts the supervisor, hands it signals, and when the supervisor ends, in whatever way, ends every process that is
left and removes the run directory. It does nothing else, so that nothing else can break it. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any, Final

from cluster import child, process_tree, run_dir
from cluster.run_dir import RunDir

_LEFTOVER_GRACE_S: Final = 0.5
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
_EXIT_INTERRUPTED: Final = 130


def serve(request: dict[str, Any], began: float) -> int:
    """Run a server until it ends or is told to; the exit status of `baton serve`.

    `request` is for the supervisor: where the configuration comes from. `began` is `time.monotonic` at the command.

    Raises:
        RunDirError: there is no place for the run directory.
    """
    run_dir.remove_dead()
    run = run_dir.create()
    guardian = _Guardian(run)
    return guardian.run({**request, "run_dir": str(run.path), "began": began})


class _Guardian:
    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._signals = 0

    def run(self, request: dict[str, Any]) -> int:
        process_tree.adopt_orphans()
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(signal.SIGHUP, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)
        status = EXIT_FAILED
        try:
            status = self._supervise(request)
        finally:
            self._clean_up(status)
        return self._exit_status(status)

    def _supervise(self, request: dict[str, Any]) -> int:
        env = {**child.environment(os.environ), run_dir.RUN_ID_ENV: self._run.run_id}
        self._supervisor = subprocess.Popen(
            child.command(signal.SIGTERM, "baton-serve", "cluster.serve"),
            stdin=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C reaches only us: one sender of signals, one order of stopping
        )
        if self._signals:
            self._supervisor.terminate()
        assert self._supervisor.stdin is not None
        try:
            self._supervisor.stdin.write(json.dumps(request).encode() + b"\n")
            self._supervisor.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone already; its status says why
        return self._supervisor.wait()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._supervisor is None:
            return
        if self._signals == 1:
            self._supervisor.terminate()
            signal.setitimer(signal.ITIMER_REAL, self._run.stop_limit_s)
        else:
            self._supervisor.kill()

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        assert self._supervisor is not None
        self._supervisor.kill()

    def _clean_up(self, status: int) -> None:
        is_unexpected = status not in (0, EXIT_USAGE) and not self._signals
        process_tree.end_descendants(grace_s=0.0 if self._signals > 1 else _LEFTOVER_GRACE_S)
        logs = self._run.keep_logs() if is_unexpected or self._run.state().get("had_failure") else None
        self._run.remove()
        if is_unexpected and status < 0:
            _say(f"the supervisor was ended by signal {-status}; everything that it had started has been ended")
        if logs is not None:
            _say(f"the logs are in {logs}")

    def _exit_status(self, status: int) -> int:
        if self._signals > 1:
            return _EXIT_INTERRUPTED
        if status < 0:
            return 0 if self._signals else EXIT_FAILED
        return status


def _say(sentence: str) -> None:
    sys.stderr.write(f"baton: {sentence}\n")


def clean_up_instead(run: RunDir, grace_s: float = _LEFTOVER_GRACE_S) -> None:
    """What the guardian does at the end, done by a supervisor whose guardian was killed."""
    process_tree.end_descendants(grace_s)
    run.remove()
