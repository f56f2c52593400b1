"""Workloads: rates and variations as asked for, everything from the seed, prefixes shared as in the trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from loadtest.prompts import PromptMaker
from loadtest.target import Target
from loadtest.workload import Length, LoadRequest, Workload, WorkloadError


def gaps(workload: Workload) -> np.ndarray:
    return np.diff([request.at_s for request in workload.requests()])


@pytest.mark.parametrize(
    ("arrivals", "cv", "expected_cv"), [("poisson", 1.0, 1.0), ("gamma", 3.0, 3.0), ("gamma", 0.3, 0.3)]
)
def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for(
    arrivals: str, cv: float, expected_cv: float
) -> None:
    found = gaps(Workload(arrivals=arrivals, cv=cv, rate=8.0, num_requests=20_000))
    assert found.mean() == pytest.approx(1 / 8, rel=0.08)
    assert found.std() / found.mean() == pytest.approx(expected_cv, rel=0.08)


def test_constant_arrivals_are_constant() -> None:
    assert gaps(Workload(arrivals="constant", rate=4.0, num_requests=10)) == pytest.approx([0.25] * 9)


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    times = np.array([r.at_s for r in Workload(rate=20.0, duration_s=1000.0).requests()])
    counts = np.histogram(times, bins=1000, range=(0, 1000))[0]
    assert counts.mean() == pytest.approx(20, rel=0.05)
    assert counts.var() == pytest.approx(20, rel=0.2)


def test_a_duration_bounds_the_arrivals() -> None:
    times = [r.at_s for r in Workload(arrivals="gamma", cv=4.0, rate=10.0, duration_s=30.0).requests()]
    assert times == sorted(times)
    assert times[0] > 0
    assert 25 < times[-1] < 30


def test_lengths_are_lognormal_with_mean_and_cv() -> None:
    requests = Workload(rate=1, num_requests=30_000, input_tokens=Length(500, 0.8), output_tokens=Length(50)).requests()
    prompts = np.array([r.num_prompt_tokens for r in requests])
    assert prompts.mean() == pytest.approx(500, rel=0.03)
    assert prompts.std() / prompts.mean() == pytest.approx(0.8, rel=0.05)
    assert {r.num_output_tokens for r in requests} == {50}


def test_the_seed_decides_everything() -> None:
    workload = Workload(rate=5, num_requests=50, input_tokens=Length(100, 1), seed=3)
    assert workload.requests() == workload.requests()
    assert workload.requests() != dataclasses.replace(workload, seed=4).requests()


def test_another_rate_has_the_same_lengths_and_scaled_arrivals() -> None:
    slow = Workload(rate=5, num_requests=50, input_tokens=Length(100, 1)).requests()
    fast = Workload(rate=20, num_requests=50, input_tokens=Length(100, 1)).requests()
    assert [r.num_prompt_tokens for r in slow] == [r.num_prompt_tokens for r in fast]
    assert [r.at_s / 4 for r in slow] == pytest.approx([r.at_s for r in fast])


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.0000000,{800 + second},{80 + second}\n" for second in range(0, 50, 10)
)


@pytest.fixture
def azure(tmp_path: Path) -> str:
    (tmp_path / "a.csv").write_text(AZURE)
    return f"azure:{tmp_path / 'a.csv'}"


def test_a_trace_replays_its_own_times(azure: str) -> None:
    requests = Workload(data=azure, arrivals="trace").requests()
    assert [r.at_s for r in requests] == [0, 10, 20, 30, 40]
    assert [r.num_prompt_tokens for r in requests] == [800, 810, 820, 830, 840]


def test_a_trace_is_compressed_by_a_factor_or_to_a_rate(azure: str) -> None:
    assert [r.at_s for r in Workload(data=azure, arrivals="trace", speedup=10).requests()] == [0, 1, 2, 3, 4]
    assert [r.at_s for r in Workload(data=azure, arrivals="trace", rate=2).requests()] == [0, 0.5, 1, 1.5, 2]
    assert len(Workload(data=azure, arrivals="trace", rate=2, duration_s=1.1).requests()) == 3


def test_lengths_of_a_trace_are_divided_and_long_requests_left_out(azure: str) -> None:
    requests = Workload(data=azure, arrivals="trace", divide=8, max_total_tokens=114).requests()
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in requests] == [(100, 10), (101, 11), (102, 12)]


def test_rows_are_used_again_where_there_are_too_few_and_never_with_the_same_content(azure: str) -> None:
    requests = Workload(data=azure, rate=1, num_requests=12).requests()
    assert [r.num_prompt_tokens for r in requests[5:10]] == [800, 810, 820, 830, 840]
    assert len({r.pieces[0][0] for r in requests}) == 12


@pytest.mark.parametrize("divide", [1, 3, 8])
def test_mooncake_prefixes_are_shared_as_far_as_their_blocks_are(tmp_path: Path, divide: float) -> None:
    rows = [(1200, [7, 8, 9]), (1500, [7, 8, 10]), (900, [7, 11])]
    lines = [
        f'{{"timestamp": {i}, "input_length": {n}, "output_length": 8, "hash_ids": {ids}}}\n'
        for i, (n, ids) in enumerate(rows)
    ]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    requests = Workload(data=f"mooncake:{tmp_path / 'm.jsonl'}", arrivals="trace", divide=divide).requests()
    assert [r.num_prompt_tokens for r in requests] == [round(n / divide) for n, _ in rows]
    maker = PromptMaker(Target("", "completions", "m", alphabet=tuple(range(1000, 1999))), "run")
    prompts = [maker.ids(request)[1:-1].split(",") for request in requests]
    assert [len(prompt) for prompt in prompts] == [r.num_prompt_tokens for r in requests]
    assert common(prompts[0], prompts[1]) == round(1024 / divide)
    assert common(prompts[0], prompts[2]) == round(512 / divide)


def common(one: list[str], other: list[str]) -> int:
    """Length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate": None, "num_requests": 5}, "need a rate"),
        ({"rate": 1.0}, "how many requests"),
        ({"rate": -1.0, "num_requests": 5}, "above 0"),
        ({"rate": 1.0, "num_requests": 5, "concurrency": 2}, "closed loop"),
        ({"arrivals": "closed", "num_requests": 5}, "needs a concurrency"),
        ({"arrivals": "closed", "num_requests": 5, "concurrency": 2, "rate": 1.0}, "no rate"),
        ({"arrivals": "trace"}, "no times to replay"),
        ({"data": "azur:x", "rate": 1.0, "num_requests": 5}, "KIND:FILE"),
        ({"arrivals": "bursty", "rate": 1.0, "num_requests": 5}, "must be one of"),
        ({"rate": 1.0, "num_requests": 5, "max_total_tokens": 10}, "no request is short enough"),
    ],
)
def test_settings_that_make_no_load_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(WorkloadError, match=complaint):
        Workload(**settings).requests()


