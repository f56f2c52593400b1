"""The public gRPC door: KServe's Open Inference Protocol v2 with Triton's bidirectional stream, health, reflection.

This is where an error becomes a gRPC status. Knows no workers. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton import __version__
from baton.clock import Clock
from baton.errors import Cancelled, InvalidRequest, ModelNotFound, Overloaded, ServeError
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server
from router.answer import Answer, Answers, Spawn, TextRequest, draw_seed
from router.api_keys import ApiKeys
from router.infer_call import INPUTS, OUTPUTS, InferCall
from router.tokenizer import TextEncoder

logger = logging.getLogger("router")

SERVICE: Final = "inference.GRPCInferenceService"
_MAX_PER_STREAM: Final = 64  # requests of one bidirectional stream at once; further ones wait unread
_MAX_MESSAGE_BYTES: Final = 2000  # it travels as metadata, three times as long
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a taken port must be an error
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class KServeDoor(GRPCInferenceServiceServicer):
    """The server and its methods."""

    def __init__(
        self,
        *,
        model: str,
        answers: Answers,
        encoder: TextEncoder,
        api_keys: ApiKeys,
        clock: Clock,
        spawn: Spawn,
        max_body_bytes: int,
    ) -> None:
        self.port = 0
        self._spawn = spawn
        self._model = model
        self._answers = answers
        self._encoder = encoder
        self._api_keys = api_keys
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._health = health.aio.HealthServicer()
        self._is_serving = False
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Open the door; `self.port` says where.

        Raises:
            OSError: the port is taken.
        """
        options = (*_OPTIONS, ("grpc.max_receive_message_length", self._max_body_bytes))
        self._server = server = grpc.aio.server(options=options)
        add_GRPCInferenceServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            self.port = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"gRPC port {port} on {host} can not be opened; is it in use?") from error
        await server.start()
        await self._show_health()

    async def stop(self) -> None:
        """Close the door and cancel what runs."""
        if self._server is not None:
            await self._server.stop(grace=None)

    def set_serving(self, is_serving: bool) -> None:
        """What health checks say from now on."""
        self._is_serving = is_serving
        self._spawn(self._show_health())

    # ---- the protocol

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:  # noqa: N802
        """This process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:  # noqa: N802
        """Requests can be served."""
        return pb.ServerReadyResponse(ready=self._is_serving)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:  # noqa: N802
        """Requests for this model can be served."""
        return pb.ModelReadyResponse(ready=self._is_serving and request.name == self._model)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:  # noqa: N802
        """Name, version, extensions."""
        return pb.ServerMetadataResponse(name="baton", version=__version__, extensions=["model_configuration"])

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:  # noqa: N802
        """Inputs and outputs."""
        async with self._statuses(context):
            self._authorize(context)
            self._check_model(request.name)
            tensor = pb.ModelMetadataResponse.TensorMetadata
            return pb.ModelMetadataResponse(
                name=self._model,
                versions=["1"],
                platform="baton",
                inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind, _, _ in INPUTS],
                outputs=[tensor(name=name, datatype=kind, shape=[-1]) for name, kind, _ in OUTPUTS],
            )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:  # noqa: N802
        """The part of Triton's model configuration that clients read."""
        async with self._statuses(context):
            self._authorize(context)
            self._check_model(request.name)
            config = pb.ModelConfig(
                name=self._model,
                platform="baton",
                backend="baton",
                input=[pb.ModelInput(name=n, data_type=t, dims=[1], optional=o) for n, _, t, o in INPUTS],
                output=[pb.ModelOutput(name=n, data_type=t, dims=[-1]) for n, _, t in OUTPUTS],
                model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
            )
            return pb.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: N802
        """One request, one whole answer."""
        async with self._statuses(context):
            tenant = self._authorize(context)
            call = InferCall(request)
            if call.wants_stream:
                raise InvalidRequest("A streamed answer needs ModelStreamInfer.", param="stream")
            async with self._answer(call, tenant, context.time_remaining()) as answer:
                return await call.whole(answer)

    async def ModelStreamInfer(self, requests: AsyncIterator[pb.ModelInferRequest], context: Any) -> None:  # noqa: N802
        """Many requests on one stream, answered side by side; each with one or, if it asks so, many responses."""
        async with self._statuses(context):
            tenant = self._authorize(context)
        writing, places = asyncio.Lock(), asyncio.Semaphore(_MAX_PER_STREAM)
        is_client_there = True

        async def write(response: pb.ModelStreamInferResponse) -> None:
            nonlocal is_client_there
            async with writing:
                if is_client_there:
                    try:
                        await context.write(response)
                    except grpc.aio.InternalError:
                        is_client_there = False
                        raise Cancelled("The client left.") from None

        async def answer_one(request: pb.ModelInferRequest) -> None:
            try:
                call = InferCall(request)
                async with self._answer(call, tenant, context.time_remaining()) as answer:
                    if not call.wants_stream:
                        await write(pb.ModelStreamInferResponse(infer_response=await call.whole(answer)))
                        return
                    async for response in call.parts(answer):
                        await write(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as problem:
                error = _as_serve_error(problem)
                response = pb.ModelInferResponse(model_name=self._model, id=request.id)
                response.parameters["triton_final_response"].bool_param = True
                message = f"[{error.grpc_status}] {_message(error)}"
                await write(pb.ModelStreamInferResponse(error_message=message, infer_response=response))
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await places.acquire()
                group.create_task(answer_one(request))

    # ---- inside

    @contextlib.asynccontextmanager
    async def _answer(self, call: InferCall, tenant: str, remaining_s: float | None) -> AsyncIterator[Answer]:
        arrived = self._clock.now()
        self._check_model(call.request.model_name)
        self._answers.require_serving()
        body = call.body
        wanted = 16 if body.max_tokens is None else body.max_tokens
        prompt = await self._encoder.encode(call.text, add_special_tokens=body.add_special_tokens)
        self._answers.max_tokens(wanted, prompt)
        limits = [limit for limit in (remaining_s, body.timeout) if limit is not None]
        answer = self._answers.open(
            TextRequest(
                id=f"infer-{secrets.token_hex(12)}",
                endpoint="grpc",
                prompts=[prompt],
                sampling=body.sampling(seed=draw_seed(), max_tokens=wanted, num_logprobs=None),
                arrived=arrived,
                n=body.n,
                stop=body.stop,
                include_stop=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
                tenant=tenant,
                cache_salt=body.cache_salt,
                priority=body.priority,
                client_request_id=call.request.id[:128],
                timeout_s=min(limits) if limits else None,
            )
        )
        try:
            yield answer
        finally:
            answer.close()

    def _authorize(self, context: Any) -> str:
        metadata = dict(context.invocation_metadata() or ())
        return self._api_keys.tenant(metadata.get("authorization"))

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise ModelNotFound(f"There is no model {name[:100]!r}; this server has {self._model!r}.", param="model")

    async def _show_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, status.SERVING if self._is_serving else status.NOT_SERVING)

    @contextlib.asynccontextmanager
    async def _statuses(self, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except Exception as problem:
            error = _as_serve_error(problem)
            trailing: tuple[tuple[str, str], ...] = (("baton-code", error.code),)
            if isinstance(error, Overloaded):
                trailing += (("retry-after-ms", str(int(error.retry_after_s * 1e3))),)
            await context.abort(grpc.StatusCode[error.grpc_status], _message(error), trailing)


def _as_serve_error(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    logger.error("a call failed by a bug", exc_info=error)
    return ServeError("Something went wrong inside the server; its log says what.")


def _message(error: ServeError) -> str:
    """A text that gRPC can send: one that it can not would leave the call without an end, a long one fails at clients."""
    return f"{error.code}: {error.message}".encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
