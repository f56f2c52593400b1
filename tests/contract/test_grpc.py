"""The public gRPC door: KServe v2 for tritonclient and anybody else, health, reflection, statuses."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from router.kserve import SERVICE
from tests.contract.test_http import run
from tests.support.fake_worker import FakeCluster, Script, Site, pair

PROMPT = "Hello wörld"
REPOSITORY = Path(__file__).parents[2]


def infer(
    prompt: str | None = PROMPT,
    *,
    stream: bool | None = None,
    sampling: str | None = None,
    model: str = "fake",
    id: str = "",
    **parameters: Any,
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id)
    tensors = {"text_input": prompt, "sampling_parameters": sampling}
    for name, value in tensors.items():
        if value is not None:
            tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(value.encode())
    if stream is not None:
        request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(stream)
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def outputs(response: pb.ModelInferResponse) -> dict[str, list[str]]:
    found = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        items, position = [], 0
        while position < len(raw):
            (length,) = struct.unpack_from("<I", raw, position)
            items.append(raw[position + 4 : position + 4 + length].decode())
            position += 4 + length
        assert list(tensor.shape) == [len(items)]
        found[tensor.name] = items
    return found


def stub(channel: grpc.aio.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


async def answers(calls: AsyncIterator[Any]) -> list[Any]:
    return [answer async for answer in calls]


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient is not installed")
def test_tritonclient_works() -> None:
    async def scenario(here: Site) -> None:
        script = REPOSITORY / "tests/support/triton_script.py"
        process = await asyncio.create_subprocess_exec(
            sys.executable, script, here.grpc_address, "fake", PROMPT, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 40)
        assert process.returncode == 0
        seen = json.loads(output)
        assert (seen["live"], seen["ready"], seen["model_ready"], seen["other_ready"]) == (True, True, True, False)
        assert (seen["server"], seen["decoupled"]) == ("baton", True)
        assert seen["inputs"][0] == "text_input"
        expected = (PROMPT * 2).encode()[:20].decode("utf-8", "replace")
        assert seen["whole"] == [expected, "length"]
        assert "".join(seen["pieces"]) == expected
        assert len(seen["pieces"]) > 1
        assert "temperature must be at least 0" in seen["stream_error"]
        assert seen["error"][0] == "StatusCode.INVALID_ARGUMENT"
        assert "max_tokens must be at least 1" in seen["error"][1]

    run(pair, scenario)


def test_one_request_has_one_answer() -> None:
    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            answer = await stub(channel).ModelInfer(infer("abc", max_tokens=4, n=2, id="mine", seed=5))
            assert (answer.id, answer.model_name) == ("mine", "fake")
            assert outputs(answer) == {"text_output": ["abca", "abca"], "finish_reason": ["length", "length"]}
            assert answer.parameters["triton_final_response"].bool_param
            assert answer.parameters["prompt_tokens"].int64_param == 3
            assert answer.parameters["completion_tokens"].int64_param == 8
        (first, second) = here.cluster.workers["prefill-0"].started
        assert (first.sampling.seed, second.sampling.sample_index) == (5, 1)

    run(pair, scenario)


def test_requests_of_one_stream_are_answered_side_by_side() -> None:
    async def scenario(here: Site) -> None:
        prefill = here.cluster.workers["prefill-0"]

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            yield infer("slow", stream=True, id="a", max_tokens=2)
            await prefill.until(lambda: bool(prefill.started))
            prefill.script.gate_at = None
            yield infer("fast", stream=True, id="b", max_tokens=2)
            yield infer("whole", id="c", max_tokens=2)
            yield infer("", id="d")

        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            finals: list[str] = []
            texts: dict[str, str] = {"a": "", "b": "", "c": ""}
            async for answer in stub(channel).ModelStreamInfer(requests()):
                response = answer.infer_response
                if response.parameters["triton_final_response"].bool_param:
                    finals.append(response.id)
                if len(finals) == 3:
                    prefill.gate.set()
                if response.id == "d":
                    assert "prompt must not be empty" in answer.error_message
                else:
                    texts[response.id] += outputs(response)["text_output"][0]
            assert finals[-1] == "a"
            assert set(finals) == {"a", "b", "c", "d"}
            assert texts == {"a": "sl", "b": "fa", "c": "wh"}

    run(lambda: pair(prefill=Script(gate_at=0)), scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_is_cancelled_aborts_its_request(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(here: Site) -> None:
        decode = here.cluster.workers["decode-0"]
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            if stream:
                call = stub(channel).ModelStreamInfer(iter([infer(stream=True, max_tokens=20)]))
            else:
                call = stub(channel).ModelInfer(infer(max_tokens=20))
            await decode.until(lambda: bool(decode.tokens))
            call.cancel()
            await decode.until(lambda: bool(decode.aborted))

    run(lambda: pair(decode=Script(gate_at=3)), scenario)
    assert "Traceback" not in caplog.text


def test_the_clients_deadline_is_kept() -> None:
    async def scenario(here: Site) -> None:
        decode = here.cluster.workers["decode-0"]
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).ModelInfer(infer(max_tokens=20), timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await decode.until(lambda: bool(decode.aborted))
        assert here.cluster.workers["prefill-0"].started[0].deadline_s < 0.31

    run(lambda: pair(decode=Script(gate_at=3)), scenario)


def broken(name: str) -> pb.ModelInferRequest:
    request = infer()
    if name == "datatype":
        request.inputs[0].datatype = "FP32"
    elif name == "two elements":
        request.inputs[0].contents.bytes_contents.append(b"more")
    elif name == "not UTF-8":
        request.inputs[0].contents.bytes_contents[0] = b"\xff"
    elif name == "raw cut short":
        request.raw_input_contents.append(b"\x05\x00\x00\x00ab")
    elif name == "raw count":
        request.raw_input_contents.extend([b"", b""])
    elif name == "unknown tensor":
        request.inputs.add(name="image", datatype="BYTES").contents.bytes_contents.append(b"x")
    elif name == "unary stream":
        request = infer(stream=True)
    elif name == "stream parameter":
        request.parameters["stream"].bool_param = True
    return request


TABLE: list[tuple[pb.ModelInferRequest, grpc.StatusCode, str]] = [
    (infer(None), grpc.StatusCode.INVALID_ARGUMENT, "text_input"),
    (infer(""), grpc.StatusCode.INVALID_ARGUMENT, "prompt must not be empty"),
    (infer("x" * 5000), grpc.StatusCode.INVALID_ARGUMENT, "context_length_exceeded"),
    (infer(model="other"), grpc.StatusCode.NOT_FOUND, "model_not_found"),
    (infer(max_tokens="many"), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens must be an integer"),
    (infer(temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature must be at least 0"),
    (infer(temprature=1.0), grpc.StatusCode.INVALID_ARGUMENT, "Did you mean temperature?"),
    (infer(kv_transfer_params="x"), grpc.StatusCode.INVALID_ARGUMENT, "internal"),
    (infer(echo=True), grpc.StatusCode.INVALID_ARGUMENT, "echo is not a parameter"),
    (infer(sampling="{"), grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
    (infer(sampling=r'{"a\ud83d": 1}'), grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
    (infer(sampling=r'{"stop": "\ud83d"}'), grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
    (infer(sampling=r'{"top_k": "\"\\ud83d\""}'), grpc.StatusCode.INVALID_ARGUMENT, "top_k must be an integer"),
    (infer(sampling='{"temperature": NaN}'), grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
    (infer(sampling="[" * 12_000), grpc.StatusCode.INVALID_ARGUMENT, "nested"),
    (infer(sampling=json.dumps({"top_k": "[" * 12_000})), grpc.StatusCode.INVALID_ARGUMENT, "top_k must be an integer"),
    (infer(sampling=json.dumps({"top_k": "[" * 990 + "]" * 990})), grpc.StatusCode.INVALID_ARGUMENT, "top_k must be"),
    (
        infer(sampling=json.dumps({"logit_bias": {"\u20ac" * 4000: 101}}, ensure_ascii=False)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "logit_bias",
    ),
    (infer(sampling="[1]"), grpc.StatusCode.INVALID_ARGUMENT, "must be a JSON object"),
    (infer(sampling='{"top_p": "2"}'), grpc.StatusCode.INVALID_ARGUMENT, "top_p must be at most 1"),
    (broken("datatype"), grpc.StatusCode.INVALID_ARGUMENT, "use BYTES or BOOL"),
    (broken("two elements"), grpc.StatusCode.INVALID_ARGUMENT, "one element"),
    (broken("not UTF-8"), grpc.StatusCode.INVALID_ARGUMENT, "UTF-8"),
    (broken("raw cut short"), grpc.StatusCode.INVALID_ARGUMENT, "cut short"),
    (broken("raw count"), grpc.StatusCode.INVALID_ARGUMENT, "raw_input_contents"),
    (broken("unknown tensor"), grpc.StatusCode.INVALID_ARGUMENT, "Unknown input tensor: image"),
    (broken("stream parameter"), grpc.StatusCode.INVALID_ARGUMENT, "with the input stream, BOOL [1] = true"),
    (broken("unary stream"), grpc.StatusCode.INVALID_ARGUMENT, "needs ModelStreamInfer"),
]


def test_bad_requests_get_a_status_and_a_code() -> None:
    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            for request, status, part in TABLE:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub(channel).ModelInfer(request, timeout=20)
                assert caught.value.code() is status, part
                assert part in (caught.value.details() or ""), part
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).ModelInfer(infer("x" * 20_000))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert outputs(await stub(channel).ModelInfer(infer("ab", max_tokens=2)))["text_output"] == ["ab"]
        assert len(here.cluster.workers["prefill-0"].started) == 1

    run(pair, scenario, max_body_bytes=16_384)


def test_a_request_that_fails_leaves_the_others_of_its_stream_alone() -> None:
    """Whatever is wrong with it, and be it a bug of the server's."""

    async def scenario(here: Site) -> None:
        prefill = here.cluster.workers["prefill-0"]
        answers = here.router.answers
        working, ends_of_texts = answers.max_tokens, []

        def stumbles(wanted: int, prompt: list[int]) -> int:
            if len(prompt) == 3:
                raise RuntimeError("half a pair: \ud83d")
            return working(wanted, prompt)

        answers.max_tokens = stumbles  # type: ignore[method-assign, assignment]

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            yield infer("good", stream=True, id="good", max_tokens=2)
            await prefill.until(lambda: bool(prefill.started))
            yield infer("good", id="bad", sampling=r'{"a\ud83d": 1}')
            yield infer("bug", id="bug")

        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            async for answer in stub(channel).ModelStreamInfer(requests(), timeout=20):
                response = answer.infer_response
                if answer.error_message:
                    ends_of_texts.append((response.id, answer.error_message))
                elif response.parameters["triton_final_response"].bool_param:
                    ends_of_texts.append((response.id, outputs(response)["finish_reason"][0]))
                if len(ends_of_texts) == 2:
                    prefill.gate.set()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).ModelInfer(infer("bug"), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "RuntimeError" not in (caught.value.details() or "")
        ends = dict(ends_of_texts)
        assert list(ends)[-1] == "good"
        assert ends["good"] == "length"
        assert ends["bad"].startswith("[INVALID_ARGUMENT]")
        assert ends["bug"].startswith("[INTERNAL]")

    run(lambda: pair(prefill=Script(gate_at=0)), scenario)


def test_errors_of_workers_are_mapped() -> None:
    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).ModelInfer(infer())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailing = dict(caught.value.trailing_metadata() or ())
            assert trailing["baton-code"] == "overloaded"
            assert int(trailing["retry-after-ms"]) > 0

    run(lambda: pair(Script(fail_at=(0, "overloaded")), Script(fail_at=(0, "overloaded"))), scenario)


