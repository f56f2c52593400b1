"""Prompts from their first token on go to FlashAttention: which rows, with which arguments, and who is trusted with it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.triton_device import HAS_CUDA  # isort: skip  (before the kernels)

from baton.clock import ManualClock
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.comm import SingleComm
from engine.cuda.decoder import FusedDecoder
from engine.cuda.flash import (
    PromptAttention,
    PromptShape,
    choose,
    flash_attention_3,
    plain_attention,
    torch_flash_attention,
)
from engine.cuda.pool import DevicePool
from engine.cuda.steps import CudaSteps
from engine.engine import LocalEngine
from engine.model_config import read_model_config
from engine.models.decoder import optional_tensors, tensor_shapes
from engine.native import NativeRunner
from engine.overlap import OverlappingEngine
from engine.types import BatchEntry, EngineConfig, SampleSpec, StepPlan
from engine.weights import Checkpoint
from tests.support.drive import join_one_by_one
from tests.support.fake_device import FakeDevice
from tests.support.tiny_models import VOCAB_SIZE, edit_config, make_model, random_prompt

needs_the_fake_device = pytest.mark.skipif(HAS_CUDA, reason="tests/gpu runs the same on the CUDA device")
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=100)
NUM_BLOCKS = 24


class Recorded:
    """plain_attention, which remembers (bounds, longest, window) of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, int | None]] = []
        self.is_broken = False

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None
    ) -> Tensor:
        """See PromptAttention."""
        assert query.is_contiguous()
        assert key.stride(-1) == value.stride(-1) == 1
        assert len(query) == len(key) == len(value) == bounds[-1]
        assert bounds.dtype == torch.int32
        self.calls.append((bounds.tolist(), longest, window))
        if self.is_broken:
            return torch.full_like(query, float("nan"))
        return plain_attention(query, key, value, bounds, longest, window)


class Model:
    """A tiny model on a FakeDevice whose fresh prompts go to `attention`, and its reference."""

    def __init__(self, model_dir: Path) -> None:
        config = read_model_config(model_dir)
        self.num_layers = config.num_layers
        self.reference = NativeRunner(model_dir, num_blocks=NUM_BLOCKS, backend="reference")
        layers = (LayerSpec(config.num_kv_heads, config.head_dim),) * config.num_layers
        device = FakeDevice()
        self.pool = DevicePool(
            KVLayout(ModelKV(layers, "float32", "x"), KVGeometry(1, 16, NUM_BLOCKS), 0), device.torch_device
        )
        self.attention = Recorded()
        decoder = FusedDecoder(
            config,
            Checkpoint(model_dir, tensor_shapes(config), optional_tensors(config)),
            dtype=torch.float32,
            comm=SingleComm(),
            pool=self.pool,
            device=device,
            prompt_attention=self.attention,
        )
        self.steps = CudaSteps(decoder, device, max_num_seqs=4, num_blocks=NUM_BLOCKS, max_blocks_per_seq=8)

    def compare(self, requests: list[GenerateRequest]) -> list[tuple[list[int], int, int | None]]:
        """Both engines answer alike; the calls of the first layer, a step each."""
        config = EngineConfig(num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE, max_num_batched_tokens=32, max_num_seqs=4)
        given = (config, self.reference, PrefixHasher(b"x", ""), ManualClock())
        self.attention.calls.clear()
        found = join_one_by_one(OverlappingEngine(*given, self.steps), requests)
        assert found == join_one_by_one(LocalEngine(*given), requests)
        return self.attention.calls[:: self.num_layers]


def asked(name: str, prompt: list[int], max_tokens: int) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    return GenerateRequest(AttemptId(name), tuple(prompt), len(prompt), params)


def entry(name: str, start: int, tokens: list[int], table: list[int]) -> BatchEntry:
    return BatchEntry(AttemptId(name), start, tokens, table, SampleSpec(GREEDY, start + len(tokens)))


