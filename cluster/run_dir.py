"""Where a running server leaves its files, and how other commands of the same user find it. Standard library only.

One directory per user (0700), in it one *run directory* per `baton serve` with everything that the server writes:
Unix sockets, Ray's session, logs, and `server.json`, which says who it is and how to reach it. The base lies in /tmp
and not in XDG_RUNTIME_DIR because logind empties that at logout, also under a server that is still running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster import process_tree
from cluster.process_tree import ProcessId

BASE_ENV: Final = "BATON_RUNTIME_DIR"
RUN_ID_ENV: Final = "BATON_RUN_ID"
"""Set in every process of a run, so that its processes can be told from all others."""
_STATE: Final = "server.json"
_LOGS: Final = "logs"
_JOINED: Final = "joined"
"""A mark of run directories on nodes that have no guardian; who holds a lock on one keeps it."""
_FAILED: Final = "failed"
_KEPT_LOGS: Final = 5
_STOP_LIMIT_S: Final = 90.0
_MAX_BASE_CHARS: Final = 32
"""Ray's socket names add 74 characters to a run directory's 9, and 107 are possible."""


class RunDirError(Exception):
    """The per-user directory can not be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """One server's directory."""

    path: Path

    @property
    def run_id(self) -> str:
        """Eight hex digits."""
        return self.path.name

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.path / _LOGS

    @property
    def ray(self) -> Path:
        """The embedded Ray's session."""
        return self.path / "ray"

    @property
    def control(self) -> Path:
        """Where the supervisor takes commands."""
        return self.path / "control.sock"

    def mark_failed(self) -> None:
        """Keep the logs of this directory when it goes."""
        with contextlib.suppress(OSError):
            (self.path / _FAILED).touch()

    def write_state(self, **fields: Any) -> None:
        """Set these fields of `server.json`, atomically. One process at a time may do so."""
        file = self.path / _STATE
        state = {**self.state(), **fields}
        temporary = file.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as out:
            json.dump(state, out)
        temporary.rename(file)

    def state(self) -> dict[str, Any]:
        """What `server.json` says; {} if it can not be read."""
        return _read_json(self.path / _STATE) or {}

    @property
    def stop_limit_s(self) -> float:
        """After so long a stop hangs: as the supervisor says, or plenty if it has not yet read its configuration."""
        return float(self.state().get("stop_limit_s", _STOP_LIMIT_S))

    def remove(self) -> None:
        """Delete it all."""
        shutil.rmtree(self.path, ignore_errors=True)

    def keep_logs(self) -> Path | None:
        """Move the logs to where they outlive the run, and return that place; the last five runs are kept."""
        if not self.logs.is_dir() or not any(file.stat().st_size for file in self.logs.iterdir()):
            return None
        kept = self.path.parent / _LOGS
        kept.mkdir(mode=0o700, exist_ok=True)
        for old in sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime)[: 1 - _KEPT_LOGS]:
            shutil.rmtree(old, ignore_errors=True)
        target = kept / self.run_id
        self.logs.rename(target)
        for index, ray_logs in enumerate(self.ray.glob("session_2*/logs")):
            ray_logs.rename(target / f"ray-{index}")
        target.touch()
        return target


@dataclass(frozen=True, slots=True)
class Server:
    """A `baton serve` as its `server.json` describes it."""

    run_dir: RunDir
    guardian: ProcessId
    supervisor: ProcessId | None
    state: dict[str, Any]

    @property
    def url(self) -> str | None:
        """Base URL of the HTTP API; None while it starts."""
        url = self.state.get("http_url")
        return url if isinstance(url, str) else None

    @property
    def urls(self) -> list[str]:
        """Of all its routers, as far as they listen."""
        routers = self.state.get("routers")
        found = [pair[0] for pair in routers.values()] if isinstance(routers, dict) else []
        return [url for url in dict.fromkeys([self.url, *found]) if isinstance(url, str)]

    @property
    def token(self) -> str:
        """Authorizes internal requests to the router."""
        return str(self.state.get("token", ""))

    @property
    def is_alive(self) -> bool:
        """Whether anyone is left to end it."""
        return self.guardian.is_alive or (self.supervisor is not None and self.supervisor.is_alive)


