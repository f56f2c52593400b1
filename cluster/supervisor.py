"""Starts a server's routers and workers, keeps them running, and ends them in order.

It knows neither what a process is told (cluster.topology.Orders) nor how one is started (cluster.unit.Launcher).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from baton.config import Config
from cluster import control, guardian, process_tree, topology
from cluster.banner import StartUp, UnitFacts, banner
from cluster.console import Console
from cluster.host import LogLine, Report
from cluster.kv_links import KVLinks
from cluster.restart import RestartPolicy
from cluster.run_dir import RunDir
from cluster.site import OWN_ADDRESS
from cluster.topology import ROUTER, ModelChoice, Orders, WorkerPlan
from cluster.unit import Launcher, StartFailed, Unit

_BROKEN_GRACE_S: Final = 0.5
"""For the rest of a unit that lost a process: it can do nothing useful any more."""
_ORPHAN_S: Final = 1.0
"""An orphan needs a moment to die, and a child's own watcher a moment to notice."""
_CAN_DECODE: Final = ("decode", "mixed")
_CAN_SEND: Final = ("prefill", "mixed")
_DRAIN_S: Final = 60.0
"""How long a worker that leaves may finish what it does."""
_INTRODUCTION_S: Final = 5.0
"""How long the greeting waits to know how KV travels."""
_LAST_STEPS_S: Final = 80.0
"""What a stop may take beside the grace of its processes: Ray's placement groups and its own end."""


def stop_limit_s(config: Config) -> float:
    """After so long a stop hangs: routers end first, drained, and then the workers, each within their grace."""
    return config.router.drain_s + 2 * config.cluster.stop_grace_s + _LAST_STEPS_S


