"""KV over TLS: nothing readable on the wire, and whoever breaks the encryption is refused by name, in bounded time."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from baton.clock import ManualClock
from baton.kv_layout import LayerSpec, ModelKV
from baton.tls import make_identity, ssl_context
from kvtransfer.api import (
    Completed,
    Failed,
    ManifestReceived,
    PeerWorker,
    Received,
    ReserveRequested,
    SendRequest,
    TransferId,
)
from kvtransfer.connection import HANDSHAKE_S
from tests.support.relay import Relay
from tests.support.transfer import (
    MODEL,
    SECRET,
    BlockingHook,
    Worker,
    assert_equal,
    closing,
    kvtransfer_threads,
    make_worker,
    new_transfer_id,
    open_fds,
    pattern,
    write_all,
)

NUM_TOKENS = 64
TABLE = [3, 1, 2, 0]
BIG_MODEL = ModelKV((LayerSpec(8, 128),) * 4, "float32", "big")
"""128 KiB per unit and layer, so that a transfer exceeds every buffer on its way."""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    fds = open_fds()
    yield
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def address_of(worker: Worker) -> tuple[str, int]:
    """Where a worker's leader listens."""
    return worker.leader.endpoint.address.host, worker.leader.endpoint.address.port


def open_through(relay: Relay, source: Worker, destination: Worker) -> TransferId:
    """Open a transfer whose connection the relay carries."""
    rank = replace(destination.peer.ranks[0], host=relay.address[0], port=relay.address[1])
    transfer_id = new_transfer_id()
    peer = PeerWorker(destination.worker_id, destination.incarnation, (rank,))
    source.leader.endpoint.open_send(SendRequest(transfer_id, peer, NUM_TOKENS, tuple(TABLE), b"please"))
    return transfer_id


def send(relay: Relay, source: Worker, destination: Worker, kv: list[np.ndarray]) -> TransferId:
    """Grant and write one transfer through the relay; it is under way."""
    transfer_id = open_through(relay, source, destination)
    destination.leader.expect(ReserveRequested, transfer_id)
    destination.leader.endpoint.grant(transfer_id, TABLE, NUM_TOKENS, 0)
    write_all(source, transfer_id, TABLE, kv)
    source.leader.endpoint.finish(transfer_id, b"m")
    return transfer_id


def complete(source: Worker, destination: Worker, transfer_id: TransferId, kv: list[np.ndarray]) -> None:
    """It arrives whole."""
    destination.leader.expect(Received, transfer_id)
    destination.leader.expect(ManifestReceived, transfer_id)
    destination.leader.endpoint.complete(transfer_id)
    source.leader.expect(Completed, transfer_id)
    assert_equal(destination, TABLE, kv)


@pytest.mark.parametrize("transport", ["tcp", "tcp+tls"])
def test_kv_and_names_can_be_read_on_the_wire_exactly_when_it_is_not_encrypted(transport: str) -> None:
    kv = pattern(MODEL, NUM_TOKENS)
    with closing(make_worker("prefill-7", transport=transport), make_worker("decode-7", transport=transport)) as pair:
        source, destination = pair
        with Relay(address_of(destination)) as relay:
            complete(source, destination, send(relay, source, destination, kv), kv)
            wire = bytes(relay.seen["to target"] + relay.seen["back"])
    head = kv[1][0, 0].tobytes()  # one head of one layer, all tokens; 16 bytes of each
    found = sum(head[start : start + 16] in wire for start in range(0, len(head), 16))
    is_readable = [found == NUM_TOKENS, b"prefill-7" in wire, b"decode-7" in wire, b"please" in wire]
    assert len(wire) > sum(tokens.nbytes for tokens in kv)
    assert is_readable == [transport == "tcp"] * 4
    assert (found > 0) == (transport == "tcp")


