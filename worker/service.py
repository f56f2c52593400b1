"""The worker's gRPC service: sessions with routers and status. The one place where a worker's errors become statuses."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol

import grpc

from protos import worker_pb2 as pb
from worker import codec

log = logging.getLogger(__name__)

PROTOCOL: Final = 1
_HELLO_TIMEOUT_S: Final = 5.0
_MAX_PENDING: Final = 200_000
_LEADER_SILENT_S: Final = 2.0


class LeaderLink(Protocol):
    """What the service needs of its leader. Everything but `status` returns at once."""

    @property
    def hello(self) -> dict[str, Any]:
        """What the leader said of itself at its start."""
        ...

    @property
    def load(self) -> tuple[int, int, int, int]:
        """(progress, running, waiting, available blocks) as of the last tick."""
        ...

    @property
    def silent_s(self) -> float:
        """Seconds since the leader last said anything."""
        ...

    def tell(self, *message: Any) -> None:
        """Queue one command."""
        ...

    async def status(self) -> dict[str, dict[str, Any]]:
        """The leader's own account. Raises TimeoutError after 2 s."""
        ...


class RouterSession:
    """What waits for one router. A router that stalls gets one larger message later, not many queued ones."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.ready = asyncio.Event()
        self.overflowed = False
        self._pending = pb.StepEvents()
        self._size = 0

    def push(self, items: list[list[Any]]) -> None:
        """Add what one step produced. Never blocks."""
        if self._size > _MAX_PENDING:
            self.overflowed = True
        else:
            self._size += len(items)
            for item in items:
                self._add(item)
        self.ready.set()

    def take(self) -> pb.StepEvents | None:
        """Everything since the last call."""
        self.ready.clear()
        if not self._size:
            return None
        pending, self._pending, self._size = self._pending, pb.StepEvents(), 0
        return pending

    def _add(self, item: list[Any]) -> None:
        pending = self._pending
        match item:
            case ["token", token]:
                pending.tokens.append(codec.token_to_proto(token))
            case ["failed", attempt_id, code, message, retry_after_s]:
                pending.failed.add(attempt_id=attempt_id, code=code, message=message, retry_after_s=retry_after_s)
            case ["refused", attempt_id, worker_id, code, message]:
                pending.refused.add(attempt_id=attempt_id, worker_id=worker_id, code=code, message=message)
            case ["timeline", attempt_id, moments, kv_bytes, transport, num_cached]:
                timeline = pending.timelines.add(
                    attempt_id=attempt_id, kv_bytes=kv_bytes, transport=transport, num_cached_tokens=num_cached
                )
                for name, at_s in moments.items():
                    timeline.moments.add(name=name, at_s=at_s)
            case _:
                raise AssertionError(f"unknown event {item[:1]}")


class WorkerService:
    """Implements baton.worker.v1.Worker. One instance per front; event loop only."""

    def __init__(
        self, leader: LeaderLink, *, worker_id: str, incarnation: str, role: str, tp_size: int, heartbeat_s: float
    ) -> None:
        self._leader = leader
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._role = role
        self._tp_size = tp_size
        self._heartbeat_s = heartbeat_s
        self._started = time.monotonic()
        self._sessions: dict[str, RouterSession] = {}
        self._is_draining = False

    def drain(self) -> None:
        """Take nothing new from here on; routers hear of it with the next heartbeat."""
        self._is_draining = True
        self._leader.tell("drain")

    async def is_idle(self) -> bool:
        """Whether nothing runs or moves here any more. Raises TimeoutError if the leader does not say."""
        status = await self._leader.status()
        transfers = {kind: count for kind, count in status["transfers"].items() if kind != "links"}
        return not any(status["sequences"].values()) and not any(transfers.values())

    def push(self, router_id: str, items: list[list[Any]]) -> None:
        """Events for a router; dropped if it has no session (its attempts are being aborted)."""
        session = self._sessions.get(router_id)
        if session is not None:
            session.push(items)

    async def Session(  # noqa: N802  (the protocol's name)
        self, requests: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerMessage]:
        """Serve one router until either side ends the stream; then all its attempts here are aborted."""
        session = await self._greet(requests, context)
        reader = asyncio.create_task(self._read(session, requests))
        try:
            yield pb.WorkerMessage(hello=self._hello())
            beat_at = 0.0
            while not reader.done():
                now = time.monotonic()
                if now >= beat_at and self._leader.silent_s < _LEADER_SILENT_S:
                    beat_at = now + self._heartbeat_s
                    yield pb.WorkerMessage(heartbeat=self._heartbeat())
                try:
                    async with asyncio.timeout(min(self._heartbeat_s, max(0.01, beat_at - now))):
                        await session.ready.wait()
                except TimeoutError:
                    continue
                if session.overflowed or self._sessions.get(session.router_id) is not session:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the session was replaced or too slow")
                if (events := session.take()) is not None:
                    yield pb.WorkerMessage(step=events)
            if (error := reader.exception()) is not None:
                log.warning(
                    "session ended by a bad message", extra={"router_id": session.router_id, "error": str(error)}
                )
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            reader.cancel()
            if self._sessions.get(session.router_id) is session:
                del self._sessions[session.router_id]
                self._leader.tell("router_gone", session.router_id)

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.WorkerStatus:
        """Blocks, sequences and transfers, as the leader counts them between two steps."""
        try:
            status = await self._leader.status()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the engine did not answer within 2 s")
            raise AssertionError("abort raises") from None
        return pb.WorkerStatus(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            role=self._role,
            tp_size=self._tp_size,
            blocks=status["blocks"],
            sequences=status["sequences"],
            transfers=status["transfers"],
            peers=status["peers"],
            counters=status["counters"],
            num_sessions=len(self._sessions),
            pids=self._leader.hello["pids"],
            uptime_s=time.monotonic() - self._started,
        )

    async def _greet(
        self, requests: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> RouterSession:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(aiter(requests))
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no hello came")
            raise AssertionError("abort raises") from None
        if self._leader.silent_s >= _LEADER_SILENT_S:  # or routers would send it requests until they miss a heartbeat
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is silent")
        hello = first.hello
        if first.WhichOneof("kind") != "hello" or not hello.router_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello with a router_id")
        if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker speaks protocol {PROTOCOL}, the router {hello.protocol_min}..{hello.protocol_max}",
            )
        old = self._sessions.get(hello.router_id)
        if old is not None:
            self._leader.tell("router_gone", hello.router_id)
        session = RouterSession(hello.router_id)
        self._sessions[hello.router_id] = session
        if old is not None:
            old.ready.set()
        self._leader.tell("router_here", hello.router_id)
        return session

    async def _read(self, session: RouterSession, requests: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in requests:
                match message.WhichOneof("kind"):
                    case "start":
                        start = message.start
                        peer = codec.pack_peer(codec.peer_from_proto(start.decode_peer))
                        self._leader.tell(
                            "start",
                            session.router_id,
                            codec.pack_request(codec.request_from_proto(start)),
                            peer if start.HasField("decode_peer") else None,
                        )
                    case "abort":
                        self._leader.tell("abort", message.abort.attempt_id)
                    case "redirect":
                        peer = codec.pack_peer(codec.peer_from_proto(message.redirect.decode_peer))
                        self._leader.tell("redirect", message.redirect.attempt_id, peer)
                    case kind:
                        raise ValueError(f"unexpected message {kind}")
        finally:
            session.ready.set()

    def _hello(self) -> pb.WorkerHello:
        hello = self._leader.hello
        return pb.WorkerHello(
            protocol=PROTOCOL,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            role=self._role,
            tp_size=self._tp_size,
            fingerprint=hello["fingerprint"],
            kv_dtype=hello["kv_dtype"],
            max_model_len=hello["max_model_len"],
            block_size=hello["block_size"],
            num_blocks=hello["num_blocks"],
            vocab_size=hello["vocab_size"],
            max_num_seqs=hello["max_num_seqs"],
            clock_id=hello["clock_id"],
            now_s=time.monotonic(),
            ranks=[
                pb.RankAddress(tp_rank=rank, host=host, port=port, unix_path=path)
                for rank, host, port, path in hello["ranks"]
            ],
        )

    def _heartbeat(self) -> pb.Heartbeat:
        progress, running, waiting, available = self._leader.load
        return pb.Heartbeat(
            progress=progress,
            now_s=time.monotonic(),
            num_running=running,
            num_waiting=waiting,
            num_free_blocks=available,
            draining=self._is_draining,
        )


class TokenAuth(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call without the cluster's bearer token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

        async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong cluster token")

        async def refuse_stream(requests: object, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong cluster token")

        self._refuse = grpc.unary_unary_rpc_method_handler(refuse)
        self._refuse_stream = grpc.stream_stream_rpc_method_handler(refuse_stream)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Called by gRPC before each call's handler."""
        given = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        if hmac.compare_digest(str(given).encode(), self._token):
            return await continuation(details)
        handler = await continuation(details)
        return self._refuse_stream if handler is not None and handler.request_streaming else self._refuse
