"""SEC-3: who does not hold this cluster's secret is refused with a reason: KV peers, routers and workers."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from baton.auth import worker_token
from baton.clock import ManualClock
from baton.specs import encode_secret
from baton.tls import SERVER_NAME, make_identity, ssl_context
from kvtransfer.api import ReserveRequested
from kvtransfer.auth import Connector, LinkKey, RefusalCode
from kvtransfer.connection import HANDSHAKE_S
from kvtransfer.frames import FrameReader, Tagger, encode_frame
from kvtransfer.messages import Challenge, Goodbye, Message, Proof
from kvtransfer.switchboard import MAX_UNAUTHENTICATED, PATIENCE_S
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServicer, WorkerStub, add_WorkerServicer_to_server
from tests.support.fake_worker import FakeCluster, site
from tests.support.transfer import SECRET, Worker, closing, kvtransfer_threads, make_worker, open_send
from worker.service import TokenAuth


class Wire:
    """A connection to a worker's leader on which recorded bytes can be sent again."""

    def __init__(self, worker: Worker) -> None:
        address = worker.leader.endpoint.address
        self._sock = socket.create_connection((address.host, address.port), timeout=10)
        self._heard: list[Message] = []
        self._reader = FrameReader(lambda message, payload_bytes: None, self._heard.append, 2**20)

    def say(self, data: bytes) -> None:
        self._sock.sendall(data)

    def hear(self) -> Message | None:
        """The next message; None: the connection was closed."""
        while not self._heard:
            count = self._sock.recv_into(self._reader.buffers()[0])
            if not count:
                return None
            self._reader.filled(count)
        return self._heard.pop(0)

    def close(self) -> None:
        self._sock.close()

    def answered(self) -> bool:
        """Has something come, and is the other end open?"""
        self._sock.setblocking(False)
        count = 0
        try:
            while data := self._sock.recv(65_536):
                count += len(data)
        except BlockingIOError:
            return count > 0
        finally:
            self._sock.setblocking(True)
        return False


def connector(worker: Worker, secret: bytes, name: str = "p") -> Connector:
    me, peer = LinkKey(name, "p1", 0), LinkKey(worker.worker_id, worker.incarnation, 0)
    return Connector(secret, me, worker.leader.layout, peer, "tcp", b"1" * 32, verify=True)


def test_sec3_a_recorded_handshake_is_refused_with_that_reason() -> None:
    worker = make_worker("d")
    with closing(worker):
        first, second = Wire(worker), Wire(worker)
        good, tagger = connector(worker, SECRET), Tagger()
        hello = encode_frame(good.hello, tagger)
        first.say(hello)
        challenge = first.hear()
        assert isinstance(challenge, Challenge)
        answer = good.receive(challenge)
        assert isinstance(answer, Proof)
        proof = encode_frame(answer, tagger)
        first.say(proof)
        good.receive(first.hear())  # type: ignore[arg-type]
        assert good.session is not None
        worker.leader.wait_for(lambda: worker.leader.endpoint.stats().transports == {"p#0": "tcp"})

        second.say(hello)
        again = second.hear()
        assert isinstance(again, Challenge)
        assert again.nonce != challenge.nonce
        second.say(proof)
        goodbye = second.hear()
        assert isinstance(goodbye, Goodbye)
        assert goodbye.code == RefusalCode.SECRET
        assert "secret" in goodbye.reason
        assert second.hear() is None
        assert worker.leader.endpoint.poll() == []
        for wire in (first, second):
            wire.close()
    assert kvtransfer_threads() == []


def is_open(sock: socket.socket) -> bool:
    """Has the other end, which said nothing, not closed it?"""
    return not select.select([sock], [], [], 0)[0]


