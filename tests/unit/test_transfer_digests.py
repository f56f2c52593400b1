"""Digests of leaves and of frames: the same by every way they are made, and of the bytes that are there."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import select
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer import arrival, digests, pool
from kvtransfer.api import (
    Completed,
    CorruptPool,
    Failed,
    ManifestReceived,
    PeerWorker,
    Received,
    ReserveRequested,
    SendRequest,
    TransferId,
)
from kvtransfer.arrival import Arrival
from kvtransfer.digests import FrameDigest, LeafDigests, SourceDigests, seal
from kvtransfer.lanes import Landing, Misfit, ReceiveLane, SendLane
from kvtransfer.messages import DIGEST_BYTES, NO_DIGEST, Data
from kvtransfer.native.library import library
from kvtransfer.plan import CopyPlan, TableRuns, plan_copies, rank_pairs
from kvtransfer.pool import Extents, Pool, address_of
from tests.support.transfer import (
    MODEL,
    assert_equal,
    closing,
    make_worker,
    new_transfer_id,
    open_send,
    pattern,
    write_all,
)

CONTEXT = b"both their ranks"
TP_PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 2)]
native_only = pytest.mark.skipif(library() is None, reason="no C++ compiler: the package makes all digests")


def relaxed(max_examples: int) -> settings:
    """A machine under load is no failure."""
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextlib.contextmanager
def packages_only(is_on: bool = True) -> Iterator[None]:
    """As where there is no compiler."""
    with contextlib.ExitStack() as stack:
        for module in (arrival, digests, pool) if is_on else ():
            stack.enter_context(mock.patch.object(module, "library", return_value=None))
        yield


def xxh3(data: bytes) -> bytes:
    digest: bytes = xxhash.xxh3_128_digest(data)
    return digest


@dataclass
class Side:
    """One rank's pool of garbage with a sequence's KV in it."""

    layout: KVLayout
    table: Sequence[int]
    buffer: np.ndarray = field(init=False)
    digests: LeafDigests = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.layout.tp_rank + self.layout.geometry.block_size)
        self.buffer = rng.integers(0, 256, self.layout.pool_bytes, np.uint8)
        self.digests = LeafDigests(self.layout, Pool(self.layout, memoryview(self.buffer)))

    def rows(self, layer: int) -> np.ndarray:
        """A layer as [block, K|V, local head, token, bytes]."""
        layout, geometry = self.layout, self.layout.geometry
        start, size = layout.layer_offset(layer), layout.block_bytes(layer) * geometry.num_blocks
        heads = len(layout.heads(layer))
        return self.buffer[start : start + size].reshape(geometry.num_blocks, 2, heads, geometry.block_size, -1)

    def put(self, kv: Sequence[np.ndarray]) -> None:
        """KV [K|V, head (all), token, bytes] of every layer into the blocks."""
        for layer, tokens in enumerate(kv):
            heads, view = self.layout.heads(layer), self.rows(layer)
            for token in range(tokens.shape[2]):
                block, at = divmod(token, self.layout.geometry.block_size)
                view[self.table[block], :, :, at] = tokens[:, heads.start : heads.stop, token]

    def table_of(self) -> bytes:
        return self.digests.table.tobytes()


@dataclass
class Frame:
    """What one frame covers on both sides, and whose digest it has by definition."""

    sender: Side
    receiver: Side
    plan: CopyPlan
    layers: range
    first: int
    end: int

    def extents(self, side: Side) -> Extents:
        sides = self.plan.source_sides if side is self.sender else self.plan.destination_sides
        runs = TableRuns(sides, self.plan.group_tokens, side.table)
        num_bytes = sum(self.plan.num_bytes(layer, self.end - self.first) for layer in self.layers)
        return Extents(side.digests.pool, runs.parts(self.layers, self.first, self.end), num_bytes)

    def digest(self, side: Side) -> FrameDigest:
        return FrameDigest(side.digests, self.extents(side))

    def data(self, digest: bytes = NO_DIGEST) -> Data:
        ranks = self.plan.source.tp_rank, self.plan.destination.tp_rank
        num_units = -(-self.end // UNIT_TOKENS) - self.first // UNIT_TOKENS
        first_unit = self.first // UNIT_TOKENS
        return Data(
            TransferId(bytes(16)), *ranks, self.layers.start, len(self.layers), first_unit, num_units, digest, b""
        )

    def payload(self) -> bytes:
        return b"".join(bytes(view) for view in self.extents(self.sender).views())

    def expected(self, kv: Sequence[np.ndarray]) -> bytes:
        """Straight from the definition, without pools: [layer][group][K|V][head][unit]."""
        leaves = []
        group = self.plan.group_tokens
        edges = sorted({self.first, self.end, *range(-(-self.first // group) * group, self.end, group)})
        for layer in self.layers:
            side = self.plan.source_sides[layer]
            first_head = self.plan.source.heads(layer).start + side.first_head
            heads = range(first_head, first_head + side.num_heads)
            for (a, b), half, head in itertools.product(itertools.pairwise(edges), range(2), heads):
                for token in range(a, b, UNIT_TOKENS):
                    leaf = kv[layer][half, head, token : min(b, token + UNIT_TOKENS)].tobytes()
                    leaves.append(xxh3(leaf.ljust(self.plan.leaf_bytes(layer), b"\0")))
        return xxh3(b"".join(leaves))


def frames_of(sender: Side, receiver: Side, first: int, end: int, cut: int) -> list[Frame]:
    """All frames between two ranks: neighbouring layers of one leaf size together, units in runs of `cut` tokens."""
    plan = plan_copies(sender.layout, receiver.layout)
    travelling = [layer for layer, num_bytes in enumerate(plan.unit_bytes) if num_bytes]
    runs: list[range] = []
    for layer in travelling:
        last = runs[-1] if runs else range(0)
        if last and last.stop == layer and plan.leaf_bytes(last.start) == plan.leaf_bytes(layer):
            runs[-1] = range(last.start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    edges = list(itertools.pairwise([*range(first, end, cut), end]))
    return [Frame(sender, receiver, plan, layers, a, b) for layers in runs for a, b in edges]


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[Frame], list[np.ndarray]]:
    """Every frame of a transfer between random workers, the KV on both sides already."""
    source_tp, destination_tp = draw(st.sampled_from(TP_PAIRS))
    dims = draw(st.sampled_from([[8], [8, 24], [4, 8], [4, 7]]))  # bfloat16: leaves of 128, 224, 256 and 768 bytes
    specs = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from(dims))
    layers = tuple(LayerSpec(*spec) for spec in draw(st.lists(specs, min_size=1, max_size=4)))
    model = ModelKV(layers, draw(st.sampled_from(["float32", "bfloat16"])), "f")
    num_tokens = draw(st.integers(1, 150))
    first = draw(st.integers(0, (num_tokens - 1) // UNIT_TOKENS)) * UNIT_TOKENS
    cut = draw(st.integers(1, 10)) * UNIT_TOKENS
    kv = pattern(model, num_tokens, seed=draw(st.integers(0, 1000)))
    sides: list[list[Side]] = []
    for tp in (source_tp, destination_tp):
        block_size = draw(st.sampled_from([16, 32, 48, 64]))
        needed = math.ceil(num_tokens / block_size)
        geometry = KVGeometry(tp, block_size, needed + draw(st.integers(0, 3)))
        table = draw(st.permutations(range(geometry.num_blocks)))[:needed]
        sides.append([Side(KVLayout(model, geometry, rank), table) for rank in range(tp)])
        for side in sides[-1]:
            side.put(kv)
    pairs = rank_pairs(model, source_tp, destination_tp)
    found = [frame for a, b in pairs for frame in frames_of(sides[0][a], sides[1][b], first, num_tokens, cut)]
    return found, kv


# One leaf.


def native_digest(data: bytes, leaf_bytes: int = 0, *, offset: int = 0) -> bytes:
    """By native code, `offset` bytes behind an aligned address."""
    native = library()
    assert native is not None
    buffer, out = np.zeros(len(data) + 64 + offset, np.uint8), np.zeros(DIGEST_BYTES, np.uint8)
    start = -address_of(buffer) % 64 + offset
    buffer[start : start + len(data)] = np.frombuffer(data, np.uint8)
    pieces = np.array([[address_of(buffer) + start, len(data)]], np.uint64)
    leaves = (ctypes.c_uint64 * 3)(address_of(buffer) + start, address_of(out), leaf_bytes or len(data))
    native.landed(address_of(pieces), (ctypes.c_uint64 * 4)(), len(data), leaves)
    return out.tobytes()


@native_only
@pytest.mark.parametrize("width", [0, 1, 2])
def test_native_xxh3_is_the_packages_whatever_the_width_of_its_registers(width: int) -> None:
    native = library()
    assert native is not None
    sizes = [*range(241, 301), 1023, 1024, 1025, 2048, 4032, 4096, 4160, 8192, 18432]
    native.digest_width(width)
    try:
        for size in sizes:
            data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
            for offset in (0, 1, 48):
                assert native_digest(data, offset=offset) == xxh3(data), (size, offset)
            for constant in (bytes(size), b"\xff" * size):  # the largest carries
                assert native_digest(constant) == xxh3(constant), size
    finally:
        native.digest_width(2)


@native_only
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize(
    ("leaf_bytes", "num_bytes"), [(256, 256), (300, 3000), (2048, 24_576), (2048, 5000), (9000, 20_000)]
)
def test_a_copy_digests_what_it_writes_whatever_the_cuts_of_its_source(
    width: int, leaf_bytes: int, num_bytes: int, streams: bool
) -> None:
    native = library()
    assert native is not None
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)
    num_leaves = -(-num_bytes // leaf_bytes)
    native.digest_width(width)
    try:
        for cuts in ((), (leaf_bytes,), (1, 100, num_bytes - 3), range(77, num_bytes, 777)):
            room, out = np.zeros(num_bytes + 128, np.uint8), np.zeros(num_leaves * DIGEST_BYTES, np.uint8)
            start = -address_of(room) % 64 + (len(cuts) == 1)  # a line's beginning: only there may it stream
            to = room[start : start + num_bytes]
            edges = sorted({0, num_bytes, *(cut for cut in cuts if cut < num_bytes)})
            fro = np.array([[address_of(data) + a, b - a] for a, b in itertools.pairwise(edges)], np.uint64)
            whole = np.array([[address_of(to), num_bytes]], np.uint64)
            leaves = (ctypes.c_uint64 * 3)(address_of(to), address_of(out), leaf_bytes)
            native.copy(address_of(whole), address_of(fro), num_bytes, leaves, streams)
            assert (to == data).all()
            assert not room[:start].any()
            assert not room[start + num_bytes :].any()
            padded = data.tobytes().ljust(num_leaves * leaf_bytes, b"\0")
            expected = [xxh3(padded[at : at + leaf_bytes]) for at in range(0, len(padded), leaf_bytes)]
            assert out.tobytes() == b"".join(expected), list(cuts)
    finally:
        native.digest_width(2)


@native_only
@pytest.mark.parametrize("num_bytes", [1, 16, 255, 256, 1000, 4095])
def test_a_short_leaf_is_digested_as_if_zeros_followed(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(1, 256, num_bytes, np.uint8).tobytes()
    assert native_digest(data, 4096) == xxh3(data.ljust(4096, b"\0"))


# Frames.


@relaxed(150)
@given(transfers())
def test_both_ends_and_both_ways_give_the_digest_that_is_defined(case: tuple[list[Frame], list[np.ndarray]]) -> None:
    frames, kv = case
    tables = []
    for is_plain in (False, True):
        with packages_only(is_plain):
            for frame in frames:
                for side in (frame.sender, frame.receiver):
                    made = frame.digest(side)
                    made.make()
                    assert made.result() == frame.expected(kv)
                    assert frame.digest(side).result() == frame.expected(kv)  # known already
        sides = {id(side): side for frame in frames for side in (frame.sender, frame.receiver)}.values()
        tables.append([side.table_of() for side in sides])
        for side in sides:
            side.digests.table[:] = 0
    assert tables[0] == tables[1]
    for side, table in zip(sides, tables[0], strict=True):
        check_table(side, np.frombuffer(table, np.uint8), kv)


def check_table(side: Side, table: np.ndarray, kv: Sequence[np.ndarray]) -> None:
    """What is there is in its place: the digest of that leaf, or nothing."""
    per_block = side.layout.geometry.block_size // UNIT_TOKENS
    at = num_made = 0
    for layer, tokens in enumerate(kv):
        leaf_bytes = side.digests.leaf_bytes[layer]
        heads = side.layout.heads(layer)
        shape = (side.layout.geometry.num_blocks, 2, len(heads), per_block, DIGEST_BYTES)
        slots = table[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
        for block, half, head, unit in np.ndindex(shape[:-1]):
            digest = slots[block, half, head, unit].tobytes()
            if digest == bytes(DIGEST_BYTES):
                continue
            num_made += 1
            assert block in side.table
            first = side.table.index(block) * side.layout.geometry.block_size + unit * UNIT_TOKENS
            leaf = tokens[half, heads.start + head, first : first + UNIT_TOKENS].tobytes()
            assert digest == xxh3(leaf.ljust(leaf_bytes, b"\0"))
    assert at == len(table)
    assert num_made


@relaxed(150)
@given(transfers(), st.data(), st.booleans())
def test_another_byte_or_another_order_of_leaves_is_another_digest(
    case: tuple[list[Frame], list[np.ndarray]], data: st.DataObject, is_plain: bool
) -> None:
    frame, side = data.draw(st.sampled_from(case[0])), data.draw(st.sampled_from(["sender", "receiver"]))
    rank: Side = getattr(frame, side)
    with packages_only(is_plain):

        def digest() -> bytes:
            made = frame.digest(rank)
            made.make()
            return made.result()

        right = digest()
        views = frame.extents(rank).views()
        view = views[data.draw(st.integers(0, len(views) - 1))]
        at, bit = data.draw(st.integers(0, len(view) - 1)), 1 << data.draw(st.integers(0, 7))
        view[at] ^= bit
        assert digest() != right
        view[at] ^= bit
        assert digest() == right

        size = frame.plan.leaf_bytes(frame.layers.start)
        leaves = [piece[i : i + size] for piece in views for i in range(0, len(piece), size)]
        whole = [leaf for leaf in leaves if len(leaf) == size]
        if len(whole) < 2:
            return
        a, b = data.draw(st.permutations(range(len(whole))))[:2]
        whole[a][:], whole[b][:] = bytes(whole[b]), bytes(whole[a])
        assert digest() != right


@relaxed(150)
@given(transfers(), st.data(), st.booleans())
def test_bytes_that_land_little_by_little_give_the_same_digests(
    case: tuple[list[Frame], list[np.ndarray]], data: st.DataObject, is_plain: bool
) -> None:
    frames, kv = case
    with packages_only(is_plain):
        frame = data.draw(st.sampled_from(frames))
        made, rest = frame.digest(frame.receiver), frame.extents(frame.receiver).num_bytes
        leaf = frame.plan.leaf_bytes(frame.layers.start)
        steps = st.one_of(st.integers(1, 3), st.sampled_from([leaf - 1, leaf, leaf + 1]), st.integers(1, 5000))
        for _ in range(300):
            step = min(rest, data.draw(steps))
            made.landed(step)
            rest -= step
            if not rest:
                break
        if rest:
            made.landed(rest)
        assert made.result() == frame.expected(kv)


@native_only
@relaxed(100)
@given(transfers(), st.data())
def test_a_leaf_is_digested_when_all_of_it_is_there_and_not_before(
    case: tuple[list[Frame], list[np.ndarray]], data: st.DataObject
) -> None:
    """What lands after its digest was made would not be in it; what has landed is in cache for a moment only."""
    frames, kv = case
    frame = data.draw(st.sampled_from(frames))
    if frame.digest(frame.receiver).native is None:
        return
    payload, size = frame.payload(), frame.plan.leaf_bytes(frame.layers.start)
    frame.receiver.buffer[:] = 0
    made, at = frame.digest(frame.receiver), 0
    views = frame.extents(frame.receiver).views()
    while at < len(payload):
        step = min(len(payload) - at, data.draw(st.integers(1, 1500)))
        fill(views, at, payload[at : at + step])
        made.landed(step)
        at += step
        num_made = int(frame.receiver.digests.table.reshape(-1, DIGEST_BYTES).any(axis=1).sum())
        assert num_made == num_complete([len(view) for view in views], at, size)
    assert made.result() == frame.expected(kv)


def num_complete(pieces: Sequence[int], landed: int, leaf_bytes: int) -> int:
    """Leaves of which all bytes are there, after so many."""
    count = 0
    for piece in pieces:
        count += -(-piece // leaf_bytes) if landed >= piece else max(0, landed) // leaf_bytes
        landed -= piece
    return count


def fill(views: Sequence[memoryview], at: int, data: bytes) -> None:
    """Bytes [at, at + len(data)) of the views."""
    for view in views:
        part = data[: max(0, len(view) - at)] if at < len(view) else b""
        view[at : at + len(part)] = part
        data, at = data[len(part) :], max(0, at + len(part) - len(view))


@relaxed(100)
@given(transfers(), st.booleans(), st.booleans())
def test_bytes_that_are_fetched_have_their_digests(
    case: tuple[list[Frame], list[np.ndarray]], is_plain: bool, is_streamed: bool
) -> None:
    frames, kv = case
    with packages_only(is_plain):
        for frame in frames:
            clear(frame.receiver)
            arrived, fro = arrive(frame, kv, is_streamed=is_streamed), frame.extents(frame.sender)
            arrived.fetch(frame.sender.digests.pool, fro.parts)
            assert arrived.is_verified
            assert b"".join(bytes(view) for view in arrived.views()) == frame.payload()
            frame.sender.rows(frame.layers.start)[:] ^= 1
            wrong = arrive(frame, kv, is_streamed=is_streamed)
            wrong.fetch(frame.sender.digests.pool, fro.parts)
            assert not wrong.is_verified
            frame.sender.rows(frame.layers.start)[:] ^= 1


def clear(side: Side) -> None:
    side.buffer[:] = 0xEE
    side.digests.table[:] = 0


def arrive(frame: Frame, kv: Sequence[np.ndarray], *, is_streamed: bool = False) -> Arrival:
    """The frame as its sender sealed it, on its way into the receiver's pool."""
    data = frame.data(seal(CONTEXT, frame.data(), frame.expected(kv)))
    extents = frame.extents(frame.receiver)
    landing = Landing(list(extents.parts), None, extents.num_bytes, is_streamed)
    return Arrival(data, landing, frame.receiver.digests, CONTEXT, None)


