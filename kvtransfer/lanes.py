"""One transfer's part on one link: what has been sent or received of it, and how much more may be. Pure.

A data frame covers a run of layers of one head size and a run of units, the same units of each layer. Its bytes are layer
by layer in the canonical order of kvtransfer.plan.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from baton.kv_layout import UNIT_TOKENS
from kvtransfer.api import TransferId
from kvtransfer.messages import MAX_NAMED_BLOCKS, NO_DIGEST, Data
from kvtransfer.plan import CopyPlan, Part, TableRuns

_MAX_CACHED_SOURCES: Final = 16
_STREAMED_BYTES: Final = 8 * 1024 * 1024
"""A larger transfer goes past the receiver's caches: several times what a core's own hold."""
_WINDOW_PARTS: Final = 4
"""A receiver returns credit when a quarter of the window is consumed; a sender's frame takes at most half of it."""


class Outgoing(NamedTuple):
    """One frame of KV to send: its digest is still to be filled in."""

    frame: Data
    parts: list[Part]
    """Source bytes."""
    num_bytes: int


class Landing(NamedTuple):
    """Where the bytes of one data frame belong."""

    parts: list[Part]
    """Destination bytes."""
    source_parts: list[Part] | None
    """Where the receiver fetches the bytes in the sender's pool. None: they come on the stream."""
    num_bytes: int
    is_streamed: bool
    """May be written past the caches."""


class Misfit(Exception):
    """A data frame contradicts the reservation."""


def least_window(plan: CopyPlan) -> int:
    """The smallest window with which a sender never waits for credit that the receiver keeps back."""
    return 2 * plan.max_unit_bytes


