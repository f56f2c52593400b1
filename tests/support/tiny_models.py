"""Tiny random models in Hugging Face directories, made at test time. Wide weights make every KV block matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB_SIZE = 300
_STD = 0.12
_NORM_SCALE = {"qwen3": 2.5}  # q and k norms undo the width of the weights; this sharpens attention again


def make_model(directory: Path, family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a model of `family` with 4 query heads, 2 KV heads and head_dim 32; a pure function of the arguments."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if family == "mistral":
        settings["sliding_window"] = None
    config = AutoConfig.for_model(family, **(settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in sorted(model.named_parameters()):
            _fill(name, parameter.data, family)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def _fill(name: str, values: torch.Tensor, family: str) -> None:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        values.uniform_(0.8, 1.2).mul_(_NORM_SCALE[family])
    elif name.endswith("norm.weight"):
        values.uniform_(0.8, 1.2)
    else:
        values.normal_(0, _STD)


def load_reference(directory: Path) -> PreTrainedModel:
    """transformers' model of a directory, in the dtype of its weights. Its `generate` never stops early."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    return model


def reference_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Exactly `num_tokens` greedy tokens, eos ignored."""
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab_size] float32: what follows each token."""
    return model(torch.tensor([tokens])).logits[0].float()


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a directory's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def random_prompt(seed: int, length: int) -> list[int]:
    """Token ids from 2 on (0 and 1 are bos and eos)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
