"""The Ray actor: hosts the processes of one place on its node, and relays what they say. Knows nothing of what they do.

It is a plain class that runs without Ray; cluster.launcher_ray makes an actor of it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.host import Ended, HostedProcess, ProcessEvent, ProcessOrder


class RankHost:
    """Processes of one place. Methods may be called from different threads; `run` is called once, and first.

    The processes belong to a thread of this object, so they end with this process, not with a call. No method may be
    a coroutine: Ray would then run all of them, `run` included, in one thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._events: queue.SimpleQueue[ProcessEvent] = queue.SimpleQueue()
        self._processes: dict[str, HostedProcess] = {}
        threading.Thread(target=self._loop.run_forever, name="rank-host", daemon=True).start()

    def run(
        self, orders: Sequence[ProcessOrder], private_dir: str | None, log_dir: str, is_reachable: bool
    ) -> Iterator[ProcessEvent]:
        """Start all processes and yield their events; ends when the last of them has ended.

        `is_reachable` puts the node's own address into their specifications, for other nodes to reach.

        Raises:
            OSError: one can not be started; the others are killed.
        """
        if private_dir is not None:
            Path(private_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_reachable:
            orders = [replace(order, spec={**order.spec, "host": _node_address()}) for order in orders]
        self._call(_start(orders, Path(log_dir), self._processes, self._events.put))
        num_running = len(orders)
        while num_running:
            event = self._events.get()
            num_running -= isinstance(event, Ended)
            yield event

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process."""
        self._loop.call_soon_threadsafe(self._processes[process].tell, message)

    def stop(self, grace_s: float) -> None:
        """End all processes; returns when none is left."""
        self._call(_stop(list(self._processes.values()), grace_s))

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


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
