"""The Ray actor: hosts the processes of one place on its node, and relays what they say. Knows nothing of what they do.

It is a plain class that runs without Ray; cluster.launcher_ray makes an actor of it.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cluster import run_dir, site
from cluster.host import Ended, Hosted, HostedProcess, ProcessEvent, ProcessOrder
from cluster.site import Home, Site

_LOOPBACK: Final = "127.0.0.1"


class RankHost:
    """Processes of one place. Methods may be called from different threads; `run` is called once, and first.

    The processes belong to a thread of this object, so they end with this process, not with a call. No method may be
    a coroutine: Ray would then run all of them, `run` included, in one thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._events: queue.SimpleQueue[ProcessEvent] = queue.SimpleQueue()
        self._processes: dict[str, HostedProcess] = {}
        self._site: Site | None = None
        self._private_dir: str | None = None
        self._is_stopping = False
        threading.Thread(target=self._loop.run_forever, name="rank-host", daemon=True).start()

    def run(
        self, orders: Sequence[ProcessOrder], private_dir: str | None, home: Home, address: str | None
    ) -> Iterator[ProcessEvent]:
        """Start all processes and yield their events; ends when the last of them has ended.

        They listen on `address`; None: on this node's own, for other nodes to reach.

        Raises:
            SiteError: this node can not take part.
            OSError: one can not be started; the others are killed.
        """
        node_id, node_address = _node()
        self._site = site.join(home, address or node_address)
        self._private_dir = private_dir
        yield Hosted(node_id, node_address)
        if private_dir is not None:
            self._site.make_private_dir(private_dir)
        orders = [self._site.localize(order) for order in orders]
        try:
            self._call(_start(orders, self._site.run.logs, self._processes, self._events.put))
            num_running = len(orders)
            while num_running:
                event = self._events.get()
                if isinstance(event, Ended):
                    num_running -= 1
                    if not self._is_stopping:
                        self._site.run.mark_failed()
                yield event
        finally:
            self._leave()

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process."""
        self._loop.call_soon_threadsafe(self._processes[process].tell, message)

    def stop(self, grace_s: float) -> None:
        """End all processes and remove what they had on this node; returns when nothing is left."""
        self._is_stopping = True
        self._call(_stop(list(self._processes.values()), grace_s))
        self._leave()

    def _leave(self) -> None:
        """Idempotent."""
        if self._site is not None:
            if self._private_dir is not None:
                self._site.remove_private_dir(self._private_dir)
            run_dir.leave(self._site.run)

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _start(
    orders: Sequence[ProcessOrder],
    log_dir: Path,
    processes: dict[str, HostedProcess],
    on_event: Callable[[ProcessEvent], None],
) -> None:
    try:
        for order in orders:
            processes[order.name] = await HostedProcess.start(order, log_dir, on_event)
    except OSError:
        await _stop(list(processes.values()), 0.0)
        raise


async def _stop(processes: Sequence[HostedProcess], grace_s: float) -> None:
    async with asyncio.TaskGroup() as group:
        for process in processes:
            group.create_task(process.stop(grace_s))


def _node() -> tuple[str, str]:
    """This node's id and address, as Ray has them, if this is an actor."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "", _LOOPBACK
    return str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address())
