"""The `baton` commands against a whole server, as a newcomer types them, and without one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.tls import make_identity, ssl_context
from tests.support.system import System, eventually, serve

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
QUESTION = "What is Baton?"
(ANSWER,) = (
    pair["answer"]
    for line in (ROOT / "bench" / "demo_model" / "qa.jsonl").read_text().splitlines()
    if (pair := json.loads(line))["question"] == QUESTION
)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with serve() as running:
        yield running


@pytest.fixture
def nowhere() -> Iterator[Path]:
    """A runtime directory without a server."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as path:
        os.chmod(path, 0o700)
        yield Path(path)


def baton(runtime_dir: Path, *arguments: str, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "BATON_RUNTIME_DIR": str(runtime_dir), **env},
    )


def test_chat_prints_the_exact_answer_and_where_the_time_went(system: System) -> None:
    done = baton(system.runtime_dir, "chat", QUESTION)
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n")
    (line,) = done.stderr.splitlines()
    for word in (
        "stop",
        "first token",
        "prefill",
        "transfer",
        "exposed",
        "per token",
        "prefill-0 -> decode-0",
        "KV by",
    ):
        assert word in line
    system.audit()


def test_a_conversation_can_be_piped_in(system: System) -> None:
    done = baton(
        system.runtime_dir, "chat", "--temperature", "0", "--max-tokens", "100", text=f"{QUESTION}\n/new\nHi\n"
    )
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == ANSWER
    assert second.startswith("Hi!")


def test_chat_shows_a_refusal_as_one_sentence(system: System) -> None:
    done = baton(system.runtime_dir, "chat", "hi", "--temperature", "-1")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("baton: temperature must be at least 0")


def test_leaving_a_chat_aborts_its_request(system: System) -> None:
    before = system.metrics().get('baton_requests_total{endpoint="chat",outcome="abort"}', 0)
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "chat", "x " * 500, "--max-tokens", "2000", "--temperature", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "BATON_RUNTIME_DIR": str(system.runtime_dir)},
    ) as chat:
        assert chat.stdout is not None
        assert chat.stdout.read(1)  # it has begun
        chat.send_signal(signal.SIGINT)
        assert chat.wait(20) == 130
        assert chat.stderr is not None
        assert b"Traceback" not in chat.stderr.read()
    eventually(
        lambda: system.metrics().get('baton_requests_total{endpoint="chat",outcome="abort"}', 0) == before + 1,
        "the abort is counted",
    )
    system.audit()


def test_status_shows_what_every_worker_holds(system: System) -> None:
    baton(system.runtime_dir, "chat", QUESTION)
    system.audit()
    done = baton(system.runtime_dir, "status", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    status = json.loads(done.stdout)
    assert status["router"]["serving"] is True
    workers = {worker["worker_id"]: worker for worker in status["workers"]}
    assert {name: worker["role"] for name, worker in workers.items()} == {"prefill-0": "prefill", "decode-0": "decode"}
    for worker in workers.values():
        assert {"free", "cached", "running", "receiving", "quarantined"} <= set(worker["blocks"])
        assert not any(worker["sequences"].values())
        assert not any(count for kind, count in worker["transfers"].items() if kind != "links")
        assert worker["peers"]
    assert workers["decode-0"]["counters"]["kv_bytes_received"] == workers["prefill-0"]["counters"]["kv_bytes_sent"] > 0
    assert workers["decode-0"]["counters"]["kv_integrity_failures"] == 0
    units = status["server"]["units"]
    assert {unit["state"] for unit in units.values()} == {"ready"}
    for name, worker in workers.items():
        assert sorted(worker["pids"]) == sorted(units[name]["pids"].values())
        assert all(Path(f"/proc/{pid}").exists() for pid in worker["pids"])
    assert str(system.state["token"]).removeprefix("Bearer ") not in done.stdout
    table = baton(system.runtime_dir, "status").stdout
    assert "serving" in table
    assert re.search(r"^decode-0 +decode +1 +ready", table, re.MULTILINE)


def test_trace_draws_the_latest_request_or_the_one_that_is_named(system: System) -> None:
    with system.client(**{"x-request-id": "draw-me"}) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}]})
    system.finished("draw-me")
    latest, named = baton(system.runtime_dir, "trace"), baton(system.runtime_dir, "trace", "draw-me")
    assert latest.returncode == named.returncode == 0
    assert latest.stdout == named.stdout
    for word in ("route", "queue", "prefill", "transfer", "deliver", "decode", "total"):
        assert re.search(rf"^  {word} ", named.stdout, re.MULTILINE), named.stdout
    trace = json.loads(baton(system.runtime_dir, "trace", answer.json()["id"], "--json").stdout)
    assert trace["request_id"] == answer.json()["id"]
    assert set(trace["moments_ms"]) == {"router", "prefill-0", "decode-0"}
    unknown = baton(system.runtime_dir, "trace", "nothing")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("baton: nothing: ")


