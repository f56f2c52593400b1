"""A server with an embedded Ray: it keeps to itself, mends itself, and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import process_tree
from tests.support.audit_processes import is_loopback
from tests.support.stub_server import StubServer

pytestmark = pytest.mark.timeout(150)


def commands(server: StubServer) -> list[str]:
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in server.audit.pids()]


def test_it_listens_on_loopback_only_and_ends_cleanly() -> None:
    with StubServer("--tp", "2", launcher="ray") as server:
        server.wait_ready(100)
        found = commands(server)
        assert sum("raylet/raylet" in command for command in found) == 1
        assert sum(command.startswith("ray::RankHost") for command in found) == 4
        listeners = server.audit.listeners()
        assert len(listeners) > 5
        assert [address for address, _ in listeners if not is_loopback(address)] == []
        (token,) = server.runtime_dir.glob("*/ray-token")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        ranks = [pid for unit in ("prefill-0", "decode-0") for pid in server.unit(unit)["pids"].values()]
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in ranks] == [os.getpriority(os.PRIO_PROCESS, 0)] * 6
        assert server.end(signal.SIGINT) == 0
        server.audit.assert_clean()
        assert not list(server.runtime_dir.iterdir())


def test_a_worker_that_loses_a_rank_or_its_actor_comes_back() -> None:
    with StubServer("--tp", "2", "--prefill", "0", launcher="ray") as server:
        server.wait_ready(100)
        for restarts, is_actor in ((1, False), (2, True)):
            before = server.unit("decode-0")
            rank = before["pids"]["rank 1"]
            actor = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
            killed_at = time.monotonic()
            os.kill(actor if is_actor else rank, signal.SIGKILL)
            server.wait_for(lambda: server.unit("decode-0")["state"] == "down", 5)
            assert time.monotonic() - killed_at < 2.0
            server.wait_for(lambda: server.unit("decode-0")["state"] == "ready", 30)
            after = server.unit("decode-0")
            assert after["incarnation"] != before["incarnation"]
            assert after["restarts"] == restarts
            pids = list(before["pids"].values())  # zombies included
            server.wait_for(lambda pids=pids: not any(process_tree.identify(pid) for pid in pids), 10)
        assert server.end() == 0
        server.audit.assert_clean()


@pytest.mark.parametrize("victim", ["guardian", "supervisor"])
def test_nothing_is_left_when_a_parent_is_killed(victim: str) -> None:
    with StubServer(launcher="ray") as server:
        server.wait_ready(100)
        os.kill(server.process.pid if victim == "guardian" else server.supervisor_pid, signal.SIGKILL)
        server.process.wait(10)
        server.audit.assert_clean(10.0)


def test_it_can_be_stopped_while_ray_starts() -> None:
    with StubServer(launcher="ray") as server:
        server.wait_for(lambda: any("gcs_server" in command for command in commands(server)), 30)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 5.0
        server.audit.assert_clean()


def test_a_start_that_fails_under_ray_is_one_sentence() -> None:
    with StubServer(launcher="ray", stub={"decode-0 rank 0": "fail"}) as server:
        assert server.process.wait(100) == 1
        complaint = server.stderr.splitlines()[0]
        assert complaint == "baton: decode-0 could not start: rank 0 failed: ValueError: the stub was told to fail"
        server.audit.assert_clean()


def test_it_joins_a_running_cluster_and_leaves_it_running() -> None:
    ray_dir = f"/tmp/rj-{secrets.token_hex(3)}"
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2", "--port=6399"]
    lean = ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"]
    subprocess.run([*start, *lean, f"--temp-dir={ray_dir}"], check=True, env=env, stdout=subprocess.DEVNULL)
    with StubServer("--address", "127.0.0.1:6399", launcher="ray") as server:
        server.wait_ready(100)
        assert not any("gcs_server" in command for command in commands(server))
        ranks = list(server.unit("decode-0")["pids"].values())
        assert server.end() == 0
        server.audit.assert_clean(10.0)
        assert [pid for pid in ranks if process_tree.identify(pid) is not None] == []
    short = ("--set", "cluster.startup_timeout_s=20")
    with StubServer("--address", "127.0.0.1:6399", "--tp", "2", *short, launcher="ray") as server:
        assert server.process.wait(60) == 1
        complaint = "decode-0 could not be placed: it needs 2 CPUs on one node: 127.0.0.1 has 2 CPUs, 0 free"
        assert f"baton: {complaint}" in server.stderr.splitlines()


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:6398", "Connect call failed"), ("127.0.0.1:6397", "did not let us in"), ("nonsense", "HOST:PORT")],
)
def test_an_address_where_no_ray_is_ends_the_start_within_ten_seconds(address: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 6397)):  # somebody listens there, but not a Ray head
        began = time.monotonic()
        with StubServer("--address", address, launcher="ray") as server:
            assert server.process.wait(60) == 1
            assert time.monotonic() - began < 20  # 10 s on a quiet machine
            assert f"could not join the Ray cluster {address}: " in server.stderr
            assert reason in server.stderr
            server.audit.assert_clean()
