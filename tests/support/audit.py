"""What must hold for an engine's ledger: at any time, and after quiescence."""

from __future__ import annotations

from collections import Counter

from engine.engine import LocalEngine
from engine.types import Engine, SeqState


def audit(engine: Engine) -> None:
    """After quiescence nothing is left: no sequence, and every block is free or cached."""
    stats = engine.stats()
    assert not any(stats.seqs_by_state.values()), f"sequences are left: {stats.seqs_by_state}"
    blocks = stats.blocks_by_state
    assert blocks["free"] + blocks["cached"] == stats.num_blocks, f"blocks are left: {blocks}"
    assert sum(blocks.values()) == stats.num_blocks


def audit_ledger(engine: LocalEngine) -> None:
    """Between any two steps: the counts add up, and each block has exactly the holders that name it."""
    stats = engine.stats()
    seqs = list(engine._seqs.values())
    assert sum(stats.blocks_by_state.values()) == stats.num_blocks
    assert Counter(seq.state.value for seq in seqs) == Counter(stats.seqs_by_state)
    holders = Counter(block for seq in seqs for block in seq.block_table)
    pool = engine._scheduler.pool
    for block in range(stats.num_blocks):
        assert pool.num_holds(block) == holders[block], f"block {block}"
    for seq in seqs:
        assert len(set(seq.block_table)) == len(seq.block_table)
        assert bool(seq.block_table) == (seq.state is not SeqState.WAITING)
        assert seq.num_published_blocks * engine.config.block_size <= seq.num_computed_tokens
        assert seq.num_computed_tokens <= len(seq.block_table) * engine.config.block_size
    assert engine._scheduler._running == sorted(engine._scheduler._running, key=lambda seq: seq.order)
