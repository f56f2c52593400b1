"""Many streams at once while processes are killed and stopped at random: every stream has the undisturbed tokens."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.integration.test_faults import SLOW, Outcome, assert_undisturbed, prompt_of, stream, wait_until_whole
from tests.support.system import System, serve

pytestmark = pytest.mark.timeout(240)

NUM_STREAMS = 8
PREFILL, DECODE = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
MANY_ATTEMPTS = ("--set", "router.max_attempts=10")  # no stream may be lost, however often it is hit


@dataclass(frozen=True)
class Fault:
    """What happens to one process, and for how long if it is only stopped."""

    unit: str
    process: str
    stop_s: float | None

    def strike(self, system: System) -> None:
        pid = int(system.state_now()["units"][self.unit]["pids"][self.process])
        if self.stop_s is None:
            os.kill(pid, signal.SIGKILL)
            return
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self.stop_s)
        finally:
            os.kill(pid, signal.SIGCONT)


def plan(seed: int) -> list[Fault]:
    """One worker of each role is killed, and one is stopped: for less than anybody would notice, or for longer."""
    rng = random.Random(seed)
    faults = [
        Fault(rng.choice(units), rng.choice(("rank 0", "front")), stop_s)
        for units in (PREFILL, DECODE)
        for stop_s in (None, rng.choice((0.3, 1.0, 2.5)))
    ]
    rng.shuffle(faults)
    return faults


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with serve(*SLOW, *MANY_ATTEMPTS, "--prefill", "2", "--decode", "2") as running:
        yield running


@pytest.mark.parametrize("seed", [1])
def test_no_stream_notices_that_processes_die_and_stand_still(system: System, seed: int) -> None:
    prompts = [prompt_of(100 * seed + index, 20 + 37 * index) for index in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        expected = [outcome.tokens for outcome in pool.map(lambda prompt: stream(system, prompt), prompts)]
    over = threading.Event()

    def client(index: int) -> list[Outcome]:
        outcomes = [stream(system, prompts[index])]
        while not over.is_set():
            outcomes.append(stream(system, prompts[index]))
        return outcomes

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        clients = [pool.submit(client, index) for index in range(NUM_STREAMS)]
        try:
            for fault in plan(seed):
                wait_until_whole(system)
                fault.strike(system)
            wait_until_whole(system)
        finally:
            over.set()
        outcomes = [future.result() for future in clients]
    for index, rounds in enumerate(outcomes):
        for outcome in rounds:
            assert_undisturbed(outcome, expected[index])
    attempts = [system.finished(outcome.request_id)["attempts"] for rounds in outcomes for outcome in rounds]
    assert max(attempts) > 1, "nobody was hit"
    wait_until_whole(system)
    system.audit()
    assert "TellTaleMismatch" not in system.log
