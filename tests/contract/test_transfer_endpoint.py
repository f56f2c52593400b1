"""One suite over every transport: two real endpoints in one process move KV, or fail as the interface says."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.clock import ManualClock
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer import arrival, digests, link, pool, thread
from kvtransfer.api import (
    Completed,
    CorruptPool,
    EndpointConfig,
    Failed,
    Granted,
    LinkReport,
    ManifestReceived,
    PeerWorker,
    Quiesced,
    Received,
    Refused,
    ReserveRequested,
    SendRequest,
    TransferId,
)
from kvtransfer.connection import HANDSHAKE_S
from kvtransfer.endpoint import Endpoint
from kvtransfer.messages import Data, Reserve
from kvtransfer.native.library import Library, library
from tests.support.transfer import (
    MODEL,
    NIXL,
    SECRET,
    BlockingHook,
    Rank,
    Worker,
    assert_equal,
    kvtransfer_threads,
    let_pass,
    make_worker,
    new_transfer_id,
    open_fds,
    open_send,
    pattern,
    sealed,
    warm_up,
    write_all,
)
from tests.support.transfer_script import ScriptedSender

BIG_MODEL = ModelKV((LayerSpec(8, 128),) * 4, "float32", "big")
"""128 KiB per unit and layer, so that a transfer exceeds every socket buffer."""


class Lab:
    """Makes workers of one transport and closes them."""

    def __init__(self, transport: str, unix_dir: str) -> None:
        self.transport = transport
        self.unix_dir = unix_dir
        self._workers: list[Worker] = []

    def worker(self, name: str, **settings: Any) -> Worker:
        """A worker that is closed with the lab."""
        worker = make_worker(name, transport=self.transport, unix_dir=self.unix_dir, **settings)
        self._workers.append(worker)
        return worker

    def pair(self, **settings: Any) -> tuple[Worker, Worker]:
        """A prefill and a decode worker with equal settings."""
        return self.worker("p", **settings), self.worker("d", **settings)

    def close(self) -> None:
        """Close what is open."""
        for worker in self._workers:
            worker.close()


@pytest.fixture(params=["tcp", "tcp+tls", "shm", NIXL, "cuda_ipc", "local"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """After each test: no thread, descriptor or socket file is left."""
    warm_up(request.param)
    fds = open_fds()
    with tempfile.TemporaryDirectory() as unix_dir:
        os.chmod(unix_dir, 0o700)
        made = Lab(request.param, unix_dir)
        try:
            yield made
        finally:
            made.close()
        assert os.listdir(unix_dir) == []
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def blocks(num_tokens: int, worker: Worker, start: int = 0) -> list[int]:
    """Enough blocks of a worker for a sequence, not in order."""
    size = worker.leader.layout.geometry.block_size
    return list(range(start, start + -(-num_tokens // size)))[::-1]


def grant(destination: Worker, transfer_id: TransferId, table: list[int], num_tokens: int, first: int = 0) -> None:
    """Grant on every rank."""
    for rank in destination.ranks:
        rank.endpoint.grant(transfer_id, table, num_tokens, first)


def complete(source: Worker, destination: Worker, transfer_id: TransferId) -> None:
    """Wait for every Received and the manifest, complete, and wait until the sender knows."""
    for rank in destination.ranks:
        rank.expect(Received, transfer_id)
    destination.leader.expect(ManifestReceived, transfer_id)
    destination.leader.endpoint.complete(transfer_id)
    for rank in destination.ranks[1:]:
        rank.endpoint.close_receive(transfer_id)
    source.leader.expect(Completed, transfer_id)
    for rank in source.ranks[1:]:
        rank.endpoint.close_send(transfer_id)


def transfer(source: Worker, destination: Worker, num_tokens: int = 100, first: int = 0, seed: int = 0) -> None:
    """One whole transfer, checked byte for byte."""
    model = source.leader.layout.model
    kv = pattern(model, num_tokens, seed)
    source_table, destination_table = blocks(num_tokens, source, 1), blocks(num_tokens, destination)
    transfer_id = open_send(source, destination, num_tokens, source_table)
    assert destination.leader.expect(ReserveRequested, transfer_id) == ReserveRequested(
        transfer_id, "p", num_tokens, b"please"
    )
    grant(destination, transfer_id, destination_table, num_tokens, first)
    assert source.leader.expect(Granted, transfer_id).first_token == first
    write_all(source, transfer_id, source_table, kv)
    source.leader.endpoint.finish(transfer_id, b"manifest")
    complete(source, destination, transfer_id)
    assert_equal(destination, destination_table, kv, first)


def assert_quiet(*workers: Worker) -> None:
    """Nothing is open."""
    for worker in workers:
        for rank in worker.ranks:
            rank.wait_for(lambda r=rank: r.endpoint.stats().open_sends == r.endpoint.stats().open_receives == 0)


# Whole transfers.


@pytest.mark.parametrize("block_sizes", [(16, 16), (16, 64), (32, 16)])
@pytest.mark.parametrize("tp_sizes", [(1, 1), (1, 2), (2, 1), (4, 2), (1, 4)])
def test_every_byte_arrives_between_any_geometries(
    lab: Lab, tp_sizes: tuple[int, int], block_sizes: tuple[int, int]
) -> None:
    source = lab.worker("p", tp_size=tp_sizes[0], block_size=block_sizes[0])
    destination = lab.worker("d", tp_size=tp_sizes[1], block_size=block_sizes[1])
    transfer(source, destination)
    assert_quiet(source, destination)
    stats = destination.leader.endpoint.stats()
    assert stats.transports == {f"p#{rank}": lab.transport for rank in range(len(stats.transports))}
    assert stats.frames_verified > 0


@pytest.mark.parametrize("verify", [False, True], ids=["no digests", "digests"])
@pytest.mark.parametrize("destination_tp", [1, 2])
def test_a_large_transfer_arrives_whole(lab: Lab, destination_tp: int, verify: bool) -> None:
    source = lab.worker("p", model=BIG_MODEL, verify=verify)
    destination = lab.worker("d", model=BIG_MODEL, verify=verify, tp_size=destination_tp)
    for seed in range(2):
        transfer(source, destination, num_tokens=1000, seed=seed)  # 31 MiB, past the receiver's caches
    assert_quiet(source, destination)
    assert (destination.leader.endpoint.stats().frames_verified > 0) == verify


def test_a_fast_link_takes_a_large_transfer_in_one_frame(lab: Lab) -> None:
    if lab.transport != "tcp":
        pytest.skip("only frames on a plain stream grow")
    source, destination = lab.pair(model=BIG_MODEL)
    transfer(source, destination)
    [connection] = source.leader.endpoint._thread._switchboard.connections
    connection.link.bytes_per_s = 1e12
    kv, table = pattern(BIG_MODEL, 1000), blocks(1000, source, 1)
    for layer, tokens in enumerate(kv):
        source.leader.write_layer(layer, table, tokens)
    before = destination.leader.endpoint.stats().frames_verified
    transfer_id = open_send(source, destination, 1000, table)
    destination.leader.expect(ReserveRequested, transfer_id)
    grant(destination, transfer_id, blocks(1000, destination), 1000)
    source.leader.endpoint.written(transfer_id, None, 1000)
    source.leader.endpoint.finish(transfer_id, b"")
    complete(source, destination, transfer_id)
    assert_equal(destination, blocks(1000, destination), kv)
    assert destination.leader.endpoint.stats().frames_verified == before + 1


@pytest.mark.parametrize("native_side", ["neither", "p", "d"])
def test_native_code_and_python_packages_understand_each_other(
    lab: Lab, native_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = library()

    def on_this_side() -> Library | None:
        thread = threading.current_thread()  # the main one makes the digests of "p"
        is_native = thread.name.startswith(f"kvtransfer-{native_side}-")
        return here if is_native or (native_side == "p" and thread is threading.main_thread()) else None

    for module in (arrival, digests, link, pool):
        monkeypatch.setattr(module, "library", on_this_side)
    source, destination = lab.worker("p", tp_size=2), lab.worker("d", block_size=32)
    transfer(source, destination)
    assert_quiet(source, destination)
    assert destination.leader.endpoint.stats().frames_verified > 0


def test_a_wrong_digest_fails_the_transfer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = lab.pair()
    transfer(source, destination)
    right = thread.seal

    def wrong(context: bytes, frame: Data, digest: bytes) -> bytes:
        return right(context, frame, bytes([digest[0] ^ 1]) + digest[1:])

    monkeypatch.setattr(thread, "seal", wrong)  # the sender's; a receiver has its own
    table = [0, 1, 2, 3]
    transfer_id = open_send(source, destination, 64, table)
    destination.leader.expect(ReserveRequested, transfer_id)
    grant(destination, transfer_id, table, 64)
    write_all(source, transfer_id, table, pattern(MODEL, 64))
    failed = destination.leader.expect(Failed, transfer_id)
    assert failed.integrity
    assert "wrong digest" in failed.reason
    assert source.leader.expect(Failed, transfer_id).integrity
    monkeypatch.setattr(thread, "seal", right)
    transfer(source, destination)
    assert_quiet(source, destination)


def test_ranks_that_replicate_a_head_share_the_work_and_unneeded_ones_send_nothing(lab: Lab) -> None:
    model = ModelKV((LayerSpec(2, 8),) * 2, "bfloat16", "f")
    source, destination = lab.worker("p", tp_size=4, model=model), lab.worker("d", tp_size=2, model=model)
    transfer(source, destination)
    assert [rank.endpoint.stats().bytes_sent > 0 for rank in source.ranks] == [True, False, True, False]


def test_chunks_go_out_as_they_are_written_and_the_partial_unit_only_at_the_end(lab: Lab) -> None:
    source, destination = lab.pair()
    num_tokens, table = 75, [9, 1, 2, 3, 4]
    kv = pattern(MODEL, num_tokens)
    transfer_id = open_send(source, destination, num_tokens, table)
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [5, 6, 7, 8, 0], num_tokens)
    unit = 2 * 4 * 8 * 2 * 16
    sent = 0
    for start, end in ((0, 20), (20, 60), (60, 75)):
        for layer, tokens in enumerate(kv):
            source.leader.write_layer(layer, table, tokens[:, :, :end])
            source.leader.endpoint.written(transfer_id, layer, end)
        sent = 3 * (end // 16 * unit if end < num_tokens else num_tokens * unit // 16)
        source.leader.wait_for(lambda n=sent: source.leader.endpoint.stats().bytes_sent == n)
        assert start < end
    source.leader.endpoint.finish(transfer_id, b"m")
    complete(source, destination, transfer_id)
    assert_equal(destination, [5, 6, 7, 8, 0], kv)
    assert destination.leader.endpoint.stats().bytes_received == sent


def test_a_command_after_the_end_wakes_nobody_else_who_has_the_descriptor_now(lab: Lab) -> None:
    worker = lab.worker("p")
    thread = worker.leader.endpoint._thread
    number = thread._wake_fd
    assert number is not None
    worker.leader.endpoint.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    os.dup2(other, number)
    try:
        thread.post(print)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)
        if number != other:
            os.close(number)


def test_the_transfer_thread_is_woken_for_a_certain_amount_of_kv(lab: Lab) -> None:
    source, destination = lab.pair()
    transfer_id = open_send(source, destination, 64, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 64)
    source.leader.expect(Granted)
    kv = pattern(MODEL, 64)
    layer_bytes = 64 * 2 * 4 * 16
    source.leader.endpoint._thread.wake_bytes = 2 * layer_bytes
    for layer in range(2):
        source.leader.write_layer(layer, [1, 2, 3, 4], kv[layer])
        source.leader.endpoint.written(transfer_id, layer, 64)
    source.leader.wait_for(lambda: source.leader.endpoint.stats().bytes_sent == 2 * layer_bytes)
    source.leader.write_layer(2, [1, 2, 3, 4], kv[2])
    source.leader.endpoint.written(transfer_id, 2, 64)
    source.leader.endpoint.finish(transfer_id, b"m")
    complete(source, destination, transfer_id)
    assert_equal(destination, [0, 1, 2, 3], kv)


@pytest.mark.parametrize("first", [16, 64, 96])
def test_only_what_the_receiver_lacks_travels(lab: Lab, first: int) -> None:
    source, destination = lab.pair()
    transfer(source, destination, num_tokens=100, first=first)
    assert destination.leader.endpoint.stats().bytes_received == (100 - first) * 2 * 4 * 16 * 3
    assert not destination.leader.layer_bytes(0)[blocks(100, destination)[0]].any()


def test_a_transfer_of_which_everything_is_cached_moves_no_byte(lab: Lab) -> None:
    source, destination = lab.pair()
    transfer_id = open_send(source, destination, 64, [0, 1, 2, 3])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [3, 2, 1, 0], 64, 64)
    source.leader.endpoint.finish(transfer_id, b"m")
    complete(source, destination, transfer_id)
    assert source.leader.endpoint.stats().bytes_sent == 0


def test_kv_that_was_written_before_the_grant_goes_out_after_it(lab: Lab) -> None:
    source, destination = lab.pair()
    kv = pattern(MODEL, 40)
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    write_all(source, transfer_id, [1, 2, 3], kv)
    source.leader.endpoint.finish(transfer_id, b"early")
    destination.leader.expect(ReserveRequested)
    assert source.leader.endpoint.stats().bytes_sent == 0
    grant(destination, transfer_id, [0, 1, 2], 40)
    complete(source, destination, transfer_id)
    assert_equal(destination, [0, 1, 2], kv)


def test_a_follower_may_be_granted_before_its_source_has_connected(lab: Lab) -> None:
    source, destination = lab.worker("p"), lab.worker("d", tp_size=2)
    transfer_id = new_transfer_id()
    destination.ranks[1].endpoint.grant(transfer_id, [0, 1], 32, 0)
    request = SendRequest(transfer_id, destination.peer, 32, (0, 1))
    kv = pattern(MODEL, 32)
    source.leader.endpoint.open_send(request)
    write_all(source, transfer_id, [0, 1], kv)
    source.leader.endpoint.finish(transfer_id, b"m")
    destination.leader.expect(ReserveRequested)
    destination.leader.endpoint.grant(transfer_id, [0, 1], 32, 0)
    complete(source, destination, transfer_id)
    assert_equal(destination, [0, 1], kv)


@pytest.mark.parametrize("credit_bytes", [1, 5000])
def test_credits_far_smaller_than_the_transfer_slow_it_and_lose_nothing(lab: Lab, credit_bytes: int) -> None:
    source, destination = lab.pair(credit_bytes=credit_bytes)
    transfer(source, destination, num_tokens=500)


def test_fifty_transfers_run_side_by_side_on_one_link(lab: Lab) -> None:
    source, destination = lab.pair(num_blocks=300)
    cases = []
    for number in range(50):
        num_tokens = 33 + number
        table = list(range(number * 6, number * 6 + 6))
        kv = pattern(MODEL, num_tokens, number)
        transfer_id = open_send(source, destination, num_tokens, table)
        cases.append((transfer_id, num_tokens, table, kv))
    for transfer_id, num_tokens, table, _ in cases:
        destination.leader.expect(ReserveRequested, transfer_id)
        grant(destination, transfer_id, table[::-1], num_tokens)
    for layer in range(3):
        for transfer_id, num_tokens, table, kv in cases:
            source.leader.write_layer(layer, table, kv[layer])
            source.leader.endpoint.written(transfer_id, layer, num_tokens)
    for transfer_id, _, table, kv in cases:
        source.leader.endpoint.finish(transfer_id, b"m")
        complete(source, destination, transfer_id)
        assert_equal(destination, table[::-1], kv)
    assert destination.leader.endpoint.stats().open_links == 1


def test_a_worker_sends_and_receives_at_the_same_time(lab: Lab) -> None:
    left, right = lab.worker("p"), lab.worker("d")
    kv = pattern(MODEL, 48)
    there = open_send(left, right, 48, [0, 1, 2])
    back = open_send(right, left, 48, [0, 1, 2])
    right.leader.expect(ReserveRequested, there)
    left.leader.expect(ReserveRequested, back)
    grant(right, there, [10, 11, 12], 48)
    grant(left, back, [10, 11, 12], 48)
    for source, transfer_id in ((left, there), (right, back)):
        write_all(source, transfer_id, [0, 1, 2], kv)
        source.leader.endpoint.finish(transfer_id, b"m")
    complete(left, right, there)
    complete(right, left, back)
    assert_equal(left, [10, 11, 12], kv)
    assert_equal(right, [10, 11, 12], kv)


def test_a_large_payload_and_a_large_manifest_fit(lab: Lab) -> None:
    source, destination = lab.pair()
    payload = os.urandom(3 * 2**20)
    transfer_id = open_send(source, destination, 16, [0], payload)
    assert destination.leader.expect(ReserveRequested).payload == payload
    grant(destination, transfer_id, [0], 16)
    source.leader.endpoint.finish(transfer_id, payload)
    assert destination.leader.expect(ManifestReceived).payload == payload


# Refusals.


def test_a_refused_transfer_is_over_and_the_code_arrives(lab: Lab) -> None:
    source, destination = lab.pair()
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    destination.leader.expect(ReserveRequested)
    destination.leader.endpoint.refuse(transfer_id, "overloaded", "no blocks")
    assert source.leader.expect(Refused) == Refused(transfer_id, "overloaded", "no blocks")
    assert_quiet(source, destination)
    transfer(source, destination)


def test_a_refusal_by_the_leader_reaches_the_followers_that_were_announced_to(lab: Lab) -> None:
    source, destination = lab.worker("p"), lab.worker("d", tp_size=2)
    transfer(source, destination)  # every link is up, so the next announcement is there at once
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    destination.leader.expect(ReserveRequested, transfer_id)
    destination.ranks[1].wait_for(lambda: destination.ranks[1].endpoint.stats().open_receives == 1)
    destination.leader.endpoint.refuse(transfer_id, "overloaded", "no blocks")
    source.leader.expect(Refused, transfer_id)
    assert_quiet(source, destination)


def test_another_clusters_secret_is_refused_with_that_reason(lab: Lab) -> None:
    source, destination = lab.worker("p", secret=b"x" * 32), lab.worker("d")
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    assert "secret" in source.leader.expect(Failed, transfer_id).reason
    assert_quiet(source, destination)
    assert destination.leader.seen == []


@pytest.mark.parametrize(
    ("field", "model"),
    [
        ("fingerprint", replace(MODEL, fingerprint="other")),
        ("dtype", replace(MODEL, dtype="float32")),
        ("layers", replace(MODEL, layers=MODEL.layers[:2])),
        ("hash_version", replace(MODEL, hash_version=2)),
    ],
)
def test_another_models_identity_is_refused_and_the_field_is_named(lab: Lab, field: str, model: ModelKV) -> None:
    source, destination = lab.worker("p", model=model), lab.worker("d")
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    reason = source.leader.expect(Failed, transfer_id).reason
    assert f"layout: {field} differs" in reason or f"{field} differs" in reason


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float8_e4m3fn")])
def test_pools_of_two_dtypes_are_refused_by_both_names_before_any_request_and_nothing_is_converted(
    lab: Lab, dtypes: tuple[str, str]
) -> None:
    model = replace(MODEL, layers=(LayerSpec(4, 16),) * 3)
    source = lab.worker("p", model=replace(model, dtype=dtypes[0]))
    destination = lab.worker("d", model=replace(model, dtype=dtypes[1]))
    reports: queue.SimpleQueue[LinkReport] = queue.SimpleQueue()
    source.leader.endpoint.set_on_link(reports.put)
    source.leader.endpoint.connect(destination.peer)
    report = reports.get(timeout=10)
    assert (report.worker_id, report.tp_rank, report.transport) == ("d", 0, "")
    assert "dtype differs" in report.reason
    assert all(dtype in report.reason for dtype in dtypes)
    transfer_id = open_send(source, destination, 16, [0])
    assert "dtype differs" in source.leader.expect(Failed, transfer_id).reason
    assert not np.frombuffer(destination.leader.buffer, np.uint8).any()


def test_an_earlier_life_of_the_worker_is_not_met(lab: Lab) -> None:
    source, destination = lab.pair()
    stale = PeerWorker("d", "an earlier incarnation", destination.peer.ranks)
    transfer_id = new_transfer_id()
    source.leader.endpoint.open_send(SendRequest(transfer_id, stale, 16, (0,)))
    assert "another worker answers" in source.leader.expect(Failed, transfer_id).reason


def test_a_peer_that_is_not_there_fails_the_transfer_at_once(lab: Lab) -> None:
    source, destination = lab.pair()
    peer = destination.peer
    destination.close()
    lab._workers.remove(destination)
    transfer_id = new_transfer_id()
    source.leader.endpoint.open_send(SendRequest(transfer_id, peer, 16, (0,)))
    assert "can not reach d#0" in source.leader.expect(Failed, transfer_id).reason


# Aborts.

MOMENTS = ["opened", "requested", "granted", "writing", "received", "whole"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_abort_at_any_moment_quiesces_here_and_reaches_the_peer(lab: Lab, side: str, moment: str) -> None:
    source, destination = lab.pair()
    kv = pattern(MODEL, 60)
    aborting = source if side == "source" else destination
    other = destination if side == "source" else source
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    reached = MOMENTS.index(moment)
    if side == "destination" and reached == 0:
        reached = 1
    if reached >= 1:
        destination.leader.expect(ReserveRequested)
    if reached >= 2:
        grant(destination, transfer_id, [0, 1, 2, 3], 60)
        source.leader.expect(Granted)
    if reached >= 3:
        source.leader.write_layer(0, [1, 2, 3, 4], kv[0])
        source.leader.endpoint.written(transfer_id, 0, 60)
    if reached >= 4:
        write_all(source, transfer_id, [1, 2, 3, 4], kv)
        destination.leader.expect(Received)
    if reached >= 5:
        source.leader.endpoint.finish(transfer_id, b"m")
        destination.leader.expect(ManifestReceived)
    aborting.leader.endpoint.abort(transfer_id, "changed my mind")
    aborting.leader.expect(Quiesced, transfer_id)
    aborting.leader.endpoint.abort(transfer_id, "once more")
    aborting.leader.expect(Quiesced, transfer_id)
    if reached >= 5 and side == "source":  # the receiver is whole and needs nobody
        destination.leader.endpoint.complete(transfer_id)
    elif reached >= 1:
        assert "changed my mind" in other.leader.expect(Failed, transfer_id).reason
    assert_quiet(source, destination)
    transfer(source, destination, seed=1)
    assert source.leader.endpoint.stats().open_links == 1


def test_abort_of_an_unknown_transfer_is_answered(lab: Lab) -> None:
    source = lab.worker("p")
    transfer_id = new_transfer_id()
    source.leader.endpoint.abort(transfer_id, "?")
    source.leader.expect(Quiesced, transfer_id)


def test_a_grant_after_the_peers_abort_fails_and_nothing_is_held(lab: Lab) -> None:
    source, destination = lab.worker("p"), lab.worker("d", tp_size=2)
    transfer_id = open_send(source, destination, 32, [0, 1])
    destination.leader.expect(ReserveRequested)
    destination.ranks[1].wait_for(lambda: destination.ranks[1].endpoint.stats().open_receives == 1)
    source.leader.endpoint.abort(transfer_id, "gone")
    destination.leader.expect(Failed, transfer_id)
    assert_quiet(destination)
    grant(destination, transfer_id, [0, 1], 32)
    assert "gone" in destination.ranks[1].expect(Failed, transfer_id).reason
    assert_quiet(destination)


def test_no_byte_lands_after_quiesced_although_the_sender_goes_on(lab: Lab) -> None:
    hook = BlockingHook(at_landing=2)
    source, destination = lab.worker("p", model=BIG_MODEL), lab.worker("d", model=BIG_MODEL, faults=hook)
    num_tokens = 64 * 16
    table = list(range(64))
    kv = pattern(BIG_MODEL, num_tokens)
    transfer_id = open_send(source, destination, num_tokens, table)
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, table, num_tokens)
    write_all(source, transfer_id, table, kv)
    assert hook.reached.wait(10)
    destination.leader.endpoint.abort(transfer_id, "enough")
    hook.release.set()
    destination.leader.expect(Quiesced, transfer_id)
    np.frombuffer(destination.leader.buffer, np.uint8)[:] = 0xA5
    source.leader.expect(Failed, transfer_id)
    transfer_2 = open_send(source, destination, 16, [0])
    destination.leader.expect(ReserveRequested, transfer_2)
    assert (np.frombuffer(destination.leader.buffer, np.uint8) == 0xA5).all()
    assert destination.leader.endpoint.stats().stale_frames_dropped > 0
    assert destination.leader.endpoint.stats().open_links == 1


def test_no_byte_is_read_after_quiesced_although_a_frame_is_under_way(lab: Lab) -> None:
    hook = BlockingHook(at_landing=2)
    source, destination = lab.worker("p", model=BIG_MODEL), lab.worker("d", model=BIG_MODEL, faults=hook)
    reports: queue.SimpleQueue[LinkReport] = queue.SimpleQueue()
    source.leader.endpoint.set_on_link(reports.put)
    num_tokens = 64 * 16
    table = list(range(64))
    kv = pattern(BIG_MODEL, num_tokens)
    transfer_id = open_send(source, destination, num_tokens, table)
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, table, num_tokens)
    write_all(source, transfer_id, table, kv)
    assert hook.reached.wait(10)
    sent = -1
    while sent != source.leader.endpoint.stats().bytes_sent:  # until the socket is full
        sent = source.leader.endpoint.stats().bytes_sent
        source.leader.turn()
    source.leader.endpoint.abort(transfer_id, "enough")
    source.leader.expect(Quiesced, transfer_id)
    np.frombuffer(source.leader.buffer, np.uint8)[:] = 0
    hook.release.set()
    failed = destination.leader.expect(Failed, transfer_id)
    assert (failed.reason, failed.integrity) == ("peer: enough", False)
    # A frame under way kept its bytes; on shared memory the late reader's own copy failed, as part of the abort.
    assert destination.leader.endpoint.stats().integrity_failures == 0
    transfer_2 = open_send(source, destination, 16, [0])
    destination.leader.expect(ReserveRequested, transfer_2)
    assert reports.get(timeout=10).transport == lab.transport
    assert reports.empty()  # it is the same link


# Faults.


class FlipOneByte:
    """Flips a byte of the first data frame: in the sender's pool once it has its digest, on its way, or in its place."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._is_done = False

    def _flip(self, views: list[memoryview]) -> None:
        if not self._is_done:
            self._is_done = True
            views[0][0] ^= 1

    def before_send(self, frame: Data, payload: list[memoryview]) -> list[memoryview]:
        """See FaultHook."""
        if self._where == "wire":
            payload = [memoryview(bytearray(view)) for view in payload]
        if self._where != "landing":
            self._flip(payload)
        return payload

    def after_landing(self, frame: Data, piece: memoryview) -> None:
        """See FaultHook."""
        if self._where == "landing":
            self._flip([piece])


