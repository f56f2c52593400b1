"""A rank process: builds its part of the engine and its transfer endpoint, then becomes leader or follower."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import zmq

from baton import auth, log
from baton.clock import SystemClock
from baton.kv_layout import KVGeometry
from baton.prefix_hash import PrefixHasher
from baton.process import ParentLink, clock_id, fail_start
from baton.specs import RankSpec, decode_secret, from_json
from baton.tls import make_identity
from engine.engine import LocalEngine
from engine.overlap import OverlappingEngine
from engine.types import EngineConfig, Runner
from kvtransfer.api import EndpointConfig, TransferEndpoint
from kvtransfer.endpoint import make_endpoint
from worker import codec
from worker.channel import Channel, endpoint
from worker.follower import Follower
from worker.group import Group, GroupRunner
from worker.hook import TransferHook
from worker.leader import Leader
from worker.model import LoadedModel, load_model
from worker.role import RolePolicy


class _Signals:
    """Two file descriptors that end or wake the engine thread's poll."""

    def __init__(self) -> None:
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def stop(self, *_: object) -> None:
        """Idempotent; callable from any thread and from a signal handler."""
        os.eventfd_write(self.stop_fd, 1)

    def wake(self) -> None:
        """The transfer thread has events."""
        os.eventfd_write(self.wake_fd, 1)


class _Introductions:
    """Connects this rank to the workers that the supervisor names, and reports the links.

    {"event": "peers", "peers": [codec.pack_peer(..), ..]} comes only after this rank has said that it is ready.
    """

    def __init__(self, link: ParentLink) -> None:
        self._link = link
        self._transfers: TransferEndpoint | None = None

    def begin(self, transfers: TransferEndpoint) -> None:
        """From here on there is something to connect."""
        self._transfers = transfers
        transfers.set_on_link(lambda report: self._link.report("link", **asdict(report)))

    def on_message(self, message: dict[str, Any]) -> None:
        """The supervisor said something. On the thread that listens to it."""
        if message["event"] == "peers" and self._transfers is not None:
            for packed in message["peers"]:
                self._transfers.connect(codec.unpack_peer(packed))


class _StepTimer:
    def __init__(self) -> None:
        self.timings: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.timings[name] = round(time.monotonic() - began, 3)


def main(roles: dict[str, RolePolicy]) -> None:
    """Run one rank until the parent closes its end. The parent's first line carries the RankSpec."""
    link = ParentLink()
    message = link.read()
    if message is None:
        return
    spec = from_json(RankSpec, message["spec"])
    log.setup(spec.log_level, role=spec.role, worker_id=spec.worker_id, tp_rank=spec.tp_rank)
    signals = _Signals()
    signal.signal(signal.SIGTERM, signals.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what Ctrl-C means
    introductions = _Introductions(link)
    link.watch(introductions.on_message, signals.stop)
    timer = _StepTimer()
    try:
        with timer.step("load_model"):
            model = load_model(spec)
        with timer.step("open_endpoint"):
            transfers = _open_endpoint(spec, model.runner)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        fail_start(link, error)
    transfers.set_wakeup(signals.wake)
    introductions.begin(transfers)
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)  # this thread, the engine's; the transfer thread may run elsewhere
    _tune_interpreter()
    context: zmq.Context[Any] = zmq.Context()
    try:
        if spec.tp_rank == 0:
            _lead(spec, roles[spec.role], model, transfers, context, signals, link, timer.timings)
        else:
            _follow(spec, model, transfers, context, signals, link, timer.timings)
    finally:
        transfers.close()
        model.runner.close()
        context.destroy(linger=200)


def _tune_interpreter() -> None:
    """For two threads that hand work to each other all the time, and a heap that is mostly there for good."""
    sys.setswitchinterval(0.0005)  # the default lets one thread keep the other waiting for 5 ms
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def _open_endpoint(spec: RankSpec, runner: Runner) -> TransferEndpoint:
    secret = decode_secret(spec.secret)
    config = EndpointConfig(
        worker_id=spec.worker_id,
        incarnation=spec.incarnation,
        layout=runner.layout,
        secret=auth.derive(secret, "kv transfer v1"),
        host=spec.host,
        unix_dir=spec.worker_dir if {"shm", "cuda_ipc"} & set(spec.transports) else "",
        transports=spec.transports,
        identity=make_identity(secret) if "tcp+tls" in spec.transports else None,
        credit_bytes=spec.credit_bytes,
        lease_s=spec.lease_s,
    )
    return make_endpoint(config, runner.kv_buffer(), runner.kv_fd())


