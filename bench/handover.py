"""P7: is the hand-over hidden? Per request through a real 1P1D cluster, from the router's timelines.

    python -m bench.handover [--shape llama-135m] [--tokens 512 1024 2048] [--requests 30] [--transports shm]
        [--json OUT.json] [--check]

`baton serve --launcher local --prefill 1 --decode 1` with random weights (load_format dummy), one core per worker; one
request at a time, prompts of random token ids, no prefix cache. Prompt lengths take turns. After each request its
timeline (`baton trace`) is read and the same bytes are copied here, scattered blocks to scattered blocks as the
transfer's, for a bare copy of the same moment. `--transports cuda_ipc` has both workers, and the bare copy, on the first GPU.

    exposed    decode side runnable - first token sampled, at least 0; target: at most 3 % of TTFT
    hand-over  gap between tokens 1 and 2 at the router, minus the request's median gap (one decode step), at least 0;
               target: at most 2 bare copies of the same bytes, or at most a copy and a decode step
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from bench import engine_cuda, engine_shapes
from bench.engine_shapes import Shape
from bench.tokenizer import write_tokenizer

_START_S: Final = 180.0
_REQUEST_S: Final = 120.0
_TRACE_S: Final = 5.0
_COPIES: Final = 3
CUDA_IPC: Final = "cuda_ipc"
SHAPES: Final = {**engine_cuda.SHAPES, **engine_shapes.SHAPES}
EXPOSED_SHARE: Final = 0.03
COPIES: Final = 2.0
MIN_TARGET_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times in ms."""

    num_tokens: int
    num_bytes: int
    transport: str
    ttft: float
    transfer: float
    exposed: float
    handover: float
    step: float
    """The median gap between tokens after the second."""
    copy: float
    """The bare copy of the same bytes, right after the request."""

    @property
    def exposed_share(self) -> float:
        """Of TTFT."""
        return self.exposed / self.ttft

    @property
    def is_quick(self) -> bool:
        """Is the hand-over within its target?"""
        return self.handover <= max(COPIES * self.copy, self.copy + self.step)


class Server:
    """A running `baton serve`; one request at a time."""

    def __init__(self, state: dict[str, Any]) -> None:
        parts = urlsplit(str(state["http_url"]))
        self._token = str(state["token"])
        self._http = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_REQUEST_S)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """The trace of one finished request."""
        body = {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        self._http.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = self._http.getresponse().read()
        lines = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
        if not lines or b"error" in lines[-1]:
            raise SystemExit(f"the request failed: {answer[-300:]!r}")
        return self._trace(json.loads(lines[0])["id"])

    def _trace(self, request_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + _TRACE_S
        while True:
            self._http.request("GET", f"/internal/trace/{request_id}", headers={"authorization": self._token})
            response = self._http.getresponse()
            answer = response.read()
            if response.status == 200:
                trace: dict[str, Any] = json.loads(answer)
                return trace
            if time.monotonic() > deadline:
                raise SystemExit(f"no trace of {request_id}: {answer!r}")
            time.sleep(0.01)  # the workers' last words may still be on their way


@contextlib.contextmanager
def serving(shape: Shape, arguments: argparse.Namespace, transport: str) -> Iterator[Server]:
    """`baton serve` with one prefill and one decode worker."""
    with tempfile.TemporaryDirectory(prefix="bh-", dir="/tmp") as scratch:
        model, runtime = Path(scratch, "model"), Path(scratch, "run")
        model.mkdir()
        runtime.mkdir(mode=0o700)
        write_model_dir(shape, model)
        command = [sys.executable, "-m", "cluster.cli", "serve", str(model), "--launcher", "local"]
        command += ["--prefill", "1", "--decode", "1", "--port", "0", "--grpc-port", "0", "--dtype", "bfloat16"]
        settings = {
            "model.load_format": "dummy",
            "engine.enable_prefix_caching": "false",
            "engine.block_size": arguments.block_size,
            "engine.max_num_batched_tokens": arguments.max_num_batched_tokens,
            "transfer.transports": f"[{transport}]",
        }
        if transport == CUDA_IPC:
            settings |= {"engine.device": "cuda", "engine.kv_cache_bytes": arguments.kv_cache_bytes}
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        with open(Path(scratch, "log"), "wb+") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "BATON_RUNTIME_DIR": str(runtime)}
            )
            try:
                yield Server(_started(process, runtime, log.name))
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def _started(process: subprocess.Popen[bytes], runtime: Path, log: str) -> dict[str, Any]:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        for file in runtime.glob("*/server.json"):
            state: dict[str, Any] = json.loads(file.read_text())
            if state.get("ready"):
                return state
        time.sleep(0.1)  # another process has to start
    raise SystemExit(f"the server did not start:\n{Path(log).read_text()[-3000:]}")


