"""Units in Ray: a placement group per unit, one actor (RankHost) per place, the unit's processes as their children.

Ray places and hosts. What processes say comes back as the items of one streaming call per actor, which is also its
sentinel: it ends when the processes end and fails when the actor dies. Nothing of a request passes through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from cluster import child, process_tree, run_dir
from cluster.host import LogLine, Report
from cluster.rank_host import RankHost
from cluster.run_dir import RunDir
from cluster.unit import Place, StartFailed, UnitOrder, UnitState

T = TypeVar("T")

_OBJECT_STORE_BYTES: Final = 80 * 2**20  # about the least that Ray takes; nothing is stored
_HELPERS: Final = ("autoscaler/_private/monitor.py", "_private/log_monitor.py", "dashboard/dashboard.py")
_SHUTDOWN_S: Final = 10.0
_STOP_CALL_S: Final = 2.0
"""On top of a unit's own grace."""
_CALLS_AT_ONCE: Final = 4  # run, stop, and two tells


class RayLauncher:
    """Implements `Launcher`, with a Ray cluster of our own or a running one."""

    def __init__(self, run: RunDir, address: str | None, num_cpus: float) -> None:
        self._run = run
        self._address = address
        self._num_cpus = num_cpus
        self._thread = _RayThread()
        self._is_joined = False
        self._has_nodes = False

    async def open(self) -> None:
        """Start Ray, or join the cluster at `address`."""
        try:
            await self._thread.call(self._connect)
        except Exception as error:  # Ray's own errors are many, and none of them is ours
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = "Ray could not start" if self._address is None else f"could not join the Ray cluster {self._address}"
            raise StartFailed(f"{what}: {reason}") from error

    async def start_unit(
        self, order: UnitOrder, on_report: Callable[[Report], None], on_log: Callable[[str, LogLine], None]
    ) -> RayUnit:
        """Place a unit and start it."""
        unit = RayUnit(UnitState(order, on_report, on_log), self._thread)
        try:
            await unit.start(self._run.logs, self._has_nodes)
        except BaseException as error:
            await unit.stop(0.0)
            if isinstance(error, Exception):
                raise StartFailed(f"{order.name} could not be placed: {error}") from error
            raise
        return unit

    async def close(self) -> None:
        """Leave a cluster that was joined.

        An embedded one is not shut down: that takes a second or two, and may hang. Its processes hold nothing of
        value, and whoever ends this process ends them too (cluster.guardian).
        """
        if self._is_joined:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_S):
                    await self._thread.call(sys.modules["ray"].shutdown)

    def _connect(self) -> None:
        if self._address is None:
            _prepare_environment(self._run)
        import ray  # half a second, and it reads the environment

        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "namespace": f"baton-{self._run.run_id}",
        }
        if self._address is None:
            ray.init(
                address="local",
                num_cpus=self._num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(self._run.ray),
                **options,
            )
            _end_helpers()
            return
        variables = {key: os.environ[key] for key in ("PYTHONPATH", run_dir.RUN_ID_ENV) if key in os.environ}
        ray.init(address=self._address, runtime_env={"env_vars": variables}, **options)
        self._is_joined = True
        available = ray.available_resources().get("CPU", 0.0)
        if available < self._num_cpus:
            raise ValueError(f"it has {available:g} free CPUs and the ranks need {self._num_cpus:g}")
        if len([node for node in ray.nodes() if node["Alive"]]) > 1:
            self._has_nodes = True


