"""CUDA IPC: a Unix socket carries the frames, the receiver's device copies the bytes out of the sender's device memory.

The sender's allocation is mapped once per link, by the handle in its Proof. A copy ends in the blocks themselves and is
digested where it lies, on the device, in order on one stream of this process. So its end is ours to see: blocks of a
transfer that was ended stay with us until the stream has passed the last copy into them (docs/decisions/0009).

A frame leaves when the engine's own work on its bytes is over, so no process waits for another one's stream.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgpack
import numpy as np

from baton.kv_layout import DeviceMemory, KVLayout
from kvtransfer.api import TransferId
from kvtransfer.cuda.driver import HANDLE_BYTES, UNIT_BYTES, UUID_BYTES, CudaDriver, CudaError, Job, reference_digest
from kvtransfer.lanes import Landing
from kvtransfer.messages import NO_DIGEST, Data, Seal
from kvtransfer.plan import Part
from kvtransfer.pool import DevicePool, Pieces

log = logging.getLogger("kvtransfer")

NAME: Final = "cuda_ipc"
_FORMAT: Final = 1
"""Of what is exposed, and of the digest."""
_MAX_READS: Final = 16
"""Reads of one link that are under way at a time: what may end between two looks."""
_HOT_LOOKS: Final = 10
"""Looks without a pause after work was begun: a device copies a frame in microseconds, unless it is busy."""


class UnusablePool(Exception):
    """What a peer exposed is not a pool of its layout, or this device can not map it."""


class ReadFailed(Exception):
    """A read could not be begun; nothing of it is under way."""


class Read:
    """One frame's bytes, on their way into the blocks or there."""

    def __init__(self, frame: Data, landing: Landing) -> None:
        self.frame = frame
        """Carries its digest as soon as that has come."""
        self.landing: Final = landing
        self.is_wanted = True
        self.job: Job | None = None

    @property
    def is_over(self) -> bool:
        """Has it been begun, and ended?"""
        return self.job is not None and self.job.is_done()

    @property
    def digest(self) -> bytes:
        """Of the bytes where they lie now; only once it is over."""
        assert self.job is not None
        return self.job.digest


