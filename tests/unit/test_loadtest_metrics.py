"""What the numbers mean: each metric on outcomes whose values can be seen, merging, intervals, the search for goodput."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from baton.process import clock_id
from loadtest import grid, metrics, page, result
from loadtest.console import Watch
from loadtest.coordinator import ClientFacts, Load, coordinating
from loadtest.metrics import Bootstrap, Sample, Slo, Window
from loadtest.outcome import Outcome
from loadtest.session import LEVELS, Session, Step, headline, search, step_of
from loadtest.target import Target
from loadtest.workload import LoadRequest, Workload

WHOLE = Window(0.0, math.inf)
SLO = Slo(0.2, 0.1)


def outcome(
    index: int, scheduled: float, times: list[float], counts: list[int] | None = None, **fields: Any
) -> Outcome:
    counts = counts or [1] * len(times)
    facts = {
        "ended": times[-1] if times else scheduled,
        "num_output_tokens": sum(counts),
        "written": scheduled,
        **fields,
    }
    return Outcome(index, scheduled, times=array("d", times), counts=array("l", counts), **facts)


def test_latency_counts_from_the_scheduled_time_however_late_the_request_was_written() -> None:
    sample = Sample([outcome(0, 10.0, [12.0, 12.5, 13.5], written=11.5, connect_s=0.25)], 10.0, WHOLE)
    assert sample.ttft_s == [2.0]
    assert sample.e2e_s == [3.5]
    assert sample.tpot_s == [0.75]
    assert sample.handover_s == [0.5]
    assert sample.gap_s.tolist() == [0.5, 1.0]
    assert sample.lag_s == [1.25]


def test_mean_and_p99_of_a_phase_are_of_the_same_requests() -> None:
    traces = [{"ttft_ms": 10.0, "prefill_ms": 4.0, "tpot_ms": 2.0, "failover_ms": None} for _ in range(199)]
    traces += [{"ttft_ms": 1000.0, "prefill_ms": 4.0, "tpot_ms": None, "failover_ms": 900.0}]
    traces += [{"ttft_ms": None, "prefill_ms": 8.0, "failover_ms": 5000.0}]  # it got no token
    found = metrics.phases(traces)
    assert found is not None
    mean, p99 = found["mean_ms"], found["p99_ms"]
    assert found["num_requests"] == 200
    assert (mean["prefill"], p99["prefill"]) == (4.0, 4.0)
    assert (mean["failover"], p99["failover"]) == (4.5, 0.0), "one of 200 is beyond the p99"
    assert (mean["tpot"], p99["tpot"]) == (2.0, 2.0), "an answer of one token has none"
    assert (mean["transfer"], p99["transfer"]) == (None, None), "nobody had one"


def test_tokens_of_one_event_came_together() -> None:
    sample = Sample([outcome(0, 0.0, [1.0, 2.0], [1, 3])], 0.0, WHOLE)
    assert sample.gap_s.tolist() == [1.0, 0.0, 0.0]
    assert sample.tpot_s == [pytest.approx(1 / 3)]
    assert Sample([outcome(0, 0.0, [1.0, 2.0], [2, 1])], 0.0, WHOLE).handover_s == [0.0]


def test_usage_counts_tokens_that_no_event_showed() -> None:
    sample = Sample([outcome(0, 0.0, [1.0, 2.0], num_output_tokens=5)], 0.0, WHOLE)
    assert sample.tpot_s == [0.25]


def test_attainment_is_joint_per_request_and_failures_violate() -> None:
    outcomes = [
        outcome(0, 0.0, [0.1, 0.2]),  # keeps both
        outcome(1, 1.0, [2.0, 2.1]),  # late first token
        outcome(2, 2.0, [2.1, 3.0]),  # slow tokens
        outcome(3, 3.0, [3.1]),  # one token: no TPOT to miss
        outcome(4, 4.0, [4.1, 4.2], failure="truncated"),
    ]
    sample = Sample(outcomes, 0.0, WHOLE)
    found = metrics.attainment(sample, Slo(0.5, 0.5), Bootstrap(5))
    assert {name: part["value"] for name, part in found.items()} == {"joint": 0.4, "ttft": 0.6, "tpot": 0.6}
    assert sample.failures() == {"truncated": 1}


def test_the_window_cuts_by_schedule_and_throughput_by_arrival() -> None:
    outcomes = [outcome(n, float(n), [n + 0.5, n + 1.5], num_prompt_tokens=10) for n in range(10)]
    sample = Sample(outcomes, 0.0, Window(2.0, 6.0))
    assert [o.index for o in sample.outcomes] == [2, 3, 4, 5]
    assert sample.throughput() == {"requests_per_s": 1.0, "output_tokens_per_s": 2.0, "total_tokens_per_s": 12.0}


def test_the_slo_scale_is_the_smallest_factor_that_is_enough() -> None:
    outcomes = [outcome(n, float(n), [n + (n + 1) / 100, n + (n + 1) / 100]) for n in range(100)]
    outcomes[99].failure = "timeout"
    found = metrics.slo_scale(Sample(outcomes, 0.0, WHOLE), Slo(0.5, 1.0))
    assert found["at_90"] == pytest.approx(1.8)
    assert found["at_99"] == pytest.approx(1.98)
    assert [value for alpha, value in found["curve"] if alpha == 1.0] == [0.5]


def test_a_harness_that_lags_more_than_two_percent_of_the_objective_is_not_believed() -> None:
    outcomes = [outcome(n, float(n), [n + 0.1], written=n + 0.003) for n in range(10)]
    sample = Sample(outcomes, 0.0, WHOLE)
    assert metrics.lag(sample, Slo(0.2, 1.0))["valid"] is True
    assert metrics.lag(sample, Slo(0.1, 1.0))["valid"] is False
    assert metrics.lag(sample, None)["valid"] is None


def test_a_client_that_reads_tokens_long_after_they_came_is_not_believed() -> None:
    def load(first: float) -> Load:  # the first of 11 tokens is read at `first`, with all that had come by then
        due = [[0.1 + k / 10 for k in range(11)] for n in range(9)]
        outcomes = [outcome(n, n + 0.0, [n + max(first, at) for at in times]) for n, times in enumerate(due)]
        return Load([], 0.0, outcomes, [ClientFacts("client-0", 0.0, 0.0)], "run", ended=10.0)

    traces = [{"ttft_ms": 100.0, "tpot_ms": 100.0}] * 9

    def entry(first: float, traces: list[dict[str, float]], slo: Slo | None = None) -> dict[str, Any]:
        return result.run(load(first), Workload(rate=1.0), slo, WHOLE, traces)

    assert entry(0.1, traces)["reading"] == {
        "together": 0.0,
        "tpot_s": 0.1,
        "server_tpot_s": 0.1,
        "bundled": 0.0,
        "valid": True,
    }
    assert entry(0.1, traces)["valid"] is None, "without objectives only what is wrong is known"
    for slo in (None, Slo(10.0, 10.0)):
        late = entry(1.1, traces, slo)
        assert late["reading"] == {"together": 1.0, "tpot_s": 0.0, "server_tpot_s": 0.1, "bundled": 0.0, "valid": False}
        assert late["valid"] is False
    assert entry(0.5, traces)["reading"] == {
        "together": 0.4,
        "tpot_s": 0.06,
        "server_tpot_s": 0.1,
        "bundled": 0.0,
        "valid": True,
    }
    assert entry(1.1, [])["valid"] is None, "whether it was the client nobody can say; that they came together is seen"
    assert entry(1.1, [])["reading"]["together"] == 1.0
    said = io.StringIO()
    for run in (late, entry(1.1, []), entry(0.1, traces)):
        Watch(Console(file=said, width=400)).result(run)
    shown = [line for line in said.getvalue().splitlines() if "/s" in line and "load" not in line]
    assert "INVALID: the client was late, TPOT p50" in shown[0]
    assert "100 % of tokens came in one read with the one before" in shown[1]
    assert shown[2].split()[-1] == "0", "nothing behind the numbers"


def test_a_client_that_can_not_count_the_tokens_of_an_event_is_not_compared() -> None:
    sample = Sample([outcome(0, 0.0, [1.0, 1.1], num_output_tokens=9)], 0.0, WHOLE)
    found = metrics.reading(sample, [{"ttft_ms": 1.0, "tpot_ms": 100.0}])
    assert (found["valid"], found["bundled"]) == (None, 0.875)


def test_intervals_of_independent_requests_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(100):
        values = rng.exponential(1.0, 200)
        low, high = Bootstrap(200, seed=trial).quantiles(values, np.arange(200), (0.5,))[0]
        held += low <= math.log(2) <= high
    assert 85 <= held <= 100


def test_intervals_are_wider_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(2)
    alike = np.repeat(rng.integers(0, 2, 100), 20).astype(bool)
    mixed = rng.permutation(alike)
    wide, narrow = Bootstrap(2000).mean(alike), Bootstrap(2000).mean(mixed)
    assert wide is not None
    assert narrow is not None
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_quantiles_count_the_gaps_of_a_request_together() -> None:
    values, owner = np.array([1.0] * 50 + [2.0] * 50), np.array([0] * 50 + [1] * 50)
    assert Bootstrap(2).quantiles(values, owner, (0.5,)) == [[1.0, 2.0]]


def test_an_outcome_survives_its_way_and_takes_the_coordinators_clock() -> None:
    sent = outcome(7, 100.0, [100.5, 100.75], [1, 2], connect_s=0.125, finish_reason="length", num_prompt_tokens=9)
    got = Outcome.from_json(json.loads(json.dumps(sent.to_json())), offset_s=1000.0)
    assert got.scheduled == 1100.0
    assert list(got.times) == [1100.5, 1100.75]
    assert list(got.counts) == [1, 2]
    assert got.lag_s == pytest.approx(sent.lag_s)
    assert (got.index, got.finish_reason, got.num_prompt_tokens, got.num_output_tokens) == (7, "length", 9, 3)


def cliff(capacity: float, width: float = 0.2) -> Any:
    """A server whose attainment falls around a rate; and the rates that were asked for."""
    asked: list[float] = []

    async def measure(rate: float) -> Step:
        asked.append(rate)
        return Step(1 / (1 + math.exp((rate / capacity - 1) / width * 4)))

    return measure, asked


@pytest.mark.parametrize("first", [0.5, 6.0, 300.0])
def test_goodput_is_found_from_below_and_from_above(first: float) -> None:
    measure, asked = cliff(20.0)
    found = asyncio.run(search(measure, LEVELS, first, 0.02))
    for level, part in zip(LEVELS, found, strict=True):
        truth = 20.0 * (1 + 0.2 / 4 * math.log(1 / level - 1))
        low, high = part["between"]
        assert low <= truth <= high <= low * 1.02
        assert part["rate"] == pytest.approx(truth, rel=0.01)
    assert len(set(asked)) == len(asked) < 30


def test_a_level_that_no_rate_reaches_has_no_goodput() -> None:
    async def never(rate: float) -> Step:
        return Step(0.95)

    at_90, at_99 = asyncio.run(search(never, LEVELS, 1.0, 0.05))
    assert at_99["rate"] is None
    assert at_90["between"][1] is None
    assert headline(at_99) == "goodput at 99 %: not reached at any rate"
    assert headline(at_90) == "goodput at 90 %: at least 4096 requests/s (no higher rate was tried)"


def test_a_search_does_not_go_beyond_a_rate_at_which_the_load_generator_was_late() -> None:
    asked: list[float] = []

    async def slow_client(rate: float) -> Step:
        asked.append(rate)
        return Step(1.0, "" if rate <= 8.0 else "late")

    found = asyncio.run(search(slow_client, LEVELS, 1.0, 0.05))
    assert asked == [1.0, 2.0, 4.0, 8.0, 16.0]
    for part in found:
        assert (part["rate"], part["between"]) == (8.0, [8.0, None])
        assert (part["limit"], part["limited_by"]) == (16.0, "late")
    said = "goodput at 90 %: at least 8 requests/s (the load generator was the limit, late from 16/s on)"
    assert headline(found[0]) == said


def test_a_search_that_begins_too_high_for_the_load_generator_goes_down_first() -> None:
    async def slow_client(rate: float) -> Step:
        return Step(0.0 if rate > 3.0 else 1.0, "" if rate <= 16.0 else "late")

    at_90, _ = asyncio.run(search(slow_client, LEVELS, 100.0, 0.05))
    assert at_90["between"][0] <= 3.0 <= at_90["between"][1] <= at_90["between"][0] * 1.05
    assert at_90["limit"] is None, "the server was the limit"


def test_where_no_step_is_valid_there_is_no_goodput_to_tell() -> None:
    asked: list[float] = []

    async def always_late(rate: float) -> Step:
        asked.append(rate)
        return Step(1.0, "late")

    at_90, _ = asyncio.run(search(always_late, LEVELS, 64.0, 0.05))
    assert asked == [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    assert (at_90["rate"], at_90["between"]) == (None, [None, None])
    said = "goodput at 90 %: could not be determined: the load generator was the limit, late from 1/s on"
    assert headline(at_90) == said


def test_objectives_that_a_burst_kept_are_no_goodput() -> None:
    def step(rate: float, ttft_s: float) -> Step:
        load = a_load(rate, ttft_s - 0.1)
        load.outcomes[20].failure = ""
        return step_of(result.run(load, Workload(rate=rate), Slo(0.5, 0.1), result.window(load, 0.0, 0.0)))

    assert step(50.0, 0.3) == Step(1.0)
    assert step(200.0, 0.3) == Step(1.0, "short"), "all 50 were sent within 0.25 s"
    assert step(200.0, 0.6) == Step(0.0), "what a burst breaks a rate breaks, too"
    found = asyncio.run(search(lambda rate: asyncio.sleep(0, step(rate, 0.3)), LEVELS, 50.0, 0.05))
    said = "goodput at 90 %: at least 100 requests/s (steps were shorter than an answer, so take more --requests, from 200/s on)"
    assert headline(found[0]) == said


def test_how_long_it_will_take_is_said_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    async def say() -> str:
        async with coordinating(Target("http://127.0.0.1:9", "completions", "m"), links=[_NoLink()]) as coordinator:
            Session(coordinator, Watch()).announce(Workload(rate=2, arrivals="constant", num_requests=101), [2.0, 4.0])
        return capsys.readouterr().err

    assert asyncio.run(say()) == (
        "2 requests/s: 101 requests, sent in 50 s; 4 requests/s: 101 requests, sent in 25 s; 75 s in all, and the time of "
        "the last answers\n"
    )


class _NoLink:
    """A client process that has nothing to do."""

    name = "client-0"

    async def send(self, message: dict[str, Any]) -> None:
        pass

    async def receive(self) -> dict[str, Any]:
        return {"event": "hello", "clock_id": clock_id()}

    async def close(self) -> None:
        pass


def test_a_step_of_a_bisection_that_is_not_valid_ends_it_and_counts_for_nothing() -> None:
    async def hiccup(rate: float) -> Step:
        return Step(1.0 if rate < 3.0 else 0.0, "" if rate in (1.0, 2.0, 4.0) else "late")

    at_90, at_99 = asyncio.run(search(hiccup, LEVELS, 1.0, 0.05))
    assert at_90["between"] == at_99["between"] == [2.0, 4.0]
    assert headline(at_90) == "goodput at 90 %: 2.2 requests/s"


def test_an_unlucky_first_rate_does_not_hide_lower_ones_that_reach_the_level() -> None:
    async def noisy(rate: float) -> Step:
        return Step({1.0: 0.98, 2.0: 0.995}.get(rate, 1.0 if rate < 4 else 0.0))

    _, at_99 = asyncio.run(search(noisy, LEVELS, 1.0, 0.05))
    assert at_99["between"][0] is not None
    assert 0.5 <= at_99["rate"] <= 1.0


def a_load(rate: float, delay: float = 0.0) -> Load:
    outcomes = [outcome(n, n / rate, [n / rate + 0.1 + delay, n / rate + 0.15 + delay]) for n in range(50)]
    requests = [LoadRequest(n, n / rate, 10, 2) for n in range(50)]
    outcomes[20].fail("http_503", "not today <script>")
    return Load(requests, 0.0, outcomes, [ClientFacts("client-0", 0.0, 0.0)], "run", ended=50 / rate + 1)


def a_result(label: str, slo: Slo | None = SLO, delay: float = 0.0) -> dict[str, Any]:
    runs = []
    for rate in (5.0, 10.0):
        load = a_load(rate, delay)
        runs.append(result.run(load, Workload(rate=rate), slo, result.window(load, None, None)))
    target = Target("http://x", "completions", "<m>", owner="baton")
    return result.whole(runs, target=target, workload=Workload(), slo=slo, command="baton bench", label=label)


def test_a_result_is_written_and_read_and_becomes_a_page_of_its_own(tmp_path: Path) -> None:
    result.write(tmp_path / "a.json", a_result("one"))
    text = page.page([result.read(tmp_path / "a.json")])
    for external in ("http://", "https://", "src=", "@import", "url("):
        assert external not in text.replace("&lt;m&gt; at http://x", "")
    assert "<script" not in text
    assert "not today &lt;script&gt;" in text
    assert text.count("<figure>") == 9  # attainment, scale, five distributions, two of the timeline


def test_every_latency_column_has_one_unit_and_no_exponents() -> None:
    entry = a_result("slow", delay=2.5)
    entry["runs"][0]["ttft_s"].update(p99=0.012, ci95={**entry["runs"][0]["ttft_s"]["ci95"], "p99": [0.0114, 1.234]})
    text = page.page([entry])
    assert "<th>TTFT p99, ms</th>" in text
    assert "<td>12.0<small>11.4–1,234</small></td>" in text
    assert not re.search(r"[0-9]e[+-][0-9]", text)
    assert not re.search(r"<td>[0-9.,]+ (us|ms|s)<", text)


def test_a_partial_result_says_so() -> None:
    entry = a_result("x")
    assert "Partial." not in page.page([entry])
    assert "Partial." in page.page([{**entry, "partial": True}])


def test_results_are_put_side_by_side_at_a_rate_that_both_have() -> None:
    text = page.page([a_result("one"), a_result("two", delay=0.2)])
    assert "one, 10 req/s" in text
    assert "two, 10 req/s" in text
    assert "one: TTFT only" in text


def test_a_result_without_objectives_has_no_attainment() -> None:
    entry = a_result("x", slo=None)
    assert entry["valid"] is None
    assert entry["runs"][0]["attainment"] is None
    assert "SLO attainment" not in page.page([entry])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": "else"}')
    with pytest.raises(result.ResultError, match=r"x\.json: not a bench result"):
        result.read(tmp_path / "x.json")


def test_warm_up_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(result.ResultError, match="leave nothing"):
        result.window(a_load(10.0), 3.0, 3.0)


def a_run(share_met: float, gap: float = 0.01) -> dict[str, Any]:
    requests = [[0.1 if n < share_met * 100 else 9.0, 0.01, ""] for n in range(100)]
    return {"requests": requests, "gap_s": {"count": 1, "p99": gap}}


def test_a_grid_cell_knows_who_wins_and_what_was_not_measured() -> None:
    shares = {"prefill-first": (0.8, 0.5), "chunked 64": (1.0, 0.8), "chunked 256": (0.95, 0.6), "PD": (1.0, 1.0)}
    runs = {
        (arm, rate, 0): a_run(share)
        for arm, pair in shares.items()
        for rate, share in zip((2.0, 4.0), pair, strict=True)
    }
    cell = grid.cells(runs, 0.05, 0.01, 0.9)[0]
    assert (cell.ttft_factor, cell.tpot_factor) == (5.0, 1.5)
    assert str(cell.goodput["prefill-first"]) == "< 2"
    assert str(cell.goodput["chunked 64"]) == "3"
    assert str(cell.goodput["PD"]) == "> 4"
    assert cell.best_chunked == "chunked 64"
    assert str(cell.ratio("chunked 64")) == "> 1.33"
    assert cell.verdict == "wins"


def test_a_cell_that_is_lost_says_so() -> None:
    shares = {"prefill-first": 0.5, "chunked 64": 1.0, "PD": 0.5}
    runs = {(arm, rate, 0): a_run(share) for arm, share in shares.items() for rate in (2.0, 4.0)}
    assert grid.cells(runs, 0.05, 0.01, 0.9)[0].verdict == "loses"
