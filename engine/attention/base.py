"""The interface of paged attention. A backend holds one rank's pool and the metadata of the step in progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.types import BatchEntry


class AttentionBackend(Protocol):
    """Writes KV into the pool and attends over it.

    One step is: `begin_step`, then for each layer in order `write_kv` and `attend`. The step's tokens are the new
    tokens of its entries, concatenated in the order of the plan; `num_tokens` is their number. Engine thread only.
    """

    def begin_step(self, entries: Sequence[BatchEntry]) -> None:
        """Compute what all layers of a step need: where its tokens go and which blocks each sequence reads."""
        ...

    def write_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the step's keys (rotated) and values, each [num_tokens, kv_heads, head_dim], in their blocks.

        On a CPU the bytes are in the pool when this returns.
        """
        ...

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Causal attention of the step's queries over all KV of their sequences, the step's own included.

        `query` is [num_tokens, heads, head_dim], rotated; so is the result. Query head h reads KV head
        h // (heads / kv_heads). A layer with a window w sees positions > p - w only. Bytes of the pool beyond a
        sequence's own tokens have no influence, whatever they hold.
        """
        ...
