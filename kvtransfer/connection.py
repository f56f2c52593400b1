"""One connection from its first byte: the handshake, then a link in one role. Knows transports, not transfers."""

from __future__ import annotations

import enum
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from kvtransfer.api import PeerRank, TransferId
from kvtransfer.arrival import Arrival, DeviceArrival
from kvtransfer.auth import Acceptor, Connector, LinkKey, Refusal, RefusalCode, Session
from kvtransfer.cuda.driver import Job
from kvtransfer.frames import Sink
from kvtransfer.link import Link, OutgoingFrame
from kvtransfer.messages import Data, Goodbye, Hello, Message, ProtocolError, code_of, is_handshake
from kvtransfer.plan import FETCHED_FRAME_BYTES, FRAME_BYTES, MAX_FRAME_BYTES
from kvtransfer.transports import cuda_ipc, nixl, shm
from kvtransfer.transports.tls import TlsSocket

FrameName: TypeAlias = tuple[TransferId, int, int, int, int]
"""Transfer, first layer, number of layers, first unit, number of units."""
_FRAME_S: Final = 0.01
"""How long a frame may hold its link, for messages wait for its end. Short ones are costly: 0.1 ms each, at both ends."""
HANDSHAKE_S: Final = 2.0
"""How long a connection may take to be made, and a peer to authenticate."""


class Role(enum.StrEnum):
    """What this rank does on a connection."""

    SENDER = "sender"
    RECEIVER = "receiver"


def stream_frame_bytes(bytes_per_s: float) -> int:
    """Most payload bytes of a frame on a link of this speed."""
    return max(FRAME_BYTES, min(MAX_FRAME_BYTES, int(bytes_per_s * _FRAME_S)))


