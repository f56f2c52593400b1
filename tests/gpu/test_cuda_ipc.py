"""CUDA IPC between two processes with a real device: the questions that only a GPU answers.

Each test runs with the fake device as well, which shows that the test itself works.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from baton.kv_layout import DeviceMemory, KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.api import (
    EndpointConfig,
    Failed,
    ManifestReceived,
    PeerRank,
    PeerWorker,
    Received,
    ReserveRequested,
    SendRequest,
    TransferId,
)
from kvtransfer.cuda.driver import CudaDriver, reference_digest
from kvtransfer.cuda.libcuda import LibCuda
from kvtransfer.endpoint import Endpoint
from kvtransfer.transports.cuda_ipc import check_device
from tests.support.fake_cuda import FakeCuda
from tests.support.transfer import SECRET, Rank, Worker

MODEL = ModelKV((LayerSpec(8, 128),) * 4, "bfloat16", "gpu")
LAYOUT = KVLayout(MODEL, KVGeometry(1, 16, 128), 0)
NUM_TOKENS = 1000
TABLE = [int(block) for block in np.random.default_rng(0).permutation(128)[: -(-NUM_TOKENS // 16)]]


def has_device() -> bool:
    """Is there a device that can be used?"""
    count = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def make_driver(kind: str) -> CudaDriver:
    return LibCuda(0) if kind == "libcuda" else FakeCuda()


@pytest.fixture(
    params=[
        "fake",
        pytest.param(
            "libcuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_device(), reason="there is no CUDA device")]
        ),
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Side:
    """A rank of this process whose pool is on a device."""

    def __init__(self, name: str, kind: str, unix_dir: str) -> None:
        self.driver = make_driver(kind)
        self.start = self.driver.allocate(LAYOUT.pool_bytes)
        self.driver.write(self.start, bytes(LAYOUT.pool_bytes))
        self.incarnation = secrets.token_hex(8)
        config = EndpointConfig(name, self.incarnation, LAYOUT, SECRET, transports=("cuda_ipc",), unix_dir=unix_dir)
        self.endpoint = Endpoint(config, DeviceMemory(self.start, LAYOUT.pool_bytes, 0), cuda=self.driver)
        self.rank = Rank(LAYOUT, memoryview(bytearray(LAYOUT.pool_bytes)), self.endpoint, None, None)
        self.worker = Worker(name, self.incarnation, [self.rank])

    def put(self) -> None:
        """The host's picture of the pool goes to the device."""
        self.driver.write(self.start, bytes(self.rank.buffer))

    def get(self) -> None:
        """The device's pool becomes the host's picture."""
        self.rank.buffer[:] = self.driver.read(self.start, LAYOUT.pool_bytes)


def kv_of(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (2, 8, NUM_TOKENS, 256), np.uint8) for _ in MODEL.layers]


def child() -> None:
    """A sender of its own process; one JSON line is one command."""
    start = json.loads(sys.stdin.readline())
    side = Side("p", start["kind"], start["unix_dir"])
    print(json.dumps("ready"), flush=True)  # noqa: T201
    for line in sys.stdin:
        command = json.loads(line)
        transfer_id = TransferId(bytes.fromhex(command["id"]))
        peer = PeerWorker("d", command["incarnation"], (PeerRank(*command["address"]),))
        side.endpoint.open_send(SendRequest(transfer_id, peer, NUM_TOKENS, tuple(TABLE)))
        for layer, tokens in enumerate(kv_of(command["seed"])):
            side.rank.write_layer(layer, TABLE, tokens)
        side.put()
        for layer in range(command["layers"]):
            side.endpoint.written(transfer_id, layer, NUM_TOKENS)
        side.endpoint.finish(transfer_id, b"m")
        print(json.dumps("sent"), flush=True)  # noqa: T201


