"""The flags of `baton bench`, and a comparison that goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from loadtest import arguments, command, compare, grid
from loadtest.workload import Length, WorkloadError


def parsed(*words: str) -> argparse.Namespace:
    return cli.parser().parse_args(arguments.with_mode(["bench", *words]))


def test_bench_without_a_mode_runs() -> None:
    assert parsed("--rate", "2,4").bench_mode == "run"
    assert parsed().bench_mode == "run"
    assert parsed("goodput").bench_mode == "goodput"
    assert arguments.with_mode(["serve", "bench"]) == ["serve", "bench"]


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("2s", 2.0), ("0.5", 0.5), ("80us", 8e-5)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert arguments.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["0", "-1s", "1h", "", "1.2.3s", "s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.duration(text)


def test_objectives_are_both_given() -> None:
    assert arguments.slo("ttft=200ms,tpot=20ms") == {"ttft_s": 0.2, "tpot_s": pytest.approx(0.02)}
    for text in ("ttft=1s", "ttft=1s,itl=2s", "ttft=1s,tpot=1s,tpot=2s", "1s"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.slo(text)


def test_flags_become_a_workload() -> None:
    flags = ("--rate", "3", "--arrivals", "gamma:2.5", "--duration", "40s", "--input-tokens", "100:0.5", "--seed", "7")
    found = command.workload_of(parsed(*flags), 4096)
    assert (found.rate, found.arrivals, found.cv, found.duration_s, found.num_requests) == (3, "gamma", 2.5, 40, None)
    assert (found.input_tokens, found.seed, found.max_total_tokens) == (Length(100, 0.5), 7, 4096)


def test_a_load_without_bounds_has_some() -> None:
    assert command.workload_of(parsed("--rate", "3"), None).num_requests == 200
    assert command.workload_of(parsed("--concurrency", "3"), None).arrivals == "closed"
    assert command.workload_of(parsed("--arrivals", "trace"), None).num_requests is None


def test_flags_that_contradict_each_other_are_refused() -> None:
    for flags in (("--arrivals", "poisson:2"), ("--speedup", "2", "--rate", "1"), ("--arrivals", "gamma:x")):
        with pytest.raises(WorkloadError):
            command.workload_of(parsed(*flags), None)


def said_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a bad command line is answered; it must be one line and status 2."""
    assert cli_status(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("baton: ")
    assert said.count("\n") == 1
    return said


def cli_status(*words: str) -> int:
    try:
        return cli.main(["bench", *words])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--slo", "ttft=200ms"), "'ttft=200ms' lacks tpot: both are needed"),
        (("--slo", "tpot=20ms"), "lacks ttft"),
        (("--slo", "ttft=200,tpot=20ms"), "ttft=200 has no unit"),
        (("--clients", "0"), "'0' is not a whole number of at least 1"),
        (("--rate", "x"), "see `baton bench run --help`"),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag; see `baton bench run --help`\n"),
        (("--rtae", "3"), "unrecognized arguments: --rtae 3; did you mean --rate?\n"),
        (("goodput", "--tolerence=0.1"), "did you mean --tolerance?\n"),
        (("compare", "--output", "d", "--bugdets", "64"), "did you mean --budgets?\n"),
        (("--url", "localhost:8000"), "localhost:8000: not a URL such as http://127.0.0.1:8000; see"),
        (("goodput", "--tolerance", "0"), "see `baton bench goodput --help`"),
        (("compare", "--output", "d", "--budgets", "64,x"), "--budgets"),
    ],
)
def test_a_bad_flag_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], part: str
) -> None:
    assert part in said_of(capsys, *words)


def test_what_can_not_be_read_or_written_is_said_before_any_server_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATON_RUNTIME_DIR", str(tmp_path / "no-server-here"))
    for words, name in (
        (("--rate", "1", "--json", "missing/x.json"), "missing/x.json"),
        (("--rate", "1", "--html", "missing/x.html"), "missing/x.html"),
        (("--rate", "1", "--json", str(tmp_path)), str(tmp_path)),
        (("--rate", "1", "--data", "azure:none.csv"), "none.csv"),
        (("--rate", "1", "--api-key-file", "none.key"), "none.key"),
        (("--compare", "a.json", "b.json"), "a.json"),
        (("--compare", "a.json"), "a.json"),
    ):
        assert said_of(capsys, *words).count(name) == 1
    assert cli_status("--rate", "1") == 1
    assert "BATON_RUNTIME_DIR" in capsys.readouterr().err  # it was looked for, in a directory that can not be


def test_a_url_may_end_as_other_tools_want_it() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert parsed("--url", url).url == "http://h:1"


