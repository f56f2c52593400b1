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

    B sequences, each with T queries and S = blocks * block_size keys (T == 1 or B == 1).
    """

    tokens: Tensor  # [B * T] rows of the step's tokens
    blocks: Tensor  # [B * S / block_size] block ids; padding repeats a sequence's own first block
    last: Tensor  # [B] index into `blocks` of the block that holds each sequence's last token
    last_holds: Tensor  # [B, 1, 1, block_size, 1] bool: slots of that block that hold the sequence's tokens
    query_positions: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, S] bool: causal
    num_sequences: int


class ReferenceAttention:
    """Gathers each sequence's blocks and calls torch's scaled_dot_product_attention.

    A decode is padded to the next power of two of its own number of blocks, so its result does not depend on which
    other sequences share the step.
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
        decodes: dict[int, list[tuple[int, BatchEntry]]] = {}  # padded number of blocks -> (token row, entry)
        size = self._block_size
        for entry in entries:
            row, end = len(slots), entry.start + len(entry.token_ids)
            slots += [entry.block_table[p // size] * size + p % size for p in range(entry.start, end)]
            num_blocks = -(-end // size)
            if len(entry.token_ids) == 1:
                decodes.setdefault(1 << (num_blocks - 1).bit_length(), []).append((row, entry))
            else:
                self._groups.append(self._group([(row, entry)], num_blocks))
        self._groups += [self._group(members, width) for width, members in decodes.items()]
        self._slots = self._kv_rows(torch.tensor(slots, dtype=torch.int64))

    def _kv_rows(self, slots: Tensor) -> Tensor:
        """Rows of the pool seen as [.., head_dim], for the K of all tokens and heads, then for their V.

        row = ((block * 2 + half) * kv_heads + head) * block_size + offset
        """
        block, offset = slots // self._block_size, slots % self._block_size
        halves = torch.arange(2)[:, None, None]
        heads = torch.arange(self._kv_heads)
        rows = ((block[:, None] * 2 + halves) * self._kv_heads + heads) * self._block_size + offset[:, None]
        return rows.flatten().to(self._device)

    def _group(self, members: Sequence[tuple[int, BatchEntry]], width: int) -> _Group:
        size = self._block_size
        tokens: list[int] = []
        blocks: list[int] = []
        positions: list[list[int]] = []
        last: list[int] = []
        held: list[int] = []
        for row, entry in members:
            num_new = len(entry.token_ids)
            end = entry.start + num_new
            num_blocks = -(-end // size)
            last.append(len(blocks) + num_blocks - 1)
            held.append(end - (num_blocks - 1) * size)
            blocks += [*entry.block_table[:num_blocks], *[entry.block_table[0]] * (width - num_blocks)]
            tokens += range(row, row + num_new)
            positions.append(list(range(entry.start, end)))
        query_positions = torch.tensor(positions)
        mask = torch.arange(width * size) <= query_positions[:, None, :, None]
        holds = torch.arange(size)[:, None] < torch.tensor(held)[:, None, None, None, None]
        device = self._device
        return _Group(
            tokens=torch.tensor(tokens).to(device),
            blocks=torch.tensor(blocks).to(device),
            last=torch.tensor(last).to(device),
            last_holds=holds.to(device),
            query_positions=query_positions.to(device),
            mask=mask.to(device),
            num_sequences=len(members),
        )

    def write_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See AttentionBackend."""
        rows = torch.cat((key.reshape(-1, self._head_dim), value.reshape(-1, self._head_dim)))
        self._pool.layer(layer).view(-1, self._head_dim).index_copy_(0, self._slots, rows)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """See AttentionBackend."""
        out = torch.empty_like(query)
        for group in self._groups:
            out.index_copy_(0, group.tokens, self._attend(layer, query[group.tokens], group))
        return out

    def _attend(self, layer: int, query: Tensor, group: _Group) -> Tensor:
        batch, heads, dim = group.num_sequences, query.shape[1], self._head_dim
        num_keys = group.mask.shape[-1]
        gathered = self._pool.layer(layer).index_select(0, group.blocks)
        # What a block holds beyond its sequence may be another request's, or NaN, which no mask removes.
        gathered[group.last] = torch.where(group.last_holds, gathered[group.last], 0)
        kv = gathered.view(batch, -1, 2, self._kv_heads, self._block_size, dim)
        key, value = (kv[:, :, half].transpose(1, 2).reshape(batch, self._kv_heads, num_keys, dim) for half in (0, 1))

        mask = group.mask
        window = self._windows[layer]
        if window is not None and window < num_keys:
            oldest = group.query_positions[:, None, :, None] - window
            mask = mask & (torch.arange(num_keys, device=self._device) > oldest)
        if query.shape[0] == batch:  # one query each: the heads that share a KV head become its rows of queries
            packed = query.view(batch, self._kv_heads, heads // self._kv_heads, dim)
            return scaled_dot_product_attention(packed, key, value, attn_mask=mask).reshape(batch, heads, dim)
        rows = query.transpose(0, 1)[None]  # [1, heads, T, dim]
        out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)
