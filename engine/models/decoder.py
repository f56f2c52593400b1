"""One decoder definition for the Llama family (Llama, Mistral, Qwen2, Qwen3), device-blind and tensor-parallel.

Computes what transformers' modeling_{llama,mistral,qwen2,qwen3}.py compute, on a flat batch of tokens. Knows no
sequences (attention does), no sampling and no transfers.

Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053, section 3): each rank has a run of query
heads with the KV heads they read and a run of MLP columns; the two row-parallel linears of a layer end in a sum over
ranks. The embedding is replicated; the output head is split by vocabulary and gathered on the leader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from baton.kv_layout import kv_head_range
from engine.attention.base import AttentionBackend
from engine.comm import Comm
from engine.layers.linear import Linear, LinearBackend, TorchLinears
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryEmbedding, rotate
from engine.model_config import ModelConfig
from engine.weights import WeightSource

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its checkpoint name, with its full shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, hidden),
        _HEAD: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (q, hidden, config.qkv_bias),
            "self_attn.k_proj": (kv, hidden, config.qkv_bias),
            "self_attn.v_proj": (kv, hidden, config.qkv_bias),
            "self_attn.o_proj": (hidden, q, config.output_bias),
            "mlp.gate_proj": (inner, hidden, config.mlp_bias),
            "mlp.up_proj": (inner, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, inner, config.mlp_bias),
        }
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes |= dict.fromkeys(kv_scale_names(layer), (1,))
    return shapes


def kv_scale_names(layer: int) -> tuple[str, str]:
    """What multiplies a layer's keys and values that are stored in fp8, [1] each; nothing else reads them."""
    k_scale, v_scale = (f"model.layers.{layer}.{name}" for name in _KV_SCALES)
    return k_scale, v_scale


def optional_tensors(config: ModelConfig) -> frozenset[str]:
    """Names that a checkpoint may leave out: scales of KV, and the output head, if the embedding serves as one."""
    scales = {name for layer in range(config.num_layers) for name in kv_scale_names(layer)}
    return frozenset(scales | {_HEAD}) if config.tie_word_embeddings else frozenset(scales)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear  # rows: this rank's query heads, then its key heads, then its value heads
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear  # rows: this rank's gate columns, then its up columns
    down: Linear


