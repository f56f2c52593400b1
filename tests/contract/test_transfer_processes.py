"""Endpoints of two processes: one is killed or stopped at a chosen moment, the other ends cleanly and goes on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from baton.clock import ManualClock
from kvtransfer.api import Failed, Granted, Received, ReserveRequested, SendRequest
from tests.support.transfer import (
    MODEL,
    NIXL,
    Worker,
    kvtransfer_threads,
    let_pass,
    make_worker,
    new_transfer_id,
    open_fds,
    pattern,
    warm_up,
)
from tests.support.transfer_child import Child

LEASE_S = 5.0
NUM_TOKENS = 60
TABLE = [3, 1, 2, 0]


class Lab:
    """A worker of this process whose clock the test moves, and children."""

    def __init__(self, transport: str, unix_dir: str) -> None:
        self.transport = transport
        self.unix_dir = unix_dir
        self.clock = ManualClock()
        self.closing: list[Worker | Child] = []

    def here(self, name: str) -> Worker:
        """A worker of this process."""
        worker = make_worker(name, transport=self.transport, unix_dir=self.unix_dir, clock=self.clock, lease_s=LEASE_S)
        self.closing.append(worker)
        return worker

    def child(self, name: str) -> Child:
        """A worker of another process."""
        child = Child(name, self.transport, self.unix_dir)
        self.closing.append(child)
        return child


@pytest.fixture(params=["tcp", "tcp+tls", "shm", NIXL, "cuda_ipc"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """After each test: no thread and no descriptor is left here."""
    warm_up(request.param)
    fds = open_fds()
    with tempfile.TemporaryDirectory() as unix_dir:
        made = Lab(request.param, unix_dir)
        try:
            yield made
        finally:
            for item in made.closing:
                item.close()
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def peer_of(worker: Worker) -> list[Any]:
    """For the wire to a child."""
    address = worker.leader.endpoint.address
    return [worker.worker_id, worker.incarnation, [[0, address.host, address.port, address.unix_path]]]


def begin_from(child: Child, worker: Worker, table: list[int]) -> str:
    """The child sends its first layer to us; answers the transfer's id in hex."""
    transfer_id = new_transfer_id()
    name = transfer_id.hex()
    child.ask("open_send", id=name, peer=peer_of(worker), num_tokens=NUM_TOKENS, table=TABLE)
    worker.leader.expect(ReserveRequested, transfer_id)
    worker.leader.endpoint.grant(transfer_id, table, NUM_TOKENS, 0)
    before = worker.leader.endpoint.stats().bytes_received
    child.ask("write", id=name, layers=[0], num_tokens=NUM_TOKENS, seed=0, table=TABLE)
    worker.leader.wait_for(lambda: worker.leader.endpoint.stats().bytes_received > before)
    return name


def fill(worker: Worker) -> None:
    """The blocks have a new owner."""
    np.frombuffer(worker.leader.buffer, np.uint8)[:] = 0xA5


def assert_untouched(worker: Worker) -> None:
    """Nothing wrote since `fill`."""
    assert (np.frombuffer(worker.leader.buffer, np.uint8) == 0xA5).all()


def test_a_killed_sender_fails_its_transfer_at_once_and_nothing_more_lands(lab: Lab) -> None:
    destination, sender = lab.here("d"), lab.child("p")
    begin_from(sender, destination, [5, 6, 7, 8])
    sender.signal(signal.SIGKILL)
    assert "lost" in destination.leader.expect(Failed).reason
    fill(destination)
    destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 0)
    assert_untouched(destination)
    begin_from(lab.child("p"), destination, [5, 6, 7, 8])
    assert destination.leader.endpoint.stats().transports == {"p#0": lab.transport}


