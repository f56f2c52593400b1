"""The router process: `python -m router`, told what to be on stdin (baton.process). Knows no HTTP and no workers.

Lines in: {"spec": RouterSpec}, then {"event": "fleet", "workers": [{"worker_id", "address"}]} with the full
membership, {"event": "stop"}. End of file without a stop: the parent is gone, and so is this process.
Lines out: listening (http_url, grpc_url, timings), serving, not_serving (reason), failed (error).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import time
from typing import Any, NoReturn

from baton import log
from baton.process import ParentLink
from baton.specs import RouterSpec, from_json


def main() -> None:
    """Read the specification, open the doors, serve until told to stop."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its notes on closed connections are not JSON
    timings = {"python_s": time.monotonic() - _process_start()}
    began = time.monotonic()
    link = ParentLink()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    first = link.read()
    if first is None:
        return
    try:
        spec = from_json(RouterSpec, first["spec"])
        log.setup(spec.log_level, role="router", router_id=spec.router_id)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        http_socket = _listen(spec.host, spec.port)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(link, error)
    timings["bind_s"] = time.monotonic() - began
    try:
        asyncio.run(_run(link, spec, http_socket, timings))
    except* (OSError, ValueError) as errors:
        _fail(link, _first(errors))
    except* Exception:
        logging.getLogger("router").exception("router failed")
        _fail(link, RuntimeError("a bug; the log has the traceback"))
    # Nothing is left to do, and a thread that still tokenizes must not delay the end.
    logging.shutdown()
    os._exit(0)


async def _run(link: ParentLink, spec: RouterSpec, http_socket: socket.socket, timings: dict[str, float]) -> None:
    began = time.monotonic()
    from router.app import serving  # after the ports are known: importing is most of the start-up time

    timings["import_s"] = time.monotonic() - began
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def on_serving(why_not: str | None) -> None:
        if why_not is None:
            link.report("serving")
        else:
            link.report("not_serving", reason=why_not)

    async with serving(spec, http_socket, on_serving=on_serving) as router:
        timings["open_s"] = time.monotonic() - began
        port = http_socket.getsockname()[1]
        host = f"[{spec.host}]" if ":" in spec.host else spec.host
        link.report(
            "listening",
            http_url=f"http://{host}:{port}",
            grpc_url=f"{host}:{router.kserve.port}",
            timings={name: round(value, 3) for name, value in timings.items()},
        )
        loop.add_signal_handler(signal.SIGTERM, commands.put_nowait, {"event": "stop"})

        is_told_to_stop = threading.Event()

        def on_message(message: dict[str, Any]) -> None:
            if message["event"] == "stop":
                is_told_to_stop.set()
            loop.call_soon_threadsafe(commands.put_nowait, message)

        def on_end() -> None:
            if not is_told_to_stop.is_set():  # a parent that says so may close its end at once; what runs is drained
                os._exit(0)  # workers notice by their broken sessions

        link.watch(on_message, on_end)
        while (command := await commands.get())["event"] != "stop":
            if command["event"] == "fleet":
                router.set_members(command["workers"])
        await router.drain()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket: bound and listening at once, so that a taken port is known before anything else happens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio turns Nagle off where it reads TCP
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is already in use") from error
        raise OSError(f"can not listen on {host}:{port}: {error.strerror}") from error
    return sock


def _fail(link: ParentLink, error: Exception) -> NoReturn:
    link.report("failed", error=str(error))
    logging.shutdown()
    os._exit(1)


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _process_start() -> float:
    """When this process began, on time.monotonic's clock."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
