"""One client's request as text: its choices, each a stream of text made from tokens. Both front doors use it.

Knows tokenizers, stop strings and dispatch; knows neither HTTP nor gRPC. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from baton.clock import Clock
from baton.errors import Cancelled, InvalidRequest, PromptTooLong, ServeError, Unavailable
from baton.request import FinishReason, RequestId, SamplingParams, TokenEvent
from router.admission import Admission
from router.attempt import Work
from router.detokenizer import StopStrings
from router.dispatcher import Dispatcher, Generation
from router.timeline import Timeline
from router.tokenizer import Tokenizer

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task in the process's task group."""

_SHUTTING_DOWN: Final = "The server is shutting down."
_QUEUED_DELTAS: Final = 64  # of one request with several choices


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A checked request, apart from what depends on the model that serves it."""

    id: str
    endpoint: str
    prompts: Sequence[list[int]]
    sampling: SamplingParams
    arrived: float
    n: int = 1
    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    tenant: str = "default"
    cache_salt: str = ""
    priority: int = 0
    client_request_id: str = ""
    timeout_s: float | None = None


@dataclass(slots=True)
class Delta:
    """What one choice gained: text that will not change any more, and the tokens that were consumed for it."""

    text: str
    tokens: list[TokenEvent]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One sample of one prompt, as text."""

    def __init__(self, index: int, generation: Generation, tokenizer: Tokenizer, request: TextRequest) -> None:
        self.index = index
        self.prompt_token_ids = generation.work.token_ids
        self.num_prompt_tokens = len(generation.work.token_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._generation = generation
        self._request = request
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens)
        self._stops = StopStrings(request.stop, include=request.include_stop) if request.stop else None

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Text as it comes, with each step of the engine. The last delta carries the finish reason.

        Raises:
            ServeError: the generation failed.
        """
        try:
            async with contextlib.aclosing(self._generation.tokens()) as steps:
                async for events in steps:
                    delta = self._take(events)
                    if delta.finish_reason is not None:
                        self.close(delta.finish_reason)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except ServeError as error:
            self.close("error", error.code)
            raise

    def close(self, finish_reason: str = "abort", error: str = "", cause: ServeError | None = None) -> None:
        """Stop generating. Synchronous, idempotent."""
        self._generation.close(finish_reason, error, cause)

    def _take(self, events: list[TokenEvent]) -> Delta:
        """Consume tokens up to a stop string; later ones are as if they had never been generated."""
        pieces: list[str] = []
        for position, event in enumerate(events):
            self.num_tokens += 1
            if event.index == 0:
                self.num_cached_tokens = event.num_cached_tokens
            text = "" if self._is_hidden(event) else self._detokenizer.push(event.token_id)
            if event.finish_reason is not None:
                text += self._detokenizer.flush()
            if self._stops is not None and self.num_tokens > self._request.sampling.min_tokens:
                text = self._stops.push(text)
                if self._stops.matched is not None:
                    pieces.append(text)
                    return Delta("".join(pieces), events[: position + 1], "stop", self._stops.matched)
                if event.finish_reason is not None:
                    text += self._stops.flush()
            pieces.append(text)
        last, stop_reason = events[-1], None
        if last.finish_reason is FinishReason.STOP and last.token_id in self._request.sampling.stop_token_ids:
            stop_reason = last.token_id
        reason = None if last.finish_reason is None else str(last.finish_reason)
        return Delta("".join(pieces), events, reason, stop_reason)

    def _is_hidden(self, event: TokenEvent) -> bool:
        """The token that stops a text is not part of it, unless the client wants what stopped it."""
        return event.finish_reason is FinishReason.STOP and not self._request.include_stop


@dataclass(slots=True, eq=False)
class Answer:
    """All choices of one request. Whoever opened it calls `close`, in every case; that never awaits."""

    request: TextRequest
    choices: list[Choice]
    deadline: float
    """On the router's clock."""
    _release: Callable[[], None]
    _spawn: Spawn

    async def deltas(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """The choices' deltas as they come.

        Raises:
            ServeError: a choice failed. Cancelled: `close` was called meanwhile.
        """
        if len(self.choices) == 1:
            async with contextlib.aclosing(self.choices[0].deltas()) as deltas:
                async for delta in deltas:
                    yield self.choices[0], delta
            return
        queue: asyncio.Queue[tuple[Choice, Delta | Exception]] = asyncio.Queue(_QUEUED_DELTAS)
        tasks = [self._spawn(_pump(choice, queue)) for choice in self.choices]
        try:
            running = len(self.choices)
            while running:
                choice, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                running -= item.finish_reason is not None
                yield choice, item
        finally:
            for task in tasks:
                task.cancel()

    def close(self, cause: ServeError | None = None) -> None:
        """Stop what still runs and give the place back. Synchronous, idempotent.

        Whoever is waiting for deltas meanwhile gets `cause`, or Cancelled.
        """
        for choice in self.choices:
            choice.close("abort", cause=cause or Cancelled("The client left."))
        self._release()


class Answers:
    """Opens answers: the last checks, admission, seeds."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        admission: Admission,
        clock: Clock,
        spawn: Spawn,
        *,
        timeout_s: float,
    ) -> None:
        self._tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._admission = admission
        self._clock = clock
        self._spawn = spawn
        self._timeout_s = timeout_s
        self._open: set[Answer] = set()
        self._is_shutting_down = False

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one request together, at most; 0 while no worker is connected."""
        return self._dispatcher.fleet.model_limits()[0]

    def require_serving(self) -> None:
        """Refuse early what could not be served.

        Raises:
            Unavailable: says why.
        """
        if self._is_shutting_down:
            raise Unavailable(_SHUTTING_DOWN)
        if (reason := self._dispatcher.fleet.why_not_serving) is not None:
            raise Unavailable(f"No worker can serve requests yet or any more: {reason}.")

    def max_tokens(self, wanted: int | None, prompt: list[int]) -> int:
        """What may be generated after `prompt`: what is asked for, or all that fits.

        Raises:
            InvalidRequest: the prompt is empty.
            PromptTooLong: it does not fit, or not with what is asked for.
        """
        limit = self.max_model_len
        if not prompt:
            raise InvalidRequest("The prompt is empty: send at least one character or token.", param="prompt")
        if len(prompt) + (wanted or 1) > limit:
            raise PromptTooLong(
                f"The model's context is {limit} tokens, but this request needs {len(prompt) + (wanted or 1)}: "
                f"{len(prompt)} of the prompt and {wanted or 'at least 1'} to generate.",
                param="input_tokens",
            )
        return wanted or limit - len(prompt)

    def open(self, request: TextRequest) -> Answer:
        """Admit a request. Nothing is sent before its deltas are asked for. The caller must `close` the answer.

        Raises:
            InvalidRequest: a token id is not in the vocabulary.
            Overloaded: too many requests already.
            Unavailable: no worker.
        """
        self.require_serving()
        self._check_vocabulary(request)
        release = self._admission.admit(len(request.prompts) * request.n)
        deadline = request.arrived + min(request.timeout_s or self._timeout_s, self._timeout_s)
        choices = []
        for number, (prompt, sample) in enumerate((p, s) for p in request.prompts for s in range(request.n)):
            request_id = RequestId(request.id if number == 0 else f"{request.id}-{number}")
            timeline = Timeline(
                request_id,
                request.arrived,
                request.tenant,
                request.client_request_id,
                request.endpoint,
                len(prompt),
                request.sampling.max_tokens,
                admitted=self._clock.now(),
            )
            work = Work(
                request_id,
                prompt,
                dataclasses.replace(request.sampling, sample_index=sample) if sample else request.sampling,
                deadline,
                timeline,
                request.tenant,
                request.cache_salt,
                request.priority,
            )
            choices.append(Choice(number, self._dispatcher.start(work), self._tokenizer, request))
        answer = Answer(request, choices, deadline, lambda: self._closed(answer, release), self._spawn)
        self._open.add(answer)
        return answer

    def refuse(self) -> None:
        """Accept nothing more."""
        self._is_shutting_down = True

    def shut_down(self) -> None:
        """Accept nothing more and end what runs, with an error that says so."""
        self.refuse()
        for answer in list(self._open):
            answer.close(Unavailable(_SHUTTING_DOWN))

    def _closed(self, answer: Answer, release: Callable[[], None]) -> None:
        self._open.discard(answer)
        release()

    def _check_vocabulary(self, request: TextRequest) -> None:
        size = self._dispatcher.fleet.model_limits()[1]
        named = {
            "prompt": (max(prompt) for prompt in request.prompts),
            "stop_token_ids": request.sampling.stop_token_ids,
            "logit_bias": request.sampling.logit_bias,
        }
        for param, token_ids in named.items():
            largest = max(token_ids, default=0)
            if largest >= size:
                raise InvalidRequest(
                    f"{param} names token {largest}, but the vocabulary has {size} tokens.", param=param
                )


def draw_seed() -> int:
    """For a request without one. Whole requests repeat by it, also on another worker."""
    return secrets.randbits(63)


async def _pump(choice: Choice, queue: asyncio.Queue[tuple[Choice, Delta | Exception]]) -> None:
    try:
        async with contextlib.aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                await queue.put((choice, delta))
    except Exception as error:  # handed on to the consumer, whatever it is
        await queue.put((choice, error))
