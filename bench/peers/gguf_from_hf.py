"""Writes a bf16 GGUF from a Llama or Qwen3 model directory, with a made-up vocabulary: for use by token id only.

usage: gguf_from_hf.py MODEL_DIR OUT.gguf      (needs gguf and numpy)
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def convert(model_dir: Path, out: Path) -> None:
    """One file for another."""
    config = json.loads((model_dir / "config.json").read_text())
    is_llama = config["model_type"] == "llama"
    writer = gguf.GGUFWriter(str(out), config["model_type"])
    _write_head(writer, config)
    for name, values in _bf16_tensors(model_dir / "model.safetensors"):
        if is_llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = _neighbours_rotate(values, heads)
        _write_tensor(writer, _gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_head(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim, vocab_size = config["head_dim"], config["vocab_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<t{index}>".encode() for index in range(vocab_size)])
    writer.add_token_types([1] * vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _bf16_tensors(path: Path) -> Any:
    """Names and values, as the upper halves of float32, of a safetensors file that holds nothing but bf16."""
    data = np.memmap(path, np.uint8, mode="r")
    (head_bytes,) = struct.unpack("<Q", data[:8].tobytes())
    head = json.loads(data[8 : 8 + head_bytes].tobytes())
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = entry["data_offsets"]
        yield name, data[8 + head_bytes + begin : 8 + head_bytes + end].view(np.uint16).reshape(entry["shape"])


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _neighbours_rotate(values: Any, num_heads: int) -> Any:
    """Rows of q or k so that RoPE turns neighbours (llama in GGUF) in place of halves of a head (Hugging Face)."""
    halves = values.reshape(num_heads, 2, -1, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: Any) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, (values.astype(np.uint32) << 16).view(np.float32))
        return
    as_bytes = np.ascontiguousarray(values).view(np.uint8)
    writer.add_tensor(name, as_bytes, raw_shape=as_bytes.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
