"""The transfer thread: one loop that joins sockets, pools and the two state machines. Knows no engine."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import selectors
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from baton.clock import Clock
from kvtransfer.api import EndpointConfig, EndpointStats, PeerRank, TransferEvent, TransferId
from kvtransfer.arrival import Arrival
from kvtransfer.auth import Acceptor, Connector, LinkKey, Refusal, RefusalCode
from kvtransfer.connection import HANDSHAKE_S, Connection, Dialling, PeerRefused, Role
from kvtransfer.faults import FaultHook
from kvtransfer.frames import Sink
from kvtransfer.lanes import Landing, Part
from kvtransfer.link import LinkClosed, OutgoingFrame
from kvtransfer.messages import DIGEST_BYTES, NONCE_BYTES, Data, Goodbye, Message, ProtocolError
from kvtransfer.pool import Pool, data_digest
from kvtransfer.protocol import CloseLink, Connect, DataReady, Emit, Send, StopIO
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.transports import local, shm, tcp

log = logging.getLogger("kvtransfer")

_MAX_UNAUTHENTICATED: Final = 32
"""Connections that may be in their handshake at a time; more wait in the listen queue."""
_NO_DIGEST: Final = bytes(DIGEST_BYTES)

Listener: TypeAlias = socket.socket | local.LocalListener
Command: TypeAlias = tuple[Callable[..., None], tuple[Any, ...]]


class TransferThread:
    """Everything that runs on the transfer thread; only `commands`, `events`, `wake_up` and `stats` are for others."""

    def __init__(
        self,
        config: EndpointConfig,
        pool: Pool,
        pool_fd: int | None,
        listeners: dict[str, Listener],
        clock: Clock,
        faults: FaultHook | None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._pool_fd = pool_fd
        self._listeners = listeners
        self._clock = clock
        self._faults = faults
        self._me = LinkKey(config.worker_id, config.incarnation, config.layout.tp_rank)
        model, tp_size, tp_rank = config.layout.model, config.layout.geometry.tp_size, config.layout.tp_rank
        self.send: Final = SendSide(model, tp_size, tp_rank, config.lease_s)
        self.receive: Final = ReceiveSide(model, tp_size, tp_rank, config.credit_bytes, config.lease_s)
        self.commands: Final[queue.SimpleQueue[Command]] = queue.SimpleQueue()
        self.events: Final[queue.SimpleQueue[TransferEvent]] = queue.SimpleQueue()
        self.on_events: Callable[[], None] | None = None
        self.failure: BaseException | None = None
        """What ended the thread, if it was not `close`."""
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_woken = False
        self._is_closing = False
        self._now = clock.now()
        self._next_tick_s = self._now
        self._has_events = False
        self._is_accepting = False
        self._connections: set[Connection] = set()
        self._unauthenticated = 0
        self._links: dict[Role, dict[LinkKey, Connection]] = {Role.SENDER: {}, Role.RECEIVER: {}}
        self._dirty: set[Connection] = set()
        """Connections that may have something to write."""
        self._reported_fallbacks: set[tuple[LinkKey, str]] = set()
        self._transports: dict[str, str] = {}
        self._bytes_sent = 0
        self._bytes_received = 0
        self._frames_verified = 0
        self._integrity_failures = 0
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._accept_again()

    # For other threads.

    def post(self, command: Callable[..., None], *args: Any) -> None:
        """Run `command(*args)` on the thread, soon."""
        self.commands.put((command, args))
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(OSError):  # the thread has ended
                os.eventfd_write(self._wake_fd, 1)

    def stats(self) -> EndpointStats:
        """Counters, each of them current; not one consistent cut."""
        return EndpointStats(
            open_sends=self.send.num_open,
            open_receives=self.receive.num_open,
            open_links=len(self._connections),
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            frames_verified=self._frames_verified,
            integrity_failures=self._integrity_failures,
            stale_frames_dropped=self.send.num_stale + self.receive.num_stale,
            transports=self._transports,
        )

    # Commands, which run on the thread.

    def now_do(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method of a side that takes the time first."""
        method(self._now, *args)

    def abort(self, now: float, transfer_id: TransferId, reason: str) -> None:
        """End a transfer on whichever side it is; exactly one `Quiesced` follows."""
        side = self.send if self.send.has(transfer_id) else self.receive
        side.abort(now, transfer_id, reason)

    def close(self) -> None:
        """End the loop."""
        self._is_closing = True

    # The loop.

    def run(self) -> None:
        """Loop until `close`; then end everything. A defect ends the thread, and every transfer with it."""
        reason = "the endpoint was closed"
        try:
            while not self._is_closing:
                self._turn()
        except Exception as error:  # the top of this thread: the engine thread learns of it in `poll`
            log.exception("transfer thread died", extra={"worker_id": self._me.worker_id})
            self.failure = error
            reason = "the transfer thread died"
        finally:
            self._shut_down(reason)

    def _turn(self) -> None:
        ready = self._selector.select(self._timeout_s())
        self._now = self._clock.now()
        for key, mask in ready:
            key.data(mask)
        self._run_commands()
        if self._now >= self._next_tick_s:
            self._tick()
        self._act()
        self._flush()
        self._act()  # a write may have met a closed connection
        if self._has_events:
            self._has_events = False
            if self.on_events is not None:
                self.on_events()

    def _timeout_s(self) -> float:
        if self._dirty or not self.commands.empty():
            return 0.0
        return max(0.0, self._next_tick_s - self._clock.now())

    def _woken(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _run_commands(self) -> None:
        self._is_woken = False  # before the queue is looked at: who posts from here on wakes again
        for _ in range(self.commands.qsize()):
            command, args = self.commands.get_nowait()
            command(*args)

    def _tick(self) -> None:
        self._next_tick_s = self._now + min(self.send.interval_s, HANDSHAKE_S) / 2
        self.send.tick(self._now)
        self.receive.tick(self._now)
        for connection in [c for c in self._connections if c.session is None and self._now > c.deadline_s]:
            self._lose(connection, "the handshake took too long")
        if not self._is_accepting and self._unauthenticated < _MAX_UNAUTHENTICATED:
            self._accept_again()

    # Actions of the state machines.

    def _act(self) -> None:
        while actions := self.send.drain():
            self._do(Role.SENDER, self.send, actions)
        while actions := self.receive.drain():
            self._do(Role.RECEIVER, self.receive, actions)

    def _do(self, role: Role, side: SendSide | ReceiveSide, actions: Iterable[object]) -> None:
        links = self._links[role]
        for action in actions:
            match action:
                case Send(key, message):
                    connection = links.get(key)
                    if connection is not None:
                        connection.link.post(message)
                        self._dirty.add(connection)
                case DataReady(key):
                    connection = links.get(key)
                    if connection is not None and not connection.link.is_blocked:
                        self._dirty.add(connection)
                case Emit(event):
                    self._has_events = True
                    self.events.put(event)
                case StopIO(transfer_id):
                    self._stop_io(links.values(), transfer_id)
                    side.io_stopped(self._now, transfer_id)
                case Connect(key, peer):
                    self._dial(Dialling(key, peer, list(self._config.transports)))
                case CloseLink(key, reason):
                    connection = links.get(key)
                    if connection is not None:
                        self._lose(connection, reason)

    def _stop_io(self, connections: Iterable[Connection], transfer_id: TransferId) -> None:
        """Copies here are synchronous, so it is enough that no link points into the transfer's blocks any more."""
        for connection in connections:
            if connection.link.stop_io(transfer_id):
                connection.arrival = None
                self.receive.num_stale += 1

    def _flush(self) -> None:
        for connection in list(self._dirty):
            self._write(connection)

    def _write(self, connection: Connection) -> None:
        if connection.is_closed or connection.is_connecting:
            self._dirty.discard(connection)
            return
        try:
            has_more = connection.link.write()
        except LinkClosed as error:
            self._lose(connection, str(error))
            return
        if not has_more:
            self._dirty.discard(connection)
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.link.is_blocked else 0)
        self._selector.modify(connection.link, mask, self._selector.get_key(connection.link).data)

    # Connections.

    def _accept_again(self) -> None:
        self._is_accepting = True
        for name, listener in self._listeners.items():
            self._selector.register(listener, selectors.EVENT_READ, lambda _mask, n=name: self._accept(n))

    def _pause_accepting(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            for listener in self._listeners.values():
                self._selector.unregister(listener)

    def _accept(self, transport: str) -> None:
        while self._is_accepting:
            try:
                sock, _ = self._listeners[transport].accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the next tick tries again
                log.warning("can not accept connections", extra={"error": str(error)})
                self._pause_accepting()
                return
            try:
                if transport == tcp.NAME:
                    tcp.tune(sock, self._config.lease_s)
                elif transport == shm.NAME:
                    shm.check_user(sock)
            except OSError as error:
                log.warning("refused a connection", extra={"transport": transport, "error": str(error)})
                sock.close()
                continue
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = Acceptor(
                self._config.secret, self._me, self._config.layout, transport, nonce, verify=self._config.verify
            )
            self._add(sock, transport, handshake)
            if self._unauthenticated >= _MAX_UNAUTHENTICATED:
                self._pause_accepting()

    def _dial(self, dialling: Dialling) -> None:
        """Try the transports that are left, in order; the first that connects and authenticates is used."""
        while dialling.transports:
            transport = dialling.transports.pop(0)
            try:
                sock = self._connect(transport, dialling.peer)
            except OSError as error:
                dialling.problems.append(f"{transport}: {error.strerror or error}")
                continue
            if sock is None:
                continue
            nonce = secrets.token_bytes(NONCE_BYTES)
            handshake = Connector(
                self._config.secret,
                self._me,
                self._config.layout,
                dialling.key,
                transport,
                nonce,
                verify=self._config.verify,
            )
            self._add(sock, transport, handshake, dialling)
            return
        reason = "; ".join(dialling.problems) or "no transport in common"
        self.send.link_down(self._now, dialling.key, f"can not reach {dialling.key}: {reason}")

    def _connect(self, transport: str, peer: PeerRank) -> socket.socket | None:
        """A socket to the peer; None if the transport does not apply to this pair."""
        if transport == shm.NAME:
            if not peer.unix_path:
                return None
            if self._pool_fd is None:
                raise OSError(0, "this rank's pool can not be shared")
            return shm.dial(peer.unix_path)
        if transport == local.NAME:
            return local.dial(peer.port) if peer.host == local.HOST else None
        if peer.host == local.HOST or not peer.port:
            return None
        sock = tcp.dial(peer.host, peer.port)
        tcp.tune(sock, self._config.lease_s)
        return sock

    def _add(
        self, sock: socket.socket, transport: str, handshake: Connector | Acceptor, dialling: Dialling | None = None
    ) -> None:
        connection = Connection(
            sock,
            transport,
            handshake,
            self,
            self._now + HANDSHAKE_S,
            self._config.max_control_bytes,
            pool_fd=self._pool_fd,
            dialling=dialling,
        )
        self._connections.add(connection)
        if connection.role is Role.RECEIVER:
            self._unauthenticated += 1
        mask = selectors.EVENT_WRITE if connection.is_connecting else selectors.EVENT_READ
        self._selector.register(connection.link, mask, lambda ready, c=connection: self._ready(c, ready))

    def _ready(self, connection: Connection, mask: int) -> None:
        if connection.is_closed:
            return
        try:
            if connection.is_connecting:
                connection.connected()
            elif mask & selectors.EVENT_READ:
                self._read(connection)
            if mask & selectors.EVENT_WRITE and not connection.is_closed:
                self._dirty.add(connection)
        except Refusal as error:
            connection.link.last_words(Goodbye(error.code, error.reason))
            self._refused(connection, error.code, error.reason)
        except PeerRefused as error:
            if connection.session is None:
                self._refused(connection, error.code, f"refused by the peer: {error.reason}")
            else:
                self._lose(connection, error.reason)
        except ProtocolError as error:
            log.warning("closed a link: protocol error", extra={"peer": str(connection), "error": str(error)})
            connection.link.last_words(Goodbye(RefusalCode.PROTOCOL, str(error)))
            self._lose(connection, f"protocol: {error}")
        except LinkClosed as error:
            self._lose(connection, str(error))
        except OSError as error:
            self._lose(connection, error.strerror or str(error))

    def _read(self, connection: Connection) -> None:
        try:
            connection.link.read()
        finally:
            if connection.session is not None and not connection.is_closed:
                self._side(connection).heard(self._now, connection.key)
                if connection.link.wants_write:
                    self._dirty.add(connection)
            elif connection.link.wants_write:
                self._dirty.add(connection)

    def _side(self, connection: Connection) -> SendSide | ReceiveSide:
        return self.send if connection.role is Role.SENDER else self.receive

    def _refused(self, connection: Connection, code: str, reason: str) -> None:
        """The handshake failed for a reason that both ends know."""
        log.warning("refused a link", extra={"peer": str(connection), "code": code, "reason": reason})
        if code not in (RefusalCode.TRANSPORT, RefusalCode.ADDRESS) and connection.dialling is not None:
            connection.dialling.transports.clear()  # another transport would be refused as well
        self._lose(connection, f"{code}: {reason}")

    def _lose(self, connection: Connection, reason: str) -> None:
        """Close a connection and tell who used it, or try the next transport."""
        if connection.is_closed:
            return
        self._selector.unregister(connection.link)
        self._connections.discard(connection)
        self._dirty.discard(connection)
        connection.close()
        session, dialling = connection.session, connection.dialling
        if session is None:
            if connection.role is Role.RECEIVER:
                self._unauthenticated -= 1
            if dialling is not None:
                dialling.problems.append(f"{connection.transport}: {reason}")
                self._dial(dialling)
            return
        links = self._links[connection.role]
        if links.get(session.peer) is connection:
            del links[session.peer]
            self._name_transports()
            self._side(connection).link_down(self._now, session.peer, f"lost {session.peer}: {reason}")

    def _name_transports(self) -> None:
        self._transports = {
            str(key): connection.transport for links in self._links.values() for key, connection in links.items()
        }

    # What connections call.

    def opened(self, connection: Connection) -> None:
        """The handshake succeeded."""
        session = connection.session
        assert session is not None
        if connection.role is Role.RECEIVER:
            self._unauthenticated -= 1
        links = self._links[connection.role]
        earlier = links.get(session.peer)
        if earlier is not None:
            self._lose(earlier, "replaced by a newer connection")
        links[session.peer] = connection
        self._name_transports()
        self._report_fallback(connection)
        self._side(connection).link_up(self._now, session.peer, session.plan)

    def _report_fallback(self, connection: Connection) -> None:
        dialling = connection.dialling
        if (
            dialling is None
            or not dialling.problems
            or (dialling.key, connection.transport) in self._reported_fallbacks
        ):
            return
        self._reported_fallbacks.add((dialling.key, connection.transport))
        log.warning(
            "fell back to another transport",
            extra={"peer": str(dialling.key), "transport": connection.transport, "problems": dialling.problems},
        )

    def begin(self, connection: Connection, message: Message, payload_bytes: int) -> Sink | None:
        """Where the payload of a message goes."""
        if type(message) is not Data or connection.role is not Role.RECEIVER or connection.is_fetched:
            return None
        landing = self.receive.begin_data(self._clock.now(), connection.key, message, payload_bytes)
        if landing is None:
            return None
        connection.arrival = arrival = self._arrival(connection, message, landing)
        return Sink(self._views(landing.parts), arrival.landed)

    def end(self, connection: Connection, message: Message) -> None:
        """A message is complete."""
        if type(message) is not Data or connection.role is not Role.RECEIVER:
            self._side(connection).on_message(self._now, connection.key, message)
        elif connection.mapped is not None:
            landing = self.receive.begin_data(self._clock.now(), connection.key, message, None)
            if landing is not None:
                connection.link.charge(landing.num_bytes)
                arrival = self._arrival(connection, message, landing)
                arrival.fetch(self._pool, connection.mapped.pool)
                self._arrived(connection, arrival)
        elif connection.arrival is not None:
            arrival, connection.arrival = connection.arrival, None
            self._arrived(connection, arrival)

    def _arrival(self, connection: Connection, frame: Data, landing: Landing) -> Arrival:
        session = connection.session
        assert session is not None
        return Arrival(frame, landing, session.context if session.verify else None, self._faults)

    def _arrived(self, connection: Connection, arrival: Arrival) -> None:
        """All bytes of a frame are in place."""
        assert connection.session is not None
        frame, num_bytes, verified = arrival.frame, arrival.landing.num_bytes, arrival.is_verified
        self._bytes_received += num_bytes
        if verified:
            self._frames_verified += connection.session.verify
        else:
            self._integrity_failures += 1
            log.error("KV bytes do not match their digest", extra={"peer": str(connection), "frame": frame[1:7]})
        self.receive.data_landed(self._clock.now(), connection.key, frame, num_bytes, verified=verified)

    def _views(self, parts: list[Part]) -> list[memoryview]:
        if len(parts) == 1:
            return self._pool.views(*parts[0])
        return [view for layer, runs in parts for view in self._pool.views(layer, runs)]

    def pull(self, connection: Connection) -> OutgoingFrame | None:
        """The next data frame of a link."""
        if connection.role is not Role.SENDER:
            return None
        outgoing = self.send.next_data(connection.key, name_blocks=connection.is_fetched)
        if outgoing is None:
            return None
        session = connection.session
        assert session is not None
        frame, payload = outgoing.frame, []
        if session.verify or not connection.is_fetched or self._faults is not None:
            payload = self._views(outgoing.parts)
        if session.verify:
            frame = frame._replace(digest=data_digest(session.context, frame, payload))
        if self._faults is not None:
            payload = self._faults.before_send(frame, payload)
        self._bytes_sent += outgoing.num_bytes
        return OutgoingFrame(frame, [] if connection.is_fetched else payload, outgoing.num_bytes)

    # The end.

    def _shut_down(self, reason: str) -> None:
        for side in (self.send, self.receive):
            side.abort_all(self._now, reason)
        self._act()
        for connection in list(self._connections):
            connection.link.last_words(Goodbye(RefusalCode.ADDRESS, reason))
            self._selector.unregister(connection.link)
            connection.close()
        self._connections.clear()
        self._links = {Role.SENDER: {}, Role.RECEIVER: {}}
        self._name_transports()
        for listener in self._listeners.values():
            listener.close()
        self._selector.close()
        os.close(self._wake_fd)
        self._pool.release()
        if self.on_events is not None:
            self.on_events()
