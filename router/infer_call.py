"""One request of KServe's protocol, read from tensors and parameters, and its responses, written as tensors.

Knows the protocol's messages; knows neither the gRPC server nor how answers come about.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from baton.errors import InvalidRequest
from protos import inference_pb2 as pb
from router.answer import Answer
from router.body import check, load_json
from router.schemas import CompletionBody

INPUTS: Final = (
    ("text_input", "BYTES", pb.TYPE_STRING, False),
    ("stream", "BOOL", pb.TYPE_BOOL, True),
    ("sampling_parameters", "BYTES", pb.TYPE_STRING, True),
    ("exclude_input_in_output", "BOOL", pb.TYPE_BOOL, True),
)
OUTPUTS: Final = (("text_output", "BYTES", pb.TYPE_STRING), ("finish_reason", "BYTES", pb.TYPE_STRING))
_TRITONS_OWN: Final = ("sequence_id", "sequence_start", "sequence_end", "triton_enable_empty_final_response")
_TEXTS: Final = ("stop", "cache_salt", "model", "user")


class InferCall:
    """One inference request, read, and its responses, written."""

    def __init__(self, request: pb.ModelInferRequest) -> None:
        """Read it.

        Raises:
            InvalidRequest: a tensor or a parameter is wrong.
        """
        self.request = request
        tensors = _tensors(request)
        unknown = set(tensors) - {name for name, *_ in INPUTS} - {"streaming"}
        if unknown:
            raise InvalidRequest(f"Unknown input tensor: {min(unknown)[:64]}.", param=min(unknown)[:64])
        if "text_input" not in tensors:
            raise InvalidRequest("The input tensor text_input (BYTES, one element) is missing.", param="text_input")
        self.text = _text(tensors["text_input"], "text_input")
        self.wants_stream = bool(tensors.get("stream", tensors.get("streaming", False)))
        self._echo = self.text if tensors.get("exclude_input_in_output") is False else ""
        tree = {name: _value(parameter) for name, parameter in request.parameters.items() if name not in _TRITONS_OWN}
        if isinstance(tree.get("timeout"), int):
            tree["timeout"] = tree["timeout"] / 1e6 or None  # Triton's is in microseconds, 0 for none
        if "sampling_parameters" in tensors:
            tree |= _sampling(_text(tensors["sampling_parameters"], "sampling_parameters"))
        if tree.pop("stream", None):
            raise InvalidRequest(
                "stream is no parameter here: ask ModelStreamInfer with the input stream, BOOL [1] = true.",
                param="stream",
            )
        for refused in ("echo", "logprobs", "prompt", "return_token_ids", "stream_options"):
            if tree.pop(refused, None):
                raise InvalidRequest(f"{refused} is not a parameter of this protocol.", param=refused)
        self.body = check(CompletionBody, {**tree, "prompt": self.text})
        if self.wants_stream and self.body.n > 1:
            raise InvalidRequest("A streamed answer has one choice: n must be 1.", param="n")

    async def whole(self, answer: Answer) -> pb.ModelInferResponse:
        """The response with all of every choice."""
        texts = {choice.index: self._echo for choice in answer.choices}
        reasons: dict[int, str] = {}
        async with contextlib.aclosing(answer.deltas()) as deltas:
            async for choice, delta in deltas:
                texts[choice.index] += delta.text
                if delta.finish_reason is not None:
                    reasons[choice.index] = delta.finish_reason
        return self._response(answer, list(texts.values()), [reasons[index] for index in texts], is_final=True)

    async def parts(self, answer: Answer) -> AsyncIterator[pb.ModelInferResponse]:
        """A response for each piece of text; the last one is marked as final."""
        text = self._echo
        async with contextlib.aclosing(answer.deltas()) as deltas:
            async for _, delta in deltas:
                text += delta.text
                is_final = delta.finish_reason is not None
                if text or is_final:
                    yield self._response(answer, [text], [delta.finish_reason or ""], is_final=is_final)
                    text = ""

    def _response(
        self, answer: Answer, texts: list[str], reasons: list[str], *, is_final: bool
    ) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(
            model_name=self.request.model_name, model_version="1", id=self.request.id, raw_output_contents=[]
        )
        for (name, kind, _), values in zip(OUTPUTS, (texts, reasons), strict=True):
            response.outputs.add(name=name, datatype=kind, shape=[len(values)])
            data = [value.encode("utf-8", "replace") for value in values]
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(item)) + item for item in data))
        response.parameters["triton_final_response"].bool_param = is_final
        if is_final:
            response.parameters["prompt_tokens"].int64_param = answer.choices[0].num_prompt_tokens
            response.parameters["completion_tokens"].int64_param = sum(c.num_tokens for c in answer.choices)
        return response


def _tensors(request: pb.ModelInferRequest) -> dict[str, bytes | bool]:
    """Each input's single element, from either of the two places where the protocol may carry it."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(f"{len(request.inputs)} inputs, but {len(raw)} raw_input_contents.", param="inputs")
    values: dict[str, bytes | bool] = {}
    for position, tensor in enumerate(request.inputs):
        name, kind = tensor.name[:64], tensor.datatype
        data: Any
        if kind == "BYTES":
            data = _raw_bytes(raw[position], name) if raw else list(tensor.contents.bytes_contents)
        elif kind == "BOOL":
            data = [byte != 0 for byte in raw[position]] if raw else list(tensor.contents.bool_contents)
        else:
            raise InvalidRequest(f"The input {name} has datatype {kind[:16]}: use BYTES or BOOL.", param=name)
        if len(data) != 1:
            raise InvalidRequest(f"The input {name} must have one element, not {len(data)}.", param=name)
        values[name] = data[0]
    return values


def _raw_bytes(raw: bytes, name: str) -> list[bytes]:
    """Elements as 4-byte little-endian length and content."""
    items, position = [], 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise InvalidRequest(f"The raw contents of {name} are cut short.", param=name)
        (length,) = struct.unpack_from("<I", raw, position)
        items.append(raw[position + 4 : position + 4 + length])
        position += 4 + length
    if position != len(raw):
        raise InvalidRequest(f"The raw contents of {name} are cut short.", param=name)
    return items


def _text(value: bytes | bool, name: str) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode()
    except UnicodeDecodeError:
        pass
    raise InvalidRequest(f"The input {name} must be a BYTES tensor with UTF-8 text.", param=name)


def _value(parameter: pb.InferParameter) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def _sampling(text: str) -> Mapping[str, Any]:
    """Triton's clients send every value as a string; those are read as JSON where they are not texts by nature."""
    try:
        tree = load_json(text)
    except ValueError as error:
        problem = f"sampling_parameters is not valid JSON: {str(error)[:200]}."
        raise InvalidRequest(problem, param="sampling_parameters") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("sampling_parameters must be a JSON object.", param="sampling_parameters")
    for name, value in tree.items():
        if isinstance(value, str) and name not in _TEXTS:
            with contextlib.suppress(ValueError):
                tree[name] = load_json(value.lower())
    return tree
