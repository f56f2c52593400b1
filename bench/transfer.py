"""How fast KV moves: Baton's transports against a bare copy and a bare TCP loop of the same bytes in the same run.

    python -m bench.transfer [--pairs 7] [--tokens 512 2048] [--block-sizes 16 32] [--congestion reno] [--by-layer]
                             [--json OUT.json] [--check]

The 135 M Llama shape in bf16. Two processes, each pinned to a core of its own where there are two: this one receives,
a child sends. Each round runs every arm once, in random order (after an arm of 50 ms everything is colder than after
one of a millisecond), on the same pools, whose pages are all touched. Before each arm both pools are flushed from all
caches, as KV blocks are that nobody has touched for a while, and both processes write WASH_BYTES of other memory, so
that no arm finds what the one before it left. Medians and the spread are printed, and ratios are medians over the
rounds. A round's time runs from the sender's first call to the moment when the receiver has the last byte in place
(and verified, where the arm verifies); the transfer has been granted and accepted by then; the two processes share
CLOCK_MONOTONIC. Baton's sender announces all layers in one call, as a worker does that redirects KV; with --by-layer
in one call each, as prefill does. TCP has congestion control "reno" in every arm unless told otherwise: with BBR's
pacing and cubic's slow start all of them, the bare one too, jump between two speeds.

    memcpy          the layers' bytes from the sender's mapped pool to this one, one contiguous copy per layer
    memcpy blocks   the same bytes block by block as the tables say, in one call of C
    tcp loop        blocking sendall and recv_into, a contiguous layer at a time, with Baton's socket options
    shm, tcp        Baton, with digests; the sender's were made when the KV was written, or rather in the first round
    ... fresh       the same, and the sender makes its digests within the round, before it sends
    tcp+tls, nixl   the same, encrypted and by NIXL (where its package is there)
    ... no digest   the same without
    ... per block   with digests, one frame per (layer, block) instead of coalesced ones
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import random
import secrets
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from baton import native_build
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.tls import make_identity
from kvtransfer import connection
from kvtransfer.api import (
    Completed,
    EndpointConfig,
    Failed,
    Granted,
    ManifestReceived,
    PeerRank,
    PeerWorker,
    Received,
    ReserveRequested,
    SendRequest,
    TransferEvent,
    TransferId,
)
from kvtransfer.endpoint import Endpoint
from kvtransfer.native.library import library
from kvtransfer.plan import FETCHED_FRAME_BYTES, FRAME_BYTES, MAX_FRAME_BYTES
from kvtransfer.pool import Pieces, address_of
from kvtransfer.transports import tcp

MODEL: Final = ModelKV((LayerSpec(3, 64),) * 30, "bfloat16", "llama-135m-shape")
SECRET: Final = b"bench secret, never used elsewhere"
PIECE: Final = 1024 * 1024
"""What the bare loop reads at a time."""
TARGETS: Final = (
    # (arm, rival, least ratio of speeds), for transfers of at least MIN_TARGET_BYTES
    ("shm", "memcpy", 0.70),
    ("tcp no digest", "tcp loop", 0.90),
    ("tcp", "tcp loop", 0.75),
    ("shm", "shm no digest", 0.80),
    ("tcp", "tcp no digest", 0.80),
)
COALESCING: Final = 10.0
"""How much faster coalesced frames must be than one per (layer, block), at COALESCING_BLOCK tokens per block."""
COALESCING_BLOCK: Final = 16
MIN_TARGET_BYTES: Final = 8 * 2**20


@dataclass(frozen=True)
class Arm:
    """How Baton sends."""

    transport: str
    verify: bool = True
    is_fresh: bool = False
    """The sender's digests are made within the round; else when the KV was written."""
    is_per_block: bool = False
    """One frame per (layer, block)."""


