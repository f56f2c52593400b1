"""NIXL (optional package `nixl`): frames on a TCP stream, the receiver reads the bytes from the sender's pool.

NIXL can not recall a read: after it has released an active request and forgotten the peer, the peer's bytes may still
land (docs/decisions/0007). So no read ever points into this rank's pool. It ends in staging memory that belongs to one
link, and the verified copy goes on from there; an abort frees the blocks at once, and the staging memory stays, longer
than its link if need be, until NIXL says of every read that it is over.

The agent has no thread: a read goes on while the endpoint at either end calls `progress` or `poll`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import os
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgpack
import numpy as np

from baton.kv_layout import KVLayout
from kvtransfer.api import TransferId
from kvtransfer.lanes import Landing
from kvtransfer.messages import Data
from kvtransfer.plan import Part
from kvtransfer.pool import Pool, address_of

NAME: Final = "nixl"
MAX_EXPOSED_BYTES: Final = 6 * 1024
"""Of what a sender says of its pool; it travels with the handshake."""
_MAX_READS: Final = 2
"""Reads of one link that are under way at a time."""


def agent_name(worker_id: str, incarnation: str, tp_rank: int) -> str:
    """Of one rank in one life of its worker."""
    return f"{worker_id}/{incarnation}/{tp_rank}"


class UnusablePool(Exception):
    """What a peer exposed is not a pool of its layout, or NIXL finds no way to it."""


class ReadFailed(Exception):
    """The peer's memory could not be read."""


