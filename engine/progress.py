"""Progress of long loads, for people who watch a server start: a bar every few seconds, nothing for a quick load."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

from torch import Tensor

from engine.weights import Shapes, WeightSource

log = logging.getLogger(__name__)

_EVERY_S: Final = 2.0
_WIDTH: Final = 20


class Progress:
    """Says how far something of a known size has come, at most every two seconds."""

    def __init__(
        self, what: str, total: int, *, say: Callable[[str], None] = log.info, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`total` and the counts of `add` are in any one unit."""
        self._what, self._total, self._say, self._now = what, max(1, total), say, now
        self._done = 0
        self._began = self._said = now()

    def add(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        moment = self._now()
        if moment - self._said < _EVERY_S:
            return
        self._said = moment
        share = min(1.0, self._done / self._total)
        left_s = (moment - self._began) * (1 - share) / share if share else math.inf
        bar = "#" * round(share * _WIDTH)
        self._say(f"{self._what} [{bar:.<{_WIDTH}}] {share:.0%}, {left_s:.0f} s left")


class MeteredWeights:
    """A WeightSource that reports which share of its tensors, by size, has been read at least once."""

    def __init__(
        self, source: WeightSource, shapes: Shapes, progress: Callable[[str, int], Progress] = Progress
    ) -> None:
        self._source = source
        self._unread = {name: math.prod(shape) for name, shape in shapes.items() if name in source}
        self._progress = progress("loading weights", sum(self._unread.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """See WeightSource."""
        tensor = self._source.read(name, rows, columns)
        self._progress.add(self._unread.pop(name, 0))
        return tensor
