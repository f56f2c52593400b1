"""The prefix-cache hash chain: the same keys on every process, for the pool, the router and the transfer."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

from baton.kv_layout import UNIT_TOKENS

MAX_SALT_CHARS = 1024


class PrefixHasher:
    """Keys for full units of `UNIT_TOKENS` tokens.

    Each key covers (secret, tenant, salt, model fingerprint, all tokens up to the end of its unit): equal keys mean
    equal KV, and nobody without the secret can aim at another tenant's entries.
    """

    def __init__(self, secret: bytes, fingerprint: str) -> None:
        self._key = hmac.new(secret, b"baton prefix hash v1", hashlib.sha256).digest()[:32]
        self._fingerprint = fingerprint.encode()

    def root(self, tenant: str, salt: str = "") -> bytes:
        """The chain's parent for a tenant and an optional client salt (at most MAX_SALT_CHARS)."""
        if len(salt) > MAX_SALT_CHARS:
            raise ValueError(f"cache_salt is longer than {MAX_SALT_CHARS} characters")
        digest = hashlib.blake2b(key=self._key, digest_size=16)
        for part in (tenant.encode(), salt.encode(), self._fingerprint):
            digest.update(struct.pack("<I", len(part)))
            digest.update(part)
        return digest.digest()

    def extend(self, parent: bytes, unit_token_ids: Sequence[int]) -> bytes:
        """The key of the unit that follows `parent` and holds exactly UNIT_TOKENS tokens."""
        assert len(unit_token_ids) == UNIT_TOKENS
        packed = struct.pack(f"<{UNIT_TOKENS}I", *unit_token_ids)
        return hashlib.blake2b(parent + packed, key=self._key, digest_size=16).digest()

    def chain(self, tenant: str, salt: str, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of all full units of `token_ids`, in order."""
        keys: list[bytes] = []
        parent = self.root(tenant, salt)
        for start in range(0, len(token_ids) - UNIT_TOKENS + 1, UNIT_TOKENS):
            parent = self.extend(parent, token_ids[start : start + UNIT_TOKENS])
            keys.append(parent)
        return keys
