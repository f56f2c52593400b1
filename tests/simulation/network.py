"""Sockets without a kernel: byte streams with capacity, latency, fragments, partitions and resets, in virtual time.

`SimSocket` offers what kvtransfer.link and kvtransfer.connection call on a socket, `SimSelector` what the transfer
thread calls on a selector. A connection never reorders, loses or repeats bytes unless a fault is put into it.
"""

from __future__ import annotations

import array
import errno
import os
import random
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from kvtransfer.link import Link
from tests.simulation.virtual_time import Scheduler

Address = tuple[str, int]
_FIN: Final = None


class Tap(Protocol):
    """Sits in one direction of a connection and may change what passes."""

    def feed(self, data: bytes) -> list[bytes]:
        """What goes on instead of `data`; may hold bytes back."""
        ...


@dataclass(slots=True)
class Conditions:
    """How the network behaves at the moment."""

    latency_s: tuple[float, float] = (0.0001, 0.002)
    capacity_bytes: int = 65536
    fragments: bool = True
    cuts: dict[tuple[str, str], None] = field(default_factory=dict)
    """(from host, to host) between which nothing passes."""


class Pipe:
    """One direction of a connection. Bytes wait in the sender's window until the reader has taken them."""

    def __init__(self, network: Network, source: str, destination: str, *, is_local: bool) -> None:
        self._network = network
        self._route = (source, destination)
        self._is_local = is_local
        self._flying: deque[bytes | None] = deque()
        self._arrives_s = 0.0
        self.buffer = bytearray()
        self.fds: list[int] = []
        self.capacity_bytes: Final = network.conditions.capacity_bytes
        self.tap: Tap | None = None
        self.num_unread = 0
        """Bytes that the sender has handed over and the reader has not taken (or not acknowledged)."""
        self._unacknowledged = 0
        self.num_read = 0
        self.is_ended = False
        """The reader has seen, or can see, the end."""
        self.is_refused = False
        """The reader's end is closed: what arrives is answered by a reset."""
        self.reader: SimSocket | None = None
        self.writer: SimSocket | None = None

    @property
    def is_cut(self) -> bool:
        """Does nothing pass at the moment?"""
        return not self._is_local and self._route in self._network.conditions.cuts

    @property
    def num_free(self) -> int:
        """Bytes that the sender may hand over."""
        return max(0, self.capacity_bytes - self.num_unread)

    def send(self, data: bytes) -> None:
        """Hand over bytes that fit."""
        self.num_unread += len(data)
        pieces = [data] if self.tap is None else self.tap.feed(data)
        rng = self._network.rng
        for piece in pieces:
            if len(piece) > 1 and self._network.conditions.fragments and rng.random() < 0.3:
                middle = rng.randrange(1, len(piece))
                self._fly(piece[:middle])
                self._fly(piece[middle:])
            elif piece:
                self._fly(piece)

    def end(self) -> None:
        """The sender closes: the end comes after all that was handed over."""
        self._fly(_FIN)

    def _fly(self, piece: bytes | None) -> None:
        self._flying.append(piece)
        network = self._network
        self._arrives_s = max(self._arrives_s, network.scheduler.now() + network.draw_latency())
        network.scheduler.at(self._arrives_s, self.arrive)

    def arrive(self) -> None:
        """What is due at the reader's end gets there, unless the direction is cut."""
        if not self._flying or self.is_cut:
            return
        piece = self._flying.popleft()
        if self.is_refused:
            if piece is not _FIN and self.writer is not None:
                self._network.reset_by_peer(self, self.writer)
            return
        if piece is _FIN:
            self.is_ended = True
        else:
            self.buffer += piece
        if self.reader is not None:
            self.reader.poke()

    def flush(self) -> None:
        """A cut has healed."""
        for _ in range(len(self._flying)):
            self._network.scheduler.after(self._network.draw_latency(), self.arrive)
        self.acknowledge(0, is_reverse_cut=False)

    def acknowledge(self, num_bytes: int, *, is_reverse_cut: bool) -> None:
        """The reader has taken bytes; the sender learns of it unless the other direction is cut."""
        self._unacknowledged += num_bytes
        if is_reverse_cut:
            return
        was_full = self.num_free == 0
        # A tap may have added bytes that the sender never handed over.
        self.num_unread = max(0, self.num_unread - self._unacknowledged)
        self._unacknowledged = 0
        if was_full and self.num_free and self.writer is not None:
            self.writer.poke()

    def drop(self) -> None:
        """Everything on the way is lost."""
        self._flying.clear()
        self.buffer.clear()
        while self.fds:
            os.close(self.fds.pop())


