"""The copy plan: every destination byte is written exactly once, with the right content, for every pair of geometries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import LayoutMismatch
from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.plan import CopyPlan, TableRuns, destination_ranks, plan_copies, rank_pairs, source_ranks, zip_runs

TP_PAIRS = [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2), (4, 4), (2, 2)]


@st.composite
def transfers(draw: st.DrawFn) -> tuple[ModelKV, KVGeometry, KVGeometry, int, int, list[int], list[int]]:
    """A model, two geometries, (first_token, num_tokens) and a block table on each side."""
    source_tp, destination_tp = draw(st.sampled_from(TP_PAIRS))
    heads = st.sampled_from([h for h in (1, 2, 4, 8) if h % 4 == 0 or 4 % h == 0])
    layers = tuple(
        LayerSpec(h, d) for h, d in draw(st.lists(st.tuples(heads, st.sampled_from([1, 2])), min_size=1, max_size=2))
    )
    model = ModelKV(layers, draw(st.sampled_from(["float32", "bfloat16"])), "f")
    num_tokens = draw(st.integers(1, 150))
    first_token = draw(st.integers(0, num_tokens // UNIT_TOKENS)) * UNIT_TOKENS
    geometries, tables = [], []
    for tp in (source_tp, destination_tp):
        block_size = draw(st.sampled_from([16, 32, 48, 64]))
        needed = math.ceil(num_tokens / block_size)
        geometry = KVGeometry(tp, block_size, needed + draw(st.integers(0, 3)))
        geometries.append(geometry)
        tables.append(draw(st.permutations(range(geometry.num_blocks)))[:needed])
    return model, geometries[0], geometries[1], first_token, num_tokens, tables[0], tables[1]


def naive_offset(layout: KVLayout, layer: int, table: list[int], half: int, head: int, token: int) -> int:
    """Where one token of one global head starts, straight from the layout's definition, relative to the layer."""
    block, in_block = divmod(token, layout.geometry.block_size)
    row = layout.model.layers[layer].head_dim * layout.model.itemsize_bytes
    local = head - layout.heads(layer).start
    heads = len(layout.heads(layer))
    return (((table[block] * 2 + half) * heads + local) * layout.geometry.block_size + in_block) * row


def cuts(first: int, end: int, step: int) -> list[tuple[int, int]]:
    """Whole-unit frames over [first, end)."""
    edges = [*range(first, end, step), end]
    return list(itertools.pairwise(edges))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(transfers(), st.integers(1, 5))
def test_every_destination_byte_is_written_exactly_once_from_its_naive_place(
    case: tuple[ModelKV, KVGeometry, KVGeometry, int, int, list[int], list[int]], units_per_frame: int
) -> None:
    model, source_geometry, destination_geometry, first, end, source_table, destination_table = case
    for destination_rank in range(destination_geometry.tp_size):
        destination = KVLayout(model, destination_geometry, destination_rank)
        for layer, spec in enumerate(model.layers):
            origin: dict[int, tuple[int, int]] = {}
            for source_rank in source_ranks(
                model, source_geometry.tp_size, destination_geometry.tp_size, destination_rank
            ):
                source = KVLayout(model, source_geometry, source_rank)
                plan = plan_copies(source, destination)
                if not plan.unit_bytes[layer]:
                    continue
                source_runs = TableRuns(plan.source_sides, plan.group_tokens, source_table)
                destination_runs = TableRuns(plan.destination_sides, plan.group_tokens, destination_table)
                for a, b in cuts(first, end, units_per_frame * UNIT_TOKENS):
                    to, fro = destination_runs.runs(layer, a, b), source_runs.runs(layer, a, b)
                    copies = zip_runs(to, fro)
                    assert plan.num_bytes(layer, b - a) == sum(to_end - to_start for to_start, to_end, _, _ in copies)
                    for to_start, to_end, from_start, from_end in copies:
                        assert to_end - to_start == from_end - from_start
                        for i in range(to_end - to_start):
                            assert to_start + i not in origin, "written twice"
                            origin[to_start + i] = (source_rank, from_start + i)
            row = spec.head_dim * model.itemsize_bytes
            expected = set()
            for half in range(2):
                for head in destination.heads(layer):
                    for token in range(first, end):
                        at = naive_offset(destination, layer, destination_table, half, head, token)
                        expected |= set(range(at, at + row))
                        source_rank, source_at = origin[at]
                        source = KVLayout(model, source_geometry, source_rank)
                        assert head in source.heads(layer)
                        assert source_at == naive_offset(source, layer, source_table, half, head, token)
                        assert all(origin[at + i] == (source_rank, source_at + i) for i in range(row))
            assert expected == set(origin)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("source_tp", "destination_tp"), TP_PAIRS)
