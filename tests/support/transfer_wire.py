"""Two workers' transfer state machines joined by simulated links: no sockets, no threads, seeded order of everything.

Each link is two FIFO queues, as a connection is; order between links, moments of commands, of cuts and of time are
drawn from one random generator. Pools are real bytes moved by the real copy plan, so what arrives can be compared.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.kv_layout import KVGeometry, KVLayout, ModelKV
from kvtransfer.api import (
    Failed,
    PeerRank,
    PeerWorker,
    Quiesced,
    SendRequest,
    TransferEvent,
    TransferId,
)
from kvtransfer.auth import LinkKey
from kvtransfer.digests import FrameDigest, LeafDigests, seal
from kvtransfer.messages import Data, Message, TransferMessage
from kvtransfer.plan import FRAME_BYTES, plan_copies
from kvtransfer.pool import Extents, Pool, copy
from kvtransfer.protocol import CloseLink, Connect, DataReady, Emit, Locate, Send, StopIO
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide

LEASE_S = 10.0
CONTEXT = bytes(16)


@dataclass
class Flying:
    """A message on a link, with the bytes of a data frame."""

    message: TransferMessage
    payload: bytes = b""


@dataclass
class WireLink:
    """One connection between a source rank and a destination rank."""

    source_rank: int
    destination_rank: int
    to_receiver: deque[Flying] = field(default_factory=deque)
    to_sender: deque[Flying] = field(default_factory=deque)
    is_up: bool = False


@dataclass
class WireRank:
    """One rank of either worker: its side, its bytes and what its engine was told."""

    key: LinkKey
    layout: KVLayout
    side: SendSide | ReceiveSide
    buffer: bytearray
    digests: LeafDigests
    events: list[TransferEvent] = field(default_factory=list)
    writable: set[TransferId] = field(default_factory=set)
    """Receiver: transfers whose blocks may be written: granted, and neither Failed nor Quiesced."""


class Wire:
    """A prefill worker "p" and a decode worker "d". `is_fetched` simulates shared memory: bytes are read late."""

    def __init__(
        self,
        model: ModelKV,
        source: KVGeometry,
        destination: KVGeometry,
        rng: random.Random,
        *,
        window_bytes: int = 1,
        is_fetched: bool = False,
        corrupt: Callable[[Data, bytearray], None] | None = None,
    ) -> None:
        self.rng = rng
        self.now = 0.0
        self.is_fetched = is_fetched
        self._corrupt = corrupt
        self.sources = [
            self._rank("p", model, source, rank, SendSide(model, source.tp_size, rank, LEASE_S))
            for rank in range(source.tp_size)
        ]
        self.destinations = [
            self._rank(
                "d", model, destination, rank, ReceiveSide(model, destination.tp_size, rank, window_bytes, LEASE_S)
            )
            for rank in range(destination.tp_size)
        ]
        self.links: dict[tuple[int, int], WireLink] = {}
        self.peer = PeerWorker("d", "1", tuple(PeerRank(rank, "x", 1) for rank in range(destination.tp_size)))

    def _rank(
        self, name: str, model: ModelKV, geometry: KVGeometry, tp_rank: int, side: SendSide | ReceiveSide
    ) -> WireRank:
        layout = KVLayout(model, geometry, tp_rank)
        buffer = bytearray(layout.pool_bytes)
        digests = LeafDigests(layout, Pool(layout, memoryview(buffer)))
        return WireRank(LinkKey(name, "1", tp_rank), layout, side, buffer, digests)

    # Links.

    def _open_link(self, source_rank: int, destination_rank: int) -> None:
        source, destination = self.sources[source_rank], self.destinations[destination_rank]
        plan = plan_copies(source.layout, destination.layout)
        self.links[source_rank, destination_rank] = WireLink(source_rank, destination_rank, is_up=True)
        destination.side.link_up(self.now, source.key, plan)
        source.side.link_up(self.now, destination.key, plan)

    def cut(self, link: WireLink) -> None:
        """Both ends see the connection close; what was under way is lost."""
        if not link.is_up:
            return
        link.is_up = False
        del self.links[link.source_rank, link.destination_rank]
        source, destination = self.sources[link.source_rank], self.destinations[link.destination_rank]
        source.side.link_down(self.now, destination.key, f"lost {destination.key}")
        destination.side.link_down(self.now, source.key, f"lost {source.key}")
        self.act()

    def act(self) -> None:
        """Do what the machines ask for, until they are silent."""
        busy = True
        while busy:
            busy = False
            for rank in [*self.sources, *self.destinations]:
                for action in rank.side.drain():
                    busy = True
                    self._do(rank, action)

    def _do(self, rank: WireRank, action: object) -> None:
        is_source = rank.key.worker_id == "p"
        match action:
            case Connect(key, _):
                self._open_link(rank.key.tp_rank, key.tp_rank)
            case Send(key, message):
                link = self._link(rank, key)
                if link is not None:
                    (link.to_receiver if is_source else link.to_sender).append(Flying(message))
            case Emit(event):
                rank.events.append(event)
                if isinstance(event, Failed | Quiesced):
                    rank.writable.discard(event.transfer_id)
            case StopIO(transfer_id):
                rank.side.io_stopped(self.now, transfer_id)
            case CloseLink(key, _):
                link = self._link(rank, key)
                if link is not None:
                    self.cut(link)
            case DataReady() | Locate():
                pass

    def _link(self, rank: WireRank, key: LinkKey) -> WireLink | None:
        if key[:2] not in (("p", "1"), ("d", "1")):
            return None
        pair = (rank.key.tp_rank, key.tp_rank) if rank.key.worker_id == "p" else (key.tp_rank, rank.key.tp_rank)
        return self.links.get(pair)

    # One step of the network.

    def possible_steps(self) -> list[Callable[[], None]]:
        """Everything that the network could do next."""
        steps: list[Callable[[], None]] = []
        for link in list(self.links.values()):
            if link.to_receiver:
                steps.append(lambda link=link: self._to_receiver(link))
            if link.to_sender:
                steps.append(lambda link=link: self._to_sender(link))
            source = self.sources[link.source_rank].side
            assert isinstance(source, SendSide)
            if source.has_data(self.destinations[link.destination_rank].key) and len(link.to_receiver) < 8:
                steps.append(lambda link=link: self._pull(link))
        return steps

    def step(self) -> bool:
        """One random step; False if there is none."""
        steps = self.possible_steps()
        if steps:
            self.rng.choice(steps)()
            self.act()
        return bool(steps)

    def drain(self) -> None:
        """Steps until the network is idle."""
        while self.step():
            pass

    def advance(self, seconds: float) -> None:
        """Let time pass, with ticks."""
        self.now += seconds
        for rank in [*self.sources, *self.destinations]:
            rank.side.tick(self.now)
        self.act()

    def _pull(self, link: WireLink) -> None:
        source, destination = self.sources[link.source_rank], self.destinations[link.destination_rank]
        assert isinstance(source.side, SendSide)
        outgoing = source.side.next_data(destination.key, FRAME_BYTES, name_blocks=self.is_fetched)
        if outgoing is None:
            return
        extents = Extents(source.digests.pool, outgoing.parts, outgoing.num_bytes)
        payload = b"" if self.is_fetched else b"".join(extents.views())
        frame = outgoing.frame._replace(digest=_digest(outgoing.frame, source, extents))
        link.to_receiver.append(Flying(frame, payload))

    def _to_sender(self, link: WireLink) -> None:
        source, destination = self.sources[link.source_rank], self.destinations[link.destination_rank]
        source.side.heard(self.now, destination.key)
        source.side.on_message(self.now, destination.key, link.to_sender.popleft().message)

    def _to_receiver(self, link: WireLink) -> None:
        source, destination = self.sources[link.source_rank], self.destinations[link.destination_rank]
        flying = link.to_receiver.popleft()
        destination.side.heard(self.now, source.key)
        if isinstance(flying.message, Data):
            self._receive_data(source, destination, flying.message, flying.payload)
        else:
            destination.side.on_message(self.now, source.key, flying.message)
        if not link.to_receiver:
            assert isinstance(destination.side, ReceiveSide)
            destination.side.settle(self.now)

    def _receive_data(self, source: WireRank, destination: WireRank, frame: Data, payload: bytes) -> None:
        side = destination.side
        assert isinstance(side, ReceiveSide)
        landing = side.begin_data(self.now, source.key, frame, None if self.is_fetched else len(payload))
        if landing is None:
            return
        assert frame.transfer_id in destination.writable, "bytes would land outside of a grant"
        extents = Extents(destination.digests.pool, landing.parts, landing.num_bytes)
        if landing.source_parts is None:
            data = bytearray(payload)
            if self._corrupt is not None:
                self._corrupt(frame, data)
            start = 0
            for view in extents.views():
                view[:] = data[start : start + len(view)]
                start += len(view)
        else:
            copy(extents, Extents(source.digests.pool, landing.source_parts, landing.num_bytes))
        verified = _digest(frame, destination, extents) == frame.digest
        side.data_landed(self.now, source.key, frame, landing.num_bytes, verified=verified, is_fetched=self.is_fetched)

    # Engines.

    def open_send(self, transfer_id: TransferId, num_tokens: int, block_table: tuple[int, ...]) -> None:
        """On every source rank."""
        for rank in self.sources:
            assert isinstance(rank.side, SendSide)
            rank.side.open(self.now, SendRequest(transfer_id, self.peer, num_tokens, block_table))
        self.act()

    def written(self, transfer_id: TransferId, layer: int, num_tokens: int) -> None:
        """On every source rank."""
        for rank in self.sources:
            assert isinstance(rank.side, SendSide)
            rank.side.written(transfer_id, layer, num_tokens)
        self.act()

    def grant_rank(
        self, tp_rank: int, transfer_id: TransferId, block_table: tuple[int, ...], num_tokens: int, first_token: int
    ) -> None:
        """On one destination rank."""
        rank = self.destinations[tp_rank]
        assert isinstance(rank.side, ReceiveSide)
        rank.writable.add(transfer_id)
        rank.side.grant(self.now, transfer_id, block_table, num_tokens, first_token)
        self.act()

    def abort(self, rank: WireRank, transfer_id: TransferId) -> None:
        """By one rank's engine."""
        rank.side.abort(self.now, transfer_id, "aborted in the test")
        self.act()

    def deliver(self, rank: WireRank, peer: WireRank, message: Message) -> None:
        """Hand a message to a rank as if `peer` had sent it."""
        rank.side.on_message(self.now, peer.key, message)
        self.act()


def kinds(rank: WireRank, transfer_id: TransferId) -> list[str]:
    """Names of the events that a rank's engine got about a transfer."""
    return [type(event).__name__ for event in rank.events if event.transfer_id == transfer_id]


def _digest(frame: Data, rank: WireRank, extents: Extents) -> bytes:
    """Of a frame's bytes as they are now."""
    digest = FrameDigest(rank.digests, extents)
    digest.make()
    return seal(CONTEXT, frame, digest.result())
