"""How long the engine thinks between two steps: bookkeeping with a runner that computes nothing.

    python -m bench.scheduler

Prints the CPU time per step of `LocalEngine.step` outside the runner, with 256 running decodes and 10 to 10,000
requests that wait, then for other batch sizes and for a prompt in chunks. Prompts have 500 tokens; prefix caching is on.
"""

from __future__ import annotations

import random
import statistics
import time

from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.engine import LocalEngine
from engine.types import EngineConfig
from tests.support.noop_runner import NoopRunner

VOCAB_SIZE = 50_000


class ThreadClock:
    """CPU time of the calling thread: what other processes do does not count."""

    def now(self) -> float:
        """Seconds."""
        return time.thread_time()


def engine_with(num_running: int, num_waiting: int, *, prompt_tokens: int = 500, **params: float) -> LocalEngine:
    """`num_running` sequences that decode, all slots taken, and `num_waiting` that wait for one."""
    num_blocks = (num_running + 1) * 128
    config = EngineConfig(
        num_blocks=num_blocks, vocab_size=VOCAB_SIZE, max_num_seqs=num_running, max_num_batched_tokens=8192
    )
    engine = LocalEngine(config, NoopRunner(num_blocks), PrefixHasher(b"secret", ""), ThreadClock())
    rng = random.Random(0)
    base = tuple(rng.randrange(VOCAB_SIZE) for _ in range(prompt_tokens - 1))
    for index in range(num_running + num_waiting):
        engine.add(
            GenerateRequest(
                attempt_id=AttemptId(f"{index}/1"),
                token_ids=(index, *base),  # nothing is shared
                num_prompt_tokens=prompt_tokens,
                sampling=SamplingParams(max_tokens=100_000, **params),  # type: ignore[arg-type]
            )
        )
    while engine.stats().num_steps < -(-num_running * prompt_tokens // 8192) + 2:
        engine.step()
    return engine


def step_times_s(engine: LocalEngine, num_steps: int) -> list[float]:
    """Bookkeeping of each of the next steps."""
    times = []
    for _ in range(num_steps):
        began = engine.stats().bookkeeping_s
        engine.step()
        times.append(engine.stats().bookkeeping_s - began)
    return times


def main() -> None:
    """Print the tables."""
    print("bookkeeping per step, CPU us: median, 99th percentile of 500 steps")
    for num_waiting in (10, 100, 1_000, 10_000):
        report(f"256 running, {num_waiting:6} waiting", step_times_s(engine_with(256, num_waiting), 500))
    for num_running in (1, 16, 64, 1024):
        report(f"{num_running} running, 10 waiting", step_times_s(engine_with(num_running, 10), 500))
    report("256 running, with a penalty", step_times_s(engine_with(256, 10, frequency_penalty=0.5), 500))
    report("prompts in chunks of 512, 1 running", prefill_times_s(512))


def prefill_times_s(chunk: int) -> list[float]:
    """Steps that compute one chunk of new prompts each: keys are hashed and blocks published."""
    config = EngineConfig(
        num_blocks=4096, vocab_size=VOCAB_SIZE, max_num_seqs=1, max_num_batched_tokens=chunk, max_model_len=60_000
    )
    engine = LocalEngine(config, NoopRunner(4096), PrefixHasher(b"secret", ""), ThreadClock())
    rng = random.Random(0)
    tokens = tuple(rng.randrange(VOCAB_SIZE) for _ in range(50_000))
    engine.add(GenerateRequest(AttemptId("a/1"), tokens, len(tokens), SamplingParams(max_tokens=1)))
    return step_times_s(engine, len(tokens) // chunk)


def report(name: str, times_s: list[float]) -> None:
    """One line."""
    ordered = sorted(times_s)
    print(f"{name:40} {statistics.median(ordered) * 1e6:8.0f} {ordered[len(ordered) * 99 // 100] * 1e6:8.0f}")


if __name__ == "__main__":
    main()
