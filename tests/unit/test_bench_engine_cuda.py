"""The arithmetic of the GPU bench: roofs, rows, and what it says of a row that is lost. No GPU."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench.engine_cuda import SHAPES, Figures, Roofs, Row, rows, summary, table

H200 = Roofs(788e12, 4.3e12)
ROW = Row("512->256", 1024, 512, 256)


@pytest.mark.parametrize(
    ("shape", "batch", "serial", "overlapped"),
    [("llama-2-13b", 204, 4556, 6600), ("llama-3.1-8b", 1024, 13454, 18101), ("qwen3-4b", 1024, 19613, 33877)],
)
def test_roofs_of_an_h200_are_those_of_the_survey(shape: str, batch: int, serial: float, overlapped: float) -> None:
    output, total = ROW.tokens()
    assert total == 3 * output
    assert output / H200.serial_s(SHAPES[shape], ROW, batch) == pytest.approx(serial, rel=0.05)
    assert output / H200.overlapped_s(SHAPES[shape], ROW, batch) == pytest.approx(overlapped, rel=0.05)


def test_a_lone_decode_reads_its_weights_once_per_token() -> None:
    row, shape = Row("decode/1", 1, 32, steps=100), SHAPES["llama-3.1-8b"]
    assert row.tokens() == (100, 100)
    assert H200.serial_s(shape, row, 512) == pytest.approx(100 * 2 * shape.num_params / 4.3e12, rel=0.01)


def test_a_quick_run_has_the_same_rows() -> None:
    assert [row.name for row in rows(is_quick=True)] == [row.name for row in rows()]


def test_a_row_that_is_lost_says_so() -> None:
    args: Any = argparse.Namespace(
        kv_gib=90.0, max_num_seqs=512, rows=["decode/8", "prefill/*"], quick=False, quantization="fp8", kv_dtype="fp8"
    )
    figures = Figures({("decode/8", "baton"): [1.0, 1.2, 1.1], ("decode/8", "vllm"): [1.0]}, faults=["vllm: gone"])
    document = summary(SHAPES["qwen3-4b"], figures, args, H200)
    lines = list(table(document))
    assert document["rows"][1]["ratio"] == pytest.approx(1 / 1.1)
    assert sum("LOST" in line for line in lines) == 1
    assert "| prefill/2032 | – | – | – | – | – | – |" in lines
    assert lines[-1] == "FAULT vllm: gone"
    assert lines[0].startswith("\nqwen3-4b, weights fp8, KV fp8")
