"""A simulated rank: a Runner without a model, whose KV is tell-tale and whose time is modelled. No torch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from baton.clock import Clock, SystemClock
from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.request import SamplingParams, TokenLogprobs
from engine import telltale
from engine.kv_memory import KVMemory
from engine.telltale import WORD_BYTES, Lanes, Words
from engine.types import BatchEntry, Sampled, SampleSpec, StepHook, StepPlan

_PIECE_BYTES: Final = 2**16
"""KV is read in pieces that stay in a core's cache."""


class TellTaleMismatch(Exception):
    """A sequence's KV is not what its own tokens make it: stale, partial, swapped or foreign bytes were read."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """How long a step lasts, in seconds. The default costs no time."""

    prefill_s_per_token: float = 0.0
    decode_s_per_step: float = 0.0
    decode_s_per_seq: float = 0.0

    def step_s(self, plan: StepPlan) -> float:
        """Prompt tokens cost each; decodes cost once for reading the weights and once for each sequence."""
        num_decodes = sum(1 for entry in plan.entries if entry.start > 0 and len(entry.token_ids) == 1)
        cost = (plan.num_tokens - num_decodes) * self.prefill_s_per_token
        return cost + (self.decode_s_per_step + num_decodes * self.decode_s_per_seq if num_decodes else 0.0)


def sim_model(num_layers: int = 4, num_kv_heads: int = 2, head_dim: int = 16, dtype: str = "float32") -> ModelKV:
    """The identity of a simulated model; equal parameters give equal models."""
    shape = f"sim {num_layers} layers, {num_kv_heads} KV heads, {head_dim} dims, {dtype}"
    fingerprint = hashlib.blake2b(shape.encode(), digest_size=16).hexdigest()
    return ModelKV(layers=(LayerSpec(num_kv_heads, head_dim),) * num_layers, dtype=dtype, fingerprint=fingerprint)


def sim_layout(num_blocks: int, block_size: int = 16, *, tp_size: int = 1, tp_rank: int = 0) -> KVLayout:
    """One rank's pool of the default simulated model."""
    return KVLayout(sim_model(), KVGeometry(tp_size, block_size, num_blocks), tp_rank)


