"""The rows of the engine bench: what is measured, what must come out, and the arithmetic between the two.

Pure: knows no process, no clock and no file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from bench.engine_shapes import BF16_BYTES, INT8_BYTES, Ceilings, Shape

WARM_STEPS: Final = 3
"""Decode steps between the last first token and the first measurement."""
NUM_MIXED: Final = 16
MIXED_PROMPT: Final = 512
MIXED_OUTPUT: Final = 64
PREFIX_PROMPT: Final = 512
MIN_BUDGET: Final = 448
"""Prompt tokens that the smallest step budget leaves beside decodes: early sequences decode while late ones prefill."""
FRESH_TOKENS: Final = 4096
"""Batches of at most so many prompt tokens are prefilled again for every pair; larger ones decode on."""


class Kind(StrEnum):
    """How a row is measured."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    PREFIX = "prefix"
    STARTUP = "startup"
    MEMORY = "memory"
    BOOKKEEPING = "bookkeeping"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `subject` against each of `rivals`, all names of arms."""

    name: str
    kind: Kind
    unit: str
    is_higher_better: bool
    subject: str = "baton"
    rivals: tuple[str, ...] = ("vllm", "llama.cpp")
    batch: int = 1
    context: int = 0
    """Tokens of each prompt; for BOOKKEEPING the number of requests that wait."""
    weight_bytes: int = BF16_BYTES

    @property
    def arms(self) -> tuple[str, ...]:
        """All that run, the subject first."""
        return (self.subject, *self.rivals)

    @property
    def num_steps(self) -> int:
        """Decode steps of one measurement."""
        return {1: 24, 8: 16}.get(self.batch, 12)

    @property
    def is_fresh(self) -> bool:
        """Is the batch prefilled for every pair?"""
        return self.batch * self.context <= FRESH_TOKENS

    def kv_tokens(self, num_pairs: int) -> int:
        """Tokens of KV that an arm needs room for, with a block to spare for each sequence."""
        if self.kind is Kind.MIXED:
            return NUM_MIXED * (MIXED_PROMPT + MIXED_OUTPUT + 16)
        if self.kind is not Kind.DECODE:
            return self.context + 32
        num_rounds = 1 if self.is_fresh else num_pairs
        head_start = self.batch * self.context // MIN_BUDGET
        return self.batch * (self.context + head_start + WARM_STEPS + num_rounds * self.num_steps + 32)

    def mean_context(self, num_pairs: int) -> float:
        """Tokens that a query of the measured decode steps sees, on average."""
        num_rounds = 1 if self.is_fresh else num_pairs
        return self.context + WARM_STEPS + num_rounds * self.num_steps / 2


def all_rows(tp_size: int = 1) -> tuple[Row, ...]:
    """Every row, in the order in which they are run."""
    tok_s = ("tok/s", True)
    rows = [Row(f"prefill/{n}", Kind.PREFILL, *tok_s, context=n) for n in (128, 512, 2048)]
    rows += [
        Row(f"decode/{batch}/{context}", Kind.DECODE, *tok_s, batch=batch, context=context)
        for context in (128, 1024)
        for batch in (1, 8, 32)
    ]
    rows.append(Row("mixed", Kind.MIXED, *tok_s, batch=NUM_MIXED, context=MIXED_PROMPT))
    rows.append(Row("memory", Kind.MEMORY, "MiB", False))
    rows += [
        Row(
            f"int8/{batch}/128",
            Kind.DECODE,
            *tok_s,
            subject="baton-int8",
            rivals=("vllm",),
            batch=batch,
            context=128,
            weight_bytes=INT8_BYTES,
        )
        for batch in (1, 8, 32)
    ]
    rows.append(
        Row("prefix", Kind.PREFIX, "ms", False, rivals=("vllm-cached", "llama.cpp"), context=PREFIX_PROMPT),
    )
    if tp_size > 1:
        name = f"baton-tp{tp_size}"
        rows.append(
            Row(f"tp{tp_size}/1/128", Kind.DECODE, *tok_s, subject=name, rivals=("baton-1core",), batch=1, context=128)
        )
    rows.append(Row("startup", Kind.STARTUP, "s", False))
    rows += [Row(f"bookkeeping/{n}", Kind.BOOKKEEPING, "ms", False, rivals=(), context=n) for n in (10, 10_000)]
    return tuple(rows)


def selected(rows: Iterable[Row], patterns: Sequence[str]) -> tuple[Row, ...]:
    """Rows whose names match any of the patterns (`*`, `?`), or start with one and a slash. None given: all.

    Raises:
        ValueError: a pattern matches no row.
    """
    rows = tuple(rows)
    if not patterns:
        return rows
    for pattern in patterns:
        if not any(_matches(row.name, pattern) for row in rows):
            raise ValueError(f"no row is called {pattern!r}; there are {', '.join(row.name for row in rows)}")
    return tuple(row for row in rows if any(_matches(row.name, pattern) for pattern in patterns))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")


def floor_s(row: Row, shape: Shape, ceilings: Ceilings, num_pairs: int) -> float | None:
    """The least time of one measurement of the row: of a step (DECODE) or of the whole. None: it has no such floor."""
    if row.kind is Kind.DECODE:
        return ceilings.decode_floor_s(shape, row.batch, row.mean_context(num_pairs), row.weight_bytes)
    if row.kind is Kind.PREFILL:
        return ceilings.prefill_floor_s(shape, row.context)
    if row.kind is Kind.MIXED:
        prefills_s = NUM_MIXED * shape.prefill_flops(MIXED_PROMPT) / ceilings.flops_per_s
        step_s = ceilings.decode_floor_s(shape, NUM_MIXED, MIXED_PROMPT + MIXED_OUTPUT / 2)
        return prefills_s + (MIXED_OUTPUT - 1) * step_s
    if row.kind is Kind.PREFIX:
        return ceilings.decode_floor_s(shape, 1, PREFIX_PROMPT)
    return None


def value_of(row: Row, seconds: float) -> float:
    """What the row shows for a measurement that took `seconds`: of all `num_steps` steps (DECODE) or of the whole.

    The mixed loop counts output tokens only; `total_tokens` has the factor for all.
    """
    if row.kind is Kind.DECODE:
        return row.batch * row.num_steps / seconds
    if row.kind is Kind.PREFILL:
        return row.context / seconds
    if row.kind is Kind.MIXED:
        return NUM_MIXED * MIXED_OUTPUT / seconds
    if row.unit == "ms":
        return seconds * 1e3
    return seconds


def value_at_floor(row: Row, floor: float) -> float:
    """What the row would show on the roofline."""
    return value_of(row, floor * row.num_steps if row.kind is Kind.DECODE else floor)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and its range."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None: there are no values."""
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass(slots=True)
class Figure:
    """What was measured for one row. `values[arm][i]` belongs to pair i; an arm may have fewer than the subject."""

    row: Row
    values: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Arms without values, and why."""
    floor: float | None = None
    """Least seconds, see floor_s."""
    foreign_cpu: list[float] = field(default_factory=list)
    """Cores' worth of CPU time that others took, for each measurement."""

    def spread(self, arm: str) -> Spread | None:
        """Of one arm's values."""
        return Spread.of(self.values.get(arm, ()))

    def ratio(self, rival: str) -> Spread | None:
        """How many times better the subject is than `rival`, pair by pair: above 1 it wins."""
        pairs = zip(self.values.get(self.row.subject, ()), self.values.get(rival, ()), strict=False)
        better = self.row.is_higher_better
        return Spread.of([ours / theirs if better else theirs / ours for ours, theirs in pairs if ours and theirs])

    def ratio_to_best(self) -> Spread | None:
        """The least of the ratios: that to the better of the peers."""
        ratios = [ratio for rival in self.row.rivals if (ratio := self.ratio(rival)) is not None]
        return min(ratios, key=lambda ratio: ratio.median) if ratios else None

    def share(self, arm: str) -> float | None:
        """The part of the roofline that an arm reaches: 1 is the floor itself."""
        spread = self.spread(arm)
        if spread is None or self.floor is None:
            return None
        best = value_at_floor(self.row, self.floor)
        return spread.median / best if self.row.is_higher_better else best / spread.median


