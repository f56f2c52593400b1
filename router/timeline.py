"""What happened to a request and when: moments from router and workers, and the waterfall made of them.

All moments are seconds on the router's clock. Knows no protocol: the fleet maps worker clocks before it calls.
"""

from __future__ import annotations

import logging
import statistics
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("router")


@dataclass(slots=True)
class AttemptRecord:
    """One attempt: who worked on it, what they measured, and what came of it."""

    prefill_worker: str
    """Empty: the decode worker did it all."""
    decode_worker: str
    placed: float
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    """Worker id -> moment name -> time."""
    num_tokens: int = 0
    """Delivered to the client."""
    num_reused_tokens: int = 0
    """Prompt tokens whose KV the decode worker had already, so that it was not sent."""
    kv_bytes: int = 0
    transport: str = ""
    clock_error_s: float = 0.0
    """How far apart moments of different processes may really be: 0 if they share the router's clock."""
    failure: str = ""
    """The code of the error that ended it."""

    @property
    def start_worker(self) -> str:
        """Who computed the prompt."""
        return self.prefill_worker or self.decode_worker

    def worker_moments(
        self,
        worker_id: str,
        moments: Mapping[str, float],
        kv_bytes: int,
        transport: str,
        num_cached_tokens: int,
        clock_error_s: float = 0.0,
    ) -> None:
        """What one of its workers measured, on the router's clock give or take `clock_error_s`."""
        self.clock_error_s = max(self.clock_error_s, clock_error_s)
        self.moments.setdefault(worker_id, {}).update(moments)
        self.kv_bytes = max(self.kv_bytes, kv_bytes)
        self.transport = self.transport or transport
        if self.prefill_worker and worker_id == self.decode_worker:
            self.num_reused_tokens = num_cached_tokens


_NO_ATTEMPT = AttemptRecord("", "", 0.0)