@pytest.mark.parametrize(("sends", "receives"), [("tcp", "tcp+tls"), ("tcp+tls", "tcp")])
def test_encryption_on_one_side_only_is_refused_by_name_on_both(
    sends: str, receives: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(make_worker("p", transport=sends), make_worker("d", transport=receives)) as (source, destination):
        transfer_id = new_transfer_id()
        source.leader.endpoint.open_send(SendRequest(transfer_id, destination.peer, NUM_TOKENS, tuple(TABLE)))
        assert "cluster.encryption" in source.leader.expect(Failed, transfer_id).reason
        destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 0)
        told = [str(getattr(r, "reason", "")) + str(getattr(r, "error", "")) for r in caplog.records]
        assert sum("cluster.encryption" in text for text in told) == 2
        assert destination.leader.seen == []


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n" + bytes(64), b"\xff" * 4096, b"\x16\x03\x01\xff\xff" + bytes(70000), b"\x16" * 300],
)
def test_garbage_instead_of_a_tls_hello_is_disconnected_and_hurts_nobody(garbage: bytes) -> None:
    kv = pattern(MODEL, NUM_TOKENS)
    with closing(make_worker("p", transport="tcp+tls"), make_worker("d", transport="tcp+tls")) as (source, destination):
        with socket.create_connection(address_of(destination), timeout=10) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(garbage)
                while sock.recv(4096):
                    pass
        with Relay(address_of(destination)) as relay:
            complete(source, destination, send(relay, source, destination, kv), kv)


@pytest.mark.parametrize("case", ["no certificate", "another cluster's", "old TLS"])
def test_a_stranger_who_speaks_tls_gets_no_answer_of_the_protocol(case: str) -> None:
    context = ssl_context(make_identity(SECRET if case == "old TLS" else b"x" * 32), server_side=False)
    if case == "no certificate":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if case == "old TLS":
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with closing(make_worker("d", transport="tcp+tls")) as (destination,):
        with socket.create_connection(address_of(destination), timeout=10) as sock, pytest.raises(ssl.SSLError):
            _ask(context, sock)
        destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 0)


def _ask(context: ssl.SSLContext, sock: socket.socket) -> bytes:
    """What a stranger hears; with TLS 1.3 it learns that it was refused when it reads."""
    with context.wrap_socket(sock) as stranger:
        stranger.sendall(b"BK")
        return stranger.recv(1)


def test_bytes_that_come_one_by_one_make_the_same_stream() -> None:
    kv = pattern(MODEL, NUM_TOKENS)
    with closing(make_worker("p", transport="tcp+tls"), make_worker("d", transport="tcp+tls")) as (source, destination):
        with Relay(address_of(destination), piece_bytes=7) as relay:
            complete(source, destination, send(relay, source, destination, kv), kv)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_stream_that_is_cut_fails_the_transfer_on_both_sides(share: float) -> None:
    kv = pattern(BIG_MODEL, NUM_TOKENS)
    cut_at = int(share * sum(tokens.nbytes for tokens in kv))
    settings = {"transport": "tcp+tls", "model": BIG_MODEL}
    with closing(make_worker("p", **settings), make_worker("d", **settings)) as (source, destination):  # type: ignore[arg-type]
        with Relay(address_of(destination), cut_at=cut_at) as relay:
            transfer_id = send(relay, source, destination, kv)
            assert "lost" in destination.leader.expect(Failed, transfer_id).reason
            assert "lost" in source.leader.expect(Failed, transfer_id).reason
        assert destination.leader.endpoint.stats().integrity_failures == 0


def test_a_changed_bit_ends_the_connection_before_it_reaches_the_pool() -> None:
    kv = pattern(BIG_MODEL, NUM_TOKENS)
    middle = sum(tokens.nbytes for tokens in kv) // 2

    def flip(data: bytes, before: int) -> bytes:
        if not before <= middle < before + len(data):
            return data
        changed = bytearray(data)
        changed[middle - before] ^= 1
        return bytes(changed)

    settings = {"transport": "tcp+tls", "model": BIG_MODEL}
    with closing(make_worker("p", **settings), make_worker("d", **settings)) as (source, destination):  # type: ignore[arg-type]
        with Relay(address_of(destination), to_target=flip) as relay:
            transfer_id = send(relay, source, destination, kv)
            assert "BAD_RECORD_MAC" in destination.leader.expect(Failed, transfer_id).reason.upper()
            source.leader.expect(Failed, transfer_id)
        assert destination.leader.endpoint.stats().integrity_failures == 0


