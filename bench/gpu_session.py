"""Half an hour on one GPU, planned: correctness first, then numbers, the most telling ones first.

    python -m bench.gpu_session correct            # tests; nothing else runs before these pass      ~4 min
    python -m bench.gpu_session kernels            # ceilings, then each kernel's share of them      ~2 min
    python -m bench.gpu_session engine [...]       # bench.engine --device cuda with those ceilings  ~6 min per shape
    python -m bench.gpu_session steps              # where a decode step's time goes                 ~2 min
    python -m bench.gpu_session fp8                # accuracy, products and attention beside bf16    ~2 min

Each stage stands alone, ends within ten minutes, prints a JSON line per figure as soon as it is known, and keeps
everything under --out. `engine` takes what bench.engine takes after `--device cuda`. Needs torch with CUDA, triton,
and pytest; where vLLM is to be the rival, a directory that holds it (--vllm-site). docs/benchmarks-gpu.md has the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parent.parent
_TESTS: Final = (
    ("kernels, small", "tests/unit/test_cuda_kernels.py"),
    ("kernels, serving sizes", "tests/gpu/test_cuda_kernels.py"),
    ("FlashAttention for prompts", "tests/gpu/test_cuda_flash.py"),
    ("fp8, small", "tests/unit/test_cuda_fp8.py"),
    ("fp8 beside plain torch", "tests/gpu/test_cuda_fp8.py"),
    ("engine beside its reference", "tests/gpu/test_cuda_engine.py"),
    ("CUDA IPC", "tests/gpu/test_cuda_ipc.py"),
)
_TEST_LIMIT_S: Final = 280.0


class Journal:
    """Prints figures and keeps them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, **figure: Any) -> None:
        """One line, at once."""
        line = json.dumps(figure)
        print(line, flush=True)
        with self._path.open("a") as kept:
            kept.write(line + "\n")


def correct(journal: Journal) -> int:
    """Every group of tests; the number of groups that failed."""
    failed = 0
    for what, path in _TESTS:
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_TEST_LIMIT_S)
            status, said = done.returncode, (done.stdout + done.stderr).strip().splitlines()
        except subprocess.TimeoutExpired:
            status, said = 124, [f"more than {_TEST_LIMIT_S:.0f} s"]
        seconds = round(time.perf_counter() - began, 1)
        journal.say(
            stage="correct", tests=what, status=status, seconds=seconds, said=said[-1:] if not status else said[-30:]
        )
        failed += status != 0
    return failed


def kernels(journal: Journal) -> None:
    """Ceilings by copy and by matrix product; attention by bytes or operations; the small kernels by bytes."""
    ceilings = measure_ceilings()
    journal.say(stage="kernels", **ceilings)
    for figure in (
        *_decode_figures(ceilings),
        *_prefill_figures(ceilings),
        *_prompt_figures(ceilings),
        *_small_figures(ceilings),
    ):
        journal.say(stage="kernels", **figure)


def measure_ceilings() -> dict[str, float]:
    """Dense bf16 TFLOP/s of a large product on random data, and TB/s of a large copy, read plus written."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = _seconds(lambda: left @ right, 20)
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source), 10)
    return {"tflops": 2 * 8192**3 / product_s / 1e12, "tbps": 2 * source.numel() / copy_s / 1e12}


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, by events, warmed up: the median of five runs of `repeats` calls."""
    import torch

    for _ in range(3):
        work()
    found = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / repeats / 1000)
    return statistics.median(found)


