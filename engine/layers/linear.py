"""The seam where a linear layer's weights take the form that a device computes best. Knows no model.

`TorchLinears` is the plain form; packed and quantised weights are other backends behind the same interface.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Linear(Protocol):
    """x @ W.T + b for a batch of rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features] in the dtype of `x`. Keeps no reference to `x`."""
        ...


class LinearBackend(Protocol):
    """Turns loaded weights into linears."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A linear of `weight` [out_features, in_features], contiguous, and `bias` [out_features].

        The backend may keep or copy them, never change them: a tied embedding shares its memory.
        """
        ...


class TorchLinears:
    """torch.nn.functional.linear on the weights as they are."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A linear that holds `weight` and `bias` themselves."""
        return lambda x: torch.nn.functional.linear(x, weight, bias)
