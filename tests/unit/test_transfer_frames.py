"""The wire of the transfer layer: encoding is reversible, and no input makes the decoder allocate, hang or crash."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer import messages, pool
from kvtransfer.auth import decode_layout, encode_layout
from kvtransfer.digests import seal
from kvtransfer.frames import HEAD_BYTES, FrameReader, Tagger, encode_frame
from kvtransfer.messages import (
    DIGEST_BYTES,
    MAX_NAMED_TRANSFERS,
    SMALL_BODY_BYTES,
    UNAUTHENTICATED_BODY_BYTES,
    Abort,
    Announce,
    Complete,
    Data,
    Goodbye,
    Manifest,
    Message,
    Ping,
    ProtocolError,
    Reserve,
    body_limit,
    code_of,
    decode_body,
    encode_body,
)
from kvtransfer.pool import copy
from tests.support.transfer import extents_over

KEY = b"k" * 32
ids = st.binary(min_size=16, max_size=16)
u32 = st.integers(0, 2**32 - 1)
u63 = st.integers(0, 2**63 - 1)
text = st.text(max_size=100)
blobs = st.binary(max_size=200)
macs = st.binary(min_size=32, max_size=32)
id_lists = st.lists(ids, max_size=5).map(tuple)
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    messages.Hello: st.tuples(u32, u32, macs, text, text, u32, text, text, u32, text),
    messages.Challenge: st.tuples(u32, macs, text, text, u32, macs),
    messages.Proof: st.tuples(macs, blobs, st.booleans(), st.binary(max_size=40)),
    messages.Welcome: st.tuples(macs, blobs, st.booleans()),
    messages.Goodbye: st.tuples(text, text),
    messages.Reserve: st.tuples(ids, u32, blobs),
    messages.Announce: st.tuples(ids, u32),
    messages.Grant: st.tuples(ids, u32),
    messages.Refuse: st.tuples(ids, text, text),
    messages.Accept: st.tuples(ids, u32, u63),
    messages.Data: st.tuples(ids, u32, u32, u32, u32, u32, u32, ids, blobs),
    messages.Seal: st.tuples(ids, u32, u32, u32, u32, ids),
    messages.Credit: st.tuples(ids, u63),
    messages.Manifest: st.tuples(ids, blobs),
    messages.Complete: st.tuples(ids),
    messages.Abort: st.tuples(ids, text, text),
    messages.Ping: st.tuples(id_lists),
    messages.Pong: st.tuples(id_lists),
}
any_message = st.one_of(*(fields.map(lambda values, cls=cls: cls(*values)) for cls, fields in MESSAGES.items()))


def relaxed(max_examples: int) -> settings:
    """A machine under load is no failure."""
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Recorder:
    """Collects what a reader hands out; payloads land in `payload`."""

    def __init__(self, *, opened: bool = True, max_control_bytes: int = 2**20, max_payload_bytes: int = 4096) -> None:
        self.done: list[Message] = []
        self.payload = bytearray()
        self.num_landed = 0
        self.reader = FrameReader(self._begin, self.done.append, max_control_bytes)
        if opened:
            self.reader.open(KEY, max_payload_bytes)

    def _begin(self, message: Message, payload_bytes: int) -> Recorder:
        self.payload = bytearray(payload_bytes)
        return self

    def views(self) -> list[memoryview]:
        view = memoryview(self.payload)
        middle = len(view) // 3
        return [part for part in (view[:middle], view[middle:]) if part]

    def landed(self, num_bytes: int) -> None:
        self.num_landed += num_bytes

    is_native = False

    def receive(self, fd: int, num_bytes: int) -> int:
        raise NotImplementedError

    def feed(self, stream: bytes, chunk: int = 2**20) -> None:
        """Fill the reader's buffers from a stream, at most `chunk` bytes at a time."""
        at = 0
        while at < len(stream):
            filled = 0
            for view in self.reader.buffers():
                count = min(len(view), chunk - filled, len(stream) - at)
                view[:count] = stream[at : at + count]
                at += count
                filled += count
                if count < len(view):
                    break
            self.reader.filled(filled)


def test_every_message_type_is_covered() -> None:
    assert set(messages._CODES) == set(MESSAGES) == set(messages._FIELDS)
    assert len(set(messages._CODES.values())) == len(messages._CODES)


@relaxed(100)
@given(any_message)
def test_decoding_reverses_encoding(message: Message) -> None:
    decoded = decode_body(code_of(message), encode_body(message))
    assert (type(decoded), decoded) == (type(message), message)


