"""Makes the model directories of the engine bench: seeded random weights in bf16. Run as a program, for torch's sake.

    python -m bench.engine_model SHAPE DIRECTORY        # with a tokenizer, so that `baton serve DIRECTORY` works

The weights keep activations near 1 in every layer, so that no kernel meets zeros, infinities or denormals.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.engine_shapes import SHAPES, Shape
from bench.tokenizer import write_tokenizer

_SEED = 0


def write_model(shape: Shape, directory: Path) -> None:
    """A Hugging Face directory without a tokenizer; config.json comes last and says that all is there."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {}
    for name, size in _sizes(shape):
        if len(size) == 1:
            values = torch.empty(size).uniform_(0.8, 1.2, generator=generator)
        else:
            std = 0.02 if "embed" in name else size[1] ** -0.5
            values = torch.empty(size).normal_(0, std, generator=generator)
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (shape.num_heads * dim, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (shape.num_kv_heads * dim, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (shape.num_kv_heads * dim, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, shape.num_heads * dim)
        if shape.model_type == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (dim,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


if __name__ == "__main__":
    wanted, target = SHAPES[sys.argv[1]], Path(sys.argv[2])
    write_model(wanted, target)
    write_tokenizer(wanted.vocab_size, target)
