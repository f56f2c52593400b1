"""The engine thread of a worker's rank 0: commands in, steps, events out. It owns sequences and the block ledger."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import Any, Final

import zmq

from baton.clock import Clock
from baton.errors import ServeError
from baton.request import AttemptId, GenerateRequest
from engine.types import Engine, StepPlan
from kvtransfer.api import EndpointStats, TransferEndpoint
from worker import codec, events
from worker.channel import Channel
from worker.group import Group
from worker.hook import TransferHook
from worker.outbox import Outbox
from worker.receiving import ReceivingSide
from worker.role import RolePolicy
from worker.sending import SendingSide

log = logging.getLogger(__name__)

_MAX_ABORTED: Final = 4096
_TICK_S: Final = 0.2
_FOLLOWER_SILENT_S: Final = 1.5


class Leader:
    """One loop: everything that changes a sequence or a block happens in `turn`, in the order it arrived."""

    def __init__(
        self,
        engine: Engine,
        transfers: TransferEndpoint,
        group: Group,
        hook: TransferHook,
        front: Channel,
        role: RolePolicy,
        clock: Clock,
        *,
        tp_size: int,
    ) -> None:
        self._engine = engine
        self._transfers = transfers
        self._group = group
        self._hook = hook
        self._front = front
        self._role = role
        self._clock = clock
        self._outbox = Outbox(front)
        self._sending = SendingSide(engine, group, self._outbox, clock, tp_size, role.hold_s)
        self._receiving = ReceivingSide(
            engine,
            group,
            self._outbox,
            clock,
            tp_size,
            admit=self._why_not_receive,
            joined=self._admitted,
            transport_of=self._transport_of,
        )
        self._running: dict[AttemptId, str] = {}  # decoding or prefilling here; whose
        self._local_moments: dict[AttemptId, dict[str, float]] = {}
        self._deadlines: dict[AttemptId, float] = {}
        self._routers: set[str] = set()
        self._aborted: OrderedDict[AttemptId, None] = OrderedDict()
        self._draining = False
        self._last_tick = -1e9
        self._follower_stats: dict[int, EndpointStats] = {}
        self._asked: dict[int, float] = {}
        """Follower rank -> since when a report of it is due."""

    def before_step(self, plan: StepPlan) -> None:
        """Called with each plan before any rank computes it."""
        self._sending.before_step(plan)

    def on_layer(self) -> None:
        """A sign of life during a long step."""
        if self._clock.now() - self._last_tick > _TICK_S:
            self._tick()

    def run(self, stop_fd: int, wake_fd: int) -> None:
        """Serve until `stop_fd` becomes readable."""
        poller = zmq.Poller()
        poller.register(self._front.socket, zmq.POLLIN)
        for follower in self._group.followers:
            poller.register(follower.socket, zmq.POLLIN)
        poller.register(stop_fd, zmq.POLLIN)
        poller.register(wake_fd, zmq.POLLIN)
        while True:
            timeout_ms = 0 if self._engine.has_work() else int(_TICK_S * 1000)
            ready = dict(poller.poll(timeout_ms))
            if stop_fd in ready:
                return
            if wake_fd in ready:
                os.read(wake_fd, 4096)
            self.turn()

    def turn(self) -> None:
        """Everything that waits, then one step, then one message to the front."""
        for message in self._front.drain():
            self._on_command(message)
        for rank, follower in enumerate(self._group.followers, start=1):
            for kind, packed in follower.drain():
                self._asked.pop(rank, None)
                if kind == "stats":
                    self._follower_stats[rank] = EndpointStats(**packed)
                else:
                    self._on_transfer_event(rank, events.unpack_event(packed))
        for event in self._transfers.poll():
            self._on_transfer_event(0, event)
        if self._engine.has_work():
            self._step()
        if self._clock.now() - self._last_tick > _TICK_S:
            if self._followers_answer():
                self._tick()
            self._sending.expire()
            self._expire_deadlines()
        self._outbox.flush()

    def _followers_answer(self) -> bool:
        """Ask every follower for a sign of life; False if one owes us the last one.

        Where no step runs, nothing else shows that a rank stands still, and its transfers would hold blocks for good.
        """
        now = self._clock.now()
        self._last_tick = now
        for rank, follower in enumerate(self._group.followers, start=1):
            if rank not in self._asked:
                self._asked[rank] = now
                follower.send(["report"])
        return all(now - asked < _FOLLOWER_SILENT_S for asked in self._asked.values())

    def _step(self) -> None:
        began = self._clock.now()
        result = self._engine.step(self._hook)
        for attempt_id in result.prefill_started:
            if (moments := self._local_moments.get(attempt_id)) is not None:
                moments["prefill_begin"] = began
        for attempt_id in result.failed:
            log.error("logits are not finite", extra={"attempt_id": attempt_id})
            if (router_id := self._running.get(attempt_id)) is not None:
                self._outbox.failed(router_id, attempt_id, "internal_error", "the model's output is not finite")
            self._abort(attempt_id, "the model's output is not finite")
        for event in result.events:
            attempt_id = event.attempt_id
            router_id = self._running.get(attempt_id)
            if router_id is None:
                continue
            self._outbox.token(router_id, event)
            moments = self._local_moments.pop(attempt_id, None)
            if moments is not None:
                moments["prefill_end"] = self._clock.now()
                self._outbox.timeline(router_id, attempt_id, moments, event.num_cached_tokens)
            if attempt_id in self._sending:
                self._sending.prefilled(event)
                self._forget(attempt_id)
            elif event.finish_reason is not None:
                self._forget(attempt_id)

    def _on_command(self, message: list[Any]) -> None:
        match message:
            case ["start", router_id, packed, peer]:
                self._start(router_id, codec.unpack_request(packed), peer)
            case ["abort", attempt_id]:
                self._abort(AttemptId(attempt_id), "aborted by the router")
            case ["redirect", attempt_id, peer]:
                self._sending.redirect(AttemptId(attempt_id), codec.unpack_peer(peer))
            case ["router_here", router_id]:
                self._routers.add(router_id)
            case ["router_gone", router_id]:
                self._router_gone(router_id)
            case ["drain"]:
                self._draining = True
            case ["status", query_id]:
                self._front.send(["status", query_id, self.status()])
            case _:
                raise AssertionError(f"unknown command {message[:1]}")

    def _start(self, router_id: str, request: GenerateRequest, peer: list[Any] | None) -> None:
        attempt_id = request.attempt_id
        try:
            if attempt_id in self._running:
                raise ServeError(f"attempt {attempt_id} was started twice")
            if (reason := self._why_not(router_id, attempt_id)) is not None:
                self._outbox.failed(router_id, attempt_id, "unavailable", reason)
                return
            if peer is None:
                self._engine.add(request)
                self._local_moments[attempt_id] = {"received": self._clock.now()}
            else:
                self._sending.start(router_id, request, codec.unpack_peer(peer))
        except ServeError as error:
            retry_after_s = getattr(error, "retry_after_s", 0.0)
            self._outbox.failed(router_id, attempt_id, error.code, error.message, retry_after_s)
            return
        self._admitted(router_id, request)

    def _admitted(self, router_id: str, request: GenerateRequest) -> None:
        self._running[request.attempt_id] = router_id
        if request.deadline_s is not None:
            self._deadlines[request.attempt_id] = self._clock.now() + request.deadline_s

    def _why_not(self, router_id: str, attempt_id: AttemptId) -> str | None:
        if attempt_id in self._aborted:
            return "the attempt was aborted"
        if self._draining:
            return "the worker is draining"
        if router_id not in self._routers:
            return "the worker has no session with that router"
        return None

    def _why_not_receive(self, router_id: str, attempt_id: AttemptId) -> str | None:
        if not self._role.accepts_transfers:
            return f"a {self._role.name} worker takes no KV from others"
        return self._why_not(router_id, attempt_id)

    def _on_transfer_event(self, rank: int, event: object) -> None:
        if getattr(event, "integrity", False):
            log.error("received KV did not verify", extra={"detail": getattr(event, "reason", "")})
        if not self._sending.handle(rank, event):
            self._receiving.handle(rank, event)

    def _abort(self, attempt_id: AttemptId, reason: str) -> None:
        self._aborted[attempt_id] = None
        if len(self._aborted) > _MAX_ABORTED:
            self._aborted.popitem(last=False)
        self._forget(attempt_id)
        if attempt_id in self._sending:
            self._sending.abort(attempt_id, reason)
        elif not self._receiving.abort(attempt_id, reason):
            self._engine.abort(attempt_id)

    def _forget(self, attempt_id: AttemptId) -> None:
        self._running.pop(attempt_id, None)
        self._deadlines.pop(attempt_id, None)
        self._local_moments.pop(attempt_id, None)

    def _router_gone(self, router_id: str) -> None:
        self._routers.discard(router_id)
        running = [attempt for attempt, owner in self._running.items() if owner == router_id]
        handed = [*self._sending.attempts_of(router_id), *self._receiving.attempts_of(router_id)]
        for attempt_id in dict.fromkeys(running + handed):
            self._abort(attempt_id, "the router is gone")

    def _expire_deadlines(self) -> None:
        now = self._clock.now()
        for attempt_id in [attempt for attempt, deadline in self._deadlines.items() if deadline < now]:
            self._outbox.failed(
                self._running[attempt_id], attempt_id, "deadline_exceeded", "the request ran out of time on the worker"
            )
            self._abort(attempt_id, "deadline exceeded")

    def _transport_of(self, peer_worker_id: str) -> str:
        transports = self._transfers.stats().transports
        return next((name for peer, name in transports.items() if peer.startswith(peer_worker_id)), "")

    def _tick(self) -> None:
        self._last_tick = self._clock.now()
        stats = self._engine.stats()
        self._front.send(
            [
                "tick",
                self._hook.num_layers_done + stats.num_steps,
                stats.seqs_by_state.get("running", 0) + stats.seqs_by_state.get("receiving", 0),
                stats.seqs_by_state.get("waiting", 0),
                stats.blocks_by_state.get("free", 0) + stats.blocks_by_state.get("cached", 0),
            ]
        )

    def status(self) -> dict[str, dict[str, Any]]:
        """What GetStatus answers; transfers are summed over ranks."""
        stats = self._engine.stats()
        ranks = [self._transfers.stats(), *self._follower_stats.values()]
        return {
            "blocks": dict(stats.blocks_by_state),
            "sequences": dict(stats.seqs_by_state),
            "transfers": {
                "open_sends": sum(rank.open_sends for rank in ranks),
                "open_receives": sum(rank.open_receives for rank in ranks),
                "links": sum(rank.open_links for rank in ranks),
                "handing_over": len(self._sending),
                "taking_over": len(self._receiving),
            },
            "peers": {peer: name for rank in ranks for peer, name in rank.transports.items()},
            "counters": {
                "steps": stats.num_steps,
                "preemptions": stats.num_preemptions,
                "tokens_computed": stats.num_tokens_computed,
                "prefix_hit_tokens": stats.num_prefix_hit_tokens,
                "prefix_query_tokens": stats.num_prefix_query_tokens,
                "kv_bytes_sent": sum(rank.bytes_sent for rank in ranks),
                "kv_bytes_received": sum(rank.bytes_received for rank in ranks),
                "kv_frames_verified": sum(rank.frames_verified for rank in ranks),
                "kv_integrity_failures": sum(rank.integrity_failures for rank in ranks),
                "kv_stale_frames_dropped": sum(rank.stale_frames_dropped for rank in ranks),
            },
        }