BATON_ARMS: Final = {
    "shm": Arm("shm"),
    "shm fresh": Arm("shm", is_fresh=True),
    "shm no digest": Arm("shm", verify=False),
    "shm per block": Arm("shm", is_per_block=True),
    "tcp": Arm("tcp"),
    "tcp fresh": Arm("tcp", is_fresh=True),
    "tcp no digest": Arm("tcp", verify=False),
    "tcp per block": Arm("tcp", is_per_block=True),
    "tcp+tls": Arm("tcp+tls"),
}
if importlib.util.find_spec("nixl") is not None:
    BATON_ARMS["nixl"] = Arm("nixl")
ARMS: Final = ("memcpy", "memcpy blocks", "tcp loop", *BATON_ARMS)
FLUSH: Final = Path(__file__).parent / "native" / "flush.cpp"
WASH_BYTES: Final = 16 * 2**20
"""Several times a core's own caches."""
_SWITCH_S: Final = 0.0005
"""As a rank process sets it."""


class Bench:
    """One process's half: a pool, its bare sockets, and an endpoint per Baton arm, so that none uses another one's link."""

    def __init__(self, worker: str, block_size: int, num_blocks: int, unix_dir: str) -> None:
        self.layout = KVLayout(MODEL, KVGeometry(1, block_size, num_blocks), 0)
        self.fd = os.memfd_create("kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.layout.pool_bytes)
        self.map = mmap.mmap(self.fd, self.layout.pool_bytes)
        self.view = memoryview(self.map)
        self.array = np.frombuffer(self.view, np.uint8)
        self._other = np.zeros(WASH_BYTES, np.uint8)
        self.news = threading.Event()
        self.endpoints: dict[str, Endpoint] = {}
        for name, arm in BATON_ARMS.items():
            config = EndpointConfig(
                worker, worker, self.layout, SECRET, unix_dir=unix_dir, transports=(arm.transport,), verify=arm.verify
            )
            config = replace(config, identity=make_identity(SECRET) if arm.transport == "tcp+tls" else None)
            endpoint = self.endpoints[name] = Endpoint(config, self.view, self.fd)
            endpoint.set_wakeup(self.news.set)

    def wash(self) -> None:
        """Fill this core's caches with something else."""
        self._other += 1

    def expect(self, arm: str, kinds: set[type[TransferEvent]]) -> dict[type[TransferEvent], Any]:
        """One event of each kind."""
        found: dict[type[TransferEvent], Any] = {}
        while set(found) != kinds:
            self.news.clear()
            for event in self.endpoints[arm].poll():
                if isinstance(event, Failed):
                    raise SystemExit(f"{arm}: transfer failed: {event.reason}")
                if type(event) in kinds:
                    found[type(event)] = event
            if set(found) != kinds and not self.news.wait(30):
                raise SystemExit(f"{arm}: no {kinds - set(found)}")
        return found

    def pieces(self, num_tokens: int, table: list[int]) -> Pieces:
        """Where the blocks of all layers lie in this process: [num_layers * num_blocks, 2]."""
        size = self.layout.block_bytes(0)
        start = address_of(self.array)
        layers = np.array([self.layout.layer_offset(layer) for layer in range(len(MODEL.layers))], np.uint64)
        starts = start + (layers[:, None] + np.array(table, np.uint64) * np.uint64(size)).ravel()
        return np.stack([starts, np.full(len(starts), size, np.uint64)], axis=1).astype(np.uint64)

    def layer_slices(self, num_tokens: int) -> list[slice]:
        """Per layer, the bytes of the first blocks that hold `num_tokens`."""
        starts = [self.layout.block_offset(layer, 0) for layer in range(len(MODEL.layers))]
        unit = self.layout.block_bytes(0) * num_tokens // self.layout.geometry.block_size
        return [slice(start, start + unit) for start in starts]

    def close(self) -> None:
        """Free all."""
        for endpoint in self.endpoints.values():
            endpoint.close()


def send_arm(
    bench: Bench, arm: str, peers: dict[str, PeerRank], num_tokens: int, table: list[int], *, by_layer: bool
) -> float:
    """The sender's half of one Baton round; when it began."""
    endpoint = bench.endpoints[arm]
    transfer_id = TransferId(secrets.token_bytes(16))
    peer = PeerWorker("d", "d", (peers[arm],))
    is_per_block, block_bytes = BATON_ARMS[arm].is_per_block, bench.layout.block_bytes(0)
    connection.FRAME_BYTES = block_bytes if is_per_block else FRAME_BYTES  # type: ignore[misc]
    connection.MAX_FRAME_BYTES = block_bytes if is_per_block else MAX_FRAME_BYTES  # type: ignore[misc]
    connection.FETCHED_FRAME_BYTES = block_bytes if is_per_block else FETCHED_FRAME_BYTES  # type: ignore[misc]
    if BATON_ARMS[arm].is_fresh:
        endpoint.will_write(table, 0, num_tokens)
    endpoint.open_send(SendRequest(transfer_id, peer, num_tokens, tuple(table)))
    accepted = threading.Event()
    bench.expect(arm, {Granted})
    endpoint._thread.post(accepted.set)  # Accept follows Grant on the same link: both are taken in one turn
    accepted.wait()
    began = time.monotonic()
    for layer in range(len(MODEL.layers)) if by_layer else (None,):
        endpoint.written(transfer_id, layer, num_tokens)
    endpoint.finish(transfer_id, b"")
    bench.expect(arm, {Completed})
    return began


def flusher() -> Callable[[int, int], object]:
    """Drops memory (address, bytes) from all caches."""
    flush = ctypes.CDLL(str(native_build.built(FLUSH, native_build.FLAGS))).bench_flush
    flush.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    if not flush(None, 0):
        print("this CPU's caches can not be flushed: arms find what others left there")
    return flush


def settle(core: int | None) -> None:
    """Stay on one core, and switch threads as a rank process does."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    sys.setswitchinterval(_SWITCH_S)


def control_congestion(name: str | None) -> None:
    """From here on every socket of this process that carries KV has this control; None: the system's."""
    if name is None:
        return
    tune = tcp.tune

    def tuned(sock: socket.socket, lease_s: float) -> None:
        tune(sock, lease_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())

    tcp.tune = tuned


def run_sender() -> None:
    """The child: obeys one JSON command per line."""

    def read() -> Any:
        return json.loads(sys.stdin.readline())

    def answer(value: Any) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    start = read()
    settle(start["core"])
    control_congestion(start["congestion"])
    bench = Bench("p", start["block_size"], start["num_blocks"], start["unix_dir"])
    bench.array[:] = np.random.default_rng(0).integers(0, 256, len(bench.array), dtype=np.uint8)
    peers = {arm: PeerRank(*rank) for arm, rank in start["peers"].items()}
    bare = tcp.dial(*start["bare"])
    bare.setblocking(True)
    tcp.tune(bare, 10.0)
    answer({"pid": os.getpid(), "fd": bench.fd})
    while (command := read())["do"] != "stop":
        num_tokens = command["num_tokens"]
        bench.wash()
        if command["do"] == "tcp loop":
            slices = bench.layer_slices(num_tokens)
            began = time.monotonic()
            for part in slices:
                bare.sendall(bench.view[part])
        else:
            began = send_arm(bench, command["do"], peers, num_tokens, command["table"], by_layer=start["by_layer"])
        answer({"began": began})
    bare.close()
    bench.close()


@dataclass(frozen=True)
class Row:
    """One arm's figures for one setting."""

    num_tokens: int
    block_size: int
    table: str
    arm: str
    num_bytes: int
    median_ms: float
    spread_ms: tuple[float, float]
    gb_per_s: float
    of_rival: dict[str, float]
    """Median over rounds of (rival's time / this arm's time)."""


class Receiver:
    """This process: drives the child and measures."""

    def __init__(
        self, block_size: int, num_blocks: int, congestion: str | None = None, *, by_layer: bool = False
    ) -> None:
        """`congestion`: for the child; this process's own is set by `control_congestion`."""
        cores = sorted(os.sched_getaffinity(0))
        has_two = len(cores) > 1
        self._dir = tempfile.TemporaryDirectory()
        settle(cores[1] if has_two else None)
        self.bench = Bench("d", block_size, num_blocks, self._dir.name)
        self.bench.array[:] = 0
        listener = tcp.listen("127.0.0.1", 0)
        listener.setblocking(True)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.transfer", "--sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        addresses = {arm: endpoint.address for arm, endpoint in self.bench.endpoints.items()}
        self._tell(
            core=cores[0] if has_two else None,
            congestion=congestion,
            by_layer=by_layer,
            block_size=block_size,
            num_blocks=num_blocks,
            unix_dir=self._dir.name,
            peers={arm: (a.tp_rank, a.host, a.port, a.unix_path) for arm, a in addresses.items()},
            bare=listener.getsockname(),
        )
        hello = self._hear()
        self._bare, _ = listener.accept()
        tcp.tune(self._bare, 10.0)
        listener.close()
        fd = os.open(f"/proc/{hello['pid']}/fd/{hello['fd']}", os.O_RDONLY)
        self._mapped = mmap.mmap(fd, self.bench.layout.pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._source = np.frombuffer(self._mapped, np.uint8)
        os.close(fd)
        self._flush = flusher()

    def _tell(self, **command: Any) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()

    def _hear(self) -> Any:
        assert self._child.stdout is not None
        return json.loads(self._child.stdout.readline())

    def run(self, arm: str, num_tokens: int, source_table: list[int], table: list[int]) -> float:
        """Seconds of one round."""
        for pool in (self.bench.array, self._source):
            self._flush(address_of(pool), len(pool))
        self.bench.wash()
        if arm == "memcpy":
            began = time.monotonic()
            for part in self.bench.layer_slices(num_tokens):
                self.bench.array[part] = self._source[part]
            return time.monotonic() - began
        if arm == "memcpy blocks":
            native = library()
            assert native is not None
            to, fro = self.bench.pieces(num_tokens, table), self.bench.pieces(num_tokens, source_table)
            fro[:, 0] += np.uint64((address_of(self._source) - address_of(self.bench.array)) % 2**64)  # wraps
            began = time.monotonic()
            native.copy(address_of(to), address_of(fro), int(to[:, 1].sum()), None, False)
            return time.monotonic() - began
        self._tell(do=arm, num_tokens=num_tokens, table=source_table)
        if arm == "tcp loop":
            for part in self.bench.layer_slices(num_tokens):
                view = self.bench.view[part]
                while view:
                    view = view[self._bare.recv_into(view[:PIECE]) :]
            return time.monotonic() - float(self._hear()["began"])
        asked = self.bench.expect(arm, {ReserveRequested})[ReserveRequested]
        endpoint = self.bench.endpoints[arm]
        endpoint.grant(asked.transfer_id, table, num_tokens, 0)
        ended = self.bench.expect(arm, {Received, ManifestReceived})[Received].ended_s
        endpoint.complete(asked.transfer_id)
        return float(ended - self._hear()["began"])

    def close(self) -> None:
        """End the child."""
        self._tell(do="stop")
        self._child.communicate(timeout=10)
        self.bench.close()
        self._bare.close()
        self._dir.cleanup()


def measure(receiver: Receiver, arms: list[str], num_tokens: int, block_size: int, table: str, pairs: int) -> list[Row]:
    """Interleaved rounds of every arm."""
    num_blocks = -(-num_tokens // block_size)

    def order(seed: int) -> list[int]:
        blocks = np.arange(num_blocks) if table == "in order" else np.random.default_rng(seed).permutation(num_blocks)
        return [int(block) for block in blocks]

    times: dict[str, list[float]] = {arm: [] for arm in arms}
    shuffle = random.Random(pairs).sample
    for number in range(pairs + 1):
        for arm in shuffle(arms, len(arms)):
            seconds = receiver.run(arm, num_tokens, order(2 * number), order(2 * number + 1))
            if number:  # the first round warms pools, sockets and page tables
                times[arm].append(seconds)
    num_bytes = sum(part.stop - part.start for part in receiver.bench.layer_slices(num_tokens))
    rows = []
    for arm in arms:
        ratios = {
            rival: statistics.median(a / b for a, b in zip(times[rival], times[arm], strict=True)) for rival in arms
        }
        median = statistics.median(times[arm])
        spread = (min(times[arm]) * 1e3, max(times[arm]) * 1e3)
        rows.append(
            Row(num_tokens, block_size, table, arm, num_bytes, median * 1e3, spread, num_bytes / median / 1e9, ratios)
        )
    return rows


def show(rows: list[Row]) -> None:
    """The table: speeds beside the bare arms', and beside the same transport's other arms."""
    print(
        f"{'tokens':>6} {'block':>5} {'blocks':>9} {'MiB':>6} {'arm':<14} {'ms':>8} {'min..max':>17} {'GB/s':>6} "
        f"{'/memcpy':>8} {'/loop':>6} {'digests':>8} {'coalesced':>9}"
    )
    for row in rows:
        rivals = row.of_rival
        cells = [f"{rivals[name]:.2f}" if name in rivals else "" for name in ("memcpy", "tcp loop")]
        plain, per_block = rivals.get(f"{row.arm} no digest"), rivals.get(f"{row.arm} per block")
        cells.append("" if plain is None else f"{1 - plain:.0%}")
        cells.append("" if per_block is None else f"{per_block:.1f}x")
        print(
            f"{row.num_tokens:>6} {row.block_size:>5} {row.table:>9} {row.num_bytes / 2**20:>6.1f} {row.arm:<14} "
            f"{row.median_ms:>8.2f} {row.spread_ms[0]:>8.2f}..{row.spread_ms[1]:<7.2f} {row.gb_per_s:>6.2f} "
            f"{cells[0]:>8} {cells[1]:>6} {cells[2]:>8} {cells[3]:>9}"
        )


def missed(rows: list[Row]) -> list[str]:
    """Targets that the figures do not reach."""
    problems = []
    for row in rows:
        if row.num_bytes < MIN_TARGET_BYTES:
            continue
        targets = list(TARGETS)
        if row.block_size == COALESCING_BLOCK:
            targets.append((row.arm, f"{row.arm} per block", COALESCING))
        for arm, rival, least in targets:
            if row.arm == arm and row.of_rival.get(rival, least) < least:
                problems.append(
                    f"{row.num_tokens} tokens, block {row.block_size}, {row.table}: {arm} has {row.of_rival[rival]:.2f} "
                    f"times the speed of {rival}, target {least:.2f}"
                )
    return problems


def main() -> None:
    """Parse, measure, print; exit status 1 where a target is missed and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="measured rounds per setting")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--tables", nargs="+", default=["in order", "shuffled"], choices=["in order", "shuffled"])
    parser.add_argument(
        "--congestion",
        metavar="NAME",
        default="reno",
        help="of every TCP arm, the bare one too; 'system': the system's",
    )
    parser.add_argument("--by-layer", action="store_true", help="announce KV layer by layer, not all layers at once")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--sender", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sender:
        run_sender()
        return
    cores = sorted(os.sched_getaffinity(0))
    print(f"$ {shlex.join(['python', '-m', 'bench.transfer', *sys.argv[1:]])}")
    print(f"{len(cores)} cores, load average {os.getloadavg()[0]:.2f}")
    congestion = None if arguments.congestion == "system" else arguments.congestion
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        print(f"congestion control of TCP: {congestion or file.read().strip()}")
    if library() is None:
        raise SystemExit("no C++ compiler here: these figures would be of the fall-back")
    control_congestion(congestion)
    rows: list[Row] = []
    for block_size in arguments.block_sizes:
        num_blocks = max(arguments.tokens) // block_size + 1
        receiver = Receiver(block_size, num_blocks, congestion, by_layer=arguments.by_layer)
        try:
            for num_tokens in arguments.tokens:
                for table in arguments.tables:
                    rows += measure(receiver, arguments.arms, num_tokens, block_size, table, arguments.pairs)
        finally:
            receiver.close()
            os.sched_setaffinity(0, cores)
    show(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    print(f"load average {os.getloadavg()[0]:.2f}")
    problems = missed(rows)
    for problem in problems:
        print("MISSED:", problem)
    if problems and arguments.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
