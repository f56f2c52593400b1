"""Runs the rows of one shape with one number of threads: arms that stay up, pair after pair, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.engine_arms import PEERS, Arm, ArmFailed, ArmSpec, Bystanders
from bench.engine_rows import (
    MIXED_OUTPUT,
    MIXED_PROMPT,
    NUM_MIXED,
    WARM_STEPS,
    Figure,
    Kind,
    Row,
    floor_s,
    value_of,
)
from bench.engine_shapes import Ceilings, Shape

_REPOSITORY: Final = Path(__file__).parent.parent
_SLOW_RATIO: Final = 3.0
_SLOW_S: Final = 15.0
_CHECK_PROMPTS: Final = 4
_CHECK_PROMPT: Final = 64
_CHECK_OUTPUT: Final = 16
_VLLM_BLOCK: Final = 128


@dataclass(frozen=True, slots=True)
class Setup:
    """What the command line asks for."""

    shape: Shape
    num_threads: int
    rows: tuple[Row, ...]
    num_pairs: int
    tp_size: int
    work_dir: Path
    vllm_python: Path | None
    llama_python: Path | None
    backend: str = "auto"
    baton_batched_tokens: int | None = None
    vllm_batched_tokens: int | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """Where the arms run: the last cores, because the first tends to have the interrupts."""
        return tuple(sorted(os.sched_getaffinity(0)))[-self.num_threads :]

    @property
    def tp_cores(self) -> tuple[int, ...]:
        """One core per rank."""
        return tuple(sorted(os.sched_getaffinity(0)))[-self.tp_size :]

    @property
    def model_dir(self) -> Path:
        """Of the shape; made when it is not there."""
        return self.work_dir / self.shape.name

    @property
    def gguf(self) -> Path:
        """Of the same weights."""
        return self.work_dir / f"{self.shape.name}.gguf"


@dataclass(slots=True)
class Outcome:
    """What a session found. `regret[arm]`: see peers/check_tokens.py."""

    figures: dict[str, Figure] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    idle_shares: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    regret: dict[str, float] = field(default_factory=dict)
    unchecked: str = ""


class Session:
    """Owns the running arms. `say` gets a line for every row; call `close` whatever happens."""

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        """Make the model where it is missing, and its GGUF where llama.cpp is there."""
        self.setup = setup
        self.outcome = Outcome()
        self._say = say
        self._arms: dict[str, Arm] = {}
        self._dead: dict[str, str] = {}
        self._seed = 0
        make_model(setup, say)
        self._specs = {spec.name: spec for spec in _specs(setup)}

    def run(self) -> Outcome:
        """All rows, in order."""
        for row in self.setup.rows:
            figure = self.outcome.figures[row.name] = Figure(row)
            self._run_row(row, figure)
            self._say(_line(figure))
        self._judge_tokens()
        return self.outcome

    def close(self) -> None:
        """End all arms. Idempotent."""
        for name in list(self._arms):
            self._stop(name)

    def _run_row(self, row: Row, figure: Figure) -> None:
        if row.kind is Kind.BOOKKEEPING:
            self._keep(())
            figure.values[row.subject] = _bookkeeping_ms(row.context, self.setup)
            return
        if row.kind is Kind.STARTUP:
            self._keep(())
            self._measure_startup(row, figure)
            return
        ceiling = "ceiling-tp" if row.subject.startswith("baton-tp") else "ceiling"
        self._keep((*row.arms, ceiling))
        live = [name for name in row.arms if self._is_up(name, figure)]
        if row.kind is Kind.MEMORY:
            for name in live:
                self.outcome.memory[name] = self._arms[name].memory()
                figure.values[name] = [self.outcome.memory[name]["peak_rss"]]
            return
        measured = self._measure_ceilings(ceiling) if self._is_up(ceiling, figure) else []
        self._measure_pairs(row, figure, live, ceiling, measured)
        if measured:
            best = {key: median(each[key] for each in measured) for key in measured[0]}
            self.outcome.ceilings.append({"row": row.name, **best})  # type: ignore[dict-item]
            ceilings = Ceilings(best["read_bytes_per_s"], best["flops_per_s"])
            figure.floor = floor_s(row, self.setup.shape, ceilings, self.setup.num_pairs)

    def _measure_pairs(
        self, row: Row, figure: Figure, live: list[str], ceiling: str, measured: list[dict[str, float]]
    ) -> None:
        """Every arm once per pair, in turn from either end; the ceilings once per pair."""
        self._seed += 1
        is_kept = row.kind is Kind.DECODE and not row.is_fresh
        if is_kept:
            live = [name for name in live if self._try(name, figure, lambda arm: self._begin(arm, row))]
        else:  # one untimed round: first uses compile, allocate and page in
            live = [name for name in live if self._try(name, figure, lambda arm: self._measure(arm, row))]
        sitting_out: set[str] = set()
        for pair in range(self.setup.num_pairs):
            self._seed += 1
            for name in live if pair % 2 == 0 else live[::-1]:
                if name in sitting_out or name in figure.absent:
                    continue
                others = Bystanders(self._arms[name])
                seconds: list[float] = []
                if self._try(name, figure, lambda arm, out=seconds: out.append(self._measure(arm, row))):  # type: ignore[misc]
                    figure.values.setdefault(name, []).append(value_of(row, seconds[0]))
                    figure.foreign_cpu.append(others.cores())
                    if pair >= 1 and seconds[0] > _SLOW_S and _is_hopeless(figure, name):
                        sitting_out.add(name)
            if ceiling in self._arms:
                measured += self._measure_ceilings(ceiling)
        if is_kept:
            for name in [name for name in live if name in self._arms]:
                self._try(name, figure, lambda arm: arm.ask("end"))

    def _measure(self, arm: Arm, row: Row) -> float:
        """Seconds of one measurement; the arm idles again afterwards."""
        shape = {"num_seqs": row.batch, "num_tokens": row.context, "seed": self._seed}
        if row.kind is Kind.DECODE:
            if row.is_fresh:
                self._begin(arm, row)
            seconds = arm.ask("decode", num_steps=row.num_steps)["seconds"]
            if row.is_fresh:
                arm.ask("end")
        elif row.kind is Kind.PREFIX:
            seconds = arm.ask("again", **shape)["seconds"]
        elif row.kind is Kind.MIXED:
            shape |= {"num_seqs": NUM_MIXED, "num_tokens": MIXED_PROMPT}
            seconds = arm.ask("generate", num_output=MIXED_OUTPUT, **shape)["seconds"]
        else:
            seconds = arm.ask("generate", num_output=1, **shape)["seconds"]
        arm.settle()
        return float(seconds)

    def _begin(self, arm: Arm, row: Row) -> None:
        num_rounds = 1 if row.is_fresh else self.setup.num_pairs
        arm.ask(
            "begin",
            num_seqs=row.batch,
            num_tokens=row.context,
            seed=self._seed,
            num_warm=WARM_STEPS,
            num_output=1 + WARM_STEPS + num_rounds * row.num_steps,
        )

    def _measure_ceilings(self, name: str) -> list[dict[str, float]]:
        found = self._arms[name].ask("measure")
        self._arms[name].settle()
        return [found]

    def _measure_startup(self, row: Row, figure: Figure) -> None:
        """From fork to the first token, caches on disk warm; no other arm is up."""
        names = [name for name in row.arms if self._is_known(name, figure)]
        for name in names:
            if name not in self.outcome.facts and not self._is_up(name, figure):
                continue
            self._stop(name)
        for _ in range(self.setup.num_pairs):
            for name in names:
                if name not in figure.absent and self._is_up(name, figure):
                    figure.values.setdefault(name, []).append(self._arms[name].start_s)
                    self._stop(name)

    def _keep(self, names: Sequence[str]) -> None:
        """Stop all other arms: they take memory."""
        for name in [name for name in self._arms if name not in names]:
            self._stop(name)

    def _is_known(self, name: str, figure: Figure) -> bool:
        reason = self._dead.get(name) or (None if name in self._specs else "absent")
        if reason is not None:
            figure.absent[name] = reason
        return reason is None

    def _is_up(self, name: str, figure: Figure) -> bool:
        """Start the arm if it is not up. False: it can not be had, as the figure says."""
        if name in self._arms:
            return True
        if not self._is_known(name, figure):
            return False
        spec = self._specs[name]
        try:
            arm = Arm(spec, self.setup.work_dir / f"{name}.log")
        except ArmFailed as error:
            self._fail(name, figure, error)
            return False
        self._arms[name] = arm
        self.outcome.facts[name] = arm.facts
        self.outcome.commands[name] = spec.command()
        arm.settle()
        if not name.startswith("ceiling") and name not in self.outcome.tokens:
            self._try(name, figure, self._take_tokens)
        return name in self._arms

    def _take_tokens(self, arm: Arm) -> None:
        """Keep what the arm generates from a few prompts, to be judged at the end."""
        details = {"num_seqs": _CHECK_PROMPTS, "num_tokens": _CHECK_PROMPT, "seed": 0}
        reply = arm.ask("generate", num_output=_CHECK_OUTPUT, wants_tokens=True, **details)
        self.outcome.tokens[arm.spec.name] = reply["tokens"]
        arm.settle()

    def _try(self, name: str, figure: Figure, work: Callable[[Arm], object]) -> bool:
        """Do something with an arm. False: it failed and is gone, as the figure says."""
        try:
            work(self._arms[name])
        except ArmFailed as error:
            self._fail(name, figure, error)
            return False
        return True

    def _fail(self, name: str, figure: Figure, error: ArmFailed) -> None:
        self._dead[name] = figure.absent[name] = f"failed: {error}"
        self._say(f"  {name} failed: {error}")
        self._stop(name)

    def _stop(self, name: str) -> None:
        arm = self._arms.pop(name, None)
        if arm is not None:
            self.outcome.idle_shares[name] = max(self.outcome.idle_shares.get(name, 0.0), arm.idle_share)
            arm.stop()

    def _judge_tokens(self) -> None:
        """A fast wrong answer has no speed: how far from the reference's choice each arm's tokens are."""
        self._keep(())
        if not self.outcome.tokens:
            return
        question = {
            "model_dir": str(self.setup.model_dir),
            "vocab_size": self.setup.shape.vocab_size,
            "num_prompts": _CHECK_PROMPTS,
            "num_prompt_tokens": _CHECK_PROMPT,
            "tokens": self.outcome.tokens,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(question, file)
            file.flush()
            command = [sys.executable, str(PEERS / "check_tokens.py"), file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.outcome.unchecked = done.stderr.strip().rpartition("\n")[2]
        else:
            self.outcome.regret = json.loads(done.stdout.strip().rpartition("\n")[2])


def make_model(setup: Setup, say: Callable[[str], None]) -> None:
    """The model directory and its GGUF.

    Raises:
        subprocess.CalledProcessError: one of them could not be made.
    """
    setup.work_dir.mkdir(parents=True, exist_ok=True)
    if not (setup.model_dir / "config.json").exists():
        say(f"making {setup.model_dir}")
        command = [sys.executable, "-m", "bench.engine_model", setup.shape.name, str(setup.model_dir)]
        subprocess.run(command, check=True, cwd=_REPOSITORY)
    if setup.llama_python is not None and not setup.gguf.exists():
        say(f"making {setup.gguf}")
        unfinished = setup.gguf.with_suffix(".part")
        command = [str(setup.llama_python), str(PEERS / "gguf_from_hf.py"), str(setup.model_dir), str(unfinished)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        unfinished.replace(setup.gguf)


def _specs(setup: Setup) -> list[ArmSpec]:
    """Every arm that this machine can start."""
    shape = setup.shape
    step_bytes = shape.decode_bytes(1, 0)

    def kv_tokens(name: str) -> int:
        return max([1024, *(row.kv_tokens(setup.num_pairs) for row in setup.rows if name in row.arms)])

    def baton(name: str, cores: tuple[int, ...], **options: Any) -> ArmSpec:
        settings = {
            "model_dir": str(setup.model_dir),
            "vocab_size": shape.vocab_size,
            "kv_tokens": kv_tokens(name),
            "backend": setup.backend,
            "max_num_batched_tokens": setup.baton_batched_tokens,
            "tp_size": 1,
        }
        return ArmSpec(name, Path(sys.executable), "arm_baton.py", cores, settings | options)

    def ceiling(name: str, cores: tuple[int, ...]) -> ArmSpec:
        sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
        return ArmSpec(name, Path(sys.executable), "arm_ceiling.py", cores, {"step_bytes": step_bytes, **sizes})

    specs = [
        ceiling("ceiling", setup.cores),
        ceiling("ceiling-tp", setup.tp_cores),
        baton("baton", setup.cores),
        baton("baton-int8", setup.cores, quantization="int8"),
        baton("baton-1core", setup.tp_cores[:1]),
        baton(f"baton-tp{setup.tp_size}", setup.tp_cores, tp_size=setup.tp_size),
    ]
    if setup.vllm_python is not None:
        for name in ("vllm", "vllm-cached"):
            options = {
                "model_dir": str(setup.model_dir),
                "vocab_size": shape.vocab_size,
                "max_positions": shape.max_positions,
                "kv_bytes": (kv_tokens(name) + 64 * _VLLM_BLOCK) * shape.kv_bytes_per_token,
                "prefix_caching": name == "vllm-cached",
                "max_num_batched_tokens": setup.vllm_batched_tokens,
            }
            environment = _vllm_environment(setup.vllm_python, setup.cores)
            specs.append(ArmSpec(name, setup.vllm_python, "arm_vllm.py", setup.cores, options, environment))
    if setup.llama_python is not None:
        options = {"gguf": str(setup.gguf), "vocab_size": shape.vocab_size}
        specs.append(ArmSpec("llama.cpp", setup.llama_python, "arm_llama_cpp.py", setup.cores, options))
    return specs


def _vllm_environment(python: Path, cores: tuple[int, ...]) -> dict[str, str]:
    """What vLLM sets for its workers itself when they are processes of their own: pinned OpenMP threads, torch's libgomp.

    libgomp's threads spin for a few milliseconds after each parallel region and then sleep; the session waits for that.
    """
    packages = sorted((python.parent.parent / "lib").glob("python3*/site-packages"))
    found = [
        str(path)
        for folder in packages
        for path in (*folder.glob("torch.libs/libgomp*"), *folder.glob("torch/lib/libgomp*"))
    ]
    malloc = [str(path) for folder in packages for path in folder.glob("vllm/libs/libtcmalloc*.so*")]
    preload = ":".join([*malloc[:1], *found[:1]])
    environment = {"GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    return environment | ({"LD_PRELOAD": preload} if preload else {})


def _is_hopeless(figure: Figure, name: str) -> bool:
    """Would more pairs tell anything new about a rival that takes minutes and is several times slower?"""
    ratio = figure.ratio(name)
    return name != figure.row.subject and ratio is not None and ratio.low > _SLOW_RATIO


def _bookkeeping_ms(num_waiting: int, setup: Setup) -> list[float]:
    """CPU time per step of the engine's own work with 256 running sequences: medians of several hundred steps."""
    program = (
        "import json, statistics as s; from bench.scheduler import engine_with, step_times_s;"
        f"e = engine_with(256, {num_waiting});"
        f"print(json.dumps([s.median(step_times_s(e, 200)) * 1e3 for _ in range({setup.num_pairs})]))"
    )
    cores = ",".join(map(str, setup.cores))
    command = ["taskset", "-c", cores, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    values: list[float] = json.loads(done.stdout)
    return values


def _line(figure: Figure) -> str:
    """What came out of a row, in short."""
    row = figure.row
    parts = [
        f"{name} {spread.median:.4g}" if (spread := figure.spread(name)) is not None else f"{name} -"
        for name in row.arms
    ]
    return f"  {row.name:18} {row.unit:6} {'   '.join(parts)}"
