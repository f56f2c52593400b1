"""Reads a Hugging Face directory's config.json. Refuses by name whatever would change results; knows no weights.

Defaults of absent keys and the precedence of the many spellings of RoPE are those of transformers 5
(configuration_*.py and modeling_rope_utils.py of each model), because a config.json may leave them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from baton.kv_layout import kv_head_range


class ModelUnsupported(ValueError):
    """The model directory asks for something that this engine does not compute; the message names it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding as the model was trained with. Fields that a type does not use keep their defaults.

    `dynamic` NTK scaling (transformers) changes nothing below max_position_embeddings, and the runner computes no
    position beyond it, so it is read as `default`.
    """

    rope_type: str = "default"
    """default, linear, llama3 or yarn."""
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    """Tokens of context before scaling (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """Multiplies cos and sin (yarn); None: from `factor`, `mscale` and `mscale_all_dim`."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One dense decoder of the Llama family, as its weights expect it. Sizes are of the whole model, not of a rank."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """Per layer: a query sees the last so many tokens, itself included; None: all."""
    dtype: str
    """What the weights are stored in, as the config states it: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes, and its defaults for keys that a config.json may leave out."""

    qk_norm: bool = False
    qkv_bias: bool | None = False  # None: `attention_bias` decides
    output_bias: bool | None = False
    has_mlp_bias: bool = False  # `mlp_bias` counts
    head_dim: int | None = None
    num_kv_heads: int | None = None
    max_position_embeddings: int = 32768
    sliding_window: int | None = None
    windows_by_layer: bool = False  # use_sliding_window, max_window_layers and layer_types count


_FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family(qkv_bias=None, output_bias=None, has_mlp_bias=True, max_position_embeddings=2048),
    "MistralForCausalLM": _Family(num_kv_heads=8, max_position_embeddings=4096 * 32, sliding_window=4096),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, num_kv_heads=32, sliding_window=4096, windows_by_layer=True),
    "Qwen3ForCausalLM": _Family(
        qk_norm=True,
        qkv_bias=None,
        output_bias=None,
        head_dim=128,
        num_kv_heads=32,
        sliding_window=4096,
        windows_by_layer=True,
    ),
}
_ARCHITECTURE_OF_TYPE: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DTYPES: Final = ("float32", "bfloat16", "float16")


def check_split(config: ModelConfig, tp_size: int) -> None:
    """Raises ModelUnsupported if the model can not be split over `tp_size` ranks."""
    for count, what in ((config.num_heads, "attention heads"), (config.intermediate_size, "MLP columns")):
        if count % tp_size:
            raise ModelUnsupported(f"{count} {what} can not be split over {tp_size} ranks")
    try:
        kv_head_range(config.num_kv_heads, tp_size, 0)
    except ValueError as error:
        raise ModelUnsupported(str(error)) from error


def read_model_config(model_dir: str | Path) -> ModelConfig:
    """The model that `model_dir` holds.

    Raises:
        ModelUnsupported: no or a malformed config.json, or an option that this engine does not compute.
    """
    path = Path(model_dir) / "config.json"
    raw = _read_json(path)
    if raw is None:
        raise ModelUnsupported(f"{path} does not exist: not a Hugging Face model directory")
    return parse_model_config(raw, _read_json(Path(model_dir) / "generation_config.json") or {})


def parse_model_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The model that the contents of a config.json and a generation_config.json describe.

    Raises:
        ModelUnsupported: see `read_model_config`.
    """
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    _refuse_options(raw)
    num_heads = _size(raw, "num_attention_heads")
    hidden_size = _size(raw, "hidden_size")
    num_layers = _size(raw, "num_hidden_layers")
    max_position = _size(raw, "max_position_embeddings", family.max_position_embeddings)
    attention_bias = bool(raw.get("attention_bias", False))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(raw, family, num_heads),
        head_dim=_size(raw, "head_dim", family.head_dim or hidden_size // num_heads),
        max_position_embeddings=max_position,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=family.has_mlp_bias and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        rope=_rope(raw, max_position),
        windows=_windows(raw, family, num_layers),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(raw, generation),
    )
    if config.num_heads % config.num_kv_heads:
        raise ModelUnsupported(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ModelUnsupported(f"head_dim {config.head_dim} is odd; rotary embeddings need an even one")
    return config


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelUnsupported(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnsupported(f"{path} does not hold a JSON object")
    return content


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or [_ARCHITECTURE_OF_TYPE.get(str(raw.get("model_type")), raw.get("model_type"))]
    for architecture in named:
        if architecture in _FAMILIES:
            return str(architecture)
    raise ModelUnsupported(f"architecture {named[0]!r} is not supported; supported are {', '.join(_FAMILIES)}")


def _refuse_options(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelUnsupported(f"quantization_config ({method}) is not supported; use the unquantised model")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelUnsupported(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelUnsupported(f"{key} must be a positive integer, not {value!r}")
    return value


def _num_kv_heads(raw: Mapping[str, Any], family: _Family, num_heads: int) -> int:
    if "num_key_value_heads" in raw:
        return _size(raw, "num_key_value_heads", num_heads)
    return family.num_kv_heads or num_heads


def _dtype(raw: Mapping[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ModelUnsupported(f"dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}")
    return dtype


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(int(token) for token in eos) if isinstance(eos, list) else (int(eos),)


def _windows(raw: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """Which layers see only the last tokens (Mistral: all or none; Qwen: by layer_types or max_window_layers)."""
    window = raw.get("sliding_window", family.sliding_window)
    if family.windows_by_layer and not raw.get("use_sliding_window", False):
        window = None
    if family.sliding_window is None:  # Llama ignores the key
        window = None
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise ModelUnsupported(f"sliding_window must be a positive integer or null, not {window!r}")

    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28) if family.windows_by_layer else 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    slides = {"sliding_attention": True, "full_attention": False}
    if len(layer_types) != num_layers or not set(layer_types) <= set(slides):
        raise ModelUnsupported(f"layer_types {sorted(set(layer_types))} for {num_layers} layers is not supported")
    wanted = tuple(window if slides[kind] else None for kind in layer_types)
    if not family.windows_by_layer and wanted != (window,) * num_layers:
        raise ModelUnsupported(f"layer_types contradicts sliding_window {window!r}")
    if window is None and any(slides[kind] for kind in layer_types):
        raise ModelUnsupported("layer_types names sliding_attention, but no sliding_window is in use")
    return wanted


def _rope(raw: Mapping[str, Any], max_position: int) -> RopeConfig:
    """transformers' precedence: `rope_scaling`, then `rope_parameters`; the outer rope_theta fills in."""
    params: dict[str, Any] = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = str(params.get("rope_type", params.get("type", "default")))
    theta = params.get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta", 10000.0)
    if params.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ModelUnsupported("partial_rotary_factor other than 1 is not supported")
    if any(isinstance(value, dict) for value in params.values()):
        raise ModelUnsupported("rope parameters per layer type are not supported")

    if rope_type in ("default", "dynamic"):
        return RopeConfig(theta=float(theta))
    if rope_type == "linear":
        return RopeConfig(rope_type, float(theta), _rope_float(params, "factor"))
    if rope_type not in ("llama3", "yarn"):
        raise ModelUnsupported(
            f"rope type {rope_type!r} is not supported; supported are default, linear, dynamic, llama3 and yarn"
        )
    original = raw.get("original_max_position_embeddings")
    if original is None:
        original = params.get("original_max_position_embeddings", max_position)
    if rope_type == "llama3":
        return RopeConfig(
            rope_type,
            float(theta),
            _rope_float(params, "factor"),
            int(original),
            low_freq_factor=_rope_float(params, "low_freq_factor"),
            high_freq_factor=_rope_float(params, "high_freq_factor"),
        )
    attention_factor = params.get("attention_factor")
    return RopeConfig(
        rope_type,
        float(theta),
        _rope_float(params, "factor", max_position / original),
        int(original),
        attention_factor=None if attention_factor is None else float(attention_factor),
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        mscale=float(params.get("mscale") or 0),
        mscale_all_dim=float(params.get("mscale_all_dim") or 0),
        truncate=bool(params.get("truncate", True)),
    )


def _rope_float(params: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = params.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelUnsupported(f"rope parameter {key} must be a number, not {value!r}")
    return float(value)
