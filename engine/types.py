"""What a step is told and what it returns. Plain dataclasses without tensors: a plan crosses process borders."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from baton.kv_layout import DeviceMemory, KVLayout
from baton.request import AttemptId, GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs

PENDING: Final = -1
"""In a plan for an OverlappingRunner: the token that its step before chose for the same attempt, not read yet."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes that the scheduler obeys."""

    block_size: int = 16
    num_blocks: int = 0
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    """Token budget of one step: running decodes first, then chunks of prompts."""
    prefill_first: bool = False
    """No decode while a prompt can be computed: the rival that disaggregation is measured against."""
    enable_prefix_caching: bool = True
    decode_reserve_blocks: int = 1
    """Blocks beyond the prompt that `reserve` holds for growth."""
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0


@dataclass(slots=True)  # never changed; frozen would make the two that each sequence gets per step 4x as slow to build
class SampleSpec:
    """How to choose the next token of one sequence in this step.

    `position` is the absolute index the chosen token will have in the sequence (prompt included): the counter of
    the noise. `prompt_token_ids` and `output_token_ids` feed penalties and are empty unless a penalty needs them.
    `banned_token_ids` can not be chosen in this step (min_tokens).
    """

    params: SamplingParams
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()


@dataclass(slots=True)  # never changed, like SampleSpec
class BatchEntry:
    """One sequence's part of a step: compute tokens [start, start + len(token_ids)).

    The KV of all positions before `start` is in the pool; the step writes the KV of the new positions through
    `block_table` (block ids, one per `block_size` tokens, covering at least start + len(token_ids) tokens).
    `sample` is None for a chunk that is not the last of its prompt.
    `tenant` and `salt` matter to the simulated engine only.
    """

    attempt_id: AttemptId
    start: int
    token_ids: Sequence[int]
    block_table: Sequence[int]
    sample: SampleSpec | None = None
    tenant: str = "default"
    salt: str = ""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything a rank needs to run one step. Entries with one token and `start` > 0 are decodes."""

    step_id: int
    entries: Sequence[BatchEntry]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(entry.token_ids) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token of one entry."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class StepFailed(RuntimeError):
    """The step computed no tokens, because the numbers of some sequences broke down.

    `attempt_ids` names them. The same plan without them may be run again.
    """

    def __init__(self, message: str, attempt_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.attempt_ids = tuple(attempt_ids)


class StepHook(Protocol):
    """Called by the runner on the engine thread of every rank, in this order, once per step; must not block."""

    def step_begin(self, plan: StepPlan) -> None:
        """KV of positions before each entry's `start` is in the pool."""
        ...

    def layer_done(self, layer: int, ready: object | None) -> None:
        """The KV of `layer` for all entries of the step is written (on a GPU: once `ready` has fired)."""
        ...

    def step_done(self) -> None:
        """All layers are written."""
        ...


