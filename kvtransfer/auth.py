"""The handshake: who is there, does it hold the secret, and can our pools exchange KV. Pure; randomness passed in.

    connecting side (sends KV)                     accepting side (receives KV)
    Hello(versions, nonce, me, whom I expect)  ->
                                               <-  Challenge(version, nonce, me, HMAC "acceptor")
    Proof(HMAC "connector", layout, exposed)   ->
                                               <-  Welcome(HMAC "welcome", layout)
    and from either side, at any point: Goodbye(code, reason)

Every HMAC (SHA-256 over the cluster secret) covers the whole Hello and Challenge, so both nonces, names, incarnations,
ranks, the version and the transport; a fixed context string and the purpose keep them apart. Each direction then
gets its own key for the tags of its frames, so everything after Welcome is authenticated frame by frame.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgpack

from baton.errors import LayoutMismatch
from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.messages import Challenge, Hello, Message, Proof, ProtocolError, Welcome
from kvtransfer.plan import CopyPlan, plan_copies

MIN_VERSION: Final = 5
MAX_VERSION: Final = 5
_CONTEXT: Final = b"baton kv transfer handshake v1"
_MAX_LAYERS: Final = 4096
_MAX_COUNT: Final = 2**31


class RefusalCode(enum.StrEnum):
    """Why a handshake failed. Both ends log it, and a transfer that needed the link fails with it."""

    VERSION = "version"
    SECRET = "secret"
    ADDRESS = "address"
    LAYOUT = "layout"
    TRANSPORT = "transport"
    PROTOCOL = "protocol"


class Refusal(Exception):
    """The handshake must not succeed. `reason` may be told to the peer."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class LinkKey(NamedTuple):
    """A peer's rank in one life of its worker."""

    worker_id: str
    incarnation: str
    tp_rank: int

    def __str__(self) -> str:
        return f"{self.worker_id}#{self.tp_rank}"


@dataclass(frozen=True, slots=True)
class Session:
    """What both ends know once they have shaken hands."""

    peer: LinkKey
    plan: CopyPlan
    verify: bool
    """Digests are made and checked: true if either end wants them."""
    context: bytes
    """16 bytes over both ends' identities; part of every digest on the link."""
    send_key: bytes
    receive_key: bytes


class _Keys:
    """What the secret makes of one Hello and one Challenge."""

    def __init__(self, secret: bytes, hello: Hello, challenge: Challenge) -> None:
        self._secret = secret
        told = challenge._replace(mac=bytes(32))
        self._transcript = hashlib.sha256(msgpack.packb([hello, told])).digest()

    def derive(self, purpose: bytes, extra: bytes = b"") -> bytes:
        """32 bytes that only a holder of the secret can compute."""
        return hmac.new(self._secret, _CONTEXT + b"\0" + purpose + b"\0" + self._transcript + extra, "sha256").digest()

    def check(self, mac: bytes, purpose: bytes, extra: bytes = b"") -> None:
        """Raise Refusal unless `mac` is what `derive` gives, in constant time."""
        if not hmac.compare_digest(mac, self.derive(purpose, extra)):
            raise Refusal(RefusalCode.SECRET, "the peer does not hold this cluster's secret")

    def session(self, peer: LinkKey, plan: CopyPlan, *, verify: bool, is_connector: bool) -> Session:
        keys = (self.derive(b"key to acceptor"), self.derive(b"key to connector"))
        send, receive = keys if is_connector else keys[::-1]
        return Session(peer, plan, verify, self.derive(b"digest context")[:16], send, receive)


def _proof_extra(layout: bytes, verify: bool, exposed: bytes = b"") -> bytes:
    return bytes([verify]) + len(exposed).to_bytes(4, "little") + exposed + layout


class Connector:
    """The connecting side's handshake. Raises Refusal (tell the peer, close) or ProtocolError (close)."""

    def __init__(
        self,
        secret: bytes,
        me: LinkKey,
        layout: KVLayout,
        peer: LinkKey,
        transport: str,
        nonce: bytes,
        *,
        verify: bool,
        exposed: bytes = b"",
    ) -> None:
        """`exposed`: how the peer may read this rank's pool, where the transport needs it."""
        self._secret = secret
        self._layout = layout
        self._peer = peer
        self._verify = verify
        self._exposed = exposed
        self._keys: _Keys | None = None
        self.hello: Final = Hello(MIN_VERSION, MAX_VERSION, nonce, *me, *peer, transport)
        self.session: Session | None = None

    def receive(self, message: Message) -> Proof | None:
        """Take the peer's next message: Challenge gives a Proof; Welcome sets `session`."""
        if isinstance(message, Challenge) and self._keys is None:
            if not MIN_VERSION <= message.version <= MAX_VERSION:
                raise Refusal(RefusalCode.VERSION, f"version {message.version} was not offered")
            if (message.worker_id, message.incarnation, message.tp_rank) != self._peer:
                raise Refusal(RefusalCode.ADDRESS, "another worker answers at this address")
            self._keys = _Keys(self._secret, self.hello, message)
            self._keys.check(message.mac, b"acceptor")
            layout = encode_layout(self._layout)
            mac = self._keys.derive(b"connector", _proof_extra(layout, self._verify, self._exposed))
            return Proof(mac, layout, self._verify, self._exposed)
        if isinstance(message, Welcome) and self._keys is not None and self.session is None:
            self._keys.check(message.mac, b"welcome", _proof_extra(message.layout, message.verify))
            plan = _plan(self._layout, decode_layout(message.layout))
            _check_rank(plan.destination, self._peer)
            verify = self._verify or message.verify
            self.session = self._keys.session(self._peer, plan, verify=verify, is_connector=True)
            return None
        raise ProtocolError(f"unexpected {type(message).__name__} in the handshake")