class RayUnit:
    """Implements `Unit`."""

    def __init__(self, state: UnitState, thread: _RayThread) -> None:
        self._state = state
        self._thread = thread
        self._group: Any = None
        self._actors: list[Any] = []
        self._listeners: list[asyncio.Task[None]] = []

    @property
    def state(self) -> UnitState:
        """What its processes said so far."""
        return self._state

    async def start(self, log_dir: Path, is_reachable: bool) -> None:
        """Make the placement group and the actors, and listen to them."""
        streams = await self._thread.call(lambda: self._place(log_dir, is_reachable))
        for place, stream in zip(self._state.order.places, streams, strict=True):
            self._listeners.append(asyncio.create_task(self._listen(place, stream)))

    def tell(self, process: str, message: dict[str, Any]) -> None:
        """Send a message to one process."""
        for place, actor in zip(self._state.order.places, self._actors, strict=True):
            if process in (order.name for order in place.processes):
                actor.tell.remote(process, message)

    async def stop(self, grace_s: float) -> None:
        """End all processes, then the actors and the placement group."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s + _STOP_CALL_S):
                async with asyncio.TaskGroup() as group:
                    for actor in self._actors:
                        group.create_task(_stop_actor(actor, grace_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_CALL_S):
                await self._thread.call(self._remove)
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            await asyncio.wait(self._listeners)

    def _place(self, log_dir: Path, is_reachable: bool) -> list[Any]:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        places = self._state.order.places
        self._group = placement_group([{"CPU": place.cpus} for place in places], strategy="STRICT_PACK")
        actor_class = ray.remote(RankHost)
        streams = []
        for index, place in enumerate(places):
            actor = actor_class.options(
                name=f"{self._state.order.name}-{index}-{secrets.token_hex(3)}",
                num_cpus=place.cpus,
                max_restarts=0,
                max_concurrency=_CALLS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            ).remote()
            self._actors.append(actor)
            run = actor.run.options(num_returns="streaming")
            streams.append(run.remote(place.processes, self._state.order.private_dir, str(log_dir), is_reachable))
        return streams

    async def _listen(self, place: Place, stream: Any) -> None:
        names = " and ".join(order.name for order in place.processes)
        try:
            async for item in stream:
                self._state.on_event(await item)
        except _ray_errors() as error:
            cause = getattr(error, "cause", None)  # what `run` raised; an actor that died has none
            self._state.lose(f"{names} could not be started: {cause}" if cause else f"the Ray actor of {names} died")

    def _remove(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def _ray_errors() -> type[Exception]:
    from ray.exceptions import RayError

    return cast(type[Exception], RayError)


async def _stop_actor(actor: Any, grace_s: float) -> None:
    with contextlib.suppress(_ray_errors()):  # it is dead: so are its processes
        await actor.stop.remote(grace_s)


class _RayThread:
    """The one thread that makes blocking calls to Ray, in order.

    Ray's own processes are tied to the thread that started them, so it must live as long as they should: it is
    never joined.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="ray", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` there."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            try:
                result, error = function(), None
            except Exception as caught:
                result, error = None, caught
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(finish, result, error)

        self._calls.put(run)
        return await future

    def _serve(self) -> None:
        while True:
            self._calls.get()()


def _prepare_environment(run: RunDir) -> None:
    """Loopback, a secret token, ordinary priority, no reports home. Ray reads most of it when it is imported."""
    token = run.path / "ray-token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    for key in [key for key in os.environ if key.startswith("RAY_")]:
        del os.environ[key]  # meant for some other cluster
    os.environ.update(
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # the node's address is 127.0.0.1, and nothing listens elsewhere
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_DISABLE_FAILURE_SIGNAL_HANDLER="1",  # it would take SIGTERM from us
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",  # under `uv run` it would ship the working directory to every worker
        RAY_worker_niceness="0",  # 15 by default: starved by any ordinary process
        RAY_ROTATION_MAX_BYTES=str(16 * 2**20),
        RAY_ROTATION_BACKUP_COUNT="1",
        RAY_memory_monitor_refresh_ms="0",  # it would kill ranks when others fill the memory
        RAY_gcs_rpc_server_reconnect_timeout_s="600",  # after 60 s without its head Ray ends every process
        PYTHONPATH=child.environment(os.environ).get("PYTHONPATH", ""),
    )


def _end_helpers() -> None:
    """Autoscaler, log monitor and dashboard have nothing to do here, but cost 180 MB; no option leaves them out."""
    helpers = process_tree.running_scripts(_HELPERS)
    process_tree.kill(helpers)
    process_tree.reap(helpers)
