"""`bench.agreement` keeps runs of one load in one directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench.agreement import claim, described, load_of

DEFAULTS: dict[str, Any] = {"requests": 700, "rate": 12.0, "arrivals": "poisson", "concurrency": None}


def load(**changes: Any) -> dict[str, Any]:
    return load_of(argparse.Namespace(**DEFAULTS | changes))


@pytest.mark.parametrize(
    "change",
    [{"requests": 70}, {"rate": 6.0}, {"arrivals": "constant"}, {"concurrency": 8}],
    ids=lambda c: next(iter(c)),
)
def test_runs_of_another_load_are_not_taken_for_this_ones(tmp_path: Path, change: dict[str, Any]) -> None:
    claim(tmp_path / "d", load())
    claim(tmp_path / "d", load())
    with pytest.raises(ValueError, match=f"holds runs with another .*{next(iter(change))}.*: take another --output"):
        claim(tmp_path / "d", load(**change))


def test_a_closed_loop_has_no_rate_that_could_differ(tmp_path: Path) -> None:
    claim(tmp_path, load(concurrency=8))
    claim(tmp_path, load(concurrency=8, rate=1.0, arrivals="constant"))


def test_runs_of_an_unknown_load_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "baton-0.json").write_text("{}")
    with pytest.raises(ValueError, match="unknown load"):
        claim(tmp_path, load())


def test_the_load_is_told_in_words() -> None:
    assert described(load()) == (
        "700 requests of each run, Poisson arrivals, 12 per second, 200 bytes in, 32 tokens out"
    )
    assert "8 always in flight" in described(load(concurrency=8))
