"""A server starts, mends itself and ends, in every way in which it can end, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from tests.support.stub_server import StubServer


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_cleanly(signum: signal.Signals) -> None:
    with StubServer("--tp", "2") as server:
        server.wait_ready()
        assert len(server.audit.pids()) == 2 + 1 + 2 * 3  # guardian, supervisor, router, two workers of three
        assert server.end(signum) == 0
        server.audit.assert_clean()
        assert not list(server.runtime_dir.iterdir())


def test_the_router_stops_before_the_workers() -> None:
    with StubServer(stub={"router": "slow-stop"}) as server:
        server.wait_ready()
        assert server.end() == 0
        stops = [entry["name"] for entry in server.whole_journal() if entry["event"] in ("stop", "stopped")]
        assert stops[:2] == ["router", "router"]
        assert sorted(stops) == sorted(
            2 * ["router", "decode-0 front", "decode-0 rank 0", "prefill-0 front", "prefill-0 rank 0"]
        )


def test_nothing_is_left_when_the_guardian_is_killed() -> None:
    with StubServer("--tp", "2") as server:
        server.wait_ready()
        server.process.kill()
        server.process.wait()
        server.audit.assert_clean()


def test_nothing_is_left_when_the_supervisor_is_killed() -> None:
    with StubServer("--tp", "2") as server:
        server.wait_ready()
        os.kill(server.supervisor_pid, signal.SIGKILL)
        assert server.process.wait(10) == 1
        server.audit.assert_clean(0.0)
        assert "the supervisor was ended by signal 9" in server.stderr
        kept = Path(server.stderr.rpartition(" ")[2].strip())
        assert (kept / "router.log").is_file()


def test_nothing_is_left_when_it_is_killed_while_starting() -> None:
    with StubServer(stub={"decode-0 rank 0": "hang"}) as server:
        server.wait_for(lambda: len(server.audit.pids()) >= 5)
        os.kill(server.supervisor_pid, signal.SIGKILL)
        assert server.process.wait(10) == 1
        server.audit.assert_clean(0.0)


def test_the_next_server_removes_what_a_killed_one_left() -> None:
    with StubServer() as first:
        first.wait_ready()
        os.kill(first.process.pid, signal.SIGSTOP)  # so that it can not clean up after its supervisor
        os.kill(first.supervisor_pid, signal.SIGKILL)
        first.process.kill()
        first.process.wait()
        assert first.audit.leftovers()
        with StubServer(runtime_dir=first.runtime_dir) as second:
            second.wait_ready()
            assert second.end() == 0
        first.audit.assert_clean(0.0)


def test_a_supervisor_that_hangs_is_ended_after_the_limit_that_its_configuration_sets() -> None:
    with StubServer("--set", "router.drain_s=600") as server:
        server.wait_ready()
        assert server.state["stop_limit_s"] > 600
        os.kill(server.supervisor_pid, signal.SIGSTOP)
        (file,) = server.runtime_dir.glob("*/server.json")
        RunDir(file.parent).write_state(stop_limit_s=0.2)
        assert server.end() == 0
        server.audit.assert_clean(0.0)


def test_a_second_signal_ends_it_at_once() -> None:
    with StubServer("--set", "cluster.stop_grace_s=30", stub={"decode-0 rank 0": "deaf"}) as server:
        server.wait_ready()
        server.process.send_signal(signal.SIGINT)
        server.wait_for(lambda: any(entry["event"] == "stop" for entry in server.journal("decode-0 rank 0")))
        began = time.monotonic()
        assert server.end(signal.SIGINT) == 130
        assert time.monotonic() - began < 3.0
        server.audit.assert_clean(0.0)


def test_a_worker_that_does_not_stop_is_killed_after_the_grace() -> None:
    with StubServer("--set", "cluster.stop_grace_s=0.3", stub={"decode-0 rank 0": "deaf"}) as server:
        server.wait_ready()
        assert server.end() == 0
        server.audit.assert_clean(0.0)


@pytest.mark.parametrize("process", ["rank 0", "rank 1", "front"])
def test_a_worker_that_loses_a_process_comes_back_as_a_new_incarnation(process: str) -> None:
    with StubServer("--tp", "2", "--decode", "2") as server:
        server.wait_ready()
        before = server.unit("decode-0")
        untouched = server.unit("decode-1")
        # The stub of the router may be slower to write its journal than to serve, or than the state file is to change.
        server.wait_for(lambda: any(len(fleet) == 3 for fleet in _fleets(server)))
        addresses = _fleets(server)[-1]
        os.kill(before["pids"][process], signal.SIGKILL)
        server.wait_for(
            lambda: server.unit("decode-0")["restarts"] == 1 and server.unit("decode-0")["state"] == "ready"
        )
        after = server.unit("decode-0")
        assert after["incarnation"] != before["incarnation"]
        assert not set(after["pids"].values()) & set(before["pids"].values())
        assert server.unit("decode-1") == untouched
        server.wait_for(lambda: _fleets(server)[-1].get("decode-0") not in (None, addresses["decode-0"]))
        fleets = _fleets(server)
        assert sorted(fleets[-2]) == ["decode-1", "prefill-0"]
        assert fleets[-1]["decode-0"] != addresses["decode-0"]
        assert f"decode-0 was lost: {process} was ended by SIGKILL" in server.stderr
        assert server.end() == 0
        server.audit.assert_clean()


def _fleets(server: StubServer) -> list[dict[str, str]]:
    """The memberships that the router was told of, in order: address by worker."""
    return [
        {worker["worker_id"]: worker["address"] for worker in entry["workers"]}
        for entry in server.journal("router")
        if entry["event"] == "fleet"
    ]


def test_a_router_that_dies_comes_back_on_its_ports_and_knows_the_fleet() -> None:
    with StubServer() as server:
        server.wait_ready()
        before, url = server.unit("router"), server.state["http_url"]
        server.wait_for(lambda: any(len(fleet) == 2 for fleet in _fleets(server)))
        fleet = _fleets(server)[-1]
        os.kill(before["pids"]["router"], signal.SIGKILL)
        server.wait_for(lambda: server.unit("router")["restarts"] == 1 and server.unit("router")["state"] == "ready")
        assert server.state["http_url"] == url
        assert server.unit("router")["pids"] != before["pids"]
        server.wait_for(lambda: _fleets(server)[-1] == fleet)
        assert server.end() == 0


def test_it_gives_up_when_its_only_decoder_fails_again_and_again() -> None:
    with StubServer("--mixed", "1", stub={"mixed-0 front": "die-after:0.6"}) as server:
        server.wait_ready()
        assert server.process.wait(40) == 1
        assert "mixed-0 failed five times within a minute" in server.stderr
        server.audit.assert_clean(0.0)


def test_a_failed_start_is_one_sentence_and_leaves_only_logs() -> None:
    with StubServer("--tp", "2", stub={"decode-0 rank 1": "fail"}) as server:
        assert server.process.wait(20) == 1
        complaint, place = server.stderr.splitlines()
        assert complaint == "baton: decode-0 could not start: rank 1 failed: ValueError: the stub was told to fail"
        kept = Path(place.removeprefix("baton: the logs are in "))
        assert (kept / "decode-0-rank1.log").is_file()
        server.audit.assert_clean(0.0)


def test_a_process_that_dies_at_its_start_is_quoted() -> None:
    with StubServer(stub={"prefill-0 rank 0": "die"}) as server:
        assert server.process.wait(20) == 1
        assert server.stderr.splitlines()[0] == (
            "baton: prefill-0 could not start: rank 0 ended with status 3 (RuntimeError: the stub was told to die)"
        )
        server.audit.assert_clean(0.0)


def test_a_start_that_takes_too_long_says_who_is_missing() -> None:
    with StubServer("--set", "cluster.startup_timeout_s=6", stub={"prefill-0 front": "hang"}) as server:
        assert server.process.wait(20) == 1
        assert "not ready after 6 s (cluster.startup_timeout_s): prefill-0 not ready" in server.stderr
        server.audit.assert_clean(0.0)


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_is_refused_before_anything_starts(flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with StubServer(flag, str(port)) as server:
            assert server.process.wait(10) == 1
            assert server.stderr == (
                f"baton: can not listen on 127.0.0.1:{port} (Address already in use); choose another with {flag}\n"
            )
            assert not server.whole_journal()
            server.audit.assert_clean(0.0)


def test_an_address_of_another_machine_is_no_fault_of_the_port() -> None:
    with StubServer("--host", "203.0.113.1") as server:
        assert server.process.wait(10) == 1
        assert server.stderr.startswith("baton: can not listen on 203.0.113.1:0 (")
        assert server.stderr.endswith("; choose another with --host\n")
        server.audit.assert_clean(0.0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--set", "engine.blok_size=32"], "engine.blok_size: no such key; did you mean engine.block_size"),
        (["--set", "engine.block_size=[1"], "engine.block_size: '[1' is not a YAML value"),
        (["--set", "nothing"], "--set nothing: must be key=value"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--engine", "native", "/no/such/model"], "model.path: /no/such/model: no such directory"),
        (["--set", "router.drain=2"], "router.drain: no such key; did you mean router.drain_s"),
        (["--set", "drain_s=2"], "drain_s: no such key; did you mean router.drain_s"),
        (["--port", "4711", "--grpc-port", "4711"], "--port and --grpc-port: both are 4711"),
        (["--prefill", "-1"], "topology.prefill"),
        (["--address", "auto"], "cluster.address needs cluster.launcher: ray"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_and_status_2(flags: list[str], complaint: str) -> None:
    with StubServer(*flags) as server:
        assert server.process.wait(10) == 2
        (line,) = server.stderr.splitlines()
        assert line.startswith("baton: ")
        assert complaint in line
        server.audit.assert_clean(0.0)
