"""The clients that people have get the demo model's exact answers from a whole server, and say where the time went."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.system import System, serve

pytestmark = pytest.mark.timeout(120)

MODEL = "baton-demo"
SERVICE = "inference.GRPCInferenceService"
QUESTIONS = ("What is Baton?", "Who are you?", "What is the KV cache?", "What is TTFT?")
ANSWERS = {
    pair["question"]: pair["answer"]
    for line in (Path(__file__).parents[2] / "bench" / "demo_model" / "qa.jsonl").read_text().splitlines()
    if (pair := json.loads(line))
}
QUESTION = QUESTIONS[0]
ANSWER = ANSWERS[QUESTION]


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def audited(system: System) -> Iterator[None]:
    yield
    system.audit()


@pytest.fixture
def client(system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
def channel(system: System) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(system.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompt(system: System) -> str:
    """QUESTION as the model's chat template writes it, for the doors that take plain text."""
    with system.client() as http:
        tokens = http.post("/tokenize", json={"messages": chat(QUESTION)}).json()["tokens"]
        return str(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])


def chat(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def sse(text: str) -> list[Any]:
    """The data of server-sent events, parsed; the end mark as it is."""
    data = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


# ---- plain HTTP


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_readmes_curl_gets_the_exact_answer(system: System, question: str) -> None:
    with system.client() as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": chat(question)}).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWERS[question], "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_plain_stream_gets_the_exact_answer_and_ends_with_the_end_mark(system: System, question: str) -> None:
    body = {"model": MODEL, "messages": chat(question), "temperature": 0, "stream": True}
    with system.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = sse(answer.read().decode())
    assert events.pop() == "[DONE]"
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWERS[question]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert "usage" not in events[-1]


def test_a_completion_of_text_and_of_its_tokens_are_the_same(system: System, prompt: str) -> None:
    with system.client() as http:
        tokens = http.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False}).json()["tokens"]
        body = {"model": MODEL, "temperature": 0, "max_tokens": 128, "add_special_tokens": False}
        answers = [http.post("/v1/completions", json={**body, "prompt": item}).json() for item in (prompt, tokens)]
    assert [answer["choices"][0]["text"] for answer in answers] == [ANSWER] * 2
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(tokens)] * 2


def test_several_prompts_are_answered_in_their_order(system: System, prompt: str) -> None:
    body = {"model": MODEL, "prompt": [prompt, prompt[:-1]], "n": 2, "temperature": 0, "max_tokens": 8, "echo": True}
    with system.client() as http:
        choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"] == prompt + choices[0]["text"].removeprefix(prompt)
    assert choices[2]["text"] == choices[3]["text"]
    assert choices[2]["text"].startswith(prompt[:-1])


def test_seeded_samples_repeat_and_differ_from_each_other(system: System) -> None:
    body = {"messages": chat(QUESTION), "temperature": 5.0, "seed": 7, "n": 2, "max_tokens": 24}
    with system.client() as http:
        first, second = (http.post("/v1/chat/completions", json=body).json()["choices"] for _ in range(2))
        other = http.post("/v1/chat/completions", json={**body, "seed": 8}).json()["choices"]
    texts = [choice["message"]["content"] for choice in first]
    assert [choice["message"]["content"] for choice in second] == texts
    assert len({*texts, *(choice["message"]["content"] for choice in other)}) == 4


def test_text_survives_tokenizing_and_back(system: System) -> None:
    text = "What is Baton? Ein Stäbchen: 接力棒 🏃\n\ttwo  spaces"
    with system.client() as http:
        answer = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back["prompt"] == text
    assert answer["count"] == len(answer["tokens"]) > 0
    assert answer["max_model_len"] >= 2048


