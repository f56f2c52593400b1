"""min_p, top_k and top_p for a whole batch on the device, with the thresholds of engine.sampler."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_ROWS: Final = 32
"""Rows that are sorted at a time: a large vocabulary in float64 is a megabyte per row and copy."""


def cut(logits: Tensor, temperatures: Tensor, log_min_p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """A copy of `logits` [num_rows, vocab] in float32, -inf where the parameters of a row exclude a token.

    Per row: `temperatures` (0 counts as 1), `log_min_p` (-inf: none) and `top_p` (1: none) in float64, `top_k` (0: none)
    in int32. Does not wait for the device.
    """
    parts = [
        _cut(*rows)
        for rows in zip(
            *(torch.split(given, _ROWS) for given in (logits, temperatures, log_min_p, top_p, top_k)),
            strict=True,
        )
    ]
    return torch.cat(parts)


def _cut(logits: Tensor, temperatures: Tensor, log_min_p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    vocab = logits.shape[1]
    scaled = logits.double() / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    ordered = scaled.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long() - 1
    threshold = torch.maximum(ordered[:, 0] + log_min_p, ordered.gather(1, last[:, None])[:, 0])
    is_kept = ordered >= threshold[:, None]
    probs = torch.where(is_kept, ordered, -math.inf).softmax(dim=-1)
    num_kept = ((probs.cumsum(-1) - probs < top_p[:, None]) & is_kept).sum(-1).clamp(min=1)
    nucleus = ordered.gather(1, num_kept[:, None] - 1)[:, 0]
    threshold = torch.where(top_p < 1, torch.maximum(threshold, nucleus), threshold)
    return torch.where(scaled >= threshold[:, None], logits.float(), -math.inf)
