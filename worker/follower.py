"""The engine thread of ranks 1..n-1: does what the leader says, in the order it says it."""

from __future__ import annotations

import os
from typing import Any

import zmq

from baton.request import AttemptId
from engine.plan_codec import decode_plan
from engine.types import Runner
from kvtransfer.api import SendRequest, TransferEndpoint, TransferId
from worker import codec, events
from worker.channel import Channel
from worker.hook import TransferHook


class Follower:
    """Owns no ledger: block ids come from the leader and are the same on every rank."""

    def __init__(self, runner: Runner, transfers: TransferEndpoint, hook: TransferHook, leader: Channel) -> None:
        self._runner = runner
        self._transfers = transfers
        self._hook = hook
        self._leader = leader

    def run(self, stop_fd: int, wake_fd: int) -> None:
        """Serve until `stop_fd` becomes readable."""
        poller = zmq.Poller()
        for waitable in (self._leader.socket, stop_fd, wake_fd):
            poller.register(waitable, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if stop_fd in ready:
                return
            if wake_fd in ready:
                os.read(wake_fd, 4096)
            self.turn()

    def turn(self) -> None:
        """Everything that waits, then a report, which is also the sign of life that the leader asks for."""
        for message in self._leader.drain():
            self._on_message(message)
            self._report()
        self._report()
        self._leader.send(["stats", events.pack_stats(self._transfers.stats())])

    def _report(self) -> None:
        for event in self._transfers.poll():
            self._leader.send(["event", events.pack_event(event)])

    def _on_message(self, message: list[Any]) -> None:
        match message:
            case ["plan", encoded]:
                self._runner.run(decode_plan(encoded), self._hook)
            case ["open_send", attempt_id, transfer_id, peer, num_tokens, block_table]:
                self._hook.open(AttemptId(attempt_id), TransferId(transfer_id))
                self._transfers.open_send(
                    SendRequest(TransferId(transfer_id), codec.unpack_peer(peer), num_tokens, tuple(block_table))
                )
            case ["written", transfer_id, num_tokens]:
                self._transfers.written(TransferId(transfer_id), None, num_tokens)
            case ["close_send", attempt_id, transfer_id]:
                self._hook.close(AttemptId(attempt_id))
                self._transfers.close_send(TransferId(transfer_id))
            case ["grant", transfer_id, block_table, num_tokens, first_token]:
                self._transfers.grant(TransferId(transfer_id), tuple(block_table), num_tokens, first_token)
            case ["close_receive", transfer_id]:
                self._transfers.close_receive(TransferId(transfer_id))
            case ["abort", attempt_id, transfer_id, reason]:
                self._hook.close(AttemptId(attempt_id))
                self._transfers.abort(TransferId(transfer_id), reason)
            case ["report"]:
                pass  # `turn` reports anyway
            case _:
                raise AssertionError(f"unknown message {message[:1]}")
