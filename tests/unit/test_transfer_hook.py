"""From the runner's layers to the transfer endpoint."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from baton.request import AttemptId
from engine.types import StepPlan
from kvtransfer.api import TransferId
from tests.support.fake_cuda import FakeCuda
from worker.hook import TransferHook


class Announcements:
    """The part of an endpoint that a hook uses."""

    def __init__(self) -> None:
        self.written_calls: list[tuple[Any, ...]] = []
        self.will_write_calls: list[tuple[Any, ...]] = []

    def written(self, *call: Any) -> None:
        self.written_calls.append(call)

    def will_write(self, *call: Any) -> None:
        self.will_write_calls.append(call)


class Entry:
    attempt_id = AttemptId("a")
    start = 16
    token_ids = (1, 2, 3)
    block_table = (5, 7)


def test_the_event_of_a_device_goes_along_with_every_layer() -> None:
    endpoint, cuda = Announcements(), FakeCuda()
    hook = TransferHook(endpoint)  # type: ignore[arg-type]
    hook.open(AttemptId("a"), TransferId(b"t" * 16))
    hook.step_begin(StepPlan(1, (Entry(),)))  # type: ignore[arg-type]
    event = cuda.write_later(cuda.allocate(4096), b"x")
    hook.layer_done(0, None)
    hook.layer_done(1, event)
    assert endpoint.written_calls == [(b"t" * 16, 0, 19, None), (b"t" * 16, 1, 19, event)]
    with pytest.raises(AssertionError):
        hook.layer_done(2, object())
    event.fire()
    cuda.end_process()


def test_the_endpoint_hears_of_every_write_before_it_happens() -> None:
    class Other(Entry):
        attempt_id = AttemptId("nobody's")
        start = 0
        block_table = (2,)

    class Plan:
        entries: ClassVar[list[Entry]] = [Entry(), Other()]

    endpoint = Announcements()
    hook = TransferHook(endpoint)  # type: ignore[arg-type]
    hook.step_begin(Plan())  # type: ignore[arg-type]
    assert endpoint.will_write_calls == [((5, 7), 16, 19), ((2,), 0, 3)]
