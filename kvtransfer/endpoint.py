"""A rank's end of all its transfers, as the engine thread sees it. Knows no sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence

from baton.clock import Clock, SystemClock
from baton.kv_layout import UNIT_TOKENS, DeviceMemory
from kvtransfer.api import (
    Completed,
    CorruptPool,
    EndpointConfig,
    EndpointStats,
    Failed,
    LinkReport,
    PeerRank,
    PeerWorker,
    Quiesced,
    Ready,
    Refused,
    SendRequest,
    TransferEndpoint,
    TransferEvent,
    TransferId,
)
from kvtransfer.cuda.driver import CudaDriver, CudaError
from kvtransfer.cuda.libcuda import LibCuda
from kvtransfer.digests import LeafDigests, SourceDigests
from kvtransfer.faults import FaultHook
from kvtransfer.messages import TRANSFER_ID_BYTES
from kvtransfer.pool import DevicePool, Pool
from kvtransfer.switchboard import Listener
from kvtransfer.thread import TransferThread
from kvtransfer.transports import cuda_ipc, local, nixl, shm, tcp, tls

log = logging.getLogger("kvtransfer")

_CLOSE_S = 2.0
_BODY_OVERHEAD_BYTES = 64


class Endpoint:
    """The TransferEndpoint over sockets and shared memory. Engine thread only, but for `stats`.

    Owns its thread, listeners and connections until `close`; the pool's memory stays the caller's.
    """

    def __init__(
        self,
        config: EndpointConfig,
        kv_buffer: memoryview | DeviceMemory,
        kv_fd: int | None = None,
        *,
        clock: Clock | None = None,
        faults: FaultHook | None = None,
        cuda: CudaDriver | None = None,
    ) -> None:
        """Listen and start the thread. `cuda`: for a pool on a device, closed with the endpoint; None: NVIDIA's.

        Raises:
            ValueError: the configuration can not work.
            OSError: an address can not be listened on.
        """
        _check(config, isinstance(kv_buffer, DeviceMemory))
        self._config = config
        self._unix_path = ""
        self._unsaid_bytes = 0
        """Written to the pool since the transfer thread was last woken for it."""
        pool: LeafDigests | DevicePool
        self._digests: LeafDigests | None = None
        self._sources: SourceDigests | None = None
        if isinstance(kv_buffer, DeviceMemory):
            pool = DevicePool(config.layout, kv_buffer.address, kv_buffer.num_bytes)
        else:
            pool = self._digests = LeafDigests(config.layout, Pool(config.layout, kv_buffer))
            self._sources = SourceDigests(config.layout, pool) if config.verify else None
        listeners: dict[str, Listener] = {}
        agent, exposed = _open_agent(config, kv_buffer, cuda)
        try:
            self._address = self._listen(listeners)
            shared_fd = _shareable(config, kv_fd)
            self._thread = TransferThread(
                config, pool, shared_fd, listeners, clock or SystemClock(), faults, agent, exposed
            )
        except BaseException:
            for listener in listeners.values():
                listener.close()
            if isinstance(agent, cuda_ipc.Agent):
                agent.close()
            self._unlink()
            raise
        self._runner = threading.Thread(
            target=self._thread.run, name=f"kvtransfer-{config.worker_id}-{config.layout.tp_rank}", daemon=True
        )
        self._runner.start()

    def _listen(self, listeners: dict[str, Listener]) -> PeerRank:
        config = self._config
        rank, host, port = config.layout.tp_rank, config.host, 0
        names = {tcp.NAME if name == nixl.NAME else name for name in config.transports}
        for name in names & {tcp.NAME, tls.NAME}:
            sock = listeners[name] = tcp.listen(config.host, config.port)
            port = sock.getsockname()[1]
        if local.NAME in config.transports:
            listener = listeners[local.NAME] = local.LocalListener()
            host, port = local.HOST, listener.port
        if {shm.NAME, cuda_ipc.NAME} & set(config.transports) and config.unix_dir:
            listeners[shm.NAME], self._unix_path = shm.listen(config.unix_dir, rank)
        return PeerRank(rank, host, port, self._unix_path)

    @property
    def address(self) -> PeerRank:
        """Where peers reach this rank. `host` is the configured one: replace a wildcard before publishing it."""
        return self._address

    def connect(self, peer: PeerWorker) -> None:
        """Make the links that transfers to this peer will need. Any thread."""
        self._thread.post(self._thread.connect, peer)

    def set_on_link(self, on_link: Callable[[LinkReport], None]) -> None:
        """`on_link` hears, on the transfer thread, of links that this rank sends on."""
        self._thread.on_link = on_link

    def open_send(self, request: SendRequest) -> None:
        """Make a transfer known; see TransferEndpoint.

        Raises:
            ValueError: the request contradicts this rank's pool.
        """
        self._check_id(request.transfer_id)
        self._check_table(request.block_table, request.num_tokens)
        self._check_payload(request.reserve_payload)
        if self._sources is not None:
            self._sources.open(request)
        self._thread.post(self._thread.now_do, self._thread.send.open, request)

    def written(self, transfer_id: TransferId, layer: int | None, num_tokens: int, ready: Ready | None = None) -> None:
        """KV of `layer` (None: of every layer) for tokens [0, num_tokens) is in the pool, once `ready` has fired.

        Raises:
            ValueError: no such layer, or a pool in host memory whose KV is still to come.
            CorruptPool: KV of a cached prefix is not what was written.
        """
        layout = self._config.layout
        if ready is not None and self._digests is not None:
            raise ValueError("KV in host memory must be there when it is announced")
        is_urgent = layer is None or layer == len(layout.model.layers) - 1
        if layer is not None:
            if not 0 <= layer < len(layout.model.layers):
                raise ValueError(f"no layer {layer}")
            self._unsaid_bytes += layout.block_bytes(layer) * num_tokens // layout.geometry.block_size
            is_urgent = is_urgent or self._unsaid_bytes >= self._thread.wake_bytes
        if is_urgent:
            self._unsaid_bytes = 0
        if self._sources is not None:
            self._sources.written(transfer_id, layer, num_tokens)
        self._thread.post(self._thread.written, transfer_id, layer, num_tokens, ready, is_urgent=is_urgent)

    def will_write(self, block_table: Sequence[int], first_token: int, end_token: int) -> None:
        """The engine is about to write KV of these tokens: their digests are forgotten."""
        if self._sources is not None:
            self._sources.will_write(block_table, first_token, end_token)

    def finish(self, transfer_id: TransferId, manifest: bytes) -> None:
        """Leader: all tokens are computed; tell the receiving leader."""
        self._check_payload(manifest)
        self._thread.post(self._thread.send.finish, transfer_id, manifest)

    def close_send(self, transfer_id: TransferId) -> None:
        """The transfer is complete: forget it on this rank."""
        if self._sources is not None:
            self._sources.close(transfer_id)
        self._thread.post(self._thread.now_do, self._thread.send.close, transfer_id)

    def grant(self, transfer_id: TransferId, block_table: Sequence[int], num_tokens: int, first_token: int) -> None:
        """Let the peer write tokens [first_token, num_tokens) into these blocks.

        Raises:
            ValueError: the grant contradicts this rank's pool.
        """
        self._check_id(transfer_id)
        self._check_table(block_table, num_tokens)
        if first_token % UNIT_TOKENS or not 0 <= first_token <= num_tokens:
            raise ValueError(f"first_token {first_token} is not a multiple of {UNIT_TOKENS} in 0..{num_tokens}")
        receive = self._thread.receive
        self.will_write(block_table, first_token, num_tokens)
        self._thread.post(self._thread.now_do, receive.grant, transfer_id, tuple(block_table), num_tokens, first_token)

    def refuse(self, transfer_id: TransferId, code: str, message: str) -> None:
        """Receiving leader: no."""
        self._thread.post(self._thread.now_do, self._thread.receive.refuse, transfer_id, code, message)

    def complete(self, transfer_id: TransferId) -> None:
        """Receiving leader: every rank has Received and the manifest is there."""
        self._thread.post(self._thread.now_do, self._thread.receive.complete, transfer_id)

    def close_receive(self, transfer_id: TransferId) -> None:
        """Receiving follower: the leader completed; forget it."""
        self._thread.post(self._thread.now_do, self._thread.receive.close, transfer_id)

    def abort(self, transfer_id: TransferId, reason: str) -> None:
        """End a transfer in any state, on either side; answered by one `Quiesced`."""
        self._thread.post(self._thread.now_do, self._thread.abort, transfer_id, reason)

    def poll(self) -> list[TransferEvent]:
        """Events since the last call.

        Raises:
            CorruptPool: a peer refused KV, and in this pool it is not what was written.
            RuntimeError: the transfer thread died of a defect; the process should end.
        """
        events: list[TransferEvent] = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._thread.events.get_nowait())
                self._ended(events[-1])
        if not events and self._thread.failure is not None:
            raise RuntimeError("the transfer thread died") from self._thread.failure
        return events

    def _ended(self, event: TransferEvent) -> None:
        """Forget what was offered in a transfer that is over."""
        if self._sources is None or not isinstance(event, (Completed, Refused, Failed, Quiesced)):
            return
        if isinstance(event, Failed) and event.integrity and not self._sources.is_intact(event.transfer_id):
            raise CorruptPool("KV in this worker's pool is not what was written there")
        self._sources.close(event.transfer_id)

    def set_wakeup(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the transfer thread whenever `poll` would return something."""
        self._thread.on_events = wake
        if not self._thread.events.empty():
            wake()

    def stats(self) -> EndpointStats:
        """A snapshot; callable from any thread."""
        return self._thread.stats()

    def close(self) -> None:
        """End every transfer, close every socket and join the thread."""
        if self._runner.is_alive():
            self._thread.post(self._thread.close)
            self._runner.join(_CLOSE_S)
            if self._runner.is_alive():
                log.error("the transfer thread did not end", extra={"worker_id": self._config.worker_id})
        if self._digests is not None and not self._runner.is_alive():
            self._digests.pool.release()
        self._unlink()

    def _unlink(self) -> None:
        if self._unix_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._unix_path)

    def _check_id(self, transfer_id: TransferId) -> None:
        if len(transfer_id) != TRANSFER_ID_BYTES:
            raise ValueError(f"a transfer id has {TRANSFER_ID_BYTES} bytes")

    def _check_table(self, block_table: Sequence[int], num_tokens: int) -> None:
        geometry = self._config.layout.geometry
        if not 0 < num_tokens <= len(block_table) * geometry.block_size:
            raise ValueError(f"{len(block_table)} blocks do not hold {num_tokens} tokens")
        if not all(0 <= block < geometry.num_blocks for block in block_table):
            raise ValueError(f"a block id is outside 0..{geometry.num_blocks - 1}")

    def _check_payload(self, payload: bytes) -> None:
        limit = self._config.max_control_bytes - _BODY_OVERHEAD_BYTES
        if len(payload) > limit:
            raise ValueError(f"a control payload may have {limit} bytes, this one has {len(payload)}")


