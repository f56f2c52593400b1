"""One process's log file, bounded, and which of its lines a user should see at once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

_MAX_BYTES: Final = 16 * 2**20
REQUEST_FINISHED: Final = "request finished"
"""The router's one line per request (event name)."""
_FOR_TERMINAL: Final = tuple(
    text.encode()
    for text in (f'"event": "{REQUEST_FINISHED}"', '"level": "warning"', '"level": "error"', '"level": "critical"')
)


class ProcessLog:
    """Append-only; the file and one predecessor (`.1`) of at most 16 MiB each."""

    def __init__(self, path: Path, max_bytes: int = _MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, line: bytes) -> None:
        """Append a line (given without its end). A full disk loses log lines, not the server."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if self._file.tell() + len(line) >= self._max_bytes:
                self._file.close()
                self._path.rename(self._path.with_name(self._path.name + ".1"))
                self._file = self._path.open("ab", buffering=0)
            self._file.write(line + b"\n")

    def close(self) -> None:
        """Later lines are dropped."""
        self._file.close()


def is_for_terminal(line: bytes) -> bool:
    """Whether a JSON log line is a warning or worse, or reports a finished request (a guess without parsing)."""
    return any(text in line for text in _FOR_TERMINAL)
