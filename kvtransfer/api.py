"""What the transfer layer offers a rank's engine thread.

Each rank has one `TransferEndpoint`. Its transfer thread owns sockets, credits and the bytes of blocks that are being
received; the engine thread owns the block ledger. They exchange messages: methods here post and return at once,
`poll` hands back events. The same transfer id is used by all ranks of both workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NewType, Protocol, TypeAlias, runtime_checkable

from baton.kv_layout import KVLayout
from baton.tls import ClusterIdentity

TransferId = NewType("TransferId", bytes)
"""16 random bytes, drawn by the sending leader for each attempt to transfer."""


@runtime_checkable
class Ready(Protocol):
    """An event of a device, for example a torch.cuda.Event, that nobody records again before it has fired."""

    def query(self) -> bool:
        """Has all the work before it ended? Never blocks; any thread."""
        ...


@dataclass(frozen=True, slots=True)
class PeerRank:
    """One rank of a worker, as a peer reaches it."""

    tp_rank: int
    host: str
    port: int
    unix_path: str = ""
    """A Unix socket for shared memory, or "". Tried first where its directory exists, which says that the peer is on this
    machine; falling back to TCP is then reported, never silent."""


@dataclass(frozen=True, slots=True)
class PeerWorker:
    """All ranks of a worker, and which start of it this is."""

    worker_id: str
    incarnation: str
    ranks: tuple[PeerRank, ...]


@dataclass(frozen=True, slots=True)
class SendRequest:
    """A transfer that this worker wants to make. `reserve_payload` is opaque; only the two leaders read it."""

    transfer_id: TransferId
    peer: PeerWorker
    num_tokens: int
    block_table: tuple[int, ...]
    """Source blocks in this worker's pool (the same ids on all its ranks)."""
    reserve_payload: bytes = b""


# Events, from the endpoint to its engine thread.


@dataclass(frozen=True, slots=True)
class ReserveRequested:
    """Receiving leader only: a peer asks for room. Answer with `grant` (on every rank) or `refuse`."""

    transfer_id: TransferId
    peer_worker_id: str
    num_tokens: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Granted:
    """Sending leader only: the receiver holds blocks and needs tokens from `first_token` on."""

    transfer_id: TransferId
    first_token: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Sending leader only: no room there; the source stays as it is. `code` is an error code of baton.errors."""

    transfer_id: TransferId
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Received:
    """Receiving rank: its bitmap is full and every byte verified in place."""

    transfer_id: TransferId
    num_bytes: int
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class ManifestReceived:
    """Receiving leader only: what the sending leader said in `finish`. May come before or after `Received`."""

    transfer_id: TransferId
    payload: bytes


@dataclass(frozen=True, slots=True)
class Completed:
    """Sending leader only: the receiving leader said `complete`; the source blocks are needed no more."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Failed:
    """Either side: the transfer is dead here (peer lost, aborted by the peer, lease lapsed, bytes did not verify).

    No byte of it will be written or read any more on this rank: `Quiesced` is implied.
    """

    transfer_id: TransferId
    reason: str
    integrity: bool = False


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Answer to `abort`: this rank neither reads nor writes the transfer's blocks any more."""

    transfer_id: TransferId


class CorruptPool(Exception):
    """KV in this rank's pool is not what the engine wrote: no peer may have it, and the process should end."""


