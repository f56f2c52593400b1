"""Which Baton this is, and what it uses, without importing any of it; `baton version`."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

from baton import __version__

_ROOT: Final = Path(__file__).resolve().parent.parent
_PACKAGES: Final = (
    *("baton", "cluster", "decode_worker", "engine", "kvtransfer"),
    *("prefill_worker", "protos", "router", "worker"),
)
_SOURCES: Final = (".py", ".cpp", ".h")
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


def code_digest() -> str:
    """ "Baton VERSION, Python X.Y, code DIGEST": equal on two machines that run the same code."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((_ROOT / package).rglob("*")):
            if file.suffix in _SOURCES and file.is_file():
                digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"Baton {__version__}, Python {python}, code {digest.hexdigest()[:12]}"
