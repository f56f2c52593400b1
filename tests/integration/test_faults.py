"""Processes are killed and stopped under running streams; clients get the tokens of an undisturbed run, or an error.

The simulated engine's tokens are a function of every KV byte that was read, so a stream that went on with stale,
partial or foreign KV would have other tokens. Times are slow enough for a fault to hit the phase that it aims at.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from router.worker_link import SILENCE_S
from tests.support.system import System, eventually, generate, serve

pytestmark = pytest.mark.timeout(180)

SLOW = (
    "--engine",
    "sim",
    "--set",
    "sim.decode_s_per_step=0.02",
    "--set",
    "sim.prefill_s_per_token=0.002",
    "--set",
    "engine.max_num_batched_tokens=128",
    "--max-model-len",
    "2048",
)
NUM_TOKENS = 60
BACK_LIMIT_S = 60.0


@dataclass
class Outcome:
    """What a client of a stream has seen."""

    request_id: str
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_done: bool = False
    error: dict[str, Any] | None = None
    broken: httpx.TransportError | None = None


def stream(
    system: System,
    prompt: list[int],
    num_tokens: int = NUM_TOKENS,
    on_tokens: Callable[[int], None] = lambda count: None,
    **params: Any,
) -> Outcome:
    """Read a completion to its end, whatever that is. `on_tokens` is called with the count after each event."""
    body = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.7,
        "seed": 11,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        **params,
    }
    outcome, event = Outcome(secrets.token_hex(8)), ""
    try:
        with (
            system.client(**{"x-request-id": outcome.request_id}) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data" and value == "[DONE]":
                    outcome.is_done = True
                elif name == "data" and event == "error":
                    outcome.error = json.loads(value)["error"]
                elif name == "data":
                    (choice,) = json.loads(value)["choices"]
                    outcome.tokens += choice.get("token_ids", [])
                    outcome.finish_reason = choice["finish_reason"]
                    on_tokens(len(outcome.tokens))
    except httpx.TransportError as error:
        outcome.broken = error
    return outcome


def once(count: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Act when at least `count` tokens are there, once."""
    acted: list[bool] = []

    def on_tokens(so_far: int) -> None:
        if so_far >= count and not acted:
            acted.append(True)
            act()

    return on_tokens


def assert_undisturbed(outcome: Outcome, expected: list[int]) -> None:
    assert outcome.error is None
    assert outcome.broken is None
    assert outcome.tokens == expected, "no token twice, none missing, none changed"
    assert (outcome.finish_reason, outcome.is_done) == ("length", True)


def prompt_of(seed: int, length: int = 40) -> list[int]:
    return [2 + (seed * 7919 + index * index) % 500 for index in range(length)]


def busy(system: System, role: str) -> str:
    """The one worker of a role that has a sequence."""

    def look() -> list[str]:
        return [
            worker["worker_id"]
            for worker in system.status()["workers"]
            if worker.get("role") == role and any(worker["sequences"].values())
        ]

    (worker_id,) = eventually(look, f"a {role} worker is busy")
    return worker_id


def pid_of(system: System, unit: str, process: str) -> int:
    return int(system.state_now()["units"][unit]["pids"][process])


def kill(system: System, unit: str, process: str, signum: int = signal.SIGKILL) -> int:
    pid = pid_of(system, unit, process)
    os.kill(pid, signum)
    return pid


def wait_until_whole(system: System) -> dict[str, str]:
    """Every unit is up and the router has a session with every worker; their incarnations."""

    def look() -> dict[str, str]:
        units = system.state_now()["units"]
        if any(unit["state"] != "ready" for unit in units.values()):
            return {}
        wanted = {name: unit["incarnation"] for name, unit in units.items() if name != "router"}
        with contextlib.suppress(httpx.HTTPError):
            status = system.status()
            seen = {worker["worker_id"]: worker.get("incarnation", "") for worker in status["workers"]}
            if seen == wanted and status["router"]["serving"] and all(w["num_sessions"] for w in status["workers"]):
                return wanted
        return {}

    return eventually(look, "all units are back", BACK_LIMIT_S)


def assert_serves_again(system: System, worker_id: str, before: dict[str, str]) -> None:
    """The worker is back as a new incarnation, and requests reach it."""
    after = wait_until_whole(system)
    assert after[worker_id] != before[worker_id]
    assert {name for name in after if after[name] != before[name]} == {worker_id}, "no other worker was touched"

    fresh = itertools.count(1000)

    def is_used() -> bool:
        outcome = stream(system, prompt_of(next(fresh)), 3)  # nobody has this prompt cached
        assert outcome.is_done
        line = system.finished(outcome.request_id)
        return worker_id in (line["prefill_worker"], line["decode_worker"])

    eventually(is_used, f"{worker_id} gets requests")


