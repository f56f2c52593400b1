"""One worker as this router sees it: a long-lived session, its health, its load.

Events of the session are handed to the attempt that they name; a worker that falls silent or whose stream breaks takes
its attempts with it at once. Knows the internal protocol; knows no text and no retries. Event loop only.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import random
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc.aio

from baton.clock import Clock
from baton.errors import WorkerLost
from baton.process import clock_id
from baton.tls import SERVER_NAME, ClusterIdentity
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerStub
from router.placement import KVPath, PrefixMemory, WorkerKey, WorkerView

logger = logging.getLogger("router")

PROTOCOL: Final = 1
SILENCE_S: Final = 1.5  # three heartbeats
_HELLO_S: Final = 3.0
_LEFT: Final = "it left the fleet"
_MAX_OUTBOX: Final = 20_000  # messages; a worker that reads that slowly is lost
_BACKOFF_S: Final = (0.05, 1.0)
_CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not wait out an old one's back-off
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.enable_http_proxy", 0),
)


class AttemptSink(Protocol):
    """What a session's reader calls for one attempt. Never blocks, never raises, never awaits."""

    def on_token(self, link: WorkerLink, token: pb.Token) -> None: ...

    def on_failed(self, link: WorkerLink, failed: pb.AttemptFailed) -> None: ...

    def on_refused(self, link: WorkerLink, refused: pb.ReserveRefused) -> None: ...

    def on_timeline(self, link: WorkerLink, timeline: pb.Timeline) -> None: ...

    def on_path_broken(self, path: KVPath) -> None:
        """Another attempt's KV did not get through, from this worker."""
        ...

    def on_lost(self, link: WorkerLink, error: WorkerLost) -> None:
        """The worker is dead; `link` has forgotten the attempt."""
        ...


