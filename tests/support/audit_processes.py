"""What a server leaves behind in the machine: processes, listening ports, shared memory, directories."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster import process_tree

_MARK = "BATON_TEST_MARK"
_LISTEN = "0A"
_LIMIT_S = 5.0


@dataclass
class MachineAudit:
    """Everything that inherits `environment` can be found again, whoever its parent is by then."""

    runtime_dir: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    _shm_before: frozenset[str] = field(default_factory=lambda: _shared_memory())

    @property
    def environment(self) -> dict[str, str]:
        """To start the server with."""
        return {_MARK: self.mark, "BATON_RUNTIME_DIR": str(self.runtime_dir)}

    def pids(self) -> list[int]:
        """All marked processes that run."""
        return [pid for pid in process_tree.marked_with(_MARK, self.mark) if _state(pid) not in "ZX"]

    def listeners(self) -> set[tuple[str, int]]:
        """(address, port) of every TCP listener of a marked process; addresses as the kernel prints them, in hex."""
        inodes = {inode for pid in self.pids() for inode in _socket_inodes(pid)}
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and columns[9] in inodes:
                    address, _, port = columns[1].partition(":")
                    found.add((address, int(port, 16)))
        return found

    def leftovers(self) -> list[str]:
        """What is left, in words; kept logs are no leftovers."""
        left = [f"process {pid}: {_command(pid)}" for pid in self.pids()]
        left += [str(path) for path in self.runtime_dir.iterdir() if path.name != "logs"]
        left += [f"/dev/shm/{name}" for name in _shared_memory() - self._shm_before]
        return left

    def assert_clean(self, limit_s: float = _LIMIT_S) -> None:
        """Fail unless nothing is left within a bound: after a SIGKILL somebody else has to clean up."""
        deadline = time.monotonic() + limit_s
        while left := self.leftovers():
            assert time.monotonic() < deadline, f"left behind after {limit_s} s: {left}"
            time.sleep(0.02)

    def kill_all(self) -> None:
        """End whatever is left, so that one failed test does not disturb the next."""
        while pids := self.pids():
            process_tree.kill(pids)
            time.sleep(0.02)


def is_loopback(address: str) -> bool:
    """Whether an address of /proc/net/tcp or tcp6 is 127.0.0.0/8, its IPv6 mapping, or ::1 (little-endian words)."""
    if len(address) == 8:
        return address.endswith("7F")
    return (address.startswith("0000000000000000FFFF0000") and address.endswith("7F")) or (
        address == "00000000000000000000000001000000"
    )


def _shared_memory() -> frozenset[str]:
    # Other programs of this machine make semaphores of this name at any time; Baton and Ray make none.
    return frozenset(name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-"))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "gone"


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # it ended, or closed the descriptor, while we looked
        pass
    return found