def test_keys_are_asked_for_on_grpc_too(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key-2 acme\n")
    file.chmod(0o600)

    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            for metadata in ((), (("authorization", "Bearer nope"),)):
                for call in (
                    stub(channel).ModelInfer(infer(), metadata=metadata),
                    stub(channel).ModelMetadata(pb.ModelMetadataRequest(name="fake"), metadata=metadata),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await answers(stub(channel).ModelStreamInfer(iter([infer()]), metadata=metadata))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert (await stub(channel).ServerReady(pb.ServerReadyRequest())).ready
            key = (("authorization", "Bearer key-2"),)
            await stub(channel).ModelInfer(infer(max_tokens=2), metadata=key)
        assert here.cluster.workers["prefill-0"].started[0].tenant == "acme"

    run(pair, scenario, api_key_file=str(file))


def test_health_follows_the_workers_and_reflection_names_the_services() -> None:
    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            statuses = health_pb2.HealthCheckResponse
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == statuses.NOT_SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
            assert (await watch.read()).status == statuses.NOT_SERVING
            worker = here.cluster.add("mixed-0", "mixed")
            await worker.start()
            here.router.set_members(here.cluster.fleet())
            assert (await watch.read()).status == statuses.SERVING
            assert (await stub(channel).ModelReady(pb.ModelReadyRequest(name="fake"))).ready
            await worker.die()
            assert (await watch.read()).status == statuses.NOT_SERVING
            watch.cancel()
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            wish = reflection_pb2.ServerReflectionRequest(list_services="")
            (listing,) = await answers(reflection.ServerReflectionInfo(iter([wish])))
            names = {service.name for service in listing.list_services_response.service}
            assert {SERVICE, "grpc.health.v1.Health"} <= names

    run(FakeCluster, scenario)
