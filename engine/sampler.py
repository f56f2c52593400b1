"""Chooses tokens from logits. A row's result depends on its logits and its SampleSpec only, not on its batch.

Noise is counter-based: a pure function of (seed, sample_index, position, token id), so that any worker that computes
the same logits draws the same token, and a retry repeats no randomness.

Order of effects: logit_bias, penalties, bans, temperature, min_p, top_k, top_p. As in vLLM, except that nothing follows a
ban: it holds whatever the other parameters are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from baton.request import SamplingParams, TokenLogprobs
from engine.types import Sampled, SampleSpec

# splitmix64: increments by the golden ratio, then "variant 13" of the MurmurHash3 finaliser (Steele, Lea and Flood,
# "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17).
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS: Final = (30, 27, 31)
_MASK64: Final = 2**64 - 1
_UNIFORM_BITS: Final = 52
_NUCLEUS_GUESSES: Final = (1024, 16384)
LOWEST_TEMPERATURE: Final = 1e-200
"""Lower ones count as this one: any float32 over it is finite in float64, and far from its neighbours beside any noise."""


class NonFiniteLogits(RuntimeError):
    """Logits of some rows are NaN or infinite: the model's numbers broke down, and no token follows from them."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"logits of rows {list(rows)} are not finite")
        self.rows = tuple(rows)


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """One token per row of `logits` [num_rows, vocab_size] float32, which is left as it is.

    Token ids in a spec that are not in the vocabulary have no effect.

    Raises:
        NonFiniteLogits: naming the rows; nothing was sampled.
    """
    highest, greedy = logits.max(dim=-1)
    finite = torch.isfinite(highest)
    if not finite.all():
        raise NonFiniteLogits((~finite).nonzero().flatten().tolist())
    return [
        Sampled(token) if is_plain_greedy(spec) else _sample_row(logits[row], spec)
        for row, (token, spec) in enumerate(zip(greedy.tolist(), specs, strict=True))
    ]


def is_plain_greedy(spec: SampleSpec) -> bool:
    """Is the token simply the first of the largest logits?"""
    params = spec.params
    return (
        params.temperature == 0
        and params.num_logprobs is None
        and not spec.banned_token_ids
        and not params.logit_bias
        and not _has_penalty(params)
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _sample_row(raw: Tensor, spec: SampleSpec) -> Sampled:
    """`raw` is [vocab_size]. One row at a time: a reduction over a batch may add in another order."""
    logits = _adjusted(raw, spec)
    token = int(logits.argmax()) if spec.params.temperature == 0 else _draw(logits, spec)
    if spec.params.num_logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprobs(raw, token, spec.params.num_logprobs))


