"""The decode role's policy, and that of a worker which does both for itself and for others."""

from __future__ import annotations

from typing import Final

from worker.role import RolePolicy

DECODE: Final = RolePolicy(name="decode", accepts_transfers=True)
MIXED: Final = RolePolicy(name="mixed", accepts_transfers=True)