def test_sec3_silent_strangers_keep_no_peer_out() -> None:
    clock = ManualClock()
    worker = make_worker("d", clock=clock)
    with closing(worker), contextlib.ExitStack() as open_sockets:
        leader, endpoint = worker.leader, worker.leader.endpoint

        def stranger(source: str) -> socket.socket:
            address = (endpoint.address.host, endpoint.address.port)
            return open_sockets.enter_context(socket.create_connection(address, timeout=10, source_address=(source, 0)))

        few = [stranger("127.0.0.1") for _ in range(2)]
        crowd = [stranger("127.0.0.2") for _ in range(MAX_UNAUTHENTICATED - 2)]
        leader.wait_for(lambda: endpoint.stats().open_links == MAX_UNAUTHENTICATED)
        wire, tagger = Wire(worker), Tagger()
        open_sockets.callback(wire.close)
        peer = connector(worker, SECRET)
        wire.say(encode_frame(peer.hello, tagger))
        for _ in range(3):
            leader.turn()
        assert all(map(is_open, (*few, *crowd))), "nobody gives way who had no time to speak"

        clock.advance(PATIENCE_S)
        challenge = wire.hear()
        assert isinstance(challenge, Challenge)
        proof = peer.receive(challenge)
        assert proof is not None
        wire.say(encode_frame(proof, tagger))
        leader.wait_for(lambda: endpoint.stats().transports == {"p#0": "tcp"})
        assert endpoint.stats().open_links == MAX_UNAUTHENTICATED
        assert not is_open(crowd[0]), "it is the oldest of the address with most connections"
        assert all(map(is_open, (*few, *crowd[1:])))


@contextlib.contextmanager
def stalled(worker: Worker) -> Iterator[None]:
    """Its transfer thread stands still meanwhile, in the middle of a turn."""
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        release.wait(10)

    worker.leader.endpoint._thread.post(hold)
    assert is_held.wait(10)
    try:
        yield
    finally:
        release.set()


@pytest.mark.parametrize("has_waited", [False, True], ids=["it had time", "its time was over"])
def test_sec3_peers_that_have_spoken_stay_although_this_end_was_slow_to_listen(has_waited: bool) -> None:
    clock = ManualClock()
    worker = make_worker("d", clock=clock)
    with closing(worker), contextlib.ExitStack() as open_sockets:
        leader, endpoint = worker.leader, worker.leader.endpoint
        peers = [connector(worker, SECRET, f"p{index}") for index in range(MAX_UNAUTHENTICATED + 1)]
        wires = [open_sockets.enter_context(contextlib.closing(Wire(worker))) for _ in peers[1:]]
        leader.wait_for(lambda: endpoint.stats().open_links == MAX_UNAUTHENTICATED)
        if has_waited:  # from here on one of them gives way to the next who comes
            clock.advance(PATIENCE_S)
            for _ in range(2):
                leader.turn()
        with stalled(worker):
            wires.append(open_sockets.enter_context(contextlib.closing(Wire(worker))))
            for wire, peer in zip(wires, peers, strict=True):
                wire.say(encode_frame(peer.hello, Tagger()))
            clock.advance(2 * PATIENCE_S)
        challenges = [wire.hear() for wire in wires[:-1]]
        for _ in range(3):
            leader.turn()
        assert all(isinstance(challenge, Challenge) for challenge in challenges)
        assert endpoint.stats().open_links == MAX_UNAUTHENTICATED
        for wire, peer, challenge in zip(wires, peers, challenges, strict=False):
            prove(wire, peer, challenge)
        prove(wires[-1], peers[-1], wires[-1].hear())
        leader.wait_for(lambda: len(endpoint.stats().transports) == len(peers))


def prove(wire: Wire, peer: Connector, challenge: Message | None) -> None:
    """Answer what came after the Hello of `peer`."""
    assert isinstance(challenge, Challenge)
    proof = peer.receive(challenge)
    assert proof is not None
    wire.say(encode_frame(proof, Tagger()))


def test_sec3_a_peer_whose_tls_was_answered_is_given_time_to_go_on_and_no_more() -> None:
    clock = ManualClock()
    worker = make_worker("d", transport="tcp+tls", clock=clock)
    with closing(worker), contextlib.ExitStack() as open_sockets:
        leader, endpoint = worker.leader, worker.leader.endpoint
        wires = [open_sockets.enter_context(contextlib.closing(Wire(worker))) for _ in range(MAX_UNAUTHENTICATED)]
        leader.wait_for(lambda: endpoint.stats().open_links == MAX_UNAUTHENTICATED)
        hello = tls_client_hello()
        with stalled(worker):
            wires.append(open_sockets.enter_context(contextlib.closing(Wire(worker))))
            for wire in wires:
                wire.say(hello)
            clock.advance(2 * PATIENCE_S)
        for _ in range(3):
            leader.turn()
        assert [wire.answered() for wire in wires] == [True] * MAX_UNAUTHENTICATED + [False]
        clock.advance(PATIENCE_S)
        leader.wait_for(wires[-1].answered)
        assert endpoint.stats().open_links == MAX_UNAUTHENTICATED


