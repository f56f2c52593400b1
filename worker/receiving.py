"""The decode side of a hand-over, on the leader: from a peer's Reserve to a sequence that decodes.

No request waits here while holding blocks anywhere: a Reserve is granted or refused at once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from baton.clock import Clock
from baton.errors import InvalidRequest, Overloaded, ServeError, TransferError, Unavailable
from baton.request import AttemptId, GenerateRequest, TokenEvent
from engine.types import Engine, Reservation
from kvtransfer.api import Failed, ManifestReceived, Quiesced, Received, ReserveRequested, TransferId
from worker import codec
from worker.channel import unpack
from worker.group import Group
from worker.outbox import Outbox

_BY_PEER: Final = "peer: "
"""How the reason of a Failed begins if the sender ended the transfer. It lives and tells the router why by itself (its
first token was the last one, it was aborted, it parks the KV for another worker); ours could overtake that."""


class ReceiveState(enum.StrEnum):
    """Where the hand-over is, and who holds the destination blocks."""

    RECEIVING = "receiving"  # the sequence; transfer threads write into them
    CLOSING = "closing"  # QUARANTINED in the ledger: ranks have yet to say that nothing is written any more
    DONE = "done"  # the running sequence, or nobody


_NEXT: Final[Mapping[ReceiveState, frozenset[ReceiveState]]] = {
    ReceiveState.RECEIVING: frozenset({ReceiveState.CLOSING, ReceiveState.DONE}),
    ReceiveState.CLOSING: frozenset({ReceiveState.DONE}),
    ReceiveState.DONE: frozenset(),
}


@dataclass(slots=True)
class Receiving:
    """One attempt whose KV comes from another worker."""

    router_id: str
    request: GenerateRequest
    transfer_id: TransferId
    reservation: Reservation
    peer_worker_id: str
    state: ReceiveState = ReceiveState.RECEIVING
    received_ranks: set[int] = field(default_factory=set)
    quiet_ranks: set[int] = field(default_factory=set)
    first: TokenEvent | None = None
    num_bytes: int = 0
    moments: dict[str, float] = field(default_factory=dict)

    def move_to(self, state: ReceiveState) -> None:
        """The only place where the state changes."""
        assert state in _NEXT[self.state], f"{self.state} -> {state}"
        self.state = state


class ReceivingSide:
    """All hand-overs that this worker takes. Engine thread of the leader only.

    `admit` says why a router's request may not run here (unknown router, aborted attempt, draining), or None.
    `joined` is called when a sequence has begun to decode.
    """

    def __init__(
        self,
        engine: Engine,
        group: Group,
        outbox: Outbox,
        clock: Clock,
        tp_size: int,
        admit: Callable[[str, AttemptId], str | None],
        joined: Callable[[str, GenerateRequest], None],
        transport_of: Callable[[str], str],
    ) -> None:
        self._engine = engine
        self._group = group
        self._outbox = outbox
        self._clock = clock
        self._tp_size = tp_size
        self._admit = admit
        self._joined = joined
        self._transport_of = transport_of
        self._by_attempt: dict[AttemptId, Receiving] = {}
        self._by_transfer: dict[TransferId, Receiving] = {}

    def __len__(self) -> int:
        return len(self._by_transfer)

    def handle(self, rank: int, event: object) -> bool:
        """An event of one of this worker's endpoints; False if it belongs to no hand-over of ours."""
        if isinstance(event, ReserveRequested):
            self._on_reserve(event)
            return True
        if not isinstance(event, Received | ManifestReceived | Failed | Quiesced):
            return False
        receiving = self._by_transfer.get(event.transfer_id)
        if receiving is None:
            return False
        if isinstance(event, Failed | Quiesced):
            self._on_quiet(rank, receiving, event)
        elif receiving.state is ReceiveState.RECEIVING:
            if isinstance(event, Received):
                receiving.received_ranks.add(rank)
                receiving.num_bytes += event.num_bytes
                moments = receiving.moments
                if event.num_bytes:
                    moments["kv_begin"] = min(moments.get("kv_begin", event.began_s), event.began_s)
                    moments["kv_end"] = max(moments.get("kv_end", event.ended_s), event.ended_s)
            else:
                receiving.first = codec.unpack_token(unpack(event.payload))
            self._join_if_whole(receiving)
        return True

    def abort(self, attempt_id: AttemptId, reason: str) -> bool:
        """End one attempt that is being received; its blocks stay quarantined until every rank is quiet."""
        receiving = self._by_attempt.get(attempt_id)
        if receiving is None:
            return False
        self._close(receiving, reason)
        return True

    def attempts_of(self, router_id: str) -> list[AttemptId]:
        """Everything that is being received for one router."""
        return [attempt for attempt, item in self._by_attempt.items() if item.router_id == router_id]

    def _on_reserve(self, event: ReserveRequested) -> None:
        try:
            router_id, packed = unpack(event.payload)
            request = codec.unpack_request(packed)
            if event.num_tokens != len(request.token_ids):
                raise InvalidRequest("the reserved length is not the request's")
            reason = self._admit(router_id, request.attempt_id)
            if reason is None and request.attempt_id in self._by_attempt:
                reason = "the attempt is being received already"
            if reason is not None:
                raise Unavailable(reason)
            reservation = self._engine.reserve(request)
        except ServeError as error:
            self._group.refuse(event.transfer_id, error.code, error.message)
            return
        except (ValueError, TypeError) as error:
            self._group.refuse(event.transfer_id, Overloaded.code, f"unreadable reserve request: {error}")
            return
        receiving = Receiving(router_id, request, event.transfer_id, reservation, event.peer_worker_id)
        receiving.moments["reserved"] = self._clock.now()
        self._by_attempt[request.attempt_id] = receiving
        self._by_transfer[event.transfer_id] = receiving
        self._group.grant(
            event.transfer_id, reservation.block_table, reservation.num_tokens, reservation.num_cached_tokens
        )

    def _join_if_whole(self, receiving: Receiving) -> None:
        if receiving.first is None or len(receiving.received_ranks) < self._tp_size:
            return
        attempt_id = receiving.request.attempt_id
        try:
            self._engine.commit(attempt_id, receiving.first)
        except TransferError as error:
            self._outbox.failed(receiving.router_id, attempt_id, error.code, error.message)
            self._close(receiving, error.message)
            return
        self._group.complete(receiving.transfer_id)
        receiving.moments["runnable"] = self._clock.now()
        self._forget(receiving)
        self._outbox.timeline(
            receiving.router_id,
            attempt_id,
            receiving.moments,
            receiving.reservation.num_cached_tokens,
            receiving.num_bytes,
            self._transport_of(receiving.peer_worker_id),
        )
        self._joined(receiving.router_id, receiving.request)

    def _on_quiet(self, rank: int, receiving: Receiving, event: Failed | Quiesced) -> None:
        receiving.quiet_ranks.add(rank)
        if isinstance(event, Failed) and receiving.state is ReceiveState.RECEIVING:
            if not event.reason.startswith(_BY_PEER):
                self._outbox.failed(
                    receiving.router_id, receiving.request.attempt_id, "kv_transfer_failed", event.reason
                )
            self._close(receiving, event.reason)
        if receiving.state is ReceiveState.CLOSING and len(receiving.quiet_ranks) == self._tp_size:
            self._engine.quiesced(receiving.request.attempt_id)
            self._by_transfer.pop(receiving.transfer_id)
            receiving.move_to(ReceiveState.DONE)

    def _close(self, receiving: Receiving, reason: str) -> None:
        receiving.move_to(ReceiveState.CLOSING)
        del self._by_attempt[receiving.request.attempt_id]
        self._engine.abort(receiving.request.attempt_id)
        self._group.abort(receiving.request.attempt_id, receiving.transfer_id, reason)

    def _forget(self, receiving: Receiving) -> None:
        receiving.move_to(ReceiveState.DONE)
        del self._by_attempt[receiving.request.attempt_id]
        del self._by_transfer[receiving.transfer_id]