@pytest.mark.parametrize("where", ["source", "wire", "landing"])
def test_one_flipped_bit_fails_the_transfer_on_both_sides_and_is_counted(lab: Lab, where: str) -> None:
    if where == "wire" and lab.transport in ("shm", "nixl", "cuda_ipc"):
        pytest.skip("the receiver fetches the bytes")
    fault = FlipOneByte(where)
    source, destination = lab.worker("p", faults=fault), lab.worker("d", faults=fault)
    kv = pattern(MODEL, 60)
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 60)
    write_all(source, transfer_id, [1, 2, 3, 4], kv)
    assert destination.leader.expect(Failed, transfer_id).integrity
    assert destination.leader.endpoint.stats().integrity_failures == 1
    assert not [event for event in destination.leader.seen if isinstance(event, Received)]
    if where == "source" and lab.transport != "cuda_ipc":  # a device keeps no digests
        with pytest.raises(CorruptPool):
            source.leader.expect(Failed, transfer_id)
        return
    assert source.leader.expect(Failed, transfer_id).integrity
    assert_quiet(source, destination)
    transfer(source, destination, seed=1)


def test_digests_are_made_once_and_tell_when_kv_changes_afterwards(lab: Lab) -> None:
    source, destination = lab.pair()
    table, kv = [1, 2, 3, 4], pattern(MODEL, 64)
    first = open_send(source, destination, 64, table)
    destination.leader.expect(ReserveRequested, first)
    destination.leader.endpoint.refuse(first, "overloaded", "no room")
    write_all(source, first, table, kv)
    source.leader.expect(Refused, first)
    source.leader.layer_bytes(2)[table[3], 1, 1, 7, 3] ^= 4  # nobody has announced this
    again = open_send(source, destination, 64, table)
    destination.leader.expect(ReserveRequested, again)
    grant(destination, again, [0, 1, 2, 3], 64)
    source.leader.endpoint.written(again, None, 64)
    if lab.transport == "cuda_ipc":
        pytest.skip("a device keeps no digests")
    assert destination.leader.expect(Failed, again).integrity
    with pytest.raises(CorruptPool):
        source.leader.expect(Failed, again)