def tls_client_hello() -> bytes:
    """What a peer of this cluster says first."""
    sent = ssl.MemoryBIO()
    context = ssl_context(make_identity(SECRET), server_side=False)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=SERVER_NAME).do_handshake()
    return sent.read()


def test_sec3_a_crowd_that_comes_again_and_again_delays_a_transfer_little() -> None:
    with closing(make_worker("p"), make_worker("d")) as (source, destination), contextlib.ExitStack() as open_sockets:
        endpoint = destination.leader.endpoint
        address = (endpoint.address.host, endpoint.address.port)
        for _ in range(2 * MAX_UNAUTHENTICATED):
            open_sockets.enter_context(socket.create_connection(address, timeout=10))
        destination.leader.wait_for(lambda: endpoint.stats().open_links >= MAX_UNAUTHENTICATED)
        began = time.monotonic()
        transfer_id = open_send(source, destination, 16, [0])
        destination.leader.expect(ReserveRequested, transfer_id)
        assert time.monotonic() - began < HANDSHAKE_S, "it waited for the strangers' time to be over"


def test_sec3_a_connector_that_forges_its_proof_is_told_that_it_lacks_the_secret() -> None:
    worker = make_worker("d")
    with closing(worker):
        wire, tagger = Wire(worker), Tagger()
        forger = connector(worker, SECRET)
        wire.say(encode_frame(forger.hello, tagger))
        proof = forger.receive(wire.hear())  # type: ignore[arg-type]
        assert proof is not None
        wire.say(encode_frame(proof._replace(mac=b"0" * 32), tagger))
        goodbye = wire.hear()
        assert isinstance(goodbye, Goodbye)
        assert (goodbye.code, wire.hear()) == (RefusalCode.SECRET, None)
        assert worker.leader.endpoint.stats().transports == {}
        wire.close()


class _Worker(WorkerServicer):
    async def Session(self, requests: object, context: object) -> None:  # noqa: N802
        """Nobody gets here."""
        raise AssertionError("a stranger's call was served")

    async def GetStatus(self, request: object, context: object) -> pb.WorkerStatus:  # noqa: N802
        """For those who hold the secret."""
        return pb.WorkerStatus(worker_id="d")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer ", worker_token(b"another cluster, same size"), worker_token(SECRET)[:-1], "Bearer x"]
)
def test_sec3_a_worker_serves_no_call_without_this_clusters_token(header: str | None) -> None:
    async def main() -> None:
        server = grpc.aio.server(interceptors=[TokenAuth(worker_token(SECRET))])
        add_WorkerServicer_to_server(_Worker(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        metadata = () if header is None else (("authorization", header),)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = WorkerStub(channel)  # type: ignore[no-untyped-call]
                session = stub.Session(iter([pb.RouterMessage()]), metadata=metadata)
                for call in (stub.GetStatus(pb.GetStatusRequest(), metadata=metadata), session.read()):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                    assert "cluster token" in (caught.value.details() or "")
                own = (("authorization", worker_token(SECRET)),)
                assert (await stub.GetStatus(pb.GetStatusRequest(), metadata=own)).worker_id == "d"
        finally:
            await server.stop(None)

    asyncio.run(main())


def test_sec3_a_router_of_another_cluster_says_why_it_has_no_workers() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        async with site(cluster, secret=encode_secret(b"another cluster's secret")) as here:
            worker = cluster.add("mixed-0", "mixed")
            await worker.start()
            here.router.set_members(cluster.fleet())
            link = here.router.fleet.links["mixed-0"]
            async with asyncio.timeout(10):
                while "secret" not in link.why_lost:
                    here.router.fleet.changed.clear()
                    await here.router.fleet.changed.wait()
            health = await here.http.get("/health")
            assert health.status_code == 503
            assert "wrong cluster secret" in health.json()["error"]["message"]
            assert not worker.num_sessions

    asyncio.run(main())
