"""What became of one request, as its client saw it. The only thing that clients hand over; metrics are made of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

SHORT_ANSWER = "short_answer"
"""A failure that no client sees: the answer ended well, but with fewer tokens than were asked for."""


@dataclass(slots=True)
class Outcome:
    """Times are monotonic seconds of the client's clock (after merging: of the coordinator's).

    Latency counts from `scheduled`, whatever the harness or the connection did since.
    """

    index: int
    scheduled: float
    written: float | None = None
    """When the request had been handed to its socket; None if it never was."""
    connect_s: float = 0.0
    """Time spent on a new connection: the server's and the network's, so no lag of the harness."""
    times: array[float] = field(default_factory=lambda: array("d"))
    """When each event that carried tokens came."""
    counts: array[int] = field(default_factory=lambda: array("l"))
    """Tokens in each of these events."""
    ended: float | None = None
    failure: str = ""
    """Empty, or the kind: connect, reset, timeout, http_429 (any status), truncated, stream_error, bad_response,
    grpc_unavailable (any gRPC status), short_answer."""
    detail: str = ""
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    """As the server's usage says; where it is silent, as counted from events."""

    def tokens(self, now: float, count: int) -> None:
        """An event brought `count` tokens."""
        self.times.append(now)
        self.counts.append(count)

    def fail(self, kind: str, detail: str = "") -> None:
        """The first failure stays."""
        if not self.failure:
            self.failure, self.detail = kind, detail[:300]

    @property
    def lag_s(self) -> float | None:
        """The harness's own delay: scheduled to written, without the time that a connection took."""
        return None if self.written is None else self.written - self.scheduled - self.connect_s

    def to_json(self) -> list[Any]:
        """As an agent sends it: times as whole microseconds, each from the one before."""
        deltas, before = [], self.scheduled
        for moment in self.times:
            deltas.append(round((moment - before) * 1e6))
            before += deltas[-1] / 1e6
        counts = None if all(count == 1 for count in self.counts) else list(self.counts)
        numbers = [self.num_prompt_tokens, self.num_cached_tokens, self.num_output_tokens]
        moments = [self.scheduled, self.written, self.connect_s, self.ended]
        return [self.index, moments, deltas, counts, self.failure, self.detail, self.finish_reason, numbers]

    @staticmethod
    def from_json(value: list[Any], offset_s: float = 0.0) -> Outcome:
        """The reverse; `offset_s` is added to every time."""
        index, (scheduled, written, connect_s, ended), deltas, counts, failure, detail, reason, numbers = value
        times = array("d")
        at = scheduled + offset_s
        for delta in deltas:
            at += delta / 1e6
            times.append(at)
        return Outcome(
            index,
            scheduled + offset_s,
            None if written is None else written + offset_s,
            connect_s,
            times,
            array("l", counts if counts is not None else [1] * len(times)),
            None if ended is None else ended + offset_s,
            failure,
            detail,
            reason,
            *numbers,
        )
