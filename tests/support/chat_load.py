"""A closed loop of streamed chats, as a program for another host: `python -m tests.support.chat_load URL SECONDS STREAMS`.

Prints one JSON line per request: {"at", "end_s", "text", "error", "gap_s"}; `error` is null only if the stream ended well.
Ends early, and well, when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx

QUESTION = "What is Baton?"


async def ask(client: httpx.AsyncClient) -> dict[str, Any]:
    """One chat; its outcome."""
    began = heard = time.time()
    outcome: dict[str, Any] = {"at": began, "text": "", "error": "the stream was cut off", "gap_s": 0.0}
    body = {
        "model": "baton-demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "temperature": 0,
    }
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                outcome["error"] = json.loads(await response.aread())["error"]["code"]
            async for line in response.aiter_lines():
                now = time.time()
                outcome["gap_s"], heard = max(outcome["gap_s"], now - heard), now
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    outcome["error"] = None
                elif data.startswith("{"):
                    chunk = json.loads(data)
                    if "error" in chunk:
                        outcome["error"] = chunk["error"]["code"]
                    for choice in chunk.get("choices", ()):
                        outcome["text"] += choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    return {**outcome, "end_s": time.time()}


async def main(url: str, seconds: float, num_streams: int) -> None:
    """Keep so many chats going for so long."""
    until = time.time() + seconds
    stopped = asyncio.Event()

    async def loop(client: httpx.AsyncClient) -> None:
        while time.time() < until and not stopped.is_set():
            outcome = await ask(client)
            sys.stdout.write(json.dumps(outcome) + "\n")
            sys.stdout.flush()
            if outcome["error"] is not None:
                await asyncio.sleep(0.2)  # not a flood of refusals

    asyncio.get_running_loop().add_reader(0, stopped.set)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_streams):
                group.create_task(loop(client))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
