"""One attempt puts in order whatever its workers say, in whatever order they say it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.clock import Clock, ManualClock, SystemClock
from baton.errors import Cancelled, LayoutMismatch, Overloaded, ServeError, TransferError, Unavailable, WorkerLost
from baton.request import AttemptId, RequestId, SamplingParams
from protos import worker_pb2 as pb
from router.attempt import Attempt, Work
from router.fleet import Fleet
from router.placement import KVPath, Placement, WorkerKey
from router.timeline import Timeline
from router.worker_link import WorkerLink

ID = AttemptId("r/1")
COUNT = 6


def link(name: str, role: str) -> WorkerLink:
    """A worker that has said hello and nothing since; what it is sent stays in its outbox."""
    found = WorkerLink(name, "", token="", router_id="r", clock=SystemClock(), on_change=lambda: None)
    found.hello = pb.WorkerHello(
        worker_id=name, incarnation="1", role=role, fingerprint="f", block_size=16, num_blocks=100, max_num_seqs=8
    )
    found.heartbeat = pb.Heartbeat(num_free_blocks=100)
    return found


@dataclass
class Stage:
    """One attempt between a prefill and two decode workers, with `delivered` tokens before it."""

    delivered: list[int] = field(default_factory=list)
    is_local: bool = False
    max_unread_tokens: int = 100
    clock: Clock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        self.p, self.d, self.d2 = link("p", "prefill"), link("d", "decode"), link("d2", "decode")
        self.fleet = Fleet(secret=b"s" * 16, router_id="r", clock=self.clock, spawn=_no_task, on_change=_nothing)
        self.fleet.links = {"p": self.p, "d": self.d, "d2": self.d2}
        self.timeline = Timeline("r", 0.0)
        key = WorkerKey("d", "1")
        self.attempt = self.begin(ID, Placement(key) if self.is_local else Placement(key, WorkerKey("p", "1")))

    def begin(self, attempt_id: AttemptId, placement: Placement) -> Attempt:
        work = Work(RequestId("r"), [7, 8, 9], SamplingParams(max_tokens=COUNT), self.clock.now() + 60, self.timeline)
        unread = self.max_unread_tokens
        attempt = Attempt(attempt_id, work, self.delivered, self.fleet, self.clock, max_unread_tokens=unread)
        attempt.begin(placement)
        return attempt

    def token(self, index: int) -> pb.Token:
        return pb.Token(
            attempt_id=ID, index=index, token_id=100 + index, finish_reason="length" if index == COUNT - 1 else ""
        )

    def sent(self, worker: WorkerLink) -> list[str | None]:
        """The kinds of messages in a worker's outbox."""
        return [message.WhichOneof("kind") for message in worker._outbox]

    def received(self) -> tuple[list[int], ServeError | None]:
        """All that a consumer gets now: token ids and the error after them."""
        tokens: list[int] = []
        while self.attempt._ready or self.attempt._error is not None:
            try:
                tokens += [event.token_id for event in _now(self.attempt.receive())]
            except ServeError as error:
                return tokens, error
        return tokens, None

    def lose(self, worker: WorkerLink) -> None:
        worker._lose("it died")


def _no_task(work: Any) -> Any:
    raise AssertionError("no session is started here")


def _nothing() -> None:
    pass


