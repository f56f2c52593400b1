"""How KV travels between which workers, as their ranks report it: by the handshakes that worked, never by a guess."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence


class KVLinks:
    """What is known of each (sender, receiver). Belongs to the supervisor's loop."""

    def __init__(self) -> None:
        self._expected: dict[tuple[str, str], set[str]] = {}
        """Pairs, and the sender's ranks that have not reported yet."""
        self._transports: dict[tuple[str, str], dict[str, str]] = {}
        """By pair and the sender's rank."""
        self._has_news = asyncio.Event()

    def expect(self, sender: str, receivers: Sequence[str], num_ranks: int) -> None:
        """The sender's ranks have been told to connect."""
        for receiver in receivers:
            self._expected[sender, receiver] = {f"rank {rank}" for rank in range(num_ranks)}

    def heard(self, sender: str, rank: str, receiver: str, transport: str) -> None:
        """A rank of the sender has a link, or none any more (""); links of one rank to one worker are alike."""
        self._transports.setdefault((sender, receiver), {})[rank] = transport
        self._expected.get((sender, receiver), set()).discard(rank)
        self._has_news.set()

    def forget(self, worker: str) -> None:
        """It is gone."""
        for known in (self._expected, self._transports):
            for pair in [pair for pair in known if worker in pair]:
                del known[pair]
        self._has_news.set()

    async def wait_until_known(self, limit_s: float) -> None:
        """Until every rank that was told to connect has reported, or that takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while any(self._expected.values()):
                    self._has_news.clear()
                    await self._has_news.wait()

    def transports(self) -> dict[tuple[str, str], str]:
        """Per pair "shm" or "tcp", say; "nothing" where the handshake failed, "nothing yet" where it still runs."""
        found = {}
        for pair in sorted(self._expected):
            kinds = set(self._transports.get(pair, {}).values()) - {""}
            missing = "nothing yet" if self._expected[pair] else "nothing"
            found[pair] = " and ".join(sorted(kinds)) or missing
        return found
