"""Which sequences compute how many tokens in the next step, and with which blocks. Knows no tokens' meaning.

The rules:

1. Decodes first, then chunks of prompts, together at most `max_num_batched_tokens` tokens. Within each, by
   (priority, arrival). A waiting prompt of better priority goes before the rest of a running one.
2. A sequence takes the blocks of *all* its known tokens when it is admitted, or is not admitted: a prompt never
   stops half-way for want of a block. Only decodes grow, block by block.
3. A decode that finds no block preempts the running sequence that is last by (priority, arrival), itself included,
   which is recomputed later from its tokens and goes to the head of its priority's queue. Sequences with `hold_kv`
   are never preempted: a transfer may be reading their blocks.
4. Admission leaves one block for every running sequence that may grow, so that it does not cause a preemption.
5. With `prefill_first`, a step that has prompts to compute has no decodes.

Every re-admission computes all known tokens and samples at least one more, and the best sequence is preempted only
if there is no other: so there is progress as long as held blocks return, and no sequence waits while it holds any.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from baton.prefix_hash import PrefixHasher
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from engine.types import EngineConfig, SeqState

Chunk: TypeAlias = tuple[Sequence, int]
"""Compute so many of a sequence's next tokens."""


class Schedule(NamedTuple):
    """One step's work, and what became of sequences on the way."""

    chunks: list[Chunk]
    preempted: list[Sequence]