def _graphed(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph: launches do not count."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def _decode_figures(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    import torch

    from engine.cuda.buckets import num_splits
    from engine.cuda.kernels.attention import decode_attention

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for heads, kv_heads in ((32, 8), (40, 40)):
        for batch, context in ((1, 640), (1, 8192), (8, 640), (64, 640), (160, 640), (256, 640)):
            for block_size in (16, 64):
                pool, tables, begins = _paged(batch, context, kv_heads, block_size)
                query = torch.randn(batch, heads, 128, device="cuda", dtype=torch.bfloat16)
                out = torch.empty_like(query)
                starts = torch.full((batch,), context - 1, device="cuda", dtype=torch.int32)
                for splits in sorted({num_splits(batch, kv_heads, multiprocessors), 1, 4, 16}):
                    given = (query, pool, starts, tables, begins)
                    work = partial(decode_attention, *given, window=None, num_splits=splits, out=out)
                    seconds = _seconds(_graphed(work), 30)
                    rate = batch * context * kv_heads * 128 * 2 * 2 / seconds / 1e12
                    yield {
                        "kernel": "decode attention",
                        "heads": heads,
                        "kv_heads": kv_heads,
                        "batch": batch,
                        "context": context,
                        "block": block_size,
                        "splits": splits,
                        "us": round(seconds * 1e6, 1),
                        "read_tbps": round(rate, 3),
                        "of_copy": round(rate / ceilings["tbps"], 3),
                    }


def _prefill_figures(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    for batch, cached, new in ((16, 0, 512), (4, 0, 2048), (1, 0, 8192), (4, 2048, 512)):
        for block_size in (16, 64):
            seconds = _seconds(_triton_prefill(batch, cached, new, 32, 8, block_size), 10)
            rate = batch * 4 * 32 * 128 * new * (cached + (new + 1) / 2) / seconds / 1e12
            yield {
                "kernel": "prefill attention",
                "batch": batch,
                "cached": cached,
                "new": new,
                "block": block_size,
                "us": round(seconds * 1e6, 1),
                "tflops": round(rate, 1),
                "of_product": round(rate / ceilings["tflops"], 3),
            }


def _triton_prefill(
    batch: int, cached: int, new: int, heads: int, kv_heads: int, block_size: int
) -> Callable[[], object]:
    import torch

    from engine.cuda.kernels.attention import prefill_attention, prefill_rows

    pool, tables, begins = _paged(batch, cached + new, kv_heads, block_size)
    query = torch.randn(batch * new, heads, 128, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)
    each = prefill_rows(heads // kv_heads, 128, torch.bfloat16) // (heads // kv_heads)
    tiles = [(seq, first) for seq in range(batch) for first in range(0, new, each)]
    tile_tensors = tuple(_ints([tile[part] for tile in tiles]) for part in (0, 1))
    seqs = (_ints([seq * new for seq in range(batch)]), _ints([cached] * batch), _ints([new] * batch))
    return partial(prefill_attention, query, pool, tile_tensors, seqs, tables, begins, window=None, out=out)


def _prompt_figures(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Prompts without KV before them: FlashAttention, each that is here, beside the Triton kernel; cuDNN as a yardstick."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from engine.cuda.flash import IMPLEMENTATIONS, PromptAttention

    flash: dict[str, PromptAttention] = {}
    for name, load in IMPLEMENTATIONS.items():
        try:
            flash[name] = load()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            yield {"kernel": "prompt attention", "by": name, "absent": str(error)}
    for heads, kv_heads in ((32, 8), (40, 40)):
        for batch, new in ((64, 128), (16, 512), (4, 2048), (1, 8192)):
            qkv = torch.randn(batch * new, heads + 2 * kv_heads, 128, device="cuda", dtype=torch.bfloat16)
            query, key = qkv[:, :heads].contiguous(), qkv[:, heads:-kv_heads].contiguous()
            value, bounds = qkv[:, -kv_heads:], _ints([seq * new for seq in range(batch + 1)])
            dense = [part.view(batch, new, -1, 128).transpose(1, 2) for part in (query, key, value.contiguous())]
            cudnn = partial(scaled_dot_product_attention, *dense, is_causal=True, enable_gqa=True)
            works: dict[str, Callable[[], object]] = {"Triton": _triton_prefill(batch, 0, new, heads, kv_heads, 64)}
            works |= {name: partial(by, query, key, value, bounds, new, None) for name, by in flash.items()}
            for name, work in (*works.items(), ("cuDNN, equal lengths", cudnn)):
                figure = {"kernel": "prompt attention", "by": name, "heads": heads, "kv_heads": kv_heads}
                figure |= {"batch": batch, "new": new}
                try:
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                        seconds = _seconds(work, 10)
                except (RuntimeError, ValueError) as error:
                    yield figure | {"failed": str(error)[:200]}
                    continue
                rate = batch * 4 * heads * 128 * new * ((new + 1) / 2) / seconds / 1e12
                share = round(rate / ceilings["tflops"], 3)
                yield figure | {"us": round(seconds * 1e6, 1), "tflops": round(rate, 1), "of_product": share}


def _small_figures(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    import torch

    from engine.cuda.kernels.fused import add_rms_norm, silu_mul
    from engine.cuda.kernels.sampling import choose_tokens

    for rows in (1, 64, 256, 8192):
        hidden, delta = (torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
        gate_up = torch.randn(rows, 28672, device="cuda", dtype=torch.bfloat16)
        works: dict[str, tuple[Callable[[], object], int]] = {
            "add_rms_norm": (partial(add_rms_norm, hidden, delta, weight, 1e-6), 4 * hidden.numel() * 2),
            "silu_mul": (partial(silu_mul, gate_up), gate_up.numel() * 3),
        }
        if rows <= 256:
            logits = torch.randn(rows, 151936, device="cuda", dtype=torch.bfloat16)
            keys = torch.arange(rows, device="cuda")
            chosen = torch.empty(rows, device="cuda", dtype=torch.int32)
            highest = torch.empty(rows, device="cuda")
            for name, temperature in (("greedy", 0.0), ("draw", 1.0)):
                given = torch.full((rows,), temperature, device="cuda", dtype=torch.float64)
                works[name] = (partial(choose_tokens, logits, keys, given, chosen, highest), logits.numel() * 2)
        for name, (work, num_bytes) in works.items():
            seconds = _seconds(_graphed(work), 30)
            share = num_bytes / seconds / 1e12 / ceilings["tbps"]
            yield {"kernel": name, "rows": rows, "us": round(seconds * 1e6, 1), "of_copy": round(share, 3)}


def _paged(batch: int, context: int, kv_heads: int, block_size: int) -> tuple[Any, Any, Any]:
    """A pool of at least 1 GiB, so that it does not fit the L2 cache, and block tables scattered over all of it."""
    import torch

    each = math.ceil(context / block_size)
    block_bytes = 2 * kv_heads * block_size * 128 * 2
    num_blocks = max(batch * each, 2**30 // block_bytes)
    pool = torch.randn(num_blocks, 2, kv_heads, block_size, 128, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(num_blocks, device="cuda")[: batch * each].to(torch.int32)
    return pool, tables, _ints([seq * each for seq in range(batch)])


def _ints(values: list[int]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int32, device="cuda")


def engine(journal: Journal, rest: list[str], out: Path) -> int:
    """bench.engine --device cuda with the ceilings of this device."""
    ceilings = measure_ceilings()
    journal.say(stage="engine", **ceilings)
    command = [sys.executable, "-m", "bench.engine", "--device", "cuda"]
    command += ["--tflops", f"{ceilings['tflops']:.1f}", "--tbps", f"{ceilings['tbps']:.3f}"]
    command += ["--work-dir", str(out), "--json", str(out / "engine.json"), *rest]
    return subprocess.run(command, cwd=REPOSITORY).returncode


def steps(journal: Journal, out: Path) -> None:
    """A decode step of the 8B shape by kernel, and how long the device waits for the host between steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from baton.clock import SystemClock
    from baton.prefix_hash import PrefixHasher
    from baton.request import AttemptId, GenerateRequest, SamplingParams
    from bench.engine_cuda import SHAPES, write_config
    from engine.native import NativeRunner
    from engine.overlap import OverlappingEngine
    from engine.types import EngineConfig

    shape, batch, num_steps = SHAPES["llama-3.1-8b"], 256, 20
    model_dir = write_config(shape, out)
    runner = NativeRunner(
        model_dir,
        dtype="bfloat16",
        device="cuda",
        load_format="dummy",
        block_size=64,
        num_blocks=4096,
        max_num_seqs=batch,
    )
    assert runner.overlapping is not None
    config = EngineConfig(
        block_size=64,
        num_blocks=4096,
        vocab_size=shape.vocab_size,
        max_num_seqs=batch,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    )
    loop = OverlappingEngine(config, runner, PrefixHasher(b"bench", ""), SystemClock(), runner.overlapping)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for index in range(batch):
        prompt = tuple((index * 7919 + place * 31) % shape.vocab_size for place in range(512))
        loop.add(GenerateRequest(AttemptId(f"{index}/1"), prompt, 512, params))
    while loop.stats().num_tokens_computed < batch * 513:
        loop.step()
    before, began = loop.stats(), time.perf_counter()
    for _ in range(num_steps):
        loop.step()
    wall_s = (time.perf_counter() - began) / num_steps
    after = loop.stats()
    host_s = (after.bookkeeping_s - before.bookkeeping_s) / num_steps
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(num_steps):
            loop.step()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)
    busy_s = sum(row.self_device_time_total for row in rows) / num_steps / 1e6
    journal.say(stage="steps", batch=batch, wall_ms=wall_s * 1e3, host_ms=host_s * 1e3, busy_ms=busy_s * 1e3)
    for row in rows[:16]:
        journal.say(stage="steps", kernel=row.key[:80], ms_per_step=row.self_device_time_total / num_steps / 1e3)


def fp8(journal: Journal) -> None:
    """What it gains and what it changes, beside bf16."""
    from bench.gpu_fp8 import accuracy, decodes, products

    for figure in accuracy():
        journal.say(stage="fp8", **figure)
    for figure in products(_seconds, _graphed):
        journal.say(stage="fp8", **figure)
    for figure in decodes(_seconds, _graphed, _paged):
        journal.say(stage="fp8", **figure)


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("correct", "kernels", "engine", "steps", "fp8"))
    parser.add_argument("--out", type=Path, default=Path("gpu-session"))
    args, rest = parser.parse_known_args()
    if rest and args.stage != "engine":
        parser.error(f"{args.stage} takes no {rest}")
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / f"{args.stage}.jsonl")
    journal.say(stage=args.stage, device=torch.cuda.get_device_name(0), torch=torch.__version__)
    if args.stage == "correct":
        return int(correct(journal) > 0)
    if args.stage == "engine":
        return engine(journal, rest, out)
    if args.stage == "kernels":
        kernels(journal)
    elif args.stage == "fp8":
        fp8(journal)
    else:
        steps(journal, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