class SendLane:
    """What a sending rank has sent to one receiving rank.

    Every (layer, token) is handed out once, in frames of whole units; the last unit of the sequence ends with its
    last token, and the bytes after it are neither read nor sent.
    """

    def __init__(self, num_layers: int, block_table: Sequence[int], num_tokens: int) -> None:
        self._block_table = block_table
        self._num_tokens = num_tokens
        self._plan: CopyPlan | None = None
        self._runs: TableRuns | None = None
        self._window_bytes = 0
        self._bytes_credited = 0
        self._sent_tokens = [0] * num_layers
        self._ready: dict[int, None] = {}
        self.bytes_sent = 0
        self.is_accepted = False
        self.parts: list[Part] = []
        """Once accepted: source bytes of all that may be sent."""
        self.is_queued = False
        """In its link's round of lanes that may have a frame."""

    def connect(self, plan: CopyPlan) -> None:
        """The link is up."""
        self._plan = plan
        self._runs = TableRuns(plan.source_sides, plan.group_tokens, self._block_table)

    def accept(self, first_token: int, window_bytes: int) -> bool:
        """The receiver wants tokens from `first_token` on; False if what it says makes no sense."""
        assert self._plan is not None
        if window_bytes < least_window(self._plan):
            return False
        self.is_accepted = True
        self._window_bytes = window_bytes
        self._sent_tokens = [first_token] * len(self._sent_tokens)
        assert self._runs is not None
        self.parts = self._runs.prepare(first_token, self._num_tokens)
        return True

    def mark_ready(self, layer: int, sendable_tokens: int) -> None:
        """Tokens [0, sendable_tokens) of a layer may go out."""
        if not self.is_accepted or self._plan is None or not self._plan.unit_bytes[layer]:
            return
        if sendable_tokens > self._sent_tokens[layer]:
            self._ready[layer] = None

    @property
    def has_ready(self) -> bool:
        """Is something written that is not sent?"""
        return bool(self._ready)

    def credit(self, total_bytes: int) -> bool:
        """The receiver has consumed so many bytes since the beginning; False if more than were sent."""
        self._bytes_credited = max(self._bytes_credited, total_bytes)
        return total_bytes <= self.bytes_sent

    def next_frame(
        self, transfer_id: TransferId, sendable: Callable[[int], int], max_bytes: int, *, name_blocks: bool
    ) -> Outgoing | None:
        """The next frame; it counts as sent. None: nothing is ready or there is no credit for it."""
        plan, runs = self._plan, self._runs
        if not self._ready or plan is None or runs is None:
            return None
        max_bytes = min(max_bytes, self._window_bytes // 2)
        layer = next(iter(self._ready))
        first, limit = self._sent_tokens[layer], sendable(layer)
        end = plan.frame_end(layer, first, limit, max_bytes)
        if name_blocks:
            block_size = plan.source.geometry.block_size
            end = min(end, (first // block_size + MAX_NAMED_BLOCKS) * block_size)
        num_bytes = plan.num_bytes(layer, end - first)
        num_layers = 1
        while end == limit:  # neighbouring layers that are ready to the same token travel in one frame
            following = layer + num_layers
            if following not in self._ready or self._sent_tokens[following] != first or sendable(following) != end:
                break
            if plan.leaf_bytes(following) != plan.leaf_bytes(layer):
                break
            more = plan.num_bytes(following, end - first)
            if num_bytes + more > max_bytes:
                break
            num_bytes += more
            num_layers += 1
        if num_bytes > self._window_bytes - self.bytes_sent + self._bytes_credited:
            return None
        self.bytes_sent += num_bytes
        layers = range(layer, layer + num_layers)
        for number in layers:
            self._sent_tokens[number] = end
            if end == limit:
                del self._ready[number]
        blocks = self._name_blocks(first, end) if name_blocks else b""
        first_unit, end_unit = first // UNIT_TOKENS, -(-end // UNIT_TOKENS)
        ranks = plan.source.tp_rank, plan.destination.tp_rank
        frame = Data(transfer_id, *ranks, layer, num_layers, first_unit, end_unit - first_unit, NO_DIGEST, blocks)
        return Outgoing(frame, runs.parts(layers, first, end), num_bytes)

    def _name_blocks(self, first_token: int, end_token: int) -> bytes:
        assert self._plan is not None
        block_size = self._plan.source.geometry.block_size
        table = self._block_table[first_token // block_size : -(-end_token // block_size)]
        return struct.pack(f"<{len(table)}I", *table)


class ReceiveLane:
    """What a receiving rank has received from one source rank: a bitmap of units per layer, and credits."""

    def __init__(self, plan: CopyPlan) -> None:
        self.plan: Final = plan
        self.is_accepted = False
        self.parts: list[Part] = []
        """Once accepted: destination bytes of all that may come."""
        self.window_bytes = 0
        self.bytes_landed = 0
        self._bytes_begun = 0
        self._bytes_credited = 0
        self._bytes_expected = 0
        self._first_token = 0
        self._num_tokens = 0
        self._runs: TableRuns | None = None
        self._got: list[int] = []
        """Per layer: bit u is set when unit u is in place and verified."""
        self._begun: list[int] = []
        """The same for units that began to come, here or not: a second copy could land after the first one's digest is made."""
        self._full = 0
        self._sources: dict[tuple[int, int, bytes], TableRuns] = {}

    def accept(self, block_table: Sequence[int], num_tokens: int, first_token: int, window_bytes: int) -> None:
        """Blocks are granted: tokens [first_token, num_tokens) may come."""
        plan = self.plan
        self.is_accepted = True
        self.window_bytes = max(window_bytes, least_window(plan))
        self._runs = TableRuns(plan.destination_sides, plan.group_tokens, block_table)
        self.parts = self._runs.prepare(first_token, num_tokens)
        self._first_token, self._num_tokens = first_token, num_tokens
        self._got = [_mask(0, first_token // UNIT_TOKENS)] * len(plan.unit_bytes)
        self._begun = [0] * len(plan.unit_bytes)
        self._full = _mask(0, -(-num_tokens // UNIT_TOKENS))
        self._bytes_expected = sum(plan.num_bytes(i, num_tokens - first_token) for i in range(len(self._got)))

    @property
    def is_full(self) -> bool:
        """Is every unit of every layer that this source rank sends there?"""
        return self.is_accepted and all(
            got == self._full for got, unit_bytes in zip(self._got, self.plan.unit_bytes, strict=True) if unit_bytes
        )

    def begin(self, frame: Data, payload_bytes: int | None) -> Landing | None:
        """Where the bytes of a frame go; None: all its units are here, it is a repetition.

        `payload_bytes` is what the frame announced, None where the receiver fetches the bytes.

        Raises:
            Misfit: it is not what was reserved.
        """
        if not self.is_accepted:
            raise Misfit("data before the permission to send")
        plan, runs = self.plan, self._runs
        assert runs is not None
        first, end = self._tokens(frame)
        layers = range(frame.first_layer, frame.first_layer + frame.num_layers)
        if not layers or layers.stop > len(self._got) or not all(plan.unit_bytes[layer] for layer in layers):
            raise Misfit(f"no layers {frame.first_layer}+{frame.num_layers} on this link")
        if len({plan.leaf_bytes(layer) for layer in layers}) > 1:
            raise Misfit("layers of several head sizes in one frame")
        mask = _mask(frame.first_unit, frame.num_units)
        if any(self._begun[layer] & mask for layer in layers):
            if all(self._got[layer] & mask == mask for layer in layers):
                return None
            raise Misfit("some units came twice")
        num_bytes = sum([plan.num_bytes(layer, end - first) for layer in layers])
        if payload_bytes is not None and payload_bytes != num_bytes:
            raise Misfit(f"a payload of {payload_bytes} bytes where {num_bytes} are due")
        if self._bytes_begun + num_bytes > self._bytes_credited + self.window_bytes:
            raise Misfit("more bytes than credited")
        source_parts = None
        if payload_bytes is None:
            source = self._source_of(first, end, frame.source_blocks)
            source_parts = source.parts(layers, first, end)
        elif frame.source_blocks:
            raise Misfit("block ids on a stream")
        for layer in layers:
            self._begun[layer] |= mask
        self._bytes_begun += num_bytes
        is_streamed = self._bytes_expected > _STREAMED_BYTES
        return Landing(runs.parts(layers, first, end), source_parts, num_bytes, is_streamed)

    def landed(self, frame: Data, num_bytes: int) -> int | None:
        """The bytes are in place and verified. Answers the total to credit, when it is time."""
        mask = _mask(frame.first_unit, frame.num_units)
        for layer in range(frame.first_layer, frame.first_layer + frame.num_layers):
            self._got[layer] |= mask
        self.bytes_landed += num_bytes
        if self._bytes_credited + self.window_bytes >= self._bytes_expected:
            return None  # the sender may send all the rest
        if self.bytes_landed - self._bytes_credited < self.window_bytes // _WINDOW_PARTS:
            return None
        self._bytes_credited = self.bytes_landed
        return self.bytes_landed

    @property
    def is_expecting(self) -> bool:
        """Are bytes still to land?"""
        return self.bytes_landed < self._bytes_expected

    def _tokens(self, frame: Data) -> tuple[int, int]:
        """The frame's tokens [first, end); the last unit may be partial."""
        end_unit = -(-self._num_tokens // UNIT_TOKENS)
        first_unit = self._first_token // UNIT_TOKENS
        if not first_unit <= frame.first_unit < frame.first_unit + frame.num_units <= end_unit:
            raise Misfit(f"units {frame.first_unit}+{frame.num_units} are outside {first_unit}..{end_unit}")
        end = (frame.first_unit + frame.num_units) * UNIT_TOKENS
        return frame.first_unit * UNIT_TOKENS, min(end, self._num_tokens)

    def _source_of(self, first: int, end: int, source_blocks: bytes) -> TableRuns:
        """Where tokens [first, end) lie in the blocks that the sender names.

        Raises:
            Misfit: not as many as the tokens take, or not in its pool.
        """
        plan = self.plan
        found = self._sources.get((first, end, source_blocks))
        if found is None:
            blocks, first_block = _checked_blocks(plan, first, end, source_blocks)
            if len(self._sources) >= _MAX_CACHED_SOURCES:
                self._sources.clear()
            found = TableRuns(plan.source_sides, plan.group_tokens, blocks, first_block)
            self._sources[first, end, source_blocks] = found
        return found


def _checked_blocks(plan: CopyPlan, first: int, end: int, source_blocks: bytes) -> tuple[tuple[int, ...], int]:
    """The sender's blocks for tokens [first, end), and which of the sequence the first one is.

    Raises:
        Misfit: not as many as the tokens take, or not in its pool.
    """
    geometry = plan.source.geometry
    first_block = first // geometry.block_size
    num_blocks = -(-end // geometry.block_size) - first_block
    if len(source_blocks) != 4 * num_blocks:
        raise Misfit(f"{len(source_blocks)} bytes of block ids where {num_blocks} blocks are due")
    blocks = struct.unpack(f"<{num_blocks}I", source_blocks)
    if max(blocks) >= geometry.num_blocks:
        raise Misfit("a block id outside the sender's pool")
    return blocks, first_block


def _mask(first_unit: int, num_units: int) -> int:
    return ((1 << num_units) - 1) << first_unit
