"""The block ledger: who holds which block, and which blocks can be found again by prefix. Knows no bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from engine.types import SeqState

_FIELD_BITS: Final = 20
"""A block's holds are one integer with a counter of this width per holding state."""

_HOLDERS: Final = (SeqState.RUNNING, SeqState.HELD, SeqState.RECEIVING, SeqState.QUARANTINED)
"""The states in which a sequence holds blocks. A shared block counts under the first that applies."""

_ONE: Final = {state: 1 << (_FIELD_BITS * field) for field, state in enumerate(_HOLDERS)}
_FIELD_MASK: Final = (1 << _FIELD_BITS) - 1


class BlockPool:
    """Ref-counted blocks 0..num_blocks-1 of one worker, with a prefix cache over the published ones.

    Invariants: a block is free (no holder, no key), cached (no holder, findable by its key) or held (at least one
    hold, each in the name of a sequence's state); the three sum to `num_blocks`. A key names at most one block and a
    block has at most one key, under which its content can never change: only a block without holder loses its key.
    Cached blocks are room: they are evicted, least recently held first, when free ones run out, and the tail of a
    chain goes before its head. Engine thread only; every operation is O(1) per block named.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # eviction order
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._holds = [0] * num_blocks
        self._num_held = [0] * len(_HOLDERS)

    @property
    def num_available(self) -> int:
        """Blocks that could be acquired: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def has_room(self, keys: Iterable[bytes], num_blocks: int, spare: int = 0) -> bool:
        """Would `acquire` with the same arguments succeed? Changes nothing."""
        return self._fits(self._match(keys), num_blocks, spare)

    def acquire(
        self, keys: Iterable[bytes], num_blocks: int, holder: SeqState, spare: int = 0
    ) -> tuple[list[int], int] | None:
        """Take one hold on each of `num_blocks` blocks; all or nothing.

        Args:
            keys: the chain keys of the first blocks wanted. It is consumed up to the first key that is not
                published; the blocks found are shared, not copied. At most `num_blocks` keys.
            spare: how many blocks must stay available afterwards.

        Returns:
            The block table and how many blocks at its head were found by key (their content is in place; that of
            the others is undefined); None if there is not enough room, and then nothing is held.
        """
        matched = self._match(keys)
        if not self._fits(matched, num_blocks, spare):
            return None
        for block in matched:
            if not self._holds[block]:
                del self._cached[block]
            self._change(block, _ONE[holder])
        fresh = [self._take_free() for _ in range(num_blocks - len(matched))]
        for block in fresh:
            self._change(block, _ONE[holder])
        return matched + fresh, len(matched)

    def release(self, block_table: Sequence[int], holder: SeqState) -> None:
        """Drop the hold that `acquire` took on each block. Blocks without another holder become cached or free."""
        one = _ONE[holder]
        for block in reversed(block_table):  # the tail becomes the older one: it is evicted before the head
            self._change(block, -one)
            if not self._holds[block]:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def rehold(self, block_table: Sequence[int], old: SeqState, new: SeqState) -> None:
        """The holder of these blocks went from state `old` to `new`."""
        delta = _ONE[new] - _ONE[old]
        for block in block_table:
            self._change(block, delta)

    def publish(self, block: int, key: bytes) -> None:
        """Make a held block findable: all its tokens are computed, and `key` covers them and everything before.

        If the key is published already, that block stays the one to be found.
        """
        assert self._holds[block], f"block {block} is published without a holder"
        assert self._key_of[block] in (None, key), f"block {block} is published under two keys"
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def num_holds(self, block: int) -> int:
        """How many holders the block has."""
        holds, total = self._holds[block], 0
        while holds:
            total += holds & _FIELD_MASK
            holds >>= _FIELD_BITS
        return total

    def key_of(self, block: int) -> bytes | None:
        """The key under which the block can be found, if any."""
        return self._key_of[block]

    def counts(self) -> dict[str, int]:
        """Number of blocks per state: free, cached, running, held, receiving, quarantined. Sums to `num_blocks`."""
        held = {state.value: count for state, count in zip(_HOLDERS, self._num_held, strict=True)}
        return {"free": len(self._free), "cached": len(self._cached), **held}

    def _match(self, keys: Iterable[bytes]) -> list[int]:
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _fits(self, matched: list[int], num_blocks: int, spare: int) -> bool:
        num_revived = sum(1 for block in matched if not self._holds[block])  # cached ones stop being room
        return num_blocks - len(matched) + num_revived + spare <= self.num_available

    def _take_free(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        return block

    def _change(self, block: int, delta: int) -> None:
        """Add to the block's holds and keep the count per state."""
        old = self._holds[block]
        new = old + delta
        assert new >= 0, f"block {block} is released more often than it was acquired"
        self._holds[block] = new
        if old:
            self._num_held[_field(old)] -= 1
        if new:
            self._num_held[_field(new)] += 1


def _field(holds: int) -> int:
    """Index of the first counter that is not zero."""
    return ((holds & -holds).bit_length() - 1) // _FIELD_BITS
