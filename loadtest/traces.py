"""Lengths, arrivals and prompts of real workloads, read from files that others publish. Strict: a bad row has a place.

Formats: Azure's LLM inference trace (CSV), Mooncake's (JSONL with hash ids of 512-token blocks), ShareGPT lengths as
Sarathi-Serve publishes them (CSV), and prompts of one's own (text, JSONL or JSONL.gz). Knows no rates and no scaling.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MOONCAKE_BLOCK_TOKENS: Final = 512
_MAX_TOKENS: Final = 10_000_000
_MAX_PROMPT_CHARS: Final = 400_000
_AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SHAREGPT: Final = ("num_prefill_tokens", "num_decode_tokens")


class TraceError(ValueError):
    """A file that is not what it should be; the message begins with file:line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace. `at_s` counts from the first row; None where the trace has no times."""

    num_prompt_tokens: int
    num_output_tokens: int
    at_s: float | None = None
    hash_ids: tuple[int, ...] = ()
    """Mooncake: one id per started block of 512 prompt tokens; equal ids are equal content with equal history."""
    text: str = ""
    """The prompt itself; then `num_prompt_tokens` is 0, unknown."""


def read(kind: str, path: Path, limit: int | None = None, output_tokens: int = 0) -> list[Row]:
    """The first `limit` rows (None: all) of a trace of a `kind` in `KINDS`.

    `output_tokens` is what each prompt of a prompt file asks for, unless its line has `output_tokens`.

    Raises:
        TraceError: the file can not be read, a row is bad, times go back, or there is no row.
    """
    reader = KINDS[kind]
    rows: list[Row] = []
    try:
        for row in reader(path):
            rows.append(row if row.num_output_tokens else _with_output(row, output_tokens))
            if limit is not None and len(rows) == limit:
                break
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else None  # its text would name the file again
        raise TraceError(f"{path}: {reason or error}") from error
    if not rows:
        raise TraceError(f"{path}:1: no request in it")
    return rows


def _azure(path: Path) -> Iterator[Row]:
    first: datetime.datetime | None = None
    before = 0.0
    for place, row in _csv(path, _AZURE):
        stamp = row["TIMESTAMP"]
        try:
            moment = datetime.datetime.fromisoformat(stamp[:26])  # the seventh decimal is below a microsecond
        except ValueError:
            raise TraceError(f"{place}: TIMESTAMP {stamp[:40]!r} is not a time") from None
        first = first or moment
        at_s = (moment - first).total_seconds()
        before = _in_order(place, before, at_s)
        yield Row(
            _tokens(place, "ContextTokens", row["ContextTokens"]),
            _tokens(place, "GeneratedTokens", row["GeneratedTokens"]),
            at_s,
        )


def _sharegpt(path: Path) -> Iterator[Row]:
    for place, row in _csv(path, _SHAREGPT):
        prompt, output = (_tokens(place, name, row[name]) for name in _SHAREGPT)
        yield Row(prompt, output)


def _mooncake(path: Path) -> Iterator[Row]:
    before = 0.0
    for place, row in _json_lines(path):
        missing = {"timestamp", "input_length", "output_length", "hash_ids"} - row.keys()
        if missing:
            raise TraceError(f"{place}: {min(missing)} is missing")
        prompt = _tokens(place, "input_length", row["input_length"])
        output = _tokens(place, "output_length", row["output_length"])
        stamp, ids = row["timestamp"], row["hash_ids"]
        if not isinstance(stamp, int | float) or isinstance(stamp, bool) or not 0 <= stamp < 1e15:
            raise TraceError(f"{place}: timestamp {str(stamp)[:40]!r} is not a time in ms")
        if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < 2**62 for item in ids):
            raise TraceError(f"{place}: hash_ids is not a list of whole numbers")
        num_blocks = -(-prompt // MOONCAKE_BLOCK_TOKENS)
        if len(ids) != num_blocks:
            raise TraceError(f"{place}: {len(ids)} hash_ids for {prompt} tokens, which are {num_blocks} blocks")
        before = _in_order(place, before, stamp / 1e3)
        yield Row(prompt, output, stamp / 1e3, tuple(ids))


def _prompts(path: Path) -> Iterator[Row]:
    """JSON lines with `prompt` (and `output_tokens`), where the name says so; else each line of text is a prompt."""
    if ".jsonl" in path.suffixes:
        for place, row in _json_lines(path):
            prompt = row.get("prompt")
            if not isinstance(prompt, str):
                raise TraceError(f"{place}: prompt is not a text")
            wanted = row.get("output_tokens")
            output = 0 if wanted is None else _tokens(place, "output_tokens", wanted)
            yield Row(0, output, text=_prompt(place, prompt))
        return
    for place, line in _lines(path):
        yield Row(0, 0, text=_prompt(place, line))


KINDS: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "sharegpt": _sharegpt,
    "prompts": _prompts,
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline=None) as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", line.rstrip("\n")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise TraceError(f"{place}: not JSON: {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{place}: not a JSON object")
        yield place, row


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    lines = _lines(path)
    header = next(csv.reader([next(lines, ("", ""))[1]]), [])
    if not set(columns) <= set(header):
        raise TraceError(f"{path}:1: the columns must be {', '.join(columns)}; here they are {', '.join(header)[:100]}")
    for place, line in lines:
        values = next(csv.reader([line]), [])
        if len(values) != len(header):
            raise TraceError(f"{place}: {len(values)} values for {len(header)} columns")
        yield place, dict(zip(header, values, strict=True))


def _tokens(place: str, name: str, value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or not 0 < int(text) <= _MAX_TOKENS:
        raise TraceError(f"{place}: {name} {text[:40]!r} is not a number of tokens (1 to {_MAX_TOKENS})")
    return int(text)


def _prompt(place: str, text: str) -> str:
    if not text.strip() or len(text) > _MAX_PROMPT_CHARS:
        raise TraceError(f"{place}: a prompt must have 1 to {_MAX_PROMPT_CHARS} characters; this has {len(text)}")
    return text


def _in_order(place: str, before: float, at_s: float) -> float:
    if at_s < before:
        raise TraceError(f"{place}: its time is {before - at_s:.6f} s before that of the row above")
    return at_s


def _with_output(row: Row, output_tokens: int) -> Row:
    return Row(row.num_prompt_tokens, output_tokens, row.at_s, row.hash_ids, row.text)
