"""What one engine alone says to the demo model's prompts, greedily: `python -m tests.support.reference_answers DTYPE N`.

Reads prompts (lists of token ids) as JSON from stdin, writes N tokens for each as JSON to stdout.
"""

from __future__ import annotations

import json
import sys

from baton.clock import SystemClock
from baton.config import DEMO_MODEL_DIR
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.engine import LocalEngine
from engine.native import NativeRunner
from engine.types import EngineConfig


def main() -> None:
    """Answer them one by one."""
    dtype, num_tokens = sys.argv[1], int(sys.argv[2])
    runner = NativeRunner(DEMO_MODEL_DIR, num_blocks=64, num_threads=1, dtype=dtype)
    config = EngineConfig(num_blocks=64, vocab_size=1024, max_model_len=512)
    engine = LocalEngine(config, runner, PrefixHasher(b"x", ""), SystemClock())
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    answers = []
    for index, prompt in enumerate(json.load(sys.stdin)):
        engine.add(GenerateRequest(AttemptId(f"{index}/1"), tuple(prompt), len(prompt), params))
        tokens: list[int] = []
        while engine.has_work():
            tokens += [event.token_id for event in engine.step().events]
        answers.append(tokens)
    runner.close()
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()