def test_kv_that_is_written_anew_gets_new_digests(lab: Lab) -> None:
    source, destination = lab.pair()
    for seed in range(3):  # the same blocks, other bytes
        transfer(source, destination, seed=seed)
    assert_quiet(source, destination)


class SwapFrames:
    """Sends the bytes of the first frame under the name of the second, and the other way round."""

    def __init__(self) -> None:
        self._first: list[bytes] = []

    def before_send(self, frame: Data, payload: list[memoryview]) -> list[memoryview]:
        """See FaultHook."""
        if not self._first:
            self._first = [bytes(view) for view in payload]
        elif len(self._first) == len(payload):
            for view, other in zip(payload, self._first, strict=True):
                view[:] = other
        return payload

    def after_landing(self, frame: Data, piece: memoryview) -> None:
        """See FaultHook."""


def test_right_bytes_under_another_frames_name_are_refused(lab: Lab) -> None:
    source, destination = lab.worker("p", faults=SwapFrames()), lab.worker("d")
    source.leader.endpoint._thread.wake_bytes = 0
    transfer_id = open_send(source, destination, 64, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 64)
    for layer, tokens in enumerate(pattern(MODEL, 64)[:2]):
        source.leader.write_layer(layer, [1, 2, 3, 4], tokens)
        source.leader.endpoint.written(transfer_id, layer, 64)
        source.leader.wait_for(lambda n=layer: source.leader.endpoint.stats().bytes_sent > n * 8192)
    assert destination.leader.expect(Failed, transfer_id).integrity


