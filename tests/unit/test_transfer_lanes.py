"""One transfer's part on one link: what a sending lane puts into a frame, and what a receiving lane lets begin."""

from __future__ import annotations

import struct

import pytest

from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.api import TransferId
from kvtransfer.lanes import Landing, Misfit, Outgoing, ReceiveLane, SendLane
from kvtransfer.messages import MAX_NAMED_BLOCKS, NO_DIGEST, SMALL_BODY_BYTES, Data, encode_body
from kvtransfer.plan import FRAME_BYTES, plan_copies
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


THIN = ModelKV((LayerSpec(1, 8),) * 2, "float8_e4m3fn", "thin")
"""16 bytes per token and layer, so that a frame could name more blocks than a body holds."""


def sent(num_blocks: int, block_size: int, first_token: int, *, name_blocks: bool) -> list[Outgoing]:
    """All frames of a sequence that fills its blocks."""
    num_tokens = num_blocks * block_size
    layout = KVLayout(THIN, KVGeometry(1, block_size, num_blocks), 0)
    lane = SendLane(2, range(num_blocks), num_tokens)
    lane.connect(plan_copies(layout, layout))
    assert lane.accept(first_token, 8 * FRAME_BYTES)
    for layer in range(2):
        lane.mark_ready(layer, num_tokens)
    frames = []
    while lane.has_ready:
        outgoing = lane.next_frame(TransferId(bytes(16)), lambda _: num_tokens, FRAME_BYTES, name_blocks=name_blocks)
        assert outgoing is not None
        frames.append(outgoing)
    return frames


@pytest.mark.parametrize(("block_size", "first_token"), [(16, 0), (32, 16)])
def test_a_frame_names_no_more_blocks_than_its_body_holds(block_size: int, first_token: int) -> None:
    [whole] = sent(MAX_NAMED_BLOCKS, block_size, first_token, name_blocks=True)
    largest = whole.frame._replace(**dict.fromkeys(Data._fields[1:7], 2**32 - 1))
    assert SMALL_BODY_BYTES - 128 < len(encode_body(largest)) <= SMALL_BODY_BYTES

    frames = sent(MAX_NAMED_BLOCKS + 1, block_size, first_token, name_blocks=True)
    assert [len(frame.source_blocks) // 4 for frame, _, _ in frames] == 2 * [MAX_NAMED_BLOCKS, 1]
    layout = KVLayout(THIN, KVGeometry(1, block_size, MAX_NAMED_BLOCKS + 1), 0)
    num_tokens = (MAX_NAMED_BLOCKS + 1) * block_size
    lane = ReceiveLane(plan_copies(layout, layout))
    lane.accept(range(MAX_NAMED_BLOCKS + 1), num_tokens, first_token, 8 * FRAME_BYTES)
    for frame, _, num_bytes in frames:
        landing = lane.begin(frame, None)
        assert landing is not None
        assert landing.num_bytes == num_bytes
        lane.landed(frame, num_bytes)
    assert lane.is_full


@pytest.mark.parametrize(("num_blocks", "is_streamed"), [(16_384, False), (16_385, True)], ids=["8 MiB", "more"])
def test_what_no_core_s_cache_holds_goes_past_it(num_blocks: int, is_streamed: bool) -> None:
    layout = KVLayout(THIN, KVGeometry(1, 16, num_blocks), 0)
    lane = ReceiveLane(plan_copies(layout, layout))
    lane.accept(range(num_blocks), num_blocks * 16, 0, 8 * FRAME_BYTES)
    [outgoing] = sent(num_blocks, 16, 0, name_blocks=False)
    landing = lane.begin(outgoing.frame, outgoing.num_bytes)
    assert landing is not None
    assert landing.is_streamed is is_streamed


def test_a_frame_on_a_stream_names_no_blocks_and_may_have_more() -> None:
    [outgoing] = sent(MAX_NAMED_BLOCKS + 1, 16, 0, name_blocks=False)
    assert outgoing.frame.num_layers == 2
    assert outgoing.frame.num_units == (MAX_NAMED_BLOCKS + 1) * 16 // UNIT_TOKENS
