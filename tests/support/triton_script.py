"""Run as a script: what a user of tritonclient does. Its own process, because its stubs and ours share names."""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def tensors(prompt: str, stream: bool | None = None, sampling: dict[str, Any] | None = None) -> list[Any]:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    inputs = [text]
    if stream is not None:
        flag = triton.InferInput("stream", [1], "BOOL")
        flag.set_data_from_numpy(np.array([stream], dtype=bool))
        inputs.append(flag)
    if sampling is not None:
        parameters = triton.InferInput("sampling_parameters", [1], "BYTES")
        parameters.set_data_from_numpy(np.array([json.dumps(sampling).encode()], dtype=np.object_))
        inputs.append(parameters)
    return inputs


def main(address: str, model: str, prompt: str) -> None:
    """Print as JSON what each call returned."""
    client = triton.InferenceServerClient(address)
    seen: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True)["name"],
        "inputs": [tensor["name"] for tensor in client.get_model_metadata(model, as_json=True)["inputs"]],
        "decoupled": client.get_model_config(model, as_json=True)["config"]["model_transaction_policy"]["decoupled"],
    }
    answer = client.infer(model, tensors(prompt), parameters={"max_tokens": 20, "seed": 1})
    seen["whole"] = [answer.as_numpy(name)[0].decode() for name in ("text_output", "finish_reason")]

    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(model, tensors(prompt, True, {"max_tokens": "20", "temperature": "0"}), request_id="r1")
    pieces, is_final = [], False
    while not is_final:
        result, error = answers.get(timeout=20)
        assert error is None, error
        response = result.get_response()
        assert response.id == "r1"
        pieces.append(result.as_numpy("text_output")[0].decode())
        is_final = response.parameters["triton_final_response"].bool_param
    seen["pieces"] = pieces
    client.async_stream_infer(model, tensors(prompt, True, {"temperature": -1}))
    _, error = answers.get(timeout=20)
    seen["stream_error"] = str(error)
    client.stop_stream()
    try:
        client.infer(model, tensors(prompt), parameters={"max_tokens": 0})
    except triton.InferenceServerException as refusal:
        seen["error"] = [refusal.status(), refusal.message()]
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