class SimRunner:
    """The Runner of the simulated engine.

    A step writes tell-tale KV (engine.telltale) that continues from what it *reads* at the position before, and
    chooses each token by hashing every byte of global head 0 that it reads back through the block table, in token
    order: rank 0 has that head at every TP size, so ranks, block sizes and chunks do not change the tokens, and
    wrong KV does. Of `SamplingParams` it honours temperature (0: no noise), seed, sample_index and the banned tokens.

    With `verify_all`, whenever a token is due every rank also compares every byte of the sequence in its pool with
    what it must be, and raises TellTaleMismatch before any token is chosen.
    """

    def __init__(
        self,
        layout: KVLayout,
        vocab_size: int,
        *,
        cost: CostModel | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
        verify_all: bool = False,
    ) -> None:
        """`clock` and `sleep` belong together: the machine's, or a ManualClock and its `advance`.

        Raises:
            ValueError: a head's vector is not a multiple of 8 bytes.
        """
        model, geometry = layout.model, layout.geometry
        self.layout = layout
        self._vocab_size = vocab_size
        self._cost = cost or CostModel()
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._verify_all = verify_all
        self._memory = KVMemory(layout.pool_bytes)
        self._lanes: list[Lanes] = []
        self._layers: list[Words] = []  # each [block, half, head, token in block, word]
        for layer, spec in enumerate(model.layers):
            vector_bytes = spec.head_dim * model.itemsize_bytes
            if vector_bytes % WORD_BYTES:
                raise ValueError(f"layer {layer}: a head of {vector_bytes} bytes is not a multiple of {WORD_BYTES}")
            heads, num_words = layout.heads(layer), vector_bytes // WORD_BYTES
            shape = (geometry.num_blocks, 2, len(heads), geometry.block_size, num_words)
            begin = layout.layer_offset(layer)
            part = self._memory.view[begin : begin + layout.block_bytes(layer) * geometry.num_blocks]
            self._layers.append(np.frombuffer(part, dtype="<u8").reshape(shape))
            self._lanes.append(Lanes(layer, heads, num_words, geometry.block_size))

    def kv_buffer(self) -> memoryview:
        """The whole pool."""
        return self._memory.view

    def kv_fd(self) -> int | None:
        """Its memfd."""
        return self._memory.fd

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Run one step.

        Raises:
            TellTaleMismatch: with `verify_all`, if any byte of a sequence whose token is due is wrong.
        """
        began, cost_s = self._clock.now(), self._cost.step_s(plan)
        if hook is not None:
            hook.step_begin(plan)
        states, blocks, offsets = self._compute(plan)
        for layer, (pool, lanes) in enumerate(zip(self._layers, self._lanes, strict=True)):
            pool[blocks, :, :, offsets] = lanes.words(states)
            self._wait_until(began + cost_s * (layer + 1) / len(self._layers))
            if hook is not None:
                hook.layer_done(layer, None)
        if hook is not None:
            hook.step_done()
        return [None if entry.sample is None else self._sample(entry, entry.sample) for entry in plan.entries]

    def close(self) -> None:
        """Free the pool."""
        self._layers = []
        self._memory.close()

    def _compute(self, plan: StepPlan) -> tuple[Words, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """States of all new positions of the step, and the block and offset of each: three arrays [num_tokens]."""
        block_size = self.layout.geometry.block_size
        states: list[int] = []
        slots: list[int] = []
        for entry in plan.entries:
            states += telltale.states(self._state_before(entry), entry.token_ids)
            table = entry.block_table
            slots += [
                table[position // block_size] * block_size + position % block_size
                for position in range(entry.start, entry.start + len(entry.token_ids))
            ]
        blocks, offsets = np.divmod(np.array(slots, dtype=np.int64), block_size)
        return np.array(states, dtype=np.uint64), blocks, offsets

    def _root(self, entry: BatchEntry) -> int:
        return telltale.root(self.layout.model.fingerprint, entry.tenant, entry.salt)

    def _state_before(self, entry: BatchEntry) -> int:
        """The state that the entry's first token continues, as read from the pool."""
        if entry.start == 0:
            return self._root(entry)
        block, offset = divmod(entry.start - 1, self.layout.geometry.block_size)
        first_word = self._layers[0][entry.block_table[block], 0, 0, offset, :1]
        return int(self._lanes[0].states(first_word)[0])

    def _sample(self, entry: BatchEntry, sample: SampleSpec) -> Sampled | None:
        """Read all KV of the sequence once; verify it if asked to; on rank 0, choose the token that it stands for."""
        block_size = self.layout.geometry.block_size
        num_tokens = entry.start + len(entry.token_ids)
        table = np.array(entry.block_table[: -(-num_tokens // block_size)], dtype=np.int64)
        states = self._verified_states(entry, table, num_tokens) if self._verify_all else None
        digest = xxhash.xxh3_64()
        for layer, pool in enumerate(self._layers):
            at_once = max(1, _PIECE_BYTES // self.layout.block_bytes(layer))
            for first in range(0, len(table), at_once):
                stored = pool[table[first : first + at_once]]  # [block, half, head, token in block, word]
                num_left = num_tokens - first * block_size
                if states is not None:
                    self._verify(entry, layer, stored, states[first : first + at_once], first, num_left)
                if self.layout.tp_rank == 0:
                    _update(digest, stored[:, :, 0], num_left)
        return choose(digest.intdigest(), sample, self._vocab_size) if self.layout.tp_rank == 0 else None

    def _verified_states(self, entry: BatchEntry, table: npt.NDArray[np.int64], num_tokens: int) -> Words:
        """States [block, token in block] as layer 0 has them; the first `num_tokens` must follow each other."""
        states = self._lanes[0].states(self._layers[0][table, 0, 0, :, 0])
        tokens = telltale.tokens_between(self._root(entry), states.reshape(-1)[:num_tokens])
        self._check(entry, 0, 0, tokens < self._vocab_size)
        return states

    def _verify(
        self, entry: BatchEntry, layer: int, stored: Words, states: Words, first_block: int, num_tokens: int
    ) -> None:
        """Compare every byte of the first `num_tokens` tokens of some blocks with what their states make it."""
        is_right = stored == self._lanes[layer].blocks(states)
        if not is_right.all():  # perhaps only after the last token
            is_right = is_right.all(axis=(1, 2, 4)).reshape(-1)[:num_tokens]
            self._check(entry, layer, first_block * self.layout.geometry.block_size, is_right)

    def _check(self, entry: BatchEntry, layer: int, first: int, is_right: npt.NDArray[np.bool_]) -> None:
        """Raise if any position from `first` on is not right."""
        if not is_right.all():
            position = first + int(np.argmin(is_right))
            block = entry.block_table[position // self.layout.geometry.block_size]
            raise TellTaleMismatch(
                f"{entry.attempt_id}: rank {self.layout.tp_rank}, layer {layer}, position {position} (block {block})"
            )

    def _wait_until(self, when: float) -> None:
        remaining_s = when - self._clock.now()
        if remaining_s > 0:
            self._sleep(remaining_s)


def _update(digest: xxhash.xxh3_64, vectors: Words, num_tokens: int) -> None:
    """Hash the first `num_tokens` tokens of [block, half, token in block, word], unit by unit.

    The order is [unit][half][token in unit][word], which is the same for all block sizes.
    """
    num_blocks, _, block_size, num_words = vectors.shape
    if block_size > UNIT_TOKENS:
        per_unit = vectors.reshape(num_blocks, 2, -1, UNIT_TOKENS, num_words)
        vectors = per_unit.swapaxes(1, 2).reshape(-1, 2, UNIT_TOKENS, num_words)
    num_full, num_rest = divmod(num_tokens, UNIT_TOKENS)
    digest.update(np.ascontiguousarray(vectors[:num_full]).data)
    if num_rest and num_full < len(vectors):
        digest.update(np.ascontiguousarray(vectors[num_full, :, :num_rest]).data)


def choose(digest: int, sample: SampleSpec, vocab_size: int) -> Sampled:
    """A token in [0, vocab_size) that is not banned: a pure function of its arguments."""
    params, banned = sample.params, frozenset(sample.banned_token_ids)
    noise = (params.seed, params.sample_index) if params.temperature > 0 else ()
    value = digest
    for part in (sample.position, *noise):
        value = telltale.mix(value ^ telltale.mix(part % 2**64))
    allowed = vocab_size - sum(1 for token_id in banned if 0 <= token_id < vocab_size)
    assert allowed > 0, "every token is banned"
    while value % vocab_size in banned:
        value = telltale.mix((value + 1) % 2**64)
    token_id = value % vocab_size
    return Sampled(token_id, _logprobs(token_id, value, params, vocab_size))


def _logprobs(token_id: int, value: int, params: SamplingParams, vocab_size: int) -> TokenLogprobs | None:
    """Made up, but the same wherever the token is: the chosen token is the likeliest one."""
    if params.num_logprobs is None:
        return None
    logprob = -((value >> 40) % 1000 + 1) / 1000
    others: Sequence[int] = range(min(params.num_logprobs, vocab_size))
    top = tuple(((token_id + offset) % vocab_size, logprob - offset) for offset in others)
    return TokenLogprobs(logprob, 1, top)