@relaxed(100)
@given(st.lists(st.tuples(any_message, st.binary(max_size=300)), max_size=6), st.integers(1, 400))
def test_a_stream_of_frames_is_read_whatever_its_cuts(frames: list[tuple[Message, bytes]], chunk: int) -> None:
    tagger, recorder = Tagger(KEY), Recorder()
    for message, payload in frames:
        payload = payload if isinstance(message, Data) else b""
        recorder.num_landed = 0
        recorder.feed(encode_frame(message, tagger, len(payload)) + payload, chunk)
        assert recorder.payload == payload
        assert recorder.num_landed == len(payload)
    assert recorder.done == [message for message, _ in frames]


@relaxed(400)
@given(st.binary(max_size=400), st.booleans(), st.integers(1, 400))
def test_random_bytes_are_a_protocol_error_or_wait_for_more(stream: bytes, opened: bool, chunk: int) -> None:
    recorder = Recorder(opened=opened)
    try:
        recorder.feed(stream, chunk)
    except ProtocolError:
        return
    assert recorder.done == []
    assert sum(len(view) for view in recorder.reader.buffers()) <= UNAUTHENTICATED_BODY_BYTES + 2**20


@relaxed(300)
@given(any_message, st.integers(0, 10**6), st.integers(0, 255))
def test_one_changed_byte_of_a_tagged_frame_is_noticed(message: Message, at: int, value: int) -> None:
    frame = bytearray(encode_frame(message, Tagger(KEY)))
    at %= len(frame)
    if frame[at] == value:
        return
    frame[at] = value
    recorder = Recorder()
    try:
        recorder.feed(bytes(frame))
    except ProtocolError:
        return
    assert recorder.done == [], "a changed frame was taken"


@relaxed(400)
@given(st.sampled_from(sorted(messages._TYPES)), st.binary(max_size=200))
def test_random_bodies_are_messages_or_protocol_errors(code: int, body: bytes) -> None:
    try:
        message = decode_body(code, body)
    except ProtocolError:
        return
    assert code_of(message) == code


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | blobs,
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@relaxed(400)
@given(st.sampled_from(sorted(messages._TYPES)), json_like)
def test_msgpack_of_other_shapes_is_refused(code: int, value: object) -> None:
    try:
        message = decode_body(code, msgpack.packb(value))
    except ProtocolError:
        return
    assert code_of(message) == code


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1
        b"\xc6\xff\xff\xff\xff",  # a blob of 4 GiB
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 - 1
        b"\x91" * 4000,  # nested deeper than any stack
        b"\xc9\x00\x00\x00\x01\x05x",  # an extension type
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"",
    ],
)
def test_bodies_that_claim_too_much_are_refused(body: bytes) -> None:
    for code in messages._TYPES:
        with pytest.raises(ProtocolError):
            decode_body(code, body)


def head(code: int, body_bytes: int, payload_bytes: int = 0) -> bytes:
    """A head with a wrong tag: lengths are checked first."""
    return struct.pack("<2sBBII8s", b"BK", 1, code, body_bytes, payload_bytes, bytes(8))


@pytest.mark.parametrize(
    ("code", "body_bytes", "payload_bytes"),
    [
        (code_of(Complete(b"")), SMALL_BODY_BYTES + 1, 0),  # type: ignore[arg-type]
        (code_of(Reserve(b"", 0, b"")), 2**20 + 1, 0),  # type: ignore[arg-type]
        (code_of(Manifest(b"", b"")), 2**32 - 1, 0),  # type: ignore[arg-type]
        (code_of(Goodbye("", "")), UNAUTHENTICATED_BODY_BYTES + 1, 0),
        (code_of(Data(b"", 0, 0, 0, 0, 0, 0, b"", b"")), 50, 4097),  # type: ignore[arg-type]
        (code_of(Complete(b"")), 0, 0),  # type: ignore[arg-type]
        (99, 10, 0),
    ],
)
def test_lengths_over_the_limit_are_refused_by_the_head_alone(code: int, body_bytes: int, payload_bytes: int) -> None:
    recorder = Recorder()
    with pytest.raises(ProtocolError):
        recorder.feed(head(code, body_bytes, payload_bytes))


def test_nothing_is_allocated_for_a_body_before_its_length_is_checked() -> None:
    recorder = Recorder()
    with pytest.raises(ProtocolError):
        recorder.feed(head(code_of(Ping(())), 2**31))
    assert sum(len(view) for view in recorder.reader.buffers()) <= HEAD_BYTES


def test_transfer_frames_before_the_handshake_are_refused_by_the_head_alone() -> None:
    recorder = Recorder(opened=False)
    with pytest.raises(ProtocolError, match="before the handshake"):
        recorder.feed(head(code_of(Ping(())), 10))


def test_a_repeated_or_skipped_frame_breaks_the_stream() -> None:
    tagger = Tagger(KEY)
    first, second = (encode_frame(Ping(()), tagger) for _ in range(2))
    for stream in (first + first, second):
        with pytest.raises(ProtocolError, match="tag"):
            Recorder().feed(stream)


def test_a_frame_under_another_key_breaks_the_stream() -> None:
    with pytest.raises(ProtocolError, match="tag"):
        Recorder().feed(encode_frame(Ping(()), Tagger(b"x" * 32)))


