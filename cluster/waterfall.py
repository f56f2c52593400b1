"""A request's measured waterfall in words and as a picture, from the router's record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_LABEL_CHARS: Final = 34


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    where: str
    begin_ms: float
    end_ms: float
    exposed_from_ms: float | None = None
    note: str = ""


def line(record: Mapping[str, Any]) -> str:
    """A finished request in one line."""
    outcome = str(record.get("finish_reason") or "failed")
    if record.get("error"):
        outcome = f"{outcome}: {record['error']}"
    parts = [f"{record.get('request_id', '?')} {outcome}", _tokens(record)]
    if record.get("ttft_ms") is not None:
        steps = " + ".join(
            f"{name} {_ms(record[f'{name}_ms'])}"
            for name in ("route", "queue", "prefill")
            if record.get(f"{name}_ms") is not None
        )
        parts.append(f"first token {_ms(record['ttft_ms'])} ms" + (f" ({steps})" if steps else ""))
    if record.get("transfer_ms") is not None:
        parts.append(f"transfer {_ms(record['transfer_ms'])} ({_exposed(record)} exposed, {record.get('transport')})")
    if record.get("failover_ms") is not None:
        parts.append(f"fail-over {_ms(record['failover_ms'])}")
    if record.get("tpot_ms") is not None:
        parts.append(f"decode {_ms(record.get('decode_ms'))} ({_ms(record['tpot_ms'])} per token)")
    parts.append(f"total {_ms(record.get('total_ms'))} ms")
    parts.append(_route(record))
    return " | ".join(part for part in parts if part)


def picture(trace: Mapping[str, Any], width: int = 100) -> str:
    """A finished request drawn to scale up to its first token, in ASCII."""
    moments: Mapping[str, Mapping[str, float]] = trace.get("moments_ms", {})
    bars = _bars(trace, moments)
    lines = [
        f"{trace.get('request_id')}  {trace.get('finish_reason') or 'failed'}",
        f"{_tokens(trace)}, {_route(trace)}",
    ]
    if trace.get("error"):
        lines.append(f"error: {trace['error']}")
    if bars:
        span = max(bar.end_ms for bar in bars) or 1.0
        room = max(20, width - _LABEL_CHARS - 12)
        lines += ["", f"{'to the first token':<{_LABEL_CHARS}}{'ms':>8}  |0{_ms(span):>{room - 2}}|"]
        lines += [_draw(bar, span, room) for bar in bars]
    lines.append("")
    if trace.get("tpot_ms") is not None:
        label = f"  decode    {_decoders(trace)}"
        lines.append(
            f"{label:<{_LABEL_CHARS}}{_ms(trace.get('decode_ms')):>8}  {int(trace.get('num_tokens', 1)) - 1} further "
            f"tokens, {_ms(trace['tpot_ms'])} ms each"
            + (f"; hand-over {_ms(trace['handover_ms'])} ms" if trace.get("handover_ms") is not None else "")
        )
    lines += _attempts(trace)
    lines.append(f"{'  total':<{_LABEL_CHARS}}{_ms(trace.get('total_ms')):>8}")
    if trace.get("clock_error_ms"):
        lines.append(f"  the workers' clocks are mapped to the router's within {_ms(trace['clock_error_ms'])} ms")
    return "\n".join(lines)


def _bars(trace: Mapping[str, Any], moments: Mapping[str, Mapping[str, float]]) -> list[_Bar]:
    router = moments.get("router", {})
    attempts = trace.get("every_attempt")
    told = attempts[trace["told_attempt"] - 1] if attempts else trace
    first_worker, decode_worker = str(told.get("prefill_worker")), str(told.get("decode_worker"))
    start, decode = moments.get(first_worker, {}), moments.get(decode_worker, {})
    bars: list[_Bar] = []

    def add(label: str, where: str, begin: float | None, end: float | None, **more: Any) -> None:
        if begin is not None and end is not None and end >= begin:
            bars.append(_Bar(label, where, begin, end, **more))

    if attempts and trace["told_attempt"] > 1:
        first = attempts[0]["moments_ms"]["router"]["placed"]
        add("fail-over", "router", first, router.get("placed"))
        add("route", "router", router.get("placed"), start.get("received"))
    else:
        add("route", "router", router.get("arrived"), start.get("received"))
    add("queue", first_worker, start.get("received"), start.get("prefill_begin"))
    add("prefill", first_worker, start.get("prefill_begin"), start.get("prefill_end"))
    if trace.get("transfer_ms") is not None:
        sampled, runnable = start.get("prefill_end"), decode.get("runnable")
        begin = min((at for at in (decode.get("kv_begin"), sampled) if at is not None), default=None)
        note = f"{_exposed(trace)} exposed"
        add("transfer", f"to {decode_worker}", begin, runnable, exposed_from_ms=sampled, note=note)
    add("deliver", "router", start.get("prefill_end"), router.get("first_token"))
    return bars


def _decoders(trace: Mapping[str, Any]) -> str:
    """Who gave the tokens after the first: after a fail-over, one worker and then another."""
    attempts = trace.get("every_attempt") or [trace]
    return ", ".join(dict.fromkeys(str(attempt["decode_worker"]) for attempt in attempts if attempt["num_tokens"] > 1))


def _attempts(trace: Mapping[str, Any]) -> list[str]:
    """Every attempt, where there was more than one, and what time those that failed have cost."""
    attempts = trace.get("every_attempt", ())
    if len(attempts) < 2:
        return []
    lines = [f"{'  fail-over':<{_LABEL_CHARS}}{_ms(trace['failover_ms']):>8}"]
    for number, attempt in enumerate(attempts, 1):
        failure = f", then {attempt['failure']}" if attempt["failure"] else ""
        lines.append(f"    attempt {number}, {_route(attempt)}: {attempt['num_tokens']} tokens{failure}")
    return lines


def _draw(bar: _Bar, span: float, room: int) -> str:
    def column(at_ms: float) -> int:
        return min(room - 1, int(at_ms / span * room))

    begin, end = column(bar.begin_ms), max(column(bar.begin_ms) + 1, column(bar.end_ms))
    cells = ["#" if begin <= cell < end else " " for cell in range(room)]
    if bar.exposed_from_ms is not None:
        for cell in range(max(begin, column(bar.exposed_from_ms)), end):
            cells[cell] = "+"
    text = "".join(cells).rstrip()
    label = f"  {bar.label:<9} {bar.where}"
    return f"{label:<{_LABEL_CHARS}}{_ms(bar.end_ms - bar.begin_ms):>8}  {text}" + (f" {bar.note}" if bar.note else "")


def _tokens(record: Mapping[str, Any]) -> str:
    cached = record.get("num_cached_tokens") or 0
    prompt = f"{record.get('num_prompt_tokens', '?')}" + (f" ({cached} cached)" if cached else "")
    return f"{prompt} -> {record.get('num_tokens', '?')} tokens"


def _route(record: Mapping[str, Any]) -> str:
    """Who worked on it, and what KV went between them; of several attempts, who did the last one."""
    first, decode = record.get("prefill_worker"), record.get("decode_worker")
    if not first and not decode:
        return ""
    route = str(decode) if first == decode else f"{first} -> {decode}"
    attempts = record.get("attempts") or 1
    if attempts > 1:  # the KV is an earlier one's
        return f"{route}, {attempts} attempts"
    kv_bytes = record.get("kv_bytes") or 0
    return f"{route}, {size(kv_bytes)} KV by {record.get('transport')}" if kv_bytes else route


def _exposed(record: Mapping[str, Any]) -> str:
    return _ms(record.get("transfer_exposed_ms"))


def _ms(value: object) -> str:
    if not isinstance(value, int | float):
        return "?"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(num_bytes: float) -> str:
    """As people write it: "11.0 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