@pytest.fixture(scope="module")
def fleet() -> Iterator[System]:
    """No unit of it may be killed five times: the supervisor would give it up."""
    with serve(*SLOW, "--prefill", "2", "--decode", "2") as running:
        yield running


@pytest.fixture
def system(fleet: System) -> Iterator[System]:
    """The fleet, whole before each test and quiescent after it."""
    wait_until_whole(fleet)
    yield fleet
    wait_until_whole(fleet)
    fleet.audit()


def test_a_killed_decode_rank_moves_its_stream(system: System) -> None:
    expected = stream(system, prompt_of(1)).tokens
    assert len(expected) == NUM_TOKENS
    before, victims = wait_until_whole(system), []

    def strike() -> None:
        victims.append(busy(system, "decode"))
        kill(system, victims[0], "rank 0")

    outcome = stream(system, prompt_of(1), on_tokens=once(15, strike))
    assert_undisturbed(outcome, expected)
    line = system.finished(outcome.request_id)
    assert line["attempts"] == 2
    assert line["num_tokens"] == NUM_TOKENS
    assert_serves_again(system, victims[0], before)


def test_a_killed_prefill_rank_moves_its_prompt(system: System) -> None:
    prompt = prompt_of(2, 600)
    before = wait_until_whole(system)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, system, prompt, 20)
        victim = busy(system, "prefill")
        kill(system, victim, "rank 0")
        outcome = running.result()
    assert_serves_again(system, victim, before)
    assert_undisturbed(outcome, stream(system, prompt, 20).tokens)


def test_a_decode_rank_killed_while_it_receives_kv_loses_nothing(system: System) -> None:
    prompt = prompt_of(30, 600)
    before = wait_until_whole(system)

    def receiving() -> list[str]:
        return [worker["worker_id"] for worker in system.status()["workers"] if worker["blocks"].get("receiving")]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, system, prompt, 20)
        (victim,) = eventually(receiving, "KV is on its way")
        kill(system, victim, "rank 0")
        outcome = running.result()
    assert wait_until_whole(system)[victim] != before[victim]
    assert_undisturbed(outcome, stream(system, prompt, 20).tokens)


def test_a_killed_front_moves_an_answer_with_three_choices_that_is_not_streamed(system: System) -> None:
    before = wait_until_whole(system)
    body = {
        "prompt": prompt_of(31),
        "n": 3,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.8,
        "seed": 3,
        "ignore_eos": True,
        "return_token_ids": True,
    }

    def ask() -> list[list[int]]:
        with system.client() as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [choice["token_ids"] for choice in answer.json()["choices"]]

    expected = ask()
    assert len(set(map(tuple, expected))) == 3
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask)
        victims = eventually(
            lambda: [w["worker_id"] for w in system.status()["workers"] if w["sequences"].get("running")], "it decodes"
        )
        kill(system, victims[0], "front")
        assert running.result() == expected
    assert_serves_again(system, victims[0], before)


def test_a_killed_router_breaks_its_streams_loudly_and_comes_back_on_the_same_ports(system: System) -> None:
    expected = stream(system, prompt_of(3)).tokens
    before, urls = wait_until_whole(system), (system.url, system.grpc)
    outcome = stream(system, prompt_of(3), on_tokens=once(10, lambda: void(kill(system, "router", "router"))))
    assert isinstance(outcome.broken, httpx.RemoteProtocolError | httpx.ReadError), "a truncated stream is no success"
    assert not outcome.is_done
    assert outcome.tokens == expected[: len(outcome.tokens)]
    assert wait_until_whole(system) == before, "workers outlive the router"
    assert (system.state_now()["http_url"], system.state_now()["grpc_url"]) == urls
    system.audit()  # the workers have dropped what nobody will ask for
    assert_undisturbed(stream(system, prompt_of(3)), expected)


def void(result: object) -> None:
    """For lambdas."""


def test_all_decode_workers_are_killed_and_prefill_workers_decode(system: System) -> None:
    expected = stream(system, prompt_of(4)).tokens
    before = wait_until_whole(system)

    def strike() -> None:
        for unit in ("decode-0", "decode-1"):
            kill(system, unit, "rank 0")

    assert_undisturbed(stream(system, prompt_of(4), on_tokens=once(15, strike)), expected)
    after = wait_until_whole(system)
    assert {name for name in after if after[name] != before[name]} == {"decode-0", "decode-1"}


