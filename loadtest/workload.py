"""What is asked and when, as plain data made from a seed. Knows no server and no tokens' values.

Everything random comes from `Workload.seed`: the same workload at another rate has the same lengths and the same
arrivals but for their scale, so that rates are compared on common random numbers. (What prompts contain is another
matter: loadtest/prompts.py.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtest import traces
from loadtest.traces import Row

ARRIVALS: Final = ("poisson", "gamma", "constant", "trace", "closed")
_GAPS, _INPUT, _OUTPUT, _ORDER = range(4)  # independent streams of random numbers

Piece = tuple[int, int]
"""(content id, number of tokens): a part of a prompt. Equal ids have equal tokens."""


class WorkloadError(ValueError):
    """A workload that can not be made; the message says what to change."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request. `at_s`: when it is sent, counted from the start of the load (closed loop: 0, not used)."""

    index: int
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    pieces: tuple[Piece, ...] = ()
    text: str = ""
    """A prompt given as text; then there are no pieces and `num_prompt_tokens` is 0, unknown."""

    def to_json(self) -> list[Any]:
        """As clients are sent it."""
        return [self.index, self.at_s, self.num_prompt_tokens, self.num_output_tokens, self.pieces, self.text]

    @staticmethod
    def from_json(value: list[Any]) -> LoadRequest:
        """The reverse of `to_json`."""
        index, at_s, prompt, output, pieces, text = value
        return LoadRequest(index, at_s, prompt, output, tuple((i, n) for i, n in pieces), text)


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens: always `mean`, or log-normal with this mean and coefficient of variation, at least 1."""

    mean: float
    cv: float = 0.0

    def draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """`count` lengths."""
        if not self.cv:
            return np.full(count, max(1, round(self.mean)), dtype=np.int64)
        variance = math.log1p(self.cv**2)
        values = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(1, np.rint(values)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Workload:
    """A load in words. `num_requests` and `duration_s` bound it (a trace may also end by itself).

    `data` is "synthetic" or KIND:FILE with a kind of loadtest.traces. `arrivals` "trace" replays the trace's own
    times, compressed so that the mean rate becomes `rate` if that is given; "closed" sends the next request of a
    slot when the last one has ended, on `concurrency` slots. `divide` divides the lengths of a trace, with its
    prefix structure; requests longer than `max_total_tokens` (prompt and output) are left out.
    """

    data: str = "synthetic"
    arrivals: str = "poisson"
    rate: float | None = None
    cv: float = 1.0
    """Coefficient of variation of the gaps between gamma arrivals."""
    speedup: float = 1.0
    """A trace's times are divided by this, where no `rate` says how much they are to be compressed."""
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    input_tokens: Length = Length(256)
    output_tokens: Length = Length(64)
    divide: float = 1.0
    max_total_tokens: int | None = None
    seed: int = 0

    def requests(self) -> list[LoadRequest]:
        """All of them, in order of time.

        Raises:
            WorkloadError: settings that contradict each other or leave nothing to send.
            TraceError: a bad trace.
        """
        self._check()
        times = None if self.arrivals in ("trace", "closed") else self._times()
        count = self._count(times)
        rows = self._rows(count)
        if self.arrivals == "trace":
            rows, times = self._replay(rows)
        out = []
        for index, row in enumerate(rows):
            at_s = 0.0 if times is None else float(times[index])
            out.append(_request(index, at_s, row, self.divide if self.data != "synthetic" else 1.0))
        if not out:
            raise WorkloadError("no request is short enough for the server, or none falls into the time given")
        return out

    def _check(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise WorkloadError(f"arrivals {self.arrivals!r}: must be one of {', '.join(ARRIVALS)}")
        kind = self.data.partition(":")[0]
        if kind != "synthetic" and (kind not in traces.KINDS or ":" not in self.data):
            raise WorkloadError(f"data {self.data!r}: must be synthetic or KIND:FILE with {', '.join(traces.KINDS)}")
        if self.arrivals == "closed":
            if self.concurrency is None or self.concurrency < 1:
                raise WorkloadError("a closed loop needs a concurrency of at least 1")
            if self.rate is not None:
                raise WorkloadError("a closed loop has no rate: it follows from the server")
            if self.num_requests is None:
                raise WorkloadError("a closed loop needs a number of requests; a duration may end it earlier")
        elif self.concurrency is not None:
            raise WorkloadError("concurrency belongs to a closed loop; an open one has a rate")
        elif self.rate is None and self.arrivals != "trace":
            raise WorkloadError(f"{self.arrivals} arrivals need a rate (--rate)")
        if self.rate is not None and not 0 < self.rate < 1e6:
            raise WorkloadError(f"rate {self.rate}: must be above 0")
        if self.arrivals == "trace" and kind not in ("azure", "mooncake"):
            raise WorkloadError(f"{kind} has no times to replay: choose poisson, gamma or constant arrivals")
        for name in ("num_requests", "duration_s", "divide", "speedup"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise WorkloadError(f"{name} must be above 0")
        if self.num_requests is None and self.duration_s is None and self.arrivals != "trace":
            raise WorkloadError("say how many requests or for how long")
        if not 0 < self.cv <= 100:
            raise WorkloadError("cv must be above 0 and at most 100")

    def _times(self) -> npt.NDArray[np.float64]:
        """Arrival times of as many requests as the bounds allow."""
        assert self.rate is not None
        rng = self._rng(_GAPS)
        batch = self.num_requests or max(64, math.ceil((self.duration_s or 0) * self.rate))
        gaps: list[npt.NDArray[np.float64]] = []
        end = 0.0
        while True:
            if self.arrivals == "constant":
                drawn = np.ones(batch)
            elif self.arrivals == "poisson":
                drawn = rng.exponential(1.0, batch)
            else:
                drawn = rng.gamma(1 / self.cv**2, self.cv**2, batch)
            gaps.append(drawn / self.rate)
            end += float(gaps[-1].sum())
            if self.num_requests is not None or self.duration_s is None or end > self.duration_s:
                break
        times = np.cumsum(np.concatenate(gaps))
        if self.arrivals == "constant":
            times -= times[0]
        return times if self.duration_s is None else times[times < self.duration_s]

    def _count(self, times: npt.NDArray[np.float64] | None) -> int | None:
        if times is not None:
            return len(times)
        return self.num_requests

    def _rows(self, count: int | None) -> list[Row]:
        kind, _, path = self.data.partition(":")
        if kind == "synthetic":
            assert count is not None
            inputs = self.input_tokens.draw(count, self._rng(_INPUT))
            outputs = self.output_tokens.draw(count, self._rng(_OUTPUT))
            rows = [Row(int(i), int(o)) for i, o in zip(inputs, outputs, strict=True)]
            return [row for row in rows if self._fits(row)]
        known = traces.read(kind, Path(path), output_tokens=round(self.output_tokens.mean))
        known = [row for row in known if self._fits(row)]
        if kind in ("sharegpt", "prompts"):  # no times, so no order to keep
            known = [known[position] for position in self._rng(_ORDER).permutation(len(known))]
        if count is None or self.arrivals == "trace" or not known:
            return known[:count]
        return [known[position % len(known)] for position in range(count)]

    def _fits(self, row: Row) -> bool:
        if self.max_total_tokens is None or row.text:
            return True
        divide = 1.0 if self.data == "synthetic" else self.divide
        return _scaled(row.num_prompt_tokens, divide) + _scaled(row.num_output_tokens, divide) <= self.max_total_tokens

    def _replay(self, rows: list[Row]) -> tuple[list[Row], npt.NDArray[np.float64]]:
        stamps = np.array([row.at_s for row in rows], dtype=np.float64)
        if len(stamps):
            stamps -= stamps[0]
        if self.rate is None:
            stamps /= self.speedup
        elif len(stamps) > 1 and stamps[-1] > 0:
            stamps *= (len(stamps) - 1) / stamps[-1] / self.rate
        if self.duration_s is not None:
            stamps = stamps[stamps < self.duration_s]
        return rows[: len(stamps)], stamps

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def _request(index: int, at_s: float, row: Row, divide: float) -> LoadRequest:
    outputs = _scaled(row.num_output_tokens, divide)
    if row.text:
        return LoadRequest(index, at_s, 0, row.num_output_tokens, (), row.text)
    prompt = _scaled(row.num_prompt_tokens, divide)
    pieces = tuple(_blocks(row.hash_ids, prompt, divide)) if row.hash_ids else ((-1 - index, prompt),)
    return LoadRequest(index, at_s, prompt, outputs, pieces)


def _scaled(num_tokens: int, divide: float) -> int:
    return max(1, round(num_tokens / divide))


def _blocks(hash_ids: Sequence[int], num_tokens: int, divide: float) -> Iterator[Piece]:
    """Blocks of 512 / `divide` tokens. Where that is not whole, a block's size depends on its place in the chain only,
    and equal ids have equal places: what was shared stays shared."""
    size = traces.MOONCAKE_BLOCK_TOKENS / divide
    begin = 0
    for place, hash_id in enumerate(hash_ids):
        end = num_tokens if place == len(hash_ids) - 1 else min(num_tokens, round((place + 1) * size))
        if end > begin:
            yield hash_id, end - begin
        begin = max(begin, end)
