"""A worker's role: a policy over one and the same program, never another program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RolePolicy:
    """What a worker of this role lets others ask of it."""

    name: str
    accepts_transfers: bool
    """May a prefill worker reserve blocks here and stream KV in?"""
    hold_s: float = 30.0
    """How long finished prefill KV stays pinned for a router that has yet to name another decode worker."""