class WorkerLink:
    """One worker: connects and reconnects for as long as `run` runs.

    An attempt is open from `open` until `close`, `on_lost`, or both; its sink hears nothing before and after.
    """

    def __init__(
        self,
        worker_id: str,
        address: str,
        *,
        token: str,
        router_id: str,
        clock: Clock,
        on_change: Callable[[], None],
        silence_s: float = SILENCE_S,
        identity: ClusterIdentity | None = None,
    ) -> None:
        """`identity`: speak TLS with the worker. `on_change` hears that the worker came, went, or started or stopped draining."""
        self.worker_id = worker_id
        self.address = address
        self.hello: pb.WorkerHello | None = None  # not None: connected
        self.heartbeat = pb.Heartbeat()
        self.why_lost = "not connected yet"
        self.num_routed = 0
        self.num_stale_tokens = 0
        self.prefixes = PrefixMemory(1)
        self._metadata = (("authorization", token),)
        self._router_id = router_id
        self._clock = clock
        self._on_change = on_change
        self._silence_s = silence_s
        self._identity = identity
        self._sinks: dict[str, AttemptSink] = {}
        self._prefill_tokens: dict[str, int] = {}  # attempt -> prompt tokens sent and not yet computed
        self._blocks: dict[str, int] = {}  # attempt -> KV blocks that it was predicted to need here
        self._outbox: collections.deque[pb.RouterMessage] = collections.deque()
        self._has_outgoing = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._heard_at = 0.0
        self._clock_offset_s = 0.0
        self._least_clock_offset_s = 0.0

    # ---- what the dispatcher uses

    @property
    def key(self) -> WorkerKey:
        """This start of the worker; only while connected."""
        assert self.hello is not None
        return WorkerKey(self.worker_id, self.hello.incarnation)

    @property
    def num_open(self) -> int:
        """Attempts whose events still have a sink."""
        return len(self._sinks)

    @property
    def is_usable(self) -> bool:
        """May it be given new attempts?"""
        return self.hello is not None and not self.heartbeat.draining

    def open(self, attempt_id: str, sink: AttemptSink, *, prefill_tokens: int, kv_tokens: int) -> None:
        """Route an attempt's events to `sink` and count its predicted load.

        Raises:
            WorkerLost: not connected.
        """
        if self.hello is None:
            raise WorkerLost(f"Worker {self.worker_id} is gone: {self.why_lost}.")
        self._sinks[attempt_id] = sink
        self.num_routed += 1
        if prefill_tokens:
            self._prefill_tokens[attempt_id] = prefill_tokens
        if kv_tokens:
            self._blocks[attempt_id] = math.ceil((kv_tokens + 1) / self.hello.block_size)

    def prefilled(self, attempt_id: str) -> None:
        """The attempt's prompt is computed. Idempotent."""
        self._prefill_tokens.pop(attempt_id, None)

    def released(self, attempt_id: str) -> None:
        """The attempt's load is gone from here; late messages still reach its sink. Idempotent."""
        self._prefill_tokens.pop(attempt_id, None)
        self._blocks.pop(attempt_id, None)

    def close(self, attempt_id: str) -> None:
        """Forget an attempt. Idempotent."""
        self.released(attempt_id)
        self._sinks.pop(attempt_id, None)

    def path_broke(self, path: KVPath) -> None:
        """KV does not get from here to `path.decode`: all open attempts hear of it."""
        for sink in list(self._sinks.values()):
            sink.on_path_broken(path)

    def send(self, message: pb.RouterMessage) -> None:
        """Put a message into the outbox; dropped if the worker is gone (its attempts have heard so)."""
        if self.hello is not None:
            self._outbox.append(message)
            self._has_outgoing.set()

    def to_router_time(self, at_s: float) -> float:
        """A moment of the worker's clock on the router's."""
        return at_s + self._clock_offset_s

    @property
    def clock_error_s(self) -> float:
        """How much too late `to_router_time` may be: never more than the shortest delay seen plus the hello's."""
        return self._clock_offset_s - self._least_clock_offset_s

    def view(self) -> WorkerView:
        """For placement. Own bookkeeping is immediate but blind to other routers; heartbeats see all, but late."""
        assert self.hello is not None
        beat = self.heartbeat
        own_blocks = sum(self._blocks.values())
        return WorkerView(
            key=self.key,
            role=self.hello.role,
            fingerprint=self.hello.fingerprint,
            kv_dtype=self.hello.kv_dtype,
            block_size=max(1, self.hello.block_size),
            num_blocks=self.hello.num_blocks,
            max_num_seqs=self.hello.max_num_seqs,
            is_draining=not self.is_usable,
            num_waiting_tokens=max(beat.num_waiting_tokens, sum(self._prefill_tokens.values())),
            num_seqs=max(beat.num_running + beat.num_waiting, len(self._blocks)),
            num_free_blocks=min(beat.num_free_blocks, max(0, self.hello.num_blocks - own_blocks)),
            num_routed=self.num_routed,
        )

    async def get_status(self, timeout_s: float) -> pb.WorkerStatus:
        """Ask the worker about itself.

        Raises:
            WorkerLost: it does not answer.
        """
        if self._channel is None:
            raise WorkerLost(self.why_lost)
        try:
            status: pb.WorkerStatus = await _stub(self._channel).GetStatus(
                pb.GetStatusRequest(), metadata=self._metadata, timeout=timeout_s
            )
            return status
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost("its connection was closed") from None  # by `run`: that cancels the call, not the caller
        except grpc.aio.AioRpcError as error:
            raise WorkerLost(f"{error.code().name}: {error.details()}") from error

    # ---- the session

    async def run(self) -> None:
        """Keep a session until cancelled."""
        delay_s = _BACKOFF_S[0]
        try:
            while True:
                try:
                    await self._session()
                except WorkerLost as error:
                    if self.hello is not None:
                        delay_s = _BACKOFF_S[0]
                    self._lose(error.message)
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    return  # cancelled while the session failed: its TaskGroup reports only the failure
                await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
                delay_s = min(delay_s * 2, _BACKOFF_S[1])
        finally:
            self._lose(_LEFT)

    async def _session(self) -> None:
        """Connect, and read until it ends, which is always by WorkerLost (or cancellation)."""
        async with _open_channel(self.address, self._identity) as channel:
            call = _stub(channel).Session(metadata=self._metadata)
            try:
                asked_at = self._clock.now()
                self._connected(await self._greet(call), channel, asked_at)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write(call))
                    group.create_task(self._watch())
                    while (message := await call.read()) is not grpc.aio.EOF:
                        self._heard_at = self._clock.now()
                        try:
                            self._dispatch(message)
                        except ValueError as error:
                            raise WorkerLost(f"it sent what it must not: {error}") from error
                    raise WorkerLost("it closed the session")
            except (grpc.aio.AioRpcError, ExceptionGroup) as error:
                lost = _worker_lost(error)
                raise (lost if self.hello is not None else _explained(lost)) from error
            finally:
                self._channel = None
                call.cancel()

    async def _greet(self, call: Any) -> pb.WorkerHello:
        own = pb.RouterHello(protocol_min=PROTOCOL, protocol_max=PROTOCOL, router_id=self._router_id)
        try:
            async with asyncio.timeout(_HELLO_S):
                await call.write(pb.RouterMessage(hello=own))
                message = await call.read()
        except TimeoutError:
            raise WorkerLost("no hello") from None
        if message is grpc.aio.EOF:
            raise WorkerLost("it closed the session before its hello")
        if not message.HasField("hello") or message.hello.protocol != PROTOCOL:
            raise WorkerLost(f"it speaks protocol {message.hello.protocol}, this router {PROTOCOL}")
        if message.hello.worker_id != self.worker_id:
            raise WorkerLost(f"{self.address} answers as {message.hello.worker_id!r}")
        hello: pb.WorkerHello = message.hello
        return hello

    def _connected(self, hello: pb.WorkerHello, channel: grpc.aio.Channel, asked_at: float) -> None:
        now = self._clock.now()
        if hello.block_size:
            self.prefixes = PrefixMemory(hello.num_blocks * hello.block_size // 16)
        self.hello = hello
        self.heartbeat = pb.Heartbeat(num_free_blocks=hello.num_blocks)
        self._channel = channel
        self._heard_at = now
        is_one_clock = hello.clock_id == clock_id()
        self._clock_offset_s = 0.0 if is_one_clock else now - hello.now_s
        self._least_clock_offset_s = 0.0 if is_one_clock else asked_at - hello.now_s
        self._outbox.clear()
        self._has_outgoing.clear()
        logger.info(
            "worker connected",
            extra={
                "worker_id": self.worker_id,
                "incarnation": hello.incarnation,
                "worker_role": hello.role,
                "tp_size": hello.tp_size,
                "address": self.address,
            },
        )
        self._on_change()

    def _lose(self, reason: str) -> None:
        if self.hello is None:
            if reason not in (self.why_lost, _LEFT):
                self.why_lost = reason
                self._on_change()  # it says why nothing can be served
            return
        level = logging.INFO if reason == _LEFT else logging.WARNING
        logger.log(
            level, "worker lost", extra={"worker_id": self.worker_id, "reason": reason, "attempts": len(self._sinks)}
        )
        self.why_lost = reason
        sinks, self._sinks = self._sinks, {}
        self._prefill_tokens.clear()
        self._blocks.clear()
        self._outbox.clear()
        error = WorkerLost(f"Worker {self.worker_id} was lost: {reason}.")
        for sink in sinks.values():
            sink.on_lost(self, error)
        self.hello = None
        self._on_change()

    async def _write(self, call: Any) -> None:
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing.clear()
            while self._outbox:
                if len(self._outbox) > _MAX_OUTBOX:
                    raise WorkerLost("it does not read")
                try:
                    await call.write(self._outbox.popleft())
                except asyncio.InvalidStateError:  # the call is over: the reader finds out why
                    return

    async def _watch(self) -> None:
        """End the session of a worker that is silent; one whose engine hangs falls silent too."""
        while True:
            due = self._heard_at + self._silence_s
            asked_s = max(0.01, due - self._clock.now())
            asleep = self._clock.now()
            await asyncio.sleep(asked_s)
            now = self._clock.now()
            if now - asleep > asked_s + 0.5:
                # This process stood still: what the worker said meanwhile is not read yet.
                self._heard_at = now
                continue
            if now - self._heard_at >= self._silence_s:
                raise WorkerLost(f"silent for {now - self._heard_at:.1f} s")

    def _dispatch(self, message: pb.WorkerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "step":
            step, sinks = message.step, self._sinks
            # Moments first: they are complete when the token that ends a request is handed on.
            for timeline in step.timelines:
                if sink := sinks.get(timeline.attempt_id):
                    sink.on_timeline(self, timeline)
            for token in step.tokens:
                if sink := sinks.get(token.attempt_id):
                    sink.on_token(self, token)
                else:
                    self.num_stale_tokens += 1
            for refused in step.refused:
                if sink := sinks.get(refused.attempt_id):
                    sink.on_refused(self, refused)
            for failed in step.failed:
                if sink := sinks.get(failed.attempt_id):
                    sink.on_failed(self, failed)
        elif kind == "heartbeat":
            self._beat(message.heartbeat)

    def _beat(self, beat: pb.Heartbeat) -> None:
        assert self.hello is not None
        now, last = self._clock.now(), self.heartbeat
        if self.hello.clock_id != clock_id():
            # The least delayed message is the best estimate: delays only ever add.
            self._clock_offset_s = min(self._clock_offset_s, now - beat.now_s)
        self.heartbeat = beat
        if beat.draining != last.draining:
            logger.info("worker draining", extra={"worker_id": self.worker_id, "draining": beat.draining})
            self._on_change()


def _open_channel(address: str, identity: ClusterIdentity | None) -> grpc.aio.Channel:
    if identity is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    keys = grpc.ssl_channel_credentials(identity.authority_pem, identity.private_key_pem, identity.certificate_pem)
    options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME))
    return grpc.aio.secure_channel(address, keys, options=options)


def _explained(error: WorkerLost) -> WorkerLost:
    """Why a session did not begin, where the words of TLS do not say it."""
    hints = {
        "WRONG_VERSION_NUMBER": "it does not encrypt, this router does (cluster.encryption)",
        "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this cluster: it holds another secret",
        "Socket closed": "perhaps it encrypts and this router does not (cluster.encryption)",
    }
    found = next((hint for words, hint in hints.items() if words in error.message), None)
    return error if found is None else WorkerLost(f"{found}: {error.message}")


def _stub(channel: grpc.aio.Channel) -> Any:
    return WorkerStub(channel)  # type: ignore[no-untyped-call]  # generated code has no annotations


def _worker_lost(error: BaseException) -> WorkerLost:
    """What ended a session, as ours; anything unforeseen is a bug and is raised."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return WorkerLost(f"{error.code().name}: {error.details()}")
    if isinstance(error, WorkerLost):
        return error
    raise error