def test_a_request_survives_its_way_to_a_client() -> None:
    request = LoadRequest(3, 1.5, 20, 7, ((4, 12), (-9, 8)), "")
    assert LoadRequest.from_json(request.to_json()) == request


def test_contents_are_the_same_on_every_client_of_a_load_and_others_in_every_load() -> None:
    target = Target("", "completions", "m", alphabet=tuple(range(50, 90)))
    request = LoadRequest(0, 0.0, 64, 1, ((-1, 64),))
    assert PromptMaker(target, "a").ids(request) == PromptMaker(target, "a").ids(request)
    assert PromptMaker(target, "a").ids(request) != PromptMaker(target, "b").ids(request)


def test_a_shorter_piece_is_the_beginning_of_a_longer_one() -> None:
    target = Target("", "completions", "m", alphabet=tuple(range(50, 90)))
    long = PromptMaker(target, "a").ids(LoadRequest(0, 0.0, 64, 1, ((5, 64),)))
    assert long.startswith(PromptMaker(target, "a").ids(LoadRequest(0, 0.0, 30, 1, ((5, 30),)))[:-1])


def test_a_prompt_in_words_has_about_as_many_tokens_as_were_asked_for() -> None:
    target = Target("", "chat", "m", tokens_per_word=1.25, overhead_tokens=10)
    text = PromptMaker(target, "a").text(LoadRequest(0, 0.0, 135, 1, ((1, 50), (2, 85))))
    assert len(text.split()) == 100
