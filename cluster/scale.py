"""`baton scale`: more or fewer workers of a running server."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from cluster import client, control

ROLES: Final = ("prefill", "decode", "mixed")
_LIMIT_S: Final = 600.0


def run(arguments: argparse.Namespace) -> int:
    """Wait until it is so; the exit status.

    Raises:
        ClientError: the server refused, or is not ours on this machine.
    """
    wanted = {role: getattr(arguments, role) for role in ROLES if getattr(arguments, role) is not None}
    if not wanted:
        raise ValueError("scale: say how many workers: --prefill N, --decode N, --mixed N")
    connection = client.connect(arguments)
    if connection.server is None:
        raise client.ClientError(f"{connection.url} is not a server of yours on this machine")
    try:
        done = control.ask(connection.server.run_dir, {"command": "scale", "workers": wanted}, _LIMIT_S)
    except control.CommandError as error:
        raise client.ClientError(str(error)) from error
    sys.stdout.write(done + "\n")
    return 0
