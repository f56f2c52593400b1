"""Compiles C++ into shared objects, once per machine and source. Knows nothing about what it compiles.

A shared object lies in $XDG_CACHE_HOME/baton/kernels under a hash of everything that determines it, so a change of
source, compiler, flags or CPU makes a new one, and processes that start together can not harm each other: each builds
under a name of its own and renames.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

FLAGS: Final = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
"""What every shared object is compiled with."""
VARIABLE: Final = "BATON_KERNELS"
"""Environment: "off" for no native code at all."""
_BUILD_TIMEOUT_S: Final = 300.0


class NativeUnavailable(RuntimeError):
    """There is no native code on this machine; the message says why."""


def built(source: Path, flags: tuple[str, ...]) -> Path:
    """The shared object of `source`, which may include all that lies beside it; compiled if it is not in the cache.

    Blocks for seconds when it must compile.

    Raises:
        NativeUnavailable: no compiler, or it failed.
    """
    compiler, version = find_compiler()
    path = _cache_dir() / f"{_digest(source.parent, version, flags)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together compile once
            if not path.exists():
                _compile(compiler, flags, source, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{source.name} can not be built in {path.parent}: {error}") from error
    return path


def _compile(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> None:
    began_s = time.monotonic()
    log.info("compiling", extra={"source": source.name, "compiler": compiler, "flags": " ".join(flags)})
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".so")
    os.close(fd)
    try:
        command = [compiler, *flags, str(source), "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} can not compile {source.name}: {done.stderr.strip()[-2000:]}")
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    seconds = round(time.monotonic() - began_s, 1)
    log.info("compiled", extra={"source": source.name, "seconds": seconds, "path": str(path)})


def _digest(directory: Path, version: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (platform.machine(), version, *flags):
        digest.update(part.encode() + b"\0")
    for source in sorted(directory.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


@functools.cache
def find_compiler() -> tuple[str, str]:
    """Path and version of $CXX, or of the first usual name that exists.

    Raises:
        NativeUnavailable: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return path, done.stdout
    raise NativeUnavailable("there is no C++ compiler ($CXX, g++, c++ or clang++)")


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "kernels"
