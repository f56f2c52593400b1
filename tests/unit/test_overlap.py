"""Steps overlap and nothing shows: same tokens, same ends, and no block returns while a launched step names it."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.request import AttemptId, FinishReason
from engine.overlap import OverlappingEngine
from tests.support.audit import audit, audit_ledger
from tests.support.deferred_runner import DeferredRunner
from tests.support.sim_engine import VOCAB_SIZE, RecordedEngine, SimEngine, TpSimRunner, alone, copy_kv, prompt, request


class OverlappedSim(RecordedEngine, OverlappingEngine):
    """An OverlappingEngine over a simulated runner whose steps run as late as they may."""

    def __init__(
        self, num_blocks: int = 64, block_size: int = 16, *, fail: AttemptId | None = None, **config: Any
    ) -> None:
        runner = TpSimRunner(num_blocks, block_size)
        self.deferred = DeferredRunner(runner, fail=fail)
        super().__init__(runner, self.deferred, **config)

    def held_blocks(self) -> dict[str, int]:
        counts = self.stats().blocks_by_state
        return {state: counts[state] for state in counts if counts[state] and state not in ("free", "cached")}


def test_step_two_is_launched_before_step_one_is_read() -> None:
    engine = OverlappedSim()
    req = request("a", prompt(1, 20), max_tokens=4)
    engine.add(req)
    assert engine.step_once() == []  # 1: the prompt is launched
    assert len(engine.deferred.plans) == 1
    assert [event.index for event in engine.step_once()] == [0]  # 2: a decode is launched, then the prompt is read
    assert len(engine.deferred.plans) == 2
    assert tuple(engine.deferred.plans[1].entries[0].token_ids) == (-1,)
    engine.drain()
    assert engine.tokens(req.attempt_id) == alone(req)
    assert (engine.deferred.max_under_way, engine.deferred.num_fed) == (2, 3)
    audit(engine)


def test_a_sequence_at_its_limit_computes_no_token_too_many() -> None:
    engine = OverlappedSim()
    req = request("a", prompt(1, 5), max_tokens=3)
    engine.add(req)
    engine.drain()
    assert len(engine.deferred.plans) == 3
    assert engine.events[req.attempt_id][-1].finish_reason is FinishReason.LENGTH


def test_a_sequence_that_stops_keeps_its_blocks_until_its_last_step_is_done() -> None:
    req = request("a", prompt(1, 20), max_tokens=50)
    stop = alone(req)[3]
    engine = OverlappedSim()
    engine.add(request("a", prompt(1, 20), max_tokens=50, stop_token_ids=(stop,)))
    while not any(event.finish_reason for event in engine.step_once()):
        pass
    assert engine.held_blocks() == {"quarantined": 2}  # the step that was launched before the stop was read
    assert engine.step_once() == []
    assert engine.held_blocks() == {}
    assert engine.events[req.attempt_id][-1].finish_reason is FinishReason.STOP
    assert engine.tokens(req.attempt_id)[-1] == stop
    assert not engine.has_work()
    audit(engine)


def test_an_aborted_sequence_is_silent_and_keeps_its_blocks_until_its_step_is_done() -> None:
    engine = OverlappedSim(8)
    engine.add(request("a", prompt(1, 20), max_tokens=50))
    engine.step_once()
    engine.step_once()
    engine.abort(AttemptId("a/1"))
    assert engine.held_blocks() == {"quarantined": 2}
    engine.abort(AttemptId("a/1"))  # again: nothing
    engine.add(request("b", prompt(2, 20), max_tokens=2))
    assert engine.step_once() == []
    assert engine.held_blocks() == {"running": 2}
    engine.drain()
    assert engine.tokens(AttemptId("b/1")) == alone(request("b", prompt(2, 20), max_tokens=2))
    assert len(engine.tokens(AttemptId("a/1"))) == 1
    audit(engine)


def test_blocks_of_an_aborted_sequence_are_not_given_away_while_a_step_reads_them() -> None:
    engine = OverlappedSim(4)
    engine.add(request("a", prompt(1, 33), max_tokens=50))
    engine.step_once()
    engine.abort(AttemptId("a/1"))
    engine.add(request("b", prompt(2, 33), max_tokens=4))
    for _ in range(2):
        engine.step_once()  # 1: nothing fits, and the step of `a` ends; 2: `b` is launched
    assert len(engine.deferred.plans) == 2
    engine.drain()
    assert engine.tokens(AttemptId("b/1")) == alone(request("b", prompt(2, 33), max_tokens=4))
    audit(engine)


def test_a_prompt_whose_kv_is_held_computes_no_second_token() -> None:
    engine = OverlappedSim()
    req = request("a", prompt(1, 20), max_tokens=9)
    engine.add(req, hold_kv=True)
    engine.drain()
    assert len(engine.deferred.plans) == 1
    assert engine.held_blocks() == {"held": 2}
    assert engine.tokens(req.attempt_id) == alone(req)[:1]
    engine.release(req.attempt_id)
    audit(engine)


def test_a_received_sequence_goes_on_with_its_own_token_beside_one_that_is_fed() -> None:
    source, to = SimEngine(), OverlappedSim()
    other, req = request("o", prompt(3, 30), max_tokens=12), request("a", prompt(1, 20), max_tokens=9)
    to.add(other)
    for _ in range(3):
        to.step_once()
    source.add(req, hold_kv=True)
    source.drain()
    reservation = to.reserve(req)
    table = source.block_table(req.attempt_id)
    copy_kv(source.runner, table, to.runner, reservation.block_table, range(reservation.num_tokens))
    first = source.events[req.attempt_id][0]
    to.commit(req.attempt_id, first)
    to.drain()
    got = [first.token_id, *(event.token_id for event in to.events[req.attempt_id])]
    assert got == alone(req)
    assert to.tokens(other.attempt_id) == alone(other)
    source.release(req.attempt_id)
    audit(to)


def test_what_the_host_samples_is_read_before_the_next_step_is_planned() -> None:
    engine = OverlappedSim()
    req = request("a", prompt(1, 20), max_tokens=5, num_logprobs=2)
    engine.add(req)
    engine.drain()
    assert engine.tokens(req.attempt_id) == alone(req)
    assert (engine.deferred.max_under_way, engine.deferred.num_fed) == (1, 0)


def test_a_sequence_whose_numbers_break_down_ends_alone() -> None:
    engine = OverlappedSim(fail=AttemptId("a/1"))
    other = request("o", prompt(3, 30), max_tokens=12)
    engine.add(request("a", prompt(1, 20), max_tokens=9))
    engine.add(other)
    failed: list[AttemptId] = []
    while engine.has_work():
        result = engine.step()
        failed += result.failed
        for event in result.events:
            engine.events.setdefault(event.attempt_id, []).append(event)
    assert failed == ["a/1"]
    assert engine.tokens(other.attempt_id) == alone(other)
    assert AttemptId("a/1") not in engine.events
    audit(engine)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_any_mixture_generates_what_each_sequence_generates_alone(seed: int) -> None:
    """Few blocks (preemption), chunks, shared prefixes, stops, aborts, sampling on the host."""
    rng = random.Random(seed)
    engine = OverlappedSim(rng.choice((10, 14, 40)), max_num_seqs=rng.choice((2, 4)), max_num_batched_tokens=24)
    requests = [
        request(
            f"r{index}",
            prompt(rng.randrange(2), rng.randrange(1, 70)),
            max_tokens=rng.randrange(1, 30),
            num_logprobs=rng.choice((None, None, 1)),
            stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice((0, 60)))),
            priority=rng.choice((0, 0, 1)),
        )
        for index in range(6)
    ]
    aborted = set()
    waiting = list(requests)
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.3:
            engine.add(waiting.pop())
        elif rng.random() < 0.02:
            victim = rng.choice(requests).attempt_id
            engine.abort(victim)
            aborted.add(victim)
        engine.step_once()
        audit_ledger(engine)
    for req in requests:
        if req.attempt_id not in aborted:
            assert engine.tokens(req.attempt_id) == alone(req)
    audit(engine)
