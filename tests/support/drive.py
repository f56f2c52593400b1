"""Drives a Runner with hand-made plans (sequences with fixed blocks, no scheduler), or an engine with requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.engine import LocalEngine
from engine.types import BatchEntry, Runner, Sampled, SampleSpec, StepHook, StepPlan
from tests.support.audit import audit

GREEDY = SamplingParams(temperature=0)


@dataclass
class Driven:
    """One sequence: its tokens so far, and the blocks it may use."""

    tokens: list[int]
    block_table: Sequence[int]
    params: SamplingParams = GREEDY
    num_computed: int = 0
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        """Tokens sampled so far."""
        return [sampled.token_id for sampled in self.sampled]

    def entry(self, chunk: int) -> BatchEntry:
        """The next `chunk` tokens, or what is left of them."""
        end = min(self.num_computed + chunk, len(self.tokens))
        is_last = end == len(self.tokens)
        return BatchEntry(
            attempt_id=AttemptId(f"seq-{self.block_table[0]}/1"),
            start=self.num_computed,
            token_ids=tuple(self.tokens[self.num_computed : end]),
            block_table=tuple(self.block_table),
            sample=SampleSpec(self.params, position=end) if is_last else None,
        )


def run_step(runner: Runner, sequences: Sequence[Driven], chunk: int = 1 << 30, hook: StepHook | None = None) -> None:
    """One step over all `sequences`, each by at most `chunk` tokens; sampled tokens are appended."""
    entries = tuple(sequence.entry(chunk) for sequence in sequences)
    results = runner.run(StepPlan(step_id=0, entries=entries), hook)
    for sequence, entry, result in zip(sequences, entries, results, strict=True):
        sequence.num_computed += len(entry.token_ids)
        if result is not None:
            sequence.sampled.append(result)
            sequence.tokens.append(result.token_id)


def generate(runner: Runner, prompt: Sequence[int], num_tokens: int, chunk: int = 1 << 30) -> list[int]:
    """Greedy tokens of one prompt alone, in the first blocks of the pool."""
    sequence = Driven(list(prompt), range(runner.layout.geometry.num_blocks))
    while len(sequence.sampled) < num_tokens:
        run_step(runner, [sequence], chunk)
    return sequence.output


def join_one_by_one(engine: LocalEngine, requests: Sequence[GenerateRequest]) -> dict[AttemptId, list[int]]:
    """The tokens of every request, when one joins at each step while others decode. Nothing is left in `engine`."""
    found: dict[AttemptId, list[int]] = {request.attempt_id: [] for request in requests}
    waiting = list(reversed(requests))
    while waiting or engine.has_work():
        if waiting:
            engine.add(waiting.pop())
        result = engine.step()
        assert not result.failed
        for event in result.events:
            found[event.attempt_id].append(event.token_id)
    audit(engine)
    return found