class SimSocket:
    """One end of a connection."""

    def __init__(self, network: Network, host: str, owner: Callable[[], None]) -> None:
        self._network = network
        self._fd = network.new_fd(self)
        self._owner = owner
        self.host: Final = host
        self.incoming: Pipe | None = None
        self.outgoing: Pipe | None = None
        self.is_connecting = False
        self.is_closed = False
        self.error = 0
        self._low_water_bytes = 1
        self.check_write: Callable[[memoryview], None] | None = None
        """Told of every buffer before bytes are read into it."""

    def poke(self) -> None:
        """Something happened that a selector may report."""
        if not self.is_closed:
            self._owner()

    # For selectors.

    def fileno(self) -> int:
        """Unique for good: numbers are not used again."""
        return self._fd

    @property
    def ready(self) -> int:
        """The event mask that a selector would report."""
        mask = 0
        if self.error or (not self.is_connecting and self.outgoing is not None and self.outgoing.num_free):
            mask |= selectors.EVENT_WRITE
        pipe = self.incoming
        if self.error and not self.is_connecting:
            mask |= selectors.EVENT_READ
        elif pipe is not None:
            is_enough = len(pipe.buffer) >= min(self._low_water_bytes, pipe.capacity_bytes)
            if pipe.is_ended or (pipe.buffer and is_enough):
                mask |= selectors.EVENT_READ
        return mask

    # What kvtransfer calls.

    def setblocking(self, flag: bool) -> None:
        """Never blocks anyway."""

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Only SO_RCVLOWAT has an effect."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            self._low_water_bytes = value

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        """SO_ERROR and SO_PEERCRED."""
        if option == socket.SO_ERROR:
            return self.error
        assert option == socket.SO_PEERCRED
        return struct.pack("3i", 1, os.geteuid(), os.getegid())

    def send(self, data: bytes) -> int:
        """As `sendmsg`."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[Any], rights: Sequence[tuple[int, int, Any]] = ()) -> int:
        """Hand over as much as fits, perhaps less."""
        self._raise_error(errno.EPIPE)
        pipe = self.outgoing
        free = 0 if pipe is None else pipe.num_free
        if pipe is None or not free:  # not connected yet, or full
            raise BlockingIOError(errno.EAGAIN, "full")
        data = b"".join(buffers)[:free]
        if len(data) > 1 and self._network.conditions.fragments and self._network.rng.random() < 0.1:
            data = data[: self._network.rng.randrange(1, len(data))]
        for _, _, fds in rights:
            pipe.fds += [os.dup(fd) for fd in fds]
        pipe.send(data)
        return len(data)

    def recv_into(self, view: memoryview, num_bytes: int = 0) -> int:
        """As the kernel does; perhaps fewer bytes than are there."""
        self._raise_error(errno.ECONNRESET)
        pipe = self.incoming
        assert pipe is not None
        if not pipe.buffer:
            if pipe.is_ended:
                return 0
            raise BlockingIOError(errno.EAGAIN, "empty")
        count = min(num_bytes or len(view), len(pipe.buffer))
        if count > 1 and self._network.conditions.fragments and self._network.rng.random() < 0.2:
            count = self._network.rng.randrange(1, count)
        if self.check_write is not None:
            self.check_write(view[:count])
        view[:count] = pipe.buffer[:count]
        del pipe.buffer[:count]
        pipe.num_read += count
        assert self.outgoing is not None
        pipe.acknowledge(count, is_reverse_cut=self.outgoing.is_cut)
        return count

    def recvmsg_into(
        self, views: Sequence[memoryview], space: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, None]:
        """Fill one view after the other."""
        total = 0
        for view in views:
            try:
                count = self.recv_into(view)
            except BlockingIOError:
                if total:
                    break
                raise
            total += count
            if count < len(view):
                break
        ancillary = []
        pipe = self.incoming
        if space and pipe is not None and pipe.fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pipe.fds).tobytes())]
            pipe.fds.clear()
        return total, ancillary, 0, None

    def close(self) -> None:
        """Close as the kernel does: unread bytes turn the end into a reset. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        self._network.closed(self)

    def vanish(self) -> None:
        """The machine is gone: nobody is told. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self._network.vanished(self)

    def _raise_error(self, code: int) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if self.is_closed:
            raise OSError(code, os.strerror(code))


class SimListener:
    """A listening socket; the kernel completes connections whether or not its process runs."""

    def __init__(self, network: Network, address: Address | str, host: str, owner: Callable[[], None]) -> None:
        self._network = network
        self._fd = network.new_fd(self)
        self.address: Final = address
        self.host: Final = host
        self.owner: Final = owner
        self.waiting: deque[SimSocket] = deque()

    def fileno(self) -> int:
        """For selectors."""
        return self._fd

    @property
    def ready(self) -> int:
        """Readable when a connection waits."""
        return selectors.EVENT_READ if self.waiting else 0

    def accept(self) -> tuple[SimSocket, None]:
        """The next connection."""
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, "none")
        return self.waiting.popleft(), None

    def close(self, *, silently: bool = False) -> None:
        """Listen no more. Idempotent."""
        self._network.unlisten(self)
        while self.waiting:
            sock = self.waiting.popleft()
            (sock.vanish if silently else sock.close)()


class Network:
    """All hosts, listeners and connections of one simulation."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, conditions: Conditions) -> None:
        self.scheduler: Final = scheduler
        self.rng: Final = rng
        self.conditions: Final = conditions
        self.connected: Callable[[SimSocket, SimSocket], None] = lambda dialler, acceptor: None
        """Told of every new connection."""
        self._by_fd: dict[int, SimSocket | SimListener] = {}
        self._last_fd = 10_000
        self._listeners: dict[Address | str, SimListener] = {}
        self._pairs: dict[SimSocket, SimSocket] = {}

    def new_fd(self, item: SimSocket | SimListener) -> int:
        """A number that no other socket ever had."""
        self._last_fd += 1
        self._by_fd[self._last_fd] = item
        return self._last_fd

    def by_fd(self, fd: int) -> SimSocket | SimListener:
        """Back from `fileno`."""
        return self._by_fd[fd]

    def draw_latency(self) -> float:
        """Seconds."""
        low, high = self.conditions.latency_s
        return low + (high - low) * self.rng.random()

    def listen(self, address: Address | str, host: str, owner: Callable[[], None]) -> SimListener:
        """Take an address over from whoever had it."""
        listener = self._listeners[address] = SimListener(self, address, host, owner)
        return listener

    def unlisten(self, listener: SimListener) -> None:
        """Give the address up."""
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]
        self._by_fd.pop(listener.fileno(), None)

    def dial(self, host: str, address: Address, owner: Callable[[], None]) -> SimSocket:
        """A socket that is connected, or knows why not, after a round trip (never while the way is cut)."""
        sock = SimSocket(self, host, owner)
        sock.is_connecting = True
        self.scheduler.after(2 * self.draw_latency(), lambda: self._complete(sock, address))
        return sock

    def dial_unix(self, host: str, path: str, owner: Callable[[], None]) -> SimSocket:
        """A connected socket.

        Raises:
            OSError: nobody listens there.
        """
        listener = self._listeners.get(path)
        if listener is None:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        sock = SimSocket(self, host, owner)
        self._join(sock, listener, is_local=True)
        return sock

    def _complete(self, sock: SimSocket, address: Address) -> None:
        if sock.is_closed:
            return
        listener = self._listeners.get(address)
        other = address[0]
        cuts = self.conditions.cuts
        if (sock.host, other) in cuts or (other, sock.host) in cuts:
            self.scheduler.after(0.3, lambda: self._complete(sock, address))  # SYNs are sent again
            return
        if listener is None:
            sock.error = errno.ECONNREFUSED
            sock.poke()
            return
        self._join(sock, listener, is_local=False)

    def _join(self, sock: SimSocket, listener: SimListener, *, is_local: bool) -> None:
        other = SimSocket(self, listener.host, listener.owner)
        there = Pipe(self, sock.host, listener.host, is_local=is_local)
        back = Pipe(self, listener.host, sock.host, is_local=is_local)
        sock.outgoing, sock.incoming, other.outgoing, other.incoming = there, back, back, there
        there.writer, there.reader, back.writer, back.reader = sock, other, other, sock
        sock.is_connecting = False
        self._pairs[sock], self._pairs[other] = other, sock
        self.connected(sock, other)
        listener.waiting.append(other)
        listener.owner()
        sock.poke()

    # Endings.

    @property
    def open_sockets(self) -> list[SimSocket]:
        """One end of each connection of which no end is closed."""
        return [s for s, o in self._pairs.items() if not s.is_closed and not o.is_closed and s.fileno() < o.fileno()]

    def closed(self, sock: SimSocket) -> None:
        """An end was closed by its process."""
        self._by_fd.pop(sock.fileno(), None)
        other = self._pairs.get(sock)
        if other is None or sock.outgoing is None or sock.incoming is None:
            return
        is_reset = bool(sock.incoming.buffer)
        sock.incoming.is_refused = True
        sock.incoming.buffer.clear()
        if sock.error:
            pass
        elif is_reset:
            self.reset_by_peer(sock.outgoing, other, is_forward=True)
        else:
            sock.outgoing.end()
        self._forget_if_over(sock, other)

    def vanished(self, sock: SimSocket) -> None:
        """An end is gone without a word; what it had sent still arrives."""
        self._by_fd.pop(sock.fileno(), None)
        if sock.incoming is not None:
            sock.incoming.is_refused = True
            sock.incoming.writer = None  # no reset is ever sent back
            sock.incoming.buffer.clear()
        other = self._pairs.get(sock)
        if other is not None:
            self._forget_if_over(sock, other)

    def reset_by_peer(self, pipe: Pipe, victim: SimSocket, *, is_forward: bool = False) -> None:
        """A reset travels to `victim`, if its way is open: back along `pipe`, or along it (`is_forward`)."""
        way = pipe if is_forward else victim.incoming

        def arrive() -> None:
            if way is not None and way.is_cut:
                self.scheduler.after(0.3, arrive)
            elif not victim.is_closed and not victim.error:
                victim.error = errno.ECONNRESET
                victim.poke()

        self.scheduler.after(self.draw_latency(), arrive)

    def cut_connection(self, sock: SimSocket) -> None:
        """Both ends see a reset; what was on the way is lost."""
        for end in (sock, self._pairs[sock]):
            if end.incoming is not None:
                end.incoming.drop()
            if not end.is_closed and not end.error:
                end.error = errno.ECONNRESET
                end.poke()

    def _forget_if_over(self, sock: SimSocket, other: SimSocket) -> None:
        if other.is_closed:
            for end in (sock, other):
                self._pairs.pop(end, None)
                if end.incoming is not None:
                    while end.incoming.fds:
                        os.close(end.incoming.fds.pop())

    # Partitions.

    def cut(self, source: str, destination: str) -> None:
        """Nothing passes in this direction until `heal`."""
        self.conditions.cuts[source, destination] = None

    def heal(self, source: str, destination: str) -> None:
        """What has waited goes on."""
        if self.conditions.cuts.pop((source, destination), 0) is None:
            for sock in list(self._pairs):
                if sock.host == source and sock.outgoing is not None:
                    sock.outgoing.flush()
                if sock.host == destination and sock.outgoing is not None and sock.incoming is not None:
                    sock.outgoing.acknowledge(0, is_reverse_cut=sock.incoming.is_cut)

    def close(self) -> None:
        """Forget everything; close descriptors that were on the way."""
        for sock in list(self._pairs):
            if sock.incoming is not None:
                sock.incoming.drop()
        self._pairs.clear()
        self._by_fd.clear()


