"""FlashAttention for prompts from their first token on: whose kernel computes it, and whether it is right here.

Such a prompt attends to the keys and values of its own step alone, which are at hand, one after the other. Knows no pool.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

CHOICES: Final = ("auto", "triton", "flash")

_TRIAL_LENGTHS: Final = (1, 65, 2, 130)
_TRIAL_WINDOW: Final = 33  # at most: a window that holds a whole trial would show nothing
_TOLERANCE: Final = 0.02  # bfloat16 makes less than 0.01, one key too many or too few more than 0.05


class PromptAttention(Protocol):
    """Causal attention of sequences, each to itself alone."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None
    ) -> Tensor:
        """[num_tokens, heads, head_dim], like `query`, of which head h reads KV head h // (heads / kv_heads).

        `key` and `value` are [num_tokens, kv_heads, head_dim]; rows may lie apart, what is in a row does not. Sequence s
        is rows bounds[s] to bounds[s + 1]: `bounds` is [num_seqs + 1] int32, from 0 to num_tokens; none is longer
        than `longest`. `window`: how many of the last tokens a query sees, its own included (None: all). Does not wait
        for the device.
        """
        ...


@dataclass(frozen=True, slots=True)
class PromptShape:
    """What a rank's prompts look like to attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    """Per layer."""


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None
) -> Tensor:
    """PromptAttention in plain torch on any device: the oracle. Waits for the device."""
    out = torch.empty_like(query)
    place = torch.arange(longest, device=query.device)
    distance = place[:, None] - place
    is_seen = (distance >= 0) & (distance < (longest if window is None else window))
    for begin, end in pairwise(bounds.tolist()):
        q, k, v = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
        mask = is_seen[: end - begin, : end - begin]
        out[begin:end] = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return out


def flash_attention_3() -> PromptAttention:
    """Dao-AILab's, for Hopper. Raises ImportError: it is not installed."""
    function: Callable[..., Any] = importlib.import_module("flash_attn_interface").flash_attn_varlen_func

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None) -> Tensor:
        given = (query, key, value, bounds, bounds, longest, longest)
        found = function(*given, causal=True, window_size=_window_size(window))
        return cast("Tensor", found[0] if isinstance(found, tuple) else found)  # older ones give sums of weights, too

    return attend


def torch_flash_attention() -> PromptAttention:
    """FlashAttention 2 inside torch. Raises RuntimeError: this torch was built without."""
    if not torch.backends.cuda.is_flash_attention_available():
        raise RuntimeError("this torch was built without FlashAttention")
    from torch.nn.attention import varlen  # it loads torch's compiler

    function: Callable[..., Any] = varlen.varlen_attn
    is_asked = "enable_gqa" in inspect.signature(function).parameters  # torch 2.11 takes fewer KV heads unasked
    options = {"enable_gqa": True} if is_asked else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None) -> Tensor:
        given = (query, key, value, bounds, bounds, longest, longest)
        return cast("Tensor", function(*given, window_size=_window_size(window), **options))

    return attend


def _window_size(window: int | None) -> tuple[int, int]:
    """Tokens seen to the left and to the right of a query's own; -1: all."""
    return (-1 if window is None else window - 1, 0)


IMPLEMENTATIONS: Final[Mapping[str, Callable[[], PromptAttention]]] = {
    "FlashAttention 3": flash_attention_3,
    "FlashAttention of torch": torch_flash_attention,
}
"""In order of preference. Calling one loads it."""


def choose(
    choice: str,
    shape: PromptShape,
    kv_dtype: torch.dtype,
    device: torch.device,
    implementations: Mapping[str, Callable[[], PromptAttention]] = IMPLEMENTATIONS,
) -> PromptAttention | None:
    """The first that is installed and right about a small batch here; None: the Triton kernel computes prompts, too.

    Logs which one it is, and why not another. `choice` "triton" tries none; "flash" does not do without. Blocks.

    Raises:
        ValueError: `choice` is not in CHOICES, or it is "flash" and none computes this here.
    """
    if choice not in CHOICES:
        raise ValueError(f"prompt_attention must be one of {CHOICES}, not {choice!r}")
    reasons: list[str] = []
    if choice == "triton":
        reasons.append("it was asked for")
    elif kv_dtype != shape.dtype:  # later tokens see rounded KV: prompts must, or their chunks would not agree
        reasons.append(f"KV is kept as {kv_dtype}, computed as {shape.dtype}")
    else:
        for name, load in implementations.items():
            try:
                found = load()
                problem = _problem(found, shape, device)
            except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
                problem = (str(error).splitlines() or [type(error).__name__])[0]
            if problem is None:
                log.info("attention of prompts", extra={"prompt_attention": name, "reason": "; ".join(reasons)})
                return found
            reasons.append(f"{name}: {problem}")
    if choice == "flash":
        raise ValueError(f"prompt_attention: flash does not compute here: {'; '.join(reasons)}")
    log.info("attention of prompts", extra={"prompt_attention": "Triton", "reason": "; ".join(reasons)})
    return None


@torch.inference_mode()
def _problem(attend: PromptAttention, shape: PromptShape, device: torch.device) -> str | None:
    """What is wrong with its result; None: nothing. Raises what it raises."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    bounds = [0, *accumulate(_TRIAL_LENGTHS)]
    size = (bounds[-1], heads + 2 * kv_heads, shape.head_dim)
    qkv = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, shape.dtype)
    query, key = qkv[:, :heads].contiguous(), qkv[:, heads:-kv_heads].contiguous()
    value = qkv[:, -kv_heads:]  # as in a step: between other heads
    where = torch.tensor(bounds, dtype=torch.int32, device=device)
    for window in {None if window is None else min(window, _TRIAL_WINDOW) for window in shape.windows}:
        given = (where, max(_TRIAL_LENGTHS), window)
        actual = attend(query, key, value, *given)
        expected = plain_attention(query.float(), key.float(), value.float(), *given)
        if actual.shape != query.shape or actual.dtype != query.dtype:
            return f"its result is {actual.dtype} {tuple(actual.shape)}"
        error = float((actual.float() - expected).norm() / expected.norm())
        if not error < _TOLERANCE:
            return f"its result is off by {error:.3f} of its size (window {window})"
    return None
