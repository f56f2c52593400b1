"""A worker of one rank in a process of its own, so that tests can stop and kill it. Obeys one JSON line at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any, TextIO

from kvtransfer import api
from kvtransfer.api import PeerRank, PeerWorker, SendRequest, TransferId
from tests.support.transfer import make_worker, pattern


class Child:
    """The parent's handle."""

    def __init__(self, name: str, transport: str, unix_dir: str, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.transfer_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        answer = self.ask("start", name=name, transport=transport, unix_dir=unix_dir, settings=settings)
        self.peer = PeerWorker(name, answer["incarnation"], (PeerRank(*answer["address"]),))

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The answer to the oldest unanswered command."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self.tell(do, **arguments)
        return self.hear()

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT or SIGKILL."""
        self._process.send_signal(number)

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """The child."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    start = json.loads(sys.stdin.readline())
    worker = make_worker(start["name"], transport=start["transport"], unix_dir=start["unix_dir"], **start["settings"])
    rank = worker.leader
    address = rank.endpoint.address
    answer({"incarnation": worker.incarnation, "address": [0, address.host, address.port, address.unix_path]})
    for line in sys.stdin:
        command = json.loads(line)
        transfer_id = TransferId(bytes.fromhex(command.get("id", "")))
        match command["do"]:
            case "open_send":
                worker_id, incarnation, ranks = command["peer"]
                peer = PeerWorker(worker_id, incarnation, tuple(PeerRank(*item) for item in ranks))
                num_tokens, table = command["num_tokens"], tuple(command["table"])
                rank.endpoint.open_send(SendRequest(transfer_id, peer, num_tokens, table))
                answer(None)
            case "write":
                kv = pattern(rank.layout.model, command["num_tokens"], command["seed"])
                for layer in command["layers"]:
                    rank.write_layer(layer, command["table"], kv[layer])
                    rank.endpoint.written(transfer_id, layer, command["num_tokens"])
                answer(None)
            case "grant":
                rank.endpoint.grant(transfer_id, command["table"], command["num_tokens"], 0)
                answer(None)
            case "finish":
                rank.endpoint.finish(transfer_id, b"m")
                answer(None)
            case "sent":
                rank.wait_for(lambda n=command["num_bytes"]: rank.endpoint.stats().bytes_sent >= n)
                answer(None)
            case "expect":
                event = rank.expect(getattr(api, command["kind"]), transfer_id or None)
                answer({"id": event.transfer_id.hex(), "reason": getattr(event, "reason", "")})


_out: TextIO


def answer(value: Any) -> None:
    """One line to the parent."""
    _out.write(json.dumps(value) + "\n")
    _out.flush()


if __name__ == "__main__":
    main()
