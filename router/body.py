"""JSON bodies to checked models: every refusal is one readable sentence that names its parameter.

null means absent for every optional field. A field that this server does not know is refused, with a hint, unless it
is known to change nothing.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from baton.errors import InvalidRequest

# fmt: off
_HARMLESS: Final = frozenset({
    # Of other vendors' clients; they change nothing here: billing, routing, telemetry, hints.
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "request_id", "spaces_between_special_tokens", "include_reasoning",
    "separate_reasoning", "stream_reasoning", "stream_interval", "provider", "transforms", "route",
    "session_id", "keep_alive", "mm_processor_kwargs",
})
_INTERNAL: Final = frozenset({
    # How workers are told about each other. From outside they would name hosts to connect to, or another tenant.
    "kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room",
    "disaggregated_params", "disagg_prefill_dp_rank", "data_parallel_rank", "do_remote_prefill", "do_remote_decode",
    "remote_host", "remote_port", "remote_engine_id", "remote_block_ids", "block_ids", "block_table",
    "slot_mapping", "worker", "worker_id", "prefill_worker", "decode_worker", "decode_peer", "attempt_id", "tenant",
    "worker_address", "prefill_address", "decode_address", "prefill_worker_id", "decode_worker_id",
    "backend_instance_id", "remote_request_id", "routed_dp_rank", "transfer_id", "incarnation", "nvext",
})
# fmt: on
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    # Understood, and refused by name unless the value asks for nothing.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "grammar": (),
    "regex": (),
    "json_schema": (),
    "ebnf": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "suffix": ("",),
    "prompt_embeds": ([],),
    "prompt_logprobs": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "thinking_token_budget": (),
    "lora_path": (),
    "session_params": (),
}

_MAX_LEVELS: Final = 64
_TOO_DEEP: Final = f"nested in more than {_MAX_LEVELS} levels"

_Model = TypeVar("_Model", bound=BaseModel)


def parse(body_type: type[_Model], data: bytes) -> _Model:
    """The checked request in a JSON body.

    Raises:
        InvalidRequest: says what is wrong, in one sentence, and with which parameter.
    """
    try:
        tree = load_json(data.decode("utf-8-sig"))  # json itself would take UTF-16 and half a surrogate pair
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return check(body_type, tree)


def load_json(text: str) -> Any:
    """What a text of JSON says, with only such strings and nesting as can be written again.

    Raises:
        ValueError: it is not JSON, or has a NaN, half a surrogate pair, or more than 64 levels.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # half a surrogate pair is no text, but JSON can spell it
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _MAX_LEVELS:
        _check_levels(tree)
    return tree


def _check_levels(tree: Any) -> None:
    level = [tree]
    for _ in range(_MAX_LEVELS + 1):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.values()
            elif isinstance(node, list):
                below += node
        if not below:
            return
        level = below
    raise ValueError(_TOO_DEEP)


def check(body_type: type[_Model], tree: dict[str, Any]) -> _Model:
    """The same for what is not JSON any more.

    Raises:
        InvalidRequest: as `parse`.
    """
    tree = without_nulls(tree)
    _judge_unknown(body_type, tree)
    try:
        return body_type.model_validate(tree)
    except ValidationError as error:
        raise _readable(error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without its null members."""
    return {key: value for key, value in tree.items() if value is not None}


def _judge_unknown(body_type: type[BaseModel], tree: dict[str, Any]) -> None:
    known = set(body_type.model_fields)
    for name, value in tree.items():
        if name in known or name in _HARMLESS:
            continue
        if name in _INTERNAL:
            raise InvalidRequest(f"{name} is internal to the cluster and not accepted from clients.", param=name)
        if name in _UNSUPPORTED:
            if value in _UNSUPPORTED[name]:
                continue
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)
        near = difflib.get_close_matches(name[:64], known | set(_UNSUPPORTED), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"Unknown parameter: {name[:64]}.{hint}", param=name[:64])


_DEMANDS: Final = {
    "missing": "is missing",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be one of {expected}",
}


def _readable(error: ValidationError) -> InvalidRequest:
    """pydantic's first finding as one sentence."""
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    kind = first["type"]
    if kind in _DEMANDS:
        demand = _DEMANDS[kind].format(**first.get("ctx", {}))
    else:
        demand = first["msg"].removeprefix("Value error, ")
    given = json.dumps(first.get("input"), default=str)
    is_short = kind != "missing" and len(given) <= 60
    return InvalidRequest(
        f"{param or 'The body'} {demand}{f' (got {given})' if is_short else ''}.", param=param or None
    )
