"""The load generator's HTTP client against answers that are legal but unusual, and against hostile ones."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.http_client import HttpClient
from loadtest.outcome import Outcome
from loadtest.target import Target
from loadtest.workload import LoadRequest

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
TOKEN = b'data: {"choices":[{"text":"x","token_ids":[1]}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(body: bytes, head: bytes = STREAM) -> bytes:
    return head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def usage(fields: bytes) -> bytes:
    return b'data: {"choices":[{"text":"x"}],"usage":{%s}}\n\n' % fields


async def _answered(answer: bytes) -> Outcome:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            writer.write(answer)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = HttpClient(Target(f"http://127.0.0.1:{port}", "completions", "m", timeout_s=10), None)
    client.begin("run")
    now = asyncio.get_running_loop().time()
    outcome = Outcome(0, now)
    await client.send(client.prepare(LoadRequest(0, 0.0, 8, 4)), outcome, now + 10)
    await client.close()
    server.close()
    await server.wait_closed()
    return outcome


def answered(answer: bytes) -> Outcome:
    return asyncio.run(_answered(answer))


@pytest.mark.parametrize(
    "answer",
    [
        chunked(TOKEN * 4 + DONE),
        STREAM + b"connection: close\r\n\r\n" + TOKEN * 4 + DONE,
        chunked(b'data: {"error":null,"choices":[{"text":"x"}]}\n\n' * 4 + DONE),
        chunked(TOKEN * 4 + DONE, STREAM.replace(b"text/event-stream", b"Text/Event-Stream")),
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + chunked(TOKEN * 4 + DONE),
        chunked((TOKEN * 4 + DONE).replace(b"\n", b"\r\n")),
        chunked(TOKEN * 4 + DONE) * 2,
    ],
    ids=["plain", "until it closes", "no error", "capitals", "early hints", "crlf", "twice"],
)
def test_legal_answers_succeed(answer: bytes) -> None:
    outcome = answered(answer)
    assert (outcome.failure, outcome.num_output_tokens, list(outcome.counts)) == ("", 4, [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (chunked(usage(b'"completion_tokens":4000000000') + DONE), "bad_response"),
        (chunked(usage(b'"completion_tokens":-5') + DONE), "bad_response"),
        (chunked(usage(b'"completion_tokens":Infinity') + DONE), "bad_response"),
        (chunked(b"data: " + b"[" * 200_000 + b"\n\n" + DONE), "bad_response"),
        (STREAM + b"x-endless: " + b"a" * 2**20, "bad_response"),
        (STREAM + b"connection: close\r\n\r\n" + TOKEN, "truncated"),
        (chunked(TOKEN), "truncated"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", "http_503"),
        (b"", "reset"),
    ],
    ids=["huge", "negative", "infinite", "deep", "endless head", "cut", "no end", "refused", "nothing"],
)
def test_others_fail_by_name_and_cost_nothing(answer: bytes, failure: str) -> None:
    outcome = answered(answer)
    assert outcome.failure == failure
    assert sum(outcome.counts) <= 1
