"""Baton's engine beside vLLM on one GPU: `python -m bench.engine --device cuda` ends up here.

    python -m bench.engine --device cuda [--shape llama-3.1-8b ...] [--repeats 3] [--rows PATTERN ...] [--kv-gib 90]
        [--quantization fp8] [--kv-dtype fp8]
        [--vllm-python PATH] [--vllm-site DIR] [--tflops F --tbps B] [--json OUT.json] [--quick]

Random weights, token ids, greedy, no end of sequence, no prefix cache. One arm is up at a time, since each takes most
of the memory: Baton, vLLM, Baton again; the two runs of Baton show what the machine itself changes. Every figure is
printed as soon as it is known. The roofs are arithmetic over two ceilings of the device (`--tflops`, `--tbps`;
bench.gpu_session measures them): *serial* computes prompts at the one and then decodes at the other, *overlapped* does
both at once, in bf16 whatever the arms have. Exit status 1: Baton is behind on a row, or an arm failed; 2: there is no device.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from bench import engine_arms
from bench.engine_arms import Arm, ArmFailed, ArmSpec
from bench.engine_shapes import BF16_BYTES, Shape

SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("llama-2-13b", "llama", 40, 5120, 40, 40, 128, 13824, 32000),
        Shape("llama-3.1-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256),
        Shape("qwen3-4b", "qwen3", 36, 2560, 32, 8, 128, 9728, 151936),
        Shape("tiny", "llama", 2, 128, 4, 2, 64, 256, 1024),  # to try the bench itself
    )
}
_UNTIED: Final = ("llama-2-13b", "llama-3.1-8b")
_BLOCK_SIZE: Final = 64
_MAX_SEQS: Final = 512
_MAX_BATCHED_TOKENS: Final = 8192
_PROMPT, _OUTPUT, _NUM_REQUESTS = 512, 256, 1024
_LONG_PROMPT, _NUM_LONG = 2032, 64
_DECODE_PROMPT, _DECODE_STEPS = 32, 256


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `num_output` of 1 is prefill alone; `steps` > 0 is decode alone, after the prompts."""

    name: str
    num_seqs: int
    num_prompt: int
    num_output: int = 1
    steps: int = 0

    def tokens(self) -> tuple[int, int]:
        """Output tokens and all tokens that the measured time is for."""
        if self.steps:
            return (self.num_seqs * self.steps,) * 2
        output = self.num_seqs * self.num_output
        return output, output + self.num_seqs * self.num_prompt


def rows(*, is_quick: bool = False) -> tuple[Row, ...]:
    """All of them, the most telling first."""
    found = (
        Row("512->256", _NUM_REQUESTS, _PROMPT, _OUTPUT),
        Row("prefill/2032", _NUM_LONG, _LONG_PROMPT),
        *(Row(f"decode/{batch}", batch, _DECODE_PROMPT, steps=_DECODE_STEPS) for batch in (1, 8, 64, 256)),
    )
    if not is_quick:
        return found
    return tuple(replace(row, num_seqs=min(row.num_seqs, 64), steps=min(row.steps, 32)) for row in found)


@dataclass(frozen=True, slots=True)
class Roofs:
    """What a device can do at best: dense bf16 operations, and bytes copied (read plus written), per second."""

    flops_per_s: float
    bytes_per_s: float

    def serial_s(self, shape: Shape, row: Row, max_batch: int) -> float:
        """The least time of a row if prompts and decodes, and in these products and attention, take turns."""
        num_steps, batch, context = _decodes(row, max_batch)
        prompts_s = 0.0 if row.steps else row.num_seqs * shape.prefill_flops(row.num_prompt) / self.flops_per_s
        products_s = max(
            shape.num_params * BF16_BYTES / self.bytes_per_s, batch * 2 * shape.num_params / self.flops_per_s
        )
        attention_s = batch * context * shape.kv_bytes_per_token / self.bytes_per_s
        return prompts_s + num_steps * (products_s + attention_s)

    def overlapped_s(self, shape: Shape, row: Row, max_batch: int) -> float:
        """The least time if operations and bytes are perfectly beside each other."""
        num_steps, batch, context = _decodes(row, max_batch)
        prompts = 0.0 if row.steps else row.num_seqs * shape.prefill_flops(row.num_prompt)
        flops = prompts + num_steps * shape.decode_flops(batch, context)
        read = num_steps * shape.decode_bytes(batch, context)
        return max(flops / self.flops_per_s, read / self.bytes_per_s)


def _decodes(row: Row, max_batch: int) -> tuple[float, int, float]:
    """Number of decode steps, their batch, and the mean context."""
    batch = min(row.num_seqs, max_batch)
    per_seq = row.steps or row.num_output - 1
    return per_seq * row.num_seqs / batch, batch, row.num_prompt + per_seq / 2


