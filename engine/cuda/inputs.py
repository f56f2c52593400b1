"""What a step is told, as one run of int32: packed on the host, copied at once, read on the device through views."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.cuda.device import Device, Event
from engine.sampler import LOWEST_TEMPERATURE, noise_key
from engine.types import PENDING, BatchEntry

Ints = npt.NDArray[np.int32]

_ALIGNMENT: Final = 4  # ints: Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes
_NUM_STAGING: Final = 3  # two steps under way and one that is being packed


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a step. `num_tiles` is 0 for a step of decodes alone; the others are padded to one of few sizes."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    num_tiles: int = 0


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Views on the device, int32 where nothing else is said. Padding has position and start -1."""

    tokens: Tensor  # [num_tokens]
    sources: Tensor  # [num_tokens]: the row of the last step whose token this is; -1: `tokens` says it
    positions: Tensor  # [num_tokens]
    token_seqs: Tensor  # [num_tokens]
    starts: Tensor  # [num_seqs]: position of the first new token
    num_new: Tensor  # [num_seqs]
    first_rows: Tensor  # [num_seqs + 1]: index of the first new token; at the end, the number of all
    table_begin: Tensor  # [num_seqs]
    rows: Tensor  # [num_rows]: tokens whose successor is sampled
    keys: Tensor  # [num_rows] int64: streams of noise
    temperatures: Tensor  # [num_rows] float64
    log_min_p: Tensor  # [num_rows] float64
    top_p: Tensor  # [num_rows] float64
    top_k: Tensor  # [num_rows]
    tile_seqs: Tensor  # [num_tiles]
    tile_begin: Tensor  # [num_tiles]
    tables: Tensor


_PER_TOKEN: Final = ("tokens", "sources", "positions", "token_seqs")
_PER_SEQ: Final = ("starts", "num_new", "table_begin")
_WIDE: Final = ("keys", "temperatures", "log_min_p", "top_p")  # per row, 8 bytes each


