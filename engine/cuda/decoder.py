"""The decoder of engine.models, computed with fused kernels: same weights, same sharding, same roundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.comm import Comm
from engine.cuda.buckets import num_splits
from engine.cuda.device import Device
from engine.cuda.flash import PromptAttention
from engine.cuda.fp8 import Fp8Linear, Fp8Linears, kv_scales
from engine.cuda.inputs import StepTensors
from engine.cuda.kernels.attention import decode_attention, prefill_attention, prefill_rows
from engine.cuda.kernels.fused import add_rms_norm, add_rms_norm_fp8, silu_mul, write_qkv
from engine.kv_pool import FP8, KVPool
from engine.layers.linear import Linear, TorchLinears
from engine.model_config import ModelConfig
from engine.models.decoder import Decoder
from engine.weights import WeightSource


@dataclass(frozen=True, slots=True)
class FreshPrompts:
    """The last sequences of a step whose new tokens begin at position 0: how many, their tokens, and the longest."""

    num_seqs: int
    num_tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step's inputs. Its first `num_decodes` sequences have one new token each, the others are prompt chunks.

    Those chunks that `tensors` has tiles for attend over the pool; `fresh` are the rest, which need not.
    """

    tensors: StepTensors
    num_decodes: int
    samples_all: bool
    """Does every token's successor get sampled, in order? Then `tensors.rows` is not read."""
    fresh: FreshPrompts | None = None


@dataclass(frozen=True, slots=True)
class _Fresh:
    """Fresh prompts on their way through the layers."""

    first: int  # row of their first token
    longest: int
    bounds: Tensor  # [num_seqs + 1] int32: rows from `first` on
    keys: Tensor  # [num_tokens of the step, kv_heads, head_dim]: rotated, of the layer at hand


class FusedDecoder(Decoder):
    """One rank's shard on CUDA, and its pool. What a step computes depends on no host value, so a graph can hold it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        comm: Comm,
        pool: KVPool,
        device: Device,
        fp8: bool = False,
        prompt_attention: PromptAttention | None = None,
    ) -> None:
        """See Decoder. Takes cosines and sines of every position, too: max_positions * head_dim * itemsize bytes.

        With `fp8` the weights of the layers are kept and multiplied in it (engine.cuda.fp8); the head's are not.
        Without `prompt_attention` no step may have fresh prompts.
        """
        linears = Fp8Linears() if fp8 else TorchLinears()
        super().__init__(config, weights, dtype=dtype, comm=comm, linears=linears, device=device.torch_device)
        self._pool = pool
        self._kv_scales = kv_scales(weights, config.num_layers, is_fp8=pool.layer(0).dtype == FP8)
        self._prompt_attention = prompt_attention
        self._num_multiprocessors = device.num_multiprocessors
        positions = torch.arange(config.max_position_embeddings, device=device.torch_device)
        half = config.head_dim // 2
        cos, sin = self._rope.cos_sin(positions, dtype)
        self._cos_sin = torch.stack((cos[:, 0, :half], sin[:, 0, :half]), dim=1).contiguous()

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._layers)

    @property
    def takes_fresh_prompts(self) -> bool:
        """May a step have any?"""
        return self._prompt_attention is not None

    def tokens_per_tile(self) -> int:
        """New tokens of a prompt chunk that one tile of attention computes."""
        group = int(self._num_heads // self._num_kv_heads)
        return prefill_rows(group, self._config.head_dim, self._dtype) // group

    def compute(self, step: Step, last_tokens: Tensor, kv_written: Callable[[int], None]) -> Tensor | None:
        """As `Decoder.forward`, but logits are in the model's dtype, and tokens may come from `last_tokens`.

        `kv_written(layer)` is called when the layer's KV is queued to be written. `last_tokens` is int32.
        """
        given, eps = step.tensors, self._config.rms_norm_eps
        fed = last_tokens[given.sources.clamp(min=0)]
        hidden = self._embedding[torch.where(given.sources >= 0, fed, given.tokens)]
        delta: Tensor | None = None
        fresh = None if step.fresh is None else self._fresh(step.fresh, given, hidden)
        for index, layer in enumerate(self._layers):
            qkv = _after_norm(layer.qkv, hidden, delta, layer.input_norm, eps)
            norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
            query = write_qkv(
                qkv,
                self._pool.layer(index),
                norms,
                self._cos_sin,
                given.positions,
                given.token_seqs,
                given.tables,
                given.table_begin,
                eps=eps,
                kv_scales=self._kv_scales[index],
                keys=None if fresh is None else fresh.keys,
            )
            kv_written(index)
            attended = layer.output(self._attended(index, query, qkv, step, fresh).view(len(query), -1))
            self._comm.all_reduce(attended)
            delta = layer.down(silu_mul(_after_norm(layer.gate_up, hidden, attended, layer.post_norm, eps)))
            self._comm.all_reduce(delta)
        if len(given.rows) == 0:
            return None
        if not step.samples_all:
            assert delta is not None
            hidden, delta = hidden[given.rows], delta[given.rows]
        shards = self._comm.gather(self._head(add_rms_norm(hidden, delta, self._norm, eps)))
        if shards is None:
            return None
        logits = shards[0] if len(shards) == 1 else torch.cat(shards, dim=-1)  # they may be 100 MB: no copy of one
        return logits[:, : self._config.vocab_size]

    def _fresh(self, fresh: FreshPrompts, given: StepTensors, hidden: Tensor) -> _Fresh:
        first_rows = given.first_rows[-fresh.num_seqs - 1 :]
        keys = hidden.new_empty(len(hidden), self._num_kv_heads, self._config.head_dim)
        return _Fresh(len(hidden) - fresh.num_tokens, fresh.longest, first_rows - first_rows[0], keys)

    def _attended(self, index: int, query: Tensor, qkv: Tensor, step: Step, fresh: _Fresh | None) -> Tensor:
        given, window = step.tensors, self._config.windows[index]
        pool = self._pool.layer(index)
        out = torch.empty_like(query)
        if fresh is not None:
            assert self._prompt_attention is not None
            first = fresh.first
            value = qkv.view(len(qkv), -1, self._config.head_dim)[first:, -self._num_kv_heads :]
            attended = self._prompt_attention(
                query[first:], fresh.keys[first:], value, fresh.bounds, fresh.longest, window
            )
            if first == 0:
                return attended
            out[first:] = attended
        if step.num_decodes:
            decodes = slice(0, step.num_decodes)
            decode_attention(
                query[decodes],
                pool,
                given.starts[decodes],
                given.tables,
                given.table_begin[decodes],
                window=window,
                num_splits=num_splits(step.num_decodes, self._num_kv_heads, self._num_multiprocessors),
                out=out[decodes],
                kv_scales=self._kv_scales[index],
            )
        if len(given.tile_seqs):
            prefill_attention(
                query,
                pool,
                (given.tile_seqs, given.tile_begin),
                (given.first_rows, given.starts, given.num_new),
                given.tables,
                given.table_begin,
                window=window,
                out=out,
                kv_scales=self._kv_scales[index],
            )
        return out


def _after_norm(linear: Linear, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """`linear` of `add_rms_norm`; the norm leaves fp8 where that is what it takes."""
    if isinstance(linear, Fp8Linear):
        return linear.product(*add_rms_norm_fp8(hidden, delta, norm, eps))
    return linear(add_rms_norm(hidden, delta, norm, eps))
