"""The server under test as clients must know it, and how it is found out. Knows OpenAI's HTTP paths; sends no load."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from loadtest.prompts import WORDS

ENDPOINTS: Final = ("completions", "chat", "grpc")
_TIMEOUT_S: Final = 60.0
BATON: Final = "baton"
"""Who owns the models of a Baton server, by its own word."""
_KNOWN_OWNERS: Final = (BATON, "vllm")  # these take `return_token_ids`; OpenAI's own refuses unknown fields
_CALIBRATION_WORDS: Final = 64


class TargetError(Exception):
    """The server can not be used; one sentence says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """Everything that a client needs to make and send requests, but for the API key, which travels apart."""

    url: str
    """HTTP base URL without /v1; for gRPC, HOST:PORT."""
    endpoint: str
    model: str
    owner: str = ""
    """Who the server says it is: "baton", "vllm", ..."""
    max_model_len: int | None = None
    alphabet: tuple[int, ...] = ()
    """Token ids that prompts are made of; empty: prompts are texts."""
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    """A text of n words has about overhead + n x tokens_per_word tokens; what it really has, usage says."""
    token_ids: bool = False
    """Ask for the ids in each event: exact counts, and also tokens without visible text have their moment."""
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    """From the scheduled time to the end of the answer."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of each body."""

    def to_json(self) -> dict[str, Any]:
        """As agents are told."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Target:
        """The reverse."""
        return Target(**{**value, "alphabet": tuple(value["alphabet"])})


def discover(
    url: str,
    *,
    endpoint: str = "completions",
    grpc: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    prompts: str = "auto",
    **options: Any,
) -> Target:
    """Ask the server what it serves and how long its prompts get. Blocks; a request or two are served for it.

    `url`: the server's root, as `loadtest.url.server_root` gives it.
    `prompts`: "ids" (exact lengths), "text", or "auto": ids where the server can tokenize and the endpoint takes
    them. `options` are further fields of Target.

    Raises:
        TargetError: nobody answers, the model is not there, or prompts of ids are impossible.
    """
    server = _Server(url, api_key)
    cards = server.ask("GET", "/v1/models").get("data") or []
    names = [str(card.get("id")) for card in cards]
    if model is None and len(names) != 1:
        raise TargetError(f"{url} serves {len(names)} models ({', '.join(names)[:200]}): name one with --model")
    model = model or names[0]
    if model not in names:
        raise TargetError(f"{url} does not serve {model!r} but {', '.join(names)[:200]}")
    card = cards[names.index(model)]
    owner = str(card.get("owned_by", ""))
    if endpoint == "grpc" and grpc is None:
        raise TargetError("the gRPC endpoint needs --grpc HOST:PORT")
    alphabet: tuple[int, ...] = ()
    if prompts == "ids" and endpoint != "completions":
        raise TargetError("prompts of token ids exist for the completions endpoint only")
    if endpoint == "completions" and prompts != "text":
        alphabet = _alphabet(server, model)
        if not alphabet and prompts == "ids":
            raise TargetError(f"{url} has no /tokenize, which prompts of token ids need")
    target = Target(
        url=url if endpoint != "grpc" else str(grpc),
        endpoint=endpoint,
        model=model,
        owner=owner,
        max_model_len=card.get("max_model_len"),
        alphabet=alphabet,
        token_ids=owner in _KNOWN_OWNERS and endpoint != "grpc",
        **options,
    )
    if alphabet:
        return target
    overhead, slope = _calibrate(server, target)
    return Target.from_json({**target.to_json(), "overhead_tokens": overhead, "tokens_per_word": slope})


@dataclass(frozen=True, slots=True)
class _Server:
    """Few small requests, one at a time."""

    url: str
    api_key: str | None

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        headers = {"content-type": "application/json"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, data, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise TargetError(f"{self.url} does not answer: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise TargetError(f"{self.url}{path}: HTTP {response.status}: {answer[:200].decode('utf-8', 'replace')}")
        try:
            value = json.loads(answer)
        except ValueError:
            raise TargetError(f"{self.url}{path}: the answer is not JSON") from None
        if not isinstance(value, dict):
            raise TargetError(f"{self.url}{path}: the answer is not a JSON object")
        return value


def _alphabet(server: _Server, model: str) -> tuple[int, ...]:
    """Ordinary tokens: those of our words. Special ones could end or change a sequence."""
    with contextlib.suppress(TargetError):
        body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        tokens = server.ask("POST", "/tokenize", body).get("tokens")
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tuple(sorted(set(tokens)))
    return ()


def _calibrate(server: _Server, target: Target) -> tuple[float, float]:
    """Tokens of an empty prompt and of one more word, from the usage of two short requests."""
    chosen = random.Random(0).choices(WORDS, k=_CALIBRATION_WORDS)
    counts = [(n, _prompt_tokens(server, target, " ".join(chosen[:n]))) for n in (1, _CALIBRATION_WORDS)]
    (few, least), (many, most) = counts
    slope = (most - least) / (many - few)
    if slope <= 0:
        raise TargetError(f"{server.url}: {many} words have no more tokens than {few}: its usage can not be right")
    return least - few * slope, slope


def _prompt_tokens(server: _Server, target: Target, text: str) -> int:
    body: dict[str, Any] = {"model": target.model, "max_tokens": 1, "stream": False}
    if target.endpoint == "chat":
        answer = server.ask("POST", "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
    else:
        answer = server.ask("POST", "/v1/completions", {**body, "prompt": text})
    try:
        return int(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError):
        raise TargetError(f"{server.url}: its answers have no usage.prompt_tokens") from None
