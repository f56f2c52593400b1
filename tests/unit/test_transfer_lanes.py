"""One transfer's part on one link: what a receiving lane lets begin."""

from __future__ import annotations

import struct

import pytest

from baton.kv_layout import KVGeometry, KVLayout
from kvtransfer.api import TransferId
from kvtransfer.lanes import Landing, Misfit, ReceiveLane
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


def begin(lane: ReceiveLane, first_unit: int, num_units: int, *, is_fetched: bool) -> Landing | None:
    data = frame(first_unit, num_units)
    if is_fetched:
        return lane.begin(data, None)
    return lane.begin(data._replace(source_blocks=b""), num_units * lane.plan.unit_bytes[0])


@pytest.mark.parametrize("is_fetched", [True, False])
def test_units_that_began_to_come_do_not_begin_again(is_fetched: bool) -> None:
    """A second copy could land, with other bytes, after the first one's digest was made and its blocks put to use."""
    lane = accepted()
    assert begin(lane, 0, 2, is_fetched=is_fetched) is not None
    for again in ((0, 2), (1, 1), (1, 2)):
        with pytest.raises(Misfit, match="came twice"):
            begin(lane, *again, is_fetched=is_fetched)
    assert begin(lane, 2, 2, is_fetched=is_fetched) is not None


def test_units_that_are_in_place_are_dropped_when_they_come_again() -> None:
    lane = accepted()
    landing = lane.begin(frame(0, 2), None)
    assert landing is not None
    lane.landed(frame(0, 2), landing.num_bytes)
    assert lane.begin(frame(0, 2), None) is None
    with pytest.raises(Misfit, match="came twice"):
        lane.begin(frame(1, 2), None)