class Sender:
    """The parent's handle on a child."""

    def __init__(self, kind: str, unix_dir: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.gpu.test_cuda_ipc import child; child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        self.ask(kind=kind, unix_dir=unix_dir)

    def ask(self, **command: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        assert json.loads(self.process.stdout.readline())

    def send(self, side: Side, seed: int, layers: int = 4) -> TransferId:
        """A transfer to a rank of ours, which grants it."""
        transfer_id = TransferId(secrets.token_bytes(16))
        address = side.endpoint.address
        parts = [0, address.host, address.port, address.unix_path]
        self.ask(id=transfer_id.hex(), incarnation=side.incarnation, address=parts, seed=seed, layers=layers)
        side.rank.expect(ReserveRequested, transfer_id, timeout_s=30)
        side.endpoint.grant(transfer_id, TABLE, NUM_TOKENS, 0)
        return transfer_id

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Lab:
    """A receiver here, senders elsewhere."""

    def __init__(self, kind: str, unix_dir: str) -> None:
        self.kind, self.unix_dir = kind, unix_dir
        self.side = Side("d", kind, unix_dir)
        self.senders: list[Sender] = []

    def sender(self) -> Sender:
        self.senders.append(Sender(self.kind, self.unix_dir))
        return self.senders[-1]

    def assert_arrives(self, sender: Sender, seed: int) -> None:
        """A whole transfer, compared byte for byte."""
        transfer_id = sender.send(self.side, seed)
        self.side.rank.expect(Received, transfer_id, timeout_s=30)
        self.side.rank.expect(ManifestReceived, transfer_id, timeout_s=30)
        self.side.endpoint.complete(transfer_id)
        self.side.get()
        for layer, tokens in enumerate(kv_of(seed)):
            np.testing.assert_array_equal(self.side.rank.read_layer(layer, TABLE, NUM_TOKENS), tokens)

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        self.side.worker.close()
        if isinstance(self.side.driver, FakeCuda):
            self.side.driver.end_process()
            assert FakeCuda.violations == []


@pytest.fixture
def lab(kind: str) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory() as unix_dir:
        made = Lab(kind, unix_dir)
        try:
            yield made
        finally:
            made.close()


def test_kv_arrives_from_another_process(lab: Lab) -> None:
    sender = lab.sender()
    for seed in range(3):
        lab.assert_arrives(sender, seed)
    assert lab.side.endpoint.stats().transports == {"p#0": "cuda_ipc"}
    assert lab.side.endpoint.stats().frames_verified > 0


@pytest.mark.parametrize("moment", ["idle", "under way"])
def test_a_killed_sender_does_no_harm_to_the_receivers_device(lab: Lab, moment: str) -> None:
    """NVIDIA does not say what becomes of memory whose exporter is killed while it is mapped, and read, here."""
    sender = lab.sender()
    lab.assert_arrives(sender, 0)
    if moment == "under way":
        transfer_id = sender.send(lab.side, 1, layers=3)
    sender.process.send_signal(signal.SIGKILL)
    if moment == "under way":
        lab.side.rank.expect(Failed, transfer_id, timeout_s=30)
    lab.side.rank.wait_for(lambda: lab.side.endpoint.stats().open_links == 0)
    check_device(lab.side.driver)
    lab.assert_arrives(lab.sender(), 2)


def test_the_device_computes_what_the_reference_does_and_how_fast(kind: str, record_property: Any) -> None:
    driver, size = make_driver(kind), 64 * 2**20 if kind == "libcuda" else 2**20
    start = driver.allocate(2 * size)
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    driver.write(start, data.tobytes())
    fro = np.stack([start + np.arange(0, size, 8192), np.full(size // 8192, 8192)], 1).astype(np.uint64)
    to = fro.copy()
    to[:, 0] += np.uint64(size)
    jobs = {"digest": (fro, None), "copy and digest": (to, fro)}
    try:
        for name, (at, source) in jobs.items():
            best_s = float("inf")
            for _ in range(5):
                begin_s = time.perf_counter()
                job = driver.begin(at, size, source)
                driver.finish()
                best_s = min(best_s, time.perf_counter() - begin_s)
                assert job.is_done()
                assert job.digest == reference_digest(data)
            record_property(name, f"{size / best_s / 1e9:.0f} GB/s")
            print(f"{name}: {size / best_s / 1e9:.0f} GB/s with launch and wait, best of 5")  # noqa: T201
    finally:
        driver.free(start)
        driver.close()
        if isinstance(driver, FakeCuda):
            driver.end_process()