@pytest.mark.parametrize("side", ["source", "destination"])
def test_the_end_of_a_peer_fails_the_transfer_here(lab: Lab, side: str) -> None:
    source, destination = lab.pair()
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 60)
    source.leader.expect(Granted)
    ending, other = (source, destination) if side == "source" else (destination, source)
    ending.leader.endpoint.close()
    assert "the endpoint was closed" in other.leader.expect(Failed, transfer_id).reason
    assert isinstance(ending.leader.expect(Failed, transfer_id), Failed)
    assert_quiet(other)


def test_a_receiver_that_hangs_fails_the_transfer_within_the_lease(lab: Lab) -> None:
    hook, clock = BlockingHook(at_landing=1), ManualClock()
    source, destination = lab.worker("p", clock=clock, lease_s=5.0), lab.worker("d", faults=hook)
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 60)
    write_all(source, transfer_id, [1, 2, 3, 4], pattern(MODEL, 60))
    assert hook.reached.wait(10)
    let_pass(clock, 5.1, source.leader)
    assert "lease" in source.leader.expect(Failed, transfer_id).reason
    hook.release.set()
    destination.leader.expect(Failed, transfer_id)
    assert_quiet(source, destination)


def test_a_sender_that_hangs_fails_the_transfer_within_the_lease(lab: Lab) -> None:
    hook, clock = BlockingHook(at_send=1), ManualClock()
    source, destination = lab.worker("p", faults=hook), lab.worker("d", clock=clock, lease_s=5.0)
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2, 3], 60)
    write_all(source, transfer_id, [1, 2, 3, 4], pattern(MODEL, 60))
    assert hook.reached.wait(10)
    let_pass(clock, 5.1, destination.leader)
    assert "lease" in destination.leader.expect(Failed, transfer_id).reason
    hook.release.set()
    source.leader.expect(Failed, transfer_id)
    assert_quiet(source, destination)


