"""Who was last heard when: the leases of links and of the transfers on them. Pure; time is passed in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvtransfer.api import TransferId
from kvtransfer.auth import LinkKey
from kvtransfer.messages import MAX_NAMED_TRANSFERS

_PINGS_PER_LEASE: Final = 5


@dataclass(slots=True)
class _Watched:
    is_up: bool = False
    heard_s: float = 0.0
    pinged_s: float = 0.0
    transfers: dict[TransferId, float] = field(default_factory=dict)
    """When the peer last named the transfer on this link."""


@dataclass(slots=True)
class Due:
    """What `LeaseTable.due` found."""

    pings: list[tuple[LinkKey, tuple[TransferId, ...]]] = field(default_factory=list)
    silent_links: list[LinkKey] = field(default_factory=list)
    lapsed: list[tuple[LinkKey, TransferId]] = field(default_factory=list)


class LeaseTable:
    """A transfer lives on a link as long as the peer names it there at least once per lease.

    A transfer may be watched before its link is up; it then lapses if the link does not come. Links without
    transfers are neither pinged nor judged. One thread.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._links: dict[LinkKey, _Watched] = {}

    @property
    def interval_s(self) -> float:
        """How often `due` wants to be asked."""
        return self._lease_s / _PINGS_PER_LEASE

    def link_up(self, key: LinkKey, now: float) -> None:
        """The link is authenticated."""
        link = self._links.setdefault(key, _Watched())
        link.is_up, link.heard_s, link.pinged_s = True, now, now

    def link_down(self, key: LinkKey) -> None:
        """The link is gone, and with it what was watched there."""
        self._links.pop(key, None)

    def watch(self, key: LinkKey, transfer_id: TransferId, now: float) -> None:
        """Start the transfer's lease on this link."""
        link = self._links.setdefault(key, _Watched())
        if not link.transfers:  # the link was allowed to be silent so far
            link.heard_s = max(link.heard_s, now)
            link.pinged_s = now
        link.transfers.setdefault(transfer_id, now)

    def unwatch(self, key: LinkKey, transfer_id: TransferId) -> None:
        """The transfer is over on this link."""
        link = self._links.get(key)
        if link is not None:
            link.transfers.pop(transfer_id, None)
            if not link.transfers and not link.is_up:
                del self._links[key]

    def heard(self, key: LinkKey, now: float, transfer_ids: Iterable[TransferId] = ()) -> None:
        """Bytes came on the link; the peer named these transfers (unknown ones are ignored)."""
        link = self._links.get(key)
        if link is None:
            return
        link.heard_s = now
        for transfer_id in transfer_ids:
            if transfer_id in link.transfers:
                link.transfers[transfer_id] = now

    def watched(self, key: LinkKey) -> tuple[TransferId, ...]:
        """The transfers that are watched on the link, as many as one heartbeat may name."""
        link = self._links.get(key)
        return () if link is None else _named(link)

    def due(self, now: float) -> Due:
        """Pings to send, links to close and transfers to fail at `now`."""
        due = Due()
        for key, link in self._links.items():
            if not link.transfers:
                continue
            if link.is_up and now - link.heard_s > self._lease_s:
                due.silent_links.append(key)
                continue
            if link.is_up and now - link.pinged_s >= self.interval_s:
                link.pinged_s = now
                due.pings.append((key, _named(link)))
            due.lapsed += [(key, item) for item, named_s in link.transfers.items() if now - named_s > self._lease_s]
        return due


def _named(link: _Watched) -> tuple[TransferId, ...]:
    return tuple(itertools.islice(link.transfers, MAX_NAMED_TRANSFERS))
