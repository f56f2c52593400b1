"""How a Baton process and whoever started it talk, under every launcher.

The parent writes JSON lines to the child's stdin: first the specification (secrets included, so that none is in
argv), later commands. The child writes JSON lines to its stdout: what it is ready for. End of file on stdin means
that the parent is gone or wants an end: the child stops. Logs go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

_MAX_LINE_BYTES: Final = 4 * 2**20


class ParentLink:
    """The child's end. `report` may be called from any thread."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb", buffering=65536)
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        self._lock = threading.Lock()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)  # a stray print must not look like a report

    def read(self) -> dict[str, Any] | None:
        """The parent's next line; None once it closed its end. Blocks."""
        line = self._in.readline(_MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            return None
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def report(self, event: str, **fields: Any) -> None:
        """Tell the parent; a parent that is gone is not an error (its end of file says so)."""
        data = json.dumps({"event": event, **fields}).encode() + b"\n"
        with self._lock:
            try:
                self._out.write(data)
            except BrokenPipeError:
                return

    def watch(self, on_message: Callable[[dict[str, Any]], None], on_end: Callable[[], None]) -> None:
        """Read further lines on a daemon thread; `on_end` runs there once, at end of file."""

        def run() -> None:
            while (message := self.read()) is not None:
                on_message(message)
            on_end()

        threading.Thread(target=run, name="parent-link", daemon=True).start()


def fail_start(link: ParentLink, error: BaseException) -> None:
    """Report why this process can not start, in one sentence, and exit with status 1."""
    link.report("failed", error=f"{type(error).__name__}: {error}")
    sys.exit(1)


def clock_id() -> str:
    """Processes with equal ids read the same monotonic clock (same boot of the same machine, same time namespace)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/time')}"
    except OSError:
        return f"pid-{os.getpid()}"