def test_a_stopped_senders_late_frames_land_nowhere(lab: Lab) -> None:
    destination, sender = lab.here("d"), lab.child("p")
    name = begin_from(sender, destination, [5, 6, 7, 8])
    sender.signal(signal.SIGSTOP)
    sender.tell("write", id=name, layers=[1, 2], num_tokens=NUM_TOKENS, seed=0, table=TABLE)
    sender.tell("expect", id=name, kind="Failed")
    let_pass(lab.clock, LEASE_S + 0.1, destination.leader)
    assert "lease" in destination.leader.expect(Failed).reason
    fill(destination)
    sender.signal(signal.SIGCONT)
    assert sender.hear() is None
    assert sender.hear()["id"] == name
    begin_from(sender, destination, [0, 1, 2, 3])
    pool = destination.leader.layer_bytes(0)
    assert (pool[5:9] == 0xA5).all()
    assert destination.leader.endpoint.stats().open_receives == 1


@pytest.mark.parametrize("moment", ["reserved", "granted", "sent", "received"])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_hangs_fails_the_transfer_in_bounded_time(
    lab: Lab, death: signal.Signals, moment: str
) -> None:
    source, receiver = lab.here("p"), lab.child("d")
    transfer_id = new_transfer_id()
    name = transfer_id.hex()
    source.leader.endpoint.open_send(SendRequest(transfer_id, receiver.peer, NUM_TOKENS, tuple(TABLE)))
    receiver.ask("expect", id=name, kind="ReserveRequested")
    if moment != "reserved":
        receiver.ask("grant", id=name, table=[5, 6, 7, 8], num_tokens=NUM_TOKENS)
        source.leader.expect(Granted)
    if moment in ("sent", "received"):
        for layer, tokens in enumerate(pattern(MODEL, NUM_TOKENS)):
            source.leader.write_layer(layer, TABLE, tokens)
            source.leader.endpoint.written(transfer_id, layer, NUM_TOKENS)
    if moment == "received":
        receiver.ask("expect", id=name, kind=Received.__name__)
    receiver.signal(death)
    if death is signal.SIGSTOP:
        let_pass(lab.clock, LEASE_S + 0.1, source.leader)
    assert source.leader.expect(Failed, transfer_id)
    assert source.leader.endpoint.stats().open_sends == 0
    fill(source)  # the blocks may be used again at once


def test_a_stopped_receiver_that_resumes_learns_that_it_was_given_up(lab: Lab) -> None:
    source, receiver = lab.here("p"), lab.child("d")
    transfer_id = new_transfer_id()
    name = transfer_id.hex()
    source.leader.endpoint.open_send(SendRequest(transfer_id, receiver.peer, NUM_TOKENS, tuple(TABLE)))
    receiver.ask("expect", id=name, kind="ReserveRequested")
    receiver.ask("grant", id=name, table=[5, 6, 7, 8], num_tokens=NUM_TOKENS)
    source.leader.expect(Granted)
    receiver.signal(signal.SIGSTOP)
    let_pass(lab.clock, LEASE_S + 0.1, source.leader)
    source.leader.expect(Failed, transfer_id)
    receiver.signal(signal.SIGCONT)
    assert receiver.ask("expect", id=name, kind="Failed")["id"] == name


def test_a_restarted_receiver_at_a_new_address_is_met_as_another_life(lab: Lab) -> None:
    source, receiver = lab.here("p"), lab.child("d")
    receiver.signal(signal.SIGKILL)
    again = lab.child("d")
    for peer in (receiver.peer, again.peer):
        transfer_id = new_transfer_id()
        source.leader.endpoint.open_send(SendRequest(transfer_id, peer, NUM_TOKENS, tuple(TABLE)))
        if peer is receiver.peer:
            assert "can not reach" in source.leader.expect(Failed, transfer_id).reason
        else:
            assert again.ask("expect", id=transfer_id.hex(), kind="ReserveRequested")["id"] == transfer_id.hex()


def test_a_killed_receivers_socket_file_does_not_stop_the_next_one(lab: Lab) -> None:
    if lab.transport not in ("shm", "cuda_ipc"):
        pytest.skip("no socket files")
    receiver = lab.child("d")
    receiver.signal(signal.SIGKILL)
    receiver.close()
    assert os.path.exists(receiver.peer.ranks[0].unix_path), "SIGKILL leaves the file; the directory's owner removes it"
    lab.child("d")