def test_leaders_always_exchange_something(heads: int, source_tp: int, destination_tp: int) -> None:
    model = ModelKV((LayerSpec(heads, 8),), "bfloat16", "f")
    assert (0, 0) in rank_pairs(model, source_tp, destination_tp)


def test_destination_ranks_take_turns_among_source_ranks_that_replicate_a_head() -> None:
    model = ModelKV((LayerSpec(1, 8),), "bfloat16", "f")
    assert rank_pairs(model, 2, 4) == ((0, 0), (0, 2), (1, 1), (1, 3))
    assert destination_ranks(model, 4, 3, 1) == []


def test_equal_geometries_move_neighbouring_blocks_in_one_run() -> None:
    model = ModelKV((LayerSpec(3, 64),), "bfloat16", "f")
    layout = KVLayout(model, KVGeometry(1, 32, 100), 0)
    plan = plan_copies(layout, layout)
    runs = TableRuns(plan.source_sides, plan.group_tokens, [7, 8, 9, 3]).runs(0, 0, 128)
    block = layout.block_bytes(0)
    assert runs.tolist() == [[7 * block, 3 * block], [3 * block, block]]


def test_a_partial_last_unit_touches_no_byte_beyond_the_last_token() -> None:
    model = ModelKV((LayerSpec(2, 4),), "bfloat16", "f")
    layout = KVLayout(model, KVGeometry(1, 16, 4), 0)
    plan = plan_copies(layout, layout)
    runs = TableRuns(plan.source_sides, plan.group_tokens, [2]).runs(0, 0, 5)
    row, block = 8, layout.block_bytes(0)
    assert runs.tolist() == [[2 * block + i * 16 * row, 5 * row] for i in range(4)]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 300), st.integers(1, 100_000))
def test_frames_end_within_their_bytes_and_between_groups_where_they_can(
    first_unit: int, num_tokens: int, max_bytes: int
) -> None:
    model = ModelKV((LayerSpec(2, 8),), "bfloat16", "f")
    source = KVLayout(model, KVGeometry(1, 64, 64), 0)
    plan = plan_copies(source, source)
    first = first_unit * UNIT_TOKENS
    end = plan.frame_end(0, first, first + num_tokens, max_bytes)
    assert first < end <= first + num_tokens
    assert plan.num_bytes(0, end - first) <= max(max_bytes, plan.unit_bytes[0])
    if end < first + num_tokens:
        assert end % UNIT_TOKENS == 0


def layout_of(**changes: object) -> KVLayout:
    """A layout with some identity fields changed."""
    fields = {"layers": (LayerSpec(4, 8),), "dtype": "bfloat16", "fingerprint": "f", "hash_version": 1, **changes}
    return KVLayout(ModelKV(**fields), KVGeometry(1, 16, 4), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float32"), ("fingerprint", "other"), ("hash_version", 2), ("layers", (LayerSpec(4, 16),))],
)
def test_another_models_kv_is_refused_and_the_field_is_named(field: str, value: object) -> None:
    with pytest.raises(LayoutMismatch, match=field):
        plan_copies(layout_of(), layout_of(**{field: value}))


def test_heads_that_do_not_divide_have_no_plan() -> None:
    model = ModelKV((LayerSpec(3, 8),), "bfloat16", "f")
    with pytest.raises(LayoutMismatch, match="3 KV heads"):
        rank_pairs(model, 1, 2)


def test_content_arrives_where_the_layout_says_it_is() -> None:
    model = ModelKV((LayerSpec(4, 8),), "float32", "f")
    source, destination = KVLayout(model, KVGeometry(2, 16, 9), 1), KVLayout(model, KVGeometry(1, 64, 3), 0)
    plan: CopyPlan = plan_copies(source, destination)
    source_table, destination_table = [8, 0, 3, 4, 1], [2, 0]
    fro = np.random.default_rng(0).integers(0, 256, source.pool_bytes, dtype=np.uint8)
    to = np.zeros(destination.pool_bytes, np.uint8)
    copies = zip_runs(
        TableRuns(plan.destination_sides, plan.group_tokens, destination_table).runs(0, 0, 70),
        TableRuns(plan.source_sides, plan.group_tokens, source_table).runs(0, 0, 70),
    )
    for to_start, to_end, from_start, from_end in copies:
        to[to_start:to_end] = fro[from_start:from_end]
    row = 8 * 4
    for half in range(2):
        for head in (2, 3):
            for token in range(70):
                a = naive_offset(source, 0, source_table, half, head, token)
                b = naive_offset(destination, 0, destination_table, half, head, token)
                assert (to[b : b + row] == fro[a : a + row]).all()
