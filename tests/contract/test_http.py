"""What HTTP clients get: OpenAI's shapes, streamed and not, from a router over fake workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from baton.auth import worker_token
from tests.support.fake_worker import EOS, SECRET, FakeCluster, Script, Site, pair, site, tokens_of

PROMPT = "Hello wörld"
TOKENS = list(PROMPT.encode())


def text_of(count: int) -> str:
    return bytes(tokens_of(TOKENS, count)).decode("utf-8", "replace")


def run(make: Callable[[], FakeCluster], scenario: Callable[[Site], Awaitable[None]], **options: Any) -> None:
    """A scenario in front of a cluster, with nothing left of it afterwards."""

    async def main() -> None:
        async with site(make(), **options) as here:
            await scenario(here)
            await here.settled()

    asyncio.run(main())


def events(body: str) -> list[Any]:
    """The data of server-sent events; [DONE] as None."""
    found = []
    for block in body.split("\n\n"):
        for line in block.split("\n"):
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(None if data == "[DONE]" else json.loads(data))
    return found


def test_a_completion_is_whole_and_counted() -> None:
    async def scenario(here: Site) -> None:
        answer = await here.http.post("/v1/completions", json={"model": "fake", "prompt": PROMPT, "max_tokens": 20})
        assert answer.status_code == 200
        body = answer.json()
        assert body["object"] == "text_completion"
        assert body["model"] == "fake"
        assert body["system_fingerprint"].startswith("baton-")
        assert body["choices"] == [
            {"index": 0, "text": text_of(20), "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]
        assert body["usage"] == {
            "prompt_tokens": 12,
            "completion_tokens": 20,
            "total_tokens": 32,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    run(pair, scenario)


def test_a_stream_of_completions_has_the_same_text_then_usage_then_the_end_mark() -> None:
    async def scenario(here: Site) -> None:
        wish = {"prompt": PROMPT, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
        answer = await here.http.post("/v1/completions", json=wish)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        *chunks, usage, done = events(answer.text)
        assert done is None
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 20
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(20)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert len({chunk["id"] for chunk in chunks}) == 1

    run(pair, scenario)


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    async def scenario(here: Site) -> None:
        wish = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
        *chunks, done = events((await here.http.post("/v1/chat/completions", json=wish)).text)
        assert done is None
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "user:"
        assert deltas[-1] == {}
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert chunks[0]["object"] == "chat.completion.chunk"

    run(pair, scenario)


def test_usage_is_on_every_chunk_if_asked_for() -> None:
    async def scenario(here: Site) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        wish = {"prompt": "abc", "max_tokens": 3, "stream": True, "stream_options": options}
        chunks = events((await here.http.post("/v1/completions", json=wish)).text)
        text = ""
        for chunk in chunks[:-1]:
            text += "".join(choice["text"] for choice in chunk["choices"])
            assert chunk["usage"]["completion_tokens"] == len(text)
        assert text == "abc"

    run(pair, scenario)


def test_the_openai_client_works_streamed_and_not() -> None:
    async def scenario(here: Site) -> None:
        async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="any", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            whole = await client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=8)
            assert whole.choices[0].message.content == "user: hi"
            assert whole.usage is not None
            stream = await client.chat.completions.create(
                model="fake",
                messages=messages,
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"top_k": 5, "ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "user: hi"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 8
            assert [model.id async for model in client.models.list()] == ["fake"]
            assert (await client.models.retrieve("fake")).id == "fake"
            with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
                await client.models.retrieve("other")

    run(pair, scenario)


def test_several_prompts_and_samples_are_choices_in_order() -> None:
    async def scenario(here: Site) -> None:
        wish: dict[str, Any] = {"prompt": ["ab", [99, 100]], "n": 2, "max_tokens": 4, "seed": 7}
        body = (await here.http.post("/v1/completions", json=wish)).json()
        assert [choice["text"] for choice in body["choices"]] == ["abab", "abab", "cdcd", "cdcd"]
        assert body["usage"]["prompt_tokens"] == 4
        assert body["usage"]["completion_tokens"] == 16
        starts = here.cluster.workers["prefill-0"].started
        assert {start.sampling.seed for start in starts} == {7}
        assert [start.sampling.sample_index for start in starts] == [0, 1, 0, 1]
        chunks = events((await here.http.post("/v1/completions", json={**wish, "stream": True})).text)[:-1]
        texts = dict.fromkeys(range(4), "")
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == {0: "abab", 1: "abab", 2: "cdcd", 3: "cdcd"}

    run(pair, scenario)


def test_a_stop_string_across_tokens_ends_the_text_and_aborts_the_rest() -> None:
    async def scenario(here: Site) -> None:
        decode = here.cluster.workers["decode-0"]
        wish: dict[str, Any] = {"prompt": "one two END more", "max_tokens": 100, "stop": ["END", "absent"]}
        body = (await here.http.post("/v1/completions", json=wish)).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two ", "stop", "END")
        assert body["usage"]["completion_tokens"] == 11
        await decode.until(lambda: bool(decode.aborted))
        wish |= {"include_stop_str_in_output": True, "stream": True}
        chunks = events((await here.http.post("/v1/completions", json=wish)).text)[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two END"
        assert chunks[-1]["choices"][0]["stop_reason"] == "END"

    run(lambda: pair(decode=Script(burst=False)), scenario)


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    async def scenario(here: Site) -> None:
        wish = {"prompt": "a.b.c.", "max_tokens": 12, "stop": ".", "min_tokens": 3}
        choice = (await here.http.post("/v1/completions", json=wish)).json()["choices"][0]
        assert choice["text"] == "a.b"

    run(pair, scenario)


def test_a_stopping_token_is_counted_and_not_shown() -> None:
    async def scenario(here: Site) -> None:
        wish = {"prompt": "abcdef", "max_tokens": 100, "stop_token_ids": [EOS]}
        body = (await here.http.post("/v1/completions", json=wish)).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abcd", "stop", EOS)
        assert body["usage"]["completion_tokens"] == 5

    run(lambda: pair(decode=Script(eos_at=4)), scenario)


def test_a_request_that_its_first_token_ends_leaves_nothing_at_the_decode_worker() -> None:
    async def scenario(here: Site) -> None:
        body = (await here.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1})).json()
        assert body["choices"][0]["text"] == "a"
        decode = here.cluster.workers["decode-0"]
        await decode.until(lambda: len(decode.aborted) == 1)

    run(pair, scenario)


def test_logprobs_have_openais_shapes() -> None:
    async def scenario(here: Site) -> None:
        wish: dict[str, Any] = {"prompt": "ab", "max_tokens": 2, "logprobs": 2}
        shape = (await here.http.post("/v1/completions", json=wish)).json()["choices"][0]["logprobs"]
        assert shape["tokens"] == ["a", "b"]
        assert shape["token_logprobs"] == [-0.5, -0.5]
        assert shape["top_logprobs"] == [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}]
        assert shape["text_offset"] == [0, 1]
        wish = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True, "top_logprobs": 1}
        content = (await here.http.post("/v1/chat/completions", json=wish)).json()["choices"][0]["logprobs"]["content"]
        assert content == [
            {
                "token": "u",
                "logprob": -0.5,
                "bytes": [117],
                "top_logprobs": [{"token": "u", "logprob": -0.5, "bytes": [117]}],
            }
        ]

    run(pair, scenario)


def test_echo_puts_the_prompt_in_front() -> None:
    async def scenario(here: Site) -> None:
        wish: dict[str, Any] = {"prompt": ["ab", [99]], "max_tokens": 2, "echo": True}
        body = (await here.http.post("/v1/completions", json=wish)).json()
        assert [choice["text"] for choice in body["choices"]] == ["abab", "ccc"]
        chunks = events((await here.http.post("/v1/completions", json={**wish, "stream": True})).text)[:-1]
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 0) == "abab"

    run(pair, scenario)


def test_token_ids_are_returned_if_asked_for() -> None:
    async def scenario(here: Site) -> None:
        wish: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True}
        choice = (await here.http.post("/v1/completions", json=wish)).json()["choices"][0]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], [5, 6, 5])
        chunks = events((await here.http.post("/v1/completions", json={**wish, "stream": True})).text)[:-1]
        assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == [5, 6, 5]

    run(pair, scenario)


def test_parameters_reach_the_worker_as_they_were_sent() -> None:
    async def scenario(here: Site) -> None:
        wish = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 7,
            "max_tokens": 9,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "seed": -1,
            "stop_token_ids": [3, 3, 4],
            "ignore_eos": True,
            "logit_bias": {"5": -3},
            "cache_salt": "salt",
            "priority": -2,
            "user": "harmless",
            "n": None,
        }
        assert (await here.http.post("/v1/chat/completions", json=wish)).status_code == 200
        (start,) = here.cluster.workers["prefill-0"].started
        sampling = start.sampling
        assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k, sampling.ignore_eos) == (7, 2, 0, True)
        assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
        assert sampling.presence_penalty == 1.0
        assert sampling.frequency_penalty == -1.0
        assert sampling.repetition_penalty == 1.5
        assert sampling.seed == 2**64 - 1
        assert list(sampling.stop_token_ids) == [3, 4]
        assert dict(sampling.logit_bias) == {5: -3.0}
        assert (start.cache_salt, start.priority, start.tenant) == ("salt", -2, "default")
        assert bytes(start.token_ids).decode() == "user: hi\nassistant:"
        assert start.num_prompt_tokens == len(start.token_ids)
        assert 0 < start.deadline_s <= 600

    run(pair, scenario)


def test_a_chat_may_generate_all_that_fits() -> None:
    async def scenario(here: Site) -> None:
        for worker in here.cluster.workers.values():
            worker.script.burst = True
        body = (
            await here.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        ).json()
        assert body["usage"]["total_tokens"] == 4096

    run(pair, scenario)


def test_request_ids_come_in_and_go_out() -> None:
    async def scenario(here: Site) -> None:
        wish = {"prompt": "a", "max_tokens": 1}
        answer = await here.http.post("/v1/completions", json=wish, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        answer = await here.http.post("/v1/completions", json=wish, headers={"x-request-id": "not nice"})
        assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"

    run(pair, scenario)


def test_tokenize_and_detokenize_are_inverse() -> None:
    async def scenario(here: Site) -> None:
        body = (await here.http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True})).json()
        assert body["tokens"] == TOKENS
        assert body["count"] == 12
        assert body["max_model_len"] == 4096
        assert len(body["token_strs"]) == 12
        assert (await here.http.post("/detokenize", json={"tokens": TOKENS})).json() == {"prompt": PROMPT}
        chat = await here.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})
        assert bytes(chat.json()["tokens"]) == b"user: x\nassistant:"

    run(pair, scenario)


def test_health_needs_workers_and_liveness_does_not() -> None:
    async def scenario(here: Site) -> None:
        assert (await here.http.get("/health")).status_code == 503
        assert (await here.http.get("/live")).status_code == 200
        refused = await here.http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        worker = here.cluster.add("mixed-0", "mixed")
        await worker.start()
        here.router.set_members(here.cluster.fleet())
        await asyncio.wait_for(here.serving.wait(), 5)
        assert (await here.http.get("/health")).json() == {"status": "ok"}
        head = await here.http.head("/health")
        assert (head.status_code, head.content) == (200, b"")
        assert (await here.http.post("/v1/completions", json={"prompt": "a"})).status_code == 200

    run(FakeCluster, scenario)


def test_metrics_have_our_names_and_vllms() -> None:
    async def scenario(here: Site) -> None:
        await here.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20})
        here.router.book.flush()
        answer = await here.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert lines['baton_requests_total{endpoint="completions",outcome="length"}'] == "1.0"
        assert lines["baton_generated_tokens_total"] == "20.0"
        assert lines["baton_inter_token_latency_seconds_count"] == "19.0"
        assert lines['baton_kv_transferred_bytes_total{transport="tcp"}'] == "1000.0"
        assert lines['baton_request_stage_seconds_count{stage="transfer_exposed"}'] == "1.0"
        assert lines['baton_worker_blocks{role="decode",state="free",worker_id="decode-0"}'] == "512.0"
        assert lines['baton_worker_kv_integrity_failures_total{role="decode",worker_id="decode-0"}'] == "0.0"
        assert lines['vllm:prefix_cache_hits_total{engine="0",model_name="fake"}'] == "32.0"
        assert lines['vllm:generation_tokens_total{engine="0",model_name="fake"}'] == "20.0"
        assert lines['vllm:time_to_first_token_seconds_count{engine="0",model_name="fake"}'] == "1.0"
        assert lines['vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"}'] == "1.0"
        assert (await here.http.head("/metrics")).status_code == 200

    run(pair, scenario)


def test_operators_see_every_worker_and_every_trace_with_the_clusters_token() -> None:
    async def scenario(here: Site) -> None:
        token = {"authorization": worker_token(SECRET)}
        answer = await here.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20})
        here.router.book.flush()
        for path in ("/internal/status", "/internal/traces", f"/internal/trace/{answer.json()['id']}"):
            assert (await here.http.get(path)).status_code == 401
            assert (await here.http.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
        for name in (answer.json()["id"], answer.headers["x-request-id"]):
            trace = (await here.http.get(f"/internal/trace/{name}", headers=token)).json()
            assert (trace["prefill_worker"], trace["decode_worker"], trace["num_tokens"]) == (
                "prefill-0",
                "decode-0",
                20,
            )
            assert trace["ttft_ms"] > 0
            assert set(trace["moments_ms"]) == {"router", "prefill-0", "decode-0"}
        assert (await here.http.get("/internal/trace/unknown", headers=token)).status_code == 404
        traces = (await here.http.get("/internal/traces", headers=token)).json()["traces"]
        assert [trace["request_id"] for trace in traces] == [answer.json()["id"]]
        await here.cluster.workers["decode-0"].die()
        status = (await here.http.get("/internal/status", headers=token)).json()
        assert status["router"]["requests_in_flight"] == 0
        by_id = {worker["worker_id"]: worker for worker in status["workers"]}
        assert by_id["prefill-0"]["role"] == "prefill"
        assert by_id["prefill-0"]["blocks"] == {"free": 512}
        assert by_id["prefill-0"]["pids"] == [4711]
        assert by_id["decode-0"]["reachable"] is False

    run(pair, scenario)


def test_api_keys_are_asked_for_and_name_the_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-1\nkey-2 acme  # a customer\n")
    file.chmod(0o600)

    async def scenario(here: Site) -> None:
        wish = {"prompt": "a", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "key-1"}):
            refused = await here.http.post("/v1/completions", json=wish, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert (await here.http.get("/v1/models", headers=headers)).status_code == 401
        for key in ("key-1", "key-2"):
            allowed = {"authorization": f"Bearer {key}"}
            assert (await here.http.post("/v1/completions", json=wish, headers=allowed)).status_code == 200
        tenants = [start.tenant for start in here.cluster.workers["prefill-0"].started]
        assert tenants == ["default", "acme"]
        for path in ("/health", "/live", "/metrics", "/version"):
            assert (await here.http.get(path)).status_code == 200

    run(pair, scenario, api_key_file=str(file))


def test_too_many_requests_are_refused_at_once() -> None:
    async def scenario(here: Site) -> None:
        wish = {"prompt": "abc", "max_tokens": 3}
        first = asyncio.create_task(here.http.post("/v1/completions", json=wish))
        prefill = here.cluster.workers["prefill-0"]
        await prefill.until(lambda: bool(prefill.started))
        refused = await here.http.post("/v1/completions", json=wish)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        impossible = await here.http.post("/v1/completions", json={**wish, "n": 2})
        assert impossible.status_code == 400
        prefill.gate.set()
        assert (await first).status_code == 200

    run(lambda: pair(prefill=Script(gate_at=0)), scenario, max_concurrent_requests=1)


def test_a_router_that_ends_tells_running_streams_so() -> None:
    async def main() -> None:
        async with site(pair(decode=Script(gate_at=2))) as here:
            wish = {"prompt": "abc", "max_tokens": 3, "stream": True}
            async with here.http.stream("POST", "/v1/completions", json=wish) as answer:
                received = ""
                async for text in answer.aiter_text():
                    received += text
                    here.router.close()
            *_, last = events(received)
            assert last["error"]["code"] == 503
            assert "shutting down" in last["error"]["message"]

    asyncio.run(main())
