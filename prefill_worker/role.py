"""The prefill role's policy."""

from __future__ import annotations

from typing import Final

from worker.role import RolePolicy

PREFILL: Final = RolePolicy(name="prefill", accepts_transfers=False)
