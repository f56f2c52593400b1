"""Workers of one process for transfer tests: pools filled with a pattern, endpoints, and waiting for events."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pytest
import xxhash

from baton.clock import Clock, ManualClock
from baton.kv_layout import DeviceMemory, KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.tls import make_identity
from kvtransfer.api import EndpointConfig, PeerWorker, SendRequest, TransferEvent, TransferId
from kvtransfer.digests import seal
from kvtransfer.endpoint import Endpoint
from kvtransfer.faults import FaultHook
from kvtransfer.messages import Data
from kvtransfer.pool import Extents, Pool
from kvtransfer.transports import nixl
from tests.support.fake_cuda import FakeCuda

SECRET = b"a secret of one cluster, 32 byte"
MODEL = ModelKV((LayerSpec(4, 8), LayerSpec(4, 8), LayerSpec(4, 8)), "bfloat16", "f1")
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="the package nixl is not there")
)
EventT = TypeVar("EventT", bound=TransferEvent)


def new_transfer_id() -> TransferId:
    """Random, as a leader draws it."""
    return TransferId(secrets.token_bytes(16))


@dataclass
class Rank:
    """One rank: a pool, its endpoint, and the events seen so far."""

    layout: KVLayout
    buffer: memoryview
    endpoint: Endpoint
    fd: int | None
    mapping: mmap.mmap | None
    cuda: FakeCuda | None = None
    """The device of the pool; `buffer` is then a look into it that only tests have."""
    address: int = 0
    seen: list[TransferEvent] = field(default_factory=list)
    _news: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.endpoint.set_wakeup(self._news.set)

    def expect(self, kind: type[EventT], transfer_id: TransferId | None = None, timeout_s: float = 10.0) -> EventT:
        """Take the first event of this kind (of this transfer), waiting for it."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._news.clear()
            self.seen += self.endpoint.poll()
            for event in self.seen:
                if isinstance(event, kind) and transfer_id in (None, event.transfer_id):
                    self.seen.remove(event)
                    return event
            if not self._news.wait(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"no {kind.__name__}; seen: {self.seen}")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until a condition on statistics holds, looking whenever the transfer thread has turned."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"condition does not hold; {self.endpoint.stats()}")
            self.turn()

    def turn(self) -> None:
        """Wait until the transfer thread has run what was posted so far."""
        turned = threading.Event()
        self.endpoint._thread.post(turned.set)
        turned.wait(1.0)

    def layer_bytes(self, layer: int) -> np.ndarray:
        """One layer as [block, K|V, head, token, dim bytes]."""
        layout = self.layout
        spec = layout.model.layers[layer]
        flat = np.frombuffer(self.buffer, np.uint8)
        start = layout.layer_offset(layer)
        size = layout.block_bytes(layer) * layout.geometry.num_blocks
        shape = (
            layout.geometry.num_blocks,
            2,
            len(layout.heads(layer)),
            layout.geometry.block_size,
            spec.head_dim * layout.model.itemsize_bytes,
        )
        return flat[start : start + size].reshape(shape)

    def write_layer(self, layer: int, block_table: Sequence[int], tokens: np.ndarray) -> None:
        """Put [K|V, head (all), token, dim bytes] of a sequence into this rank's blocks."""
        view, size = self.layer_bytes(layer), self.layout.geometry.block_size
        heads = self.layout.heads(layer)
        self.endpoint.will_write(block_table, 0, tokens.shape[2])
        for token in range(tokens.shape[2]):
            view[block_table[token // size], :, :, token % size] = tokens[:, heads.start : heads.stop, token]

    def read_layer(self, layer: int, block_table: Sequence[int], num_tokens: int) -> np.ndarray:
        """[K|V, local head, token, dim bytes] of a sequence."""
        view, size = self.layer_bytes(layer), self.layout.geometry.block_size
        rows = [view[block_table[token // size], :, :, token % size] for token in range(num_tokens)]
        return np.stack(rows, axis=2)

    def close(self) -> None:
        """End the endpoint and free the pool."""
        self.endpoint.close()
        self.buffer.release()
        if self.mapping is not None:
            self.mapping.close()
        if self.fd is not None:
            os.close(self.fd)
        if self.cuda is not None:
            self.cuda.end_process()
            assert FakeCuda.violations == []


@dataclass
class Worker:
    """All ranks of a worker."""

    worker_id: str
    incarnation: str
    ranks: list[Rank]

    @property
    def peer(self) -> PeerWorker:
        """As others reach it."""
        return PeerWorker(self.worker_id, self.incarnation, tuple(rank.endpoint.address for rank in self.ranks))

    @property
    def leader(self) -> Rank:
        """Rank 0."""
        return self.ranks[0]

    def close(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            rank.close()


def make_worker(
    name: str,
    *,
    transport: str = "tcp",
    unix_dir: str = "",
    tp_size: int = 1,
    block_size: int = 16,
    num_blocks: int = 64,
    model: ModelKV = MODEL,
    faults: FaultHook | None = None,
    clock: Clock | None = None,
    shared_pool: bool = True,
    **settings: object,
) -> Worker:
    """A worker whose ranks offer one transport (and TCP to fall back on for shm)."""
    transports = ("shm", "tcp") if transport == "shm" else (transport,)
    secret = settings.get("secret", SECRET)
    assert isinstance(secret, bytes)
    identity = make_identity(secret) if transport == "tcp+tls" else None
    incarnation = secrets.token_hex(8)
    ranks = []
    for tp_rank in range(tp_size):
        layout = KVLayout(model, KVGeometry(tp_size, block_size, num_blocks), tp_rank)
        config = EndpointConfig(name, incarnation, layout, SECRET, unix_dir=unix_dir, transports=transports)
        config = replace(config, identity=identity)
        config = replace(config, **settings)  # type: ignore[arg-type]
        if transport == "cuda_ipc":
            ranks.append(_device_rank(config, faults, clock))
            continue
        fd, mapping = None, None
        if transport == "shm" and shared_pool:
            fd = os.memfd_create("kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            os.ftruncate(fd, layout.pool_bytes)
            mapping = mmap.mmap(fd, layout.pool_bytes)
        buffer = memoryview(mapping if mapping is not None else bytearray(layout.pool_bytes))
        ranks.append(Rank(layout, buffer, Endpoint(config, buffer, fd, faults=faults, clock=clock), fd, mapping))
    return Worker(name, incarnation, ranks)


def _device_rank(config: EndpointConfig, faults: FaultHook | None, clock: Clock | None) -> Rank:
    """A rank whose pool lies on a device of its own, not at the start of its allocation."""
    cuda, before = FakeCuda(), 4096
    start = cuda.allocate(before + config.layout.pool_bytes + 512)
    buffer = cuda.view(start)[before : before + config.layout.pool_bytes]
    memory = DeviceMemory(start + before, config.layout.pool_bytes, 0)
    try:
        endpoint = Endpoint(config, memory, clock=clock, cuda=cuda)
    except BaseException:
        buffer.release()
        cuda.end_process()
        raise
    cuda.faults = faults
    return Rank(config.layout, buffer, endpoint, None, None, cuda, memory.address)


def extents_over(data: bytes, cuts: Sequence[int] = ()) -> Extents:
    """`data` as a pool of its own, its bytes in runs that end at `cuts`."""
    edges = np.array(sorted({0, len(data), *(cut for cut in cuts if cut < len(data))}), np.uint64)
    runs = np.stack([edges[:-1], np.diff(edges)], axis=1)
    return Extents(Pool.flat(memoryview(bytearray(data))), [(0, runs)], len(data))


def sealed(context: bytes, frame: Data, payload: bytes, leaf_bytes: int) -> Data:
    """The frame with the digest of a payload of whole leaves, made in the plainest way."""
    leaves = [payload[at : at + leaf_bytes] for at in range(0, len(payload), leaf_bytes)]
    digest = xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves))
    return frame._replace(digest=seal(context, frame, digest))


def pattern(model: ModelKV, num_tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Per layer: random [K|V, head, token, dim bytes] of a sequence."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (2, s.num_kv_heads, num_tokens, s.head_dim * model.itemsize_bytes), dtype=np.uint8)
        for s in model.layers
    ]


def open_send(
    source: Worker, destination: Worker, num_tokens: int, block_table: Iterable[int], payload: bytes = b"please"
) -> TransferId:
    """Open a transfer on every source rank."""
    transfer_id = new_transfer_id()
    request = SendRequest(transfer_id, destination.peer, num_tokens, tuple(block_table), payload)
    for rank in source.ranks:
        rank.endpoint.open_send(request)
    return transfer_id


def write_all(source: Worker, transfer_id: TransferId, block_table: Sequence[int], kv: Sequence[np.ndarray]) -> None:
    """Write the whole sequence, layer by layer, on every source rank."""
    for layer, tokens in enumerate(kv):
        for rank in source.ranks:
            rank.write_layer(layer, block_table, tokens)
            rank.endpoint.written(transfer_id, layer, tokens.shape[2])


def assert_equal(
    destination: Worker, block_table: Sequence[int], kv: Sequence[np.ndarray], first_token: int = 0
) -> None:
    """Every destination rank holds its heads of the sequence from `first_token` on."""
    for rank in destination.ranks:
        for layer, tokens in enumerate(kv):
            heads = rank.layout.heads(layer)
            got = rank.read_layer(layer, block_table, tokens.shape[2])
            np.testing.assert_array_equal(got[:, :, first_token:], tokens[:, heads.start : heads.stop, first_token:])


def let_pass(clock: ManualClock, seconds: float, *ranks: Rank, steps: int = 1) -> None:
    """Move the clock on in steps; after each, the ranks take turns until what they had to say has arrived."""
    for _ in range(steps):
        clock.advance(seconds / steps)
        for rank in (*ranks, *ranks, *ranks):
            rank.turn()


def warm_up(transport: str) -> None:
    """Let libraries load what they keep for good, so that descriptors can be counted."""
    if transport == "nixl":
        nixl.Agent("warm-up", "127.0.0.1").close()


def open_fds() -> frozenset[str]:
    """File descriptors of this process, with what each is open on.

    What is open after a test must be a subset of what was open before: garbage of earlier tests may go at any moment.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return frozenset(found)


def kvtransfer_threads() -> list[str]:
    """Transfer threads that run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvtransfer")]


class BlockingHook:
    """Holds the transfer thread at the n-th data frame until released."""

    def __init__(self, at_send: int | None = None, at_landing: int | None = None) -> None:
        self.reached, self.release = threading.Event(), threading.Event()
        self._at = {"send": at_send, "landing": at_landing}
        self._count = {"send": 0, "landing": 0}

    def _pass(self, where: str) -> None:
        self._count[where] += 1
        if self._count[where] == self._at[where]:
            self.reached.set()
            self.release.wait(10)

    def before_send(self, frame: object, payload: list[memoryview]) -> list[memoryview]:
        """See FaultHook."""
        self._pass("send")
        return payload

    def after_landing(self, frame: object, piece: memoryview) -> None:
        """See FaultHook."""
        self._pass("landing")


@contextlib.contextmanager
def closing(*workers: Worker):  # type: ignore[no-untyped-def]
    """Close workers at the end."""
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()
