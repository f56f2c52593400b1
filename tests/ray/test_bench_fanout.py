"""`baton bench --ray-nodes`: client processes on the nodes of a Ray cluster send one load."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.coordinator import Link, Load, coordinating
from loadtest.fake_server import FakeServer
from loadtest.target import Target, discover
from loadtest.workload import Length, Workload

pytestmark = pytest.mark.timeout(120)


def test_a_client_on_every_node_takes_its_share_and_ends_with_the_load(tmp_path: Path) -> None:
    ray = Path(sys.executable).with_name("ray")
    flags = ("--port=6399", "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats")
    environment = {**os.environ, "RAY_TMPDIR": "/tmp"}
    subprocess.run([ray, "start", "--head", *flags], check=True, capture_output=True, env=environment)
    from cluster import fanout  # imports Ray

    with FakeServer("--interval", "0.002") as server, fanout.agents("127.0.0.1:6399") as links:
        load = asyncio.run(_drive(discover(server.url), links))
    assert [client.name.partition(" at ")[0] for client in load.clients] == ["client"]
    assert len(load.outcomes) == 30
    assert {outcome.failure for outcome in load.outcomes} == {""}
    assert not _processes("loadtest.agent")


async def _drive(target: Target, links: list[Link]) -> Load:
    async with coordinating(target, links=links) as coordinator:
        workload = Workload(rate=50.0, num_requests=30, output_tokens=Length(5))
        return await coordinator.drive(workload.requests())


def _processes(word: str) -> list[str]:
    """Command lines in this pid namespace that contain it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text()
        except OSError:  # it has just ended
            continue
        if word in command:
            found.append(command)
    return found