# ---- compare


def prepared(directory: Path, *more: str) -> argparse.Namespace:
    """A comparison whose runs are all stored."""
    words = ("--output", str(directory), "--azure", "a.csv", "--budgets", "64,256", "--repetitions", "2", *more)
    found = parsed("compare", *words)
    workload = {
        "unloaded_ttft_s": 0.05,
        "unloaded_tpot_s": 0.01,
        "mean_prompt_tokens": 100.0,
        "mean_output_tokens": 20.0,
        "capacity_requests_per_s": 5.0,
        "rates": [2.0, 4.0],
    }
    settings = {
        **{
            name: getattr(found, name)
            for name in ("model", "engine", "divide", "requests", "repetitions", "rates", "seed")
        },
        "data": {"azure": "azure:a.csv"},
        "budgets": [64, 256],
        "set": [],
    }
    machine = {"cpu": "some", "num_cores": 2, "load_average_1min": 0.5}
    plan = {"format": compare.FORMAT, "settings": settings, "machine": machine, "workloads": {"azure": workload}}
    (directory / "runs").mkdir(parents=True)
    (directory / "plan.json").write_text(json.dumps(plan))
    for arm in compare.arms([64, 256]):
        for rate in (2.0, 4.0):
            for repetition in range(2):
                slow = 0.2 if arm.name == grid.PREFILL_FIRST else 0.01
                name = f"azure-{arm.name.replace(' ', '')}-{rate:g}-{repetition}.json"
                (directory / "runs" / name).write_text(json.dumps(a_run(slow)))
    return found


def a_run(tpot_s: float) -> dict[str, Any]:
    requests = [[0.1, tpot_s, ""]] * 20
    return {"requests": requests, "valid": True, "num_failed": 0, "gap_s": {"count": 1, "p99": tpot_s * 2}}


NO_SERVER = ["false"]  # whoever starts it fails


def test_a_comparison_that_is_complete_is_only_reported(tmp_path: Path) -> None:
    assert compare.run(prepared(tmp_path / "c"), NO_SERVER) == 0
    text = (tmp_path / "c" / "compare.md").read_text()
    assert text.count("| wins |") + text.count("| undecided |") + text.count("| **loses** |") == 16
    assert "| 5x = 250 ms | 1.5x = 15 ms | < 2 (< 2 to < 2) | > 4 (> 4 to > 4), chunked 64 | > 4 (> 4 to > 4) |" in text
    assert "| 2 | 400 ms (400 ms to 400 ms) |" in text
    assert "<figure>" in (tmp_path / "c" / "compare.html").read_text()
    assert len(json.loads((tmp_path / "c" / "compare.json").read_text())["grid"]["azure"]) == 16


def test_late_runs_make_a_comparison_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path / "c")
    (tmp_path / "c" / "runs" / "azure-PD-4-1.json").write_text(json.dumps({**a_run(0.01), "valid": False}))
    assert compare.run(found, NO_SERVER) == 3
    assert (tmp_path / "c" / "compare.md").read_text().startswith("**INVALID: in 1 of 16 runs")
    assert "INVALID: in 1 of 16 runs" in (tmp_path / "c" / "compare.html").read_text()
    assert "INVALID: in 1 of 16 runs" in capsys.readouterr().err
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["valid"] is False


def test_a_run_that_is_missing_is_measured_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path / "c")
    (tmp_path / "c" / "runs" / "azure-PD-4-1.json").unlink()
    assert compare.run(found, NO_SERVER) == 1
    said = capsys.readouterr().err
    assert said.count("repetition") == 1
    assert "azure, PD, repetition 2 of 2" in said
    assert "the same command goes on" in said


def test_other_settings_do_not_go_on_in_the_same_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path / "c")
    other = parsed(
        *("compare", "--output", str(tmp_path / "c"), "--azure", "a.csv", "--budgets", "64,256"),
        *("--repetitions", "2", "--requests", "9"),
    )
    assert compare.run(other, NO_SERVER) == 2
    assert "another requests" in capsys.readouterr().err


def test_every_arm_has_two_ranks_and_its_own_scheduling() -> None:
    flags = {arm.name: " ".join(arm.flags) for arm in compare.arms([64, 512])}
    assert list(flags) == ["prefill-first", "chunked 64", "chunked 512", "PD"]
    assert flags["PD"] == "--prefill 1 --decode 1"
    assert all(flags[name].startswith("--mixed 2") for name in flags if name != "PD")
    assert "engine.scheduling=prefill_first" in flags["prefill-first"]
    assert "engine.max_num_batched_tokens=64" in flags["chunked 64"]
