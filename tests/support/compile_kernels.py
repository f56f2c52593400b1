"""Compiles every Triton kernel for a Hopper GPU, without one: `python -m tests.support.compile_kernels [NAME ..]`.

The interpreter forgives what the compiler does not. Prints a line per variant: its name, registers, spills, bytes of
shared memory. Runs in a process of its own, because the interpreter replaces kernels where it is on.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.cuda.kernels import attention, fused, sampling

TARGET = GPUTarget("cuda", 90, 32)
ALIGNED = [["tt.divisibility", 16]]


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, types of what is not constant, constants, warps)."""
    for dtype, full in (("bf16", False), ("fp32", True)):
        pointers = dict.fromkeys(("query", "pool", "out"), f"*{dtype}")
        pointers |= {"sums": "*fp32", "scales": "*fp32", "scale": "fp32", "value_scale": "fp32"}
        in_fp8, from_fp8 = pointers | {"pool": "*fp8e4nv"}, {} if full else {"DOT_DTYPE": tl.float16}
        for heads, dim, block, window in ((4, 128, 64, 0), (1, 128, 16, 0), (3, 64, 16, 100), (4, 96, 64, 0)):
            common = {
                "KV_HEADS": 8,
                "GROUP": heads,
                "HEAD_DIM": dim,
                "DIM_PAD": triton.next_power_of_2(dim),
                "BLOCK_SIZE": block,
                "KEYS": 64,
                "WINDOW": window,
                "DOT_DTYPE": tl.float32 if full else tl.bfloat16,
            }
            what = f"{dtype} group {heads} dim {dim} block {block} window {window}"
            for splits in (1, 8):
                constants = {**common, "ROWS": 16, "NUM_SPLITS": splits, "IS_DECODE": True}
                yield f"decode {what} splits {splits}", attention._attend_kernel, pointers, constants, 4
                name = f"decode {what} splits {splits} from fp8"
                yield name, attention._attend_kernel, in_fp8, constants | from_fp8, 4
            rows = attention.prefill_rows(heads, dim, torch.float32 if full else torch.bfloat16)
            constants = {**common, "ROWS": rows, "NUM_SPLITS": 1, "IS_DECODE": False}
            yield f"prefill {what} rows {rows}", attention._attend_kernel, pointers, constants, 8
            yield f"prefill {what} rows {rows} from fp8", attention._attend_kernel, in_fp8, constants | from_fp8, 8
        reduce = {"HEADS": 32, "HEAD_DIM": 128, "DIM_PAD": 128, "NUM_SPLITS": 8}
        types = {"sums": "*fp32", "scales": "*fp32", "out": f"*{dtype}"}
        yield f"reduce {dtype}", attention._reduce_kernel, types, reduce, 4
        for size in (4096, 5120):
            types = dict.fromkeys(("hidden", "delta", "weight", "out"), f"*{dtype}")
            types |= {"scales": "*fp32", "eps": "fp32"}
            padded = {"SIZE": size, "SIZE_PAD": triton.next_power_of_2(size)}
            for out, is_fp8 in ((f"*{dtype}", False), ("*fp8e4nv", True)):
                name, norm = f"add_norm {dtype} {size}" + " to fp8" * is_fp8, {"HAS_DELTA": True, "IS_FP8": is_fp8}
                yield name, fused._add_norm_kernel, types | {"out": out}, padded | norm, 8
        for size, num_warps in ((4096, 8), (14336, 16)):
            types = {"rows": f"*{dtype}", "out": "*fp8e4nv", "scales": "*fp32"}
            padded = {"SIZE": size, "SIZE_PAD": triton.next_power_of_2(size)}
            yield f"quantise {dtype} {size}", fused._quantise_kernel, types, padded, num_warps
        types = {"gate_up": f"*{dtype}", "out": f"*{dtype}"}
        yield f"silu_mul {dtype}", fused._silu_mul_kernel, types, {"SIZE": 14336, "COLUMNS": 1024}, 4
        names = ("qkv", "query", "keys", "pool", "q_norm", "k_norm", "cos_sin")
        for has_norm, keeps_keys in ((True, False), (full, True)):
            qkv = {
                "HEADS": 32,
                "KV_HEADS": 8,
                "HEAD_DIM": 128,
                "HALF_PAD": 64,
                "BLOCK_SIZE": 64,
                "HEADS_EACH": 8,
                "HAS_NORM": has_norm,
                "KEEPS_KEYS": keeps_keys,
            }
            types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("eps", "k_inverse", "v_inverse"), "fp32")
            for pool, is_fp8 in ((f"*{dtype}", False), ("*fp8e4nv", True)):
                name = f"write_qkv {dtype} norm {has_norm} keys {keeps_keys}" + " to fp8" * is_fp8
                yield name, fused._write_qkv_kernel, types | {"pool": pool}, qkv | {"IS_FP8": is_fp8}, 4
        types = {
            "logits": f"*{dtype}",
            "stride": "i32",
            "keys": "*i64",
            "temperatures": "*fp64",
            "scores": "*fp64",
            "peaks": "*fp32",
            "vocab": "i32",
        }
        yield f"best_of_tile {dtype}", sampling._best_of_tile_kernel, types, {"COLUMNS": 2048}, 4
    types = {"scores": "*fp64", "peaks": "*fp32", "highest": "*fp32", "num_tiles": "i32"}
    yield "best_of_row", sampling._best_of_row_kernel, types, {"TILES_PAD": 128}, 4


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> Any:
    """The kernel for TARGET; pointers that `types` leaves out are int32."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    attributes = {(index,): ALIGNED for index, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": num_warps})


def main(wanted: list[str]) -> None:
    """Compile what is wanted, or everything."""
    for name, kernel, types, constants, num_warps in variants():
        if wanted and not any(part in name for part in wanted):
            continue
        result = compiled(kernel, types, constants, num_warps)
        loads = len(re.findall(r"cp\.async|ld\.global\.v", result.asm["ptx"]))
        sys.stdout.write(
            f"{name}: {result.metadata.shared} bytes shared, {len(result.asm['cubin'])} bytes of code, "
            f"{'wgmma' if 'wgmma' in result.asm['ptx'] else 'mma' if 'mma.' in result.asm['ptx'] else 'no mma'}, "
            f"{loads} wide loads\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
