"""The front process of a worker: asyncio and gRPC, so that network Python never holds the engine's GIL."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from typing import Any

import grpc
import zmq
import zmq.asyncio

from baton import auth, log
from baton.process import ParentLink
from baton.specs import FrontSpec, decode_secret, from_json
from baton.tls import make_identity
from protos import worker_pb2_grpc
from worker.channel import configure, endpoint, pack, unpack
from worker.service import TokenAuth, WorkerService

_STATUS_TIMEOUT_S = 2.0
_LOOK_AGAIN_S = 0.5


class _Leader:
    """The front's end of the channel to rank 0. Implements worker.service.LeaderLink."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._outgoing: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue(100_000)
        self._queries: dict[int, asyncio.Future[dict[str, dict[str, Any]]]] = {}
        self._query_ids = itertools.count()
        self._heard_at = time.monotonic()
        self.hello: dict[str, Any] = {}
        self.load: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard_at

    def tell(self, *message: Any) -> None:
        self._outgoing.put_nowait(message)

    async def status(self) -> dict[str, dict[str, Any]]:
        query_id = next(self._query_ids)
        answer: asyncio.Future[dict[str, dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._queries[query_id] = answer
        self.tell("status", query_id)
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await answer
        finally:
            del self._queries[query_id]

    async def receive_hello(self) -> None:
        kind, hello = unpack(await self._socket.recv())
        assert kind == "hello"
        self.hello = {**hello, "pids": [os.getpid(), *hello["pids"]]}
        self.load = (0, 0, 0, hello["num_blocks"])  # routers place by it before the first tick
        self._heard_at = time.monotonic()

    async def send_loop(self) -> None:
        while True:
            await self._socket.send(pack(await self._outgoing.get()))

    async def receive_loop(self, service: WorkerService) -> None:
        while True:
            message = unpack(await self._socket.recv())
            self._heard_at = time.monotonic()
            match message:
                case ["events", by_router]:
                    for router_id, items in by_router.items():
                        service.push(router_id, items)
                case ["tick", progress, running, waiting, available]:
                    self.load = (progress, running, waiting, available)
                case ["status", query_id, status]:
                    if (answer := self._queries.get(query_id)) is not None and not answer.done():
                        answer.set_result(status)
                case _:
                    raise AssertionError(f"unknown message {message[:1]}")


def main() -> None:
    """Run the front until the parent closes its end. The parent's first line carries the FrontSpec."""
    link = ParentLink()
    message = link.read()
    if message is None:
        return
    spec = from_json(FrontSpec, message["spec"])
    log.setup(spec.log_level, role=spec.role, worker_id=spec.worker_id)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_serve(spec, link))


def server_credentials(secret: bytes) -> grpc.ServerCredentials:
    """TLS with certificates on both sides: only processes of the cluster that `secret` defines are let in."""
    identity = make_identity(secret)
    keys = [(identity.private_key_pem, identity.certificate_pem)]
    return grpc.ssl_server_credentials(keys, identity.authority_pem, require_client_auth=True)


async def _serve(spec: FrontSpec, link: ParentLink) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the supervisor decides what Ctrl-C means

    def parent_gone() -> None:
        loop.call_soon_threadsafe(stopped.set)

    drain_asked = asyncio.Event()

    def on_message(message: dict[str, Any]) -> None:
        if message["event"] == "drain":
            loop.call_soon_threadsafe(drain_asked.set)

    link.watch(on_message, parent_gone)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PAIR)
    configure(socket)
    socket.bind(endpoint(spec.worker_dir, "front"))
    leader = _Leader(socket)
    began = time.monotonic()
    secret = decode_secret(spec.secret)
    server = grpc.aio.server(
        interceptors=[TokenAuth(auth.worker_token(secret))],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", 64 * 2**20),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    try:
        waiting = asyncio.create_task(leader.receive_hello())
        ended = asyncio.create_task(stopped.wait())
        await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            return
        waiting.result()
        service = WorkerService(
            leader,
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            role=spec.role,
            tp_size=spec.tp_size,
            heartbeat_s=spec.heartbeat_s,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        address = f"{spec.host}:{spec.port}"
        if spec.encrypt:
            port = server.add_secure_port(address, server_credentials(secret))
        else:
            port = server.add_insecure_port(address)
        await server.start()
        link.report(
            "ready",
            worker_id=spec.worker_id,
            address=f"{spec.host}:{port}",
            transfer=leader.hello["ranks"],
            timings={"wait_for_ranks": round(time.monotonic() - began, 3)},
        )
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(leader.send_loop()),
                tasks.create_task(leader.receive_loop(service)),
                tasks.create_task(_drain(drain_asked, service, link)),
            ]
            await ended
            await server.stop(0.2)
            for task in loops:
                task.cancel()
    finally:
        socket.close(linger=0)
        context.destroy(linger=0)


async def _drain(asked: asyncio.Event, service: WorkerService, link: ParentLink) -> None:
    """Once asked, take nothing new, and report when what runs has ended."""
    await asked.wait()
    service.drain()
    is_idle = False
    while not is_idle:
        await asyncio.sleep(_LOOK_AGAIN_S)  # the first router's heartbeat must be out, too
        with contextlib.suppress(TimeoutError):
            is_idle = await service.is_idle()
    link.report("drained")
