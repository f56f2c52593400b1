"""What must be: the tokens of an undisturbed run, and the KV bytes that a sequence's own tokens make. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.clock import ManualClock
from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, ModelKV
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine import telltale
from engine.engine import LocalEngine
from engine.sim import SimRunner, sim_model
from engine.telltale import WORD_BYTES, Lanes, Words
from engine.types import EngineConfig

VOCAB_SIZE: Final = 509
MAX_NEW_TOKENS: Final = 14
MAX_MODEL_LEN: Final = 160
SECRET: Final = b"a secret of one cluster, 32 byte"
PREFIX_SECRET: Final = b"prefix"


@functools.lru_cache(maxsize=8)
def model(num_layers: int, num_kv_heads: int) -> ModelKV:
    """A tiny simulated model: two 8-byte words per head and token."""
    return sim_model(num_layers, num_kv_heads, head_dim=4)


@functools.lru_cache(maxsize=20_000)
def undisturbed(
    kv: ModelKV, prompt: tuple[int, ...], tenant: str, salt: str, temperature: float, seed: int
) -> tuple[int, ...]:
    """The first MAX_NEW_TOKENS tokens that one engine alone generates."""
    engine = _engine(kv)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=MAX_NEW_TOKENS)
    request = GenerateRequest(AttemptId("alone/1"), prompt, len(prompt), params, tenant, salt)
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work():
        tokens += [event.token_id for event in engine.step().events]
    return tuple(tokens)


@functools.lru_cache(maxsize=8)
def _engine(kv: ModelKV) -> LocalEngine:
    num_blocks = -(-MAX_MODEL_LEN // UNIT_TOKENS)
    runner = SimRunner(KVLayout(kv, KVGeometry(1, UNIT_TOKENS, num_blocks), 0), VOCAB_SIZE)
    config = EngineConfig(UNIT_TOKENS, num_blocks, MAX_MODEL_LEN, enable_prefix_caching=False, vocab_size=VOCAB_SIZE)
    return LocalEngine(config, runner, PrefixHasher(PREFIX_SECRET, kv.fingerprint), ManualClock())


class PoolView:
    """One rank's pool as arrays [block, half, local head, token in block, word], and what they should contain."""

    def __init__(self, layout: KVLayout, buffer: memoryview) -> None:
        self.layout: Final = layout
        geometry = layout.geometry
        self.layers: list[Words] = []
        self._lanes: list[Lanes] = []
        flat = np.frombuffer(buffer, dtype=np.uint8)
        self.base_address: Final[int] = flat.__array_interface__["data"][0]
        for layer, spec in enumerate(layout.model.layers):
            heads, num_words = layout.heads(layer), spec.head_dim * layout.model.itemsize_bytes // WORD_BYTES
            begin = layout.layer_offset(layer)
            part = flat[begin : begin + layout.block_bytes(layer) * geometry.num_blocks].view("<u8")
            self.layers.append(part.reshape(geometry.num_blocks, 2, len(heads), geometry.block_size, num_words))
            self._lanes.append(_lanes(layer, heads.start, heads.stop, num_words, geometry.block_size))

    def block_at(self, address: int) -> tuple[int, int] | None:
        """Layer and block of a byte of memory; None if it is not in this pool."""
        offset = address - self.base_address
        if not 0 <= offset < self.layout.pool_bytes:
            return None
        for layer in range(len(self.layers)):
            size = self.layout.block_bytes(layer) * self.layout.geometry.num_blocks
            if offset < size:
                return layer, offset // self.layout.block_bytes(layer)
            offset -= size
        return None

    def is_right(self, layer: int, block_table: Sequence[int], tokens: range, states: Words, heads: slice) -> bool:
        """Do some tokens of a sequence lie in its blocks as they should? `states` are those of its tokens from 0 on."""
        positions = np.arange(tokens.start, tokens.stop)
        blocks = np.asarray(block_table)[positions // self.layout.geometry.block_size]
        stored = self.layers[layer][blocks, :, heads, positions % self.layout.geometry.block_size]
        wanted = self._lanes[layer].words(states[tokens.start : tokens.stop])[:, :, heads]
        return bool((stored == wanted).all())

    def release(self) -> None:
        """Drop the arrays, so that the memory can be unmapped."""
        self.layers = []


@functools.lru_cache(maxsize=128)
def _lanes(layer: int, first_head: int, end_head: int, num_words: int, block_size: int) -> Lanes:
    return Lanes(layer, range(first_head, end_head), num_words, block_size)


@functools.lru_cache(maxsize=4096)
def states(kv: ModelKV, tenant: str, salt: str, tokens: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """The tell-tale states of all positions of a sequence."""
    root = telltale.root(kv.fingerprint, tenant, salt)
    return np.array(telltale.states(root, tokens), dtype=np.uint64)


def prefix_keys(
    hasher: PrefixHasher, block_size: int, sequences: Iterable[tuple[str, str, tuple[int, ...]]]
) -> dict[bytes, tuple[str, str, tuple[int, ...]]]:
    """For each prefix-cache key that the sequences can have: the (tenant, salt, tokens) up to the end of its block."""
    found: dict[bytes, tuple[str, str, tuple[int, ...]]] = {}
    units = block_size // UNIT_TOKENS
    for tenant, salt, tokens in sequences:
        keys = hasher.chain(tenant, salt, tokens)
        for index, key in zip(itertools.count(1), keys[units - 1 :: units], strict=False):
            found[key] = (tenant, salt, tokens[: index * block_size])
    return found
