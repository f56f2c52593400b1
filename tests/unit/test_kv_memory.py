"""The pool's bytes: pages taken ahead, in the background, without harm to what is written or to closing."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
import pytest

from engine import kv_memory
from engine.kv_memory import KVMemory

MIB = 1 << 20
HAS_POPULATE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14)


def committer() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "kv-commit"), None)


def held(memory: KVMemory) -> int:
    """Bytes that the system has given to the pool."""
    return os.fstat(memory.fd).st_blocks * 512


def wait() -> None:
    if (thread := committer()) is not None:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.skipif(not HAS_POPULATE, reason="the kernel can not take pages ahead")
def test_every_page_of_the_regions_is_taken_and_no_other() -> None:
    page = mmap.PAGESIZE
    memory = KVMemory(16 * MIB)
    memory.commit([(0, 3 * MIB + 5), (5 * MIB + 100, 100), (8 * MIB, 2 * MIB)])
    wait()
    assert held(memory) == (3 * MIB + page) + page + 2 * MIB
    memory.close()


def test_what_is_written_meanwhile_stays() -> None:
    memory = KVMemory(64 * MIB)
    data = np.frombuffer(memory.view, np.uint8)
    places = np.random.default_rng(0).permutation(len(data) // 4096) * 4096
    memory.commit([(0, 32 * MIB), (32 * MIB, 32 * MIB)])
    for number, place in enumerate(places):
        data[place : place + 8] = number % 251 + 1
    wait()
    assert (data[places] == np.arange(len(places)) % 251 + 1).all()
    assert int(np.count_nonzero(data)) == 8 * len(places)
    del data
    memory.close()


def test_closing_ends_it() -> None:
    memory = KVMemory(1024 * MIB)
    inode = os.fstat(memory.fd).st_ino
    memory.commit([(0, 1024 * MIB)])
    memory.close()
    assert committer() is None
    with open("/proc/self/maps") as maps:
        assert not any(f" {inode} " in line and "baton-kv" in line for line in maps)
    memory.close()


def test_a_kernel_that_can_not_do_it_gives_pages_when_they_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "_MADV_POPULATE_WRITE", 9999)
    memory = KVMemory(4 * MIB)
    memory.commit([(0, 4 * MIB)])
    wait()
    assert held(memory) == 0
    memory.view[MIB] = 7
    assert memory.view[MIB] == 7
    memory.close()
