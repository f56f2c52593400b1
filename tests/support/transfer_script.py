"""A sender that a test writes by hand, byte by byte, over a real socket."""

from __future__ import annotations

import secrets
import socket

from baton.kv_layout import KVLayout
from kvtransfer.auth import Connector, LinkKey, Session
from kvtransfer.frames import FrameReader, Tagger, encode_frame
from kvtransfer.messages import Message
from tests.support.transfer import SECRET, Worker


class ScriptedSender:
    """Shakes hands with a worker's leader over TCP as worker "p", then says only what it is told to."""

    def __init__(self, destination: Worker, layout: KVLayout) -> None:
        address = destination.leader.endpoint.address
        self.sock = socket.create_connection((address.host, address.port), timeout=10)
        self.heard: list[Message] = []
        self._reader = FrameReader(lambda message, payload_bytes: None, self.heard.append, 2**20)
        self._tagger = Tagger()
        me, peer = LinkKey("p", secrets.token_hex(4), 0), LinkKey(destination.worker_id, destination.incarnation, 0)
        connector = Connector(SECRET, me, layout, peer, "tcp", secrets.token_bytes(32), verify=True)
        self.say(connector.hello)
        proof = connector.receive(self.hear())
        assert proof is not None
        self.say(proof)
        connector.receive(self.hear())
        assert connector.session is not None
        self.session: Session = connector.session
        self._tagger = Tagger(self.session.send_key)
        self._reader.open(self.session.receive_key, 0)

    def frame(self, message: Message, payload_bytes: int = 0) -> bytes:
        """The next frame's head and body; they must be sent."""
        return encode_frame(message, self._tagger, payload_bytes)

    def say(self, message: Message) -> None:
        """Send a message."""
        self.sock.sendall(self.frame(message))

    def hear(self) -> Message:
        """The next message."""
        while not self.heard:
            count = self.sock.recv_into(self._reader.buffers()[0])
            assert count, "the peer closed the connection"
            self._reader.filled(count)
        return self.heard.pop(0)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
