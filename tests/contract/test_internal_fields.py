"""SEC-5: clients name no workers, addresses, blocks or transfers, at any door; headers are labels at most."""

from __future__ import annotations

import itertools
import json
from typing import Any

import grpc
import httpx
import pytest

from baton.errors import InvalidRequest
from router.body import _INTERNAL
from tests.contract.test_grpc import infer, stub
from tests.contract.test_http import run
from tests.contract.test_http_bad_input import CHAT, TEXT, good
from tests.support.fake_worker import Site, pair

VALUES: tuple[Any, ...] = (
    {"do_remote_prefill": True, "remote_host": "203.0.113.1", "remote_block_ids": [1, 2, 3]},
    "203.0.113.1:5557",
    [1, 2, 3],
    7,
    "",
)
HEADERS: dict[str, str] = {
    "x-prefiller-host-port": "203.0.113.1:8000",
    "x-data-parallel-rank": "1",
    "x-decode-worker": "d1",
    "x-worker-instance-id": "d1",
    "x-tenant": "somebody-else",
    "x-attempt-id": "r/1",
    "x-kv-transfer-params": '{"remote_host": "203.0.113.1"}',
}
ADDRESS_AS_ID = "___prefill_addr_203.0.113.1:5557___decode_addr_203.0.113.1:5558_x"


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_sec5_internal_fields_are_refused_by_name_over_http(path: str) -> None:
    async def scenario(here: Site) -> None:
        for name, value in itertools.product(sorted(_INTERNAL), VALUES):
            answer = await here.http.post(path, json=good(path) | {name: value})
            assert answer.status_code == 400, name
            error = answer.json()["error"]
            assert error["param"] == name
            assert "internal to the cluster" in error["message"]
            assert error["type"] == InvalidRequest.code
        assert not any(worker.started for worker in here.cluster.workers.values()), "no worker hears of it"

    run(pair, scenario)


@pytest.mark.parametrize("is_stream", [False, True])
def test_sec5_internal_fields_are_refused_by_name_over_grpc(is_stream: bool) -> None:
    async def refusal(service: Any, request: Any) -> str:
        if is_stream:
            async for answer in service.ModelStreamInfer(iter([request])):
                return str(answer.error_message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(caught.value.details())

    async def scenario(here: Site) -> None:
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            service = stub(channel)
            for name in sorted(_INTERNAL):
                requests = [infer(**{name: value}) for value in ("203.0.113.1:5557", 7, True)]
                requests += [infer(sampling=json.dumps({name: value})) for value in VALUES]
                for request in requests:
                    assert f"{name} is internal to the cluster" in await refusal(service, request)
                tensor = infer()
                tensor.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
                assert f"Unknown input tensor: {name}" in await refusal(service, tensor)
        assert not any(worker.started for worker in here.cluster.workers.values())

    run(pair, scenario)


def test_sec5_headers_and_metadata_choose_neither_workers_nor_ids_nor_tenants() -> None:
    def said(here: Site) -> list[tuple[Any, ...]]:
        starts = here.cluster.workers["prefill-0"].started
        return [(s.tenant, s.cache_salt, s.decode_peer.worker_id, s.deadline_s > 100) for s in starts]

    async def scenario(here: Site) -> None:
        wish = good(TEXT) | {"max_tokens": 3}
        for headers in ({}, HEADERS, {"x-request-id": ADDRESS_AS_ID}):
            answer: httpx.Response = await here.http.post(TEXT, json=wish, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] == headers.get("x-request-id", answer.headers["x-request-id"])
        async with grpc.aio.insecure_channel(here.grpc_address) as channel:
            metadata = tuple(HEADERS.items())
            await stub(channel).ModelInfer(infer(id=ADDRESS_AS_ID, max_tokens=3), metadata=metadata)
        assert len(set(said(here))) == 1
        starts = here.cluster.workers["prefill-0"].started
        assert len(starts) == 4
        assert not any("addr" in start.attempt_id for start in starts), "a client's label is in no id of ours"

    run(pair, scenario)