def test_version_says_what_runs(system: System) -> None:
    with system.client() as client:
        version = client.get("/version").json()["version"]
    assert baton(system.runtime_dir, "version").stdout.startswith(f"baton {version}\n")


def test_help_comes_at_once(nowhere: Path) -> None:
    times_s = []
    for _ in range(5):
        began = time.monotonic()
        done = baton(nowhere, "--help")
        times_s.append(time.monotonic() - began)
        assert done.returncode == 0
    assert min(times_s) < 0.5, "nothing slow is imported (0.1 s on an idle machine)"
    for command in ("serve", "chat", "status", "trace", "down"):
        assert command in done.stdout


@pytest.mark.parametrize("command", [("chat", "hi"), ("status",), ("status", "--json"), ("trace",), ("trace", "x")])
def test_without_a_server_there_is_one_sentence(nowhere: Path, command: tuple[str, ...]) -> None:
    done = baton(nowhere, *command)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("baton: no server of yours is running; start one with `baton serve`")


def test_down_without_a_server_has_failed(nowhere: Path) -> None:
    done = baton(nowhere, "down")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "baton: no such server of yours is running\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("serve", "--set", "engine.blok_size=32"), "engine.blok_size"),
        (("serve", "--set", "nonsense"), "key=value"),
        (("serve", "/no/such/model"), "/no/such/model"),
        (("serve", "--decode", "0"), "--decode"),
        (("serve", "--api-key-file", "/no/such/keys", "--launcher", "local", "--engine", "sim"), "/no/such/keys"),
    ],
)
def test_a_server_that_can_not_start_says_why_and_leaves_nothing(
    nowhere: Path, arguments: tuple[str, ...], word: str
) -> None:
    done = baton(nowhere, *arguments, "--port", "0", "--grpc-port", "0")
    assert done.returncode in (1, 2)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in nowhere.iterdir() if path.name != "logs"] == []


def test_down_ends_the_server_and_leaves_nothing() -> None:
    with serve("--engine", "sim") as system:
        pids = [pid for unit in system.state_now()["units"].values() for pid in unit["pids"].values()]
        done = baton(system.runtime_dir, "down")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Ended baton-sim at {system.url} ")
        assert system.process.wait(5) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert [path for path in system.runtime_dir.iterdir() if path.name != "logs"] == []


@pytest.mark.parametrize("how", ["Ctrl-C", "down"])
def test_a_stream_that_outlives_the_drain_ends_with_an_error_that_says_why(how: str) -> None:
    wish = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with serve("--engine", "sim", "--set", "router.drain_s=0.2") as system:
        with system.client() as client, client.stream("POST", "/v1/completions", json=wish) as stream:
            lines = stream.iter_lines()
            assert "text_completion" in next(lines)
            if how == "down":
                assert baton(system.runtime_dir, "down").returncode == 0
            else:
                system.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line.startswith("data: ")]  # a cut connection raises
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert system.process.wait(20) == 0


def test_an_encrypted_worker_speaks_tls_1_3_and_nothing_older() -> None:
    secret = "a secret of this cluster, 32 byte"
    identity = make_identity(secret.encode())
    flags = ("--engine", "sim", "--mixed", "1", "--prefill", "0", "--decode", "0", "--encrypt")
    with serve(*flags, env={"BATON_CLUSTER_SECRET": secret}) as system:
        (worker,) = system.status()["workers"]
        host, _, port = worker["address"].rpartition(":")
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = ssl_context(identity, server_side=False)
            context.check_hostname = False
            context.set_alpn_protocols(["h2"])
            context.minimum_version = context.maximum_version = version
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                if version is ssl.TLSVersion.TLSv1_3:
                    with context.wrap_socket(sock) as stream:
                        assert stream.version() == "TLSv1.3"
                    continue
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(sock)