def write_model_dir(shape: Shape, directory: Path) -> None:
    """config.json and a tokenizer that has a word for every id; the weights are random."""
    (directory / "config.json").write_text(json.dumps(shape.hf_config()))
    write_tokenizer(shape.vocab_size, directory)


class BareCopy:
    """Copies the bytes of a prompt block by block between two scattered pools, as the transfer does."""

    def __init__(self, shape: Shape, block_size: int, max_tokens: int) -> None:
        self._block_bytes = shape.kv_bytes_per_token // shape.num_layers * block_size
        self._block_size = block_size
        num_blocks = -(-max_tokens // block_size)
        self._shape = (shape.num_layers, num_blocks, self._block_bytes)
        self._source = np.full(self._shape, 1, np.uint8)
        self._destination = np.full(self._shape, 2, np.uint8)

    def run_ms(self, num_tokens: int, rng: random.Random) -> float:
        """The median of a few copies."""
        num_blocks = -(-num_tokens // self._block_size)
        times = []
        for _ in range(_COPIES):
            source, destination = (rng.sample(range(self._shape[1]), num_blocks) for _ in range(2))
            began = time.perf_counter()
            for layer in range(self._shape[0]):
                to, fro = self._destination[layer], self._source[layer]
                for a, b in zip(destination, source, strict=True):
                    to[a] = fro[b]
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3


class BareDeviceCopy:
    """The same on a GPU: one gather and one scatter per layer. The median of a few, by events."""

    def __init__(self, shape: Shape, block_size: int, max_tokens: int) -> None:
        import torch

        self._block_size = block_size
        block_bytes = shape.kv_bytes_per_token // shape.num_layers * block_size
        size = (shape.num_layers, -(-max_tokens // block_size), block_bytes)
        self._source, self._destination = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))

    def run_ms(self, num_tokens: int, rng: random.Random) -> float:
        """As `BareCopy.run_ms`."""
        import torch

        num_blocks, times = -(-num_tokens // self._block_size), []
        for _ in range(_COPIES):
            source, destination = (
                torch.tensor(rng.sample(range(self._source.shape[1]), num_blocks), device="cuda") for _ in range(2)
            )
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for to, fro in zip(self._destination, self._source, strict=True):
                to.index_copy_(0, destination, fro[source])
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def measure(shape: Shape, arguments: argparse.Namespace, transport: str) -> list[Sample]:
    """All requests of one transport."""
    rng = random.Random(0)
    kind = BareDeviceCopy if transport == CUDA_IPC else BareCopy
    bare = kind(shape, arguments.block_size, max(arguments.tokens))
    samples = []
    with serving(shape, arguments, transport) as server:
        for number in range(arguments.warm_up + arguments.requests):
            for num_tokens in arguments.tokens:
                prompt = [rng.randrange(3, shape.vocab_size) for _ in range(num_tokens)]
                trace = server.generate(prompt, arguments.steps + 2)
                copy_ms = bare.run_ms(num_tokens, rng)
                if number >= arguments.warm_up:
                    samples.append(_sample(trace, num_tokens, copy_ms))
    return samples


def _sample(trace: dict[str, Any], num_tokens: int, copy_ms: float) -> Sample:
    missing = [name for name in ("transfer_ms", "transfer_exposed_ms", "handover_ms") if trace.get(name) is None]
    if missing:
        raise SystemExit(f"{missing} is not in the trace: {trace}")
    return Sample(
        num_tokens=num_tokens,
        num_bytes=int(trace["kv_bytes"]),
        transport=str(trace["transport"]),
        ttft=float(trace["ttft_ms"]),
        transfer=float(trace["transfer_ms"]),
        exposed=float(trace["transfer_exposed_ms"]),
        handover=float(trace["handover_ms"]),
        step=float(trace["step_ms"]),
        copy=copy_ms,
    )


def show(samples: list[Sample]) -> list[str]:
    """Print the table; the targets that are missed."""
    problems = []
    print(
        f"{'tokens':>6} {'MiB':>5} {'by':>4} {'n':>3} {'TTFT':>15} {'transfer':>15} {'exposed':>15} {'of TTFT':>13} "
        f"{'hand-over':>15} {'step':>6} {'copy':>6} {'in target':>9}   (ms, median and p95)"
    )
    for key in sorted({(sample.num_tokens, sample.transport) for sample in samples}):
        rows = [sample for sample in samples if (sample.num_tokens, sample.transport) == key]
        share = statistics.median(row.exposed_share for row in rows)
        handover, copy, step = (
            statistics.median(getattr(row, name) for row in rows) for name in ("handover", "copy", "step")
        )
        in_target = sum(row.is_quick for row in rows) / len(rows)
        cells = [_spread([getattr(row, name) for row in rows]) for name in ("ttft", "transfer", "exposed")]
        shares = [100 * row.exposed_share for row in rows]
        print(
            f"{key[0]:>6} {rows[0].num_bytes / 2**20:>5.1f} {key[1]:>4} {len(rows):>3} "
            + " ".join(f"{cell:>15}" for cell in cells)
            + f" {_spread(shares):>11} % {_spread([row.handover for row in rows]):>15} {step:>6.2f} {copy:>6.2f} "
            f"{in_target:>9.0%}"
        )
        if key[0] < MIN_TARGET_TOKENS:
            continue
        if key[1] == "shm" and share > EXPOSED_SHARE:
            problems.append(f"{key[0]} tokens, {key[1]}: exposed transfer is {share:.1%} of TTFT")
        if handover > max(COPIES * copy, copy + step):
            problems.append(
                f"{key[0]} tokens, {key[1]}: hand-over takes {handover:.2f} ms; a copy {copy:.2f}, a step {step:.2f}"
            )
    return problems


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} {ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]:.2f}"


def main() -> None:
    """Parse, measure, print; exit status 1 where a target is missed and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="prompt lengths")
    parser.add_argument("--requests", type=int, default=30, help="measured requests per prompt length")
    parser.add_argument("--warm-up", type=int, default=2, help="requests per prompt length before")
    parser.add_argument("--steps", type=int, default=16, help="decode steps after token 2, for the median step")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="a prefill chunk")
    parser.add_argument("--transports", nargs="+", default=["shm"], choices=["shm", "tcp", CUDA_IPC])
    parser.add_argument("--kv-cache-bytes", type=int, default=8 << 30, help="of each worker on a GPU")
    parser.add_argument("--json", type=Path, help="write every request here")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    arguments = parser.parse_args()
    print(f"$ {shlex.join(['python', '-m', 'bench.handover', *sys.argv[1:]])}")
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.2f}")
    samples: list[Sample] = []
    for transport in arguments.transports:
        samples += measure(SHAPES[arguments.shape], arguments, transport)
    problems = show(samples)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    print(f"load average {os.getloadavg()[0]:.2f}")
    for problem in problems:
        print("MISSED:", problem)
    if problems and arguments.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
