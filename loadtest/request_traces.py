"""Baton's own measured timeline of requests, asked for by the ids that our clients gave them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from loadtest.coordinator import Load
from loadtest.metrics import Window

_REMEMBERED: Final = 800  # requests: a router keeps 1,000 by default (router.trace_capacity)
_WANTED: Final = 200
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class RequestTraces:
    """A Baton server that answers `token`, the whole `authorization` value of its internal paths."""

    url: str
    token: str

    def of(self, load: Load, window: Window) -> list[dict[str, Any]]:
        """Up to 200 of the measured requests that the router still remembers, evenly chosen. Blocks.

        Fewer, or none, if it has forgotten them or does not answer: a load test does not fail for want of traces.
        """
        measured = [
            outcome.index
            for outcome in load.outcomes[-_REMEMBERED:]
            if not outcome.failure and window.begin_s <= outcome.scheduled - load.start < window.end_s
        ]
        chosen = measured[:: max(1, -(-len(measured) // _WANTED))]
        return self._fetch([f"{load.run_id}-{index}" for index in chosen])

    def _fetch(self, request_ids: Sequence[str]) -> list[dict[str, Any]]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
        traces = []
        try:
            for request_id in request_ids:
                connection.request("GET", f"/internal/trace/{request_id}", headers={"authorization": self.token})
                response = connection.getresponse()
                data = response.read()
                if response.status == 200:
                    traces.append(json.loads(data))
        except (OSError, http.client.HTTPException, ValueError):
            return traces
        finally:
            connection.close()
        return traces