class Agent:
    """One rank's pool on a device, to peers and from peers. Transfer thread only, but for its making.

    It knows all work on the pool's bytes, whatever becomes of links.
    """

    def __init__(self, driver: CudaDriver, memory: DeviceMemory, layout: KVLayout) -> None:
        """Owns the driver.

        Raises:
            ValueError: the pool can not be shared in this way, or the device does not compute what it should.
        """
        self._driver = driver
        self._remotes: set[RemotePool] = set()
        self._under_way: list[tuple[TransferId, Job]] = []
        self._num_looks = 0
        """Since work was begun or was over."""
        self._is_closed = False
        try:
            self._pool = DevicePool(layout, memory.address, memory.num_bytes)
            self.exposed: Final = self._expose(memory, layout)
            check_device(driver)
        except CudaError as error:
            driver.close()
            raise ValueError(f"transport {NAME} does not work here: {error}") from error
        except BaseException:
            driver.close()
            raise

    def _expose(self, memory: DeviceMemory, layout: KVLayout) -> bytes:
        token_bytes = {spec.head_dim * layout.model.itemsize_bytes for spec in layout.model.layers}
        if memory.address % UNIT_BYTES or any(size % UNIT_BYTES for size in token_bytes):
            raise ValueError(f"transport {NAME} moves {UNIT_BYTES} bytes at a time: the pool or a head is not aligned")
        start, size = self._driver.range_of(memory.address)
        if memory.address + layout.pool_bytes > start + size:
            raise ValueError(f"the KV pool is not in one allocation of the device ({size} bytes)")
        handle = self._driver.export(start)
        exposed: bytes = msgpack.packb([_FORMAT, handle, self._driver.uuid, memory.address - start, layout.pool_bytes])
        return exposed

    def bind(self) -> None:
        """Let the calling thread go on with the agent."""
        self._driver.bind()

    def open(self, exposed: bytes, layout: KVLayout) -> RemotePool:
        """The pool of a peer on this machine, mapped.

        Raises:
            UnusablePool: it is not what its layout says, or can not be mapped or read from this device.
        """
        handle, uuid, offset = _checked(exposed, layout)
        try:
            if uuid not in self._driver.readable():
                raise UnusablePool(f"device {uuid.hex()} of the peer's pool is not visible here, or not readable")
            start = self._driver.open(handle)
        except CudaError as error:
            raise UnusablePool(f"the peer's device memory can not be mapped: {error}") from error
        try:
            mapped_start, size = self._driver.range_of(start)
            if mapped_start != start or offset + layout.pool_bytes > size:
                raise UnusablePool(f"the peer's mapped memory has {size} bytes, its pool ends at {offset}+pool")
            pool = DevicePool(layout, start + offset, size - offset)
        except (CudaError, UnusablePool) as error:
            with contextlib.suppress(CudaError):
                self._driver.close_handle(start)
            raise UnusablePool(str(error)) from error
        remote = RemotePool(self, start, pool)
        self._remotes.add(remote)
        return remote

    def digest(self, transfer_id: TransferId, parts: Sequence[Part], num_bytes: int) -> Job:
        """Begin to digest bytes of our pool.

        Raises:
            ReadFailed: nothing is under way.
        """
        return self._begin(transfer_id, self._pool.pieces(parts), num_bytes, None)

    def fetch(self, transfer_id: TransferId, landing: Landing, source: DevicePool) -> Job:
        """Begin to copy a frame's bytes to where they belong, and then to digest them there.

        Raises:
            ReadFailed: nothing is under way.
        """
        assert landing.source_parts is not None
        fro = source.pieces(landing.source_parts)
        return self._begin(transfer_id, self._pool.pieces(landing.parts), landing.num_bytes, fro)

    def _begin(self, transfer_id: TransferId, to: Pieces, num_bytes: int, fro: Pieces | None) -> Job:
        try:
            job = self._driver.begin(to, num_bytes, fro)
        except CudaError as error:
            raise ReadFailed(f"CUDA: {error}") from error
        self._under_way.append((transfer_id, job))
        self._num_looks = 0
        return job

    @property
    def is_busy(self) -> bool:
        """Is work under way?"""
        return bool(self._under_way)

    @property
    def is_hot(self) -> bool:
        """Will work under way probably be over at once?"""
        return self.is_busy and self._num_looks < _HOT_LOOKS

    def touches(self, transfer_id: TransferId) -> bool:
        """May work under way read or write blocks of the transfer?"""
        return any(item[0] == transfer_id for item in self._under_way)

    def progress(self) -> None:
        """See what is over; unmap what closed links have left.

        Raises:
            CudaError: the device does not work any more. Its process can only end.
        """
        left = [item for item in self._under_way if not item[1].is_done()]
        self._num_looks = self._num_looks + 1 if len(left) == len(self._under_way) else 0
        self._under_way = left
        for remote in [remote for remote in self._remotes if remote.is_closed and remote.is_free]:
            self._remotes.discard(remote)
            self._driver.close_handle(remote.start)

    def close(self) -> None:
        """Wait until nothing is under way, unmap everything, give the driver up. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for remote in self._remotes:
            remote.close()
        try:
            self._driver.finish()
            self.progress()
        except CudaError as error:  # then nothing runs on the device
            log.error("the CUDA device does not work any more", extra={"error": str(error)})
            self._under_way.clear()
        self._driver.close()


class RemotePool:
    """A peer's pool, as one link reads it. Transfer thread only."""

    def __init__(self, agent: Agent, start: int, pool: DevicePool) -> None:
        self.start: Final = start
        self.is_closed = False
        self._agent = agent
        self._pool = pool
        self._waiting: deque[Read] = deque()
        self._under_way: list[Read] = []

    @property
    def is_busy(self) -> bool:
        """Is there anything that `poll` could begin or find finished?"""
        return bool(self._waiting or self._under_way)

    @property
    def is_free(self) -> bool:
        """Is no read under way?"""
        return all(read.is_over for read in self._under_way)

    def read(self, frame: Data, landing: Landing) -> None:
        """Fetch a frame's bytes as soon as it is their turn."""
        assert not self.is_closed
        self._waiting.append(Read(frame, landing))

    def seal(self, message: Seal) -> bool:
        """The digest of a frame whose read is not over; False if there is none."""
        name = (message.transfer_id, message.first_layer, message.num_layers, message.first_unit, message.num_units)
        for read in (*self._waiting, *self._under_way):
            frame = read.frame
            found = (frame.transfer_id, frame.first_layer, frame.num_layers, frame.first_unit, frame.num_units)
            if found == name and read.is_wanted and frame.digest == NO_DIGEST:
                read.frame = frame._replace(digest=message.digest)
                return True
        return False

    def drop(self, transfer_id: TransferId) -> int:
        """Nobody wants these reads any more; how many there were. What is under way goes on."""
        reads = [read for read in (*self._waiting, *self._under_way) if read.frame.transfer_id == transfer_id]
        reads = [read for read in reads if read.is_wanted]
        for read in reads:
            read.is_wanted = False
        self._waiting = deque(read for read in self._waiting if read.is_wanted)
        return len(reads)

    def poll(self) -> Read | None:
        """A wanted read whose bytes are in place and digested.

        Raises:
            ReadFailed: this pool can not be read any more.
            CudaError: the device does not work any more.
        """
        while self._waiting and len(self._under_way) < _MAX_READS:
            read = self._waiting.popleft()
            read.job = self._agent.fetch(read.frame.transfer_id, read.landing, self._pool)
            self._under_way.append(read)
        while self._under_way and self._under_way[0].is_over:
            read = self._under_way.pop(0)
            if read.is_wanted:
                return read
        return None

    def close(self) -> None:
        """The link is gone: no read is wanted. The memory stays mapped until the last one is over. Idempotent."""
        self.is_closed = True
        self._waiting.clear()
        for read in self._under_way:
            read.is_wanted = False


