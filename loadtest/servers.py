"""Starts and ends a `baton serve` of one's own, by the command line that the caller gives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from baton import auth

_START_S: Final = 180.0
_END_S: Final = 30.0
_MAX_LINE_BYTES: Final = 2**22


class ServerFailed(Exception):
    """A server did not start; the message ends with what it said last."""


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A running server; `token` opens its internal paths."""

    url: str
    token: str


@contextlib.asynccontextmanager
async def serving(command: Sequence[str], flags: Sequence[str]) -> AsyncIterator[OwnServer]:
    """Serve on free ports of loopback until the block is left.

    Raises:
        ServerFailed: it ended, or was not ready in time.
    """
    secret = secrets.token_hex(32)
    inherited = {name: value for name, value in os.environ.items() if name != auth.SECRET_FILE_ENV}
    process = await asyncio.create_subprocess_exec(
        *command,
        *flags,
        *("--launcher", "local", "--port", "0", "--grpc-port", "0", "--log-format", "json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=_MAX_LINE_BYTES,
        env={**inherited, auth.SECRET_ENV: secret},
    )
    last: deque[str] = deque(maxlen=20)
    reader: asyncio.Task[None] | None = None
    try:
        try:
            async with asyncio.timeout(_START_S):
                url = await _until_ready(process, last)
        except TimeoutError:
            raise ServerFailed(f"not ready after {_START_S:g} s: {' '.join(flags)}\n" + "\n".join(last)) from None
        reader = asyncio.create_task(_read_on(process))
        yield OwnServer(url, auth.worker_token(secret.encode()))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        if reader is None:
            reader = asyncio.create_task(_read_on(process))
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        reader.cancel()


async def _until_ready(process: asyncio.subprocess.Process, last: deque[str]) -> str:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        text = line.decode("utf-8", "replace").rstrip()
        last.append(text[:500])
        if '"event": "ready"' in text:
            return str(json.loads(text)["router"]["http_url"])
    raise ServerFailed("the server ended:\n" + "\n".join(last))


async def _read_on(process: asyncio.subprocess.Process) -> None:
    """A server whose pipe is full would stand still."""
    assert process.stdout is not None
    while await process.stdout.read(2**16):
        pass
