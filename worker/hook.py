"""From the runner's layer-by-layer progress to the transfer endpoint. One per rank, on its engine thread."""

from __future__ import annotations

from collections.abc import Callable

from baton.request import AttemptId
from engine.types import StepPlan
from kvtransfer.api import Ready, TransferEndpoint, TransferId


class TransferHook:
    """Announces written KV of every attempt that has an open transfer.

    `on_layer` is called after each layer: the leader's sign of life during a long step.
    """

    def __init__(self, transfers: TransferEndpoint) -> None:
        self._transfers = transfers
        self.on_layer: Callable[[], None] = lambda: None
        self._open: dict[AttemptId, TransferId] = {}
        self._step: list[tuple[TransferId, int]] = []
        self.num_layers_done = 0
        self.last_ready: Ready | None = None
        """On a device: fires when all KV announced so far is written."""

    def open(self, attempt_id: AttemptId, transfer_id: TransferId) -> None:
        """From the next step on, announce this attempt's KV under `transfer_id`."""
        self._open[attempt_id] = transfer_id

    def close(self, attempt_id: AttemptId) -> None:
        """Stop announcing. Unknown ids are ignored."""
        self._open.pop(attempt_id, None)

    def step_begin(self, plan: StepPlan) -> None:
        """Note what this step adds: tokens before an entry's start are there already, in every layer."""
        for entry in plan.entries:
            self._transfers.will_write(entry.block_table, entry.start, entry.start + len(entry.token_ids))
        self._step = [
            (self._open[entry.attempt_id], entry.start + len(entry.token_ids))
            for entry in plan.entries
            if entry.attempt_id in self._open
        ]

    def layer_done(self, layer: int, ready: object | None) -> None:
        """Announce one layer of every open attempt in the step. (`ready` is None on a CPU: it is written.)"""
        assert ready is None or isinstance(ready, Ready)
        self.num_layers_done += 1
        self.last_ready = ready
        for transfer_id, num_tokens in self._step:
            self._transfers.written(transfer_id, layer, num_tokens, ready)
        self.on_layer()

    def step_done(self) -> None:
        """The step's KV is complete."""
        self._step = []
