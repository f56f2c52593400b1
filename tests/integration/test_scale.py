"""Workers join and leave a running server, and no request notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.stub_server import ROOT
from tests.support.system import System, eventually, generate, serve

pytestmark = pytest.mark.timeout(150)
NUM_TOKENS = 300
SIM = ("--engine", "sim", "--set", "sim.decode_s_per_step=0.01")


def scale(system: System, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "scale", *flags],
        env={"PYTHONPATH": str(ROOT), "BATON_RUNTIME_DIR": str(system.runtime_dir), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_workers_join_and_leave_under_load() -> None:
    with serve(*SIM) as system, ThreadPoolExecutor(4) as pool:
        expected = generate(system, [5, 6, 7], NUM_TOKENS)
        joined = scale(system, "--decode", "2", "--prefill", "2")
        assert joined.stdout == "prefill-1 joined; decode-1 joined\n", joined.stderr
        asked = [pool.submit(generate, system, [5, 6, 7], NUM_TOKENS) for _ in range(4)]
        eventually(lambda: any(system.worker("decode-1")["sequences"].values()), "decode-1 has something to do")
        left = scale(system, "--decode", "1", "--prefill", "0")
        assert left.stdout == "prefill-0 left; prefill-1 left; decode-1 left\n", left.stderr
        assert [task.result() for task in asked] == [expected] * 4
        assert generate(system, [5, 6, 7], NUM_TOKENS) == expected
        served = [(line["decode_worker"], line["attempts"]) for line in system.finished_requests()]
        assert ("decode-1", 1) in served  # it finished what it did before it left
        assert {attempts for _, attempts in served} == {1}
        assert set(system.state_now()["units"]) == {"router", "decode-0"}
        refused = scale(system, "--decode", "0")
        assert (refused.returncode, refused.stderr) == (
            1,
            "baton: no worker would decode: --decode or --mixed must be at least 1\n",
        )
        assert scale(system, "--decode", "1").stdout == "nothing to do\n"


def test_a_worker_that_dies_while_it_leaves_is_not_started_again() -> None:
    with serve(*SIM, "--decode", "2") as system, ThreadPoolExecutor(8) as pool:
        expected = generate(system, [5, 6, 7], NUM_TOKENS)
        asked = [pool.submit(generate, system, [5, 6, 7], NUM_TOKENS) for _ in range(6)]
        eventually(lambda: any(system.worker("decode-1")["sequences"].values()), "decode-1 has something to do")
        pid = system.state_now()["units"]["decode-1"]["pids"]["front"]
        leaving = pool.submit(scale, system, "--decode", "1")
        eventually(lambda: system.worker("decode-1")["draining"], "decode-1 is leaving")
        os.kill(pid, signal.SIGKILL)
        assert leaving.result().stdout == "decode-1 left\n"
        assert [task.result() for task in asked] == [expected] * 6
        assert set(system.state_now()["units"]) == {"router", "prefill-0", "decode-0"}
        assert "starting it again" not in system.log
