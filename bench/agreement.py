"""Does `baton bench` see what others see? The same server and prompts, measured by it, by aiperf and by guidellm in turn.

    python -m bench.agreement --aiperf VENV/bin/aiperf --guidellm VENV/bin/guidellm --output DIR

starts a simulated Baton (1 prefill + 1 decode, no prefix cache, ASCII tokens so that every token is visible text), then
runs the three tools interleaved, `--repetitions` times: with Poisson arrivals from each tool's own generator; with arrivals
at equal distances, where no generator can differ; or as a closed loop. Definitions are aligned: /v1/completions,
streamed, 200-byte prompts from one file, 32 tokens out, `ignore_eos`, nothing cut; TTFT, and the mean gap of each request
(TPOT here, "inter-token latency" in both others). Results are kept in DIR, and what is there is not run again; a DIR of
another load is refused. Prints a Markdown table; the status is 1 if a p50 differs from ours by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from baton.config import DEMO_MODEL_DIR
from loadtest.metrics import Bootstrap
from loadtest.prompts import WORDS
from loadtest.result import REQUEST_FIELDS, machine
from loadtest.servers import serving

Floats = npt.NDArray[np.float64]

_TOOLS: Final = ("baton", "aiperf", "guidellm")
_MODEL: Final = "baton-sim"
_NUM_PROMPTS: Final = 2500
_PROMPT_BYTES: Final = 200
_OUTPUT_TOKENS: Final = 32
_SERVER: Final = (
    *("--engine", "sim", "--prefill", "1", "--decode", "1"),
    *("--set", "sim.vocab_size=128", "--set", "sim.verify_all=false", "--set", "engine.enable_prefix_caching=false"),
    *("--set", "sim.prefill_s_per_token=1e-4", "--set", "sim.decode_s_per_step=0.015"),
)


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", type=Path, required=True, metavar="FILE")
    parser.add_argument("--guidellm", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--requests", type=int, default=700, metavar="N", help="of each run")
    parser.add_argument("--rate", type=float, default=12.0, metavar="R", help="arrivals per second (default 12)")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--concurrency", type=int, metavar="N", help="a closed loop instead")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    try:
        claim(arguments.output, load_of(arguments))
    except ValueError as error:
        parser.error(str(error))
    asyncio.run(_run_missing(arguments))
    return _table(arguments)


def load_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What runs must have in common to be in one table."""
    is_closed = arguments.concurrency is not None
    return {
        "requests": arguments.requests,
        "concurrency": arguments.concurrency,
        "rate": None if is_closed else arguments.rate,
        "arrivals": None if is_closed else arguments.arrivals,
        "prompt_bytes": _PROMPT_BYTES,
        "output_tokens": _OUTPUT_TOKENS,
        "server": list(_SERVER),
    }


def claim(output: Path, load: dict[str, Any]) -> None:
    """Make `output` the directory of this load. Raises ValueError: it holds runs of another one."""
    path = output / "load.json"
    if path.exists():
        held = json.loads(path.read_text())
        changed = [key for key in load if held.get(key) != load[key]]
        if changed:
            raise ValueError(f"{output} holds runs with another {', '.join(changed)}: take another --output")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds other things, or runs of an unknown load: take another --output")
    else:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(load))


def described(load: dict[str, Any]) -> str:
    """A load in words."""
    if load["concurrency"] is None:
        how = f"{'Poisson' if load['arrivals'] == 'poisson' else 'evenly spaced'} arrivals, {load['rate']:g} per second"
    else:
        how = f"{load['concurrency']} always in flight"
    sizes = f"{load['prompt_bytes']} bytes in, {load['output_tokens']} tokens out"
    return f"{load['requests']} requests of each run, {how}, {sizes}"


