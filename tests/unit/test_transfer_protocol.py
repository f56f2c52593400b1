"""The transfer protocol's two state machines, without sockets: tables, every order of events, and their invariants."""

from __future__ import annotations

import random
from collections.abc import Mapping
from enum import Enum

import numpy as np
import pytest

from baton.kv_layout import UNIT_TOKENS, KVGeometry, LayerSpec, ModelKV
from kvtransfer.api import (
    Failed,
    TransferId,
)
from kvtransfer.messages import (
    Abort,
    Accept,
    Announce,
    Complete,
    Credit,
    Data,
    Grant,
    Manifest,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
    Reserve,
)
from kvtransfer.protocol import RECEIVE_NEXT, SEND_NEXT, EndedTransfers, ReceiveState, SendState
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from tests.support.transfer_wire import LEASE_S, Wire, WireRank, kinds

MODEL = ModelKV((LayerSpec(4, 2), LayerSpec(2, 4), LayerSpec(4, 2)), "bfloat16", "f")
ID = TransferId(b"transfer number1")
TABLE = tuple(range(8))


@pytest.mark.parametrize(("table", "end"), [(SEND_NEXT, SendState.CLOSED), (RECEIVE_NEXT, ReceiveState.CLOSED)])
def test_the_end_is_reachable_from_every_state(table: Mapping[Enum, frozenset[Enum]], end: Enum) -> None:
    reaches = {end}
    while more := {state for state, following in table.items() if following & reaches} - reaches:
        reaches |= more
    assert set(table) == reaches


def make_wire(
    source_tp: int = 1, destination_tp: int = 1, seed: int = 0, model: ModelKV = MODEL, **settings: object
) -> Wire:
    """Two workers with 64 blocks each."""
    return Wire(
        model,
        KVGeometry(source_tp, 16, 64),
        KVGeometry(destination_tp, 32, 64),
        random.Random(seed),
        **settings,  # type: ignore[arg-type]
    )


def send_side(wire: Wire, rank: int = 0) -> SendSide:
    """A source rank's machine."""
    side = wire.sources[rank].side
    assert isinstance(side, SendSide)
    return side


def receive_side(wire: Wire, rank: int = 0) -> ReceiveSide:
    """A destination rank's machine."""
    side = wire.destinations[rank].side
    assert isinstance(side, ReceiveSide)
    return side


def fill(wire: Wire, seed: int = 1) -> None:
    """Random bytes in the source pools; ranks of one worker hold different heads, so different bytes."""
    rng = np.random.default_rng(seed)
    for rank in wire.sources:
        np.frombuffer(rank.buffer, np.uint8)[:] = rng.integers(0, 256, len(rank.buffer), dtype=np.uint8)


def run_to(wire: Wire, stage: str, num_tokens: int = 40) -> None:
    """A transfer of 40 tokens up to a stage, in order."""
    stages = ["opened", "requested", "granted", "sent", "finished"]
    reached = stages.index(stage)
    wire.open_send(ID, num_tokens, TABLE)
    if reached >= 1:
        wire.drain()
    if reached >= 2:
        for rank in range(len(wire.destinations)):
            wire.grant_rank(rank, ID, TABLE, num_tokens, 0)
        wire.drain()
    if reached >= 3:
        for layer in range(len(MODEL.layers)):
            wire.written(ID, layer, num_tokens)
        wire.drain()
    if reached >= 4:
        send_side(wire).finish(ID, b"manifest")
        wire.act()
        wire.drain()


