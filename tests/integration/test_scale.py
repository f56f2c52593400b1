"""Workers join and leave a running server, and no request notices."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.stub_server import ROOT
from tests.support.system import System, eventually, generate, serve

pytestmark = pytest.mark.timeout(150)
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
    with serve(*SIM) as system, ThreadPoolExecutor(3) as pool:
        expected = generate(system, [5, 6, 7], 60)
        is_over = threading.Event()

        def keep_asking() -> int:
            count = 0
            while not is_over.is_set():
                assert generate(system, [5, 6, 7], 60) == expected
                count += 1
            return count

        asking = [pool.submit(keep_asking) for _ in range(3)]
        try:
            joined = scale(system, "--decode", "2", "--prefill", "2")
            assert joined.stdout == "prefill-1 joined; decode-1 joined\n", joined.stderr
            eventually(
                lambda: any(line["decode_worker"] == "decode-1" for line in system.finished_requests()), "it serves"
            )
            left = scale(system, "--decode", "1", "--prefill", "0")
            assert left.stdout == "prefill-0 left; prefill-1 left; decode-1 left\n", left.stderr
            before = len(system.finished_requests())
            eventually(lambda: len(system.finished_requests()) > before + 3, "what is left serves")
        finally:
            is_over.set()
        assert sum(task.result() for task in asking) > 6
        assert {line.get("error") for line in system.finished_requests()} == {None}
        assert '"code": "worker_lost"' not in system.log  # whoever left had finished what it did
        assert {line["attempts"] for line in system.finished_requests()} <= {1, 2}
        assert set(system.state_now()["units"]) == {"router", "decode-0"}
        refused = scale(system, "--decode", "0")
        assert (refused.returncode, refused.stderr) == (
            1,
            "baton: no worker would decode: --decode or --mixed must be at least 1\n",
        )
        assert scale(system, "--decode", "1").stdout == "nothing to do\n"
