"""The measured waterfall, its ring and its log line."""

from __future__ import annotations

import logging

import pytest

from cluster import waterfall
from router.timeline import Timeline, TimelineBook


def finished(request_id: str = "r", client_request_id: str = "") -> Timeline:
    """A disaggregated request: prefill 10 ms from 0.102, the decode side ready 2 ms later, steps of 5 ms."""
    timeline = Timeline(request_id, 0.1, client_request_id=client_request_id)
    hand_over(timeline, 0.0)
    for index, at in enumerate((0.1125, 0.1195, 0.1245, 0.1295)):
        timeline.tokens(at, 1, 16 if index == 0 else 0)
    timeline.finished = 0.13
    timeline.finish_reason = "stop"
    return timeline


def hand_over(timeline: Timeline, later_s: float) -> None:
    """One attempt, from 0.101 on, or so much later."""
    record = timeline.attempt("p", "d", 0.101 + later_s)
    for worker, moments, num_bytes, num_cached in (
        ("p", {"received": 0.1015, "prefill_begin": 0.102, "prefill_end": 0.112}, 0, 0),
        ("d", {"kv_begin": 0.104, "kv_end": 0.113, "runnable": 0.114}, 4096, 32),
    ):
        shifted = {name: at + later_s for name, at in moments.items()}
        record.worker_moments(worker, shifted, num_bytes, "shm", num_cached)


def test_the_waterfall_adds_up() -> None:
    parts = finished().waterfall()
    assert parts == {
        "route_ms": 1.5,
        "queue_ms": 0.5,
        "prefill_ms": 10.0,
        "transfer_ms": 10.0,
        "transfer_hidden_ms": 8.0,
        "transfer_exposed_ms": 2.0,
        "handover_ms": 2.0,
        "failover_ms": None,
        "failover_ttft_ms": None,
        "decode_ms": 17.0,
        "ttft_ms": 12.5,
        "tpot_ms": 5.667,
        "step_ms": 5.0,
        "total_ms": 30.0,
    }
    summary = finished().summary()
    assert (summary["num_cached_tokens"], summary["num_reused_tokens"]) == (16, 32)


def test_a_decode_side_that_was_ready_first_exposes_nothing() -> None:
    timeline = finished()
    timeline.told.worker_moments("d", {"runnable": 0.1}, 0, "", 0)
    assert timeline.waterfall()["transfer_exposed_ms"] == 0.0


def test_a_transfer_that_began_after_the_first_token_is_no_shorter_than_its_exposed_part() -> None:
    timeline = finished()
    timeline.told.worker_moments("d", {"kv_begin": 0.1135}, 0, "", 0)
    trace = timeline.trace()
    assert (trace["transfer_ms"], trace["transfer_hidden_ms"], trace["transfer_exposed_ms"]) == (2.0, 0.0, 2.0)
    assert "transfer 2.00 (2.00 exposed, shm)" in waterfall.line(trace)
    (bar,) = [line for line in waterfall.picture(trace).splitlines() if line.startswith("  transfer")]
    assert bar.split()[3] == "2.00"
    assert bar.endswith("2.00 exposed")


def test_the_log_and_the_trace_mean_the_same_transfer() -> None:
    trace = {**finished().trace(), "request_id": "r"}
    moments = trace["moments_ms"]
    assert trace["transfer_ms"] == moments["d"]["runnable"] - moments["d"]["kv_begin"]
    assert trace["transfer_exposed_ms"] == moments["d"]["runnable"] - moments["p"]["prefill_end"]
    (bar,) = [line for line in waterfall.picture(trace).splitlines() if line.startswith("  transfer")]
    assert bar.split()[3] == "10.0"
    assert bar.endswith("2.00 exposed")


def test_the_worst_of_the_workers_clocks_is_told() -> None:
    timeline = finished()
    assert timeline.summary()["clock_error_ms"] == 0.0
    timeline.told.worker_moments("d", {}, 0, "", 0, 0.0004)
    timeline.told.worker_moments("p", {}, 0, "", 0, 0.0001)
    assert timeline.summary()["clock_error_ms"] == 0.4
    assert "within 0.40 ms" in waterfall.picture(timeline.trace())