@native_only
@relaxed(100)
@given(transfers(), st.data())
def test_bytes_that_come_on_a_socket_in_tiny_bites_are_verified(
    case: tuple[list[Frame], list[np.ndarray]], data: st.DataObject
) -> None:
    frames, kv = case
    native = [frame for frame in frames if frame.digest(frame.receiver).native is not None]
    if not native:
        return
    frame = data.draw(st.sampled_from(native))
    payload = bytearray(frame.payload())
    is_broken = data.draw(st.booleans())
    if is_broken:
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 0x10
    clear(frame.receiver)
    arrived = arrive(frame, kv, is_streamed=data.draw(st.booleans()))
    assert arrived.is_native
    bites = itertools.cycle(data.draw(st.lists(st.integers(1, 3000), min_size=3, max_size=20)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        at = came = 0
        with pytest.raises(BlockingIOError):
            arrived.receive(ours.fileno(), len(payload))
        while came < len(payload):
            at += theirs.send(payload[at : at + next(bites)])
            while came < at:
                count = arrived.receive(ours.fileno(), min(next(bites), len(payload) - came))
                assert count > 0
                came += count
    assert b"".join(bytes(view) for view in arrived.views()) == payload
    assert arrived.is_verified is not is_broken


@native_only
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 63])
def test_bytes_that_come_without_digests_go_to_their_place_whether_many_or_few_wait(cut: int, streams: bool) -> None:
    native = library()
    assert native is not None
    num_bytes = 3 * 2**20 + 77
    data = np.random.default_rng(cut).integers(0, 256, num_bytes, np.uint8)
    room = np.zeros(num_bytes + 3 * 64, np.uint8)
    lengths = [700_000 - cut, 1_000_000, num_bytes - 1_700_000 + cut]
    starts = [cut, 700_064, 1_700_128]
    pieces = np.array([[address_of(room) + at, length] for at, length in zip(starts, lengths, strict=True)], np.uint64)
    progress = (ctypes.c_uint64 * 4)()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        sent = came = 0
        while came < num_bytes:
            while sent < num_bytes:  # as much as the sockets take: more than one read, where they are large
                try:
                    sent += theirs.send(data[sent:].data)
                except BlockingIOError:
                    break
            assert select.select([ours], [], [], 10)[0]
            count = native.receive(ours.fileno(), address_of(pieces), progress, num_bytes - came, None, streams)
            assert count > 0
            came += count
    found = [room[at : at + length] for at, length in zip(starts, lengths, strict=True)]
    assert (np.concatenate(found) == data).all()
    assert room.sum(dtype=np.int64) == data.sum(dtype=np.int64)  # nothing beside


