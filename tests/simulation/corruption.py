"""Wrong bytes on purpose, of seven kinds, below the digest and above it, and the book of what became of each.

Below: in the source pool once its digests are made, on the wire (a tap that knows frames), and between landing and
verification: the digest or the frame's tag must refuse them. Above: in the source pool before the digest is made, which
only the tell-tale can catch.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgpack

from kvtransfer.frames import HEAD_BYTES
from kvtransfer.messages import Data, code_of
from tests.simulation import history
from tests.simulation.network import Pipe

BIT_FLIP: Final = "bit flip"
SWAPPED: Final = "swapped chunks"
STALE: Final = "stale generation"
TRUNCATED: Final = "truncation"
DUPLICATED: Final = "duplication"
MISPLACED: Final = "wrong layer or rank"
FOREIGN: Final = "foreign tenant"
KINDS: Final = (BIT_FLIP, SWAPPED, STALE, TRUNCATED, DUPLICATED, MISPLACED, FOREIGN)

BELOW: Final = "below"
ABOVE: Final = "above"

FrameName = tuple[bytes, int, int, int, int]
"""Transfer, source rank, destination rank, first layer, first unit."""

_DATA_CODE: Final = 21
_GOODBYE_CODE: Final = 5


@dataclass(eq=False, slots=True)
class Injection:
    """One corruption; `outcome` is "" until it is known."""

    level: str
    kind: str
    outcome: str = ""


@dataclass(slots=True)
class _OnWire:
    """A frame whose head, body or order was changed."""

    injection: Injection
    pipe: Pipe
    num_following: int = 0
    certain_at: int | None = None
    """Once the reader has read so many bytes of the stream, it must have noticed."""


@dataclass
class InjectionBook:
    """All injections of one run. What is still open at the end was never read by anybody: moot."""

    rng: random.Random
    tell: Callable[[history.Event], None]
    now: Callable[[], float]
    wire_rate: float = 0.0
    landing_rate: float = 0.0
    source_rate: float = 0.0
    """Of the moments right before digests are made, and of those right before a frame is."""
    is_on: bool = True
    recent: deque[tuple[Data, bytes]] = field(default_factory=lambda: deque(maxlen=40))
    """Data frames of the past, as they passed on any wire."""
    recent_frames: deque[bytes] = field(default_factory=lambda: deque(maxlen=40))
    _payloads: dict[FrameName, Injection] = field(default_factory=dict)
    _sealed: dict[FrameName, bytes] = field(default_factory=dict)
    """Hash of the bytes that the newest digest of a frame on a stream was made over."""
    _on_wire: list[_OnWire] = field(default_factory=list)
    _taints: dict[tuple[str, int], dict[int, list[Injection]]] = field(default_factory=lambda: defaultdict(dict))
    _sources: list[Injection] = field(default_factory=list)

    def close(self, injection: Injection, outcome: str) -> None:
        """It is known what became of it."""
        if not injection.outcome:
            injection.outcome = outcome
            self.tell(history.Injected(self.now(), injection.level, injection.kind, outcome))

    # Payloads.

    def payload(self, name: FrameName, kind: str) -> None:
        """The payload of a frame is not what was sent."""
        earlier = self._payloads.get(name)
        if earlier is None:
            self._payloads[name] = Injection(BELOW, kind)

    def sealed(self, name: FrameName, payload: bytes | bytearray) -> None:
        """A digest was made over these bytes, be they right or not."""
        self._sealed[name] = hashlib.sha256(payload).digest()

    def arrived(self, name: FrameName, payload: bytes, *, verified: bool, is_right: bool) -> bool:
        """A receiver has judged a frame; was it spoilt?

        Two injections may have undone each other: then the bytes are right, or, where the source was wrong before the
        digest, those that the digest was made over.
        """
        injection = self._payloads.pop(name, None)
        if injection is not None:
            is_undone = is_right or self._sealed.get(name) == hashlib.sha256(payload).digest()
            self.close(injection, "detected" if not verified else "moot" if is_undone else "missed")
        return injection is not None

    # Frames.

    def frame(self, kind: str, pipe: Pipe) -> _OnWire:
        """Head, body or order of a frame was changed on this pipe."""
        item = _OnWire(Injection(BELOW, kind), pipe)
        self._on_wire.append(item)
        return item

    def link_lost(self, pipe: Pipe, reason: str) -> None:
        """The reader of this pipe has closed its connection."""
        is_noticed = any(
            word in reason
            for word in (
                "protocol",
                "secret",
                "address",
                "layout",
                "version",
                "handshake",
                "integrity",
                "lease",
                "transport",
            )
        )
        for item in [item for item in self._on_wire if item.pipe is pipe]:
            self._on_wire.remove(item)
            self.close(item.injection, "detected" if is_noticed else "moot")

    # Sources.

    def spoil(self, worker: str, rank: int, block: int, level: str, kind: str) -> None:
        """Bytes of a block changed in its pool, before their digest was made (ABOVE) or mostly after it."""
        injection = Injection(level, kind)
        self._sources.append(injection)
        self._taints[worker, rank].setdefault(block, []).append(injection)

    def is_tainted(self, worker: str) -> bool:
        """Was anything wrong ever put into this worker's pools?"""
        return any(name == worker and blocks for (name, _), blocks in self._taints.items())

    def spread(self, source: str, blocks: set[int], worker: str, rank: int, table: set[int]) -> None:
        """Wrong bytes went from one pool to another with a right digest."""
        for (name, _), tainted in list(self._taints.items()):
            if name == source:
                for block in blocks & tainted.keys():
                    for target in table:
                        self._taints[worker, rank].setdefault(target, []).extend(tainted[block])

    def caught(self, worker: str, rank: int, block: int) -> None:
        """A tell-tale refused to choose a token, or a peer refused a frame."""
        for injection in self._taints.get((worker, rank), {}).get(block, ()):
            self.close(injection, "detected")

    def settle(self, is_inside_frame: Callable[[Pipe], bool]) -> None:
        """The run is over. A reader that is inside a frame may be swallowing what follows, and has accepted nothing."""
        for item in self._on_wire:
            has_read = item.certain_at is not None and item.pipe.num_read >= item.certain_at
            is_open = not item.pipe.is_refused and not is_inside_frame(item.pipe)
            self.close(item.injection, "missed" if has_read and is_open else "moot")
        for injection in [*self._payloads.values(), *self._sources]:
            self.close(injection, "moot")


