"""Between which workers KV did not get through, as far as one router has seen. Knows no connections and no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from router.placement import KVPath, WorkerKey

MOST_LEASES: Final = 6
_CAPACITY: Final = 4096  # paths


@dataclass(slots=True)
class _Broken:
    period_s: float
    until_s: float


class Reachability:
    """Paths that failed, each avoided for a period. After it one attempt tries the path, and the next period is longer.

    The first is one lease: a hand-over that can not be made takes two, so trying is the dearer part, while a connection
    that only broke is soon mended, and a pair that is alone has to do without its transfer meanwhile. The longest is
    `MOST_LEASES`, so that a path that heals is used again. KV that gets through ends it. Times are the caller's, in
    seconds, and never go back.
    """

    def __init__(self, lease_s: float) -> None:
        """`lease_s`: the workers'."""
        self._first_s = lease_s
        self._most_s = MOST_LEASES * lease_s
        self._paths: OrderedDict[KVPath, _Broken] = OrderedDict()
        self.num_failures = 0
        """Hand-overs that did not get through, ever."""

    def __len__(self) -> int:
        """Paths that failed and have not worked since."""
        return len(self._paths)

    def avoided(self, now: float) -> frozenset[KVPath]:
        """Paths that nothing should be sent by."""
        return frozenset(path for path, broken in self._paths.items() if now < broken.until_s)

    def failed(self, now: float, path: KVPath) -> bool:
        """KV did not get through. True: nobody knew."""
        self.num_failures += 1
        broken = self._paths.get(path)
        if broken is not None:
            broken.until_s = now + broken.period_s
            return False
        if len(self._paths) >= _CAPACITY:
            self._paths.popitem(last=False)
        self._paths[path] = _Broken(self._first_s, now + self._first_s)
        return True

    def trying(self, now: float, path: KVPath) -> None:
        """An attempt takes this path. If it failed before, no other follows for a (longer) period, unless this one gets through."""
        broken = self._paths.get(path)
        if broken is not None and now >= broken.until_s:
            broken.period_s = min(2 * broken.period_s, self._most_s)
            broken.until_s = now + broken.period_s

    def worked(self, path: KVPath) -> bool:
        """KV got through. True: the path was taken for broken."""
        return self._paths.pop(path, None) is not None

    def keep(self, is_current: Callable[[WorkerKey], bool]) -> None:
        """Forget workers that are gone."""
        for path in [path for path in self._paths if not all(is_current(key) for key in path)]:
            del self._paths[path]
