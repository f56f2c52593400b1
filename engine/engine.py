"""One model replica: requests in, token events out. Drives any Runner; knows no network and no transfer."""

from __future__ import annotations

from baton.clock import Clock
from baton.errors import InvalidRequest, Overloaded, PromptTooLong, TransferError
from baton.prefix_hash import MAX_SALT_CHARS, PrefixHasher
from baton.request import AttemptId, FinishReason, GenerateRequest, TokenEvent
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence
from engine.types import (
    BatchEntry,
    EngineConfig,
    EngineStats,
    Reservation,
    Runner,
    Sampled,
    SampleSpec,
    SeqState,
    StepFailed,
    StepHook,
    StepPlan,
    StepResult,
)


class LocalEngine:
    """The implementation of `engine.types.Engine`, whose docstrings are the contract. One thread.

    `max_len` is the longest a sequence can get: the model's context or, if that is less, all blocks of the pool. A
    sequence that reaches it ends with LENGTH, and a prompt that leaves no room for one more token is refused; so
    every sequence that is accepted fits when it is alone.

    If the runner raises anything but StepFailed, the step is lost and the engine is not usable any more: its process must end.
    """

    def __init__(self, config: EngineConfig, runner: Runner, hasher: PrefixHasher, clock: Clock) -> None:
        """Take over the runner. `clock` only measures where time goes (`EngineStats`).

        Raises:
            ValueError: the config is incomplete or the runner's pool has another geometry.
        """
        geometry = runner.layout.geometry
        if (config.block_size, config.num_blocks) != (geometry.block_size, geometry.num_blocks):
            raise ValueError(f"{config} does not match the runner's {geometry}")
        for name in ("num_blocks", "vocab_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(config, name) <= 0:
                raise ValueError(f"EngineConfig.{name} must be positive, not {getattr(config, name)}")
        self.config = config
        self.max_len = min(config.max_model_len, config.num_blocks * config.block_size)
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(config, hasher)
        self._seqs: dict[AttemptId, Sequence] = {}
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_tokens_computed = 0
        self._run_s = 0.0
        self._bookkeeping_s = 0.0

    def add(self, request: GenerateRequest, *, hold_kv: bool = False) -> None:
        """Queue a request."""
        self._check(request)
        seq = self._sequence(request, SeqState.WAITING, hold_kv=hold_kv)
        self._scheduler.add(seq)
        self._seqs[request.attempt_id] = seq

    def reserve(self, request: GenerateRequest) -> Reservation:
        """Hold blocks for tokens that a transfer will bring; a full prefix hit leaves nothing to send.

        Also Raises:
            PromptTooLong, InvalidRequest: the request can never run here.
        """
        self._check(request)
        num_tokens, block_size = len(request.token_ids), self.config.block_size
        seq = self._sequence(request, SeqState.RECEIVING)
        num_covered = -(-num_tokens // block_size) * block_size
        # Growth is bounded by what the sequence can ever use, so that a request that fits alone can be granted.
        with_growth = min(num_covered + self.config.decode_reserve_blocks * block_size, seq.length_limit)
        if not self._scheduler.reserve(seq, with_growth):
            raise Overloaded(
                f"no room for {num_tokens} tokens: {self._scheduler.pool.num_available} of {self.config.num_blocks} "
                f"blocks are available and {self._num_active} of {self.config.max_num_seqs} slots are taken"
            )
        self._seqs[request.attempt_id] = seq
        return Reservation(
            attempt_id=request.attempt_id,
            block_table=tuple(seq.block_table[: num_covered // block_size]),
            num_tokens=num_tokens,
            num_cached_tokens=seq.num_computed_tokens,
        )

    def commit(self, attempt_id: AttemptId, first: TokenEvent) -> None:
        """Start to decode a received sequence. If `first` says that it ended the request, it is finished at once.

        Raises:
            TransferError: `first` can not be this sequence's next token, or would end it by this worker's rules but
                not by the sender's. The sequence stays RECEIVING: abort it.
            LookupError: there is no such RECEIVING sequence.
        """
        seq = self._seqs.get(attempt_id)
        if seq is None or seq.state is not SeqState.RECEIVING:
            raise LookupError(f"{attempt_id} is not receiving")
        if first.index != seq.num_output_tokens or not 0 <= first.token_id < self.config.vocab_size:
            raise TransferError(f"{attempt_id}: token {first.token_id} at {first.index} can not be its next one")
        reason = self._finish_reason(seq, first.token_id, len(seq.token_ids))
        if reason is not None and first.finish_reason is None:
            raise TransferError(f"{attempt_id}: its first token ends it here ({reason}), but not where it was sampled")
        seq.has_prefill_started = seq.has_prefill_finished = True  # elsewhere
        self._scheduler.start(seq)
        self._scheduler.computed(seq, seq.num_pending_tokens)
        seq.append(first.token_id)
        if first.finish_reason is not None:
            self._finish(seq)

    def release(self, attempt_id: AttemptId) -> None:
        """Let go of a HELD sequence's blocks."""
        seq = self._seqs.get(attempt_id)
        if seq is not None:
            assert seq.state is SeqState.HELD, f"{attempt_id} is {seq.state}, not held"
            self._finish(seq)

    def abort(self, attempt_id: AttemptId) -> None:
        """End a sequence in any state."""
        seq = self._seqs.get(attempt_id)
        if seq is None or seq.state is SeqState.QUARANTINED:
            return
        if seq.state is SeqState.RECEIVING:
            self._scheduler.quarantine(seq)
        else:
            self._finish(seq)

    def quiesced(self, attempt_id: AttemptId) -> None:
        """Free a quarantined sequence's blocks."""
        seq = self._seqs.get(attempt_id)
        if seq is not None:
            assert seq.state is SeqState.QUARANTINED, f"{attempt_id} is {seq.state}, not quarantined"
            self._finish(seq)

    def has_work(self) -> bool:
        """Would `step` compute something? (A step that has to preempt its only sequence computes nothing.)"""
        return self._scheduler.has_work()

    def step(self, hook: StepHook | None = None) -> StepResult:
        """Schedule, run and postprocess one batch. Without work it does nothing."""
        began = self._clock.now()
        schedule = self._scheduler.schedule()
        result = StepResult(preempted=[seq.attempt_id for seq in schedule.preempted])
        self._num_preemptions += len(schedule.preempted)
        run_s = 0.0
        if schedule.chunks:
            self._num_steps += 1
            plan = StepPlan(self._num_steps, [self._entry(chunk) for chunk in schedule.chunks])
            run_began = self._clock.now()
            try:
                sampled = self._runner.run(plan, hook)
            except StepFailed as failure:
                result = self._drop(failure, result.preempted)
            else:
                run_s = self._clock.now() - run_began
                result = self._postprocess(schedule.chunks, sampled, result.preempted)
        self._run_s += run_s
        self._bookkeeping_s += self._clock.now() - began - run_s
        return result

    def block_table(self, attempt_id: AttemptId) -> tuple[int, ...]:
        """The sequence's blocks, in order; KeyError if it is unknown."""
        return tuple(self._seqs[attempt_id].block_table)

    def stats(self) -> EngineStats:
        """A snapshot, O(1)."""
        census = self._scheduler.census
        return EngineStats(
            blocks_by_state=self._scheduler.pool.counts(),
            seqs_by_state={state.value: census[state] for state in SeqState if state is not SeqState.FINISHED},
            num_blocks=self.config.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_tokens_computed=self._num_tokens_computed,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_prefix_query_tokens=self._scheduler.num_prefix_query_tokens,
            run_s=self._run_s,
            bookkeeping_s=self._bookkeeping_s,
        )

    @property
    def _num_active(self) -> int:
        return self._scheduler.census[SeqState.RUNNING] + self._scheduler.census[SeqState.RECEIVING]

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what can never run here."""
        num_tokens, num_prompt = len(request.token_ids), request.num_prompt_tokens
        params = request.sampling
        if request.attempt_id in self._seqs:
            raise InvalidRequest(f"attempt {request.attempt_id} is here already")
        if not 0 < num_prompt <= num_tokens:
            raise InvalidRequest(f"a prompt of {num_prompt} tokens in a sequence of {num_tokens}")
        if min(request.token_ids) < 0 or max(request.token_ids) >= self.config.vocab_size:
            raise InvalidRequest(f"token ids must be in [0, {self.config.vocab_size})")
        if params.max_tokens <= request.num_delivered_tokens:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens} and {request.num_delivered_tokens} tokens are delivered: "
                "there is nothing to generate",
                param="max_tokens",
            )
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.config.eos_token_ids)}
        if params.min_tokens > 0 and all(token_id in ends for token_id in range(self.config.vocab_size)):
            raise InvalidRequest("min_tokens leaves no token to choose: all of them stop", param="min_tokens")
        if len(request.cache_salt) > MAX_SALT_CHARS:
            raise InvalidRequest(f"cache_salt is longer than {MAX_SALT_CHARS} characters", param="cache_salt")
        if num_tokens >= self.max_len:
            limit = "the model's context" if self.max_len == self.config.max_model_len else "this worker's KV cache"
            raise PromptTooLong(
                f"{num_tokens} tokens leave no room to generate: {limit} is {self.max_len} tokens in all"
            )

    def _sequence(self, request: GenerateRequest, state: SeqState, *, hold_kv: bool = False) -> Sequence:
        self._num_arrivals += 1
        return Sequence(
            request,
            state,
            self._num_arrivals,
            max_len=self.max_len,
            eos_token_ids=self.config.eos_token_ids,
            hold_kv=hold_kv,
        )

    def _entry(self, chunk: Chunk) -> BatchEntry:
        seq, num_tokens = chunk
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        length = len(seq.token_ids)
        sample = None
        if end == length:
            params = seq.request.sampling
            may_stop = not seq.banned_token_ids or seq.num_output_tokens >= params.min_tokens
            sample = SampleSpec(
                params,
                length,
                seq.prompt_token_ids,
                seq.output_token_ids,
                () if may_stop else seq.banned_token_ids,
            )
        tokens = (seq.token_ids[start],) if num_tokens == 1 else tuple(seq.token_ids[start:end])
        request = seq.request
        return BatchEntry(seq.attempt_id, start, tokens, seq.block_table, sample, request.tenant, request.cache_salt)

    def _drop(self, failure: StepFailed, preempted: list[AttemptId]) -> StepResult:
        """End the sequences whose numbers broke down; the others are where they were before the step."""
        failed = [AttemptId(name) for name in failure.attempt_ids]
        for attempt_id in failed:
            self.abort(attempt_id)
        return StepResult(preempted=preempted, failed=failed)

    def _postprocess(
        self, chunks: list[Chunk], results: list[Sampled | None], preempted: list[AttemptId]
    ) -> StepResult:
        """Count what was computed, append what was sampled, and let go of sequences that are done."""
        events: list[TokenEvent] = []
        started: list[AttemptId] = []
        finished: list[AttemptId] = []
        total = 0
        for (seq, num_tokens), sampled in zip(chunks, results, strict=True):
            self._scheduler.computed(seq, num_tokens)
            total += num_tokens
            if not seq.has_prefill_started:
                seq.has_prefill_started = True
                started.append(seq.attempt_id)
            if seq.num_computed_tokens < len(seq.token_ids):  # not the last chunk of its prompt
                continue
            assert sampled is not None, f"the runner chose no token for {seq.attempt_id}"
            if not seq.has_prefill_finished:
                finished.append(seq.attempt_id)
            events.append(self._accept(seq, len(seq.token_ids), sampled))
        self._num_tokens_computed += total
        return StepResult(events, started, finished, preempted, num_tokens=total)

    def _accept(self, seq: Sequence, position: int, sampled: Sampled) -> TokenEvent:
        """Take a sampled token as the sequence's token at `position`; it ends, or is held, if that is what follows."""
        index, num_cached = position - seq.request.num_prompt_tokens, 0
        if not seq.has_prefill_finished:
            seq.has_prefill_finished = True
            num_cached = min(seq.num_cached_tokens or 0, seq.request.num_prompt_tokens)
        reason = self._finish_reason(seq, sampled.token_id, position)
        seq.resolve(position, sampled.token_id)
        if seq.hold_kv:
            self._scheduler.hold(seq)
        elif reason is not None:
            self._finish(seq)
        return TokenEvent(seq.attempt_id, index, sampled.token_id, sampled.logprobs, reason, num_cached)

    def _finish_reason(self, seq: Sequence, token_id: int, position: int) -> FinishReason | None:
        """Why the sequence ends if `token_id` is its token at `position`; None if it goes on."""
        num_output_tokens = position - seq.request.num_prompt_tokens
        if token_id in seq.stop_token_ids and num_output_tokens >= seq.request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if position + 1 >= seq.length_limit else None

    def _finish(self, seq: Sequence) -> None:
        self._scheduler.finish(seq)
        del self._seqs[seq.attempt_id]