class FrameTap:
    """Sees whole frames of one direction of a connection and spoils some."""

    def __init__(self, book: InjectionBook, pipe: Pipe) -> None:
        self._book = book
        self._pipe = pipe
        self._pending = bytearray()
        self._held: bytes | None = None
        self._num_out = 0
        self._watched: list[_OnWire] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Whole frames, once they are whole."""
        self._pending += data
        out: list[bytes] = []
        while (frame := self._take_frame()) is not None:
            out += self._pass(frame)
        self._num_out += sum(map(len, out))
        for item in self._watched:
            item.num_following += 1
            if item.num_following == 4:
                item.certain_at = self._num_out
        self._watched = [item for item in self._watched if item.certain_at is None]
        return out

    def _take_frame(self) -> bytes | None:
        if len(self._pending) < HEAD_BYTES:
            return None
        body_bytes = int.from_bytes(self._pending[4:8], "little")
        payload_bytes = int.from_bytes(self._pending[8:12], "little")
        total = HEAD_BYTES + body_bytes + payload_bytes
        if len(self._pending) < total:
            return None
        frame = bytes(self._pending[:total])
        del self._pending[:total]
        return frame

    def _pass(self, frame: bytes) -> list[bytes]:
        book = self._book
        out = [frame]
        if self._held is not None:
            out, self._held = [frame, self._held], None
        elif book.is_on and frame[3] != _GOODBYE_CODE and book.rng.random() < book.wire_rate:
            out = self._spoil(frame)
        book.recent_frames.append(frame)
        return out

    def _spoil(self, frame: bytes) -> list[bytes]:
        book, rng = self._book, self._book.rng
        kind = rng.choice(KINDS)
        body_end = HEAD_BYTES + int.from_bytes(frame[4:8], "little")
        data, payload = _decode(frame, body_end), frame[body_end:]
        if data is not None and payload:
            book.recent.append((data, payload))
            changed = self._spoil_payload(kind, data, payload)
            if changed is not None and changed != payload:
                book.payload((*data[:4], data.first_unit), kind)  # type: ignore[arg-type]
                return [frame[:body_end] + changed]
        out = self._spoil_frame(kind, frame, body_end, data)
        if out != [frame]:
            self._watched.append(book.frame(kind, self._pipe))
        return out

    def _spoil_payload(self, kind: str, data: Data, payload: bytes) -> bytes | None:
        """Same length, other bytes; None: this kind does not apply here."""
        rng = self._book.rng
        if kind == BIT_FLIP:
            return _flip(payload, rng)
        if kind == SWAPPED and rng.random() < 0.5:
            middle = len(payload) // 2
            return payload[middle:] + payload[:middle]
        if kind == TRUNCATED and rng.random() < 0.5:
            keep = rng.randrange(len(payload))
            return payload[:keep] + bytes(len(payload) - keep)
        if kind == DUPLICATED and rng.random() < 0.5:
            half = len(payload) // 2
            return payload[:half] + payload[: len(payload) - half]
        others = [
            other
            for frame, other in self._book.recent
            if len(other) == len(payload) and (frame.transfer_id != data.transfer_id or kind == MISPLACED)
        ]
        if kind in (STALE, FOREIGN, MISPLACED) and others:
            return rng.choice(others)
        return None

    def _spoil_frame(self, kind: str, frame: bytes, body_end: int, data: Data | None) -> list[bytes]:
        rng = self._book.rng
        if kind == DUPLICATED:
            return [frame, frame]
        if kind == TRUNCATED:
            return [frame[: rng.randrange(len(frame))]]
        if kind == SWAPPED:
            self._held = frame
            return []
        if kind in (STALE, FOREIGN) and self._book.recent_frames:
            return [rng.choice(self._book.recent_frames), frame]
        if kind == MISPLACED and data is not None:
            fields = list(data)
            fields[rng.choice((1, 2, 3, 5))] += 1
            body = msgpack.packb(fields)
            if len(body) == body_end - HEAD_BYTES:
                return [frame[:HEAD_BYTES] + body + frame[body_end:]]
        return [_flip(frame[:body_end], rng) + frame[body_end:]]


class LandingFaults:
    """kvtransfer.faults.FaultHook: spoils payloads after the digest is made, and pieces before they are verified."""

    def __init__(self, book: InjectionBook) -> None:
        self._book = book

    def before_send(self, frame: Data, payload: list[memoryview]) -> list[memoryview]:
        """Sometimes other bytes of the same length."""
        if frame.source_blocks or not payload:  # on shared memory the receiver fetches the bytes
            return payload
        data = bytearray(b"".join(payload))
        self._book.sealed(name_of(frame), data)
        if not self._hits():
            return payload
        kind = spoil_bytes(memoryview(data), self._book.rng)
        if kind is None:
            return payload
        self._book.payload(name_of(frame), kind)
        return [memoryview(data)]

    def after_landing(self, frame: Data, piece: memoryview) -> None:
        """Sometimes other bytes in place."""
        if self._hits():
            kind = spoil_bytes(piece, self._book.rng)
            if kind is not None:
                self._book.payload(name_of(frame), kind)

    def _hits(self) -> bool:
        return self._book.is_on and self._book.rng.random() < self._book.landing_rate


def name_of(frame: Data) -> FrameName:
    """Which bytes of which transfer it carries."""
    return frame.transfer_id, frame.source_rank, frame.destination_rank, frame.first_layer, frame.first_unit


def spoil_bytes(view: memoryview, rng: random.Random, others: memoryview | None = None) -> str | None:
    """Change bytes in place, in one of the seven ways; the kind, or None if nothing changed.

    `others`: bytes of the same length that belong somewhere else (another layer, sequence, tenant or an earlier time).
    """
    kind = rng.choice(KINDS)
    before = bytes(view)
    half = len(before) // 2
    match kind:
        case "bit flip":
            after = _flip(before, rng)
        case "swapped chunks":
            after = before[half:] + before[:half]
        case "truncation":
            keep = rng.randrange(len(before))
            after = before[:keep] + bytes(len(before) - keep)
        case "duplication":
            after = before[:half] + before[: len(before) - half]
        case _:
            after = rng.randbytes(len(before)) if others is None else bytes(others)
    view[:] = after
    return None if after == before else kind


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _decode(frame: bytes, body_end: int) -> Data | None:
    if frame[3] != _DATA_CODE:
        return None
    return Data(*msgpack.unpackb(frame[HEAD_BYTES:body_end], use_list=False))


assert code_of(Data(b"", 0, 0, 0, 0, 0, 0, b"", b"")) == _DATA_CODE  # type: ignore[arg-type]
