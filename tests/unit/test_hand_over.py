"""Two leaders with simulated engines hand requests over, under every order of events that hypothesis finds."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from baton.clock import ManualClock
from baton.kv_layout import KVGeometry
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, RequestId, attempt_id
from engine.engine import LocalEngine
from engine.overlap import OverlappingEngine
from engine.types import EngineConfig
from kvtransfer.api import PeerRank, PeerWorker, TransferId
from tests.support.audit import audit, audit_ledger
from tests.support.deferred_runner import DeferredRunner
from tests.support.direct_transfer import DirectEndpoint, Network
from tests.support.sim_engine import VOCAB_SIZE, TpSimRunner, alone, prompt, request
from worker import codec, sending
from worker.group import Group, GroupRunner
from worker.hook import TransferHook
from worker.leader import Leader
from worker.role import RolePolicy

ROUTER = "router-1"


class FakeChannel:
    """Both ends of the leader's channel to its front, as two lists."""

    def __init__(self) -> None:
        self.to_leader: list[Any] = []
        self.from_leader: list[Any] = []
        self.socket = None

    def send(self, message: Any) -> None:
        self.from_leader.append(message)

    def drain(self) -> list[Any]:
        messages, self.to_leader = self.to_leader, []
        return messages


class Worker:
    """A leader without processes around it. With `overlaps` its steps do, as on a GPU."""

    def __init__(
        self, network: Network, name: str, clock: ManualClock, num_blocks: int, chunk: int, overlaps: bool
    ) -> None:
        self.name = name
        self.runner = TpSimRunner(num_blocks)
        self.endpoint = DirectEndpoint(network, name, self.runner)
        self.hook = TransferHook(self.endpoint)
        group = Group(None, "", 1, self.endpoint, self.hook)  # type: ignore[arg-type]
        runner = GroupRunner(self.runner, group, DeferredRunner(self.runner) if overlaps else None)
        geometry: KVGeometry = self.runner.layout.geometry
        config = EngineConfig(
            block_size=geometry.block_size,
            num_blocks=num_blocks,
            max_model_len=512,
            max_num_batched_tokens=chunk,
            vocab_size=VOCAB_SIZE,
        )
        hasher = PrefixHasher(b"secret", self.runner.layout.model.fingerprint)
        self.engine = (
            OverlappingEngine(config, runner, hasher, clock, runner)
            if overlaps
            else LocalEngine(config, runner, hasher, clock)
        )
        self.front = FakeChannel()
        self.leader = Leader(
            self.engine,
            self.endpoint,
            group,
            self.hook,
            self.front,  # type: ignore[arg-type]
            RolePolicy(name, accepts_transfers=True),
            clock,
            tp_size=1,
        )
        runner.before_step = self.leader.before_step

    @property
    def peer(self) -> PeerWorker:
        return PeerWorker(self.name, "1", (PeerRank(0, self.name, 0),))

    def command(self, *message: Any) -> None:
        self.front.to_leader.append(list(message))

    def turn(self) -> list[list[Any]]:
        """One turn; what the leader then said to our router."""
        self.leader.turn()
        said, self.front.from_leader = self.front.from_leader, []
        return [item for message in said if message[0] == "events" for item in message[1].get(ROUTER, [])]


class Pair:
    """A prefill and two decode workers, and a test that plays the router."""

    def __init__(
        self, num_blocks: int = 64, decode_blocks: int = 64, chunk: int = 48, *, overlaps: bool = False
    ) -> None:
        self.clock = ManualClock()
        self.network = Network()
        self.prefill = Worker(self.network, "prefill-0", self.clock, num_blocks, chunk, overlaps)
        self.decodes = [
            Worker(self.network, f"decode-{i}", self.clock, decode_blocks, chunk, overlaps) for i in range(2)
        ]
        self.workers = [self.prefill, *self.decodes]
        self.tokens: dict[AttemptId, dict[int, int]] = defaultdict(dict)
        self.finished: dict[AttemptId, str] = {}
        self.failed: dict[AttemptId, str] = {}
        self.refused: dict[AttemptId, str] = {}
        self.moments: dict[AttemptId, dict[str, float]] = {}
        for worker in self.workers:
            worker.command("router_here", ROUTER)

    def start(self, req: GenerateRequest, decode: int | None = 0) -> None:
        peer = None if decode is None else codec.pack_peer(self.decodes[decode].peer)
        self.prefill.command("start", ROUTER, codec.pack_request(req), peer)

    def abort(self, attempt: AttemptId) -> None:
        for worker in self.workers:
            worker.command("abort", attempt)

    def turn(self, worker: Worker) -> None:
        for item in worker.turn():
            match item:
                case ["token", packed]:
                    event = codec.unpack_token(packed)
                    assert self.tokens[event.attempt_id].get(event.index, event.token_id) == event.token_id
                    self.tokens[event.attempt_id][event.index] = event.token_id
                    if event.finish_reason:
                        self.finished[event.attempt_id] = event.finish_reason
                case ["failed", attempt, code, _, _]:
                    self.failed[attempt] = code
                case ["refused", attempt, worker_id, _, _]:
                    self.refused[attempt] = worker_id
                case ["timeline", attempt, moments, *_]:
                    self.moments.setdefault(attempt, {}).update(moments)
                case _:
                    raise AssertionError(item)

    def run(self, turns: int = 400) -> None:
        """Until nothing happens any more."""
        for _ in range(turns):
            while self.network.messages:
                self.network.deliver()
            for worker in self.workers:
                self.turn(worker)

    def output(self, attempt: AttemptId) -> list[int]:
        got = self.tokens[attempt]
        assert sorted(got) == list(range(len(got))), f"a token is missing: {sorted(got)}"
        return [got[index] for index in range(len(got))]

    def audit(self) -> None:
        for worker in self.workers:
            audit(worker.engine)
            assert not len(worker.leader._sending)
            assert not len(worker.leader._receiving)
            stats = worker.endpoint.stats()
            assert (stats.open_sends, stats.open_receives) == (0, 0)

    def close(self) -> None:
        for worker in self.workers:
            worker.runner.close()


