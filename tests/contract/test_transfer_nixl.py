"""KV over NIXL, beyond what every transport shows: what a peer may say of its pool, and reads that no one can recall."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest

from baton.kv_layout import KVGeometry, KVLayout
from kvtransfer.api import EndpointConfig, Failed, Quiesced, ReserveRequested, TransferId
from kvtransfer.endpoint import Endpoint
from kvtransfer.transports.nixl import RemotePool
from tests.contract.test_transfer_endpoint import transfer
from tests.support.transfer import (
    MODEL,
    NIXL,
    SECRET,
    Worker,
    closing,
    kvtransfer_threads,
    make_worker,
    new_transfer_id,
    open_fds,
    open_send,
    pattern,
    warm_up,
)
from tests.support.transfer_child import Child

LAYOUT = KVLayout(MODEL, KVGeometry(1, 16, 64), 0)
needs_nixl = NIXL.marks[0]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    if needs_nixl.args[0]:
        yield
        return
    warm_up("nixl")
    fds = open_fds()
    yield
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def test_without_the_package_an_endpoint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    config = EndpointConfig("p", "i", LAYOUT, SECRET, transports=("nixl",))
    with pytest.raises(ValueError, match="pip install nixl"):
        Endpoint(config, memoryview(bytearray(LAYOUT.pool_bytes)))


@needs_nixl
def test_a_peer_without_nixl_is_reached_by_the_next_transport_and_that_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = make_worker("p", transport="nixl", transports=("nixl", "tcp"))
    with closing(source, make_worker("d")) as (_, destination):
        transfer(source, destination)
        assert source.leader.endpoint.stats().transports == {"d#0": "tcp"}
        assert any("fell back to another transport" in record.message for record in caplog.records)


def _changed(what: str, exposed: bytes) -> bytes:
    metadata, address, num_bytes = msgpack.unpackb(exposed)
    return {
        "nothing": b"",
        "no msgpack": b"\xc1",
        "another size": msgpack.packb([metadata, address, num_bytes * 2]),
        "no address": msgpack.packb([metadata, "0", num_bytes]),
        "garbage": msgpack.packb([b"\xff" * 400, address, num_bytes]),
        "half of the metadata": msgpack.packb([metadata[: len(metadata) // 2], address, num_bytes]),
    }[what]


@needs_nixl
@pytest.mark.parametrize(
    "what", ["nothing", "no msgpack", "another size", "no address", "garbage", "half of the metadata"]
)
def test_a_pool_that_is_not_what_its_layout_says_is_refused_by_both(what: str) -> None:
    with closing(make_worker("p", transport="nixl"), make_worker("d", transport="nixl")) as (source, destination):
        switchboard = source.leader.endpoint._thread._switchboard
        switchboard._exposed = _changed(what, switchboard._exposed)
        transfer_id = open_send(source, destination, 16, [0])
        assert "transport: refused by the peer" in source.leader.expect(Failed, transfer_id).reason
        destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 0)


@needs_nixl
def test_another_workers_pool_is_refused() -> None:
    with closing(*(make_worker(name, transport="nixl") for name in "pqd")) as (source, other, destination):
        exposed = other.leader.endpoint._thread._switchboard._exposed
        source.leader.endpoint._thread._switchboard._exposed = exposed
        transfer_id = open_send(source, destination, 16, [0])
        assert "another agent's pool" in source.leader.expect(Failed, transfer_id).reason


@needs_nixl
def test_a_refused_peer_takes_nothing_from_the_one_whose_pool_it_exposed() -> None:
    with closing(*(make_worker(name, transport="nixl") for name in "qpd")) as (source, other, destination):
        transfer(other, destination)
        source.leader.endpoint._thread._switchboard._exposed = other.leader.endpoint._thread._switchboard._exposed
        refused = open_send(source, destination, 16, [0])
        assert "another agent's pool" in source.leader.expect(Failed, refused).reason
        transfer(other, destination, seed=1)
        assert destination.leader.endpoint.stats().transports == {"p#0": "nixl"}


@needs_nixl
def test_memory_beside_the_exposed_pool_can_not_be_read() -> None:
    with closing(make_worker("p", transport="nixl"), make_worker("d", transport="nixl")) as (source, destination):
        switchboard = source.leader.endpoint._thread._switchboard
        metadata, address, num_bytes = msgpack.unpackb(switchboard._exposed)
        switchboard._exposed = msgpack.packb([metadata, address + 2**20, num_bytes])
        transfer_id = open_send(source, destination, 16, [0])
        destination.leader.expect(ReserveRequested, transfer_id)
        destination.leader.endpoint.grant(transfer_id, [0], 16, 0)
        source.leader.write_layer(0, [0], pattern(MODEL, 16)[0])
        source.leader.endpoint.written(transfer_id, 0, 16)
        assert "NIXL" in destination.leader.expect(Failed, transfer_id).reason
        assert not np.frombuffer(destination.leader.buffer, np.uint8).any()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, Child, TransferId, RemotePool]]:
    """A receiver whose read is under way, from a sender that stands still."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")  # between two hosts, the sender's process takes part in a read
    num_tokens, table = 60, [3, 1, 2, 0]
    destination, sender = make_worker("d", transport="nixl"), Child("p", "nixl", "")
    address = destination.leader.endpoint.address
    peer = ["d", destination.incarnation, [[0, address.host, address.port, ""]]]
    thread = destination.leader.endpoint._thread
    held, release = threading.Event(), threading.Event()
    try:
        transfer_id = new_transfer_id()
        sender.ask("open_send", id=transfer_id.hex(), peer=peer, num_tokens=num_tokens, table=table)
        destination.leader.expect(ReserveRequested, transfer_id)
        destination.leader.endpoint.grant(transfer_id, table, num_tokens, 0)
        sender.ask("expect", id=transfer_id.hex(), kind="Granted")
        thread.post(lambda: (held.set(), release.wait(30)))
        assert held.wait(10)
        sender.ask("write", id=transfer_id.hex(), layers=[0], num_tokens=num_tokens, seed=0, table=table)
        sender.ask("sent", id=transfer_id.hex(), num_bytes=num_tokens * 2 * 4 * 16)
        sender.signal(signal.SIGSTOP)
        os.waitpid(sender._process.pid, os.WUNTRACED)
        release.set()
        (remote,) = [connection.remote for connection in thread._switchboard.connections]
        assert remote is not None
        destination.leader.wait_for(lambda: remote.is_busy)
        yield destination, sender, transfer_id, remote
    finally:
        release.set()
        sender.close()
        destination.close()


