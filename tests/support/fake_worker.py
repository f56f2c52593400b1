"""Workers without engines: a real gRPC server that speaks the internal protocol and does what a script says.

The generated tokens are a pure function of the prompt (`tokens_of`), whoever computes them, so a test knows what a
client must get however often the request moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # servers die here on purpose

import grpc.aio
import httpx

from baton.auth import worker_token
from baton.process import clock_id
from baton.specs import RouterSpec, encode_secret
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from router.app import Router, serving
from worker.front import server_credentials

SECRET = b"0123456789abcdef"
EOS = 0
_LAST_WORDS = object()


def tokens_of(prompt: Sequence[int], count: int) -> list[int]:
    """What every fake worker generates: the prompt, round and round."""
    return [prompt[index % len(prompt)] for index in range(count)]


@dataclass
class Script:
    """What a worker does besides working. Indices count output tokens of the request."""

    gate_at: int | None = None  # wait for FakeWorker.gate before this token
    die_at: int | None = None  # the server ends before this token
    hang_up_at: int | None = None  # the session ends before this token, the server stays
    repeat: bool = False  # every token twice
    skip: int | None = None  # this token is never sent
    eos_at: int | None = None  # this token is EOS and the last
    fail_at: tuple[int, str] | None = None  # (index, error code): the attempt fails before this token
    refuse: int = 0  # so many reservations are refused
    cut_off_from: tuple[str, ...] = ()  # KV does not get from here to these workers
    mute: bool = False  # no heartbeats
    timeline: bool = True  # moments are sent
    late_timeline: bool = False  # ... in a message after the last token
    burst: bool = False  # all tokens in one step message


@dataclass(eq=False)
class FakeWorker:
    """One worker of a `FakeCluster`. All on the test's event loop."""

    cluster: FakeCluster
    worker_id: str
    role: str
    script: Script = field(default_factory=Script)
    incarnation: str = "1"
    fingerprint: str = "model-1"
    kv_dtype: str = "float32"
    max_model_len: int = 4096
    num_blocks: int = 512
    protocol: int = 1
    port: int = 0
    tls_secret: bytes | None = None
    clock_shift_s: float = 0.0
    """How far its clock, another machine's, is ahead; 0: the same clock."""

    def __post_init__(self) -> None:
        self.started: list[pb.StartAttempt] = []
        self.reserved: list[str] = []
        self.aborted: list[str] = []
        self.tokens: list[str] = []
        self.gate = asyncio.Event()
        self.changed = asyncio.Condition()
        self.num_sessions = 0
        self.draining = False
        self._sessions: dict[str, _Session] = {}
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> set[str]:
        """Attempts that it works on."""
        return {attempt for session in self._sessions.values() for attempt in session.tasks}

    async def start(self) -> None:
        """Listen."""
        server = grpc.aio.server()
        add_WorkerServicer_to_server(_Service(self), server)
        if self.tls_secret is None:
            self.port = server.add_insecure_port(self.address)
        else:
            self.port = server.add_secure_port(self.address, server_credentials(self.tls_secret))
        await server.start()
        self._server = server

    async def die(self) -> None:
        """Every connection breaks at once."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def restart(self) -> None:
        """Die, and come back as a new start on the same port."""
        await self.die()
        self.incarnation += "+"
        self.script = Script()
        await self.start()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that happens at this worker."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)

    def now(self) -> float:
        """On its clock."""
        return asyncio.get_running_loop().time() + self.clock_shift_s

    async def notify(self) -> None:
        """Something happened."""
        async with self.changed:
            self.changed.notify_all()

    def beat(self) -> None:
        """Send a heartbeat now, besides the regular ones."""
        for session in self._sessions.values():
            session.send(heartbeat=session.heartbeat())


class FakeCluster:
    """Workers that know each other, as prefill and decode workers do."""

    def __init__(self) -> None:
        self.workers: dict[str, FakeWorker] = {}

    def add(self, worker_id: str, role: str, **options: Any) -> FakeWorker:
        """A worker that is still to be started."""
        worker = self.workers[worker_id] = FakeWorker(self, worker_id, role, **options)
        return worker

    def fleet(self) -> list[dict[str, str]]:
        """As the launcher names it to routers."""
        return [{"worker_id": worker.worker_id, "address": worker.address} for worker in self.workers.values()]


class _Service(WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Session(self, requests: AsyncIterator[pb.RouterMessage], context: Any) -> None:  # noqa: N802
        await _authorize(context)
        worker = self._worker
        hello = (await anext(requests)).hello
        session = _Session(worker, context)
        session.send(hello=session.hello())
        session.send(heartbeat=session.heartbeat())
        worker._sessions[hello.router_id] = session
        worker.num_sessions += 1
        await worker.notify()
        try:
            async with asyncio.TaskGroup() as group:
                session.group = group
                group.create_task(session.write())
                group.create_task(session.beat())
                async for message in requests:
                    await session.on_message(hello.router_id, message)
                raise _HungUp
        except* _HungUp:
            pass
        finally:
            worker._sessions.pop(hello.router_id, None)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.WorkerStatus:  # noqa: N802
        await _authorize(context)
        worker = self._worker
        return pb.WorkerStatus(
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            role=worker.role,
            tp_size=1,
            blocks={"free": worker.num_blocks},
            sequences={"running": len(worker.running)},
            counters={"kv_integrity_failures": 0, "prefix_hit_tokens": 16},
            pids=[4711],
        )


class _HungUp(Exception):
    pass


async def _authorize(context: Any) -> None:
    if dict(context.invocation_metadata()).get("authorization") != worker_token(SECRET):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong cluster secret")


class _Session:
    """One router at one worker."""

    def __init__(self, worker: FakeWorker, context: Any) -> None:
        self.worker = worker
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.group: asyncio.TaskGroup | None = None
        self._context = context
        self._outbox: asyncio.Queue[pb.WorkerMessage | object] = asyncio.Queue()

    def send(self, **kind: Any) -> None:
        self._outbox.put_nowait(pb.WorkerMessage(**kind))

    def hello(self) -> pb.WorkerHello:
        worker = self.worker
        return pb.WorkerHello(
            protocol=worker.protocol,
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            role=worker.role,
            tp_size=1,
            fingerprint=worker.fingerprint,
            kv_dtype=worker.kv_dtype,
            max_model_len=worker.max_model_len,
            block_size=16,
            num_blocks=worker.num_blocks,
            vocab_size=1024,
            clock_id="elsewhere" if worker.clock_shift_s else clock_id(),
            now_s=worker.now(),
            max_num_seqs=64,
        )

    def heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(
            progress=len(self.worker.tokens),
            now_s=self.worker.now(),
            num_running=len(self.tasks),
            num_free_blocks=self.worker.num_blocks,
            draining=self.worker.draining,
        )

    async def write(self) -> None:
        while True:
            message = await self._outbox.get()
            if message is _LAST_WORDS:
                raise _HungUp
            await self._context.write(message)

    async def beat(self) -> None:
        while not self.worker.script.mute:
            await asyncio.sleep(0.5)
            self.send(heartbeat=self.heartbeat())

    async def on_message(self, router_id: str, message: pb.RouterMessage) -> None:
        worker, kind = self.worker, message.WhichOneof("kind")
        if kind == "start":
            worker.started.append(message.start)
            self.run(message.start.attempt_id, functools.partial(self.prefill, router_id, message.start))
        elif kind == "abort":
            worker.aborted.append(message.abort.attempt_id)
            task = self.tasks.pop(message.abort.attempt_id, None)
            if task is not None:
                task.cancel()
        elif kind == "redirect":
            start = next(s for s in worker.started if s.attempt_id == message.redirect.attempt_id)
            again = pb.StartAttempt()
            again.CopyFrom(start)
            again.decode_peer.CopyFrom(message.redirect.decode_peer)
            self.run(start.attempt_id, functools.partial(self.hand_over, router_id, again))
        await worker.notify()

    def run(self, attempt_id: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        async def tracked() -> None:  # makes the coroutine itself: a task may be cancelled before it begins
            try:
                await work()
            finally:
                if self.tasks.get(attempt_id) is asyncio.current_task():
                    del self.tasks[attempt_id]
                await asyncio.shield(self.worker.notify())

        assert self.group is not None
        self.tasks[attempt_id] = self.group.create_task(tracked())

    # ---- the work

    async def prefill(self, router_id: str, start: pb.StartAttempt) -> None:
        base = len(start.token_ids) - start.num_prompt_tokens
        expected = tokens_of(start.token_ids[: start.num_prompt_tokens], base)
        assert list(start.token_ids[start.num_prompt_tokens :]) == expected, "delivered tokens came back wrong"
        if not start.HasField("decode_peer"):
            await self.generate(start, base, ["prefill_begin", "prefill_end"])
            return
        is_over = await self.generate(start, base, ["prefill_begin", "prefill_end", "kv_begin", "kv_end"], count=1)
        if not is_over:
            await self.hand_over(router_id, start)

    async def hand_over(self, router_id: str, start: pb.StartAttempt) -> None:
        peer = self.worker.cluster.workers[start.decode_peer.worker_id]
        peer.reserved.append(start.attempt_id)
        is_cut_off = peer.worker_id in self.worker.script.cut_off_from
        if is_cut_off or peer.script.refuse > 0:
            peer.script.refuse -= not is_cut_off
            code = "kv_transfer_failed" if is_cut_off else "overloaded"
            refused = pb.ReserveRefused(
                attempt_id=start.attempt_id, worker_id=peer.worker_id, code=code, message="as scripted"
            )
            self.send(step=pb.StepEvents(refused=[refused]))
            await peer.notify()
            return
        session = peer._sessions.get(router_id)
        if session is not None and start.attempt_id not in peer.aborted:
            base = len(start.token_ids) - start.num_prompt_tokens
            rest = functools.partial(session.generate, start, base + 1, ["granted", "runnable"])
            session.run(start.attempt_id, rest)

    async def generate(self, start: pb.StartAttempt, begin: int, moments: list[str], count: int | None = None) -> bool:
        """Send tokens from index `begin` on. True if the last of all was among them."""
        worker, script = self.worker, self.worker.script
        prompt, limit = start.token_ids[: start.num_prompt_tokens], start.sampling.max_tokens
        end = limit if count is None else min(limit, begin + count)
        stamps = [pb.Moment(name=name, at_s=worker.now()) for name in ("received", *moments)]
        step = pb.StepEvents()
        for index, token_id in enumerate(tokens_of(prompt, end)[begin:], begin):
            if index == script.gate_at:
                await worker.gate.wait()
            if index == script.die_at:
                await asyncio.shield(worker.die())
            if index == script.hang_up_at:
                self._outbox.put_nowait(_LAST_WORDS)
                return True
            if script.fail_at is not None and script.fail_at[0] == index:
                failed = pb.AttemptFailed(attempt_id=start.attempt_id, code=script.fail_at[1], message="as scripted")
                self.send(step=pb.StepEvents(failed=[failed]))
                return True
            token = pb.Token(attempt_id=start.attempt_id, index=index, token_id=token_id)
            if index == begin:
                token.num_cached_tokens = 16 if len(prompt) > 16 else 0
            if index == script.eos_at:
                token.token_id, token.finish_reason = EOS, "stop"
            elif index == limit - 1:
                token.finish_reason = "length"
            if start.sampling.HasField("num_logprobs"):
                count_top = start.sampling.num_logprobs
                token.logprobs.CopyFrom(
                    pb.Logprobs(
                        logprob=-0.5,
                        rank=1,
                        top_token_ids=range(token_id, token_id + count_top),
                        top_logprobs=[-0.5 - n for n in range(count_top)],
                    )
                )
            worker.tokens.append(start.attempt_id)
            if index != script.skip:
                step.tokens.extend([token] * (2 if script.repeat else 1))
            is_last = bool(token.finish_reason)
            if script.timeline and (index == end - 1 or is_last):
                stamps.append(pb.Moment(name="finished", at_s=worker.now()))
                timeline = pb.Timeline(
                    attempt_id=start.attempt_id, moments=stamps, kv_bytes=1000, transport="tcp", num_cached_tokens=0
                )
                if script.late_timeline:
                    self.send(step=step)
                    step = pb.StepEvents()
                step.timelines.append(timeline)
            if not script.burst or is_last or index == end - 1:
                self.send(step=step)
                step = pb.StepEvents()
                await worker.notify()
                await asyncio.sleep(0)
            if is_last:
                return True
        return False


# ---- a router in front of them


@dataclass
class Site:
    """A router with its workers and a client for it."""

    router: Router
    cluster: FakeCluster
    http: httpx.AsyncClient
    url: str
    serving: asyncio.Event

    @property
    def grpc_address(self) -> str:
        """The public gRPC door."""
        return f"127.0.0.1:{self.router.kserve.port}"

    async def settled(self) -> None:
        """Nothing is left of any request: neither at the router nor, once they have heard of it, at the workers."""
        async with asyncio.timeout(5):
            await self.router.admission.idle()
        self.router.book.flush()
        assert [link.num_open for link in self.router.fleet.links.values() if link.num_open] == []
        for worker in self.cluster.workers.values():
            await worker.until(lambda worker=worker: not worker.running)


@contextlib.asynccontextmanager
async def site(cluster: FakeCluster, *, send_buffer_bytes: int | None = None, **options: Any) -> AsyncIterator[Site]:
    """Start the cluster's workers and a router with `options` in its specification."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # or Nagle costs each answer 40 ms
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    if send_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)  # accepted sockets inherit it
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    spec = dataclasses.replace(
        RouterSpec("router-0", encode_secret(SECRET), "", "fake", port=0, grpc_port=0), **options
    )
    is_serving = asyncio.Event()

    def on_serving(why_not: str | None) -> None:
        if why_not is None:
            is_serving.set()
        else:
            is_serving.clear()

    for worker in cluster.workers.values():
        await worker.start()
    try:
        async with serving(spec, sock, on_serving=on_serving) as router:
            router.set_members(cluster.fleet())
            if cluster.workers:
                async with asyncio.timeout(5):
                    await is_serving.wait()
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                yield Site(router, cluster, client, url, is_serving)
    finally:
        for worker in cluster.workers.values():
            await worker.die()


def pair(prefill: Script | None = None, decode: Script | None = None) -> FakeCluster:
    """One prefill and one decode worker."""
    cluster = FakeCluster()
    cluster.add("prefill-0", "prefill", script=prefill or Script())
    cluster.add("decode-0", "decode", script=decode or Script())
    return cluster
