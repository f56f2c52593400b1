"""What happened to a request and when: moments from router and workers, and the waterfall made of them.

All moments are seconds on the router's clock. Knows no protocol: the fleet maps worker clocks before it calls.
"""

from __future__ import annotations

import logging
import statistics
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("router")


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
    placed: float | None = None
    placed_again: float | None = None
    """The last attempt, if it is not the first: what its workers measured began then."""
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_reused_tokens: int = 0
    """Prompt tokens whose KV the decode worker had already, so that it was not sent."""
    num_attempts: int = 0
    finish_reason: str = ""
    error: str = ""
    intervals: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between consecutive tokens."""
    prefill_worker: str = ""
    decode_worker: str = ""
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the last attempt: worker id -> moment name -> time."""
    kv_bytes: int = 0
    transport: str = ""
    clock_error_s: float = 0.0
    """How far apart moments of different processes may really be: 0 if they share the router's clock."""

    def attempt(self, prefill: str, decode: str, now: float) -> None:
        """A new attempt was placed: what earlier ones' workers say no longer counts."""
        self.num_attempts += 1
        self.prefill_worker, self.decode_worker = prefill, decode
        self.moments, self.kv_bytes, self.transport, self.num_reused_tokens = {}, 0, "", 0
        self.clock_error_s = 0.0
        if self.placed is None:
            self.placed = now
        else:
            self.placed_again = now

    def tokens(self, now: float, count: int, num_cached_tokens: int) -> None:
        """`count` tokens were delivered at once; the first of an attempt says what was cached."""
        if self.last_token is None:
            self.first_token = now
            self.num_cached_tokens = num_cached_tokens
        else:
            self.intervals.append(now - self.last_token)
        self.intervals.extend([0.0] * (count - 1))
        self.last_token = now
        self.num_tokens += count

    def worker_moments(
        self,
        worker_id: str,
        moments: Mapping[str, float],
        kv_bytes: int,
        transport: str,
        num_cached_tokens: int,
        clock_error_s: float = 0.0,
    ) -> None:
        """What one worker of the last attempt measured, on the router's clock give or take `clock_error_s`."""
        self.clock_error_s = max(self.clock_error_s, clock_error_s)
        self.moments.setdefault(worker_id, {}).update(moments)
        self.kv_bytes = max(self.kv_bytes, kv_bytes)
        self.transport = self.transport or transport
        if self.prefill_worker and worker_id == self.decode_worker:
            self.num_reused_tokens = num_cached_tokens

    def waterfall(self) -> dict[str, Any]:
        """The measured parts, in ms; None where a part did not happen or nobody measured it.

        `transfer` = from the first KV byte that the decode side takes, or from the first token sampled if that is
        earlier (then the wait for the first byte belongs to it), until that side is runnable: all ranks hold every
        byte, verified, and the manifest. `transfer_exposed` = its part after the first token was sampled, at least 0;
        `transfer_hidden` = the rest of it, which the prefill covered.
        `step` = the median gap between tokens after the second; `handover` = gap between tokens 1 and 2, minus that.
        """
        start = self.moments.get(self.prefill_worker or self.decode_worker, {})
        decode = self.moments.get(self.decode_worker, {})
        begun, ended = start.get("prefill_begin"), start.get("prefill_end")
        parts: dict[str, float | None] = {
            "route": _gap(self.placed_again or self.arrived, start.get("received", self.placed)),
            "queue": _gap(start.get("received", self.placed), begun),
            "prefill": _gap(begun, ended),
            "transfer": None,
            "transfer_hidden": None,
            "transfer_exposed": None,
            "handover": None,
            "decode": _gap(self.first_token, self.last_token),
            "ttft": _gap(self.arrived, self.first_token),
            "tpot": None,
            "step": None,
            "total": _gap(self.arrived, self.finished),
        }
        if self.prefill_worker and ended is not None and "runnable" in decode:
            exposed = max(0.0, decode["runnable"] - ended)
            parts["transfer_exposed"] = exposed
            if "kv_begin" in decode:
                hidden = max(0.0, min(ended, decode["runnable"]) - decode["kv_begin"])
                parts["transfer"], parts["transfer_hidden"] = hidden + exposed, hidden
        if self.intervals:
            parts["tpot"] = sum(self.intervals) / len(self.intervals)
            if len(self.intervals) > 1:
                parts["step"] = statistics.median(self.intervals[1:])
            if self.prefill_worker:
                parts["handover"] = max(0.0, self.intervals[0] - (parts["step"] or 0.0))
        return {f"{name}_ms": None if value is None else round(value * 1e3, 3) for name, value in parts.items()}

    def summary(self) -> dict[str, Any]:
        """The fields of the log line."""
        return {
            "request_id": self.request_id,
            "x_request_id": self.client_request_id,
            "endpoint": self.endpoint,
            "tenant": self.tenant,
            "finish_reason": self.finish_reason,
            **({"error": self.error} if self.error else {}),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_reused_tokens": self.num_reused_tokens,
            "num_tokens": self.num_tokens,
            "attempts": self.num_attempts,
            "prefill_worker": self.prefill_worker or self.decode_worker,
            "decode_worker": self.decode_worker,
            "transport": self.transport,
            "kv_bytes": self.kv_bytes,
            "clock_error_ms": round(self.clock_error_s * 1e3, 3),
            **self.waterfall(),
        }

    def trace(self) -> dict[str, Any]:
        """The summary and every moment, in ms since arrival: what `baton trace` shows."""
        own: dict[str, float | None] = {
            "arrived": self.arrived,
            "admitted": self.admitted,
            "placed": self.placed,
            "placed_again": self.placed_again,
            "first_token": self.first_token,
            "last_token": self.last_token,
            "finished": self.finished,
        }
        tracks: dict[str, Mapping[str, float | None]] = {"router": own, **self.moments}
        return {
            **self.summary(),
            "moments_ms": {
                track: {
                    name: round((at - self.arrived) * 1e3, 3)
                    for name, at in sorted(moments.items(), key=lambda item: item[1] or 0.0)
                    if at is not None
                }
                for track, moments in tracks.items()
            },
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
