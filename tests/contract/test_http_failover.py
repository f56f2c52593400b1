"""A client's stream survives its workers: no token twice, none missing, one named outcome in bounded time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from baton.auth import worker_token
from protos import worker_pb2 as pb
from tests.contract.test_http import events, run
from tests.support.fake_worker import SECRET, FakeCluster, FakeWorker, Script, Site, pair, site

PROMPT = "The quick brown fox"
WISH: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "stream": True}
EXPECTED = (PROMPT * 3)[:40]


def two_pairs(**scripts: Script) -> Callable[[], FakeCluster]:
    """Two prefill and two decode workers, p0 p1 d0 d1; ties go to the 0s."""

    def make() -> FakeCluster:
        cluster = FakeCluster()
        for name in ("p0", "p1", "d0", "d1"):
            role = "prefill" if name.startswith("p") else "decode"
            cluster.add(name, role, script=scripts.get(name) or Script())
        return cluster

    return make


async def streamed(here: Site, **wish: Any) -> tuple[str, str | None]:
    """The text and the finish reason; every chunk but the last has none, and the end mark is there."""
    answer = await here.http.post("/v1/completions", json=WISH | wish)
    *chunks, done = events(answer.text)
    assert done is None, answer.text[-500:]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]


async def attempts(here: Site) -> int:
    """Of the newest request."""
    here.router.book.flush()
    return len(next(reversed(here.router.book._ring.values())).attempts)


async def newest_trace(here: Site) -> dict[str, Any]:
    """Of the last request that is over, once its workers have said what they measured."""
    token, traces = {"authorization": worker_token(SECRET)}, []
    async with asyncio.timeout(5):
        while not traces:
            traces = (await here.http.get("/internal/traces", headers=token)).json()["traces"]
    trace = here.router.book.trace(traces[0]["request_id"])
    assert trace is not None
    return trace


def survives(make: Callable[[], FakeCluster], num_attempts: int, wish: dict[str, Any] | None = None) -> None:
    """The whole text arrives, after so many attempts."""

    async def scenario(here: Site) -> None:
        assert await streamed(here, **(wish or {})) == (EXPECTED, "length")
        assert await attempts(here) == num_attempts

    run(make, scenario)


@pytest.mark.parametrize("index", [1, 2, 39])
def test_a_decode_worker_may_die_at_any_token(index: int) -> None:
    survives(two_pairs(d0=Script(die_at=index)), 2)


@pytest.mark.parametrize("index", [1, 20])
def test_a_decode_workers_session_may_break(index: int) -> None:
    survives(two_pairs(d0=Script(hang_up_at=index)), 2)


def test_only_a_worker_that_stores_kv_alike_goes_on_with_a_request() -> None:
    """Rounded KV gives other tokens."""

    def make() -> FakeCluster:
        cluster = FakeCluster()
        cluster.add("m0", "mixed", script=Script(die_at=5))
        cluster.add("m1", "mixed", kv_dtype="float8_e4m3fn")  # would be taken before m2
        cluster.add("m2", "mixed")
        return cluster

    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        assert [len(here.cluster.workers[name].started) for name in ("m0", "m1", "m2")] == [1, 0, 1]

    run(make, scenario)


def test_a_prefill_worker_may_die_before_the_first_token() -> None:
    survives(two_pairs(p0=Script(die_at=0)), 2)


def test_a_prefill_worker_and_then_a_decode_worker_may_die() -> None:
    """The second attempt takes the workers that the first did not: p1 and d1. The third has p1 and d0."""
    survives(two_pairs(p0=Script(die_at=0), d1=Script(die_at=9)), 3)


def test_without_other_decode_workers_the_prefill_worker_finishes() -> None:
    survives(lambda: pair(decode=Script(die_at=10)), 2)


def test_without_prefill_workers_the_decode_worker_does_it_all() -> None:
    survives(lambda: pair(prefill=Script(die_at=0)), 2)


def test_the_death_of_a_prefill_worker_that_is_not_needed_any_more_goes_unnoticed() -> None:
    async def scenario(here: Site) -> None:
        decode, prefill = here.cluster.workers["decode-0"], here.cluster.workers["prefill-0"]
        stream = asyncio.create_task(streamed(here))
        await decode.until(lambda: len(decode.tokens) >= 4)
        here.router.fleet.changed.clear()
        await prefill.die()
        await asyncio.wait_for(here.router.fleet.changed.wait(), 5)
        decode.gate.set()
        assert await stream == (EXPECTED, "length")
        assert await attempts(here) == 1

    run(lambda: pair(decode=Script(gate_at=5)), scenario)


def test_a_request_that_has_begun_waits_for_a_worker_to_come_back() -> None:
    async def scenario(here: Site) -> None:
        (worker,) = here.cluster.workers.values()
        stream = asyncio.create_task(streamed(here))
        await worker.until(lambda: len(worker.tokens) == 5)
        await worker.restart()
        assert await stream == (EXPECTED, "length")
        assert await attempts(here) == 2

    def make() -> FakeCluster:
        cluster = FakeCluster()
        cluster.add("mixed-0", "mixed", script=Script(gate_at=5))
        return cluster

    run(make, scenario)


def test_repeated_tokens_are_delivered_once() -> None:
    survives(lambda: pair(Script(repeat=True), Script(repeat=True)), 1)


def test_a_missing_token_is_generated_elsewhere() -> None:
    survives(two_pairs(d0=Script(skip=7)), 2)


def test_tokens_of_the_decode_worker_wait_for_the_first_one() -> None:
    async def scenario(here: Site) -> None:
        # The prefill worker's token is sent behind the gate, and the decode worker does not wait for it.
        prefill = here.cluster.workers["prefill-0"]
        decode = here.cluster.workers["decode-0"]
        stream = asyncio.create_task(streamed(here))
        await prefill.until(lambda: bool(prefill.started))
        session = decode._sessions["router-0"]
        session.run(prefill.started[0].attempt_id, lambda: session.generate(prefill.started[0], 1, []))
        await decode.until(lambda: len(decode.tokens) == 39)
        prefill.gate.set()
        assert await stream == (EXPECTED, "length")

    run(lambda: pair(prefill=Script(gate_at=0)), scenario)


def test_a_failed_transfer_is_retried_elsewhere() -> None:
    survives(two_pairs(d0=Script(fail_at=(1, "kv_transfer_failed"))), 2)


def test_with_one_pair_a_failed_transfer_is_retried_without_a_transfer() -> None:
    survives(lambda: pair(prefill=Script(fail_at=(0, "kv_transfer_failed"))), 2)


def test_a_refused_reservation_goes_to_the_next_decode_worker() -> None:
    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        assert await attempts(here) == 1
        assert here.cluster.workers["d1"].reserved == here.cluster.workers["d0"].reserved
        assert len(here.cluster.workers["p0"].started) == 1, "the prompt is computed once"

    run(two_pairs(d0=Script(refuse=1)), scenario)


def test_refused_by_all_the_request_waits_for_room() -> None:
    survives(two_pairs(d0=Script(refuse=3), d1=Script(refuse=3)), 1)


def test_x1_a_decode_worker_that_the_kv_did_not_reach_is_not_asked_again() -> None:
    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        assert await attempts(here) == 1
        assert len(here.cluster.workers["d0"].reserved) == 1
        assert len(here.cluster.workers["d1"].reserved) == 4, "it had no room three times, and is waited for"

    run(two_pairs(p0=Script(cut_off_from=("d0",)), d1=Script(refuse=3)), scenario)


def one_cut_path() -> FakeCluster:
    """One prefill worker that does not reach the first of two decode workers; idle ones take turns."""
    cluster = FakeCluster()
    cluster.add("p0", "prefill", script=Script(cut_off_from=("d0",)))
    cluster.add("d0", "decode")
    cluster.add("d1", "decode")
    return cluster


def test_x1_the_next_requests_go_around_and_operators_see_it() -> None:
    async def scenario(here: Site) -> None:
        for _ in range(4):
            assert await streamed(here) == (EXPECTED, "length")
            assert await attempts(here) == 1
        assert len(here.cluster.workers["d0"].reserved) == 1
        metrics = (await here.http.get("/metrics")).text
        assert "baton_kv_unreachable_total 1.0" in metrics
        assert "baton_kv_paths_broken 1.0" in metrics

    run(one_cut_path, scenario, kv_lease_s=1000.0)


def test_x1_a_path_is_tried_again_by_and_by() -> None:
    async def scenario(here: Site) -> None:
        for _ in range(4):
            assert await streamed(here) == (EXPECTED, "length")
        assert len(here.cluster.workers["d0"].reserved) > 1

    run(one_cut_path, scenario, kv_lease_s=1e-6)


def test_x1_a_prefill_worker_that_reaches_no_decode_worker_is_given_up_at_once() -> None:
    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        assert await attempts(here) == 2
        workers = here.cluster.workers
        (first,) = workers["p0"].started
        (second,) = workers["p1"].started
        asked = sorted(workers["d0"].reserved + workers["d1"].reserved)
        assert asked == [first.attempt_id, first.attempt_id, second.attempt_id], "each was asked once"

    run(two_pairs(p0=Script(cut_off_from=("d0", "d1"))), scenario)


def test_x1_the_only_pair_cut_in_two_serves_without_a_transfer() -> None:
    survives(lambda: pair(prefill=Script(cut_off_from=("decode-0",))), 2)


def test_without_room_within_its_time_a_request_is_overloaded() -> None:
    async def scenario(here: Site) -> None:
        # The first token is out before the refusal, so the error comes as an event.
        answer = await here.http.post("/v1/completions", json=WISH | {"timeout": 0.3})
        assert events(answer.text)[-1]["error"]["code"] == 429

    run(lambda: pair(decode=Script(refuse=10_000)), scenario)


def test_when_every_worker_says_no_the_client_hears_it_early() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json=WISH)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"]

    run(lambda: pair(Script(fail_at=(0, "overloaded")), Script(fail_at=(0, "overloaded"))), scenario)


def test_an_overloaded_prefill_worker_is_passed_over() -> None:
    survives(two_pairs(p0=Script(fail_at=(0, "overloaded"))), 2)


def test_attempts_are_bounded() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json=WISH)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert sum(len(worker.started) for worker in here.cluster.workers.values()) == 3

    failing = {name: Script(fail_at=(0, "unavailable")) for name in ("p0", "p1", "d0", "d1")}
    run(two_pairs(**failing), scenario)


def test_what_no_worker_can_do_is_not_retried() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json=WISH)
        assert answer.status_code == 400
        assert sum(len(worker.started) for worker in here.cluster.workers.values()) == 1

    run(two_pairs(p0=Script(fail_at=(0, "invalid_request_error"))), scenario)


def test_an_error_after_the_first_byte_is_an_event_and_no_end_mark_follows() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json=WISH)
        assert answer.status_code == 200
        assert "event: error\n" in answer.text
        assert "[DONE]" not in answer.text
        last = events(answer.text)[-1]
        assert last["error"]["code"] == 500
        assert last["error"]["message"] == "as scripted"

    run(lambda: pair(decode=Script(fail_at=(3, "internal_error"))), scenario)


def test_a_request_ends_at_its_deadline() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json=WISH | {"timeout": 0.2, "stream": False})
        assert answer.status_code == 504
        assert answer.headers["x-should-retry"] == "false"

    run(lambda: pair(decode=Script(gate_at=5)), scenario)


# ---- clients that leave


async def post(here: Site, path: str, wish: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request by hand."""
    host, port = here.url.removeprefix("http://").split(":")
    body = json.dumps(wish).encode()
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def leave(
    here: Site,
    path: str,
    wish: dict[str, Any],
    *,
    after: FakeWorker,
    then: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Close the connection when `after` has done something, and `then` has been awaited."""
    _, writer = await post(here, path, wish)
    await after.until(lambda: bool(after.tokens or after.started))
    if then is not None:
        await then()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_aborts_its_request_at_both_workers(stream: bool, where: str, n: int) -> None:
    scripts = {where: Script(gate_at=0 if where == "prefill-0" else 3)}

    async def scenario(here: Site) -> None:
        prefill, decode = here.cluster.workers["prefill-0"], here.cluster.workers["decode-0"]
        wish = WISH | {"stream": stream, "n": n}
        await leave(here, "/v1/completions", wish, after=here.cluster.workers[where])
        for worker in (prefill, decode):
            await worker.until(lambda worker=worker: len(worker.aborted) == n)
        await asyncio.wait_for(here.router.admission.idle(), 5)
        assert here.router.admission.num_admitted == 0

    run(lambda: pair(scripts.get("prefill-0"), scripts.get("decode-0")), scenario)


def test_a_client_that_does_not_read_is_aborted_when_its_buffer_is_full() -> None:
    async def scenario(here: Site) -> None:
        here.router.dispatcher.max_unread_tokens = 200
        decode = here.cluster.workers["decode-0"]
        reader, writer = await post(here, "/v1/completions", WISH | {"max_tokens": 4000, "logprobs": 20})
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await decode.until(lambda: bool(decode.aborted))
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        received = b""
        while b"event: error" not in received:
            data = await reader.read(1 << 16)
            assert data, "the stream ended without an error"
            received = received[-100:] + data
        writer.close()
        await writer.wait_closed()

    run(pair, scenario, send_buffer_bytes=16_384)


# ---- the fleet


def test_a_silent_worker_is_dead_after_a_while() -> None:
    async def scenario(here: Site) -> None:
        link = here.router.fleet.links["d0"]
        stream = asyncio.create_task(streamed(here))
        d0 = here.cluster.workers["d0"]
        await d0.until(lambda: bool(d0.tokens))
        assert await stream == (EXPECTED, "length")
        assert await attempts(here) == 2
        assert "silent" in link.why_lost

    run(two_pairs(d0=Script(gate_at=3, mute=True)), scenario)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"protocol": 2}, "protocol 2"), ({"worker_id": "other"}, "answers as 'other'")],
)
def test_a_worker_that_is_not_what_was_expected_is_not_used(options: dict[str, Any], reason: str) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        async with site(cluster) as here:
            worker = cluster.add("mixed-0", "mixed")
            for name, value in options.items():
                setattr(worker, name, value)
            await worker.start()
            here.router.set_members([{"worker_id": "mixed-0", "address": worker.address}])
            link = here.router.fleet.links["mixed-0"]
            async with asyncio.timeout(5):
                while reason not in link.why_lost:
                    await worker.until(lambda: worker.num_sessions > 0)
                    worker.num_sessions = 0
            health = await here.http.get("/health")
            assert health.status_code == 503
            assert reason in health.json()["error"]["message"]

    asyncio.run(main())


def test_a_draining_worker_gets_nothing_new() -> None:
    async def scenario(here: Site) -> None:
        d0 = here.cluster.workers["d0"]
        d0.draining = True
        here.router.fleet.changed.clear()
        d0.beat()
        await asyncio.wait_for(here.router.fleet.changed.wait(), 5)
        assert await streamed(here) == (EXPECTED, "length")
        assert not d0.reserved

    run(two_pairs(), scenario)


def test_a_worker_that_leaves_the_fleet_gives_its_requests_to_others() -> None:
    async def scenario(here: Site) -> None:
        d0 = here.cluster.workers["d0"]
        stream = asyncio.create_task(streamed(here))
        await d0.until(lambda: bool(d0.tokens))
        here.router.set_members([member for member in here.cluster.fleet() if member["worker_id"] != "d0"])
        assert await stream == (EXPECTED, "length")
        d0.gate.set()

    run(two_pairs(d0=Script(gate_at=3)), scenario)


def test_the_same_worker_at_another_address_is_a_new_start() -> None:
    async def scenario(here: Site) -> None:
        old = here.cluster.workers["mixed-0"]
        await old.die()
        new = here.cluster.add("mixed-0", "mixed", incarnation="2")
        await new.start()
        here.serving.clear()
        here.router.set_members(here.cluster.fleet())
        await asyncio.wait_for(here.serving.wait(), 5)
        assert await streamed(here) == (EXPECTED, "length")
        assert len(new.started) == 1

    def make() -> FakeCluster:
        cluster = FakeCluster()
        cluster.add("mixed-0", "mixed")
        return cluster

    run(make, scenario)


def test_moments_that_come_after_the_last_token_are_in_the_trace() -> None:
    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        trace = await newest_trace(here)
        assert "runnable" in trace["moments_ms"]["decode-0"]
        assert trace["transfer_exposed_ms"] is not None

    run(lambda: pair(decode=Script(late_timeline=True)), scenario)


@pytest.mark.parametrize(("die_at", "is_before_token_1"), [(0, True), (20, False)])
def test_a_trace_tells_the_time_that_a_failed_attempt_has_cost(die_at: int, is_before_token_1: bool) -> None:
    dying = "p0" if is_before_token_1 else "d0"

    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        trace = await newest_trace(here)
        first, second = trace["every_attempt"]
        assert first["num_tokens"] + second["num_tokens"] == 40
        assert (first["num_tokens"] == 0) is is_before_token_1
        assert (first["failure"], second["failure"]) == ("worker_lost", "")
        told = second if is_before_token_1 else first
        assert trace["told_attempt"] == trace["every_attempt"].index(told) + 1
        assert trace["moments_ms"][told["prefill_worker"]] == told["moments_ms"][told["prefill_worker"]]
        assert (set(first["moments_ms"]) == {"router"}) is is_before_token_1
        for role in ("prefill_worker", "decode_worker"):
            assert trace[role] == second[role], "it finished the request"
        assert trace["failover_ms"] > 0
        assert (trace["failover_ttft_ms"] > 0) is is_before_token_1
        assert trace["total_ms"] + 0.01 >= trace["failover_ms"] + trace["decode_ms"]

    run(two_pairs(**{dying: Script(die_at=die_at)}), scenario)


@pytest.mark.parametrize("shift_s", [0.0, 1e6, -1e6])
def test_moments_of_another_clock_are_mapped_and_the_error_is_told(shift_s: float) -> None:
    async def scenario(here: Site) -> None:
        assert await streamed(here) == (EXPECTED, "length")
        trace = await newest_trace(here)
        error_ms = trace["clock_error_ms"]
        assert (error_ms > 0) == (shift_s != 0)
        moments = trace["moments_ms"]
        # Late by no more than the error, which the shortest delays bound.
        assert -1 <= moments["decode-0"]["received"] <= moments["router"]["finished"] + error_ms + 1

    def make() -> FakeCluster:
        cluster = FakeCluster()
        cluster.add("prefill-0", "prefill")
        cluster.add("decode-0", "decode", clock_shift_s=shift_s)
        return cluster

    run(make, scenario)


def test_a_client_that_leaves_while_there_is_no_worker_is_not_waited_for() -> None:
    async def scenario(here: Site) -> None:
        (worker,) = here.cluster.workers.values()
        await leave(here, "/v1/completions", WISH, after=worker, then=worker.die)
        await asyncio.wait_for(here.router.admission.idle(), 5)
        async with asyncio.timeout(5):
            while not here.router.book.latest():
                await here.http.get("/live")
        assert here.router.book.latest()[0]["finish_reason"] == "abort"

    def make() -> FakeCluster:
        cluster = FakeCluster()
        cluster.add("mixed-0", "mixed", script=Script(gate_at=2))
        return cluster

    run(make, scenario)


def test_a_worker_that_sends_nonsense_is_lost_and_the_router_is_not() -> None:
    async def scenario(here: Site) -> None:
        stream = asyncio.create_task(streamed(here))
        d0 = here.cluster.workers["d0"]
        await d0.until(lambda: len(d0.tokens) == 2)
        link = here.router.fleet.links["d0"]
        token = pb.Token(attempt_id=d0.tokens[0], index=3, token_id=1, finish_reason="because")
        d0._sessions["router-0"].send(step=pb.StepEvents(tokens=[token]))
        assert await stream == (EXPECTED, "length")
        assert "must not" in link.why_lost

    run(two_pairs(d0=Script(gate_at=3)), scenario)