class Supervisor:
    """One server. Everything happens in the loop that calls `run`."""

    def __init__(
        self,
        config: Config,
        model: ModelChoice,
        workers: Sequence[WorkerPlan],
        orders: Orders,
        launcher: Launcher,
        local: Launcher,
        console: Console,
        run: RunDir,
        start_up: StartUp,
    ) -> None:
        """`local` starts what belongs on this machine, the first router; `launcher` starts the workers.

        Further routers are on this machine as well, unless there are others (`cluster.address`).
        """
        self._config = config
        self._model = model
        self._workers = {plan.worker_id: plan for plan in workers}
        self._orders = orders
        self._launcher = launcher
        self._local = local
        self._console = console
        self._run = run
        self._start_up = start_up
        self._guardian_pid = os.getppid()
        self._stop = asyncio.Event()
        self._is_open = asyncio.Event()
        self._has_lost_unit = asyncio.Event()
        self._routers = {topology.router_name(index): index for index in range(config.topology.routers)}
        self._ready = {name: asyncio.Event() for name in (*self._routers, *self._workers)}
        self._is_serving = {name: asyncio.Event() for name in self._routers}
        self._why_not_serving: dict[str, str] = {}
        self._units: dict[str, Unit] = {}
        """Those that run; workers once they are ready."""
        self._ports = {name: self._wanted_ports(index) for name, index in self._routers.items()}
        self._fleet: dict[str, str] = {}
        self._links = KVLinks()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What keeps each worker."""
        self._drained: dict[str, asyncio.Event] = {}
        self._scaling = asyncio.Lock()
        self._facts = {name: UnitFacts() for name in self._ready}
        self._numbers = topology.number_formats(config, model)

    async def run(self) -> None:
        """Serve until a signal says stop; then end routers first, workers after them.

        Raises:
            StartFailed: something did not come up, or too much of it was lost; nothing is left running.
        """
        self._take_signals()
        try:
            async with asyncio.TaskGroup() as group:
                opening = group.create_task(self._open_launcher())
                routers = [group.create_task(self._keep(name, self._start_router)) for name in self._routers]
                for name in self._workers:
                    self._tasks[name] = group.create_task(self._keep(name, self._start_worker))
                helpers = [
                    group.create_task(self._announce()),
                    group.create_task(self._reap_orphans()),
                    group.create_task(control.serve(self._run, lambda command: self._on_command(group, command))),
                ]
                await self._stop.wait()
                for tasks in (helpers, routers, [*self._tasks.values(), opening]):
                    await _cancel(tasks)
        except* StartFailed as failures:
            if not self._stop.is_set():
                raise StartFailed(str(failures.exceptions[0])) from None
        finally:
            await self._launcher.close()

    def _take_signals(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            if os.getppid() != self._guardian_pid:
                guardian.clean_up_instead(self._run, grace_s=0.0)
            os._exit(guardian.EXIT_FAILED)
        self._console.say("stopping; once more to stop at once")
        self._stop.set()

    async def _open_launcher(self) -> None:
        with self._start_up.step(self._config.cluster.launcher):
            await self._launcher.open()
        self._take_signals()  # again: starting Ray replaces handlers
        self._is_open.set()

    async def _announce(self) -> None:
        limit_s = self._config.cluster.startup_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                for event in self._ready.values():
                    await event.wait()
                for event in self._is_serving.values():
                    await event.wait()
        except TimeoutError:
            missing = ", ".join(name for name, event in self._ready.items() if not event.is_set())
            reasons = "; ".join(f"{name} does not serve: {why}" for name, why in self._why_not_serving.items())
            why = f"{missing} not ready" if missing else reasons
            raise StartFailed(f"not ready after {limit_s:g} s (cluster.startup_timeout_s): {why}") from None
        await self._links.wait_until_known(_INTRODUCTION_S)
        self._start_up.finish()
        workers, logs = list(self._workers.values()), str(self._run.logs)
        self._console.greet(
            banner(
                self._config,
                self._model,
                self._numbers,
                workers,
                self._facts,
                self._links.transports(),
                self._start_up,
                logs,
            ),
            model=self._model.name,
            **self._numbers,
            ready_s=self._start_up.total_s,
            steps={step.name: [step.begin_s, step.end_s] for step in self._start_up.steps},
            router=self._router_reports().get(ROUTER),
            routers=self._router_reports(),
            kv_links=[[sender, receiver, how] for (sender, receiver), how in self._links.transports().items()],
            logs=logs,
        )
        self._write_state()

    async def _reap_orphans(self) -> None:
        """Orphans of a lost unit are ours (a dead actor's ranks): wait for those that no other part waits for."""
        while True:
            await self._has_lost_unit.wait()
            self._has_lost_unit.clear()
            await asyncio.sleep(_ORPHAN_S)
            before = process_tree.zombies()
            await asyncio.sleep(_ORPHAN_S)
            process_tree.reap(before & process_tree.zombies())

    async def _on_command(self, group: asyncio.TaskGroup, command: control.Command) -> str:
        """What other commands of the user ask; a sentence for them.

        Raises:
            CommandError: it can not be done.
        """
        if command.get("command") != "scale":
            raise control.CommandError(f"unknown command {command.get('command')}")
        if not self._start_up.is_finished:
            raise control.CommandError("the server is still starting")
        if self._config.cluster.launcher == "ray" and self._config.cluster.address is None:
            raise control.CommandError(
                "an embedded Ray has room for its first workers only; use --launcher local or --address"
            )
        if self._scaling.locked():
            raise control.CommandError("the server is being scaled already")
        async with self._scaling:
            return await self._scale(
                group, topology.plan_scaled(self._config, self._workers.values(), command["workers"])
            )

    async def _scale(self, group: asyncio.TaskGroup, wanted: Sequence[WorkerPlan]) -> str:
        """Start the workers that are missing, wait until they serve, and end the others, drained.

        Raises:
            ConfigError: those that are missing would not fit; nothing was started or ended.
        """
        plans = {plan.worker_id: plan for plan in wanted}
        new = [name for name in plans if name not in self._workers]
        topology.check_fit(self._config, self._model, [plans[name] for name in new])
        old = [name for name in self._workers if name not in plans]
        for name in new:
            self._workers[name], self._facts[name], self._ready[name] = plans[name], UnitFacts(), asyncio.Event()
            self._tasks[name] = group.create_task(self._keep(name, self._start_worker))
        try:
            async with asyncio.timeout(self._config.cluster.startup_timeout_s):
                for name in new:
                    await self._ready[name].wait()
        except TimeoutError:
            missing = ", ".join(name for name in new if not self._ready[name].is_set())
            raise control.CommandError(f"{missing} not ready yet; the server goes on trying") from None
        for name in old:
            await self._retire(name)
        text = "; ".join([f"{name} joined" for name in new] + [f"{name} left" for name in old]) or "nothing to do"
        self._console.say(f"scaled: {text}", joined=new, left=old)
        return text

    async def _retire(self, name: str) -> None:
        """End a worker when it has nothing left to do; what it still does after a while goes on elsewhere."""
        self._drained[name] = asyncio.Event()
        if (unit := self._units.get(name)) is not None:
            unit.tell(topology.FRONT, {"event": "drain"})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    await self._drained[name].wait()
        await _cancel([self._tasks.pop(name)])
        for known in (self._workers, self._facts, self._ready, self._drained):
            known.pop(name)
        self._write_state()

    def _grace_s(self, name: str) -> float:
        """How long a healthy unit may take to end."""
        return self._config.cluster.stop_grace_s + (self._config.router.drain_s if name in self._routers else 0.0)

    async def _keep(self, name: str, start: Callable[[str], Awaitable[Unit]]) -> None:
        """Start a unit, and again whenever it ends."""
        policy = RestartPolicy()
        while True:
            how, uptime_s = await self._run_once(name, start)
            if name in self._drained:  # it was to leave, and has
                self._drained[name].set()
                return
            self._has_lost_unit.set()
            self._facts[name].had_failure = True
            delay_s = policy.after_failure(time.monotonic(), uptime_s)
            if delay_s is None:
                self._give_up(name, how)
                return
            self._facts[name].restarts += 1
            again = f"{name} was lost: {how}; starting it again in {delay_s:g} s"
            self._console.say(again, "warning", unit=name, delay_s=delay_s)
            await asyncio.sleep(delay_s)

    async def _run_once(self, name: str, start: Callable[[str], Awaitable[Unit]]) -> tuple[str, float]:
        """Start a unit and see it end; how it ended and how long it was ready.

        Raises:
            StartFailed: it could not start, and the server as a whole has never been ready.
        """
        limit_s = self._config.cluster.startup_timeout_s
        begin_s = self._start_up.elapsed_s
        try:
            async with asyncio.timeout(limit_s):
                unit = await start(name)
            try:
                async with asyncio.timeout(limit_s):
                    reports = await asyncio.shield(unit.state.ready)
                if not self._ready[name].is_set():
                    self._start_up.add(name, begin_s)
                up_since = time.monotonic()
                self._on_up(name, unit, {process: report.fields for process, report in reports.items()})
                return await asyncio.shield(unit.state.ended), time.monotonic() - up_since
            finally:
                self._on_down(name)
                is_broken = unit.state.ended.done()
                await unit.stop(_BROKEN_GRACE_S if is_broken else self._grace_s(name))
        except (StartFailed, TimeoutError) as error:
            failure = error if isinstance(error, StartFailed) else StartFailed(f"{name} was not ready in {limit_s:g} s")
        if not self._start_up.is_finished:
            raise failure
        return str(failure), 0.0

    def _give_up(self, name: str, how: str) -> None:
        self._facts[name].state = "given up"
        self._write_state()
        able = [plan.worker_id for plan in self._workers.values() if plan.role in _CAN_DECODE]
        verdict = f"{name} failed five times within a minute and is not started again; the last time: {how}"
        if name == ROUTER or all(self._facts[worker_id].state == "given up" for worker_id in able):
            raise StartFailed(verdict)
        self._console.say(verdict, "error", unit=name)

    async def _start_router(self, name: str) -> Unit:
        status = {
            "launcher": self._config.cluster.launcher,
            **self._numbers,
            "workers": [
                {"worker_id": plan.worker_id, "role": plan.role, "tp_size": plan.tp_size}
                for plan in self._workers.values()
            ],
        }
        launcher, host = self._local, self._config.router.host
        if self._config.cluster.address is not None and (name != ROUTER or host == OWN_ADDRESS):
            await self._is_open.wait()
            if name != ROUTER:
                launcher = self._launcher
            elif host == OWN_ADDRESS:
                host = self._launcher.address
        order = self._orders.router(self._routers[name], host, self._ports[name], status)
        self._units[name] = await launcher.start_unit(order, lambda report: self._on_router(name, report), self._on_log)
        self._tell_fleet(name)
        return self._units[name]

    async def _start_worker(self, name: str) -> Unit:
        await self._is_open.wait()
        start = topology.worker_start(name, secrets.token_hex(8))
        order = self._orders.worker(self._workers[name], start)
        return await self._launcher.start_unit(order, lambda report: self._on_worker(name, report), self._on_log)

    def _on_up(self, name: str, unit: Unit, reports: dict[str, dict[str, Any]]) -> None:
        is_restart = self._ready[name].is_set()
        facts = self._facts[name]
        facts.state, facts.reports, facts.pids = "ready", reports, dict(unit.state.pids)
        facts.node = None if unit.state.node is None else unit.state.node.address
        self._ready[name].set()
        if name in self._routers:
            self._ports[name] = _ports_of(reports[name], self._ports[name])
        else:
            self._units[name] = unit
            facts.incarnation = unit.state.order.processes[0].spec["incarnation"]
            self._fleet[name] = str(reports[topology.FRONT]["address"])
            self._tell_fleet()
            self._introduce(name)
        self._write_state()
        if is_restart:
            self._console.say(f"{name} is back", unit=name)

    def _on_down(self, name: str) -> None:
        self._facts[name].state = "down"
        self._units.pop(name, None)
        if name in self._routers:
            self._is_serving[name].clear()
        elif self._fleet.pop(name, None) is not None:
            self._links.forget(name)
            self._tell_fleet()
        self._write_state()

    def _tell_fleet(self, *names: str) -> None:
        """Tell these routers (all of them) who serves."""
        workers = [{"worker_id": name, "address": address} for name, address in sorted(self._fleet.items())]
        for name in names or self._routers:
            if (router := self._units.get(name)) is not None:
                router.tell(name, {"event": "fleet", "workers": workers})

    def _introduce(self, newcomer: str) -> None:
        """Have the ranks that may send KV to a worker, or to others from it, connect before a request needs it."""
        peers = {name: self._peer(name) for name in self._fleet if self._workers[name].role in _CAN_DECODE}
        for sender in self._fleet:
            wanted = [newcomer] if sender != newcomer else list(peers)
            found = [peers[name] for name in wanted if name in peers and name != sender and peers[name][2]]
            if found and self._workers[sender].role in _CAN_SEND:
                self._links.expect(sender, [str(name) for name, _, _ in found], self._workers[sender].tp_size)
                for rank in range(self._workers[sender].tp_size):
                    self._units[sender].tell(f"rank {rank}", {"event": "peers", "peers": found})

    def _peer(self, name: str) -> tuple[str, str | None, list[Any]]:
        """A worker as worker.codec.unpack_peer reads it."""
        facts = self._facts[name]
        return name, facts.incarnation, list((facts.reports or {})[topology.FRONT].get("transfer", ()))

    def _is_of(self, worker_id: str, incarnation: str) -> bool:
        """Is this the worker's present start?"""
        return worker_id in self._facts and self._facts[worker_id].incarnation == incarnation

    def _on_worker(self, name: str, report: Report) -> None:
        if report.event == "drained" and name in self._drained:
            self._drained[name].set()
        elif report.event == "link" and self._is_of(report.fields["worker_id"], report.fields["incarnation"]):
            peer, transport, reason = (str(report.fields[key]) for key in ("worker_id", "transport", "reason"))
            self._links.heard(name, report.process, peer, transport)
            if not transport and peer in self._fleet and not self._stop.is_set():
                self._console.say(f"{name} has no KV link to {peer}: {reason}", "warning", unit=name)

    def _on_router(self, name: str, report: Report) -> None:
        if report.event == "serving":
            self._is_serving[name].set()
            self._why_not_serving.pop(name, None)
        elif report.event == "not_serving":
            self._is_serving[name].clear()
            self._why_not_serving[name] = str(report.fields.get("reason", ""))

    def _router_reports(self) -> dict[str, dict[str, Any]]:
        """What each router said when it was ready, the first one first."""
        return {name: dict((self._facts[name].reports or {}).get(name, {})) for name in self._routers}

    def _wanted_ports(self, index: int) -> tuple[int, int]:
        """HTTP and gRPC: as configured on another machine, the next ones on the same."""
        router = self._config.router
        step = index if self._config.cluster.address is None else 0
        return router.port + step if router.port else 0, router.grpc_port + step if router.grpc_port else 0

    def _on_log(self, unit: str, line: LogLine) -> None:
        self._console.child_line(unit if unit == line.process else f"{unit} {line.process}", line.text)

    def _write_state(self) -> None:
        """For other commands. A full disk, say, must not end the server."""
        routers = self._router_reports()
        router = routers[ROUTER]
        fields = {
            "http_url": router.get("http_url"),
            "grpc_url": router.get("grpc_url"),
            "routers": {name: [report.get("http_url"), report.get("grpc_url")] for name, report in routers.items()},
            "ready": self._start_up.is_finished,
            "had_failure": any(facts.had_failure for facts in self._facts.values()),
            "units": {
                name: {
                    "state": facts.state,
                    "pids": facts.pids,
                    "node": facts.node,
                    "incarnation": facts.incarnation,
                    "restarts": facts.restarts,
                }
                for name, facts in self._facts.items()
            },
        }
        try:
            self._run.write_state(**fields)
        except OSError as error:
            self._console.say(f"can not write the state file: {error}", "warning")


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _ports_of(report: dict[str, Any], before: tuple[int, int]) -> tuple[int, int]:
    """The ports that the router took, so that a restarted one takes them again."""

    def port(url: object, default: int) -> int:
        tail = str(url).rstrip("/").rpartition(":")[2]
        return int(tail) if tail.isdigit() else default

    return port(report.get("http_url"), before[0]), port(report.get("grpc_url"), before[1])
