"""Messages to a prompt: the model's jinja template in a sandbox, with the globals that templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from baton.errors import InvalidRequest

_PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; to serving it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. The environment is the one that transformers documents for chat templates."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Compile.

        Raises:
            ValueError: the template has a syntax error.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error
        self._variables = dict(variables)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, whose contents are strings.

        With `continue_final_message` the prompt ends where the last message's content ends.

        Raises:
            InvalidRequest: the template refuses these messages or variables.
        """
        if not self._knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        scope = {"tools": None, "documents": None, **self._variables, **(variables or {})}
        try:
            text = self._template.render(
                **{**scope, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if continue_final_message:
            final = str(messages[-1]["content"]).strip()
            position = text.rfind(final)
            if not final or position < 0:
                raise InvalidRequest(
                    "continue_final_message needs a last message whose content the chat template keeps",
                    param="continue_final_message",
                )
            text = text[: position + len(final)]
        return text


def load_chat_template(model_dir: str) -> ChatTemplate | None:
    """The template in chat_template.jinja or tokenizer_config.json; None if the model has none. "" gets a plain one.

    Raises:
        ValueError: a file can not be read or the template does not compile.
    """
    if not model_dir:
        return ChatTemplate(_PLAIN_TEMPLATE, {})
    directory = Path(model_dir)
    config: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        config = json.loads((directory / "tokenizer_config.json").read_text())
    source = config.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        source = (directory / "chat_template.jinja").read_text()
    if isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default") or next(iter(named.values()), None)
    return None if not source else ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as templates see them; each is a string or {"content": string} in the file."""
    tokens: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
    return tokens


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)
