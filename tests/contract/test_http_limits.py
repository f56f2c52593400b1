"""What a stranger may send before anybody asks who it is: heads, trailers, chunk extensions and requests ahead have ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from router import http_protocol
from tests.contract.test_http import run
from tests.support.fake_worker import Script, Site, pair

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n"
TEXT = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = TEXT + b"transfer-encoding: chunked\r\n\r\n"
KIB = b"a" * 1024


@contextlib.asynccontextmanager
async def connection(here: Site) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def all_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server ends it."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            found += data
    return found


async def answer_to(here: Site, pieces: Iterator[bytes]) -> tuple[bytes, bool]:
    """What the server says to a client that sends on whatever it hears, and whether that could send it all."""
    async with connection(here) as (reader, writer):
        reading = asyncio.create_task(all_of(reader))
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            is_sent = True
        except ConnectionError:
            is_sent = False
        return await reading, is_sent


def completion(prompt: str = "abc") -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": 2}).encode()
    return TEXT + b"content-length: %d\r\n\r\n" % len(body) + body


def without_end(begin: bytes, piece: bytes) -> Iterator[bytes]:
    """More than sockets hold, but not for ever."""
    yield begin
    for _ in range(128 * 2**20 // len(piece)):
        yield piece


ENDLESS = {
    "field": (HEALTH + b"x-a: ", KIB * 64),
    "fields": (HEALTH, b"a: b\r\n" * 10_000),
    "name": (HEALTH, KIB * 64),
    "url": (b"GET /", KIB * 64),
    "lines": (b"", b"\r\n" * 32_768),
    "chunk extension": (CHUNKED + b"1;", KIB * 64),
    "trailer": (CHUNKED + b"0\r\na: ", KIB * 64),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 10_000),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_head_without_end_is_refused_while_others_are_served(kind: str) -> None:
    async def scenario(here: Site) -> None:
        flood = asyncio.create_task(answer_to(here, without_end(*ENDLESS[kind])))
        while not flood.done():
            assert (await here.http.get("/health")).status_code == 200
        answer, is_sent = await flood
        assert answer.startswith(b"HTTP/1.1 431 ")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert "at most 65536 bytes and 128 fields" in json.loads(body)["error"]["message"]
        assert not is_sent, "the server read on"
        assert here.cluster.workers["prefill-0"].started == []

    run(pair, scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEALTH + b"x-a: " + KIB * 300 + b"\r\n\r\n",
        HEALTH + b"x-a: " + KIB * 65 + b"\r\n\r\n",
        HEALTH + (b"x-a: " + KIB + b"\r\n") * 65 + b"\r\n",
        HEALTH + b"x-a: b\r\n" * 20_000 + b"\r\n",
        HEALTH + b"x-a: b\r\n" * 128 + b"\r\n",
        b"GET /health?" + KIB * 65 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x-a: b\r\n" * 128 + b"\r\n",
    ],
    ids=["300 kB", "65 kB", "65 fields of 1 kB", "20000 fields", "129 fields", "request line", "trailers"],
)
def test_a_finished_head_is_held_to_the_same_limits(request_bytes: bytes) -> None:
    async def scenario(here: Site) -> None:
        answer, _ = await answer_to(here, iter([request_bytes]))
        assert answer.startswith(b"HTTP/1.1 431 ")
        pieces = [request_bytes[at : at + 1000] for at in range(0, len(request_bytes), 1000)]
        answer, _ = await answer_to(here, iter(pieces))
        assert answer.startswith(b"HTTP/1.1 431 ")

    run(pair, scenario)


def test_what_keeps_the_limits_is_served_on_one_connection() -> None:
    """Limits are per request, and what surrounds many small chunks is no head."""
    requests = [
        HEALTH + b"x-a: b\r\n" * 127 + b"\r\n",
        HEALTH + b"x-a: " + KIB * 63 + b"\r\n\r\n",
        HEALTH + b"x-a: " + KIB * 63 + b"\r\n\r\n",
        completion("\n" * 3000),
        CHUNKED
        + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in b'{"prompt":"%b"}' % (b"z" * 3900))
        + b"0\r\nt: u\r\n\r\n",
        *[HEALTH + b"\r\n"] * 40,
    ]

    async def scenario(here: Site) -> None:
        async with connection(here) as (reader, writer):
            for request in requests:
                writer.write(request)
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        answer, is_sent = await answer_to(here, iter([b"".join(requests[:-1]), HEALTH + b"connection: close\r\n\r\n"]))
        assert is_sent
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == len(requests)
        at = [answer.index(part) for part in (b'"status"', b'"text_completion"')]
        assert at == sorted(at), "not in order"

    run(pair, scenario)


def test_requests_that_are_sent_ahead_do_not_pile_up() -> None:
    async def scenario(here: Site) -> None:
        answer, is_sent = await answer_to(here, without_end(b"", (HEALTH + b"\r\n") * 1000))
        assert answer.count(b"HTTP/1.1") <= 2 * http_protocol.MAX_SENT_AHEAD
        assert b" 431 " not in answer
        assert not is_sent

    run(pair, scenario)


def test_no_refusal_is_written_into_an_earlier_answer() -> None:
    async def scenario(here: Site) -> None:
        decode = here.cluster.workers["decode-0"]
        body = b'{"prompt": "abc", "max_tokens": 9, "stream": true}'
        async with connection(here) as (reader, writer):
            writer.write(TEXT + b"content-length: %d\r\n\r\n" % len(body) + body)
            await reader.readuntil(b"data: ")
            writer.write(HEALTH + b"x-a: " + KIB * 100)
            assert b"431" not in await all_of(reader)
        await decode.until(lambda: bool(decode.aborted))

    run(lambda: pair(decode=Script(gate_at=4)), scenario)


def test_what_is_not_http_is_refused_in_the_same_words_as_everything_else() -> None:
    async def scenario(here: Site) -> None:
        answer, _ = await answer_to(here, iter([b"\x16\x03\x01 TLS\r\n\r\n"]))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"

    run(pair, scenario)


def test_a_head_must_come_in_time_but_an_answer_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)

    async def dribble(here: Site, begin: bytes, piece: bytes) -> bytes:
        async with connection(here) as (reader, writer):
            reading = asyncio.create_task(all_of(reader))
            writer.write(begin)
            with contextlib.suppress(ConnectionError):
                while piece and not reading.done():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02)
            return await reading

    async def scenario(here: Site) -> None:
        prefill = here.cluster.workers["prefill-0"]
        async with connection(here) as (reader, writer):
            writer.write(completion())
            await prefill.until(lambda: bool(prefill.started))
            async with asyncio.timeout(30):
                silent, half, slow, second, body = await asyncio.gather(
                    dribble(here, b"", b""),
                    dribble(here, HEALTH, b""),
                    dribble(here, HEALTH + b"x-a: ", b"a"),
                    dribble(here, HEALTH + b"\r\n", b"\r\n"),
                    dribble(here, HEALTH + b"content-length: 1000000000\r\n\r\n", b"a"),
                )
            assert silent == half == slow == b""
            assert second.startswith(b"HTTP/1.1 200 ")
            assert body.startswith(b"HTTP/1.1 200 ")
            prefill.gate.set()
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"

    run(lambda: pair(prefill=Script(gate_at=0)), scenario)
