"""The states of a transfer on each side, what may follow what, and what the protocol asks its shell to do. No I/O.

One send state machine (`kvtransfer.sending.SendSide`) and one receive state machine
(`kvtransfer.receiving.ReceiveSide`) per rank take commands of the engine, messages of peers, links going up and down
and the time; they answer with the actions below, in order. The same two classes run over sockets and in simulation.

Decisions:
* Control and bulk share one authenticated stream per (source rank, destination rank) pair. One connection means one
  order of events and one fate, and a closed connection proves that no more bytes come.
* The connecting side is always the sender of KV, the accepting side the receiver. Leaders are tp_rank 0 of each
  worker; the link (0, 0) always exists and carries Reserve, Grant, Refuse, Manifest and Complete.
* Every sending rank announces the transfer on each of its links when it opens it, so a receiving rank knows from whom
  the bytes come; it accepts on each link as soon as it holds both the announcement and its engine's grant, in either
  order.
* Completion is a full bitmap over (source rank, layer, unit), never "the last message came". A frame counts once its
  bytes are in place and its digest, which may follow in a Seal, was right.
* Credits are cumulative counts, so that a repeated Credit changes nothing.
* Once a receiver is whole (all bytes verified and, on the leader, the manifest) it needs nobody any more: a late Abort
  or a lost link changes nothing (reliability X2).
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from kvtransfer.api import PeerRank, TransferEvent, TransferId
from kvtransfer.auth import LinkKey
from kvtransfer.messages import TransferMessage
from kvtransfer.plan import Part


class SendState(enum.StrEnum):
    """A transfer on a sending rank. The comment says who may read its source blocks here."""

    OPENED = "opened"  # nobody: the receiver has not decided
    SENDING = "sending"  # the transfer thread, and on shared memory the peer
    STOPPING = "stopping"  # perhaps the transfer thread: the last read is being ended
    CLOSED = "closed"  # nobody


SEND_NEXT: Final[Mapping[SendState, frozenset[SendState]]] = {
    SendState.OPENED: frozenset({SendState.SENDING, SendState.STOPPING}),
    SendState.SENDING: frozenset({SendState.STOPPING}),
    SendState.STOPPING: frozenset({SendState.CLOSED}),
    SendState.CLOSED: frozenset(),
}


class ReceiveState(enum.StrEnum):
    """A transfer on a receiving rank. The comment says who may write its destination blocks here."""

    REQUESTED = "requested"  # nobody: a peer named it, the engine has granted nothing
    RECEIVING = "receiving"  # the transfer thread
    RECEIVED = "received"  # nobody: every byte is in place and verified
    STOPPING = "stopping"  # perhaps the transfer thread: the last write is being ended
    CLOSED = "closed"  # nobody


RECEIVE_NEXT: Final[Mapping[ReceiveState, frozenset[ReceiveState]]] = {
    ReceiveState.REQUESTED: frozenset({ReceiveState.RECEIVING, ReceiveState.STOPPING}),
    ReceiveState.RECEIVING: frozenset({ReceiveState.RECEIVED, ReceiveState.STOPPING}),
    ReceiveState.RECEIVED: frozenset({ReceiveState.STOPPING}),
    ReceiveState.STOPPING: frozenset({ReceiveState.CLOSED}),
    ReceiveState.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Connect:
    """Bring up the link to a receiving rank, by whichever transport works. Answer: `link_up` or `link_down`."""

    key: LinkKey
    peer: PeerRank


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message on a link, before any further data. A link that is down swallows it."""

    key: LinkKey
    message: TransferMessage


@dataclass(frozen=True, slots=True)
class DataReady:
    """`SendSide.next_data(key)` has something."""

    key: LinkKey


@dataclass(frozen=True, slots=True)
class Locate:
    """Frames will soon name these bytes of this rank's pool: find out where they lie, while there is time."""

    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell the engine thread."""

    event: TransferEvent


@dataclass(frozen=True, slots=True)
class StopIO:
    """Let no copy from or to the transfer's blocks go on or begin. Answer: `io_stopped`, once that is so."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class CloseLink:
    """The peer is silent or misbehaves: close. Answer: `link_down`."""

    key: LinkKey
    reason: str


Action: TypeAlias = Connect | Send | DataReady | Locate | Emit | StopIO | CloseLink


class Ended(NamedTuple):
    """How a transfer ended, and whether this rank's engine was told."""

    reason: str
    engine_knows: bool


class EndedTransfers:
    """Remembers transfers that ended a short while ago, so that what comes late meets an answer. Bounded."""

    def __init__(self, keep_s: float, capacity: int = 4096) -> None:
        self._keep_s = keep_s
        self._capacity = capacity
        self._ended: OrderedDict[TransferId, tuple[float, Ended]] = OrderedDict()

    def add(self, transfer_id: TransferId, now: float, reason: str, *, engine_knows: bool) -> None:
        """Remember the end of a transfer; a second call replaces the first."""
        self._ended[transfer_id] = (now + self._keep_s, Ended(reason, engine_knows))
        self._ended.move_to_end(transfer_id)
        if len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def get(self, transfer_id: TransferId) -> Ended | None:
        """How a transfer ended lately."""
        found = self._ended.get(transfer_id)
        return None if found is None else found[1]

    def expire(self, now: float) -> None:
        """Forget what is older than the time to keep."""
        while self._ended:
            first = next(iter(self._ended.values()))
            if first[0] > now:
                return
            self._ended.popitem(last=False)
