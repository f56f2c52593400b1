"""The product's transfer endpoint, driven turn by turn: only its sockets, its selector and its thread are replaced.

The seam is small on purpose. `SimEndpoint` is `kvtransfer.endpoint.Endpoint` without a thread; `SimTransferThread`
is `TransferThread` whose turns an actor takes; `SimSwitchboard` is `Switchboard` that dials in the simulated network.
Everything else (handshake, frames, links, lanes, leases, both state machines, the shared-memory mapping) is the code
that production runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from baton.clock import Clock
from kvtransfer.api import EndpointConfig, PeerRank, Ready, SendRequest, TransferId
from kvtransfer.arrival import Arrival
from kvtransfer.auth import Acceptor, Connector
from kvtransfer.connection import Connection, Dialling
from kvtransfer.digests import LeafDigests, SourceDigests
from kvtransfer.endpoint import Endpoint
from kvtransfer.faults import FaultHook
from kvtransfer.frames import HEAD_BYTES
from kvtransfer.lanes import Landing
from kvtransfer.link import OutgoingFrame
from kvtransfer.messages import Data
from kvtransfer.pool import Pool
from kvtransfer.switchboard import Switchboard
from kvtransfer.thread import TransferThread
from kvtransfer.transports import shm, tcp
from tests.simulation.network import Network, SimListener, SimSelector, SimSocket

ItemT = TypeVar("ItemT")


class OrderedSet(dict[Any, None]):
    """A set in order of insertion: sets of objects are ordered by address, which differs from run to run."""

    def add(self, item: Any) -> None:
        """As `set.add`."""
        self[item] = None

    def discard(self, item: Any) -> None:
        """As `set.discard`."""
        self.pop(item, None)


class Watcher(Protocol):
    """Sees what the transfer thread does with bytes."""

    def before_write(self, view: memoryview) -> None:
        """Bytes are about to be read into memory that may be the pool's."""

    def before_digests(self, transfer_id: TransferId, num_tokens: int) -> None:
        """The digests of what a transfer's tokens [0, num_tokens) have are made next, as far as they are not known."""

    def before_frame(self) -> None:
        """A frame is made next, of bytes that have their digests."""

    def digested(self, frame: Data) -> None:
        """A digest vouches for source blocks."""

    def landing(self, connection: Connection, frame: Data, landing: Landing) -> None:
        """The bytes of a frame are about to be written."""

    def arrived(self, connection: Connection, arrival: Arrival) -> None:
        """All bytes of a frame are in place; it was verified or not."""

    def link_lost(self, connection: Connection, sock: SimSocket, reason: str) -> None:
        """A connection is being closed here."""

    def opened(self, request: SendRequest) -> None:
        """The leader opens a transfer."""

    def preempt(self) -> None:
        """The kernel may let other threads run here."""


class SimSwitchboard(Switchboard):
    """Dials and listens in the simulated network."""

    def __init__(
        self,
        config: EndpointConfig,
        pool_fd: int | None,
        listeners: dict[str, SimListener],
        selector: SimSelector,
        user: TransferThread,
        now: float,
        network: Network,
        watcher: Watcher,
        poke: Callable[[], None],
    ) -> None:
        self._network = network
        self._watcher = watcher
        self._poke = poke
        super().__init__(config, pool_fd, listeners, selector, user, now)  # type: ignore[arg-type]
        self.connections = OrderedSet()  # type: ignore[misc, assignment]
        self.dirty = OrderedSet()  # type: ignore[misc, assignment]
        self._waits_for_room = OrderedSet()  # type: ignore[assignment]

    def _connect(self, transport: str, peer: PeerRank) -> Any:
        if transport == shm.NAME:
            if not peer.unix_path:
                return None
            if self._pool_fd is None:
                raise OSError(0, "this rank's pool can not be shared")
            return self._network.dial_unix(peer.host, peer.unix_path, self._poke)
        return self._network.dial(self._config.host, (peer.host, peer.port), self._poke)

    def _add(
        self, sock: Any, transport: str, handshake: Connector | Acceptor, dialling: Dialling | None = None
    ) -> Connection:
        sock.check_write = self._watcher.before_write
        return super()._add(sock, transport, handshake, dialling)

    def lose(self, connection: Connection, reason: str) -> None:
        """As production; the watcher is told why."""
        if not connection.is_closed:
            self._watcher.link_lost(connection, connection._sock, reason)  # type: ignore[arg-type]
        super().lose(connection, reason)


