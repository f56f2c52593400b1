"""One link to another over a real socket, natively: what is being sent may lose its pool at any moment."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvtransfer.api import TransferId
from kvtransfer.connection import stream_frame_bytes
from kvtransfer.frames import Sink
from kvtransfer.link import MEASURED_BYTES, Link, OutgoingFrame
from kvtransfer.messages import NO_DIGEST, Complete, Data, Manifest, Message
from kvtransfer.native.library import library
from kvtransfer.plan import FRAME_BYTES, HASH_BYTES, MAX_FRAME_BYTES
from kvtransfer.pool import Extents, Pool

ID = TransferId(bytes(16))
KEYS = b"a" * 32, b"b" * 32
PIECE = 4096
NUM_PIECES = 3 * HASH_BYTES // PIECE
FRAME = Data(ID, 0, 0, 0, 1, 0, NUM_PIECES, NO_DIGEST, b"")
MANIFEST = Manifest(ID, bytes(100_000))
"""Larger than the socket's buffer."""


class Ends:
    """A sender that has one frame and a receiver that keeps what comes. The socket between them takes small bites."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.memory = rng.integers(0, 256, 2 * NUM_PIECES * PIECE, np.uint8)
        starts = rng.permutation(2 * NUM_PIECES)[:NUM_PIECES].astype(np.uint64) * np.uint64(PIECE)
        runs = np.stack([starts, np.full(NUM_PIECES, PIECE, np.uint64)], axis=1)
        self._extents = Extents(Pool.flat(memoryview(self.memory)), [(0, runs)], NUM_PIECES * PIECE)
        self.payload = b"".join(bytes(view) for view in self._extents.views())
        self.came: list[Message] = []
        self.landed_bytes = 0
        self._landing = bytearray(len(self.payload))
        self._has_pulled = False
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        self.sender = Link(ours, lambda message, num_bytes: None, self.came.append, self._pull, 2**20)
        self.sender.open(*KEYS, 0)
        self.receiver = Link(theirs, self._begin, self.came.append, lambda: None, 2**20)
        self.receiver.open(*KEYS[::-1], len(self.payload))

    def _pull(self) -> OutgoingFrame | None:
        if self._has_pulled:
            return None
        self._has_pulled = True
        return OutgoingFrame(FRAME, self._extents, len(self.payload))

    def _begin(self, message: Message, payload_bytes: int) -> Sink | None:
        assert payload_bytes in (0, len(self.payload))
        return self if payload_bytes else None

    def views(self) -> list[memoryview]:
        """As a Sink."""
        return [memoryview(self._landing)]

    def landed(self, num_bytes: int) -> None:
        """As a Sink."""
        self.landed_bytes += num_bytes

    is_native = False

    def receive(self, fd: int, num_bytes: int) -> int:
        """As a Sink."""
        raise NotImplementedError

    def turn(self) -> bool:
        """Send until the socket is full and receive all of it; is there more?"""
        self.sender.write()
        self.receiver.read()
        return self.sender.wants_write

    def finish(self) -> None:
        """Send and receive the rest."""
        while self.turn():
            pass
        assert self.landed_bytes == len(self.payload)
        assert self._landing == self.payload

    def close(self) -> None:
        """Close both."""
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    if library() is None:
        pytest.skip("no C++ compiler")
    made = Ends()
    yield made
    made.close()


def test_a_message_of_the_meantime_comes_after_the_frame(ends: Ends) -> None:
    assert ends.turn()
    ends.sender.post(MANIFEST)
    ends.finish()
    assert ends.came == [FRAME, MANIFEST]


@pytest.mark.parametrize("is_behind", [False, True], ids=["some is to be sent", "a message behind it is"])
def test_a_frame_that_is_stopped_arrives_as_it_was_and_the_link_goes_on(ends: Ends, is_behind: bool) -> None:
    assert ends.turn()
    ends.sender.post(MANIFEST)
    while is_behind and ends.landed_bytes < len(ends.payload):
        assert ends.turn()
    assert MANIFEST not in ends.came
    assert is_behind or ends.landed_bytes < len(ends.payload)
    assert not ends.sender.stop_io(ID)
    ends.memory[:] = 0
    ends.sender.post(Complete(ID))
    ends.finish()
    assert ends.came == [FRAME, MANIFEST, Complete(ID)]


class Stepping:
    """A clock of which each reading is half a second later."""

    def __init__(self) -> None:
        self._readings = itertools.count()

    def now(self) -> float:
        """See Clock."""
        return next(self._readings) / 2


def test_a_link_tells_how_fast_a_large_frame_went_and_ignores_small_ones() -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    for num_bytes, bytes_per_s in ((MEASURED_BYTES - PIECE, 0.0), (MEASURED_BYTES, 2 * MEASURED_BYTES)):
        memory = np.zeros(num_bytes, np.uint8)
        runs = np.array([[0, num_bytes]], np.uint64)
        frames = [OutgoingFrame(FRAME, Extents(Pool.flat(memoryview(memory)), [(0, runs)], num_bytes), num_bytes)]
        ours, theirs = socket.socketpair()
        link = Link(ours, _nothing, print, lambda frames=frames: frames.pop() if frames else None, 2**20, Stepping())
        link.open(*KEYS, 0)
        link.write()
        while link.wants_write:
            theirs.recv(1 << 20)
            link.write()
        assert bytes_per_s <= link.bytes_per_s < bytes_per_s + 1000  # its head counts
        link.close()
        theirs.close()


def _nothing(message: Message, num_bytes: int) -> None:
    """Begins nothing."""


@pytest.mark.parametrize(
    ("bytes_per_s", "frame_bytes"),
    [(0.0, FRAME_BYTES), (125e6, FRAME_BYTES), (4e9, 40_000_000), (1e12, MAX_FRAME_BYTES)],
)
def test_a_frame_holds_its_link_for_ten_milliseconds_or_has_sixteen_mebibytes(
    bytes_per_s: float, frame_bytes: int
) -> None:
    assert stream_frame_bytes(bytes_per_s) == frame_bytes
