"""What the ranks of one replica say to each other: plans from the leader, sums and gathers of tensors."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

_COUNTER_BYTES: Final = 128  # two cache lines: the hardware fetches neighbours in pairs
_COUNTER_STRIDE: Final = _COUNTER_BYTES // 8
_SPINS: Final = 100
_YIELDS: Final = 500
_NAP_S: Final = 20e-6
_YIELDS_PER_CHECK: Final = 64
_LENGTH: Final = struct.Struct("<I")
_BYE: Final = 2**32 - 1
_HELLO: Final = struct.Struct("<II")  # rank, size
_WELCOME: Final = struct.Struct("<Q")  # slot_bytes


class PeerLost(RuntimeError):
    """Another rank of this replica died, closed or fell silent; the replica can not go on."""


class Comm(Protocol):
    """A group of `size` ranks; rank 0 is the leader. Collectives are called by all ranks in the same order.

    Engine thread only.
    """

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` (contiguous) by its sum over ranks; every rank gets the same bits. Blocks.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every rank's `tensor` (contiguous, one shape), by rank, on the leader; None on followers. May block.

        The leader's own is `tensor` itself, not a copy.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def send(self, message: bytes) -> None:
        """Leader: hand a message to all followers. Blocks only while their socket buffers are full.

        Raises:
            PeerLost: the group is unusable from then on.
        """
        ...

    def receive(self) -> bytes | None:
        """Follower: the leader's next message; None when the leader has closed. Blocks without spinning.

        Raises:
            PeerLost: the leader is gone without closing.
        """
        ...

    def close(self) -> None:
        """Leave the group and free what it shares. Idempotent."""
        ...


class SingleComm:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum is the tensor itself."""

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """See Comm."""
        return [tensor]

    def send(self, message: bytes) -> None:
        """There is nobody to hear it."""

    def receive(self) -> bytes | None:
        """There is no leader to hear."""
        return None

    def close(self) -> None:
        """See Comm."""


