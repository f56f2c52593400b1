"""The processes of the engine bench: starts an arm on its cores, asks it, watches what it and others use of the machine.

Linux only. Knows no row. One thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

PEERS: Final = Path(__file__).parent / "peers"
_IDLE_SHARE: Final = 0.05
_IDLE_WINDOW_S: Final = 0.04
_IDLE_LIMIT_S: Final = 2.0
_STOP_S: Final = 10.0
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_SCRUBBED: Final = ("OMP_", "GOMP_", "KMP_", "MKL_", "VLLM_", "GGML_", "LD_PRELOAD", "PYTHONPATH", "BATON_KERNELS")


class ArmFailed(RuntimeError):
    """An arm ended, fell silent or answered with an error; it is of no more use."""


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """How to start an arm."""

    name: str
    python: Path
    script: str
    cores: tuple[int, ...]
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """What is run."""
        cores = ",".join(map(str, self.cores))
        options = json.dumps({**self.options, "cores": list(self.cores)})
        return ["taskset", "-c", cores, str(self.python), str(PEERS / self.script), options]


class Arm:
    """A running arm. `facts` is what it said of itself, `start_s` the time from fork to its first token.

    It idles between calls: `idle_share` is the most that it was seen to burn after one, in cores, once settled.
    """

    def __init__(self, spec: ArmSpec, log: Path, *, start_timeout_s: float = 900.0) -> None:
        """Start it and wait for its first token.

        Raises:
            ArmFailed: it did not come up.
        """
        self.spec = spec
        self.idle_share = 0.0
        self._log = log
        began = time.perf_counter()
        with log.open("ab") as errors:
            errors.write(f"# {' '.join(spec.command())}\n".encode())
            errors.flush()
            environment = {key: value for key, value in os.environ.items() if not key.startswith(_SCRUBBED)}
            environment |= {"OMP_NUM_THREADS": str(len(spec.cores)), **spec.environment}
            self._process = subprocess.Popen(
                spec.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=log.parent,
                start_new_session=True,
            )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._unread = b""
        try:
            self.facts = self._reply(start_timeout_s)
        except ArmFailed:
            self.stop()
            raise
        self.start_s = time.perf_counter() - began

    def ask(self, operation: str, *, timeout_s: float = 1200.0, **details: Any) -> dict[str, Any]:
        """One command and its answer.

        Raises:
            ArmFailed: stop it and do without.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": operation, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ArmFailed(f"{self.spec.name} is gone ({self._log})") from error
        return self._reply(timeout_s)

    def settle(self) -> float:
        """Wait until the arm's processes idle, but not for ever; how many cores they burn at the end."""
        deadline = time.monotonic() + _IDLE_LIMIT_S
        while True:
            before, began = self.cpu_s(), time.monotonic()
            time.sleep(_IDLE_WINDOW_S)
            share = (self.cpu_s() - before) / (time.monotonic() - began)
            if share < _IDLE_SHARE or time.monotonic() > deadline:
                self.idle_share = max(self.idle_share, share)
                return share

    def cpu_s(self) -> float:
        """CPU seconds that the arm's living processes have used."""
        return sum(_cpu_s(pid) for pid in self._pids())

    def memory(self) -> dict[str, float]:
        """MiB over all its processes: `peak_rss` adds their high-water marks, `pss` shares out what is shared."""
        found = {"peak_rss": 0.0, "pss": 0.0, "pss_file": 0.0}
        for pid in self._pids():
            with contextlib.suppress(OSError):
                found["peak_rss"] += _kib(f"/proc/{pid}/status").get("VmHWM", 0) / 1024
                rollup = _kib(f"/proc/{pid}/smaps_rollup")
                found["pss"] += rollup.get("Pss", 0) / 1024
                found["pss_file"] += rollup.get("Pss_File", 0) / 1024
        return found

    def stop(self) -> None:
        """End it and all of its processes. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            _close(pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own: followers, compilers
        self._process.wait()
        self._selector.close()

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + timeout_s)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ArmFailed(f"{self.spec.name}: {reply['error']} ({self._log})")
        return reply

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            if not self._selector.select(max(deadline - time.monotonic(), 0)):
                raise ArmFailed(f"{self.spec.name} does not answer ({self._log})")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise ArmFailed(f"{self.spec.name} has ended: {_last_line(self._log)} ({self._log})")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _pids(self) -> Iterator[int]:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self._process.pid:  # its session
                        yield int(entry.name)


class Bystanders:
    """What processes other than the arm that is measured take of the machine."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self._began = time.monotonic()
        self._before = _busy_s() - arm.cpu_s()

    def cores(self) -> float:
        """Cores that others kept busy since the start (in ticks of 10 ms: rough over short times)."""
        return max(0.0, _busy_s() - self._arm.cpu_s() - self._before) / max(time.monotonic() - self._began, _TICK_S)


def machine() -> dict[str, Any]:
    """What a reader must know of where this ran."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "?")
    flags = next((line.partition(":")[2].split() for line in info if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": sorted(os.sched_getaffinity(0)),
        "isa": [
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8") if name in flags
        ],
        "memory_gib": round(_kib("/proc/meminfo")["MemTotal"] / 2**20, 1),
        "available_gib": round(_kib("/proc/meminfo")["MemAvailable"] / 2**20, 1),
        "load_average_1min": os.getloadavg()[0],
        "kernel": os.uname().release,
        "huge_pages": _first_word("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def missing_tools() -> Sequence[str]:
    """Programs that the bench runs and that are not here."""
    return [name for name in ("taskset",) if shutil.which(name) is None]


def _busy_s() -> float:
    """CPU seconds that all cores have spent on anything."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + soft + steal) * _TICK_S


def _cpu_s(pid: int) -> float:
    total = 0.0
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, ValueError):
                total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) * 1e-9
    return total


def _kib(path: str) -> dict[str, int]:
    """Lines such as `VmHWM:  123 kB`."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0])
    return found


def _first_word(path: str) -> str:
    try:
        text = Path(path).read_text()
    except OSError:
        return "?"
    return next((word.strip("[]") for word in text.split() if word.startswith("[")), text.strip())


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.close()
