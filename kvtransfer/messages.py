"""What the two ends of a link say to each other: message types, their codes and the check of every field.

A message is a msgpack array of its fields. Decoding accepts exactly the right number of fields of the right types and
sizes; nothing here is an address, an offset or code.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import msgpack

from kvtransfer.api import TransferId

TRANSFER_ID_BYTES: Final = 16
DIGEST_BYTES: Final = 16
NO_DIGEST: Final = bytes(DIGEST_BYTES)
NONCE_BYTES: Final = 32
MAC_BYTES: Final = 32
MAX_TEXT_BYTES: Final = 1024
MAX_NAMED_TRANSFERS: Final = 2048
"""Most transfers that one link may have open at a time, hence named by one heartbeat."""
SMALL_BODY_BYTES: Final = 64 * 1024
"""Limit of every body but those that carry a payload of the caller (Reserve, Manifest)."""
MAX_NAMED_BLOCKS: Final = (SMALL_BODY_BYTES - 128) // 4
"""Most blocks that one Data frame may name; its other fields take less than 128 bytes."""
UNAUTHENTICATED_BODY_BYTES: Final = 8 * 1024


class ProtocolError(Exception):
    """The peer broke the protocol: its link is closed."""


class AbortCode(enum.StrEnum):
    """Why a transfer was ended by the peer."""

    ABORTED = "aborted"
    INTEGRITY = "integrity"
    LEASE = "lease"
    PROTOCOL = "protocol"
    OVERLOADED = "overloaded"
    LOST = "lost"


class Hello(NamedTuple):
    """Connecting side, first: who I am and whom I expect to meet."""

    min_version: int
    max_version: int
    nonce: bytes
    worker_id: str
    incarnation: str
    tp_rank: int
    expected_worker_id: str
    expected_incarnation: str
    expected_tp_rank: int
    transport: str


class Challenge(NamedTuple):
    """Accepting side: who I am, and proof that I hold the secret."""

    version: int
    nonce: bytes
    worker_id: str
    incarnation: str
    tp_rank: int
    mac: bytes


class Proof(NamedTuple):
    """Connecting side: proof that I hold the secret, my layout, and how to read my pool (both covered by the proof)."""

    mac: bytes
    layout: bytes
    verify: bool
    exposed: bytes
    """Opaque, for the transports whose receiver fetches the bytes by itself; else empty."""


class Welcome(NamedTuple):
    """Accepting side: you are in; my layout. Frames from here on are tagged."""

    mac: bytes
    layout: bytes
    verify: bool


class Goodbye(NamedTuple):
    """Either side: this link ends, and why. `code` is one of kvtransfer.auth.RefusalCode during the handshake."""

    code: str
    reason: str


class Reserve(NamedTuple):
    """Sending leader to receiving leader: a transfer wants room. Announces it as well."""

    transfer_id: TransferId
    num_tokens: int
    payload: bytes


class Announce(NamedTuple):
    """Sending rank on its other links: I am a source of this transfer."""

    transfer_id: TransferId
    num_tokens: int


class Grant(NamedTuple):
    """Receiving leader to sending leader: room is held for tokens from `first_token` on."""

    transfer_id: TransferId
    first_token: int


class Refuse(NamedTuple):
    """Receiving leader to sending leader: no room."""

    transfer_id: TransferId
    code: str
    message: str


class Accept(NamedTuple):
    """Receiving rank to one source rank: send tokens from `first_token` on, `window_bytes` at most unacknowledged."""

    transfer_id: TransferId
    first_token: int
    window_bytes: int


class Data(NamedTuple):
    """Units [first_unit, first_unit + num_units) of some layers from one rank to another.

    On a stream the payload follows; on shared memory `source_blocks` (little-endian u32) names the sender's blocks
    that hold the units and the receiver fetches them. From a device the digest may be `NO_DIGEST`: a Seal follows.
    """

    transfer_id: TransferId
    source_rank: int
    destination_rank: int
    first_layer: int
    num_layers: int
    first_unit: int
    num_units: int
    digest: bytes
    source_blocks: bytes


class Seal(NamedTuple):
    """Sending rank: the digest of a Data frame that went without, which its device made while the bytes moved."""

    transfer_id: TransferId
    first_layer: int
    num_layers: int
    first_unit: int
    num_units: int
    digest: bytes


class Credit(NamedTuple):
    """Receiving rank: so many payload bytes of this transfer on this link are consumed since it began."""

    transfer_id: TransferId
    total_bytes: int


class Manifest(NamedTuple):
    """Sending leader to receiving leader: all tokens are computed; `payload` is opaque."""

    transfer_id: TransferId
    payload: bytes


class Complete(NamedTuple):
    """Receiving leader to sending leader: everything is here and verified on every rank."""

    transfer_id: TransferId


class Abort(NamedTuple):
    """Either side, any time: the transfer is over for me."""

    transfer_id: TransferId
    code: str
    reason: str


class Ping(NamedTuple):
    """I live, and these transfers are open here on this link. Answered by `Pong`."""

    transfer_ids: tuple[TransferId, ...]


class Pong(NamedTuple):
    """Answer to `Ping`: these transfers are open here on this link."""

    transfer_ids: tuple[TransferId, ...]


Handshake: TypeAlias = Hello | Challenge | Proof | Welcome | Goodbye
TransferMessage: TypeAlias = (
    Reserve | Announce | Grant | Refuse | Accept | Data | Seal | Credit | Manifest | Complete | Abort | Ping | Pong
)
Message: TypeAlias = Handshake | TransferMessage

_CODES: Final[Mapping[type[Message], int]] = {
    Hello: 1,
    Challenge: 2,
    Proof: 3,
    Welcome: 4,
    Goodbye: 5,
    Reserve: 16,
    Announce: 17,
    Grant: 18,
    Refuse: 19,
    Accept: 20,
    Data: 21,
    Credit: 22,
    Manifest: 23,
    Complete: 24,
    Abort: 25,
    Ping: 26,
    Pong: 27,
    Seal: 28,
}
_TYPES: Final[Mapping[int, type[Message]]] = {code: cls for cls, code in _CODES.items()}
_UNLIMITED: Final = frozenset({_CODES[Reserve], _CODES[Manifest]})
_HANDSHAKE: Final = frozenset(_CODES[cls] for cls in (Hello, Challenge, Proof, Welcome, Goodbye))

Check: TypeAlias = Callable[[object], bool]


def _uint(limit: int) -> Check:
    return lambda value: type(value) is int and 0 <= value < limit


def _bytes(length: int) -> Check:
    return lambda value: type(value) is bytes and len(value) == length


def _blob(value: object) -> bool:
    return type(value) is bytes


def _text(value: object) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT_BYTES


def _flag(value: object) -> bool:
    return type(value) is bool


def _ids(value: object) -> bool:
    return type(value) is tuple and len(value) <= MAX_NAMED_TRANSFERS and all(_id(item) for item in value)


_u32 = _uint(2**32)
_u63 = _uint(2**63)
_id = _bytes(TRANSFER_ID_BYTES)
_nonce = _bytes(NONCE_BYTES)
_mac = _bytes(MAC_BYTES)
_digest = _bytes(DIGEST_BYTES)

_FIELDS: Final[Mapping[type[Message], tuple[Check, ...]]] = {
    Hello: (_u32, _u32, _nonce, _text, _text, _u32, _text, _text, _u32, _text),
    Challenge: (_u32, _nonce, _text, _text, _u32, _mac),
    Proof: (_mac, _blob, _flag, _blob),
    Welcome: (_mac, _blob, _flag),
    Goodbye: (_text, _text),
    Reserve: (_id, _u32, _blob),
    Announce: (_id, _u32),
    Grant: (_id, _u32),
    Refuse: (_id, _text, _text),
    Accept: (_id, _u32, _u63),
    Data: (_id, _u32, _u32, _u32, _u32, _u32, _u32, _digest, _blob),
    Seal: (_id, _u32, _u32, _u32, _u32, _digest),
    Credit: (_id, _u63),
    Manifest: (_id, _blob),
    Complete: (_id,),
    Abort: (_id, _text, _text),
    Ping: (_ids,),
    Pong: (_ids,),
}


def code_of(message: Message) -> int:
    """The type byte of a frame that carries `message`."""
    return _CODES[type(message)]


def is_handshake(code: int) -> bool:
    """Does this type byte belong to the handshake (or `Goodbye`)?"""
    return code in _HANDSHAKE


def body_limit(code: int, max_control_bytes: int) -> int:
    """Most body bytes that a frame of this type may announce.

    Raises:
        ProtocolError: there is no such type.
    """
    if code not in _TYPES:
        raise ProtocolError(f"unknown frame type {code}")
    return max_control_bytes if code in _UNLIMITED else min(SMALL_BODY_BYTES, max_control_bytes)


def encode_body(message: Message) -> bytes:
    """The msgpack array of the message's fields."""
    body: bytes = msgpack.packb(message)
    return body


def decode_body(code: int, body: bytes | bytearray | memoryview) -> Message:
    """The message that `body` holds.

    Raises:
        ProtocolError: not exactly the fields of type `code`, each within its bounds.
    """
    cls = _TYPES.get(code)
    if cls is None:
        raise ProtocolError(f"unknown frame type {code}")
    try:
        values = msgpack.unpackb(body, use_list=False, max_ext_len=0, max_map_len=0)
    except (ValueError, msgpack.UnpackException) as error:  # the library's own errors derive from these
        raise ProtocolError(f"{cls.__name__}: not msgpack") from error
    checks = _FIELDS[cls]
    if type(values) is not tuple or len(values) != len(checks):
        raise ProtocolError(f"{cls.__name__}: expected {len(checks)} fields")
    for index, (check, value) in enumerate(zip(checks, values, strict=True)):
        if not check(value):
            raise ProtocolError(f"{cls.__name__}: bad {cls._fields[index]}")
    return cls(*values)