def test_the_small_endpoints_answer(system: System) -> None:
    with system.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        head = http.head("/health")
        assert (head.status_code, head.content) == (200, b"")
        assert http.get("/live").status_code == 200
        assert http.get("/version").json()["version"]
        models = http.get("/v1/models").json()
        assert [card["id"] for card in models["data"]] == [MODEL]
        assert models["data"][0]["max_model_len"] >= 2048
        assert http.get(f"/v1/models/{MODEL}").json() == models["data"][0]


def test_a_request_id_is_echoed_and_found_again(system: System) -> None:
    with system.client() as http:
        body = {"messages": chat(QUESTION), "max_tokens": 2}
        answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "my-own-1"})
        assert answer.headers["x-request-id"] == "my-own-1"
        strange = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "not a \t plain one"})
        assert strange.headers["x-request-id"].isalnum()
    assert system.finished("my-own-1")["request_id"] == answer.json()["id"]
    assert system.trace("my-own-1")["request_id"] == answer.json()["id"]


def test_a_small_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(system: System) -> None:
    """Nagle's algorithm and a client's delayed acknowledgements together cost 40 ms per answer."""
    times_ms = []
    with system.client() as http:
        for _ in range(25):
            began = time.perf_counter()
            http.get("/version")
            times_ms.append((time.perf_counter() - began) * 1e3)
    assert statistics.median(times_ms) < 30


# ---- the openai package


def test_openai_lists_and_retrieves_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize("question", QUESTIONS)
def test_openai_chat_gets_the_exact_answer(client: openai.OpenAI, question: str) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=chat(question), temperature=0)
    assert answer.choices[0].message.content == ANSWERS[question]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_streams_the_exact_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=chat(QUESTION), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_chat_gives_n_choices_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0, n=2)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(0, ANSWER), (1, ANSWER)]
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: ANSWER, 1: ANSWER}
    assert reasons == {0: "stop", 1: "stop"}
    assert whole.usage is not None
    assert whole.usage.prompt_tokens < 20, "a prompt counts once"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_stop_strings_end_the_text_before_them(client: openai.OpenAI, is_streamed: bool) -> None:
    stop = ANSWER.split()[6]
    expected = ANSWER[: ANSWER.index(stop)]
    assert len(expected) > 10
    request: dict[str, Any] = {"model": MODEL, "messages": chat(QUESTION), "temperature": 0, "stop": [stop, "zzz"]}
    if is_streamed:
        chunks = list(client.chat.completions.create(**request, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        choice = client.chat.completions.create(**request).choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
        assert choice.stop_reason == stop  # type: ignore[attr-defined]  # vLLM's extra field


def test_openai_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat(QUESTION), temperature=0, max_completion_tokens=5
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert ANSWER.startswith(answer.choices[0].message.content or "?")


def test_openai_chat_logprobs_name_the_tokens_of_the_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": chat(QUESTION),
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = client.chat.completions.create(**request).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert len(content) == 12
    assert b"".join(bytes(item.bytes or []) for item in content).decode() == choice.message.content
    for item in content:
        values = [top.logprob for top in item.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert item.logprob == values[0] <= 0, "greedy takes the likeliest token"
    streamed = [
        item
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs is not None
        for item in chunk.choices[0].logprobs.content or []
    ]
    assert [item.token for item in streamed] == [item.token for item in content]


def test_openai_completions_streamed_and_not_with_logprobs(client: openai.OpenAI, prompt: str) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 128,
        "extra_body": {"add_special_tokens": False},
    }
    assert client.completions.create(**request).choices[0].text == ANSWER
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    choice = client.completions.create(**request, logprobs=2).choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert "".join(tokens).startswith(ANSWER)
    assert [ANSWER.startswith(token, offset) for token, offset in zip(tokens, offsets, strict=True)][:-1] == [True] * (
        len(tokens) - 1
    )


def test_openai_errors_carry_their_parameter(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=chat("?"), temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=chat("?"))
    assert missing.value.code == "model_not_found"


# ---- tritonclient and plain gRPC


@pytest.fixture(scope="module")
def triton(system: System, prompt: str) -> dict[str, Any]:
    """What tritonclient got; see tests/support/triton_client.py."""
    command = [sys.executable, "-m", "tests.support.triton_client", system.grpc, MODEL, prompt]
    found = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout))


