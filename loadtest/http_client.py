"""A raw HTTP/1.1 client for streamed completions of any OpenAI-compatible server. No SDK, no retries, little work.

Bytes are given their time as they leave the event loop's poll, before they are parsed.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from loadtest.outcome import Outcome
from loadtest.prompts import PromptMaker
from loadtest.target import Target
from loadtest.workload import LoadRequest

_MAX_IDLE_S: Final = 2.0
"""Servers close idle connections (uvicorn after 5 s). One that may be closed at the moment of use is not used: a
request that is lost so would have to be sent again, and nothing is ever sent again here."""
_MAX_LINE_BYTES: Final = 16 * 2**20
_MAX_HEAD_BYTES: Final = 256 * 2**10
_MAX_TOKENS: Final = 2**22
"""More than any context: a server that reports so many tokens of one request is wrong."""
_MAX_ERROR_BYTES: Final = 4096


class HttpClient:
    """Keeps connections alive and opens another where none is idle. Event loop only."""

    def __init__(self, target: Target, api_key: str | None) -> None:
        """Sends nothing yet."""
        parts = urlsplit(target.url)
        is_tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if is_tls else 80)
        self._tls = ssl.create_default_context() if is_tls else None
        self._target = target
        self.begin("")
        path = parts.path.rstrip("/") + ("/v1/chat/completions" if target.endpoint == "chat" else "/v1/completions")
        lines = [
            f"POST {path} HTTP/1.1",
            f"host: {parts.netloc.rpartition('@')[2]}",
            "content-type: application/json",
            "accept: text/event-stream",
            *([f"authorization: Bearer {api_key}"] if api_key is not None else []),
        ]
        self._head = "\r\n".join(lines).encode() + b"\r\n"
        self._body_tail = self._make_body_tail()
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    def begin(self, run_id: str) -> None:
        """See Client."""
        self._run_id = run_id
        self._prompts = PromptMaker(self._target, run_id)

    def prepare(self, request: LoadRequest) -> bytes:
        """Head and body."""
        if self._target.endpoint == "chat":
            content = json.dumps(self._prompts.text(request), ensure_ascii=False)
            start = f'{{"messages":[{{"role":"user","content":{content}}}],'
        elif self._target.alphabet and not request.text:
            start = f'{{"prompt":{self._prompts.ids(request)},'
        else:
            start = f'{{"prompt":{json.dumps(self._prompts.text(request), ensure_ascii=False)},'
        body = f'{start}"max_tokens":{request.num_output_tokens},{self._body_tail}'.encode()
        own = f"x-request-id: {self._run_id}-{request.index}\r\ncontent-length: {len(body)}\r\n\r\n"
        return self._head + own.encode() + body

    async def send(self, prepared: bytes, outcome: Outcome, deadline: float) -> None:
        """See Client."""
        exchange = _Exchange(outcome)
        connection: _Connection | None = None
        try:
            async with asyncio.timeout_at(deadline):
                connection = self._take_idle()
                if connection is None:
                    began = time.monotonic()
                    try:
                        connection = await self._connect()
                    finally:
                        outcome.connect_s = time.monotonic() - began
                connection.start(prepared, exchange)
                outcome.written = time.monotonic()
                await exchange.ended
        except TimeoutError:
            outcome.fail("timeout", f"no end within {self._target.timeout_s:g} s")
        except OSError as error:
            outcome.fail("connect", str(error))
        finally:
            outcome.ended = outcome.ended or time.monotonic()
            if connection is not None and not (exchange.is_reusable and connection.is_open):
                connection.abort()
            elif connection is not None:
                connection.exchange = None
                connection.idle_since = time.monotonic()
                self._idle.append(connection)

    async def close(self) -> None:
        """Close all connections, and wait until they are closed."""
        for connection in list(self._open):
            connection.abort()
        while self._open:
            await next(iter(self._open)).closed

    def _make_body_tail(self) -> str:
        target = self._target
        fields: dict[str, Any] = {
            "model": target.model,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.ignore_eos:
            fields["ignore_eos"] = True
        if target.token_ids:
            fields["return_token_ids"] = True
        return json.dumps({**fields, **target.extra})[1:]

    def _take_idle(self) -> _Connection | None:
        fresh = time.monotonic() - _MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > fresh:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._open), self._host, self._port, ssl=self._tls
        )
        return connection


class _Exchange:
    """One request's answer, from its first byte to its last."""

    def __init__(self, outcome: Outcome) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_reusable = False
        self._outcome = outcome
        self._status = 0
        self._is_stream = False
        self._rest = b""
        self._error = b""
        self._is_error_event = False
        self._is_done = False
        self._num_tokens = 0  # counted from events
        self._num_reported = 0  # by usage

    def head(self, status: int, content_type: bytes) -> None:
        self._status = status
        self._is_stream = content_type.lower().startswith(b"text/event-stream")

    def body(self, data: bytes, now: float) -> None:
        if self._status != 200 or not self._is_stream:
            self._error = (self._error + data)[:_MAX_ERROR_BYTES]
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_LINE_BYTES:
            self.lost("bad_response", "an event without end")
            return
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)
            elif line.startswith(b"event:"):
                self._is_error_event = line[6:].strip() == b"error"

    def end(self, is_reusable: bool) -> None:
        """The response is complete as far as HTTP knows."""
        outcome = self._outcome
        outcome.ended = time.monotonic()
        self.is_reusable = is_reusable
        if self._status != 200:
            outcome.fail(f"http_{self._status}", _message(self._error))
        elif not self._is_stream:
            outcome.fail("bad_response", f"not an event stream: {_message(self._error)}")
        elif not self._is_done:
            outcome.fail("truncated", "the stream ended without [DONE]")
        outcome.num_output_tokens = self._num_reported or self._num_tokens
        self._finish()

    def lost(self, kind: str, detail: str) -> None:
        """The connection is gone or of no more use."""
        if not self.ended.done():
            self._outcome.num_output_tokens = max(self._num_reported, self._num_tokens)
            self._outcome.fail(kind, detail)
            self._finish()

    def connection_lost(self, reason: str) -> None:
        """The server closed it: the end of a response without a length, or before the response was complete."""
        if self._is_done and not self.ended.done():
            self.end(is_reusable=False)
            return
        self.lost("truncated" if self._status == 200 else "reset", reason)

    def _finish(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = json.loads(data)
            if self._is_error_event or event.get("error"):
                self._outcome.fail("stream_error", _message(data))
                return
            for choice in event["choices"]:
                self._choice(choice, event.get("usage"), now)
            if event.get("usage"):
                self._usage(event["usage"])
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
            self._outcome.fail("bad_response", f"not a completion chunk: {_message(data)}")

    def _choice(self, choice: Mapping[str, Any], usage: Mapping[str, Any] | None, now: float) -> None:
        """Tokens of one event: as many as it has ids; else as usage grows; else one if there is text."""
        token_ids = choice.get("token_ids")
        if token_ids is not None:
            count = len(token_ids)
        elif usage:
            count = _count(usage, "completion_tokens") - self._num_tokens
        else:
            delta = choice.get("delta")
            if delta is None:
                count = 1 if choice.get("text") else 0
            else:
                count = 1 if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")) else 0
        if count > 0:
            self._num_tokens += count
            self._outcome.tokens(now, count)
        if choice.get("finish_reason"):
            self._outcome.finish_reason = str(choice["finish_reason"])

    def _usage(self, usage: Mapping[str, Any]) -> None:
        self._num_reported = _count(usage, "completion_tokens")
        self._outcome.num_prompt_tokens = _count(usage, "prompt_tokens")
        self._outcome.num_cached_tokens = _count(usage.get("prompt_tokens_details") or {}, "cached_tokens")


class _Connection(asyncio.Protocol):
    """One TCP connection with at most one exchange at a time."""

    def __init__(self, registry: set[_Connection]) -> None:
        self.exchange: _Exchange | None = None
        self.idle_since = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._registry = registry
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._content_type = b""
        self._head_bytes = 0
        self._has_head = False
        self._now = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, prepared: bytes, exchange: _Exchange) -> None:
        """Write a request; its answer goes to `exchange`."""
        assert self._transport is not None
        self.exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._content_type, self._head_bytes, self._has_head = b"", 0, False
        self._transport.write(prepared)

    def abort(self) -> None:
        """Close at once."""
        self.exchange = None
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._registry.add(self)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self.exchange is None or self.exchange.ended.done():  # an answer that nobody asked for
            self._transport.abort()  # type: ignore[union-attr]
            return
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self.exchange.lost("bad_response", "a head without end")
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.exchange is not None:
                self.exchange.lost("bad_response", f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._registry.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)
        self._parser = None  # it and we hold each other
        if self.exchange is not None:
            self.exchange.connection_lost(str(exc or "closed by the server"))

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value

    def on_headers_complete(self) -> None:
        if self.exchange is None or self.exchange.ended.done():
            return
        status = self._parser.get_status_code()
        if status >= 200:  # others come before the answer
            self._has_head = True
            self.exchange.head(status, self._content_type)

    def on_body(self, data: bytes) -> None:
        if self.exchange is not None and not self.exchange.ended.done():
            self.exchange.body(data, self._now)

    def on_message_complete(self) -> None:
        if self.exchange is not None and self._has_head and not self.exchange.ended.done():
            self.exchange.end(self._parser.should_keep_alive())


def _count(usage: Mapping[str, Any], name: str) -> int:
    """A number of tokens that a server reports.

    Raises:
        ValueError: it is none that a request could have.
    """
    count = int(usage.get(name) or 0)
    if not 0 <= count <= _MAX_TOKENS:
        raise ValueError(f"{name} {count}")
    return count


def _message(data: bytes) -> str:
    """An error's own words where it has the usual shape, or what there is."""
    try:
        error = json.loads(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return data[:200].decode("utf-8", "replace")
