"""Runs the ranks of one replica as threads of the test, joined by shared memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from engine.comm import ShmComm

T = TypeVar("T")


@contextmanager
def fast_switching() -> Iterator[None]:
    """Threads that wait for each other hold the interpreter for at most 50 us, not 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_ranks(
    directory: Path, size: int, work: Callable[[ShmComm], T], *, slot_bytes: int = 2**16, leave_together: bool = False
) -> list[T]:
    """`work(comm)` on `size` joined ranks at once; the results by rank. The first rank's exception is raised.

    With `leave_together` a rank that is done stays until all are: where one that leaves would be a death to those that
    still wait for a third.
    """
    all_done = threading.Barrier(size)

    def run(rank: int) -> T:
        comm = ShmComm(directory / "comm", rank=rank, size=size, slot_bytes=slot_bytes, timeout_s=20)
        try:
            result = work(comm)
            if leave_together:
                with suppress(threading.BrokenBarrierError):  # another one failed, and tells why
                    all_done.wait(60)
            return result
        finally:
            if leave_together:
                all_done.abort()
            comm.close()

    with fast_switching(), ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]