def infer(channel: grpc.Channel, model: str, text: str, key: str = "", **sampling: Any) -> pb.ModelInferResponse:
    """One call of plain gRPC."""
    request = pb.ModelInferRequest(model_name=model, id=f"infer-{text[:8]}-{key}")
    for name, value in (("text_input", text), ("sampling_parameters", json.dumps({"temperature": 0, **sampling}))):
        request.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(value.encode())
    metadata = (("authorization", key),) if key else ()
    return GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30, metadata=metadata)


def test_triton_sees_a_live_ready_server_and_its_model(triton: dict[str, Any]) -> None:
    assert triton["live"] is triton["ready"] is triton["model_ready"] is triton["decoupled"] is True
    assert triton["other_model_ready"] is False
    assert triton["server"] == "baton"
    assert "text_input" in triton["inputs"]
    assert "text_output" in triton["outputs"]
    assert triton["error"]["status"] == "StatusCode.NOT_FOUND"
    assert MODEL in triton["error"]["message"]


def test_triton_infer_gets_the_exact_answer(triton: dict[str, Any]) -> None:
    answer = triton["infer"]
    assert (answer["id"], answer["text"], answer["finish_reason"]) == ("triton-1", ANSWER, "stop")
    assert answer["completion_tokens"] > 10


def test_triton_streams_several_requests_side_by_side(triton: dict[str, Any]) -> None:
    stream = triton["stream"]
    assert stream["texts"] == dict.fromkeys(("a", "b", "whole"), ANSWER)
    assert stream["counts"]["whole"] == 1
    assert min(stream["counts"]["a"], stream["counts"]["b"]) > 5


def test_grpc_health_says_serving(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_grpc_reflection_names_the_service_and_its_methods(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    described = database.FindFileContainingSymbol(SERVICE)
    methods = {method.name for service in described.service for method in service.method}
    assert {"ServerLive", "ModelInfer", "ModelStreamInfer"} <= methods


# ---- what the server says about its requests


def check_waterfall(line: dict[str, Any]) -> None:
    """A disaggregated request's measured parts: all there, none negative, none longer than what contains it."""
    names = ("route", "queue", "prefill", "transfer", "transfer_hidden", "transfer_exposed", "handover", "decode")
    parts = {name: line[f"{name}_ms"] for name in (*names, "ttft", "tpot", "total")}
    assert all(value is not None and value >= 0 for value in parts.values()), parts
    assert parts["ttft"] <= parts["total"]
    assert parts["route"] + parts["queue"] + parts["prefill"] <= parts["ttft"] + 0.01
    assert parts["ttft"] + parts["decode"] <= parts["total"] + 0.01
    assert parts["transfer_hidden"] <= parts["transfer"] + 0.01
    assert line["transport"] in ("shm", "tcp")
    assert line["kv_bytes"] > 0
    assert line["attempts"] == 1
    assert (line["prefill_worker"], line["decode_worker"]) == ("prefill-0", "decode-0")


def test_every_request_leaves_one_log_line_with_its_waterfall(
    system: System, client: openai.OpenAI, channel: grpc.Channel, prompt: str
) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0)
    (stream_id,) = {
        chunk.id
        for chunk in client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0, stream=True)
    }
    completion = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    response = infer(channel, MODEL, prompt)
    for request_id, endpoint in (
        (plain.id, "chat"),
        (stream_id, "chat"),
        (completion.id, "completions"),
        (response.id, "grpc"),
    ):
        line = system.finished(request_id)
        assert line["endpoint"] == endpoint
        assert line["finish_reason"] in ("stop", "length")
        assert line["num_prompt_tokens"] > 0
        assert line["num_tokens"] > 1
        check_waterfall(line)
        trace = system.trace(line["request_id"])
        assert {key: trace[key] for key in ("ttft_ms", "total_ms", "kv_bytes", "transport")} == {
            key: line[key] for key in ("ttft_ms", "total_ms", "kv_bytes", "transport")
        }
        assert set(trace["moments_ms"]) == {"router", "prefill-0", "decode-0"}
        assert min(at for moments in trace["moments_ms"].values() for at in moments.values()) >= 0


