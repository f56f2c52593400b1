"""A real `ray up` of the shipped cluster file, on four hosts made of namespaces: head, two workers, and the operator.

`make ray-up-test` runs it alone, with everything that takes long (BATON_RAY_UP=long).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.hosts import Host, Hosts, missing

_IS_LONG: Final = os.environ.get("BATON_RAY_UP") == "long"
_HEADLESS_S: Final = 120 if _IS_LONG else 20
_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_DEPLOY: Final = _ROOT / "deploy" / "ray"
_DETECTED_S: Final = 2.0
_STOOD_STILL_S: Final = 2.0
"""A router that gets no processor detects nothing; on a quiet machine this is not used."""
_NAMED: Final = {"worker_lost", "unavailable", "overloaded", "transfer_error"}
_SERVE: Final = "--address auto --host node --routers 2 --prefill 1 --decode 1 --prefill-tp 1 --tp 2 --dtype float32 --log-format json"
_LIMIT_S: Final = 120.0
_NUM_TOKENS: Final = 24

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=f"hosts made of namespaces need {', '.join(missing())}"),
]


def until(look: Callable[[], Any], what: str, limit_s: float = _LIMIT_S) -> Any:
    """The first true answer; other hosts have to act, so there is no event to wait for."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)
    return found


class Lab:
    """The hosts with a Ray cluster on three of them, and the server that runs there."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.head, self.prefill, self.decode, self.operator = hosts.hosts
        self.file = self.operator.root / "home" / "cluster.yaml"
        self.url = f"http://{self.head.address}:8000"

    def write_files(self) -> None:
        """The shipped cluster file with these hosts in it, and a token, on the operator's machine."""
        cluster = yaml.safe_load((_DEPLOY / "onprem.yaml").read_text())
        cluster["provider"].update(head_ip=self.head.address, worker_ips=[self.prefill.address, self.decode.address])
        cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        start = cluster["worker_start_ray_commands"][-1]
        role = "$([ $(hostname) = h1 ] && echo prefill || echo decode)"
        start = start.replace(
            "--labels=baton.zone=rack-1", f"--labels=baton.zone=rack-1,baton.role={role} --num-cpus=2"
        )
        cluster["worker_start_ray_commands"][-1] = start
        self.file.write_text(yaml.safe_dump(cluster))
        self.operator.run("ray get-auth-token --generate > /dev/null")

    def ray(self, command: str, limit_s: float = 180.0) -> str:
        """A `ray` command of the operator."""
        return self.operator.run(f"cd ~; ray {command}", limit_s)

    def on_head(self, command: str) -> str:
        """A command on the head, in the environment of its Ray."""
        return self.head.run(f". ~/baton-ray.env; {command}")

    def state(self) -> dict[str, Any]:
        """The server's state file; {} if there is none."""
        for file in (self.head.root / "tmp/tmp").glob(f"baton-{os.getuid()}/*/server.json"):
            return dict(json.loads(file.read_text()))
        return {}

    def log(self) -> list[dict[str, Any]]:
        """The server's own lines, and those of its processes that a user should see."""
        lines = (self.head.root / "home" / "baton.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def serve(self) -> dict[str, Any]:
        """Start a server on the head, as the README says; its greeting."""
        self.ray(
            f"exec {self.file} '. ~/baton-ray.env; nohup baton serve {_SERVE} > ~/baton.log 2>&1 < /dev/null & sleep 1'"
        )

        def ready() -> dict[str, Any] | None:
            assert "baton: " not in (text := (self.head.root / "home" / "baton.log").read_text()), text
            return next((line for line in self.log() if line["event"] == "ready"), None)

        found: dict[str, Any] = until(ready, "the server is ready")
        return found

    def traces(self) -> list[dict[str, Any]]:
        """The newest finished requests, by the server's own account."""
        return [line for line in self.log() if line["event"] == "request finished"]

    @contextmanager
    def load(self, num_streams: int) -> Iterator[list[dict[str, Any]]]:
        """Chats from the operator's machine while the block runs; the list is filled at its end."""
        outcomes: list[dict[str, Any]] = []
        program = f"cd {_ROOT}; exec python -m tests.support.chat_load {self.url} 3600 {num_streams}"
        with tempfile.TemporaryFile("w+", dir=self.operator.root) as out:  # a pipe that nobody reads would stop it
            process = subprocess.Popen(self.operator.command(program), stdin=subprocess.PIPE, stdout=out)
            try:
                yield outcomes
                process.communicate(timeout=60)  # closes its stdin
                assert process.returncode == 0
                out.seek(0)
                outcomes += [json.loads(line) for line in out]
            finally:
                process.kill()
                process.wait()


@contextmanager
def make_lab() -> Iterator[Lab]:
    """Not a fixture: those are made outside of the namespaces that the test runs in, too (conftest.py)."""
    work = Path(tempfile.mkdtemp(prefix="ru-", dir="/tmp"))
    try:
        with Hosts(work, 4) as hosts:
            yield Lab(hosts)
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        assert "br0" not in links
        assert "vh0" not in links
        mounts = Path("/proc/self/mounts").read_text()
        assert str(work) not in mounts
        processes = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
        assert str(work) not in processes
    finally:
        shutil.rmtree(work)


def reference_answers(operator: Host, prompts: list[list[int]]) -> list[list[int]]:
    """What one engine alone says, greedily."""
    program = f"cd {_ROOT}; exec python -m tests.support.reference_answers float32 {_NUM_TOKENS}"
    done = subprocess.run(
        operator.command(program), input=json.dumps(prompts), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def ask_for_tokens(lab: Lab, url: str, prompts: list[list[int]]) -> list[list[int]]:
    """What a router says to the operator's machine, greedily."""
    answers = []
    for prompt in prompts:
        body = {"model": "baton-demo", "prompt": prompt, "max_tokens": _NUM_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        call = f"curl -sS --noproxy '*' -m 60 -H 'content-type: application/json' -d '{json.dumps(body)}'"
        answers.append(json.loads(lab.operator.run(f"{call} {url}/v1/completions"))["choices"][0]["token_ids"])
    return answers


def listeners(host: Host) -> list[str]:
    """The addresses that Baton's processes listen on there, without ports."""
    lines = host.run("ss -ltnpH").splitlines()
    found = [line.split()[3].rpartition(":")[0] for line in lines if re.search(r'"(prefill|decode|router)', line)]
    return [address.strip("[]").removeprefix("::ffff:") for address in found]


def test_a_cluster_serves_loses_a_node_loses_its_head_and_leaves_nothing() -> None:
    with make_lab() as lab:
        drill(lab)


def drill(lab: Lab) -> None:
    """All of it, in order: a cluster is too dear for one per test."""
    began = time.monotonic()

    def tell(what: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:6.1f} s] {what}\n")

    # 1. Three machines become a Ray cluster.
    lab.write_files()
    lab.ray(f"up -y --no-config-cache {lab.file}")
    until(lambda: "3 local.cluster.node" in lab.on_head("ray status"), "three nodes")
    tell("ray up: three nodes")

    # 2. Prefill on one, decode with two ranks on another; KV by TCP, by the handshakes that worked.
    greeting = lab.serve()
    tell(f"baton serve: ready after {greeting['ready_s']:.1f} s")
    units = lab.state()["units"]
    nodes = {name: unit["node"] for name, unit in units.items()}
    assert (nodes["prefill-0"], nodes["decode-0"]) == (lab.prefill.address, lab.decode.address)
    assert nodes["router-1"] in (lab.prefill.address, lab.decode.address)
    assert greeting["kv_links"] == [["prefill-0", "decode-0", "tcp"]]
    assert set(listeners(lab.prefill)) == {lab.prefill.address}
    assert set(listeners(lab.decode)) == {lab.decode.address}
    assert set(listeners(lab.head)) == {lab.head.address}

    # 3. Its answers are those of one engine, and its own account says how the KV moved.
    prompts = [list(range(3 + shift, 3 + shift + length)) for shift, length in ((0, 5), (40, 40), (300, 200))]
    expected = reference_answers(lab.operator, prompts)
    assert ask_for_tokens(lab, lab.url, prompts) == expected
    assert ask_for_tokens(lab, f"http://{nodes['router-1']}:8000", prompts) == expected
    assert {trace["router_id"] for trace in lab.traces()} == {"router-0", "router-1"}
    for trace in lab.traces():
        assert (trace["prefill_worker"], trace["decode_worker"], trace["transport"]) == ("prefill-0", "decode-0", "tcp")
        assert trace["kv_bytes"] > 0
    peers = json.loads(lab.on_head("baton status --json"))["workers"]
    assert {how for worker in peers for how in worker["peers"].values()} == {"tcp"}
    tell("answers equal those of one engine")

    # 4. A node is cut off under load, and comes back.
    with lab.load(3) as outcomes:
        until(lambda: len(lab.traces()) > 8, "load")
        cut_at = time.time()
        lab.hosts.cut(lab.decode)
        lost = until(lambda: [line for line in lab.log() if line["event"] == "worker lost"], "the loss is seen", 30)[0]
        time.sleep(max(0.0, cut_at + 4.0 - time.time()))
        lab.hosts.mend(lab.decode)
        mended = len(lab.traces())
        until(lambda: any(trace["transport"] == "tcp" for trace in lab.traces()[mended:]), "decode-0 serves again")
    seen_at = datetime.fromisoformat(lost["time"]).timestamp()
    tell(f"a node was cut off: seen after {seen_at - cut_at:.2f} s; {summary(outcomes)}")
    assert lost["worker_id"] == "decode-0"
    assert seen_at - cut_at < _DETECTED_S + _STOOD_STILL_S
    texts = {outcome["text"] for outcome in outcomes if outcome["error"] is None}
    assert len(texts) == 1
    assert {outcome["error"] for outcome in outcomes} <= {None, *_NAMED}

    if _IS_LONG:
        replace_a_node(lab, tell)
        lose_a_node_for_long(lab, tell)

    # 5. The head's GCS is killed under load, and serving goes on.
    gcs = int(lab.head.run("pgrep -x gcs_server"))
    with lab.load(2) as outcomes:
        before = len(lab.traces())
        until(lambda: len(lab.traces()) > before + 4, "load")
        lab.head.run(f"kill -9 {gcs}")
        killed_at = time.time()
        time.sleep(_HEADLESS_S)
        assert lab.head.run("pgrep -x gcs_server || true") == ""
    tell(f"{_HEADLESS_S} s without the head: {summary(outcomes)}")
    assert [outcome for outcome in outcomes if outcome["error"] is not None] == []
    assert {outcome["text"] for outcome in outcomes} == texts
    ends = sorted(outcome["end_s"] for outcome in outcomes)
    assert ends[-1] > killed_at + _HEADLESS_S
    assert max(later - earlier for earlier, later in pairwise(ends)) < 5.0

    # 6. All of it goes.
    lab.on_head("baton down")
    for host in (lab.head, lab.prefill, lab.decode):
        base = host.root / "tmp/tmp" / f"baton-{os.getuid()}"
        until(
            lambda base=base: not [path for path in base.iterdir() if path.name != "logs"], f"{host.name} is clean", 20
        )
    tell("baton down")
    lab.operator.run(f"cd ~; {_DEPLOY / 'down.sh'} {lab.file}", 180)
    for host in lab.hosts.hosts[:3]:
        until(lambda host=host: not host.processes(), f"{host.name} has no process: {host.processes()}", 30)
    tell("ray down")


def replace_a_node(lab: Lab, tell: Callable[[str], None]) -> None:
    """The prefill node's raylet dies; the autoscaler starts another, and the worker is placed on it."""
    with lab.load(2) as outcomes:
        killed_at = time.time()
        lab.prefill.run("kill -9 $(pgrep -x raylet)")
        before = lab.state()["units"]["prefill-0"]["incarnation"]

        def is_back() -> bool:
            unit = lab.state()["units"]["prefill-0"]
            return bool(unit["state"] == "ready" and unit["incarnation"] != before)

        until(is_back, "prefill-0 is placed again", 240)
        back_s = time.time() - killed_at
        served = len(lab.traces())
        until(lambda: any(trace["transport"] == "tcp" for trace in lab.traces()[served:]), "prefill-0 serves again")
    tell(f"a node's raylet was killed: its worker was back after {back_s:.0f} s; {summary(outcomes)}")
    assert {outcome["error"] for outcome in outcomes} <= {None, *_NAMED}


def lose_a_node_for_long(lab: Lab, tell: Callable[[str], None]) -> None:
    """A node is cut off until Ray gives it up; when it is back, nothing of its past is left on it."""
    before = lab.state()["units"]["decode-0"]
    with lab.load(2) as outcomes:
        cut_at = time.time()
        lab.hosts.cut(lab.decode)
        until(lambda: lab.state()["units"]["decode-0"]["state"] == "down", "Ray gives the node up", 60)
        down_s = time.time() - cut_at
        lab.hosts.mend(lab.decode)

        def is_back() -> bool:
            unit = lab.state()["units"]["decode-0"]
            return bool(unit["state"] == "ready" and unit["incarnation"] != before["incarnation"])

        until(is_back, "decode-0 is placed again", 240)
        back_s = time.time() - cut_at
        served = len(lab.traces())
        until(lambda: any(trace["transport"] == "tcp" for trace in lab.traces()[served:]), "decode-0 serves again")
    assert sum("decode-0-front" in line for line in lab.decode.processes()) == 1
    tell(f"a node was cut off for {down_s:.0f} s: its worker was back after {back_s:.0f} s; {summary(outcomes)}")
    assert {outcome["error"] for outcome in outcomes} <= {None, *_NAMED}


def summary(outcomes: list[dict[str, Any]]) -> str:
    """In words."""
    failed = [outcome["error"] for outcome in outcomes if outcome["error"] is not None]
    gap_s = max(outcome["gap_s"] for outcome in outcomes)
    return f"{len(outcomes)} requests, {len(failed)} failed {sorted(set(failed))}, longest gap {gap_s:.1f} s"
