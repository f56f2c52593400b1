"""The handshake: both ends prove the secret, and what one end claims the other has checked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV
from kvtransfer.auth import MAX_VERSION, MIN_VERSION, Acceptor, Connector, LinkKey, Refusal, RefusalCode, Session
from kvtransfer.messages import Challenge, Hello, Proof, ProtocolError, Welcome

SECRET = b"s" * 32
MODEL = ModelKV((LayerSpec(4, 8),), "bfloat16", "f")
P, D = LinkKey("p", "p1", 0), LinkKey("d", "d1", 0)


def layout(tp_size: int = 1, tp_rank: int = 0, model: ModelKV = MODEL) -> KVLayout:
    """A small pool."""
    return KVLayout(model, KVGeometry(tp_size, 16, 4), tp_rank)


def connector(**changes: object) -> Connector:
    """The prefill side."""
    fields = {"secret": SECRET, "me": P, "layout": layout(), "peer": D, "transport": "tcp", "nonce": b"1" * 32}
    return Connector(**{**fields, "verify": True, **changes})  # type: ignore[arg-type]


def acceptor(**changes: object) -> Acceptor:
    """The decode side."""
    fields = {"secret": SECRET, "me": D, "layout": layout(), "transports": ("tcp",), "nonce": b"2" * 32}
    return Acceptor(**{**fields, "verify": True, **changes})  # type: ignore[arg-type]


def shake(left: Connector, right: Acceptor) -> tuple[Session, Session]:
    """All four messages."""
    proof = left.receive(right.receive(left.hello))
    assert proof is not None
    assert left.receive(right.receive(proof)) is None
    assert left.session is not None
    assert right.session is not None
    return left.session, right.session


def test_both_ends_know_each_other_and_hold_the_same_keys() -> None:
    left, right = shake(connector(), acceptor())
    assert (left.peer, right.peer) == (D, P)
    assert left.send_key == right.receive_key != left.receive_key == right.send_key
    assert left.context == right.context
    assert left.plan == right.plan


def test_keys_and_digest_context_are_new_for_each_connection() -> None:
    first, _ = shake(connector(), acceptor())
    second, _ = shake(connector(nonce=b"3" * 32), acceptor())
    third, _ = shake(connector(), acceptor(nonce=b"4" * 32))
    assert len({session.send_key for session in (first, second, third)}) == 3
    assert len({session.context for session in (first, second, third)}) == 3


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_digests_are_made_if_either_end_wants_them(ours: bool, theirs: bool) -> None:
    left, right = shake(connector(verify=ours), acceptor(verify=theirs))
    assert left.verify == right.verify == (ours or theirs)


def refusal(run: object) -> RefusalCode:
    """The code with which something is refused."""
    with pytest.raises(Refusal) as caught:
        run()  # type: ignore[operator]
    return caught.value.code


def test_an_acceptor_without_the_secret_is_refused_before_anything_is_told_to_it() -> None:
    assert refusal(lambda: shake(connector(), acceptor(secret=b"x" * 32))) is RefusalCode.SECRET


def test_a_connector_without_the_secret_is_refused() -> None:
    left, right = connector(), acceptor()
    forger = connector(secret=b"x" * 32)
    challenge = right.receive(left.hello)
    assert isinstance(challenge, Challenge)
    with pytest.raises(Refusal):
        forger.receive(challenge)  # it notices first
    assert refusal(lambda: right.receive(Proof(b"0" * 32, b"", True, b""))) is RefusalCode.SECRET


def test_a_replayed_proof_is_refused_because_the_nonce_is_new() -> None:
    left, right = connector(), acceptor()
    proof = left.receive(right.receive(left.hello))
    assert proof is not None
    later = acceptor(nonce=b"9" * 32)
    later.receive(left.hello)
    assert refusal(lambda: later.receive(proof)) is RefusalCode.SECRET


def test_the_acceptors_proof_can_not_be_reflected() -> None:
    left, right = connector(), acceptor()
    challenge = right.receive(left.hello)
    assert isinstance(challenge, Challenge)
    assert refusal(lambda: right.receive(Proof(challenge.mac, b"", True, b""))) is RefusalCode.SECRET


@pytest.mark.parametrize("field", ["layout", "verify"])
def test_what_the_proof_carries_is_covered_by_it(field: str) -> None:
    left, right = connector(), acceptor()
    proof = left.receive(right.receive(left.hello))
    assert proof is not None
    other: dict[str, object] = {"layout": proof.layout + b"\0", "verify": False}
    changed = proof._replace(**{field: other[field]})  # type: ignore[arg-type]
    assert refusal(lambda: right.receive(changed)) is RefusalCode.SECRET


@pytest.mark.parametrize(
    ("field", "value"),
    [("worker_id", "q"), ("incarnation", "p2"), ("tp_rank", 1), ("nonce", b"5" * 32), ("min_version", 0)],
)
def test_every_field_of_the_hello_is_covered_by_the_proofs(field: str, value: object) -> None:
    left, right = connector(), acceptor()
    changed = left.hello._replace(**{field: value})  # type: ignore[arg-type]
    challenge = right.receive(changed)
    assert refusal(lambda: left.receive(challenge)) is RefusalCode.SECRET


def test_what_the_welcome_carries_is_covered_by_its_mac() -> None:
    left, right = connector(), acceptor()
    proof = left.receive(right.receive(left.hello))
    assert proof is not None
    welcome = right.receive(proof)
    assert isinstance(welcome, Welcome)
    assert refusal(lambda: left.receive(welcome._replace(verify=False))) is RefusalCode.SECRET


@pytest.mark.parametrize(
    "change", [{"expected_worker_id": "e"}, {"expected_incarnation": "d0"}, {"expected_tp_rank": 1}]
)
def test_a_hello_for_somebody_else_is_refused(change: dict[str, object]) -> None:
    hello = connector().hello._replace(**change)  # type: ignore[arg-type]
    assert refusal(lambda: acceptor().receive(hello)) is RefusalCode.ADDRESS


def test_a_worker_that_answers_at_the_wrong_address_is_refused() -> None:
    left, right = connector(peer=D._replace(incarnation="d0")), acceptor()
    challenge = right.receive(left.hello._replace(expected_incarnation="d1"))
    assert refusal(lambda: left.receive(challenge)) is RefusalCode.ADDRESS


@pytest.mark.parametrize(("low", "high"), [(MAX_VERSION + 1, MAX_VERSION + 9), (0, MIN_VERSION - 1)])
def test_versions_without_a_common_one_are_refused(low: int, high: int) -> None:
    hello = connector().hello._replace(min_version=low, max_version=high)
    assert refusal(lambda: acceptor().receive(hello)) is RefusalCode.VERSION


def test_another_transport_is_refused() -> None:
    assert refusal(lambda: acceptor().receive(connector(transport="shm").hello)) is RefusalCode.TRANSPORT


@pytest.mark.parametrize("field", ["dtype", "fingerprint"])
def test_another_model_is_refused_and_the_field_is_named(field: str) -> None:
    other = replace(MODEL, **{field: "float32"})
    with pytest.raises(Refusal, match=field) as caught:
        shake(connector(layout=layout(model=other)), acceptor())
    assert caught.value.code is RefusalCode.LAYOUT


def test_ranks_that_exchange_nothing_are_refused() -> None:
    left = connector(layout=layout(2, 0), peer=D._replace(tp_rank=1))
    right = acceptor(me=D._replace(tp_rank=1), layout=layout(2, 1))
    assert refusal(lambda: shake(left, right)) is RefusalCode.LAYOUT


def test_another_ranks_layout_is_refused() -> None:
    assert refusal(lambda: shake(connector(layout=layout(2, 1)), acceptor())) is RefusalCode.PROTOCOL


def test_messages_out_of_order_are_a_protocol_error() -> None:
    left, right = connector(), acceptor()
    hello: Hello = left.hello
    with pytest.raises(ProtocolError):
        left.receive(Welcome(b"0" * 32, b"", True))
    with pytest.raises(ProtocolError):
        right.receive(Proof(b"0" * 32, b"", True, b""))
    right.receive(hello)
    with pytest.raises(ProtocolError):
        right.receive(hello)
