"""A frame on its way out: head and pieces in order, however small the socket's bites are."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from kvtransfer.departure import Departure
from kvtransfer.native.library import library
from kvtransfer.plan import HASH_BYTES
from kvtransfer.pool import Extents, Pool

PIECE = 4096
MIB = 1024 * 1024


@pytest.mark.parametrize("num_pieces", [1, 63, 64, 65, 95, 96, 97, 300])
@pytest.mark.parametrize("head_bytes", [20, 2 * HASH_BYTES])
def test_head_and_bytes_arrive_in_order(num_pieces: int, head_bytes: int) -> None:
    native = library()
    if native is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(num_pieces)
    memory = rng.integers(0, 256, 400 * PIECE, np.uint8)
    starts = rng.permutation(400)[:num_pieces].astype(np.uint64) * np.uint64(PIECE)
    runs = np.stack([starts, np.full(num_pieces, PIECE, np.uint64)], axis=1)
    payload = b"".join(memory[int(start) : int(start) + PIECE].tobytes() for start in starts)
    head = rng.bytes(head_bytes)
    pool = Pool.flat(memoryview(memory))
    extents = Extents(pool, [(0, runs)], len(payload))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        departure = Departure(native, head, extents)
        sent, came = 0, b""
        while departure.bytes_left:
            try:
                sent += departure.send(ours.fileno(), len(head) + len(payload))
            except BlockingIOError:
                came += theirs.recv(10_000)
        ours.shutdown(socket.SHUT_WR)
        while part := theirs.recv(1 << 20):
            came += part
    assert came == head + payload
    assert sent == len(came)


def test_it_stops_when_enough_is_sent_and_its_rest_is_a_copy() -> None:
    native = library()
    if native is None:
        pytest.skip("no C++ compiler")
    memory = np.random.default_rng(1).integers(0, 256, 6 * MIB, np.uint8)
    runs = np.array([[3 * MIB, 2 * MIB - 100], [0, MIB], [5 * MIB, MIB]], np.uint64)
    payload = b"".join(memory[int(start) : int(start) + int(length)].tobytes() for start, length in runs)
    departure = Departure(native, b"head", Extents(Pool.flat(memoryview(memory)), [(0, runs)], len(payload)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MIB)
        ours.setblocking(False)
        sent = departure.send(ours.fileno(), 100_000)
        assert 0 < sent <= MIB + len(b"head")
        rest = departure.rest()
        memory[:] = 0
        came = theirs.recv(sent, socket.MSG_WAITALL)
    assert departure.bytes_left == sum(len(part) for part in rest)
    assert came + b"".join(rest) == b"head" + payload


def test_the_rest_of_what_has_not_begun_is_all_and_of_what_is_over_nothing() -> None:
    native = library()
    if native is None:
        pytest.skip("no C++ compiler")
    memory = np.arange(PIECE, dtype=np.uint8)
    runs = np.array([[0, PIECE]], np.uint64)
    departure = Departure(native, b"head", Extents(Pool.flat(memoryview(memory)), [(0, runs)], PIECE))
    assert b"".join(departure.rest()) == b"head" + memory.tobytes()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        while departure.bytes_left:
            theirs.recv(departure.send(ours.fileno(), PIECE))
    assert departure.rest() == []
