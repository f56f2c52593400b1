"""From the configuration to what must be started: workers, their places, and each process's specification."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from baton import specs
from baton.config import DEMO_MODEL_DIR, DEMO_MODEL_NAME, Config, ConfigError
from baton.kv_layout import stored_dtype
from cluster.host import ProcessOrder
from cluster.nodes import ROUTER_ROLE
from cluster.run_dir import worker_dir
from cluster.unit import Place, UnitOrder
from engine.model_config import check_split, read_model_config

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model")
_DEMO: Final = "demo"
SIM_MODEL_NAME: Final = "baton-sim"
ROUTER: Final = "router"
FRONT: Final = "front"
_ROLES: Final = ("prefill", "decode", "mixed")
_MAX_WORKERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Modules:
    """What is run (`python -m`): a worker's package with "rank" or "front", and the router."""

    prefill: str = "prefill_worker"
    decode: str = "decode_worker"
    router: str = "router"

    def worker(self, role: str) -> str:
        """The package of a role; a mixed worker is a decode worker that also prefills for itself."""
        return self.prefill if role == "prefill" else self.decode


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model to serve; `path` is "" for the simulated engine."""

    path: str
    name: str
    source: str | None = None
    """What `find_model` makes `path` of, on any node; None: nothing is to be found."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker, whatever its incarnation."""

    worker_id: str
    role: str
    tp_size: int
    cores: tuple[tuple[int, ...], ...]
    """Per rank; empty tuples: not pinned."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of one worker: what differs between incarnations."""

    incarnation: str
    worker_dir: str
    """Relative to the run directory of the worker's node."""


def plan_workers(config: Config, available_cores: Sequence[int]) -> tuple[WorkerPlan, ...]:
    """All workers: prefill-0.., decode-0.., mixed-0..; every rank has cores of its own if there are enough, or none."""
    topology = config.topology
    counts = {"prefill": topology.prefill, "decode": topology.decode, "mixed": topology.mixed}
    if topology.mixed:  # `--mixed 2` means two workers, not two more than by default
        counts = {role: n for role, n in counts.items() if role in topology.model_fields_set}
    prefill_tp = topology.tp if topology.prefill_tp is None else topology.prefill_tp
    workers = [
        (f"{role}-{index}", role, prefill_tp if role == "prefill" else topology.tp)
        for role, count in counts.items()
        for index in range(count)
    ]
    cores = _share_cores(available_cores, sum(tp for _, _, tp in workers), config.engine.threads_per_rank)
    plans = []
    for worker_id, role, tp_size in workers:
        plans.append(WorkerPlan(worker_id, role, tp_size, tuple(cores[:tp_size])))
        cores = cores[tp_size:]
    return tuple(plans)


def plan_scaled(config: Config, plans: Iterable[WorkerPlan], wanted: Mapping[str, int]) -> tuple[WorkerPlan, ...]:
    """The workers with as many of the `wanted` roles as asked; those that stay are as they were.

    Raises:
        ValueError: no such role, or nobody would decode.
    """
    kept = {plan.worker_id: plan for plan in plans}
    counts = {role: sum(plan.role == role for plan in kept.values()) for role in _ROLES}
    for role, count in wanted.items():
        if role not in _ROLES or not isinstance(count, int) or not 0 <= count <= _MAX_WORKERS:
            raise ValueError(f"{count} {role} workers: a number of 0 to {_MAX_WORKERS}, of {', '.join(_ROLES)}")
        counts[role] = count
    if counts["decode"] + counts["mixed"] == 0:
        raise ValueError("no worker would decode: --decode or --mixed must be at least 1")
    prefill_tp = config.topology.tp if config.topology.prefill_tp is None else config.topology.prefill_tp
    names = [(f"{role}-{index}", role) for role, count in counts.items() for index in range(count)]
    scaled = []
    for name, role in names:
        tp_size = prefill_tp if role == "prefill" else config.topology.tp
        scaled.append(kept.get(name) or WorkerPlan(name, role, tp_size, ((),) * tp_size))
    return tuple(scaled)


def _share_cores(available: Sequence[int], num_ranks: int, threads: int) -> list[tuple[int, ...]]:
    if num_ranks * threads > len(available):
        return [()] * num_ranks
    return [tuple(available[rank * threads : (rank + 1) * threads]) for rank in range(num_ranks)]


