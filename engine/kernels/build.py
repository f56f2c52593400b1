"""Compiles the kernels for one instruction set, once per machine and source. Knows no kernel.

The shared object lies in $XDG_CACHE_HOME/baton/kernels under a hash of everything that determines it, so a change of
source, compiler, flags or CPU makes a new one, and processes that start together can not harm each other: each builds
under a name of its own and renames.
"""

from __future__ import annotations

import enum
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

SOURCES: Final = Path(__file__).parent / "src"
_COMMON_FLAGS: Final = (
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
_BUILD_TIMEOUT_S: Final = 300.0


class KernelsUnavailable(RuntimeError):
    """There are no kernels on this machine; the message says why. Plain torch does the same work, slower."""


class Isa(enum.StrEnum):
    """Instruction sets, best first. A machine runs its own and all that follow."""

    AMX = "amx"
    AVX512 = "avx512"
    AVX2 = "avx2"
    PORTABLE = "portable"


_AVX2: Final = ("avx2", "fma", "f16c", "bmi2")
_AVX512: Final = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
_NEEDS: Final = {
    Isa.AMX: (*_AVX512, "amx_tile", "amx_bf16", "amx_int8"),
    Isa.AVX512: _AVX512,
    Isa.AVX2: _AVX2,
    Isa.PORTABLE: (),
}
"""CPU features by their names in /proc/cpuinfo; gcc's are the same but for the underscores."""
_GCC_NAMES: Final = {
    "avx512_bf16": "avx512bf16",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
}


def isas() -> tuple[Isa, ...]:
    """What this CPU runs, best first; never empty."""
    flags = _cpu_flags()
    return tuple(isa for isa in Isa if flags.issuperset(_NEEDS[isa]))


def built(isa: Isa) -> Path:
    """The shared object for `isa`, compiled if it is not in the cache. Blocks for seconds when it must compile.

    Raises:
        KernelsUnavailable: no compiler, or it failed.
    """
    compiler, version = _compiler()
    flags = _flags(isa)
    path = _cache_dir() / f"{_digest(version, flags)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ranks that start together compile once
            if not path.exists():
                _compile(compiler, flags, isa, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the kernels can not be built in {path.parent}: {error}") from error
    return path


def _compile(compiler: str, flags: tuple[str, ...], isa: Isa, path: Path) -> None:
    began_s = time.monotonic()
    log.info("compiling the CPU kernels", extra={"isa": str(isa), "compiler": compiler})
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".so")
    os.close(fd)
    try:
        command = [compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise KernelsUnavailable(f"{compiler} can not compile the kernels: {done.stderr.strip()[-2000:]}")
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    log.info("the CPU kernels are compiled", extra={"seconds": round(time.monotonic() - began_s, 1), "path": str(path)})


def _flags(isa: Isa) -> tuple[str, ...]:
    machine = tuple(f"-m{_GCC_NAMES.get(name, name)}" for name in _NEEDS[isa])
    # Narrow vectors make much longer code; those kernels are there for correctness.
    return (*_COMMON_FLAGS, "-O3" if isa in (Isa.AMX, Isa.AVX512) else "-O2", *machine)


def _digest(version: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (platform.machine(), version, *flags):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


@functools.cache
def _compiler() -> tuple[str, str]:
    """Path and version of $CXX, or of the first usual name that exists."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return path, done.stdout
    raise KernelsUnavailable("there is no C++ compiler ($CXX, g++, c++ or clang++)")


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "kernels"


def main() -> None:
    """`python -m engine.kernels.build`: compile for this CPU now, so that no first start has to wait for it."""
    try:
        sys.stdout.write(f"CPU kernels: {built(isas()[0])}\n")
    except KernelsUnavailable as error:
        sys.stdout.write(f"CPU kernels are not available, plain torch will compute: {error}\n")


if __name__ == "__main__":
    main()