class ShmComm:
    """Ranks on one host that add tensors in shared memory. Construction is collective.

    The leader makes a memfd and passes it to each follower over a Unix socket that stays open: it carries messages,
    and its end of file is how a rank learns that another has died. The memory holds a counter per rank, each on cache
    lines of its own, and for each rank two slots:

        [counter of rank 0 | .. | counter of rank n-1][slot 0 of each rank][slot 1 of each rank]

    A collective is cut into pieces of at most a slot. Piece number m uses slot m % 2: a rank writes its own slot, sets
    its counter to m + 1, waits until all counters are > m, and reads all slots. It may overwrite slot m % 2 with piece
    m + 2 only when no rank reads piece m any more, which is so when all counters are > m + 1: hence two slots.

    This relies on x86: stores become visible in program order, loads are not reordered with older loads, and an
    aligned store of eight bytes is not torn. Another architecture needs fences at `_publish` and `_wait`.
    """

    def __init__(
        self, socket_path: str | Path, *, rank: int, size: int, slot_bytes: int = 2**20, timeout_s: float = 60.0
    ) -> None:
        """Join the group. Blocks until all ranks have joined.

        `socket_path` is in a directory that only this user can enter; the leader makes the socket, and removes it when
        all have joined. The leader's `slot_bytes` counts (a multiple of 4096). `timeout_s` bounds joining, and how
        long a collective waits for a rank that is alive but does not come.

        Raises:
            PeerLost: not all ranks joined within `timeout_s`.
        """
        if not 0 <= rank < size or size < 2:
            raise ValueError(f"rank {rank} of {size} ranks is not a group")
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._is_closed = False
        self.num_pieces = 0  # collective pieces so far; the same on all ranks between collectives
        if rank == 0:
            fd, self._sockets = _gather_followers(str(socket_path), size, slot_bytes, timeout_s)
        else:
            fd, slot_bytes, leader = _join_leader(str(socket_path), rank, size, timeout_s)
            self._sockets = {0: leader}
        try:
            self._map = mmap.mmap(fd, _region_bytes(size, slot_bytes))
        finally:
            os.close(fd)
        self.slot_bytes = slot_bytes
        self._counters = memoryview(self._map)[: size * _COUNTER_BYTES].cast("Q")
        slots = torch.frombuffer(self._map, dtype=torch.uint8)[_header_bytes(size) :]
        self._slots = slots.view(2, size, slot_bytes)
        self._poll = select.poll()
        for peer in self._sockets.values():
            self._poll.register(peer, select.POLLRDHUP)  # and errors and hang-up, which are always reported

    def all_reduce(self, tensor: Tensor) -> None:
        """See Comm. Adds in float32 in the order of ranks, then rounds once."""
        for piece in self._pieces(tensor):
            slots = self._exchange(piece, reads=True)
            # One addition rounds once by itself, and float32 needs no wider sum: neither needs a temporary.
            in_place = self.size == 2 or piece.dtype == torch.float32
            total = torch.add(slots[0], slots[1], out=piece) if in_place else slots[0].float() + slots[1]
            for slot in slots[2:]:
                total += slot
            if not in_place:
                piece.copy_(total)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """See Comm. Followers do not wait for the leader."""
        if self.rank != 0:
            for piece in self._pieces(tensor):
                self._exchange(piece, reads=False)
            return None
        gathered = [tensor] + [torch.empty_like(tensor) for _ in range(1, self.size)]
        for pieces in zip(*(self._pieces(part) for part in gathered), strict=True):
            slots = self._exchange(pieces[0], reads=True)
            for piece, slot in zip(pieces[1:], slots[1:], strict=True):
                piece.copy_(slot)
        return gathered

    def send(self, message: bytes) -> None:
        """See Comm."""
        assert self.rank == 0, "only the leader sends"
        for rank, peer in self._sockets.items():
            try:
                peer.sendall(_LENGTH.pack(len(message)) + message)
            except OSError as error:  # a timeout, too: the follower has not read for timeout_s
                raise self._lost(f"rank {rank} takes no messages") from error

    def receive(self) -> bytes | None:
        """See Comm."""
        try:
            (length,) = _LENGTH.unpack(_read_exactly(self._sockets[0], _LENGTH.size))
            return None if length == _BYE else _read_exactly(self._sockets[0], length)
        except OSError as error:
            raise self._lost("rank 0 is gone") from error

    def close(self) -> None:
        """See Comm. The leader says so to its followers."""
        if self._is_closed:
            return
        self._is_closed = True
        for peer in self._sockets.values():
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    peer.send(_LENGTH.pack(_BYE), socket.MSG_DONTWAIT)
            peer.close()
        self._counters.release()
        del self._slots, self._map  # unmapped when the last view goes

    @property
    def address(self) -> int:
        """Of the shared memory: kernels that add by this protocol take and leave `num_pieces`. Valid until `close`."""
        return int(self._slots.data_ptr()) - _header_bytes(self.size)

    def check_open(self) -> None:
        """Raises PeerLost after `close`."""
        if self._is_closed:
            raise PeerLost("the group is closed")

    def _pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        return iter(torch.split(tensor.view(-1), self.slot_bytes // tensor.element_size()))

    def _exchange(self, piece: Tensor, *, reads: bool) -> list[Tensor]:
        """Publish this rank's piece; wait for those of all ranks if it `reads` them. Slots by rank, cut to size."""
        self.check_open()
        number = self.num_pieces
        size_bytes = piece.numel() * piece.element_size()
        slots = [slot[:size_bytes].view(piece.dtype) for slot in self._slots[number % 2]]
        self._wait(number)
        slots[self.rank].copy_(piece)
        self.num_pieces = number + 1
        self._counters[self.rank * _COUNTER_STRIDE] = self.num_pieces
        if reads:
            self._wait(self.num_pieces)
        return slots

    def _wait(self, count: int) -> None:
        """Until every rank has published `count` pieces. Spins, gives way, then naps."""
        began_s = time.monotonic()
        for rank in range(self.size):
            tries = 0
            while self._counters[rank * _COUNTER_STRIDE] < count:
                tries += 1
                if tries <= _SPINS:
                    continue
                if tries <= _YIELDS:
                    os.sched_yield()
                else:
                    time.sleep(_NAP_S)  # more processes than cores: the rank that we wait for needs this one
                if tries % _YIELDS_PER_CHECK == 0:
                    self.check_peers(rank, time.monotonic() - began_s)

    def check_peers(self, waiting_for: int, waited_s: float) -> None:
        """For who waits: raises PeerLost, and closes, if a rank is gone or `waiting_for` is later than it may be."""
        ranks = {peer.fileno(): rank for rank, peer in self._sockets.items()}
        gone = [ranks[fd] for fd, _ in self._poll.poll(0)]
        if gone:
            raise self._lost(f"rank {gone[0]} is gone")
        if waited_s > self._timeout_s:
            raise self._lost(f"rank {waiting_for} has not joined a collective for {waited_s:.0f} s")

    def _lost(self, reason: str) -> PeerLost:
        """Closing tells the other ranks, whatever they wait for."""
        self.close()
        return PeerLost(reason)


def _header_bytes(size: int) -> int:
    return -(-size * _COUNTER_BYTES // 4096) * 4096


def _region_bytes(size: int, slot_bytes: int) -> int:
    return _header_bytes(size) + 2 * size * slot_bytes


def _gather_followers(path: str, size: int, slot_bytes: int, timeout_s: float) -> tuple[int, dict[int, socket.socket]]:
    """Leader: the shared memory, and a socket to each follower."""
    if slot_bytes % 4096 or slot_bytes <= 0:
        raise ValueError(f"slot_bytes must be a positive multiple of 4096, not {slot_bytes}")
    deadline_s = time.monotonic() + timeout_s
    followers: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.memfd_create("baton-comm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _region_bytes(size, slot_bytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        listener.bind(path)
        listener.listen(size)
        while len(followers) < size - 1:
            listener.settimeout(max(0.001, deadline_s - time.monotonic()))
            peer, _ = listener.accept()
            peer.settimeout(timeout_s)
            rank, its_size = _HELLO.unpack(_read_exactly(peer, _HELLO.size))
            if its_size != size or not 0 < rank < size or rank in followers or _uid(peer) != os.getuid():
                peer.close()
                raise PeerLost(f"rank {rank} of {its_size} can not join a group of {size}")
            followers[rank] = peer
        for peer in followers.values():
            socket.send_fds(peer, [_WELCOME.pack(slot_bytes)], [fd])
    except BaseException as error:
        for peer in followers.values():
            peer.close()
        os.close(fd)
        if isinstance(error, OSError):
            missing = sorted(set(range(1, size)) - followers.keys())
            raise PeerLost(f"ranks {missing} did not join at {path}: {error}") from error
        raise
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(path)
    return fd, followers


def _join_leader(path: str, rank: int, size: int, timeout_s: float) -> tuple[int, int, socket.socket]:
    """Follower: the shared memory, the leader's slot_bytes, and a socket to the leader."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(path)
            break
        except OSError as error:
            peer.close()
            if time.monotonic() > deadline_s:
                raise PeerLost(f"rank 0 does not listen at {path}") from error
            time.sleep(0.01)  # ranks start in any order, and nothing announces the leader's socket
    try:
        peer.sendall(_HELLO.pack(rank, size))
        peer.settimeout(timeout_s)
        data, fds, _, _ = socket.recv_fds(peer, _WELCOME.size, 1)
        if len(data) != _WELCOME.size or len(fds) != 1:
            raise ConnectionError("the leader left")
        peer.settimeout(None)
    except OSError as error:
        peer.close()
        raise PeerLost(f"rank 0 did not admit rank {rank}: {error}") from error
    return fds[0], _WELCOME.unpack(data)[0], peer


def _uid(peer: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _read_exactly(peer: socket.socket, count: int) -> bytes:
    """Raises ConnectionError at the end of the stream."""
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(count - len(parts))
        if not part:
            raise ConnectionError("end of stream")
        parts += part
    return bytes(parts)