def test_a_frame_is_sealed_for_what_it_is() -> None:
    frame = Data(TransferId(b"t" * 16), 0, 1, 2, 3, 4, 5, NO_DIGEST, b"")
    others = [frame._replace(**{name: 9}) for name in frame._fields[1:7]]
    others.append(frame._replace(transfer_id=TransferId(b"u" * 16)))
    sealed = {seal(CONTEXT, other, b"d" * 16) for other in [frame, *others]}
    sealed |= {seal(CONTEXT, frame, b"e" * 16), seal(b"other ranks here", frame, b"d" * 16)}
    assert len(sealed) == len(others) + 3


# Layers of several head sizes.

MIXED = ModelKV((LayerSpec(2, 8), LayerSpec(4, 8), LayerSpec(2, 16), LayerSpec(2, 8), LayerSpec(1, 4)), "bfloat16", "f")


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_layers_of_several_head_sizes_travel_in_frames_of_their_own(tp_rank: int) -> None:
    source = Side(KVLayout(MIXED, KVGeometry(1, 32, 6), 0), [4, 1, 3])
    destination = Side(KVLayout(MIXED, KVGeometry(2, 16, 8), tp_rank), [7, 2, 5, 0, 1])
    kv = pattern(MIXED, 70)
    source.put(kv)
    destination.put(kv)
    plan = plan_copies(source.layout, destination.layout)
    lane = SendLane(len(MIXED.layers), source.table, 70)
    lane.connect(plan)
    assert lane.accept(0, 2**20)
    for layer in range(len(MIXED.layers)):
        lane.mark_ready(layer, 70)
    layers: list[range] = []
    while outgoing := lane.next_frame(new_transfer_id(), lambda layer: 70, 2**20, name_blocks=False):
        frame = outgoing.frame
        layers.append(range(frame.first_layer, frame.first_layer + frame.num_layers))
        covered = Frame(source, destination, plan, layers[-1], 0, 70)
        for side in (source, destination):
            made = covered.digest(side)
            made.make()
            assert made.result() == covered.expected(kv)
        check_table(source, source.digests.table, kv)
        check_table(destination, destination.digests.table, kv)
    assert layers == [range(2), range(2, 3), range(3, 4), range(4, 5)]


