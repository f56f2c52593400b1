"""Stands in for a rank, a front or a router: speaks baton.process, does what it is told, computes nothing.

`python -m tests.support.stub_process [rank|front]`; without an argument it is a router with a small HTTP server.
BATON_STUB is JSON: {name: behaviour}, where a name is "decode-0 rank 1", "decode-0 front" or "router", and a behaviour
is "fail" (report a failure), "die" (exit without a word), "hang" (never ready), "deaf" (ignore stop and SIGTERM),
"die-after:SECONDS" (once ready), "slow-stop" (takes its time). `{"event": "die"}` and `{"event": "deaf"}` do so on command; every other message is
echoed as a report. What it is told is appended to the file BATON_STUB_JOURNAL, as JSON lines.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from baton import log
from baton.process import ParentLink


def main() -> None:
    """Be the process that argv names."""
    link = ParentLink()
    message = link.read()
    if message is None:
        return
    spec = message["spec"]
    kind = sys.argv[1] if len(sys.argv) > 1 else "router"
    log.setup("info")
    logging.getLogger("stub").info("started")
    name = {
        "rank": f"{spec.get('worker_id')} rank {spec.get('tp_rank')}",
        "front": f"{spec.get('worker_id')} front",
        "router": "router",
    }[kind]
    Stub(link, spec, kind, name, json.loads(os.environ.get("BATON_STUB", "{}")).get(name, "")).run()


class Stub:
    """One stub process."""

    def __init__(self, link: ParentLink, spec: dict[str, Any], kind: str, name: str, behaviour: str) -> None:
        self._name = name
        self._link = link
        self._spec = spec
        self._kind = kind
        self._behaviour = behaviour
        self._is_deaf = behaviour == "deaf"
        self._stop = threading.Event()
        self._fleet: list[dict[str, str]] = []

    def run(self) -> None:
        """Report ready, then wait for the end."""
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._behaviour == "fail":
            self._link.report("failed", error="ValueError: the stub was told to fail")
            sys.exit(1)
        if self._behaviour == "die":
            sys.stderr.write("Traceback (most recent call last):\nRuntimeError: the stub was told to die\n")
            sys.exit(3)
        self._link.watch(self._on_message, self._end)
        if self._behaviour != "hang":
            getattr(self, f"_start_{self._kind}")()
        if self._behaviour.startswith("die-after:"):
            self._stop.wait(float(self._behaviour.partition(":")[2]))
            os._exit(4)
        self._stop.wait()
        if self._behaviour == "slow-stop":
            time.sleep(0.3)
        self._journal(event="stopped")

    def _end(self) -> None:
        if not self._is_deaf:
            self._stop.set()

    def _journal(self, **entry: Any) -> None:
        if path := os.environ.get("BATON_STUB_JOURNAL"):
            with open(path, "a") as file:
                file.write(json.dumps({"name": self._name, **entry}) + "\n")

    def _on_message(self, message: dict[str, Any]) -> None:
        self._journal(**message)
        match message["event"]:
            case "stop":
                self._end()
            case "die":
                os._exit(5)
            case "deaf":
                self._is_deaf = True
                self._link.report("echo", message=message)
            case "fleet":
                self._fleet = message["workers"]
                self._tell_whether_serving()
            case _:
                self._link.report("echo", message=message)

    def _start_rank(self) -> None:
        kv = {"num_blocks": 64, "block_size": 16, "pool_bytes": 64 * 16 * 1024}
        self._link.report("ready", tp_rank=self._spec["tp_rank"], timings={"load_model": 0.01}, kv=kv)

    def _start_front(self) -> None:
        server = ThreadingHTTPServer((self._spec["host"], self._spec["port"]), BaseHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"{self._spec['host']}:{server.server_address[1]}"
        self._link.report(
            "ready", worker_id=self._spec["worker_id"], address=address, transfer=[], timings={"wait_for_ranks": 0.02}
        )

    def _start_router(self) -> None:
        handler = type("Handler", (RouterHandler,), {"stub": self})
        server = ThreadingHTTPServer((self._spec["host"], self._spec["port"]), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = self._spec["host"], server.server_address[1]
        self._link.report("listening", http_url=f"http://{host}:{port}", grpc_url=f"{host}:{self._spec['grpc_port']}")
        self._tell_whether_serving()

    def _tell_whether_serving(self) -> None:
        if self._fleet:
            self._link.report("serving")
        else:
            self._link.report("not_serving", reason="no workers")

    @property
    def fleet(self) -> list[dict[str, str]]:
        """As last told."""
        return self._fleet

    @property
    def spec(self) -> dict[str, Any]:
        """As told at the start."""
        return self._spec


TRACE = {
    "request_id": "cmpl-1",
    "finish_reason": "stop",
    "num_prompt_tokens": 12,
    "num_tokens": 3,
    "prefill_worker": "prefill-0",
    "decode_worker": "decode-0",
    "transport": "shm",
    "kv_bytes": 4096,
    "ttft_ms": 9.0,
    "total_ms": 20.0,
    "moments_ms": {
        "router": {"arrived": 0.0, "placed": 1.0, "first_token": 9.0, "finished": 20.0},
        "prefill-0": {"received": 2.0, "prefill_begin": 3.0, "prefill_end": 8.0},
        "decode-0": {"kv_begin": 4.0, "runnable": 9.5},
    },
}


class RouterHandler(BaseHTTPRequestHandler):
    """What the CLI asks of a router; echoes questions."""

    stub: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health, status, traces."""
        from baton import auth, specs

        token = auth.worker_token(specs.decode_secret(self.stub.spec["secret"]))
        if self.path.startswith("/internal") and self.headers.get("authorization") != token:
            self._answer(401, {"error": {"message": "wrong token"}})
        elif self.path == "/internal/status":
            workers = [{**worker, "role": worker["worker_id"].partition("-")[0]} for worker in self.stub.fleet]
            self._answer(200, {"workers": workers, "pid": os.getpid()})
        elif self.path == "/internal/traces":
            self._answer(200, {"traces": [{"request_id": "cmpl-1"}]})
        elif self.path == "/internal/trace/cmpl-1":
            self._answer(200, TRACE)
        elif self.path == "/v1/models" and self.headers.get("authorization") == "Bearer wrong":
            self._answer(401, {"error": {"message": "The API key is not known here."}})
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": self.stub.spec["served_model_name"], "owned_by": "baton"}]})
        else:
            self._answer(404, {"error": {"message": f"nothing at {self.path}"}})

    def do_POST(self) -> None:
        """A chat completion: the question in upper case, a word at a time."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for word in body["messages"][-1]["content"].upper().split():
            chunk = {"id": "cmpl-1", "choices": [{"delta": {"content": word + " "}}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        line = {"level": "info", "event": "request finished", **TRACE, "at": time.time()}
        sys.stderr.write(json.dumps(line) + "\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    main()