def _lead(
    spec: RankSpec,
    role: RolePolicy,
    model: LoadedModel,
    transfers: TransferEndpoint,
    context: zmq.Context[Any],
    signals: _Signals,
    link: ParentLink,
    timings: dict[str, float],
) -> None:
    clock = SystemClock()
    layout = model.runner.layout
    hook = TransferHook(transfers)
    group = Group(context, spec.worker_dir, spec.tp_size, transfers, hook)
    runner = GroupRunner(model.runner, group, model.overlapping)
    hasher = PrefixHasher(auth.derive(decode_secret(spec.secret), "prefix cache v1"), layout.model.fingerprint)
    engine_config = _engine_config(spec, model, layout.geometry)
    engine = (
        LocalEngine(engine_config, runner, hasher, clock)
        if model.overlapping is None
        else OverlappingEngine(engine_config, runner, hasher, clock, runner)
    )
    front = Channel(context, endpoint(spec.worker_dir, "front"), bind=False)
    leader = Leader(
        engine,
        transfers,
        group,
        hook,
        front,
        role,
        clock,
        tp_size=spec.tp_size,
    )
    runner.before_step = leader.before_step
    hook.on_layer = leader.on_layer
    ranks = [_describe(transfers, 0)]
    pids = [os.getpid()]
    for follower in group.followers:
        _, address, pid = follower.receive()
        ranks.append(address)
        pids.append(pid)
    front.send(["hello", _hello(spec, model, layout.geometry, ranks, pids)])
    link.report("ready", tp_rank=0, timings=timings, kv=_memory(spec, model.runner))
    leader.run(signals.stop_fd, signals.wake_fd)
    group.close()
    front.close()


def _follow(
    spec: RankSpec,
    model: LoadedModel,
    transfers: TransferEndpoint,
    context: zmq.Context[Any],
    signals: _Signals,
    link: ParentLink,
    timings: dict[str, float],
) -> None:
    leader = Channel(context, endpoint(spec.worker_dir, f"rank{spec.tp_rank}"), bind=False)
    leader.send(["hello", _describe(transfers, spec.tp_rank), os.getpid()])
    link.report("ready", tp_rank=spec.tp_rank, timings=timings, kv=_memory(spec, model.runner))
    Follower(model.runner, transfers, TransferHook(transfers), leader).run(signals.stop_fd, signals.wake_fd)
    leader.close()


def _engine_config(spec: RankSpec, model: LoadedModel, geometry: KVGeometry) -> EngineConfig:
    return EngineConfig(
        block_size=geometry.block_size,
        num_blocks=geometry.num_blocks,
        max_model_len=model.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        prefill_first=spec.prefill_first,
        enable_prefix_caching=spec.enable_prefix_caching,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
    )


def _describe(transfers: TransferEndpoint, tp_rank: int) -> list[Any]:
    address = transfers.address
    return [tp_rank, address.host, address.port, address.unix_path]


def _hello(
    spec: RankSpec, model: LoadedModel, geometry: KVGeometry, ranks: list[list[Any]], pids: list[int]
) -> dict[str, Any]:
    return {
        "fingerprint": model.runner.layout.model.fingerprint,
        "kv_dtype": model.runner.layout.model.dtype,
        "max_model_len": model.max_model_len,
        "block_size": geometry.block_size,
        "num_blocks": geometry.num_blocks,
        "vocab_size": model.vocab_size,
        "max_num_seqs": spec.max_num_seqs,
        "ranks": ranks,
        "pids": pids,
        "clock_id": clock_id(),
    }


def _memory(spec: RankSpec, runner: Runner) -> dict[str, int]:
    layout = runner.layout
    return {
        "num_blocks": layout.geometry.num_blocks,
        "block_size": layout.geometry.block_size,
        "pool_bytes": layout.pool_bytes,
    }
