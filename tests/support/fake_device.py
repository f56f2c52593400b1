"""A Device that is as late as it may be: work waits in a queue until somebody waits for an event behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FakeDevice:
    """Computes on the CPU. A copy reads its source when it is done, not when it is queued."""

    fp8_product_dtypes = ("float32", "bfloat16")

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.num_multiprocessors = 1
        self.num_captured = 0
        self._queue: list[Callable[[], None]] = []
        self._num_done = 0

    @property
    def num_queued(self) -> int:
        """Pieces of work that are not done."""
        return len(self._queue) - self._num_done

    def check_fp8(self) -> None:
        """See Device: it can."""

    def host_ints(self, count: int) -> Tensor:
        """See Device."""
        return torch.zeros(count, dtype=torch.int32)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See Device."""

        def work() -> None:
            target.copy_(source)

        self._queue.append(work)

    def run(self, work: Callable[[], None]) -> None:
        """See Device."""
        self._queue.append(work)

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        """See Device."""
        self.run(work)
        self.record().wait()
        self.num_captured += 1
        return FakeGraph(self, work)

    def record(self) -> FakeEvent:
        """See Device."""
        return FakeEvent(self, len(self._queue))

    def do_until(self, count: int) -> None:
        """Do the first `count` pieces of work, where they are not done."""
        while self._num_done < count:
            work = self._queue[self._num_done]
            self._num_done += 1
            work()

    def has_done(self, count: int) -> bool:
        """Are the first `count` pieces done?"""
        return self._num_done >= count


class FakeEvent:
    """Behind so many pieces of work."""

    def __init__(self, device: FakeDevice, count: int) -> None:
        self._device, self._count = device, count

    def wait(self) -> None:
        """Make the device catch up."""
        self._device.do_until(self._count)

    def query(self) -> bool:
        """See Event."""
        return self._device.has_done(self._count)


class FakeGraph:
    """The work itself."""

    def __init__(self, device: FakeDevice, work: Callable[[], None]) -> None:
        self._device, self._work = device, work

    def replay(self) -> None:
        """See Graph."""
        self._device.run(self._work)
