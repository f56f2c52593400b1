"""Builds the demo model: tokenizer, training and the checks that the result must pass.

Usage: python bench/demo_model/train.py [--out DIR]

Owns everything in `baton/demo_model/` but the prose of its README. Knows nothing of Baton's code: the result is a
plain Hugging Face directory. One thread and one seed: the same machine and versions give the same bytes each time,
another machine may round differently.

Its texts lie beside it: `qa.jsonl` has the answers and the questions that must get them exactly, `paraphrases.txt`
other ways to ask (question | other | other), `offtopic.txt` questions that it must say it cannot answer.
"""

import argparse
import hashlib
import random
import re
import time
from pathlib import Path
from typing import Final

import torch
from checker import check, margins_of
from corpus import RowSampler, read_pairs, spellings
from safetensors.torch import save
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import BOS, END, MAX_LENGTH_TOKENS, PAD, VOCAB_SIZE, train_tokenizer, write_json, write_tokenizer

DEFAULT_OUT: Final = Path(__file__).resolve().parents[2] / "baton" / "demo_model"
SEED: Final = 7

MODEL: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH_TOKENS,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "torch_dtype": "bfloat16",
}

NUM_STEPS: Final = 1700
PEAK_LR: Final = 2.5e-3
# The loss pushes each right token this many logits above the runner-up; what rounding to bf16 leaves
# of it is the margin that makes greedy decoding insensitive to the order of additions.
TARGET_MARGIN: Final = 10.0


def train_model(sampler: RowSampler, num_steps: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).float().train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
        fused=True,
    )
    started_s = time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / 50, 1 - step / num_steps)
        loss, margin = train_step(model, optimizer, *sampler.batch())
        if step % 100 == 0 or step == num_steps - 1:
            elapsed_s = time.monotonic() - started_s
            print(f"step {step:5d}  {elapsed_s:6.1f} s  loss {loss:.5f}  lowest margin {margin:.2f}", flush=True)
    return model.to(torch.bfloat16).eval()


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    is_target: torch.Tensor,
) -> tuple[float, float]:
    """One update on `ids` [rows, tokens]; returns the cross entropy per target and the lowest margin."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = ids[:, 1:][is_target[:, 1:]]  # [targets]
    logits = model.lm_head(hidden[is_target[:, 1:]])  # [targets, vocab]
    cross_entropy = functional.cross_entropy(logits, targets)
    margins = margins_of(logits, targets)
    loss = cross_entropy + 0.1 * functional.relu(TARGET_MARGIN - margins).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return cross_entropy.item(), margins.min().item()


def write_model(model: LlamaForCausalLM, out: Path) -> None:
    write_json(out / "config.json", MODEL)
    write_json(
        out / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False},
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))


def record_checksum(out: Path) -> None:
    """Print the checksum of the weights, and put it into the README where there is one."""
    checksum = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    print(f"sha256 of model.safetensors: {checksum}")
    readme = out / "README.md"
    if readme.exists():
        readme.write_text(re.sub(r"\b[0-9a-f]{64}\b", checksum, readme.read_text("utf-8")), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory for the model (%(default)s)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    pairs = read_pairs()
    texts = [text for pair in pairs for text in (pair.answer, *spellings(pair.question), *pair.also_asked)]
    tokenizer = train_tokenizer(texts)
    model = train_model(RowSampler(tokenizer, pairs, random.Random(SEED)), args.steps)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, args.out)
    write_model(model, args.out)
    record_checksum(args.out)
    return 0 if check(args.out, pairs, random.Random(SEED)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
