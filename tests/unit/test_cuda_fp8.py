"""fp8 on the CUDA backend: KV and weights in it agree with plain torch, who can not do it says so, no pools are mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.triton_device import DEVICE, HAS_CUDA  # isort: skip  (before the kernels)

from safetensors.torch import load_file, save_file

from baton.clock import ManualClock
from baton.config import load_config
from baton.errors import LayoutMismatch
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV, stored_dtype
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.cuda.fp8 import Fp8Linear, kv_scales, quantised
from engine.cuda.kernels.fused import add_rms_norm_fp8, quantise_rows, write_qkv
from engine.cuda.pool import DevicePool
from engine.kv_pool import FP8
from engine.layers.norm import rms_norm
from engine.layers.rope import rotate
from engine.model_config import ModelUnsupported
from engine.native import NativeRunner
from engine.overlap import OverlappingEngine
from engine.types import EngineConfig
from engine.weights import WeightsMismatch
from kvtransfer.auth import decode_layout, encode_layout
from kvtransfer.plan import plan_copies
from tests.support.drive import join_one_by_one
from tests.support.fake_device import FakeDevice
from tests.support.fp8_reference import Fp8Reference, RoundedLinears
from tests.support.tiny_models import VOCAB_SIZE, make_model, random_prompt

KV_LAYERS = (LayerSpec(8, 128),) * 4


def multiplies_by_rows() -> bool:
    """Has this torch the product of two matrices in fp8, each row with a scale, on the CPU? Its first ones had not."""
    try:
        Fp8Linear(torch.ones(16, 16), None).product(*quantised(torch.ones(2, 16)))
    except RuntimeError:
        return False
    return True


needs_product = pytest.mark.skipif(
    HAS_CUDA or not multiplies_by_rows(), reason="a GPU's product is tested by tests/gpu, and this torch has no other"
)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same_fp8(actual: Tensor, expected: Tensor) -> None:
    """But for few that lie between two numbers, where what was rounded differs in its last bits."""
    found, wanted = actual.cpu().float(), expected.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    assert (found == wanted).float().mean() > 0.98
    torch.testing.assert_close(found, wanted, rtol=0.13, atol=2**-8)


# ---- Kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.03, 2.5)])
def test_keys_and_values_are_stored_in_fp8_saturated_and_nan_stays_nan(scales: tuple[float, float]) -> None:
    torch.manual_seed(1)
    heads, kv_heads, dim, num_tokens, block_size = 4, 2, 64, 20, 16
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim)
    qkv[3, -1, 0], qkv[3, -1, 40], qkv[5, -2, 2], qkv[7, heads] = 1e4, -1e4, float("nan"), 1e5
    angles = torch.rand(num_tokens, dim // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1)
    pool = torch.full((3, 2, kv_heads, block_size, dim), float("nan")).to(FP8).to(DEVICE)
    query = write_qkv(
        qkv.view(num_tokens, -1).to(DEVICE),
        pool,
        None,
        cos_sin.to(DEVICE),
        ints([*range(num_tokens)]),
        ints([0] * num_tokens),
        ints([2, 1]),
        ints([0]),
        eps=1e-6,
        kv_scales=scales,
    )
    plain, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
    cos, sin = (torch.cat((half, half), -1)[:, None] for half in cos_sin.unbind(1))
    torch.testing.assert_close(query.cpu(), rotate(plain, cos, sin), rtol=2e-5, atol=2e-5)
    slots = torch.cat((pool[2], pool[1]), 2).transpose(1, 2)  # [2, tokens, kv_heads, dim]
    for stored, rows, scale in zip(slots, (rotate(key, cos, sin), value), scales, strict=True):
        assert_same_fp8(stored[:num_tokens], (rows * (1 / scale)).clamp(-448, 448).to(FP8))
        assert stored[num_tokens:].float().isnan().all()
    assert (slots[1, 3, 1, 0].float(), slots[1, 3, 1, 40].float()) == (448, -448)
    assert slots[1, 5, 0, 2].float().isnan()
    assert slots.float().nan_to_num().abs().max() == 448
    assert pool[0].float().isnan().all()


@pytest.mark.parametrize("size", [64, 96, 300])
def test_rows_are_quantised_as_plain_torch_does(size: int) -> None:
    torch.manual_seed(size)
    rows = torch.randn(6, size) * torch.tensor([1.0, 1e-5, 1e5, 0.0, 1.0, 1e30])[:, None]
    rows[4, 3] = float("nan")
    stored, scales = quantise_rows(rows.to(DEVICE))
    expected, expected_scales = quantised(rows)
    finite = [0, 1, 2, 3, 5]
    torch.testing.assert_close(scales.cpu()[finite], expected_scales[finite], rtol=1e-6, atol=0)
    assert_same_fp8(stored[finite], expected[finite])
    assert stored.float()[finite[:3]].abs().amax(1).tolist() == [448] * 3  # all of the range is used
    assert (stored.float()[4] * scales[4]).isnan().any()


def test_a_matrix_is_quantised_row_by_row_however_many_rows_are_taken_at_a_time() -> None:
    torch.manual_seed(4)
    rows = (torch.randn(9000, 16) * torch.rand(9000, 1)).bfloat16()
    stored, scales = quantised(rows)
    assert (stored.shape, stored.dtype, scales.shape) == ((9000, 16), FP8, (9000, 1))
    parts = [quantised(part) for part in rows.split(700)]
    assert torch.equal(stored.float(), torch.cat([part.float() for part, _ in parts]))
    assert torch.equal(scales, torch.cat([scale for _, scale in parts]))
    torch.testing.assert_close(stored.float() * scales, rows.float(), rtol=2**-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 300])
@pytest.mark.parametrize("has_delta", [True, False])
def test_the_norm_leaves_fp8_as_a_norm_and_a_rounding_would(size: int, has_delta: bool) -> None:
    torch.manual_seed(size)
    hidden, weight = torch.randn(4, size), torch.rand(size)
    delta = torch.randn(4, size) if has_delta else None
    on_device = hidden.to(DEVICE, copy=True)
    stored, scales = add_rms_norm_fp8(on_device, None if delta is None else delta.to(DEVICE), weight.to(DEVICE), 1e-5)
    whole = hidden if delta is None else hidden + delta
    expected, expected_scales = quantised(rms_norm(whole, weight, 1e-5))
    torch.testing.assert_close(on_device.cpu(), whole)
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-5, atol=0)
    assert_same_fp8(stored, expected)


# ---- Products -------------------------------------------------------------------------------------------------------


@needs_product
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_is_the_plain_products(has_bias: bool) -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(48, 64) * torch.rand(48, 1), torch.randn(48) if has_bias else None
    x = torch.randn(5, 64) * torch.tensor([1.0, 1e3, 1e-3, 0.0, 1.0])[:, None]
    expected = RoundedLinears().prepare(weight, bias)(x)
    torch.testing.assert_close(Fp8Linear(weight, bias)(x), expected, rtol=2e-2, atol=1e-3)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert float((expected - exact).norm() / exact.norm()) < 0.05


@needs_product
def test_shards_have_scales_of_their_own() -> None:
    """Rows of a rank are rows of the whole; a rank's columns, and their inputs, are scaled by their own largest."""
    torch.manual_seed(3)
    weight, x = torch.randn(64, 96), torch.randn(4, 96)
    whole = Fp8Linear(weight, None)(x)
    rows = torch.cat([Fp8Linear(part, None)(x) for part in weight.split(32)], 1)
    assert torch.equal(rows, whole)
    halves = zip(weight.split(48, 1), x.split(48, 1), strict=True)
    summed = sum(Fp8Linear(part.contiguous(), None)(columns.contiguous()) for part, columns in halves)
    exact = x @ weight.T
    assert float((summed - exact).norm() / exact.norm()) < 0.05


