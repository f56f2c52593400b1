"""The sending side of all transfers of one rank, as a pure state machine (see kvtransfer.protocol)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.errors import LayoutMismatch
from baton.kv_layout import UNIT_TOKENS, ModelKV
from kvtransfer.api import (
    Completed,
    Failed,
    Granted,
    PeerRank,
    PeerWorker,
    Quiesced,
    Refused,
    SendRequest,
    TransferEvent,
    TransferId,
)
from kvtransfer.auth import LinkKey
from kvtransfer.lanes import Outgoing, SendLane
from kvtransfer.liveness import LeaseTable
from kvtransfer.messages import (
    MAX_NAMED_TRANSFERS,
    Abort,
    AbortCode,
    Accept,
    Announce,
    Complete,
    Credit,
    Grant,
    Manifest,
    Message,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
    Reserve,
    TransferMessage,
)
from kvtransfer.plan import CopyPlan, destination_ranks
from kvtransfer.protocol import SEND_NEXT, Action, CloseLink, Connect, DataReady, Emit, Locate, Send, SendState, StopIO


@dataclass(slots=True)
class _Transfer:
    request: SendRequest
    lanes: dict[LinkKey, SendLane]
    written: list[int]
    accept_by_s: float
    state: SendState = SendState.OPENED
    manifest: bytes | None = None
    is_granted: bool = False
    last_events: list[TransferEvent] = field(default_factory=list)
    """Told to the engine once I/O has stopped."""

    def sendable(self, layer: int) -> int:
        """Tokens of the layer that may go out: whole units, and the last partial unit once all is written."""
        written = self.written[layer]
        return written if written == self.request.num_tokens else written - written % UNIT_TOKENS


@dataclass(slots=True)
class _Link:
    plan: CopyPlan | None = None
    """None: not up yet."""
    lanes: dict[TransferId, SendLane] = field(default_factory=dict)
    queue: deque[TransferId] = field(default_factory=deque)


class SendSide:
    """All transfers that this rank sends. Methods are called by one thread; actions are taken with `drain`.

    Every transfer ends through STOPPING, and tells the engine Completed, Refused, Failed or Quiesced only when no byte
    of it is read any more.
    """

    def __init__(self, model: ModelKV, tp_size: int, tp_rank: int, lease_s: float) -> None:
        self._model = model
        self._tp_size = tp_size
        self._tp_rank = tp_rank
        self._lease_s = lease_s
        self._leases = LeaseTable(lease_s)
        self._transfers: dict[TransferId, _Transfer] = {}
        self._links: dict[LinkKey, _Link] = {}
        self._actions: list[Action] = []
        self.num_stale = 0

    @property
    def num_open(self) -> int:
        """Transfers that are not forgotten."""
        return len(self._transfers)

    def has(self, transfer_id: TransferId) -> bool:
        """Is the transfer known here?"""
        return transfer_id in self._transfers

    @property
    def is_leader(self) -> bool:
        """Does this rank talk to the receiving leader?"""
        return self._tp_rank == 0

    def drain(self) -> list[Action]:
        """Actions since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    def connect(self, peer: PeerWorker) -> None:
        """Make the links that transfers to the peer will need.

        Raises:
            LayoutMismatch: there is no way to send to a worker of that many ranks.
        """
        wanted = destination_ranks(self._model, self._tp_size, self._tp_rank, len(peer.ranks))
        for rank in peer.ranks:
            if rank.tp_rank in wanted:
                self._link(LinkKey(peer.worker_id, peer.incarnation, rank.tp_rank), rank)

    def _link(self, key: LinkKey, peer: PeerRank) -> _Link:
        """The link to a rank, which is on its way if there was none."""
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link()
            self._actions.append(Connect(key, peer))
        return link

    # Commands of the engine.

    def open(self, now: float, request: SendRequest) -> None:
        """Begin a transfer: connect and announce on every link that the plan names; the leader also reserves."""
        if request.transfer_id in self._transfers:
            return
        peer = request.peer
        transfer = _Transfer(request, {}, [0] * len(self._model.layers), now + 2 * self._lease_s)
        self._transfers[request.transfer_id] = transfer
        try:
            ranks = destination_ranks(self._model, self._tp_size, self._tp_rank, len(peer.ranks))
        except LayoutMismatch as error:
            self._fail(transfer, now, f"layout: {error.message}", AbortCode.PROTOCOL)
            return
        by_rank = {rank.tp_rank: rank for rank in peer.ranks}
        for tp_rank in ranks:
            if tp_rank not in by_rank:
                self._fail(
                    transfer, now, f"address: rank {tp_rank} of {peer.worker_id} is not named", AbortCode.ABORTED
                )
                return
            key = LinkKey(peer.worker_id, peer.incarnation, tp_rank)
            lane = transfer.lanes[key] = SendLane(len(transfer.written), request.block_table, request.num_tokens)
            link = self._link(key, by_rank[tp_rank])
            if len(link.lanes) >= MAX_NAMED_TRANSFERS:
                self._fail(transfer, now, f"overloaded: too many transfers to {key}", AbortCode.OVERLOADED)
                return
            link.lanes[request.transfer_id] = lane
            self._leases.watch(key, request.transfer_id, now)
            if link.plan is not None:
                self._begin_lane(transfer, key, lane, link.plan)

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int) -> None:
        """KV of `layer` (None: of every layer) for tokens [0, num_tokens) is in the pool."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is SendState.STOPPING:
            return
        layers = range(len(transfer.written)) if layer is None else (layer,)
        for number in layers:
            transfer.written[number] = max(transfer.written[number], min(num_tokens, transfer.request.num_tokens))
        for key, lane in transfer.lanes.items():
            self._mark_ready(transfer, key, lane, layers)

    def finish(self, transfer_id: TransferId, manifest: bytes) -> None:
        """Leader: hand the manifest over, once room is granted."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is SendState.STOPPING or transfer.manifest is not None:
            return
        transfer.manifest = manifest
        if transfer.is_granted:
            self._send(self._leader_key(transfer), Manifest(transfer_id, manifest))

    def close(self, now: float, transfer_id: TransferId) -> None:
        """The leader knows that the transfer is complete: forget it."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._end(transfer, now)

    def abort(self, now: float, transfer_id: TransferId, reason: str) -> None:
        """End the transfer in any state; `Quiesced` follows, at once for an unknown one."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._actions.append(Emit(Quiesced(transfer_id)))
        elif transfer.state is SendState.STOPPING:
            transfer.last_events.append(Quiesced(transfer_id))
        else:
            self._tell_abort(transfer, AbortCode.ABORTED, reason)
            self._end(transfer, now, Quiesced(transfer_id))

    def abort_all(self, now: float, reason: str) -> None:
        """The endpoint closes: every transfer fails."""
        for transfer in list(self._transfers.values()):
            self._fail(transfer, now, reason, AbortCode.LOST)

    # What links do.

    def link_up(self, now: float, key: LinkKey, plan: CopyPlan) -> None:
        """The link is authenticated."""
        link = self._links.setdefault(key, _Link())
        link.plan = plan
        self._leases.link_up(key, now)
        for transfer_id, lane in list(link.lanes.items()):
            self._begin_lane(self._transfers[transfer_id], key, lane, plan)

    def link_down(self, now: float, key: LinkKey, reason: str) -> None:
        """The link is closed or never came up: what was open on it fails."""
        link = self._links.pop(key, None)
        self._leases.link_down(key)
        for transfer_id in list(link.lanes) if link else ():
            transfer = self._transfers[transfer_id]
            self._fail(transfer, now, reason, AbortCode.LOST, except_key=key)

    def heard(self, now: float, key: LinkKey) -> None:
        """Bytes came on the link."""
        self._leases.heard(key, now)

    def on_message(self, now: float, key: LinkKey, message: Message) -> None:
        """A message of the receiving rank at the other end of the link.

        Raises:
            ProtocolError: a message that a receiver never sends.
        """
        match message:
            case Ping(transfer_ids):
                self._leases.heard(key, now, transfer_ids)
                self._send(key, Pong(self._leases.watched(key)))
                return
            case Pong(transfer_ids):
                self._leases.heard(key, now, transfer_ids)
                return
            case Grant() | Refuse() | Accept() | Credit() | Complete() | Abort():
                pass
            case _:
                raise ProtocolError(f"a receiver does not send {type(message).__name__}")
        transfer = self._transfers.get(message.transfer_id)
        lane = None if transfer is None else transfer.lanes.get(key)
        if transfer is None or lane is None or transfer.state is SendState.STOPPING:
            self.num_stale += 1
            return
        self._leases.heard(key, now, (message.transfer_id,))
        match message:
            case Accept():
                self._accepted(transfer, now, key, lane, message)
            case Credit(_, total_bytes):
                if lane.credit(total_bytes):
                    self._enqueue(transfer, key, lane)
                else:
                    self._fail(transfer, now, "protocol: credit for bytes that were not sent", AbortCode.PROTOCOL)
            case Abort(_, code, reason):
                integrity = code == AbortCode.INTEGRITY
                self._fail(transfer, now, f"peer: {reason}", AbortCode.ABORTED, integrity=integrity, except_key=key)
            case Grant(_, first_token):
                self._granted(transfer, now, key, first_token)
            case Refuse(_, code, text) if self._between_leaders(key) and not transfer.is_granted:
                self._tell_abort(transfer, AbortCode.ABORTED, "the leader refused", except_key=key)
                self._end(transfer, now, Refused(message.transfer_id, code, text))
            case Complete() if self._between_leaders(key) and transfer.is_granted:
                self._end(transfer, now, Completed(message.transfer_id))
            case _:
                self._fail(transfer, now, "protocol: a decision that is not the peer's to make", AbortCode.PROTOCOL)

    def has_data(self, key: LinkKey) -> bool:
        """Would `next_data` give something?"""
        link = self._links.get(key)
        return link is not None and bool(link.queue)

    def next_data(self, key: LinkKey, max_bytes: int, *, name_blocks: bool) -> Outgoing | None:
        """The next frame for the link, transfers taking turns. It counts as sent.

        `max_bytes` of payload, but at least one unit. `name_blocks`: the receiver fetches the bytes itself and is told the source blocks.
        """
        link = self._links.get(key)
        while link is not None and link.queue:
            transfer_id = link.queue.popleft()
            transfer, lane = self._transfers[transfer_id], link.lanes[transfer_id]
            outgoing = lane.next_frame(transfer_id, transfer.sendable, max_bytes, name_blocks=name_blocks)
            lane.is_queued = outgoing is not None and lane.has_ready
            if lane.is_queued:
                link.queue.append(transfer_id)
            if outgoing is not None:
                return outgoing
        return None

    # Time and I/O.

    @property
    def interval_s(self) -> float:
        """How often `tick` wants to be called."""
        return self._leases.interval_s

    def tick(self, now: float) -> None:
        """Send heartbeats; end what is overdue."""
        due = self._leases.due(now)
        for key, transfer_ids in due.pings:
            self._send(key, Ping(transfer_ids))
        for key in due.silent_links:
            self._actions.append(CloseLink(key, f"lease: {key} was silent for {self._lease_s} s"))
        for key, transfer_id in due.lapsed:
            self._lapse(now, transfer_id, f"lease: {key} has not named the transfer for {self._lease_s} s")
        for transfer in list(self._transfers.values()):
            if now > transfer.accept_by_s and not all(lane.is_accepted for lane in transfer.lanes.values()):
                self._lapse(now, transfer.request.transfer_id, "lease: the receiver did not accept in time")

    def io_stopped(self, now: float, transfer_id: TransferId) -> None:
        """The shell reads nothing of the transfer any more."""
        transfer = self._transfers.pop(transfer_id)
        self._move(transfer, SendState.CLOSED)
        self._actions += [Emit(event) for event in transfer.last_events]

    # Steps.

    def _move(self, transfer: _Transfer, state: SendState) -> None:
        assert state in SEND_NEXT[transfer.state], f"{transfer.state} -> {state}"
        transfer.state = state

    def _send(self, key: LinkKey, message: TransferMessage) -> None:
        self._actions.append(Send(key, message))

    def _between_leaders(self, key: LinkKey) -> bool:
        return self.is_leader and key.tp_rank == 0

    def _leader_key(self, transfer: _Transfer) -> LinkKey:
        return LinkKey(transfer.request.peer.worker_id, transfer.request.peer.incarnation, 0)

    def _begin_lane(self, transfer: _Transfer, key: LinkKey, lane: SendLane, plan: CopyPlan) -> None:
        request = transfer.request
        lane.connect(plan)
        if self.is_leader and key.tp_rank == 0:
            self._send(key, Reserve(request.transfer_id, request.num_tokens, request.reserve_payload))
        else:
            self._send(key, Announce(request.transfer_id, request.num_tokens))

    def _granted(self, transfer: _Transfer, now: float, key: LinkKey, first_token: int) -> None:
        if transfer.is_granted:
            return
        if not self._between_leaders(key) or not _is_start(first_token, transfer):
            self._fail(transfer, now, "protocol: the receiver's grant makes no sense", AbortCode.PROTOCOL)
            return
        transfer.is_granted = True
        transfer_id = transfer.request.transfer_id
        self._actions.append(Emit(Granted(transfer_id, first_token)))
        if transfer.manifest is not None:
            self._send(key, Manifest(transfer_id, transfer.manifest))

    def _accepted(self, transfer: _Transfer, now: float, key: LinkKey, lane: SendLane, accept: Accept) -> None:
        if lane.is_accepted:
            return
        if not _is_start(accept.first_token, transfer) or not lane.accept(accept.first_token, accept.window_bytes):
            self._fail(transfer, now, "protocol: the receiver's acceptance makes no sense", AbortCode.PROTOCOL)
            return
        if transfer.state is SendState.OPENED:
            self._move(transfer, SendState.SENDING)
        self._actions.append(Locate(lane.parts))
        self._mark_ready(transfer, key, lane, range(len(self._model.layers)))

    def _mark_ready(self, transfer: _Transfer, key: LinkKey, lane: SendLane, layers: Iterable[int]) -> None:
        for layer in layers:
            lane.mark_ready(layer, transfer.sendable(layer))
        self._enqueue(transfer, key, lane)

    def _enqueue(self, transfer: _Transfer, key: LinkKey, lane: SendLane) -> None:
        if lane.has_ready and not lane.is_queued:
            lane.is_queued = True
            self._links[key].queue.append(transfer.request.transfer_id)
            self._actions.append(DataReady(key))

    def _lapse(self, now: float, transfer_id: TransferId, reason: str) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._fail(transfer, now, reason, AbortCode.LEASE)

    def _fail(
        self,
        transfer: _Transfer,
        now: float,
        reason: str,
        code: AbortCode,
        *,
        integrity: bool = False,
        except_key: LinkKey | None = None,
    ) -> None:
        if transfer.state is SendState.STOPPING:
            return
        self._tell_abort(transfer, code, reason, except_key)
        self._end(transfer, now, Failed(transfer.request.transfer_id, reason, integrity))

    def _tell_abort(self, transfer: _Transfer, code: AbortCode, reason: str, except_key: LinkKey | None = None) -> None:
        for key in transfer.lanes:
            if key != except_key:
                self._send(key, Abort(transfer.request.transfer_id, code, reason[:200]))

    def _end(self, transfer: _Transfer, now: float, *events: TransferEvent) -> None:
        transfer.last_events += events
        if transfer.state is SendState.STOPPING:
            return
        self._move(transfer, SendState.STOPPING)
        transfer_id = transfer.request.transfer_id
        for key, lane in transfer.lanes.items():
            self._leases.unwatch(key, transfer_id)
            link = self._links.get(key)
            if link is not None:
                link.lanes.pop(transfer_id, None)
                if lane.is_queued:
                    link.queue.remove(transfer_id)
        self._actions.append(StopIO(transfer_id))


def _is_start(first_token: int, transfer: _Transfer) -> bool:
    return first_token % UNIT_TOKENS == 0 and first_token <= transfer.request.num_tokens
