"""The supervisor's process: it reads what the guardian wants, checks what can be checked early, and supervises.

`python -m cluster.serve`, started by cluster.guardian, which writes one JSON line to its stdin: where the configuration
comes from and the run directory.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from baton import auth
from baton.config import Config, ConfigError, load_config
from cluster import guardian, process_tree, topology, version
from cluster.banner import StartUp
from cluster.console import Console, choose_style
from cluster.launcher_local import LocalLauncher
from cluster.launcher_ray import Cluster, RayLauncher
from cluster.run_dir import RunDir
from cluster.site import OWN_ADDRESS, Home
from cluster.supervisor import Supervisor, stop_limit_s
from cluster.topology import Modules, Orders
from cluster.unit import Launcher, StartFailed
from router.api_keys import load_api_keys

MODULES_ENV: Final = "BATON_MODULES"
"""For tests: "router=tests.support.stub_process,prefill=..." replaces what is run."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the guardian asks for."""

    config_file: str | None
    settings: dict[str, Any]
    log_format: str | None
    run: RunDir
    began: float
    program: str
    """How the user called this command; for advice on others."""


def check_ports(config: Config) -> None:
    """Fail early if a front door's port is taken.

    Raises:
        ConfigError: both doors want the same port.
        StartFailed: names the port and the flag that chooses another.
    """
    router = config.router
    if router.port and router.port == router.grpc_port:
        raise ConfigError(f"--port and --grpc-port: both are {router.port}; choose another for one of them")
    if router.host == OWN_ADDRESS:
        return  # it is known later
    for flag, port in (("--port", router.port), ("--grpc-port", router.grpc_port)):
        family = socket.AF_INET6 if ":" in router.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((router.host, port))
            except OSError as error:
                choice = flag if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
                raise StartFailed(
                    f"can not listen on {router.host}:{port} ({error.strerror}); choose another with {choice}"
                ) from error


def _modules() -> Modules:
    chosen = dict(item.split("=", 1) for item in os.environ.get(MODULES_ENV, "").split(",") if item)
    return Modules(**chosen)


def _build(request: Request, console: Console) -> Supervisor:
    start_up = StartUp(request.began, request.program)
    config = load_config(request.config_file, request.settings)
    check_ports(config)
    _check_api_keys(config)
    secret = _take_secret(config)
    model = topology.resolve_model(config, lambda hub_id: console.say(f"downloading {hub_id}"))
    is_one_machine = config.cluster.address is None
    workers = topology.plan_workers(config, sorted(os.sched_getaffinity(0)) if is_one_machine else ())
    topology.check_fit(config, model, workers)
    local = LocalLauncher(request.run)
    launcher: Launcher = local
    if config.cluster.launcher == "ray":
        num_cpus = sum(plan.tp_size for plan in workers) * config.engine.threads_per_rank
        home = Home(request.run.run_id, "" if is_one_machine else version.code_digest(), model.source)
        launcher = RayLauncher(request.run, home, _cluster(config, console), num_cpus)
    start_up.add("configuration", 0.0)
    request.run.write_state(token=auth.worker_token(secret), model=model.name, stop_limit_s=stop_limit_s(config))
    orders = Orders(config, model, secret, _modules())
    return Supervisor(config, model, workers, orders, launcher, local, console, request.run, start_up)


def _cluster(config: Config, console: Console) -> Cluster | None:
    """The Ray cluster to join, if any."""
    address = config.cluster.address
    if address is None:
        return None
    # Half of the time for a place to run, so that who has none can say why before the time is over.
    return Cluster(address, config.cluster.startup_timeout_s / 2, lambda text: console.say(text, "warning"))


def _check_api_keys(config: Config) -> None:
    """What the router would find out after everything else has started."""
    path = config.router.api_key_file
    try:
        load_api_keys(None if path is None else str(Path(path).expanduser()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"router.api_key_file: {error}") from error


def _take_secret(config: Config) -> bytes:
    try:
        secret = auth.load_secret(config.cluster.secret_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster.secret_file: {error}") from error
    os.environ.pop(auth.SECRET_ENV, None)  # children are told through their stdin
    return secret


async def _serve(request: Request, console: Console) -> None:
    await _build(request, console).run()


def _take_terminal(request: Request) -> Console:
    """The terminal is for the console; what libraries print goes to a log file."""
    console = Console(choose_style(request.log_format, sys.stderr), os.fdopen(os.dup(2), "w"), sys.stderr)
    log = os.open(request.run.logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


def _read_request() -> Request:
    asked = json.loads(sys.stdin.buffer.readline())
    return Request(
        asked["config_file"],
        asked["settings"],
        asked["log_format"],
        RunDir(Path(asked["run_dir"])),
        asked["began"],
        asked["program"],
    )


def main() -> int:
    """Serve; the exit status."""
    guardian_pid = os.getppid()
    process_tree.adopt_orphans()
    request = _read_request()
    me = process_tree.identify(os.getpid())
    assert me is not None
    request.run.write_state(supervisor=[me.pid, me.start_ticks])
    console = _take_terminal(request)
    status = 0
    try:
        asyncio.run(_serve(request, console))
    except ConfigError as error:
        console.complain(str(error))
        status = guardian.EXIT_USAGE
    except StartFailed as error:
        console.complain(str(error))
        status = guardian.EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        console.complain(f"a bug ended the supervisor ({type(error).__name__}: {error}); its log has the traceback")
        status = guardian.EXIT_FAILED
    if os.getppid() != guardian_pid:
        guardian.clean_up_instead(request.run)
    return status


if __name__ == "__main__":
    # No exit handlers: Ray's would try to shut its cluster down, which the guardian does faster and for certain.
    os._exit(main())
