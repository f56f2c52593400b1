"""What config.json says, compared with what transformers reads from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rope import RotaryEmbedding, inverse_frequencies
from engine.model_config import ModelUnsupported, parse_model_config, read_model_config

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def raw(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json with nothing but what it must have, and `changes`."""
    return {"architectures": [ARCHITECTURES[family]], "model_type": family, **SIZES, **changes}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_absent_keys_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw(family)))
    ours, theirs = read_model_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128 // 32)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.rope_type == theirs.rope_parameters["rope_type"]
    assert ours.windows == (theirs.sliding_window if family == "mistral" else None,) * 3
    assert ours.qkv_bias == (family == "qwen2")
    assert ours.qk_norm == (family == "qwen3")


@pytest.mark.parametrize(
    ("spelling", "max_position"),
    [
        ({}, 2048),
        ({"rope_theta": 5e5}, 2048),
        ({"rope_theta": 5e5, "rope_scaling": None}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 2e4}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2048),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "rope_theta": 5e5}, 131072),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 8192),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 40, "rope_theta": 1e6}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e6, "attention_factor": 1.25}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_slow": 2}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}}, 4096),
    ],
)
def test_every_spelling_of_rope_gives_the_angles_of_transformers(
    spelling: dict[str, Any], max_position: int, tmp_path: Path
) -> None:
    """Bit for bit: frequencies, scale, and cos and sin of positions near and far."""
    config = raw(head_dim=64, max_position_embeddings=max_position, **spelling)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    rope = read_model_config(tmp_path).rope
    inv_freq, scale = inverse_frequencies(rope, 64)
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert scale == theirs.attention_scaling

    positions = torch.tensor([0, 1, 17, max_position // 2, max_position - 1])
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = theirs(torch.empty(0, dtype=dtype), positions[None])
        ours = RotaryEmbedding(rope, 64).cos_sin(positions, dtype)
        assert torch.equal(ours[0][:, 0], cos[0])
        assert torch.equal(ours[1][:, 0], sin[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ],
)
def test_what_would_change_results_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=named):
        parse_model_config(raw() | changes, {})


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 64}, (None, None, None)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 64}, (64, 64, 64)),
        ("qwen2", {"sliding_window": 64}, (None, None, None)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 64)),
        (
            "qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (64, None, 64),
        ),
    ],
)
def test_windows_are_those_of_transformers(
    family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert parse_model_config(raw(family, **changes), {}).windows == windows


def test_windows_that_contradict_each_other_are_refused() -> None:
    sliding = ["sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(ModelUnsupported, match="layer_types contradicts sliding_window"):
        parse_model_config(raw("mistral", sliding_window=64, layer_types=sliding), {})
    with pytest.raises(ModelUnsupported, match="no sliding_window is in use"):
        parse_model_config(raw("qwen2", layer_types=sliding), {})


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, (8, 9)),
        ({"eos_token_id": [1, 2]}, {"temperature": 0.6}, (1, 2)),
        ({}, {}, ()),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_eos_is_that_of_generation_config_if_it_has_one(
    in_config: dict[str, Any], in_generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert parse_model_config(raw(**in_config), in_generation).eos_token_ids == expected


@pytest.mark.parametrize(("stored", "dtype"), [({}, "float32"), ({"torch_dtype": "bfloat16"}, "bfloat16")])
def test_dtype_has_two_spellings(stored: dict[str, Any], dtype: str) -> None:
    assert parse_model_config(raw(**stored), {}).dtype == dtype


def test_a_directory_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelUnsupported, match="not valid JSON"):
        read_model_config(tmp_path)
