"""The engine loop where steps overlap: the next step is launched before the last one is read. Knows no device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from baton.clock import Clock
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, TokenEvent
from engine.engine import LocalEngine
from engine.scheduler import Chunk
from engine.sequence import Sequence
from engine.types import (
    PENDING,
    BatchEntry,
    EngineConfig,
    Launched,
    OverlappingRunner,
    Runner,
    SampleSpec,
    SeqState,
    StepHook,
    StepPlan,
    StepResult,
)


class _Part(NamedTuple):
    """What a launched step computes of one sequence: its tokens up to `end`, and the one at `position`, if any."""

    seq: Sequence
    num_tokens: int
    end: int
    position: int | None


@dataclass(slots=True)
class _Flight:
    """A step under way."""

    launched: Launched
    parts: list[_Part]
    names: frozenset[AttemptId]
    leaving: list[Sequence] = field(default_factory=list)
    """Sequences that ended since it was launched: their blocks return when it has completed."""


class OverlappingEngine(LocalEngine):
    """A LocalEngine that launches step N + 1 before it reads step N.

    `step` launches a step and reports the one before it. A sequence's unread token stands in its `token_ids` as
    PENDING; the runner feeds it. Nothing else is done on a guess: a step is read before the next one is planned when
    what it samples can not be fed, and when the next one might have to preempt. A sequence whose last token is under
    way (its length limit, or the end of a prompt whose KV is held) is not planned again; one that turns out to have
    stopped computes one token too many, which is dropped.

    Blocks return only after the last launched step that names them has completed: a sequence that ends earlier is
    QUARANTINED until then.
    """

    def __init__(
        self, config: EngineConfig, runner: Runner, hasher: PrefixHasher, clock: Clock, overlapping: OverlappingRunner
    ) -> None:
        """`overlapping` runs the steps; `runner` is what owns its pool."""
        super().__init__(config, runner, hasher, clock)
        self._overlapping = overlapping
        self._flight: _Flight | None = None
        self._run_s_of_step = 0.0

    def has_work(self) -> bool:
        """Would `step` compute or report something?"""
        return self._flight is not None or super().has_work()

    def step(self, hook: StepHook | None = None) -> StepResult:
        """Launch the next step and report the one before it."""
        began = self._clock.now()
        self._run_s_of_step = 0.0
        result = self._step(hook)
        self._run_s += self._run_s_of_step
        self._bookkeeping_s += self._clock.now() - began - self._run_s_of_step
        return result

    def _step(self, hook: StepHook | None) -> StepResult:
        previous = self._flight
        if previous is not None and self._must_settle(previous):
            self._flight = None  # what ends now returns its blocks at once
            return self._collected(previous, [])
        schedule = self._scheduler.schedule()
        preempted = [seq.attempt_id for seq in schedule.preempted]
        self._num_preemptions += len(preempted)
        self._flight = self._launch(schedule.chunks, hook) if schedule.chunks else None
        return StepResult(preempted=preempted) if previous is None else self._collected(previous, preempted)

    def _must_settle(self, flight: _Flight) -> bool:
        """Every running sequence may want a block, and none may be taken from a sequence that a step names."""
        return (
            not flight.launched.feeds or self._scheduler.pool.num_available < self._scheduler.census[SeqState.RUNNING]
        )

    def _launch(self, chunks: list[Chunk], hook: StepHook | None) -> _Flight:
        self._num_steps += 1
        plan = StepPlan(self._num_steps, [self._entry(chunk) for chunk in chunks])
        began = self._clock.now()
        launched = self._overlapping.launch(plan, hook)
        self._run_s_of_step += self._clock.now() - began
        parts = [self._advanced(*chunk, entry) for chunk, entry in zip(chunks, plan.entries, strict=True)]
        return _Flight(launched, parts, frozenset(entry.attempt_id for entry in plan.entries))

    def _advanced(self, seq: Sequence, num_tokens: int, entry: BatchEntry) -> _Part:
        """The sequence as it will be after the step, but for the token that is not known."""
        seq.num_computed_tokens += num_tokens
        position = _sampled_position(entry.sample)
        if position is not None and not seq.hold_kv and position + 1 < seq.length_limit:
            seq.append(PENDING)
        return _Part(seq, num_tokens, seq.num_computed_tokens, position)

    def _collected(self, flight: _Flight, preempted: list[AttemptId]) -> StepResult:
        """Read a step; the one launched after it, if any, is `self._flight`."""
        began = self._clock.now()
        collected = self._overlapping.collect(flight.launched)
        self._run_s_of_step += self._clock.now() - began
        for seq in flight.leaving:
            super()._finish(seq)
        events: list[TokenEvent] = []
        started: list[AttemptId] = []
        finished: list[AttemptId] = []
        failed: list[AttemptId] = []
        for part, sampled in zip(flight.parts, collected.sampled, strict=True):
            seq = part.seq
            if seq.state is not SeqState.RUNNING:  # it ended while this step was under way
                continue
            if seq.attempt_id in collected.failed:
                failed.append(seq.attempt_id)
                self._finish(seq)
                continue
            self._scheduler.publish(seq, part.end)
            if not seq.has_prefill_started:
                seq.has_prefill_started = True
                started.append(seq.attempt_id)
            if part.position is None:
                continue
            assert sampled is not None, f"the runner chose no token for {seq.attempt_id}"
            if not seq.has_prefill_finished:
                finished.append(seq.attempt_id)
            events.append(self._accept(seq, part.position, sampled))
        total = sum(part.num_tokens for part in flight.parts)
        self._num_tokens_computed += total
        return StepResult(events, started, finished, preempted, failed, total)

    def _finish(self, seq: Sequence) -> None:
        flight = self._flight
        if flight is None or seq.attempt_id not in flight.names or seq.state is SeqState.QUARANTINED:
            super()._finish(seq)
            return
        self._scheduler.quarantine(seq)
        flight.leaving.append(seq)


def _sampled_position(spec: SampleSpec | None) -> int | None:
    return None if spec is None else spec.position