@dataclass(slots=True)
class Timeline:
    """One request (one sample of it) from arrival to end. Written by its own task and by the fleet's readers."""

    request_id: str
    arrived: float
    tenant: str = "default"
    client_request_id: str = ""
    endpoint: str = ""
    num_prompt_tokens: int = 0
    max_tokens: int = 0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    intervals: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between consecutive tokens."""
    gaps: list[int] = field(default_factory=list)
    """Indices of the intervals in which one attempt failed and another one took over."""
    attempts: list[AttemptRecord] = field(default_factory=list)

    @property
    def told_attempt(self) -> int:
        """The number, from 1 on, of the attempt whose phases are told: it gave the first token. Without one: the last."""
        numbers = (number for number, attempt in enumerate(self.attempts, 1) if attempt.num_tokens)
        return next(numbers, len(self.attempts))

    @property
    def told(self) -> AttemptRecord:
        """That attempt."""
        return self.attempts[self.told_attempt - 1] if self.attempts else _NO_ATTEMPT

    @property
    def last(self) -> AttemptRecord:
        """The attempt that finished the request, or failed last."""
        return self.attempts[-1] if self.attempts else _NO_ATTEMPT

    def attempt(self, prefill: str, decode: str, now: float) -> AttemptRecord:
        """A new attempt was placed; tokens are its own from here on."""
        self.attempts.append(AttemptRecord(prefill, decode, now))
        return self.attempts[-1]

    def tokens(self, now: float, count: int, num_cached_tokens: int) -> None:
        """`count` tokens were delivered at once; the first of all says what was cached."""
        attempt = self.attempts[-1]
        if self.last_token is None:
            self.first_token = now
            self.num_cached_tokens = num_cached_tokens
        else:
            if not attempt.num_tokens:
                self.gaps.append(len(self.intervals))
            self.intervals.append(now - self.last_token)
        self.intervals.extend([0.0] * (count - 1))
        self.last_token = now
        self.num_tokens += count
        attempt.num_tokens += count

    def waterfall(self) -> dict[str, Any]:
        """The measured parts, in ms; None where a part did not happen or nobody measured it.

        `route`, `queue`, `prefill`, `transfer` and `handover` are of the attempt that gave the first token.
        `transfer` = from the first KV byte that the decode side takes, or from the first token sampled if that is
        earlier (then the wait for the first byte belongs to it), until that side is runnable: all ranks hold every
        byte, verified, and the manifest. `transfer_exposed` = its part after the first token was sampled, at least 0;
        `transfer_hidden` = the rest of it, which the prefill covered.
        `step` = the median gap between tokens after the second; `handover` = gap between tokens 1 and 2, minus that.
        `failover` = time lost to attempts that failed: from the first placement to that of the attempt that gave the
        first token (`failover_ttft`), and every gap from the last token of one attempt to the first of another.
        `decode`, `step` and `tpot` leave these gaps out; `ttft` and `total` are what the client saw.
        """
        told = self.told
        start, decode = told.moments.get(told.start_worker, {}), told.moments.get(told.decode_worker, {})
        begun, ended = start.get("prefill_begin"), start.get("prefill_end")
        parts: dict[str, float | None] = {
            "route": None,
            "queue": None,
            "prefill": _gap(begun, ended),
            "transfer": None,
            "transfer_hidden": None,
            "transfer_exposed": None,
            "handover": None,
            "failover": None,
            "failover_ttft": None,
            "decode": None,
            "ttft": _gap(self.arrived, self.first_token),
            "tpot": None,
            "step": None,
            "total": _gap(self.arrived, self.finished),
        }
        lost_in_stream = sum(self.intervals[index] for index in self.gaps)
        if self.attempts:
            received = start.get("received", told.placed)
            parts["queue"] = _gap(received, begun)
            parts["route"] = max(0.0, self.attempts[0].placed - self.arrived) + max(0.0, received - told.placed)
        if len(self.attempts) > 1:
            lost_before = told.placed - self.attempts[0].placed
            parts["failover_ttft"] = lost_before
            parts["failover"] = lost_before + lost_in_stream + self._lost_at_end()
        if self.first_token is not None and self.last_token is not None:
            parts["decode"] = self.last_token - self.first_token - lost_in_stream
        if told.prefill_worker and ended is not None and "runnable" in decode:
            exposed = max(0.0, decode["runnable"] - ended)
            parts["transfer_exposed"] = exposed
            if "kv_begin" in decode:
                hidden = max(0.0, min(ended, decode["runnable"]) - decode["kv_begin"])
                parts["transfer"], parts["transfer_hidden"] = hidden + exposed, hidden
        if steps := self._steps(0):
            parts["tpot"] = sum(steps) / len(steps)
            if later := self._steps(1):
                parts["step"] = statistics.median(later)
            if told.prefill_worker and 0 not in self.gaps:
                parts["handover"] = max(0.0, self.intervals[0] - (parts["step"] or 0.0))
        return {f"{name}_ms": None if value is None else round(value * 1e3, 3) for name, value in parts.items()}

    def summary(self) -> dict[str, Any]:
        """The fields of the log line: the workers of the last attempt, and what was measured of `told`."""
        told, last = self.told, self.last
        return {
            "request_id": self.request_id,
            "x_request_id": self.client_request_id,
            "endpoint": self.endpoint,
            "tenant": self.tenant,
            "finish_reason": self.finish_reason,
            **({"error": self.error} if self.error else {}),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_reused_tokens": told.num_reused_tokens,
            "num_tokens": self.num_tokens,
            "attempts": len(self.attempts),
            "prefill_worker": last.start_worker,
            "decode_worker": last.decode_worker,
            "transport": told.transport,
            "kv_bytes": told.kv_bytes,
            "clock_error_ms": round(told.clock_error_s * 1e3, 3),
            **self.waterfall(),
        }

    def trace(self) -> dict[str, Any]:
        """The summary and every moment, in ms since arrival: what `baton trace` shows.

        `every_attempt` has, in order, the workers of each, what went between them, what they measured, how many tokens
        it gave and why it failed. Workers tell what they measured when the first token or the KV is there: an attempt
        that failed before has the router's `placed` alone. `moments_ms` has the router's moments and those of the
        workers of `told_attempt`, whose phases the summary tells.
        """
        own: dict[str, float | None] = {
            "arrived": self.arrived,
            "admitted": self.admitted,
            "placed": self.told.placed if self.attempts else None,
            "first_token": self.first_token,
            "last_token": self.last_token,
            "finished": self.finished,
        }
        every_attempt = [
            {
                "prefill_worker": attempt.start_worker,
                "decode_worker": attempt.decode_worker,
                "num_tokens": attempt.num_tokens,
                "failure": attempt.failure,
                "transport": attempt.transport,
                "kv_bytes": attempt.kv_bytes,
                "moments_ms": self._in_ms({"router": {"placed": attempt.placed}, **attempt.moments}),
            }
            for attempt in self.attempts
        ]
        return {
            **self.summary(),
            "told_attempt": self.told_attempt,
            "moments_ms": self._in_ms({"router": own, **self.told.moments}),
            "every_attempt": every_attempt,
        }

    def _steps(self, begin: int) -> Sequence[float]:
        """The intervals from that one on, but for fail-overs."""
        if not self.gaps:
            return self.intervals[begin:]
        return [value for index, value in enumerate(self.intervals) if index >= begin and index not in self.gaps]

    def _lost_at_end(self) -> float:
        """From the last token to the end, if whoever was to go on gave nothing."""
        if self.attempts[-1].num_tokens or self.last_token is None:
            return 0.0
        return _gap(self.last_token, self.finished) or 0.0

    def _in_ms(self, tracks: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
        """Since arrival, in order of time; without those that did not happen."""
        return {
            track: {
                name: round((at - self.arrived) * 1e3, 3)
                for name, at in sorted(moments.items(), key=lambda item: item[1] or 0.0)
                if at is not None
            }
            for track, moments in tracks.items()
        }


class TimelineBook:
    """Ends timelines: one log line each, a bounded ring of the latest for `baton trace`. Event loop only."""

    def __init__(self, capacity: int, on_finished: Callable[[Timeline], None]) -> None:
        """`on_finished` sees each timeline once, when it is complete (metrics)."""
        self._capacity = capacity
        self._on_finished = on_finished
        self._ring: OrderedDict[str, Timeline] = OrderedDict()
        self._by_client_id: dict[str, str] = {}
        self._expected: dict[str, Callable[[], None]] = {}

    def expect(self, timeline: Timeline, hurry: Callable[[], None]) -> None:
        """A finished request whose workers may still speak; `hurry` makes it be added at once."""
        self._expected[timeline.request_id] = hurry

    def add(self, timeline: Timeline) -> None:
        """A request is over and its timeline complete."""
        self._expected.pop(timeline.request_id, None)
        self._ring[timeline.request_id] = timeline
        if timeline.client_request_id:
            self._by_client_id[timeline.client_request_id] = timeline.request_id
        while len(self._ring) > self._capacity:
            _, old = self._ring.popitem(last=False)
            if self._by_client_id.get(old.client_request_id) == old.request_id:
                del self._by_client_id[old.client_request_id]
        logger.info("request finished", extra=timeline.summary())
        self._on_finished(timeline)

    def flush(self) -> None:
        """Add what is expected as it is: the process ends."""
        for hurry in list(self._expected.values()):
            hurry()

    def trace(self, request_id: str) -> dict[str, Any] | None:
        """By our id or by the client's x-request-id; None if it is not (any longer) known."""
        timeline = self._ring.get(self._by_client_id.get(request_id, request_id))
        return None if timeline is None else timeline.trace()

    def latest(self, count: int = 100) -> list[dict[str, Any]]:
        """The newest first."""
        newest: Iterable[Timeline] = reversed(self._ring.values())
        return [
            {"request_id": t.request_id, "finish_reason": t.finish_reason, **t.waterfall()}
            for t, _ in zip(newest, range(count), strict=False)
        ]


def _gap(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)
