"""Tell-tale KV: what is read decides the next token, so nothing wrong can be read unnoticed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import ManualClock
from baton.kv_layout import KVGeometry, KVLayout
from baton.request import AttemptId, SamplingParams
from engine import telltale
from engine.kv_memory import KVMemory
from engine.sim import CostModel, SimRunner, TellTaleMismatch, choose, sim_layout, sim_model
from engine.types import BatchEntry, SampleSpec, StepPlan
from tests.support.sim_engine import VOCAB_SIZE, head_view, prompt

TABLE = [5, 2, 7, 3]
TOKENS = prompt(1, 60)


def entry(
    start: int = 0,
    end: int = len(TOKENS),
    *,
    tokens: tuple[int, ...] = TOKENS,
    table: list[int] = TABLE,
    params: SamplingParams | None = None,
    tenant: str = "default",
    salt: str = "",
) -> BatchEntry:
    """Compute tokens [start, end) and sample."""
    sample = SampleSpec(params or SamplingParams(temperature=0), position=end)
    return BatchEntry(AttemptId("a/1"), start, tokens[start:end], table, sample, tenant, salt)


def plan(*entries: BatchEntry) -> StepPlan:
    return StepPlan(1, entries)


def runner(*, verify_all: bool = False, num_blocks: int = 12, tp_size: int = 1, tp_rank: int = 0) -> SimRunner:
    return SimRunner(
        sim_layout(num_blocks, tp_size=tp_size, tp_rank=tp_rank), VOCAB_SIZE, verify_all=verify_all, sleep=forbidden
    )


def forbidden(seconds: float) -> None:
    raise AssertionError(f"slept for {seconds} s")


def token(sim: SimRunner, *entries: BatchEntry) -> int:
    """The token of the last entry."""
    sampled = sim.run(plan(*entries))[-1]
    assert sampled is not None
    return sampled.token_id


def bytes_of(sim: SimRunner, layer: int, block: int) -> memoryview:
    """One block of one layer."""
    begin = sim.layout.block_offset(layer, block)
    return sim.kv_buffer()[begin : begin + sim.layout.block_bytes(layer)]


def prefilled(*, verify_all: bool = False) -> SimRunner:
    """TOKENS but the last one are computed in TABLE; another prompt's KV is in blocks 8..11."""
    sim = runner(verify_all=verify_all)
    sim.run(plan(entry(end=59), entry(tokens=prompt(2, 60), table=[8, 9, 10, 11])))
    return sim


def replace_block(index: int) -> Callable[[SimRunner], None]:
    def spoil(sim: SimRunner) -> None:
        for layer in range(4):
            bytes_of(sim, layer, TABLE[index])[:] = bytes_of(sim, layer, 8 + index)

    return spoil


def erase_block(index: int) -> Callable[[SimRunner], None]:
    def spoil(sim: SimRunner) -> None:
        for layer in range(4):
            bytes_of(sim, layer, TABLE[index])[:] = bytes(sim.layout.block_bytes(layer))

    return spoil


def erase_block_of_layer(layer: int) -> Callable[[SimRunner], None]:
    def spoil(sim: SimRunner) -> None:
        bytes_of(sim, layer, TABLE[1])[:] = bytes(sim.layout.block_bytes(layer))

    return spoil


def swap_layers(sim: SimRunner) -> None:
    for block in TABLE:
        first = bytes(bytes_of(sim, 0, block))
        bytes_of(sim, 0, block)[:] = bytes_of(sim, 1, block)
        bytes_of(sim, 1, block)[:] = first


def swap_keys_and_values(sim: SimRunner) -> None:
    part = bytes_of(sim, 2, TABLE[0])
    middle = len(part) // 2
    part[:] = bytes(part[middle:]) + bytes(part[:middle])


def swap_blocks(sim: SimRunner) -> None:
    for layer in range(4):
        first = bytes(bytes_of(sim, layer, TABLE[0]))
        bytes_of(sim, layer, TABLE[0])[:] = bytes_of(sim, layer, TABLE[1])
        bytes_of(sim, layer, TABLE[1])[:] = first


def flip_one_bit(sim: SimRunner) -> None:
    head_view(sim, 3, 0)[TABLE[2], 1, 9, 63] ^= 0x80