def test_a_payload_on_anything_but_data_is_refused() -> None:
    with pytest.raises(ProtocolError, match="payload"):
        Recorder().feed(encode_frame(Complete(b"i" * 16), Tagger(KEY), 5))  # type: ignore[arg-type]


def test_a_redirected_payload_lands_nowhere_and_the_stream_goes_on() -> None:
    tagger, recorder = Tagger(KEY), Recorder()
    frame = encode_frame(Data(b"i" * 16, 0, 0, 0, 1, 0, 1, bytes(16), b""), tagger, 1000)  # type: ignore[arg-type]
    recorder.feed(frame + b"a" * 400)
    recorder.reader.redirect()
    recorder.feed(b"b" * 600)
    assert recorder.payload == b"a" * 400 + bytes(600)
    recorder.feed(encode_frame(Ping(()), tagger))
    assert recorder.done[-1] == Ping(())


def test_a_heartbeat_of_all_transfers_fits_its_limit() -> None:
    ping = Ping(tuple(bytes(16) for _ in range(MAX_NAMED_TRANSFERS)))  # type: ignore[arg-type]
    body = encode_body(ping)
    assert len(body) <= body_limit(code_of(ping), 2**20)
    assert decode_body(code_of(ping), body) == ping
    with pytest.raises(ProtocolError):
        decode_body(code_of(ping), encode_body(Ping((*ping.transfer_ids, ping.transfer_ids[0]))))


def test_fields_out_of_bounds_are_named() -> None:
    for message, field in (
        (Announce(b"short", 1), "transfer_id"),  # type: ignore[arg-type]
        (Announce(b"i" * 16, -1), "num_tokens"),  # type: ignore[arg-type]
        (Announce(b"i" * 16, True), "num_tokens"),  # type: ignore[arg-type]
        (Abort(b"i" * 16, "c", "x" * 2000), "reason"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ProtocolError, match=field):
            decode_body(code_of(message), encode_body(message))


layouts = st.builds(
    lambda layers, dtype, tp, size, blocks: KVLayout(
        ModelKV(tuple(layers), dtype, "f"), KVGeometry(tp, size, blocks), 0
    ),
    st.lists(st.builds(LayerSpec, st.sampled_from([4, 8]), st.integers(1, 256)), min_size=1, max_size=8),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([16, 32]),
    st.integers(1, 10**6),
)


@relaxed(100)
@given(layouts)
def test_layouts_survive_the_wire(layout: KVLayout) -> None:
    assert decode_layout(encode_layout(layout)) == layout


@relaxed(300)
@given(st.binary(max_size=100) | json_like.map(msgpack.packb))
def test_other_layouts_are_refused(packed: bytes) -> None:
    try:
        decode_layout(packed)
    except ProtocolError:
        return
    pytest.fail("a random layout was taken")


def test_a_layout_can_not_claim_endless_layers() -> None:
    fields = [[[2**30, 4, 8]], "bfloat16", "f", 1, 1, 16, 4, 0]
    with pytest.raises(ProtocolError, match="too many layers"):
        decode_layout(msgpack.packb(fields))


# The seal covers what a frame is, not only what it holds.

FRAME = Data(b"i" * 16, 0, 1, 2, 3, 4, 5, bytes(16), b"")  # type: ignore[arg-type]
DIGEST = b"d" * 16


@pytest.mark.parametrize(
    "field", ["source_rank", "destination_rank", "first_layer", "num_layers", "first_unit", "num_units"]
)
def test_the_seal_covers_every_field_of_the_identity(field: str) -> None:
    changed = FRAME._replace(**{field: 7})
    assert seal(bytes(16), FRAME, DIGEST) != seal(bytes(16), changed, DIGEST)


def test_the_seal_covers_transfer_link_and_digest() -> None:
    sealed = seal(bytes(16), FRAME, DIGEST)
    assert sealed != seal(bytes(16), FRAME._replace(transfer_id=b"j" * 16), DIGEST)  # type: ignore[arg-type]
    assert sealed != seal(b"another link....", FRAME, DIGEST)
    assert sealed != seal(bytes(16), FRAME, b"e" * 16)
    assert len(sealed) == DIGEST_BYTES


@relaxed(100)
@given(
    st.binary(min_size=1, max_size=3000),
    st.lists(st.integers(0, 3000), max_size=5),
    st.lists(st.integers(0, 3000), max_size=5),
    st.booleans(),
)
def test_a_copy_is_the_same_however_both_sides_are_cut(
    data: bytes, cuts: list[int], others: list[int], has_native: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not has_native:
            patch.setattr(pool, "library", lambda: None)
        to = extents_over(bytes(len(data)), cuts)
        copy(to, extents_over(data, others))
    assert b"".join(to.views()) == data