async def _run_missing(arguments: argparse.Namespace) -> None:
    runs = [(tool, n) for n in range(arguments.repetitions) for tool in _TOOLS[n % 3 :] + _TOOLS[: n % 3]]
    missing = [(tool, n) for tool, n in runs if not _file(arguments.output, tool, n).exists()]
    if not missing:
        return
    prompts = _write_prompts(arguments.output)
    async with serving([sys.executable, "-m", "cluster.cli", "serve"], _SERVER) as server:
        for tool, number in missing:
            print(f"{tool}, repetition {number + 1}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            command = _command(arguments, tool, number, server.url, prompts)
            await asyncio.to_thread(_run_tool, command, arguments.output / f"{tool}-{number}.log")


def _run_tool(command: list[str], log_path: Path) -> None:
    """aiperf takes a local tokenizer for a hub id where these variables say that there is no hub."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    with open(log_path, "wb") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{command[0]} failed: {log_path}")


def _command(arguments: argparse.Namespace, tool: str, number: int, url: str, prompts: Path) -> list[str]:
    count, slots, output = str(arguments.requests), arguments.concurrency, arguments.output / f"{tool}-{number}"
    rate, arrivals = f"{arguments.rate:g}", arguments.arrivals
    if tool == "baton":
        flags = f"--output-tokens {_OUTPUT_TOKENS} --requests {count} --seed {number} --warmup 0 --cooldown 0 "
        flags += f"--concurrency {slots}" if slots else f"--rate {rate} --arrivals {arrivals}"
        where = ["--url", url, "--data", f"prompts:{prompts}", "--json", f"{output}.json"]
        return [sys.executable, "-m", "cluster.cli", "bench", *where, *flags.split(), "--slo", "ttft=500ms,tpot=50ms"]
    if tool == "aiperf":
        flags = (
            f"profile -m {_MODEL} --url {url} --endpoint-type completions --streaming --use-server-token-count "
            f"--custom-dataset-type single_turn --extra-inputs max_tokens:{_OUTPUT_TOKENS} --extra-inputs ignore_eos:true "
            f"--extra-inputs temperature:0 --request-count {count} --random-seed {number} --ui none "
        )
        flags += f"--concurrency {slots}" if slots else f"--request-rate {rate} --arrival-pattern {arrivals}"
        files = ["--tokenizer", str(DEMO_MODEL_DIR), "--input-file", str(prompts.with_name("texts.jsonl"))]
        return [str(arguments.aiperf), *flags.split(), *files, "--output-artifact-dir", str(output)]
    return [
        *(str(arguments.guidellm), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url},model={_MODEL},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={DEMO_MODEL_DIR}", "--data", f"kind=json_file,path={prompts}"),
        *("--profile", f"kind=concurrent,streams={slots}" if slots else f"kind={arrivals},rate={rate}"),
        *("--constraint", f"kind=max_requests,count={count}"),
        *("--seed", f"kind=static,value={number}", "--output", f"kind=json,path={output}.json"),
    ]


def _write_prompts(output: Path) -> Path:
    """The same texts for all, in the columns that each tool reads."""
    chooser = random.Random(5)
    texts = [
        " ".join(chooser.choices(WORDS, k=_PROMPT_BYTES // 3))[: _PROMPT_BYTES - 1] + "." for _ in range(_NUM_PROMPTS)
    ]
    rows = [{"prompt": text, "output_tokens_count": _OUTPUT_TOKENS} for text in texts]
    prompts = output / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.with_name("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prompts


def _file(output: Path, tool: str, number: int) -> Path:
    return (
        output / f"{tool}-{number}" / "profile_export.jsonl" if tool == "aiperf" else output / f"{tool}-{number}.json"
    )


def _read(path: Path, tool: str) -> tuple[Floats, Floats]:
    """TTFT and mean gap of every request of a run, in ms, in the order in which they ended."""
    if tool == "aiperf":
        rows = [json.loads(line)["metrics"] for line in path.read_text().splitlines()]
        pairs = [(row["time_to_first_token"]["value"], row["inter_token_latency"]["value"]) for row in rows]
    elif tool == "guidellm":
        requests = json.loads(path.read_text())["benchmarks"][0]["requests"]["successful"]
        pairs = [(row["time_to_first_token_ms"], row["inter_token_latency_ms"]) for row in requests]
    else:
        columns = [REQUEST_FIELDS.index(name) for name in ("ttft_s", "tpot_s", "failure")]
        found = [[row[column] for column in columns] for row in json.loads(path.read_text())["runs"][0]["requests"]]
        pairs = [(ttft * 1e3, tpot * 1e3) for ttft, tpot, failure in found if not failure]
    values = np.array(pairs, dtype=np.float64)
    return values[:, 0], values[:, 1]


def _table(arguments: argparse.Namespace) -> int:
    runs = {
        tool: [_read(_file(arguments.output, tool, n), tool) for n in range(arguments.repetitions)] for tool in _TOOLS
    }
    facts = machine()
    print(f"{facts['cpu']}, {facts['num_cores']} cores; {described(load_of(arguments))}\n")
    print("| metric | tool | requests | p50, ms | runs | against ours | p99, ms | 95 % interval | runs |")
    print("|---|---|---|---|---|---|---|---|---|")
    is_far = False
    for column, metric in enumerate(("TTFT", "mean gap")):
        ours = 0.0
        for tool in _TOOLS:
            single = [run[column] for run in runs[tool]]
            values = np.concatenate(single)
            (low, high), *_ = Bootstrap(len(values)).quantiles(values, np.arange(len(values)), (0.99,))
            p50, p99 = np.quantile(values, (0.5, 0.99))
            ours = ours or p50
            is_far = is_far or abs(p50 / ours - 1) > 0.05
            cells = [
                metric,
                tool,
                str(len(values)),
                f"{p50:.2f}",
                _runs(single, 0.5),
                f"{(p50 / ours - 1) * 100:+.1f} %",
            ]
            print("| " + " | ".join([*cells, f"{p99:.2f}", f"{low:.2f} to {high:.2f}", _runs(single, 0.99)]) + " |")
    return int(is_far)


def _runs(single: list[Floats], quantile: float) -> str:
    return ", ".join(f"{np.quantile(values, quantile):.2f}" for values in single)


if __name__ == "__main__":
    sys.exit(main())
