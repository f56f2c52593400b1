"""Engines on simulated runners, and the shortest possible transfer between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.clock import ManualClock
from baton.kv_layout import KVLayout
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, FinishReason, GenerateRequest, SamplingParams, TokenEvent
from engine.engine import LocalEngine
from engine.sim import SimRunner, sim_layout
from engine.types import EngineConfig, Sampled, StepHook, StepPlan

VOCAB_SIZE = 997


class TpSimRunner:
    """All ranks of a simulated replica in one process; every rank verifies every byte that it reads."""

    def __init__(self, num_blocks: int, block_size: int = 16, tp_size: int = 1, vocab_size: int = VOCAB_SIZE) -> None:
        self.ranks = [
            SimRunner(sim_layout(num_blocks, block_size, tp_size=tp_size, tp_rank=rank), vocab_size, verify_all=True)
            for rank in range(tp_size)
        ]
        self.layout = self.ranks[0].layout

    def kv_buffer(self) -> memoryview:
        """The leader's pool."""
        return self.ranks[0].kv_buffer()

    def kv_fd(self) -> int | None:
        """The leader's pool."""
        return self.ranks[0].kv_fd()

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Every rank runs the step; the leader's answer counts."""
        answers = [rank.run(plan, hook if index == 0 else None) for index, rank in enumerate(self.ranks)]
        assert all(answer is None for follower in answers[1:] for answer in follower)
        return answers[0]

    def close(self) -> None:
        """Free all pools."""
        for rank in self.ranks:
            rank.close()


class RecordedEngine(LocalEngine):
    """A LocalEngine over a simulated runner that keeps its ranks and events at hand for tests."""

    def __init__(self, runner: TpSimRunner, *more: Any, **config: Any) -> None:
        """`more`: what another kind of LocalEngine takes after the arguments of this one."""
        self.runner = runner
        geometry, model = runner.layout.geometry, runner.layout.model
        settings = {"vocab_size": VOCAB_SIZE, "max_model_len": 4096, **config}
        sizes = EngineConfig(block_size=geometry.block_size, num_blocks=geometry.num_blocks, **settings)
        super().__init__(sizes, runner, PrefixHasher(b"secret", model.fingerprint), ManualClock(), *more)
        self.events: dict[AttemptId, list[TokenEvent]] = {}

    def step_once(self) -> list[TokenEvent]:
        """One step; its events are also kept by attempt."""
        events = self.step().events
        for event in events:
            self.events.setdefault(event.attempt_id, []).append(event)
        return events

    def drain(self) -> None:
        """Step until there is nothing to compute."""
        while self.has_work():
            self.step_once()

    def tokens(self, attempt_id: AttemptId) -> list[int]:
        """What the attempt generated here so far: none is missing, and none is there twice."""
        found = self.events.get(attempt_id, [])
        assert not found or [event.index for event in found] == list(range(found[0].index, found[-1].index + 1))
        return [event.token_id for event in found]

    def finish_reason(self, attempt_id: AttemptId) -> FinishReason | None:
        """That of its last event."""
        return self.events[attempt_id][-1].finish_reason


class SimEngine(RecordedEngine):
    """One step after the other."""

    def __init__(self, num_blocks: int = 64, block_size: int = 16, tp_size: int = 1, **config: Any) -> None:
        super().__init__(TpSimRunner(num_blocks, block_size, tp_size), **config)


def request(
    name: str,
    prompt: Sequence[int],
    *,
    delivered: Sequence[int] = (),
    priority: int = 0,
    tenant: str = "default",
    cache_salt: str = "",
    **params: Any,
) -> GenerateRequest:
    """A greedy attempt unless `params` (SamplingParams) says otherwise."""
    return GenerateRequest(
        attempt_id=AttemptId(f"{name}/1"),
        token_ids=(*prompt, *delivered),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**{"temperature": 0.0, **params}),
        tenant=tenant,
        cache_salt=cache_salt,
        priority=priority,
    )


def prompt(seed: int, num_tokens: int) -> tuple[int, ...]:
    """Different seeds differ from the first token on."""
    return tuple((seed * 131 + position * position * 7 + position) % VOCAB_SIZE for position in range(num_tokens))


def alone(req: GenerateRequest, **config: Any) -> list[int]:
    """What the request generates when nothing disturbs it."""
    engine = SimEngine(256, max_num_batched_tokens=4096, **config)
    engine.add(req)
    engine.drain()
    tokens = engine.tokens(req.attempt_id)
    engine._runner.close()
    return tokens


def copy_kv(
    source: TpSimRunner, source_table: Sequence[int], to: TpSimRunner, table: Sequence[int], tokens: range
) -> None:
    """Copy positions `tokens` of a sequence, whatever the two TP and block sizes are."""
    for rank in to.ranks:
        for layer in range(len(rank.layout.model.layers)):
            for head in rank.layout.heads(layer):
                origin = next(other for other in source.ranks if head in other.layout.heads(layer))
                read, write = head_view(origin, layer, head), head_view(rank, layer, head)
                for position in tokens:
                    a, b = slot(origin.layout, source_table, position), slot(rank.layout, table, position)
                    write[b[0], :, b[1]] = read[a[0], :, a[1]]


def head_view(runner: SimRunner, layer: int, head: int) -> npt.NDArray[np.uint8]:
    """One global head's bytes: [block, half, token in block, byte of the vector]; writable."""
    layout = runner.layout
    heads, geometry = layout.heads(layer), layout.geometry
    begin = layout.layer_offset(layer)
    part = runner.kv_buffer()[begin : begin + layout.block_bytes(layer) * geometry.num_blocks]
    shape = (geometry.num_blocks, 2, len(heads), geometry.block_size, -1)
    return np.frombuffer(part, dtype=np.uint8).reshape(shape)[:, :, head - heads.start]


def slot(layout: KVLayout, table: Sequence[int], position: int) -> tuple[int, int]:
    """Block and offset of a position."""
    index, offset = divmod(position, layout.geometry.block_size)
    return table[index], offset
