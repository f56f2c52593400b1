"""Units in Ray: a placement group per worker, one actor (RankHost) per place, the unit's processes as their children.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from cluster import child, process_tree, run_dir
from cluster.host import LogLine, Report
from cluster.nodes import ROLE_LABEL, ROUTER_ROLE, Need, Node, Placed, choose, excluded_roles, why_none
from cluster.rank_host import RankHost
from cluster.run_dir import RunDir
from cluster.site import Home
from cluster.unit import Place, StartFailed, UnitOrder, UnitState

T = TypeVar("T")

_OBJECT_STORE_BYTES: Final = 80 * 2**20  # about the least that Ray takes; nothing is stored
_HELPERS: Final = ("autoscaler/_private/monitor.py", "_private/log_monitor.py", "dashboard/dashboard.py")
_SHUTDOWN_S: Final = 10.0
_STOP_CALL_S: Final = 2.0
"""On top of a unit's own grace."""
_CALLS_AT_ONCE: Final = 4  # run, stop, and two tells
_LOOPBACK: Final = "127.0.0.1"
_DIAL_S: Final = 3.0
_JOIN_S: Final = 6.0
"""Ray itself would take 40 s to find out that nobody answers. With `_DIAL_S` less than 10."""
_SURVEY_S: Final = 60.0
"""A node starts a Python process to answer."""
_LOOK_AGAIN_S: Final = 1.0
_SAY_SO_S: Final = 3.0
"""How long a unit waits for room before the user hears of it."""
_HEADLESS_S: Final = "86400"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray cluster to join."""

    address: str
    """ "auto" or host:port of its head."""
    wait_s: float
    """How long a unit may wait for a node with room."""
    on_notice: Callable[[str], None]
    """Hears what the user should know."""


class RayLauncher:
    """Implements `Launcher`, with a Ray cluster of our own or a running one."""

    def __init__(self, run: RunDir, home: Home, cluster: Cluster | None, num_cpus: float) -> None:
        """`num_cpus` is what all workers need together; without a `cluster`, Ray is started with so many."""
        self.home = home
        self.cluster = cluster
        self.thread = _RayThread()
        self.bind: str | None = _LOOPBACK
        """Where workers listen; None: on the address of their node."""
        self._run = run
        self._num_cpus = num_cpus
        self._units: dict[str, RayUnit] = {}
        self._node: Node | None = None

    @property
    def address(self) -> str:
        """Of this node in the Ray cluster."""
        return _LOOPBACK if self._node is None else self._node.address

    async def open(self) -> None:
        """Start Ray, or join the cluster."""
        if self.cluster is None:
            await self._call(self._start_own, "Ray could not start")
            return
        what = f"could not join the Ray cluster {self.cluster.address}"
        try:
            async with asyncio.timeout(_DIAL_S):
                await _dial(self.cluster.address)
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or f"no answer within {_DIAL_S:g} s"
            raise StartFailed(f"{what}: {reason}; `ray start --head` says where its head listens") from error
        _prepare_environment()
        await asyncio.to_thread(__import__, "ray")  # half a second that is not the cluster's fault
        try:
            async with asyncio.timeout(_JOIN_S):
                nodes = await self._call(self._join, what)
        except TimeoutError:
            raise StartFailed(
                f"{what}: it did not let us in within {_JOIN_S:g} s; is its head alive, and its token ours "
                "(RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)?"
            ) from None
        await self._survey(nodes, what)

    async def start_unit(
        self, order: UnitOrder, on_report: Callable[[Report], None], on_log: Callable[[str, LogLine], None]
    ) -> RayUnit:
        """Place a unit and start it."""
        unit = RayUnit(UnitState(order, on_report, on_log), self)
        self._units[order.name] = unit
        try:
            await unit.start()
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
        if self._node is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_S):
                    await self.thread.call(sys.modules["ray"].shutdown)

    def placed(self) -> list[Placed]:
        """Units that have a node, the first router among them."""
        found = [unit.placed for unit in self._units.values() if unit.placed is not None]
        if self._node is not None:
            found.append(Placed(self._node.node_id, Need(ROUTER_ROLE, 0.0)))
        return found

    def forget(self, unit: RayUnit) -> None:
        """The unit is gone."""
        if self._units.get(unit.state.order.name) is unit:
            del self._units[unit.state.order.name]

    async def _call(self, function: Callable[[], T], what: str) -> T:
        try:
            return await self.thread.call(function)
        except Exception as error:  # Ray's own errors are many, and none of them is ours
            raise StartFailed(f"{what}: {_first_line(error)}") from error

    def _start_own(self) -> None:
        _prepare_own_environment(self._run)
        import ray  # half a second, and it reads the environment

        ray.init(
            address="local",
            num_cpus=self._num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self._run.ray),
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=f"baton-{self._run.run_id}",
        )
        _end_helpers()

    def _join(self) -> list[Node]:
        assert self.cluster is not None
        import ray

        passed = ("PYTHONPATH", run_dir.RUN_ID_ENV, run_dir.BASE_ENV)
        ray.init(
            address=self.cluster.address,
            runtime_env={"env_vars": {key: os.environ[key] for key in passed if key in os.environ}},
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=f"baton-{self._run.run_id}",
        )
        nodes = list_nodes()
        own_id = ray.get_runtime_context().get_node_id()
        self._node = next(node for node in nodes if node.node_id == own_id)
        if len(nodes) > 1 or self._node.cpus < self._num_cpus:  # or other nodes will have to come
            self.bind = None
        return nodes

    async def _survey(self, nodes: list[Node], what: str) -> None:
        """Ask every node that may be given a worker whether it can take one."""
        assert self.cluster is not None
        answers = await self._call(lambda: _ask(nodes, self.home), what)
        try:
            async with asyncio.timeout(_SURVEY_S):
                for node, answer in answers:
                    try:
                        nice = await answer
                    except _ray_errors() as error:
                        cause = getattr(error, "cause", None) or error
                        raise StartFailed(f"node {node.address} can not take part: {_cause_text(cause)}") from error
                    if nice > os.getpriority(os.PRIO_PROCESS, 0):
                        self.cluster.on_notice(
                            f"Ray runs its workers on {node.address} at nice {nice}, where any other process slows "
                            "them down; set RAY_worker_niceness=0 before `ray start`"
                        )
        except TimeoutError:
            raise StartFailed(f"{what}: its nodes did not all answer within {_SURVEY_S:g} s") from None


class RayUnit:
    """Implements `Unit`."""

    def __init__(self, state: UnitState, launcher: RayLauncher) -> None:
        self._state = state
        self._launcher = launcher
        self._thread = launcher.thread
        self._chosen: str | None = None
        self._group: Any = None
        self._actors: list[Any] = []
        self._listeners: list[asyncio.Task[None]] = []
        places = state.order.places
        self._need = Need(state.order.role, sum(place.cpus for place in places), sum(place.gpus for place in places))

    @property
    def state(self) -> UnitState:
        """What its processes said so far."""
        return self._state

    @property
    def placed(self) -> Placed | None:
        """What it takes of which node, once that is known."""
        node_id = self._state.node.node_id if self._state.node is not None else self._chosen
        return None if node_id is None else Placed(node_id, self._need)

    async def start(self) -> None:
        """Find a node, make the actors, and listen to them."""
        if self._launcher.cluster is None:
            self._group = await self._thread.call(self._make_group)
        elif self._need.cpus:
            await self._reserve(self._launcher.cluster)
        else:
            await self._find(self._launcher.cluster)
        streams = await self._thread.call(self._make_actors)
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
        self._launcher.forget(self)
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            await asyncio.wait(self._listeners)

    async def _reserve(self, cluster: Cluster) -> None:
        """A placement group on the best node; Ray takes another if that one is full, or waits for one.

        A group that waits is what makes an autoscaler add nodes.
        """
        nodes = await self._thread.call(list_nodes)
        best = choose(nodes, self._need, self._launcher.placed())
        self._chosen = None if best is None else best.node_id
        self._group = await self._thread.call(self._make_group)
        waited_s = 0.0
        while not await asyncio.to_thread(self._group.wait, _LOOK_AGAIN_S):
            waited_s += _LOOK_AGAIN_S
            await self._still_waiting(cluster, waited_s)

    async def _find(self, cluster: Cluster) -> None:
        """A node for a unit that takes nothing which Ray counts."""
        waited_s = 0.0
        while True:
            nodes = await self._thread.call(list_nodes)
            best = choose(nodes, self._need, self._launcher.placed())
            if best is not None:
                self._chosen = best.node_id
                return
            await asyncio.sleep(_LOOK_AGAIN_S)  # Ray tells nobody when a node joins
            waited_s += _LOOK_AGAIN_S
            await self._still_waiting(cluster, waited_s)

    async def _still_waiting(self, cluster: Cluster, waited_s: float) -> None:
        if waited_s != _SAY_SO_S and waited_s < cluster.wait_s:
            return
        nodes = await self._thread.call(list_nodes)
        others = [placed for placed in self._launcher.placed() if placed != self.placed]
        why = why_none(nodes, self._need, others)
        if waited_s >= cluster.wait_s:
            raise StartFailed(why)
        cluster.on_notice(f"{self._state.order.name} waits for a node: {why}")

    def _make_group(self) -> Any:
        from ray.util.placement_group import placement_group

        bundles = [_resources(place) for place in self._state.order.places]
        if self._launcher.cluster is None:
            return placement_group(bundles, strategy="STRICT_PACK")
        selector = {ROLE_LABEL: excluded_roles(self._need.role)}
        return placement_group(
            bundles,
            strategy="STRICT_PACK",
            bundle_label_selector=[selector] * len(bundles),
            _soft_target_node_id=self._chosen,
        )

    def _make_actors(self) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        actor_class = ray.remote(RankHost)
        streams = []
        for index, place in enumerate(self._state.order.places):
            if self._group is not None:
                strategy: Any = PlacementGroupSchedulingStrategy(self._group, index)
            else:
                strategy = NodeAffinitySchedulingStrategy(self._chosen, soft=False)
            actor = actor_class.options(
                name=f"{self._state.order.name}-{index}-{secrets.token_hex(3)}",
                num_cpus=place.cpus,
                num_gpus=place.gpus,
                max_restarts=0,
                max_concurrency=_CALLS_AT_ONCE,
                scheduling_strategy=strategy,
            ).remote()
            self._actors.append(actor)
            run = actor.run.options(num_returns="streaming")
            order, launcher = self._state.order, self._launcher
            streams.append(run.remote(place.processes, order.private_dir, launcher.home, launcher.bind))
        return streams

    async def _listen(self, place: Place, stream: Any) -> None:
        names = " and ".join(order.name for order in place.processes)
        try:
            async for item in stream:
                self._state.on_event(await item)
        except _ray_errors() as error:
            cause = getattr(error, "cause", None)  # what `run` raised; an actor that died has none
            if cause is not None:
                self._state.lose(f"{names} could not be started: {cause}")
                return
            node = self._state.node
            where = f" on {node.address}" if node is not None and self._launcher.cluster is not None else ""
            self._state.lose(f"the Ray actor of {names}{where} died")

    def _remove(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def list_nodes() -> list[Node]:
    """The cluster's living nodes. Blocks while its head does not answer."""
    import ray

    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


