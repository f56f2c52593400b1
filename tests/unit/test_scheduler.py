"""The scheduling rules, seen through the plans that a runner gets."""

from __future__ import annotations

from typing import Any

import pytest

from baton.clock import ManualClock
from baton.errors import Overloaded
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, TokenEvent
from engine.engine import LocalEngine
from engine.scheduler import WaitingQueue
from engine.sequence import _NEXT, Sequence
from engine.types import EngineConfig, SeqState, StepPlan
from tests.support.audit import audit, audit_ledger
from tests.support.noop_runner import NoopRunner
from tests.support.sim_engine import prompt, request


class Planned(LocalEngine):
    """An engine without computation that remembers what each step was to compute."""

    def __init__(self, num_blocks: int = 64, **config: Any) -> None:
        self.plans: list[dict[str, int]] = []  # attempt's name -> number of tokens, in the plan's order
        settings = {"vocab_size": 997, "max_model_len": 4096, "block_size": 16, **config}
        runner = NoopRunner(num_blocks, settings["block_size"], on_plan=self._remember)
        super().__init__(EngineConfig(num_blocks=num_blocks, **settings), runner, PrefixHasher(b"s", ""), ManualClock())

    def _remember(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        block_size = self.config.block_size
        for entry in plan.entries:
            assert entry.token_ids
            assert len(entry.block_table) * block_size >= entry.start + len(entry.token_ids)
        self.plans.append({entry.attempt_id.split("/")[0]: len(entry.token_ids) for entry in plan.entries})

    def steps(self, count: int) -> list[dict[str, int]]:
        """The next plans."""
        for _ in range(count):
            self.step()
            audit_ledger(self)
        return self.plans[-count:]


def add(engine: LocalEngine, name: str, num_tokens: int, *, hold_kv: bool = False, **options: Any) -> AttemptId:
    """Queue a request with its own prompt that runs until it is stopped."""
    seed = sum(name.encode())
    req = request(name, prompt(seed, num_tokens), **{"max_tokens": 1000, **options})
    engine.add(req, hold_kv=hold_kv)
    return req.attempt_id


def receive(engine: LocalEngine, name: str, num_tokens: int, **options: Any) -> AttemptId:
    """A decode whose prompt was computed elsewhere."""
    req = request(name, prompt(sum(name.encode()), num_tokens), **{"max_tokens": 1000, **options})
    engine.reserve(req)
    engine.commit(req.attempt_id, TokenEvent(req.attempt_id, 0, 7))
    return req.attempt_id


def test_the_end_is_reachable_from_every_state() -> None:
    assert set(_NEXT) == set(SeqState)
    for state in SeqState:
        reached = {state}
        while more := {after for before in reached for after in _NEXT[before]} - reached:
            reached |= more
        assert SeqState.FINISHED in reached


def test_a_forbidden_change_of_state_is_noticed() -> None:
    seq = Sequence(request("a", [1]), SeqState.HELD, 1, max_len=9)
    with pytest.raises(AssertionError, match="held -> running"):
        seq.move_to(SeqState.RUNNING)


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine = Planned(max_num_batched_tokens=20)
    add(engine, "a", 50)
    assert engine.steps(4) == [{"a": 20}, {"a": 20}, {"a": 10}, {"a": 1}]


def test_decodes_come_first_and_chunks_take_what_is_left() -> None:
    engine = Planned(max_num_batched_tokens=20)
    add(engine, "a", 20)
    engine.step()
    add(engine, "b", 30)
    add(engine, "c", 5)
    assert engine.steps(3) == [{"a": 1, "b": 19}, {"a": 1, "b": 11, "c": 5}, {"a": 1, "b": 1, "c": 1}]


def test_with_prefill_first_no_decode_runs_before_all_prompts_are_computed() -> None:
    engine = Planned(max_num_batched_tokens=20, prefill_first=True)
    add(engine, "a", 20)
    engine.step()
    add(engine, "b", 30)
    add(engine, "c", 5)
    assert engine.steps(3) == [{"b": 20}, {"b": 10, "c": 5}, {"a": 1, "b": 1, "c": 1}]


def test_with_prefill_first_decodes_go_on_while_no_prompt_finds_room() -> None:
    engine = Planned(num_blocks=4, max_num_batched_tokens=64, prefill_first=True)
    add(engine, "a", 20)
    engine.step()
    add(engine, "b", 40)
    assert engine.steps(2) == [{"a": 1}, {"a": 1}]


def test_the_budget_goes_to_the_oldest_decodes() -> None:
    engine = Planned(max_num_batched_tokens=2)
    for name in "abc":
        receive(engine, name, 10, max_tokens=3)
    assert engine.steps(4) == [{"a": 1, "b": 1}, {"a": 1, "b": 1}, {"c": 1}, {"c": 1}]


def test_requests_are_served_in_order_of_arrival_within_a_priority() -> None:
    engine = Planned(max_num_batched_tokens=10)
    add(engine, "a", 10)
    add(engine, "b", 10)
    add(engine, "urgent", 10, priority=-1)
    assert engine.steps(1) == [{"urgent": 10}]
    assert engine.steps(2) == [{"urgent": 1, "a": 9}, {"urgent": 1, "a": 1, "b": 8}]


def test_a_better_priority_overtakes_a_prompt_that_is_half_done() -> None:
    engine = Planned(max_num_batched_tokens=10)
    add(engine, "a", 30)
    engine.step()
    add(engine, "urgent", 15, priority=-1)
    assert engine.steps(3) == [{"urgent": 10}, {"urgent": 5, "a": 5}, {"urgent": 1, "a": 9}]


def test_a_prompt_is_not_started_before_all_its_blocks_are_there() -> None:
    engine = Planned(num_blocks=4, max_num_batched_tokens=16)
    held = add(engine, "a", 32, hold_kv=True)
    engine.steps(2)
    add(engine, "b", 33)
    assert not engine.has_work()
    engine.release(held)
    assert engine.steps(1) == [{"b": 16}]
    assert engine.stats().blocks_by_state["running"] == 3


def test_admission_leaves_a_block_for_each_sequence_that_may_grow() -> None:
    engine = Planned(num_blocks=4)
    first = add(engine, "a", 16)
    engine.step()
    add(engine, "b", 32)
    assert engine.steps(1) == [{"a": 1}], "two blocks are left, and one of them is for a"
    engine.abort(first)
    assert engine.steps(1) == [{"b": 32}]


def test_the_youngest_is_preempted_and_recomputed_before_those_that_wait() -> None:
    engine = Planned(num_blocks=5, enable_prefix_caching=False)
    first = add(engine, "a", 31)
    second = add(engine, "b", 16)
    engine.steps(3)
    add(engine, "c", 1)
    while not (result := engine.step()).preempted:  # "a" needs its fourth block, and "b" grew before it
        audit_ledger(engine)
    assert result.preempted == [second]
    assert list(engine.plans[-1]) == ["a"]
    assert engine.stats().seqs_by_state["waiting"] == 2
    length = len(engine._seqs[second].token_ids)
    engine.abort(first)
    assert engine.steps(1) == [{"b": length, "c": 1}]


def test_a_worse_priority_is_preempted_before_a_younger_one() -> None:
    engine = Planned(num_blocks=4)
    worse = add(engine, "worse", 16, priority=1)
    add(engine, "better", 16)
    while not (result := engine.step()).preempted:
        pass
    assert result.preempted == [worse]


def test_a_decode_preempts_a_younger_prompt_that_is_half_done() -> None:
    engine = Planned(num_blocks=6, max_num_batched_tokens=2)
    add(engine, "a", 1)
    engine.step()
    younger = add(engine, "b", 60)
    while not (result := engine.step()).preempted:
        audit_ledger(engine)
    assert result.preempted == [younger]
    assert engine.plans[-2:] == [{"a": 1, "b": 1}, {"a": 1}]


def test_a_prompt_whose_kv_will_be_held_is_never_preempted() -> None:
    engine = Planned(num_blocks=5, max_num_batched_tokens=2)
    growing = add(engine, "a", 1)
    engine.step()
    held = add(engine, "b", 40, hold_kv=True)
    while not (result := engine.step()).preempted:
        audit_ledger(engine)
    assert result.preempted == [growing], "the only one that may be preempted is the one that needs the block"
    assert engine.stats().blocks_by_state["running"] == 3, "it waits without holding a block"
    while engine.has_work():
        assert list(engine.steps(1)[0]) == ["b"]
    assert engine.stats().seqs_by_state["held"] == 1
    engine.release(held)
    assert engine.has_work()


def test_a_preempted_sequence_goes_before_older_ones_that_wait() -> None:
    engine = Planned(num_blocks=6)
    held = add(engine, "h", 48, hold_kv=True)
    engine.step()
    add(engine, "older", 64)
    younger = receive(engine, "younger", 16)
    while not (result := engine.step()).preempted:
        audit_ledger(engine)
    assert result.preempted == [younger]
    engine.release(held)
    assert list(engine.steps(1)[0]) == ["younger"]


def test_every_preempted_sequence_still_ends() -> None:
    engine = Planned(num_blocks=6, max_num_batched_tokens=24, max_num_seqs=5)
    for name in "abcdefgh":
        add(engine, name, 20, max_tokens=60)
    num_events = 0
    while engine.has_work():
        num_events += len(engine.step().events)
        audit_ledger(engine)
    assert num_events == 8 * 60
    assert engine.stats().num_preemptions > 0
    audit(engine)


def test_a_sequence_that_alone_fills_the_pool_ends_with_length() -> None:
    engine = Planned(num_blocks=2)
    add(engine, "a", 20)
    reasons = []
    while engine.has_work():
        reasons += [event.finish_reason for event in engine.step().events]
    assert len(reasons) == 12
    assert reasons[-1] == "length"
    audit(engine)


def test_a_reserved_sequence_keeps_a_slot() -> None:
    engine = Planned(max_num_seqs=1)
    reserved = request("r", prompt(1, 20), max_tokens=5)
    engine.reserve(reserved)
    add(engine, "a", 5)
    assert not engine.has_work()
    with pytest.raises(Overloaded):
        engine.reserve(request("s", prompt(2, 20), max_tokens=5))
    engine.commit(reserved.attempt_id, TokenEvent(reserved.attempt_id, 0, 7))
    assert engine.steps(4) == [{"r": 1}] * 4
    assert engine.steps(1) == [{"a": 5}]


def test_a_blocked_head_is_no_work() -> None:
    engine = Planned(num_blocks=2)
    held = add(engine, "a", 30, hold_kv=True)
    engine.step()
    add(engine, "b", 5)
    assert not engine.has_work()
    assert engine.step().num_tokens == 0
    engine.abort(held)
    assert engine.has_work()


def test_aborted_requests_do_not_stay_in_the_queue() -> None:
    queue = WaitingQueue()
    seqs = [Sequence(request(str(index), [1]), SeqState.WAITING, index, max_len=9) for index in range(1000)]
    for seq in seqs:
        queue.push(seq)
    for seq in seqs[1:]:
        seq.move_to(SeqState.FINISHED)
        queue.discard()
    assert len(queue._heap) < 50
    assert queue.head() is seqs[0]


def test_penalties_see_prompt_and_output_and_others_get_no_lists() -> None:
    specs = []
    runner = NoopRunner(8, on_plan=lambda plan: specs.append([entry.sample for entry in plan.entries]))
    config = EngineConfig(num_blocks=8, vocab_size=997)
    engine = LocalEngine(config, runner, PrefixHasher(b"s", ""), ManualClock())
    engine.add(request("a", [1, 2, 3], delivered=[9], frequency_penalty=0.5))
    engine.add(request("b", [1, 2, 3]))
    engine.step()
    with_penalty, without = specs[0]
    assert with_penalty is not None
    assert without is not None
    assert (with_penalty.prompt_token_ids, with_penalty.position) == ((1, 2, 3), 4)
    assert list(with_penalty.output_token_ids) == [9, 7]  # the list is the sequence's own and has grown since
    assert not without.prompt_token_ids
    assert not without.output_token_ids
