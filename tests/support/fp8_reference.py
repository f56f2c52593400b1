"""What the CUDA backend computes with fp8 KV and fp8 weights, in plain torch on the CPU, one sequence at a time.

python -m tests.support.fp8_reference        # how far that is from bf16 and float32 on the demo model
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baton.config import DEMO_MODEL_DIR
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.request import AttemptId
from engine.attention.reference import ReferenceAttention
from engine.comm import SingleComm
from engine.cuda.fp8 import kv_scales, quantised
from engine.cuda.pool import DevicePool
from engine.kv_pool import FP8, TORCH_DTYPES
from engine.layers.linear import Linear, LinearBackend, TorchLinears
from engine.model_config import read_model_config
from engine.models.decoder import Decoder, optional_tensors, tensor_shapes
from engine.types import BatchEntry
from engine.weights import Checkpoint

_BLOCK_SIZE = 16


class RoundedKV(ReferenceAttention):
    """Keys and values are rounded to fp8 on their way into a pool of the model's dtype."""

    scales: list[tuple[float, float]]

    def write_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See AttentionBackend."""
        k_scale, v_scale = self.scales[layer]
        super().write_kv(layer, through_fp8(key, k_scale), through_fp8(value, v_scale))


def through_fp8(values: Tensor, scale: float) -> Tensor:
    """What is read where `values` were stored in fp8, divided by `scale`."""
    stored = (values.float() * (1 / scale)).clamp(-448, 448).to(FP8)
    return (stored.float() * scale).to(values.dtype)


class RoundedLinears:
    """Products of rows and weights in fp8, each with a scale, summed in float32."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See LinearBackend."""
        stored, scales = quantised(weight)

        def linear(x: Tensor) -> Tensor:
            rows, row_scales = quantised(x)
            product = (rows.float() @ stored.float().T) * row_scales * scales.T
            return (product if bias is None else product + bias.float()).to(x.dtype)

        return linear


class Fp8Reference:
    """A model of a directory; whatever is not in fp8 is in `dtype`."""

    def __init__(
        self, model_dir: Path, *, dtype: str = "float32", kv: bool = False, weights: bool = False, max_tokens: int = 512
    ) -> None:
        config = read_model_config(model_dir)
        source = Checkpoint(model_dir, tensor_shapes(config), optional_tensors(config))
        layers = (LayerSpec(config.num_kv_heads, config.head_dim),) * config.num_layers
        self._table = range(-(-max_tokens // _BLOCK_SIZE))
        geometry = KVGeometry(1, _BLOCK_SIZE, len(self._table))
        pool = DevicePool(KVLayout(ModelKV(layers, dtype, ""), geometry, 0), torch.device("cpu"))
        linears: LinearBackend = RoundedLinears() if weights else TorchLinears()
        self._decoder = Decoder(config, source, dtype=TORCH_DTYPES[dtype], comm=SingleComm(), linears=linears)
        self._attention = ReferenceAttention(pool, config.windows)
        if kv:
            rounded = RoundedKV(pool, config.windows)
            rounded.scales = kv_scales(source, config.num_layers, is_fp8=True)
            self._attention = rounded

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[len(tokens), vocab_size] float32: what follows each token."""
        self._attention.begin_step([BatchEntry(AttemptId("a"), 0, tokens, self._table)])
        rows = torch.arange(len(tokens))
        found = self._decoder.forward(torch.tensor(tokens), rows, rows, self._attention, lambda layer: None)
        assert found is not None
        return found

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Every token computes its whole past anew."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def divergence(exact: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of rows of logits, nats per token."""
    exact, other = exact.log_softmax(-1), other.log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def demo_sequences() -> list[list[int]]:
    """What the demo model itself says, so that its distributions are those of use: 8 sequences of 160 tokens."""
    model = Fp8Reference(DEMO_MODEL_DIR)
    starts = [[1, 3 + 97 * index % 1000, 3 + 31 * index % 1000] for index in range(8)]
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: list[int]) -> int:
        return int(torch.multinomial(model.logits(tokens)[-1].softmax(-1), 1, generator=generator))

    return [_continued(start, 157, drawn) for start in starts]


def _continued(start: list[int], num_tokens: int, following: Callable[[list[int]], int]) -> list[int]:
    tokens = list(start)
    for _ in range(num_tokens):
        tokens.append(following(tokens))
    return tokens


def main() -> None:
    """Print a line per variant, beside bf16 and beside float32."""
    sequences = demo_sequences()

    def logits(**settings: object) -> Tensor:
        model = Fp8Reference(DEMO_MODEL_DIR, **settings)  # type: ignore[arg-type]
        return torch.cat([model.logits(sequence) for sequence in sequences])

    exact, bf16 = logits(), logits(dtype="bfloat16")
    variants = {
        "bf16": bf16,
        "fp8 KV": logits(dtype="bfloat16", kv=True),
        "fp8 weights": logits(dtype="bfloat16", weights=True),
        "both": logits(dtype="bfloat16", kv=True, weights=True),
    }
    for name, found in variants.items():
        for beside, of in (("float32", exact), ("bf16", bf16)):
            same = (found.argmax(-1) == of.argmax(-1)).float().mean()
            sys.stdout.write(
                f"{name} beside {beside}: likeliest token the same {same:.2%}, {divergence(of, found):.5f} nats, "
                f"logits differ by {(found - of).abs().mean():.4f} on average, {(found - of).abs().max():.3f} at most "
                f"(they spread by {of.std():.2f})\n"
            )


if __name__ == "__main__":
    main()
