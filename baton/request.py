"""One generation request and its tokens, as every process sees them. Knows no text and no KV."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
AttemptId = NewType("AttemptId", str)
"""`{request_id}/{attempt}`: fences everything that a worker does for one attempt of one request."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Workers use STOP, LENGTH, ABORT and ERROR; clients never see ABORT."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen: vLLM's names and defaults; stop *strings* stay in the router.

    `temperature == 0` is greedy. `top_k == 0` means all. Noise is a pure function of
    (`seed`, `sample_index`, position, token id), so a retry on another worker samples the same tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample_index: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    """None: no logprobs. n >= 0: the chosen token's logprob and those of the n likeliest tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the unmodified distribution (before temperature and penalties)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One attempt of one request, as a worker computes it.

    `token_ids` is the prompt followed by tokens that were already delivered to the client
    (`num_prompt_tokens` says where the prompt ends); those are input and are never generated again.
    """

    attempt_id: AttemptId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    tenant: str = "default"
    cache_salt: str = ""
    priority: int = 0
    deadline_s: float | None = None
    """Remaining budget in seconds when the message was sent; never a wall-clock time."""

    @property
    def num_delivered_tokens(self) -> int:
        """Output tokens that an earlier attempt delivered."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of one attempt. `index` counts output tokens of the request from 0, across attempts."""

    attempt_id: AttemptId
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from a prefix cache; set on the first event of an attempt."""


def attempt_id(request_id: RequestId, attempt: int) -> AttemptId:
    """The id of attempt number `attempt` (from 1) of a request."""
    return AttemptId(f"{request_id}/{attempt}")
