"""What operators ask: health, metrics, and, with the cluster's token, the state of every worker and request traces."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton import __version__
from baton.errors import ServeError, Unauthorized, WorkerLost
from protos import worker_pb2 as pb
from router.admission import Admission
from router.answer import Answers
from router.fleet import Fleet
from router.http import json_response
from router.metrics import CONTENT_TYPE, Metrics
from router.timeline import TimelineBook
from router.worker_link import WorkerLink

_STATUS_S: Final = 2.0  # a worker that takes longer is missing from that answer


class TraceNotFound(ServeError):
    """No such request is remembered."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    code = "trace_not_found"


class AdminDoor:
    """The handlers. Event loop only."""

    def __init__(
        self,
        *,
        router_id: str,
        token: str,
        answers: Answers,
        fleet: Fleet,
        book: TimelineBook,
        admission: Admission,
        metrics: Metrics,
        facts: dict[str, Any],
    ) -> None:
        """`token`: the whole `authorization` value that opens /internal. `facts`: static, shown in the status."""
        self._router_id = router_id
        self._token = token.encode()
        self._answers = answers
        self._fleet = fleet
        self._book = book
        self._admission = admission
        self._metrics = metrics
        self._facts = facts
        self._started = time.monotonic()

    def routes(self) -> list[Route]:
        """Paths and methods; Starlette answers HEAD wherever there is GET."""
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/live", self.live, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/internal/status", self.status, methods=["GET"]),
            Route("/internal/traces", self.traces, methods=["GET"]),
            Route("/internal/trace/{request_id}", self.trace, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        """GET /health: 503 until a request can be served."""
        self._answers.require_serving()
        return json_response({"status": "ok"})

    async def live(self, request: Request) -> Response:
        """GET /live: this process answers."""
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_scrape(link)) for link in self._fleet.links.values()]
        statuses = [status for task in tasks if (status := task.result()) is not None]
        return Response(self._metrics.render(statuses), headers={"content-type": CONTENT_TYPE})

    async def status(self, request: Request) -> Response:
        """GET /internal/status: the router's facts, and each worker's own account of itself."""
        self._authorize(request)
        links = list(self._fleet.links.values())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_worker_status(link)) for link in links]
        return json_response(
            {
                "router": {
                    "router_id": self._router_id,
                    "version": __version__,
                    "uptime_s": round(time.monotonic() - self._started, 3),
                    "serving": self._fleet.why_not_serving is None,
                    "why_not_serving": self._fleet.why_not_serving,
                    "requests_in_flight": self._admission.num_admitted,
                    "open_attempts": sum(link.num_open for link in links),
                    **self._facts,
                },
                "workers": [task.result() for task in tasks],
            }
        )

    async def traces(self, request: Request) -> Response:
        """GET /internal/traces: the newest finished requests."""
        self._authorize(request)
        return json_response({"traces": self._book.latest()})

    async def trace(self, request: Request) -> Response:
        """GET /internal/trace/{request_id}: one finished request's moments."""
        self._authorize(request)
        trace = self._book.trace(request.path_params["request_id"])
        if trace is None:
            raise TraceNotFound("No such request is remembered: it is unknown, unfinished or too long ago.")
        return json_response(trace)

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, self._token):
            raise Unauthorized("This path is for the cluster's own tools.")


async def _scrape(link: WorkerLink) -> pb.WorkerStatus | None:
    try:
        return await link.get_status(_STATUS_S)
    except WorkerLost:
        return None


async def _worker_status(link: WorkerLink) -> dict[str, Any]:
    """One worker, or why it does not answer."""
    status: dict[str, Any] = {"worker_id": link.worker_id, "address": link.address}
    try:
        answer = await link.get_status(_STATUS_S)
    except WorkerLost as error:
        return {**status, "reachable": False, "error": error.message}
    return {
        **status,
        "reachable": True,
        "incarnation": answer.incarnation,
        "role": answer.role,
        "tp_size": answer.tp_size,
        "draining": link.heartbeat.draining,
        "blocks": dict(answer.blocks),
        "sequences": dict(answer.sequences),
        "transfers": dict(answer.transfers),
        "peers": dict(answer.peers),
        "counters": dict(answer.counters),
        "num_sessions": answer.num_sessions,
        "pids": list(answer.pids),
        "uptime_s": answer.uptime_s,
    }
