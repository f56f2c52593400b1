"""Commands to a running supervisor: one JSON line each way over a Unix socket in the run directory, which is private."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cluster.run_dir import RunDir

Command = Mapping[str, Any]


class CommandError(Exception):
    """The supervisor does not do that; one sentence for the user."""


async def serve(run: RunDir, handle: Callable[[Command], Awaitable[str]]) -> None:
    """Answer commands until cancelled. `handle` returns a sentence for the user, or raises CommandError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                outcome = {"done": await handle(json.loads(await reader.readline()))}
            except (CommandError, ValueError) as error:
                outcome = {"error": str(error)}
            writer.write(json.dumps(outcome).encode() + b"\n")
            await writer.drain()
        except ConnectionError:  # who asked is gone; what was asked is done
            return
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, run.control)
    async with server:
        await server.serve_forever()


def ask(run: RunDir, command: Command, timeout_s: float) -> str:
    """What the supervisor says when it is done. Blocks.

    Raises:
        CommandError: it refused, or does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(run.control))
            sock.sendall(json.dumps(command).encode() + b"\n")
            outcome = json.loads(sock.makefile().readline())
        except (OSError, ValueError) as error:
            raise CommandError(f"the supervisor does not answer: {str(error) or type(error).__name__}") from error
    if "error" in outcome:
        raise CommandError(outcome["error"])
    return str(outcome["done"])