def base_dir() -> Path:
    """The user's own directory for all runs, made if absent.

    Raises:
        RunDirError: it belongs to someone else, is open to others, or its path is too long for Unix sockets.
    """
    path = Path(os.environ.get(BASE_ENV) or f"/tmp/baton-{os.getuid()}")
    hint = f"set {BASE_ENV} to a directory of your own"
    if len(str(path)) > _MAX_BASE_CHARS:
        raise RunDirError(f"{path}: longer than {_MAX_BASE_CHARS} characters, too long for Unix sockets in it; {hint}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise RunDirError(f"{path}: {error.strerror}; {hint}") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise RunDirError(f"{path}: must be a directory of yours that nobody else can enter (chmod 700); {hint}")
    return path


def create() -> RunDir:
    """A fresh run directory, registered as owned by this process; it stays locked until this process ends."""
    base = base_dir()
    run = RunDir(base / secrets.token_hex(4))
    run.path.mkdir(mode=0o700)
    run.logs.mkdir(mode=0o700)
    for path in (base, run.path):  # systemd-tmpfiles leaves locked directories alone, however old
        fcntl.flock(os.open(path, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH | fcntl.LOCK_NB)
    me = process_tree.identify(os.getpid())
    assert me is not None
    run.write_state(guardian=[me.pid, me.start_ticks])
    return run


def worker_dir(worker_id: str, incarnation: str) -> str:
    """For the Unix sockets of one start of one worker; relative to the run directory on the worker's node."""
    return f"w/{worker_id}-{incarnation[:6]}"


def join(run_id: str) -> RunDir:
    """The run directory of a server on this node, made if absent; it stays as long as this process holds it.

    Raises:
        RunDirError: there is no place for it.
    """
    _remove_abandoned()
    run = RunDir(base_dir() / run_id)
    while (descriptor := _hold(run.path)) is None:  # who left it last was about to remove it
        continue
    _held[run.path] = descriptor
    run.logs.mkdir(mode=0o700, exist_ok=True)
    if not (run.path / _STATE).exists():
        (run.path / _JOINED).touch()
    return run


def _hold(path: Path) -> int | None:
    """A descriptor whose lock keeps the directory, made if absent; None if it was removed meanwhile."""
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def leave(run: RunDir) -> None:
    """Let go of a joined run directory; whoever lets go last removes it. Idempotent."""
    descriptor = _held.pop(run.path, None)
    if descriptor is None:
        return
    if (run.path / _JOINED).exists():
        _remove_if_unused(run, descriptor)
    os.close(descriptor)


_held: Final[dict[Path, int]] = {}
"""Joined directories and the descriptors whose locks keep them."""


def _remove_if_unused(run: RunDir, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if (run.path / _FAILED).exists():
        run.keep_logs()
    run.remove()


def _remove_abandoned() -> None:
    """Directories that servers of other nodes left here when their processes were killed."""
    for mark in base_dir().glob(f"*/{_JOINED}"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(mark.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _remove_if_unused(RunDir(mark.parent), descriptor)
            finally:
                os.close(descriptor)


def servers() -> list[Server]:
    """This user's servers that are alive or left something behind, oldest first."""
    found = []
    for entry in sorted(base_dir().iterdir(), key=lambda path: path.stat().st_mtime):
        state = _read_json(entry / _STATE)
        if state is None or "guardian" not in state:
            continue
        supervisor = ProcessId(*state["supervisor"]) if "supervisor" in state else None
        found.append(Server(RunDir(entry), ProcessId(*state["guardian"]), supervisor, state))
    return found


def remove_dead() -> list[str]:
    """End the leftovers of servers whose guardian and supervisor were both killed; their run ids."""
    _remove_abandoned()
    dead = [server for server in servers() if not server.is_alive]
    for server in dead:
        process_tree.kill(process_tree.marked_with(RUN_ID_ENV, server.run_dir.run_id))
        server.run_dir.remove()
    return [server.run_dir.run_id for server in dead]


def _read_json(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(file.read_text())
        return value if isinstance(value, dict) else None
    return None
