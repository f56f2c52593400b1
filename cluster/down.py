"""`baton down`: end a running `baton serve` of this user."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Final

from cluster import client, process_tree, run_dir
from cluster.client import ClientError
from cluster.run_dir import Server

_MORE_S: Final = 5.0
"""Than the guardian gives the supervisor."""
_LOOK_AGAIN_S: Final = 0.05


def run(arguments: argparse.Namespace) -> int:
    """End it, wait until it is gone, and say what ended; the exit status.

    Raises:
        ClientError: there is none, or more than one to choose from, or it did not end.
    """
    for run_id in run_dir.remove_dead():
        sys.stdout.write(f"Removed what server {run_id} had left behind when it was killed.\n")
    servers = [server for server in run_dir.servers() if server.is_alive]
    if (wanted := client.wanted_url(arguments)) is not None:
        servers = [server for server in servers if client.is_at(server, wanted)]
    if not servers:
        raise ClientError("no such server of yours is running")
    for server in servers if arguments.all else [client.choose(servers)]:
        _end(server)
    return 0


def _end(server: Server) -> None:
    """SIGTERM its guardian, or its supervisor if the guardian was killed.

    Raises:
        ClientError: it did not end.
    """
    limit_s = server.run_dir.stop_limit_s + _MORE_S
    process = server.guardian if server.guardian.is_alive else server.supervisor
    if process is not None and process.is_alive:  # by start time too: a pid may have a new owner
        os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + limit_s
    while server.is_alive:
        if time.monotonic() > deadline:
            raise ClientError(f"process {server.guardian.pid} did not end within {limit_s:g} s")
        time.sleep(_LOOK_AGAIN_S)  # it is no child of ours, so there is nothing to wait on
    process_tree.kill(process_tree.marked_with(run_dir.RUN_ID_ENV, server.run_dir.run_id))
    server.run_dir.remove()
    what = f"{server.state.get('model', 'a model')} at {server.url}" if server.url else "a server that was starting"
    sys.stdout.write(f"Ended {what} (process {server.guardian.pid}).\n")
