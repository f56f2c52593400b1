"""What each kind of process is told at its start, as plain dataclasses that travel as JSON (baton.process)."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a rank loads. `kind` is "native" or "sim"; `sim` holds the SimSection's fields then."""

    kind: str = "native"
    path: str = ""
    dtype: str = "auto"
    max_model_len: int | None = None
    load_format: str = "auto"
    quantization: str | None = None
    sim: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank process of a worker."""

    worker_id: str
    incarnation: str
    role: str
    tp_rank: int
    tp_size: int
    worker_dir: str
    """Private (0700) directory of this start of this worker, on this host: Unix sockets only."""
    secret: str
    """Base64."""
    model: ModelSpec
    host: str = "127.0.0.1"
    """Address that this rank's data socket binds and advertises."""
    block_size: int = 16
    kv_dtype: str = "auto"
    """auto (the model's) or fp8."""
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    prefill_first: bool = False
    enable_prefix_caching: bool = True
    threads: int = 1
    cores: tuple[int, ...] = ()
    device: str = "cpu"
    """cpu or cuda."""
    prompt_attention: str = "auto"
    """auto, flash or triton."""
    transports: tuple[str, ...] = ("shm", "tcp")
    credit_bytes: int = 128 * 2**20
    lease_s: float = 10.0
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class FrontSpec:
    """The front process of a worker."""

    worker_id: str
    incarnation: str
    role: str
    tp_size: int
    worker_dir: str
    secret: str
    host: str = "127.0.0.1"
    port: int = 0
    encrypt: bool = False
    heartbeat_s: float = 0.5
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router process. The fleet comes later, as {"event": "fleet", "workers": [{"worker_id", "address"}]} lines."""

    router_id: str
    secret: str
    model_dir: str
    """Directory with tokenizer.json, tokenizer_config.json, config.json; "" for the simulated engine's byte tokenizer."""
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    api_key_file: str | None = None
    encrypt: bool = False
    """Speak TLS with workers."""
    max_concurrent_requests: int = 1024
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 600.0
    drain_s: float = 1.0
    max_attempts: int = 3
    local_prefill_max_tokens: int = 0
    kv_lease_s: float = 10.0
    """The lease of KV transfers between workers."""
    trace_capacity: int = 1000
    status: dict[str, Any] = field(default_factory=dict)
    """Static facts for `baton status` (launcher, topology)."""
    log_level: str = "info"


def to_json(spec: object) -> dict[str, Any]:
    """A spec as a JSON-ready mapping."""
    return asdict(cast(Any, spec))


def from_json(cls: type[T], data: dict[str, Any]) -> T:
    """A spec from `to_json`'s mapping; unknown keys are an error."""
    known = {item.name for item in fields(cast(Any, cls))}
    unknown = set(data) - known
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown keys {sorted(unknown)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if cls is RankSpec:
        values["model"] = from_json(ModelSpec, values["model"])
    return cls(**values)


def encode_secret(secret: bytes) -> str:
    """As it stands in a spec."""
    return base64.b64encode(secret).decode()


def decode_secret(text: str) -> bytes:
    """Back to bytes."""
    return base64.b64decode(text, validate=True)
