"""The per-cluster secret: where it comes from and what is derived from it. Never in argv, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Final

SECRET_ENV: Final = "BATON_CLUSTER_SECRET"
SECRET_FILE_ENV: Final = "BATON_CLUSTER_SECRET_FILE"
_MIN_BYTES: Final = 16


def load_secret(path: str | None = None) -> bytes:
    """The cluster secret from `path`, the file named by BATON_CLUSTER_SECRET_FILE, or BATON_CLUSTER_SECRET.

    A fresh random secret if none is given: right for one machine, useless for several launchers.

    Raises:
        ValueError: the secret is shorter than 16 bytes, or its file is readable by others.
        OSError: the file can not be read.
    """
    path = path or os.environ.get(SECRET_FILE_ENV)
    if path:
        file = Path(path)
        if file.stat().st_mode & 0o077:
            raise ValueError(f"{path}: the cluster secret must not be accessible to group or others (chmod 600)")
        secret = file.read_bytes().strip()
    elif SECRET_ENV in os.environ:
        secret = os.environ[SECRET_ENV].encode()
    else:
        return secrets.token_bytes(32)
    if len(secret) < _MIN_BYTES:
        raise ValueError(f"the cluster secret must have at least {_MIN_BYTES} bytes")
    return secret


def derive(secret: bytes, purpose: str) -> bytes:
    """A 32-byte key for one purpose, from which the secret and other keys can not be found."""
    return hmac.new(secret, b"baton " + purpose.encode(), hashlib.sha256).digest()


def worker_token(secret: bytes) -> str:
    """The bearer token of the internal gRPC protocol (metadata key `authorization`)."""
    return "Bearer " + derive(secret, "worker api v1").hex()