class InputBuffer:
    """Steps of up to `capacity`: one device buffer, and host buffers that take turns. Engine thread only.

    The host buffer of a step is not touched before the copy out of it is done.
    """

    def __init__(self, device: Device, capacity: Shape, num_table_ints: int) -> None:
        self.capacity, self.num_table_ints = capacity, num_table_ints
        self._device = device
        self._offsets: dict[str, int] = {}
        end = 0
        # what has 8 bytes comes first: it must lie on a multiple of 8
        for name, count in (
            *((name, 2 * capacity.num_rows) for name in _WIDE),
            *((name, capacity.num_tokens) for name in _PER_TOKEN),
            *((name, capacity.num_seqs) for name in _PER_SEQ),
            ("first_rows", capacity.num_seqs + 1),
            ("rows", capacity.num_rows),
            ("top_k", capacity.num_rows),
            ("tile_seqs", capacity.num_tiles),
            ("tile_begin", capacity.num_tiles),
            ("tables", num_table_ints),
        ):
            self._offsets[name] = end
            end += -(-count // _ALIGNMENT) * _ALIGNMENT
        self._staging: deque[tuple[Tensor, Event]] = deque(
            (device.host_ints(end), _Never()) for _ in range(_NUM_STAGING)
        )
        self._on_device = torch.zeros(end, dtype=torch.int32, device=device.torch_device)

    def tensors(self, shape: Shape) -> StepTensors:
        """Views of the first `shape` of everything; the same memory for every step."""

        def view(name: str, count: int) -> Tensor:
            return self._on_device[self._offsets[name] :][:count]

        return StepTensors(
            **{name: view(name, shape.num_tokens) for name in _PER_TOKEN},
            **{name: view(name, shape.num_seqs) for name in _PER_SEQ},
            first_rows=view("first_rows", shape.num_seqs + 1),
            rows=view("rows", shape.num_rows),
            top_k=view("top_k", shape.num_rows),
            keys=view("keys", 2 * shape.num_rows).view(torch.int64),
            **{name: view(name, 2 * shape.num_rows).view(torch.float64) for name in _WIDE[1:]},
            tile_seqs=view("tile_seqs", shape.num_tiles),
            tile_begin=view("tile_begin", shape.num_tiles),
            tables=view("tables", self.num_table_ints),
        )

    def clear(self) -> None:
        """Queue padding alone: a step of any size that changes no KV, and whose attention is zero everywhere."""

        def work() -> None:
            self._on_device.zero_()
            given = self.tensors(self.capacity)
            for field in (given.sources, given.positions, given.starts):
                field.fill_(-1)
            given.num_new.fill_(self.capacity.num_tokens)
            given.first_rows[-1:].fill_(self.capacity.num_tokens)

        self._device.run(work)

    def load(
        self,
        entries: Sequence[BatchEntry],
        shape: Shape,
        tables: Tables,
        sources: Sequence[int],
        tiles: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Pack a step, padded to `shape`, and queue its copy to the device.

        `sources` gives the row of the last step for each entry whose token is PENDING (any number for the others),
        `tiles` the sequence and first new token of each tile of a prefill.
        """
        staging, copied = self._staging.popleft()
        copied.wait()
        host = _HostView(staging.numpy(), self._offsets, shape)
        used = self._offsets["tables"] + host.pack(entries, sources, tiles, tables)
        self._device.copy(staging[:used], self._on_device[:used])
        self._staging.append((staging, self._device.record()))


class _Never:
    """The event of a buffer that no copy was made from."""

    def wait(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        """It is."""
        return True


class _HostView:
    def __init__(self, ints: Ints, offsets: dict[str, int], shape: Shape) -> None:
        self._ints, self._offsets, self._shape = ints, offsets, shape

    def _field(self, name: str, count: int) -> Ints:
        begin = self._offsets[name]
        return self._ints[begin : begin + count]

    def pack(
        self,
        entries: Sequence[BatchEntry],
        sources: Sequence[int],
        tiles: Sequence[tuple[int, int]],
        tables: Tables,
    ) -> int:
        """Fill everything; how many ints of block tables there are."""
        shape, count = self._shape, len(entries)
        tokens, source, positions, token_seqs = (self._field(name, shape.num_tokens) for name in _PER_TOKEN)
        starts, num_new, table_begin = (self._field(name, shape.num_seqs) for name in _PER_SEQ)
        first_rows = self._field("first_rows", shape.num_seqs + 1)
        starts[:count] = [entry.start for entry in entries]
        num_new[:count] = [len(entry.token_ids) for entry in entries]
        ends = np.cumsum(num_new[:count])
        num_tokens = int(ends[-1])
        first_rows[0], first_rows[1 : count + 1], first_rows[count + 1 :] = 0, ends, num_tokens
        if num_tokens == count:
            tokens[:count] = [entry.token_ids[0] for entry in entries]
        else:
            tokens[:num_tokens] = [token for entry in entries for token in entry.token_ids]
        seq_of = np.repeat(np.arange(count, dtype=np.int32), num_new[:count])
        token_seqs[:num_tokens] = seq_of
        positions[:num_tokens] = np.arange(num_tokens) + (starts[:count] - first_rows[:count])[seq_of]
        source[:num_tokens] = np.where(tokens[:num_tokens] == PENDING, np.asarray(sources, np.int32)[seq_of], -1)
        positions[num_tokens:] = starts[count:] = source[num_tokens:] = -1
        tokens[num_tokens:] = token_seqs[num_tokens:] = 0
        num_new[count:] = table_begin[count:] = 0
        self._pack_samples(entries, ends)
        if tiles:
            self._field("tile_seqs", len(tiles))[:] = [seq for seq, _ in tiles]
            self._field("tile_begin", len(tiles))[:] = [begin for _, begin in tiles]
        rows = tables.rows(entries)
        lengths = np.fromiter(map(len, rows), np.int32, count)
        table_ends = np.cumsum(lengths)
        table_begin[:count] = table_ends - lengths
        used = int(table_ends[-1])
        np.concatenate(rows, out=self._field("tables", used))
        return used

    def _pack_samples(self, entries: Sequence[BatchEntry], ends: npt.NDArray[np.integer[Any]]) -> None:
        num_rows = self._shape.num_rows
        rows = self._field("rows", num_rows)
        keys = self._field("keys", 2 * num_rows).view(np.int64)
        temperatures, log_min_p, top_p = (self._field(name, 2 * num_rows).view(np.float64) for name in _WIDE[1:])
        top_k = self._field("top_k", num_rows)
        rows[:], keys[:], temperatures[:] = 0, 0, 0.0
        log_min_p[:], top_p[:], top_k[:] = -math.inf, 1.0, 0
        row = 0
        for entry, end in zip(entries, ends.tolist(), strict=True):
            spec = entry.sample
            if spec is None:
                continue
            rows[row] = end - 1
            params = spec.params
            if params.temperature > 0:
                temperatures[row] = max(params.temperature, LOWEST_TEMPERATURE)
                keys[row] = noise_key(params.seed, params.sample_index, spec.position)
                if params.min_p > 0:
                    log_min_p[row] = math.log(params.min_p)
                top_p[row], top_k[row] = params.top_p, max(0, params.top_k)
            row += 1


class Tables:
    """Block tables as arrays, kept between steps: of a table that only grew, only what is new is converted."""

    def __init__(self, keep: int, num_blocks: int) -> None:
        """`keep`: about how many sequences to remember. `num_blocks`: of the pool."""
        self._keep, self._num_blocks = keep, num_blocks
        self._of: dict[str, tuple[Sequence[int], Ints, int]] = {}  # the table itself, its copy, and how much of it

    def rows(self, entries: Sequence[BatchEntry]) -> list[Ints]:
        """Each entry's table, [len(block_table)]; valid until the next call.

        Raises:
            ValueError: a table names a block that is not in the pool.
        """
        if len(self._of) > 2 * self._keep:
            names = {entry.attempt_id for entry in entries}
            self._of = {name: kept for name, kept in self._of.items() if name in names}
        return [self._row(entry) for entry in entries]

    def _row(self, entry: BatchEntry) -> Ints:
        table, length = entry.block_table, len(entry.block_table)
        made_from, row, filled = self._of.get(entry.attempt_id, (None, _EMPTY, 0))
        if made_from is not table or filled > length:  # a preempted sequence has a new list: the old one never changes
            filled = 0
        if filled < length:
            if length > len(row):
                grown = np.empty(length + max(16, length // 4), np.int32)
                grown[:filled] = row[:filled]
                row = grown
            new = np.asarray(table[filled:], np.int64)
            if new.min() < 0 or new.max() >= self._num_blocks:
                raise ValueError(f"{entry.attempt_id} names a block outside of 0..{self._num_blocks - 1}")
            row[filled:length] = new
            self._of[entry.attempt_id] = (table, row, length)
        return row[:length]


_EMPTY: Final[Ints] = np.empty(0, np.int32)
