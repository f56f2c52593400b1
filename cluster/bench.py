"""`baton bench`: which server is meant, whose processes send the load; loadtest does the rest."""

from __future__ import annotations

import argparse
import sys

from cluster import client


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit status. ValueError: flags or files that can not be used."""
    from loadtest import command  # numpy and rich take a while

    if arguments.bench_mode == "compare":
        from loadtest import compare

        return compare.run(arguments, [sys.executable, "-m", "cluster.cli", "serve"])
    command.check(arguments)
    if getattr(arguments, "compare", None):
        return command.put_side_by_side(arguments)
    connection = client.connect(arguments)
    grpc = None
    if connection.server is not None:
        grpc = str(connection.server.state.get("grpc_url", "")).removeprefix("grpc://") or None
    place = command.Place(connection.url, grpc, connection.token)
    if arguments.ray_nodes is None:
        return command.run(arguments, place)
    from cluster import fanout

    with fanout.agents(arguments.ray_nodes) as links:
        return command.run(arguments, place, links)
