"""How fast KV moves: Baton's transports against a bare copy and a bare TCP loop of the same bytes in the same run.

    python -m bench.transfer [--pairs 7] [--tokens 512 2048] [--block-sizes 16 32] [--json out.json] [--check]

Two processes: this one receives, a child sends. Each round runs every arm once, in turn, on the same pools; medians
and the spread are printed. A round's time runs from the sender's first call to the moment when the receiver has the
last byte in place (and verified, where the arm verifies); the two processes share CLOCK_MONOTONIC.

Arms: `memcpy` copies the layers' bytes from the sender's mapped pool (one contiguous copy per layer), `memcpy blocks`
the same blocks one by one as the tables say, `tcp loop` is a blocking sendall/recv_into of one stream, `shm` and `tcp`
are Baton with and without digests, and `per block` is Baton's TCP with one frame per (layer, block) instead of
coalesced ones.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer import lanes
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
from kvtransfer.plan import FRAME_BYTES

MODEL: Final = ModelKV((LayerSpec(3, 64),) * 30, "bfloat16", "llama-135m-shape")
SECRET: Final = b"bench secret, never used elsewhere"
PIECE: Final = 1024 * 1024
"""What the bare loop reads at a time."""
TARGETS: Final = (
    # (arm, rival, least ratio), for transfers of at least 8 MiB
    ("shm", "memcpy", 0.70),
    ("tcp no digest", "tcp loop", 0.90),
    ("tcp", "tcp loop", 0.75),
)
MIN_TARGET_BYTES: Final = 8 * 2**20
ARMS: Final = ("memcpy", "memcpy blocks", "tcp loop", "shm", "shm no digest", "tcp", "tcp no digest", "per block")


class Bench:
    """One process's half: a pool, its bare sockets, and an endpoint per Baton arm."""

    def __init__(self, name: str, block_size: int, num_blocks: int, unix_dir: str) -> None:
        self.layout = KVLayout(MODEL, KVGeometry(1, block_size, num_blocks), 0)
        self.fd = os.memfd_create("kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.layout.pool_bytes)
        self.map = mmap.mmap(self.fd, self.layout.pool_bytes)
        self.view = memoryview(self.map)
        self.array = np.frombuffer(self.view, np.uint8)
        self.news = threading.Event()
        self.endpoints: dict[str, Endpoint] = {}
        for kind, transports, verify in (
            ("shm", ("shm",), True),
            ("shm no digest", ("shm",), False),
            ("tcp", ("tcp",), True),
            ("tcp no digest", ("tcp",), False),
        ):
            config = EndpointConfig(
                name, name, self.layout, SECRET, unix_dir=unix_dir, transports=transports, verify=verify
            )
            endpoint = self.endpoints[kind] = Endpoint(config, self.view, self.fd)
            endpoint.set_wakeup(self.news.set)
        self.endpoints["per block"] = self.endpoints["tcp"]

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

    def layer_slices(self, num_tokens: int) -> list[slice]:
        """Per layer, the bytes of the first blocks that hold `num_tokens`."""
        starts = [self.layout.block_offset(layer, 0) for layer in range(len(MODEL.layers))]
        unit = self.layout.block_bytes(0) * num_tokens // self.layout.geometry.block_size
        return [slice(start, start + unit) for start in starts]

    def close(self) -> None:
        """Free all."""
        for endpoint in set(self.endpoints.values()):
            endpoint.close()


def send_arm(bench: Bench, arm: str, peers: dict[str, PeerRank], num_tokens: int, table: list[int]) -> float:
    """The sender's half of one Baton round; when it began."""
    endpoint = bench.endpoints[arm]
    transfer_id = TransferId(secrets.token_bytes(16))
    peer = PeerWorker("d", "d", (peers[arm],))
    lanes.FRAME_BYTES = bench.layout.block_bytes(0) if arm == "per block" else FRAME_BYTES  # type: ignore[misc]
    endpoint.open_send(SendRequest(transfer_id, peer, num_tokens, tuple(table)))
    accepted = threading.Event()
    bench.expect(arm, {Granted})
    endpoint._thread.post(accepted.set)  # Accept follows Grant on the same link: both are taken in one turn
    accepted.wait()
    began = time.monotonic()
    for layer in range(len(MODEL.layers)):
        endpoint.written(transfer_id, layer, num_tokens)
    endpoint.finish(transfer_id, b"")
    bench.expect(arm, {Completed})
    return began


def run_sender() -> None:
    """The child: obeys one JSON command per line."""

    def read() -> Any:
        return json.loads(sys.stdin.readline())

    def answer(value: Any) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    start = read()
    bench = Bench("p", start["block_size"], start["num_blocks"], start["unix_dir"])
    bench.array[:] = np.random.default_rng(0).integers(0, 256, len(bench.array), dtype=np.uint8)
    peers = {arm: PeerRank(*rank) for arm, rank in start["peers"].items()}
    bare = socket.create_connection(tuple(start["bare"]))
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer({"pid": os.getpid(), "fd": bench.fd})
    while (command := read())["do"] != "stop":
        num_tokens = command["num_tokens"]
        if command["do"] == "tcp loop":
            slices = bench.layer_slices(num_tokens)
            began = time.monotonic()
            for part in slices:
                bare.sendall(bench.view[part])
        else:
            began = send_arm(bench, command["do"], peers, num_tokens, command["table"])
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

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._dir = tempfile.TemporaryDirectory()
        self.bench = Bench("d", block_size, num_blocks, self._dir.name)
        self.bench.array[:] = 0
        listener = socket.create_server(("127.0.0.1", 0))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.transfer", "--sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        addresses = {arm: endpoint.address for arm, endpoint in self.bench.endpoints.items()}
        self._tell(
            block_size=block_size,
            num_blocks=num_blocks,
            unix_dir=self._dir.name,
            peers={arm: (a.tp_rank, a.host, a.port, a.unix_path) for arm, a in addresses.items()},
            bare=listener.getsockname(),
        )
        hello = self._hear()
        self._bare, _ = listener.accept()
        listener.close()
        fd = os.open(f"/proc/{hello['pid']}/fd/{hello['fd']}", os.O_RDONLY)
        self._mapped = mmap.mmap(fd, self.bench.layout.pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._source = np.frombuffer(self._mapped, np.uint8)
        os.close(fd)

    def _tell(self, **command: Any) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()

    def _hear(self) -> Any:
        assert self._child.stdout is not None
        return json.loads(self._child.stdout.readline())

    def run(self, arm: str, num_tokens: int, source_table: list[int], table: list[int]) -> float:
        """Seconds of one round."""
        if arm == "memcpy":
            began = time.monotonic()
            for part in self.bench.layer_slices(num_tokens):
                self.bench.array[part] = self._source[part]
            return time.monotonic() - began
        if arm == "memcpy blocks":
            size, arrays = self.bench.layout.block_bytes(0), (self.bench.array, self._source)
            began = time.monotonic()
            for part in self.bench.layer_slices(num_tokens):
                to, fro = (array[part] for array in arrays)
                for a, b in zip(table, source_table, strict=True):
                    to[a * size : a * size + size] = fro[b * size : b * size + size]
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
    for number in range(pairs + 1):
        for arm in arms:
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
    """The table."""
    print(
        f"{'tokens':>6} {'block':>5} {'blocks':>9} {'MiB':>6} {'arm':<14} {'ms':>8} {'min..max':>17} {'GB/s':>6} {'/memcpy':>8} {'/loop':>6}"
    )
    for row in rows:
        print(
            f"{row.num_tokens:>6} {row.block_size:>5} {row.table:>9} {row.num_bytes / 2**20:>6.1f} {row.arm:<14} "
            f"{row.median_ms:>8.2f} {row.spread_ms[0]:>8.2f}..{row.spread_ms[1]:<7.2f} {row.gb_per_s:>6.2f} "
            f"{row.of_rival.get('memcpy', 0):>8.2f} {row.of_rival.get('tcp loop', 0):>6.2f}"
        )


def show_ratios(rows: list[Row]) -> None:
    """What digests cost and what coalescing gains, each as a median over interleaved rounds."""
    for row in rows:
        if row.arm in ("tcp", "shm"):
            parts = [
                f"{1 - row.of_rival[rival]:.0%} of speed for digests"
                for rival in (f"{row.arm} no digest",)
                if rival in row.of_rival
            ]
            if row.arm == "tcp" and "per block" in row.of_rival:
                parts.append(f"{row.of_rival['per block']:.1f} times as fast as a frame per block")
            print(f"{row.num_tokens} tokens, block {row.block_size}, {row.table}, {row.arm}: {', '.join(parts)}")


def missed(rows: list[Row]) -> list[str]:
    """Targets that the figures do not reach."""
    problems = []
    for row in rows:
        if row.num_bytes < MIN_TARGET_BYTES:
            continue
        for arm, rival, least in TARGETS:
            if row.arm == arm and row.of_rival.get(rival, least) < least:
                problems.append(
                    f"{row.num_tokens} tokens, block {row.block_size}, {row.table}: {arm} reaches "
                    f"{row.of_rival[rival]:.2f} of {rival}, target {least:.2f}"
                )
        if row.arm == "tcp" and row.of_rival.get("tcp no digest", 1.0) < 0.8:
            problems.append(f"{row.num_tokens} tokens, block {row.block_size}, {row.table}: digests cost over 20 %")
    return problems


def main() -> None:
    """Parse, measure, print; exit status 1 where a target is missed and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="measured rounds per setting")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--tables", nargs="+", default=["in order", "shuffled"], choices=["in order", "shuffled"])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--sender", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sender:
        run_sender()
        return
    rows: list[Row] = []
    for block_size in arguments.block_sizes:
        receiver = Receiver(block_size, max(arguments.tokens) // block_size + 1)
        try:
            for num_tokens in arguments.tokens:
                for table in arguments.tables:
                    rows += measure(receiver, arguments.arms, num_tokens, block_size, table, arguments.pairs)
        finally:
            receiver.close()
    show(rows)
    show_ratios(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    problems = missed(rows)
    for problem in problems:
        print("MISSED:", problem)
    if problems and arguments.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