class SimTransferThread(TransferThread):
    """A transfer thread without a thread: `take_turn` is one pass of its loop."""

    def __init__(
        self,
        config: EndpointConfig,
        pool: LeafDigests,
        pool_fd: int | None,
        listeners: dict[str, SimListener],
        clock: Clock,
        faults: FaultHook | None,
        network: Network,
        watcher: Watcher,
        poke: Callable[[], None],
    ) -> None:
        super().__init__(config, pool, pool_fd, {}, clock, faults)
        self._selector.close()
        self._poke = poke
        self._watcher = watcher
        self.selector: Final = SimSelector(network)
        self._selector = self.selector  # type: ignore[assignment]
        self._switchboard = SimSwitchboard(
            config, pool_fd, listeners, self.selector, self, clock.now(), network, watcher, poke
        )

    def post(self, command: Callable[..., None], *args: Any, is_urgent: bool = True) -> None:
        """As production; the actor is poked, even where nothing is urgent."""
        self._commands.put((command, args))
        self._poke()

    def take_turn(self) -> None:
        """One pass of the loop; raises what would have ended the thread."""
        self._turn()
        if self._timeout_s() <= 0 or self.selector.is_ready:
            self._poke()

    @property
    def next_tick_s(self) -> float:
        """When it wants a turn even if nothing happens."""
        return min(self._next_tick_s, self._switchboard.sweep_at_s)

    @property
    def connections(self) -> Iterator[Connection]:
        """Those that are open."""
        return iter(list(self._switchboard.connections))

    def pull(self, connection: Connection) -> OutgoingFrame | None:
        """As production; the watcher sees what a digest vouches for."""
        self._watcher.preempt()
        self._watcher.before_frame()
        outgoing = super().pull(connection)
        if outgoing is not None:
            self._watcher.digested(outgoing.message)
        return outgoing

    def _arrival(self, connection: Connection, frame: Data, landing: Landing) -> Arrival:
        self._watcher.landing(connection, frame, landing)
        return super()._arrival(connection, frame, landing)

    def _arrived(self, connection: Connection, arrival: Arrival) -> None:
        self._watcher.arrived(connection, arrival)
        self._watcher.preempt()
        super()._arrived(connection, arrival)

    def shut_down(self, reason: str) -> None:
        """What a loop that was told to close does at its end."""
        self._shut_down(reason)

    def die(self, *, silently: bool) -> None:
        """What the kernel does when the process is killed; `silently`: the machine is gone."""
        for connection in self.connections:
            if silently:
                connection._sock.vanish()  # type: ignore[attr-defined]
            connection.close()
        self._close_wake_fd()
        assert isinstance(self._pool, LeafDigests)
        self._pool.pool.release()


class SimEndpoint(Endpoint):
    """The product's endpoint in front of a SimTransferThread."""

    def __init__(
        self,
        config: EndpointConfig,
        kv_buffer: memoryview,
        kv_fd: int | None,
        address: PeerRank,
        clock: Clock,
        faults: FaultHook | None,
        network: Network,
        watcher: Watcher,
        poke: Callable[[], None],
    ) -> None:
        self._config = config
        self._unix_path = ""
        self._unsaid_bytes = 0
        self._address = address
        self._watcher = watcher
        self.listeners: dict[str, SimListener] = {}
        if tcp.NAME in config.transports:
            self.listeners[tcp.NAME] = network.listen((address.host, address.port), config.host, poke)
        if address.unix_path:
            self.listeners[shm.NAME] = network.listen(address.unix_path, config.host, poke)
        pool_fd = kv_fd if shm.NAME in config.transports else None
        self._digests = LeafDigests(config.layout, Pool(config.layout, kv_buffer))
        self._sources = SourceDigests(config.layout, self._digests) if config.verify else None
        self._thread: SimTransferThread = SimTransferThread(
            config, self._digests, pool_fd, self.listeners, clock, faults, network, watcher, poke
        )

    @property
    def thread(self) -> SimTransferThread:
        """Where turns are taken."""
        return self._thread

    def open_send(self, request: SendRequest) -> None:
        """As production; the watcher is told."""
        self._watcher.opened(request)
        super().open_send(request)

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int, ready: Ready | None = None) -> None:
        """As production; the watcher is told."""
        self._watcher.before_digests(transfer_id, num_tokens)
        super().written(transfer_id, layer, num_tokens, ready)

    def close(self) -> None:
        """The process ends in order."""
        with contextlib.suppress(ValueError):
            self._thread.shut_down("the endpoint was closed")
        assert self._digests is not None
        self._digests.pool.release()


def is_inside_frame(connection: Connection) -> bool:
    """Has the reader begun a frame whose end it has not seen?"""
    reader = connection.link._reader
    return reader._advance != reader._head_read or len(reader._pending[0]) < HEAD_BYTES


def address_of(view: memoryview) -> int:
    """Where a view's memory lies."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
