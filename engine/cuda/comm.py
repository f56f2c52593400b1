"""Ranks of one replica on several GPUs: tensors go by NCCL, on the rank's own stream; messages as among CPU ranks."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.comm import Comm
from engine.cuda.device import CudaUnavailable

_TIMEOUT: Final = timedelta(seconds=60)


class GroupComm:
    """See engine.comm.Comm. Collectives are queued, not awaited, and may be captured in a graph.

    So a rank that dies is not noticed here: whoever waits for the step waits in vain, until the process that supervises
    the ranks ends them.
    """

    def __init__(self, control: Comm, group: Any) -> None:
        """`control` carries messages and is owned from here on; `group` is a torch.distributed process group."""
        self.rank, self.size = control.rank, control.size
        self._control, self._group = control, group

    def all_reduce(self, tensor: Tensor) -> None:
        """See Comm; does not block."""
        self._group.allreduce([tensor]).wait()  # NCCL's wait is the stream's, not the host's

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """See Comm; does not block."""
        everyones = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([everyones], [tensor]).wait()
        return [tensor, *everyones[1:]] if self.rank == 0 else None

    def send(self, message: bytes) -> None:
        """See Comm."""
        self._control.send(message)

    def receive(self) -> bytes | None:
        """See Comm."""
        return self._control.receive()

    def close(self) -> None:
        """See Comm."""
        self._control.close()


def nccl_comm(control: Comm, store_path: Path, device: str) -> GroupComm:
    """Join the ranks of `control`, each on a GPU of its own. Collective; `store_path` is a file that all can open.

    Raises:
        CudaUnavailable: there is no CUDA device.
        RuntimeError: NCCL is missing, or two ranks have the same GPU.
    """
    if not torch.cuda.is_available():
        raise CudaUnavailable("device cuda: no CUDA device is usable here")
    torch_device = torch.device(device)
    distributed: Any = torch.distributed
    store = distributed.FileStore(str(store_path), control.size)
    torch.cuda.set_device(torch_device)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    comm = GroupComm(control, distributed.ProcessGroupNCCL(store, control.rank, control.size, options))
    comm.all_reduce(torch.zeros(1, device=torch_device))  # connects the ranks; a captured collective could not
    torch.cuda.synchronize(torch_device)
    return comm