def test_a_frame_of_several_head_sizes_is_refused() -> None:
    layout = KVLayout(MIXED, KVGeometry(1, 16, 4), 0)
    plan = plan_copies(layout, layout)
    lane = ReceiveLane(plan)
    lane.accept([0, 1, 2, 3], 64, 0, 2**20)
    wrong = Data(new_transfer_id(), 0, 0, 1, 2, 0, 4, NO_DIGEST, b"")
    with pytest.raises(Misfit, match="several head sizes"):
        lane.begin(wrong, plan.num_bytes(1, 64) + plan.num_bytes(2, 64))
    assert lane.begin(wrong._replace(first_layer=0), plan.num_bytes(0, 64) + plan.num_bytes(1, 64))


# What a sender offers.

BLOCK, UNITS_PER_BLOCK, NUM_BLOCKS = 32, 2, 8
LAYOUT = KVLayout(MIXED, KVGeometry(2, BLOCK, NUM_BLOCKS), 1)
PEER = PeerWorker("d", "1", ())


@dataclass
class Attempt:
    """Tokens [0, computed) are in the pool."""

    table: list[int]
    prompt: int
    computed: int
    open: dict[TransferId, int] = field(default_factory=dict)
    """Transfers, and how many tokens each has announced in every layer."""


class Offers(RuleBasedStateMachine):
    """An engine with a prefix cache that prefills in chunks, offers, is refused, offers again, receives, decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.side = Side(LAYOUT, list(range(NUM_BLOCKS)))
        self.sources = SourceDigests(LAYOUT, self.side.digests)
        self.rng = np.random.default_rng(7)
        self.running: list[Attempt] = []
        self.cached: list[Attempt] = []
        self.known: set[int] = set()
        """Units that were announced in every layer and not written since."""
        self.kept: dict[TransferId, int] = {}
        """Per transfer: units at its head that were known when it first announced something."""
        self.hashed: list[int] = []
        """Addresses of the leaves that were digested since somebody looked."""

    # The engine.

    def free_blocks(self) -> list[int]:
        held = {block for sequence in self.running for block in sequence.table}
        return [block for block in range(NUM_BLOCKS) if block not in held]

    def units(self, sequence: Attempt, first: int, end: int) -> list[int]:
        where = range(first // UNIT_TOKENS, -(-end // UNIT_TOKENS))
        return [sequence.table[u // UNITS_PER_BLOCK] * UNITS_PER_BLOCK + u % UNITS_PER_BLOCK for u in where]

    def forget(self, sequence: Attempt, first: int, end: int) -> None:
        self.sources.will_write(tuple(sequence.table), first, end)
        self.known -= set(self.units(sequence, first, end))

    def write(self, sequence: Attempt, layer: int, first: int, end: int) -> None:
        for token in range(first, end):
            rows = self.side.rows(layer)[sequence.table[token // BLOCK], :, :, token % BLOCK]
            rows[:] = self.rng.integers(0, 256, rows.shape, np.uint8)

    def admit(self, data: st.DataObject, num_tokens: int) -> Attempt | None:
        """A sequence with blocks: the head of somebody's, as far as it is full, and free ones."""
        known = self.running + self.cached
        table: list[int] = []
        if known and data.draw(st.booleans()):
            other = known[data.draw(st.integers(0, len(known) - 1))]
            num_full = min(other.computed, num_tokens - 1) // BLOCK
            table = other.table[: data.draw(st.integers(0, num_full))]
        num_shared = len(table)
        free = [block for block in self.free_blocks() if block not in table]
        num_new = -(-num_tokens // BLOCK) - num_shared
        if num_new > len(free):
            return None
        fresh = (free[::-1] if data.draw(st.booleans()) else free)[:num_new]  # the same ones again and again
        self.cached = [other for other in self.cached if not set(fresh) & set(other.table)]
        sequence = Attempt(table + fresh, num_tokens, num_shared * BLOCK)
        self.running.append(sequence)
        return sequence

    # Rules.

    @rule(data=st.data(), num_tokens=st.integers(1, 160))
    def prefill(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = self.admit(data, num_tokens)
        if sequence is not None and data.draw(st.integers(0, 3)):
            self.offer(sequence)

    @rule(data=st.data(), num_tokens=st.integers(1, 160))
    def receive(self, data: st.DataObject, num_tokens: int) -> None:
        """Somebody else's KV lands, and its digests with it: those of whole transfers only, perhaps."""
        sequence = self.admit(data, num_tokens)
        if sequence is None:
            return
        first = sequence.computed
        self.forget(sequence, first, num_tokens)
        for layer in range(len(MIXED.layers)):
            self.write(sequence, layer, first, num_tokens)
        for layer in range(data.draw(st.integers(0, len(MIXED.layers)))):
            runs = TableRuns(tuple(self.sources._sides), BLOCK, sequence.table).runs(layer, first, num_tokens)
            FrameDigest(
                self.side.digests, Extents(self.side.digests.pool, [(layer, runs)], int(runs[:, 1].sum()))
            ).make()
        if data.draw(st.booleans()):
            for layer in range(data.draw(st.integers(0, len(MIXED.layers)))):  # and was aborted
                self.write(sequence, layer, first, num_tokens)
            self.running.remove(sequence)
        else:
            sequence.computed = num_tokens

    @precondition(lambda self: self.running)
    @rule(data=st.data(), budget=st.one_of(st.integers(1, 120), st.sampled_from([16, 32, 160])))
    def step(self, data: st.DataObject, budget: int) -> None:
        """Chunks of some prompts, and one token of sequences that decode, in one step."""
        self.compute(data, self.running, budget)

    @rule(data=st.data(), num_tokens=st.integers(100, 160))
    def serve(self, data: st.DataObject, num_tokens: int) -> None:
        """A whole request: its blocks are free, with digests, for the next one."""
        sequence = self.admit(data, num_tokens)
        if sequence is not None:
            self.offer(sequence)
            while sequence.computed < num_tokens:
                self.compute(data, [sequence], 96)
            self.end_transfers(sequence)
            self.running.remove(sequence)

    @precondition(lambda self: any(seq.computed == seq.prompt and not seq.open for seq in self.running))
    @rule(data=st.data(), num_tokens=st.integers(1, 40))
    def decode(self, data: st.DataObject, num_tokens: int) -> None:
        done = [seq for seq in self.running if seq.computed == seq.prompt and not seq.open]
        sequence = done[data.draw(st.integers(0, len(done) - 1))]
        for _ in range(num_tokens):
            self.compute(data, [sequence], 1)

    def compute(self, data: st.DataObject, sequences: list[Attempt], budget: int) -> None:
        chunks: list[tuple[Attempt, int, int]] = []
        for sequence in sequences:
            if len(sequences) > 1 and not data.draw(st.integers(0, 3)):
                continue
            end = min(sequence.prompt, sequence.computed + budget)
            if sequence.computed == sequence.prompt:  # a decode
                if sequence.open:
                    continue
                if sequence.prompt == len(sequence.table) * BLOCK:
                    free = self.free_blocks()
                    if not free:
                        continue
                    self.cached = [other for other in self.cached if free[0] not in other.table]
                    sequence.table.append(free[0])
                end = sequence.prompt = sequence.computed + 1
            chunks.append((sequence, sequence.computed, end))
        for chunk in chunks:
            self.forget(*chunk)
        for layer in range(len(MIXED.layers)):
            for sequence, first, end in chunks:
                self.write(sequence, layer, first, end)
            for sequence, _, end in chunks:
                for transfer_id in sequence.open:
                    self.announce(sequence, transfer_id, layer, end)
        for sequence, _, end in chunks:
            sequence.computed = end
            for transfer_id in sequence.open:
                self.announced(sequence, transfer_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def offer_again(self, data: st.DataObject) -> None:
        """A redirect, in the middle of a prefill or after it; all that is there is announced at once."""
        sequence = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        if sequence.open and data.draw(st.booleans()):
            self.end_transfers(sequence)
        self.offer(sequence)
        transfer_id = list(sequence.open)[-1]
        if sequence.computed and data.draw(st.booleans()):
            self.announce(sequence, transfer_id, None, sequence.computed)
            self.announced(sequence, transfer_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        self.end_transfers(sequence)
        self.running.remove(sequence)
        self.cached.append(sequence)

    @precondition(lambda self: self.kept)
    @rule()
    def judge(self) -> None:
        """Everything that is offered is what it was."""
        for transfer_id in self.kept:
            assert self.sources.is_intact(transfer_id)

    @precondition(lambda self: any(end for sequence in self.running for end in sequence.open.values()))
    @rule(data=st.data())
    def spoil(self, data: st.DataObject) -> None:
        """A byte changes of which nobody spoke: whoever offers it has to say so, and the table is what it was."""
        offers = [(s, t, end) for s in self.running for t, end in s.open.items() if end]
        sequence, transfer_id, end = offers[data.draw(st.integers(0, len(offers) - 1))]
        token, layer = data.draw(st.integers(0, end - 1)), data.draw(st.integers(0, len(MIXED.layers) - 1))
        rows = self.side.rows(layer)[sequence.table[token // BLOCK], :, :, token % BLOCK]
        at, before = data.draw(st.integers(0, rows.size - 1)), self.side.table_of()
        index = np.unravel_index(at, rows.shape)
        rows[index] ^= 64
        assert not self.sources.is_intact(transfer_id)
        assert not self.sources.is_intact(transfer_id)
        assert self.side.table_of() == before
        rows[index] ^= 64
        assert self.sources.is_intact(transfer_id)

    # What the digests must be.

    def offer(self, sequence: Attempt) -> None:
        transfer_id = new_transfer_id()
        self.sources.open(SendRequest(transfer_id, PEER, sequence.prompt, tuple(sequence.table)))
        sequence.open[transfer_id] = 0

    def end_transfers(self, sequence: Attempt) -> None:
        for transfer_id in sequence.open:
            self.sources.close(transfer_id)
            self.kept.pop(transfer_id, None)
        sequence.open.clear()

    def announce(self, sequence: Attempt, transfer_id: TransferId, layer: int | None, end: int) -> None:
        layers = range(len(MIXED.layers)) if layer is None else (layer,)
        stop = end if end == sequence.prompt else end - end % UNIT_TOKENS
        if transfer_id not in self.kept:
            whole = self.units(sequence, 0, stop - stop % UNIT_TOKENS)
            unknown = (index for index, unit in enumerate(whole) if unit not in self.known)
            self.kept[transfer_id] = next(unknown, len(whole))
        spared = max(self.kept[transfer_id], sequence.open[transfer_id] // UNIT_TOKENS)
        with mock.patch.object(digests, "FrameDigest", self.spy):
            self.sources.written(transfer_id, layer, end)
        due = {
            (number, row, unit)
            for number in layers
            for row in range(2 * len(LAYOUT.heads(number)))
            for unit in self.units(sequence, spared * UNIT_TOKENS, stop)
        }
        assert sorted(self.leaf_at(address) for address in self.hashed) == sorted(due)
        self.hashed.clear()
        for number in layers:
            self.check(sequence, number, stop)

    def announced(self, sequence: Attempt, transfer_id: TransferId) -> None:
        """In every layer."""
        end = sequence.computed
        sequence.open[transfer_id] = end if end == sequence.prompt else end - end % UNIT_TOKENS
        self.known |= set(self.units(sequence, 0, end - end % UNIT_TOKENS))

    def spy(self, leaf_digests: LeafDigests, extents: Extents) -> FrameDigest:
        made = FrameDigest(leaf_digests, extents)
        if leaf_digests is not self.side.digests:  # it compares
            return made
        right = made.make

        def make() -> None:
            size = int(made.leaves[2])
            self.hashed += [at for a, n in extents.pieces.tolist() for at in range(a, a + n, size)]
            right()

        made.make = make  # type: ignore[method-assign]
        return made

    def leaf_at(self, address: int) -> tuple[int, int, int]:
        """The layer, which K|V and head of it, and which unit of the pool."""
        offset = address - address_of(self.side.buffer)
        layer = max(number for number in range(len(MIXED.layers)) if LAYOUT.layer_offset(number) <= offset)
        leaf, rest = divmod(offset - LAYOUT.layer_offset(layer), self.side.digests.leaf_bytes[layer])
        assert not rest
        row, unit = divmod(leaf, UNITS_PER_BLOCK)
        block, row = divmod(row, 2 * len(LAYOUT.heads(layer)))
        return layer, row, block * UNITS_PER_BLOCK + unit

    def check(self, sequence: Attempt, layer: int, end: int) -> None:
        """Tokens [0, end) of a layer have the digests of what lies in the pool."""
        table = self.side.digests.table
        sizes = [
            LAYOUT.block_bytes(number) * NUM_BLOCKS // leaf_bytes * DIGEST_BYTES
            for number, leaf_bytes in enumerate(self.side.digests.leaf_bytes)
        ]
        start = sum(sizes[:layer])
        rows = self.side.rows(layer)
        slots = table[start : start + sizes[layer]].reshape(*rows.shape[:3], UNITS_PER_BLOCK, DIGEST_BYTES)
        for first in range(0, end, UNIT_TOKENS):
            block, at = sequence.table[first // BLOCK], first % BLOCK
            stop = min(at + UNIT_TOKENS, at + end - first)
            for half, head in np.ndindex(rows.shape[1:3]):
                leaf = rows[block, half, head, at:stop].tobytes().ljust(self.side.digests.leaf_bytes[layer], b"\0")
                assert slots[block, half, head, at // UNIT_TOKENS].tobytes() == xxh3(leaf)

    @invariant()
    def nothing_else_is_hashed(self) -> None:
        assert not self.hashed


TestOffers = Offers.TestCase
TestOffers.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_later_chunk_is_digested_although_its_blocks_were_announced_for_somebody_else() -> None:
    """A redirect between two chunks finds the digests of the last owner of blocks that are still to be written."""
    machine = Offers()
    old = Attempt([0, 1, 2], 96, 0)
    new = Attempt([0, 1, 2], 96, 0)
    for sequence, ends in ((old, [96]), (new, [32, 96])):
        for end in ends:
            machine.offer(sequence)
            transfer_id = list(sequence.open)[-1]
            if sequence.computed:
                machine.announce(sequence, transfer_id, None, sequence.computed)
                machine.announced(sequence, transfer_id)
            machine.forget(sequence, sequence.computed, end)
            for layer in range(len(MIXED.layers)):
                machine.write(sequence, layer, sequence.computed, end)
                machine.announce(sequence, transfer_id, layer, end)
            sequence.computed = end
            machine.announced(sequence, transfer_id)
            machine.end_transfers(sequence)


def test_a_unit_is_not_known_before_every_layer_of_it_is() -> None:
    machine = Offers()
    last = len(MIXED.layers) - 1
    attempt = Attempt([3, 1], 64, 64)
    machine.forget(attempt, 0, 64)
    for layer in range(last + 1):
        machine.write(attempt, layer, 0, 64)
    machine.offer(attempt)
    machine.announce(attempt, next(iter(attempt.open)), last, 64)
    machine.end_transfers(attempt)
    machine.offer(attempt)
    machine.announce(attempt, next(iter(attempt.open)), None, 64)


def test_kv_of_a_decode_is_digested_where_somebody_elses_was_announced() -> None:
    machine = Offers()
    old, new = Attempt([2], 32, 32), Attempt([2], 32, 16)
    machine.forget(old, 0, 32)
    for layer in range(len(MIXED.layers)):
        machine.write(old, layer, 0, 32)
    machine.offer(old)
    machine.announce(old, next(iter(old.open)), None, 32)
    machine.announced(old, next(iter(old.open)))
    for token in range(16, 32):
        machine.forget(new, token, token + 1)
        for layer in range(len(MIXED.layers)):
            machine.write(new, layer, token, token + 1)
    new.computed = 32
    machine.offer(new)
    machine.announce(new, next(iter(new.open)), None, 32)


@relaxed(100)
@given(st.integers(0, 95), st.integers(1, 96))
def test_every_unit_of_which_one_token_is_written_is_digested_again(first: int, num_tokens: int) -> None:
    machine = Offers()
    attempt = Attempt([3, 1, 6], 96, 96)
    end = min(96, first + num_tokens)
    for layer in range(len(MIXED.layers)):
        machine.write(attempt, layer, 0, 96)
    for _ in range(2):
        machine.offer(attempt)
        transfer_id = next(iter(attempt.open))
        machine.announce(attempt, transfer_id, None, 96)
        machine.announced(attempt, transfer_id)
        machine.end_transfers(attempt)
        machine.forget(attempt, first, end)
        for layer in range(len(MIXED.layers)):
            machine.write(attempt, layer, first, end)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cached_prefix_that_has_changed_is_noticed_by_the_step_that_reads_it(layer: int) -> None:
    side = Side(LAYOUT, list(range(NUM_BLOCKS)))
    sources = SourceDigests(LAYOUT, side.digests)
    table = (3, 1, 2)
    num_layers = len(MIXED.layers)

    def offer(num_tokens: int) -> TransferId:
        transfer_id = new_transfer_id()
        sources.open(SendRequest(transfer_id, PEER, num_tokens, table))
        return transfer_id

    first = offer(2 * BLOCK)
    for number in range(num_layers):
        sources.written(first, number, 2 * BLOCK)
    sources.close(first)
    unharmed = offer(3 * BLOCK)
    for number in range(num_layers):
        sources.written(unharmed, number, 3 * BLOCK)
    sources.will_write(table, 2 * BLOCK, 3 * BLOCK)
    side.rows(layer)[table[1], 1, 0, 5, 0] ^= 1
    redirected = offer(2 * BLOCK)  # nobody reads it here, and who receives it will say so
    sources.written(redirected, None, 2 * BLOCK)
    again = offer(3 * BLOCK)
    for number in range(layer):
        sources.written(again, number, 3 * BLOCK)
    with pytest.raises(CorruptPool):
        sources.written(again, layer, 3 * BLOCK)


def test_transfers_that_are_over_or_unknown_cost_nothing() -> None:
    machine = Offers()
    attempt = Attempt([2], 32, 32)
    machine.offer(attempt)
    transfer_id = next(iter(attempt.open))
    machine.end_transfers(attempt)
    with mock.patch.object(digests, "FrameDigest", machine.spy):
        machine.sources.written(transfer_id, None, 32)
        machine.sources.close(transfer_id)
        assert machine.sources.is_intact(transfer_id)
    assert not machine.hashed


def test_what_is_written_after_the_transfer_thread_died_does_no_harm_until_poll_tells() -> None:
    """The engine's thread digests the pool by itself: its views must not go with the other thread."""
    with closing(make_worker("p")) as (worker,):
        rank, kv = worker.leader, pattern(MODEL, 64)
        transfer_id = open_send(worker, worker, 64, [0, 1, 2, 3])
        rank.endpoint._thread.post(lambda: 1 // 0)
        rank.endpoint._runner.join(10)
        assert not rank.endpoint._runner.is_alive()
        write_all(worker, transfer_id, [0, 1, 2, 3], kv)
        assert [type(event) for event in rank.endpoint.poll()] == [Failed]
        with pytest.raises(RuntimeError, match="the transfer thread died"):
            rank.endpoint.poll()


def test_kv_that_was_received_where_other_kv_was_announced_is_offered_with_its_own_digests() -> None:
    table = [0, 1, 2, 3]
    with closing(make_worker("a"), make_worker("b")) as (a, b):
        for number, (source, destination) in enumerate([(a, b), (b, a), (a, b)]):
            transfer_id = open_send(source, destination, 64, table)
            destination.leader.expect(ReserveRequested, transfer_id)
            destination.leader.endpoint.grant(transfer_id, table, 64, 0)
            if number < 2:
                write_all(source, transfer_id, table, kv := pattern(MODEL, 64, seed=number))
            else:
                source.leader.endpoint.written(transfer_id, None, 64)  # what it got from "b"
            source.leader.endpoint.finish(transfer_id, b"manifest")
            destination.leader.expect(Received, transfer_id)
            destination.leader.expect(ManifestReceived, transfer_id)
            assert_equal(destination, table, kv)
            destination.leader.endpoint.complete(transfer_id)
            source.leader.expect(Completed, transfer_id)
