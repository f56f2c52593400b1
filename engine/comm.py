"""What the ranks of one replica say to each other: plans from the leader, sums and gathers of tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PeerLost(RuntimeError):
    """Another rank of this replica died, closed or fell silent; the replica can not go on."""


class Comm(Protocol):
    """A group of `size` ranks; rank 0 is the leader. Collectives are called by all ranks in the same order.

    Engine thread only.
    """

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` (contiguous) by its sum over ranks; every rank gets the same bits. Blocks.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every rank's `tensor` (contiguous, one shape), by rank, on the leader; None on followers. May block.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def send(self, message: bytes) -> None:
        """Leader: hand a message to all followers. Blocks only while their socket buffers are full.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def receive(self) -> bytes | None:
        """Follower: the leader's next message; None when the leader has closed. Blocks without spinning.

        Raises:
            PeerLost: the leader is gone without closing.
        """
        ...

    def close(self) -> None:
        """Leave the group and free what it shares. Idempotent."""
        ...


class SingleComm:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum is the tensor itself."""

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """See Comm."""
        return [tensor]

    def send(self, message: bytes) -> None:
        """There is nobody to hear it."""

    def receive(self) -> bytes | None:
        """There is no leader to hear."""
        return None

    def close(self) -> None:
        """See Comm."""
