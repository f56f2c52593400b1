"""FlashAttention, as far as it is installed, beside the Triton kernel and the oracle on a real GPU, in bfloat16."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from baton.request import AttemptId, SamplingParams
from engine.cuda.flash import IMPLEMENTATIONS, PromptAttention, PromptShape, choose, plain_attention
from engine.cuda.kernels.attention import prefill_attention, prefill_rows
from engine.cuda.kernels.fused import write_qkv
from engine.native import NativeRunner
from engine.types import BatchEntry, Sampled, SampleSpec, StepPlan
from tests.support.tiny_models import edit_config, make_model, random_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
BLOCK_SIZE = 64


def loaded(name: str) -> PromptAttention:
    try:
        return IMPLEMENTATIONS[name]()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=CUDA)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, by norms; NaN is no number that is less than anything."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(32, 8, 128, None), (40, 40, 128, None), (14, 2, 64, None), (32, 8, 128, 300), (6, 1, 96, None)],
)
@pytest.mark.parametrize("lengths", [(1000,), (2, 1, 63, 64, 65, 127, 129, 513), (5000, 3, 700)], ids=str)
def test_flash_is_the_triton_kernel_and_the_oracle(
    name: str, heads: int, kv_heads: int, dim: int, window: int | None, lengths: tuple[int, ...]
) -> None:
    """Over what one launch leaves: queries, keys, values where the product put them, and KV in the pool."""
    attention = loaded(name)
    torch.manual_seed(heads + sum(lengths))
    bounds = [0, *accumulate(lengths)]
    num_tokens, counts = bounds[-1], [-(-length // BLOCK_SIZE) for length in lengths]
    tables = (torch.randperm(sum(counts), device=CUDA) + 1).to(torch.int32)
    table_begin = ints([0, *accumulate(counts)][:-1])
    pool = torch.full((sum(counts) + 1, 2, kv_heads, BLOCK_SIZE, dim), float("nan"), device=CUDA, dtype=BF16)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim, device=CUDA).to(BF16)
    angles = torch.rand(max(lengths), dim // 2, device=CUDA) * 6
    keys = torch.empty(num_tokens, kv_heads, dim, device=CUDA, dtype=BF16)
    query = write_qkv(
        qkv,
        pool,
        None,
        torch.stack((angles.cos(), angles.sin()), 1).to(BF16),
        ints([position for length in lengths for position in range(length)]),
        ints([seq for seq, length in enumerate(lengths) for _ in range(length)]),
        tables,
        table_begin,
        eps=1e-6,
        keys=keys,
    )
    value = qkv.view(num_tokens, -1, dim)[:, -kv_heads:]
    given = (ints(bounds), max(lengths), window)
    actual = attention(query, keys, value, *given)

    each = prefill_rows(heads // kv_heads, dim, BF16) // (heads // kv_heads)
    tiles = [(seq, first) for seq, length in enumerate(lengths) for first in range(0, length, each)]
    by_triton = torch.full_like(query, float("nan"))
    prefill_attention(
        query,
        pool,
        (ints([seq for seq, _ in tiles]), ints([first for _, first in tiles])),
        (ints(bounds[:-1]), ints([0] * len(lengths)), ints(list(lengths))),
        tables,
        table_begin,
        window=window,
        out=by_triton,
    )
    expected = plain_attention(query.float(), keys.float(), value.float(), *given)
    assert error(by_triton, expected) < 1e-2
    assert error(actual, expected) < 1e-2
    assert error(actual, by_triton) < 1e-2


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_serves_is_trusted_and_float32_is_left_to_triton(name: str) -> None:
    loaded(name)
    one = {name: IMPLEMENTATIONS[name]}
    for heads, kv_heads, dim, windows in ((32, 8, 128, (None,)), (40, 40, 128, (None, 4096)), (14, 2, 64, (None,))):
        assert choose("flash", PromptShape(heads, kv_heads, dim, BF16, windows), BF16, CUDA, one) is not None
    shape = PromptShape(32, 8, 128, torch.float32, (None,))
    assert choose("auto", shape, torch.float32, CUDA, one) is None


@pytest.mark.parametrize("window", [None, 33])
def test_steps_give_what_they_give_by_triton(window: int | None, tmp_path: Path) -> None:
    """Fresh prompts alone; then fresh ones, a chunk and decodes together: the log-probability of every choice."""
    model_dir = make_model(tmp_path, "mistral", head_dim=64)
    if window is not None:
        edit_config(model_dir, sliding_window=window)
    chunked = random_prompt(1, 100)
    lengths = (70, 2, 129, 33)

    def entry(name: str, start: int, tokens: list[int], table: list[int]) -> BatchEntry:
        params = SamplingParams(temperature=0.0, max_tokens=9, num_logprobs=1)
        return BatchEntry(AttemptId(name), start, tokens, table, SampleSpec(params, start + len(tokens)))

    plans = [
        [entry("chunked", 0, chunked[:60], [1, 2]), entry("decoding", 0, random_prompt(2, 64), [3, 4])],
        [
            *(
                entry(
                    f"fresh {length}", 0, random_prompt(length, length), [5 + 3 * index, 6 + 3 * index, 7 + 3 * index]
                )
                for index, length in enumerate(lengths)
            ),
            entry("decoding", 64, [9], [3, 4]),
            entry("chunked", 60, chunked[60:], [1, 2]),
        ],
    ]
    found: dict[str, list[Sampled | None]] = {}
    for choice in ("flash", "triton"):
        try:
            runner = NativeRunner(
                model_dir,
                dtype="bfloat16",
                device="cuda",
                block_size=BLOCK_SIZE,
                num_blocks=20,
                max_num_seqs=8,
                prompt_attention=choice,
            )
        except ValueError as error:
            pytest.skip(str(error))
        found[choice] = [sampled for step, plan in enumerate(plans) for sampled in runner.run(StepPlan(step, plan))]
        runner.close()
    assert len(found["flash"]) == len(found["triton"]) == 8
    num_equal = 0
    for one, other in zip(found["flash"], found["triton"], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprobs is not None
        assert other.logprobs is not None
        if one.token_id == other.token_id:  # two that are nearly equal may change places
            num_equal += 1
            assert abs(one.logprobs.logprob - other.logprobs.logprob) < 0.2
    assert num_equal >= 6