@needs_nixl
def test_a_read_that_outlives_its_transfer_never_reaches_the_pool(
    stuck: tuple[Worker, Child, TransferId, RemotePool],
) -> None:
    destination, sender, transfer_id, remote = stuck
    destination.leader.endpoint.abort(transfer_id, "enough")
    destination.leader.expect(Quiesced, transfer_id)
    np.frombuffer(destination.leader.buffer, np.uint8)[:] = 0xA5  # the blocks have a new owner
    assert remote.is_busy
    sender.signal(signal.SIGCONT)
    destination.leader.wait_for(lambda: not remote.is_busy)
    assert (np.frombuffer(destination.leader.buffer, np.uint8) == 0xA5).all()
    assert destination.leader.endpoint.stats().stale_frames_dropped == 1


@needs_nixl
def test_staging_memory_stays_until_the_read_of_a_dead_peer_has_failed(
    stuck: tuple[Worker, Child, TransferId, RemotePool],
) -> None:
    destination, sender, transfer_id, remote = stuck
    sender.signal(signal.SIGKILL)
    assert "lost" in destination.leader.expect(Failed, transfer_id).reason
    agent = destination.leader.endpoint._thread._agent
    assert agent is not None
    destination.leader.wait_for(lambda: not agent._remotes)
    assert not remote.is_busy


@needs_nixl
def test_an_endpoint_closes_in_time_with_a_read_under_way(
    stuck: tuple[Worker, Child, TransferId, RemotePool],
) -> None:
    destination, _, transfer_id, remote = stuck
    assert remote.is_busy
    destination.leader.endpoint.close()
    assert kvtransfer_threads() == []
    assert "closed" in destination.leader.expect(Failed, transfer_id).reason
