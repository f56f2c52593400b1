"""What happened in one run, simulated or real, as plain events that `checker` judges. Knows no simulation.

A history of real processes is the same events as JSON lines: `{"event": "Delivered", "at_s": ..., ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias


class Submitted(NamedTuple):
    """A client asked. `expected` is what an undisturbed engine generates; None: not known."""

    at_s: float
    request_id: str
    expected: tuple[int, ...] | None
    max_tokens: int
    deadline_s: float


class AttemptStarted(NamedTuple):
    """A router sent an attempt to workers."""

    at_s: float
    request_id: str
    attempt: int


class AttemptFailed(NamedTuple):
    """An attempt ended without success. `counts`: it is one of those that are limited (Overloaded is not)."""

    at_s: float
    request_id: str
    attempt: int
    code: str
    counts: bool


class Delivered(NamedTuple):
    """A token went to the client."""

    at_s: float
    request_id: str
    attempt: int
    index: int
    token_id: int


class Ended(NamedTuple):
    """The client was told the end. `outcome`: stop, length, cancelled, router_lost, or `error` with its code."""

    at_s: float
    request_id: str
    outcome: str
    code: str = ""


class Ledger(NamedTuple):
    """Blocks of a worker by state, at any moment."""

    at_s: float
    worker: str
    by_state: dict[str, int]
    num_blocks: int


class Landed(NamedTuple):
    """A data frame was accepted by a receiving rank: its digest was right.

    `is_right`: the bytes are what the request's own tokens make them. `is_granted`: its blocks were reserved for
    this very transfer. `is_tainted`: wrong bytes had been put into the source before the digest was made.
    """

    at_s: float
    worker: str
    transfer_id: str
    is_right: bool
    is_granted: bool
    is_tainted: bool


class Mismatch(NamedTuple):
    """A worker's tell-tale caught wrong KV before a token was chosen. `is_tainted` as in Landed."""

    at_s: float
    worker: str
    detail: str
    is_tainted: bool


class Injected(NamedTuple):
    """What became of one injected corruption: detected, moot (nobody could read it) or missed."""

    at_s: float
    level: str
    kind: str
    outcome: str


class Breach(NamedTuple):
    """Somebody saw an invariant broken as it happened (an audit, a guard on memory, an uncaught exception)."""

    at_s: float
    where: str
    invariant: str
    detail: str


class Rest(NamedTuple):
    """A live worker when everything should be at rest."""

    at_s: float
    worker: str
    by_state: dict[str, int]
    num_blocks: int
    sequences: dict[str, int]
    open_transfers: int
    handing_over: int
    taking_over: int
    wrong_cached_blocks: int


class Promise(NamedTuple):
    """From here on at least one healthy pair can be reached: every request must end well."""

    at_s: float
    within_s: float


class Over(NamedTuple):
    """The history ends; nothing may be open."""

    at_s: float


Event: TypeAlias = (
    Submitted
    | AttemptStarted
    | AttemptFailed
    | Delivered
    | Ended
    | Ledger
    | Landed
    | Mismatch
    | Injected
    | Breach
    | Rest
    | Promise
    | Over
)
_TYPES = {
    cls.__name__: cls
    for cls in (
        Submitted,
        AttemptStarted,
        AttemptFailed,
        Delivered,
        Ended,
        Ledger,
        Landed,
        Mismatch,
        Injected,
        Breach,
        Rest,
        Promise,
        Over,
    )
}


def to_json(event: Event) -> str:
    """One line."""
    return json.dumps({"event": type(event).__name__, **event._asdict()})


def from_json(lines: Iterable[str]) -> Iterator[Event]:
    """Back from `to_json`, for histories of real processes.

    Raises:
        KeyError, TypeError: not such a line.
    """
    for line in lines:
        fields: dict[str, Any] = json.loads(line)
        kind = _TYPES[fields.pop("event")]
        if kind is Submitted and fields["expected"] is not None:
            fields["expected"] = tuple(fields["expected"])
        yield kind(**fields)
