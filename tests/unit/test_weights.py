"""Reading checkpoints, and the fingerprint that stands for them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import weights
from engine.model_config import ModelConfig, parse_model_config
from engine.models.decoder import optional_tensors, tensor_shapes
from engine.weights import Checkpoint, DummyWeights, WeightsMismatch, fingerprint, weight_files

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton" / "weights"


@pytest.fixture
def config() -> ModelConfig:
    return parse_model_config(CONFIG, {})


def full(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in tensor_shapes(config).items()}


def save(directory: Path, tensors: dict[str, torch.Tensor], num_files: int = 1) -> Path:
    """Write a checkpoint that is old enough for its digest to be cached."""
    directory.mkdir(exist_ok=True)
    names = sorted(tensors)
    parts = [names[index::num_files] for index in range(num_files)]
    files = ["model.safetensors"] if num_files == 1 else [f"model-{index}.safetensors" for index in range(num_files)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / file)
    if num_files > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_those_of_the_saved_tensor(
    tmp_path: Path, config: ModelConfig, num_files: int, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in full(config).items()}
    checkpoint = Checkpoint(save(tmp_path / "m", tensors, num_files), tensor_shapes(config))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read(name), tensors[name])
    assert torch.equal(checkpoint.read(name, slice(3, 7)), tensors[name][3:7])
    assert torch.equal(checkpoint.read(name, columns=slice(12, 24)), tensors[name][:, 12:24])
    assert torch.equal(checkpoint.read("model.norm.weight"), tensors["model.norm.weight"])


def test_missing_unexpected_and_misshapen_tensors_are_named_at_once(tmp_path: Path, config: ModelConfig) -> None:
    tensors = full(config)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.norm.weight"] = torch.zeros(15)
    with pytest.raises(WeightsMismatch) as raised:
        Checkpoint(save(tmp_path / "m", tensors), tensor_shapes(config))
    message = str(raised.value)
    assert "missing: model.layers.0.mlp.up_proj.weight" in message
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "shape of model.norm.weight: [15], expected [16]" in message


def test_derived_and_optional_tensors_may_be_there_or_not(tmp_path: Path) -> None:
    tied = parse_model_config({**CONFIG, "tie_word_embeddings": True}, {})
    tensors = full(tied)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    del tensors["lm_head.weight"]
    checkpoint = Checkpoint(save(tmp_path / "m", tensors), tensor_shapes(tied), optional_tensors(tied))
    assert "lm_head.weight" not in checkpoint
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in checkpoint


def test_unusable_files_are_refused(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(WeightsMismatch, match="has neither"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(WeightsMismatch, match="not a readable safetensors file"):
        Checkpoint(tmp_path, tensor_shapes(config))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsMismatch, match="outside its directory"):
        weight_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(WeightsMismatch, match="no usable weight_map"):
        weight_files(tmp_path)


def test_dummy_weights_are_a_function_of_the_name(config: ModelConfig) -> None:
    first, second = DummyWeights(tensor_shapes(config)), DummyWeights(tensor_shapes(config))
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert torch.equal(first.read(q), second.read(q))
    assert torch.equal(first.read(q)[4:8, 2:5], second.read(q, slice(4, 8), slice(2, 5)))
    assert not torch.equal(first.read(q)[:8], second.read(k))


def test_the_fingerprint_covers_weights_config_and_dtype(tmp_path: Path, config: ModelConfig) -> None:
    tensors = full(config)
    first = fingerprint(save(tmp_path / "a", tensors), config, "float32")
    assert fingerprint(save(tmp_path / "b", tensors), config, "float32") == first
    assert fingerprint(tmp_path / "a", config, "bfloat16") != first
    assert fingerprint(tmp_path / "a", parse_model_config({**CONFIG, "rope_theta": 2e4}, {}), "float32") != first
    assert fingerprint(tmp_path / "a", parse_model_config({**CONFIG, "eos_token_id": 3}, {}), "float32") == first
    assert fingerprint(tmp_path / "a", config, "float32", "dummy") != first
    tensors["model.norm.weight"][0] += 1
    assert fingerprint(save(tmp_path / "b", tensors), config, "float32") != first


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, config: ModelConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_RACY_S", -1.0)  # as if the file were old
    model = save(tmp_path / "m", full(config))
    first = fingerprint(model, config, "float32")
    (entry,) = cache.iterdir()
    forged = "0" * 32
    entry.write_text(forged)
    assert fingerprint(model, config, "float32") != first  # the cache was believed
    entry.write_text(forged[:-1])
    assert fingerprint(model, config, "float32") == first  # damaged: hashed again, and mended
    assert len(entry.read_text()) == 32
    os.utime(model / "model.safetensors", ns=(0, time.time_ns()))
    fingerprint(model, config, "float32")
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_changed_just_now_is_not_cached(tmp_path: Path, config: ModelConfig, cache: Path) -> None:
    """It may change again within one tick of the clock that stamps it."""
    fingerprint(save(tmp_path / "m", full(config)), config, "float32")
    assert not cache.exists()


def test_a_cache_that_can_not_be_written_is_done_without(
    tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_RACY_S", -1.0)
    model = save(tmp_path / "m", full(config))
    first = fingerprint(model, config, "float32")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert fingerprint(model, config, "float32") == first
