"""What NVIDIA's tritonclient gets from a server, as JSON: `python -m tests.support.triton_client ADDRESS MODEL PROMPT`.

A process of its own, because tritonclient and Baton describe the same protocol under the same protobuf names, and a
process can hold one description only.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

GREEDY = {"temperature": 0, "max_tokens": 128, "add_special_tokens": False}


def inputs(text: str, *, stream: bool) -> list[triton.InferInput]:
    """The request's tensors."""
    values: dict[str, tuple[str, Any]] = {
        "text_input": ("BYTES", np.array([text.encode()], dtype=np.object_)),
        "stream": ("BOOL", np.array([stream])),
        "sampling_parameters": ("BYTES", np.array([json.dumps(GREEDY).encode()], dtype=np.object_)),
    }
    tensors = []
    for name, (kind, data) in values.items():
        tensor = triton.InferInput(name, [1], kind)
        tensor.set_data_from_numpy(data)
        tensors.append(tensor)
    return tensors


def text_of(result: triton.InferResult) -> str:
    """The first choice's text."""
    return str(result.as_numpy("text_output")[0].decode())


def infer(client: triton.InferenceServerClient, model: str, prompt: str) -> dict[str, Any]:
    """One call, one answer."""
    result = client.infer(model, inputs(prompt, stream=False), request_id="triton-1")
    response = result.get_response()
    return {
        "id": response.id,
        "text": text_of(result),
        "finish_reason": result.as_numpy("finish_reason")[0].decode(),
        "completion_tokens": response.parameters["completion_tokens"].int64_param,
    }


def stream(client: triton.InferenceServerClient, model: str, prompt: str) -> dict[str, Any]:
    """Three requests side by side on one stream, the last of which wants its answer whole."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    running = {"a", "b", "whole"}
    texts, counts = dict.fromkeys(running, ""), dict.fromkeys(running, 0)
    for name in sorted(running):
        client.async_stream_infer(model, inputs(prompt, stream=name != "whole"), request_id=name)
    while running:
        result, error = arrived.get(timeout=30)
        if error is not None:
            raise error
        response = result.get_response()
        texts[response.id] += text_of(result)
        counts[response.id] += 1
        if response.parameters["triton_final_response"].bool_param:
            running.discard(response.id)
    client.stop_stream()
    return {"texts": texts, "counts": counts}


def main(address: str, model: str, prompt: str) -> None:
    """Try everything once."""
    with triton.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata(model)
        found = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready(model),
            "other_model_ready": client.is_model_ready("gpt-5"),
            "server": client.get_server_metadata().name,
            "inputs": [tensor.name for tensor in metadata.inputs],
            "outputs": [tensor.name for tensor in metadata.outputs],
            "decoupled": client.get_model_config(model).config.model_transaction_policy.decoupled,
            "infer": infer(client, model, prompt),
            "stream": stream(client, model, prompt),
        }
        try:
            client.infer("gpt-5", inputs(prompt, stream=False))
        except triton.InferenceServerException as error:
            found["error"] = {"status": error.status(), "message": error.message()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
