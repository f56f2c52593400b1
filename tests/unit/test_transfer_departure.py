"""A frame that is hashed while it goes out: head, pieces and trailer in order, however small the socket's bites are."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import xxhash

from kvtransfer.departure import Departure
from kvtransfer.native.library import library
from kvtransfer.plan import HASH_BYTES
from kvtransfer.pool import Extents, Pool

PIECE = 4096


@pytest.mark.parametrize("num_pieces", [1, 63, 64, 65, 95, 96, 97, 300])
@pytest.mark.parametrize("head_bytes", [20, 2 * HASH_BYTES])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_head_bytes_and_trailer_arrive_in_order(num_pieces: int, head_bytes: int, is_sealed: bool) -> None:
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
    digests: list[bytes] = []

    def trailer(digest: bytes) -> bytes:
        digests.append(digest)
        return b"trailer"

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        departure = Departure(native, head, extents, trailer if is_sealed else None)
        sent, came = 0, b""
        while departure.bytes_left:
            try:
                sent += departure.send(ours.fileno())
            except BlockingIOError:
                came += theirs.recv(10_000)
        ours.shutdown(socket.SHUT_WR)
        while part := theirs.recv(1 << 20):
            came += part
    assert came == head + payload + (b"trailer" if is_sealed else b"")
    assert sent == len(came)
    assert digests == ([xxhash.xxh3_128_digest(payload)] if is_sealed else [])


@pytest.mark.parametrize("num_pieces", [1, 32])
def test_the_last_part_and_the_trailer_go_out_in_one_write(num_pieces: int) -> None:
    """Each write to a socket of packets is a packet of its own."""
    native = library()
    if native is None:
        pytest.skip("no C++ compiler")
    payload = np.random.default_rng(num_pieces).integers(0, 256, num_pieces * PIECE, np.uint8)
    starts = np.arange(num_pieces, dtype=np.uint64) * np.uint64(PIECE)
    runs = np.stack([starts, np.full(num_pieces, PIECE, np.uint64)], axis=1)
    extents = Extents(Pool.flat(memoryview(payload)), [(0, runs)], len(payload))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        departure = Departure(native, b"head", extents, lambda digest: b"trailer " + digest)
        departure.send(ours.fileno())
        ours.shutdown(socket.SHUT_WR)
        packets = list(iter(lambda: theirs.recv(1 << 20), b""))
    assert packets == [b"head" + payload.tobytes() + b"trailer " + xxhash.xxh3_128_digest(payload)]
