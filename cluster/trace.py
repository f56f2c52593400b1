"""`baton trace`: one request's waterfall."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from cluster import client, waterfall


def run(arguments: argparse.Namespace) -> int:
    """Print it; the exit status."""
    connection = client.connect(arguments)
    request_id = arguments.request_id
    if request_id is None:
        traces = connection.ask("/internal/traces")["traces"]
        if not traces:
            raise client.ClientError("no request has finished yet")
        request_id = traces[0]["request_id"]
    try:
        trace = connection.ask(f"/internal/trace/{request_id}")
    except client.NotFound:
        raise client.ClientError(f"{request_id}: unknown, unfinished or too long ago") from None
    width = shutil.get_terminal_size().columns
    sys.stdout.write((json.dumps(trace, indent=2) if arguments.json else waterfall.picture(trace, width)) + "\n")
    return 0
