"""Lifecycles step by step on the simulated runner, whose tokens tell whether the KV was right."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.clock import ManualClock
from baton.errors import InvalidRequest, Overloaded, PromptTooLong, TransferError
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, FinishReason, GenerateRequest, TokenEvent
from engine.engine import LocalEngine
from engine.types import EngineConfig, Reservation, StepPlan
from tests.support.audit import audit, audit_ledger
from tests.support.noop_runner import NoopRunner
from tests.support.sim_engine import VOCAB_SIZE, SimEngine, alone, copy_kv, prompt, request

STATES = ("free", "cached", "running", "held", "receiving", "quarantined")


def blocks(engine: LocalEngine) -> dict[str, int]:
    """Blocks per state, without the states that have none."""
    counts = engine.stats().blocks_by_state
    assert tuple(counts) == STATES
    return {state: count for state, count in counts.items() if count}


def prefill(engine: SimEngine, req: GenerateRequest) -> TokenEvent:
    """The prefill side of a hand-over, up to HELD."""
    engine.add(req, hold_kv=True)
    while req.attempt_id not in engine.events:
        engine.step_once()
    return engine.events[req.attempt_id][0]


def hand_over(source: SimEngine, to: SimEngine, req: GenerateRequest) -> TokenEvent:
    """A whole hand-over; the sequence decodes on `to` afterwards."""
    first = prefill(source, req)
    reservation = to.reserve(req)
    transfer(source, to, reservation)
    to.commit(req.attempt_id, first)
    source.release(req.attempt_id)
    return first


def transfer(source: SimEngine, to: SimEngine, reservation: Reservation) -> None:
    """Bring what is missing."""
    tokens = range(reservation.num_cached_tokens, reservation.num_tokens)
    source_table = source.block_table(reservation.attempt_id)
    copy_kv(source.runner, source_table, to.runner, reservation.block_table, tokens)


# Exactness: whatever happens on the way, the tokens are those of an undisturbed run.


@pytest.mark.parametrize("budget", [1, 7, 16, 33, 1000])
def test_chunks_do_not_change_the_tokens(budget: int) -> None:
    req = request("a", prompt(1, 75), max_tokens=12)
    engine = SimEngine(max_num_batched_tokens=budget)
    engine.add(req)
    engine.drain()
    assert engine.tokens(req.attempt_id) == alone(req)
    audit(engine)


@pytest.mark.parametrize(("block_size", "tp_size"), [(32, 1), (16, 2), (48, 2)])
def test_block_size_and_tp_do_not_change_the_tokens(block_size: int, tp_size: int) -> None:
    req = request("a", prompt(1, 75), max_tokens=12)
    engine = SimEngine(16, block_size, tp_size, max_num_batched_tokens=20)
    engine.add(req)
    engine.drain()
    assert engine.tokens(req.attempt_id) == alone(req)


def test_block_size_does_not_change_the_tokens_of_a_long_prompt() -> None:
    req = request("a", prompt(1, 1010), max_tokens=20)
    engines = [SimEngine(num_blocks, block_size) for num_blocks, block_size in ((80, 16), (30, 48), (10, 256))]
    for engine in engines:
        engine.add(req)
        engine.drain()
    tokens = [engine.tokens(req.attempt_id) for engine in engines]
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_batch_does_not_change_the_tokens() -> None:
    requests = [request(str(seed), prompt(seed, 10 + 9 * seed), max_tokens=5 + seed) for seed in range(8)]
    engine = SimEngine(max_num_batched_tokens=40)
    for req in requests:
        engine.add(req)
    engine.drain()
    assert [engine.tokens(req.attempt_id) for req in requests] == [alone(req) for req in requests]
    audit(engine)


def test_a_prefix_hit_computes_only_the_rest() -> None:
    engine = SimEngine()
    first, second = request("a", prompt(1, 50), max_tokens=3), request("b", prompt(1, 50)[:40] + (5,) * 9, max_tokens=9)
    engine.add(first)
    engine.drain()
    computed = engine.stats().num_tokens_computed
    engine.add(second)
    engine.drain()
    assert engine.stats().num_tokens_computed - computed == 49 - 32 + 8
    assert engine.events[second.attempt_id][0].num_cached_tokens == 32
    assert [event.num_cached_tokens for event in engine.events[second.attempt_id][1:]] == [0] * 8
    assert engine.tokens(second.attempt_id) == alone(second)
    assert (engine.stats().num_prefix_hit_tokens, engine.stats().num_prefix_query_tokens) == (32, 99)


def test_a_full_prefix_hit_still_computes_the_last_block() -> None:
    engine = SimEngine()
    first, second = request("a", prompt(1, 64), max_tokens=2), request("b", prompt(1, 64), max_tokens=5)
    engine.add(first)
    engine.drain()
    engine.add(second)
    assert engine.step().num_tokens == 16
    engine.drain()
    assert engine.stats().num_prefix_hit_tokens == 48
    assert engine.tokens(second.attempt_id) == alone(second)[1:]


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine = SimEngine()
    first = request("a", prompt(1, 30), max_tokens=40)
    engine.add(first)
    engine.drain()
    turn = request("b", prompt(1, 30) + tuple(engine.tokens(first.attempt_id)) + (1, 2, 3), max_tokens=4)
    engine.add(turn)
    engine.drain()
    assert engine.events[turn.attempt_id][0].num_cached_tokens == 64
    assert engine.tokens(turn.attempt_id) == alone(turn)


@pytest.mark.parametrize("other", [{"tenant": "other"}, {"cache_salt": "other"}])
def test_a_prefix_is_not_shared_across_tenants_and_salts(other: dict[str, Any]) -> None:
    engine = SimEngine()
    mine, theirs = request("a", prompt(1, 64), max_tokens=5), request("b", prompt(1, 64), max_tokens=5, **other)
    engine.add(mine)
    engine.drain()
    engine.add(theirs)
    engine.drain()
    assert engine.stats().num_prefix_hit_tokens == 0
    assert engine.tokens(mine.attempt_id) != engine.tokens(theirs.attempt_id)


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = SimEngine(enable_prefix_caching=False)
    for name in "ab":
        engine.add(request(name, prompt(1, 64), max_tokens=5))
        engine.drain()
    assert engine.stats().num_prefix_hit_tokens == 0
    assert blocks(engine) == {"free": 64}


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preemption_does_not_change_the_tokens(enable_prefix_caching: bool) -> None:
    requests = [request(str(seed), prompt(seed, 20), max_tokens=50) for seed in range(6)]
    engine = SimEngine(9, max_num_batched_tokens=24, enable_prefix_caching=enable_prefix_caching)
    for req in requests:
        engine.add(req)
    engine.drain()
    assert engine.stats().num_preemptions > 0
    assert (engine.stats().num_prefix_hit_tokens, engine.stats().num_prefix_query_tokens) == (0, 6 * 20)
    for req in requests:
        assert engine.tokens(req.attempt_id) == alone(req)
        assert [event.index for event in engine.events[req.attempt_id]] == list(range(50))
    audit(engine)


def test_a_resumed_attempt_goes_on_where_the_client_stopped() -> None:
    whole = request("a", prompt(1, 40), max_tokens=20)
    expected = alone(whole)
    resumed = request("b", prompt(1, 40), delivered=expected[:7], max_tokens=20)
    engine = SimEngine()
    engine.add(resumed)
    engine.drain()
    assert engine.tokens(resumed.attempt_id) == expected[7:]
    assert [event.index for event in engine.events[resumed.attempt_id]] == list(range(7, 20))


def test_cached_tokens_are_counted_within_the_prompt() -> None:
    engine = SimEngine()
    whole = request("a", prompt(1, 40), max_tokens=20)
    engine.add(whole)
    engine.drain()
    resumed = request("b", prompt(1, 40), delivered=engine.tokens(whole.attempt_id)[:15], max_tokens=20)
    engine.add(resumed)
    assert engine.step().num_tokens == 55 - 48
    engine.drain()
    engine.add(request("c", prompt(1, 40), delivered=engine.tokens(whole.attempt_id)[:15], max_tokens=20))
    assert [event.num_cached_tokens for event in engine.step_once()] == [40]


def test_seeds_matter_only_with_a_temperature() -> None:
    hot = [alone(request("a", prompt(1, 20), max_tokens=9, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    cold = [alone(request("a", prompt(1, 20), max_tokens=9, temperature=0.0, seed=seed)) for seed in (1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert cold[0] == cold[1]


# Hand-over: hold and release on one side, reserve, commit, abort and quiesced on the other.


@pytest.mark.parametrize(("source", "to"), [((16, 1), (16, 1)), ((32, 2), (16, 1)), ((16, 1), (48, 2))])
def test_a_hand_over_does_not_change_the_tokens(source: tuple[int, int], to: tuple[int, int]) -> None:
    req = request("a", prompt(1, 75), max_tokens=40)
    sender, receiver = SimEngine(16, *source, max_num_batched_tokens=32), SimEngine(16, *to)
    first = hand_over(sender, receiver, req)
    receiver.drain()
    assert [first.token_id, *receiver.tokens(req.attempt_id)] == alone(req)
    assert [event.index for event in receiver.events[req.attempt_id]] == list(range(1, 40))
    audit(sender)
    audit(receiver)


def test_a_hand_over_step_by_step() -> None:
    # 1. The prefill side takes all source blocks before its first chunk.
    sender, receiver = SimEngine(8, max_num_batched_tokens=32), SimEngine(8)
    req = request("a", prompt(1, 40), max_tokens=9)
    sender.add(req, hold_kv=True)
    assert blocks(sender) == {"free": 8}
    result = sender.step()
    assert (result.prefill_started, result.prefill_finished, result.events) == ([req.attempt_id], [], [])
    assert len(sender.block_table(req.attempt_id)) == 3
    assert blocks(sender) == {"free": 5, "running": 3}
    # 2. The decode side holds blocks for the tokens and one for growth, and runs nothing.
    reservation = receiver.reserve(req)
    assert (len(reservation.block_table), reservation.num_tokens, reservation.num_cached_tokens) == (3, 40, 0)
    assert blocks(receiver) == {"free": 4, "receiving": 4}
    assert not receiver.has_work()
    # 3. The last chunk samples the first token; the source stays.
    result = sender.step()
    assert (result.prefill_started, result.prefill_finished) == ([], [req.attempt_id])
    assert [event.index for event in result.events] == [0]
    assert blocks(sender) == {"free": 5, "held": 3}
    assert not sender.has_work()
    # 4. Committed: it decodes; only now its full blocks can be found.
    transfer(sender, receiver, reservation)
    receiver.commit(req.attempt_id, result.events[0])
    assert blocks(receiver) == {"free": 4, "running": 4}
    assert receiver.step().prefill_started == []
    # 5. Released: the source's full blocks stay as cache.
    sender.release(req.attempt_id)
    assert blocks(sender) == {"free": 6, "cached": 2}
    sender.release(req.attempt_id)
    audit(sender)
    receiver.drain()
    audit(receiver)


def test_only_what_is_missing_is_asked_for() -> None:
    sender, receiver = SimEngine(), SimEngine()
    hand_over(sender, receiver, request("a", prompt(1, 40), max_tokens=9))
    req = request("b", prompt(1, 40), max_tokens=30)
    first = prefill(sender, req)
    reservation = receiver.reserve(req)
    assert reservation.num_cached_tokens == 32
    assert reservation.block_table[:2] == receiver.block_table(AttemptId("a/1"))[:2]
    transfer(sender, receiver, reservation)
    receiver.commit(req.attempt_id, first)
    receiver.drain()
    assert [first.token_id, *receiver.tokens(req.attempt_id)] == alone(req)


def test_a_whole_cached_prompt_leaves_nothing_to_send() -> None:
    sender, receiver = SimEngine(), SimEngine()
    hand_over(sender, receiver, request("a", prompt(1, 48), max_tokens=9))
    req = request("b", prompt(1, 48), max_tokens=30)
    first = prefill(sender, req)
    assert receiver.reserve(req).num_cached_tokens == 48
    receiver.commit(req.attempt_id, first)
    receiver.drain()
    assert [first.token_id, *receiver.tokens(req.attempt_id)] == alone(req)


def test_blocks_that_are_being_received_do_not_match() -> None:
    engine = SimEngine()
    engine.reserve(request("a", prompt(1, 40), max_tokens=9))
    assert engine.reserve(request("b", prompt(1, 40), max_tokens=9)).num_cached_tokens == 0


def test_an_aborted_receive_is_quarantined_and_never_published() -> None:
    engine = SimEngine(8)
    req = request("a", prompt(1, 40), max_tokens=9)
    engine.reserve(req)
    engine.abort(req.attempt_id)
    engine.abort(req.attempt_id)
    assert blocks(engine) == {"free": 4, "quarantined": 4}
    with pytest.raises(LookupError):
        engine.commit(req.attempt_id, TokenEvent(req.attempt_id, 0, 1))
    engine.quiesced(req.attempt_id)
    engine.quiesced(req.attempt_id)
    assert blocks(engine) == {"free": 8}
    audit(engine)


def test_a_received_sequence_can_be_preempted_and_recomputed() -> None:
    sender, receiver = SimEngine(), SimEngine(9)
    requests = [request(name, prompt(ord(name), 40), max_tokens=50) for name in "ab"]
    firsts = [hand_over(sender, receiver, req) for req in requests]
    receiver.drain()
    assert receiver.stats().num_preemptions > 0
    for req, first in zip(requests, firsts, strict=True):
        assert [first.token_id, *receiver.tokens(req.attempt_id)] == alone(req)
    audit(receiver)


def test_a_reservation_that_does_not_fit_holds_nothing() -> None:
    engine = SimEngine(8)
    engine.reserve(request("a", prompt(1, 60), max_tokens=9))
    with pytest.raises(Overloaded, match="3 of 8 blocks"):
        engine.reserve(request("b", prompt(2, 50), max_tokens=90))
    assert blocks(engine) == {"free": 3, "receiving": 5}
    assert engine.reserve(request("b", prompt(2, 40), max_tokens=1)).num_tokens == 40


def test_growth_is_bounded_by_what_a_sequence_can_use() -> None:
    engine = SimEngine(8, decode_reserve_blocks=5)
    engine.reserve(request("a", prompt(1, 20), max_tokens=4))
    assert blocks(engine) == {"free": 6, "receiving": 2}


def test_a_first_token_that_ends_the_request_holds_its_blocks_for_a_reader() -> None:
    engine = SimEngine()
    req = request("a", prompt(1, 40), max_tokens=1)
    assert prefill(engine, req).finish_reason is FinishReason.LENGTH
    assert engine.stats().seqs_by_state["held"] == 1
    engine.release(req.attempt_id)
    audit(engine)


@pytest.mark.parametrize(("index", "token_id"), [(1, 5), (0, VOCAB_SIZE), (0, -1)])
def test_a_wrong_first_token_is_refused(index: int, token_id: int) -> None:
    engine = SimEngine()
    req = request("a", prompt(1, 40), max_tokens=9)
    engine.reserve(req)
    with pytest.raises(TransferError):
        engine.commit(req.attempt_id, TokenEvent(req.attempt_id, index, token_id))
    assert engine.stats().seqs_by_state["receiving"] == 1


def test_workers_must_agree_on_the_end() -> None:
    engine = SimEngine()
    req = request("a", prompt(1, 40), max_tokens=1)
    engine.reserve(req)
    with pytest.raises(TransferError, match="length"):
        engine.commit(req.attempt_id, TokenEvent(req.attempt_id, 0, 5))
    engine.commit(req.attempt_id, TokenEvent(req.attempt_id, 0, 5, finish_reason=FinishReason.LENGTH))
    audit(engine)


# Finish rules. The no-op runner always samples token 7.


def outcome(req: GenerateRequest, **config: Any) -> tuple[int, FinishReason | None, list[tuple[int, ...]]]:
    """How many tokens, why it ended, and what was banned at each of them."""
    bans: list[tuple[int, ...]] = []

    def remember(plan: StepPlan) -> None:
        bans.extend(tuple(entry.sample.banned_token_ids) for entry in plan.entries if entry.sample is not None)

    settings = {"vocab_size": 997, "eos_token_ids": (7,), **config}
    engine = LocalEngine(
        EngineConfig(num_blocks=16, **settings),
        NoopRunner(16, on_plan=remember),
        PrefixHasher(b"s", ""),
        ManualClock(),
    )
    engine.add(req)
    events: list[TokenEvent] = []
    while engine.has_work():
        events += engine.step().events
    audit(engine)
    assert all(event.finish_reason is None for event in events[:-1])
    return len(events), events[-1].finish_reason, bans


def test_eos_stops() -> None:
    assert outcome(request("a", [1, 2], max_tokens=9)) == (1, FinishReason.STOP, [()])


def test_eos_wins_over_the_length() -> None:
    assert outcome(request("a", [1, 2], max_tokens=1)) == (1, FinishReason.STOP, [()])


def test_ignored_eos_runs_to_max_tokens() -> None:
    assert outcome(request("a", [1, 2], max_tokens=3, ignore_eos=True)) == (3, FinishReason.LENGTH, [()] * 3)


def test_a_stop_token_stops_even_if_eos_is_ignored() -> None:
    req = request("a", [1, 2], max_tokens=9, ignore_eos=True, stop_token_ids=(7, 8))
    assert outcome(req) == (1, FinishReason.STOP, [()])


def test_before_min_tokens_nothing_stops_and_the_stops_are_banned() -> None:
    req = request("a", [1, 2], max_tokens=9, min_tokens=3, stop_token_ids=(5,))
    assert outcome(req) == (4, FinishReason.STOP, [(5, 7)] * 3 + [()])


def test_min_tokens_counts_what_an_earlier_attempt_delivered() -> None:
    req = request("a", [1, 2], delivered=[3, 4], max_tokens=9, min_tokens=3)
    assert outcome(req) == (2, FinishReason.STOP, [(7,), ()])


def test_max_tokens_counts_what_an_earlier_attempt_delivered() -> None:
    req = request("a", [1, 2], delivered=[3, 4], max_tokens=5, ignore_eos=True)
    assert outcome(req)[:2] == (3, FinishReason.LENGTH)


def test_the_models_context_ends_a_sequence_with_length() -> None:
    req = request("a", prompt(1, 20), max_tokens=100, ignore_eos=True)
    assert outcome(req, max_model_len=30)[:2] == (10, FinishReason.LENGTH)


def test_the_pool_is_a_limit_like_the_models_context() -> None:
    req = request("a", prompt(1, 250), max_tokens=100, ignore_eos=True)
    assert outcome(req)[:2] == (6, FinishReason.LENGTH)


# Refusals.


@pytest.mark.parametrize(
    ("req", "error", "message"),
    [
        (request("a", []), InvalidRequest, "prompt of 0"),
        (request("a", [1, VOCAB_SIZE]), InvalidRequest, r"\[0, 997\)"),
        (request("a", [-1]), InvalidRequest, r"\[0, 997\)"),
        (request("a", [1], max_tokens=0), InvalidRequest, "max_tokens is 0"),
        (request("a", [1], delivered=[2, 3], max_tokens=2), InvalidRequest, "2 tokens are delivered"),
        (
            request("a", [1], min_tokens=1, stop_token_ids=tuple(range(VOCAB_SIZE))),
            InvalidRequest,
            "no token to choose",
        ),
        (request("a", [1], cache_salt="x" * 2000), InvalidRequest, "cache_salt"),
        (request("a", prompt(1, 100)), PromptTooLong, "100 tokens .* the model's context is 100 tokens"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(
    req: GenerateRequest, error: type[Exception], message: str
) -> None:
    engine = SimEngine(max_model_len=100)
    for method in (engine.add, engine.reserve):
        with pytest.raises(error, match=message):
            method(req)
    audit(engine)


def test_a_prompt_that_fills_the_pool_is_refused() -> None:
    with pytest.raises(PromptTooLong, match="KV cache is 32 tokens"):
        SimEngine(2).add(request("a", prompt(1, 32)))


def test_an_attempt_is_known_once() -> None:
    engine = SimEngine()
    engine.add(request("a", [1]))
    with pytest.raises(InvalidRequest, match="already"):
        engine.add(request("a", [1]))


def test_unknown_attempts_are_ignored() -> None:
    engine = SimEngine()
    for method in (engine.release, engine.abort, engine.quiesced):
        method(AttemptId("nobody/1"))
    audit(engine)


def test_a_runner_with_another_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="does not match"):
        LocalEngine(EngineConfig(num_blocks=4, vocab_size=9), NoopRunner(5), PrefixHasher(b"s", ""), ManualClock())


def test_abort_ends_a_sequence_in_each_state() -> None:
    engine = SimEngine(12, max_num_batched_tokens=16)
    running, waiting, held = (request(name, prompt(ord(name), 40), max_tokens=9) for name in "rwh")
    engine.add(held, hold_kv=True)
    engine.drain()
    engine.add(running)
    engine.add(waiting)
    engine.step()
    seqs = engine.stats().seqs_by_state
    assert (seqs["running"], seqs["waiting"], seqs["held"]) == (1, 1, 1)
    for req in (running, waiting, held):
        engine.abort(req.attempt_id)
    assert not engine.has_work()
    audit(engine)


# Random lives.

PROMPTS = [prompt(1, 5), prompt(4, 9), prompt(2, 15), prompt(1, 40), prompt(1, 32) + prompt(3, 20)]
MAX_TOKENS = 60


@functools.cache
def expected(which: int) -> list[int]:
    """What an undisturbed run generates."""
    return alone(request("x", PROMPTS[which], max_tokens=MAX_TOKENS))


class Life:
    """Everything a worker can do to its engine, in any order, with a pool too small for comfort."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.engine = SimEngine(
            rng.randint(5, 12),
            max_num_batched_tokens=rng.choice([3, 16, 40, 200]),
            max_num_seqs=rng.randint(2, 6),
            enable_prefix_caching=rng.random() < 0.8,
        )
        self.sender = SimEngine(200)
        self.alive: dict[AttemptId, tuple[int, GenerateRequest]] = {}
        self.receiving: dict[AttemptId, tuple[Reservation, TokenEvent]] = {}
        self.quarantined: list[AttemptId] = []
        self.held: list[AttemptId] = []
        self.count = 0

    def live(self, num_actions: int) -> None:
        """Random actions, then a peaceful end."""
        actions = [self.add, self.reserve, self.end_of_transfer, self.quiesced, self.abort, self.release, self.steps]
        for _ in range(num_actions):
            self.rng.choices(actions, weights=[3, 3, 4, 2, 1, 2, 8])[0]()
            audit_ledger(self.engine)
        while self.receiving:
            self.end_of_transfer()
        while self.quarantined:
            self.quiesced()
        while self.engine.has_work() or self.held:
            self.steps()
            self.release()
        audit(self.engine)
        assert not self.alive

    def draw(self) -> tuple[int, GenerateRequest]:
        """A request, perhaps of an attempt that resumes."""
        self.count += 1
        which = self.rng.randrange(len(PROMPTS))
        num_delivered = self.rng.choice([0, 0, 3])
        return which, request(
            str(self.count),
            PROMPTS[which],
            delivered=expected(which)[:num_delivered],
            max_tokens=self.rng.randint(num_delivered + 1, MAX_TOKENS),
            priority=self.rng.randrange(2),
        )

    def add(self) -> None:
        which, req = self.draw()
        hold_kv = self.rng.random() < 0.2
        self.engine.add(req, hold_kv=hold_kv)
        self.alive[req.attempt_id] = (which, req)
        if hold_kv:
            self.held.append(req.attempt_id)

    def reserve(self) -> None:
        which, req = self.draw()
        try:
            reservation = self.engine.reserve(req)
        except Overloaded:
            return
        first = prefill(self.sender, req)
        if first.finish_reason is not None:
            self.engine.abort(req.attempt_id)
            self.quarantined.append(req.attempt_id)
            self.sender.release(req.attempt_id)
        else:
            self.receiving[req.attempt_id] = (reservation, first)
            self.alive[req.attempt_id] = (which, req)

    def end_of_transfer(self) -> None:
        if not self.receiving:
            return
        attempt_id = self.rng.choice(list(self.receiving))
        reservation, first = self.receiving.pop(attempt_id)
        if self.rng.random() < 0.8:
            transfer(self.sender, self.engine, reservation)
            self.engine.commit(attempt_id, first)
            self.engine.events[attempt_id] = [first]
        else:
            self.engine.abort(attempt_id)
            del self.alive[attempt_id]
            self.quarantined.append(attempt_id)
        self.sender.release(attempt_id)

    def quiesced(self) -> None:
        if self.quarantined:
            self.engine.quiesced(self.quarantined.pop())

    def abort(self) -> None:
        if candidates := [attempt_id for attempt_id in self.alive if attempt_id not in self.receiving]:
            attempt_id = self.rng.choice(candidates)
            self.engine.abort(attempt_id)
            self.forget(attempt_id)

    def release(self) -> None:
        for attempt_id in [attempt_id for attempt_id in self.held if self.engine.tokens(attempt_id)]:
            self.engine.release(attempt_id)
            self.forget(attempt_id)

    def steps(self) -> None:
        for _ in range(self.rng.choice([1, 2, 10, 30])):
            had_work = self.engine.has_work()
            result = self.engine.step()
            assert bool(result.num_tokens or result.preempted) == had_work
            for event in result.events:
                self.engine.events.setdefault(event.attempt_id, []).append(event)
                self.check(event)

    def check(self, event: TokenEvent) -> None:
        which, req = self.alive[event.attempt_id]
        assert event.token_id == expected(which)[event.index]
        assert event.index == req.num_delivered_tokens + len(self.engine.events[event.attempt_id]) - 1
        is_last = (
            event.index + 1 == req.sampling.max_tokens or len(PROMPTS[which]) + event.index + 1 == self.engine.max_len
        )
        assert (event.finish_reason is FinishReason.LENGTH) == is_last
        if is_last and event.attempt_id not in self.held:
            self.forget(event.attempt_id)

    def forget(self, attempt_id: AttemptId) -> None:
        del self.alive[attempt_id]
        if attempt_id in self.held:
            self.held.remove(attempt_id)


@settings(max_examples=25, deadline=None)
@given(rng=st.randoms(use_true_random=True))
def test_no_life_leaks_or_changes_a_token(rng: random.Random) -> None:
    Life(rng).live(num_actions=80)