def _now(work: Any) -> Any:
    """The result of a coroutine that does not wait."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def on_loop(scenario: Callable[[], None]) -> None:
    async def main() -> None:
        scenario()

    asyncio.run(main())


@settings(deadline=None)
@given(data=st.data(), num_delivered=st.integers(0, COUNT - 1))
def test_any_interleaving_with_repetitions_is_delivered_once_and_in_order(data: Any, num_delivered: int) -> None:
    def scenario() -> None:
        stage = Stage(delivered=[100 + i for i in range(num_delivered)])
        queues = {
            "p": [num_delivered],
            "d": list(range(num_delivered + 1, COUNT)),
        }
        got: list[int] = []
        said: dict[str, list[int]] = {"p": [], "d": []}
        while any(queues.values()):
            who = data.draw(st.sampled_from([name for name, queue in queues.items() if queue]))
            repeat = bool(said[who]) and data.draw(st.booleans())
            index = data.draw(st.sampled_from(said[who])) if repeat else queues[who].pop(0)
            said[who].append(index)
            stage.attempt.on_token(getattr(stage, who), stage.token(index))
            if data.draw(st.booleans()):
                got += stage.received()[0]
        got += stage.received()[0]
        assert got == [100 + index for index in range(num_delivered, COUNT)]

    on_loop(scenario)


@settings(deadline=None)
@given(data=st.data())
def test_whatever_is_lost_what_came_is_a_prefix_and_the_end_is_named(data: Any) -> None:
    events = ["p-token", *["d-token"] * (COUNT - 1), "p-lost", "d-lost", "p-failed", "d-failed"]

    def scenario() -> None:
        stage = Stage()
        next_index = 1
        order = data.draw(st.permutations(events).map(lambda e: e[: data.draw(st.integers(1, len(e)))]))
        for event in order:
            who, what = event.split("-")
            worker = getattr(stage, who)
            if worker.hello is None:
                continue
            if what == "token":
                index = 0 if who == "p" else next_index
                next_index += who == "d"
                stage.attempt.on_token(worker, stage.token(index))
            elif what == "lost":
                stage.lose(worker)
            else:
                stage.attempt.on_failed(worker, pb.AttemptFailed(attempt_id=ID, code="unavailable", message="no"))
        tokens, error = stage.received()
        assert tokens == [100 + index for index in range(len(tokens))]
        assert (len(tokens) == COUNT) <= (error is None)
        if error is not None:
            assert stage.attempt.blamed
        stage.attempt.close()
        stage.attempt.settle()
        assert not any(worker.num_open or worker._blocks or worker._prefill_tokens for worker in (stage.p, stage.d))

    on_loop(scenario)


def test_a_loss_of_the_prefill_worker_matters_until_the_decode_worker_has_spoken() -> None:
    def scenario() -> None:
        early = Stage()
        early.attempt.on_token(early.p, early.token(0))
        early.lose(early.p)
        tokens, error = early.received()
        assert (tokens, type(error)) == ([100], WorkerLost)
        assert early.attempt.blamed == {WorkerKey("p", "1")}
        assert early.sent(early.d) == ["abort"]
        late = Stage()
        late.attempt.on_token(late.p, late.token(0))
        late.attempt.on_token(late.d, late.token(1))
        late.lose(late.p)
        assert late.received() == ([100, 101], None)

    on_loop(scenario)


def test_a_missing_token_fails_the_attempt() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_token(stage.p, stage.token(0))
        stage.attempt.on_token(stage.d, stage.token(2))
        tokens, error = stage.received()
        assert (tokens, type(error)) == ([100], Unavailable)

    on_loop(scenario)


def test_after_the_last_token_nothing_is_aborted_and_nothing_more_is_heard() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_token(stage.p, stage.token(0))
        for index in range(1, COUNT):
            stage.attempt.on_token(stage.d, stage.token(index))
        stage.lose(stage.p)
        assert stage.received() == ([100 + index for index in range(COUNT)], None)
        stage.attempt.close()
        assert stage.sent(stage.d) == []

    on_loop(scenario)


def test_when_the_first_token_is_the_last_the_decode_worker_is_told() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_token(stage.p, pb.Token(attempt_id=ID, index=0, token_id=1, finish_reason="stop"))
        stage.attempt.close()
        assert (stage.sent(stage.p), stage.sent(stage.d)) == (["start"], ["abort"])

    on_loop(scenario)


def test_closing_aborts_both_workers_once_and_wakes_who_waits() -> None:
    async def main() -> None:
        stage = Stage()
        waiting = asyncio.create_task(stage.attempt.receive())
        await asyncio.sleep(0)
        stage.attempt.close(Unavailable("over"))
        stage.attempt.close()
        with pytest.raises(Unavailable, match="over"):
            await waiting
        assert (stage.sent(stage.p), stage.sent(stage.d)) == (["start", "abort"], ["abort"])

    asyncio.run(main())


def test_a_local_attempt_uses_one_worker() -> None:
    def scenario() -> None:
        stage = Stage(is_local=True)
        for index in range(COUNT):
            stage.attempt.on_token(stage.d, stage.token(index))
        assert len(stage.received()[0]) == COUNT
        assert (stage.sent(stage.p), stage.sent(stage.d)) == ([], ["start"])
        assert not stage.d._outbox[0].start.HasField("decode_peer")

    on_loop(scenario)


def refusal(worker_id: str, code: str = "overloaded") -> pb.ReserveRefused:
    return pb.ReserveRefused(attempt_id=ID, worker_id=worker_id, code=code, message="no room")


def test_a_refusal_redirects_and_a_stale_one_does_not() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_refused(stage.p, refusal("d"))
        assert stage.sent(stage.p) == ["start", "redirect"]
        assert stage.p._outbox[1].redirect.decode_peer.worker_id == "d2"
        assert stage.d.num_open == 0
        stage.attempt.on_refused(stage.p, refusal("d"))
        assert stage.sent(stage.p) == ["start", "redirect"]
        stage.attempt.on_token(stage.d2, stage.token(1))
        stage.attempt.on_token(stage.p, stage.token(0))
        assert stage.received()[0] == [100, 101]
        assert stage.timeline.told.decode_worker == "d2"

    on_loop(scenario)


def test_x1_the_prefill_worker_is_blamed_when_the_kv_reached_nobody() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_refused(stage.p, refusal("d", TransferError.code))
        assert stage.p._outbox[1].redirect.decode_peer.worker_id == "d2"
        stage.attempt.on_refused(stage.p, refusal("d2", TransferError.code))
        assert isinstance(stage.received()[1], TransferError)
        assert stage.attempt.blamed == {WorkerKey("p", "1")}
        assert stage.sent(stage.p) == ["start", "redirect", "abort"]

    on_loop(scenario)


P_D, P_D2 = (KVPath(WorkerKey("p", "1"), WorkerKey(name, "1")) for name in ("d", "d2"))


def test_kv_that_did_not_arrive_is_remembered_until_some_does() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_refused(stage.p, refusal("d"))
        assert stage.fleet.avoided_paths() == frozenset(), "no room is no broken path"
        stage.attempt.on_refused(stage.p, refusal("d2", TransferError.code))
        assert stage.fleet.avoided_paths() == {P_D2}
        other = stage.begin(AttemptId("s/1"), Placement(WorkerKey("d2", "1"), WorkerKey("p", "1")))
        other.on_token(stage.p, stage.token(0))
        assert stage.fleet.avoided_paths() == {P_D2}, "the prefill worker's token has not taken the path"
        other.on_token(stage.d2, stage.token(1))
        assert stage.fleet.avoided_paths() == frozenset()

    on_loop(scenario)


@pytest.mark.parametrize(
    ("who", "code", "broken"),
    [("d", TransferError.code, {P_D}), ("d", "unavailable", set()), ("p", TransferError.code, set())],
)
def test_a_decode_worker_that_missed_the_kv_has_said_that_the_path_is_broken(
    who: str, code: str, broken: set[KVPath]
) -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_failed(getattr(stage, who), pb.AttemptFailed(attempt_id=ID, code=code, message="so it is"))
        assert stage.fleet.avoided_paths() == broken

    on_loop(scenario)


def test_a_local_failure_says_nothing_of_paths() -> None:
    def scenario() -> None:
        stage = Stage(is_local=True)
        stage.attempt.on_failed(stage.d, pb.AttemptFailed(attempt_id=ID, code=TransferError.code, message="no"))
        assert stage.fleet.avoided_paths() == frozenset()

    on_loop(scenario)


def test_kv_is_not_redirected_by_a_path_that_others_found_broken() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.fleet.kv_did_not_arrive(P_D2, "silence")
        stage.attempt.on_refused(stage.p, refusal("d", TransferError.code))
        assert isinstance(stage.received()[1], TransferError)
        assert stage.attempt.blamed == {WorkerKey("p", "1")}
        assert stage.sent(stage.p) == ["start", "abort"]

    on_loop(scenario)


def test_kv_that_is_redirected_tries_a_path_that_was_broken_and_others_wait_for_it() -> None:
    def scenario() -> None:
        clock = ManualClock()
        stage = Stage(clock=clock)
        stage.fleet.kv_did_not_arrive(P_D2, "silence")
        clock.advance(10.0)
        assert stage.fleet.avoided_paths() == frozenset()
        stage.attempt.on_refused(stage.p, refusal("d"))
        assert stage.sent(stage.p) == ["start", "redirect"]
        assert stage.fleet.avoided_paths() == {P_D2}

    on_loop(scenario)


def test_when_a_path_breaks_attempts_that_wait_to_take_it_are_taken_back() -> None:
    def scenario() -> None:
        stage = Stage()
        placed = {
            name: stage.begin(AttemptId(f"{name}/1"), Placement(WorkerKey(decode, "1"), WorkerKey("p", "1")))
            for name, decode in (("waits", "d"), ("computed", "d"), ("early", "d"), ("elsewhere", "d2"))
        }
        placed["computed"].on_token(stage.p, stage.token(0))
        placed["early"].on_token(stage.d, stage.token(1))
        stage.attempt.on_refused(stage.p, refusal("d", TransferError.code))
        assert {name for name, attempt in placed.items() if attempt.is_moved} == {"waits"}
        with pytest.raises(TransferError):
            _now(placed["waits"].receive())
        assert placed["waits"].blamed == set(), "nobody else needs to be avoided"
        assert [m.abort.attempt_id for m in stage.d._outbox if m.HasField("abort")] == ["waits/1"]
        assert not stage.attempt.is_moved
        assert stage.sent(stage.p)[-1] == "redirect", "who found out goes on with what it has"

    on_loop(scenario)


def test_a_worker_that_starts_again_has_no_broken_paths() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.fleet.kv_did_not_arrive(P_D, "silence")
        stage.fleet.kv_did_not_arrive(P_D2, "silence")
        stage.lose(stage.d)
        stage.fleet._on_change()
        assert stage.fleet.avoided_paths() == {P_D, P_D2}, "only its session broke"
        stage.d.hello = pb.WorkerHello(worker_id="d", incarnation="2", role="decode")
        stage.fleet._on_change()
        assert stage.fleet.avoided_paths() == {P_D2}
        stage.fleet.links.pop("p")
        stage.fleet._on_change()
        assert len(stage.fleet.reachability) == 0

    on_loop(scenario)


def test_a_refusal_for_another_layout_is_final() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_refused(stage.p, refusal("d", LayoutMismatch.code))
        assert isinstance(stage.received()[1], LayoutMismatch)

    on_loop(scenario)


def test_refused_without_any_decode_worker_left_the_attempt_fails_at_once() -> None:
    def scenario() -> None:
        stage = Stage()
        stage.lose(stage.d2)
        stage.fleet.links.pop("d2")
        stage.d.heartbeat = pb.Heartbeat(num_free_blocks=0, draining=True)
        stage.attempt.on_refused(stage.p, refusal("d"))
        assert isinstance(stage.received()[1], Unavailable)

    on_loop(scenario)


@pytest.mark.parametrize(
    ("code", "kind", "blamed"),
    [
        ("kv_transfer_failed", TransferError, {"p", "d"}),
        ("overloaded", Overloaded, {"p"}),
        ("unavailable", Unavailable, {"p"}),
        ("something_new", ServeError, {"p"}),
    ],
)
def test_failures_keep_their_kind_and_name_who_is_to_blame(code: str, kind: type[ServeError], blamed: set[str]) -> None:
    def scenario() -> None:
        stage = Stage()
        stage.attempt.on_failed(
            stage.p, pb.AttemptFailed(attempt_id=ID, code=code, message="so it is", retry_after_s=2.5)
        )
        error = stage.received()[1]
        assert type(error) is kind
        assert error.message == "so it is"
        assert {key.worker_id for key in stage.attempt.blamed} == blamed
        if isinstance(error, Overloaded):
            assert error.retry_after_s == 2.5

    on_loop(scenario)


def test_a_consumer_that_does_not_keep_up_is_cut_off() -> None:
    def scenario() -> None:
        stage = Stage(is_local=True, max_unread_tokens=3)
        for index in range(5):
            stage.attempt.on_token(stage.d, stage.token(index))
        tokens, error = stage.received()
        assert (len(tokens), type(error)) == (4, Cancelled)
        assert stage.sent(stage.d) == ["start", "abort"]

    on_loop(scenario)


def test_the_next_attempt_feeds_delivered_tokens_and_continues_their_indices() -> None:
    def scenario() -> None:
        stage = Stage(delivered=[100, 101])
        start = stage.p._outbox[0].start
        assert (list(start.token_ids), start.num_prompt_tokens) == ([7, 8, 9, 100, 101], 3)
        stage.attempt.on_token(stage.p, stage.token(1))
        stage.attempt.on_token(stage.p, stage.token(2))
        assert stage.received()[0] == [102]

    on_loop(scenario)


def test_load_is_predicted_until_it_is_done() -> None:
    def scenario() -> None:
        stage = Stage()
        assert stage.p.view().num_waiting_tokens == 3
        assert stage.d.view().num_free_blocks == 99
        stage.attempt.on_token(stage.p, stage.token(0))
        assert stage.p.view().num_waiting_tokens == 0
        stage.attempt.close()
        assert stage.d.view().num_free_blocks == 100

    on_loop(scenario)