STAGES = ["opened", "requested", "granted", "sent", "finished"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_abort_in_every_state_quiesces_twice_and_leaves_nothing_open(stage: str, side: str) -> None:
    wire = make_wire()
    run_to(wire, stage)
    rank = wire.sources[0] if side == "source" else wire.destinations[0]
    wire.abort(rank, ID)
    wire.abort(rank, ID)
    assert kinds(rank, ID).count("Quiesced") == 2
    assert kinds(rank, ID).count("Failed") == 0
    wire.drain()
    if stage == "finished" and side == "source":  # the receiver is whole and needs nobody (X2)
        assert "Failed" not in kinds(wire.destinations[0], ID)
        receive_side(wire).complete(wire.now, ID)
        wire.act()
    assert send_side(wire).num_open == receive_side(wire).num_open == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_the_loss_of_the_link_ends_every_state(stage: str, side: str) -> None:
    wire = make_wire()
    run_to(wire, stage)
    wire.cut(wire.links[0, 0])
    assert "Failed" in kinds(wire.sources[0], ID)
    if stage == "finished":  # the receiver is whole and needs nobody (X2)
        assert "Failed" not in kinds(wire.destinations[0], ID)
        receive_side(wire).complete(wire.now, ID)
        wire.act()
    assert send_side(wire).num_open == receive_side(wire).num_open == 0


@pytest.mark.parametrize("stage", ["requested", "granted", "sent"])
def test_without_a_word_from_the_peer_every_state_ends_within_the_lease(stage: str) -> None:
    wire = make_wire()
    run_to(wire, stage)
    for _ in range(12):
        wire.advance(LEASE_S / 10)  # nothing is delivered
    assert wire.links == {}, "the silent link is closed"
    assert "Failed" in kinds(wire.sources[0], ID)
    assert "Failed" in kinds(wire.destinations[0], ID)
    assert send_side(wire).num_open == receive_side(wire).num_open == 0


@pytest.mark.parametrize(
    ("head_dims", "frames"), [((2, 2, 2), [[0, 1, 2]]), ((2, 4, 4), [[0], [1, 2]]), ((2, 4, 2), [[0], [1], [2]])]
)
def test_layers_of_one_head_size_that_are_written_together_travel_in_one_frame(
    head_dims: tuple[int, ...], frames: list[list[int]]
) -> None:
    model = ModelKV(tuple(LayerSpec(4, head_dim) for head_dim in head_dims), "bfloat16", "f")
    wire = make_wire(model=model, window_bytes=2**20)
    run_to(wire, "granted")
    side, key = send_side(wire), wire.destinations[0].key
    side.written(ID, None, 32)
    side.written(ID, None, 16)  # nothing is taken back
    for layers in frames:
        outgoing = side.next_data(key, 2**20, name_blocks=False)
        assert outgoing is not None
        assert [layer for layer, _ in outgoing.parts] == layers
        assert (outgoing.frame.first_unit, outgoing.frame.num_units) == (0, 32 // UNIT_TOKENS)
    assert side.next_data(key, 2**20, name_blocks=False) is None


def test_heartbeats_keep_a_granted_transfer_alive_while_the_prompt_is_computed() -> None:
    wire = make_wire(2, 2)
    run_to(wire, "granted")
    for _ in range(100):
        wire.advance(LEASE_S / 10)
        wire.drain()
    assert send_side(wire).num_open == receive_side(wire).num_open == 1
    for layer in range(3):
        wire.written(ID, layer, 40)
    wire.drain()
    assert "Received" in kinds(wire.destinations[0], ID)


def test_a_follower_that_was_granted_first_lives_on_heartbeats_as_well() -> None:
    wire = make_wire(1, 2)
    wire.grant_rank(1, ID, TABLE, 40, 0)
    run_to(wire, "requested")
    wire.grant_rank(0, ID, TABLE, 40, 0)
    for _ in range(30):
        wire.drain()
        wire.advance(LEASE_S / 10)
    assert receive_side(wire, 1).num_open == 1


def test_the_loss_of_a_source_rank_that_has_not_announced_itself_fails_the_transfer() -> None:
    wire = make_wire(2, 1)
    wire.open_send(ID, 40, TABLE)
    wire._to_receiver(wire.links[0, 0])
    wire.act()
    wire.grant_rank(0, ID, TABLE, 40, 0)
    wire.links[1, 0].to_receiver.clear()
    wire.cut(wire.links[1, 0])
    assert "Failed" in kinds(wire.destinations[0], ID)
    assert receive_side(wire)._leases.watched(wire.sources[0].key) == ()


def test_a_transfer_that_ended_is_watched_on_no_link() -> None:
    wire = make_wire(2, 1)
    wire.open_send(ID, 40, TABLE)
    wire._to_receiver(wire.links[0, 0])
    wire.act()
    wire.grant_rank(0, ID, TABLE, 40, 0)
    wire.abort(wire.destinations[0], ID)
    assert [receive_side(wire)._leases.watched(rank.key) for rank in wire.sources] == [(), ()]


def test_a_sender_without_credit_waits() -> None:
    wire = make_wire(window_bytes=1)
    run_to(wire, "granted", num_tokens=128)
    for layer in range(3):
        wire.written(ID, layer, 128)
    link = wire.links[0, 0]
    for _ in range(20):
        wire._pull(link)
    window_bytes = 2 * 512
    assert sum(len(flying.payload) for flying in link.to_receiver) == window_bytes
    assert not send_side(wire).has_data(wire.destinations[0].key)


def test_a_peer_that_lives_but_has_forgotten_the_transfer_loses_the_lease() -> None:
    wire = make_wire()
    run_to(wire, "granted")
    receive_side(wire)._transfers.clear()
    receive_side(wire)._leases.unwatch(wire.sources[0].key, ID)
    for _ in range(12):
        wire.advance(LEASE_S / 10)
        wire.drain()
    (failed,) = [event for event in wire.sources[0].events if isinstance(event, Failed)]
    assert "has not named" in failed.reason


def test_an_unanswered_request_is_refused_after_the_lease() -> None:
    wire = make_wire()
    run_to(wire, "requested")
    for _ in range(11):
        wire.advance(LEASE_S / 10)
        wire.drain()
    assert kinds(wire.sources[0], ID) == ["Refused"]
    assert kinds(wire.destinations[0], ID) == ["ReserveRequested", "Failed"]


def test_a_rank_that_is_never_accepted_gives_up() -> None:
    wire = make_wire(1, 2)
    wire.open_send(ID, 40, TABLE)
    wire.drain()
    wire.grant_rank(0, ID, TABLE, 40, 0)
    for _ in range(25):
        wire.advance(LEASE_S / 10)
        wire.drain()
    (failed,) = [event for event in wire.sources[0].events if isinstance(event, Failed)]
    assert "did not accept in time" in failed.reason
    assert send_side(wire).num_open == receive_side(wire, 0).num_open == receive_side(wire, 1).num_open == 0


# Duplicates change nothing (INV-15).


def test_every_message_may_come_twice() -> None:
    wire = make_wire(window_bytes=1)
    fill(wire)
    source, destination = wire.sources[0], wire.destinations[0]
    wire.open_send(ID, 40, TABLE)
    queues = wire.links[0, 0]
    granted = False
    doubled: list[object] = []
    for _ in range(500):
        for queue in (queues.to_receiver, queues.to_sender):
            if queue and not any(queue[0] is flying for flying in doubled):
                doubled.append(queue[0])
                queue.insert(1, queue[0])
        if not granted and "ReserveRequested" in kinds(destination, ID):
            granted = True
            wire.grant_rank(0, ID, TABLE, 40, 0)
            wire.grant_rank(0, ID, TABLE, 40, 0)
            send_side(wire).finish(ID, b"m")
            for layer in range(3):
                wire.written(ID, layer, 40)
                wire.written(ID, layer, 40)
        if not wire.step():
            break
    assert kinds(destination, ID) == ["ReserveRequested", "ManifestReceived", "Received"]
    receive_side(wire).complete(wire.now, ID)
    wire.act()
    queues.to_sender.append(queues.to_sender[0])
    wire.drain()
    assert kinds(source, ID) == ["Granted", "Completed"]
    assert send_side(wire).num_open == receive_side(wire).num_open == 0


def test_a_repeated_data_frame_is_dropped_and_does_not_touch_verified_bytes() -> None:
    wire = make_wire()
    run_to(wire, "granted")
    wire.written(ID, 0, 32)
    link = wire.links[0, 0]
    wire._pull(link)
    link.to_receiver.append(link.to_receiver[0])
    wire.drain()
    assert receive_side(wire).num_stale == 1
    assert "Failed" not in kinds(wire.destinations[0], ID)


# What contradicts the reservation fails the transfer, and only that.

GOOD = Data(ID, 0, 0, 0, 1, 0, 2, bytes(16), b"")
BAD_FRAMES = {
    "a frame for another pair": GOOD._replace(source_rank=1),
    "no layers": GOOD._replace(first_layer=3),
    "no layers 0+0": GOOD._replace(num_layers=0),
    "no layers 2+5": GOOD._replace(first_layer=2, num_layers=5),
    "several head sizes": GOOD._replace(num_layers=2),
    "are outside": GOOD._replace(first_unit=2, num_units=2),
    "units 0+0": GOOD._replace(num_units=0),
    "units 4294967295": GOOD._replace(first_unit=2**32 - 1),
    "a payload of": GOOD._replace(num_units=1),
    "block ids on a stream": GOOD._replace(source_blocks=bytes(4)),
}


@pytest.mark.parametrize("reason", BAD_FRAMES)
def test_a_frame_that_contradicts_the_reservation_fails_its_transfer(reason: str) -> None:
    wire = make_wire(window_bytes=10**6)
    run_to(wire, "granted")
    payload_bytes = 2 * 4 * 2 * 2 * 32
    landing = receive_side(wire).begin_data(wire.now, wire.sources[0].key, BAD_FRAMES[reason], payload_bytes)
    wire.act()
    assert landing is None
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert reason in failed.reason
    wire.drain()
    assert "Failed" in kinds(wire.sources[0], ID)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [(b"", "0 bytes of block ids"), (bytes(12), "12 bytes"), (bytes(4) + b"\x40\0\0\0", "outside the sender's pool")],
)
def test_source_blocks_of_a_notice_are_checked_before_use(blocks: bytes, reason: str) -> None:
    wire = make_wire(window_bytes=10**6, is_fetched=True)
    run_to(wire, "granted")
    frame = GOOD._replace(source_blocks=blocks)
    assert receive_side(wire).begin_data(wire.now, wire.sources[0].key, frame, None) is None
    wire.act()
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert reason in failed.reason


def test_more_bytes_than_credited_fail_the_transfer() -> None:
    wire = make_wire(window_bytes=1)
    run_to(wire, "granted", num_tokens=128)
    frame = GOOD._replace(num_units=8)
    assert receive_side(wire).begin_data(wire.now, wire.sources[0].key, frame, 8 * 512) is None
    wire.act()
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert "more bytes than credited" in failed.reason


def test_frames_that_have_not_landed_count_towards_the_credit() -> None:
    wire = make_wire(window_bytes=1)
    run_to(wire, "granted", num_tokens=128)
    side, peer = receive_side(wire), wire.sources[0].key
    frames = [GOOD._replace(first_unit=unit, num_units=1) for unit in range(3)]
    assert [side.begin_data(wire.now, peer, frame, 512) is not None for frame in frames] == [True, True, False]
    wire.act()
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert "more bytes than credited" in failed.reason


def test_data_before_the_permission_fails_the_transfer() -> None:
    wire = make_wire()
    run_to(wire, "requested")
    assert receive_side(wire).begin_data(wire.now, wire.sources[0].key, GOOD, 1024) is None
    wire.act()
    assert "Failed" in kinds(wire.destinations[0], ID)


def test_frames_of_unknown_transfers_are_dropped_and_counted() -> None:
    wire = make_wire()
    run_to(wire, "granted")
    stranger = GOOD._replace(transfer_id=TransferId(b"x" * 16))
    assert receive_side(wire).begin_data(wire.now, wire.sources[0].key, stranger, 1024) is None
    assert receive_side(wire).num_stale == 1
    assert receive_side(wire).num_open == 1


@pytest.mark.parametrize(
    "message",
    [
        Accept(ID, 0, 1),
        Accept(ID, 8, 10**6),
        Accept(ID, 48, 10**6),
        Credit(ID, 1),
        Grant(ID, 48),
        Complete(ID),
    ],
)
def test_a_receiver_that_talks_nonsense_fails_the_transfer(message: Accept | Credit | Grant | Complete) -> None:
    wire = make_wire()
    run_to(wire, "requested")
    wire.deliver(wire.sources[0], wire.destinations[0], message)
    (failed,) = [event for event in wire.sources[0].events if isinstance(event, Failed)]
    assert "protocol" in failed.reason


@pytest.mark.parametrize("message", [Reserve(ID, 1, b""), Announce(ID, 1), Manifest(ID, b""), GOOD])
def test_a_message_of_the_wrong_direction_breaks_the_link(message: Reserve | Announce | Manifest | Data) -> None:
    wire = make_wire()
    run_to(wire, "granted")
    with pytest.raises(ProtocolError):
        send_side(wire).on_message(wire.now, wire.destinations[0].key, message)


@pytest.mark.parametrize("message", [Accept(ID, 0, 1), Credit(ID, 1), Grant(ID, 0), Refuse(ID, "", ""), Complete(ID)])
def test_a_message_of_the_other_direction_breaks_the_link(
    message: Accept | Credit | Grant | Refuse | Complete,
) -> None:
    wire = make_wire()
    run_to(wire, "granted")
    with pytest.raises(ProtocolError):
        receive_side(wire).on_message(wire.now, wire.sources[0].key, message)


def test_a_reservation_between_followers_breaks_the_link() -> None:
    wire = make_wire(2, 2)
    run_to(wire, "granted")
    with pytest.raises(ProtocolError):
        receive_side(wire, 1).on_message(wire.now, wire.sources[1].key, Reserve(ID, 40, b""))


def test_a_grant_of_another_length_fails() -> None:
    wire = make_wire()
    run_to(wire, "requested")
    wire.grant_rank(0, ID, TABLE, 41, 0)
    assert kinds(wire.destinations[0], ID) == ["ReserveRequested", "Failed"]


def test_complete_before_everything_is_there_fails_closed() -> None:
    wire = make_wire()
    run_to(wire, "sent")
    receive_side(wire).complete(wire.now, ID)
    wire.act()
    wire.drain()
    assert "Failed" in kinds(wire.destinations[0], ID)
    assert "Completed" not in kinds(wire.sources[0], ID)


def test_another_worker_can_not_join_or_end_a_transfer() -> None:
    wire = make_wire()
    run_to(wire, "granted")
    stranger = wire.sources[0].key._replace(worker_id="mallory")
    side = receive_side(wire)
    side.link_up(wire.now, stranger, side._links[wire.sources[0].key])
    side.on_message(wire.now, stranger, Announce(ID, 40))
    side.on_message(wire.now, stranger, Abort(ID, "aborted", "ha"))
    assert side.begin_data(wire.now, stranger, GOOD, 1024) is None
    assert side.num_open == 1
    wire.act()
    assert "Failed" not in kinds(wire.destinations[0], ID)


def test_another_worker_can_not_take_the_place_of_a_rank_that_has_not_announced_itself() -> None:
    wire = make_wire(2, 1)
    wire.open_send(ID, 40, TABLE)
    wire._to_receiver(wire.links[0, 0])
    wire.act()
    side = receive_side(wire)
    stranger = wire.sources[1].key._replace(worker_id="mallory")
    side.link_up(wire.now, stranger, side._links[wire.sources[1].key])
    side.on_message(wire.now, stranger, Announce(ID, 40))
    wire.act()
    wire.grant_rank(0, ID, TABLE, 40, 0)
    wire.drain()
    for layer in range(3):
        wire.written(ID, layer, 40)
    wire.drain()
    assert "Received" in kinds(wire.destinations[0], ID)


# A late reader on shared memory.


def test_a_mismatch_followed_by_the_senders_abort_is_an_abort_and_no_integrity_failure() -> None:
    wire = make_wire(window_bytes=10**6, is_fetched=True)
    fill(wire)
    run_to(wire, "granted")
    wire.written(ID, 0, 40)
    wire._pull(wire.links[0, 0])
    wire.abort(wire.sources[0], ID)
    fill(wire, seed=2)  # the blocks have a new owner
    wire.drain()
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert not failed.integrity
    assert receive_side(wire).num_integrity_failures == 0


def test_a_mismatch_alone_is_an_integrity_failure_on_both_sides() -> None:
    wire = make_wire(window_bytes=10**6, is_fetched=True)
    run_to(wire, "granted")
    wire.written(ID, 0, 40)
    wire._pull(wire.links[0, 0])
    fill(wire)
    wire.drain()
    for rank in (wire.destinations[0], wire.sources[0]):
        (failed,) = [event for event in rank.events if isinstance(event, Failed)]
        assert failed.integrity
    assert receive_side(wire).num_integrity_failures == 1


def test_a_mismatch_on_a_link_that_never_drains_is_judged_at_the_next_tick() -> None:
    wire = make_wire(window_bytes=10**6, is_fetched=True)
    run_to(wire, "granted")
    for layer in range(2):
        wire.written(ID, layer, 40)
        wire._pull(wire.links[0, 0])
    fill(wire)
    wire._to_receiver(wire.links[0, 0])
    wire.act()
    assert "Failed" not in kinds(wire.destinations[0], ID)
    wire.advance(0.1)
    (failed,) = [event for event in wire.destinations[0].events if isinstance(event, Failed)]
    assert failed.integrity


# Remembering what ended.


def test_ended_transfers_are_forgotten_after_a_time_and_bounded_in_number() -> None:
    ended = EndedTransfers(keep_s=10, capacity=3)
    ids = [TransferId(bytes([number]) * 16) for number in range(5)]
    for number, transfer_id in enumerate(ids):
        ended.add(transfer_id, float(number), "r", engine_knows=True)
    assert [ended.get(item) is not None for item in ids] == [False, False, True, True, True]
    ended.expire(12.5)
    assert [ended.get(item) is not None for item in ids] == [False, False, False, True, True]


def test_an_announcement_after_the_end_is_answered_with_abort() -> None:
    wire = make_wire(1, 2)
    wire.open_send(ID, 40, TABLE)
    wire.abort(wire.destinations[1], ID)
    wire.drain()
    assert "Failed" in kinds(wire.sources[0], ID)


def test_ping_is_answered_with_what_is_open() -> None:
    wire = make_wire()
    run_to(wire, "granted")
    wire.deliver(wire.destinations[0], wire.sources[0], Ping(()))
    assert [flying.message for flying in wire.links[0, 0].to_sender] == [Pong((ID,))]


# Any order of everything.

TERMINAL = {"Completed", "Refused", "Failed", "Quiesced"}


class Story:
    """Random engines on both workers driving several transfers while the network does what it likes."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        tp = rng.choice([(1, 1), (1, 2), (2, 1), (4, 2), (1, 4), (2, 2)])
        sizes = rng.choice([(16, 16), (16, 32), (64, 16)])
        self.wire = Wire(
            MODEL,
            KVGeometry(tp[0], sizes[0], 40),
            KVGeometry(tp[1], sizes[1], 40),
            rng,
            window_bytes=rng.choice([1, 5000, 10**7]),
            is_fetched=rng.random() < 0.5,
        )
        fill(self.wire, seed)
        self.faults = rng.random() < 0.5
        self.transfers: dict[TransferId, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {}
        self.written: dict[TransferId, list[int]] = {}
        self.granted: dict[TransferId, set[int]] = {}
        self.decided: set[TransferId] = set()
        self.ended: set[TransferId] = set()

    def open_one(self) -> None:
        """Blocks of different transfers do not overlap, so that each one's content can be checked at the end."""
        number = len(self.transfers)
        transfer_id = TransferId(bytes([number]) * 16)
        num_tokens = self.rng.randint(1, 128)
        first = self.rng.randint(0, num_tokens // UNIT_TOKENS) * UNIT_TOKENS
        tables = []
        for side in (self.wire.sources, self.wire.destinations):
            size = side[0].layout.geometry.block_size
            table = list(range(number * 8, number * 8 + -(-num_tokens // size)))
            self.rng.shuffle(table)
            tables.append(tuple(table))
        self.transfers[transfer_id] = (num_tokens, first, tables[0], tables[1])
        self.written[transfer_id] = [0] * len(MODEL.layers)
        self.granted[transfer_id] = set()
        self.wire.open_send(transfer_id, num_tokens, tables[0])

    def engine_step(self) -> None:
        """One thing that some engine does."""
        rng, wire = self.rng, self.wire
        if len(self.transfers) < 4 and rng.random() < 0.2:
            self.open_one()
        if not self.transfers:
            return
        transfer_id = rng.choice(list(self.transfers))
        num_tokens, first, _, table = self.transfers[transfer_id]
        choice = rng.random()
        if choice < 0.5:
            layer = rng.randrange(len(MODEL.layers))
            written = min(num_tokens, self.written[transfer_id][layer] + rng.randint(1, 60))
            self.written[transfer_id][layer] = written
            wire.written(transfer_id, layer, written)
            if all(tokens == num_tokens for tokens in self.written[transfer_id]):
                send_side(wire).finish(transfer_id, b"manifest of " + transfer_id)
                wire.act()
        elif choice < 0.9:
            self._decide(transfer_id, table, num_tokens, first)
        elif self.faults and choice < 0.95:
            wire.abort(rng.choice([*wire.sources, *wire.destinations]), transfer_id)
        elif self.faults and choice < 0.96 and wire.links:
            wire.cut(rng.choice(list(wire.links.values())))

    def _decide(self, transfer_id: TransferId, table: tuple[int, ...], num_tokens: int, first: int) -> None:
        leader_events = kinds(self.wire.destinations[0], transfer_id)
        if "ReserveRequested" not in leader_events or transfer_id in self.decided:
            return
        if self.faults and not self.granted[transfer_id] and self.rng.random() < 0.1:
            self.decided.add(transfer_id)
            receive_side(self.wire).refuse(self.wire.now, transfer_id, "overloaded", "no")
            self.wire.act()
            return
        left = set(range(len(self.wire.destinations))) - self.granted[transfer_id]
        rank = self.rng.choice(sorted(left))
        self.granted[transfer_id].add(rank)
        self.wire.grant_rank(rank, transfer_id, table, num_tokens, first)
        if left == {rank}:
            self.decided.add(transfer_id)

    def worker_step(self) -> None:
        """What the two leaders do with what their ranks report: end everywhere what ended anywhere, complete."""
        wire = self.wire
        for transfer_id in set(self.transfers) - self.ended:
            sending = [kinds(rank, transfer_id) for rank in wire.sources]
            receiving = [kinds(rank, transfer_id) for rank in wire.destinations]
            if "Completed" in sending[0]:
                for rank in range(1, len(wire.sources)):
                    send_side(wire, rank).close(wire.now, transfer_id)
                wire.act()
                self.ended.add(transfer_id)
                continue
            if any({"Failed", "Quiesced", "Refused"} & set(events) for events in sending):
                for rank, events in zip(wire.sources, sending, strict=True):
                    if not TERMINAL & set(events):
                        wire.abort(rank, transfer_id)
            if any({"Failed", "Quiesced"} & set(events) for events in receiving):
                for rank, events in zip(wire.destinations, receiving, strict=True):
                    if not TERMINAL & set(events):
                        wire.abort(rank, transfer_id)
            elif all("Received" in events for events in receiving) and "ManifestReceived" in receiving[0]:
                for rank in range(1, len(wire.destinations)):
                    receive_side(wire, rank).close(wire.now, transfer_id)
                receive_side(wire, 0).complete(wire.now, transfer_id)
                wire.act()

    def run(self) -> None:
        """Chaos for a while, then calm until everything has ended."""
        for _ in range(400):
            choice = self.rng.random()
            if choice < 0.6:
                self.wire.step()
            elif choice < 0.97:
                self.engine_step()
            else:
                self.wire.advance(self.rng.random() * LEASE_S / 20)
            self.worker_step()
        for _ in range(60):
            for _ in range(30):
                self.engine_step_calm()
            self.wire.drain()
            self.worker_step()
            self.wire.drain()
            self.wire.advance(LEASE_S / 20)

    def engine_step_calm(self) -> None:
        """Progress only."""
        self.faults, faults = False, self.faults
        if self.transfers:
            self.engine_step()
        self.faults = faults


def check_story(story: Story) -> None:
    """The invariants of a finished story."""
    wire = story.wire
    for rank in [*wire.sources, *wire.destinations]:
        assert rank.side.num_open == 0, (rank.key, rank.events)
    for transfer_id in story.transfers:
        for rank in [*wire.sources, *wire.destinations]:
            check_events(rank, kinds(rank, transfer_id))
        if "Completed" in kinds(wire.sources[0], transfer_id):
            for rank in wire.destinations:
                assert "Received" in kinds(rank, transfer_id)
        for rank in wire.destinations:
            if "Received" in kinds(rank, transfer_id):
                check_content(story, rank, transfer_id)
        if not story.faults:
            assert kinds(wire.sources[0], transfer_id) == ["Granted", "Completed"]
    for rank in range(len(wire.destinations)):
        assert receive_side(wire, rank).num_integrity_failures == 0


def check_events(rank: WireRank, events: list[str]) -> None:
    """An engine is told each thing once, and nothing after the end but the answers to its aborts."""
    for kind in ("Granted", "Refused", "Received", "ManifestReceived", "Completed", "Failed", "ReserveRequested"):
        assert events.count(kind) <= 1, (rank.key, events)
    ends = [index for index, kind in enumerate(events) if kind in TERMINAL]
    if ends:
        assert set(events[ends[0] + 1 :]) <= {"Quiesced"}, (rank.key, events)


def check_content(story: Story, rank: WireRank, transfer_id: TransferId) -> None:
    """Every byte of the transfer is where the destination's layout wants it."""
    num_tokens, first, source_table, table = story.transfers[transfer_id]
    wire = story.wire
    for layer in range(len(MODEL.layers)):
        for head in rank.layout.heads(layer):
            holder = next(source for source in wire.sources if head in source.layout.heads(layer))
            for half in range(2):
                for token in range(first, num_tokens):
                    here = token_bytes(rank, table, layer, half, head, token)
                    assert here in [
                        token_bytes(source, source_table, layer, half, head, token)
                        for source in wire.sources
                        if head in source.layout.heads(layer)
                    ], (holder.key, layer, head, token)


def token_bytes(rank: WireRank, table: tuple[int, ...], layer: int, half: int, head: int, token: int) -> bytes:
    """One token of one head, by the layout's definition."""
    layout = rank.layout
    block, in_block = divmod(token, layout.geometry.block_size)
    row = MODEL.layers[layer].head_dim * MODEL.itemsize_bytes
    heads = layout.heads(layer)
    start = layout.block_offset(layer, table[block])
    start += ((half * len(heads) + head - heads.start) * layout.geometry.block_size + in_block) * row
    return bytes(rank.buffer[start : start + row])


@pytest.mark.parametrize("chunk", range(12))
def test_any_order_of_events_ends_well(chunk: int) -> None:
    for seed in range(chunk * 10, chunk * 10 + 10):
        story = Story(seed)
        try:
            story.run()
            check_story(story)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
