"""What HTTP clients may send: OpenAI's requests with vLLM's extra parameters, by their names, defaults and ranges.

Knows no tokenizer and no fleet: what depends on the model is checked later.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from baton.errors import InvalidRequest
from baton.prefix_hash import MAX_SALT_CHARS
from baton.request import SamplingParams
from router.body import without_nulls

MAX_CHOICES: Final = 256  # prompts x n
_MAX_N: Final = 16
_MAX_LOGPROBS: Final = 20
_MAX_STOPS: Final = 16
_MAX_STOP_CHARS: Final = 1024
_MAX_IDS: Final = 1024


def _stop(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > _MAX_STOPS:
        raise ValueError(f"must have at most {_MAX_STOPS} strings")
    if not all(0 < len(item) <= _MAX_STOP_CHARS for item in strings):
        raise ValueError(f"must have strings of 1 to {_MAX_STOP_CHARS} characters")
    return strings


def _prompts(value: Any) -> list[str | list[int]]:
    if value in ("", []):
        raise ValueError("must not be empty")
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(prompts, list) or not all(isinstance(item, str) or _is_tokens(item) for item in prompts):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if "" in prompts:
        raise ValueError("must not be empty")
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value) and value != []


_ONE_OR_MORE: Final[dict[str, Any]] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TOKENS: Final[dict[str, Any]] = {"type": "array", "items": {"type": "integer"}}
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopStrings = Annotated[list[str], BeforeValidator(_stop), WithJsonSchema(_ONE_OR_MORE)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [*_ONE_OR_MORE["anyOf"], _TOKENS, {"type": "array", "items": _TOKENS}]}),
]


class _Body(BaseModel):
    # "ignore": router.body has judged unknown fields, with a better message than pydantic's.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    """When a stream reports token counts."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return without_nulls(value) if isinstance(value, dict) else value


class GenerationBody(_Body):
    """What chat and completions have in common."""

    model: str | None = Field(default=None, description="Served model; the only one if absent.")
    n: int = Field(default=1, ge=1, le=_MAX_N)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="0 or -1: all tokens.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=_MAX_IDS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=_MAX_IDS)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARS)
    return_token_ids: bool = False
    timeout: float | None = Field(default=None, gt=0, description="Seconds; at most the server's own limit.")

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(key.isascii() and key.isdecimal() and len(key) <= 9 for key in value):
            raise ValueError("must have token ids as keys")
        return value

    def sampling(self, *, seed: int, max_tokens: int, num_logprobs: int | None) -> SamplingParams:
        """What workers are told; `seed` is used if the client gave none."""
        if self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {max_tokens}.", param="min_tokens"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=(seed if self.seed is None else self.seed) % 2**64,
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids)),
            ignore_eos=self.ignore_eos,
            logit_bias={int(key): bias for key, bias in self.logit_bias.items()},
            num_logprobs=num_logprobs,
        )


def _content(value: Any) -> Any:
    is_parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    if value is None or isinstance(value, str) or is_parts:
        return value
    raise ValueError("must be a string or a list of content parts")


class Message(BaseModel):
    """One chat message. Further fields (name, tool_calls, ...) go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, AfterValidator(_content)] = None

    def for_template(self, index: int) -> dict[str, Any]:
        """As a template reads it: the content is one string.

        Raises:
            InvalidRequest: a content part is not text.
        """
        content = self.content
        if content is None and self.role != "assistant":
            raise InvalidRequest(f"messages[{index}].content is missing.", param=f"messages[{index}].content")
        if isinstance(content, list):
            content = "".join(_part_text(part, index, position) for position, part in enumerate(content))
        extra = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        return {"role": self.role, "content": content or "", **extra}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=_MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = Field(default=False, description="Besides those of the chat template.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = Field(default=None, max_length=64, description="Given to the chat template.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        reserved = {"messages", "add_generation_prompt"} & set(self.chat_template_kwargs)
        if reserved:
            raise InvalidRequest(f"chat_template_kwargs may not set {reserved.pop()}.", param="chat_template_kwargs")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    """Always a list, of texts and token lists."""
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(self.prompt)} prompts with n={self.n} make more than {MAX_CHOICES} choices.", param="prompt"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo together with logprobs (logprobs of the prompt) is not supported.", param="logprobs"
            )
        return self


class TokenizeBody(_Body):
    """POST /tokenize, as vLLM has it: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    """POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: list[TokenId]


def _part_text(part: dict[str, Any], message: int, position: int) -> str:
    where = f"messages[{message}].content[{position}]"
    if part.get("type") not in ("text", "input_text", "output_text"):
        raise InvalidRequest(
            f"{where} has type {json.dumps(part.get('type'))[:40]}: this model reads text only.", param=f"{where}.type"
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}.text must be a string.", param=f"{where}.text")
    return str(part["text"])