def test_weights_that_the_product_does_not_take_are_refused_by_their_sizes() -> None:
    with pytest.raises(ModelUnsupported, match=r"multiples of 16.*40 -> 32"):
        Fp8Linear(torch.randn(32, 40), None)
    with pytest.raises(ModelUnsupported, match="64 -> 24"):
        Fp8Linear(torch.randn(24, 64), None)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_torch_takes_these_layouts_for_a_row_wise_product_on_cuda(num_tokens: int) -> None:
    """By torch's own checks, which need no GPU."""
    linear = Fp8Linear(torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16())
    with FakeTensorMode():
        for name in ("_weight", "_scales", "_bias"):
            held = getattr(linear, name)
            there = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="cuda")
            setattr(linear, name, there)
        rows = torch.empty(num_tokens, 64, dtype=FP8, device="cuda")
        result = linear.product(rows, torch.empty(num_tokens, 1, device="cuda"))
    assert (result.shape, result.dtype) == ((num_tokens, 48), torch.bfloat16)


# ---- Whole engines --------------------------------------------------------------------------------------------------


def add_kv_scales(model_dir: Path, num_layers: int, k_scale: float = 0.03, v_scale: float = 0.01) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    for layer in range(num_layers):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([k_scale * (layer + 1)])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([v_scale])
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # what padding computes is not defined
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "kv", "weights", "has_scales"),
    [
        ("qwen3", True, False, True),
        pytest.param("qwen2", False, True, False, marks=needs_product),
        pytest.param("llama", True, True, False, marks=needs_product),
    ],
)
def test_an_engine_in_fp8_gives_the_tokens_of_plain_torch(
    tmp_path: Path, family: str, kv: bool, weights: bool, has_scales: bool
) -> None:
    """Chunks beside decodes, a shared prefix, graphs of each size."""
    model_dir = make_model(tmp_path, family, num_hidden_layers=2)
    if has_scales:
        add_kv_scales(model_dir, 2)
    reference = Fp8Reference(model_dir, kv=kv, weights=weights, max_tokens=64)
    runner = NativeRunner(
        model_dir,
        num_blocks=24,
        max_num_seqs=4,
        device="cuda" if HAS_CUDA else "cpu",
        cuda_device=None if HAS_CUDA else FakeDevice(),
        kv_dtype="fp8" if kv else "auto",
        quantization="fp8" if weights else None,
    )
    assert runner.layout.model.dtype == ("float8_e4m3fn" if kv else "float32")
    assert runner.overlapping is not None
    sizes: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "num_blocks": 24}
    config = EngineConfig(vocab_size=VOCAB_SIZE, **sizes)
    engine = OverlappingEngine(config, runner, PrefixHasher(b"x", ""), ManualClock(), runner.overlapping)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=6)
    prompts = {"a": random_prompt(1, 40), "b": random_prompt(2, 3), "c": random_prompt(1, 37)}
    requests = [
        GenerateRequest(AttemptId(name), tuple(prompt), len(prompt), params) for name, prompt in prompts.items()
    ]
    expected = {name: reference.greedy(prompt, 6) for name, prompt in prompts.items()}
    assert join_one_by_one(engine, requests) == expected
    exact = Fp8Reference(model_dir, max_tokens=64).logits(prompts["a"])
    assert not torch.equal(exact, reference.logits(prompts["a"]))
    runner.close()


