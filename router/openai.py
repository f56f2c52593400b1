"""OpenAI's endpoints, and vLLM's small ones beside them: from a body to an answer. Knows no workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton import __version__
from baton.clock import Clock
from baton.errors import InvalidRequest, ModelNotFound, ServeError
from baton.request import SamplingParams
from router.answer import Answers, Spawn, TextRequest, draw_seed
from router.api_keys import ApiKeys
from router.body import parse
from router.chat_template import ChatTemplate
from router.http import EventStream, closing_when_gone, json_response, read_json
from router.openai_json import Writer
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from router.tokenizer import TextEncoder, Tokenizer

_READ_GRACE_S = 5.0  # after its deadline a stream may still be read for this long


class OpenAiDoor:
    """The handlers. Event loop only."""

    def __init__(
        self,
        *,
        model: str,
        answers: Answers,
        tokenizer: Tokenizer,
        encoder: TextEncoder,
        chat_template: ChatTemplate | None,
        api_keys: ApiKeys,
        spawn: Spawn,
        clock: Clock,
        max_body_bytes: int,
    ) -> None:
        self._model = model
        self._answers = answers
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._template = chat_template
        self._api_keys = api_keys
        self._spawn = spawn
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Paths and methods."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        tenant = self._api_keys.tenant(request.headers.get("authorization"))
        body = parse(ChatBody, await read_json(request, self._max_body_bytes))
        self._check_model(body.model)
        self._answers.require_serving()
        variables = dict(body.chat_template_kwargs)
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        text = self._render(body, variables)
        prompt = await self._encoder.encode(text, add_special_tokens=body.add_special_tokens)
        num_logprobs = body.top_logprobs if body.logprobs else None
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        max_tokens = self._answers.max_tokens(wanted, prompt)
        sampling = body.sampling(seed=draw_seed(), max_tokens=max_tokens, num_logprobs=num_logprobs)
        return await self._respond(request, "chat", body, [prompt], sampling, tenant)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        tenant = self._api_keys.tenant(request.headers.get("authorization"))
        body = parse(CompletionBody, await read_json(request, self._max_body_bytes))
        self._check_model(body.model)
        self._answers.require_serving()
        prompts, echoes = [], []
        wanted = 16 if body.max_tokens is None else body.max_tokens
        for prompt in body.prompt:
            if isinstance(prompt, str):
                token_ids = await self._encoder.encode(prompt, add_special_tokens=body.add_special_tokens)
            else:
                token_ids = prompt
            self._answers.max_tokens(wanted, token_ids)
            prompts.append(token_ids)
            if body.echo:
                echoes.append(prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt))
        sampling = body.sampling(seed=draw_seed(), max_tokens=wanted, num_logprobs=body.logprobs)
        return await self._respond(request, "text", body, prompts, sampling, tenant, echoes)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._api_keys.tenant(request.headers.get("authorization"))
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._api_keys.tenant(request.headers.get("authorization"))
        self._check_model(request.path_params["model"])
        return json_response(self._card())

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return json_response({"version": __version__})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        self._api_keys.tenant(request.headers.get("authorization"))
        body = parse(TokenizeBody, await read_json(request, self._max_body_bytes))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt")
        text = body.prompt if body.prompt is not None else self._render(body, body.chat_template_kwargs)
        special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
        tokens = await self._encoder.encode(text, add_special_tokens=special)
        strings = [self._tokenizer.token_bytes(t).decode("utf-8", "replace") for t in tokens]
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": self._answers.max_model_len,
                "tokens": tokens,
                "token_strs": strings if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        self._api_keys.tenant(request.headers.get("authorization"))
        body = parse(DetokenizeBody, await read_json(request, self._max_body_bytes))
        self._check_model(body.model)
        return json_response({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)})

    # ---- inside

    async def _respond(
        self,
        request: Request,
        kind: str,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        tenant: str,
        echoes: Sequence[str] = (),
    ) -> Response:
        facts = request.scope["baton"]
        answer = self._answers.open(
            TextRequest(
                id=f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{facts['id']}",
                endpoint="chat" if kind == "chat" else "completions",
                prompts=prompts,
                sampling=sampling,
                arrived=facts["arrived"],
                n=body.n,
                stop=body.stop,
                include_stop=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
                tenant=tenant,
                cache_salt=body.cache_salt,
                priority=body.priority,
                client_request_id=facts["client_id"] or facts["id"],
                timeout_s=body.timeout,
            )
        )
        options = body.stream_options
        writer = Writer(
            kind,
            answer,
            self._model,
            self._tokenizer,
            num_logprobs=sampling.num_logprobs,
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
            return_token_ids=body.return_token_ids,
            echoes=echoes,
        )
        if body.stream:
            timeout_s = answer.deadline - self._clock.now() + _READ_GRACE_S
            return EventStream(_events(writer), answer, self._spawn, timeout_s=timeout_s)
        with closing_when_gone(request.receive, answer, self._spawn):
            async with contextlib.aclosing(answer.deltas()) as deltas:
                return json_response(writer.body([item async for item in deltas]))

    def _render(self, body: ChatBody | TokenizeBody, variables: dict[str, Any]) -> str:
        if self._template is None:
            raise InvalidRequest("This model has no chat template: use /v1/completions.", param="messages")
        assert body.messages is not None
        return self._template.render(
            [message.for_template(index) for index, message in enumerate(body.messages)],
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=variables,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise ModelNotFound(f"There is no model {name[:100]!r}; this server has {self._model!r}.", param="model")

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "baton",
            "root": self._model,
            "parent": None,
            "max_model_len": self._answers.max_model_len or None,
        }


async def _events(writer: Writer) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events; once one is out, an error is an event too."""
    has_begun = False
    try:
        async with contextlib.aclosing(writer.answer.deltas()) as deltas:
            async for choice, delta in deltas:
                data = writer.events(choice, delta)
                if data:
                    has_begun = True
                    yield data
    except ServeError as error:
        if not has_begun:
            raise
        yield writer.error_event(error)
        return
    yield writer.last_events()
