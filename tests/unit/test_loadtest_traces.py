"""Trace readers: what they read, and how they name what they can not read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from loadtest import traces
from loadtest.traces import Row, TraceError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
SHAREGPT = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.32\n"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [0, 1]}\n{"timestamp": 250, "input_length": 512, "output_length": 4, "hash_ids": [0]}\n'


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_azure_rows_have_times_from_the_first_one(tmp_path: Path) -> None:
    assert traces.read("azure", written(tmp_path, AZURE)) == [Row(374, 44, 0.0), Row(396, 109, pytest.approx(4.314579))]


def test_sharegpt_rows_have_no_times(tmp_path: Path) -> None:
    assert traces.read("sharegpt", written(tmp_path, SHAREGPT)) == [Row(74, 918), Row(290, 905)]


def test_mooncake_rows_keep_their_blocks(tmp_path: Path) -> None:
    expected = [Row(600, 6, 0.0, (0, 1)), Row(512, 4, 0.25, (0,))]
    assert traces.read("mooncake", written(tmp_path, MOONCAKE)) == expected


def test_prompts_come_from_lines_of_text_and_from_json_lines(tmp_path: Path) -> None:
    assert traces.read("prompts", written(tmp_path, "one\ntwo\n"), output_tokens=7) == [
        Row(0, 7, text="one"),
        Row(0, 7, text="two"),
    ]
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "def f():", "output_tokens": 3}\n{"prompt": "x"}\n'))
    assert traces.read("prompts", path, output_tokens=7) == [Row(0, 3, text="def f():"), Row(0, 7, text="x")]


def test_a_limit_ends_the_reading_before_bad_rows(tmp_path: Path) -> None:
    assert len(traces.read("azure", written(tmp_path, AZURE + "nonsense\n"), limit=2)) == 2


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("azure", AZURE + "2023-11-16 18:15:51,0,5\n", r":4: ContextTokens '0' is not a number of tokens"),
        ("azure", AZURE + "2023-11-16 18:15:51,5\n", r":4: 2 values for 3 columns"),
        ("azure", AZURE + "yesterday,5,5\n", r":4: TIMESTAMP 'yesterday' is not a time"),
        ("azure", AZURE + "2023-11-16 18:15:47,5,5\n", r":4: its time is 3\.9\d+ s before that of the row above"),
        ("azure", AZURE + "2023-11-16 18:15:51,-3,5\n", r":4: ContextTokens '-3'"),
        ("azure", "a,b\n1,2\n", r":1: the columns must be TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("azure", "", r":1: the columns must be"),
        ("azure", AZURE.splitlines()[0], r":1: no request in it"),
        ("sharegpt", SHAREGPT + "1.5,2,3,4\n", r":4: num_prefill_tokens '1\.5'"),
        ("mooncake", MOONCAKE + "{\n", r":3: not JSON"),
        ("mooncake", MOONCAKE + "[]\n", r":3: not a JSON object"),
        ("mooncake", MOONCAKE + '{"timestamp": 1}\n', r":3: hash_ids is missing"),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [0]}',
            r":1: 1 hash_ids for 600 tokens, which are 2 blocks",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": true, "output_length": 6, "hash_ids": [0]}',
            r":1: input_length 'True'",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 1, "output_length": 6, "hash_ids": ["0"]}',
            r":1: hash_ids is not a list",
        ),
        ("prompts", "one\n\n", r":2: a prompt must have 1 to"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path: Path, kind: str, text: str, complaint: str) -> None:
    path = written(tmp_path, text, "some.trace")
    with pytest.raises(TraceError, match=r"some\.trace" + complaint):
        traces.read(kind, path)


def test_a_file_that_is_not_there_is_an_error_of_the_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="absent"):
        traces.read("azure", tmp_path / "absent")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published traces are not beside the repository (../shared/data)")
def test_the_published_traces_are_read_whole() -> None:
    azure = traces.read("azure", DATA / "azure" / "AzureLLMInferenceTrace_conv.csv")
    assert len(azure) == 19_366
    assert azure[-1].at_s == pytest.approx(3501.72, abs=0.01)
    assert sum(row.num_prompt_tokens for row in azure) / len(azure) == pytest.approx(1154.7, abs=0.1)
    sharegpt = traces.read("sharegpt", DATA / "sarathi" / "sharegpt_8k_filtered_stats_llama2_tokenizer.csv")
    assert len(sharegpt) == 30_731
    mooncake = traces.read("mooncake", DATA / "mooncake" / "synthetic_trace.jsonl")
    assert len(mooncake) == 3_993
    assert sum(row.num_prompt_tokens for row in mooncake) / len(mooncake) == pytest.approx(15_325, abs=1)
    assert len(traces.read("prompts", DATA / "humaneval" / "HumanEval.jsonl.gz", output_tokens=9)) == 164


@pytest.mark.skipif(not DATA.is_dir(), reason="the published traces are not beside the repository (../shared/data)")
def test_a_mooncake_block_id_stands_at_one_place_of_its_chain_only() -> None:
    """Why a block's size may depend on its place when lengths are divided."""
    places: dict[int, int] = {}
    for row in traces.read("mooncake", DATA / "mooncake" / "synthetic_trace.jsonl"):
        for place, hash_id in enumerate(row.hash_ids):
            assert places.setdefault(hash_id, place) == place