def test_a_stopped_decode_rank_is_detected_and_does_no_harm_when_it_goes_on(system: System) -> None:
    expected = stream(system, prompt_of(5)).tokens
    before, victims, pids = wait_until_whole(system), [], []

    def strike() -> None:
        victims.append(busy(system, "decode"))
        pids.append(kill(system, victims[0], "rank 0", signal.SIGSTOP))

    try:
        outcome = stream(system, prompt_of(5), on_tokens=once(15, strike))
        assert_undisturbed(outcome, expected)
        line = system.finished(outcome.request_id)
        assert line["attempts"] == 2
        assert line["failover_ttft_ms"] == 0, "the first token came before the fault"
        assert line["failover_ms"] >= SILENCE_S * 1e3, "the stream stood still until the worker was given up"
        seen_ms = line["total_ms"] - line["ttft_ms"]
        assert line["decode_ms"] <= seen_ms - line["failover_ms"] + 0.01, "the gap is no part of decode"
        assert line["tpot_ms"] == pytest.approx(line["decode_ms"] / (NUM_TOKENS - 2), abs=0.01), "nor of its mean"
        for seed in (6, 7, 8):  # new requests are not sent to a worker that stands still
            outcome = stream(system, prompt_of(seed), 3)
            assert outcome.is_done
            assert system.finished(outcome.request_id)["attempts"] == 1
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert wait_until_whole(system) == before, "it was silent, not dead: nothing was started again"
    system.audit()
    with ThreadPoolExecutor(4) as pool:  # enough to reach both decode workers
        outcomes = list(pool.map(lambda _: stream(system, prompt_of(5)), range(4)))
    for outcome in outcomes:
        assert_undisturbed(outcome, expected)
    used = {system.finished(outcome.request_id)["decode_worker"] for outcome in outcomes}
    assert used == {"decode-0", "decode-1"}


def test_a_prefill_rank_that_stops_in_the_middle_of_its_transfer_does_no_harm_when_it_goes_on(system: System) -> None:
    prompt = prompt_of(9, 800)
    before = wait_until_whole(system)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, system, prompt, 20)
        eventually(
            lambda: any(worker["blocks"].get("receiving") for worker in system.status()["workers"]), "KV is on its way"
        )
        victim = busy(system, "prefill")
        pid = kill(system, victim, "rank 0", signal.SIGSTOP)
        try:
            outcome = running.result()
        finally:
            os.kill(pid, signal.SIGCONT)
    assert system.finished(outcome.request_id)["attempts"] == 2
    assert wait_until_whole(system) == before
    system.audit()
    with ThreadPoolExecutor(2) as pool:
        (again, too) = pool.map(lambda _: stream(system, prompt, 20), range(2))
    assert_undisturbed(outcome, again.tokens)
    assert_undisturbed(too, again.tokens)


# ---- a server with one worker


@pytest.fixture(scope="module")
def single() -> Iterator[System]:
    with serve(*SLOW, "--mixed", "1", "--prefill", "0", "--decode", "0") as running:
        yield running


def test_the_only_worker_is_killed_and_its_streams_go_on_when_it_is_back(single: System) -> None:
    before = wait_until_whole(single)
    expected = stream(single, prompt_of(1)).tokens
    strike = once(15, lambda: void(kill(single, "mixed-0", "rank 0")))
    assert_undisturbed(stream(single, prompt_of(1), on_tokens=strike), expected)
    assert wait_until_whole(single)["mixed-0"] != before["mixed-0"]
    single.audit()


def test_a_stream_that_can_not_wait_for_the_only_worker_ends_with_a_named_error(single: System) -> None:
    wait_until_whole(single)
    strike = once(15, lambda: void(kill(single, "mixed-0", "rank 0")))
    outcome = stream(single, prompt_of(2), on_tokens=strike, timeout=1.0)
    assert outcome.error is not None, "never silently"
    assert outcome.error["message"]
    assert outcome.error["type"] == "server_error"
    assert outcome.error["code"] in (503, 504)
    assert not outcome.is_done
    with single.client() as client:
        refused = client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 1})
        health = client.get("/health")
    if refused.status_code != 200:  # unless it is back already
        assert (refused.status_code, health.status_code) == (503, 503)
        assert refused.json()["error"]["code"] in ("unavailable", "worker_lost")
        assert refused.headers["retry-after"]
    wait_until_whole(single)
    assert len(generate(single, prompt_of(3), 4)) == 4
    single.audit()