def resolve_model(config: Config, on_download: Callable[[str], None] = lambda hub_id: None) -> ModelChoice:
    """Find the model, downloading it if it is named by a hub id (`on_download` hears of that first).

    Raises:
        ConfigError: it is not there or can not be had; names the path.
    """
    wanted, name = config.model.path, config.model.served_model_name
    if config.engine.kind == "sim":
        return ModelChoice("", name or wanted or SIM_MODEL_NAME)
    if wanted is None:
        return ModelChoice(find_model(_DEMO), name or DEMO_MODEL_NAME, _DEMO)
    path = Path(wanted).expanduser()
    if path.exists():
        source = str(path.resolve())
        return ModelChoice(find_model(source), name or path.resolve().name, source)
    if _is_hub_id(wanted):
        on_download(wanted)
        return ModelChoice(find_model(wanted), name or wanted, wanted)
    raise ConfigError(f"model.path: {wanted}: no such directory")


def find_model(source: str) -> str:
    """The directory on this node: of the demo model, at a path, or of a hub id, which may be downloaded.

    Raises:
        ConfigError: it is not there or can not be had; names the path.
    """
    if source == _DEMO:
        return _model_dir(DEMO_MODEL_DIR)
    if Path(source).exists():
        return _model_dir(Path(source))
    if _is_hub_id(source):
        return _download(source)
    raise ConfigError(f"model.path: {source}: no such directory")


def _is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def check_fit(config: Config, model: ModelChoice, workers: Iterable[WorkerPlan]) -> None:
    """Refuse at once what every rank of workers to be started would refuse: a model or sizes that do not go together.

    Raises:
        ConfigError: names the key.
    """
    ranks = [plan.tp_size for plan in workers]
    pools_bytes = (config.engine.kv_cache_bytes or 0) * sum(ranks)
    if config.cluster.address is None and pools_bytes > (available := _available_bytes()):
        raise ConfigError(
            f"engine.kv_cache_bytes: {sum(ranks)} ranks would take {pools_bytes} bytes; {available} are available"
        )
    if config.engine.kind == "sim":
        return
    try:
        shape = read_model_config(model.path)
        for tp_size in sorted(set(ranks)):
            check_split(shape, tp_size)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{model.path}: {error}") from error
    asked, possible = config.model.max_model_len, shape.max_position_embeddings
    if asked is not None and asked > possible:
        raise ConfigError(f"model.max_model_len: {asked} is more than the model's {possible} positions")


def number_formats(config: Config, model: ModelChoice) -> dict[str, str | None]:
    """What is computed in, and what KV and weights are stored as; {} for the simulated engine. For users to see.

    Raises:
        ValueError, OSError: the model's configuration can not be read.
    """
    if config.engine.kind == "sim":
        return {}
    dtype = read_model_config(model.path).dtype if config.model.dtype == "auto" else config.model.dtype
    kv_dtype = stored_dtype(config.engine.kv_dtype, dtype)
    return {"dtype": dtype, "kv_dtype": kv_dtype, "quantization": config.model.quantization}


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say how much memory is available")


def _model_dir(path: Path) -> str:
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: {path}: not a model directory (it has no config.json)")
    return str(path.resolve())