def test_a_local_request_has_no_transfer() -> None:
    timeline = Timeline("r", 0.0)
    record = timeline.attempt("", "d", 0.1)
    record.worker_moments("d", {"received": 0.1, "prefill_begin": 0.2, "prefill_end": 0.3}, 0, "", 0)
    timeline.tokens(0.31, 1, 0)
    parts = timeline.waterfall()
    assert (parts["prefill_ms"], parts["transfer_ms"], parts["handover_ms"]) == (100.0, None, None)


def test_what_nobody_measured_is_unknown() -> None:
    parts = Timeline("r", 0.0).waterfall()
    assert set(parts.values()) == {None}


def test_an_attempt_that_gave_no_token_is_time_lost_before_the_phases_of_the_next_one() -> None:
    timeline = Timeline("r", 0.1)
    timeline.attempt("q", "e", 0.101).failure = "worker_lost"  # and its workers never told a moment
    hand_over(timeline, 0.5)
    timeline.tokens(0.6125, 1, 0)
    timeline.tokens(0.6195, 1, 0)
    timeline.finished = 0.63
    trace = timeline.trace()
    names = ("route", "queue", "prefill", "transfer", "failover", "failover_ttft", "ttft")
    assert [trace[f"{name}_ms"] for name in names] == [1.5, 0.5, 10.0, 10.0, 500.0, 500.0, 512.5]
    assert (trace["prefill_worker"], trace["decode_worker"], trace["attempts"]) == ("p", "d", 2)
    assert (trace["told_attempt"], set(trace["moments_ms"])) == (2, {"router", "p", "d"})
    assert trace["every_attempt"][0]["moments_ms"] == {"router": {"placed": 1.0}}
    drawn = waterfall.picture(trace)
    bars = [line.split()[0] for line in drawn.splitlines() if line.startswith("  ") and "#" in line]
    assert bars == ["fail-over", "route", "queue", "prefill", "transfer", "deliver"]
    assert "    attempt 1, q -> e: 0 tokens, then worker_lost\n" in drawn
    assert "    attempt 2, p -> d, 4.0 KiB KV by shm: 2 tokens\n" in drawn
    assert " | fail-over 500.0 | " in waterfall.line(trace)


def go_on(timeline: Timeline, prefill_worker: str, decode_worker: str, transport: str) -> None:
    """A second attempt, in which p2 computes the prompt, gives two tokens and the end."""
    moments = {"received": 0.41, "prefill_begin": 0.42, "prefill_end": 0.47}
    timeline.attempt(prefill_worker, decode_worker, 0.4).worker_moments("p2", moments, 0, transport, 0)
    timeline.tokens(0.4795, 1, 0)
    timeline.tokens(0.4845, 1, 0)
    timeline.finished = 0.485


def test_a_gap_in_which_another_attempt_took_over_is_no_part_of_decode() -> None:
    timeline = finished()  # 4 tokens by p and d, the last one at 0.1295
    timeline.attempts[0].failure = "worker_lost"
    before = timeline.waterfall()
    go_on(timeline, "p2", "d2", "tcp")
    parts = timeline.waterfall()
    assert (parts["failover_ms"], parts["failover_ttft_ms"], parts["total_ms"]) == (350.0, 0.0, 385.0)
    assert (parts["decode_ms"], parts["tpot_ms"], parts["step_ms"]) == (22.0, 5.5, 5.0)
    for name in ("route", "queue", "prefill", "transfer", "transfer_exposed", "handover", "ttft"):
        assert parts[f"{name}_ms"] == before[f"{name}_ms"]


