"""What the step runner needs of a device: one stream of work, events, graphs, copies. `CudaDevice` is torch.cuda's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import torch
from torch import Tensor

_cuda: Final[Any] = torch.cuda  # half of it has no types, and which half depends on the version


class CudaUnavailable(ValueError):
    """CUDA was asked for by name and can not compute here; the message says why."""


class Event(Protocol):
    """A point in the device's stream of work."""

    def wait(self) -> None:
        """Block the host until everything before this point is done."""
        ...

    def query(self) -> bool:
        """Is it? Does not block."""
        ...


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Queue it once more, on the same tensors."""
        ...


class Device(Protocol):
    """One stream: work is done in the order in which it was queued. Nothing here blocks, unless it says so."""

    torch_device: torch.device
    num_multiprocessors: int
    fp8_product_dtypes: Collection[str]
    """What its products of rows in fp8 can give."""

    def check_fp8(self) -> None:
        """Raises CudaUnavailable: it can not convert to fp8, or not multiply in it."""
        ...

    def host_ints(self, count: int) -> Tensor:
        """A tensor of zeros, [count] int32, in host memory that copies can use while the host goes on."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy between host and device. `source` must keep its content until the copy is done."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Queue what `work` computes."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` computes, after running it as a warm-up. Blocks. Its tensors are the graph's from then on."""
        ...

    def record(self) -> Event:
        """The present end of the queue."""
        ...


class CudaDevice:
    """A CUDA device and a stream of its own, on which the thread that makes it computes from then on.

    So what is allocated and filled on the way (weights, the pool, buffers) needs no other order than the stream's.
    """

    fp8_product_dtypes: Collection[str] = ("bfloat16",)  # of cuBLAS, where rows have scales

    def __init__(self, index: int = 0) -> None:
        """Raises CudaUnavailable: torch has no CUDA, the machine no device, or triton is missing."""
        if not _cuda.is_available():
            has_cuda = torch.version.cuda is not None
            raise CudaUnavailable(
                "device cuda: no CUDA device is usable here" if has_cuda else "device cuda: this torch has no CUDA"
            )
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise CudaUnavailable("device cuda: triton is not installed") from error
        self.torch_device = torch.device("cuda", index)
        _cuda.set_device(self.torch_device)
        self.num_multiprocessors: int = _cuda.get_device_properties(self.torch_device).multi_processor_count
        self._stream = _cuda.Stream(self.torch_device)
        _cuda.set_stream(self._stream)
        self._graph_memory: Any = None

    def check_fp8(self) -> None:
        """See Device."""
        major, minor = _cuda.get_device_capability(self.torch_device)
        if (major, minor) < (8, 9):
            raise CudaUnavailable(f"fp8 needs compute capability 8.9 or later; this device has {major}.{minor}")

    def host_ints(self, count: int) -> Tensor:
        """See Device."""
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See Device."""
        target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        """See Device."""
        work()

    def capture(self, work: Callable[[], None]) -> Graph:
        """See Device. All graphs share one pool of memory: capture the largest first."""
        for _ in range(2):  # compiles kernels and lets cuBLAS take its workspace, neither of which can be captured
            work()
        self._stream.synchronize()
        graph = _cuda.CUDAGraph()
        with _cuda.graph(graph, pool=self._graph_memory, stream=self._stream):
            work()
        self._graph_memory = self._graph_memory or graph.pool()
        return _CudaGraph(graph)

    def record(self) -> Event:
        """See Device."""
        event = _cuda.Event()
        event.record(self._stream)
        return _CudaEvent(event)


class _CudaEvent:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def query(self) -> bool:
        return bool(self._event.query())


class _CudaGraph:
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()
