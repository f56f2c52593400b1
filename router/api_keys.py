"""Who may use the public doors, and as which tenant. Knows no HTTP and no gRPC."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from baton.errors import Unauthorized

DEFAULT_TENANT = "default"


class ApiKeys:
    """Keys and their tenants; without keys everybody is the default tenant."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        # Digests have one length, so that comparing them tells nothing about the keys.
        self._tenants = [(_digest(key), tenant) for key, tenant in tenants.items()]

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an `authorization: Bearer KEY` value. Takes the same time for every wrong key.

        Raises:
            Unauthorized: no key, or one that is not known.
        """
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("Send your API key as `Authorization: Bearer KEY`.")
        given, found = _digest(key.strip()), None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise Unauthorized("The API key is not known here.")
        return found


def load_api_keys(path: str | None) -> ApiKeys:
    """The keys in a file with a line `KEY` or `KEY TENANT` for each; # begins a comment. None: no keys needed.

    Raises:
        ValueError: the file is open to others, holds no key, or a line has a third word.
        OSError: it can not be read.
    """
    if path is None:
        return ApiKeys({})
    file = Path(path)
    if file.stat().st_mode & 0o077:
        raise ValueError(f"{path}: the API key file must not be accessible to group or others (chmod 600)")
    tenants: dict[str, str] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise ValueError(f"{path}:{number}: expected `KEY` or `KEY TENANT`")
        if words:
            tenants[words[0]] = words[1] if len(words) == 2 else DEFAULT_TENANT
    if not tenants:
        raise ValueError(f"{path}: holds no API key")
    return ApiKeys(tenants)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
