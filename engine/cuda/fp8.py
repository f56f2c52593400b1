"""8-bit floating point (e4m3) on a device: linears whose weights and inputs are in it, and the scales of KV in it.

A number is what is stored times a scale. Weights have a scale per output channel, made when they are loaded; inputs one
per token, made when they are computed; stored keys and values one each per layer, the checkpoint's.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from engine.cuda.kernels.fused import LARGEST, SMALLEST, quantise_rows
from engine.kv_pool import FP8
from engine.model_config import ModelUnsupported
from engine.models.decoder import kv_scale_names
from engine.weights import WeightsMismatch, WeightSource

_MULTIPLE: Final = 16  # of both sizes of a product's weights: cuBLAS takes no others
_ROWS_AT_A_TIME: Final = 4096  # in float32 a matrix has four times its bytes in fp8, and loading needs some copies


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` [n, size] in fp8, the largest of each at 448, and their scales [n, 1] float32. Plain torch."""
    largest, smallest = LARGEST.value, SMALLEST.value
    stored = torch.empty(rows.shape, dtype=FP8, device=rows.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    for begin in range(0, len(rows), _ROWS_AT_A_TIME):
        run = slice(begin, begin + _ROWS_AT_A_TIME)
        wide = rows[run].float()
        scales[run] = wide.abs().amax(-1, keepdim=True).clamp(min=smallest) / largest
        stored[run] = (wide / scales[run]).clamp_(-largest, largest).to(FP8)
    return stored, scales


class Fp8Linear:
    """x @ W.T + b, multiplied in fp8 and summed in float32; x and the result are in the dtype of `weight`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises ModelUnsupported: a size of `weight` is no multiple of 16."""
        if any(size % _MULTIPLE for size in weight.shape):
            raise ModelUnsupported(
                f"quantization fp8 takes products of multiples of {_MULTIPLE}; one of this rank's is "
                f"{weight.shape[1]} -> {weight.shape[0]}"
            )
        stored, scales = quantised(weight)
        self._weight = stored.T  # [in_features, out_features], column-major
        self._scales = scales.T.contiguous()  # [1, out_features]
        self._bias, self._dtype = bias, weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return self.product(*quantise_rows(x))

    def product(self, rows: Tensor, scales: Tensor) -> Tensor:
        """The same of inputs that are in fp8 already: [num_tokens, in_features], and their scales [num_tokens, 1]."""
        return torch._scaled_mm(
            rows,
            self._weight,
            scale_a=scales,
            scale_b=self._scales,
            bias=self._bias,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )


class Fp8Linears:
    """See LinearBackend."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        """A linear that holds `weight` in half of bfloat16's bytes."""
        return Fp8Linear(weight, bias)


def kv_scales(weights: WeightSource, num_layers: int, *, is_fp8: bool) -> list[tuple[float, float]]:
    """Of keys and of values, per layer: the checkpoint's for KV in fp8, 1.0 for what it has none for.

    Raises:
        WeightsMismatch: one of them is not a positive number.
    """
    if not is_fp8:
        return [(1.0, 1.0)] * num_layers
    names = [kv_scale_names(layer) for layer in range(num_layers)]
    return [(_scale(weights, k_name), _scale(weights, v_name)) for k_name, v_name in names]


def _scale(weights: WeightSource, name: str) -> float:
    if name not in weights:
        return 1.0
    scale = float(weights.read(name))
    if not (math.isfinite(scale) and scale > 0):
        raise WeightsMismatch(f"{name} is {scale}: a scale of KV is a positive number")
    return scale
