"""Builds cuda_stub.cpp: a libcuda whose device is this process's memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

from kvtransfer.cuda import libcuda

KERNELS = Path(libcuda.__file__).parent / "kernels.cu"
_SOURCE = Path(__file__).with_name("cuda_stub.cpp")
_FLAGS = ("-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", "-DTHREADS=256")


def build_stub(folder: Path, *flags: str) -> str:
    """The path of the library; needs g++."""
    path = str(folder / "libcuda.so.1")
    subprocess.run(
        ["g++", *_FLAGS, *flags, "-I", str(KERNELS.parent), str(_SOURCE), "-o", path], check=True, timeout=50
    )
    return path
