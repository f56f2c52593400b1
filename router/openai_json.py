"""The JSON that OpenAI's clients read: whole answers, and stream chunks written by hand because there is one per token.

Knows the shapes of chat and text completions; knows neither HTTP nor how answers come about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as quote
from typing import Any, Final

from baton import __version__
from baton.errors import ServeError
from baton.request import TokenEvent
from router.answer import Answer, Choice, Delta
from router.http import error_body
from router.tokenizer import Tokenizer

FINGERPRINT: Final = f"baton-{__version__}"
DONE: Final = b"data: [DONE]\n\n"
_LEAST_LOGPROB: Final = -9999.0  # JSON has no -Infinity


@dataclass(slots=True)
class Writer:
    """Writes one answer. `kind` is "chat" or "text"."""

    kind: str
    answer: Answer
    model: str
    tokenizer: Tokenizer
    num_logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    echoes: Sequence[str] = ()
    """Per prompt: the text that goes in front (`echo`)."""
    created: int = field(default_factory=lambda: int(time.time()))
    _begun: set[int] = field(default_factory=set)
    _offsets: dict[int, int] = field(default_factory=dict)

    # ---- streams

    def events(self, choice: Choice, delta: Delta) -> bytes:
        """The events for one delta; empty if it shows nothing that a client could see."""
        out: list[str] = []
        is_first = choice.index not in self._begun
        text = delta.text
        if is_first:
            self._begun.add(choice.index)
            text = self._echo(choice) + text
            if self.kind == "chat":
                out.append(self._chunk(choice, '"delta":{"role":"assistant","content":""}', None, "null"))
        if text or self.return_token_ids or self.num_logprobs is not None:
            content = f'"delta":{{"content":{quote(text)}}}' if self.kind == "chat" else f'"text":{quote(text)}'
            if self.return_token_ids:
                content += f',"token_ids":{[event.token_id for event in delta.tokens]}'
                if is_first:
                    content += f',"prompt_token_ids":{choice.prompt_token_ids}'
            logprobs = "null"
            if self.num_logprobs is not None:
                logprobs = json.dumps(self.logprobs(choice.index, delta.tokens), ensure_ascii=False)
            out.append(self._chunk(choice, content, None, logprobs))
        if delta.finish_reason is not None:
            content = '"delta":{}' if self.kind == "chat" else '"text":""'
            out.append(self._chunk(choice, content, delta, "null"))
        return "".join(out).encode("utf-8", "replace")

    def last_events(self) -> bytes:
        """After all choices: usage if it was asked for, and the end mark."""
        if not self.include_usage:
            return DONE
        usage = json.dumps(self.usage(self.answer.choices))
        return f'{self._head()}"choices":[],"usage":{usage}}}\n\n'.encode() + DONE

    @staticmethod
    def error_event(error: ServeError) -> bytes:
        """Instead of further events, once the status is spent. No end mark follows: the stream did not end well."""
        body = error_body(error)
        body["error"]["code"] = error.http_status
        return f"event: error\ndata: {json.dumps(body)}\n\n".encode()

    def _head(self) -> str:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return (
            f'data: {{"id":"{self.answer.request.id}","object":"{name}","created":{self.created},'
            f'"model":{quote(self.model)},"system_fingerprint":"{FINGERPRINT}",'
        )

    def _chunk(self, choice: Choice, content: str, final: Delta | None, logprobs: str) -> str:
        ending = '"finish_reason":null'
        if final is not None:
            ending = f'"finish_reason":"{final.finish_reason}","stop_reason":{json.dumps(final.stop_reason)}'
        usage = ""
        if self.continuous_usage:
            usage = f',"usage":{json.dumps(self.usage([choice]))}'
        return f'{self._head()}"choices":[{{"index":{choice.index},{content},"logprobs":{logprobs},{ending}}}]{usage}}}\n\n'

    # ---- whole answers

    def body(self, deltas: Iterable[tuple[Choice, Delta]]) -> dict[str, Any]:
        """The answer to a request that did not ask for a stream, from all its deltas."""
        by_choice: dict[int, list[Delta]] = {choice.index: [] for choice in self.answer.choices}
        for choice, delta in deltas:
            by_choice[choice.index].append(delta)
        return {
            "id": self.answer.request.id,
            "object": "chat.completion" if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": [self._choice(choice, by_choice[choice.index]) for choice in self.answer.choices],
            "usage": self.usage(self.answer.choices),
        }

    def _choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        text = self._echo(choice) + "".join(delta.text for delta in deltas)
        tokens = [event for delta in deltas for event in delta.tokens]
        shape: dict[str, Any] = {"index": choice.index}
        if self.kind == "chat":
            shape["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            shape["text"] = text
        shape["logprobs"] = None if self.num_logprobs is None else self.logprobs(choice.index, tokens)
        shape["finish_reason"] = deltas[-1].finish_reason
        shape["stop_reason"] = deltas[-1].stop_reason
        if self.return_token_ids:
            shape["token_ids"] = [event.token_id for event in tokens]
            shape["prompt_token_ids"] = choice.prompt_token_ids
        return shape

    # ---- parts of both

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Token counts; a prompt counts once however many choices it has."""
        n = self.answer.request.n
        firsts = choices if len(choices) == 1 else choices[::n]
        prompt = sum(choice.num_prompt_tokens for choice in firsts)
        completion = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in firsts)},
        }

    def logprobs(self, index: int, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """Of consecutive tokens of one choice, as chat or as text completions have them."""
        if self.kind == "chat":
            return {"content": [self._chat_logprob(event) for event in tokens], "refusal": None}
        texts, values, tops, offsets = [], [], [], []
        offset = self._offsets.get(index, 0)
        for event in tokens:
            text = self._text(event.token_id)
            value, top = _logprobs_of(event)
            texts.append(text)
            values.append(value)
            tops.append({text: value} | {self._text(token_id): logprob for token_id, logprob in top})
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        value, top = _logprobs_of(event)
        return {
            **self._token(event.token_id, value),
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def _text(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _echo(self, choice: Choice) -> str:
        return self.echoes[choice.index // self.answer.request.n] if self.echoes else ""


def _logprobs_of(event: TokenEvent) -> tuple[float, list[tuple[int, float]]]:
    if event.logprobs is None:
        return _LEAST_LOGPROB, []
    top = [(token_id, max(logprob, _LEAST_LOGPROB)) for token_id, logprob in event.logprobs.top]
    return max(event.logprobs.logprob, _LEAST_LOGPROB), top
