"""vLLM as an arm, on CPU or on CUDA: vllm.LLM, offline, its engine core and worker in this one process.

usage: arm_vllm.py OPTIONS_JSON      (the bench starts it, under the Python of vLLM's environment)

In one process there is no message passing between a front end and the core, which on one core is vLLM's best case.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from arm import Tokens, serve_arm

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
)


class VllmArm:
    """See arm.Arm. Prefix caching is as the options say, for the whole life of the process."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import vllm

        settings: dict[str, Any] = {}
        if options.get("max_num_batched_tokens"):
            settings["max_num_batched_tokens"] = options["max_num_batched_tokens"]
        self._llm = vllm.LLM(
            model=options["model_dir"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options["max_positions"],
            max_num_seqs=int(options.get("max_num_seqs", 64)),
            load_format=options.get("load_format", "auto"),
            kv_cache_memory_bytes=int(options["kv_bytes"]),
            kv_cache_dtype=options.get("kv_dtype", "auto"),
            quantization=options.get("quantization"),
            enable_prefix_caching=bool(options["prefix_caching"]),
            seed=0,
            **settings,
        )
        self._engine = self._llm.llm_engine
        self._vllm, self._torch = vllm, torch
        self._max_len = int(options["max_positions"])
        self._num_requests = 0
        self._batch: list[str] = []

    def prepare(self, num_seqs: int, num_tokens: int) -> None:
        """The pool is there from the start."""

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See Arm."""
        found: dict[str, Tokens] = {self._add(prompt, num_tokens): [] for prompt in prompts}
        while self._engine.has_unfinished_requests():
            for name, tokens in self._step():
                found[name] += tokens
        return list(found.values())

    def begin(self, prompts: Sequence[Tokens]) -> None:
        """See Arm."""
        self._batch = [self._add(prompt, self._max_len - len(prompt)) for prompt in prompts]
        started: set[str] = set()
        while len(started) < len(prompts):
            started.update(name for name, tokens in self._step() if tokens)

    def decode(self, num_steps: int) -> None:
        """See Arm."""
        missing = num_steps * len(self._batch)
        while missing > 0:
            missing -= sum(len(tokens) for _, tokens in self._step())

    def end(self) -> None:
        """See Arm."""
        self._engine.abort_request(self._batch)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def remember(self, prompt: Tokens) -> None:
        """See Arm."""
        self.generate([prompt], 1)

    def generate_again(self, prompt: Tokens) -> None:
        """See Arm."""
        self.generate([prompt], 1)

    def facts(self) -> dict[str, Any]:
        """See Arm."""
        config = self._engine.vllm_config
        preload = os.environ.get("LD_PRELOAD", "")
        return {
            "engine": "vllm",
            "version": self._vllm.__version__,
            "python": platform.python_version(),
            "torch": self._torch.__version__,
            "torch_threads": self._torch.get_num_threads(),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_size": config.cache_config.block_size,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "compilation": str(config.compilation_config.mode),
            "preloaded": [os.path.basename(path) for path in preload.split(":") if path],
        }

    def _add(self, prompt: Tokens, num_tokens: int) -> str:
        from vllm.sampling_params import RequestOutputKind

        self._num_requests += 1
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = str(self._num_requests)
        internal = self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        assert internal is None or isinstance(internal, str)
        return name

    def _step(self) -> list[tuple[str, Tokens]]:
        return [(output.request_id, list(output.outputs[0].token_ids)) for output in self._engine.step()]


if __name__ == "__main__":
    serve_arm(VllmArm)