class Acceptor:
    """The accepting side's handshake. Raises Refusal (tell the peer, close) or ProtocolError (close)."""

    def __init__(
        self, secret: bytes, me: LinkKey, layout: KVLayout, transports: tuple[str, ...], nonce: bytes, *, verify: bool
    ) -> None:
        """`transports`: what may be spoken at the address where the peer has called."""
        self._secret = secret
        self._me = me
        self._layout = layout
        self._transports = transports
        self._nonce = nonce
        self._verify = verify
        self._hello: Hello | None = None
        self._keys: _Keys | None = None
        self.session: Session | None = None
        self.exposed = b""
        """What the peer said of its pool; authenticated once there is a session."""

    def receive(self, message: Message) -> Challenge | Welcome:
        """Take the peer's next message: Hello gives a Challenge, Proof gives a Welcome and sets `session`."""
        if isinstance(message, Hello) and self._hello is None:
            return self._challenge(message)
        if isinstance(message, Proof) and self._keys is not None and self.session is None:
            return self._welcome(message)
        raise ProtocolError(f"unexpected {type(message).__name__} in the handshake")

    def _challenge(self, hello: Hello) -> Challenge:
        version = min(hello.max_version, MAX_VERSION)
        if version < max(hello.min_version, MIN_VERSION):
            raise Refusal(RefusalCode.VERSION, f"versions {MIN_VERSION}..{MAX_VERSION} are spoken here")
        if hello.transport not in self._transports:
            raise Refusal(RefusalCode.TRANSPORT, f"this is a {' and '.join(self._transports)} address")
        if (hello.expected_worker_id, hello.expected_incarnation, hello.expected_tp_rank) != self._me:
            raise Refusal(RefusalCode.ADDRESS, "another worker answers at this address")
        self._hello = hello
        challenge = Challenge(version, self._nonce, *self._me, bytes(32))
        self._keys = _Keys(self._secret, hello, challenge)
        return challenge._replace(mac=self._keys.derive(b"acceptor"))

    def _welcome(self, proof: Proof) -> Welcome:
        hello, keys = self._hello, self._keys
        assert hello is not None
        assert keys is not None
        keys.check(proof.mac, b"connector", _proof_extra(proof.layout, proof.verify, proof.exposed))
        self.exposed = proof.exposed
        peer = LinkKey(hello.worker_id, hello.incarnation, hello.tp_rank)
        plan = _plan(decode_layout(proof.layout), self._layout)
        _check_rank(plan.source, peer)
        self.session = keys.session(peer, plan, verify=proof.verify or self._verify, is_connector=False)
        layout = encode_layout(self._layout)
        return Welcome(keys.derive(b"welcome", _proof_extra(layout, self._verify)), layout, self._verify)


def _plan(source: KVLayout, destination: KVLayout) -> CopyPlan:
    try:
        return plan_copies(source, destination)
    except LayoutMismatch as error:
        raise Refusal(RefusalCode.LAYOUT, error.message) from error


def _check_rank(layout: KVLayout, key: LinkKey) -> None:
    if layout.tp_rank != key.tp_rank:
        raise Refusal(RefusalCode.PROTOCOL, "the layout is another rank's")


def encode_layout(layout: KVLayout) -> bytes:
    """A rank's identity and geometry for the wire; equal neighbouring layers are written once."""
    runs: list[list[int]] = []
    for spec in layout.model.layers:
        if runs and runs[-1][1:] == [spec.num_kv_heads, spec.head_dim]:
            runs[-1][0] += 1
        else:
            runs.append([1, spec.num_kv_heads, spec.head_dim])
    model, geometry = layout.model, layout.geometry
    fields = [runs, model.dtype, model.fingerprint, model.hash_version]
    fields += [geometry.tp_size, geometry.block_size, geometry.num_blocks, layout.tp_rank]
    packed: bytes = msgpack.packb(fields)
    return packed


def decode_layout(packed: bytes) -> KVLayout:
    """The inverse of `encode_layout`.

    Raises:
        ProtocolError: not a layout, or one with impossible sizes.
    """
    try:
        fields = msgpack.unpackb(packed, max_ext_len=0, max_map_len=0)
        runs, dtype, fingerprint, hash_version, tp_size, block_size, num_blocks, tp_rank = fields
        _check_counts((hash_version, tp_size, block_size, num_blocks))
        layers: list[LayerSpec] = []
        for count, num_kv_heads, head_dim in runs:
            _check_counts((count, num_kv_heads, head_dim))
            if len(layers) + count > _MAX_LAYERS:
                raise ProtocolError("layout: too many layers")
            layers += [LayerSpec(num_kv_heads, head_dim)] * count
        if not layers or type(dtype) is not str or type(fingerprint) is not str or type(tp_rank) is not int:
            raise ProtocolError("layout: bad field")
        model = ModelKV(tuple(layers), dtype, fingerprint, hash_version)
        return KVLayout(model, KVGeometry(tp_size, block_size, num_blocks), tp_rank)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"layout: {error}") from error


def _check_counts(values: Sequence[object]) -> None:
    if not all(type(value) is int and 0 < value < _MAX_COUNT for value in values):
        raise ProtocolError("layout: a count is out of range")
