"""`baton version`: versions of Baton and of what it uses, without importing any of it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Final

from baton import __version__

_USED: Final = ("torch", "ray", "grpcio", "pyzmq", "starlette", "uvicorn", "tokenizers")


def run() -> int:
    """Print them; the exit status."""
    versions = [f"{name} {_version_of(name)}" for name in _USED]
    sys.stdout.write(f"baton {__version__}\npython {platform.python_version()}, {', '.join(versions)}\n")
    return 0


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"
