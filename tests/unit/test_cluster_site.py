"""A node's own part of a server: its directory, its model, its code."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import run_dir, site, version
from cluster.host import ProcessOrder
from cluster.run_dir import RunDir
from cluster.site import Home, Site, SiteError


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(f"/tmp/bs-{os.getpid()}")
    monkeypatch.setenv("BATON_RUNTIME_DIR", str(path))
    yield path
    for directory in list(path.iterdir()):
        RunDir(directory).remove()
    path.rmdir()


def test_whoever_leaves_last_removes_the_directory(base: Path) -> None:
    ours = run_dir.join("01234567")
    child = os.fork()
    if child == 0:  # another process of the same node
        run_dir.leave(run_dir.join("01234567"))
        os._exit(0 if ours.path.is_dir() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run_dir.leave(ours)
    run_dir.leave(ours)
    assert list(base.iterdir()) == []


def test_what_killed_processes_left_is_removed_by_whoever_comes_next(base: Path) -> None:
    child = os.fork()
    if child == 0:
        run_dir.join("01234567")
        os._exit(0)
    os.waitpid(child, 0)
    assert (base / "01234567").is_dir()
    run_dir.leave(run_dir.join("89abcdef"))
    assert list(base.iterdir()) == []


def test_a_directory_with_a_guardian_is_the_guardians(base: Path) -> None:
    run = run_dir.create()
    run_dir.leave(run_dir.join(run.run_id))
    assert run.state()["guardian"][0] == os.getpid()


def test_logs_of_a_failure_outlive_the_directory(base: Path) -> None:
    run = run_dir.join("01234567")
    (run.logs / "x.log").write_text("why")
    run.mark_failed()
    run_dir.leave(run)
    assert (base / "logs" / "01234567" / "x.log").read_text() == "why"


def test_an_order_gets_the_nodes_own_address_and_paths(tmp_path: Path) -> None:
    here = Site("10.0.0.7", RunDir(tmp_path), "/models/here")
    rank = ProcessOrder("rank 0", ("x",), {"worker_dir": "w/d-0-1", "host": "?", "model": {"path": "/there"}}, "l")
    assert here.localize(rank).spec == {
        "worker_dir": str(tmp_path / "w/d-0-1"),
        "host": "10.0.0.7",
        "model": {"path": "/models/here"},
    }
    router = ProcessOrder("router", ("x",), {"host": "node", "model_dir": "/there"}, "l")
    assert here.localize(router).spec == {"host": "10.0.0.7", "model_dir": "/models/here"}
    fixed = ProcessOrder("router", ("x",), {"host": "127.0.0.1", "model_dir": ""}, "l")
    assert here.localize(fixed).spec == fixed.spec


def test_a_new_start_of_a_worker_takes_the_place_of_earlier_ones(tmp_path: Path) -> None:
    here = Site("127.0.0.1", RunDir(tmp_path), None)
    for name in ("w/decode-1-aaa", "w/decode-10-ccc", "w/decode-1-bbb"):
        here.make_private_dir(name)
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["decode-1-bbb", "decode-10-ccc"]
    assert (tmp_path / "w/decode-1-bbb").stat().st_mode & 0o777 == 0o700


def test_other_code_is_refused_by_name(base: Path) -> None:
    with pytest.raises(
        SiteError, match=f"{socket.gethostname()} has Baton .*, the supervisor Baton 9: install the same"
    ):
        site.join(Home("01234567", "Baton 9", None), "10.0.0.7")
    assert "Python 3." in version.code_digest()
    base.mkdir(exist_ok=True)


def test_a_model_that_is_not_on_this_node_is_refused_by_name(base: Path) -> None:
    with pytest.raises(SiteError, match="/no/such: no such directory"):
        site.survey(version.code_digest(), "/no/such")
    base.mkdir(exist_ok=True)