class Agent:
    """One rank's NIXL agent. Made where waiting is allowed, then used by the transfer thread only, until `close`."""

    def __init__(self, name: str, host: str) -> None:
        """`name` is unique in the cluster.

        Raises:
            ValueError: the package is missing or does not work on this machine.
        """
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            os.environ.setdefault("UCX_NET_DEVICES", "lo")  # or it would listen on every interface
        os.environ.setdefault("UCX_HANDLE_ERRORS", "none")  # the signal handlers are not its business
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # to stdout, line by line
        try:
            import nixl  # optional, and slow to import
            from nixl import _bindings
        except ImportError as error:
            raise ValueError(f"transport nixl needs `pip install nixl`: {error}") from error
        known = [kind for kind in vars(_bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self._errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, *known)
        try:
            config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent: Any = nixl.nixl_agent(name, config)
        except self._errors as error:
            raise ValueError(f"transport nixl does not work here: {error}") from error
        if "UCX" not in self._agent.backends:
            raise ValueError("transport nixl does not work here: its UCX backend is missing")
        self._remotes: set[RemotePool] = set()

    def expose(self, buffer: memoryview, num_bytes: int) -> bytes:
        """Let peers who are told the answer read the first `num_bytes` of a pool.

        Raises:
            ValueError: it can not be registered.
        """
        address = address_of(np.frombuffer(buffer, np.uint8))
        try:
            registered = self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM")
            metadata = self._agent.get_partial_agent_metadata(registered, True, ["UCX"])
        except self._errors as error:
            raise ValueError(f"transport nixl can not register the KV pool: {error}") from error
        exposed: bytes = msgpack.packb([metadata, address, num_bytes])
        if len(exposed) > MAX_EXPOSED_BYTES:
            raise ValueError(f"transport nixl: {len(exposed)} bytes of metadata, {MAX_EXPOSED_BYTES} can be sent")
        return exposed

    def open(self, exposed: bytes, name: str, layout: KVLayout, read_bytes: int) -> RemotePool:
        """The pool of the peer's agent `name`, to be read in pieces of at most `read_bytes`.

        Raises:
            UnusablePool: it is not what its layout says, or can not be reached.
        """
        try:
            metadata, address, num_bytes = msgpack.unpackb(exposed, max_ext_len=0, max_map_len=0)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise UnusablePool("the peer exposes no pool") from error
        is_sound = type(metadata) is bytes and type(address) is int and num_bytes == layout.pool_bytes
        if not is_sound or not 0 <= address <= 2**64 - num_bytes:
            raise UnusablePool(f"the peer exposes another pool than its layout's {layout.pool_bytes} bytes")
        found = ""
        try:
            found = self._agent.add_remote_agent(metadata)
            found = found.decode() if isinstance(found, bytes) else found
            if found != name:
                raise UnusablePool("the peer exposes another agent's pool")
            self._agent.make_connection(name, ["UCX"])
            remote = RemotePool(self._agent, self._errors, name, address, layout, read_bytes)
            self._remotes.add(remote)
        except self._errors as error:
            raise UnusablePool(f"NIXL can not reach the peer's pool: {error}") from error
        finally:
            self._forget_unused(found)
        return remote

    def progress(self) -> None:
        """Serve peers' reads, and free what closed links have left once its reads are over."""
        self._agent.update_notifs()
        for remote in [remote for remote in self._remotes if remote.is_closed and remote.try_free()]:
            self._remotes.discard(remote)
            self._forget_unused(remote.name)

    def _forget_unused(self, name: str) -> None:
        """NIXL has one agent for all links to a peer: it goes with the last of them, whoever named it."""
        if name and all(remote.name != name for remote in self._remotes):
            with contextlib.suppress(*self._errors):
                self._agent.remove_remote_agent(name)

    def close(self) -> None:
        """End the agent: nothing is read any more, by us or from us."""
        for remote in self._remotes:
            remote.close()
        self.progress()
        remotes, self._remotes = self._remotes, set()
        for remote in remotes:
            remote.forget_agent()
        self._agent = None  # its end is the end of all its reads
        for remote in remotes:
            remote.release()


class Read:
    """One frame's bytes, on their way into the staging memory or there."""

    def __init__(self, frame: Data, landing: Landing) -> None:
        self.frame: Final = frame
        self.landing: Final = landing
        self.is_wanted = True
        self.slot = -1
        self.handle: Any = None
        self.staged: list[Part] = []
        """Where the bytes lie in `RemotePool.staging`, in the parts of the landing."""


class RemotePool:
    """A peer's pool, as one link reads it. Transfer thread only."""

    def __init__(
        self,
        agent: Any,
        errors: tuple[type[Exception], ...],
        name: str,
        address: int,
        layout: KVLayout,
        read_bytes: int,
    ) -> None:
        self.name: Final = name
        self.is_closed = False
        self._agent = agent
        self._errors = errors
        self._starts = [address + layout.layer_offset(layer) for layer in range(len(layout.model.layers))]
        self._sizes = [
            layout.block_bytes(layer) * layout.geometry.num_blocks for layer in range(len(layout.model.layers))
        ]
        self._read_bytes = read_bytes
        self._memory = mmap.mmap(-1, _MAX_READS * read_bytes)
        buffer = memoryview(self._memory)
        self._address = address_of(np.frombuffer(buffer, np.uint8))
        self.staging: Final = Pool.flat(buffer)
        self._registered: Any = agent.register_memory([(self._address, len(buffer), 0, "")], "DRAM")
        self._free_slots = list(range(_MAX_READS))
        self._waiting: deque[Read] = deque()
        self._under_way: list[Read] = []

    @property
    def is_busy(self) -> bool:
        """Is there anything that `poll` could find finished?"""
        return bool(self._under_way)

    def read(self, read: Read) -> None:
        """Fetch a frame's bytes as soon as there is room for them. The peer's blocks are checked against its layout."""
        assert not self.is_closed
        self._waiting.append(read)

    def drop(self, transfer_id: TransferId) -> int:
        """Nobody wants these reads any more; how many there were."""
        reads = [read for read in (*self._waiting, *self._under_way) if read.frame.transfer_id == transfer_id]
        for read in reads:
            read.is_wanted = False
        self._waiting = deque(read for read in self._waiting if read.is_wanted)
        return len(reads)

    def poll(self) -> Read | None:
        """A wanted read whose bytes are all in `staging`; they stay there until the next call.

        Raises:
            ReadFailed: this pool can not be read any more.
        """
        try:
            self._begin_waiting()
            for read in list(self._under_way):
                state = self._agent.check_xfer_state(read.handle)
                if state == "ERR":
                    raise ReadFailed("NIXL: a read failed")
                if state == "DONE":
                    self._over(read)
                    if read.is_wanted:
                        return read
        except self._errors as error:
            raise ReadFailed(f"NIXL: {error}") from error
        return None

    def _begin_waiting(self) -> None:
        while self._waiting and self._free_slots:
            read = self._waiting.popleft()
            read.slot = self._free_slots.pop()
            assert read.landing.source_parts is not None
            near, far, read.staged = self._descriptors(read.landing.source_parts, read.slot * self._read_bytes)
            near, far = (self._agent.get_xfer_descs(side, "DRAM") for side in (near, far))
            read.handle = self._agent.initialize_xfer("READ", near, far, self.name)
            self._under_way.append(read)  # before it is posted: a post that fails may have begun some of it
            self._agent.transfer(read.handle)

    def _over(self, read: Read) -> None:
        """NIXL has said that it touches the read's slot no more."""
        self._under_way.remove(read)
        self._free_slots.append(read.slot)
        read.handle.release()

    def _descriptors(self, parts: Sequence[Part], start: int) -> tuple[Any, Any, list[Part]]:
        """(address, length, device) of both sides, and the parts in the staging memory from `start` on."""
        staged: list[Part] = []
        lengths, addresses = [], []
        at = start
        for layer, runs in parts:
            ends = runs[:, 0] + runs[:, 1]
            assert int(ends.max()) <= self._sizes[layer], "outside of the peer's pool"
            part_bytes = int(runs[:, 1].sum())
            staged.append((0, np.array([[at, part_bytes]], np.uint64)))
            lengths.append(runs[:, 1])
            addresses.append(runs[:, 0] + np.uint64(self._starts[layer]))
            at += part_bytes
        assert at - start <= self._read_bytes
        length = np.concatenate(lengths)
        offsets = np.cumsum(length) - length + np.uint64(self._address + start)
        device = np.zeros(len(length), np.uint64)
        far = np.stack([np.concatenate(addresses), length, device], 1)
        return np.stack([offsets, length, device], 1), far, staged

    def close(self) -> None:
        """The link is gone: no read is wanted. What is under way stays until it is over. Idempotent."""
        self.is_closed = True
        self._waiting.clear()
        for read in self._under_way:
            read.is_wanted = False

    def try_free(self) -> bool:
        """Closed: free the staging memory, unless a read may still write it."""
        for read in list(self._under_way):
            try:
                is_over = self._agent.check_xfer_state(read.handle) != "PROC"
            except self._errors:
                is_over = True  # the connection to the peer has failed, so nothing of it can come any more
            if is_over:
                with contextlib.suppress(*self._errors):
                    self._over(read)
        if self._under_way:
            return False
        self.forget_agent()
        self.release()
        return True

    def forget_agent(self) -> None:
        """Before the agent ends."""
        with contextlib.suppress(*self._errors):
            self._agent.deregister_memory(self._registered)
        self._agent = self._registered = None

    def release(self) -> None:
        """Unmap the staging memory. No read may be under way, or the agent has ended."""
        self._under_way.clear()
        self.staging.release()
        with contextlib.suppress(BufferError):  # a traceback still holds a view: it is unmapped with that
            self._memory.close()