TransferEvent: TypeAlias = (
    ReserveRequested | Granted | Refused | Received | ManifestReceived | Completed | Failed | Quiesced
)


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """Counters since start, and what is open now.

    After quiescence `open_sends` and `open_receives` are 0; links stay for the next transfer until `close`.
    """

    open_sends: int
    open_receives: int
    open_links: int
    bytes_sent: int
    bytes_received: int
    frames_verified: int
    integrity_failures: int
    stale_frames_dropped: int
    transports: dict[str, str]
    """Peer rank -> "tcp" | "tcp+tls" | "shm" | "nixl" | "cuda_ipc" | "local"."""


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A link that this rank sends KV on was made, or could not be made, or is lost."""

    worker_id: str
    incarnation: str
    tp_rank: int
    """Of the peer; -1: no rank, the whole worker can not be sent to."""
    transport: str
    """How KV travels: "tcp" | "tcp+tls" | "shm" | "nixl" | "cuda_ipc" | "local"; "": there is no link."""
    reason: str = ""
    """Why there is none."""


class TransferEndpoint(Protocol):
    """One rank's end of all its transfers. Every method posts and returns at once; engine thread only."""

    @property
    def address(self) -> PeerRank:
        """Where peers reach this rank."""
        ...

    def connect(self, peer: PeerWorker) -> None:
        """Make the links that transfers to this peer will need, so that the first one finds them. Any thread."""
        ...

    def set_on_link(self, on_link: Callable[[LinkReport], None]) -> None:
        """`on_link` is called from the transfer thread whenever a link that this rank sends on comes or goes."""
        ...

    def open_send(self, request: SendRequest) -> None:
        """Make a transfer known. On the leader (tp_rank 0) this sends the reserve request."""
        ...

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int, ready: Ready | None = None) -> None:
        """KV of `layer` (None: of every layer) for tokens [0, num_tokens) is in the pool, or on a device will be once `ready` fired.

        Its digests are made here, on the caller's thread, unless they are known from an earlier transfer: then a step that
        announces a layer has read what they are of, and they are checked. Full units go out as credits allow. Events fire
        in the order of the calls that bring them.

        Raises:
            CorruptPool: KV that an earlier transfer announced is not what it was.
        """
        ...

    def will_write(self, block_table: Sequence[int], first_token: int, end_token: int) -> None:
        """The engine is about to write KV of tokens [first_token, end_token) of a sequence with these blocks.

        Every write after which the blocks may be offered must be told of: digests of what was there are kept.
        """
        ...

    def finish(self, transfer_id: TransferId, manifest: bytes) -> None:
        """Leader: all tokens are computed; tell the receiving leader `manifest` (opaque)."""
        ...

    def close_send(self, transfer_id: TransferId) -> None:
        """The transfer is complete: forget it on this rank (followers; the leader does so by itself)."""
        ...

    def grant(self, transfer_id: TransferId, block_table: Sequence[int], num_tokens: int, first_token: int) -> None:
        """Receiver, on every rank: let the peer write tokens [first_token, num_tokens) into these blocks."""
        ...

    def refuse(self, transfer_id: TransferId, code: str, message: str) -> None:
        """Receiving leader: no."""
        ...

    def complete(self, transfer_id: TransferId) -> None:
        """Receiving leader: every rank has Received and the manifest is there. Tells the sender; forgets it."""
        ...

    def close_receive(self, transfer_id: TransferId) -> None:
        """Receiving follower: the leader completed; forget it."""
        ...

    def abort(self, transfer_id: TransferId, reason: str) -> None:
        """End a transfer in any state, on either side; idempotent; the peer is told. Answered by `Quiesced`."""
        ...

    def poll(self) -> list[TransferEvent]:
        """Events since the last call. Never blocks.

        Raises:
            CorruptPool: a peer refused KV, and in this pool it is not what was written.
        """
        ...

    def set_wakeup(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the transfer thread whenever `poll` would return something."""
        ...

    def stats(self) -> EndpointStats:
        """A snapshot; callable from any thread."""
        ...

    def close(self) -> None:
        """End every transfer, close every socket and join the thread. Idempotent. Blocks for at most 2 s."""
        ...


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """How a rank's endpoint behaves."""

    worker_id: str
    incarnation: str
    layout: KVLayout
    secret: bytes = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 0
    unix_dir: str = ""
    """Private directory for the Unix socket; "" turns shared memory and CUDA IPC off."""
    transports: tuple[str, ...] = ("shm", "tcp")
    """In order of preference. "tcp+tls" needs `identity` and excludes "tcp" and "nixl", which do not encrypt."""
    identity: ClusterIdentity | None = None
    credit_bytes: int = 128 * 2**20
    """Receiver: most bytes of one transfer that one source rank may have under way."""
    lease_s: float = 10.0
    """Without progress or a heartbeat from the peer for so long, a transfer fails."""
    max_control_bytes: int = 8 * 2**20
    verify: bool = True
