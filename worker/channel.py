"""Bounded message channels between the processes of one worker: ZeroMQ PAIR over ipc, msgpack bodies.

The sockets lie in the worker's private directory (0700), so file permissions say who may connect.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack
import zmq

_MAX_QUEUED: Final = 100_000
_MAX_BYTES: Final = 64 * 2**20


def endpoint(worker_dir: str, name: str) -> str:
    """The address of one channel of a worker."""
    return f"ipc://{worker_dir}/{name}.zmq"


def configure(socket: zmq.Socket[Any]) -> None:
    """Bounds that every channel shares. LINGER lets a last report out, but never holds up an exit for long."""
    socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
    socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_BYTES)
    socket.setsockopt(zmq.LINGER, 200)


def pack(message: Any) -> bytes:
    """One message body."""
    packed = msgpack.packb(message)
    assert isinstance(packed, bytes)
    return packed


def unpack(body: bytes) -> Any:
    """Back from `pack`; lists come back as lists."""
    return msgpack.unpackb(body, strict_map_key=False)


class Channel:
    """One end of a channel, for a thread that blocks. Not thread-safe: one owner."""

    def __init__(self, context: zmq.Context[Any], address: str, *, bind: bool) -> None:
        self.socket = context.socket(zmq.PAIR)
        configure(self.socket)
        if bind:
            self.socket.bind(address)
        else:
            self.socket.connect(address)

    def send(self, message: Any) -> None:
        """Queue one message.

        Raises:
            zmq.Again: the other end has not read for _MAX_QUEUED messages; the worker is broken.
        """
        self.socket.send(pack(message), zmq.NOBLOCK)

    def receive(self) -> Any:
        """Block for the next message."""
        return unpack(self.socket.recv())

    def drain(self) -> list[Any]:
        """Every message that is there."""
        messages: list[Any] = []
        while True:
            try:
                messages.append(unpack(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def close(self) -> None:
        """Free the socket. Idempotent."""
        self.socket.close()
