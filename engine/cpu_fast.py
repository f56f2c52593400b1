"""A decoder step on the CPU kernels: packs one rank's weights once, then turns a batch into flat arrays and one call.

Computes what engine.models.decoder with ReferenceAttention computes, with the same roundings; knows no sampling.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kv_layout import KVLayout, kv_head_range
from engine.comm import Comm, ShmComm
from engine.kernels.build import Isa, KernelsUnavailable
from engine.kernels.library import (
    PANEL,
    PHASES,
    LayerDesc,
    Library,
    LossCallback,
    Memory,
    ModelDesc,
    PackedLinear,
    SharedGroup,
    StepDesc,
    ThreadPool,
    load,
    packed_bytes,
)
from engine.kv_pool import KVPool
from engine.layers.rope import RotaryEmbedding
from engine.model_config import ModelConfig
from engine.types import BatchEntry
from engine.weights import WeightSource

log = logging.getLogger(__name__)

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_HALF_PANEL: Final = 16
_LOST: Final = -2
_FIRST_POSITIONS: Final = 2048
_MAX_HEAD_DIM: Final = 256
_MAX_GROUP: Final = 512

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Greedy:
    """The likeliest token of each row that samples; of equals the first. `logits` is NaN or infinite where any is."""

    token_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]


def unsupported(config: ModelConfig, comm: Comm) -> str | None:
    """Why the kernels can not compute this model on this group of ranks; None if they can."""
    if config.head_dim % 32 or config.head_dim > _MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of 32 up to {_MAX_HEAD_DIM}"
    if config.num_heads // config.num_kv_heads > _MAX_GROUP:
        return f"{config.num_heads} heads share {config.num_kv_heads} KV heads"
    if comm.size > 1 and not isinstance(comm, ShmComm):
        return f"ranks that talk by {type(comm).__name__} share no memory"
    return None


class FastDecoder:
    """One rank's shard of the model in packed form, its threads, and its view of the pool. Engine thread only."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        comm: Comm,
        pool: KVPool,
        layout: KVLayout,
        int8: bool = False,
        num_threads: int = 1,
        cores: Sequence[int] | None = None,
        isa: Isa | None = None,
    ) -> None:
        """Pack this rank's slices out of `weights`. `int8` quantises all linears (W8A8, dynamic), the head too.

        Raises:
            KernelsUnavailable: no compiler, or a model that the kernels do not compute.
        """
        reason = unsupported(config, comm)
        if reason is not None:
            raise KernelsUnavailable(reason)
        self.library: Library = load(isa)
        self._config, self._dtype, self._comm = config, dtype, comm
        self._block_size, self._num_blocks = layout.geometry.block_size, layout.geometry.num_blocks
        self._rope = RotaryEmbedding(config.rope, config.head_dim)
        self._cos_sin = torch.empty(0)
        self._threads = ThreadPool(self.library, num_threads, cores)
        self._tables = _TableCache(config.max_position_embeddings, self._block_size, self._num_blocks)
        self._pool = pool
        self._group = None if comm.size == 1 else _Group(comm)
        packer = _Packer(self.library, config, weights, dtype, comm, int8)
        self._weights = packer.weights  # keeps alive what the descriptors point to
        self._num_heads = packer.num_heads
        self._head_rows = packer.head.num_outputs
        self._layer_descs = (LayerDesc * config.num_layers)(*packer.layers)
        for index, desc in enumerate(self._layer_descs):
            desc.pool = pool.layer(index).data_ptr()
            desc.window = config.windows[index] or 0
        self._desc = ModelDesc(
            is_bf16=int(dtype == torch.bfloat16),
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=packer.num_heads,
            num_kv_heads=packer.num_kv_heads,
            head_dim=config.head_dim,
            block_size=self._block_size,
            num_head_outputs=packer.num_head_tokens,
            eps=config.rms_norm_eps,
            scale=1 / math.sqrt(config.head_dim),
            embedding=packer.embedding.data_ptr(),
            final_norm=packer.final_norm.data_ptr(),
            head=packer.head.desc,
            layers=self._layer_descs,
            group=None if self._group is None else ctypes.pointer(self._group.desc),
        )
        self._model: int | None = self.library.c.baton_model_create(byref(self._desc), self._threads.handle)

    def logits(self, entries: Sequence[BatchEntry], kv_written: Callable[[int], None] | None) -> Tensor | None:
        """Run a step; logits [num_rows, vocab_size] float32 of the entries that sample, on the leader.

        None on followers, and if no entry samples. `kv_written(layer)` is called as soon as the KV of a layer is in
        the pool. Collective.

        Raises:
            PeerLost: another rank is gone.
        """
        step = self._step(entries)
        stride = -(-self._head_rows // PANEL) * PANEL
        logits = torch.empty(step.num_rows, stride)
        step.logits = logits.data_ptr()
        self._run(step, kv_written)
        if step.num_rows == 0:
            return None
        shards = self._comm.gather(logits[:, : self._head_rows].contiguous())
        if shards is None:
            return None
        return torch.cat(shards, dim=-1)[:, : self._config.vocab_size]

    def greedy(self, entries: Sequence[BatchEntry], kv_written: Callable[[int], None] | None) -> Greedy | None:
        """As `logits`, but only the best of each row, which spares writing the logits down."""
        step = self._step(entries)
        index, value = np.empty(step.num_rows, np.int32), np.empty(step.num_rows, np.float32)
        step.best_index, step.best_value = index.ctypes.data, value.ctypes.data
        self._run(step, kv_written)
        if step.num_rows == 0:
            return None
        if self._group is None:
            return Greedy(index.astype(np.int64), value)
        shards = self._comm.gather(torch.from_numpy(np.stack((index.astype(np.float64), value.astype(np.float64)))))
        return None if shards is None else _merged([shard.numpy() for shard in shards], self._head_rows)

    def phases(self, *, on: bool) -> dict[str, float]:
        """Seconds in each kind of work since the last call, all layers together; timing is on from then if `on`."""
        seconds = (ctypes.c_double * len(PHASES))()
        self.library.c.baton_model_phases(self._model, int(on), seconds)
        return dict(zip(PHASES, seconds, strict=True))

    def close(self) -> None:
        """Free threads, weights and buffers. Idempotent."""
        if getattr(self, "_model", None) is not None:
            self.library.c.baton_model_destroy(self._model)
            self._model = None
            del self._weights, self._layer_descs, self._desc, self._threads, self._pool

    def __del__(self) -> None:
        self.close()

    def _step(self, entries: Sequence[BatchEntry]) -> StepDesc:
        count = len(entries)
        arrays = np.empty((4, count), np.int32)
        starts, num_new, table_begin, ends = arrays
        starts[:] = [entry.start for entry in entries]
        num_new[:] = [len(entry.token_ids) for entry in entries]
        np.cumsum(num_new, out=ends)
        num_tokens = int(ends[-1])
        if num_tokens == count:
            tokens = np.array([entry.token_ids[0] for entry in entries], np.int32)
        else:
            tokens = np.array([token for entry in entries for token in entry.token_ids], np.int32)
        table_begin[:] = self._tables.rows(entries)
        table_begin *= self._tables.width
        rows = ends[[entry.sample is not None for entry in entries]] - 1
        step = StepDesc(
            num_tokens=num_tokens,
            num_seqs=count,
            num_rows=len(rows),
            token_ids=tokens.ctypes.data,
            starts=starts.ctypes.data,
            num_new=num_new.ctypes.data,
            tables=self._tables.address,
            table_begin=table_begin.ctypes.data,
            rows=rows.ctypes.data,
            cos_sin=self._angles(int((starts + num_new).max())),
        )
        self._arrays = (arrays, tokens, rows)  # alive until the next step
        return step

    def _angles(self, num_positions: int) -> int:
        """Address of cosines and sines [>= num_positions][head_dim], as the reference rounds them."""
        if num_positions > len(self._cos_sin):
            size = max(_FIRST_POSITIONS, 1 << (num_positions - 1).bit_length())
            size = min(size, self._config.max_position_embeddings)
            half = self._config.head_dim // 2
            cos, sin = self._rope.cos_sin(torch.arange(size), self._dtype)
            self._cos_sin = torch.cat((cos[:, 0, :half], sin[:, 0, :half]), dim=1).float().contiguous()
        return self._cos_sin.data_ptr()

    def _run(self, step: StepDesc, kv_written: Callable[[int], None] | None) -> None:
        assert self._model is not None, "the decoder is closed"
        num_layers = self._config.num_layers
        if kv_written is None:
            self._run_segments(step, 0, num_layers + 1)
            return
        for segment in range(num_layers + 1):
            self._run_segments(step, segment, segment + 1)
            if segment < num_layers:
                kv_written(segment)

    def _run_segments(self, step: StepDesc, first: int, end: int) -> None:
        if self._group is not None:
            self._group.begin()
        status = self.library.c.baton_model_run(self._model, byref(step), first, end)
        if self._group is not None:
            self._group.end()
        if status == _LOST:
            assert self._group is not None
            raise self._group.lost or RuntimeError("a rank is lost")
        if status:
            raise MemoryError(f"a step of {step.num_tokens} tokens")


class _TableCache:
    """Block tables of the sequences that run, as rows of one array, checked and written only where they changed.

    A table is compared with what its row was made from: a list of the same objects compares at the speed of memory.
    """

    def __init__(self, max_positions: int, block_size: int, num_blocks: int) -> None:
        self._max_width = -(-max_positions // block_size)
        self._num_blocks = num_blocks
        self.width = 64
        self._rows: Ints = np.zeros((64, self.width), np.int32)
        self._row_of: dict[str, int] = {}
        self._made_from: list[list[int]] = [[] for _ in range(64)]
        self._free = list(range(64))

    @property
    def address(self) -> int:
        """Of [row][width] int32; changes with `rows`."""
        return int(self._rows.ctypes.data)

    def rows(self, entries: Sequence[BatchEntry]) -> list[int]:
        """The row of each entry's table.

        Raises:
            ValueError: a table names a block that is not in the pool.
        """
        needed = max(len(entry.block_table) for entry in entries)
        if needed > self.width or len(entries) > len(self._rows):
            self._grow(needed, len(entries))
        if len(self._free) < len(entries):
            self._forget_others(entries)
        found = []
        for entry in entries:
            row = self._row_of.get(entry.attempt_id)
            if row is None:
                row = self._row_of[entry.attempt_id] = self._free.pop()
            if self._made_from[row] != entry.block_table and self._made_from[row] != list(entry.block_table):
                self._write(row, entry.block_table)
            found.append(row)
        return found

    def _write(self, row: int, table: Sequence[int]) -> None:
        values = np.array(table, np.int64)
        if len(values) and (values.min() < 0 or values.max() >= self._num_blocks):
            raise ValueError(f"a block table names a block outside of 0..{self._num_blocks - 1}")
        self._rows[row, : len(values)] = values
        self._made_from[row] = list(table)

    def _forget_others(self, entries: Sequence[BatchEntry]) -> None:
        """Rows of sequences that are not in this step are free again."""
        keep = {entry.attempt_id for entry in entries}
        self._row_of = {name: row for name, row in self._row_of.items() if name in keep}
        used = set(self._row_of.values())
        self._free = [row for row in range(len(self._rows)) if row not in used]

    def _grow(self, width: int, count: int) -> None:
        self.width = min(max(self.width, 1 << (width - 1).bit_length()), max(self._max_width, width))
        self._rows = np.zeros((max(len(self._rows), 2 * count), self.width), np.int32)
        self._row_of.clear()
        self._made_from = [[] for _ in range(len(self._rows))]
        self._free = list(range(len(self._rows)))


class _Group:
    """The C side of a ShmComm: the two take turns on one count of pieces."""

    def __init__(self, comm: Comm) -> None:
        assert isinstance(comm, ShmComm)
        self._comm = comm
        self.lost: Exception | None = None
        self._callback = LossCallback(self._is_lost)
        self.desc = SharedGroup(comm.address, comm.rank, comm.size, comm.slot_bytes, 0, self._callback)

    def begin(self) -> None:
        self._comm.check_open()
        self.desc.num_pieces = self._comm.num_pieces

    def end(self) -> None:
        self._comm.num_pieces = self.desc.num_pieces

    def _is_lost(self, rank: int, waited_s: float) -> int:
        try:
            self._comm.check_peers(rank, waited_s)
        except Exception as error:  # it can not pass through C: `lost` carries it
            self.lost = error
            return 1
        return 0


class _Packer:
    """Reads one rank's part of each tensor, merges what is computed together, and packs it in the order of use."""

    def __init__(
        self,
        library: Library,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype,
        comm: Comm,
        int8: bool,
    ) -> None:
        self._library, self._config, self._source, self._dtype = library, config, weights, dtype
        self._rank, self._size, self._int8 = comm.rank, comm.size, int8
        rank, size = comm.rank, comm.size
        self._heads = slice(rank * config.num_heads // size, (rank + 1) * config.num_heads // size)
        self._kv_heads = kv_head_range(config.num_kv_heads, size, rank)
        self._inner = slice(rank * config.intermediate_size // size, (rank + 1) * config.intermediate_size // size)
        self.num_heads = self._heads.stop - self._heads.start
        self.num_kv_heads = len(self._kv_heads)
        vocab = config.vocab_size
        per_rank = -(-vocab // size)
        vocab_rows = slice(min(rank * per_rank, vocab), min((rank + 1) * per_rank, vocab))
        self.num_head_tokens = vocab_rows.stop - vocab_rows.start

        self._arena = Memory(library, self._arena_bytes(per_rank))
        self._used_bytes = 0
        self.weights: list[object] = [self._arena]
        self.embedding = self._read(_EMBEDDING).to(dtype, copy=True).contiguous()
        self.final_norm = self._norm("model.norm.weight")
        self.weights += [self.embedding, self.final_norm]
        self.layers = [self._layer(index) for index in range(config.num_layers)]
        head = self._read(_HEAD, vocab_rows) if _HEAD in weights else self.embedding[vocab_rows]
        self.head = self._pack(head.to(dtype), num_outputs=per_rank)

    def _arena_bytes(self, head_rows: int) -> int:
        config, dim = self._config, self._config.head_dim
        q, kv, inner = self.num_heads * dim, self.num_kv_heads * dim, self._inner.stop - self._inner.start
        hidden = config.hidden_size
        shapes = [(q + 2 * kv, hidden), (hidden, q), (_interleaved(inner), hidden), (hidden, inner)]
        dtype = torch.int8 if self._int8 else self._dtype
        layer = sum(packed_bytes(self._library, dtype, *shape) for shape in shapes)
        return layer * config.num_layers + packed_bytes(self._library, dtype, head_rows, hidden)

    def _layer(self, index: int) -> LayerDesc:
        prefix = f"model.layers.{index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        dim = self._config.head_dim
        q = slice(self._heads.start * dim, self._heads.stop * dim)
        kv = slice(self._kv_heads.start * dim, self._kv_heads.stop * dim)
        inner = self._inner.stop - self._inner.start
        # gate i and up i are 16 columns apart in one panel, so that one block of sums holds both.
        gate = torch.arange(inner) // _HALF_PANEL * PANEL + torch.arange(inner) % _HALF_PANEL
        norms = [self._norm(prefix + name + ".weight") for name in ("input_layernorm", "post_attention_layernorm")]
        head_norms = [
            self._norm(attn + name + ".weight") if self._config.qk_norm else None for name in ("q_norm", "k_norm")
        ]
        self.weights += [*norms, *head_norms]
        qkv = self._column_parallel([(attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)])
        output = self._row_parallel(attn + "o_proj", q)
        gate_up = self._column_parallel(
            [(mlp + "gate_proj", self._inner), (mlp + "up_proj", self._inner)],
            order=torch.cat((gate, gate + _HALF_PANEL)),
            num_outputs=_interleaved(inner),
        )
        down = self._row_parallel(mlp + "down_proj", self._inner)
        return LayerDesc(
            qkv.desc,
            output.desc,
            gate_up.desc,
            down.desc,
            *(norm.data_ptr() for norm in norms),
            *(None if norm is None else norm.data_ptr() for norm in head_norms),
        )

    def _read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return self._source.read(name, rows, columns)

    def _norm(self, name: str) -> Tensor:
        """A vector as the kernels want it: rounded to this model's dtype, float32, padded with zeros."""
        vector = self._read(name).to(self._dtype).float()
        return torch.nn.functional.pad(vector, (0, -len(vector) % PANEL))

    def _column_parallel(
        self, parts: Sequence[tuple[str, slice]], *, order: Tensor | None = None, num_outputs: int | None = None
    ) -> PackedLinear:
        merged = [
            torch.cat([self._read(name + kind, rows) for name, rows in parts]).to(self._dtype)
            for kind in (".weight", ".bias")
            if parts[0][0] + kind in self._source
        ]
        bias = merged[1] if len(merged) == 2 else None
        return self._pack(merged[0], bias, order=order, num_outputs=num_outputs)

    def _row_parallel(self, name: str, columns: slice) -> PackedLinear:
        """A linear whose outputs are summed over ranks, so only the leader adds the bias."""
        weight = self._read(name + ".weight", slice(None), columns).to(self._dtype)
        has_bias = self._rank == 0 and name + ".bias" in self._source
        return self._pack(weight, self._read(name + ".bias").to(self._dtype) if has_bias else None)

    def _pack(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        order: Tensor | None = None,
        num_outputs: int | None = None,
    ) -> PackedLinear:
        assert self._arena.address is not None
        packed = PackedLinear(
            self._library,
            weight,
            bias,
            int8=self._int8,
            order=order,
            num_outputs=num_outputs,
            address=self._arena.address + self._used_bytes,
        )
        self._used_bytes += packed.num_bytes
        assert self._used_bytes <= self._arena.num_bytes
        self.weights.append(packed)
        return packed


def _interleaved(inner: int) -> int:
    """Packed outputs of gate and up of `inner` columns each."""
    return -(-inner // _HALF_PANEL) * PANEL


def _merged(shards: Sequence[npt.NDArray[np.float64]], rows_per_rank: int) -> Greedy:
    """The best over ranks of [index, value] x [num_rows]; of equals the first. NaN wins."""
    values = np.stack([shard[1] for shard in shards])
    rank = np.argmax(values, axis=0)  # the first maximum; NaN counts as one
    columns = np.arange(values.shape[1])
    index = np.stack([shard[0] for shard in shards])[rank, columns] + rank * rows_per_rank
    return Greedy(index.astype(np.int64), values[rank, columns].astype(np.float32))
