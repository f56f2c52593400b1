"""Charts as inline SVG, coloured by the page's style sheet (light and dark). Knows axes and curves, not load tests.

Legends are HTML beside the drawing, so that no label can lie on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 560
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 46
NUM_COLOURS: Final = 8

STYLE: Final = """
:root { --bg:#ffffff; --panel:#f6f7f9; --ink:#1c2430; --dim:#5a6675; --grid:#dfe3e8; --bad:#c0262d; --good:#1b7f4d;
  --c0:#2563c9; --c1:#c2540a; --c2:#178055; --c3:#9037a8; --c4:#96740a; --c5:#4b5865; --c6:#0e7d92; --c7:#b8336a; }
@media (prefers-color-scheme: dark) { :root { --bg:#12161c; --panel:#1b212a; --ink:#e6eaf0; --dim:#9aa7b6;
  --grid:#323b47; --bad:#ff7b7b; --good:#57c98e; --c0:#74a9ff; --c1:#ff9d5c; --c2:#4cc38a; --c3:#d592e6; --c4:#e0bd4c;
  --c5:#a9b5c2; --c6:#4fc3d9; --c7:#f58fb5; } }
svg { width:100%; height:auto; display:block; }
svg text { fill:var(--dim); font:12px system-ui,sans-serif; }
svg .axis { stroke:var(--dim); stroke-width:1; }
svg .grid { stroke:var(--grid); stroke-width:1; }
svg .mark { stroke:var(--dim); stroke-width:1; stroke-dasharray:2 3; }
svg .curve { fill:none; stroke-width:2; stroke-linejoin:round; }
svg .s1 { stroke-dasharray:7 4; } svg .s2 { stroke-dasharray:2 3; }
""" + "\n".join(
    f".k{n} {{ stroke:var(--c{n}); }} .f{n} {{ fill:var(--c{n}); }} .b{n} {{ background:var(--c{n}); }}"
    for n in range(NUM_COLOURS)
)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in data units, in order of x. `band`: (x, low, high). `style`: 0 solid, 1 dashed, 2 dotted."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    style: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension: what it shows, and how its numbers read."""

    label: str
    low: float
    high: float
    is_log: bool = False
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def place(self, value: float) -> float:
        """0 to 1 within the range."""
        if self.is_log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers, some four to eight."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= 7:
                    return found
            return found[:: -(-len(found) // 7)]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * f for f in (1, 2, 2.5, 5, 10) if size * f >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def linear(label: str, values: Sequence[float], text: Callable[[float], str] | None = None) -> Axis:
    """From 0 to a little above the largest value."""
    high = max(values, default=1.0)
    return Axis(label, 0.0, high * 1.05 if high > 0 else 1.0, text=text or (lambda value: f"{value:g}"))


def logarithmic(label: str, values: Sequence[float], text: Callable[[float], str] | None = None) -> Axis:
    """Around all positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high < low * 1.5:
        low, high = low / 1.3, high * 1.3
    return Axis(label, low * 0.95, high * 1.05, is_log=True, text=text or (lambda value: f"{value:g}"))


def percent(label: str) -> Axis:
    """Shares from 0 to 1."""
    return Axis(label, 0.0, 1.0, text=lambda value: f"{value * 100:.0f} %")


def seconds(value: float) -> str:
    """As people write it: 250 us, 3.5 ms, 2 s."""
    if value == 0:
        return "0"
    unit, size = ("s", 1.0) if value >= 0.9995 else ("ms", 1e-3) if value >= 0.9995e-3 else ("us", 1e-6)
    return f"{value / size:.3g} {unit}" if value / size < 999.5 else f"{value / size:.0f} {unit}"


def common_unit(values: Iterable[float]) -> tuple[str, float]:
    """(name, seconds) of a unit in which the smallest of these times, but for zeros, is at least 1."""
    least = min((value for value in values if value > 0), default=1.0)
    return ("s", 1.0) if least >= 0.9995 else ("ms", 1e-3) if least >= 0.9995e-3 else ("us", 1e-6)


def plain(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value == 0:
        return "0"
    return f"{value:,.{min(3, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def line_chart(title: str, x: Axis, y: Axis, curves: Sequence[Curve], marks: Sequence[float] = ()) -> str:
    """A figure: title, drawing, legend. `marks` are horizontal lines."""
    parts = [_frame(x, y)]
    for mark in marks:
        at = _y(y, mark)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for curve in curves:
        if curve.band:
            upper = [f"{_x(x, at):.1f},{_y(y, high):.1f}" for at, _, high in curve.band]
            lower = [f"{_x(x, at):.1f},{_y(y, low):.1f}" for at, low, _ in reversed(curve.band)]
            parts.append(f'<polygon class="f{curve.colour}" opacity="0.15" points="{" ".join(upper + lower)}"/>')
        points = " ".join(f"{_x(x, at):.1f},{_y(y, value):.1f}" for at, value in curve.points)
        tip = f"<title>{escape(curve.name)}</title>"
        parts.append(f'<polyline class="curve k{curve.colour} s{curve.style}" points="{points}">{tip}</polyline>')
        for at, value in curve.points if curve.has_dots else ():
            tip = f"<title>{escape(f'{curve.name}: {x.text(at)}, {y.text(value)}')}</title>"
            parts.append(
                f'<circle class="f{curve.colour}" cx="{_x(x, at):.1f}" cy="{_y(y, value):.1f}" r="3.5">{tip}</circle>'
            )
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    named = [(curve.name, curve.colour, curve.style) for curve in curves]
    return figure(title, drawing, legend(named))


@dataclass(frozen=True, slots=True)
class Stack:
    """A horizontal bar of parts (name, length), and a second one beneath it (begin, length, colour, name)."""

    name: str
    parts: Sequence[tuple[str, float]]
    beneath: Sequence[tuple[float, float, int, str]] = ()


def stacked_bars(title: str, x: Axis, stacks: Sequence[Stack], names: Sequence[tuple[str, int]]) -> str:
    """A figure; `names` gives every part its colour and the legend its order."""
    colours = dict(names)
    row = 46
    height = _TOP + row * len(stacks) + _BOTTOM
    parts = []
    for tick in x.ticks():
        at = _x(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">{escape(x.text(tick))}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    for place, stack in enumerate(stacks):
        top = _TOP + place * row
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 20}" text-anchor="end">{escape(stack.name)}</text>')
        begin = 0.0
        for name, length in stack.parts:
            parts.append(_bar(x, begin, length, top + 4, 22, colours[name], f"{name} {x.text(length)}"))
            begin += length
        for begin_beneath, length, colour, name in stack.beneath:
            parts.append(_bar(x, begin_beneath, length, top + 28, 9, colour, f"{name} {x.text(length)}"))
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return figure(title, drawing, legend([(name, colour, 0) for name, colour in names]))


def figure(title: str, drawing: str, below: str = "") -> str:
    """A framed drawing with a heading."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{below}</figure>"


def legend(named: Sequence[tuple[str, int, int]]) -> str:
    """What colours and dashes mean: (name, colour, style)."""
    items = []
    for name, colour, style in named:
        line = f'<svg viewBox="0 0 26 10" class="key"><line class="curve k{colour} s{style}" x1="1" x2="25" y1="5" y2="5" stroke-width="3"/></svg>'
        items.append(f"<li>{line}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _bar(x: Axis, begin: float, length: float, top: float, height: int, colour: int, tip: str) -> str:
    left, right = _x(x, begin), _x(x, begin + length)
    return (
        f'<rect class="f{colour}" x="{left:.1f}" y="{top}" width="{max(0.0, right - left):.1f}" height="{height}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in x.ticks():
        at = _x(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(x.text(tick))}</text>')
    for tick in y.ticks():
        at = _y(y, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(y.text(tick))}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    middle = (_TOP + bottom) / 2
    if y.label:
        parts.append(
            f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
        )
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + max(0.0, min(1.0, axis.place(value))) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - max(0.0, min(1.0, axis.place(value))) * (HEIGHT - _BOTTOM - _TOP)
