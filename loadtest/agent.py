"""One client process: `python -m loadtest.agent`, told what to send on stdin, telling what came of it on stdout.

Lines in (JSON, baton.process):
    {"target": {...}, "api_key": s|null}                              first
    {"ping": n}                                                       answered at once, for the clock
    {"load": [request, ...]}                                          add to the next load; may come in pieces
    {"prepare": run_id}                                               make the first requests' bytes
    {"start": t, "concurrency": n|null, "stop_after_s": s|null}       at t of this process's monotonic clock
Lines out:
    hello (clock_id, pid), pong (n, now), prepared, outcomes (outcomes, in_flight, cpu_s), done, failed (error)

End of file ends the process, and with it whatever it has in flight. Another load may follow the end of one.
With `--ahead` it runs ahead of the server that it shares its cores with, where the system lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from typing import Any, Final

from baton.process import ParentLink, clock_id, fail_start
from loadtest.client import Client
from loadtest.outcome import Outcome
from loadtest.pacer import Pacer
from loadtest.target import Target
from loadtest.workload import LoadRequest

_REPORT_S: Final = 0.25


class Agent:
    """Runs one load after another on one client. Event loop only."""

    def __init__(self, link: ParentLink, target: Target, client: Client) -> None:
        self._link = link
        self._target = target
        self._client = client
        self._requests: list[LoadRequest] = []
        self._pacer: Pacer | None = None
        self._outcomes: list[Outcome] = []

    async def obey(self, orders: asyncio.Queue[dict[str, Any] | None]) -> None:
        """Until the end of orders, also in the middle of a load."""
        load: asyncio.Task[None] | None = None
        try:
            while (order := await orders.get()) is not None:
                if "ping" in order:
                    self._link.report("pong", n=order["ping"], now=time.monotonic())
                elif "load" in order:
                    self._requests += [LoadRequest.from_json(value) for value in order["load"]]
                elif "prepare" in order:
                    self._client.begin(order["prepare"])
                    self._pacer = Pacer(
                        self._client,
                        self._requests,
                        self._outcomes.append,
                        timeout_s=self._target.timeout_s,
                        expects_all_tokens=self._target.ignore_eos,
                    )
                    self._requests = []
                    gc.collect()
                    gc.freeze()  # what is here stays; collections during the load need not look at it
                    self._link.report("prepared")
                elif "start" in order:
                    load = asyncio.create_task(self._run(order))
                    load.add_done_callback(lambda task: orders.put_nowait({"ended": task}))
                elif "ended" in order:
                    order["ended"].result()  # a bug ends this process, with its traceback
        finally:
            if load is not None:
                load.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await load
            await self._client.close()

    async def _run(self, order: dict[str, Any]) -> None:
        pacer = self._pacer
        assert pacer is not None, "start without prepare"
        if order["concurrency"] is None:
            load = pacer.open_loop(order["start"])
        else:
            load = pacer.closed_loop(order["start"], order["concurrency"], order["stop_after_s"])
        reports = asyncio.create_task(self._report(pacer))
        try:
            await load
        finally:
            reports.cancel()
        self._flush(pacer)
        self._pacer = None
        gc.unfreeze()
        self._link.report("done")

    async def _report(self, pacer: Pacer) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            self._flush(pacer)

    def _flush(self, pacer: Pacer) -> None:
        outcomes = [outcome.to_json() for outcome in self._outcomes]
        self._outcomes.clear()
        self._link.report("outcomes", outcomes=outcomes, in_flight=pacer.num_in_flight, cpu_s=time.process_time())


def _client(target: Target, api_key: str | None) -> Client:
    if target.endpoint == "grpc":
        from loadtest.grpc_client import GrpcClient  # grpc takes a while to import

        return GrpcClient(target, api_key)
    from loadtest.http_client import HttpClient

    return HttpClient(target, api_key)


async def _main(link: ParentLink, first: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def post(order: dict[str, Any] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(orders.put_nowait, order)

    target = Target.from_json(first["target"])
    agent = Agent(link, target, _client(target, first["api_key"]))
    link.watch(post, lambda: post(None))
    link.report("hello", clock_id=clock_id(), pid=os.getpid())
    await agent.obey(orders)


def main() -> None:
    """Obey until the parent closes stdin."""
    link = ParentLink()
    if "--ahead" in sys.argv:
        with contextlib.suppress(PermissionError, AttributeError):  # not root, not Linux: then lag shows in the results
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C may reach whole groups; the parent decides
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    first = link.read()
    if first is None:
        return
    try:
        asyncio.run(_main(link, first))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail_start(link, error)


if __name__ == "__main__":
    main()
