"""fp8 on a real GPU: its conversions, its row-wise products, and how far the demo model's answers move.

`tests/unit/test_cuda_fp8.py` runs its kernels on the GPU too, where there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bench.gpu_fp8 import accuracy
from engine.cuda.fp8 import Fp8Linear, quantised
from engine.cuda.kernels.fused import quantise_rows
from engine.model_config import ModelUnsupported
from engine.native import NativeRunner
from tests.support.fp8_reference import RoundedLinears
from tests.support.tiny_models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("size", [2560, 4096, 9728, 14336, 27648])
def test_rows_of_serving_sizes_are_quantised_as_plain_torch_does(size: int) -> None:
    torch.manual_seed(size)
    rows = (torch.randn(300, size, device=CUDA) * torch.rand(300, 1, device=CUDA) * 50).bfloat16()
    stored, scales = quantise_rows(rows)
    expected, expected_scales = quantised(rows)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    assert (stored.float() == expected.float()).float().mean() > 0.999
    torch.testing.assert_close(stored.float(), expected.float(), rtol=0.13, atol=2**-8)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 64, 300])
@pytest.mark.parametrize(("size", "out"), [(128, 384), (4096, 6144), (14336, 4096)])
def test_products_are_those_of_plain_torch_and_can_be_captured(
    size: int, out: int, num_tokens: int, has_bias: bool
) -> None:
    torch.manual_seed(size + num_tokens)
    weight = (torch.randn(out, size, device=CUDA) / size**0.5 * torch.rand(out, 1, device=CUDA)).bfloat16()
    bias = torch.randn(out, device=CUDA).bfloat16() if has_bias else None
    x = (torch.randn(num_tokens, size, device=CUDA) * torch.rand(num_tokens, 1, device=CUDA) * 9).bfloat16()
    linear = Fp8Linear(weight, bias)
    expected = RoundedLinears().prepare(weight, bias)(x).float()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = linear(x)
    graph.replay()
    for found in (captured, linear(x)):
        assert float((found.float() - expected).norm() / expected.norm()) < 1e-2


def test_weights_in_fp8_want_bfloat16(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "llama", num_hidden_layers=1)
    with pytest.raises(ModelUnsupported, match="add --dtype bfloat16"):
        NativeRunner(model_dir, dtype="float32", device="cuda", num_blocks=4, quantization="fp8")


def test_the_demo_model_in_fp8_says_about_what_it_says_in_bf16() -> None:
    """The figures: `python -m bench.gpu_session fp8`. Bounds are three times what plain torch shows on the CPU."""
    for figure in accuracy(2):
        assert figure["nats_from_plain_torch"] < 0.07, figure
        assert figure["nats_from_bf16"] < 0.09, figure
        assert figure["same_token_as_bf16"] > 0.88, figure
