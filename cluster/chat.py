"""`baton chat`: a conversation with a server over its HTTP API, with the waterfall of each answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cluster import client, waterfall
from cluster.client import ClientError, Connection

_KEY_ENV: Final = "BATON_API_KEY"
_ANSWER_LIMIT_S: Final = 600.0
_TRACE_LIMIT_S: Final = 2.0
_LOOK_AGAIN_S: Final = 0.05
_HELP: Final = "Ask something; an empty line or Ctrl-D ends, /new forgets the conversation.\n"

Message = dict[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Ask one question, or hold a conversation; the exit status."""
    chat = Chat(client.connect(arguments), arguments)
    if arguments.question is not None:
        chat.ask(arguments.question)
        return 0
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        import readline  # noqa: F401  (line editing for `input`)

        sys.stdout.write(f"{chat.model} at {chat.url}. {_HELP}")
    for question in _questions(is_interactive):
        if question == "/new":
            chat.forget()
            continue
        try:
            chat.ask(question)
        except ClientError as error:
            if not is_interactive:
                raise
            sys.stderr.write(f"baton: {error}\n")
        except KeyboardInterrupt:  # leaving the stream aborts the request
            sys.stdout.write("\n")
    return 0


def _questions(is_interactive: bool) -> Iterator[str]:
    if not is_interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if not question:
            return
        yield question


_OWNER: Final = "baton"
_SIM_MODEL_NAME: Final = "baton-sim"
_SIM_MAX_TOKENS: Final = 64
"""A simulated model never ends its answer by itself."""


class Chat:
    """One conversation."""

    def __init__(self, connection: Connection, arguments: argparse.Namespace) -> None:
        self._connection = connection
        self._headers = _authorization(arguments)
        self._options: dict[str, Any] = {}
        if arguments.max_tokens is not None:
            self._options["max_tokens"] = arguments.max_tokens
        if arguments.temperature is not None:
            self._options["temperature"] = arguments.temperature
        self._messages: list[Message] = []
        models = self._models()
        if not models:
            raise ClientError(f"{connection.url} serves no model")
        self._has_waterfalls = self._may_inspect(models[0])
        self.model = str(models[0]["id"])
        if self.model == _SIM_MODEL_NAME:
            self._options.setdefault("max_tokens", _SIM_MAX_TOKENS)

    def _models(self) -> list[dict[str, Any]]:
        """What is served. The API key is tried here, so that a wrong one shows before any question is answered.

        Raises:
            ClientError: the API key is refused.
        """
        try:
            return list(self._connection.get("/v1/models", self._headers)["data"])
        except client.Refused as error:
            whose = "refuses the API key" if self._headers else "wants an API key"
            raise ClientError(f"{self.url} {whose} ({error}); set {_KEY_ENV} or give --api-key-file") from error

    def _may_inspect(self, model: dict[str, Any]) -> bool:
        """Does it show its waterfalls to us? Who neither runs here nor calls itself Baton is not told the secret.

        Raises:
            ClientError: the secret is refused.
        """
        connection = self._connection
        if connection.token is None or (connection.server is None and model.get("owned_by") != _OWNER):
            return False
        with contextlib.suppress(client.NotFound):  # nobody's request: it is the secret that matters
            connection.ask("/internal/trace/none")
        return True

    @property
    def url(self) -> str:
        """Of the server."""
        return self._connection.url

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def ask(self, question: str) -> None:
        """Print the answer as it comes, then its waterfall. A failed question is not part of the conversation.

        Raises:
            ClientError: the server refused or failed.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        answer = []
        request_id = ""
        for chunk in self._stream({"model": self.model, "messages": messages, "stream": True, **self._options}):
            request_id = str(chunk.get("id", ""))
            for choice in chunk.get("choices", ()):
                text = choice.get("delta", {}).get("content") or ""
                answer.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
        sys.stdout.write("\n")
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
        self._show_waterfall(request_id)

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a server-sent event stream (WHATWG HTML, section 9.2), which must end with [DONE]."""
        with self._connection.request(
            "POST", "/v1/chat/completions", body=body, headers=self._headers, timeout_s=_ANSWER_LIMIT_S
        ) as response:
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(":")
                if name != "data":
                    continue
                if value.strip() == "[DONE]":
                    return
                chunk = json.loads(value)
                if "error" in chunk:
                    raise ClientError(str(chunk["error"].get("message", chunk["error"])))
                yield chunk
        raise ClientError("the answer was cut off")

    def _show_waterfall(self, request_id: str) -> None:
        """One line on stderr, if we may see it. The record is complete when all workers have reported."""
        if not self._has_waterfalls:
            return
        deadline = time.monotonic() + _TRACE_LIMIT_S
        while time.monotonic() < deadline:
            try:
                trace = self._connection.ask(f"/internal/trace/{request_id}")
            except client.NotFound:
                time.sleep(_LOOK_AGAIN_S)
                continue
            sys.stderr.write(f"[{waterfall.line(trace)}]\n")
            return


def _authorization(arguments: argparse.Namespace) -> dict[str, str]:
    key = os.environ.get(_KEY_ENV, "")
    if arguments.api_key_file is not None:
        try:
            key = Path(arguments.api_key_file).read_text().split(maxsplit=1)[0]
        except OSError as error:
            raise ClientError(f"{arguments.api_key_file}: {error.strerror}") from error
        except IndexError:
            raise ClientError(f"{arguments.api_key_file}: there is no API key in it") from None
    return {"authorization": f"Bearer {key}"} if key else {}
