"""llama.cpp as an arm, by its low-level API, on a GGUF of the same weights. Batches are static: all prefill, then decode.

usage: arm_llama_cpp.py OPTIONS_JSON      (the bench starts it, under a Python that has llama-cpp-python)
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
from arm import Tokens, serve_arm

_BATCH = 2048
_MICRO_BATCH = 512


class LlamaCppArm:
    """See arm.Arm. Each sequence has KV cells of its own; `prepare` makes a context for so many of such a length."""

    def __init__(self, options: dict[str, Any]) -> None:
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        self._num_threads = len(options["cores"])
        self._model = lc.llama_model_load_from_file(options["gguf"].encode(), params)
        if not self._model:
            raise RuntimeError(f"{options['gguf']} can not be loaded")
        self._vocab_size = int(options["vocab_size"])
        self._batch = lc.llama_batch_init(_BATCH, 0, 1)
        self._context: Any = None
        self._room = (0, 0)
        self._ends: list[int] = []
        self._next: Tokens = []

    def prepare(self, num_seqs: int, num_tokens: int) -> None:
        """See Arm. A context of the same size is kept."""
        room = (num_seqs, -(-(num_tokens + 8) // 256) * 256)
        if self._room == room:
            return
        if self._context is not None:
            lc.llama_free(self._context)
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room[1] * num_seqs, num_seqs
        params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
        params.n_threads = params.n_threads_batch = self._num_threads
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1
        self._context, self._room = lc.llama_init_from_model(self._model, params), room
        if not self._context:
            raise RuntimeError(f"no context for {room}")

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See Arm."""
        self._clear()
        self._ends = [0] * len(prompts)
        self._next = [self._prefill(seq, prompt) for seq, prompt in enumerate(prompts)]
        found = [[token] for token in self._next]
        for _ in range(num_tokens - 1):
            self._decode()
            for tokens, token in zip(found, self._next, strict=True):
                tokens.append(token)
        return found

    def begin(self, prompts: Sequence[Tokens]) -> None:
        """See Arm. Prefills one prompt and copies its KV for the others: prefill is slow, and decoding the same."""
        self._clear()
        self._ends = [0] * len(prompts)
        first = self._prefill(0, prompts[0])
        for seq in range(1, len(prompts)):
            lc.llama_memory_seq_cp(self._memory(), 0, seq, -1, -1)
            self._ends[seq] = self._ends[0]
        self._next = [first] * len(prompts)

    def decode(self, num_steps: int) -> None:
        """See Arm."""
        for _ in range(num_steps):
            self._decode()

    def end(self) -> None:
        """See Arm."""
        self._clear()

    def remember(self, prompt: Tokens) -> None:
        """See Arm."""
        self.generate([prompt], 1)

    def generate_again(self, prompt: Tokens) -> None:
        """See Arm: computes the last token of the prompt again, as llama.cpp's server does."""
        lc.llama_memory_seq_rm(self._memory(), 0, len(prompt) - 1, -1)
        self._ends[0] = len(prompt) - 1
        self._prefill(0, prompt[-1:])

    def facts(self) -> dict[str, Any]:
        """See Arm."""
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {lc.__version__}",
            "python": platform.python_version(),
            "system": lc.llama_print_system_info().decode(),
            "n_batch": _BATCH,
            "n_ubatch": _MICRO_BATCH,
        }

    def _memory(self) -> Any:
        return lc.llama_get_memory(self._context)

    def _clear(self) -> None:
        lc.llama_memory_clear(self._memory(), True)

    def _prefill(self, seq: int, tokens: Tokens) -> int:
        """The likeliest token after the sequence's next tokens."""
        last = -1
        for begin in range(0, len(tokens), _BATCH):
            piece = tokens[begin : begin + _BATCH]
            for token in piece:
                last = self._put(seq, token, wants_logits=False)
            if begin + len(piece) == len(tokens):
                self._batch.logits[last] = 1
            self._run()
        return self._likeliest(last)

    def _decode(self) -> None:
        for seq, token in enumerate(self._next):
            self._put(seq, token, wants_logits=True)
        self._run()
        self._next = [self._likeliest(row) for row in range(len(self._next))]

    def _put(self, seq: int, token: int, *, wants_logits: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row] = token, self._ends[seq]
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
        batch.logits[row] = int(wants_logits)
        batch.n_tokens = row + 1
        self._ends[seq] += 1
        return int(row)

    def _run(self) -> None:
        status = lc.llama_decode(self._context, self._batch)
        lc.llama_synchronize(self._context)
        self._batch.n_tokens = 0
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _likeliest(self, row: int) -> int:
        logits = lc.llama_get_logits_ith(self._context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))


if __name__ == "__main__":
    serve_arm(LlamaCppArm)
