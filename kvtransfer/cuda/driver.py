"""What the CUDA IPC transport asks of a driver, and what its kernels compute. Knows no peers and no transfers.

The digest of `num_units` units of 16 bytes, the unit at place i being the little-endian words (lo, hi):

    key = (i + 1) * WEYL                    all arithmetic modulo 2^64
    a   = lo ^ key
    b   = hi + rotate_left(key, 32)
    b  ^= mix(a);  a ^= mix(b);  b ^= mix(a);  a ^= mix(b)
    digest = (num_units + sum of all a, sum of all b)        two little-endian words

Sums do not depend on the order of threads. For one place (lo, hi) -> (a, b) is a bijection, so a change within one unit
always changes the digest; changes of several units go unseen with a chance of about 2^-128. Like xxh3 it detects
faults, not attackers.
"""

from __future__ import annotations

import struct
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtransfer.pool import Pieces

HANDLE_BYTES: Final = 64
UUID_BYTES: Final = 16
UNIT_BYTES: Final = 16
"""What a thread moves at a time: every address and length is a multiple of it."""

_WEYL: Final = 0x9E3779B97F4A7C15
_MIX: Final = 0x9FB21C651E98DF25

_Words: TypeAlias = npt.NDArray[np.uint64]
Table: TypeAlias = npt.NDArray[np.uint64]
"""[num_pieces, 3]: (destination address, source address, first unit), in order of the units."""


class CudaError(Exception):
    """A call of the driver failed; the message names the call and the error."""


class Job(Protocol):
    """Work that was begun on the driver's stream."""

    def is_done(self) -> bool:
        """Is it over? Never blocks. Once it is, the bytes are in place for whoever starts work from here on.

        Raises:
            CudaError: the device does not work any more, and nothing on it runs.
        """
        ...

    @property
    def digest(self) -> bytes:
        """Of the destination, 16 bytes; only once it is done."""
        ...


class CudaDriver(Protocol):
    """One device as one process sees it. One thread at a time, each after `bind`. Every method raises CudaError.

    Work runs in order on one stream of its own. Addresses are the device's; the driver checks none of them.
    """

    @property
    def uuid(self) -> bytes:
        """Of the device; UUID_BYTES bytes."""
        ...

    def readable(self) -> frozenset[bytes]:
        """The UUIDs of the devices that this process sees and whose memory this device can read, itself included."""
        ...

    def bind(self) -> None:
        """Let the calling thread use the driver."""
        ...

    def range_of(self, address: int) -> tuple[int, int]:
        """(start, size in bytes) of the allocation, ours or mapped, that holds an address."""
        ...

    def export(self, start: int) -> bytes:
        """HANDLE_BYTES bytes by which other processes on this machine can map the allocation of ours that begins there.

        The allocation must not be freed before every such process has closed its mapping.
        """
        ...

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; where it begins here. Fails in the process that exported it.

        Every `open` needs a `close_handle`; opening the same again gives the same address.
        """
        ...

    def close_handle(self, start: int) -> None:
        """Undo one `open`. No work on the mapping may be under way."""
        ...

    def begin(self, to: Pieces, num_bytes: int, source: Pieces | None) -> Job:
        """Copy `num_bytes` bytes from `source`, if there is one, to `to`; then digest what lies in `to`.

        Never waits for the device, unless it fails: a call that raises leaves nothing of its own under way.
        """
        ...

    def finish(self) -> None:
        """Block until all that was begun is over."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """Memory of our own on the device, for self-tests. May wait for the device."""
        ...

    def free(self, start: int) -> None:
        """Give back what `allocate` gave. May wait for the device."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Put bytes on the device; blocks until they are there."""
        ...

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes of the device; blocks until all that was begun is over."""
        ...

    def close(self) -> None:
        """Free what the driver holds. Nothing may be under way. Idempotent."""
        ...


def table(to: Pieces, source: Pieces | None) -> Table:
    """Both lists of pieces, which hold equally many bytes, cut where either is cut.

    Raises:
        ValueError: an address or a length is no multiple of UNIT_BYTES, or the lists do not fit together.
    """
    sides = (to,) if source is None else (to, source)
    if any((side % UNIT_BYTES).any() for side in sides):
        raise ValueError(f"a piece on the device is not aligned to {UNIT_BYTES} bytes")
    side_ends = [np.cumsum(side[:, 1]) for side in sides]
    if any(ends[-1] != side_ends[0][-1] for ends in side_ends):
        raise ValueError("the pieces of source and destination hold different numbers of bytes")
    ends = np.unique(np.concatenate(side_ends))
    starts = np.concatenate([ends[:1] * 0, ends[:-1]])
    found = np.zeros((len(starts), 3), np.uint64)
    for column, (side, side_end) in enumerate(zip(sides, side_ends, strict=True)):
        index = np.searchsorted(side_end, starts, side="right")
        found[:, column] = side[index, 0] + starts - (side_end[index] - side[index, 1])
    found[:, 2] = starts // np.uint64(UNIT_BYTES)
    return found


def reference_digest(data: bytes | memoryview | npt.NDArray[np.uint8]) -> bytes:
    """What the kernel makes of bytes that lie in order; a multiple of UNIT_BYTES of them."""
    words: _Words = np.frombuffer(data, "<u8").reshape(-1, 2)
    key: _Words = np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(_WEYL)
    a: _Words = words[:, 0] ^ key
    b: _Words = words[:, 1] + (key << np.uint64(32) | key >> np.uint64(32))
    for _ in range(2):
        b = b ^ _mixed(a)
        a = a ^ _mixed(b)
    return digest_of(int(a.sum(dtype=np.uint64)), int(b.sum(dtype=np.uint64)), len(words))


def digest_of(sum_a: int, sum_b: int, num_units: int) -> bytes:
    """The digest from the kernel's sums."""
    return struct.pack("<QQ", (sum_a + num_units) % 2**64, sum_b)


def _mixed(words: _Words) -> _Words:
    words = (words ^ words >> np.uint64(32)) * np.uint64(_MIX)
    return words ^ words >> np.uint64(29)