@dataclass(slots=True)
class Figures:
    """Seconds per row and arm, as measured; facts of each arm; what went wrong."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def median_s(self, row: str, arm: str) -> float | None:
        """None: not measured."""
        found = self.seconds.get((row, arm))
        return statistics.median(found) if found else None


def main(argv: Sequence[str]) -> int:
    """Run what the command line says."""
    args = _parse(argv)
    print(f"$ {shlex.join(['python', '-m', 'bench.engine', '--device', 'cuda', *argv])}")
    machine = engine_arms.machine()
    print("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    roofs = Roofs(args.tflops * 1e12, args.tbps * 1e12)
    documents: list[dict[str, Any]] = []
    is_behind = False
    for name in args.shape:
        shape = SHAPES[name]
        figures = measure(shape, args)
        document = summary(shape, figures, args, roofs)
        documents.append(document)
        is_behind |= bool(figures.faults) or any((line["ratio"] or 1.0) < 1.0 for line in document["rows"])
        for line in table(document):
            print(line, flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps({"machine": machine, "command": list(argv), "runs": documents}, indent=1))
    return int(is_behind)


def measure(shape: Shape, args: argparse.Namespace) -> Figures:
    """Every arm in its turn, every row in each."""
    figures = Figures()
    model_dir = write_config(shape, args.work_dir)
    for turn in ("baton", "vllm", "baton") if _has_vllm(args) else ("baton",):
        try:
            for row, seconds in _turn(shape, turn, model_dir, args, figures):
                figures.seconds.setdefault((row.name, turn), []).append(seconds)
                said = {"shape": shape.name, "arm": turn, "row": row.name, "seconds": round(seconds, 4)}
                output, total = row.tokens()
                rates = {"output_tok_s": round(output / seconds, 1), "total_tok_s": round(total / seconds, 1)}
                print(json.dumps(said | rates), flush=True)
        except ArmFailed as error:
            print(json.dumps({"shape": shape.name, "arm": turn, "error": str(error)}), flush=True)
            figures.faults.append(f"{turn}: {error}")
    return figures


def _turn(
    shape: Shape, name: str, model_dir: Path, args: argparse.Namespace, figures: Figures
) -> Iterator[tuple[Row, float]]:
    arm = Arm(_spec(shape, name, model_dir, args), args.work_dir / f"{shape.name}-{name}.log")
    try:
        figures.facts[name] = {**arm.facts, "start_s": round(arm.start_s, 1)}
        print(json.dumps({"shape": shape.name, "arm": name, "facts": figures.facts[name]}), flush=True)
        for row in _selected(args):
            for repeat in range(args.repeats + 1):
                seconds = _ask(arm, row, seed=repeat)
                if repeat:  # the first one compiles kernels and fills caches
                    yield row, seconds
    finally:
        arm.stop()


def _ask(arm: Arm, row: Row, seed: int) -> float:
    given = {"num_seqs": row.num_seqs, "num_tokens": row.num_prompt, "seed": seed}
    if not row.steps:
        return float(arm.ask("generate", num_output=row.num_output, **given)["seconds"])
    arm.ask("begin", num_warm=4, **given)
    seconds = float(arm.ask("decode", num_steps=row.steps)["seconds"])
    arm.ask("end")
    return seconds


def _spec(shape: Shape, name: str, model_dir: Path, args: argparse.Namespace) -> ArmSpec:
    kv_bytes = int(args.kv_gib * 2**30)
    options: dict[str, Any] = {
        "model_dir": str(model_dir),
        "vocab_size": shape.vocab_size,
        "max_positions": shape.max_positions,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": _MAX_BATCHED_TOKENS,
        "load_format": "dummy",
        "kv_bytes": kv_bytes,
        "kv_tokens": _kv_tokens(shape, args),
        "prefix_caching": False,
        "quantization": args.quantization,
        "kv_dtype": args.kv_dtype,
    }
    cores = tuple(engine_arms.machine()["cores"])
    if name == "vllm":
        site = {"PYTHONPATH": str(args.vllm_site)} if args.vllm_site else {}
        return ArmSpec(name, Path(args.vllm_python or sys.executable), "arm_vllm.py", cores, options, site)
    options |= {"device": args.arm_device, "backend": "auto", "tp_size": 1, "block_size": _BLOCK_SIZE}
    options |= {"prompt_attention": args.prompt_attention}
    repository = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return ArmSpec(name, Path(sys.executable), "arm_baton.py", cores, options, repository)


def write_config(shape: Shape, work_dir: Path) -> Path:
    """A model directory of config.json alone."""
    directory = Path(work_dir) / f"cuda-{shape.name}"
    directory.mkdir(parents=True, exist_ok=True)
    config = shape.hf_config() | {"tie_word_embeddings": shape.name not in _UNTIED}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def summary(shape: Shape, figures: Figures, args: argparse.Namespace, roofs: Roofs) -> dict[str, Any]:
    """Medians, spreads, rates, ratios and shares, ready to be printed or kept."""
    kv_tokens = _kv_tokens(shape, args)
    lines = []
    for row in _selected(args):
        max_batch = max(1, min(args.max_num_seqs, kv_tokens // (row.num_prompt + row.num_output + row.steps)))
        ours, theirs = figures.median_s(row.name, "baton"), figures.median_s(row.name, "vllm")
        found = figures.seconds.get((row.name, "baton"), [])
        output, total = row.tokens()
        lines.append(
            {
                "row": row.name,
                "measured": asdict(row),
                "baton_output_tok_s": None if ours is None else output / ours,
                "baton_total_tok_s": None if ours is None else total / ours,
                "vllm_output_tok_s": None if theirs is None else output / theirs,
                "vllm_total_tok_s": None if theirs is None else total / theirs,
                "ratio": None if ours is None or theirs is None else theirs / ours,
                "spread": None if ours is None else (max(found) - min(found)) / ours,
                "serial_share": None if ours is None else roofs.serial_s(shape, row, max_batch) / ours,
                "overlapped_share": None if ours is None else roofs.overlapped_s(shape, row, max_batch) / ours,
            }
        )
    numbers = f"weights {args.quantization or 'bf16'}, KV {'bf16' if args.kv_dtype == 'auto' else args.kv_dtype}"
    return {
        "shape": shape.name,
        "numbers": numbers,
        "rows": lines,
        "facts": figures.facts,
        "faults": figures.faults,
    }


def _kv_tokens(shape: Shape, args: argparse.Namespace) -> int:
    """How many the KV cache of an arm holds."""
    per_token = shape.kv_bytes_per_token // (2 if args.kv_dtype == "fp8" else 1)
    return int(args.kv_gib * 2**30) // per_token


def table(document: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield f"\n{document['shape']}, {document['numbers']}, random; output (all) tokens per second, medians; roofs of bf16"
    yield "| row | Baton | vLLM | Baton / vLLM | spread of Baton | of the serial roof | of the overlapped roof |"
    yield "|---|---|---|---|---|---|---|"
    for line in document["rows"]:
        ours = _rate(line["baton_output_tok_s"], line["baton_total_tok_s"])
        theirs = _rate(line["vllm_output_tok_s"], line["vllm_total_tok_s"])
        ratio = "–" if line["ratio"] is None else f"{line['ratio']:.2f}" + (" LOST" if line["ratio"] < 1 else "")
        shares = [_percent(line[key]) for key in ("spread", "serial_share", "overlapped_share")]
        yield f"| {line['row']} | {ours} | {theirs} | {ratio} | {' | '.join(shares)} |"
    for fault in document["faults"]:
        yield f"FAULT {fault}"


def _rate(output: float | None, total: float | None) -> str:
    return "–" if output is None or total is None else f"{output:,.0f} ({total:,.0f})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _selected(args: argparse.Namespace) -> list[Row]:
    found = rows(is_quick=args.quick)
    return [row for row in found if not args.rows or any(fnmatchcase(row.name, pattern) for pattern in args.rows)]


def _has_vllm(args: argparse.Namespace) -> bool:
    return bool(args.vllm_python or args.vllm_site)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.engine --device cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs="+", choices=sorted(SHAPES), default=["llama-3.1-8b", "qwen3-4b", "llama-2-13b"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=[], help="names or patterns, such as 'decode/*'")
    parser.add_argument("--kv-gib", type=float, default=90.0, help="KV cache of each arm")
    parser.add_argument("--max-num-seqs", type=int, default=_MAX_SEQS)
    parser.add_argument("--quantization", choices=("fp8",), help="of weights, in both arms (default: bf16)")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="in both arms (auto: bf16)")
    parser.add_argument("--prompt-attention", choices=("auto", "flash", "triton"), default="auto", help="Baton's")
    parser.add_argument("--vllm-python", help="of an environment that has vLLM")
    parser.add_argument("--vllm-site", type=Path, help="a directory with vLLM for this Python")
    parser.add_argument("--tflops", type=float, default=788.0, help="dense bf16 of the device (default: one H200's)")
    parser.add_argument("--tbps", type=float, default=4.3, help="TB/s of a copy, both ways (default: one H200's)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path.home() / ".cache" / "baton" / "bench")
    parser.add_argument("--quick", action="store_true", help="a few sequences and steps: does it run?")
    parser.add_argument("--arm-device", default="cuda", help=argparse.SUPPRESS)  # cpu: tries the bench without a GPU
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.absolute()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    return args