def make_endpoint(
    config: EndpointConfig,
    kv_buffer: memoryview | DeviceMemory,
    kv_fd: int | None = None,
    *,
    clock: Clock | None = None,
    faults: FaultHook | None = None,
) -> TransferEndpoint:
    """One rank's endpoint over its KV pool: `kv_buffer` in the canonical layout, `kv_fd` the memfd behind it.

    A pool on a device is read by CUDA IPC and by nothing else. Without `kv_fd` this rank can not send by shared memory. Raises as `Endpoint`.
    """
    return Endpoint(config, kv_buffer, kv_fd, clock=clock, faults=faults)


def _check(config: EndpointConfig, is_on_device: bool) -> None:
    known = {tcp.NAME, tls.NAME, shm.NAME, nixl.NAME, cuda_ipc.NAME, local.NAME}
    if not config.transports or not set(config.transports) <= known:
        raise ValueError(f"transports must be some of {sorted(known)}, not {config.transports}")
    if is_on_device and set(config.transports) != {cuda_ipc.NAME}:
        raise ValueError(f"the KV pool is on a CUDA device, which only {cuda_ipc.NAME} reads, not {config.transports}")
    if cuda_ipc.NAME in config.transports and not is_on_device:
        raise ValueError(f"transport {cuda_ipc.NAME} needs a KV pool on a CUDA device; this engine's is in host memory")
    if is_on_device and not config.unix_dir:
        raise ValueError(f"transport {cuda_ipc.NAME} needs a directory for its Unix socket")
    if tls.NAME in config.transports:
        if config.identity is None:
            raise ValueError(f"{tls.NAME} needs an identity")
        if clear := {tcp.NAME, nixl.NAME} & set(config.transports):
            raise ValueError(f"{tls.NAME} beside {clear.pop()}: KV would be encrypted or not, as it comes")
    if not config.secret:
        raise ValueError("the cluster secret is empty")
    if not config.verify:
        log.warning("KV digests are off on this rank", extra={"worker_id": config.worker_id})


