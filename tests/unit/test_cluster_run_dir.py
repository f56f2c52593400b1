"""Run directories: private, short, found again, removed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import process_tree, run_dir


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(f"/tmp/br-{os.getpid()}")
    monkeypatch.setenv("BATON_RUNTIME_DIR", str(path))
    yield path
    for run in path.iterdir() if path.is_dir() else ():
        run_dir.RunDir(run).remove()
    if path.is_dir():
        path.rmdir()


def test_nobody_else_can_enter_or_read(base: Path) -> None:
    run = run_dir.create()
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.path / "server.json").stat().st_mode) == 0o600


def test_a_directory_that_others_can_enter_is_refused(base: Path) -> None:
    base.mkdir(mode=0o755)
    with pytest.raises(run_dir.RunDirError, match="nobody else can enter"):
        run_dir.base_dir()


def test_a_link_in_its_place_is_refused(base: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    base.symlink_to(tmp_path)
    with pytest.raises(run_dir.RunDirError):
        run_dir.base_dir()
    base.unlink()


def test_a_path_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_RUNTIME_DIR", "/tmp/" + "x" * 40)
    with pytest.raises(run_dir.RunDirError, match="too long"):
        run_dir.base_dir()


def test_a_server_is_found_and_its_fields_add_up(base: Path) -> None:
    run = run_dir.create()
    run.write_state(http_url="http://127.0.0.1:1", token="t")
    run.write_state(http_url="http://127.0.0.1:2")
    (server,) = run_dir.servers()
    assert (server.url, server.token) == ("http://127.0.0.1:2", "t")
    assert server.is_alive
    assert run_dir.remove_dead() == []


def test_a_pid_with_a_new_owner_is_not_the_server(base: Path) -> None:
    run = run_dir.create()
    me = process_tree.identify(os.getpid())
    assert me is not None
    run.write_state(guardian=[me.pid, me.start_ticks - 1])
    assert not run_dir.servers()[0].is_alive
    assert run_dir.remove_dead() == [run.run_id]
    assert not run.path.exists()


def test_logs_of_the_last_five_failures_are_kept(base: Path) -> None:
    kept = []
    for index in range(7):
        run = run_dir.create()
        (run.logs / "router.log").write_text("line\n")
        path = run.keep_logs()
        assert path is not None
        os.utime(path, (index, index))
        kept.append(path)
        run.remove()
    assert [path.exists() for path in kept] == [False, False, True, True, True, True, True]


def test_a_longest_worker_directory_leaves_room_for_a_socket_name(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_dir.RunDir(Path("/" + "x" * 31) / "0123abcd")
    assert len(str(run.path / run_dir.worker_dir("prefill-1023", "0123456789abcdef"))) <= 107 - 40


def test_a_server_is_known_by_every_router(tmp_path: Path) -> None:
    urls = {"router": "http://127.0.0.1:8000", "router-1": "http://127.0.0.1:8001", "router-2": None}
    state = {"http_url": urls["router"], "routers": {name: [url, ""] for name, url in urls.items()}}
    server = run_dir.Server(run_dir.RunDir(tmp_path), process_tree.ProcessId(os.getpid(), 0), None, state)
    assert server.urls == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