def test_scales_of_kv_are_the_checkpoints_and_only_kv_in_fp8_reads_them(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "llama", num_hidden_layers=2)
    without = NativeRunner(model_dir, num_blocks=4, backend="reference").layout.model.fingerprint
    add_kv_scales(model_dir, 2, 0.25, -1.0)
    with_scales = NativeRunner(model_dir, num_blocks=4, backend="reference").layout.model.fingerprint
    assert with_scales != without  # pools that are scaled otherwise do not mix
    weights = load_file(model_dir / "model.safetensors")

    class Weights:
        def __contains__(self, name: str) -> bool:
            return name in weights

        def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
            return weights[name]

    assert kv_scales(Weights(), 2, is_fp8=False) == [(1.0, 1.0)] * 2
    with pytest.raises(WeightsMismatch, match=r"layers.0.self_attn.v_scale is -1.0"):
        kv_scales(Weights(), 2, is_fp8=True)
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([4.0])
    assert kv_scales(Weights(), 2, is_fp8=True) == [(0.25, 4.0), (0.5, 4.0)]
    del weights["model.layers.1.self_attn.k_scale"]
    assert kv_scales(Weights(), 2, is_fp8=True) == [(0.25, 4.0), (1.0, 4.0)]


# ---- Pools, configuration, refusals ---------------------------------------------------------------------------------


