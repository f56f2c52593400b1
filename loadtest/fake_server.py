"""An OpenAI-compatible server that computes nothing: tokens at a fixed pace, and faults on order. For testing harnesses.

`python -m loadtest.fake_server --interval 0.1` prints {"url": ...} and serves on loopback until its stdin ends. A
body's field "fault" asks for one of `FAULTS`. With `--stall S` the whole process sleeps for S seconds, a second after
the first completion was asked for, and then prints {"stalled": [begin, end]} in monotonic seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

import httptools

FAULTS: Final = ("reset", "truncated", "no_done", "error_event", "http_503", "silence", "short", "garbage")
_MODEL: Final = "fake"
_STALL_AFTER_S: Final = 1.0


@dataclass(slots=True)
class _Pace:
    interval_s: float
    tokens_per_event: int
    stall_s: float
    is_stall_due: bool = False


class _Connection(asyncio.Protocol):
    def __init__(self, pace: _Pace) -> None:
        self._pace = pace
        self._parser: Any = None
        self._transport: Any = None
        self._path = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._parser = None

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, b""

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._path == b"/v1/models":
            self._json({"object": "list", "data": [{"id": _MODEL, "owned_by": "baton", "max_model_len": 100_000}]})
        elif self._path == b"/tokenize":
            self._json({"tokens": list(range(3, 103))})
        elif self._path in (b"/v1/completions", b"/v1/chat/completions"):
            self._complete(json.loads(self._body))
        else:
            self._json({"error": {"message": "no such path"}}, "404 Not Found")

    def _complete(self, body: dict[str, Any]) -> None:
        if self._pace.stall_s and not self._pace.is_stall_due:
            self._pace.is_stall_due = True
            asyncio.get_running_loop().call_later(_STALL_AFTER_S, _stall, self._pace.stall_s)
        fault, count = body.get("fault"), body["max_tokens"]
        if fault == "reset":
            self._transport.abort()
        elif fault == "http_503":
            self._json({"error": {"message": "not today"}}, "503 Service Unavailable")
        elif not body.get("stream"):
            self._json({"choices": [], "usage": {"prompt_tokens": len(str(body.get("prompt", "")).split())}})
        elif fault != "silence":
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._transport.write(head)
            self._next(0, count - 1 if fault == "short" else count, fault, body)

    def _next(self, sent: int, count: int, fault: str | None, body: dict[str, Any]) -> None:
        """One event, and the one after it an interval later."""
        if self._transport.is_closing():
            return
        if sent >= count:
            prompt = body.get("prompt", "")
            num_prompt = len(prompt) if isinstance(prompt, list) else len(prompt.split())
            usage = {"prompt_tokens": num_prompt, "completion_tokens": sent}
            self._event(json.dumps({"choices": [], "usage": usage}))
            if fault != "no_done":
                self._event("[DONE]")
            self._transport.write(b"0\r\n\r\n")
            return
        if sent and fault == "truncated":
            self._transport.abort()
            return
        if sent and fault == "error_event":
            self._event('{"error":{"message":"it broke"}}', name="error")
            self._transport.write(b"0\r\n\r\n")
            return
        number = min(self._pace.tokens_per_event, count - sent)
        ids = list(range(3, 3 + number))
        data = f'{{"choices":[{{"index":0,"text":"x","token_ids":{ids},"finish_reason":null}}]}}'
        self._event("{not JSON" if fault == "garbage" else data)
        loop = asyncio.get_running_loop()
        loop.call_later(self._pace.interval_s, self._next, sent + number, count, fault, body)

    def _event(self, data: str, name: str = "") -> None:
        line = (f"event: {name}\n" if name else "") + f"data: {data}\n\n"
        self._transport.write(f"{len(line):x}\r\n{line}\r\n".encode())

    def _json(self, value: dict[str, Any], status: str = "200 OK") -> None:
        data = json.dumps(value).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)


class FakeServer:
    """A fake server as a child process, until the block is left."""

    def __init__(self, *flags: str) -> None:
        """`flags` as on the command line."""
        self._flags = flags
        self.url = ""
        self.pid = 0

    def __enter__(self) -> FakeServer:
        command = [sys.executable, "-m", "loadtest.fake_server", *self._flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        self.url = str(self.said()["url"])
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate(timeout=20)

    def said(self) -> dict[str, Any]:
        """The next line that it prints. Blocks."""
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


def _stall(seconds: float) -> None:
    begin = time.monotonic()
    time.sleep(seconds)
    _say({"stalled": [begin, time.monotonic()]})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _serve(pace: _Pace) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(pace), "127.0.0.1", 0, backlog=4096)
    _say({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"})
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interval", type=float, default=0.01, metavar="S", help="between events")
    parser.add_argument("--tokens-per-event", type=int, default=1, metavar="N")
    parser.add_argument("--stall", type=float, default=0.0, metavar="S")
    arguments = parser.parse_args()
    asyncio.run(_serve(_Pace(arguments.interval, arguments.tokens_per_event, arguments.stall)))


if __name__ == "__main__":
    main()
