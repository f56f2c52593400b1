"""The pool's bytes: taken from the system ahead, where it can do that."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from engine import kv_memory
from engine.kv_memory import KVMemory

MIB = 1 << 20
CAN_COMMIT = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14)


def held(memory: KVMemory) -> int:
    """Bytes that the system has given to the pool."""
    return os.fstat(memory.fd).st_blocks * 512


@pytest.mark.skipif(not CAN_COMMIT, reason="the kernel can not take pages ahead")
@pytest.mark.parametrize("num_bytes", [1, 4096, 130 * MIB + 5])
def test_committed_memory_has_all_its_pages(num_bytes: int) -> None:
    memory = KVMemory(num_bytes, commit=True)
    assert held(memory) == -(-num_bytes // 4096) * 4096
    assert not np.frombuffer(memory.view, np.uint8).any()
    memory.view[-1] = 7
    memory.close()


def test_memory_that_is_not_committed_has_none() -> None:
    memory = KVMemory(4 * MIB)
    assert held(memory) == 0
    memory.close()


def test_a_kernel_that_can_not_do_it_gives_pages_when_they_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "_MADV_POPULATE_WRITE", 9999)
    memory = KVMemory(4 * MIB, commit=True)
    assert held(memory) == 0
    memory.view[MIB] = 7
    assert memory.view[MIB] == 7
    memory.close()


def test_a_machine_without_the_memory_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(kv_memory.mmap.mmap):  # type: ignore[name-defined, misc]
        def madvise(self, *_: Any) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(kv_memory.mmap, "mmap", Full)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="Cannot allocate"):
        KVMemory(4 * MIB, commit=True)
