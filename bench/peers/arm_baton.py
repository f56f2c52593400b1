"""Baton as an arm: LocalEngine over NativeRunner, in one process per rank, without the processes around a worker.

usage: arm_baton.py OPTIONS_JSON      (the bench starts it; it starts its own followers)
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from arm import Tokens, serve_arm

from baton.clock import SystemClock
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams, TokenEvent
from engine.comm import Comm, ShmComm
from engine.engine import LocalEngine
from engine.native import NativeRunner
from engine.overlap import OverlappingEngine
from engine.types import EngineConfig, Sampled, StepHook, StepPlan

_BEGIN_TOKENS = 4096
"""Of a step while a batch to decode is prefilled, as many as vLLM takes by default. With few, the sequences that are
prefilled first run ahead of the others, and later steps see more KV than the row says."""


class LeaderRunner:
    """A runner whose followers run along."""

    def __init__(self, runner: NativeRunner) -> None:
        self._runner = runner
        self.layout = runner.layout

    def kv_buffer(self) -> memoryview:
        """See engine.types.Runner."""
        return self._runner.kv_buffer()

    def kv_fd(self) -> int | None:
        """See engine.types.Runner."""
        return self._runner.kv_fd()

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """See engine.types.Runner."""
        return self._runner.run_all(plan, hook)

    def close(self) -> None:
        """See engine.types.Runner."""
        self._runner.close()


class BatonArm:
    """See arm.Arm. A measurement gets a new engine over the same runner, so that nothing is cached from before."""

    def __init__(self, options: dict[str, Any]) -> None:
        tp_size, cores = int(options["tp_size"]), options["cores"]
        self._options = options
        comm = _lead(options) if tp_size > 1 else None
        runner = make_runner(options, comm, cores[:1] if tp_size > 1 else cores)
        self._overlapping = runner.overlapping
        self._backend = "reference" if getattr(runner, "_fast", None) is None else "fast"
        if self._overlapping is not None:
            self._backend = "cuda"
        library = getattr(getattr(runner, "_fast", None), "library", None)
        self._isa = None if library is None else str(library.isa)
        self._vocab_size = runner.config.vocab_size
        self._num_blocks = runner.layout.geometry.num_blocks
        self._max_len = runner.config.max_position_embeddings
        self._runner = LeaderRunner(runner) if tp_size > 1 else runner
        self._engine = self._fresh_engine(caching=False)
        self._num_requests = 0

    def prepare(self, num_seqs: int, num_tokens: int) -> None:
        """The pool is there from the start."""

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See Arm."""
        self._engine = self._fresh_engine(caching=False)
        return self._generate(prompts, num_tokens)

    def begin(self, prompts: Sequence[Tokens]) -> None:
        """See Arm."""
        self._engine = self._fresh_engine(caching=False, max_num_batched_tokens=_BEGIN_TOKENS)
        self._batch = [self._add(prompt, self._max_len) for prompt in prompts]
        started: set[AttemptId] = set()
        while len(started) < len(prompts):
            started.update(event.attempt_id for event in self._step())

    def decode(self, num_steps: int) -> None:
        """See Arm. Every step has every sequence."""
        missing = num_steps * len(self._batch)
        while missing > 0:
            missing -= len(self._step())

    def end(self) -> None:
        """See Arm."""
        for name in self._batch:
            self._engine.abort(name)
        while self._engine.has_work():  # a step may still be under way
            self._engine.step()

    def remember(self, prompt: Tokens) -> None:
        """See Arm."""
        self._engine = self._fresh_engine(caching=True)
        self._generate([prompt], 1)

    def generate_again(self, prompt: Tokens) -> None:
        """See Arm."""
        self._generate([prompt], 1)

    def facts(self) -> dict[str, Any]:
        """See Arm."""
        return {
            "engine": "baton",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "backend": self._backend,
            "isa": self._isa,
            "num_blocks": self._num_blocks,
            "max_num_batched_tokens": self._engine.config.max_num_batched_tokens,
            "block_size": self._engine.config.block_size,
        }

    def _fresh_engine(self, *, caching: bool, **defaults: int) -> LocalEngine:
        """`defaults` give way to the arm's options."""
        settings: dict[str, Any] = {"enable_prefix_caching": caching, "max_model_len": self._max_len, **defaults}
        for name in ("max_num_batched_tokens", "max_num_seqs", "block_size"):
            if self._options.get(name):
                settings[name] = self._options[name]
        config = EngineConfig(num_blocks=self._num_blocks, vocab_size=self._vocab_size, **settings)
        parts = (config, self._runner, PrefixHasher(b"bench", ""), SystemClock())
        return LocalEngine(*parts) if self._overlapping is None else OverlappingEngine(*parts, self._overlapping)

    def _add(self, prompt: Tokens, num_tokens: int) -> AttemptId:
        self._num_requests += 1
        name = AttemptId(f"{self._num_requests}/1")
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add(GenerateRequest(name, tuple(prompt), len(prompt), params))
        return name

    def _generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        found: dict[AttemptId, Tokens] = {self._add(prompt, num_tokens): [] for prompt in prompts}
        while self._engine.has_work():
            for event in self._step():
                found[event.attempt_id].append(event.token_id)
        return list(found.values())

    def _step(self) -> list[TokenEvent]:
        result = self._engine.step()
        if result.preempted or result.failed:
            raise RuntimeError(f"preempted {result.preempted}, failed {result.failed}")
        return result.events


def make_runner(options: dict[str, Any], comm: Comm | None, cores: Sequence[int]) -> NativeRunner:
    """One rank."""
    return NativeRunner(
        options["model_dir"],
        dtype="bfloat16",
        comm=comm,
        num_blocks=-(-int(options["kv_tokens"]) // int(options.get("block_size", 16))),
        block_size=int(options.get("block_size", 16)),
        num_threads=len(cores),
        cores=cores if len(cores) > 1 else (),
        backend=options["backend"],
        quantization=options.get("quantization"),
        kv_dtype=options.get("kv_dtype", "auto"),
        device=options.get("device", "cpu"),
        load_format=options.get("load_format", "auto"),
        max_num_seqs=int(options.get("max_num_seqs", 256)),
        prompt_attention=options.get("prompt_attention", "auto"),
    )


def _lead(options: dict[str, Any]) -> ShmComm:
    """Start a follower on each core but the first, and join them."""
    size, cores = int(options["tp_size"]), options["cores"]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        path = f"{directory}/tp.sock"
        os.sched_setaffinity(0, cores)
        for rank in range(1, size):
            spec = json.dumps({**options, "follow": path, "rank": rank, "cores": [cores[rank]]})
            subprocess.Popen([sys.executable, __file__, spec], stdin=subprocess.DEVNULL, stdout=2)
        os.sched_setaffinity(0, cores[:1])
        return ShmComm(path, rank=0, size=size)


def _follow(options: dict[str, Any]) -> None:
    os.sched_setaffinity(0, options["cores"])
    comm = ShmComm(options["follow"], rank=options["rank"], size=int(options["tp_size"]))
    make_runner(options, comm, options["cores"]).follow()


if __name__ == "__main__":
    if "follow" in (asked := json.loads(sys.argv[1])):
        _follow(asked)
    else:
        serve_arm(BatonArm)
