"""The connections of one rank: listening, dialling, handshakes, fall-back, and who is linked to whom. No transfers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import selectors
import socket
import ssl
from collections import Counter
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from baton.tls import ssl_context
from kvtransfer.api import EndpointConfig, PeerRank
from kvtransfer.auth import Acceptor, Connector, LinkKey, Refusal, RefusalCode
from kvtransfer.connection import HANDSHAKE_S, Connection, Dialling, PeerRefused, Role, Traffic
from kvtransfer.link import LinkClosed
from kvtransfer.messages import NONCE_BYTES, Goodbye, ProtocolError
from kvtransfer.transports import cuda_ipc, local, nixl, shm, tcp, tls
from kvtransfer.transports.tls import TlsSocket

log = logging.getLogger("kvtransfer")

MAX_UNAUTHENTICATED: Final = 32
"""Connections that may be in their handshake at a time; more wait in the listen queue."""
PATIENCE_S: Final = 0.25
"""How long such a connection keeps its place although others wait, from its beginning and from each of its words that
was answered: a handshake takes some ms, if neither end is slow."""

Listener: TypeAlias = socket.socket | local.LocalListener


@dataclass(slots=True)
class _Stranger:
    """An accepted connection in its handshake."""

    source: str
    """Its address; where there is none, its transport."""
    patience_until_s: float
    num_words: int = 0
    """As far as they have been answered."""


class LinkUser(Traffic, Protocol):
    """Who is told of links, on the transfer thread."""

    def link_up(self, connection: Connection) -> None:
        """A link is authenticated."""

    def link_down(self, role: Role, key: LinkKey, reason: str) -> None:
        """A link is gone, or (sender) could not be made."""

    def drained(self, connection: Connection) -> None:
        """All that the peer had sent so far is processed."""


class Switchboard:
    """Owns the listeners and all connections, and registers them with the loop's selector. One thread.

    A selector's data is a callable that takes the ready mask. `now` is set by the loop once per turn.
    """

    def __init__(
        self,
        config: EndpointConfig,
        pool_fd: int | None,
        listeners: dict[str, Listener],
        selector: selectors.BaseSelector,
        user: LinkUser,
        now: float,
        agent: nixl.Agent | cuda_ipc.Agent | None = None,
        exposed: bytes = b"",
    ) -> None:
        """`agent` and `exposed`: for NIXL or CUDA IPC, and how peers may read this rank's pool by it."""
        self._config = config
        self._me = LinkKey(config.worker_id, config.incarnation, config.layout.tp_rank)
        self._pool_fd = pool_fd
        self._agent = agent
        self._exposed = exposed
        self._listeners = listeners
        self._selector = selector
        self._user = user
        self._is_accepting = False
        self._knocked: list[str] = []
        """Listeners at which somebody waits."""
        self._strangers: dict[Connection, _Stranger] = {}
        self._reported_fallbacks: set[LinkKey] = set()
        self._links: dict[Role, dict[LinkKey, Connection]] = {Role.SENDER: {}, Role.RECEIVER: {}}
        self._waits_for_room: set[Connection] = set()
        """Connections whose socket is full."""
        self.connections: Final[set[Connection]] = set()
        self.dirty: Final[set[Connection]] = set()
        """Connections that may have something to write."""
        self.unread: Final[set[Connection]] = set()
        """Connections that must be read again although their socket may have nothing."""
        self.transports: dict[str, str] = {}
        """Peer rank -> transport. Replaced as a whole, for readers on other threads."""
        self.now = now
        self.sweep_at_s = math.inf
        """When a sweep makes room for those who wait to be accepted, if not earlier."""
        identity = config.identity
        self._contexts: dict[bool, ssl.SSLContext] = {}
        if identity is not None:
            self._contexts = {is_server: ssl_context(identity, server_side=is_server) for is_server in (False, True)}
        self._accept_more()

    def links(self, role: Role) -> dict[LinkKey, Connection]:
        """Authenticated links in which this rank has the role; do not change."""
        return self._links[role]

    # Out.

    def flush(self) -> None:
        """Let every connection that has something to write do so for one turn."""
        for connection in list(self.dirty):
            self._write(connection)

    def _write(self, connection: Connection) -> None:
        if connection.is_closed or connection.is_connecting:
            self.dirty.discard(connection)
            return
        try:
            has_more = connection.link.write()
        except LinkClosed as error:
            self.lose(connection, str(error))
            return
        if not has_more:
            self.dirty.discard(connection)
        if connection.link.is_blocked != (connection in self._waits_for_room):
            self._wait_for_room(connection, connection.link.is_blocked)

    def _wait_for_room(self, connection: Connection, waits: bool) -> None:
        (self._waits_for_room.add if waits else self._waits_for_room.discard)(connection)
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits else 0)
        self._selector.modify(connection.link, mask, self._selector.get_key(connection.link).data)

    # New connections.

    def dial(self, key: LinkKey, peer: PeerRank) -> None:
        """Reach a receiving rank by the first transport that connects and authenticates; else `link_down`."""
        self._dial(Dialling(key, peer, list(self._config.transports)))

    def _dial(self, dialling: Dialling) -> None:
        config = self._config
        while dialling.transports:
            transport = dialling.transports.pop(0)
            try:
                sock = self._connect(transport, dialling.peer)
            except OSError as error:
                dialling.problems.append(f"{transport}: {error.strerror or error}")
                continue
            if sock is not None:
                nonce = secrets.token_bytes(NONCE_BYTES)
                me, peer, layout = self._me, dialling.key, config.layout
                exposed = self._exposed if transport in (nixl.NAME, cuda_ipc.NAME) else b""
                self._add(
                    sock,
                    transport,
                    Connector(config.secret, me, layout, peer, transport, nonce, verify=config.verify, exposed=exposed),
                    dialling,
                )
                return
        reason = "; ".join(dialling.problems) or "no transport in common"
        self._user.link_down(Role.SENDER, dialling.key, f"can not reach {dialling.key}: {reason}")

    def _connect(self, transport: str, peer: PeerRank) -> socket.socket | TlsSocket | None:
        """A socket to the peer; None if the transport does not apply to this pair."""
        if transport == shm.NAME:
            if not os.path.isdir(os.path.dirname(peer.unix_path)):
                return None  # it is on another machine, or has no shared memory
            if self._pool_fd is None:
                raise OSError(0, "this rank's pool can not be shared")
            return shm.dial(peer.unix_path)
        if transport == cuda_ipc.NAME:
            return shm.dial(peer.unix_path) if os.path.isdir(os.path.dirname(peer.unix_path)) else None
        if transport == local.NAME:
            return local.dial(peer.port) if peer.host == local.HOST else None
        if peer.host == local.HOST or not peer.port:
            return None
        sock = tcp.dial(peer.host, peer.port)
        tcp.tune(sock, self._config.lease_s)
        return TlsSocket(sock, self._contexts[False], server_side=False) if transport == tls.NAME else sock

    def _accept_more(self) -> None:
        if self._is_accepting:
            return
        self.sweep_at_s = self._room_at_s()
        if self.sweep_at_s <= self.now:
            self.sweep_at_s = math.inf
            self._is_accepting = True
            for name, listener in self._listeners.items():
                self._selector.register(listener, selectors.EVENT_READ, lambda _mask, n=name: self._knocked.append(n))

    def _room_at_s(self) -> float:
        """When there is room for one more: there is, or the one that is to give way has had its time."""
        if len(self._strangers) < MAX_UNAUTHENTICATED:
            return -math.inf
        return self._strangers[self._first_to_go()].patience_until_s

    def _first_to_go(self) -> Connection:
        """Of the strangers' address that holds most places, so that a crowd keeps nobody else out, whose time ends first."""
        counts = Counter(stranger.source for stranger in self._strangers.values())
        crowd = max(counts, key=counts.__getitem__)
        members = (connection for connection, stranger in self._strangers.items() if stranger.source == crowd)
        return min(members, key=lambda connection: self._strangers[connection].patience_until_s)

    def _accept_no_more(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            for listener in self._listeners.values():
                self._selector.unregister(listener)

    def accept(self) -> None:
        """Let in who waits. Comes after the connections' reads in a turn: what has come in counts before who gives way."""
        for transport in self._knocked:
            self._accept(transport)
        self._knocked.clear()

    def _accept(self, transport: str) -> None:
        config = self._config
        offered = tuple(name for name in config.transports if _listener_of(name) == transport)
        while self._is_accepting:
            if self._room_at_s() > self.now:
                self._accept_no_more()
                self._accept_more()
                return
            try:
                sock, address = self._listeners[transport].accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: `sweep` tries again
                log.warning("can not accept connections", extra={"error": str(error)})
                self._accept_no_more()
                return
            try:
                if transport in (tcp.NAME, tls.NAME):
                    tcp.tune(sock, config.lease_s)
                elif transport == shm.NAME:
                    shm.check_user(sock)
            except OSError as error:
                log.warning("refused a connection", extra={"transport": transport, "error": str(error)})
                sock.close()
                continue
            if len(self._strangers) == MAX_UNAUTHENTICATED:
                self.lose(self._first_to_go(), "others waited for its place")
            nonce = secrets.token_bytes(NONCE_BYTES)
            connection = self._add(
                TlsSocket(sock, self._contexts[True], server_side=True) if transport == tls.NAME else sock,
                transport,
                Acceptor(config.secret, self._me, config.layout, offered, nonce, verify=config.verify),
            )
            source = address[0] if isinstance(address, tuple) else transport
            self._strangers[connection] = _Stranger(source, self.now + PATIENCE_S)

    def _add(
        self,
        sock: socket.socket | TlsSocket,
        transport: str,
        handshake: Connector | Acceptor,
        dialling: Dialling | None = None,
    ) -> Connection:
        connection = Connection(
            sock,
            transport,
            handshake,
            self._opened,
            self._user,
            self.now + HANDSHAKE_S,
            self._config.max_control_bytes,
            pool_fd=self._pool_fd,
            agent=self._agent,
            dialling=dialling,
        )
        self.connections.add(connection)
        mask = selectors.EVENT_WRITE if connection.is_connecting else selectors.EVENT_READ
        self._selector.register(connection.link, mask, lambda ready, c=connection: self._ready(c, ready))
        return connection

    # What happens on connections.

    def _ready(self, connection: Connection, mask: int) -> None:
        if connection.is_closed:
            return
        try:
            if connection.is_connecting:
                connection.connected()
                self._wait_for_room(connection, waits=False)
            elif mask & selectors.EVENT_READ:
                self._read(connection)
            if not connection.is_closed:
                self.dirty.add(connection)
        except Refusal as error:
            connection.link.last_words(Goodbye(error.code, error.reason))
            self._refused(connection, error.code, error.reason)
        except PeerRefused as error:
            if connection.session is None:
                self._refused(connection, error.code, f"refused by the peer: {error.reason}")
            else:
                self.lose(connection, error.reason)
        except ProtocolError as error:
            log.warning("closed a link: protocol error", extra={"peer": str(connection), "error": str(error)})
            connection.link.last_words(Goodbye(RefusalCode.PROTOCOL, str(error)))
            self.lose(connection, f"protocol: {error}")
        except LinkClosed as error:
            self.lose(connection, str(error))
        except OSError as error:
            self.lose(connection, error.strerror or str(error))

    def read_on(self) -> None:
        """Read what links hold back since their last turn."""
        for connection in list(self.unread):
            self._ready(connection, selectors.EVENT_READ)

    def _read(self, connection: Connection) -> None:
        is_drained = connection.link.read()
        if connection.link.holds_input and not connection.is_closed:
            (self.unread.discard if is_drained else self.unread.add)(connection)
        if is_drained and connection.session is not None:
            self._user.drained(connection)
        stranger = self._strangers.get(connection)
        if stranger is not None and connection.num_words > stranger.num_words:
            stranger.num_words = connection.num_words
            stranger.patience_until_s = self.now + PATIENCE_S

    def _opened(self, connection: Connection) -> None:
        """The handshake succeeded."""
        if connection.role is Role.RECEIVER:
            self._authenticated_or_gone(connection)
        links, key = self._links[connection.role], connection.key
        earlier = links.get(key)
        if earlier is not None:
            self.lose(earlier, "replaced by a newer connection")
        links[key] = connection
        self._name_transports()
        self._report_fallback(connection)
        self._user.link_up(connection)

    def _report_fallback(self, connection: Connection) -> None:
        dialling = connection.dialling
        if dialling is not None and dialling.problems and dialling.key not in self._reported_fallbacks:
            self._reported_fallbacks.add(dialling.key)
            log.warning(
                "fell back to another transport",
                extra={"peer": str(dialling.key), "transport": connection.transport, "problems": dialling.problems},
            )

    def _refused(self, connection: Connection, code: str, reason: str) -> None:
        """The handshake failed for a reason that both ends know."""
        log.warning("refused a link", extra={"peer": str(connection), "code": code, "reason": reason})
        if code not in (RefusalCode.TRANSPORT, RefusalCode.ADDRESS) and connection.dialling is not None:
            connection.dialling.transports.clear()  # another transport would be refused as well
        self.lose(connection, f"{code}: {reason}")

    def lose(self, connection: Connection, reason: str) -> None:
        """Close a connection and tell who used it, or try the next transport. Idempotent."""
        if connection.is_closed:
            return
        self._forget(connection)
        session, dialling = connection.session, connection.dialling
        if session is None and connection.role is Role.RECEIVER:
            self._authenticated_or_gone(connection)
        elif session is None and dialling is not None:
            dialling.problems.append(f"{connection.transport}: {reason}")
            self._dial(dialling)
        elif session is not None and self._links[connection.role].get(session.peer) is connection:
            del self._links[connection.role][session.peer]
            self._name_transports()
            self._user.link_down(connection.role, session.peer, f"lost {session.peer}: {reason}")

    def _authenticated_or_gone(self, connection: Connection) -> None:
        """It is not in its handshake any more."""
        del self._strangers[connection]
        self._accept_more()

    def _forget(self, connection: Connection) -> None:
        self._selector.unregister(connection.link)
        for group in (self.connections, self.dirty, self.unread, self._waits_for_room):
            group.discard(connection)
        connection.close()

    def _name_transports(self) -> None:
        self.transports = {
            str(key): connection.transport for links in self._links.values() for key, connection in links.items()
        }

    # Time and the end.

    def sweep(self) -> None:
        """Close connections whose handshake takes too long; accept again after a pause."""
        for connection in [c for c in self.connections if c.session is None and self.now > c.deadline_s]:
            self.lose(connection, "the handshake took too long")
        self._accept_more()

    def close(self, reason: str) -> None:
        """Say goodbye, close everything, tell nobody."""
        for connection in list(self.connections):
            connection.link.last_words(Goodbye("closed", reason))
            self._forget(connection)
        for links in self._links.values():
            links.clear()
        self._name_transports()
        self._accept_no_more()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.close()


def _listener_of(transport: str) -> str:
    """Where the frames of a transport come in."""
    return {nixl.NAME: tcp.NAME, cuda_ipc.NAME: shm.NAME}.get(transport, transport)
