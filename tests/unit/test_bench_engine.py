"""The arithmetic of `make bench-engine`: bytes and operations, ratios, shares of the roofline, targets."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from bench.engine_report import MAX_REGRET, broken_rows, exit_status, ratios_line, table, wrong_arms
from bench.engine_rows import (
    TARGETS,
    Figure,
    Kind,
    Metric,
    Row,
    Target,
    Verdict,
    all_rows,
    floor_s,
    selected,
    value_at_floor,
    value_of,
    verdicts,
)
from bench.engine_session import Outcome, Setup
from bench.engine_shapes import SHAPES, Ceilings, Shape

LLAMA, QWEN = SHAPES["llama-135m"], SHAPES["qwen3-0.6b"]
ROWS = {row.name: row for row in all_rows(tp_size=2)}
CEILINGS = Ceilings(read_bytes_per_s=15e9, flops_per_s=1.2e12)


def figure(name: str, **values: list[float]) -> Figure:
    """A row with values by arm; `llama` stands for llama.cpp, and `_` for `-`."""
    names = {arm: arm.replace("llama", "llama.cpp").replace("_", "-") for arm in values}
    return Figure(ROWS[name], {names[arm]: numbers for arm, numbers in values.items()})


def test_shapes_have_the_sizes_that_their_names_say() -> None:
    assert LLAMA.num_params == pytest.approx(134.5e6, rel=1e-3)
    assert QWEN.num_params == pytest.approx(596e6, rel=1e-3)
    assert LLAMA.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    assert QWEN.kv_bytes_per_token == 114_688


def test_a_decode_step_reads_all_weights_once_and_the_kv_of_each_sequence() -> None:
    assert LLAMA.decode_bytes(1, 0) == 2 * LLAMA.num_params
    assert LLAMA.decode_bytes(8, 100) - LLAMA.decode_bytes(8, 0) == 800 * LLAMA.kv_bytes_per_token
    assert LLAMA.decode_bytes(8, 0, weight_bytes=1) == LLAMA.num_params


def test_floors_of_a_batch_of_one_are_those_that_issue_4_names() -> None:
    assert CEILINGS.decode_floor_s(LLAMA, 1, 0) == pytest.approx(18e-3, rel=0.01)
    assert CEILINGS.decode_floor_s(QWEN, 1, 0) == pytest.approx(79e-3, rel=0.01)


def test_a_floor_is_the_longer_of_reading_and_computing() -> None:
    slow = Ceilings(read_bytes_per_s=1e15, flops_per_s=1e12)
    assert slow.decode_floor_s(QWEN, 32, 0) == pytest.approx(32 * 2 * QWEN.num_params / 1e12)
    assert slow.decode_floor_s(QWEN, 32, 0, weight_bytes=1) == pytest.approx(32 * QWEN.num_params / 1e12)


def test_prefill_counts_the_head_once_and_attention_causally() -> None:
    tiny = Shape("t", "llama", 1, 8, 2, 1, 4, 16, 32)
    per_token = 2 * ((2 + 2) * 4 * 8 + 2 * 4 * 8 + 3 * 8 * 16)
    attention = sum(4 * 2 * 4 * seen for seen in (1, 2, 3))
    assert tiny.prefill_flops(3) == 3 * per_token + 2 * 32 * 8 + attention


@pytest.mark.parametrize("name", ["decode/8/128", "prefill/512", "mixed", "prefix"])
def test_an_arm_on_the_roofline_has_a_share_of_one_and_half_the_speed_a_half(name: str) -> None:
    row = ROWS[name]
    floor = floor_s(row, LLAMA, CEILINGS, num_pairs=5)
    assert floor is not None
    best = value_at_floor(row, floor)
    half = best / 2 if row.is_higher_better else best * 2
    found = Figure(row, {"baton": [best], "vllm": [half]}, floor=floor)
    assert found.share("baton") == pytest.approx(1)
    assert found.share("vllm") == pytest.approx(0.5)


def test_rows_without_a_floor_have_no_share() -> None:
    assert floor_s(ROWS["startup"], LLAMA, CEILINGS, 5) is None
    assert figure("startup", baton=[1.0]).share("baton") is None


def test_values_are_per_second_of_what_the_row_counts() -> None:
    row = ROWS["decode/8/128"]
    assert value_of(row, 2.0) == 8 * row.num_steps / 2
    assert value_of(ROWS["prefill/512"], 2.0) == 256
    assert value_of(ROWS["mixed"], 2.0) == 512
    assert value_of(ROWS["prefix"], 0.5) == 500
    assert value_of(ROWS["startup"], 0.5) == 0.5


def test_a_ratio_is_taken_pair_by_pair_and_above_one_is_better_for_baton() -> None:
    found = figure("decode/1/128", baton=[30.0, 40.0, 60.0], vllm=[20.0, 40.0, 20.0]).ratio("vllm")
    assert found is not None
    assert (found.median, found.low, found.high, found.count) == (1.5, 1.0, 3.0, 3)
    less_is_better = figure("startup", baton=[2.0], vllm=[10.0]).ratio("vllm")
    assert less_is_better is not None
    assert less_is_better.median == 5.0


def test_a_rival_with_fewer_pairs_is_compared_over_those() -> None:
    found = figure("mixed", baton=[10.0, 20.0, 90.0], llama=[5.0, 5.0]).ratio("llama.cpp")
    assert found is not None
    assert (found.median, found.count) == (3.0, 2)


def test_the_best_peer_is_the_one_that_leaves_the_least_ratio() -> None:
    best = figure("decode/1/128", baton=[40.0], vllm=[20.0], llama=[32.0]).ratio_to_best()
    assert best is not None
    assert best.median == 1.25
    assert figure("decode/1/128", baton=[40.0]).ratio_to_best() is None


def verdicts_of(shape: str, *figures: Figure, num_threads: int = 1) -> dict[tuple[str, str], bool | None]:
    """By row and what it is against."""
    found = verdicts(shape, num_threads, {each.row.name: each for each in figures})
    return {(verdict.row, verdict.target.against or str(verdict.target.metric)): verdict.is_met for verdict in found}


def test_targets_are_met_missed_or_unknown() -> None:
    found = figure("decode/1/128", baton=[40.0], vllm=[30.0])
    expected = {("decode/1/128", "vllm"): False, ("decode/1/128", "llama.cpp"): None, ("decode/1/128", "best"): True}
    assert verdicts_of("llama-135m", found) == expected


def test_a_share_target_reads_the_roofline_of_the_same_run() -> None:
    row = ROWS["decode/1/128"]
    floor = floor_s(row, QWEN, CEILINGS, 5)
    assert floor is not None
    for share, is_met in ((0.89, True), (0.87, False)):
        found = Figure(row, {"baton": [share * value_at_floor(row, floor)]}, floor=floor)
        assert verdicts_of("qwen3-0.6b", found)["decode/1/128", "share"] is is_met


def test_bookkeeping_is_bounded_and_flat() -> None:
    few, many = figure("bookkeeping/10", baton=[0.5]), figure("bookkeeping/10000", baton=[0.9])
    found = verdicts_of("llama-135m", few, many)
    assert found["bookkeeping/10000", "at most"] is True
    assert found["bookkeeping/10000", "bookkeeping/10"] is False
    assert verdicts_of("llama-135m", many)["bookkeeping/10000", "bookkeeping/10"] is None


def test_there_are_no_verdicts_on_other_thread_counts_and_shapes() -> None:
    found = figure("decode/1/128", baton=[1.0], vllm=[30.0])
    assert verdicts_of("llama-135m", found, num_threads=2) == {}
    assert verdicts_of("tiny", found) == {}


def test_every_target_names_a_row_and_a_rival_that_exist() -> None:
    for target in TARGETS:
        assert target.shape in SHAPES
        rows = [row for row in ROWS.values() if fnmatchcase(row.name, target.rows)]
        assert rows, target
        if target.metric is Metric.RATIO and target.against != "best":
            assert all(target.against in row.rivals for row in rows), target


def test_rows_are_selected_by_name_prefix_or_pattern() -> None:
    names = [row.name for row in selected(ROWS.values(), ["decode/1", "int8/*", "mixed"])]
    assert names == ["decode/1/128", "decode/1/1024", "mixed", "int8/1/128", "int8/8/128", "int8/32/128"]
    with pytest.raises(ValueError, match="no row is called 'decod'"):
        selected(ROWS.values(), ["decod"])


def test_room_for_kv_covers_what_early_sequences_decode_while_late_ones_prefill() -> None:
    row = ROWS["decode/32/1024"]
    assert not row.is_fresh
    steps_of_prefill = 32 * 1024 // 480
    assert row.kv_tokens(5) >= 32 * (1024 + steps_of_prefill + 3 + 5 * row.num_steps)


def test_the_exit_status_is_1_for_a_missed_target_or_wrong_tokens_only() -> None:
    target = Target("llama-135m", "mixed", Metric.RATIO, 1.25, "vllm")
    met, missed, unknown = (Verdict(target, "mixed", value) for value in (1.25, 1.24, None))
    assert exit_status([met, unknown], []) == 0
    assert exit_status([met, missed], []) == 1
    assert exit_status([met], ["baton"]) == 1


def test_wrong_tokens_condemn_bf16_arms_of_baton_and_nan_counts_as_wrong() -> None:
    regret = {"baton": float("nan"), "baton-int8": 9.0, "baton-tp2": MAX_REGRET / 2, "vllm": 9.0}
    assert wrong_arms(Outcome(regret=regret)) == ["baton"]


def test_a_row_that_baton_could_not_run_is_a_fault_and_one_that_a_peer_could_not_is_none() -> None:
    broken = Figure(ROWS["mixed"], absent={"baton": "failed: it crashed"})
    fine = Figure(ROWS["prefill/512"], {"baton": [1.0]}, absent={"vllm": "absent"})
    assert broken_rows(Outcome(figures={"mixed": broken, "prefill/512": fine})) == ["mixed"]


def test_only_shapes_whose_heads_split_have_ranks() -> None:
    assert QWEN.splits_over(2)
    assert not LLAMA.splits_over(2)


def test_the_table_shows_an_absent_peer_as_absent() -> None:
    found = Figure(ROWS["mixed"], {"baton": [10.0]}, absent={"vllm": "absent", "llama.cpp": "failed: it crashed"})
    text = "\n".join(table(Outcome(figures={"mixed": found})))
    assert "vllm absent" in text
    assert "llama.cpp failed" in text


def test_rows_of_one_kind_share_their_measure() -> None:
    assert {row.kind for row in ROWS.values()} == set(Kind)
    assert len(ROWS) == len(all_rows(tp_size=2))
    assert all(isinstance(row, Row) and row.subject not in row.rivals for row in ROWS.values())


def test_the_last_line_names_every_ratio() -> None:
    outcome = Outcome(figures={"mixed": figure("mixed", baton=[30.0], vllm=[20.0], llama=[10.0])})
    line = ratios_line(_setup(), outcome)
    assert line == "llama-135m 1 thread(s): mixed 1.50x vllm 3.00x llama.cpp"
    assert "no rival was measured" in ratios_line(_setup(), Outcome())


def _setup() -> Setup:
    return Setup(LLAMA, 1, (), 5, 1, Path("/nowhere"), None, None)
