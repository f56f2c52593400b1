"""Judges the tokens of all arms by transformers in float32: prints a JSON object with each arm's largest regret.

usage: check_tokens.py QUESTION.json

The arm's tokens are fed to the reference one after the other; the regret of a token is the reference's best logit
minus the token's own, in units of the standard deviation of all logits at that position. 0: its own choice. Random
weights have small margins, so honest bf16 arms differ from it, and from each other, by a little.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from arm import prompts
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def largest_regret(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Of one sequence."""
    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((logits.amax(dim=1) - chosen) / logits.std(dim=1)).max())


def main() -> None:
    """Answer the question."""
    question = json.loads(Path(sys.argv[1]).read_text())
    made = prompts(question["num_prompts"], question["num_prompt_tokens"], 0, question["vocab_size"])
    model = AutoModelForCausalLM.from_pretrained(question["model_dir"], dtype=torch.float32).eval()
    print(
        json.dumps(
            {
                name: max(largest_regret(model, prompt, out) for prompt, out in zip(made, tokens, strict=True))
                for name, tokens in question["tokens"].items()
            }
        )
    )


if __name__ == "__main__":
    main()
