"""The invariants of reliability.md §4 as one pure function over a history, simulated or real."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.simulation import history
from tests.simulation.history import Event

MAX_FAILED_ATTEMPTS: Final = 3
DEADLINE_SLACK_S: Final = 1.0
_RESTING: Final = frozenset({"free", "cached"})
_GOOD: Final = frozenset({"stop", "length"})


class Violation(NamedTuple):
    """A broken invariant, by its id in reliability.md (or DEFECT: code that raised)."""

    invariant: str
    at_s: float
    detail: str

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at_s:.4f} s: {self.detail}"


@dataclass(slots=True)
class _Request:
    submitted: history.Submitted
    tokens: list[int] = field(default_factory=list)
    attempt: int = 0
    num_failed: int = 0
    ended: history.Ended | None = None


class Checker:
    """Feed it a history in order; `violations` says what is wrong with it."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._requests: dict[str, _Request] = {}
        self._promise: history.Promise | None = None

    def feed(self, event: Event) -> None:
        """Judge the next event."""
        match event:
            case history.Submitted():
                self._requests[event.request_id] = _Request(event)
            case history.AttemptStarted():
                self._attempt(event)
            case history.AttemptFailed():
                request = self._requests[event.request_id]
                request.num_failed += event.counts
                if request.num_failed > MAX_FAILED_ATTEMPTS:
                    self._broken("INV-11", event.at_s, f"{event.request_id}: {request.num_failed} attempts failed")
            case history.Delivered():
                self._delivered(event)
            case history.Ended():
                self._ended(event)
            case history.Ledger():
                self._ledger("INV-1", event)
            case history.Landed():
                self._landed(event)
            case history.Mismatch():
                if not event.is_tainted:
                    self._broken("INV-10", event.at_s, f"{event.worker} read KV that nobody had spoilt: {event.detail}")
            case history.Injected():
                if event.outcome == "missed":
                    self._broken("INV-7", event.at_s, f"{event.kind} injected {event.level} the digest was accepted")
            case history.Breach():
                self._broken(event.invariant, event.at_s, f"{event.where}: {event.detail}")
            case history.Rest():
                self._rest(event)
            case history.Promise():
                self._promise = event
            case history.Over():
                self._over(event)

    def _broken(self, invariant: str, at_s: float, detail: str) -> None:
        self.violations.append(Violation(invariant, at_s, detail))

    def _attempt(self, event: history.AttemptStarted) -> None:
        request = self._requests[event.request_id]
        if event.attempt != request.attempt + 1:
            self._broken("INV-11", event.at_s, f"{event.request_id}: attempt {event.attempt} after {request.attempt}")
        if request.ended is not None:
            self._broken("INV-4", event.at_s, f"{event.request_id}: an attempt after the end")
        request.attempt = event.attempt

    def _delivered(self, event: history.Delivered) -> None:
        name, request = event.request_id, self._requests[event.request_id]
        if request.ended is not None:
            self._broken("INV-4", event.at_s, f"{name}: token {event.index} after the end")
        if event.attempt != request.attempt:
            self._broken("INV-11", event.at_s, f"{name}: a token of attempt {event.attempt} during {request.attempt}")
        if event.index != len(request.tokens):
            self._broken("INV-3", event.at_s, f"{name}: token {event.index} where {len(request.tokens)} was due")
        request.tokens.append(event.token_id)
        if len(request.tokens) > request.submitted.max_tokens:
            self._broken("INV-6", event.at_s, f"{name}: more than {request.submitted.max_tokens} tokens")
        expected = request.submitted.expected
        if expected is not None and tuple(request.tokens) != expected[: len(request.tokens)]:
            self._broken("INV-5", event.at_s, f"{name}: token {event.index} is not the undisturbed run's")

    def _ended(self, event: history.Ended) -> None:
        name, request = event.request_id, self._requests[event.request_id]
        if request.ended is not None:
            self._broken("INV-4", event.at_s, f"{name}: ended {request.ended.outcome}, then {event.outcome}")
            return
        request.ended = event
        expected = request.submitted.expected
        if event.outcome in _GOOD and expected is not None and tuple(request.tokens) != expected:
            self._broken("INV-5", event.at_s, f"{name}: {event.outcome} after {len(request.tokens)} of {len(expected)}")
        if event.at_s > request.submitted.deadline_s + DEADLINE_SLACK_S:
            self._broken("INV-13", event.at_s, f"{name}: ended after its deadline")
        if event.outcome == "error" and not event.code:
            self._broken("INV-4", event.at_s, f"{name}: an error without a name")
        promise = self._promise
        if promise is not None and event.outcome == "error":
            self._broken("INV-17", event.at_s, f"{name}: {event.code}, although a healthy pair was there")

    def _ledger(self, invariant: str, event: history.Ledger | history.Rest) -> None:
        counts = event.by_state.values()
        if sum(counts) != event.num_blocks or any(count < 0 for count in counts):
            self._broken(invariant, event.at_s, f"{event.worker}: {event.by_state} of {event.num_blocks} blocks")

    def _landed(self, event: history.Landed) -> None:
        if not event.is_granted:
            self._broken("INV-9", event.at_s, f"{event.worker}: {event.transfer_id} wrote outside of its grant")
        if not event.is_right and not event.is_tainted:
            self._broken("INV-7", event.at_s, f"{event.worker}: {event.transfer_id}: wrong bytes were verified")

    def _rest(self, event: history.Rest) -> None:
        self._ledger("INV-1", event)
        where = event.worker
        left = {state: count for state, count in event.by_state.items() if count and state not in _RESTING}
        if left:
            self._broken("INV-2", event.at_s, f"{where}: blocks did not return: {left}")
        sequences = {state: count for state, count in event.sequences.items() if count}
        if sequences:
            self._broken("INV-2", event.at_s, f"{where}: sequences are left: {sequences}")
        if event.open_transfers or event.handing_over or event.taking_over:
            self._broken(
                "INV-2",
                event.at_s,
                f"{where}: {event.open_transfers} transfers are open, {event.handing_over} are handed over and "
                f"{event.taking_over} taken over",
            )
        if event.wrong_cached_blocks:
            self._broken("INV-8", event.at_s, f"{where}: {event.wrong_cached_blocks} cached blocks hold other KV")

    def _over(self, event: history.Over) -> None:
        for name, request in self._requests.items():
            submitted = request.submitted
            if request.ended is None:
                self._broken("INV-4", event.at_s, f"{name}: no outcome")
            elif self._promise is not None:
                began_s = max(submitted.at_s, self._promise.at_s)
                if request.ended.outcome in _GOOD and request.ended.at_s > began_s + self._promise.within_s:
                    self._broken("INV-17", event.at_s, f"{name}: took {request.ended.at_s - began_s:.1f} s")


def check(events: Iterable[Event]) -> list[Violation]:
    """Everything that is wrong with a history."""
    checker = Checker()
    for event in events:
        checker.feed(event)
    return checker.violations
