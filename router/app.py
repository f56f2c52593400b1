"""One router: its parts, in the order in which they need each other, and their common life. Knows no parent process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from baton.auth import worker_token
from baton.clock import Clock, SystemClock
from baton.errors import ServeError
from baton.specs import RouterSpec, decode_secret
from baton.tls import make_identity
from router.admin import AdminDoor
from router.admission import Admission
from router.answer import Answers, Spawn
from router.api_keys import load_api_keys
from router.chat_template import load_chat_template
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.http import Identified, on_bug, on_http_exception, on_serve_error
from router.http_protocol import BoundedHttp
from router.kserve import KServeDoor
from router.metrics import Metrics
from router.openai import OpenAiDoor
from router.timeline import TimelineBook
from router.tokenizer import TextEncoder, load_tokenizer

_SETTLE_S: Final = 2.0  # a first fleet whose members are not all there by then serves without them


class Router:
    """The parts between the public doors and the workers' sessions. Event loop only; made by `serving`."""

    def __init__(self, spec: RouterSpec, spawn: Spawn, clock: Clock, on_serving: Callable[[str | None], None]) -> None:
        """See `serving`."""
        secret = decode_secret(spec.secret)
        self._on_serving = on_serving
        self._is_serving = False
        self._settling: asyncio.TimerHandle | None = None
        self._drain_s = spec.drain_s

        tokenizer = load_tokenizer(spec.model_dir)
        chat_template = load_chat_template(spec.model_dir)
        api_keys = load_api_keys(spec.api_key_file)
        self.encoder = TextEncoder(tokenizer)
        self.fleet = Fleet(
            secret=secret,
            router_id=spec.router_id,
            clock=clock,
            spawn=spawn,
            on_change=self._fleet_changed,
            identity=make_identity(secret) if spec.encrypt else None,
            kv_lease_s=spec.kv_lease_s,
        )
        self.admission = Admission(spec.max_concurrent_requests)
        self.metrics = Metrics(spec.served_model_name, self.fleet, self.admission)
        self.book = TimelineBook(spec.trace_capacity, self.metrics.request_finished)
        self.dispatcher = Dispatcher(
            self.fleet,
            self.book,
            clock,
            max_attempts=spec.max_attempts,
            local_prefill_max_tokens=spec.local_prefill_max_tokens,
        )
        self.answers = Answers(
            tokenizer, self.dispatcher, self.admission, clock, spawn, timeout_s=spec.request_timeout_s
        )
        openai = OpenAiDoor(
            model=spec.served_model_name,
            answers=self.answers,
            tokenizer=tokenizer,
            encoder=self.encoder,
            chat_template=chat_template,
            api_keys=api_keys,
            spawn=spawn,
            clock=clock,
            max_body_bytes=spec.max_body_bytes,
        )
        admin = AdminDoor(
            router_id=spec.router_id,
            token=worker_token(secret),
            answers=self.answers,
            fleet=self.fleet,
            book=self.book,
            admission=self.admission,
            metrics=self.metrics,
            facts={"model": spec.served_model_name, "status": spec.status},
        )
        app = Starlette(
            routes=[*openai.routes(), *admin.routes()],
            exception_handlers={ServeError: on_serve_error, HTTPException: on_http_exception, Exception: on_bug},
        )
        app.router.redirect_slashes = False
        self.http: ASGIApp = Identified(app, clock, self.metrics.response)
        self.kserve = KServeDoor(
            model=spec.served_model_name,
            answers=self.answers,
            encoder=self.encoder,
            api_keys=api_keys,
            clock=clock,
            spawn=spawn,
            max_body_bytes=spec.max_body_bytes,
        )

    def set_members(self, members: Sequence[Mapping[str, str]]) -> None:
        """The fleet, as the launcher names it."""
        self.fleet.set_members(members)
        if members and self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(_SETTLE_S, self.fleet.settle)

    async def drain(self) -> None:
        """Let what runs end by itself for the spec's `drain_s`. Nothing new is accepted meanwhile."""
        self.answers.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self.admission.idle()

    def close(self) -> None:
        """End every request and every session."""
        self._on_serving = lambda why_not: None
        if self._settling is not None:
            self._settling.cancel()
        self.answers.shut_down()
        self.book.flush()
        self.fleet.close()
        self.encoder.close()

    def _fleet_changed(self) -> None:
        reason = self.fleet.why_not_serving
        if (reason is None) != self._is_serving:
            self._is_serving = reason is None
            self.kserve.set_serving(self._is_serving)
            self._on_serving(reason)


@contextlib.asynccontextmanager
async def serving(
    spec: RouterSpec,
    http_socket: socket.socket,
    *,
    on_serving: Callable[[str | None], None] = lambda why_not: None,
    clock: Clock | None = None,
) -> AsyncIterator[Router]:
    """A router with open doors: HTTP on a listening socket, gRPC on the spec's port (`router.kserve.port`).

    `on_serving` hears each change: None when requests can be served, else why not.

    Raises:
        ValueError, OSError: a file is missing or can not be used, the gRPC port is taken.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(http_socket.close)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        router = Router(spec, group.create_task, clock or SystemClock(), on_serving)
        await router.kserve.start(spec.host, spec.grpc_port)
        server = _Server(
            uvicorn.Config(
                router.http,
                http=BoundedHttp,
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=1,
                timeout_keep_alive=75,
            )
        )
        http = group.create_task(server.serve(sockets=[http_socket]), name="http")
        try:
            yield router
        finally:
            router.close()
            server.should_exit = True
            await router.kserve.stop()
            await http


class _Server(uvicorn.Server):  # type: ignore[misc]  # mypy does not follow uvicorn
    """Signals are the process's business, not the server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
