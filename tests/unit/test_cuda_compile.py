"""The kernels compile for a Hopper GPU, down to machine code: what the interpreter does not show. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOME = (
    "group 4 dim 128 block 64 window 0 splits 8",
    "prefill bf16 group 3",
    "reduce",
    "4096",
    "silu",
    "norm True",
    "best",
)


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (dev extra, Linux)")
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """All variants: `python -m tests.support.compile_kernels`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", *SOME],
        cwd=REPOSITORY,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    kinds = {line.split()[0].rstrip(":") for line in lines}
    between = {"add_norm", "silu_mul", "write_qkv", "quantise"}
    assert kinds == {"decode", "prefill", "reduce", *between, "best_of_tile", "best_of_row"}
    assert sum("fp8" in line for line in lines) >= 6
    on_tensor_cores = [line for line in lines if line.startswith(("decode bf16", "prefill bf16"))]
    assert all("mma" in line and "no mma" not in line for line in on_tensor_cores)
