"""A transfer layer without sockets, for tests of worker/: copies between pools when told to, one event at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.api import (
    Completed,
    EndpointStats,
    Failed,
    Granted,
    LinkReport,
    ManifestReceived,
    PeerRank,
    PeerWorker,
    Quiesced,
    Ready,
    Received,
    Refused,
    ReserveRequested,
    SendRequest,
    TransferEvent,
    TransferId,
)
from kvtransfer.digests import LeafDigests, SourceDigests
from kvtransfer.pool import Pool
from tests.support.sim_engine import TpSimRunner, copy_kv


@dataclass
class _Transfer:
    source: DirectEndpoint
    request: SendRequest
    destination: DirectEndpoint
    written: dict[int, int] = field(default_factory=dict)
    granted: tuple[tuple[int, ...], int] | None = None
    is_received: bool = False
    is_over: bool = False


class Network:
    """All endpoints and the messages between them. `deliver` moves one message, chosen by the test."""

    def __init__(self) -> None:
        self.endpoints: dict[str, DirectEndpoint] = {}
        self.transfers: dict[TransferId, _Transfer] = {}
        self.messages: deque[Callable[[], None]] = deque()

    def deliver(self, index: int = 0) -> None:
        """Deliver one pending message; the caller may reorder between, but not within, transfers by choosing 0."""
        message = self.messages[index]
        del self.messages[index]
        message()

    def cut(self, worker_id: str) -> None:
        """The worker's links break: all its transfers fail on both sides."""
        for transfer in self.transfers.values():
            if not transfer.is_over and worker_id in (
                transfer.source.worker_id,
                transfer.destination.worker_id,
            ):
                transfer.is_over = True
                for endpoint in (transfer.source, transfer.destination):
                    endpoint.events.append(Failed(transfer.request.transfer_id, "link lost"))


