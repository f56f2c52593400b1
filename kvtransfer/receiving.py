"""The receiving side of all transfers of one rank, as a pure state machine (see kvtransfer.protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.kv_layout import ModelKV
from kvtransfer.api import (
    Failed,
    ManifestReceived,
    Quiesced,
    Received,
    ReserveRequested,
    TransferEvent,
    TransferId,
)
from kvtransfer.auth import LinkKey
from kvtransfer.lanes import Landing, Misfit, ReceiveLane
from kvtransfer.liveness import LeaseTable
from kvtransfer.messages import (
    MAX_NAMED_TRANSFERS,
    Abort,
    AbortCode,
    Accept,
    Announce,
    Complete,
    Credit,
    Data,
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
from kvtransfer.plan import CopyPlan, source_ranks
from kvtransfer.protocol import (
    RECEIVE_NEXT,
    Action,
    CloseLink,
    Emit,
    EndedTransfers,
    Locate,
    ReceiveState,
    Send,
    StopIO,
)

_NOBODY = LinkKey("", "", -1)
"""Stands for the peer of a transfer that was granted before anybody announced it."""
_COMPLETED = "completed"
_REFUSED = "refused: "


@dataclass(slots=True)
class _Transfer:
    transfer_id: TransferId
    state: ReceiveState
    num_tokens: int
    worker: tuple[str, str] | None = None
    """(worker id, incarnation) of the sender, once somebody announced the transfer."""
    lanes: dict[int, ReceiveLane] = field(default_factory=dict)
    """By source rank, for those that announced the transfer."""
    sources: list[int] = field(default_factory=list)
    """All source ranks that the plan names; known from the first acceptance on."""
    block_table: tuple[int, ...] = ()
    first_token: int = 0
    is_requested: bool = False
    """Leader: the engine was asked."""
    is_granted: bool = False
    has_manifest: bool = False
    decide_by_s: float = 0.0
    began_s: float | None = None
    last_events: list[TransferEvent] = field(default_factory=list)
    """Told to the engine once I/O has stopped."""

    @property
    def engine_knows(self) -> bool:
        return self.is_requested or self.is_granted

    def key(self, source_rank: int) -> LinkKey:
        assert self.worker is not None
        return LinkKey(*self.worker, source_rank)


class ReceiveSide:
    """All transfers that this rank receives. Methods are called by one thread; actions are taken with `drain`.

    Bytes are written only between `grant` and STOPPING, only where the grant's block table says, and each unit is
    verified once; anything else that comes is dropped and counted.
    """

    def __init__(self, model: ModelKV, tp_size: int, tp_rank: int, window_bytes: int, lease_s: float) -> None:
        self._model = model
        self._tp_size = tp_size
        self._tp_rank = tp_rank
        self._window_bytes = window_bytes
        self._lease_s = lease_s
        self._leases = LeaseTable(lease_s)
        self._ended = EndedTransfers(2 * lease_s)
        self._transfers: dict[TransferId, _Transfer] = {}
        self._links: dict[LinkKey, CopyPlan] = {}
        self._actions: list[Action] = []
        self._suspects: dict[TransferId, str] = {}
        """Transfers of which fetched bytes did not verify, and which, until `settle` judges them."""
        self.num_stale = 0
        self.num_integrity_failures = 0

    @property
    def num_open(self) -> int:
        """Transfers that are not forgotten."""
        return len(self._transfers)

    @property
    def is_leader(self) -> bool:
        """Does this rank decide, manifest in hand, that a transfer is complete?"""
        return self._tp_rank == 0

    def drain(self) -> list[Action]:
        """Actions since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    # Commands of the engine.

    def grant(
        self, now: float, transfer_id: TransferId, block_table: Sequence[int], num_tokens: int, first_token: int
    ) -> None:
        """Let the peer write tokens [first_token, num_tokens) into these blocks."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = self._grant_unknown(now, transfer_id, num_tokens)
            if transfer is None:
                return
        elif transfer.state is ReceiveState.STOPPING and not transfer.engine_knows:
            self._tell_late(transfer, now)
            return
        elif transfer.is_granted or transfer.state is ReceiveState.STOPPING:
            return
        transfer.is_granted = True
        if transfer.num_tokens != num_tokens:
            self._fail(transfer, now, "protocol: granted and announced lengths differ", AbortCode.PROTOCOL)
            return
        if transfer.state is ReceiveState.REQUESTED:
            self._move(transfer, ReceiveState.RECEIVING)
        transfer.block_table = tuple(block_table)
        transfer.first_token = first_token
        if self.is_leader:
            self._send(transfer.key(0), Grant(transfer_id, first_token))
        for source_rank in list(transfer.lanes):
            self._accept(transfer, now, source_rank)
        self._check_received(transfer, now)

    def refuse(self, now: float, transfer_id: TransferId, code: str, message: str) -> None:
        """Leader: no."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not ReceiveState.REQUESTED:
            return
        self._send(transfer.key(0), Refuse(transfer_id, code, message[:200]))
        self._end(transfer, now, _REFUSED + message)

    def complete(self, now: float, transfer_id: TransferId) -> None:
        """Leader: every rank has everything: tell the sender and forget the transfer."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return
        if not self._is_whole(transfer):
            self._fail(transfer, now, "protocol: completed before it was received", AbortCode.PROTOCOL)
            return
        self._send(transfer.key(0), Complete(transfer_id))
        self._end(transfer, now, _COMPLETED)

    def close(self, now: float, transfer_id: TransferId) -> None:
        """Follower: the leader completed: forget the transfer."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return
        if not self._is_whole(transfer):
            self._fail(transfer, now, "protocol: closed before it was received", AbortCode.PROTOCOL)
            return
        self._end(transfer, now, _COMPLETED)

    def abort(self, now: float, transfer_id: TransferId, reason: str) -> None:
        """End the transfer in any state; `Quiesced` follows, at once for an unknown one."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._ended.add(transfer_id, now, reason, engine_knows=True)
            self._actions.append(Emit(Quiesced(transfer_id)))
        elif transfer.state is ReceiveState.STOPPING:
            transfer.last_events.append(Quiesced(transfer_id))
        else:
            transfer.is_granted = True  # the engine knows it
            self._tell_abort(transfer, AbortCode.ABORTED, reason)
            self._end(transfer, now, reason, Quiesced(transfer_id))

    def abort_all(self, now: float, reason: str) -> None:
        """The endpoint closes: every transfer fails."""
        for transfer in list(self._transfers.values()):
            self._fail(transfer, now, reason, AbortCode.LOST)

    # What links do.

    def link_up(self, now: float, key: LinkKey, plan: CopyPlan) -> None:
        """The link is authenticated."""
        self._links[key] = plan
        self._leases.link_up(key, now)

    def link_down(self, now: float, key: LinkKey, reason: str) -> None:
        """The link is closed: what was not whole fails."""
        self._links.pop(key, None)
        self._leases.link_down(key)
        for transfer in list(self._transfers.values()):
            concerned = key.tp_rank in transfer.lanes or key.tp_rank in transfer.sources
            if transfer.worker == key[:2] and concerned and not self._is_whole(transfer):
                self._fail(transfer, now, reason, AbortCode.LOST, except_key=key)

    def heard(self, now: float, key: LinkKey) -> None:
        """Bytes came on the link."""
        self._leases.heard(key, now)

    def on_message(self, now: float, key: LinkKey, message: Message) -> None:
        """A message, other than Data, of the source rank at the other end of the link.

        Raises:
            ProtocolError: a message that a sender never sends.
        """
        match message:
            case Ping(transfer_ids):
                self._leases.heard(key, now, transfer_ids)
                self._send(key, Pong(self._leases.watched(key)))
            case Pong(transfer_ids):
                self._leases.heard(key, now, transfer_ids)
            case Reserve(transfer_id, num_tokens, payload):
                self._reserve(now, key, transfer_id, num_tokens, payload)
            case Announce(transfer_id, num_tokens):
                self._announce(now, key, transfer_id, num_tokens)
            case Manifest(transfer_id, payload):
                self._manifest(now, key, transfer_id, payload)
            case Abort(transfer_id, code, reason):
                self._aborted(now, key, transfer_id, code, reason)
            case _:
                raise ProtocolError(f"a sender does not send {type(message).__name__}")

    def begin_data(self, now: float, key: LinkKey, frame: Data, payload_bytes: int | None) -> Landing | None:
        """Where the bytes of a data frame may be written; None: nowhere, drop them.

        `payload_bytes` is what the frame announced, None where the receiver fetches the bytes itself. A frame that
        contradicts the reservation fails its transfer and is dropped. A Landing must be followed by `data_landed`
        unless the transfer is stopped before.
        """
        transfer = self._transfers.get(frame.transfer_id)
        lane = self._lane(transfer, key)
        is_over = transfer is None or transfer.state in (ReceiveState.STOPPING, ReceiveState.RECEIVED)
        if transfer is None or lane is None or is_over or frame.transfer_id in self._suspects:
            self.num_stale += 1
            return None
        self._leases.heard(key, now, (frame.transfer_id,))
        try:
            if transfer.state is not ReceiveState.RECEIVING:
                raise Misfit("data before the permission to send")
            if (frame.source_rank, frame.destination_rank) != (key.tp_rank, self._tp_rank):
                raise Misfit("a frame for another pair of ranks")
            landing = lane.begin(frame, payload_bytes)
        except Misfit as error:
            self._fail(transfer, now, f"protocol: {error}", AbortCode.PROTOCOL)
            return None
        if landing is None:
            self.num_stale += 1
        elif transfer.began_s is None:
            transfer.began_s = now
        return landing

    def data_landed(
        self, now: float, key: LinkKey, frame: Data, num_bytes: int, *, verified: bool, is_fetched: bool = False
    ) -> None:
        """The bytes of a Landing are in place and their digest was right or wrong.

        Bytes that the receiver fetched may be wrong because the sender has aborted and reused its blocks, which is
        its right; whether its Abort is on the way shows when the link is drained (`settle`).
        """
        transfer = self._transfers.get(frame.transfer_id)
        lane = self._lane(transfer, key)
        if transfer is None or lane is None or transfer.state is not ReceiveState.RECEIVING:
            self.num_stale += 1
            return
        if not verified:
            units = f"units {frame.first_unit}+{frame.num_units}"
            self._suspects[frame.transfer_id] = f"layers {frame.first_layer}+{frame.num_layers}, {units} from {key}"
            if not is_fetched:
                self.settle(now)
            return
        credit = lane.landed(frame, num_bytes)
        if credit is not None:
            self._send(key, Credit(frame.transfer_id, credit))
        if not lane.is_expecting:
            self._check_received(transfer, now)

    def settle(self, now: float) -> None:
        """All that peers had sent so far is processed: fail what did not verify."""
        for transfer_id, where in list(self._suspects.items()):
            transfer = self._transfers[transfer_id]
            self.num_integrity_failures += 1
            reason = f"integrity: wrong digest, {where}"
            self._fail(transfer, now, reason, AbortCode.INTEGRITY, integrity=True)

    # Time and I/O.

    @property
    def interval_s(self) -> float:
        """How often `tick` wants to be called."""
        return self._leases.interval_s

    def tick(self, now: float) -> None:
        """Send heartbeats; end what is overdue."""
        self._ended.expire(now)
        self.settle(now)
        due = self._leases.due(now)
        for key, transfer_ids in due.pings:
            self._send(key, Ping(transfer_ids))
        for key in due.silent_links:
            self._actions.append(CloseLink(key, f"lease: {key} was silent for {self._lease_s} s"))
        for key, transfer_id in due.lapsed:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None and not self._is_whole(transfer):
                who = "nobody announced" if key == _NOBODY else f"{key} has not named"
                reason = f"lease: {who} the transfer for {self._lease_s} s"
                self._fail(transfer, now, reason, AbortCode.LEASE)
        for transfer in list(self._transfers.values()):
            undecided = transfer.state is ReceiveState.REQUESTED and transfer.is_requested
            if undecided and now > transfer.decide_by_s:
                self._send(transfer.key(0), Refuse(transfer.transfer_id, "unavailable", "the receiver did not decide"))
                reason = "lease: the engine did not answer the request in time"
                self._end(transfer, now, reason, Failed(transfer.transfer_id, reason))

    def io_stopped(self, now: float, transfer_id: TransferId) -> None:
        """The shell writes nothing of the transfer any more."""
        transfer = self._transfers.pop(transfer_id)
        self._move(transfer, ReceiveState.CLOSED)
        self._actions += [Emit(event) for event in transfer.last_events]

    # Steps.

    def _move(self, transfer: _Transfer, state: ReceiveState) -> None:
        assert state in RECEIVE_NEXT[transfer.state], f"{transfer.state} -> {state}"
        transfer.state = state

    def _send(self, key: LinkKey, message: TransferMessage) -> None:
        self._actions.append(Send(key, message))

    def _lane(self, transfer: _Transfer | None, key: LinkKey) -> ReceiveLane | None:
        if transfer is None or transfer.worker != key[:2]:
            return None
        return transfer.lanes.get(key.tp_rank)

    def _is_whole(self, transfer: _Transfer) -> bool:
        return transfer.state is ReceiveState.RECEIVED and (transfer.has_manifest or not self.is_leader)

    def _reserve(self, now: float, key: LinkKey, transfer_id: TransferId, num_tokens: int, payload: bytes) -> None:
        if not self.is_leader or key.tp_rank != 0:
            raise ProtocolError("a reservation between ranks that are not leaders")
        transfer = self._announce(now, key, transfer_id, num_tokens)
        if transfer is None or transfer.is_requested:
            return
        transfer.is_requested = True
        transfer.decide_by_s = now + self._lease_s
        self._actions.append(Emit(ReserveRequested(transfer_id, key.worker_id, num_tokens, payload)))

    def _announce(self, now: float, key: LinkKey, transfer_id: TransferId, num_tokens: int) -> _Transfer | None:
        ended = self._ended.get(transfer_id)
        if ended is not None:
            # After a refusal the leaders speak: an Abort to another rank would overtake the Refuse and hide its code.
            if ended.reason != _COMPLETED and not ended.reason.startswith(_REFUSED):
                self._send(key, Abort(transfer_id, AbortCode.ABORTED, ended.reason[:200]))
            return None
        if num_tokens == 0 or len(self._leases.watched(key)) >= MAX_NAMED_TRANSFERS:
            self._send(key, Abort(transfer_id, AbortCode.OVERLOADED, "empty, or too many transfers on one link"))
            return None
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = _Transfer(transfer_id, ReceiveState.REQUESTED, num_tokens)
            self._transfers[transfer_id] = transfer
        if transfer.state is ReceiveState.STOPPING or key.tp_rank in transfer.lanes:
            return transfer
        if transfer.worker not in (None, key[:2]):  # an id of somebody else: not a reason to end that one
            self._send(key, Abort(transfer_id, AbortCode.PROTOCOL, "the transfer is another worker's"))
            return None
        if transfer.num_tokens != num_tokens:
            self._fail(transfer, now, "protocol: granted and announced lengths differ", AbortCode.PROTOCOL)
            return None
        transfer.worker = (key.worker_id, key.incarnation)
        transfer.lanes[key.tp_rank] = ReceiveLane(self._links[key])
        self._leases.unwatch(_NOBODY, transfer_id)
        self._leases.watch(key, transfer_id, now)
        self._leases.heard(key, now, (transfer_id,))
        if transfer.is_granted:
            self._accept(transfer, now, key.tp_rank)
        return transfer

    def _grant_unknown(self, now: float, transfer_id: TransferId, num_tokens: int) -> _Transfer | None:
        """A grant before any announcement, or after the end."""
        ended = self._ended.get(transfer_id)
        if ended is not None or self.is_leader:
            reason, engine_knows = ended or ("protocol: nobody asked for it", False)
            if not engine_knows:
                self._ended.add(transfer_id, now, reason, engine_knows=True)
                self._actions.append(Emit(Failed(transfer_id, reason)))
            return None
        transfer = _Transfer(transfer_id, ReceiveState.RECEIVING, num_tokens)
        self._transfers[transfer_id] = transfer
        self._leases.watch(_NOBODY, transfer_id, now)
        return transfer

    def _accept(self, transfer: _Transfer, now: float, source_rank: int) -> None:
        """Both the grant and this rank's announcement are here: it may send."""
        lane = transfer.lanes[source_rank]
        if lane.is_accepted:
            return
        key = transfer.key(source_rank)
        lane.accept(transfer.block_table, transfer.num_tokens, transfer.first_token, self._window_bytes)
        source_tp = lane.plan.source.geometry.tp_size
        transfer.sources = source_ranks(self._model, source_tp, self._tp_size, self._tp_rank)
        for rank in transfer.sources:  # the others must come within a lease as well
            self._leases.watch(transfer.key(rank), transfer.transfer_id, now)
        self._send(key, Accept(transfer.transfer_id, transfer.first_token, lane.window_bytes))
        self._actions.append(Locate(lane.parts))

    def _check_received(self, transfer: _Transfer, now: float) -> None:
        """Every source rank, layer and unit there?"""
        if transfer.state is not ReceiveState.RECEIVING:
            return
        if transfer.first_token < transfer.num_tokens:
            lanes = [transfer.lanes.get(rank) for rank in transfer.sources]
            if not lanes or not all(lane is not None and lane.is_full for lane in lanes):
                return
        self._move(transfer, ReceiveState.RECEIVED)
        num_bytes = sum(lane.bytes_landed for lane in transfer.lanes.values())
        began_s = now if transfer.began_s is None else transfer.began_s
        self._actions.append(Emit(Received(transfer.transfer_id, num_bytes, began_s, now)))

    def _manifest(self, now: float, key: LinkKey, transfer_id: TransferId, payload: bytes) -> None:
        transfer = self._transfers.get(transfer_id)
        if self._lane(transfer, key) is None or transfer is None or transfer.state is ReceiveState.STOPPING:
            self.num_stale += 1
            return
        if not transfer.is_granted or not self.is_leader or key.tp_rank != 0:
            self._fail(transfer, now, "protocol: an unexpected manifest", AbortCode.PROTOCOL)
            return
        self._leases.heard(key, now, (transfer_id,))
        if transfer.has_manifest:
            self.num_stale += 1
            return
        transfer.has_manifest = True
        self._actions.append(Emit(ManifestReceived(transfer_id, payload)))

    def _aborted(self, now: float, key: LinkKey, transfer_id: TransferId, code: str, reason: str) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            if self._ended.get(transfer_id) is None:
                self._ended.add(transfer_id, now, f"peer: {reason}", engine_knows=False)
            return
        if self._lane(transfer, key) is None or transfer.state is ReceiveState.STOPPING or self._is_whole(transfer):
            self.num_stale += 1
            return
        self._fail(transfer, now, f"peer: {reason}", AbortCode.ABORTED, except_key=key)

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
        if transfer.state is ReceiveState.STOPPING:
            return
        self._tell_abort(transfer, code, reason, except_key)
        events = [Failed(transfer.transfer_id, reason, integrity)] if transfer.engine_knows else []
        self._end(transfer, now, reason, *events)

    def _tell_abort(self, transfer: _Transfer, code: AbortCode, reason: str, except_key: LinkKey | None = None) -> None:
        for source_rank in transfer.lanes:
            key = transfer.key(source_rank)
            if key != except_key:
                self._send(key, Abort(transfer.transfer_id, code, reason[:200]))

    def _end(self, transfer: _Transfer, now: float, reason: str, *events: TransferEvent) -> None:
        transfer.last_events += events
        self._move(transfer, ReceiveState.STOPPING)
        self._suspects.pop(transfer.transfer_id, None)
        self._ended.add(transfer.transfer_id, now, reason, engine_knows=transfer.engine_knows)
        self._leases.unwatch(_NOBODY, transfer.transfer_id)
        if transfer.worker is not None:
            for rank in {*transfer.lanes, *transfer.sources}:
                self._leases.unwatch(transfer.key(rank), transfer.transfer_id)
        self._actions.append(StopIO(transfer.transfer_id))

    def _tell_late(self, transfer: _Transfer, now: float) -> None:
        """The engine grants what is being stopped already."""
        ended = self._ended.get(transfer.transfer_id)
        reason = "peer: ended" if ended is None else ended.reason
        transfer.is_granted = True
        transfer.last_events.append(Failed(transfer.transfer_id, reason))
        self._ended.add(transfer.transfer_id, now, reason, engine_knows=True)
