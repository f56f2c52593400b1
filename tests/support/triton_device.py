"""Where Triton's kernels run in tests: on the CUDA device where there is one, else in Triton's interpreter.

Import this module before any of `engine.cuda.kernels`: the interpreter is chosen when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it comes with the dev extra on Linux", allow_module_level=True)


def _use_interpreter() -> None:
    """Triton 3.6's interpreter makes loop bounds with int() of arrays of one element, which numpy 2.4 refuses."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if not HAS_CUDA:
    _use_interpreter()
