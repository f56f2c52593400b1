"""Where Triton's kernels run in tests: on the CUDA device where there is one, else in Triton's interpreter.

Import this module before any of `engine.cuda.kernels`: the interpreter is chosen when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it comes with the dev extra on Linux", allow_module_level=True)


def _use_interpreter() -> None:
    """Repairs two things in Triton 3.6's interpreter.

    It makes loop bounds with int() of arrays of one element, which numpy 2.4 refuses. Converting to fp8 it loses the carry of
    what rounds up to a power of two (1.97 becomes 1), and rounds small numbers wrongly; torch converts instead.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    convert = interpreter._convert_float
    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}
    stored = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16, torch.float32: torch.float32}

    def converted(values: npt.NDArray[Any], source: Any, target: Any, rounding: Any) -> npt.NDArray[Any]:
        if tl.float8e4nv not in (source, target):
            return convert(values, source, target, rounding)  # type: ignore[no-any-return]
        given = torch.from_numpy(np.require(values, requirements=["C", "W"])).view(types[source])
        if target == tl.float8e4nv:  # what is too large is NaN: some versions of torch saturate
            given = torch.where(given.abs() > 464, torch.nan, given)
        return given.to(types[target]).view(stored[types[target]]).numpy()

    interpreter._convert_float = converted


if not HAS_CUDA:
    _use_interpreter()
