"""Sizes of the models that the engine bench runs, and the bytes and operations that their steps can not do without.

Pure arithmetic. A multiply and an add count as two operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

BF16_BYTES: Final = 2
INT8_BYTES: Final = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder whose head is its embedding."""

    name: str
    model_type: str
    """llama, or qwen3: with norms of q and k."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int = 4096

    @property
    def layer_params(self) -> int:
        """Weights of one layer's linears."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        output = self.num_heads * self.head_dim * self.hidden_size
        return qkv + output + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_params(self) -> int:
        """Weights of the head, which are those of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All linears; norms are left out."""
        return self.num_layers * self.layer_params + self.head_params

    def splits_over(self, tp_size: int) -> bool:
        """Can so many ranks share the heads?"""
        return self.num_heads % tp_size == 0 and self.num_kv_heads % tp_size == 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bf16, all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * BF16_BYTES

    def decode_bytes(self, batch: int, context: float, weight_bytes: int = BF16_BYTES) -> float:
        """What a decode step reads: every weight once, and the KV of `context` tokens of each sequence."""
        return self.num_params * weight_bytes + batch * context * self.kv_bytes_per_token

    def decode_flops(self, batch: int, context: float) -> float:
        """Operations of a decode step."""
        return batch * (2 * self.num_params + self._attention_flops(context))

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations from a prompt to its first token: causal attention, and the head for the last token only."""
        linears = 2 * self.num_layers * self.layer_params * num_tokens
        return linears + 2 * self.head_params + num_tokens * self._attention_flops((num_tokens + 1) / 2)

    def _attention_flops(self, context: float) -> float:
        """Of one query that sees `context` tokens: scores, and the weighted sum of values."""
        return self.num_layers * 2 * 2 * self.num_heads * self.head_dim * context

    def hf_config(self) -> dict[str, Any]:
        """What config.json of its Hugging Face directory says."""
        config: dict[str, Any] = {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
        }
        if self.model_type == "llama":
            config["mlp_bias"] = False
        return config


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("llama-135m", "llama", 30, 576, 9, 3, 64, 1536, 49152),
        Shape("qwen3-0.6b", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936),
        Shape("tiny", "llama", 2, 128, 4, 2, 32, 256, 1024),  # to try the bench itself; no target
    )
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the cores of an arm can do at best, measured in the same run."""

    read_bytes_per_s: float
    flops_per_s: float
    """In bf16."""

    def decode_floor_s(self, shape: Shape, batch: int, context: float, weight_bytes: int = BF16_BYTES) -> float:
        """The least time of a decode step: reading its bytes, or doing its operations, whichever is longer.

        int8 products are twice as fast as bf16 ones.
        """
        read_s = shape.decode_bytes(batch, context, weight_bytes) / self.read_bytes_per_s
        speed_up = BF16_BYTES / weight_bytes
        return max(read_s, shape.decode_flops(batch, context) / (self.flops_per_s * speed_up))

    def prefill_floor_s(self, shape: Shape, num_tokens: int) -> float:
        """The least time from a prompt to its first token."""
        read_s = shape.num_params * BF16_BYTES / self.read_bytes_per_s
        return max(read_s, shape.prefill_flops(num_tokens) / self.flops_per_s)
