"""The machine itself as an arm: how fast the cores read memory and multiply matrices, for the rooflines.

usage: arm_ceiling.py OPTIONS_JSON      (the bench starts it)

Reading: the kernels' own loop over one buffer per thread, twice over, best of several; numpy where there are no
kernels. A buffer has the size of what a decode step reads, because part of it may stay in a large last-level cache
(and 1 GiB, for information). Multiplying: the best of torch's bf16 products (oneDNN, AMX where present) over sizes of
a prefill; the tiles' peak without any memory is given for information.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from arm import serve

from engine.kernels.build import KernelsUnavailable
from engine.kernels.library import Library, Memory, load

_GIB = 2**30


class CeilingArm:
    """Buffers and matrices on the arm's cores."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._cores: list[int] = options["cores"]
        torch.set_num_threads(len(self._cores))
        self._library: Library | None
        try:
            self._library = load()
        except KernelsUnavailable:
            self._library = None
        per_core = max(int(options["step_bytes"]) // len(self._cores) // 256 * 256, 2**20)
        self._reader = _Reader(self._library, per_core, self._cores)
        is_big = int(options["step_bytes"]) >= _GIB
        self._big = self._reader if is_big else _Reader(self._library, _GIB // len(self._cores), self._cores)
        hidden, inner = options["hidden_size"], options["intermediate_size"]
        self._sizes = ((2048, 2048, 2048), (512, hidden, 2 * inner), (1024, inner, hidden), (1024, 4096, 1024))
        self._matrices = [
            (torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16).t())
            for m, k, n in self._sizes
        ]

    def measure(self) -> dict[str, float]:
        """All ceilings once."""
        return {
            "read_bytes_per_s": self._reader.bytes_per_s(4),
            "read_1gib_bytes_per_s": self._big.bytes_per_s(2),
            "flops_per_s": max(self._gemm(a, b) for a, b in self._matrices),
            "tile_peak_per_s": self._tile_peak() * len(self._cores),
        }

    def facts(self) -> dict[str, Any]:
        """How it was measured."""
        return {
            "engine": "ceiling",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "reads_with": "numpy" if self._library is None else f"kernels ({self._library.isa})",
            "gemm_sizes": [list(size) for size in self._sizes],
        }

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """A hello, or all measurements."""
        return self.facts() if command["op"] == "hello" else self.measure()

    def _gemm(self, a: torch.Tensor, b: torch.Tensor) -> float:
        a @ b
        best = min(_seconds(lambda: a @ b) for _ in range(3))
        return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best

    def _tile_peak(self) -> float:
        return 0.0 if self._library is None else max(self._library.c.baton_tile_peak(2) for _ in range(3))


class _Reader:
    """One touched buffer per core."""

    def __init__(self, library: Library | None, num_bytes: int, cores: Sequence[int]) -> None:
        self._library, self._num_bytes, self._cores = library, num_bytes, cores
        self._memories = [Memory(library, num_bytes + 4096) for _ in cores] if library is not None else []
        for memory in self._memories:
            ctypes.memset(memory.address, 1, num_bytes + 4096)
        self._arrays = [] if self._memories else [np.ones(num_bytes // 8, np.uint64) for _ in cores]

    def bytes_per_s(self, repeats: int) -> float:
        """The best of `repeats`, all cores together, by the wall clock."""
        return len(self._cores) * self._num_bytes / min(self._pass_s() for _ in range(repeats))

    def _pass_s(self) -> float:
        times: list[float] = []
        gate = threading.Barrier(len(self._cores))
        threads = [threading.Thread(target=self._read, args=(index, gate, times)) for index in range(len(self._cores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(times)

    def _read(self, index: int, gate: threading.Barrier, times: list[float]) -> None:
        os.sched_setaffinity(0, {self._cores[index]})  # of this thread only
        gate.wait()
        if self._library is None:
            array = self._arrays[index]
            times.append(_seconds(lambda: np.bitwise_or.reduce(array)))
        else:
            c, address = self._library.c, self._memories[index].address
            times.append(_seconds(lambda: c.baton_read_s(address, self._num_bytes)))


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    serve(lambda options: CeilingArm(options).answer)
