"""Bad input gets a clear error in the client's own shape, leaves nothing behind, and no other request notices."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.system import System, eventually, serve

pytestmark = pytest.mark.timeout(120)

MODEL = "baton-demo"
MAX_BODY_BYTES = 65536
QUESTION = "What is Baton?"
(ANSWER,) = (
    pair["answer"]
    for line in (Path(__file__).parents[2] / "bench" / "demo_model" / "qa.jsonl").read_text().splitlines()
    if (pair := json.loads(line))["question"] == QUESTION
)
JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with serve("--set", f"router.max_body_bytes={MAX_BODY_BYTES}") as running:
        yield running


@pytest.fixture(autouse=True)
def audited(system: System) -> Iterator[None]:
    yield
    system.audit()


@dataclass(frozen=True)
class Bad:
    """A request and what must be said about it. `body` overlays a good one; bytes are sent as they are."""

    path: str
    body: dict[str, Any] | bytes
    status: int
    words: tuple[str, ...]
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))

    def post(self, url: str) -> httpx.Response:
        good = {COMPLETIONS: {"prompt": "hi", "max_tokens": 4}, CHAT: {"messages": HELLO, "max_tokens": 4}}
        body = self.body
        if isinstance(body, dict):
            body = json.dumps({**good.get(self.path, {}), **body}).encode()
        return httpx.post(
            f"{url}{self.path}", content=body, headers=self.headers, timeout=60, trust_env=False, verify=False
        )

    def check(self, answer: httpx.Response) -> None:
        assert answer.status_code == self.status, answer.text
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        for word in self.words:
            assert word in error["message"]
        assert error["message"].rstrip(".").count("\n") == 0
        assert error["type"] == "invalid_request_error"
        assert error["param"] == self.param
        assert error["code"] == self.code


def comp(words: str | tuple[str, ...], param: str | None = None, **fields: Any) -> Bad:
    """A completion that is refused with 400; the parameter at fault is the only field unless it is named."""
    (first, *_) = fields
    return Bad(COMPLETIONS, fields, 400, (words,) if isinstance(words, str) else words, param or first)


def chat(words: str | tuple[str, ...], param: str | None = None, **fields: Any) -> Bad:
    (first, *_) = fields
    return Bad(CHAT, fields, 400, (words,) if isinstance(words, str) else words, param or first)


def raw(body: bytes, *words: str) -> Bad:
    return Bad(COMPLETIONS, body, 400, words)


TOO_LONG = {"param": "input_tokens", "code": "context_length_exceeded"}
NO_MODEL = {"param": "model", "code": "model_not_found"}
CASES: dict[str, Bad] = {
    # prompts
    "empty prompt": comp("must not be empty", prompt=""),
    "no prompts": comp("must not be empty", prompt=[]),
    "one of the prompts is empty": comp("must not be empty", prompt=["a", ""]),
    "an empty token list": comp("must be a string", prompt=[[]]),
    "no prompt": comp("missing", prompt=None),
    "a number as prompt": comp("must be a string", prompt=5),
    "an object as prompt": comp("must be a string", prompt={"text": "hi"}),
    "a fractional token": comp("must be a string", prompt=[1.5]),
    "true as a token": comp("must be a string", prompt=[True]),
    "a negative token": comp("must be a string", prompt=[-1]),
    "a token beyond the vocabulary": comp(("1000000", "1024"), prompt=[1000000]),
    "a token of 400 digits": comp("must be a string", prompt=[10**400]),
    "tokens mixed with text": comp("must be a string", prompt=[1, "a"]),
    "257 prompts": comp("256", prompt=["a"] * 257),
    "too long": Bad(COMPLETIONS, {"prompt": "x " * 5000}, 400, ("4096", "5001", "4 to generate"), **TOO_LONG),
    "too long with what is asked for": Bad(COMPLETIONS, {"max_tokens": 4096}, 400, ("4096", "4097"), **TOO_LONG),
    "a huge max_tokens": Bad(COMPLETIONS, {"max_tokens": 10**9}, 400, ("4096", "1000000001"), **TOO_LONG),
    "chat: too long": Bad(
        CHAT, {"messages": [{"role": "user", "content": "x " * 5000}]}, 400, ("4096", "5007"), **TOO_LONG
    ),
    # messages
    "no messages": chat("at least 1", messages=[]),
    "messages absent": chat("missing", messages=None),
    "messages a text": chat("must be a list", messages="hi"),
    "a message without role": chat("missing", "messages[0].role", messages=[{}]),
    "a message of a king": chat("'user'", "messages[0].role", messages=[{"role": "king", "content": "x"}]),
    "a user's message without content": chat("missing", "messages[0].content", messages=[{"role": "user"}]),
    "a number as content": chat("must be", "messages[0].content", messages=[{"role": "user", "content": 5}]),
    "an image": chat(
        "text only",
        "messages[0].content[0].type",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ),
    # wrong types
    "max_tokens a text": comp("must be an integer", max_tokens="4"),
    "max_tokens a fraction": comp("must be an integer", max_tokens=1.5),
    "max_tokens true": comp("must be an integer", max_tokens=True),
    "temperature a text": comp("must be a number", temperature="hot"),
    "stream a text": comp("must be true or false", stream="yes"),
    "stream_options a number": comp("must be an object", stream_options=5),
    "stop a number": comp("must be a string or a list", stop=5),
    "seed a text": comp("must be an integer", seed="x"),
    "model a number": comp("must be a string", model=5),
    "logit_bias a list": comp("must be an object", logit_bias=[1]),
    "logit_bias of words": comp("token ids", logit_bias={"word": 1}),
    "logprobs true, for completions": comp("must be an integer", logprobs=True),
    "logprobs a number, for chat": chat("must be true or false", logprobs=3),
    # absurd values
    "max_tokens 0": comp("at least 1", max_tokens=0),
    "max_tokens negative": comp("at least 1", max_tokens=-1),
    "max_tokens astronomic": comp("less than", max_tokens=10**30),
    "n 0": comp("at least 1", n=0),
    "n a million": comp(("at most 16", "1000000"), n=10**6),
    "temperature negative": comp("at least 0", temperature=-1),
    "temperature 1e308": comp("at most", temperature=1e308),
    "top_p 0": comp("greater than 0", top_p=0),
    "top_p 2": comp("at most 1", top_p=2),
    "top_k -2": comp("at least -1", top_k=-2),
    "repetition_penalty 0": comp("greater than 0", repetition_penalty=0),
    "presence_penalty 3": comp("at most 2", presence_penalty=3),
    "min_tokens above max_tokens": comp(("5", "4"), min_tokens=5),
    "seed of 65 bits": comp("less than", seed=2**64),
    "an empty stop string": comp("1 to 1024", stop=[""]),
    "17 stop strings": comp("at most 16", stop=["a"] * 17),
    "a stop token beyond the vocabulary": comp("1024", stop_token_ids=[10**6]),
    "a bias beyond the vocabulary": comp("1024", logit_bias={"99999": 1}),
    "21 logprobs": comp("at most 20", logprobs=21),
    "top_logprobs without logprobs": chat("needs logprobs", top_logprobs=3),
    "timeout 0": comp("greater than 0", timeout=0),
    "a long cache_salt": comp("at most", cache_salt="x" * 2000),
    # fields that are not there
    "a typing error": comp("Did you mean temperature?", temprature=1),
    "an unknown field": comp("Unknown parameter", frobnicate=1),
    "tools": chat("not supported", tools=[{"type": "function", "function": {"name": "f"}}]),
    "JSON mode": chat("not supported", response_format={"type": "json_object"}),
    **{
        f"internal: {name}": comp("internal to the cluster", **{name: value})
        for name, value in {
            "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "203.0.113.1"},
            "remote_host": "203.0.113.1",
            "bootstrap_host": "203.0.113.1",
            "decode_peer": {"host": "203.0.113.1"},
            "worker_id": "decode-0",
            "block_table": [1, 2, 3],
            "attempt_id": "x/1",
            "tenant": "somebody-else",
        }.items()
    },
    # models
    "unknown model": Bad(COMPLETIONS, {"model": "gpt-5"}, 404, ("gpt-5", MODEL), **NO_MODEL),
    "chat: unknown model": Bad(CHAT, {"model": "gpt-5"}, 404, ("gpt-5", MODEL), **NO_MODEL),
    "a very long model name": Bad(COMPLETIONS, {"model": "x" * 9999}, 404, (MODEL,), **NO_MODEL),
    # broken JSON
    "no body": raw(b"", "not valid JSON"),
    "half a body": raw(b'{"prompt": "hi"', "not valid JSON"),
    "not an object": raw(b'["hi"]', "object"),
    "null": raw(b"null", "object"),
    "NaN": raw(b'{"prompt": "hi", "temperature": NaN}', "NaN"),
    "-Infinity": raw(b'{"prompt": "hi", "temperature": -Infinity}', "Infinity"),
    "not UTF-8": raw(b'{"prompt": "\xff"}', "not valid JSON"),
    "30000 brackets": raw(b'{"prompt": ' + b"[" * 30000 + b"]" * 30000 + b"}", "not valid JSON"),
    "5000 digits": raw(b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "1e999": Bad(COMPLETIONS, b'{"prompt": "hi", "temperature": 1e999}', 400, ("finite",), "temperature"),
    "half a surrogate pair": Bad(COMPLETIONS, {"prompt": "\ud800"}, 400, ("surrogates",)),
    "half a surrogate pair in a message": Bad(
        CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, ("surrogates",)
    ),
    "half a surrogate pair to tokenize": Bad("/tokenize", {"prompt": "\ud800"}, 400, ("surrogates",)),
    # other wrappings
    "text/plain": Bad(COMPLETIONS, {}, 415, ("application/json",), headers={"content-type": "text/plain"}),
    "a form": Bad(CHAT, {}, 415, ("application/json",), headers={"content-type": "application/x-www-form-urlencoded"}),
    "no content type": Bad(COMPLETIONS, {}, 415, ("application/json",), headers={}),
    "oversize": Bad(COMPLETIONS, {"prompt": "x" * MAX_BODY_BYTES}, 413, ("larger",)),
    "no such path": Bad("/v1/nope", {}, 404, ("path",)),
    "a trailing slash": Bad(f"{COMPLETIONS}/", {}, 404, ("path",)),
    "posting to models": Bad("/v1/models", {}, 405, ("method",)),
    "tokenize nothing": Bad("/tokenize", {}, 400, ("prompt or messages",), "prompt"),
    "detokenize text": Bad("/detokenize", {"tokens": "x"}, 400, ("must be a list",), "tokens"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_clear_sentence(system: System, name: str) -> None:
    CASES[name].check(CASES[name].post(system.url))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", CHAT, 405),
        ("PUT", "/health", 405),
        ("PATCH", "/health", 405),
        ("GET", "/", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/gpt-5", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/internal/status", 401),
        ("GET", "/internal/trace/x", 401),
    ],
)
def test_wrong_methods_and_paths_get_errors_of_the_same_shape(
    system: System, method: str, path: str, status: int
) -> None:
    with system.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


def test_a_body_that_never_says_its_length_is_cut_off_at_the_limit(system: System) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1024

    with system.client(**JSON) as client:
        try:
            answer = client.post(COMPLETIONS, content=endless())
        except (httpx.WriteError, httpx.ReadError):
            return  # the answer was there, but the connection was closed while we were still writing
    assert answer.status_code == 413


def test_what_is_not_http_is_hung_up_on(system: System) -> None:
    host, _, port = system.url.removeprefix("http://").partition(":")
    hellos = (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"A" * 100_000)
    for hello in hellos:
        for address in ((host, int(port)), (system.grpc.rpartition(":")[0], int(system.grpc.rpartition(":")[2]))):
            with socket.create_connection(address, timeout=20) as connection, contextlib.suppress(OSError):
                connection.sendall(hello)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    assert ask(system) == ANSWER


def test_a_request_whose_time_runs_out_ends_with_an_error_that_says_so(system: System) -> None:
    body = {"prompt": "hi", "max_tokens": 3000, "ignore_eos": True, "timeout": 0.2}
    with system.client() as client:
        answer = client.post(COMPLETIONS, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        streamed = client.post(COMPLETIONS, json={**body, "stream": True}).text
    *events, last, end = streamed.split("\n\n")
    assert len(events) > 3, "some of the answer came in time"
    name, data = last.split("\n")
    assert (name, end) == ("event: error", "")
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == (504, "server_error")
    assert "[DONE]" not in streamed


# ---- gRPC


@dataclass(frozen=True)
class BadCall:
    """A gRPC request and what must be said about it."""

    words: tuple[str, ...]
    text: bytes | None = b"hi"
    parameters: str | None = None
    status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    model: str = MODEL
    datatype: str = "BYTES"
    num_elements: int = 1
    extra: str | None = None

    def request(self) -> pb.ModelInferRequest:
        request = pb.ModelInferRequest(model_name=self.model, id="bad")
        if self.text is not None:
            tensor = request.inputs.add(name="text_input", datatype=self.datatype, shape=[self.num_elements])
            tensor.contents.bytes_contents.extend([self.text] * self.num_elements)
        for name, value in (("sampling_parameters", self.parameters), (self.extra, "x")):
            if name is not None and value is not None:
                tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
                tensor.contents.bytes_contents.append(value.encode())
        return request


GRPC_CASES: dict[str, BadCall] = {
    "empty prompt": BadCall(("empty",), text=b""),
    "no prompt": BadCall(("text_input", "missing"), text=None),
    "two prompts": BadCall(("one element",), num_elements=2),
    "numbers": BadCall(("INT32",), datatype="INT32"),
    "not UTF-8": BadCall(("UTF-8",), text=b"\xff"),
    "too long": BadCall(("4096", "5001"), text=b"x " * 5000, parameters='{"max_tokens": 4}'),
    "an unknown tensor": BadCall(("frobnicate",), extra="frobnicate"),
    "broken parameters": BadCall(("JSON",), parameters="{"),
    "a list of parameters": BadCall(("JSON object",), parameters="[]"),
    "a negative temperature": BadCall(("temperature",), parameters='{"temperature": -1}'),
    "a huge n": BadCall(("at most 16",), parameters='{"n": 1000000}'),
    "an unknown parameter": BadCall(("Unknown parameter",), parameters='{"frobnicate": 1}'),
    "an internal parameter": BadCall(("internal to the cluster",), parameters='{"kv_transfer_params": {}}'),
    "another protocol's parameter": BadCall(("stream_options",), parameters='{"stream_options": {"a": 1}}'),
    "an unknown model": BadCall(("gpt-5", MODEL), model="gpt-5", status=grpc.StatusCode.NOT_FOUND),
    "oversize": BadCall(("larger",), text=b"x" * MAX_BODY_BYTES, status=grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@pytest.fixture
def stub(system: System) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(system.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("name", GRPC_CASES)
def test_grpc_calls_are_refused_with_a_status_and_a_sentence(stub: GRPCInferenceServiceStub, name: str) -> None:
    case = GRPC_CASES[name]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(case.request(), timeout=30)
    assert caught.value.code() is case.status, caught.value.details()
    for word in case.words:
        assert word in caught.value.details()


def test_one_bad_request_on_a_stream_leaves_the_others_alone(stub: GRPCInferenceServiceStub) -> None:
    names = [name for name in GRPC_CASES if name != "oversize"]
    good = BadCall((), parameters='{"max_tokens": 6, "temperature": 0}').request()
    good.id = "good"
    requests = [good]
    for name in names:
        request = GRPC_CASES[name].request()
        request.id = name
        requests.append(request)
    wrong: dict[str, str] = {}
    right = 0
    for response in stub.ModelStreamInfer(iter(requests), timeout=60):
        if response.error_message:
            wrong[response.infer_response.id] = response.error_message
        else:
            assert response.infer_response.id == "good"
            right += 1
    assert right == 1
    assert set(wrong) == set(names)
    for name, message in wrong.items():
        assert all(word in message for word in GRPC_CASES[name].words), message


# ---- neighbours


def ask(system: System, **fields: Any) -> str:
    """The demo model's answer, streamed."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": True, **fields}
    text = ""
    with system.client() as client, client.stream("POST", CHAT, json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += "".join(
                    choice["delta"].get("content", "") for choice in json.loads(line.removeprefix("data: "))["choices"]
                )
    return text


def test_good_requests_do_not_notice_bad_ones_beside_them(system: System) -> None:
    before = system.metrics()
    with ThreadPoolExecutor(6) as pool:
        good = [pool.submit(ask, system) for _ in range(6)]
        bad = {name: pool.submit(case.post, system.url) for name, case in CASES.items()}
        good += [pool.submit(ask, system) for _ in range(6)]
        assert [future.result() for future in good] == [ANSWER] * 12
        for name, future in bad.items():
            CASES[name].check(future.result())
    after = system.metrics()
    name = 'baton_http_responses_total{status="500"}'
    assert after.get(name, 0) == before.get(name, 0)
    assert after["baton_requests_in_flight"] == 0


# ---- clients that leave, and clients that do not read


def aborts(system: System) -> float:
    return sum(value for name, value in system.metrics().items() if 'outcome="abort"' in name and "baton_" in name)


def leave(system: System, seed: int) -> None:
    """Start a long answer and leave: at once, before the first token, or after some of them."""
    rng = random.Random(seed)
    is_streamed = rng.random() < 0.7
    body = {
        "messages": [{"role": "user", "content": f"{seed} {'why? ' * rng.randrange(200)}"}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "n": rng.choice((1, 1, 3)),
        "stream": is_streamed,
    }
    data = json.dumps(body).encode()
    host, _, port = system.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        if not is_streamed or rng.random() < 0.3:
            time.sleep(rng.random() * 0.3)  # leave at a random moment
            return
        for _ in range(rng.randrange(1, 40)):
            assert connection.recv(256)


def test_clients_that_leave_are_counted_and_their_blocks_return(system: System) -> None:
    before, lines = aborts(system), len(system.finished_requests())
    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, system, seed) for seed in range(24)]
        staying = [pool.submit(ask, system) for _ in range(4)]
        for future in leaving:
            future.result()
        assert [future.result() for future in staying] == [ANSWER] * 4
    system.audit()
    expected = sum(random_n(seed) for seed in range(24))
    eventually(lambda: aborts(system) >= before + expected, f"{expected} aborts are counted")
    assert aborts(system) == before + expected
    eventually(lambda: len(system.finished_requests()) >= lines + expected + 4, "a log line for each")
    reasons = [line["finish_reason"] for line in system.finished_requests()[lines:]]
    assert reasons.count("abort") == expected
    with system.client() as client:
        assert client.get("/health").status_code == 200