def test_a_granted_transfer_that_nobody_sends_lapses(lab: Lab) -> None:
    clock = ManualClock()
    destination = lab.worker("d", tp_size=2, clock=clock, lease_s=5.0)
    transfer_id = new_transfer_id()
    follower = destination.ranks[1]
    follower.endpoint.grant(transfer_id, [0, 1], 32, 0)
    follower.wait_for(lambda: follower.endpoint.stats().open_receives == 1)
    let_pass(clock, 5.1, follower)
    assert "nobody announced" in follower.expect(Failed, transfer_id).reason


def test_a_request_that_the_receiving_engine_never_answers_is_refused_in_time(lab: Lab) -> None:
    clock = ManualClock()
    source, destination = lab.pair(clock=clock, lease_s=5.0)
    transfer_id = open_send(source, destination, 60, [1, 2, 3, 4])
    destination.leader.expect(ReserveRequested)
    let_pass(clock, 5.1, source.leader, destination.leader, steps=20)
    assert source.leader.expect(Refused, transfer_id).code == "unavailable"
    destination.leader.expect(Failed, transfer_id)
    assert_quiet(source, destination)


def test_a_long_prefill_does_not_end_the_lease(lab: Lab) -> None:
    clock = ManualClock()
    source, destination = lab.pair(clock=clock, lease_s=5.0)
    kv = pattern(MODEL, 40)
    transfer_id = open_send(source, destination, 40, [1, 2, 3])
    destination.leader.expect(ReserveRequested)
    grant(destination, transfer_id, [0, 1, 2], 40)
    source.leader.expect(Granted)
    let_pass(clock, 60.0, source.leader, destination.leader, steps=240)
    write_all(source, transfer_id, [1, 2, 3], kv)
    source.leader.endpoint.finish(transfer_id, b"m")
    complete(source, destination, transfer_id)