class Metric(StrEnum):
    """What a target bounds."""

    RATIO = "ratio"  # at least, against a rival or against "best", the better of those measured
    SHARE = "share"  # of the roofline, at least
    AT_MOST = "at most"  # the subject's median
    FLAT = "flat"  # the subject's median over that of the row named by `against`, at most


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that issue 4 asks for, at one thread."""

    shape: str
    rows: str
    """A pattern of row names."""
    metric: Metric
    bound: float
    against: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a target on one row. `value` is None where something that it needs was not measured."""

    target: Target
    row: str
    value: float | None

    @property
    def is_met(self) -> bool | None:
        """None: unknown."""
        if self.value is None:
            return None
        if self.target.metric in (Metric.AT_MOST, Metric.FLAT):
            return self.value <= self.target.bound
        return self.value >= self.target.bound

    def __str__(self) -> str:
        target = self.target
        sign = "<=" if target.metric in (Metric.AT_MOST, Metric.FLAT) else ">="
        against = f" vs {target.against}" if target.against else ""
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        return f"{self.row}: {target.metric}{against} {value}, asked {sign} {target.bound:g}"


def _ratios(shape: str, rows: str, bound: float, against: str) -> Target:
    return Target(shape, rows, Metric.RATIO, bound, against)


TARGETS: Final = (
    _ratios("llama-135m", "decode/1/*", 1.4, "vllm"),
    _ratios("llama-135m", "decode/1/*", 1.15, "llama.cpp"),
    _ratios("llama-135m", "decode/8/*", 1.25, "vllm"),
    _ratios("llama-135m", "decode/32/*", 1.25, "vllm"),
    _ratios("llama-135m", "prefill/*", 1.25, "vllm"),
    _ratios("llama-135m", "mixed", 1.25, "vllm"),
    Target("qwen3-0.6b", "decode/1/*", Metric.SHARE, 0.88),
    _ratios("qwen3-0.6b", "decode/8/*", 1.2, "vllm"),
    _ratios("qwen3-0.6b", "decode/32/*", 1.2, "vllm"),
    _ratios("qwen3-0.6b", "prefill/*", 1.3, "vllm"),
    Target("qwen3-0.6b", "prefill/*", Metric.SHARE, 0.70),
    _ratios("qwen3-0.6b", "mixed", 1.25, "vllm"),
    _ratios("qwen3-0.6b", "tp2/1/128", 1.5, "baton-1core"),
    *(
        target
        for shape in ("llama-135m", "qwen3-0.6b")
        for target in (
            _ratios(shape, "startup", 5.0, "vllm"),
            _ratios(shape, "int8/*", 1.8, "vllm"),
            _ratios(shape, "prefill/*", 1.0, "best"),
            _ratios(shape, "decode/*", 1.0, "best"),
            _ratios(shape, "mixed", 1.0, "best"),
            Target(shape, "bookkeeping/*", Metric.AT_MOST, 1.0),
            Target(shape, "bookkeeping/10000", Metric.FLAT, 1.25, "bookkeeping/10"),
        )
    ),
)
"""All that issue 4 asks of speed. They hold for one thread per engine; with more, rows are shown without verdicts."""


def verdicts(shape: str, num_threads: int, figures: Mapping[str, Figure]) -> list[Verdict]:
    """Every target of `shape` on every row that was run (`figures`, by row name)."""
    if num_threads != 1:
        return []
    return [
        Verdict(target, name, _measured(target, figure, figures))
        for target in TARGETS
        if target.shape == shape
        for name, figure in figures.items()
        if fnmatchcase(name, target.rows)
    ]


def _measured(target: Target, figure: Figure, figures: Mapping[str, Figure]) -> float | None:
    if target.metric is Metric.SHARE:
        return figure.share(figure.row.subject)
    if target.metric is Metric.RATIO:
        ratio = figure.ratio_to_best() if target.against == "best" else figure.ratio(target.against)
        return None if ratio is None else ratio.median
    ours = figure.spread(figure.row.subject)
    if ours is None or target.metric is Metric.AT_MOST:
        return None if ours is None else ours.median
    other = figures.get(target.against)
    base = None if other is None else other.spread(other.row.subject)
    return None if base is None else ours.median / base.median
