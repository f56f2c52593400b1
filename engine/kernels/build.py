"""Which instruction set the kernels are compiled for, and with what flags. Knows no kernel."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Final

from baton import native_build
from baton.native_build import NativeUnavailable

SOURCES: Final = Path(__file__).parent / "src"
_COMMON_FLAGS: Final = (*native_build.FLAGS, "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")


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
    try:
        return native_build.built(SOURCES / "kernels.cpp", _flags(isa))
    except NativeUnavailable as error:
        raise KernelsUnavailable(str(error)) from error


def _flags(isa: Isa) -> tuple[str, ...]:
    machine = tuple(f"-m{_GCC_NAMES.get(name, name)}" for name in _NEEDS[isa])
    # Narrow vectors make much longer code; those kernels are there for correctness.
    return (*_COMMON_FLAGS, "-O3" if isa in (Isa.AMX, Isa.AVX512) else "-O2", *machine)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def main() -> None:
    """`python -m engine.kernels.build`: compile for this CPU now, so that no first start has to wait for it."""
    try:
        sys.stdout.write(f"CPU kernels: {built(isas()[0])}\n")
    except KernelsUnavailable as error:
        sys.stdout.write(f"CPU kernels are not available, plain torch will compute: {error}\n")


if __name__ == "__main__":
    main()
