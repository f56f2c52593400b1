"""Root mean square normalisation, bit for bit as transformers computes it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean and the scaling are in float32; the result is rounded to x's dtype *before* the weight multiplies it
    (transformers' LlamaRMSNorm): the other order differs in bfloat16.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
