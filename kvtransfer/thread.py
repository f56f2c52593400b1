"""The transfer thread: one loop that joins connections, the pool and the two state machines. Knows no engine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import selectors
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from baton.clock import Clock
from baton.errors import LayoutMismatch
from kvtransfer.api import (
    EndpointConfig,
    EndpointStats,
    Failed,
    LinkReport,
    PeerWorker,
    Ready,
    TransferEvent,
    TransferId,
)
from kvtransfer.arrival import Arrival, DeviceArrival
from kvtransfer.auth import LinkKey
from kvtransfer.connection import HANDSHAKE_S, Connection, FrameName, Role
from kvtransfer.cuda.driver import Job
from kvtransfer.digests import FrameDigest, LeafDigests, seal
from kvtransfer.faults import FaultHook
from kvtransfer.frames import Sink
from kvtransfer.lanes import Landing, Outgoing
from kvtransfer.link import TURN_BYTES, LinkClosed, OutgoingFrame
from kvtransfer.messages import NO_DIGEST, Data, Message, Seal
from kvtransfer.plan import Part
from kvtransfer.pool import DevicePool, Extents
from kvtransfer.protocol import Action, CloseLink, Connect, DataReady, Emit, Locate, Send, StopIO
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.switchboard import Listener, Switchboard
from kvtransfer.transports import cuda_ipc, nixl

log = logging.getLogger("kvtransfer")

_POLL_S: Final = 0.0005
"""How often NIXL or a device is asked while it moves bytes: it wakes nobody."""

Command: TypeAlias = tuple[Callable[..., None], tuple[Any, ...]]


class TransferThread:
    """Everything that runs on the transfer thread; only `post`, `events`, `on_events`, `on_link`
    and `stats` are for others."""

    wake_bytes = 1024 * 1024
    """The thread is woken for so much new KV, or for the last layer: each time costs the engine's thread 0.1 ms."""

    def __init__(
        self,
        config: EndpointConfig,
        pool: LeafDigests | DevicePool,
        pool_fd: int | None,
        listeners: dict[str, Listener],
        clock: Clock,
        faults: FaultHook | None,
        agent: nixl.Agent | cuda_ipc.Agent | None = None,
        exposed: bytes = b"",
    ) -> None:
        """Owns the listeners, and `agent` with what it has `exposed`. A pool on a device needs its agent.

        `pool`: the digests of one in host memory. Where `config.verify`, those of what is announced are made.
        """
        self._agent = agent
        self._makes_digests = not config.verify
        """Nobody has made those that a peer asks for."""
        self._name = f"{config.worker_id}#{config.layout.tp_rank}"
        self._pool = pool
        self._clock = clock
        self._faults = faults
        model, tp_size, tp_rank = config.layout.model, config.layout.geometry.tp_size, config.layout.tp_rank
        self.send: Final = SendSide(model, tp_size, tp_rank, config.lease_s)
        self.receive: Final = ReceiveSide(model, tp_size, tp_rank, config.credit_bytes, config.lease_s)
        self.events: Final[queue.SimpleQueue[TransferEvent]] = queue.SimpleQueue()
        self.on_events: Callable[[], None] | None = None
        self.on_link: Callable[[LinkReport], None] | None = None
        self.failure: BaseException | None = None
        """What ended the thread, if it was not `close`."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_fd: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        """Once the descriptor is closed its number may be another's, and somebody may still post."""
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._is_woken = False
        self._is_closing = False
        self._now = clock.now()
        self._next_tick_s = self._now
        self._switchboard = Switchboard(config, pool_fd, listeners, self._selector, self, self._now, agent, exposed)
        self._unpublished: list[TransferEvent] = []
        self._unlocated: list[list[Part]] = []
        self._unready: deque[tuple[Ready, TransferId, int | None, int]] = deque()
        """What `written` said of bytes that a device may still be writing, in order."""
        self._stopping: list[tuple[SendSide | ReceiveSide, TransferId]] = []
        """Transfers that are over but for work of a device on their blocks."""
        self._bytes_sent = 0
        self._bytes_received = 0
        self._frames_verified = 0

    # For other threads.

    def post(self, command: Callable[..., None], *args: Any, is_urgent: bool = True) -> None:
        """Run `command(*args)` on the thread, soon; if it is not urgent, with the next command that is."""
        self._commands.put((command, args))
        if is_urgent and not self._is_woken:
            self._is_woken = True
            with self._wake_lock:
                if self._wake_fd is not None:
                    os.eventfd_write(self._wake_fd, 1)

    def stats(self) -> EndpointStats:
        """Counters, each of them current; not one consistent cut."""
        return EndpointStats(
            open_sends=self.send.num_open,
            open_receives=self.receive.num_open,
            open_links=len(self._switchboard.connections),
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            frames_verified=self._frames_verified,
            integrity_failures=self.receive.num_integrity_failures,
            stale_frames_dropped=self.send.num_stale + self.receive.num_stale,
            transports=self._switchboard.transports,
        )

    # Commands, which run on the thread.

    def now_do(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method of a side that takes the time first."""
        method(self._now, *args)

    def connect(self, peer: PeerWorker) -> None:
        """Make the links that transfers to this peer will need."""
        try:
            self.send.connect(peer)
        except LayoutMismatch as error:
            self._tell_link(LinkReport(peer.worker_id, peer.incarnation, -1, "", f"layout: {error.message}"))

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int, ready: Ready | None) -> None:
        """KV of `layer` (None: of every layer) for tokens [0, num_tokens) is in the pool, once `ready` has fired."""
        if ready is None:
            self.send.written(transfer_id, layer, num_tokens)
        else:
            self._unready.append((ready, transfer_id, layer, num_tokens))

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
            if isinstance(self._agent, cuda_ipc.Agent):
                self._agent.bind()
            while not self._is_closing:
                self._turn()
        except Exception as error:  # the top of this thread: the engine thread learns of it in `poll`
            log.exception("transfer thread died", extra={"rank": self._name})
            self.failure = error
            reason = "the transfer thread died"
        finally:
            self._shut_down(reason)

    def _turn(self) -> None:
        ready = self._selector.select(self._timeout_s())
        self._now = self._switchboard.now = self._clock.now()
        self._switchboard.read_on()
        for key, mask in ready:
            key.data(mask)
        self._switchboard.accept()
        if self._agent is not None:
            self._poll_agent(self._agent)
        self._run_commands()
        while self._unready and self._unready[0][0].query():
            self.send.written(*self._unready.popleft()[1:])
        if self._now >= self._next_tick_s:
            self._tick()
        elif self._now >= self._switchboard.sweep_at_s:
            self._switchboard.sweep()
        self._act()
        self._switchboard.flush()
        while self._act():  # a write met a closed connection
            self._switchboard.flush()
        self._publish()
        self._locate()

    def _timeout_s(self) -> float:
        if self._switchboard.dirty or self._switchboard.unread or not self._commands.empty():
            return 0.0
        if isinstance(self._agent, cuda_ipc.Agent) and self._agent.is_hot:
            return 0.0
        limit_s = _POLL_S if self._agent is not None and self._is_agent_busy() else math.inf
        return max(0.0, min(limit_s, min(self._next_tick_s, self._switchboard.sweep_at_s) - self._clock.now()))

    def _woken(self, _mask: int) -> None:
        assert self._wake_fd is not None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _run_commands(self) -> None:
        self._is_woken = False  # before the queue is looked at: who posts from here on wakes again
        for _ in range(self._commands.qsize()):
            command, args = self._commands.get_nowait()
            command(*args)

    def _tick(self) -> None:
        self._next_tick_s = self._now + min(self.send.interval_s, HANDSHAKE_S) / 2
        self.send.tick(self._now)
        self.receive.tick(self._now)
        self._switchboard.sweep()

    def _locate(self) -> None:
        for parts in self._unlocated:
            if isinstance(self._pool, LeafDigests) and parts:
                self._pool.pool.locate(parts)
        self._unlocated.clear()

    def _publish(self) -> None:
        """Events come last in a turn: an Abort is on its way before the engine may reuse the blocks."""
        if not self._unpublished:
            return
        for event in self._unpublished:
            self.events.put(event)
        self._unpublished.clear()
        if self.on_events is not None:
            self.on_events()

    # Actions of the state machines.

    def _act(self) -> bool:
        """Do what the state machines ask for; False if that was nothing."""
        has_acted = False
        for role, side in ((Role.SENDER, self.send), (Role.RECEIVER, self.receive)):
            while actions := side.drain():
                has_acted = True
                for action in actions:
                    self._do(role, side, action)
        return has_acted

    def _do(self, role: Role, side: SendSide | ReceiveSide, action: Action) -> None:
        switchboard = self._switchboard
        match action:
            case Send(key, message):
                connection = switchboard.links(role).get(key)
                if connection is not None:
                    connection.link.post(message)
                    switchboard.dirty.add(connection)
            case DataReady(key):
                connection = switchboard.links(role).get(key)
                if connection is not None and not connection.link.is_blocked:
                    switchboard.dirty.add(connection)
            case Locate(parts):
                self._unlocated.append(parts)
            case Emit(event):
                self._unpublished.append(event)
                if isinstance(event, Failed) and event.integrity:
                    log.error("KV bytes do not match their digest", extra={"rank": self._name, "reason": event.reason})
            case StopIO(transfer_id):
                self._stop_io(role, transfer_id)
                if isinstance(self._agent, cuda_ipc.Agent) and self._agent.touches(transfer_id):
                    self._stopping.append((side, transfer_id))
                else:
                    side.io_stopped(self._now, transfer_id)
            case Connect(key, peer):
                switchboard.dial(key, peer)
            case CloseLink(key, reason):
                connection = switchboard.links(role).get(key)
                if connection is not None:
                    switchboard.lose(connection, reason)

    def _stop_io(self, role: Role, transfer_id: TransferId) -> None:
        """Begin nothing more on the transfer's blocks, and let no link point into them.

        That is enough where copies are synchronous or end elsewhere; a device's end by themselves (`_stopping`).
        """
        for connection in self._switchboard.links(role).values():
            if connection.link.stop_io(transfer_id):
                connection.arrival = None
                self.receive.num_stale += 1
            for name in [name for name in connection.unsealed if name[0] == transfer_id]:
                del connection.unsealed[name]
                self.receive.num_stale += 1
            for sealing in [item for item in connection.sealing if item[0].transfer_id == transfer_id]:
                connection.sealing.remove(sealing)
            if connection.remote is not None:
                self.receive.num_stale += connection.remote.drop(transfer_id)

    # NIXL and CUDA IPC.

    def _is_agent_busy(self) -> bool:
        """Do bytes move, from here or to here, as far as this end knows?"""
        if isinstance(self._agent, cuda_ipc.Agent) and (self._agent.is_busy or self._unready):
            return True
        for connection in self._switchboard.connections:
            if connection.remote is not None and connection.remote.is_busy:
                return True
            if connection.transport == nixl.NAME and connection.role is Role.SENDER and self.send.num_open:
                return True
        return False

    def _poll_agent(self, agent: nixl.Agent | cuda_ipc.Agent) -> None:
        agent.progress()
        for connection in list(self._switchboard.connections):
            budget = TURN_BYTES
            remote = connection.remote
            try:
                while budget > 0 and remote is not None and (read := remote.poll()) is not None:
                    if isinstance(read, nixl.Read):
                        budget -= read.landing.num_bytes  # which are copied now
                    self._has_read(connection, read)
            except (nixl.ReadFailed, cuda_ipc.ReadFailed) as error:
                self._switchboard.lose(connection, str(error))
            while connection.sealing and connection.sealing[0][1].is_done():
                self._send_seal(connection, *connection.sealing.popleft())
        self._end_stopped()

    def _has_read(self, connection: Connection, read: nixl.Read | cuda_ipc.Read) -> None:
        """A frame's bytes are in staging memory, or by a device in their place."""
        if isinstance(read, cuda_ipc.Read):
            session = connection.session
            assert session is not None
            context = session.context if session.verify else None
            self._landed(connection, DeviceArrival(read.frame, read.landing, context, read.digest))
            return
        assert isinstance(connection.remote, nixl.RemotePool)
        arrival = self._arrival(connection, read.frame, read.landing)
        arrival.fetch(connection.remote.staging, read.staged)
        self._arrived(connection, arrival)

    def _send_seal(self, connection: Connection, frame: Data, job: Job) -> None:
        """The device has made the digest of a frame that went without."""
        assert connection.session is not None
        connection.link.post(Seal(*_name(frame), seal(connection.session.context, frame, job.digest)))
        self._switchboard.dirty.add(connection)

    def _end_stopped(self) -> None:
        """Let go of blocks that no device works on any more."""
        if not self._stopping:
            return
        assert isinstance(self._agent, cuda_ipc.Agent)
        touched = [item for item in self._stopping if self._agent.touches(item[1])]
        over, self._stopping = [item for item in self._stopping if item not in touched], touched
        for side, transfer_id in over:
            side.io_stopped(self._now, transfer_id)

    # What the switchboard and its connections call.

    def link_up(self, connection: Connection) -> None:
        """A link is authenticated."""
        assert connection.session is not None
        self._side(connection.role).link_up(self._now, connection.key, connection.session.plan)
        if connection.role is Role.SENDER:
            key = connection.key
            self._tell_link(LinkReport(key.worker_id, key.incarnation, key.tp_rank, connection.transport))

    def link_down(self, role: Role, key: LinkKey, reason: str) -> None:
        """A link is gone, or could not be made."""
        self._side(role).link_down(self._now, key, reason)
        if role is Role.SENDER:
            self._tell_link(LinkReport(key.worker_id, key.incarnation, key.tp_rank, "", reason))

    def drained(self, connection: Connection) -> None:
        """All that the peer had sent so far is processed."""
        self._side(connection.role).heard(self._now, connection.key)
        if connection.is_fetched and connection.role is Role.RECEIVER:
            self.receive.settle(self._now)

    def begin(self, connection: Connection, message: Message, payload_bytes: int) -> Sink | None:
        """Where the payload of a message goes."""
        if type(message) is not Data or connection.role is not Role.RECEIVER or connection.is_fetched:
            return None
        landing = self.receive.begin_data(self._clock.now(), connection.key, message, payload_bytes)
        if landing is None:
            return None
        connection.arrival = arrival = self._arrival(connection, message, landing)
        return arrival

    def end(self, connection: Connection, message: Message) -> None:
        """A message is complete."""
        if type(message) is Seal and connection.role is Role.RECEIVER:
            self._sealed(connection, message)
        elif type(message) is not Data or connection.role is not Role.RECEIVER:
            self._side(connection.role).on_message(self._now, connection.key, message)
        elif connection.is_fetched:
            landing = self.receive.begin_data(self._clock.now(), connection.key, message, None)
            if landing is not None:
                self._fetch(connection, message, landing)
        elif connection.arrival is not None:
            arrival, connection.arrival = connection.arrival, None
            self._landed(connection, arrival)

    def _fetch(self, connection: Connection, message: Data, landing: Landing) -> None:
        """Get a frame's bytes from the sender's pool: at once, or by NIXL soon."""
        assert landing.source_parts is not None
        if connection.mapped is not None:
            connection.link.charge(landing.num_bytes)
            arrival = self._arrival(connection, message, landing)
            arrival.fetch(connection.mapped.pool, landing.source_parts)
            self._landed(connection, arrival)
        elif isinstance(connection.remote, cuda_ipc.RemotePool):
            connection.remote.read(message, landing)
        elif connection.remote is not None:
            connection.remote.read(nixl.Read(message, landing))

    def _landed(self, connection: Connection, arrival: Arrival | DeviceArrival) -> None:
        """All bytes of a frame are in place; perhaps its digest is still to come from a device."""
        assert connection.session is not None
        if isinstance(arrival, DeviceArrival) and connection.session.verify and arrival.frame.digest == NO_DIGEST:
            connection.unsealed[_name(arrival.frame)] = arrival
        else:
            self._arrived(connection, arrival)

    def _sealed(self, connection: Connection, message: Seal) -> None:
        """The digest of a frame whose bytes are in place."""
        arrival = connection.unsealed.pop(_name(message), None)
        if arrival is None:
            remote = connection.remote
            if isinstance(remote, cuda_ipc.RemotePool) and remote.seal(message):
                return
            self.receive.num_stale += 1
            return
        arrival.seal(message.digest)
        self._arrived(connection, arrival)

    def pull(self, connection: Connection) -> OutgoingFrame | None:
        """The next data frame of a link."""
        if connection.role is not Role.SENDER:
            return None
        session, is_fetched = connection.session, connection.is_fetched
        assert session is not None
        outgoing = self.send.next_data(connection.key, connection.frame_bytes, name_blocks=is_fetched)
        if outgoing is None:
            return None
        frame = outgoing.frame
        if isinstance(self._pool, DevicePool):
            return self._name_on_device(connection, outgoing)
        extents = Extents(self._pool.pool, outgoing.parts, outgoing.num_bytes)
        if session.verify:
            digest = FrameDigest(self._pool, extents)
            if self._makes_digests:
                digest.make()
            frame = frame._replace(digest=seal(session.context, frame, digest.result()))
        payload: Extents | list[memoryview] = extents
        if self._faults is not None:
            payload = self._faults.before_send(frame, extents.views())
        self._bytes_sent += outgoing.num_bytes
        return OutgoingFrame(frame, [] if is_fetched else payload, outgoing.num_bytes)

    def _name_on_device(self, connection: Connection, outgoing: Outgoing) -> OutgoingFrame:
        """A frame whose bytes the peer's device fetches, while ours makes their digest."""
        assert isinstance(self._agent, cuda_ipc.Agent)
        assert connection.session is not None
        frame = outgoing.frame
        if connection.session.verify:
            try:
                job = self._agent.digest(frame.transfer_id, outgoing.parts, outgoing.num_bytes)
            except cuda_ipc.ReadFailed as error:
                raise LinkClosed(str(error)) from error
            connection.sealing.append((frame, job))
        self._bytes_sent += outgoing.num_bytes
        return OutgoingFrame(frame, [], outgoing.num_bytes)

    def _tell_link(self, report: LinkReport) -> None:
        if self.on_link is not None:
            self.on_link(report)

    def _side(self, role: Role) -> SendSide | ReceiveSide:
        return self.send if role is Role.SENDER else self.receive

    def _arrival(self, connection: Connection, frame: Data, landing: Landing) -> Arrival:
        session = connection.session
        assert session is not None
        assert isinstance(self._pool, LeafDigests)
        return Arrival(frame, landing, self._pool, session.context if session.verify else None, self._faults)

    def _arrived(self, connection: Connection, arrival: Arrival | DeviceArrival) -> None:
        """All bytes of a frame are in place."""
        assert connection.session is not None
        frame, num_bytes, verified = arrival.frame, arrival.landing.num_bytes, arrival.is_verified
        self._bytes_received += num_bytes
        self._frames_verified += verified and connection.session.verify
        self.receive.data_landed(
            self._clock.now(), connection.key, frame, num_bytes, verified=verified, is_fetched=connection.is_fetched
        )

    # The end.

    def _shut_down(self, reason: str) -> None:
        self.send.abort_all(self._now, reason)
        self.receive.abort_all(self._now, reason)
        self._act()
        self._switchboard.close(reason)
        if self._agent is not None:
            self._agent.close()
        self._end_stopped()
        self._act()
        self._selector.close()
        self._close_wake_fd()
        self._publish()
        if self.failure is not None and self.on_events is not None:
            self.on_events()

    def _close_wake_fd(self) -> None:
        with self._wake_lock:
            if self._wake_fd is not None:
                os.close(self._wake_fd)
                self._wake_fd = None


def _name(frame: Data | Seal) -> FrameName:
    return frame.transfer_id, frame.first_layer, frame.num_layers, frame.first_unit, frame.num_units