class Runner(Protocol):
    """Executes plans on one rank and owns that rank's KV pool. Only its engine thread calls it."""

    layout: KVLayout

    def kv_buffer(self) -> memoryview | DeviceMemory:
        """The whole pool in the canonical layout (baton.kv_layout): as writable bytes, or where it is on a device.

        Valid until `close`.
        """
        ...

    def kv_fd(self) -> int | None:
        """The memfd behind the pool, for shared-memory readers; None if there is none."""
        ...

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Run one step; one result per entry, None where `sample` is None.

        On a follower rank (tp_rank > 0) the results are all None. Blocks until the step is done.

        Raises:
            StepFailed: some sequences can not go on; no token was chosen for any.
        """
        ...

    def close(self) -> None:
        """Free the pool and everything shared with other ranks. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. `feeds`: what it samples can be PENDING in the next one."""

    plan: StepPlan
    feeds: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """What a launched step did. Rows do not depend on each other: those of `failed` attempts have no token."""

    sampled: list[Sampled | None]
    failed: list[AttemptId] = field(default_factory=list)


class OverlappingRunner(Protocol):
    """Starts a step before the one before it is read. Steps run in the order of their launches; engine thread only."""

    def launch(self, plan: StepPlan, hook: StepHook | None = None) -> Launched:
        """Start a step and return. A decode's token may be PENDING if its attempt sampled in the step launched last.

        At most two steps are under way. The blocks that `plan` names must stay its own until `collect` has returned.
        """
        ...

    def collect(self, launched: Launched) -> Collected:
        """Wait for the oldest step under way; one result per entry, as `Runner.run` has them."""
        ...


class SeqState(enum.StrEnum):
    """Where a sequence is. The comment says who holds its blocks."""

    WAITING = "waiting"  # nobody
    RUNNING = "running"  # the sequence: prefill chunks or decode
    HELD = "held"  # the sequence, PINNED for a transfer: its prefill is finished
    RECEIVING = "receiving"  # the sequence: a transfer writes into them
    QUARANTINED = "quarantined"  # the ledger: the request is gone, a copy or a launched step may still use them
    FINISHED = "finished"  # nobody


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that a decode worker promised to one transfer.

    The first `num_cached_tokens` tokens (a multiple of UNIT_TOKENS and of block_size) are already there, in pinned
    cached blocks at the head of `block_table`; only the rest must be sent.
    """

    attempt_id: AttemptId
    block_table: tuple[int, ...]
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did."""

    events: list[TokenEvent] = field(default_factory=list)
    prefill_started: list[AttemptId] = field(default_factory=list)
    """Attempts whose first chunk was in this step."""
    prefill_finished: list[AttemptId] = field(default_factory=list)
    preempted: list[AttemptId] = field(default_factory=list)
    failed: list[AttemptId] = field(default_factory=list)
    """Aborted, because their numbers broke down; the step computed nothing for the others, who go on."""
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for heartbeats, status and audits. After quiescence every block is free or cached."""

    blocks_by_state: dict[str, int]
    """Keys: free, cached (free but hashed), running, held, receiving, quarantined; they sum to num_blocks."""
    seqs_by_state: dict[str, int]
    num_blocks: int
    num_steps: int
    num_preemptions: int
    num_tokens_computed: int
    num_prefix_hit_tokens: int
    num_prefix_query_tokens: int
    run_s: float = 0.0
    """Seconds spent in the runner so far."""
    bookkeeping_s: float = 0.0
    """Seconds of `step` spent outside the runner so far."""


class Engine(Protocol):
    """One model replica, as its driver sees it. Synchronous, no I/O, one thread.

    (engine.engine.LocalEngine is the implementation; it drives any Runner: native or simulated.)
    """

    def add(self, request: GenerateRequest, *, hold_kv: bool = False) -> None:
        """Queue a request.

        With `hold_kv` (prefill role) the sequence stops after its first sampled token and keeps its blocks, HELD,
        until `release` or `abort`; all its prompt blocks are taken before its first chunk, so it is never preempted.
        They are kept even if that first token ends the request: a transfer may still read them.

        Raises:
            PromptTooLong, InvalidRequest: the request can never run here; nothing was queued.
        """
        ...

    def reserve(self, request: GenerateRequest) -> Reservation:
        """Hold blocks for the request's tokens and a bounded growth; state RECEIVING. Never blocks.

        Raises:
            Overloaded: not enough free blocks after eviction; nothing is held.
        """
        ...

    def commit(self, attempt_id: AttemptId, first: TokenEvent) -> None:
        """All KV of a RECEIVING sequence is in place and verified, and `first` is its next token: start to decode it.

        The full blocks received are published to the prefix cache. `first` itself is not reported again.

        Raises:
            TransferError: `first` can not be the next token, or the two workers disagree on whether it is the last.
                Nothing changed: abort it.
        """
        ...

    def release(self, attempt_id: AttemptId) -> None:
        """Let go of a HELD sequence's blocks (they stay cached). Unknown ids are ignored."""
        ...

    def abort(self, attempt_id: AttemptId) -> None:
        """End a sequence in any state and free its blocks, without an event. Unknown ids are ignored.

        A RECEIVING sequence's blocks become QUARANTINED: they return with `quiesced`, never by time.
        """
        ...

    def quiesced(self, attempt_id: AttemptId) -> None:
        """No copy into the aborted sequence's blocks can happen any more: free them (without publishing)."""
        ...

    def has_work(self) -> bool:
        """Would `step` compute something?"""
        ...

    def step(self, hook: StepHook | None = None) -> StepResult:
        """Schedule, run and postprocess one batch."""
        ...

    def block_table(self, attempt_id: AttemptId) -> tuple[int, ...]:
        """The sequence's blocks, in order."""
        ...

    def stats(self) -> EngineStats:
        """Cheap; exact between steps."""
        ...