class WaitingQueue:
    """WAITING sequences by (priority, preempted first, arrival). O(log n) to add and take, O(1) to discard."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bool, int, Sequence]] = []
        self._num_stale = 0  # entries whose sequence has left; dropped when they surface or outnumber the others

    def push(self, seq: Sequence, *, preempted: bool = False) -> None:
        """Add a sequence; a preempted one goes before all others of its priority."""
        heapq.heappush(self._heap, (seq.request.priority, not preempted, seq.arrival, seq))

    def head(self) -> Sequence | None:
        """The sequence to be admitted next."""
        while self._heap and self._heap[0][3].state is not SeqState.WAITING:
            heapq.heappop(self._heap)
            self._num_stale -= 1
        return self._heap[0][3] if self._heap else None

    def pop(self) -> None:
        """Take out the head, which `head` has just returned."""
        heapq.heappop(self._heap)

    def discard(self) -> None:
        """A queued sequence has just left the state WAITING (aborted)."""
        self._num_stale += 1
        if self._num_stale > 16 and 2 * self._num_stale > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[3].state is SeqState.WAITING]
            heapq.heapify(self._heap)
            self._num_stale = 0


class Scheduler:
    """Owns the queue, the running batch and the block ledger. Engine thread only.

    Invariants: a sequence holds blocks in the ledger exactly in its states RUNNING, HELD, RECEIVING and QUARANTINED,
    and then `block_table` is what it holds. RUNNING and RECEIVING together never exceed `max_num_seqs`, so a
    received sequence can always start.
    """

    def __init__(self, config: EngineConfig, hasher: PrefixHasher) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.census: Counter[SeqState] = Counter()
        """Number of sequences per state."""
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._config = config
        self._block_size = config.block_size
        self._hasher = hasher
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # the best by (priority, arrival) first

    def add(self, seq: Sequence) -> None:
        """Queue a WAITING sequence."""
        self.census[SeqState.WAITING] += 1
        self._waiting.push(seq)

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Give a RECEIVING sequence blocks for `num_tokens` tokens, at least its own. False: no room, nothing held."""
        if not self._acquire(seq, num_tokens, num_tokens_to_match=len(seq.token_ids)):
            return False
        self.census[SeqState.RECEIVING] += 1
        return True

    def start(self, seq: Sequence) -> None:
        """RECEIVING -> RUNNING: its blocks contain what they should."""
        self._move(seq, SeqState.RUNNING)

    def hold(self, seq: Sequence) -> None:
        """RUNNING -> HELD: it computes no more and keeps its blocks."""
        self._move(seq, SeqState.HELD)

    def quarantine(self, seq: Sequence) -> None:
        """RECEIVING, RUNNING or HELD -> QUARANTINED: it is gone, and its blocks may still be written to or read."""
        self._move(seq, SeqState.QUARANTINED)

    def finish(self, seq: Sequence) -> None:
        """Any state but RECEIVING -> FINISHED: its blocks return."""
        was_waiting = seq.state is SeqState.WAITING
        self._move(seq, SeqState.FINISHED)
        if was_waiting:
            self._waiting.discard()

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        """KV of `num_tokens` more tokens is in place: count them and publish the blocks that they fill."""
        seq.num_computed_tokens += num_tokens
        self.publish(seq, seq.num_computed_tokens)

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Offer the blocks that the first `num_tokens` tokens fill to the prefix cache: they are known and computed."""
        num_full = num_tokens // self._block_size
        if num_full > seq.num_published_blocks and self._config.enable_prefix_caching:
            for index in range(seq.num_published_blocks, num_full):
                key = seq.block_key(index, self._hasher, self._block_size)
                self.pool.publish(seq.block_table[index], key)
            seq.num_published_blocks = num_full

    def has_work(self) -> bool:
        """Would `schedule` find anything to compute?"""
        if self._running:
            return True
        head = self._waiting.head()
        if head is None or not self._has_slot:
            return False
        num_tokens = len(head.token_ids)
        return self.pool.has_room(self._keys(head, num_tokens - 1), self._blocks_for(num_tokens))

    def schedule(self) -> Schedule:
        """Choose the next step's chunks and take the blocks that they need."""
        plan = Schedule([], [])
        budget = self._config.max_num_batched_tokens
        if self._config.prefill_first:
            self._add_prompts(plan, deque(seq for seq in self._running if seq.num_pending_tokens > 1), budget)
            if plan.chunks:
                return plan
        prefills: deque[Sequence] = deque()
        for seq in tuple(self._running):
            if seq.state is not SeqState.RUNNING:  # preempted a moment ago: victims come after whom they give way to
                continue
            num_pending = len(seq.token_ids) - seq.num_computed_tokens
            if num_pending > 1:
                prefills.append(seq)
            elif budget and num_pending and self._grow(seq, plan.preempted):  # 0: its last step is under way
                plan.chunks.append((seq, 1))
                budget -= 1
        self._add_prompts(plan, prefills, budget)
        return plan

    def _add_prompts(self, plan: Schedule, prefills: deque[Sequence], budget: int) -> None:
        """Fill a step's budget with chunks of running and of waiting prompts."""
        is_blocked = False
        while budget:
            head = None if is_blocked else self._waiting.head()
            if head is not None and (not prefills or head.request.priority < prefills[0].request.priority):
                if not self._admit(head):
                    is_blocked = True
                    continue
                seq = head
            elif prefills:
                seq = prefills.popleft()
            else:
                break
            num_tokens = min(budget, seq.num_pending_tokens)
            plan.chunks.append((seq, num_tokens))
            budget -= num_tokens

    def _admit(self, seq: Sequence) -> bool:
        """WAITING -> RUNNING with blocks for all its tokens; False if there is no slot or no room."""
        # The last token is computed even if its KV is cached: its output is what the next token is sampled from.
        num_tokens = len(seq.token_ids)
        if not self._acquire(seq, num_tokens, num_tokens_to_match=num_tokens - 1):
            return False
        self._waiting.pop()
        self._move(seq, SeqState.RUNNING)
        return True

    def _acquire(self, seq: Sequence, num_tokens: int, *, num_tokens_to_match: int) -> bool:
        """A slot, and blocks for `num_tokens`, shared with the prefix cache as far as it goes; all or nothing."""
        if not self._has_slot:
            return False
        holder = SeqState.RECEIVING if seq.state is SeqState.RECEIVING else SeqState.RUNNING
        num_growing = sum(1 for other in self._running if not other.hold_kv)
        keys = self._keys(seq, num_tokens_to_match)
        found = self.pool.acquire(keys, self._blocks_for(num_tokens), holder, spare=num_growing)
        if found is None:
            return False
        seq.block_table, num_matched = found
        seq.num_published_blocks = num_matched
        seq.num_computed_tokens = num_matched * self._block_size
        if seq.num_cached_tokens is None:  # a preempted sequence that finds its own blocks is no hit
            seq.num_cached_tokens = seq.num_computed_tokens
            self.num_prefix_query_tokens += len(seq.token_ids)
            self.num_prefix_hit_tokens += seq.num_computed_tokens
        return True

    def _grow(self, seq: Sequence, preempted: list[Sequence]) -> bool:
        """A place for the KV of a decode's one token; False if the sequence had to preempt itself."""
        while len(seq.block_table) * self._block_size <= seq.num_computed_tokens:
            found = self.pool.acquire((), 1, SeqState.RUNNING)
            if found is not None:
                seq.block_table += found[0]
                break
            victim = next(other for other in reversed(self._running) if not other.hold_kv)
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """RUNNING -> WAITING: its KV is forgotten (but for what the prefix cache keeps)."""
        self._move(seq, SeqState.WAITING)
        seq.num_computed_tokens = seq.num_published_blocks = 0
        self._waiting.push(seq, preempted=True)

    def _move(self, seq: Sequence, state: SeqState) -> None:
        """Change a sequence's state; the census, the batch and the ledger follow."""
        old = seq.state
        seq.move_to(state)
        self.census[old] -= 1
        self.census[state] += 1
        if old is SeqState.RUNNING:
            del self._running[bisect_left(self._running, seq.order, key=_order)]
        if state is SeqState.RUNNING:
            insort(self._running, seq, key=_order)
        if old is SeqState.WAITING:  # it held nothing; what it holds from here on was acquired as RUNNING
            return
        if state in (SeqState.WAITING, SeqState.FINISHED):
            self.pool.release(seq.block_table, old)
            seq.block_table = []
        else:
            self.pool.rehold(seq.block_table, old, state)

    @property
    def _has_slot(self) -> bool:
        return self.census[SeqState.RUNNING] + self.census[SeqState.RECEIVING] < self._config.max_num_seqs

    def _keys(self, seq: Sequence, num_tokens: int) -> Iterator[bytes]:
        """Keys of the blocks that the first `num_tokens` tokens fill; none if nothing may be shared."""
        if not self._config.enable_prefix_caching:
            return iter(())
        return (seq.block_key(index, self._hasher, self._block_size) for index in range(num_tokens // self._block_size))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
