"""`python -m router` as its launcher sees it: lines in, lines out, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.specs import RouterSpec, encode_secret
from tests.support.fake_worker import SECRET, FakeCluster, Script

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Child:
    """A router process."""

    process: asyncio.subprocess.Process

    def tell(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 20)
        assert line, "the process has ended"
        return dict(json.loads(line))

    async def end(self, limit_s: float) -> int:
        return await asyncio.wait_for(self.process.wait(), limit_s)


@contextlib.asynccontextmanager
async def child(**options: Any) -> AsyncIterator[Child]:
    spec = RouterSpec("router-0", encode_secret(SECRET), "", "fake", port=0, grpc_port=0)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    try:
        started = Child(process)
        started.tell(spec=asdict(spec) | options)
        yield started
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_listens_then_serves_then_does_not_then_ends() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        worker = cluster.add("mixed-0", "mixed")
        await worker.start()
        async with child() as router:
            listening = await router.hear()
            assert listening["event"] == "listening"
            assert listening["timings"]["import_s"] > 0
            url, grpc_url = listening["http_url"], listening["grpc_url"]
            router.tell(event="fleet", workers=cluster.fleet())
            assert await router.hear() == {"event": "serving"}
            async with httpx.AsyncClient(base_url=url, timeout=10) as client:
                answer = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
                assert answer.json()["choices"][0]["text"] == "abc"
            await worker.die()
            lost = await router.hear()
            assert lost["event"] == "not_serving"
            assert "mixed-0" in lost["reason"]
            await worker.restart()
            assert await router.hear() == {"event": "serving"}
            router.tell(event="stop")
            began = time.monotonic()
            assert await router.end(5) == 0
            assert time.monotonic() - began < 2
            for address in (url, grpc_url):
                assert not is_open(int(address.rpartition(":")[2]))
        await worker.die()

    run(scenario)


@pytest.mark.parametrize("how", ["stop", "stop, then end of file", "SIGTERM", "end of file"])
def test_it_ends_soon_even_under_a_request_that_does_not(how: str) -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        worker = cluster.add("mixed-0", "mixed", script=Script(gate_at=2))
        await worker.start()
        async with child() as router, httpx.AsyncClient(timeout=10) as client:
            url = (await router.hear())["http_url"]
            router.tell(event="fleet", workers=cluster.fleet())
            await router.hear()
            wish = {"prompt": "abc", "max_tokens": 9, "stream": True}
            stream = asyncio.create_task(client.post(f"{url}/v1/completions", json=wish))
            await worker.until(lambda: bool(worker.tokens))
            began = time.monotonic()
            if how.startswith("stop"):
                router.tell(event="stop")
                if how != "stop":
                    assert router.process.stdin is not None
                    router.process.stdin.close()
            elif how == "SIGTERM":
                os.kill(router.process.pid, signal.SIGTERM)
            else:
                assert router.process.stdin is not None
                router.process.stdin.close()
            assert await router.end(5) == 0
            assert time.monotonic() - began < (1 if how == "end of file" else 2.5)
            if how == "end of file":
                with pytest.raises(httpx.HTTPError):
                    await stream
            else:
                assert "shutting down" in (await stream).text
            await worker.until(lambda: not worker.running)
        await worker.die()

    run(scenario)


def test_draining_lets_short_requests_end_and_takes_no_new_ones() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        worker = cluster.add("mixed-0", "mixed", script=Script(gate_at=2))
        await worker.start()
        async with child(drain_s=30.0) as router, httpx.AsyncClient(timeout=10) as client:
            url = (await router.hear())["http_url"]
            router.tell(event="fleet", workers=cluster.fleet())
            await router.hear()
            wish = {"prompt": "abc", "max_tokens": 3}
            answer = asyncio.create_task(client.post(f"{url}/v1/completions", json=wish))
            await worker.until(lambda: bool(worker.tokens))
            router.tell(event="stop")
            while (await client.get(f"{url}/health")).status_code == 200:
                pass
            refused = await client.post(f"{url}/v1/completions", json=wish)
            assert refused.status_code == 503
            worker.gate.set()
            assert (await answer).json()["choices"][0]["text"] == "abc"
            assert await router.end(5) == 0
        await worker.die()

    run(scenario)


@pytest.mark.parametrize("which", ["port", "grpc_port"])
def test_a_taken_port_is_named(which: str) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with child(**{which: port}) as router:
                failed = await router.hear()
                assert failed["event"] == "failed"
                assert str(port) in failed["error"]
                assert "in use" in failed["error"]
                assert await router.end(5) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model_dir": "/nowhere"}, "tokenizer.json"),
        ({"api_key_file": "/nowhere/keys"}, "/nowhere/keys"),
        ({"surprise": 1}, "surprise"),
        ({"host": "203.0.113.1"}, "203.0.113.1"),
    ],
)
def test_what_can_not_start_says_why(options: dict[str, Any], part: str) -> None:
    async def scenario() -> None:
        async with child(**options) as router:
            failed = await router.hear()
            assert failed["event"] == "failed"
            assert part in failed["error"]
            assert await router.end(5) == 1

    run(scenario)