class DirectEndpoint:
    """Implements kvtransfer.api.TransferEndpoint for a leader without followers.

    Where KV is written by the time it is announced, it checks that its digests are made as it must be for an Endpoint.
    """

    def __init__(self, network: Network, worker_id: str, runner: TpSimRunner) -> None:
        self.network = network
        self.worker_id = worker_id
        self.runner = runner
        self.events: list[TransferEvent] = []
        self._announced: deque[tuple[TransferId, int, int, Ready | None]] = deque()
        digests = LeafDigests(runner.layout, Pool(runner.layout, runner.kv_buffer()))
        self._sources: SourceDigests | None = SourceDigests(runner.layout, digests)
        network.endpoints[worker_id] = self

    @property
    def address(self) -> PeerRank:
        return PeerRank(0, self.worker_id, 0)

    def open_send(self, request: SendRequest) -> None:
        destination = self.network.endpoints[request.peer.worker_id]
        self.network.transfers[request.transfer_id] = _Transfer(self, request, destination)
        event = ReserveRequested(request.transfer_id, self.worker_id, request.num_tokens, request.reserve_payload)
        if self._sources is not None:
            self._sources.open(request)
        self._send(request.transfer_id, lambda: destination.events.append(event))

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int, ready: Ready | None = None) -> None:
        if ready is not None:  # a device keeps no digests
            self._sources = None
        if self._sources is not None:
            self._sources.written(transfer_id, layer, num_tokens)
            assert self._sources.is_intact(transfer_id), "announced with digests of other bytes"
        self._announced.append((transfer_id, layer, num_tokens, ready))
        self._copy_what_is_ready()

    def will_write(self, block_table: Sequence[int], first_token: int, end_token: int) -> None:
        if self._sources is not None:
            self._sources.will_write(block_table, first_token, end_token)

    def _copy_what_is_ready(self) -> None:
        while self._announced and (self._announced[0][3] is None or self._announced[0][3].query()):
            transfer_id, layer, num_tokens, _ = self._announced.popleft()
            written = self.network.transfers[transfer_id].written
            for number in range(len(self.runner.layout.model.layers)) if layer is None else (layer,):
                written[number] = num_tokens
            self._copy_if_possible(transfer_id)

    def finish(self, transfer_id: TransferId, manifest: bytes) -> None:
        destination = self.network.transfers[transfer_id].destination
        self._send(transfer_id, lambda: destination.events.append(ManifestReceived(transfer_id, manifest)))

    def close_send(self, transfer_id: TransferId) -> None:
        if self._sources is not None:
            self._sources.close(transfer_id)

    def grant(self, transfer_id: TransferId, block_table: Sequence[int], num_tokens: int, first_token: int) -> None:
        transfer = self.network.transfers[transfer_id]
        transfer.granted = (tuple(block_table), first_token)
        self.will_write(block_table, first_token, num_tokens)
        self._send(transfer_id, lambda: transfer.source.events.append(Granted(transfer_id, first_token)))
        self._copy_if_possible(transfer_id)

    def refuse(self, transfer_id: TransferId, code: str, message: str) -> None:
        transfer = self.network.transfers[transfer_id]
        self._send(transfer_id, lambda: transfer.source.events.append(Refused(transfer_id, code, message)))

    def complete(self, transfer_id: TransferId) -> None:
        transfer = self.network.transfers[transfer_id]
        transfer.is_over = True
        self.network.messages.append(lambda: transfer.source.events.append(Completed(transfer_id)))

    def close_receive(self, transfer_id: TransferId) -> None:
        pass

    def abort(self, transfer_id: TransferId, reason: str) -> None:
        self.events.append(Quiesced(transfer_id))
        transfer = self.network.transfers.get(transfer_id)
        if transfer is None or transfer.is_over:
            return
        transfer.is_over = True
        peer = transfer.destination if self is transfer.source else transfer.source
        self.network.messages.append(lambda: peer.events.append(Failed(transfer_id, reason)))

    def poll(self) -> list[TransferEvent]:
        self._copy_what_is_ready()
        events, self.events = self.events, []
        for event in events:
            if self._sources is not None and isinstance(event, Completed | Refused | Failed | Quiesced):
                assert self._sources.is_intact(event.transfer_id), "offered KV has changed before the transfer was over"
                self._sources.close(event.transfer_id)
        return events

    def set_wakeup(self, wake: Callable[[], None]) -> None:
        pass

    def connect(self, peer: PeerWorker) -> None:
        pass

    def set_on_link(self, on_link: Callable[[LinkReport], None]) -> None:
        pass

    def stats(self) -> EndpointStats:
        open_sends = sum(t.source is self and not t.is_over for t in self.network.transfers.values())
        open_receives = sum(t.destination is self and not t.is_over for t in self.network.transfers.values())
        return EndpointStats(open_sends, open_receives, 0, 0, 0, 0, 0, 0, {})

    def close(self) -> None:
        pass

    def _send(self, transfer_id: TransferId, action: Callable[[], None]) -> None:
        transfer = self.network.transfers[transfer_id]
        self.network.messages.append(lambda: None if transfer.is_over else action())

    def _copy_if_possible(self, transfer_id: TransferId) -> None:
        transfer = self.network.transfers[transfer_id]
        num_layers = len(self.runner.layout.model.layers)
        num_tokens = transfer.request.num_tokens
        whole = [transfer.written.get(layer, 0) >= num_tokens for layer in range(num_layers)]
        if transfer.is_over or transfer.is_received or transfer.granted is None or not all(whole):
            return
        transfer.is_received = True
        table, first = transfer.granted

        def arrive() -> None:
            sources = transfer.source._sources
            assert sources is None or sources.is_intact(transfer_id), "offered KV has changed"
            copy_kv(
                transfer.source.runner,
                transfer.request.block_table,
                transfer.destination.runner,
                table,
                range(first, num_tokens),
            )
            transfer.destination.events.append(Received(transfer_id, (num_tokens - first) * 64, 0.0, 0.0))

        self._send(transfer_id, arrive)