@needs_the_fake_device
def test_a_mixed_step_sends_the_prompts_that_begin_in_it_to_flash_and_nothing_else(tmp_path: Path) -> None:
    model = Model(make_model(tmp_path, "qwen3", num_hidden_layers=2))
    chunked, decoding = random_prompt(1, 40), random_prompt(2, 18)
    plans = [
        [entry("chunked", 0, chunked[:20], [3, 7, 1]), entry("decoding", 0, decoding, [5, 9])],
        [
            entry("fresh", 0, random_prompt(3, 7), [2]),
            entry("chunked", 20, chunked[20:], [3, 7, 1]),
            entry("one token", 0, [11], [4]),
            entry("also fresh", 0, random_prompt(4, 17), [6, 8]),
            entry("decoding", 18, [12], [5, 9]),
        ],
        [entry("decoding", 19, [13], [5, 9]), entry("fresh", 7, [14, 15], [2])],
    ]
    for step_id, entries in enumerate(plans):
        plan = StepPlan(step_id, entries)
        assert model.steps.collect(model.steps.launch(plan)).sampled == model.reference.run(plan)
    assert model.attention.calls == [  # of two layers each
        *[([0, 20, 38], 20, None)] * 2,
        *[([0, 7, 24], 17, None)] * 2,  # in the order of the plan, behind everything else
    ]


@needs_the_fake_device
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # numpy's, in the interpreter
def test_what_flash_computes_is_used_and_reaches_no_other_sequence(tmp_path: Path) -> None:
    model = Model(make_model(tmp_path, "llama", num_hidden_layers=1))
    chunk, decode = random_prompt(1, 20), random_prompt(2, 5)
    model.steps.collect(model.steps.launch(StepPlan(1, [entry("chunk", 0, chunk, [1, 2]), entry("a", 0, decode, [3])])))
    model.attention.is_broken = True
    entries = [entry("fresh", 0, [7, 8], [4]), entry("chunk", 20, [9, 3], [1, 2]), entry("a", 5, [6], [3])]
    collected = model.steps.collect(model.steps.launch(StepPlan(2, entries)))
    assert collected.failed == ["fresh"]


