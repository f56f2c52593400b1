"""fp8 beside bf16 on one GPU: how far the demo model's answers move; what products and attention of decodes gain.

The stage `fp8` of bench.gpu_session. Needs what tests/gpu needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from baton.config import DEMO_MODEL_DIR
from baton.request import AttemptId, SamplingParams
from engine.cuda.buckets import num_splits
from engine.cuda.fp8 import Fp8Linear
from engine.cuda.kernels.attention import decode_attention
from engine.cuda.kernels.fused import quantise_rows
from engine.kv_pool import FP8
from engine.layers.linear import TorchLinears
from engine.native import NativeRunner
from engine.types import BatchEntry, SampleSpec, StepPlan
from tests.support.fp8_reference import Fp8Reference, RoundedLinears, demo_sequences, divergence

VARIANTS: Final[dict[str, dict[str, bool]]] = {
    "bf16": {},
    "fp8 KV": {"kv": True},
    "fp8 weights": {"weights": True},
    "both": {"kv": True, "weights": True},
}
_SHAPES: Final = {"qkv": (4096, 6144), "gate_up": (4096, 28672), "down": (14336, 4096)}  # Llama-3.1-8B
_COPIES: Final = 4  # of weights in turn, so that none stays in the L2 cache


def accuracy(num_sequences: int = 4) -> Iterator[dict[str, Any]]:
    """Each variant of the demo model beside bf16 on this GPU, and beside plain torch's arithmetic of the same."""
    sequences = demo_sequences()[:num_sequences]
    beside: Tensor | None = None
    for name, settings in VARIANTS.items():
        runner = NativeRunner(
            DEMO_MODEL_DIR,
            dtype="bfloat16",
            device="cuda",
            num_blocks=16,
            max_num_seqs=1,
            kv_dtype="fp8" if settings.get("kv") else "auto",
            quantization="fp8" if settings.get("weights") else None,
        )
        found = torch.cat([log_probabilities(runner, sequence) for sequence in sequences])
        runner.close()
        reference = Fp8Reference(DEMO_MODEL_DIR, dtype="bfloat16", **settings)
        plain = torch.cat([reference.logits(sequence)[len(sequence) // 2 - 1 :] for sequence in sequences])
        beside = found if beside is None else beside
        yield {
            "model": "demo",
            "in": name,
            "tokens": len(found),
            "same_token_as_bf16": round(float((found.argmax(-1) == beside.argmax(-1)).float().mean()), 4),
            "nats_from_bf16": round(divergence(beside, found), 6),
            "mean_difference": round(float((found - beside).abs().mean()), 5),
            "largest_difference": round(float((found - beside).abs().max()), 4),
            "nats_from_plain_torch": round(divergence(plain, found), 6),
        }


def log_probabilities(runner: NativeRunner, tokens: list[int]) -> Tensor:
    """[about half of the tokens, vocab_size]: the first half is a prompt in one chunk, the others come one by one."""
    params = SamplingParams(temperature=0, num_logprobs=runner.config.vocab_size)
    table = range(-(-len(tokens) // runner.layout.geometry.block_size))
    rows, begin = [], 0
    for end in range(len(tokens) // 2, len(tokens) + 1):
        entry = BatchEntry(AttemptId("a"), begin, tokens[begin:end], table, SampleSpec(params, end))
        (sampled,) = runner.run(StepPlan(end, [entry]))
        assert sampled is not None
        assert sampled.logprobs is not None
        rows.append([value for _, value in sorted(sampled.logprobs.top)])
        begin = end
    return torch.tensor(rows)


def products(
    seconds: Callable[[Callable[[], object], int], float],
    graphed: Callable[[Callable[[], object]], Callable[[], object]],
) -> Iterator[dict[str, Any]]:
    """The 8B shape's products in bf16, in fp8 from inputs that are in it, and with making them so."""
    for name, (size, out) in _SHAPES.items():
        weights = [torch.randn(out, size, device="cuda", dtype=torch.bfloat16) / size**0.5 for _ in range(_COPIES)]
        plain = [TorchLinears().prepare(weight, None) for weight in weights]
        fp8 = [Fp8Linear(weight, None) for weight in weights]
        for num_tokens in (1, 16, 64, 256, 2048, 8192):
            x = torch.randn(num_tokens, size, device="cuda", dtype=torch.bfloat16)
            rows, scales = quantise_rows(x)
            works: dict[str, Callable[[], object]] = {
                "bf16": lambda x=x, plain=plain: [linear(x) for linear in plain],
                "fp8": lambda rows=rows, scales=scales, fp8=fp8: [linear.product(rows, scales) for linear in fp8],
                "quantised too": lambda x=x, fp8=fp8: [linear(x) for linear in fp8],
            }
            times = {what: seconds(graphed(work), 20) / _COPIES for what, work in works.items()}
            exact = RoundedLinears().prepare(weights[0], None)(x[:256].float()).float()
            off = float((fp8[0](x[:256]).float() - exact).norm() / exact.norm())
            yield {
                "product": name,
                "tokens": num_tokens,
                "us": {what: round(time * 1e6, 1) for what, time in times.items()},
                "fp8_tflops": round(2 * num_tokens * size * out / times["fp8"] / 1e12, 1),
                "fp8_read_tbps": round(size * out / times["fp8"] / 1e12, 3),
                "gain": round(times["bf16"] / times["quantised too"], 3),
                "off_plain_fp8_by": round(off, 5),  # bf16 results, and how the tensor cores sum
            }


def decodes(
    seconds: Callable[[Callable[[], object], int], float],
    graphed: Callable[[Callable[[], object]], Callable[[], object]],
    paged: Callable[[int, int, int, int], tuple[Any, Any, Any]],
) -> Iterator[dict[str, Any]]:
    """Attention of decodes over KV in bf16 and in fp8."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for heads, kv_heads in ((32, 8), (40, 40)):
        for batch, context in ((1, 8192), (16, 8192), (64, 640), (256, 640)):
            pool, tables, begins = paged(batch, context, kv_heads, 64)
            query = torch.randn(batch, heads, 128, device="cuda", dtype=torch.bfloat16)
            starts = torch.full((batch,), context - 1, device="cuda", dtype=torch.int32)
            splits = num_splits(batch, kv_heads, multiprocessors)
            times = {}
            for name, stored in (("bf16", pool), ("fp8", pool.to(FP8))):
                given = (query, stored, starts, tables, begins)
                out = torch.empty_like(query)
                work = partial(decode_attention, *given, window=None, num_splits=splits, out=out)
                times[name] = seconds(graphed(work), 30)
            yield {
                "kernel": "decode attention",
                "heads": heads,
                "kv_heads": kv_heads,
                "batch": batch,
                "context": context,
                "us": {name: round(time * 1e6, 1) for name, time in times.items()},
                "fp8_read_tbps": round(batch * context * kv_heads * 128 * 2 / times["fp8"] / 1e12, 3),
                "gain": round(times["bf16"] / times["fp8"], 3),
            }
