"""What the user sees of a running server: one line per request, warnings, and what the supervisor has to say."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any, Final, Literal, TextIO

from cluster import waterfall
from cluster.process_log import REQUEST_FINISHED

Style = Literal["json", "text"]
_SKIPPED: Final = frozenset({"time", "level", "logger", "event", "exception", "role", "worker_id", "tp_rank"})


def choose_style(wanted: str | None, out: TextIO) -> Style:
    """ "json" and "text" as wanted; otherwise text for people (a terminal) and JSON for programs."""
    match wanted:
        case "json":
            return "json"
        case "text":
            return "text"
        case _:
            return "text" if out.isatty() else "json"


class Console:
    """Lines for the user, and a log of the supervisor's own words. A terminal that is gone is not an error."""

    def __init__(self, style: Style, out: TextIO, log: TextIO | None = None) -> None:
        self._style = style
        self._out = out
        self._log = log

    def say(self, text: str, level: str = "info", **fields: Any) -> None:
        """The supervisor's own words: a sentence, and its values for programs."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = json.dumps({"time": stamp, "level": level, "logger": "cluster", "event": text, **fields}, default=str)
        _write(self._log, line)
        _write(self._out, line if self._style == "json" else f"{_clock_text(now)} {_mark(level)}{text}")

    def greet(self, banner: str, **fields: Any) -> None:
        """The server is ready: the banner for people, its facts for programs."""
        if self._style == "text":
            self._write(banner)
        else:
            self.say("ready", **fields)

    def complain(self, sentence: str) -> None:
        """Why the server ends, in the form of a command's error, whatever the style."""
        self._write(f"baton: {sentence}")

    def child_line(self, process: str, line: str) -> None:
        """A JSON log line of a child."""
        if self._style == "json":
            self._write(line)
            return
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self._write(line)
        elif record.get("event") == REQUEST_FINISHED:
            self._write(f"{_clock_text(time.time())} {waterfall.line(record)}")
        else:
            self._write(f"{_clock_text(time.time())} {_mark(str(record.get('level')))}{process}: {_event_text(record)}")

    def _write(self, text: str) -> None:
        _write(self._out, text)


def _write(out: TextIO | None, text: str) -> None:
    if out is not None:
        with contextlib.suppress(OSError):
            out.write(text + "\n")
            out.flush()


def _clock_text(now: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(now))


def _mark(level: str) -> str:
    return "" if level == "info" else f"{level.upper()} "


def _event_text(record: dict[str, Any]) -> str:
    fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in _SKIPPED)
    text = f"{record.get('event', '')} {fields}".rstrip()
    exception = str(record.get("exception", "")).strip()
    return f"{text} [{exception.splitlines()[-1]}]" if exception else text
