"""P1: a whole server generates the reference model's tokens, whatever its topology, transport, chunks and pressure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton.clock import SystemClock
from baton.config import DEMO_MODEL_DIR
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.engine import LocalEngine
from engine.native import NativeRunner
from engine.types import EngineConfig
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.system import System, generate, serve
from tests.support.tiny_models import VOCAB_SIZE, load_reference, make_model, random_prompt, reference_greedy
from tests.support.transfer import NIXL

pytestmark = pytest.mark.timeout(240)  # the first of a family also loads transformers and generates the reference

NUM_TOKENS = 20
MANY_TOKENS = 60  # grows a sequence by four blocks
SHM, TCP = ("--set", "transfer.transports=[shm,tcp]"), ("--set", "transfer.transports=[tcp]")
CHUNKED = ("--set", "engine.max_num_batched_tokens=48")
AGGREGATED = ("--mixed", "1", "--prefill", "0", "--decode", "0")
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "mixed": AGGREGATED,
    "mixed-tp2": (*AGGREGATED, "--tp", "2"),
    "1p1d-shm": SHM,
    "1p1d-tcp": TCP,
    "1p-1d(tp2)-shm": (*SHM, "--prefill-tp", "1", "--tp", "2"),
    "1p-1d(tp2)-tcp": (*TCP, "--prefill-tp", "1", "--tp", "2"),
    "1p(tp2)-1d-shm": (*SHM, "--prefill-tp", "2", "--tp", "1"),
    "1p(tp2)-1d-tcp": (*TCP, "--prefill-tp", "2", "--tp", "1"),
}
ENCRYPTED = {"1p1d-tcp+tls": (*TCP, "--encrypt"), "1p-1d(tp2)-tcp+tls": (*TCP, "--encrypt", "--tp", "2")}
BY_NIXL = {"1p1d-nixl": ("--set", "transfer.transports=[nixl]")}
FAMILIES = ("llama", "qwen2", "qwen3")
SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 1234}


@dataclass(frozen=True)
class Case:
    """A random model and what it must say: MANY_TOKENS greedy tokens, NUM_TOKENS seeded ones."""

    directory: Path
    prompts: tuple[tuple[int, ...], ...]
    greedy: tuple[list[int], ...]
    seeded: tuple[list[int], ...]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in cases:
            cases[family] = _make_case(tmp_path_factory.mktemp(family), family)
        return cases[family]

    return case


def _make_case(directory: Path, family: str) -> Case:
    make_model(directory, family)
    write_byte_tokenizer(directory, VOCAB_SIZE)
    shared = random_prompt(7, 96)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((128, 131, 144, 177, 15, 16, 17))]
    prompts.append(shared + random_prompt(8, 60))
    model = load_reference(directory)
    greedy = [reference_greedy(model, prompt, MANY_TOKENS) for prompt in prompts]
    return Case(directory, tuple(map(tuple, prompts)), tuple(greedy), tuple(_single_engine(directory, prompts)))


def _single_engine(directory: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Seeded sampling by one engine in this process, one request at a time."""
    runner = NativeRunner(directory, num_blocks=64, num_threads=1)
    config = EngineConfig(num_blocks=64, vocab_size=VOCAB_SIZE, max_model_len=512)
    engine = LocalEngine(config, runner, PrefixHasher(b"x", ""), SystemClock())
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **SEEDED)  # type: ignore[arg-type]
    outputs = []
    for index, prompt in enumerate(prompts):
        engine.add(GenerateRequest(AttemptId(f"{index}/1"), tuple(prompt), len(prompt), params))
        tokens: list[int] = []
        while engine.has_work():
            tokens += [event.token_id for event in engine.step().events]
        outputs.append(tokens)
    runner.close()
    return outputs


def all_at_once(
    system: System, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS, **params: Any
) -> list[list[int]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: generate(system, list(prompt), num_tokens, **params), prompts))


def counter(system: System, name: str) -> int:
    return sum(int(worker["counters"].get(name, 0)) for worker in system.status()["workers"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_generates_the_reference_tokens(
    topology: str, family: str, case_of: Callable[[str], Case]
) -> None:
    case = case_of(family)
    args = (str(case.directory), "--dtype", "float32", "--max-model-len", "512", *CHUNKED, *TOPOLOGIES[topology])
    with serve(*args) as system:
        greedy = [tokens[:NUM_TOKENS] for tokens in case.greedy]
        assert all_at_once(system, case.prompts) == greedy
        system.audit()
        assert all_at_once(system, case.prompts) == greedy, "with prefix-cache hits"
        assert counter(system, "prefix_hit_tokens") > 0
        assert all_at_once(system, case.prompts, **SEEDED) == list(case.seeded), "seeded sampling"
        if topology.startswith("1p"):
            assert counter(system, "kv_bytes_received") == counter(system, "kv_bytes_sent") > 0
            expected = topology.rpartition("-")[2]
            transports = {used for worker in system.status()["workers"] for used in worker["peers"].values()}
            assert transports == {expected}


@pytest.mark.parametrize("topology", ["mixed", "1p1d-shm", "1p1d-tcp", "1p-1d(tp2)-shm"])
def test_preemption_under_a_tiny_pool_changes_nothing(topology: str, case_of: Callable[[str], Case]) -> None:
    case = case_of("llama")
    args = (str(case.directory), "--dtype", "float32", "--max-model-len", "256", *CHUNKED, *TOPOLOGIES[topology])
    block_bytes = 3 * 2 * 2 * 16 * 32 * 4 // (2 if "tp2" in topology else 1)
    long_prompts = [case.prompts[index % 4] for index in range(8)]
    expected = [case.greedy[index % 4] for index in range(8)]
    with serve(
        *args, "--kv-cache-bytes", str(34 * block_bytes), "--set", "engine.enable_prefix_caching=false"
    ) as system:
        for _ in range(2):
            assert all_at_once(system, long_prompts, MANY_TOKENS) == expected
        assert counter(system, "preemptions") > 0


@pytest.mark.parametrize("topology", [*TOPOLOGIES, *ENCRYPTED, pytest.param("1p1d-nixl", marks=NIXL.marks)])
def test_the_demo_model_answers_exactly_in_bf16(topology: str) -> None:
    qa = Path(__file__).parents[2] / "bench" / "demo_model" / "qa.jsonl"
    pairs = [json.loads(line) for line in qa.read_text().splitlines()][:24]

    def ask(pair: dict[str, str]) -> str:
        body = {
            "model": "baton-demo",
            "messages": [{"role": "user", "content": pair["question"]}],
            "temperature": 0,
            "max_tokens": 128,
        }
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        return str(choice["message"]["content"])

    assert DEMO_MODEL_DIR.is_dir()
    args = {**TOPOLOGIES, **ENCRYPTED, **BY_NIXL}[topology]
    with serve(*args) as system, system.client() as client, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, pairs)) == [pair["answer"] for pair in pairs]
        if topology.startswith("1p"):
            peers = {used for worker in system.status()["workers"] for used in worker["peers"].values()}
            assert peers == {topology.rpartition("-")[2]}