def test_metrics_parse_and_count_what_was_served(system: System, client: openai.OpenAI) -> None:
    before = system.metrics()
    answer = client.chat.completions.create(model=MODEL, messages=chat(QUESTION), temperature=0)
    system.finished(answer.id)
    with system.client() as http:
        text = http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "baton_build_info",
        "baton_requests",
        "baton_prompt_tokens",
        "baton_generated_tokens",
        "baton_kv_transferred_bytes",
        "baton_time_to_first_token_seconds",
        "baton_request_stage_seconds",
        "baton_worker_up",
        "baton_worker_blocks",
        "baton_worker_sequences",
        "baton_serving",
        "vllm:time_to_first_token_seconds",
        "vllm:num_requests_running",
    ):
        assert name in families, f"{name} is not among {sorted(families)}"
    after = system.metrics()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert answer.usage is not None
    assert gained('baton_requests_total{endpoint="chat",outcome="stop"}') == 1
    assert gained("baton_generated_tokens_total") == answer.usage.completion_tokens
    assert gained("baton_prompt_tokens_total") == answer.usage.prompt_tokens
    assert gained("baton_time_to_first_token_seconds_count") == 1
    assert gained('baton_request_stage_seconds_count{stage="transfer"}') == 1
    assert after["baton_serving"] == 1
    assert after['baton_worker_up{role="decode",worker_id="decode-0"}'] == 1


# ---- API keys


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two tenants. The simulated engine's KV tells whose it is, so a leak between them would also end the request."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# who may\nkey-of-ann ann\nkey-of-bob bob  # a comment\n")
    file.chmod(0o600)
    with serve("--engine", "sim", "--api-key-file", str(file)) as running:
        yield running


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic key-of-ann", "key-of-ann"])
def test_without_a_known_key_nothing_is_served(guarded: System, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    with guarded.client(**headers) as http:
        for answer in (
            http.post("/v1/completions", json={"prompt": "x"}),
            http.post("/v1/chat/completions", json={"messages": chat("x")}),
            http.post("/tokenize", json={"prompt": "x"}),
            http.get("/v1/models"),
            http.get("/internal/status"),
        ):
            assert answer.status_code == 401, answer.text
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
    with grpc.insecure_channel(guarded.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        infer(channel, "baton-sim", "x", header or "")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_openai_reports_a_wrong_key(guarded: System) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="baton-sim", prompt="x")


def test_the_prefix_cache_is_shared_within_a_tenant_and_never_between(guarded: System) -> None:
    prompt = [3 + index % 200 for index in range(100)]

    def cached(key: str, salt: str = "") -> int:
        body = {"model": "baton-sim", "prompt": prompt, "max_tokens": 4, "temperature": 0, "cache_salt": salt}
        with guarded.client(authorization=f"Bearer {key}") as http:
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
        assert guarded.finished(answer.json()["id"])["tenant"] == key.removeprefix("key-of-")
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("key-of-ann") == 0
    assert cached("key-of-ann") > 0
    assert cached("key-of-bob") == 0
    assert cached("key-of-bob") > 0
    assert cached("key-of-ann", salt="mine") == 0
    guarded.audit()


def test_a_key_opens_the_grpc_door(guarded: System) -> None:
    with grpc.insecure_channel(guarded.grpc) as channel:
        response = infer(channel, "baton-sim", "hello", "Bearer key-of-bob", max_tokens=3)
    assert guarded.finished(response.id)["tenant"] == "bob"
