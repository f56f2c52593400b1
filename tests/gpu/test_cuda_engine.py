"""P1 on a GPU: overlapped steps on CUDA graphs give the tokens of the plain torch reference on the CPU, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from baton.clock import SystemClock
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.engine import LocalEngine
from engine.native import NativeRunner
from engine.overlap import OverlappingEngine
from engine.types import EngineConfig
from tests.support.drive import join_one_by_one
from tests.support.tiny_models import VOCAB_SIZE, edit_config, make_model, random_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_MODEL = REPOSITORY / "baton" / "demo_model"
SIZES = {"num_blocks": 96, "max_num_seqs": 24, "max_num_batched_tokens": 128}


def requests(vocab_size: int, num_requests: int = 40) -> list[GenerateRequest]:
    """Prompts of all lengths, some with a prefix in common; greedy, drawn on the device, drawn on the host."""
    found = []
    for index in range(num_requests):
        head = random_prompt(index % 3, 40 if index % 2 else 7)
        prompt = [token % vocab_size for token in (*head, *random_prompt(100 + index, 1 + index * 5 % 90))]
        params = SamplingParams(
            max_tokens=1 + index * 7 % 30,
            ignore_eos=True,
            temperature=0.0 if index % 3 else 0.8,
            top_p=0.9 if index % 9 == 0 else 1.0,
            presence_penalty=0.5 if index % 11 == 0 else 0.0,
            seed=index,
        )
        found.append(GenerateRequest(AttemptId(f"{index}/1"), tuple(prompt), len(prompt), params))
    return found


def compare(model_dir: Path, vocab_size: int, *, block_size: int = 16, num_blocks: int = 96) -> None:
    sizes = {**SIZES, "num_blocks": num_blocks * 16 // block_size, "block_size": block_size}
    config = EngineConfig(vocab_size=vocab_size, max_model_len=512, **sizes)
    hasher = PrefixHasher(b"x", "")
    pool = {"num_blocks": config.num_blocks, "block_size": block_size, "dtype": "float32"}
    reference = NativeRunner(model_dir, backend="reference", **pool)
    expected = join_one_by_one(LocalEngine(config, reference, hasher, SystemClock()), requests(vocab_size))
    reference.close()
    runner = NativeRunner(model_dir, device="cuda", max_num_seqs=16, **pool)  # larger batches run without a graph
    assert runner.overlapping is not None
    engine = OverlappingEngine(config, runner, hasher, SystemClock(), runner.overlapping)
    assert join_one_by_one(engine, requests(vocab_size)) == expected
    runner.close()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_models(family: str, block_size: int, tmp_path: Path) -> None:
    compare(make_model(tmp_path, family, head_dim=64), VOCAB_SIZE, block_size=block_size)


def test_a_sliding_window(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "mistral")
    edit_config(model_dir, sliding_window=33)
    compare(model_dir, VOCAB_SIZE)


def test_few_blocks_and_preemption(tmp_path: Path) -> None:
    compare(make_model(tmp_path, "qwen3", head_dim=128), VOCAB_SIZE, num_blocks=20)


def test_the_demo_model() -> None:
    compare(DEMO_MODEL, 1024)