def _shareable(config: EndpointConfig, kv_fd: int | None) -> int | None:
    """The pool's descriptor if it can be passed to peers."""
    if kv_fd is None or shm.NAME not in config.transports:
        return None
    problem = shm.seal(kv_fd, config.layout.pool_bytes)
    if problem is not None:
        log.warning("the KV pool can not be shared: sending by shared memory is off", extra={"problem": problem})
        return None
    return kv_fd


def _open_agent(
    config: EndpointConfig, kv_buffer: memoryview | DeviceMemory, cuda: CudaDriver | None
) -> tuple[nixl.Agent | cuda_ipc.Agent | None, bytes]:
    """The agent of NIXL or CUDA IPC and what it tells peers of the pool, if either is wanted."""
    if isinstance(kv_buffer, DeviceMemory):
        try:
            device = cuda_ipc.Agent(cuda or LibCuda(kv_buffer.ordinal), kv_buffer, config.layout)
        except CudaError as error:
            raise ValueError(f"transport {cuda_ipc.NAME} does not work here: {error}") from error
        return device, device.exposed
    if nixl.NAME not in config.transports:
        return None, b""
    name = nixl.agent_name(config.worker_id, config.incarnation, config.layout.tp_rank)
    agent = nixl.Agent(name, config.host)
    return agent, agent.expose(kv_buffer, config.layout.pool_bytes)