def _adjusted(raw: Tensor, spec: SampleSpec) -> Tensor:
    params = spec.params
    logits = raw.clone()
    bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < len(logits)}
    if bias:
        logits[list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    if _has_penalty(params):
        _penalise(logits, spec)
    banned = [token for token in spec.banned_token_ids if 0 <= token < len(logits)]
    if banned:
        logits[banned] = -math.inf
    return logits


def _penalise(logits: Tensor, spec: SampleSpec) -> None:
    """Repetition (Keskar et al. 2019, arXiv:1909.05858) over prompt and output; presence, frequency over output.

    A finite logit stays finite, so that it is never as unlikely as a banned one.
    """
    params = spec.params
    counts = Counter(spec.output_token_ids)
    if params.repetition_penalty != 1:
        seen = sorted({*spec.prompt_token_ids, *counts})
        values = logits[seen]
        limits = torch.finfo(logits.dtype)
        penalty = max(params.repetition_penalty, limits.tiny)
        penalised = torch.where(values > 0, values / penalty, values * penalty)
        logits[seen] = penalised.clamp(limits.min, limits.max)
    if counts:
        count = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[list(counts)] -= params.frequency_penalty * count + params.presence_penalty


def _draw(logits: Tensor, spec: SampleSpec) -> int:
    """A draw from softmax(logits / temperature), cut by min_p, top_k and top_p, by the Gumbel-max trick."""
    scaled = logits.double() / max(spec.params.temperature, LOWEST_TEMPERATURE)
    threshold = _threshold(scaled, spec.params)
    if threshold == -math.inf:
        candidates = torch.arange(len(scaled), device=scaled.device)
    else:
        candidates = (scaled >= threshold).nonzero().flatten()
        scaled = scaled[candidates]
    params = spec.params
    noise = gumbel_noise(params.seed, params.sample_index, spec.position, candidates)
    return int(candidates[(scaled + noise).argmax()])


def _threshold(scaled: Tensor, params: SamplingParams) -> float:
    """Tokens below this value are cut. A threshold, so that equal tokens are kept or cut together."""
    threshold = -math.inf
    if params.min_p > 0:  # p >= min_p * max(p)
        threshold = float(scaled.max()) + math.log(params.min_p)
    if 0 < params.top_k < len(scaled):
        threshold = max(threshold, float(scaled.topk(params.top_k).values[-1]))
    if params.top_p < 1:
        kept = scaled[scaled >= threshold]
        threshold = max(threshold, _nucleus(kept, params.top_p))
    return threshold


def _nucleus(scaled: Tensor, top_p: float) -> float:
    """The lowest value in the smallest set of likeliest tokens whose probability reaches `top_p`.

    (Holtzman et al. 2020, arXiv:1904.09751.) Sorts only as far as needed; the result does not depend on how far.
    """
    total = scaled.logsumexp(0)
    for width in (*_NUCLEUS_GUESSES, len(scaled)):
        width = min(width, len(scaled))
        likeliest = scaled.topk(width).values
        probs = (likeliest - total).exp()
        num_kept = max(1, int((probs.cumsum(0) - probs < top_p).sum()))
        if num_kept < width or width == len(scaled):
            break
    return float(likeliest[num_kept - 1])


def gumbel_noise(seed: int, sample_index: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each of `token_ids` (int64): always finite, in [-3.7, 36.8].

    Each (seed, sample_index, position) is hashed to a stream of splitmix64, whose output number `token id` is used:
    -log(-log(u)) with u the middle of one of 2**52 equal parts of (0, 1), which float64 holds exactly.
    """
    key = noise_key(seed, sample_index, position)
    # In place: a fresh megabyte per operation would cost more in page faults than the arithmetic does.
    bits = (token_ids + 1).mul_(_signed(_GOLDEN)).add_(key)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        # int64 shifts repeat the sign: mask it off.
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1))
        if multiplier is not None:
            bits.mul_(_signed(multiplier))
    top = bits.bitwise_right_shift_(64 - _UNIFORM_BITS).bitwise_and_(2**_UNIFORM_BITS - 1)
    uniform = top.double().add_(0.5).mul_(2.0**-_UNIFORM_BITS)
    return uniform.log_().neg_().log_().neg_()


def noise_key(seed: int, sample_index: int, position: int) -> int:
    """Which stream of splitmix64 is the noise of one token, as an int64."""
    key = 0
    for word in (seed, sample_index, position):
        key = _mix((key ^ (word & _MASK64)) + _GOLDEN)
    return _signed(key)


def _mix(word: int) -> int:
    """splitmix64's finaliser on Python integers."""
    word &= _MASK64
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        word ^= word >> shift
        if multiplier is not None:
            word = word * multiplier & _MASK64
    return word


def _signed(word: int) -> int:
    """The int64 with the same bits."""
    return word - 2**64 if word >= 2**63 else word


def _logprobs(raw: Tensor, token: int, num_top: int) -> TokenLogprobs:
    logprobs = raw.log_softmax(0)
    rank = 1 + int((raw > raw[token]).sum())
    top = logprobs.topk(min(num_top, len(raw)))
    return TokenLogprobs(
        logprob=float(logprobs[token]),
        rank=rank,
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