class SelectorKey(NamedTuple):
    """What `select` reports of an object."""

    fileobj: Any
    data: Any


class SimSelector:
    """A level-triggered selector over simulated sockets. `select` never waits: its owner is poked."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._entries: dict[Any, tuple[SimSocket | SimListener, int, SelectorKey]] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> None:
        """Watch a Link or a listener."""
        assert fileobj not in self._entries
        item = self._network.by_fd(fileobj.fileno()) if isinstance(fileobj, Link) else fileobj
        self._entries[fileobj] = (item, events, SelectorKey(fileobj, data))

    def unregister(self, fileobj: Any) -> None:
        """Watch it no more; KeyError if it is not watched."""
        del self._entries[fileobj]

    def modify(self, fileobj: Any, events: int, data: Any = None) -> None:
        """Watch for other events."""
        item = self._entries[fileobj][0]
        self._entries[fileobj] = (item, events, SelectorKey(fileobj, data))

    def get_key(self, fileobj: Any) -> SelectorKey:
        """What it was registered with."""
        return self._entries[fileobj][2]

    @property
    def is_ready(self) -> bool:
        """Would `select` report something?"""
        return any(item.ready & events for item, events, _ in self._entries.values())

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Everything that is ready, in any order."""
        found = [(key, mask) for item, events, key in self._entries.values() if (mask := item.ready & events)]
        if len(found) > 1:
            self._network.rng.shuffle(found)
        return found

    def close(self) -> None:
        """Watch nothing."""
        self._entries.clear()
