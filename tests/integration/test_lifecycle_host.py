"""The conversation with one child process."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster import process_tree, version
from cluster.host import Ended, HostedProcess, ProcessEvent, ProcessOrder, Report, Started
from cluster.process_log import ProcessLog
from cluster.rank_host import RankHost
from cluster.site import Home
from tests.support.stub_server import ROOT

_STUB = ("tests.support.stub_process", "rank")
_SPEC = {"worker_id": "decode-0", "tp_rank": 0}


def converse(
    tmp_path: Path, order: ProcessOrder, talk: Callable[[HostedProcess, asyncio.Queue[ProcessEvent]], Awaitable[None]]
) -> list[ProcessEvent]:
    """Start a child, talk to it, stop it; what came after the talk."""

    async def main() -> list[ProcessEvent]:
        events: asyncio.Queue[ProcessEvent] = asyncio.Queue()
        process = await HostedProcess.start(order, tmp_path, events.put_nowait)
        async with asyncio.timeout(20):
            await talk(process, events)
            await process.stop(5.0)
        rest = []
        while not events.empty():
            rest.append(events.get_nowait())
        return rest

    return asyncio.run(main())


async def until_ready(events: asyncio.Queue[ProcessEvent]) -> Started:
    first = await events.get()
    assert isinstance(first, Started)
    second = await events.get()
    assert isinstance(second, Report)
    assert second.event == "ready"
    return first


def test_messages_arrive_in_order_and_are_answered(tmp_path: Path) -> None:
    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await until_ready(events)
        for number in range(100):
            process.tell({"event": "count", "number": number})
        for number in range(100):
            answer = await events.get()
            assert answer == Report("rank 0", "echo", {"message": {"event": "count", "number": number}})

    rest = converse(tmp_path, ProcessOrder("rank 0", _STUB, _SPEC, "a.log"), talk)
    assert rest == [Ended("rank 0", 0, "")]
    assert '"started"' in (tmp_path / "a.log").read_text()


def test_a_deaf_child_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await until_ready(events)
        process.tell({"event": "deaf"})
        await events.get()
        began = time.monotonic()
        await process.stop(0.2)
        assert 0.2 <= time.monotonic() - began < 2.0

    assert converse(tmp_path, ProcessOrder("rank 0", _STUB, _SPEC, "a.log"), talk) == [Ended("rank 0", -9, "")]


def test_a_child_that_is_gone_can_be_told_things(tmp_path: Path) -> None:
    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await until_ready(events)
        process.tell({"event": "die"})
        assert isinstance(await events.get(), Ended)
        process.tell({"event": "hello"})

    assert converse(tmp_path, ProcessOrder("rank 0", _STUB, _SPEC, "a.log"), talk) == []


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> ProcessOrder:
    """A child that runs this code; its module is found by way of PYTHONPATH."""
    (tmp_path / "odd_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ProcessOrder("odd", ("odd_child",), {}, "odd.log")


def test_what_is_no_report_is_logged_and_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = script(
        tmp_path,
        monkeypatch,
        """if True:
        import sys
        print("hello", flush=True)
        print('["event"]', flush=True)
        print('{"no": 1}', flush=True)
        print('{"event": "ready"}', flush=True)
        sys.stdin.read()
        """,
    )

    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await until_ready(events)

    converse(tmp_path, order, talk)
    assert (tmp_path / "odd.log").read_text().count("not a report") == 3


def test_the_end_is_seen_though_a_grandchild_holds_the_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = script(
        tmp_path,
        monkeypatch,
        """if True:
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print('{"event": "ready", "pid": %d}' % child.pid, flush=True)
        sys.stderr.write("ValueError: it broke")
        sys.exit(7)
        """,
    )

    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await events.get()
        report = await events.get()
        assert isinstance(report, Report)
        began = time.monotonic()
        assert await events.get() == Ended("odd", 7, "ValueError: it broke")
        assert time.monotonic() - began < 2.0
        process_tree.kill([report.fields["pid"]])

    converse(tmp_path, order, talk)


def test_a_child_starts_in_any_directory_and_with_few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = script(
        tmp_path,
        monkeypatch,
        """if True:
        import json, os, sys
        import baton, cluster
        assert "" not in sys.path and os.getcwd() not in sys.path, sys.path
        print(json.dumps({"event": "ready", "omp": os.environ["OMP_NUM_THREADS"]}), flush=True)
        """,
    )
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "baton.py").write_text("raise SystemExit('the working directory was imported from')")
    monkeypatch.chdir(tmp_path / "cwd")

    async def talk(process: HostedProcess, events: asyncio.Queue[ProcessEvent]) -> None:
        await events.get()
        assert await events.get() == Report("odd", "ready", {"omp": "1"})

    assert converse(tmp_path, order, talk) == [Ended("odd", 0, "")]


def test_a_rank_host_relays_events_until_all_its_processes_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(f"/tmp/br-{os.getpid()}")
    monkeypatch.setenv("BATON_RUNTIME_DIR", str(base))
    home = Home("01234567", version.code_digest(), None)
    private = base / home.run_id / "w" / "decode-0-abcdef"
    host = RankHost()
    front = ProcessOrder(
        "front", (_STUB[0], "front"), {"worker_id": "decode-0", "host": "127.0.0.1", "port": 0}, "f.log"
    )
    rank = ProcessOrder("rank 0", _STUB, _SPEC, "r.log")
    events: list[ProcessEvent] = []
    both_ready = threading.Event()

    def listen() -> None:
        for event in host.run([rank, front], "w/decode-0-abcdef", home, "127.0.0.1"):
            events.append(event)
            if sum(isinstance(seen, Report) for seen in events) == 2:
                both_ready.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert both_ready.wait(20)
    assert private.stat().st_mode & 0o777 == 0o700
    host.stop(5.0)
    listener.join(5)
    assert not listener.is_alive()
    assert sorted(event.process for event in events if isinstance(event, Ended)) == ["front", "rank 0"]
    assert list(base.iterdir()) == []
    base.rmdir()


def test_a_log_file_is_bounded(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "x.log", max_bytes=1000)
    for number in range(1000):
        log.write(b"line %d" % number)
    log.close()
    log.write(b"too late")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"x.log", "x.log.1"}
    assert max(sizes.values()) <= 1000
    assert (tmp_path / "x.log").read_bytes().endswith(b"line 999\n")


def test_descendants_are_ended_children_of_dead_parents_included() -> None:
    code = """if True:
        import subprocess, sys
        from cluster import process_tree
        process_tree.adopt_orphans()
        inner = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', %r])"
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", inner % stubborn]).wait()
        subprocess.Popen(["sleep", "60"])
        import time
        time.sleep(0.3)
        assert len(process_tree.descendants()) == 2
        assert process_tree.end_descendants(grace_s=0.2) == 2
        assert process_tree.descendants() == []
        """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pid = os.spawnve(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code], env)
    assert os.waitpid(pid, 0)[1] == 0