def _download(hub_id: str) -> str:
    try:
        from huggingface_hub import snapshot_download  # optional, and slow to import
    except ImportError:
        raise ConfigError(
            f"model.path: {hub_id}: no such directory, and downloading from the hub needs `pip install huggingface_hub`"
        ) from None
    try:
        return str(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises errors of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model.path: {hub_id}: no such directory, and the hub download failed: {reason}") from error


class Orders:
    """What every process of one server is told, under whatever launcher."""

    def __init__(self, config: Config, model: ModelChoice, secret: bytes, modules: Modules) -> None:
        self._config = config
        self._model = model
        self._secret = specs.encode_secret(secret)
        self._modules = modules

    def worker(self, plan: WorkerPlan, start: Start) -> UnitOrder:
        """One incarnation of a worker: one place per rank, the front beside rank 0."""
        ranks = [self._rank(plan, tp_rank, start) for tp_rank in range(plan.tp_size)]
        cpus = float(self._config.engine.threads_per_rank)
        gpus = 1.0 if self._config.engine.device == "cuda" else 0.0
        processes = [(ranks[0], self._front(plan, start)), *((rank,) for rank in ranks[1:])]
        places = tuple(Place(place, cpus, gpus) for place in processes)
        return UnitOrder(plan.worker_id, plan.role, places, "ready", start.worker_dir)

    def router(self, index: int, host: str, ports: tuple[int, int], status: dict[str, Any]) -> UnitOrder:
        """A router on these (HTTP, gRPC) ports of `host`; `status` is what it tells about the server."""
        router = self._config.router
        spec = specs.RouterSpec(
            router_id=f"{ROUTER}-{index}",
            secret=self._secret,
            model_dir=self._model.path,
            served_model_name=self._model.name,
            host=host,
            port=ports[0],
            grpc_port=ports[1],
            encrypt=self._config.is_encrypted,
            api_key_file=None if router.api_key_file is None else str(Path(router.api_key_file).expanduser().resolve()),
            max_concurrent_requests=router.max_concurrent_requests,
            max_body_bytes=router.max_body_bytes,
            request_timeout_s=router.request_timeout_s,
            max_attempts=router.max_attempts,
            local_prefill_max_tokens=router.local_prefill_max_tokens,
            kv_lease_s=self._config.transfer.lease_s,
            drain_s=router.drain_s,
            trace_capacity=router.trace_capacity,
            status=status,
            log_level=self._config.log_level,
        )
        name = router_name(index)
        process = ProcessOrder(name, (self._modules.router,), specs.to_json(spec), f"{name}.log")
        return UnitOrder(name, ROUTER_ROLE, (Place((process,), cpus=0.0),), "listening")

    def _front(self, plan: WorkerPlan, start: Start) -> ProcessOrder:
        spec = specs.FrontSpec(
            worker_id=plan.worker_id,
            incarnation=start.incarnation,
            role=plan.role,
            tp_size=plan.tp_size,
            worker_dir=start.worker_dir,
            secret=self._secret,
            encrypt=self._config.is_encrypted,
            log_level=self._config.log_level,
        )
        command = (self._modules.worker(plan.role), "front")
        return ProcessOrder(FRONT, command, specs.to_json(spec), f"{plan.worker_id}-front.log")

    def _rank(self, plan: WorkerPlan, tp_rank: int, start: Start) -> ProcessOrder:
        config, engine = self._config, self._config.engine
        spec = specs.RankSpec(
            worker_id=plan.worker_id,
            incarnation=start.incarnation,
            role=plan.role,
            tp_rank=tp_rank,
            tp_size=plan.tp_size,
            worker_dir=start.worker_dir,
            secret=self._secret,
            model=specs.ModelSpec(
                kind=engine.kind,
                path=self._model.path,
                dtype=config.model.dtype,
                max_model_len=config.model.max_model_len,
                load_format=config.model.load_format,
                quantization=config.model.quantization,
                sim=config.sim.model_dump() if engine.kind == "sim" else {},
            ),
            block_size=engine.block_size,
            kv_dtype=engine.kv_dtype,
            kv_cache_bytes=engine.kv_cache_bytes,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            prefill_first=engine.scheduling == "prefill_first",
            enable_prefix_caching=engine.enable_prefix_caching,
            threads=engine.threads_per_rank,
            cores=plan.cores[tp_rank],
            device="cuda" if engine.device == "cuda" else "cpu",
            prompt_attention=engine.prompt_attention,
            transports=config.kv_transports,
            credit_bytes=config.transfer.credit_bytes,
            lease_s=config.transfer.lease_s,
            log_level=config.log_level,
        )
        command = (self._modules.worker(plan.role), "rank")
        log_file = f"{plan.worker_id}-rank{tp_rank}.log"
        return ProcessOrder(f"rank {tp_rank}", command, specs.to_json(spec), log_file, engine.threads_per_rank)


def worker_start(worker_id: str, incarnation: str) -> Start:
    """The incarnation's own directory."""
    return Start(incarnation, worker_dir(worker_id, incarnation))


def router_name(index: int) -> str:
    """ "router", "router-1", ..: the first one is on the supervisor's node."""
    return ROUTER if index == 0 else f"{ROUTER}-{index}"
