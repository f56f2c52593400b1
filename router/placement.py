"""Which workers serve one attempt: a pure function over a snapshot of the fleet. Knows no connections and no clock."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from baton.errors import ServeError, TransferError, Unavailable
from baton.kv_layout import UNIT_TOKENS

_PREFILL_ROLES: Final = ("prefill", "mixed")
_DECODE_ROLES: Final = ("decode", "mixed")
_TRANSFER_LOAD: Final = 0.1  # a mixed worker keeps what it prefilled unless another one is emptier by this much


class WorkerKey(NamedTuple):
    """One start of one worker."""

    worker_id: str
    incarnation: str


class KVPath(NamedTuple):
    """What KV takes from one worker to another."""

    prefill: WorkerKey
    decode: WorkerKey


class Group(NamedTuple):
    """Workers of one group can exchange KV and go on with each other's requests: they compute the same tokens."""

    fingerprint: str
    kv_dtype: str


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A live worker as placement sees it: its last heartbeat, raised by what this router has sent since."""

    key: WorkerKey
    role: str
    fingerprint: str
    kv_dtype: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    is_draining: bool
    num_waiting_tokens: int
    """Prompt tokens that it has still to compute."""
    num_seqs: int
    """Sequences running or waiting."""
    num_free_blocks: int
    num_routed: int = 0
    """Attempts that this router ever sent there: breaks ties, so that idle workers take turns."""

    @property
    def group(self) -> Group:
        """Whose KV and tokens are like its own."""
        return Group(self.fingerprint, self.kv_dtype)


@dataclass(frozen=True, slots=True)
class Placement:
    """`decode` generates. `prefill` computes the prompt and sends the KV; None: `decode` does both."""

    decode: WorkerKey
    prefill: WorkerKey | None = None

    @property
    def start(self) -> WorkerKey:
        """Who is sent the attempt."""
        return self.prefill or self.decode


def place(
    fleet: Sequence[WorkerView],
    num_tokens: int,
    *,
    cached_tokens: Mapping[WorkerKey, int] | None = None,
    avoid: Collection[WorkerKey] = (),
    broken: Collection[KVPath] = (),
    group: Group | None = None,
    local_prefill_max_tokens: int = 0,
) -> Placement | None:
    """The best workers for a prompt of `num_tokens`; None if nobody can take it.

    Prefill goes where queue + uncached prompt is shortest. Decode goes where there is room for the prompt's KV, then
    to the emptiest. The decode worker prefills by itself if nobody else can or if the uncached prompt has at most
    `local_prefill_max_tokens`. Avoided workers are used only where nobody else is left; for prefill never, as long as
    a decode worker is there; the same holds for prefill workers from which every path is `broken`. `group` pins the
    model that began the request, and what its KV is stored as.
    """
    cached = cached_tokens or {}
    usable = [view for view in fleet if not view.is_draining and group in (None, view.group)]

    def uncached(view: WorkerView) -> int:
        return max(1, num_tokens - cached.get(view.key, 0))

    def prefill_cost(view: WorkerView) -> tuple[object, ...]:
        return view.num_waiting_tokens + uncached(view), view.num_seqs, view.num_routed, view.key

    def decode_load(view: WorkerView) -> float:
        """KV and batch slots in use with this prompt, each 0..1; infinite where it does not fit."""
        blocks = math.ceil((num_tokens + 1) / view.block_size)
        if blocks > view.num_free_blocks or view.num_seqs >= view.max_num_seqs:
            return math.inf
        used = 1.0 - (view.num_free_blocks - blocks) / max(1, view.num_blocks)
        return round(used + view.num_seqs / max(1, view.max_num_seqs), 3)

    def decode_cost(view: WorkerView) -> tuple[object, ...]:
        load = decode_load(view)
        return load, view.num_seqs if load == math.inf else view.num_routed, view.key

    def is_open(prefiller: WorkerView, decoder: WorkerView) -> bool:
        return decoder.group == prefiller.group and KVPath(prefiller.key, decoder.key) not in broken

    decoders = sorted((view for view in usable if view.role in _DECODE_ROLES), key=decode_cost)
    decoders = [view for view in decoders if view.key not in avoid] or decoders
    prefillers = sorted(
        (view for view in usable if view.role in _PREFILL_ROLES and view.key not in avoid), key=prefill_cost
    )
    if not decoders:  # every worker can do both: better one that was not meant to than none
        rest = prefillers or sorted(usable, key=prefill_cost)
        return Placement(decode=rest[0].key) if rest else None
    if uncached(decoders[0]) <= local_prefill_max_tokens:
        return Placement(decode=decoders[0].key)
    pairs = []
    for prefiller in prefillers:
        best = next((view for view in decoders if is_open(prefiller, view)), None)
        if best is not None:
            pairs.append((prefiller, best))
    if not pairs:
        return Placement(decode=decoders[0].key)
    # The shortest queue, unless its open paths lead only to where there is no room.
    prefiller, best = min(pairs, key=lambda pair: decode_load(pair[1]) == math.inf)
    if prefiller.role == "mixed" and decode_load(prefiller) <= decode_load(best) + _TRANSFER_LOAD:
        best = prefiller
    return Placement(decode=best.key, prefill=None if best is prefiller else prefiller.key)


@dataclass(frozen=True, slots=True)
class Redirect:
    """What becomes of KV that is pinned at a prefill worker: to one of `decodes`, or the attempt fails with `error`.

    Neither: all who can be reached have said that they have no room; ask them again a little later.
    """

    decodes: tuple[WorkerKey, ...] = ()
    """The best one first."""
    error: ServeError | None = None
    blamed: frozenset[WorkerKey] = frozenset()
    """Whom a next attempt should avoid."""


def redirect(
    fleet: Sequence[WorkerView],
    prefill: WorkerView,
    *,
    refused: Collection[WorkerKey],
    unreachable: Collection[WorkerKey],
    broken: Collection[KVPath] = (),
    avoid: Collection[WorkerKey] = (),
) -> Redirect:
    """Where KV that is pinned at `prefill` goes after `refused` had no room and it did not get to `unreachable`.

    Workers to `avoid` failed the request before: rather than they, those without room are asked again. A prefill worker
    from which no path is left that is not `broken` is the one to avoid: others may reach them.
    """
    others = [
        view
        for view in fleet
        if view.role in _DECODE_ROLES
        and view.group == prefill.group
        and view.key != prefill.key
        and not view.is_draining
    ]
    if not others:
        return Redirect(error=Unavailable("No decode worker is left."), blamed=frozenset(refused))
    reachable = [view for view in others if view.key not in unreachable and KVPath(prefill.key, view.key) not in broken]
    if not reachable:
        error = TransferError(f"Worker {prefill.key.worker_id} reached no decode worker.")
        return Redirect(error=error, blamed=frozenset({prefill.key}))
    reachable = [view for view in reachable if view.key not in avoid] or reachable
    fresh = [view for view in reachable if view.key not in refused]
    fresh.sort(key=lambda view: (-view.num_free_blocks * view.block_size, view.num_seqs, view.key))
    return Redirect(tuple(view.key for view in fresh))


class PrefixMemory:
    """Which prefixes one worker has probably cached: the newest keys of what this router sent there.

    A guess that costs nothing when wrong: the worker looks its own cache up.
    """

    def __init__(self, capacity_units: int) -> None:
        self._capacity = max(1, capacity_units)
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def record(self, chain: Sequence[bytes]) -> None:
        """The worker was sent a prompt with these keys (baton.prefix_hash)."""
        for key in reversed(chain):  # the first units are the most shared: let them go last
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def match(self, chain: Sequence[bytes]) -> int:
        """Tokens of the longest known prefix."""
        num_units = 0
        for key in chain:
            if key not in self._keys:
                break
            num_units += 1
        return num_units * UNIT_TOKENS
