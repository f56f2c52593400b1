"""Paged attention in plain torch: the oracle that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kv_pool import KVPool
from engine.types import BatchEntry


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences attended in one call: one prefill chunk, or decodes whose block tables are padded to one length.

    B sequences of `width` blocks each, with T queries and S = width * block_size keys (T == 1 or B == 1). A *row* is
    what one KV head stores of one half of one block: block_size * head_dim contiguous elements of the pool.
    """

    tokens: Tensor  # [B * T] indices into the step's tokens
    rows: Tensor  # [2 (K, V) * B * kv_heads * width] rows of the pool; padding repeats a sequence's first block
    last_rows: Tensor  # [2 * B * kv_heads] indices into `rows`: each sequence's last block
    last_holds: Tensor  # [2 * B * kv_heads, block_size, 1] bool: slots of that block that hold the sequence's tokens
    query_positions: Tensor  # [B, 1, T, 1]
    mask: Tensor  # [B, 1, T, S] bool: causal
    num_sequences: int


class ReferenceAttention:
    """Gathers each sequence's blocks and calls torch's scaled_dot_product_attention.

    A decode is padded by less than a quarter, to a length that its own number of blocks decides, so its result does
    not depend on which other sequences share the step.
    """

    def __init__(self, pool: KVPool, windows: Sequence[int | None]) -> None:
        """`windows`: per layer, how many of the last tokens a query sees (None: all)."""
        self._pool = pool
        self._windows = tuple(windows)
        _, _, self._kv_heads, self._block_size, self._head_dim = pool.layer(0).shape
        self._device = pool.layer(0).device
        self._slots = torch.empty(0, dtype=torch.int64)
        self._groups: list[_Group] = []

    def begin_step(self, entries: Sequence[BatchEntry]) -> None:
        """See AttentionBackend."""
        self._groups.clear()
        slots: list[int] = []  # block * block_size + offset, per token
        decodes: dict[int, list[tuple[int, BatchEntry]]] = {}  # width -> (index of the token, entry)
        size = self._block_size
        for entry in entries:
            first, end = len(slots), entry.start + len(entry.token_ids)
            slots += [entry.block_table[p // size] * size + p % size for p in range(entry.start, end)]
            num_blocks = -(-end // size)
            if len(entry.token_ids) == 1:
                decodes.setdefault(_padded(num_blocks), []).append((first, entry))
            else:
                self._groups.append(self._group([(first, entry)], num_blocks))
        self._groups += [self._group(members, width) for width, members in decodes.items()]
        self._slots = self._token_slots(torch.tensor(slots, dtype=torch.int64))

    def _token_slots(self, slots: Tensor) -> Tensor:
        """Where the step's new KV goes, in the pool seen as [.., head_dim]: K of all tokens and heads, then V.

        slot = ((block * 2 + half) * kv_heads + head) * block_size + offset
        """
        block, offset = slots // self._block_size, slots % self._block_size
        halves, heads = torch.arange(2)[:, None, None], torch.arange(self._kv_heads)
        return self._moved(
            (((block[:, None] * 2 + halves) * self._kv_heads + heads) * self._block_size + offset[:, None]).flatten()
        )

    def _group(self, members: Sequence[tuple[int, BatchEntry]], width: int) -> _Group:
        size = self._block_size
        tokens: list[int] = []
        blocks: list[list[int]] = []
        positions: list[list[int]] = []
        last: list[int] = []  # index of the last block in the sequence's table
        for first, entry in members:
            end = entry.start + len(entry.token_ids)
            num_blocks = -(-end // size)
            blocks.append([*entry.block_table[:num_blocks], *[entry.block_table[0]] * (width - num_blocks)])
            tokens += range(first, first + len(entry.token_ids))
            positions.append(list(range(entry.start, end)))
            last.append(num_blocks - 1)
        halves, heads = torch.arange(2)[:, None, None, None], torch.arange(self._kv_heads)[:, None]
        rows = (torch.tensor(blocks)[:, None] * 2 + halves) * self._kv_heads + heads  # [2, B, kv_heads, width]
        each = torch.arange(rows[..., 0].numel()).view(rows.shape[:-1]) * width  # [2, B, kv_heads]
        query_positions = torch.tensor(positions)[:, None, :, None]
        slots_held = query_positions[:, 0, -1] + 1 - torch.tensor(last)[:, None] * size  # [B, 1]
        holds = (torch.arange(size) < slots_held)[:, None].expand(*rows.shape[:-1], size)
        return _Group(
            tokens=self._moved(torch.tensor(tokens)),
            rows=self._moved(rows.flatten()),
            last_rows=self._moved((each + torch.tensor(last)[:, None]).flatten()),
            last_holds=self._moved(holds.reshape(-1, size, 1)),
            query_positions=self._moved(query_positions),
            mask=self._moved(torch.arange(width * size) <= query_positions),
            num_sequences=len(members),
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)

    def write_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See AttentionBackend."""
        new = torch.cat((key.reshape(-1, self._head_dim), value.reshape(-1, self._head_dim)))
        self._pool.layer(layer).view(-1, self._head_dim).index_copy_(0, self._slots, new)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """See AttentionBackend."""
        out = torch.empty_like(query)
        for group in self._groups:
            out.index_copy_(0, group.tokens, self._attend(layer, query[group.tokens], group))
        return out

    def _attend(self, layer: int, query: Tensor, group: _Group) -> Tensor:
        """[B * T, heads, head_dim] -> the same."""
        batch, heads, dim = group.num_sequences, query.shape[1], self._head_dim
        num_keys = group.mask.shape[-1]
        rows = self._pool.layer(layer).view(-1, self._block_size * dim).index_select(0, group.rows)
        # What a block holds beyond its sequence may be another request's, or NaN, which no mask removes.
        last = rows.view(-1, self._block_size, dim)
        last[group.last_rows] = torch.where(group.last_holds, last[group.last_rows], 0)
        key, value = rows.view(2, batch, self._kv_heads, num_keys, dim)

        mask = group.mask
        window = self._windows[layer]
        if window is not None and window < num_keys:
            mask = mask & (torch.arange(num_keys, device=self._device) > group.query_positions - window)
        if query.shape[0] == batch:  # one query each: the heads that share a KV head become its queries
            packed = query.view(batch, self._kv_heads, heads // self._kv_heads, dim)
            return scaled_dot_product_attention(packed, key, value, attn_mask=mask).reshape(batch, heads, dim)
        queries = query.transpose(0, 1)[None]  # [1, heads, T, dim]
        out = scaled_dot_product_attention(queries, key, value, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)


def _padded(num_blocks: int) -> int:
    """The next multiple of a quarter of the largest power of two in `num_blocks`."""
    step = max(1, (1 << (num_blocks.bit_length() - 1)) // 4)
    return -(-num_blocks // step) * step
