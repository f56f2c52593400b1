"""Where bytes of a pool lie: the same, whether they were looked for ahead of time or not."""

from __future__ import annotations

import numpy as np
import pytest

from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.pool import Pool, address_of

MODEL = ModelKV((LayerSpec(2, 8),) * 5, "bfloat16", "f")
LAYOUT = KVLayout(MODEL, KVGeometry(1, 16, 40), 0)


def runs_of(seed: int) -> np.ndarray:
    """Some whole blocks of a layer."""
    blocks = np.random.default_rng(seed).permutation(40)[:7].astype(np.uint64)
    size = np.uint64(LAYOUT.block_bytes(0))
    return np.stack([blocks * size, np.full(7, size)], axis=1)


def test_what_was_located_lies_where_it_is_for_any_layers_and_number_of_transfers() -> None:
    buffer = np.zeros(LAYOUT.pool_bytes, np.uint8)
    pool, other = (Pool(LAYOUT, memoryview(buffer)) for _ in range(2))
    all_runs = [runs_of(seed) for seed in range(40)]
    for runs in all_runs:
        pool.locate([(layer, runs) for layer in range(5)])
    for runs in all_runs:
        for layers in ([0], [4], [1, 2, 3], [0, 1, 2, 3, 4], [0, 2]):
            parts = [(layer, runs) for layer in layers]
            found = pool.pieces(parts)
            assert (found == other.pieces(parts)).all()
            starts = [
                address_of(buffer) + LAYOUT.layer_offset(layer) + int(at) for layer in layers for at in runs[:, 0]
            ]
            assert found[:, 0].tolist() == starts


def test_pieces_of_a_layer_that_is_not_there_are_an_error() -> None:
    pool = Pool(LAYOUT, memoryview(np.zeros(LAYOUT.pool_bytes, np.uint8)))
    known, unknown = runs_of(0), runs_of(1)
    pool.locate([(layer, known) for layer in range(5)])
    for runs in (known, unknown):
        with pytest.raises(ValueError, match="layers 4"):
            pool.pieces([(4, runs), (5, runs)])
    pool.release()
    for runs in (known, unknown):
        with pytest.raises(ValueError, match="with 0"):
            pool.pieces([(0, runs)])