async def _dial(address: str) -> None:
    """See whether anyone listens there.

    Raises:
        OSError: nobody does, or it is no address.
    """
    if address in ("auto", "local"):
        return  # Ray looks on this machine, which is quick
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise OSError(0, "it must be auto or HOST:PORT")
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.close()


def _ask(nodes: list[Node], home: Home) -> list[tuple[Node, Any]]:
    """Start a survey on every node that has something to offer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def survey(code: str, model_source: str | None) -> int:  # nested, so that it travels by value
        from cluster import site

        return site.survey(code, model_source)

    task = ray.remote(num_cpus=0, max_retries=0)(survey)
    asked = []
    for node in nodes:
        if node.cpus or node.gpus:
            here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            asked.append((node, task.options(scheduling_strategy=here).remote(home.code, home.model_source)))
    return asked


def _resources(place: Place) -> Mapping[str, float]:
    return {"CPU": place.cpus, "GPU": place.gpus} if place.gpus else {"CPU": place.cpus}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _cause_text(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return f"it has no Baton, or not all that it needs ({_first_line(error)}); install it on every node"
    return _first_line(error)


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
            result: T | None = None
            error: Exception | None = None
            try:
                result = function()
            except SystemExit as caught:  # Ray, when it gives up
                error = RuntimeError(f"Ray ended the call ({caught})")
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(finish, result, error)

        self._calls.put(run)
        return await future

    def _serve(self) -> None:
        while True:
            self._calls.get()()


def _prepare_environment() -> None:
    """For a process that joins a cluster: Ray reads it when it is imported, or when it connects."""
    os.environ.update(
        RAY_DISABLE_FAILURE_SIGNAL_HANDLER="1",  # it would take SIGTERM from us
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",  # under `uv run` it would ship the working directory to every worker
        PYTHONPATH=child.environment(os.environ).get("PYTHONPATH", ""),
    )
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _HEADLESS_S)  # after 60 s Ray would end us


def _prepare_own_environment(run: RunDir) -> None:
    """Loopback, a secret token, ordinary priority, no reports home."""
    token = run.path / "ray-token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    for key in [key for key in os.environ if key.startswith("RAY_")]:
        del os.environ[key]  # meant for some other cluster
    _prepare_environment()
    os.environ.update(
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # the node's address is 127.0.0.1, and nothing listens elsewhere
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_worker_niceness="0",  # 15 by default: starved by any ordinary process
        RAY_ROTATION_MAX_BYTES=str(16 * 2**20),
        RAY_ROTATION_BACKUP_COUNT="1",
        RAY_memory_monitor_refresh_ms="0",  # it would kill ranks when others fill the memory
    )


def _end_helpers() -> None:
    """Autoscaler, log monitor and dashboard have nothing to do here, but cost 180 MB; no option leaves them out."""
    helpers = process_tree.running_scripts(_HELPERS)
    process_tree.kill(helpers)
    process_tree.reap(helpers)
