"""One transfer's part on one link: what a receiving lane lets begin."""

from __future__ import annotations

import struct

import pytest

from baton.kv_layout import KVGeometry, KVLayout
from kvtransfer.api import TransferId
from kvtransfer.lanes import Misfit, ReceiveLane
from kvtransfer.messages import NO_DIGEST, Data
from kvtransfer.plan import plan_copies
from tests.support.transfer import MODEL

LAYOUT = KVLayout(MODEL, KVGeometry(1, 16, 64), 0)


def accepted() -> ReceiveLane:
    lane = ReceiveLane(plan_copies(LAYOUT, LAYOUT))
    lane.accept([0, 1, 2, 3], 64, 0, 2**20)
    return lane


def frame(first_unit: int, num_units: int) -> Data:
    blocks = struct.pack(f"<{num_units}I", *range(first_unit, first_unit + num_units))
    return Data(TransferId(bytes(16)), 0, 0, 0, 1, first_unit, num_units, NO_DIGEST, blocks)


def test_units_that_are_being_fetched_are_not_fetched_again() -> None:
    """A second copy could end, with other bytes, after the first one was verified and its blocks put to use."""
    lane = accepted()
    assert lane.begin(frame(0, 2), None) is not None
    for again in (frame(0, 2), frame(1, 1), frame(1, 2)):
        with pytest.raises(Misfit, match="came twice"):
            lane.begin(again, None)
    assert lane.begin(frame(2, 2), None) is not None


def test_units_that_are_in_place_are_dropped_when_they_come_again() -> None:
    lane = accepted()
    landing = lane.begin(frame(0, 2), None)
    assert landing is not None
    lane.landed(frame(0, 2), landing.num_bytes)
    assert lane.begin(frame(0, 2), None) is None
    with pytest.raises(Misfit, match="came twice"):
        lane.begin(frame(1, 2), None)
