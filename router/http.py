"""HTTP without any API: bodies with limits, OpenAI-shaped errors, event streams that notice a client's leaving.

This is where an error becomes an HTTP status. Knows no models and no tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Final, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.clock import Clock
from baton.errors import Cancelled, InvalidRequest, Overloaded, ServeError, Unauthorized, Unavailable
from router.answer import Spawn

logger = logging.getLogger("router")

_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9._:/@+=~-]{1,128}")
_BODY_S: Final = 60.0  # for a body to arrive
_EXPLANATIONS: Final = {
    404: "There is no such path here.",
    405: "This path does not take that method.",
    408: "The body did not arrive in time.",
    413: "The body is larger than this server accepts.",
    415: "Send JSON, with `content-type: application/json`.",
}


class Closable(Protocol):
    """Something whose end a client's leaving must cause."""

    def close(self) -> None:
        """Synchronous, idempotent."""
        ...


def error_body(error: ServeError) -> dict[str, Any]:
    """As OpenAI's clients read it."""
    status = error.http_status
    if isinstance(error, InvalidRequest):
        kind = "invalid_request_error"
    elif isinstance(error, Unauthorized):
        kind = "authentication_error"
    else:
        kind = "rate_limit_error" if status == 429 else "server_error"
    code = None if error.code == kind else error.code
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_response(error: ServeError) -> Response:
    """The status, the body, and when to come back."""
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        seconds = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        headers = {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1e3))}
    elif error.http_status >= 500:
        headers = {"x-should-retry": "false"}  # SDKs retry every 5xx twice otherwise
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), error.http_status, headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Compact UTF-8 JSON."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    return Response(data, status, headers, "application/json")


async def on_serve_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for our errors."""
    assert isinstance(error, ServeError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what its router refuses."""
    assert isinstance(error, HTTPException)
    message = _EXPLANATIONS.get(error.status_code, error.detail)
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    response = json_response({"error": body}, error.status_code, dict(error.headers or {}))
    return _Lingering(response) if error.status_code == 413 else response


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler for everything else; it logs the traceback itself by raising on."""
    return error_response(ServeError("Something went wrong inside the server; its log says what."))


async def read_json(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request.

    Raises:
        HTTPException: 415, 413 before more than `max_bytes` are read, or 408.
        Cancelled: the client left before.
    """
    # Requiring the type keeps browsers from posting here on behalf of any page: such posts have another type.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise HTTPException(413)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise HTTPException(413)
    except TimeoutError:
        raise HTTPException(408, headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise Cancelled("The client left before all of its body was there.") from None
    return bytes(body)


@contextlib.contextmanager
def closing_when_gone(receive: Receive, work: Closable, spawn: Spawn) -> Iterator[None]:
    """Close `work` as soon as the client leaves, and at the end in any case."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        work.close()

    watcher = spawn(watch())
    try:
        yield
    finally:
        watcher.cancel()
        work.close()


class EventStream(Response):
    """Server-sent events. The work behind them is closed in any case: at their end, when the client leaves (also
    before the first of them), when the task is cancelled, and when a client has not read them in time."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], work: Closable, spawn: Spawn, *, timeout_s: float) -> None:
        """`events` are encoded; an error before the first one becomes an ordinary response."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._work = work
        self._spawn = spawn
        self._timeout_s = timeout_s
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        with closing_when_gone(receive, self._work, self._spawn):
            async with contextlib.aclosing(self._events) as events:
                first = await anext(events)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        await send(start)
                        await send({"type": "http.response.body", "body": first, "more_body": True})
                        async for event in events:
                            await send({"type": "http.response.body", "body": event, "more_body": True})
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
                except TimeoutError:
                    logger.warning("client does not read", extra={"path": scope["path"]})


class _Lingering(Response):
    """A refusal of a body that is still being sent: most clients read nothing before they have sent it all, so what
    comes is thrown away for a moment. Closing at once would reset the connection and take the refusal with it."""

    _SECONDS = 1.0

    def __init__(self, refusal: Response) -> None:
        self._refusal = refusal
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        headers = [*self._refusal.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self._refusal.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self._refusal.body, "more_body": True})
        if not any(name == b"expect" for name, _ in scope["headers"]):  # who asks first has not sent it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._SECONDS):
                    while (await receive()).get("more_body"):
                        pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Identified:
    """ASGI middleware: a request id in and out, the time of arrival, a count of responses."""

    def __init__(self, app: ASGIApp, clock: Clock, count: Callable[[int], None]) -> None:
        self._app = app
        self._clock = clock
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request an id (the client's, if it is a plain one) and echo it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        client_id = given if _CLIENT_ID.fullmatch(given) else ""
        own_id = secrets.token_hex(12)
        scope["baton"] = {"id": own_id, "client_id": client_id, "arrived": self._clock.now()}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", (client_id or own_id).encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)