@needs_the_fake_device
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # what padding computes is not defined
@pytest.mark.parametrize(
    ("family", "kv_heads", "window"), [("qwen3", 2, None), ("llama", 4, None), ("qwen2", 1, None), ("mistral", 2, 20)]
)
def test_an_engine_whose_prompts_go_to_flash_gives_the_references_tokens(
    family: str, kv_heads: int, window: int | None, tmp_path: Path
) -> None:
    """Prompts in chunks, behind a cached prefix, beside decodes, on graphs and not; groups of 1, 2 and 4; a window."""
    model_dir = make_model(tmp_path, family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    if window is not None:
        edit_config(model_dir, sliding_window=window)
    model = Model(model_dir)
    model.steps.capture_all()
    assert not model.pool.flat.any()  # the warm-up wrote nothing
    calls = model.compare(
        [
            asked("a", random_prompt(1, 45), 9),
            asked("b", random_prompt(2, 9), 5),
            asked("c", random_prompt(1, 37), 4),  # 32 of them are cached
            asked("d", random_prompt(4, 30), 3),
            asked("e", [7], 2),
        ]
    )
    assert calls[0][0] == [0, 32]  # a whole step, the first chunk of `a`
    assert sum(bounds[-1] for bounds, _, _ in calls) <= 32 + 9 + 30  # nor its second, nor `c` behind what is cached
    for bounds, longest, its_window in calls:
        assert bounds[0] == 0
        assert longest == max(end - begin for begin, end in itertools.pairwise(bounds))
        assert its_window == window
    assert model.steps.num_replays > 0


def shape(dtype: torch.dtype = torch.bfloat16, windows: tuple[int | None, ...] = (None, 4096)) -> PromptShape:
    return PromptShape(num_heads=6, num_kv_heads=2, head_dim=64, dtype=dtype, windows=windows)


def sees_one_more(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None
) -> Tensor:
    return plain_attention(query, key, value, bounds, longest, window and window + 1)


def swaps_heads(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None) -> Tensor:
    return plain_attention(query, key.flip(1), value.flip(1), bounds, longest, window)


def fails(*given: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nand so on")


def loaded(attention: PromptAttention) -> Any:
    return lambda: attention


def not_installed() -> PromptAttention:
    raise ImportError("No module named 'fast'")


def test_the_first_implementation_that_is_right_here_is_taken() -> None:
    tried = {"absent": not_installed, "window": loaded(sees_one_more), "right": loaded(plain_attention)}
    assert choose("auto", shape(), torch.bfloat16, CPU, tried) is plain_attention
    assert choose("auto", shape(windows=(None,)), torch.bfloat16, CPU, tried) is sees_one_more  # nobody asks it for one
    assert choose("triton", shape(), torch.bfloat16, CPU, tried) is None


def test_what_does_not_compute_here_leaves_prompts_to_triton_unless_flash_is_demanded() -> None:
    wrong = {
        "absent": not_installed,
        "window": loaded(sees_one_more),
        "heads": loaded(swaps_heads),
        "image": loaded(fails),
        "dtype": loaded(lambda *given: plain_attention(*given).float()),
    }
    assert choose("auto", shape(), torch.bfloat16, CPU, wrong) is None
    with pytest.raises(
        ValueError, match=r"does not compute here: absent: No module.*; window: .* off by .*window 33"
    ) as e:
        choose("flash", shape(), torch.bfloat16, CPU, wrong)
    assert "heads: its result is off" in str(e.value)
    assert "image: no kernel image is available; dtype: its result is torch.float32" in str(e.value)
    with pytest.raises(ValueError, match="one of"):
        choose("fast", shape(), torch.bfloat16, CPU, wrong)


def test_prompts_over_kv_in_another_dtype_are_left_to_triton() -> None:
    right = {"right": loaded(plain_attention)}
    assert choose("auto", shape(), torch.float8_e4m3fn, CPU, right) is None
    with pytest.raises(ValueError, match=r"KV is kept as torch\.float8_e4m3fn"):
        choose("flash", shape(), torch.float8_e4m3fn, CPU, right)


def test_flash_attention_3_is_called_as_its_interface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, in plain torch: (left, right) tokens are seen beside a query's own."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        window_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        assert causal
        assert (cu_seqlens_q is cu_seqlens_k, max_seqlen_q) == (True, max_seqlen_k)
        left, right = window_size
        assert right == 0
        out = plain_attention(q, k, v, cu_seqlens_q, max_seqlen_q, None if left < 0 else left + 1)
        return out, torch.empty(0)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert choose("flash", shape(), torch.bfloat16, CPU, {"3": flash_attention_3}) is not None


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_own_takes_the_arguments(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes only: it computes on CUDA alone."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    attention = torch_flash_attention()
    meta = {"device": "meta", "dtype": torch.bfloat16}
    qkv = torch.empty(10, 8, 64, **meta)
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    with torch.inference_mode():
        out = attention(torch.empty(10, 4, 64, **meta), qkv[:, 4:6], qkv[:, 6:], bounds, 6, window)
    assert (out.shape, out.dtype) == ((10, 4, 64), torch.bfloat16)
    problem = "FlashAttention of torch: .*CPU"
    with pytest.raises(ValueError, match=problem):
        choose("flash", shape(), torch.bfloat16, CPU, {"FlashAttention of torch": torch_flash_attention})


def test_a_runner_without_flash_says_so_where_it_is_demanded(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="flash does not compute here"):
        NativeRunner(model_dir, num_blocks=4, cuda_device=FakeDevice(), prompt_attention="flash")
    with pytest.raises(ValueError, match="prompt_attention triton needs device cuda"):
        NativeRunner(model_dir, num_blocks=4, prompt_attention="triton")
