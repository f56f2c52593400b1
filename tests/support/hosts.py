"""Hosts made of namespaces, for tests of a real `ray up`: each has its own network, pid, mount, uts and ipc namespace.

They share the machine's files but for /tmp, /run, /dev/shm and what says who and where they are. Whoever makes them must
be in a network and pid namespace of its own: the bridge between the hosts lies there, and the caller is one more machine
on it. Everything dies with the caller's namespaces. Needs root, iproute2, openssh-server and rsync.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

T = TypeVar("T")

NEEDED: Final = ("unshare", "nsenter", "ip", "/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync")
OPERATOR: Final = "10.77.0.1"
_FIRST_OCTET: Final = 10
_UP_LIMIT_S: Final = 20.0
_END_LIMIT_S: Final = 20.0

_INIT: Final = """#!/bin/bash
# The first process of a host: what it sees of the machine, and then its sshd.
set -e
hostname {name}
mount --make-rprivate /
for keep in {keep}; do
  mkdir -p {root}/tmp$keep && mount --rbind $keep {root}/tmp$keep
done
mount --rbind {root}/tmp/tmp /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir /run/sshd
for file in passwd shadow hosts; do mount --bind {root}/etc_$file /etc/$file; done
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {operator}
export HOME={root}/home
exec /usr/sbin/sshd -D -e -f {root}/sshd_config
"""

_SSHD: Final = """Port 22
ListenAddress {address}
HostKey {root}/host_key
AuthorizedKeysFile {root}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
UseDNS no
"""

_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_BASHRC: Final = """export PATH={path}:$PATH PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME={cache}
export RAY_USAGE_STATS_ENABLED=0
"""


def missing() -> list[str]:
    """What this machine lacks for such hosts; empty: nothing."""
    lacks = [tool for tool in NEEDED if shutil.which(tool) is None]
    return lacks if os.geteuid() == 0 else ["root", *lacks]


@dataclass(frozen=True, slots=True)
class Host:
    """One of them."""

    name: str
    address: str
    root: Path
    """Its own files, on the machine's file system."""
    process: subprocess.Popen[bytes]
    """The parent of its first process."""

    def command(self, script: str) -> list[str]:
        """The argv that runs a line of bash as a login on the host would, without a network."""
        (init,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        home = f"HOME={self.root / 'home'}"
        return ["nsenter", "-t", init, "-a", "--wd=/", "env", home, "bash", "-c", f". ~/.bashrc; {script}"]

    def run(self, script: str, limit_s: float = 60.0) -> str:
        """What it prints; fails the test unless it ends well."""
        done = subprocess.run(self.command(script), capture_output=True, text=True, timeout=limit_s)
        assert done.returncode == 0, f"{self.name}: {script}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all its processes but sshd's own and ours."""
        lines = self.run("ps -eo pid=,args=").splitlines()
        return [line.strip() for line in lines if not any(word in line for word in ("sshd", "ps -eo"))]


class Hosts:
    """A number of hosts on one bridge; the caller is at 10.77.0.1. Ends them, and deletes their files, on leaving."""

    def __init__(self, work_dir: Path, num_hosts: int) -> None:
        self._work_dir = work_dir
        self._num_hosts = num_hosts
        self.hosts: list[Host] = []
        self.key = work_dir / "id_ed25519"

    def __enter__(self) -> Self:
        links = subprocess.run(["ip", "-o", "link", "show", "up"], capture_output=True, text=True, check=True)
        ups = links.stdout.splitlines()
        assert len(ups) == 1, "hosts are made only in a network namespace of their own, where nothing but lo is up"
        _run("ssh-keygen -q -t ed25519 -N '' -f", str(self.key))
        _run("ip link add br0 type bridge")
        _run(f"ip addr add {OPERATOR}/24 dev br0")
        _run("ip link set br0 up")
        try:
            for index in range(self._num_hosts):
                self.hosts.append(self._start(index))
            for host in self.hosts:
                self._wait_for_sshd(host)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def cut(self, host: Host) -> None:
        """Pull its network cable."""
        _run(f"ip link set v{host.name} down")

    def mend(self, host: Host) -> None:
        """Plug it in again."""
        _run(f"ip link set v{host.name} up")

    def _start(self, index: int) -> Host:
        name, address = f"h{index}", f"10.77.0.{_FIRST_OCTET + index}"
        root = self._work_dir / name
        for directory in ("home/.ssh", "tmp/tmp"):
            (root / directory).mkdir(parents=True)
        (root / "tmp/tmp").chmod(0o1777)
        _run("ssh-keygen -q -t ed25519 -N '' -f", str(root / "host_key"))
        shutil.copy(self.key.with_suffix(".pub"), root / "authorized_keys")
        bashrc = _BASHRC.format(path=Path(sys.executable).parent, root=_ROOT, cache=_cache())
        (root / "home/.bashrc").write_text(bashrc)
        (root / "home/.profile").write_text(". ~/.bashrc\n")
        (root / "etc_hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        # ssh finds `~` in passwd, whatever HOME says, and sshd refuses accounts that are locked.
        _rewrite("/etc/passwd", root / "etc_passwd", f"root:x:0:0:root:{root / 'home'}:/bin/bash")
        _rewrite("/etc/shadow", root / "etc_shadow", "root:*:19000:0:99999:7:::")
        (root / "sshd_config").write_text(_SSHD.format(address=address, root=root))
        keep = " ".join(shlex.quote(path) for path in self._kept())
        init = root / "init.sh"
        init.write_text(_INIT.format(name=name, address=address, root=root, keep=keep, operator=OPERATOR))
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with open(root / "sshd.log", "wb") as log:
            process = subprocess.Popen(
                ["unshare", *spaces, "bash", str(init)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        host = Host(name, address, root, process)
        child = _until(lambda: _children(process.pid), f"{name} has a first process")
        _run(f"ip link add v{name} type veth peer name eth0 netns {child[0]}")
        _run(f"ip link set v{name} master br0 up")
        return host

    def _kept(self) -> Iterator[str]:
        """What a host needs of the machine's /tmp: the interpreter, the code, and its own files."""
        for path in {Path(sys.prefix), _ROOT, self._work_dir.resolve()}:
            if path.is_relative_to("/tmp"):
                yield str(path)

    def _wait_for_sshd(self, host: Host) -> None:
        def answers() -> bool:
            assert host.process.poll() is None, (host.root / "sshd.log").read_text()
            probe = f"exec 3<>/dev/tcp/{host.address}/22"
            return subprocess.run(["bash", "-c", probe], capture_output=True).returncode == 0

        _until(answers, f"{host.name} answers")

    def _end(self) -> None:
        for host in self.hosts:
            host.process.kill()  # --kill-child: its first process goes, and with it all others
        for host in self.hosts:
            host.process.wait(_END_LIMIT_S)
        # The kernel takes its time to remove the links of a namespace that is gone.
        for name in (*(f"v{host.name}" for host in self.hosts), "br0"):
            subprocess.run(["ip", "link", "del", name], check=False, stderr=subprocess.DEVNULL)


def _cache() -> Path:
    """Compiled kernels are the machine's, not a host's."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _rewrite(source: str, target: Path, root_line: str) -> None:
    lines = [line for line in Path(source).read_text().splitlines() if not line.startswith("root:")]
    target.write_text("\n".join([root_line, *lines]) + "\n")


def _run(command: str, *more: str) -> None:
    subprocess.run([*shlex.split(command), *more], check=True)


def _until(look: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + _UP_LIMIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {_UP_LIMIT_S} s: {what}"
        time.sleep(0.02)  # another process has to act; there is no event to wait for
    return found
