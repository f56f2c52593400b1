"""The workers that serve: who belongs to the fleet, whether it can serve, and a snapshot of it for placement.

Knows sessions only through their links; knows no text and no retries. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from baton.auth import worker_token
from baton.clock import Clock
from baton.prefix_hash import PrefixHasher
from baton.tls import ClusterIdentity
from router.placement import KVPath, Placement, WorkerKey, WorkerView
from router.reachability import Reachability
from router.worker_link import WorkerLink

logger = logging.getLogger("router")

_MAX_CHAIN_UNITS: Final = 256  # of a prompt's prefix that placement looks at


class Fleet:
    """The members, as the launcher last named them, and whether they can serve."""

    def __init__(
        self,
        *,
        secret: bytes,
        router_id: str,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_change: Callable[[], None],
        identity: ClusterIdentity | None = None,
        kv_lease_s: float = 10.0,
    ) -> None:
        """`identity`: sessions are encrypted. `kv_lease_s`: the lease of KV transfers. `spawn` starts a session's task. `on_change` hears of all that may matter to `why_not_serving`."""
        self.links: dict[str, WorkerLink] = {}
        self.reachability = Reachability(kv_lease_s)
        self.changed = asyncio.Event()  # set at each change; who waits clears it first
        self._secret = secret
        self._token = worker_token(secret)
        self._identity = identity
        self._router_id = router_id
        self._clock = clock
        self._notify = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._spawn = spawn
        self._hashers: dict[str, PrefixHasher] = {}
        self._was_complete = False

    def close(self) -> None:
        """End every session. Their tasks end soon after."""
        self.set_members([])

    def set_members(self, members: Sequence[Mapping[str, str]]) -> None:
        """The full membership: [{"worker_id", "address"}]. A known id at another address is a new start."""
        wanted = {member["worker_id"]: member["address"] for member in members}
        for worker_id, link in list(self.links.items()):
            if wanted.get(worker_id) != link.address:
                self._tasks.pop(worker_id).cancel()
                del self.links[worker_id]
        for worker_id, address in wanted.items():
            if worker_id not in self.links:
                link = WorkerLink(
                    worker_id,
                    address,
                    token=self._token,
                    router_id=self._router_id,
                    clock=self._clock,
                    on_change=self._on_change,
                    identity=self._identity,
                )
                self.links[worker_id] = link
                self._tasks[worker_id] = self._spawn(link.run())
        self._on_change()

    def settle(self) -> None:
        """Serve with whom is there, even if some member has never connected."""
        self._was_complete = True
        self._on_change()

    @property
    def why_not_serving(self) -> str | None:
        """None: requests can be served. Until all members have connected once (or `settle`), they can not."""
        usable = [link for link in self.links.values() if link.is_usable]
        missing = [link for link in self.links.values() if link.hello is None]
        if not self.links:
            return "no workers yet"
        if usable and (self._was_complete or not missing):
            return None
        if missing:
            return "; ".join(f"{link.worker_id}: {link.why_lost}" for link in missing)
        return "all workers are draining"

    def link(self, key: WorkerKey) -> WorkerLink | None:
        """The link to exactly this start of a worker, while it is connected."""
        link = self.links.get(key.worker_id)
        return link if link is not None and link.hello is not None and link.key == key else None

    def views(self) -> list[WorkerView]:
        """A snapshot of the connected workers, for placement."""
        return [link.view() for link in self.links.values() if link.hello is not None]

    def model_limits(self) -> tuple[int, int]:
        """(max_model_len, vocab_size) that every connected worker can do; (0, 0) without workers."""
        hellos = [link.hello for link in self.links.values() if link.hello is not None]
        if not hellos:
            return 0, 0
        return min(hello.max_model_len for hello in hellos), min(hello.vocab_size for hello in hellos)

    def prefix_chain(self, token_ids: Sequence[int], tenant: str, salt: str) -> list[bytes]:
        """Prefix-cache keys of a prompt's beginning; empty where there is no choice that they could inform."""
        hellos = [link.hello for link in self.links.values() if link.hello is not None]
        if len(hellos) < 2 or len({hello.role for hello in hellos}) == len(hellos):
            return []
        fingerprint = hellos[0].fingerprint
        hasher = self._hashers.get(fingerprint)
        if hasher is None:
            hasher = self._hashers.setdefault(fingerprint, PrefixHasher(self._secret, fingerprint))
        return hasher.chain(tenant, salt, token_ids[: _MAX_CHAIN_UNITS * 16])

    def cached_tokens(self, chain: Sequence[bytes]) -> dict[WorkerKey, int]:
        """How much of a prompt each worker has probably cached."""
        if not chain:
            return {}
        return {link.key: link.prefixes.match(chain) for link in self.links.values() if link.hello is not None}

    def record_prefix(self, placement: Placement, chain: Sequence[bytes]) -> None:
        """The placed workers will have this prompt cached."""
        for key in {placement.start, placement.decode}:
            if chain and (link := self.link(key)) is not None:
                link.prefixes.record(chain)

    def avoided_paths(self) -> frozenset[KVPath]:
        """By which no KV should be sent, because it did not get through lately."""
        return self.reachability.avoided(self._clock.now())

    def kv_leaves(self, path: KVPath) -> None:
        """An attempt's KV is to take this path."""
        self.reachability.trying(self._clock.now(), path)

    def kv_arrived(self, path: KVPath) -> None:
        """An attempt's KV got through."""
        if self.reachability.worked(path):
            logger.warning("kv path works again", extra=_names(path))  # as loud as its end was

    def kv_did_not_arrive(self, path: KVPath, reason: str) -> None:
        """An attempt's KV did not get through. Others that wait to take this path hear of it."""
        if self.reachability.failed(self._clock.now(), path):
            logger.warning("kv path broken", extra={**_names(path), "reason": reason})
        if (link := self.link(path.prefill)) is not None:
            link.path_broke(path)

    def _is_current(self, key: WorkerKey) -> bool:
        """May this start of a worker still be running?"""
        link = self.links.get(key.worker_id)
        return link is not None and (link.hello is None or link.key == key)

    def _on_change(self) -> None:
        self.reachability.keep(self._is_current)
        if self.links and all(link.hello is not None for link in self.links.values()):
            self._was_complete = True
        self.changed.set()
        self._notify()


def _names(path: KVPath) -> dict[str, str]:
    return {"prefill_worker": path.prefill.worker_id, "decode_worker": path.decode.worker_id}
