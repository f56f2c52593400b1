"""The entry point that both roles share: `python -m prefill_worker rank|front`, `python -m decode_worker rank|front`."""

from __future__ import annotations

import sys

from worker.role import RolePolicy


def run(roles: dict[str, RolePolicy]) -> None:
    """Become a front or a rank. A rank's role is the one that its spec names, among `roles`.

    Imports follow the choice: a front never loads torch.
    """
    match sys.argv[1:]:
        case ["front"]:
            from worker import front

            front.main()
        case ["rank"]:
            from worker import rank

            rank.main(roles)
        case _:
            sys.stderr.write("usage: python -m prefill_worker|decode_worker front|rank   (started by `baton serve`)\n")
            sys.exit(2)