def test_after_a_fail_over_the_record_names_who_finished_and_each_row_who_did_it() -> None:
    timeline = finished()  # 4 tokens by p and d
    timeline.attempts[0].failure = "worker_lost"
    go_on(timeline, "", "p2", "")
    trace = timeline.trace()
    assert (trace["prefill_worker"], trace["decode_worker"], trace["attempts"]) == ("p2", "p2", 2)
    assert (trace["told_attempt"], set(trace["moments_ms"])) == (1, {"router", "p", "d"})
    assert [attempt["kv_bytes"] for attempt in trace["every_attempt"]] == [4096, 0]
    assert waterfall.line(trace).endswith(" | p2, 2 attempts")
    drawn = waterfall.picture(trace)
    assert drawn.splitlines()[1] == "0 (16 cached) -> 6 tokens, p2, 2 attempts"
    rows = {line.split()[0]: line.split()[1] for line in drawn.splitlines() if line.startswith("  ") and "#" in line}
    assert rows == {"route": "router", "queue": "p", "prefill": "p", "transfer": "to", "deliver": "router"}
    assert "\n  transfer  to d  " in drawn
    assert "\n  decode    d, p2  " in drawn
    assert "\n    attempt 1, p -> d, 4.0 KiB KV by shm: 4 tokens, then worker_lost\n" in drawn
    assert "\n    attempt 2, p2: 2 tokens\n" in drawn


def test_a_worker_that_gave_no_token_after_the_first_decoded_nothing() -> None:
    timeline = Timeline("r", 0.0)
    timeline.attempt("p", "d", 0.1).failure = "worker_lost"
    timeline.tokens(0.2, 1, 0)
    timeline.attempt("p", "d2", 0.3)
    timeline.tokens(0.5, 3, 0)
    assert "\n  decode    d2  " in waterfall.picture(timeline.trace())


def test_a_fail_over_between_tokens_1_and_2_is_no_hand_over() -> None:
    timeline = Timeline("r", 0.0)
    timeline.attempt("p", "d", 0.1)
    timeline.tokens(0.2, 1, 0)
    timeline.attempt("p2", "d2", 0.3)
    timeline.tokens(0.5, 2, 0)
    parts = timeline.waterfall()
    assert (parts["failover_ms"], parts["handover_ms"], parts["decode_ms"]) == (300.0, None, 0.0)


def test_an_attempt_that_gave_nothing_more_is_time_lost_until_the_end() -> None:
    timeline = finished()
    timeline.attempt("p2", "d2", 0.2)
    timeline.finished = 0.3295
    assert timeline.waterfall()["failover_ms"] == 200.0


def test_tokens_that_arrive_together_are_no_time_apart() -> None:
    timeline = Timeline("r", 0.0)
    timeline.attempt("p", "d", 0.5)
    timeline.tokens(1.0, 3, 0)
    timeline.tokens(2.0, 2, 0)
    assert list(timeline.intervals) == [0.0, 0.0, 1.0, 0.0]
    assert timeline.num_tokens == 5


def test_a_finished_request_is_logged_once_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    book = TimelineBook(2, lambda timeline: seen.append(timeline.request_id))
    with caplog.at_level(logging.INFO, "router"):
        for name in ("a", "b", "c"):
            book.add(finished(name, f"client-{name}"))
    (record, *_) = [record for record in caplog.records if record.message == "request finished"]
    assert (record.request_id, record.transfer_exposed_ms) == ("a", 2.0)  # type: ignore[attr-defined]
    assert seen == ["a", "b", "c"]
    assert book.trace("a") is None
    assert book.trace("client-a") is None
    assert [trace["request_id"] for trace in book.latest()] == ["c", "b"]
    trace = book.trace("client-c")
    assert trace is not None
    assert trace["moments_ms"]["d"] == {"kv_begin": 4.0, "kv_end": 13.0, "runnable": 14.0}


def test_at_the_end_of_the_process_what_is_awaited_is_logged_as_it_is() -> None:
    seen: list[str] = []
    book = TimelineBook(2, lambda timeline: seen.append(timeline.request_id))
    timeline = finished()
    book.expect(timeline, lambda: book.add(timeline))
    book.flush()
    book.flush()
    assert seen == ["r"]
