"""One child process and the conversation with it (baton.process), for a supervisor or a Ray actor alike.

All of it happens in callbacks of one asyncio loop. The loop's thread must live as long as the process that it is in:
children are tied to it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from cluster import child
from cluster.process_log import ProcessLog, is_for_terminal

_MAX_LINE_BYTES: Final = 4 * 2**20
_LAST_WORDS_S: Final = 0.25
"""How long after its end a child's pipes are read: a grandchild may hold them open for ever."""


@dataclass(frozen=True, slots=True)
class ProcessOrder:
    """A process to start."""

    name: str
    """Within its unit: "rank 0", "front", "router"."""
    command: tuple[str, ...]
    """Module and arguments, as after `python -m`."""
    spec: dict[str, Any]
    log_file: str
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Hosted:
    """A place has a node; its processes start now."""

    node_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Started:
    """The child runs. Always the first event of a process."""

    process: str
    pid: int


@dataclass(frozen=True, slots=True)
class Report:
    """The child said something."""

    process: str
    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LogLine:
    """The child logged something that the user should see."""

    process: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The child is gone. Always the last event of a process."""

    process: str
    status: int
    """Exit status; -N: ended by signal N."""
    last_words: str
    """Its last line on stderr that is no log line: the end of a traceback, say."""

    @property
    def how(self) -> str:
        """As the end of a sentence."""
        if self.status >= 0:
            how = f"ended with status {self.status}"
        else:
            how = f"was ended by {signal.Signals(-self.status).name}"
        return f"{how} ({self.last_words})" if self.last_words else how


ProcessEvent = Hosted | Started | Report | LogLine | Ended


class HostedProcess(asyncio.SubprocessProtocol):
    """A running child. Every method is called in the loop that started it, and none blocks.

    Ends the child by: asking ("stop" and end of file), then SIGKILL. The kernel kills it when this process dies.
    """

    def __init__(self, order: ProcessOrder, log_dir: Path, on_event: Callable[[ProcessEvent], None]) -> None:
        self.name = order.name
        self._log = ProcessLog(log_dir / order.log_file)
        self._on_event = on_event
        self._lines = {1: _LineSplitter(self._on_report), 2: _LineSplitter(self._on_log)}
        self._last_words: deque[str] = deque(maxlen=1)
        self._open_pipes = {1, 2}
        self._status: int | None = None
        self._transport: asyncio.SubprocessTransport | None = None
        self._ended = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, order: ProcessOrder, log_dir: Path, on_event: Callable[[ProcessEvent], None]) -> HostedProcess:
        """Start the child and tell it its specification; its events come from now on.

        Raises:
            OSError: it can not be started.
        """
        loop = asyncio.get_running_loop()
        process = cls(order, log_dir, on_event)
        await loop.subprocess_exec(
            lambda: process,
            *child.command(signal.SIGKILL, Path(order.log_file).stem, *order.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child.environment(os.environ, order.threads),
        )
        process.tell({"spec": order.spec})
        return process

    def tell(self, message: dict[str, Any]) -> None:
        """Send one message; nothing happens if the child is gone."""
        if (pipe := self._stdin()) is not None and not pipe.is_closing():
            pipe.write(json.dumps(message).encode() + b"\n")

    async def stop(self, grace_s: float) -> None:
        """Ask the child to end, insist after `grace_s`; returns when it has ended. May be called again to insist."""
        self.tell({"event": "stop"})
        if (pipe := self._stdin()) is not None:
            pipe.close()
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.shield(self._ended)
        except TimeoutError:
            self.kill()
            await asyncio.shield(self._ended)

    def kill(self) -> None:
        """End the child at once."""
        if self._status is None and self._transport is not None:
            self._transport.kill()

    def _stdin(self) -> asyncio.WriteTransport | None:
        assert self._transport is not None
        return cast(asyncio.WriteTransport | None, self._transport.get_pipe_transport(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the child runs."""
        self._transport = cast(asyncio.SubprocessTransport, transport)
        pid = self._transport.get_pid()
        assert pid is not None
        self._on_event(Started(self.name, pid))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """asyncio: the child wrote to stdout (reports) or stderr (its log)."""
        self._lines[fd].feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """asyncio: a pipe was closed."""
        self._open_pipes.discard(fd)
        if not self._open_pipes and self._status is not None:
            self._finish()

    def process_exited(self) -> None:
        """asyncio: the child ended; what it wrote last may still be in the pipes."""
        assert self._transport is not None
        self._status = self._transport.get_returncode()
        if self._open_pipes:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._finish)
        else:
            self._finish()

    def _finish(self) -> None:
        if self._ended.done():
            return
        assert self._transport is not None
        assert self._status is not None
        for splitter in self._lines.values():
            splitter.end()
        self._transport.close()
        self._log.close()
        self._ended.set_result(None)
        self._on_event(Ended(self.name, self._status, self._last_words[-1] if self._last_words else ""))

    def _on_report(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            event = message.pop("event")
        except (ValueError, AttributeError, KeyError, TypeError):
            self._log.write(b"not a report: " + line)
            return
        self._on_event(Report(self.name, event, message))

    def _on_log(self, line: bytes) -> None:
        self._log.write(line)
        if not line.startswith(b"{"):
            if text := line.decode(errors="replace").strip():
                self._last_words.append(text[:300])
        elif is_for_terminal(line):
            self._on_event(LogLine(self.name, line.decode(errors="replace")))


class _LineSplitter:
    """Bytes in, lines out; an endless line is cut."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line)
        if len(self._rest) > _MAX_LINE_BYTES:
            self.end()

    def end(self) -> None:
        if self._rest:
            rest, self._rest = self._rest, b""
            self._on_line(rest)
