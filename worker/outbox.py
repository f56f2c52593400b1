"""What the leader has to say to its front, gathered per router and sent as one message per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.request import AttemptId, TokenEvent
from worker import codec
from worker.channel import Channel


class Outbox:
    """Engine thread only. `flush` sends at most one message; nothing is sent before it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pending: dict[str, list[list[Any]]] = {}

    def token(self, router_id: str, event: TokenEvent) -> None:
        """One generated token."""
        self._add(router_id, ["token", codec.pack_token(event)])

    def failed(
        self, router_id: str, attempt_id: AttemptId, code: str, message: str, retry_after_s: float = 0.0
    ) -> None:
        """The attempt is over here."""
        self._add(router_id, ["failed", attempt_id, code, message, retry_after_s])

    def refused(self, router_id: str, attempt_id: AttemptId, worker_id: str, code: str, message: str) -> None:
        """The decode worker has no room; the KV stays pinned here."""
        self._add(router_id, ["refused", attempt_id, worker_id, code, message])

    def timeline(
        self,
        router_id: str,
        attempt_id: AttemptId,
        moments: Mapping[str, float],
        num_cached_tokens: int,
        kv_bytes: int = 0,
        transport: str = "",
    ) -> None:
        """The attempt's moments as this worker measured them, seconds on its monotonic clock."""
        self._add(router_id, ["timeline", attempt_id, dict(moments), kv_bytes, transport, num_cached_tokens])

    def flush(self) -> None:
        """Send what has gathered."""
        if self._pending:
            self._channel.send(["events", self._pending])
            self._pending = {}

    def _add(self, router_id: str, item: list[Any]) -> None:
        self._pending.setdefault(router_id, []).append(item)
