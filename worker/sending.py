"""The prefill side of a hand-over, on the leader: from the first chunk's Reserve to the release of the source blocks.

One `Sending` per attempt. Its transfer id changes when the router names another decode worker.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from baton.clock import Clock
from baton.request import AttemptId, GenerateRequest, TokenEvent
from engine.types import Engine, StepPlan
from kvtransfer.api import Completed, Failed, Granted, PeerWorker, Quiesced, Refused, SendRequest, TransferId
from worker import codec
from worker.channel import pack
from worker.group import Group
from worker.outbox import Outbox


class SendState(enum.StrEnum):
    """Where the hand-over is. The engine holds the source blocks in every state but DONE."""

    QUEUED = "queued"  # not scheduled yet: nothing is reserved anywhere
    OPEN = "open"  # reserved or being reserved; KV goes out as it is written
    PARKED = "parked"  # refused or failed there; waits for the router to name another decode worker
    CLOSING = "closing"  # over; ranks have yet to say that they read no block of it any more
    DONE = "done"  # complete, or given up


_NEXT: Final[Mapping[SendState, frozenset[SendState]]] = {
    SendState.QUEUED: frozenset({SendState.OPEN, SendState.DONE}),
    SendState.OPEN: frozenset({SendState.PARKED, SendState.CLOSING, SendState.DONE}),
    SendState.PARKED: frozenset({SendState.OPEN, SendState.CLOSING, SendState.DONE}),
    SendState.CLOSING: frozenset({SendState.DONE}),
    SendState.DONE: frozenset(),
}


_NO_TRANSFER: Final = TransferId(b"")


@dataclass(slots=True)
class Sending:
    """One attempt whose KV goes to another worker."""

    router_id: str
    request: GenerateRequest
    peer: PeerWorker
    state: SendState = SendState.QUEUED
    transfer_id: TransferId = _NO_TRANSFER
    num_written: int = 0
    first: TokenEvent | None = None
    parked_at: float = 0.0
    unquiet: dict[TransferId, set[int]] = field(default_factory=dict)
    """Aborted transfers, and the ranks that may still read their blocks: none is freed before this is empty."""
    moments: dict[str, float] = field(default_factory=dict)

    def move_to(self, state: SendState) -> None:
        """The only place where the state changes."""
        assert state in _NEXT[self.state], f"{self.state} -> {state}"
        self.state = state


class SendingSide:
    """All hand-overs that this worker gives. Engine thread of the leader only."""

    def __init__(self, engine: Engine, group: Group, outbox: Outbox, clock: Clock, tp_size: int, hold_s: float) -> None:
        self._engine = engine
        self._group = group
        self._outbox = outbox
        self._clock = clock
        self._tp_size = tp_size
        self._hold_s = hold_s
        self._by_attempt: dict[AttemptId, Sending] = {}
        self._by_transfer: dict[TransferId, Sending] = {}
        self._handlers: dict[type, Callable[[int, Sending, object], None]] = {
            Granted: self._on_granted,
            Refused: self._on_refused,
            Completed: self._on_completed,
            Failed: self._on_failed,
            Quiesced: self._on_quiesced,
        }

    def __contains__(self, attempt_id: AttemptId) -> bool:
        return attempt_id in self._by_attempt

    def __len__(self) -> int:
        return len(self._by_attempt)

    def start(self, router_id: str, request: GenerateRequest, peer: PeerWorker) -> None:
        """Queue a prefill whose KV goes to `peer`. Raises what Engine.add raises; nothing was queued then."""
        self._engine.add(request, hold_kv=True)
        sending = Sending(router_id, request, peer)
        sending.moments["received"] = self._clock.now()
        self._by_attempt[request.attempt_id] = sending

    def before_step(self, plan: StepPlan) -> None:
        """Reserve at the peer for every attempt whose first chunk is in this step, beside its computation."""
        for entry in plan.entries:
            sending = self._by_attempt.get(entry.attempt_id)
            if sending is None:
                continue
            if sending.state is SendState.QUEUED:
                sending.moments["prefill_begin"] = self._clock.now()
                self._open(sending, tuple(entry.block_table))
            sending.num_written = entry.start + len(entry.token_ids)

    def prefilled(self, event: TokenEvent) -> None:
        """The first token of one of our attempts was sampled: tell the peer, or nobody if it also ends the request."""
        sending = self._by_attempt[event.attempt_id]
        sending.moments["prefill_end"] = self._clock.now()
        sending.first = event
        if sending.state is SendState.CLOSING:
            return
        self._tell_moments(sending, event)
        if event.finish_reason is not None:
            self._close(sending, "the first token ended the request")
        elif sending.state is SendState.OPEN:
            self._finish(sending)
        elif sending.state is SendState.PARKED:
            sending.parked_at = self._clock.now()

    def redirect(self, attempt_id: AttemptId, peer: PeerWorker) -> None:
        """Offer the KV, as far as it is computed, to another decode worker. Ignored unless parked."""
        sending = self._by_attempt.get(attempt_id)
        if sending is None or sending.state is not SendState.PARKED:
            return
        sending.peer = peer
        self._open(sending, self._engine.block_table(attempt_id))
        if sending.num_written:
            self._group.written(sending.transfer_id, sending.num_written)
        if sending.first is not None:
            self._finish(sending)

    def abort(self, attempt_id: AttemptId, reason: str) -> None:
        """End one attempt in any state. Ignored if unknown."""
        sending = self._by_attempt.get(attempt_id)
        if sending is not None and sending.state is not SendState.CLOSING:
            self._close(sending, reason)

    def handle(self, rank: int, event: object) -> bool:
        """An event of one of this worker's endpoints; False if it belongs to no hand-over of ours."""
        handler = self._handlers.get(type(event))
        sending = self._by_transfer.get(event.transfer_id) if handler else None  # type: ignore[attr-defined]
        if handler is None or sending is None:
            return False
        handler(rank, sending, event)
        return True

    def expire(self) -> None:
        """Give up parked KV that no router asked for in time."""
        limit = self._clock.now() - self._hold_s
        for attempt_id, sending in list(self._by_attempt.items()):
            if sending.state is SendState.PARKED and sending.first is not None and sending.parked_at < limit:
                self._outbox.failed(
                    sending.router_id, attempt_id, "kv_transfer_failed", "no decode worker was named in time"
                )
                self._close(sending, "held too long")

    def attempts_of(self, router_id: str) -> list[AttemptId]:
        """Everything that one router started."""
        return [attempt for attempt, sending in self._by_attempt.items() if sending.router_id == router_id]

    def _open(self, sending: Sending, block_table: tuple[int, ...]) -> None:
        sending.move_to(SendState.OPEN)
        sending.transfer_id = TransferId(secrets.token_bytes(16))
        self._by_transfer[sending.transfer_id] = sending
        request = SendRequest(
            transfer_id=sending.transfer_id,
            peer=sending.peer,
            num_tokens=len(sending.request.token_ids),
            block_table=block_table,
            reserve_payload=pack([sending.router_id, codec.pack_request(sending.request)]),
        )
        self._group.open_send(sending.request.attempt_id, request)

    def _finish(self, sending: Sending) -> None:
        assert sending.first is not None
        self._group.finish(sending.transfer_id, pack(codec.pack_token(sending.first)))

    def _close(self, sending: Sending, reason: str) -> None:
        """Stop the transfer first and free the blocks after: no rank may read a block that has a new owner."""
        if sending.state is SendState.OPEN:
            self._abort_transfer(sending, reason)
        if sending.unquiet:
            sending.move_to(SendState.CLOSING)
        else:
            self._forget(sending)
            self._engine.abort(sending.request.attempt_id)

    def _abort_transfer(self, sending: Sending, reason: str) -> None:
        """Every rank is told, and answers Quiesced when it reads the blocks no more."""
        sending.unquiet[sending.transfer_id] = set(range(self._tp_size))
        self._group.abort(sending.request.attempt_id, sending.transfer_id, reason)

    def _forget(self, sending: Sending) -> None:
        sending.move_to(SendState.DONE)
        self._by_transfer.pop(sending.transfer_id, None)
        del self._by_attempt[sending.request.attempt_id]

    def _tell_moments(self, sending: Sending, first: TokenEvent) -> None:
        self._outbox.timeline(sending.router_id, sending.request.attempt_id, sending.moments, first.num_cached_tokens)

    def _on_granted(self, rank: int, sending: Sending, event: object) -> None:
        sending.moments["granted"] = self._clock.now()
        if sending.first is not None:
            self._tell_moments(sending, sending.first)

    def _on_refused(self, rank: int, sending: Sending, event: object) -> None:
        assert isinstance(event, Refused)
        if sending.state is SendState.OPEN and event.transfer_id == sending.transfer_id:  # it may cross our abort
            self._park(sending, event.code, event.message)

    def _on_failed(self, rank: int, sending: Sending, event: object) -> None:
        assert isinstance(event, Failed)
        if event.transfer_id in sending.unquiet:
            self._quiet(rank, sending, event.transfer_id)
        elif sending.state is SendState.OPEN and event.transfer_id == sending.transfer_id:
            self._park(sending, "kv_transfer_failed", event.reason)

    def _park(self, sending: Sending, code: str, message: str) -> None:
        """The KV stays pinned here, which is the burst buffer; the router decides where it goes."""
        attempt_id = sending.request.attempt_id
        self._abort_transfer(sending, message)
        sending.move_to(SendState.PARKED)
        sending.parked_at = self._clock.now()
        self._outbox.refused(sending.router_id, attempt_id, sending.peer.worker_id, code, message)

    def _on_completed(self, rank: int, sending: Sending, event: object) -> None:
        assert isinstance(event, Completed)
        if sending.state is not SendState.OPEN or event.transfer_id != sending.transfer_id:
            return
        attempt_id = sending.request.attempt_id
        self._group.close_send(attempt_id, sending.transfer_id)
        if sending.unquiet:  # a rank may still read for an earlier transfer, if this one had nothing to send
            sending.move_to(SendState.CLOSING)
        else:
            self._forget(sending)
            self._engine.release(attempt_id)

    def _on_quiesced(self, rank: int, sending: Sending, event: object) -> None:
        assert isinstance(event, Quiesced)
        self._quiet(rank, sending, event.transfer_id)

    def _quiet(self, rank: int, sending: Sending, transfer_id: TransferId) -> None:
        """A rank reads no block of an aborted transfer any more."""
        ranks = sending.unquiet.get(transfer_id)
        if ranks is None:
            return
        ranks.discard(rank)
        if ranks:
            return
        del sending.unquiet[transfer_id], self._by_transfer[transfer_id]
        if sending.state is SendState.CLOSING and not sending.unquiet:
            self._forget(sending)
            self._engine.abort(sending.request.attempt_id)
