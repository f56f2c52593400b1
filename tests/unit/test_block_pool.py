"""The ledger against a simple model: a list of tables and what was last written to each block."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.types import SeqState

HOLDERS = [SeqState.RUNNING, SeqState.HELD, SeqState.RECEIVING, SeqState.QUARANTINED]


def keys_of(chain: str) -> list[bytes]:
    """A key per letter that covers all letters before it."""
    return [chain[: index + 1].encode() for index in range(len(chain))]


def acquire(pool: BlockPool, chain: str = "", num_blocks: int | None = None) -> list[int]:
    """A running table; fails if there is no room."""
    found = pool.acquire(keys_of(chain), len(chain) if num_blocks is None else num_blocks, SeqState.RUNNING)
    assert found is not None
    return found[0]


def publish(pool: BlockPool, table: list[int], chain: str) -> None:
    for block, key in zip(table, keys_of(chain), strict=True):
        pool.publish(block, key)


@dataclass
class Table:
    chain: str
    blocks: list[int]
    holder: SeqState
    num_published: int


class BlockPoolMachine(RuleBasedStateMachine):
    """Random tables over few chains and few blocks, so that sharing, eviction and refusal all happen."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[Table] = []
        self.content: dict[int, bytes] = {}

    @rule(
        chain=st.text("ab", max_size=6),
        extra=st.integers(0, 3),
        holder=st.sampled_from(HOLDERS),
        spare=st.integers(0, 2),
    )
    def acquire(self, chain: str, extra: int, holder: SeqState, spare: int) -> None:
        num_blocks = len(chain) + extra
        available = self.pool.num_available
        matched = self.published_run(keys_of(chain))
        num_revived = sum(1 for block in matched if not self.held()[block])
        has_room = self.pool.has_room(keys_of(chain), num_blocks, spare)
        found = self.pool.acquire(keys_of(chain), num_blocks, holder, spare)
        assert has_room == (found is not None)
        if found is None:
            assert self.pool.num_available == available
            assert num_blocks - len(matched) > available - num_revived - spare
            return
        blocks, num_matched = found
        assert len(blocks) == num_blocks
        assert blocks[:num_matched] == matched
        assert self.pool.num_available == available - num_revived - (num_blocks - len(matched)) >= spare
        assert [self.content[block] for block in blocks[:num_matched]] == keys_of(chain)[:num_matched]
        assert not set(blocks[num_matched:]) & set(self.held()), "a held block was handed out as a fresh one"
        for block in blocks[num_matched:]:
            self.content[block] = b"garbage"
        self.tables.append(Table(chain, blocks, holder, num_matched))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish_next_block(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        if table.num_published < len(table.chain):
            key = keys_of(table.chain)[table.num_published]
            block = table.blocks[table.num_published]
            self.content[block] = key
            self.pool.publish(block, key)
            table.num_published += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), new=st.sampled_from(HOLDERS))
    def rehold(self, data: st.DataObject, new: SeqState) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.rehold(table.blocks, table.holder, new)
        table.holder = new

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table.blocks, table.holder)

    def published_run(self, keys: list[bytes]) -> list[int]:
        block_of = {self.pool.key_of(block): block for block in range(self.pool.num_blocks)}
        return [block_of[key] for key in takewhile(lambda key: key in block_of, keys)]

    def held(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table.blocks)

    @invariant()
    def counts_add_up(self) -> None:
        counts, held = self.pool.counts(), self.held()
        assert sum(counts.values()) == self.pool.num_blocks
        assert self.pool.num_available == counts["free"] + counts["cached"] == self.pool.num_blocks - len(held)
        first_holder = Counter(
            min((HOLDERS.index(table.holder) for table in self.tables if block in table.blocks), default=-1)
            for block in held
        )
        assert [counts[state.value] for state in HOLDERS] == [first_holder[index] for index in range(len(HOLDERS))]

    @invariant()
    def each_block_has_as_many_holds_as_tables_name_it(self) -> None:
        held = self.held()
        assert [self.pool.num_holds(block) for block in range(self.pool.num_blocks)] == [
            held[block] for block in range(self.pool.num_blocks)
        ]

    @invariant()
    def a_key_says_what_is_in_the_block(self) -> None:
        keys = {block: self.pool.key_of(block) for block in range(self.pool.num_blocks)}
        published = {block: key for block, key in keys.items() if key is not None}
        assert all(self.content[block] == key for block, key in published.items())
        assert len(set(published.values())) == len(published)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_tail_of_a_released_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    table = acquire(pool, "abcd")
    publish(pool, table, "abcd")
    pool.release(table, SeqState.RUNNING)
    assert acquire(pool, num_blocks=2) == [table[3], table[2]]
    assert acquire(pool, "ab") == table[:2]


def test_the_chain_that_was_released_first_is_evicted_first() -> None:
    pool = BlockPool(4)
    old, new = acquire(pool, "ab"), acquire(pool, "xy")
    publish(pool, old, "ab")
    publish(pool, new, "xy")
    pool.release(old, SeqState.RUNNING)
    pool.release(new, SeqState.RUNNING)
    assert sorted(acquire(pool, num_blocks=2)) == sorted(old)
    assert acquire(pool, "xy") == new


def test_a_match_makes_a_cached_chain_young_again() -> None:
    pool = BlockPool(4)
    first, second = acquire(pool, "ab"), acquire(pool, "xy")
    publish(pool, first, "ab")
    publish(pool, second, "xy")
    pool.release(first, SeqState.RUNNING)
    pool.release(second, SeqState.RUNNING)
    pool.release(acquire(pool, "ab"), SeqState.RUNNING)
    assert sorted(acquire(pool, num_blocks=2)) == sorted(second)


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3)
    table = acquire(pool, "a")
    publish(pool, table, "a")
    pool.release(table, SeqState.RUNNING)
    assert table[0] not in acquire(pool, num_blocks=2)
    assert {"cached": 1, "running": 2}.items() <= pool.counts().items()


def test_a_second_block_with_the_same_content_is_not_published() -> None:
    pool = BlockPool(2)
    first, second = acquire(pool, num_blocks=1), acquire(pool, num_blocks=1)
    publish(pool, first, "a")
    publish(pool, second, "a")
    pool.release(second, SeqState.RUNNING)
    assert {"free": 1, "cached": 0, "running": 1}.items() <= pool.counts().items()
    assert acquire(pool, "a") == first


def test_keys_after_the_first_miss_are_not_asked_for() -> None:
    pool = BlockPool(4)

    def keys() -> object:
        yield b"unknown"
        raise AssertionError("asked for a second key")

    assert pool.acquire(keys(), 2, SeqState.RUNNING) is not None  # type: ignore[arg-type]


def test_nothing_is_held_after_a_refusal() -> None:
    pool = BlockPool(3)
    table = acquire(pool, "ab")
    publish(pool, table, "ab")
    assert pool.acquire(keys_of("ab"), 4, SeqState.RUNNING) is None
    assert [pool.num_holds(block) for block in table] == [1, 1]


def test_a_double_release_is_noticed() -> None:
    pool = BlockPool(2)
    table = acquire(pool, num_blocks=1)
    pool.release(table, SeqState.RUNNING)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(table, SeqState.RUNNING)
