"""The other commands find a running server, ask it, and end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.stub_server import ROOT, StubServer


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with StubServer("--log-format", "text") as running:
        yield running.wait_ready()


def run(
    server: StubServer | Path, *arguments: str, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    runtime_dir = server if isinstance(server, Path) else server.runtime_dir
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), "BATON_RUNTIME_DIR": str(runtime_dir), **(env or {})},
    )


def test_one_question_is_answered_and_its_waterfall_shown(server: StubServer) -> None:
    done = run(server, "chat", "what is it?")
    assert done.stdout == "WHAT IS IT? \n"
    assert "first token 9.00 ms" in done.stderr
    assert done.returncode == 0


def test_questions_can_be_piped_in(server: StubServer) -> None:
    assert run(server, "chat", stdin="one\n\ntwo two\n").stdout == "ONE \nTWO TWO \n"


def test_the_request_leaves_one_line_on_the_servers_terminal(server: StubServer) -> None:
    before = server.stderr.count("cmpl-1")
    run(server, "chat", "again")
    server.wait_for(lambda: server.stderr.count("cmpl-1") == before + 1)


def test_status_names_every_worker(server: StubServer) -> None:
    shown = run(server, "status").stdout
    assert "decode-0" in shown
    assert "prefill-0" in shown
    for_programs = json.loads(run(server, "status", "--json").stdout)
    assert [worker["worker_id"] for worker in for_programs["workers"]] == ["decode-0", "prefill-0"]
    assert for_programs["server"]["units"]["decode-0"]["state"] == "ready"
    assert "token" not in json.dumps(for_programs)


def test_trace_without_an_id_shows_the_latest(server: StubServer) -> None:
    latest, named = run(server, "trace"), run(server, "trace", "cmpl-1")
    assert latest.stdout == named.stdout
    assert "prefill-0 -> decode-0" in named.stdout
    assert json.loads(run(server, "trace", "cmpl-1", "--json").stdout)["request_id"] == "cmpl-1"


def test_an_unknown_trace_is_one_sentence(server: StubServer) -> None:
    done = run(server, "trace", "nothing")
    assert (done.returncode, done.stderr) == (1, "baton: nothing: unknown, unfinished or too long ago\n")


def test_a_url_of_a_server_that_is_not_ours_can_not_be_inspected(server: StubServer, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    empty = Path(f"/tmp/bn-{os.getpid()}")
    empty.mkdir(mode=0o700, exist_ok=True)
    url = server.state["http_url"]
    assert run(empty, "chat", "hi", "--url", url).stdout == "HI \n"
    refused = run(empty, "status", "--url", url)
    assert refused.returncode == 1
    assert "is not a server of yours" in refused.stderr
    wrong = run(empty, "status", "--url", url, env={"BATON_CLUSTER_SECRET": "x" * 32})
    assert wrong.returncode == 1
    assert wrong.stderr.startswith(f"baton: {url} refuses the secret that is set (wrong token); set BATON_CLUSTER_")
    asked = run(empty, "chat", "hi", "--url", url, env={"BATON_CLUSTER_SECRET": "x" * 32})
    assert (asked.returncode, asked.stdout, asked.stderr) == (1, "", wrong.stderr), "it was answered first"
    empty.rmdir()


class Foreign(BaseHTTPRequestHandler):
    """A server of somebody else: it knows no path of ours, and forbids what it does not know."""

    heard: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        """Its models."""
        self.heard.append((self.path, self.headers.get("authorization")))
        is_known = self.path == "/v1/models"
        body = json.dumps({"data": [{"id": "m", "owned_by": "somebody"}]} if is_known else {}).encode()
        self.send_response(200 if is_known else 403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """One word."""
        self.heard.append((self.path, self.headers.get("authorization")))
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"id": "1", "choices": [{"delta": {"content": "yes"}}]}\n\ndata: [DONE]\n\n')

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def test_who_is_not_baton_is_talked_to_and_not_told_the_secret() -> None:
    foreign = ThreadingHTTPServer(("127.0.0.1", 0), Foreign)
    serving = threading.Thread(target=foreign.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        url = f"http://127.0.0.1:{foreign.server_port}"
        with tempfile.TemporaryDirectory(prefix="bn-", dir="/tmp") as nothing:
            done = run(Path(nothing), "chat", "hi", "--url", url, env={"BATON_CLUSTER_SECRET": "x" * 32})
    finally:
        foreign.shutdown()
        serving.join()
        foreign.server_close()
    assert (done.returncode, done.stdout, done.stderr) == (0, "yes\n", "")
    assert Foreign.heard == [("/v1/models", None), ("/v1/chat/completions", None)]


def test_a_wrong_api_key_is_said_before_anything_is_asked(server: StubServer, tmp_path: Path) -> None:
    url = server.state["http_url"]
    done = run(server, "chat", "hi", env={"BATON_API_KEY": "wrong"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"baton: {url} refuses the API key (The API key is not known here.); set BATON_API_KEY or give --api-key-file\n"
    )
    (tmp_path / "key").write_text("\n")
    empty = run(server, "chat", "hi", "--api-key-file", str(tmp_path / "key"))
    assert (empty.returncode, empty.stdout, empty.stderr) == (
        1,
        "",
        f"baton: {tmp_path}/key: there is no API key in it\n",
    )


@pytest.mark.parametrize("command", [("chat", "hi"), ("status",), ("trace",)])
def test_a_port_where_nobody_listens_is_one_sentence(server: StubServer, command: tuple[str, ...]) -> None:
    done = run(server, *command, "--port", "1")
    assert (done.returncode, done.stderr) == (1, "baton: http://127.0.0.1:1 does not answer: Connection refused\n")


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1", "http://", "http://localhost:http"])
@pytest.mark.parametrize("command", [("chat", "hi"), ("status",), ("down",)])
def test_what_is_no_url_is_told_so(server: StubServer, command: tuple[str, ...], url: str) -> None:
    done = run(server, *command, "--url", url)
    assert (done.returncode, done.stderr) == (1, f"baton: {url}: not a URL such as http://127.0.0.1:8000\n")


@pytest.mark.parametrize("tail", ["/v1", "/v1/", "/"])
def test_the_url_that_the_banner_prints_is_understood(server: StubServer, tail: str) -> None:
    url = server.state["http_url"] + tail
    assert run(server, "chat", "hi", "--url", url).stdout == "HI \n"
    assert "decode-0" in run(server, "status", "--url", url).stdout


def test_down_ends_the_server_and_says_so() -> None:
    with StubServer() as server:
        url = server.wait_ready().state["http_url"]
        done = run(server, "down")
        assert done.stdout == f"Ended baton-sim at {url} (process {server.process.pid}).\n"
        assert server.process.wait(5) == 0
        server.audit.assert_clean(0.0)
        again = run(server, "down")
        assert (again.returncode, again.stderr) == (1, "baton: no such server of yours is running\n")
        lost = run(server, "status")
        assert lost.returncode == 1
        assert "no server of yours is running" in lost.stderr


def test_of_several_servers_one_must_be_chosen() -> None:
    with StubServer() as one, StubServer(runtime_dir=one.runtime_dir) as other:
        one.wait_ready()
        other.wait_ready()
        undecided = run(one, "down")
        assert undecided.returncode == 1
        assert "choose one with --port" in undecided.stderr
        port = one.state["http_url"].rpartition(":")[2]
        assert run(one, "down", "--port", port).returncode == 0
        assert one.process.wait(5) == 0
        assert other.process.poll() is None
        assert run(one, "down", "--all").returncode == 0
        assert other.process.wait(5) == 0


def test_down_removes_what_a_killed_server_left() -> None:
    with StubServer() as server:
        server.wait_ready()
        os.kill(server.process.pid, signal.SIGSTOP)
        os.kill(server.supervisor_pid, signal.SIGKILL)
        server.process.kill()
        server.process.wait()
        done = run(server, "down")
        assert "Removed what server" in done.stdout
        server.audit.assert_clean(0.0)


def test_workers_that_do_not_fit_are_refused_before_any_starts() -> None:
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    pool_bytes = int(available.split()[1]) * 1024 // 8
    with StubServer("--kv-cache-bytes", str(pool_bytes)) as server:
        server.wait_ready()
        refused = run(server, "scale", "--decode", "100")
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"baton: engine.kv_cache_bytes: 99 ranks would take {99 * pool_bytes} bytes;")
        assert set(server.state["units"]) == {"router", "prefill-0", "decode-0"}


def test_the_banner_prints_commands_that_work_as_typed(server: StubServer) -> None:
    port = server.state["http_url"].rpartition(":")[2]
    (advice,) = [line for line in server.stderr.splitlines() if line.startswith("  try")]
    command = advice.split(", ")[1].split()
    assert command[-3:] == ["status", "--port", port]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BATON_RUNTIME_DIR": str(server.runtime_dir)},
    )
    assert "decode-0" in done.stdout
