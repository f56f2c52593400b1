"""Shared-memory collectives: ranks as threads where possible, as processes where one must die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.comm import PeerLost, ShmComm, SingleComm
from tests.support.rank_threads import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


def part(rank: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank contributes; any rank can tell."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def sum_in_rank_order(size: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    total = part(0, shape, seed, dtype).float()
    for rank in range(1, size):
        total = total + part(rank, shape, seed, dtype)
    return total.to(dtype)


def start_rank(body: str, directory: Path) -> subprocess.Popen[str]:
    """A rank as a process: `body` has `comm_at(rank)` and `torch`."""
    prelude = (
        "import torch; from engine.comm import ShmComm, PeerLost\n"
        f"comm_at = lambda rank: ShmComm({str(directory / 'comm')!r}, rank=rank, size=2, timeout_s=30)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + body],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_the_bits_of_the_sum_in_rank_order(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    def work(comm: ShmComm) -> torch.Tensor:
        tensor = part(comm.rank, (7, 33), 1, dtype)
        comm.all_reduce(tensor)
        return tensor

    expected = sum_in_rank_order(size, (7, 33), 1, dtype)
    for result in run_ranks(tmp_path, size, work, leave_together=True):
        assert torch.equal(result, expected)


def test_a_tensor_larger_than_a_slot_is_summed_and_gathered_by_pieces(tmp_path: Path) -> None:
    shape = (3, 2500)  # 30000 bytes, slots of 4096

    def work(comm: ShmComm) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        tensor = part(comm.rank, shape)
        gathered = comm.gather(tensor.clone())
        comm.all_reduce(tensor)
        return tensor, gathered

    (total, gathered), (follower_total, nothing) = run_ranks(tmp_path, 2, work, slot_bytes=4096, leave_together=True)
    assert torch.equal(total, sum_in_rank_order(2, shape, 0, torch.float32))
    assert torch.equal(total, follower_total)
    assert nothing is None
    assert gathered is not None
    for rank, tensor in enumerate(gathered):
        assert torch.equal(tensor, part(rank, shape))


@pytest.mark.parametrize("size", [2, 4])
def test_hundreds_of_collectives_in_a_row_never_mix(tmp_path: Path, size: int) -> None:
    """Followers run ahead of the leader in gathers: a slot that is still read must not be overwritten."""

    def work(comm: ShmComm) -> int:
        wrong = 0
        for index in range(150):
            gathered = comm.gather(torch.full((5,), float(100 * index + comm.rank)))
            if gathered is not None:
                wrong += any(gathered[rank][0] != 100 * index + rank for rank in range(size))
            if index % 3 == 0:
                total = torch.full((40,), float(index + comm.rank))
                comm.all_reduce(total)
                wrong += int(total[-1] != size * index + sum(range(size)))
        return wrong

    assert run_ranks(tmp_path, size, work, leave_together=True) == [0] * size


def test_messages_reach_every_follower_in_order_until_the_leader_closes(tmp_path: Path) -> None:
    def work(comm: ShmComm) -> list[bytes]:
        if comm.rank == 0:
            for message in (b"one", b"", b"x" * 300_000):
                comm.send(message)
            return []
        received = []
        while (message := comm.receive()) is not None:
            received.append(message)
        return received

    results = run_ranks(tmp_path, 3, work)
    assert results == [[], *[[b"one", b"", b"x" * 300_000]] * 2]


def test_a_rank_that_waits_learns_of_a_death_two_ranks_away(tmp_path: Path) -> None:
    """Rank 2 dies; rank 0 sees its socket close and rank 1 sees rank 0's."""

    def work(comm: ShmComm) -> str:
        if comm.rank == 2:
            return "died"
        with pytest.raises(PeerLost):
            comm.all_reduce(torch.ones(4))
        with pytest.raises(PeerLost):
            comm.all_reduce(torch.ones(4))  # and the group stays unusable
        return "told"

    assert run_ranks(tmp_path, 3, work) == ["told", "told", "died"]


def test_a_rank_that_lives_but_never_comes_is_given_up(tmp_path: Path) -> None:
    def work(comm: ShmComm) -> None:
        if comm.rank == 0:
            comm._timeout_s = 0.05
            with pytest.raises(PeerLost, match="rank 1 has not joined"):
                comm.all_reduce(torch.ones(4))
        else:
            assert comm.receive() is None

    run_ranks(tmp_path, 2, work)


def test_a_group_that_stays_incomplete_names_the_missing_ranks(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match=r"ranks \[1\] did not join"):
        ShmComm(tmp_path / "comm", rank=0, size=2, timeout_s=0.05)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PeerLost, match="rank 0 does not listen"):
        ShmComm(tmp_path / "comm", rank=1, size=2, timeout_s=0.0)


def test_a_group_leaves_no_descriptor_and_no_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    run_ranks(tmp_path, 2, lambda comm: comm.all_reduce(torch.ones(3)), leave_together=True)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_killed_follower_is_noticed_in_the_middle_of_a_collective(tmp_path: Path) -> None:
    follower = start_rank("comm = comm_at(1); print('joined', flush=True); comm.receive()", tmp_path)
    comm = ShmComm(tmp_path / "comm", rank=0, size=2, timeout_s=30)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "joined\n"
    follower.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerLost, match="rank 1 is gone"):
        comm.all_reduce(torch.ones(4))
    assert time.monotonic() - began < 1
    follower.communicate()


def test_a_killed_leader_is_noticed_by_an_idle_follower(tmp_path: Path) -> None:
    """And an idle follower burns no time: it sleeps in a read."""
    leader = start_rank("comm = comm_at(0); comm.send(b'hello'); print(comm.rank, flush=True); input()", tmp_path)
    comm = ShmComm(tmp_path / "comm", rank=1, size=2, timeout_s=30)
    assert comm.receive() == b"hello"
    leader.send_signal(signal.SIGKILL)
    with pytest.raises(PeerLost, match="rank 0 is gone"):
        comm.receive()
    leader.communicate()


def test_a_single_rank_sums_nothing() -> None:
    comm = SingleComm()
    tensor = torch.ones(3)
    comm.all_reduce(tensor)
    assert tensor.tolist() == [1, 1, 1]
    assert comm.gather(tensor) == [tensor]
