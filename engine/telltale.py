"""Tell-tale KV: bytes that say which prefix they belong to. Pure functions of numpy arrays; knows no pool.

The *state* of position i is 64 bits that stand for (model, tenant, salt, token 0 .. token i):

    state[-1] = root(model, tenant, salt)        state[i] = mix(state[i-1] + token[i] + 1)        (mod 2**64)

`mix` is a bijection (the finalizer of SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014, figure 16), so two neighbouring states give the token back. KV of position i, seen as 64-bit words, is

    word[lane] = state[i] * scale[lane] + shift[lane]        (mod 2**64, scale odd)

with a lane for each (layer, half, *global* head, word of the head's vector). Every word is a bijection of the state:
a rank needs any one of its words to continue a sequence, as a model needs KV, and any byte that differs from what
the other words or the neighbouring position say is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]

WORD_BYTES: Final = 8
_MASK: Final = 2**64 - 1
_MUL1: Final = 0xBF58476D1CE4E5B9
_MUL2: Final = 0x94D049BB133111EB
_GOLDEN: Final = 0x9E3779B97F4A7C15
_INV1: Final = np.uint64(pow(_MUL1, -1, 2**64))
_INV2: Final = np.uint64(pow(_MUL2, -1, 2**64))


def root(fingerprint: str, tenant: str, salt: str) -> int:
    """The state before the first token."""
    parts = b"".join(len(part).to_bytes(4, "little") + part for part in map(str.encode, (fingerprint, tenant, salt)))
    return int.from_bytes(hashlib.blake2b(parts, digest_size=WORD_BYTES, person=b"baton sim kv").digest(), "little")


def mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers in which every bit depends on every other."""
    value = ((value ^ (value >> 30)) * _MUL1) & _MASK
    value = ((value ^ (value >> 27)) * _MUL2) & _MASK
    return value ^ (value >> 31)


def states(before: int, token_ids: Iterable[int]) -> list[int]:
    """The states of consecutive positions, the first of which follows a position with state `before`."""
    found: list[int] = []
    for token_id in token_ids:
        before = mix((before + token_id + 1) & _MASK)
        found.append(before)
    return found


def tokens_between(before: int, states: Words) -> Words:
    """The token ids, shape [n], that lead from `before` through `states`, shape [n].

    States that do not follow one another give numbers far outside of any vocabulary.
    """
    value = states.copy()
    value ^= (value >> np.uint64(31)) ^ (value >> np.uint64(62))
    value *= _INV2
    value ^= (value >> np.uint64(27)) ^ (value >> np.uint64(54))
    value *= _INV1
    value ^= (value >> np.uint64(30)) ^ (value >> np.uint64(60))
    previous = np.concatenate([np.array([before], dtype=np.uint64), states[:-1]])
    value -= previous
    value -= np.uint64(1)
    return value


class Lanes:
    """Scale and shift of the words that one rank stores for one layer."""

    def __init__(self, layer: int, heads: range, words_per_head: int, block_size: int) -> None:
        seeds = [
            mix((((layer * 2 + half) * 2**20 + head) * 2**20 + word + 1) * _GOLDEN & _MASK)
            for half in range(2)
            for head in heads
            for word in range(words_per_head)
        ]
        self._shape = (2, len(heads), words_per_head)
        self._scale: Words = np.array([mix(seed) | 1 for seed in seeds], dtype=np.uint64)
        self._shift: Words = np.array([mix(seed ^ _MASK) for seed in seeds], dtype=np.uint64)
        self._unscale = np.array([pow(int(self._scale[0]), -1, 2**64)], dtype=np.uint64)
        # The same for each token of a block, [half, head, token * word]: long rows are what numpy is fast at.
        self._block_shape = (2, len(heads), block_size, words_per_head)
        self._block_scale = np.tile(self._scale.reshape(self._shape), (1, 1, block_size))
        self._block_shift = np.tile(self._shift.reshape(self._shape), (1, 1, block_size))

    def words(self, states: Words) -> Words:
        """What to store for positions with these states: [n] -> [n, half, head, word]."""
        words = states[:, None] * self._scale
        words += self._shift
        return words.reshape(-1, *self._shape)

    def blocks(self, states: Words) -> Words:
        """What whole blocks with these states contain: [n, token] -> [n, half, head, token, word]."""
        words = np.repeat(states, self._shape[2], axis=1)[:, None, None] * self._block_scale
        words += self._block_shift
        return words.reshape(-1, *self._block_shape)

    def states(self, first_words: Words) -> Words:
        """Back from the first word of each position (half K, first head), whatever the shape."""
        return (first_words - self._shift[:1]) * self._unscale