@pytest.fixture(params=[False, True], ids=["one by one", "overlapping"])
def pair(request: Any) -> Any:
    pair = Pair(overlaps=request.param)
    yield pair
    pair.close()


def test_a_handed_over_request_generates_what_a_single_engine_does(pair: Pair) -> None:
    req = request("a", prompt(1, 150), max_tokens=20)
    pair.start(req)
    pair.run(60)
    assert pair.output(req.attempt_id) == alone(req)
    assert pair.finished[req.attempt_id] == "length"
    assert pair.decodes[0].engine.stats().num_tokens_computed == 19  # decode computed no prompt
    pair.audit()


def test_a_cached_prefix_does_not_travel_again(pair: Pair) -> None:
    first = request("a", prompt(1, 150), max_tokens=4)
    again = request("b", (*prompt(1, 150), 5, 6, 7), max_tokens=4)
    pair.start(first)
    pair.run(40)
    pair.start(again)
    pair.run(40)
    assert pair.output(again.attempt_id) == alone(again)
    transfers = list(pair.network.transfers.values())
    assert transfers[1].granted is not None
    assert transfers[1].granted[1] == 144
    pair.audit()


def test_first_token_that_ends_the_request_leaves_nothing_behind(pair: Pair) -> None:
    req = request("a", prompt(1, 100), max_tokens=1)
    pair.start(req)
    pair.run(40)
    assert pair.output(req.attempt_id) == alone(req)
    pair.audit()


def test_a_refused_request_keeps_its_kv_and_goes_to_another_worker() -> None:
    pair = Pair(decode_blocks=33)
    big = request("big", prompt(2, 400), max_tokens=100)
    second = request("second", prompt(3, 300), max_tokens=5)
    pair.start(big)
    pair.run(12)
    pair.start(second)
    pair.run(12)
    assert pair.refused[second.attempt_id] == "decode-0"
    assert {"received", "prefill_begin", "prefill_end"} <= set(pair.moments[second.attempt_id]), "told with the token"
    computed = pair.prefill.engine.stats().num_tokens_computed
    pair.prefill.command("redirect", second.attempt_id, codec.pack_peer(pair.decodes[1].peer))
    pair.run(150)
    assert pair.output(second.attempt_id) == alone(second)
    assert pair.output(big.attempt_id) == alone(big)
    assert pair.prefill.engine.stats().num_tokens_computed == computed
    pair.audit()
    pair.close()


def test_a_redirect_in_the_middle_of_a_prefill_digests_the_rest_although_its_blocks_were_somebody_elses() -> None:
    pair = Pair(num_blocks=28, decode_blocks=33)
    big = request("big", prompt(2, 400), max_tokens=100)
    second = request("second", prompt(3, 300), max_tokens=5)
    urgent = request("urgent", prompt(4, 96), max_tokens=2, priority=-1)
    pair.start(big)
    pair.run(12)
    pair.start(second)
    pair.turn(pair.prefill)
    pair.start(urgent, None)  # no chunk of the other one between its refusal and its redirect
    while second.attempt_id not in pair.refused:
        pair.run(1)
    pair.prefill.command("redirect", second.attempt_id, codec.pack_peer(pair.decodes[1].peer))
    pair.run(1)
    assert not pair.tokens[second.attempt_id], "chunks are still to come"
    pair.run(150)
    assert pair.output(second.attempt_id) == alone(second)
    pair.audit()
    pair.close()


def test_kv_of_earlier_steps_is_announced_with_the_event_of_the_last_one() -> None:
    """A redirect may come while the step that writes is under way."""

    class Fired:
        def query(self) -> bool:
            return True

    class Endpoint:
        calls: ClassVar[list[tuple[Any, ...]]] = []

        def written(self, *announced: Any) -> None:
            self.calls.append(announced)

    endpoint, ready = Endpoint(), Fired()
    hook = TransferHook(endpoint)  # type: ignore[arg-type]
    hook.layer_done(0, ready)
    Group(None, "", 1, endpoint, hook).written(TransferId(b"x"), 32)  # type: ignore[arg-type]
    assert endpoint.calls == [(b"x", None, 32, ready)]