def layout_of(kv_dtype: str, tp_size: int = 1) -> KVLayout:
    model = ModelKV(KV_LAYERS, stored_dtype(kv_dtype, "bfloat16"), "f")
    return KVLayout(model, KVGeometry(tp_size, 64, 10), 0)


def test_a_pool_in_fp8_has_half_of_the_bytes_and_mixes_with_its_like_only() -> None:
    fp8, bf16 = layout_of("fp8"), layout_of("auto")
    assert 2 * fp8.pool_bytes == bf16.pool_bytes == 4 * 10 * 2 * 8 * 64 * 128 * 2
    assert decode_layout(encode_layout(fp8)) == fp8
    assert sum(plan_copies(fp8, layout_of("fp8", 2)).unit_bytes) == 4 * 2 * 4 * 16 * 128
    with pytest.raises(LayoutMismatch, match="dtype differs: 'bfloat16' here, 'float8_e4m3fn' there"):
        plan_copies(bf16, fp8)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"engine.kv_dtype": "fp8"}, "engine.kv_dtype: fp8 is computed on a GPU only"),
        ({"engine.kv_dtype": "fp8", "engine.device": "cpu"}, "add --device cuda"),
        ({"model.quantization": "fp8"}, "model.quantization: fp8 is computed on a GPU only; take int8"),
        ({"model.quantization": "int8", "engine.device": "cuda"}, "cuda has fp8"),
        (
            {"model.quantization": "fp8", "engine.device": "cuda", "model.dtype": "float32"},
            "^model.quantization: fp8 goes with model.dtype bfloat16, not float32$",
        ),
        ({"engine.kv_dtype": "e5m2", "engine.device": "cuda"}, "engine.kv_dtype"),
        ({"model.quantization": "fp4"}, "model.quantization"),
    ],
)
def test_the_configuration_refuses_fp8_where_nothing_computes_it(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_config(settings=settings)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_configuration_takes_fp8_on_cuda(dtype: str) -> None:
    settings = {"engine.device": "cuda", "engine.kv_dtype": "fp8", "model.quantization": "fp8", "model.dtype": dtype}
    config = load_config(settings=settings)
    assert (config.engine.kv_dtype, config.model.quantization) == ("fp8", "fp8")
    assert load_config(settings={"engine.device": "cuda", "engine.kv_dtype": "fp8", "model.dtype": "float32"})


def test_products_in_fp8_give_what_the_device_says_they_can(tmp_path: Path) -> None:
    class Gpu(FakeDevice):
        fp8_product_dtypes = ("bfloat16",)

    model_dir = make_model(tmp_path, "llama")
    with pytest.raises(ModelUnsupported, match="quantization fp8 goes with dtype bfloat16, not float32"):
        NativeRunner(model_dir, num_blocks=4, quantization="fp8", cuda_device=Gpu())


def test_a_pool_on_a_device_stores_what_its_layout_names() -> None:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    for name, dtype in names.items():
        layout = KVLayout(ModelKV((LayerSpec(2, 16),), name, "f"), KVGeometry(1, 16, 2), 0)
        assert DevicePool(layout, torch.device("cpu")).flat.dtype == dtype


def test_the_cpu_engine_refuses_fp8_in_one_line(tmp_path: Path) -> None:
    for settings in ({"kv_dtype": "fp8"}, {"quantization": "fp8"}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"^{name} fp8 is computed by the CUDA kernels only, not on the CPU$"):
            NativeRunner(tmp_path, num_blocks=4, **settings)
        with pytest.raises(ValueError, match="by the CUDA kernels only"):
            NativeRunner(tmp_path, num_blocks=4, device="cuda", backend="reference", **settings)
    with pytest.raises(ValueError, match="kv_dtype must be one of"):
        NativeRunner(tmp_path, num_blocks=4, kv_dtype="fp4")
    with pytest.raises(ValueError, match="int8 is computed on the CPU only"):
        NativeRunner(tmp_path, num_blocks=4, device="cuda", quantization="int8")