class Decoder:
    """One rank's shard of the model. Immutable after construction; one step at a time."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        comm: Comm,
        linears: LinearBackend,
        device: torch.device | None = None,
    ) -> None:
        """Copy this rank's slices out of `weights`, converted to `dtype`. `check_split` has passed.

        `linears` prepares those of the layers, not the head.
        """
        self._config = config
        self._comm = comm
        self._dtype = dtype
        self._rope = RotaryEmbedding(config.rope, config.head_dim, device)
        loader = _ShardLoader(config, weights, dtype, comm, linears, device)
        self._num_heads = loader.heads.stop - loader.heads.start
        self._num_kv_heads = len(loader.kv_heads)
        self._embedding = loader.vector(_EMBEDDING)
        self._layers = [loader.layer(index) for index in range(config.num_layers)]
        self._norm = loader.vector("model.norm.weight")
        self._head = loader.head(self._embedding)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        attention: AttentionBackend,
        kv_written: Callable[[int], None],
    ) -> Tensor | None:
        """Compute one step and leave its KV in the pool.

        `token_ids` and `positions` are [num_tokens] int64; `logit_rows` [num_rows] names the tokens whose successor
        is sampled. `kv_written(layer)` is called when the layer's KV of all tokens is in the pool, before the layer's
        attention. Collective: all ranks call it with equal arguments.

        Returns logits [num_rows, vocab_size] in float32 on the leader; None on followers, and if there are no rows.
        """
        hidden = self._embedding[token_ids]
        cos, sin = self._rope.cos_sin(positions, self._dtype)
        for index, layer in enumerate(self._layers):
            hidden = hidden + self._attend(index, layer, hidden, cos, sin, attention, kv_written)
            hidden = hidden + self._mlp(layer, hidden)
        if logit_rows.numel() == 0:
            return None
        logits = self._head(rms_norm(hidden[logit_rows], self._norm, self._config.rms_norm_eps))
        shards = self._comm.gather(logits)
        if shards is None:
            return None
        return torch.cat(shards, dim=-1)[:, : self._config.vocab_size].float()

    def _attend(
        self,
        index: int,
        layer: _Layer,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBackend,
        kv_written: Callable[[int], None],
    ) -> Tensor:
        config = self._config
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, config.rms_norm_eps))
        heads = qkv.view(len(qkv), -1, config.head_dim)
        query, key, value = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = rms_norm(query, layer.q_norm, config.rms_norm_eps)
            key = rms_norm(key, layer.k_norm, config.rms_norm_eps)
        attention.write_kv(index, rotate(key, cos, sin), value)
        kv_written(index)
        attended = attention.attend(index, rotate(query, cos, sin))
        out = layer.output(attended.reshape(len(qkv), -1))
        self._comm.all_reduce(out)
        return out

    def _mlp(self, layer: _Layer, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up(rms_norm(hidden, layer.post_norm, self._config.rms_norm_eps)).chunk(2, dim=-1)
        out = layer.down(silu(gate) * up)
        self._comm.all_reduce(out)
        return out


class _ShardLoader:
    """Reads one rank's part of each tensor and merges what is computed together."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype,
        comm: Comm,
        linears: LinearBackend,
        device: torch.device | None,
    ) -> None:
        rank, size = comm.rank, comm.size
        self._config, self._weights, self._dtype = config, weights, dtype
        self._linears, self._device, self._rank, self._size = linears, device, rank, size
        self.heads = _even_run(config.num_heads, rank, size)
        self.kv_heads = kv_head_range(config.num_kv_heads, size, rank)

    def layer(self, index: int) -> _Layer:
        prefix = f"model.layers.{index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        dim = self._config.head_dim
        q, kv = _scaled(self.heads, dim), _scaled(self.kv_heads, dim)
        inner = _even_run(self._config.intermediate_size, self._rank, self._size)
        return _Layer(
            input_norm=self.vector(prefix + "input_layernorm.weight"),
            qkv=self._column_parallel([(attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)]),
            q_norm=self.vector(attn + "q_norm.weight") if self._config.qk_norm else None,
            k_norm=self.vector(attn + "k_norm.weight") if self._config.qk_norm else None,
            output=self._row_parallel(attn + "o_proj", q),
            post_norm=self.vector(prefix + "post_attention_layernorm.weight"),
            gate_up=self._column_parallel([(mlp + "gate_proj", inner), (mlp + "up_proj", inner)]),
            down=self._row_parallel(mlp + "down_proj", inner),
        )

    def vector(self, name: str) -> Tensor:
        """A tensor that every rank holds whole."""
        return self._own(self._weights.read(name))

    def head(self, embedding: Tensor) -> Linear:
        """This rank's run of the vocabulary, the last ones padded with zero rows so that all have one length.

        A tied model uses its embedding, unless the checkpoint has a head of its own (as transformers 5 does). The head
        is never quantised: its errors would be the logits'.
        """
        vocab = self._config.vocab_size
        per_rank = -(-vocab // self._size)
        rows = slice(min(self._rank * per_rank, vocab), min((self._rank + 1) * per_rank, vocab))
        has_own = _HEAD in self._weights
        weight = self._own(self._weights.read(_HEAD, rows)) if has_own else embedding[rows]
        missing = per_rank - len(weight)
        if missing:
            weight = torch.cat((weight, weight.new_zeros(missing, weight.shape[1])))
        return TorchLinears().prepare(weight, None)

    def _column_parallel(self, parts: Sequence[tuple[str, slice]]) -> Linear:
        """One linear of the named rows of several."""
        merged = [
            torch.cat([self._weights.read(name + kind, rows) for name, rows in parts]).to(self._device, self._dtype)
            for kind in (".weight", ".bias")
            if parts[0][0] + kind in self._weights
        ]
        return self._linears.prepare(merged[0], merged[1] if len(merged) == 2 else None)

    def _row_parallel(self, name: str, columns: slice) -> Linear:
        """A linear whose outputs are summed over ranks, so only the leader adds the bias."""
        weight = self._own(self._weights.read(name + ".weight", slice(None), columns))
        bias = None
        if self._rank == 0 and name + ".bias" in self._weights:
            bias = self._own(self._weights.read(name + ".bias"))
        return self._linears.prepare(weight, bias)

    def _own(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in this rank's dtype and on its device: the file it came from may change or go away."""
        return tensor.to(self._device, self._dtype, copy=True).contiguous()


def _even_run(count: int, rank: int, size: int) -> slice:
    return slice(rank * count // size, (rank + 1) * count // size)


def _scaled(heads: range | slice, head_dim: int) -> slice:
    """The rows of a run of heads."""
    return slice(heads.start * head_dim, heads.stop * head_dim)