def test_parked_kv_is_given_up_when_no_router_asks_for_it() -> None:
    pair = Pair(decode_blocks=33)
    big, second = request("big", prompt(2, 400), max_tokens=100), request("x", prompt(3, 300), max_tokens=5)
    pair.start(big)
    pair.run(12)
    pair.start(second)
    pair.run(12)
    assert pair.prefill.engine.stats().seqs_by_state["held"] == 1
    pair.clock.advance(31)
    pair.run(200)
    assert pair.failed[second.attempt_id] == "kv_transfer_failed"
    pair.audit()
    pair.close()


def test_an_abort_that_overtakes_the_reserve_wins(pair: Pair) -> None:
    req = request("a", prompt(1, 150), max_tokens=20)
    pair.start(req)
    pair.turn(pair.prefill)  # the reserve is on its way
    pair.decodes[0].command("abort", req.attempt_id)
    pair.run(40)
    assert pair.refused[req.attempt_id] == "decode-0"
    pair.abort(req.attempt_id)
    pair.run(10)
    pair.audit()


def test_a_router_that_leaves_takes_all_its_attempts_along(pair: Pair) -> None:
    for index in range(4):
        pair.start(request(f"r{index}", prompt(index, 150), max_tokens=200), decode=index % 2)
    pair.run(6)
    for worker in pair.workers:
        worker.command("router_gone", ROUTER)
    pair.run(20)
    pair.audit()


def test_every_send_state_reaches_its_end() -> None:
    for table, end in ((sending._NEXT, sending.SendState.DONE),):
        reached = {end}
        for _ in table:
            reached |= {state for state, following in table.items() if following & reached}
        assert reached == set(table)


class HandOver(RuleBasedStateMachine):
    """Random starts, aborts, broken links, redirects and orders of delivery; then everything must come to rest."""

    @initialize(
        decode_blocks=st.sampled_from([33, 40, 64]), chunk=st.sampled_from([16, 48, 500]), overlaps=st.booleans()
    )
    def make(self, decode_blocks: int, chunk: int, overlaps: bool) -> None:
        self.pair = Pair(decode_blocks=decode_blocks, chunk=chunk, overlaps=overlaps)
        self.requests: dict[AttemptId, GenerateRequest] = {}
        self.aborted: set[AttemptId] = set()

    @precondition(lambda self: len(self.requests) < 12)  # more would not come to rest within teardown's turns
    @rule(
        seed=st.integers(0, 3),
        length=st.integers(1, 300),
        max_tokens=st.integers(1, 30),
        decode=st.sampled_from([None, 0, 1]),
    )
    def start(self, seed: int, length: int, max_tokens: int, decode: int | None) -> None:
        name = f"r{len(self.requests)}"
        req = request(name, prompt(seed, length), max_tokens=max_tokens)
        assert req.attempt_id == attempt_id(RequestId(name), 1)
        self.requests[req.attempt_id] = req
        self.pair.start(req, decode)

    @rule(index=st.integers(0, 2))
    def turn(self, index: int) -> None:
        self.pair.turn(self.pair.workers[index])
        audit_ledger(self.pair.workers[index].engine)

    @precondition(lambda self: self.pair.network.messages)
    @rule()
    def deliver(self) -> None:
        self.pair.network.deliver()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), everywhere=st.booleans())
    def abort(self, data: st.DataObject, everywhere: bool) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(attempt)
        if everywhere:
            self.pair.abort(attempt)
        else:
            self.pair.decodes[0].command("abort", attempt)

    @rule(index=st.integers(0, 2))
    def cut(self, index: int) -> None:
        self.pair.network.cut(self.pair.workers[index].name)

    @precondition(lambda self: self.pair.refused)
    @rule(data=st.data(), decode=st.integers(0, 1))
    def redirect(self, data: st.DataObject, decode: int) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.pair.refused)))
        del self.pair.refused[attempt]
        self.pair.prefill.command("redirect", attempt, codec.pack_peer(self.pair.decodes[decode].peer))

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            pair = self.pair
            for _ in range(6):  # the router: asks again for what was refused, until everything has an end
                pair.run(60)
                for attempt in list(pair.refused):
                    del pair.refused[attempt]
                    pair.prefill.command("redirect", attempt, codec.pack_peer(pair.decodes[1].peer))
            for attempt in {*pair.refused, *self.aborted}:
                pair.abort(attempt)
            pair.run(10)
            for attempt, req in self.requests.items():
                expected = alone(req)
                got = pair.tokens[attempt]
                assert {index: expected[index] for index in got} == got
                if attempt in pair.finished:
                    assert pair.output(attempt) == expected
                else:
                    assert attempt in self.aborted or attempt in pair.failed or attempt in pair.refused, attempt
                    pair.abort(attempt)
            pair.run(10)
            pair.audit()
        finally:
            self.pair.close()


HandOver.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHandOver = HandOver.TestCase