def random_n(seed: int) -> int:
    """How many choices `leave` asks for."""
    rng = random.Random(seed)
    rng.random()
    rng.randrange(200)
    return rng.choice((1, 1, 3))


def test_a_cancelled_grpc_call_is_aborted(system: System, stub: GRPCInferenceServiceStub) -> None:
    before = aborts(system)
    request = BadCall((), parameters='{"max_tokens": 1500, "ignore_eos": true}').request()
    future = stub.ModelInfer.future(request, timeout=60)
    eventually(lambda: any(worker["sequences"].get("running") for worker in system.status()["workers"]), "it runs")
    future.cancel()
    system.audit()
    eventually(lambda: aborts(system) == before + 1, "the abort is counted")


def test_a_client_that_does_not_read_hurts_nobody_and_gets_all_of_its_answer(system: System) -> None:
    """16 choices with 20 logprobs per token are megabytes: more than every buffer between the worker and the client."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "n": 16,
        "max_tokens": 150,
        "ignore_eos": True,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 20,
        "stream": True,
    }
    data = json.dumps(body).encode()
    host, _, port = system.url.removeprefix("http://").partition(":")
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.settimeout(60)
    with connection:
        connection.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"connection: close\r\n\r\n" + data)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: ask(system), range(8))) == [ANSWER] * 8
        system.audit()  # the workers are done with it, although its client has read nothing
        assert system.status()["router"]["requests_in_flight"] == 16
        received = bytearray()
        while chunk := connection.recv(1 << 20):
            received += chunk
    assert len(received) > 4_000_000
    assert b"data: [DONE]" in received[-100:]
    assert received.count(b'"finish_reason":"length"') == 16
    eventually(lambda: system.status()["router"]["requests_in_flight"] == 0, "its place is given back")


def test_a_client_that_does_not_read_and_leaves_is_aborted(system: System) -> None:
    before = aborts(system)
    body = {"messages": HELLO, "n": 16, "max_tokens": 1500, "ignore_eos": True, "logprobs": True, "stream": True}
    with system.client() as client, client.stream("POST", CHAT, json=body) as answer:
        chunks = answer.iter_raw()  # when it is collected, the connection is closed
        next(chunks)
        eventually(
            lambda: sum(worker["sequences"].get("running", 0) for worker in system.status()["workers"]) == 16, "all run"
        )
    system.audit()
    eventually(lambda: aborts(system) == before + 16, "the aborts are counted")
