"""Whatever a client sends, it gets one readable sentence in OpenAI's shape, and no worker hears of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.contract.test_http import run
from tests.support.fake_worker import FakeCluster, Site, pair

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]

# path, what differs from a good body, the parameter that is named, a part of the sentence
TABLE: list[tuple[str, dict[str, Any], str | None, str]] = [
    (TEXT, {"prompt": ""}, "prompt", "must not be empty"),
    (TEXT, {"prompt": []}, "prompt", "must not be empty"),
    (TEXT, {"prompt": [[]]}, "prompt", "must be a string"),
    (TEXT, {"prompt": ["a", ""]}, "prompt", "must not be empty"),
    (TEXT, {"prompt": None}, "prompt", "is missing"),
    (TEXT, {"prompt": 5}, "prompt", "must be a string"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "must be a string"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", "must be a string"),
    (TEXT, {"prompt": [1.5]}, "prompt", "must be a string"),
    (TEXT, {"prompt": [True]}, "prompt", "must be a string"),
    (TEXT, {"prompt": [-1]}, "prompt", "must be a string"),
    (TEXT, {"prompt": [1024]}, "prompt", "vocabulary has 1024 tokens"),
    (TEXT, {"prompt": "x" * 5000}, "input_tokens", "context is 4096 tokens"),
    (TEXT, {"prompt": "x" * 4000, "max_tokens": 97}, "input_tokens", "4000 of the prompt and 97 to generate"),
    (TEXT, {"prompt": ["a"] * 300}, "prompt", "more than 256 choices"),
    (TEXT, {"model": "gpt-5"}, "model", "this server has 'fake'"),
    (TEXT, {"model": 5}, "model", "must be a string"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "must be at least 1"),
    (TEXT, {"max_tokens": "many"}, "max_tokens", "must be an integer"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", "must be an integer"),
    (TEXT, {"max_tokens": 10**30}, "max_tokens", "must be less than"),
    (TEXT, {"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than max_tokens"),
    (TEXT, {"temperature": -0.1}, "temperature", "must be at least 0"),
    (TEXT, {"temperature": 1e6}, "temperature", "must be at most"),
    (TEXT, {"temperature": "0.5"}, "temperature", "must be a number"),
    (TEXT, {"temperature": True}, "temperature", "must be a number"),
    (TEXT, {"top_p": 0}, "top_p", "must be greater than 0"),
    (TEXT, {"top_p": 1.1}, "top_p", "must be at most 1"),
    (TEXT, {"top_k": -2}, "top_k", "must be at least -1"),
    (TEXT, {"min_p": 2}, "min_p", "must be at most 1"),
    (TEXT, {"presence_penalty": 3}, "presence_penalty", "must be at most 2"),
    (TEXT, {"frequency_penalty": -3}, "frequency_penalty", "must be at least -2"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty", "must be greater than 0"),
    (TEXT, {"n": 0}, "n", "must be at least 1"),
    (TEXT, {"n": 17}, "n", "must be at most 16"),
    (TEXT, {"seed": 2**64}, "seed", "must be less than"),
    (TEXT, {"seed": "lucky"}, "seed", "must be an integer"),
    (TEXT, {"stop": ["x"] * 17}, "stop", "at most 16 strings"),
    (TEXT, {"stop": [""]}, "stop", "1 to 1024 characters"),
    (TEXT, {"stop": 7}, "stop", "a string or a list"),
    (TEXT, {"stop_token_ids": ["x"]}, "stop_token_ids[0]", "must be an integer"),
    (TEXT, {"stop_token_ids": [5000]}, "stop_token_ids", "vocabulary"),
    (TEXT, {"logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
    (TEXT, {"logit_bias": {"1": 101}}, "logit_bias.1", "must be at most 100"),
    (TEXT, {"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
    (TEXT, {"logit_bias": [1]}, "logit_bias", "must be an object"),
    (TEXT, {"logprobs": 21}, "logprobs", "must be at most 20"),
    (TEXT, {"logprobs": True}, "logprobs", "must be an integer"),
    (TEXT, {"logprobs": 1, "echo": True}, "logprobs", "echo together with logprobs"),
    (TEXT, {"stream": "yes"}, "stream", "must be true or false"),
    (TEXT, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "must be true or false"),
    (TEXT, {"cache_salt": "s" * 2000}, "cache_salt", "at most 1024 characters"),
    (TEXT, {"priority": 2**40}, "priority", "must be less than"),
    (TEXT, {"timeout": 0}, "timeout", "must be greater than 0"),
    (TEXT, {"best_of": 3}, "best_of", "not supported"),
    (TEXT, {"suffix": "!"}, "suffix", "not supported"),
    (TEXT, {"max_token": 5}, "max_token", "Did you mean max_tokens?"),
    (TEXT, {"foo": 5}, "foo", "Unknown parameter: foo."),
    (TEXT, {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params", "internal"),
    (TEXT, {"ec_transfer_params": {}}, "ec_transfer_params", "internal"),
    (TEXT, {"bootstrap_host": "x"}, "bootstrap_host", "internal"),
    (TEXT, {"block_ids": [1]}, "block_ids", "internal"),
    (TEXT, {"decode_worker": "d0"}, "decode_worker", "internal"),
    (TEXT, {"tenant": "other"}, "tenant", "internal"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": None}, "messages", "is missing"),
    (CHAT, {"messages": "hi"}, "messages", "must be a list"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "must be an object"),
    (CHAT, {"messages": [{"role": "cat", "content": "x"}]}, "messages[0].role", "must be one of"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0].type",
        "text only",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "input_tokens", "context is 4096"),
    (CHAT, {"max_completion_tokens": 5000}, "input_tokens", "context is 4096"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set messages"),
    ("/tokenize", {"prompt": "a", "messages": HI}, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": None}, "prompt", "either prompt or messages"),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "must be an integer"),
    ("/detokenize", {"tokens": [2**40]}, "tokens[0]", "must be less than"),
]

BODIES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (rb'{"prompt": "\ud800"}', "surrogates not allowed"),
    (b'{"prompt": "a\xed\xa0\xbd"}', "not valid JSON"),
    ('{"prompt": "a"}'.encode("utf-16"), "not valid JSON"),
    ('{"prompt": "a"}'.encode("utf-32-le"), "not valid JSON"),
    (b'{"prompt": "a", "stop": ' + b"[" * 960 + b"]" * 960 + b"}", "nested in more than 64 levels"),
    (b'{"messages": ' + b"[" * 66 + b"]" * 66 + b"}", "nested in more than 64 levels"),
    (b'{"prompt": ' + b"[" * 60 + b"]" * 60 + b"}", "must be a string"),
    (b"[1, 2]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is not JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', "must be a finite number"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "not valid JSON"),
]


def good(path: str) -> dict[str, Any]:
    if path == CHAT:
        return {"model": "fake", "messages": HI}
    return {"tokens": [1]} if path == "/detokenize" else {"model": "fake", "prompt": "hello"}


def test_bad_bodies_are_refused_by_name() -> None:
    async def scenario(here: Site) -> None:
        for path, change, param, part in TABLE:
            answer = await here.http.post(path, json=good(path) | change)
            error = answer.json()["error"]
            where = f"{path} {str(change)[:80]}: {error}"
            assert answer.status_code == (404 if "this server has" in part else 400), where
            assert set(error) == {"message", "type", "param", "code"}, where
            assert error["type"] == "invalid_request_error", where
            assert error["param"] == param, where
            assert part in error["message"], where
            assert "\n" not in error["message"], where
            assert len(error["message"]) < 300, where
        for data, part in BODIES:
            answer = await here.http.post(TEXT, content=data, headers={"content-type": "application/json"})
            assert answer.status_code == 400, data[:40]
            assert part in answer.json()["error"]["message"], data[:40]
        assert not any(worker.started for worker in here.cluster.workers.values())
        assert (await here.http.post(TEXT, json={"prompt": "still there", "max_tokens": 5})).status_code == 200

    run(pair, scenario)


def test_a_prompt_that_is_too_long_has_its_own_code() -> None:
    async def scenario(here: Site) -> None:
        error = (await here.http.post(TEXT, json={"prompt": "x" * 5000})).json()["error"]
        assert error["code"] == "context_length_exceeded"
        error = (await here.http.post(TEXT, json={"prompt": "x", "model": "other"})).json()["error"]
        assert error["code"] == "model_not_found"

    run(pair, scenario)


def test_what_changes_nothing_is_accepted() -> None:
    harmless = {
        "n": None,
        "temperature": None,
        "stop": None,
        "stream": None,
        "stream_options": None,
        "logit_bias": None,
        "seed": None,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "best_of": 1,
        "response_format": {"type": "text"},
        "tools": None,
        "kv_transfer_params": None,
        "max_tokens": 3,
    }

    async def scenario(here: Site) -> None:
        for path in (TEXT, CHAT):
            answer = await here.http.post(path, json=good(path) | harmless)
            assert answer.status_code == 200, answer.text

    run(pair, scenario)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/chat/completions/", 404),
    ],
)
def test_wrong_paths_and_methods_are_openai_shaped(method: str, path: str, status: int) -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]

    run(FakeCluster, scenario)


def test_only_json_is_read() -> None:
    async def scenario(here: Site) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await here.http.post(TEXT, content=b'{"prompt": "a"}', headers={"content-type": kind})
            assert answer.status_code == 415
            assert "application/json" in answer.json()["error"]["message"]
        answer = await here.http.post(
            TEXT, content=b'{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
        )
        assert answer.status_code == 200

    run(pair, scenario)


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    async def scenario(here: Site) -> None:
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000000\r\n\r\n"
        )
        assert b" 413 " in await reader.readline()
        writer.close()
        await writer.wait_closed()

        async def endless() -> Any:
            for _ in range(100):
                yield json.dumps({"prompt": "x" * 1000}).encode()

        answer = await here.http.post(TEXT, content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"

    run(pair, scenario, max_body_bytes=4096)


def test_a_client_that_leaves_within_its_body_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(here: Site) -> None:
        answered = asyncio.Event()
        statuses = []

        def count(status: int) -> None:
            statuses.append(status)
            answered.set()

        here.router.http._count = count  # type: ignore[attr-defined]
        host, port = here.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(30):
            await answered.wait()
        assert statuses == [499]
        assert "Traceback" not in caplog.text

    run(pair, scenario)


def test_a_bug_is_a_plain_500_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(here: Site) -> None:
        admission = here.router.admission
        here.router.answers._admission = None  # type: ignore[assignment]
        answer = await here.http.post(TEXT, json={"prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "NoneType" not in answer.text
        here.router.answers._admission = admission
        assert (await here.http.post(TEXT, json={"prompt": "a"})).status_code == 200

    run(pair, scenario)
