"""The kernel's view of our processes: parents, orphans, and ending all of them. Linux; standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_KILL_WAIT_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that can not be confused with a later one of the same pid."""

    pid: int
    start_ticks: int
    """Since boot, field 22 of /proc/PID/stat."""

    @property
    def is_alive(self) -> bool:
        """Whether exactly this process still runs (a zombie does not)."""
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state not in "ZX"


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    state: str
    ppid: int
    start_ticks: int


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process; None if there is none."""
    stat = _stat(pid)
    return None if stat is None else ProcessId(pid, stat.start_ticks)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int, signum: int) -> bool:
    """Let the kernel send `signum` to this process when `parent` dies; False: it is dead already.

    The kernel watches the *thread* that started this process: a parent must start it from one that lives as long
    as the parent itself.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent


def set_name(name: str) -> None:
    """The name that `top` and `ps -o comm` show; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def descendants(root: int | None = None) -> list[int]:
    """Pids of all running descendants of `root` (this process), parents before children; no zombies."""
    children: dict[int, list[_Stat]] = {}
    for stat in _all_stats():
        children.setdefault(stat.ppid, []).append(stat)
    found: list[int] = []
    queue = [os.getpid() if root is None else root]
    while queue:
        for stat in children.get(queue.pop(), ()):
            queue.append(stat.pid)
            if stat.state not in "ZX":
                found.append(stat.pid)
    return found


def end_descendants(grace_s: float) -> int:
    """SIGTERM every descendant, SIGKILL those that are left after `grace_s`, and reap them all; how many there were.

    Needs `adopt_orphans`, or a descendant whose parent dies first gets away. Nobody else in this process may be
    waiting for a child.
    """
    begin = time.monotonic()
    signalled: dict[int, int] = {}
    while True:
        _reap_all()
        waited = time.monotonic() - begin
        left = descendants()
        if not left or waited > grace_s + _KILL_WAIT_S:
            return len(signalled)
        wanted = signal.SIGKILL if waited >= grace_s else signal.SIGTERM
        for pid in left:
            if signalled.get(pid) != wanted:
                _signal(pid, wanted)
                signalled[pid] = wanted
        # Orphans are handed up to us one by one as their parents die, so there is no single event to wait for.
        time.sleep(_LOOK_AGAIN_S)


def zombies() -> set[int]:
    """Pids of children of this process that ended and that nobody has waited for."""
    return {stat.pid for stat in _all_stats() if stat.ppid == os.getpid() and stat.state == "Z"}


def reap(pids: Iterable[int]) -> None:
    """Wait for these children until they have ended."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def running_scripts(suffixes: tuple[str, ...]) -> list[int]:
    """Pids of children of this process that run a Python file whose path ends so."""
    found = []
    for stat in _all_stats():
        if stat.ppid == os.getpid():
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{stat.pid}/cmdline").read_text(errors="replace").split("\0")
                if any(argument.endswith(suffixes) for argument in arguments[1:3]):
                    found.append(stat.pid)
    return found


def marked_with(name: str, value: str) -> list[int]:
    """Pids of our user's processes whose initial environment holds `name=value`, this one excepted."""
    wanted = f"{name}={value}".encode()
    found = []
    for pid in _pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if pid != os.getpid() and wanted in environ.split(b"\0"):
            found.append(pid)
    return found


def kill(pids: Iterable[int]) -> None:
    """SIGKILL each; one that is gone is no error."""
    for pid in pids:
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        return


def _reap_all() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _all_stats() -> Iterator[_Stat]:
    return (stat for pid in _pids() if (stat := _stat(pid)) is not None)


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return _Stat(pid, fields[0], int(fields[1]), int(fields[19]))


def _prctl(option: int, value: int | ctypes.Array[ctypes.c_char]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_ulong(value) if isinstance(value, int) else value
    if libc.prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