SPOILS = [
    *(replace_block(index) for index in range(4)),
    *(erase_block(index) for index in range(4)),
    *(erase_block_of_layer(layer) for layer in range(4)),
    swap_layers,
    swap_keys_and_values,
    swap_blocks,
    flip_one_bit,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_kv_changes_the_next_token(spoil: Callable[[SimRunner], None]) -> None:
    sim = prefilled()
    spoil(sim)
    assert token(sim, entry(start=59)) != token(runner(), entry())


@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_kv_is_named_when_all_is_verified(spoil: Callable[[SimRunner], None]) -> None:
    sim = prefilled(verify_all=True)
    spoil(sim)
    with pytest.raises(TellTaleMismatch, match="a/1: rank 0, layer"):
        sim.run(plan(entry(start=59)))


@given(byte=st.integers(0, 2**63), flip=st.integers(1, 255))
def test_every_byte_of_every_rank_is_verified(byte: int, flip: int) -> None:
    sim = runner(verify_all=True, tp_size=2, tp_rank=1)
    sim.run(plan(entry(end=59)))
    offset = byte % (59 * 64)
    layer, half = byte % 4, byte % 2
    head_view(sim, layer, 1)[TABLE[offset // 64 // 16], half, offset // 64 % 16, offset % 64] ^= flip
    with pytest.raises(TellTaleMismatch):
        sim.run(plan(entry(start=59)))


def test_the_wrong_position_of_a_long_sequence_is_named() -> None:
    tokens, table = prompt(1, 700), list(range(44))
    sim = runner(verify_all=True, num_blocks=44)
    sim.run(plan(entry(end=699, tokens=tokens, table=table)))
    head_view(sim, 2, 1)[table[39], 1, 7, 5] ^= 1
    with pytest.raises(TellTaleMismatch, match=r"rank 0, layer 2, position 631 \(block 39\)"):
        sim.run(plan(entry(start=699, end=700, tokens=tokens, table=table)))


def test_bytes_after_the_last_token_do_not_matter() -> None:
    sim = prefilled(verify_all=True)
    head_view(sim, 0, 0)[TABLE[3], :, 12:] = 255
    assert token(sim, entry(start=59)) == token(runner(), entry())


def test_a_table_with_another_sequences_block_changes_the_next_token() -> None:
    sim = prefilled()
    assert token(sim, entry(start=59, table=[5, 9, 7, 3])) != token(runner(), entry())


def test_a_stale_last_position_changes_all_that_follows() -> None:
    sim = prefilled()
    replace_block(3)(sim)
    right, wrong = runner(), sim
    right.run(plan(entry()))
    wrong.run(plan(entry(start=59)))
    for layer in range(4):
        assert (head_view(right, layer, 0)[3, :, 11] != head_view(wrong, layer, 0)[3, :, 11]).any()


@pytest.mark.parametrize("other", [{"tenant": "t"}, {"salt": "s"}, {"tenant": "s", "salt": "t"}])
def test_tenant_and_salt_are_in_every_byte(other: dict[str, Any]) -> None:
    mine, theirs = runner(), runner()
    assert token(mine, entry()) != token(theirs, entry(**other))
    words = [np.frombuffer(sim.kv_buffer(), dtype=np.uint64) for sim in (mine, theirs)]
    assert ((words[0] != words[1]) == (words[0] != 0)).all()


def test_foreign_kv_is_named_even_if_the_tokens_are_the_same() -> None:
    sim = runner(verify_all=True)
    sim.run(plan(entry(end=59, tenant="them")))
    with pytest.raises(TellTaleMismatch, match="position 0"):
        sim.run(plan(entry(start=59, tenant="me")))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stores_its_part_of_the_same_content(rank: int) -> None:
    whole, part = runner(), runner(tp_size=2, tp_rank=rank)
    whole.run(plan(entry()))
    answers = part.run(plan(entry()))
    assert (answers[0] is None) == (rank > 0)
    for layer in range(4):
        assert (head_view(whole, layer, rank) == head_view(part, layer, rank)).all()


def test_replicated_heads_are_the_same_on_each_rank() -> None:
    ranks = [runner(tp_size=4, tp_rank=rank) for rank in range(4)]
    for rank in ranks:
        rank.run(plan(entry()))
    assert bytes(ranks[0].kv_buffer()) == bytes(ranks[1].kv_buffer()) != bytes(ranks[2].kv_buffer())


def test_noise_depends_on_seed_and_sample_but_not_without_temperature() -> None:
    def chosen(**params: float) -> int:
        return token(runner(), entry(params=SamplingParams(**params)))  # type: ignore[arg-type]

    assert chosen(temperature=1, seed=1) == chosen(temperature=1, seed=1)
    assert len({chosen(temperature=1, seed=seed, sample_index=index) for seed in (1, 2) for index in (0, 1)}) == 4
    assert len({chosen(temperature=0, seed=seed, sample_index=index) for seed in (1, 2) for index in (0, 1)}) == 1


@given(digest=st.integers(0, 2**64 - 1), banned=st.sets(st.integers(0, 6), max_size=6))
def test_tokens_are_in_the_vocabulary_and_not_banned(digest: int, banned: set[int]) -> None:
    spec = SampleSpec(SamplingParams(), 5, banned_token_ids=tuple(banned))
    assert choose(digest, spec, 7).token_id in set(range(7)) - banned


def test_logprobs_come_as_asked() -> None:
    sampled = runner().run(plan(entry(params=SamplingParams(num_logprobs=3))))[0]
    assert sampled is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.top[0] == (sampled.token_id, sampled.logprobs.logprob)
    assert len(sampled.logprobs.top) == 3


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_states_give_their_tokens_back(tokens: list[int], before: int) -> None:
    states = np.array(telltale.states(before, tokens), dtype=np.uint64)
    assert telltale.tokens_between(before, states).tolist() == tokens


class Recorder:
    """A hook that writes down what it hears, and when."""

    def __init__(self, clock: ManualClock) -> None:
        self.heard: list[tuple[str, float]] = []
        self._clock = clock

    def step_begin(self, plan: StepPlan) -> None:
        self.heard.append(("begin", self._clock.now()))

    def layer_done(self, layer: int, ready: object | None) -> None:
        self.heard.append((f"layer {layer}", self._clock.now()))

    def step_done(self) -> None:
        self.heard.append(("done", self._clock.now()))


def test_time_passes_layer_by_layer_as_the_cost_model_says() -> None:
    clock = ManualClock()
    cost = CostModel(prefill_s_per_token=1, decode_s_per_step=10, decode_s_per_seq=2)
    sim = SimRunner(sim_layout(12), VOCAB_SIZE, cost=cost, clock=clock, sleep=clock.advance)
    hook = Recorder(clock)
    sim.run(plan(entry(end=59)), hook)
    layers = [(f"layer {layer}", 59 / 4 * (layer + 1)) for layer in range(4)]
    assert hook.heard == [("begin", 0), *layers, ("done", 59)]
    sim.run(plan(entry(start=59), entry(end=5, table=[1])), hook)
    assert clock.now() == 59 + 10 + 2 + 5


def test_the_pool_can_be_read_but_neither_written_nor_resized_by_others() -> None:
    sim = runner()
    sim.run(plan(entry()))
    fd = sim.kv_fd()
    assert fd is not None
    peer = mmap.mmap(fd, sim.layout.pool_bytes, prot=mmap.PROT_READ)
    assert peer[:] == bytes(sim.kv_buffer())
    with pytest.raises(PermissionError):
        mmap.mmap(fd, sim.layout.pool_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    peer.close()


def test_close_gives_the_memory_back_and_can_be_repeated() -> None:
    sim = runner()
    fd = sim.kv_fd()
    assert fd is not None
    inode = os.fstat(fd).st_ino
    assert any(f" {inode} " in line for line in mappings())
    sim.close()
    sim.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert not any(f" {inode} " in line for line in mappings())


def mappings() -> list[str]:
    """Of this process, those of a KV pool."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "baton-kv" in line]


def test_memory_that_is_still_looked_at_survives_its_close() -> None:
    memory = KVMemory(4096)
    look = np.frombuffer(memory.view, dtype=np.uint8)
    memory.close()
    assert look.sum() == 0


def test_a_head_that_is_no_multiple_of_a_word_is_refused() -> None:
    layout = KVLayout(sim_model(head_dim=3), KVGeometry(1, 16, 4), 0)
    with pytest.raises(ValueError, match="12 bytes"):
        SimRunner(layout, VOCAB_SIZE)


def test_the_core_starts_without_torch() -> None:
    code = "import sys, engine.engine, engine.sim; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
