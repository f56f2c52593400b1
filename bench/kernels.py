"""What the CPU kernels reach of this machine: each kernel and the whole step beside ceilings measured in the same run.

    python -m bench.kernels                     # both shapes, bf16 and int8, one thread and all
    python -m bench.kernels --shapes 135m --quantization none --threads 1 --reference

Decode is held against reading its weights and KV once at the speed of a read loop, prefill against the best bf16 matrix
product that torch reaches here. A lone thread is timed by its own CPU time, so that other processes on its core do not
count; several threads by the clock. Figures are the quickest of `--reps` steps, medians beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baton.request import AttemptId, SamplingParams
from engine.kernels.library import Library, Memory, PackedLinear, ThreadPool, linear, load
from engine.native import NativeRunner
from engine.types import BatchEntry, SampleSpec, StepPlan

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}
PEERS = {  # issue 4: vLLM's CPU backend, bf16, tokens per second: decode by (threads, batch), prefill of 512 by threads
    "135m": {(1, 1): 29, (1, 8): 200, (1, 32): 540, (1, 0): 2600},
    "0.6b": {(1, 1): 9.1, (1, 8): 64, (1, 32): 155, (1, 0): 695, (2, 1): 15, (2, 8): 108, (2, 32): 286, (2, 0): 1230},
}
BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Ceilings:
    """Of one core, bytes and operations per second."""

    read: float
    gemm: float
    tile_peak: float


def measure_ceilings(library: Library, reps: int) -> Ceilings:
    piece, count = 2**25, 16
    memory = Memory(library, piece * count)
    assert memory.address is not None
    ctypes.memset(memory.address, 1, memory.num_bytes)  # pages that were never written are all one page of zeros
    read = max(piece / library.c.baton_read_s(memory.address + i % count * piece, piece) for i in range(2 * count))
    x, weight = torch.randn(1024, 1024).bfloat16(), torch.randn(2048, 1024).bfloat16()
    seconds = min(_cpu_s(lambda: torch.nn.functional.linear(x, weight)) for _ in range(reps * 3))
    peak = max(library.c.baton_tile_peak(2) for _ in range(50))
    return Ceilings(read, 2 * 1024 * 1024 * 2048 / seconds, peak)


def _cpu_s(call: Callable[[], object]) -> float:
    began_s = time.thread_time()
    call()
    return time.thread_time() - began_s


def linear_table(library: Library, ceilings: Ceilings, shape: dict[str, Any], reps: int) -> None:
    """Each linear of a layer at several batch sizes; weights rotate, so that they come from memory."""
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    sizes = {
        "qkv": (hidden, (heads + 2 * kv_heads) * dim),
        "output": (heads * dim, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    pool = ThreadPool(library)
    for name, (inputs, outputs) in sizes.items():
        weight = torch.randn(outputs, inputs).bfloat16()
        count = max(2, 2**26 // (weight.numel() * 2))
        for label, int8 in (("bf16", False), ("int8", True)):
            packed = [PackedLinear(library, weight, int8=int8) for _ in range(count)]
            for rows in (1, 8, 32, 128, 512):
                x = torch.randn(rows, inputs).bfloat16()
                seconds = min(linear(library, pool, x, one, 1)[1] for _ in range(max(1, reps // 3)) for one in packed)
                bandwidth, rate = packed[0].num_bytes / seconds, 2 * rows * inputs * outputs / seconds
                print(
                    f"  {name:8} {label} M={rows:<4} {seconds * 1e6:9.1f} us  {bandwidth / 1e9:6.1f} GB/s "
                    f"({bandwidth / ceilings.read:4.0%} of read)  {rate / 1e12:6.3f} TOP/s ({rate / ceilings.gemm:4.0%} "
                    f"of torch's GEMM, {rate / ceilings.tile_peak:4.0%} of the bf16 tile peak)"
                )


@dataclass(frozen=True)
class Timing:
    best_s: float
    median_s: float


def timed(call: Callable[[], object], reps: int, *, cpu_time: bool) -> Timing:
    clock = time.thread_time if cpu_time else time.perf_counter
    call()
    seconds = []
    for _ in range(reps):
        began_s = clock()
        call()
        seconds.append(clock() - began_s)
    return Timing(min(seconds), statistics.median(seconds))


def entry(name: int, start: int, tokens: Sequence[int], first_block: int) -> BatchEntry:
    end = start + len(tokens)
    blocks = range(first_block, first_block + -(-end // BLOCK_SIZE))
    return BatchEntry(AttemptId(str(name)), start, tokens, list(blocks), SampleSpec(GREEDY, end))


def whole_model(name: str, directory: Path, ceilings: Ceilings, args: argparse.Namespace) -> None:
    """Decode and prefill of one shape with dummy weights; a line per cell."""
    shape = SHAPES[name]
    kv_token_bytes = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    arms = [("fast", quantization) for quantization in args.quantization]
    arms += [("reference", None)] if args.reference else []
    for backend, quantization in arms:
        for threads in args.threads:
            torch.set_num_threads(threads)
            began_s = time.perf_counter()
            runner = NativeRunner(
                directory,
                dtype="bfloat16",
                num_blocks=32 * (1024 // BLOCK_SIZE + 1),
                load_format="dummy",
                num_threads=threads,
                backend=backend,
                quantization=quantization,
            )
            layers = sum(size for key, size in parameter_counts(shape).items() if key != "embedding") * (
                1 if quantization else 2
            )
            print(
                f"{name} {backend} {quantization or 'bf16'} threads={threads}: loaded in {time.perf_counter() - began_s:.1f} s"
            )
            cpu_time = threads == 1
            for context in (128, 1024):
                for batch in (1, 8, 32):
                    width = context // BLOCK_SIZE + 1
                    entries = [entry(i, context - 1, [7], i * width) for i in range(batch)]
                    plan = StepPlan(0, entries)
                    t = timed(functools.partial(runner.run, plan), args.reps, cpu_time=cpu_time)
                    floor_s = (layers + batch * context * kv_token_bytes) / (ceilings.read * threads)
                    peer = PEERS[name].get((threads, batch)) if context == 128 else None
                    _print_row(f"decode batch {batch:<2} context {context:<4}", batch, t, floor_s, peer)
            for length in (128, 512, 2048):
                plan = StepPlan(0, [entry(0, 0, [5 + i % 1000 for i in range(length)], 0)])
                t = timed(functools.partial(runner.run, plan), max(2, args.reps // 3), cpu_time=cpu_time)
                operations = 2 * length * parameter_counts(shape)["layers"] + attention_operations(shape, length)
                floor_s = operations / (ceilings.gemm * threads)
                _print_row(
                    f"prefill {length}", length, t, floor_s, PEERS[name].get((threads, 0)) if length == 512 else None
                )
            runner.close()


def _print_row(label: str, tokens: int, t: Timing, floor_s: float, peer: float | None) -> None:
    rate = tokens / t.best_s
    ratio = f"  {rate / peer:5.2f} x vLLM's {peer:g}" if peer else ""
    print(
        f"  {label:28} {t.best_s * 1e3:8.1f} ms (median {t.median_s * 1e3:8.1f})  {rate:8.1f} tok/s  "
        f"{floor_s / t.best_s:5.0%} of the ceiling{ratio}",
        flush=True,
    )


def parameter_counts(shape: dict[str, Any]) -> dict[str, int]:
    hidden, dim = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * shape["intermediate_size"]
    head = shape["vocab_size"] * hidden
    return {"layers": layer * shape["num_hidden_layers"], "head": head, "embedding": head}


def attention_operations(shape: dict[str, Any], length: int) -> int:
    """Causal: half of the square."""
    return 2 * length * length * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8"), default=["none", "int8"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--reference", action="store_true", help="measure the plain torch backend, too")
    parser.add_argument("--no-linears", action="store_true", help="only whole steps")
    args = parser.parse_args()
    args.quantization = [None if name == "none" else name for name in args.quantization]
    torch.set_num_threads(1)
    library = load()
    ceilings = measure_ceilings(library, args.reps)
    print(
        f"{library.isa}: read {ceilings.read / 1e9:.1f} GB/s, torch's bf16 GEMM {ceilings.gemm / 1e12:.2f} TFLOP/s, "
        f"tile peak {ceilings.tile_peak / 1e12:.2f} TFLOP/s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    with tempfile.TemporaryDirectory() as directory:
        for name in args.shapes:
            (Path(directory) / "config.json").write_text(json.dumps(SHAPES[name]))
            if not args.no_linears:
                linear_table(library, ceilings, SHAPES[name], args.reps)
            whole_model(name, Path(directory), ceilings, args)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
