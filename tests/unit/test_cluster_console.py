"""What people and programs see of a running server."""

from __future__ import annotations

import io
import json

import pytest

from cluster import waterfall
from cluster.console import Console, Style, choose_style
from cluster.process_log import is_for_terminal

_RECORD = {
    "level": "info",
    "event": "request finished",
    "request_id": "cmpl-1",
    "finish_reason": "stop",
    "num_prompt_tokens": 63,
    "num_cached_tokens": 48,
    "num_tokens": 45,
    "attempts": 1,
    "prefill_worker": "prefill-0",
    "decode_worker": "decode-0",
    "transport": "shm",
    "kv_bytes": 15360,
    "route_ms": 1.9,
    "queue_ms": 0.14,
    "prefill_ms": 12.64,
    "transfer_ms": 1.72,
    "transfer_exposed_ms": 0.87,
    "handover_ms": 0.66,
    "decode_ms": 40.1,
    "ttft_ms": 15.97,
    "tpot_ms": 0.91,
    "total_ms": 1046.1,
}
_MOMENTS = {
    "router": {"arrived": 0.0, "first_token": 16.0, "last_token": 56.1},
    "prefill-0": {"received": 2.0, "prefill_begin": 2.5, "prefill_end": 14.0},
    "decode-0": {"kv_begin": 8.0, "kv_end": 15.0, "runnable": 15.5},
}


def shown(style: Style, line: str) -> str:
    out = io.StringIO()
    Console(style, out).child_line("decode-0 rank 0", line)
    return out.getvalue()


@pytest.mark.parametrize(("wanted", "style"), [("json", "json"), ("text", "text"), ("auto", "json"), (None, "json")])
def test_a_pipe_gets_json_unless_text_is_asked_for(wanted: str | None, style: Style) -> None:
    assert choose_style(wanted, io.StringIO()) == style


def test_programs_get_the_childs_line_as_it_is() -> None:
    line = json.dumps(_RECORD)
    assert shown("json", line) == line + "\n"


def test_people_get_a_request_in_one_line() -> None:
    assert shown("text", json.dumps(_RECORD))[9:] == (
        "cmpl-1 stop | 63 (48 cached) -> 45 tokens | first token 16.0 ms (route 1.90 + queue 0.14 + prefill 12.6) | "
        "transfer 1.72 (0.87 exposed, shm) | decode 40.1 (0.91 per token) | total 1046 ms | "
        "prefill-0 -> decode-0, 15.0 KiB KV by shm\n"
    )


def test_workers_of_several_attempts_are_the_last_ones_and_named_without_an_earlier_ones_kv() -> None:
    assert waterfall.line({**_RECORD, "attempts": 2}).endswith(" | total 1046 ms | prefill-0 -> decode-0, 2 attempts")


def test_people_get_a_warning_with_its_origin_and_its_values() -> None:
    line = (
        '{"level": "warning", "event": "slow", "worker_id": "decode-0", "took_s": 3, "exception": "T\\nValueError: x"}'
    )
    assert shown("text", line)[9:] == "WARNING decode-0 rank 0: slow took_s=3 [ValueError: x]\n"


def test_a_failed_request_says_why() -> None:
    record = {"request_id": "cmpl-2", "finish_reason": "error", "error": "worker lost", "total_ms": 3}
    assert waterfall.line(record).startswith("cmpl-2 error: worker lost | ")


def test_the_supervisors_words_are_json_for_programs() -> None:
    out = io.StringIO()
    Console("json", out).say("decode-0 was lost", "warning", unit="decode-0")
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["unit"]) == ("decode-0 was lost", "warning", "decode-0")


def test_a_closed_terminal_is_no_error() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Console("text", Closed()).say("hello")


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [
        (b'{"level": "info", "event": "request finished"}', True),
        (b'{"level": "error", "event": "x"}', True),
        (b'{"level": "info", "event": "model loaded"}', False),
        (b'{"level": "debug", "event": "step"}', False),
    ],
)
def test_the_terminal_is_for_requests_and_warnings(line: bytes, is_shown: bool) -> None:
    assert is_for_terminal(line) == is_shown


def test_the_picture_is_to_scale_up_to_the_first_token() -> None:
    drawn = waterfall.picture({**_RECORD, "moments_ms": _MOMENTS}, width=78).splitlines()
    bars = {line.split()[0]: line[44:] for line in drawn if line.startswith("  ") and "#" in line}
    assert bars["route"] == "####"
    assert bars["prefill"] == " " * 5 + "#" * 23
    assert bars["transfer"] == " " * 16 + "#" * 12 + "+++ 0.87 exposed"
    assert bars["deliver"].startswith(" " * 28 + "#")
    assert any("44 further tokens, 0.91 ms each; hand-over 0.66 ms" in line for line in drawn)


def test_a_trace_without_moments_is_still_told() -> None:
    assert "cmpl-3" in waterfall.picture({"request_id": "cmpl-3", "total_ms": 1.0})


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(17, "17 bytes"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_sizes_are_written_as_people_write_them(num_bytes: int, text: str) -> None:
    assert waterfall.size(num_bytes) == text