def test_a_receiver_that_stands_still_stops_the_sender_and_nothing_is_lost() -> None:
    kv = pattern(BIG_MODEL, NUM_TOKENS)
    hook = BlockingHook(at_landing=1)
    source = make_worker("p", transport="tcp+tls", model=BIG_MODEL)
    destination = make_worker("d", transport="tcp+tls", model=BIG_MODEL, faults=hook, credit_bytes=2**20)
    with closing(source, destination), Relay(address_of(destination)) as relay:
        transfer_id = send(relay, source, destination, kv)
        assert hook.reached.wait(10)
        source.leader.turn()
        assert source.leader.endpoint.stats().bytes_sent <= 2**20
        hook.release.set()
        complete(source, destination, transfer_id, kv)


def test_half_of_a_connection_is_no_connection() -> None:
    with closing(make_worker("p", transport="tcp+tls"), make_worker("d", transport="tcp+tls")) as (source, destination):
        with Relay(address_of(destination)) as relay:
            transfer_id = open_through(relay, source, destination)
            destination.leader.expect(ReserveRequested, transfer_id)
            relay.half_close()
            assert "lost" in destination.leader.expect(Failed, transfer_id).reason
            assert "lost" in source.leader.expect(Failed, transfer_id).reason


def test_a_tls_handshake_that_does_not_end_is_ended_on_either_side() -> None:
    clock = ManualClock()
    hello = bytes.fromhex("16030100ff010000fb0303")  # the first bytes of a hello
    with closing(make_worker("d", transport="tcp+tls", clock=clock)) as (destination,):
        with socket.create_connection(address_of(destination), timeout=10) as sock:
            sock.sendall(hello)
            destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 1)
            clock.advance(HANDSHAKE_S + 1)
            destination.leader.wait_for(lambda: destination.leader.endpoint.stats().open_links == 0)
            assert sock.recv(1) == b""
    with (
        closing(make_worker("p", transport="tcp+tls", clock=clock)) as (source,),
        socket.create_server(("127.0.0.1", 0)) as mute,
    ):
        rank = replace(source.peer.ranks[0], host="127.0.0.1", port=mute.getsockname()[1])
        transfer_id = new_transfer_id()
        source.leader.endpoint.open_send(SendRequest(transfer_id, PeerWorker("d", "i", (rank,)), 16, (0,)))
        source.leader.wait_for(lambda: source.leader.endpoint.stats().open_links == 1)
        clock.advance(HANDSHAKE_S + 1)
        assert "the handshake took too long" in source.leader.expect(Failed, transfer_id).reason


def test_every_process_has_a_key_of_its_own_and_shows_none() -> None:
    identity = make_identity(SECRET)
    assert make_identity(SECRET).private_key_pem != identity.private_key_pem
    assert "PRIVATE" not in repr(identity)


def test_a_large_transfer_arrives_whole_over_records_of_every_size() -> None:
    kv = pattern(BIG_MODEL, NUM_TOKENS)
    settings = {"transport": "tcp+tls", "model": BIG_MODEL}
    source, destination = make_worker("p", **settings), make_worker("d", block_size=32, **settings)  # type: ignore[arg-type]
    with closing(source, destination), Relay(address_of(destination), piece_bytes=4001) as relay:
        transfer_id = open_through(relay, source, destination)
        destination.leader.expect(ReserveRequested, transfer_id)
        destination.leader.endpoint.grant(transfer_id, [1, 0], NUM_TOKENS, 0)
        write_all(source, transfer_id, TABLE, kv)
        destination.leader.expect(Received, transfer_id)
        assert_equal(destination, [1, 0], kv)


def test_what_a_link_holds_back_at_the_end_of_its_turn_is_read_without_a_further_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtransfer.link.TURN_BYTES", 4096)
    kv = pattern(BIG_MODEL, NUM_TOKENS)
    settings = {"transport": "tcp+tls", "model": BIG_MODEL, "clock": ManualClock()}  # no heartbeats
    with closing(make_worker("p", **settings), make_worker("d", **settings)) as (source, destination):  # type: ignore[arg-type]
        with Relay(address_of(destination)) as relay:
            complete(source, destination, send(relay, source, destination, kv), kv)