def test_without_verification_bytes_move_and_none_is_counted_as_verified(lab: Lab) -> None:
    source, destination = lab.pair(verify=False)
    transfer(source, destination)
    assert destination.leader.endpoint.stats().frames_verified == 0


def test_one_side_that_verifies_is_enough(lab: Lab) -> None:
    source, destination = lab.worker("p", verify=False), lab.worker("d")
    transfer(source, destination)
    assert destination.leader.endpoint.stats().frames_verified > 0


# What callers get wrong is an error at once.


class Fired:
    """An event of a device."""

    def query(self) -> bool:
        """See Ready."""
        return True


def test_impossible_requests_are_refused_where_they_are_made(lab: Lab) -> None:
    rank = lab.worker("p", num_blocks=4).leader
    peer = PeerWorker("d", "i", ())
    with pytest.raises(ValueError, match="do not hold"):
        rank.endpoint.open_send(SendRequest(new_transfer_id(), peer, 33, (0, 1)))
    with pytest.raises(ValueError, match="outside"):
        rank.endpoint.grant(new_transfer_id(), [4], 16, 0)
    with pytest.raises(ValueError, match="multiple"):
        rank.endpoint.grant(new_transfer_id(), [0], 16, 8)
    with pytest.raises(ValueError, match="16 bytes"):
        rank.endpoint.open_send(SendRequest(TransferId(b"short"), peer, 16, (0,)))
    with pytest.raises(ValueError, match="no layer 3"):
        rank.endpoint.written(new_transfer_id(), 3, 16)
    if rank.cuda is None:
        with pytest.raises(ValueError, match="must be there"):
            rank.endpoint.written(new_transfer_id(), 0, 16, ready=Fired())
    with pytest.raises(ValueError, match="control payload"):
        rank.endpoint.finish(new_transfer_id(), bytes(9 * 2**20))


