"""An OverlappingRunner over any Runner: a launched step computes nothing until it is collected, or made to run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from baton.request import AttemptId
from engine.types import PENDING, Collected, Launched, Runner, Sampled, SampleSpec, StepHook, StepPlan


class DeferredRunner:
    """Steps run as late as they may: whoever reuses a block that a launched step names, spoils that step.

    `plans` are the launched ones, in order; `num_fed` counts tokens that were PENDING.
    """

    def __init__(self, runner: Runner, *, fail: AttemptId | None = None) -> None:
        self.plans: list[StepPlan] = []
        self.num_fed = 0
        self.max_under_way = 0
        self._runner = runner
        self._under_way: deque[Launched] = deque()
        self._last: dict[AttemptId, int] = {}
        self._fail = fail

    def launch(self, plan: StepPlan, hook: StepHook | None = None) -> Launched:
        """See OverlappingRunner. Like a device, it feeds what it can choose without the host: no logprobs."""
        tables = [replace_table(entry.block_table) for entry in plan.entries]
        entries = [replace(entry, block_table=table) for entry, table in zip(plan.entries, tables, strict=True)]
        feeds = all(entry.sample is None or is_fed(entry.sample) for entry in plan.entries)
        launched = Launched(StepPlan(plan.step_id, entries), feeds)
        self.plans.append(launched.plan)
        self._under_way.append(launched)
        self.max_under_way = max(self.max_under_way, len(self._under_way))
        if hook is not None:
            hook.step_begin(plan)
            for layer in range(len(self._runner.layout.model.layers)):
                hook.layer_done(layer, _Ready(self._under_way, launched))
            hook.step_done()
        return launched

    def collect(self, launched: Launched) -> Collected:
        """See OverlappingRunner."""
        assert self._under_way[0] is launched, "collected out of order"
        entries = []
        for entry in launched.plan.entries:
            if tuple(entry.token_ids) == (PENDING,):
                self.num_fed += 1
                entry = replace(entry, token_ids=(self._last[entry.attempt_id],))
            entries.append(entry)
        results: list[Sampled | None] = self._runner.run(StepPlan(launched.plan.step_id, entries))
        self._under_way.popleft()
        self._last = {
            entry.attempt_id: result.token_id
            for entry, result in zip(entries, results, strict=True)
            if result is not None
        }
        failed = [entry.attempt_id for entry in entries if entry.attempt_id == self._fail and entry.sample is not None]
        return Collected(results, failed)


@dataclass(frozen=True, slots=True)
class _Ready:
    """Fires when the step has run."""

    under_way: deque[Launched]
    launched: Launched

    def query(self) -> bool:
        """See kvtransfer.api.Ready."""
        return all(other is not self.launched for other in self.under_way)


def is_fed(spec: SampleSpec) -> bool:
    """Does the step after it not wait for the host?"""
    return spec.params.num_logprobs is None


def replace_table(table: object) -> tuple[int, ...]:
    """As it is at the launch."""
    assert isinstance(table, (list, tuple))
    return tuple(table)
