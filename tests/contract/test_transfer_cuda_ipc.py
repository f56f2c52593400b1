"""KV over CUDA IPC with devices that are not there: late copies, refused pools, broken devices, and the engine's events."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest

from baton.kv_layout import DeviceMemory, KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.api import EndpointConfig, Failed, Granted, Quiesced, Received, ReserveRequested, TransferId
from kvtransfer.cuda.driver import CudaError
from kvtransfer.cuda.libcuda import LibCuda
from kvtransfer.endpoint import Endpoint
from tests.contract.test_transfer_endpoint import transfer
from tests.support.cuda_stub import build_stub
from tests.support.fake_cuda import FakeCuda
from tests.support.transfer import (
    MODEL,
    SECRET,
    Rank,
    Worker,
    assert_equal,
    kvtransfer_threads,
    make_worker,
    open_fds,
    open_send,
    pattern,
    write_all,
)

NUM_TOKENS = 60
TABLE = [3, 1, 2, 0]
LAYOUT = KVLayout(MODEL, KVGeometry(1, 16, 64), 0)


class Pair:
    """A sender and a receiver, closed at the end."""

    def __init__(self, unix_dir: str) -> None:
        self.unix_dir = unix_dir
        self.source = self.worker("p")
        self.destination = self.worker("d")

    def worker(self, name: str) -> Worker:
        return make_worker(name, transport="cuda_ipc", unix_dir=self.unix_dir)

    def begin(self) -> TransferId:
        """A transfer that is granted."""
        transfer_id = open_send(self.source, self.destination, NUM_TOKENS, TABLE)
        self.destination.leader.expect(ReserveRequested, transfer_id)
        self.destination.leader.endpoint.grant(transfer_id, TABLE, NUM_TOKENS, 0)
        self.source.leader.expect(Granted, transfer_id)
        return transfer_id

    def close(self) -> None:
        self.source.close()
        self.destination.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """After each test no thread and no descriptor is left, and nothing was done to memory that should not be."""
    fds = open_fds()
    with tempfile.TemporaryDirectory() as unix_dir:
        made = Pair(unix_dir)
        try:
            yield made
        finally:
            made.close()
        assert os.listdir(unix_dir) == []
    assert kvtransfer_threads() == []
    assert open_fds() <= fds
    assert FakeCuda.violations == []


def cuda_of(worker: Worker) -> FakeCuda:
    cuda = worker.leader.cuda
    assert cuda is not None
    return cuda


def let_go(worker: Worker) -> None:
    """The device goes on."""
    worker.leader.endpoint._thread.post(cuda_of(worker).let_go)


def events_so_far(rank: Rank) -> list[object]:
    """What the endpoint says, after it has had several turns to say it."""
    for _ in range(5):
        rank.turn()
    rank.seen += rank.endpoint.poll()
    return list(rank.seen)


# Work of a device that is still under way.


@pytest.mark.parametrize("end", ["abort here", "abort there", "the peer closes", "the peer's link breaks"])
def test_blocks_stay_with_the_receiver_until_the_device_has_passed_the_last_copy(pair: Pair, end: str) -> None:
    destination, transfer_id = pair.destination, pair.begin()
    rank, cuda = destination.leader, cuda_of(destination)
    cuda.is_held = True
    write_all(pair.source, transfer_id, TABLE, pattern(MODEL, NUM_TOKENS))
    rank.wait_for(lambda: cuda.num_queued > 0)
    if end == "abort here":
        rank.endpoint.abort(transfer_id, "enough")
    elif end == "abort there":
        pair.source.leader.endpoint.abort(transfer_id, "enough")
        pair.source.leader.expect(Quiesced, transfer_id)
    elif end == "the peer closes":
        pair.source.leader.endpoint.close()
    else:
        thread = rank.endpoint._thread
        (connection,) = thread._switchboard.connections
        thread.post(thread._switchboard.lose, connection, "cut")
    assert events_so_far(rank) == []
    assert rank.endpoint.stats().open_receives == 1
    assert cuda.num_mapped == 1
    let_go(destination)
    rank.expect(Quiesced if end == "abort here" else Failed, transfer_id)
    assert rank.endpoint.stats().open_receives == 0
    np.frombuffer(rank.buffer, np.uint8)[:] = 0xA5  # the blocks have a new owner
    events_so_far(rank)
    assert (np.frombuffer(rank.buffer, np.uint8) == 0xA5).all()
    if not end.startswith("abort"):
        rank.wait_for(lambda: cuda.num_mapped == 0)


def test_blocks_stay_with_the_sender_until_its_device_has_digested_them(pair: Pair) -> None:
    source, transfer_id = pair.source, pair.begin()
    cuda_of(source).is_held = True
    write_all(source, transfer_id, TABLE, pattern(MODEL, NUM_TOKENS))
    source.leader.wait_for(lambda: cuda_of(source).num_queued > 0)
    source.leader.endpoint.abort(transfer_id, "enough")
    assert events_so_far(source.leader) == []
    let_go(source)
    source.leader.expect(Quiesced, transfer_id)
    pair.destination.leader.expect(Failed, transfer_id)


@pytest.mark.parametrize("late", ["copy", "digest"])
def test_copy_and_digest_may_come_in_either_order(pair: Pair, late: str) -> None:
    transfer_id, kv = pair.begin(), pattern(MODEL, NUM_TOKENS)
    slow = pair.destination if late == "copy" else pair.source
    cuda_of(slow).is_held = True
    write_all(pair.source, transfer_id, TABLE, kv)
    pair.source.leader.wait_for(lambda: pair.source.leader.endpoint.stats().bytes_sent == 3 * 60 * 2 * 4 * 16)
    assert events_so_far(pair.destination.leader) == []
    assert pair.destination.leader.endpoint.stats().frames_verified == 0
    let_go(slow)
    pair.destination.leader.expect(Received, transfer_id)
    assert_equal(pair.destination, TABLE, kv)
    assert pair.destination.leader.endpoint.stats().frames_verified > 0


def test_an_endpoint_closes_only_when_its_device_is_done(pair: Pair) -> None:
    transfer_id, rank = pair.begin(), pair.destination.leader
    cuda = cuda_of(pair.destination)
    cuda.is_held = True
    write_all(pair.source, transfer_id, TABLE, pattern(MODEL, NUM_TOKENS))
    rank.wait_for(lambda: cuda.num_queued > 0)
    rank.endpoint.close()
    assert "closed" in rank.expect(Failed, transfer_id).reason
    assert (cuda.num_queued, cuda.num_mapped, cuda.is_closed) == (0, 0, True)


def test_a_pool_stays_mapped_as_long_as_its_link_and_no_longer(pair: Pair) -> None:
    transfer(pair.source, pair.destination)
    assert cuda_of(pair.destination).num_mapped == 1
    assert cuda_of(pair.source).num_mapped == 0
    pair.source.leader.endpoint.close()
    pair.destination.leader.wait_for(lambda: cuda_of(pair.destination).num_mapped == 0)


# The same with libcuda's calls and the kernels, on the host.


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_kv_arrives_by_libcudas_calls_and_the_kernels(tmp_path: Path) -> None:
    stub, size = build_stub(tmp_path), LAYOUT.pool_bytes
    os.chmod(tmp_path, 0o700)
    workers = []
    for name in "pd":
        driver = LibCuda(0, libcuda=stub, image=b"stub")
        start = driver.allocate(size)
        config = EndpointConfig(name, "i", LAYOUT, SECRET, transports=("cuda_ipc",), unix_dir=str(tmp_path))
        endpoint = Endpoint(config, DeviceMemory(start, size, 0), cuda=driver)
        buffer = memoryview((ctypes.c_ubyte * size).from_address(start)).cast("B")
        workers.append(Worker(name, "i", [Rank(LAYOUT, buffer, endpoint, None, None)]))
    source, destination = workers
    transfer(source, destination)
    transfer(source, destination, num_tokens=333, first=32, seed=1)
    assert destination.leader.endpoint.stats().frames_verified > 0
    for worker in workers:
        worker.close()
    assert kvtransfer_threads() == []
    assert ctypes.CDLL(stub).stub_num_allocations() == len(workers)


# The engine's events.


def write_on_device(worker: Worker, layer: int, kv: np.ndarray) -> tuple[object, ...]:
    """The engine has launched the work that will write a layer; the events of its pieces."""
    rank, cuda = worker.leader, cuda_of(worker)
    before = np.frombuffer(rank.buffer, np.uint8).copy()
    rank.write_layer(layer, TABLE, kv)
    there = np.frombuffer(rank.buffer, np.uint8)
    start, size = rank.layout.layer_offset(layer), 4 * rank.layout.block_bytes(layer)
    data = there[start : start + size].tobytes()
    there[:] = before
    return (cuda.write_later(rank.address + start, data),)


def test_a_layer_goes_out_only_after_the_engines_event(pair: Pair) -> None:
    transfer_id, kv = pair.begin(), pattern(MODEL, NUM_TOKENS)
    source = pair.source.leader
    events = []
    for layer, tokens in enumerate(kv):
        (event,) = write_on_device(pair.source, layer, tokens)
        source.endpoint.written(transfer_id, layer, NUM_TOKENS, event)  # type: ignore[arg-type]
        events.append(event)
    events_so_far(source)
    assert source.endpoint.stats().bytes_sent == 0
    for number, event in enumerate(events, 1):
        event.fire()  # type: ignore[attr-defined]
        source.wait_for(lambda n=number: source.endpoint.stats().bytes_sent == n * 60 * 2 * 4 * 16)
    pair.destination.leader.expect(Received, transfer_id)
    assert_equal(pair.destination, TABLE, kv)


def test_a_layer_that_goes_out_before_the_event_would_be_noticed(pair: Pair) -> None:
    transfer_id = pair.begin()
    (event,) = write_on_device(pair.source, 0, pattern(MODEL, NUM_TOKENS)[0])
    pair.source.leader.endpoint.written(transfer_id, 0, NUM_TOKENS)
    pair.destination.leader.wait_for(lambda: pair.destination.leader.endpoint.stats().bytes_received > 0)
    assert set(FakeCuda.violations) == {"bytes were read before the engine had written them"}
    event.fire()  # type: ignore[attr-defined]
    FakeCuda.violations.clear()


# What a peer may say of its pool.


def changed(what: str, exposed: bytes) -> bytes:
    form, handle, uuid, offset, num_bytes = msgpack.unpackb(exposed)
    return {
        "nothing": b"",
        "no msgpack": b"\xc1",
        "another format": msgpack.packb([form + 1, handle, uuid, offset, num_bytes]),
        "a short handle": msgpack.packb([form, handle[:-1], uuid, offset, num_bytes]),
        "a handle of nothing": msgpack.packb([form, bytes(64), uuid, offset, num_bytes]),
        "another size": msgpack.packb([form, handle, uuid, offset, 2 * num_bytes]),
        "an offset that leaves too little": msgpack.packb([form, handle, uuid, offset + 528, num_bytes]),
        "a huge offset": msgpack.packb([form, handle, uuid, 2**63, num_bytes]),
        "a negative offset": msgpack.packb([form, handle, uuid, -16, num_bytes]),
        "an odd offset": msgpack.packb([form, handle, uuid, offset + 1, num_bytes]),
        "a device that is not visible": msgpack.packb([form, handle, b"\x02" * 16, offset, num_bytes]),
    }[what]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nothing", "exposes no pool"),
        ("no msgpack", "exposes no pool"),
        ("another format", "in format 2"),
        ("a short handle", "another pool"),
        ("a handle of nothing", "INVALID_HANDLE"),
        ("another size", "another pool"),
        ("an offset that leaves too little", "mapped memory has"),
        ("a huge offset", "mapped memory has"),
        ("a negative offset", "another pool"),
        ("an odd offset", "another pool"),
        ("a device that is not visible", "not visible here"),
    ],
)
def test_a_pool_that_is_not_what_its_layout_says_is_refused_by_both_and_unmapped(
    pair: Pair, what: str, why: str
) -> None:
    switchboard = pair.source.leader.endpoint._thread._switchboard
    right = switchboard._exposed
    switchboard._exposed = changed(what, right)
    transfer_id = open_send(pair.source, pair.destination, 16, [0])
    reason = pair.source.leader.expect(Failed, transfer_id).reason
    assert "refused by the peer" in reason
    assert why in reason
    pair.destination.leader.wait_for(lambda: pair.destination.leader.endpoint.stats().open_links == 0)
    assert cuda_of(pair.destination).num_mapped == 0
    switchboard._exposed = right
    transfer(pair.source, pair.destination)


def test_a_dead_peers_handle_is_refused(pair: Pair) -> None:
    switchboard = pair.source.leader.endpoint._thread._switchboard
    other = pair.worker("q")
    switchboard._exposed = other.leader.endpoint._thread._switchboard._exposed
    other.close()
    transfer_id = open_send(pair.source, pair.destination, 16, [0])
    assert "can not be mapped" in pair.source.leader.expect(Failed, transfer_id).reason


# Devices that fail.


@pytest.mark.parametrize("side", ["source", "destination"])
def test_work_that_can_not_be_begun_loses_the_link_and_the_next_transfer_finds_another(pair: Pair, side: str) -> None:
    transfer(pair.source, pair.destination)
    failing = pair.source if side == "source" else pair.destination
    transfer_id = pair.begin()
    cuda_of(failing).fails["cuLaunchKernel"] = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    write_all(pair.source, transfer_id, TABLE, pattern(MODEL, NUM_TOKENS))
    for worker in (pair.source, pair.destination):
        worker.leader.expect(Failed, transfer_id)
    del cuda_of(failing).fails["cuLaunchKernel"]
    transfer(pair.source, pair.destination, seed=1)


def test_a_device_that_stops_working_ends_the_endpoint_which_says_so(pair: Pair) -> None:
    transfer_id, rank, cuda = pair.begin(), pair.destination.leader, cuda_of(pair.destination)
    cuda.is_held = True
    write_all(pair.source, transfer_id, TABLE, pattern(MODEL, NUM_TOKENS))
    rank.wait_for(lambda: cuda.num_queued > 0)
    for call in ("cuEventQuery", "cuStreamSynchronize", "cuIpcCloseMemHandle"):
        cuda.fails[call] = "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert "died" in rank.expect(Failed, transfer_id).reason
    rank.endpoint._runner.join(10)
    with pytest.raises(RuntimeError, match="transfer thread died") as caught:
        rank.endpoint.poll()
    assert isinstance(caught.value.__cause__, CudaError)
    pair.source.leader.expect(Failed, transfer_id)


# What can not work is refused at start.


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """A device, and nothing left at the end."""
    made = FakeCuda()
    yield made
    made.end_process()
    assert kvtransfer_threads() == []
    assert FakeCuda.violations == []


def start(cuda: FakeCuda | None, memory: object, tmp_path: Path, **settings: object) -> None:
    os.chmod(str(tmp_path), 0o700)
    config = EndpointConfig("p", "i", LAYOUT, SECRET, transports=("cuda_ipc",), unix_dir=str(tmp_path))
    Endpoint(replace(config, **settings), memory, cuda=cuda)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("too small", "the device memory has"),
        ("beyond its allocation", "not in one allocation"),
        ("not aligned", "not aligned"),
        ("an odd head", "not aligned"),
        ("no export", "cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED"),
        ("wrong digests", "digest is not the reference's"),
        ("wrong copies", "does not copy"),
        ("another transport", "only cuda_ipc reads"),
        ("no directory", "directory"),
        ("a directory for everybody", "0700"),
    ],
)
def test_a_device_or_a_pool_that_can_not_be_used_is_refused_at_start(
    cuda: FakeCuda, tmp_path: Path, what: str, why: str
) -> None:
    size = LAYOUT.pool_bytes
    memory = DeviceMemory(cuda.allocate(size), size, 0)
    settings: dict[str, object] = {}
    match what:
        case "too small":
            memory = replace(memory, num_bytes=size - 16)
        case "beyond its allocation":
            memory = replace(memory, address=memory.address + 16)
        case "not aligned":
            memory = replace(memory, address=memory.address + 8)
        case "an odd head":
            model = ModelKV((LayerSpec(4, 4),), "bfloat16", "f1")
            settings["layout"] = KVLayout(model, KVGeometry(1, 16, 4), 0)
        case "no export":
            cuda.fails["cuIpcGetMemHandle"] = "CUDA_ERROR_NOT_SUPPORTED"
        case "wrong digests":
            cuda.breaks_digests = True
        case "wrong copies":
            cuda.breaks_copies = True
        case "another transport":
            settings["transports"] = ("cuda_ipc", "tcp")
        case "no directory":
            settings["unix_dir"] = ""
        case "a directory for everybody":
            everybody = tmp_path / "everybody"
            everybody.mkdir(mode=0o755)
            settings["unix_dir"] = str(everybody)
    with pytest.raises(ValueError, match=why):
        start(cuda, memory, tmp_path, **settings)
    assert cuda.is_closed or what in ("too small", "another transport", "no directory")


def test_a_pool_in_host_memory_can_not_travel_by_cuda_ipc(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a KV pool on a CUDA device"):
        start(None, memoryview(bytearray(LAYOUT.pool_bytes)), tmp_path)


def test_without_nvidias_driver_the_error_names_it(tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(ValueError, match="cuda_ipc does not work here: NVIDIA's driver is not there"):
            start(None, DeviceMemory(2**40, LAYOUT.pool_bytes, 0), tmp_path)
    else:
        pytest.skip("there is a driver")