# What only some transports have.


@pytest.fixture
def unix_dir() -> Iterator[str]:
    """A private directory with a short path."""
    fds = open_fds()
    with tempfile.TemporaryDirectory() as path:
        yield path
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def warnings_of(caplog: pytest.LogCaptureFixture, message: str) -> list[logging.LogRecord]:
    """Log records with a constant message."""
    return [record for record in caplog.records if record.getMessage() == message]


def test_falling_back_from_shared_memory_is_reported_once(unix_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    source = make_worker("p", transport="shm", unix_dir=unix_dir)
    destination = make_worker("d", transport="shm", unix_dir=unix_dir)
    try:
        os.unlink(destination.leader.endpoint.address.unix_path)
        transfer(source, destination)
        transfer(source, destination, seed=1)
        assert source.leader.endpoint.stats().transports == {"d#0": "tcp"}
        (record,) = warnings_of(caplog, "fell back to another transport")
        assert record.levelno == logging.WARNING
        assert record.__dict__["transport"] == "tcp"
    finally:
        source.close()
        destination.close()


def test_a_pool_that_can_not_be_shared_falls_back_to_tcp(unix_dir: str) -> None:
    source = make_worker("p", transport="shm", unix_dir=unix_dir, shared_pool=False)
    destination = make_worker("d", transport="shm", unix_dir=unix_dir)
    try:
        transfer(source, destination)
        assert source.leader.endpoint.stats().transports == {"d#0": "tcp"}
    finally:
        source.close()
        destination.close()


def test_the_receiver_can_not_write_the_senders_pool(unix_dir: str) -> None:
    import mmap

    source = make_worker("p", transport="shm", unix_dir=unix_dir)
    try:
        assert source.leader.fd is not None
        with pytest.raises(PermissionError):
            mmap.mmap(source.leader.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(source.leader.fd, 16)
    finally:
        source.close()


def make_bare(**settings: Any) -> Endpoint:
    """An endpoint without a peer."""
    layout = KVLayout(MODEL, KVGeometry(1, 16, 4), 0)
    config = replace(EndpointConfig("x", "i", layout, SECRET), **settings)
    return Endpoint(config, memoryview(bytearray(layout.pool_bytes)))


def test_a_socket_path_that_is_too_long_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unix socket path may have 107 bytes"):
        make_bare(unix_dir=str(tmp_path / ("x" * 100)))
    assert kvtransfer_threads() == []


def test_a_socket_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    with pytest.raises(ValueError, match="0700"):
        make_bare(unix_dir=str(tmp_path))


def test_an_unknown_transport_is_an_error_at_start() -> None:
    with pytest.raises(ValueError, match="transports must be some of"):
        make_bare(transports=("carrier pigeon",))


def test_the_secret_is_in_no_repr() -> None:
    layout = KVLayout(MODEL, KVGeometry(1, 16, 4), 0)
    assert "secret" not in repr(EndpointConfig("x", "i", layout, SECRET))


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n" + bytes(64), b"\xff" * 4096, b"BK\x01\x01" + b"\xff" * 60]
)
def test_garbage_is_disconnected_and_hurts_nobody(garbage: bytes) -> None:
    source, destination = make_worker("p"), make_worker("d")
    try:
        address = destination.leader.endpoint.address
        with socket.create_connection((address.host, address.port), timeout=5) as sock:
            sock.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
        transfer(source, destination)
    finally:
        source.close()
        destination.close()


@pytest.fixture
def half_sent() -> Iterator[tuple[Worker, ScriptedSender, TransferId, bytes]]:
    """A receiver in the middle of a payload: half of a frame's bytes have landed, the other half is still to come."""
    destination = make_worker("d")
    sender = ScriptedSender(destination, destination.leader.layout)
    transfer_id = new_transfer_id()
    sender.say(Reserve(transfer_id, 64, b""))
    destination.leader.expect(ReserveRequested)
    destination.leader.endpoint.grant(transfer_id, [0, 1, 2, 3], 64, 0)
    payload = os.urandom(4 * 2048)
    frame = Data(transfer_id, 0, 0, 0, 1, 0, 4, bytes(16), b"")
    frame = sealed(sender.session.context, frame, payload, leaf_bytes=256)
    sender.sock.sendall(sender.frame(frame, len(payload)) + payload[:4096])
    destination.leader.wait_for(lambda: destination.leader.layer_bytes(0)[1].any())
    try:
        yield destination, sender, transfer_id, payload
    finally:
        sender.close()
        destination.close()


def test_a_frame_that_comes_in_two_halves_is_verified_whole(
    half_sent: tuple[Worker, ScriptedSender, TransferId, bytes],
) -> None:
    destination, sender, _, payload = half_sent
    sender.sock.sendall(payload[4096:])
    destination.leader.wait_for(lambda: destination.leader.endpoint.stats().frames_verified == 1)
    assert bytes(destination.leader.buffer[:8192]) == payload


def test_the_rest_of_a_payload_lands_nowhere_after_quiesced(
    half_sent: tuple[Worker, ScriptedSender, TransferId, bytes],
) -> None:
    destination, sender, transfer_id, payload = half_sent
    destination.leader.endpoint.abort(transfer_id, "enough")
    destination.leader.expect(Quiesced)
    np.frombuffer(destination.leader.buffer, np.uint8)[:] = 0xA5
    sender.sock.sendall(payload[4096:])
    again = new_transfer_id()
    sender.say(Reserve(again, 64, b""))
    destination.leader.expect(ReserveRequested, again)
    assert (np.frombuffer(destination.leader.buffer, np.uint8) == 0xA5).all()
    assert destination.leader.endpoint.stats().stale_frames_dropped == 1


def test_half_a_frame_and_the_end_of_the_connection_fail_the_transfer(
    half_sent: tuple[Worker, ScriptedSender, TransferId, bytes],
) -> None:
    destination, sender, transfer_id, _ = half_sent
    sender.close()
    assert "lost" in destination.leader.expect(Failed, transfer_id).reason


def test_a_wrong_payload_length_fails_the_transfer_before_a_byte_lands_and_the_link_stays() -> None:
    destination = make_worker("d")
    sender = ScriptedSender(destination, destination.leader.layout)
    try:
        transfer_id, again = new_transfer_id(), new_transfer_id()
        sender.say(Reserve(transfer_id, 64, b""))
        destination.leader.expect(ReserveRequested)
        destination.leader.endpoint.grant(transfer_id, [0, 1, 2, 3], 64, 0)
        frame = Data(transfer_id, 0, 0, 0, 1, 0, 4, bytes(16), b"")
        sender.sock.sendall(sender.frame(frame, 5000) + b"x" * 5000 + sender.frame(Reserve(again, 64, b"")))
        assert "a payload of 5000 bytes" in destination.leader.expect(Failed, transfer_id).reason
        destination.leader.expect(ReserveRequested, again)
        assert not np.frombuffer(destination.leader.buffer, np.uint8).any()
    finally:
        sender.close()
        destination.close()


def test_silent_strangers_are_limited_in_number_and_time() -> None:
    clock = ManualClock()
    layout = KVLayout(MODEL, KVGeometry(1, 16, 64), 0)
    buffer = memoryview(bytearray(layout.pool_bytes))
    endpoint = Endpoint(EndpointConfig("d", "i", layout, SECRET), buffer, clock=clock)
    rank = Rank(layout, buffer, endpoint, None, None)
    address = (endpoint.address.host, endpoint.address.port)
    strangers = [socket.create_connection(address, timeout=5) for _ in range(40)]
    try:
        rank.wait_for(lambda: endpoint.stats().open_links == 32)
        clock.advance(HANDSHAKE_S + 1)
        rank.wait_for(lambda: endpoint.stats().open_links == 8)
        clock.advance(HANDSHAKE_S + 1)
        rank.wait_for(lambda: endpoint.stats().open_links == 0)
        for stranger in strangers:
            assert stranger.recv(1) == b""
    finally:
        for stranger in strangers:
            stranger.close()
        rank.close()
