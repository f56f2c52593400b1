"""The ranks of one worker: the leader tells every follower everything in one order (plans and transfer commands).

One order means that a follower knows a transfer before it runs the first step whose KV belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from baton.kv_layout import DeviceMemory
from baton.request import AttemptId
from engine.plan_codec import encode_plan
from engine.types import Collected, Launched, OverlappingRunner, Runner, Sampled, StepHook, StepPlan
from kvtransfer.api import SendRequest, TransferEndpoint, TransferId
from worker import codec
from worker.channel import Channel, endpoint
from worker.hook import TransferHook


class Group:
    """Leader's side. Applies each transfer command to its own endpoint and sends it to every follower."""

    def __init__(
        self, context: zmq.Context[Any], worker_dir: str, tp_size: int, transfers: TransferEndpoint, hook: TransferHook
    ) -> None:
        self.followers = [
            Channel(context, endpoint(worker_dir, f"rank{rank}"), bind=True) for rank in range(1, tp_size)
        ]
        self._transfers = transfers
        self._hook = hook

    def tell(self, *message: Any) -> None:
        """One message to every follower."""
        for follower in self.followers:
            follower.send(message)

    def open_send(self, attempt_id: AttemptId, request: SendRequest) -> None:
        """Every rank connects to its peers and announces the attempt's KV from its next step on."""
        self.tell(
            "open_send",
            attempt_id,
            request.transfer_id,
            codec.pack_peer(request.peer),
            request.num_tokens,
            list(request.block_table),
        )
        self._hook.open(attempt_id, request.transfer_id)
        self._transfers.open_send(request)

    def written(self, transfer_id: TransferId, num_tokens: int) -> None:
        """KV that earlier steps wrote, for a transfer that was opened after them."""
        self.tell("written", transfer_id, num_tokens)
        self._transfers.written(transfer_id, None, num_tokens, self._hook.last_ready)

    def finish(self, transfer_id: TransferId, manifest: bytes) -> None:
        """All tokens are computed; only the leaders speak of it."""
        self._transfers.finish(transfer_id, manifest)

    def refuse(self, transfer_id: TransferId, code: str, message: str) -> None:
        """No room; only the leaders speak of it."""
        self._transfers.refuse(transfer_id, code, message)

    def close_send(self, attempt_id: AttemptId, transfer_id: TransferId) -> None:
        """The peer has everything."""
        self._hook.close(attempt_id)
        self.tell("close_send", attempt_id, transfer_id)
        self._transfers.close_send(transfer_id)

    def grant(self, transfer_id: TransferId, block_table: tuple[int, ...], num_tokens: int, first_token: int) -> None:
        """Every rank lets the peer write into these blocks."""
        self.tell("grant", transfer_id, list(block_table), num_tokens, first_token)
        self._transfers.grant(transfer_id, block_table, num_tokens, first_token)

    def complete(self, transfer_id: TransferId) -> None:
        """Every rank has everything."""
        self.tell("close_receive", transfer_id)
        self._transfers.complete(transfer_id)

    def abort(self, attempt_id: AttemptId, transfer_id: TransferId, reason: str) -> None:
        """Every rank stops; each answers Quiesced (or had said Failed)."""
        self._hook.close(attempt_id)
        self.tell("abort", attempt_id, transfer_id, reason)
        self._transfers.abort(transfer_id, reason)

    def close(self) -> None:
        """Free the sockets."""
        for follower in self.followers:
            follower.close()


class GroupRunner:
    """The leader's runner with its followers behind it: the plan goes out, then the leader computes its part.

    Without followers its steps may overlap, where `overlapping` is the same runner as one that can.
    """

    def __init__(self, runner: Runner, group: Group, overlapping: OverlappingRunner | None = None) -> None:
        self._runner = runner
        self._group = group
        self._overlapping = overlapping
        self.layout = runner.layout
        self.before_step: Callable[[StepPlan], None] = lambda plan: None

    def kv_buffer(self) -> memoryview | DeviceMemory:
        """The leader's own pool."""
        return self._runner.kv_buffer()

    def kv_fd(self) -> int | None:
        """The leader's own pool."""
        return self._runner.kv_fd()

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Run one step on every rank."""
        self.before_step(plan)
        if self._group.followers:
            self._group.tell("plan", encode_plan(plan, for_followers=True))
        return self._runner.run(plan, hook)

    def launch(self, plan: StepPlan, hook: StepHook | None = None) -> Launched:
        """See OverlappingRunner."""
        assert self._overlapping is not None
        assert not self._group.followers
        self.before_step(plan)
        return self._overlapping.launch(plan, hook)

    def collect(self, launched: Launched) -> Collected:
        """See OverlappingRunner."""
        assert self._overlapping is not None
        return self._overlapping.collect(launched)

    def close(self) -> None:
        """Free the leader's pool."""
        self._runner.close()