class PeerRefused(Exception):
    """The peer said Goodbye."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class Dialling:
    """Sender: whom to reach, and by which transports it may still be tried."""

    key: LinkKey
    peer: PeerRank
    transports: list[str]
    problems: list[str] = field(default_factory=list)
    """Why earlier transports did not work."""


class Traffic(Protocol):
    """Takes and gives what authenticated connections carry, on the transfer thread."""

    def begin(self, connection: Connection, message: Message, payload_bytes: int) -> Sink | None:
        """A message came; where does its payload go?"""

    def end(self, connection: Connection, message: Message) -> None:
        """The message is complete."""

    def pull(self, connection: Connection) -> OutgoingFrame | None:
        """The next data frame."""


class Connection:
    """A socket, its link and what is known of the peer. One thread.

    The handshake object tells the role: a Connector sends KV, an Acceptor receives it. `opened` is called once, when
    the handshake has succeeded and `session` is set.
    """

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        transport: str,
        handshake: Connector | Acceptor,
        opened: Callable[[Connection], None],
        traffic: Traffic,
        deadline_s: float,
        max_control_bytes: int,
        *,
        pool_fd: int | None = None,
        agent: nixl.Agent | cuda_ipc.Agent | None = None,
        dialling: Dialling | None = None,
    ) -> None:
        self.transport = transport
        """Receiver: what the sender's Hello says, of those that its address offers."""
        self.role: Final = Role.SENDER if isinstance(handshake, Connector) else Role.RECEIVER
        self.dialling: Final = dialling
        self.deadline_s: Final = deadline_s
        """When the handshake must be done."""
        self.session: Session | None = None
        self.arrival: Arrival | None = None
        """Receiver: the data frame whose payload is being read."""
        self.sealing: Final[deque[tuple[Data, Job]]] = deque()
        """Sender on CUDA IPC: data frames that went without their digest, which the device makes."""
        self.unsealed: Final[dict[FrameName, DeviceArrival]] = {}
        """Receiver on CUDA IPC: data frames whose bytes are in place and whose digest has not come."""
        self.mapped: shm.MappedPool | None = None
        """Receiver on shared memory: the sender's pool."""
        self.remote: nixl.RemotePool | cuda_ipc.RemotePool | None = None
        """Receiver on NIXL or CUDA IPC: the sender's pool."""
        self.is_connecting = isinstance(handshake, Connector)
        self.is_closed = False
        self.link: Final = Link(sock, self._begin, self._end, self._pull, max_control_bytes)
        self._sock = sock
        self._handshake = handshake
        self._opened = opened
        self._traffic = traffic
        self._pool_fd = pool_fd
        self._agent = agent
        self._claimed: Hello | None = None
        if self.role is Role.RECEIVER and transport == shm.NAME:
            self.link.expect_fd()

    @property
    def is_fetched(self) -> bool:
        """Does the receiver fetch the bytes from the sender's pool?"""
        return self.transport in (shm.NAME, nixl.NAME, cuda_ipc.NAME)

    @property
    def frame_bytes(self) -> int:
        """Most payload bytes of a frame that goes out, unless a single unit is larger."""
        if self.transport in (nixl.NAME, cuda_ipc.NAME):
            return FETCHED_FRAME_BYTES
        return stream_frame_bytes(self.link.bytes_per_s)

    @property
    def key(self) -> LinkKey:
        """The peer; authenticated."""
        assert self.session is not None
        return self.session.peer

    def __str__(self) -> str:
        if self.session is not None:
            return f"{self.session.peer} over {self.transport}"
        if self.dialling is not None:
            return f"{self.dialling.key} over {self.transport}"
        if self._claimed is not None:
            return f"unauthenticated {self._claimed.worker_id!r} over {self.transport}"
        return f"unauthenticated peer over {self.transport}"

    @property
    def num_words(self) -> int:
        """Receiver: how far the sender's handshake has come: TLS, where it is spoken, then a Hello that was answered."""
        has_begun_tls = isinstance(self._sock, TlsSocket) and self._sock.has_heard
        return has_begun_tls + (self._claimed is not None)

    def connected(self) -> None:
        """Sender: the socket is writable for the first time. Says Hello.

        Raises:
            OSError: the connection was not made.
        """
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self.is_connecting = False
        assert isinstance(self._handshake, Connector)
        self.link.post(self._handshake.hello)

    def close(self) -> None:
        """Close the socket and unmap the peer's pool. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        self.arrival = None
        self.sealing.clear()
        self.unsealed.clear()
        self.link.close()
        if self.mapped is not None:
            self.mapped.close()
        if self.remote is not None:
            self.remote.close()

    def _pull(self) -> OutgoingFrame | None:
        return None if self.session is None else self._traffic.pull(self)

    def _begin(self, message: Message, payload_bytes: int) -> Sink | None:
        return None if self.session is None else self._traffic.begin(self, message, payload_bytes)

    def _end(self, message: Message) -> None:
        if isinstance(message, Goodbye):
            raise PeerRefused(message.code, message.reason)
        if self.session is None:
            self._shake(message)
        elif is_handshake(code_of(message)):
            raise ProtocolError("the handshake is over")
        else:
            self._traffic.end(self, message)

    def _shake(self, message: Message) -> None:
        handshake = self._handshake
        if isinstance(message, Hello):
            self._claimed = message
        reply = handshake.receive(message)
        if isinstance(message, Hello):
            self.transport = message.transport
        session = handshake.session
        if isinstance(handshake, Acceptor) and session is not None:
            self._open_pool(session, handshake.exposed)
        if reply is not None and isinstance(handshake, Connector) and self.transport == shm.NAME:
            assert self._pool_fd is not None
            self.link.post_with_fd(reply, self._pool_fd)
        elif reply is not None:
            self.link.post(reply)
        if session is not None:
            limit = 0 if self.is_fetched else max(MAX_FRAME_BYTES, session.plan.max_unit_bytes)
            self.link.open(session.send_key, session.receive_key, limit)
            self.session = session
            self._opened(self)

    def _open_pool(self, session: Session, exposed: bytes) -> None:
        if self.transport == shm.NAME:
            self._map(session)
        elif self.transport == cuda_ipc.NAME:
            assert isinstance(self._agent, cuda_ipc.Agent)
            try:
                self.remote = self._agent.open(exposed, session.plan.source)
            except cuda_ipc.UnusablePool as error:
                raise Refusal(RefusalCode.TRANSPORT, str(error)) from error
        elif self.transport == nixl.NAME:
            assert isinstance(self._agent, nixl.Agent)
            try:
                read_bytes = max(FETCHED_FRAME_BYTES, session.plan.max_unit_bytes)
                self.remote = self._agent.open(exposed, nixl.agent_name(*session.peer), session.plan.source, read_bytes)
            except nixl.UnusablePool as error:
                raise Refusal(RefusalCode.TRANSPORT, str(error)) from error

    def _map(self, session: Session) -> None:
        fd = self.link.take_fd()
        if fd is None:
            raise Refusal(RefusalCode.TRANSPORT, "no pool was passed")
        try:
            self.mapped = shm.MappedPool(fd, session.plan.source)
        except shm.UnusablePool as error:
            raise Refusal(RefusalCode.TRANSPORT, str(error)) from error
        finally:
            os.close(fd)
