"""A Runner that computes nothing: what remains is the engine's own time."""

from __future__ import annotations

from collections.abc import Callable

from baton.kv_layout import KVGeometry, KVLayout
from engine.sim import sim_model
from engine.types import Sampled, StepHook, StepPlan


class NoopRunner:
    """Samples `token_id` for every entry that asks. `on_plan` sees each plan while it is valid."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        token_id: int = 7,
        on_plan: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.layout = KVLayout(sim_model(), KVGeometry(1, block_size, num_blocks), 0)
        self._sampled = Sampled(token_id)
        self._on_plan = on_plan

    def kv_buffer(self) -> memoryview:
        """No pool."""
        return memoryview(b"")

    def kv_fd(self) -> int | None:
        """No pool."""
        return None

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Nothing but the answer."""
        if self._on_plan is not None:
            self._on_plan(plan)
        return [None if entry.sample is None else self._sampled for entry in plan.entries]

    def close(self) -> None:
        """Nothing to free."""
