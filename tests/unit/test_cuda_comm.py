"""GroupComm over gloo in threads: NCCL's process group has the same calls, and needs GPUs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.comm import Comm
from engine.cuda.comm import GroupComm
from tests.support.rank_threads import run_ranks

distributed: Any = torch.distributed
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def joined(control: Comm, path: Path) -> GroupComm:
    store = distributed.FileStore(str(path / "store"), control.size)
    return GroupComm(control, distributed.ProcessGroupGloo(store, control.rank, control.size, timedelta(seconds=20)))


def test_sums_gathers_and_messages_reach_every_rank(tmp_path: Path) -> None:
    def work(control: Comm) -> tuple[list[float], list[list[float]] | None, bytes | None]:
        comm = joined(control, tmp_path)
        tensor = torch.arange(3.0) + comm.rank
        comm.all_reduce(tensor)
        shards = comm.gather(torch.full((2,), float(comm.rank)))
        if comm.rank == 0:
            comm.send(b"plan")
        message = None if comm.rank == 0 else comm.receive()
        return tensor.tolist(), None if shards is None else [shard.tolist() for shard in shards], message

    leader, follower = run_ranks(tmp_path, 2, work, leave_together=True)
    assert leader == ([1.0, 3.0, 5.0], [[0.0, 0.0], [1.0, 1.0]], None)
    assert follower == ([1.0, 3.0, 5.0], None, b"plan")
