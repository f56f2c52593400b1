"""Progress of a load: a bar now and then, from what was really read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.progress import MeteredWeights, Progress
from engine.weights import Checkpoint


def test_a_bar_comes_every_two_seconds_and_says_what_is_left() -> None:
    said: list[str] = []
    moments = iter((100.0, 100.5, 101.9, 102.0, 103.9, 106.0))
    progress = Progress("loading", 200, say=said.append, now=lambda: next(moments))
    for _ in range(5):
        progress.add(20)
    assert said == ["loading [######..............] 30%, 5 s left", "loading [##########..........] 50%, 6 s left"]


def test_a_tensor_that_is_read_in_parts_counts_once(tmp_path: Path) -> None:
    shapes = {"a.weight": (4, 8), "b.weight": (2,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    counts: list[int] = []

    class Counted(Progress):
        def add(self, count: int) -> None:
            counts.append(count)

    weights = MeteredWeights(Checkpoint(tmp_path, shapes), shapes, lambda what, total: Counted(what, total))
    assert weights.read("a.weight", slice(0, 2)).shape == (2, 8)
    assert weights.read("a.weight", slice(2, 4), slice(0, 4)).shape == (2, 4)
    weights.read("b.weight")
    assert counts == [32, 0, 2]
    assert "a.weight" in weights
    assert "c.weight" not in weights
