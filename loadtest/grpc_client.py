"""KServe's ModelStreamInfer as Baton's gRPC door speaks it: one stream per request, its answer piece by piece.

The protocol's pieces carry text and no token counts, so a piece counts as one token, and the total comes with the last.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
import time
from typing import Any, Final

import grpc
import grpc.aio

from loadtest.outcome import Outcome
from loadtest.prompts import PromptMaker
from loadtest.target import Target
from loadtest.workload import LoadRequest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub

_STATUS: Final = re.compile(r"\[([A-Z_]+)\]")
_OPTIONS: Final = (("grpc.max_receive_message_length", 16 * 2**20), ("grpc.enable_retries", 0))


class GrpcClient:
    """One channel to the server. Event loop only."""

    def __init__(self, target: Target, api_key: str | None) -> None:
        """Sends nothing yet."""
        self._target = target
        self.begin("")
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = grpc.aio.insecure_channel(target.url, options=_OPTIONS)
        self._stub: Any = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def begin(self, run_id: str) -> None:
        """See Client."""
        self._run_id = run_id
        self._prompts = PromptMaker(self._target, run_id)

    def prepare(self, request: LoadRequest) -> pb.ModelInferRequest:
        """The message."""
        target = self._target
        message = pb.ModelInferRequest(model_name=target.model, id=f"{self._run_id}-{request.index}")
        text = self._prompts.text(request).encode()
        message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        message.inputs.add(name="stream", datatype="BOOL", shape=[1])
        message.raw_input_contents.extend([struct.pack("<I", len(text)) + text, b"\x01"])
        message.parameters["max_tokens"].int64_param = request.num_output_tokens
        message.parameters["temperature"].double_param = target.temperature
        message.parameters["ignore_eos"].bool_param = target.ignore_eos
        for name, value in target.extra.items():
            kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
            text_value = value if isinstance(value, bool | int | float | str) else json.dumps(value)
            setattr(message.parameters[name], kind, text_value)
        return message

    async def send(self, prepared: pb.ModelInferRequest, outcome: Outcome, deadline: float) -> None:
        """See Client."""
        remaining_s = max(0.0, deadline - asyncio.get_running_loop().time())
        call = self._stub.ModelStreamInfer(timeout=remaining_s, metadata=self._metadata)
        is_final = False
        try:
            await call.write(prepared)
            outcome.written = time.monotonic()
            await call.done_writing()
            async for response in call:
                now = time.monotonic()
                if response.error_message:
                    status = _STATUS.match(response.error_message)
                    kind = f"grpc_{status[1].lower()}" if status else "stream_error"
                    outcome.fail("timeout" if kind == "grpc_deadline_exceeded" else kind, response.error_message)
                    is_final = True
                    continue
                is_final = self._take(response.infer_response, outcome, now)
            if not is_final:
                outcome.fail("truncated", "the stream ended without a final response")
        except grpc.aio.AioRpcError as error:
            name = error.code().name.lower()
            kind = {"deadline_exceeded": "timeout"}.get(name, f"grpc_{name}")
            if name == "unavailable" and outcome.written is None:
                kind = "connect"
            outcome.fail(kind, error.details() or "")
        except asyncio.InvalidStateError as error:  # the call ended while it was being written to
            outcome.fail("reset", str(error))
        finally:
            call.cancel()
            outcome.ended = time.monotonic()
            outcome.num_output_tokens = outcome.num_output_tokens or sum(outcome.counts)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def _take(self, response: pb.ModelInferResponse, outcome: Outcome, now: float) -> bool:
        """Note a piece; was it the last one?"""
        parameters = response.parameters
        is_final = "triton_final_response" in parameters and parameters["triton_final_response"].bool_param
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
            if len(raw) <= 4:  # a BYTES element without bytes
                continue
            if output.name == "text_output":
                outcome.tokens(now, 1)
            elif output.name == "finish_reason":
                outcome.finish_reason = raw[4:].decode("utf-8", "replace")
        if is_final:
            outcome.num_prompt_tokens = parameters["prompt_tokens"].int64_param
            outcome.num_output_tokens = parameters["completion_tokens"].int64_param
        return bool(is_final)
