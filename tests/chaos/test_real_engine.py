"""Fail-over with the real engine and tensor parallelism: half a worker dies or stands still in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from cluster import waterfall
from tests.integration.test_faults import assert_undisturbed, kill, once, prompt_of, stream, wait_until_whole
from tests.support.system import System, serve

pytestmark = pytest.mark.timeout(240)

PROMPT = prompt_of(1, 60)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One prefill worker with one rank, one decode worker with two. fp32: both compute the same tokens."""
    with serve("--dtype", "float32", "--prefill-tp", "1", "--tp", "2") as running:
        yield running


@pytest.fixture(scope="module")
def expected(system: System) -> list[int]:
    tokens = stream(system, PROMPT, 300, temperature=0).tokens
    assert len(set(tokens)) > 30, "the same few tokens again and again would hide a splice"
    return tokens


@pytest.fixture(autouse=True)
def audited(system: System) -> Iterator[None]:
    wait_until_whole(system)
    yield
    wait_until_whole(system)
    system.audit()


def assert_told(system: System, request_id: str) -> None:
    """The log names who finished the request, the trace each attempt, the picture who did what."""
    line = system.finished(request_id)
    assert (line["attempts"], line["prefill_worker"], line["decode_worker"]) == (2, "prefill-0", "prefill-0")
    trace = system.trace(request_id)
    first, second = trace["every_attempt"]
    assert (first["prefill_worker"], first["decode_worker"], first["kv_bytes"] > 0) == ("prefill-0", "decode-0", True)
    assert (second["prefill_worker"], second["decode_worker"], second["kv_bytes"]) == ("prefill-0", "prefill-0", 0)
    assert first["num_tokens"] >= 20
    assert first["num_tokens"] + second["num_tokens"] == 300
    assert (bool(first["failure"]), second["failure"]) == (True, "")
    assert (trace["told_attempt"], trace["failover_ttft_ms"], trace["failover_ms"] > 0) == (1, 0.0, True)
    drawn = waterfall.picture(trace)
    assert "\n  transfer  to decode-0 " in drawn
    assert "\n  decode    decode-0, prefill-0 " in drawn
    assert f"\n    attempt 2, prefill-0: {second['num_tokens']} tokens\n" in drawn


def test_a_stopped_follower_stops_its_worker_and_the_prefill_worker_goes_on(
    system: System, expected: list[int]
) -> None:
    before, pids = wait_until_whole(system), []

    def strike() -> None:
        pids.append(kill(system, "decode-0", "rank 1", signal.SIGSTOP))

    try:
        outcome = stream(system, PROMPT, 300, once(20, strike), temperature=0)
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert_undisturbed(outcome, expected)
    assert_told(system, outcome.request_id)
    assert wait_until_whole(system) == before
    again = stream(system, PROMPT, 300, temperature=0)
    assert_undisturbed(again, expected)
    assert system.finished(again.request_id)["decode_worker"] == "decode-0"


def test_a_killed_follower_takes_its_worker_along_and_the_prefill_worker_goes_on(
    system: System, expected: list[int]
) -> None:
    before = wait_until_whole(system)

    def strike() -> None:
        kill(system, "decode-0", "rank 1")

    outcome = stream(system, PROMPT, 300, once(20, strike), temperature=0)
    assert_undisturbed(outcome, expected)
    assert_told(system, outcome.request_id)
    after = wait_until_whole(system)
    assert after["prefill-0"] == before["prefill-0"]
    assert after["decode-0"] != before["decode-0"]
    again = stream(system, PROMPT, 300, temperature=0)
    assert_undisturbed(again, expected)
    assert system.finished(again.request_id)["decode_worker"] == "decode-0"
