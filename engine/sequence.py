"""One sequence: its tokens, its blocks, its state. Knows neither the ledger nor the runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from baton.kv_layout import UNIT_TOKENS
from baton.prefix_hash import PrefixHasher
from baton.request import GenerateRequest
from engine.types import SeqState

_NEXT: Final[Mapping[SeqState, frozenset[SeqState]]] = {
    SeqState.WAITING: frozenset({SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.RUNNING: frozenset({SeqState.WAITING, SeqState.HELD, SeqState.QUARANTINED, SeqState.FINISHED}),
    SeqState.HELD: frozenset({SeqState.QUARANTINED, SeqState.FINISHED}),
    SeqState.RECEIVING: frozenset({SeqState.RUNNING, SeqState.QUARANTINED}),
    SeqState.QUARANTINED: frozenset({SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}
"""RUNNING -> WAITING is preemption; RECEIVING ends only by commit or by the quarantine that follows an abort.

RUNNING and HELD go through QUARANTINED only where steps overlap: a launched step still names the blocks."""


class Sequence:
    """One attempt of one request on this engine.

    Invariants: `token_ids` only grows (request's tokens, then generated ones); KV of its first `num_computed_tokens`
    is in `block_table`, in order; the first `num_published_blocks` blocks were offered to the prefix cache. A
    preempted sequence gets a new, empty table: the old list is never changed, so a plan may refer to it.
    Engine thread only.
    """

    __slots__ = (
        "arrival",
        "attempt_id",
        "banned_token_ids",
        "block_keys",
        "block_table",
        "has_penalty",
        "has_prefill_finished",
        "has_prefill_started",
        "hold_kv",
        "length_limit",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_published_blocks",
        "order",
        "output_token_ids",
        "prompt_token_ids",
        "request",
        "state",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerateRequest,
        state: SeqState,
        arrival: int,
        *,
        max_len: int,
        eos_token_ids: tuple[int, ...] = (),
        hold_kv: bool = False,
    ) -> None:
        params = request.sampling
        self.request = request
        self.attempt_id = request.attempt_id
        self.state = state
        self.hold_kv = hold_kv
        self.arrival = arrival
        self.order = (request.priority, arrival)
        """Smaller is served sooner and preempted later."""
        self.token_ids = list(request.token_ids)
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_published_blocks = 0
        self.has_prefill_started = False
        self.has_prefill_finished = False
        self.num_cached_tokens: int | None = None
        """Tokens found in the prefix cache at the first admission; None before it."""
        self.length_limit = min(max_len, request.num_prompt_tokens + params.max_tokens)
        """The sequence ends with LENGTH when it has this many tokens."""
        self.stop_token_ids = frozenset(params.stop_token_ids + (() if params.ignore_eos else eos_token_ids))
        self.banned_token_ids = tuple(sorted(self.stop_token_ids)) if params.min_tokens > 0 else ()
        """What can not be chosen before `min_tokens` output tokens exist."""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.output_token_ids: list[int] = []
        self.has_penalty = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)
        if self.has_penalty:  # only then are the two lists kept
            self.prompt_token_ids = request.token_ids[: request.num_prompt_tokens]
            self.output_token_ids = list(request.token_ids[request.num_prompt_tokens :])

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of the request so far, those of earlier attempts included."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed before the next token can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    def move_to(self, state: SeqState) -> None:
        """Change state. The only place where one changes."""
        assert state in _NEXT[self.state], f"{self.attempt_id}: {self.state} -> {state}"
        self.state = state

    def append(self, token_id: int) -> None:
        """One more output token; its KV is not computed yet."""
        self.token_ids.append(token_id)
        if self.has_penalty:
            self.output_token_ids.append(token_id)

    def resolve(self, position: int, token_id: int) -> None:
        """The output token at `position`, which was appended before it was known, or is the next one."""
        if position == len(self.token_ids):
            self.append(token_id)
            return
        self.token_ids[position] = token_id
        if self.has_penalty:
            self.output_token_ids[position - self.request.num_prompt_tokens] = token_id

    def block_key(self, index: int, hasher: PrefixHasher, block_size: int) -> bytes:
        """Prefix-cache key of block `index`, which must be full of known tokens: the chain key of its last unit.

        Hashed once; amortised O(1) when asked for in order.
        """
        while index >= len(self.block_keys):
            end = len(self.block_keys) * block_size
            parent = self.block_keys[-1] if end else hasher.root(self.request.tenant, self.request.cache_salt)
            for start in range(end, end + block_size, UNIT_TOKENS):
                parent = hasher.extend(parent, self.token_ids[start : start + UNIT_TOKENS])
            self.block_keys.append(parent)
        return self.block_keys[index]
