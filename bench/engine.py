"""Baton's engine side by side with vLLM's CPU backend and llama.cpp: same weights, same token ids, same cores.

    python -m bench.engine [--shape llama-135m qwen3-0.6b] [--threads 1 2] [--tp 2] [--pairs 5] [--rows PATTERN ...]
        [--vllm-python PATH] [--llama-cpp-python PATH] [--json OUT.json] [--quick]

The peers are optional: give the Python of an environment that has them, or BATON_BENCH_VLLM_PYTHON and
BATON_BENCH_LLAMA_CPP_PYTHON. docs/benchmarks-engine.md has the method. With `--device cuda` first, the arms run on a GPU:
`python -m bench.engine --device cuda --help`, docs/benchmarks-gpu.md. Exit status 1: a target of issue 4 is missed,
Baton's tokens are not the model's, or it failed; 2: the bench could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final

from bench import engine_arms, engine_cuda, engine_report
from bench.engine_rows import Verdict, all_rows, selected
from bench.engine_session import Outcome, Session, Setup
from bench.engine_shapes import SHAPES

_QUICK_ROWS: Final = ("prefill/128", "prefill/512", "decode/1/128", "decode/8/128", "bookkeeping")
_BUSY_LOAD: Final = 0.5


def main() -> int:
    """Run what the command line says."""
    if sys.argv[1:3] == ["--device", "cuda"]:
        return engine_cuda.main(sys.argv[3:])
    args = _parse()
    missing = engine_arms.missing_tools()
    if missing:
        print(f"not here: {', '.join(missing)}", file=sys.stderr)
        return 2
    machine = engine_arms.machine()
    print(f"$ {shlex.join([sys.executable, '-m', 'bench.engine', *sys.argv[1:]])}")
    print("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if machine["load_average_1min"] > _BUSY_LOAD:
        print(f"WARNING: the load average is {machine['load_average_1min']:.2f}; do not cite these numbers")
    for name in ("vllm", "llama_cpp"):
        if getattr(args, f"{name}_python") is None:
            print(f"{name.replace('_', '.')} is absent: no --{name.replace('_', '-')}-python")
    documents: list[dict[str, Any]] = []
    last: list[str] = []
    all_verdicts: list[Verdict] = []
    faults: list[str] = []
    for setup in _setups(args):
        outcome = _run(setup)
        documents.append(engine_report.as_json(setup, outcome))
        last.append(engine_report.ratios_line(setup, outcome))
        all_verdicts += engine_report.judged(setup, outcome)
        faults += [f"wrong tokens from {name}" for name in engine_report.wrong_arms(outcome)]
        faults += [f"no figure for {name}" for name in engine_report.broken_rows(outcome)]
    if args.json is not None:
        document = {"command": sys.argv[1:], "machine": machine, "is_quick": args.quick, "runs": documents}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    unknown = sum(verdict.is_met is None for verdict in all_verdicts)
    missed = sum(verdict.is_met is False for verdict in all_verdicts)
    print(
        f"RATIOS {' | '.join(last)} | targets: {len(all_verdicts) - missed - unknown} met, {missed} missed, "
        f"{unknown} not measured" + (f" | FAULTS: {', '.join(faults)}" if faults else "")
    )
    return engine_report.exit_status(all_verdicts, faults)


def _run(setup: Setup) -> Outcome:
    """One shape and thread count: progress, table, notes, verdicts."""
    print(f"\n{setup.shape.name}, {setup.num_threads} thread(s), bf16, {setup.num_pairs} pairs", flush=True)
    session = Session(setup, lambda line: print(line, flush=True))
    try:
        outcome = session.run()
    finally:
        session.close()
    print()
    for line in (*engine_report.table(outcome), "", *engine_report.notes(setup, outcome), ""):
        print(line)
    for verdict in engine_report.judged(setup, outcome):
        print(f"{ {True: 'met', False: 'MISSED', None: 'unknown'}[verdict.is_met]:8} {verdict}")
    return outcome


def _setups(args: argparse.Namespace) -> list[Setup]:
    rows = selected(all_rows(args.tp), args.rows or (_QUICK_ROWS if args.quick else ()))
    return [
        Setup(
            shape=SHAPES[shape],
            num_threads=num_threads,
            rows=tuple(row for row in rows if not row.name.startswith("tp") or SHAPES[shape].splits_over(args.tp)),
            num_pairs=args.pairs or (2 if args.quick else 5),
            tp_size=args.tp,
            work_dir=args.work_dir,
            vllm_python=args.vllm_python,
            llama_python=args.llama_cpp_python,
            backend=args.backend,
            baton_batched_tokens=args.baton_batched_tokens,
            vllm_batched_tokens=args.vllm_batched_tokens,
        )
        for shape in args.shape
        for num_threads in args.threads
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.engine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "bench"
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="cuda: see above")
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-135m", "qwen3-0.6b"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="threads, and cores, per arm")
    parser.add_argument("--tp", type=int, default=1, help="2: also Baton with two ranks, a core each")
    parser.add_argument("--pairs", type=int, help="default 5")
    parser.add_argument("--rows", nargs="+", default=[], help="names or patterns, such as decode/1 or 'int8/*'")
    parser.add_argument("--quick", action="store_true", help="2 pairs of a few rows: does it run?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=cache, help=f"models, GGUFs and logs (default {cache})")
    for name in ("vllm", "llama-cpp"):
        variable = f"BATON_BENCH_{name.upper().replace('-', '_')}_PYTHON"
        parser.add_argument(f"--{name}-python", type=Path, default=os.environ.get(variable) or None, metavar="PYTHON")
    parser.add_argument("--backend", default="auto", help="Baton's: auto, fast or reference")
    parser.add_argument("--baton-batched-tokens", type=int, help="token budget of a step; default: the engine's own")
    parser.add_argument("--vllm-batched-tokens", type=int, help="token budget of a step; default: vLLM's own")
    args = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    if max(*args.threads, args.tp, 1) > num_cores:
        parser.error(f"only {num_cores} cores are here")
    try:
        selected(all_rows(args.tp), args.rows)
    except ValueError as error:
        parser.error(str(error))
    args.vllm_python, args.llama_cpp_python = (
        None if path is None else Path(path).absolute() for path in (args.vllm_python, args.llama_cpp_python)
    )
    for path in (args.vllm_python, args.llama_cpp_python):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    args.work_dir = args.work_dir.absolute()
    return args


if __name__ == "__main__":
    sys.exit(main())
