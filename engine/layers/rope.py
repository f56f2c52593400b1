"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their scalings, as transformers 5 computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig


class RotaryEmbedding:
    """Angles for any set of positions. Immutable."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | None = None) -> None:
        inv_freq, self._scale = inverse_frequencies(rope, head_dim)
        self._inv_freq = inv_freq.to(device)  # [head_dim / 2], float32

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [num_tokens], int64 -> cos and sin [num_tokens, 1, head_dim]; computed in float32, then rounded."""
        angles = positions.float()[:, None] * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [num_tokens, heads, head_dim] by angles from `cos_sin`; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per token of each pair, [head_dim / 2] float32, and what multiplies cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    pos_freqs = rope.theta**exponents
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, pos_freqs)
    inv_freq = 1.0 / pos_freqs
    if rope.rope_type == "linear":
        inv_freq /= rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    low_wavelen = rope.original_max_position / rope.low_freq_factor
    high_wavelen = rope.original_max_position / rope.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_wavelen, inv_freq / rope.factor, inv_freq)
    smooth = (rope.original_max_position / wavelen - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_medium = ~(wavelen < high_wavelen) & ~(wavelen > low_wavelen)
    return torch.where(is_medium, smoothed, scaled)


def _yarn(rope: RopeConfig, head_dim: int, pos_freqs: Tensor) -> tuple[Tensor, float]:
    """YaRN, "NTK-by-parts" (Peng et al. 2023, arXiv:2309.00071, section 3.2) with its attention temperature."""

    def correction_dim(num_rotations: float) -> float:
        return (head_dim * math.log(rope.original_max_position / (num_rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float) - low) / (high - low), 0, 1)
    keep = 1 - ramp  # 1: extrapolate (short wavelengths), 0: interpolate
    inv_freq = 1.0 / (rope.factor * pos_freqs) * (1 - keep) + 1.0 / pos_freqs * keep
    return inv_freq, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