def _checked(exposed: bytes, layout: KVLayout) -> tuple[bytes, bytes, int]:
    """(handle, device's UUID, offset of the pool in its allocation) of what a peer exposed.

    Raises:
        UnusablePool: it is something else.
    """
    try:
        form, handle, uuid, offset, num_bytes = msgpack.unpackb(exposed, max_ext_len=0, max_map_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise UnusablePool("the peer exposes no pool") from error
    if form != _FORMAT:
        raise UnusablePool(f"the peer exposes its pool in format {form!r}, this is {_FORMAT}")
    fits = type(handle) is bytes and len(handle) == HANDLE_BYTES and type(uuid) is bytes and len(uuid) == UUID_BYTES
    if not fits or type(offset) is not int or offset < 0 or offset % UNIT_BYTES or num_bytes != layout.pool_bytes:
        raise UnusablePool(f"the peer exposes another pool than its layout's {layout.pool_bytes} bytes")
    return handle, uuid, offset


_CHECK_BYTES: Final = 64 * 1024


def check_device(driver: CudaDriver) -> None:
    """Does the device copy and digest as the reference does? A digest that means nothing would verify anything.

    Raises:
        CudaError: no, or it does not work at all.
    """
    data = np.random.default_rng(0).integers(0, 256, _CHECK_BYTES, np.uint8)
    fro_runs, to_runs = _check_runs(seed=1), _check_runs(seed=2)
    start = driver.allocate(2 * _CHECK_BYTES)
    try:
        driver.write(start, data.tobytes() + bytes(_CHECK_BYTES))
        fro, to = fro_runs.copy(), to_runs.copy()
        fro[:, 0] += np.uint64(start)
        to[:, 0] += np.uint64(start + _CHECK_BYTES)
        moved = np.concatenate([data[at : at + length] for at, length in fro_runs.tolist()])
        job = driver.begin(to, len(moved), fro)
        driver.finish()
        expected, taken = np.zeros(_CHECK_BYTES, np.uint8), 0
        for at, length in to_runs.tolist():
            expected[at : at + length] = moved[taken : taken + length]
            taken += length
        if not job.is_done() or driver.read(start + _CHECK_BYTES, _CHECK_BYTES) != expected.tobytes():
            raise CudaError("self-test: the device does not copy what it should")
        if job.digest != reference_digest(moved):
            raise CudaError("self-test: the device's digest is not the reference's")
    finally:
        driver.free(start)


def _check_runs(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """[num_runs, 2]: three quarters of _CHECK_BYTES in shuffled pieces, with gaps."""
    rng = np.random.default_rng(seed)
    num_units = _CHECK_BYTES // UNIT_BYTES
    edges = np.unique(np.concatenate([[0, num_units], rng.integers(1, num_units, 200)]))
    runs = np.stack([edges[:-1], np.diff(edges)], 1).astype(np.uint64)
    runs = rng.permutation(runs)
    wanted = num_units * 3 // 4
    before = np.cumsum(runs[:, 1]) - runs[:, 1]
    runs = runs[before < wanted]
    runs[-1, 1] -= np.uint64(int(runs[:, 1].sum()) - wanted)
    return runs * np.uint64(UNIT_BYTES)
