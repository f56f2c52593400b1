"""Client processes of `baton bench` on the nodes of a Ray cluster: one actor on each, the agent as its child.

Orders and outcomes pass through Ray a few times per second; requests and tokens go straight to the server. Baton must
be installed on every node. Clocks are compared by the coordinator, over these links.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loadtest.coordinator import AgentLost, Link

_END_S: Final = 5.0
_CALLS_AT_ONCE: Final = 3  # one waits for a line, one sends, one ends it all


class AgentHost:
    """The actor: holds one agent (loadtest.agent), which ends with it. A plain class that runs without Ray."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "loadtest.agent"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, line: bytes) -> None:
        """One line to the agent."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def receive(self) -> bytes:
        """The agent's next line; empty if it has ended. Blocks."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        """End the agent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RayLink:
    """Implements `loadtest.coordinator.Link`."""

    def __init__(self, host: Any, name: str) -> None:
        self.name = name
        self._host = host

    async def send(self, message: dict[str, Any]) -> None:
        """See Link."""
        await self._call(self._host.send.remote(json.dumps(message, ensure_ascii=False).encode() + b"\n"))

    async def receive(self) -> dict[str, Any]:
        """See Link."""
        line = await self._call(self._host.receive.remote())
        if not line.endswith(b"\n"):
            raise AgentLost(f"{self.name} has ended")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def close(self) -> None:
        """See Link."""
        with contextlib.suppress(AgentLost):
            await self._call(self._host.close.remote())

    async def _call(self, reference: Any) -> Any:
        try:
            return await asyncio.wrap_future(reference.future())
        except ray.exceptions.RayError as error:
            raise AgentLost(f"{self.name}: {type(error).__name__}") from error


@contextlib.contextmanager
def agents(address: str) -> Iterator[list[Link]]:
    """A link to an agent on every node of the cluster at `address` ("auto" or HOST:PORT).

    Raises:
        ConnectionError: nobody answers there.
    """
    ray.init(address=address, log_to_driver=False, logging_level="error")
    hosts = []
    try:
        actor = ray.remote(num_cpus=0, max_concurrency=_CALLS_AT_ONCE)(AgentHost)
        for node in (node for node in ray.nodes() if node["Alive"]):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            hosts.append((node["NodeManagerAddress"], actor.options(scheduling_strategy=place).remote()))
        yield [RayLink(host, f"client at {where}") for where, host in hosts]
    finally:
        for _, host in hosts:
            ray.kill(host)
        ray.shutdown()
