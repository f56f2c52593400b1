"""The configuration: one frozen tree, read from YAML and `--set key=value`. Every default is written here.

pydantic checks it because untrusted text enters here; processes get plain dataclasses (baton.specs) made from it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"
DEMO_MODEL_NAME = "baton-demo"

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=0, le=1024)]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def _num_bytes(value: object) -> object:
    """A size as people write it, as a number; what is no text is for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,6})?\s*([A-Za-z]*)", value.strip())
    if match is None or (unit := match[3].upper()) not in _UNITS or (match[2] and not unit):
        raise ValueError(f"{value[:40]!r} is not a size such as 1073741824, 512MiB, 1GiB or 2GB")
    return int(match[1]) * _UNITS[unit] + int(float(match[2] or 0) * _UNITS[unit])


Bytes = Annotated[int, BeforeValidator(_num_bytes)]
"""Accepts 1073741824, 1GiB (powers of 1,024) and 2GB (of 1,000)."""


class ConfigError(ValueError):
    """A configuration that can not be used; the message names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(_Section):
    """Which model, as what."""

    path: str | None = None  # a Hugging Face directory or hub id; None: the embedded demo model
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: Literal["int8", "fp8"] | None = None  # of weights: int8 on the CPU, fp8 on CUDA


class EngineSection(_Section):
    """One replica. Sizes are per worker (all its ranks together compute one batch)."""

    kind: Literal["native", "sim"] = "native"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_size: int = Field(default=16, ge=16, le=256, multiple_of=16)
    kv_dtype: Literal["auto", "fp8"] = "auto"  # auto: as the model; fp8: e4m3, one byte, on CUDA only
    # per rank; None: 64 x max_model_len tokens, at most 1 GiB
    kv_cache_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    max_num_seqs: int = Field(default=256, ge=1, le=4096)
    max_num_batched_tokens: int = Field(default=512, ge=16, le=65536)
    scheduling: Literal["decode_first", "prefill_first"] = "decode_first"  # who goes first into a step's token budget
    enable_prefix_caching: bool = True
    prompt_attention: Literal["auto", "flash", "triton"] = "auto"  # on CUDA: who attends where no KV is before a prompt
    threads_per_rank: int = Field(default=1, ge=1, le=256)


class SimSection(_Section):
    """The simulated engine's cost model and shape."""

    prefill_s_per_token: float = Field(default=2e-5, ge=0)
    decode_s_per_step: float = Field(default=2e-3, ge=0)
    decode_s_per_seq: float = Field(default=5e-5, ge=0)
    vocab_size: int = Field(default=512, ge=2)
    verify_all: bool = True


class TopologySection(_Section):
    """How many workers of which role."""

    prefill: Count = 1
    decode: Count = 1
    mixed: Count = 0
    routers: int = Field(default=1, ge=1, le=64)  # in a Ray cluster each on a node of its own; else port, port + 1, ..
    tp: int = Field(default=1, ge=1, le=64)  # of decode and mixed workers
    prefill_tp: int | None = Field(default=None, ge=1, le=64)  # None: as tp

    @model_validator(mode="after")
    def _somebody_decodes(self) -> TopologySection:
        if self.decode + self.mixed == 0:
            raise ValueError("no worker would decode: --decode or --mixed must be at least 1")
        return self


class TransferSection(_Section):
    """KV between workers."""

    transports: tuple[Literal["shm", "nixl", "cuda_ipc", "tcp"], ...] = ("shm", "tcp")  # in order of preference
    credit_bytes: Bytes = Field(default=128 * 2**20, ge=2**16)
    lease_s: float = Field(default=10.0, gt=0.1, le=3600)

    @model_validator(mode="after")
    def _tcp_is_the_fallback(self) -> TransferSection:
        if not self.transports:
            raise ValueError("transports must name at least one of shm, nixl, cuda_ipc, tcp")
        if "cuda_ipc" in self.transports and len(self.transports) > 1:
            raise ValueError(
                "transports: cuda_ipc alone reads a KV pool on a device, and reads no other; leave the rest out"
            )
        return self


class RouterSection(_Section):
    """The front doors."""

    host: str = "127.0.0.1"  # "node": the address of the router's node in the Ray cluster
    port: Port = 8000
    grpc_port: Port = 50051
    api_key_file: str | None = None
    max_concurrent_requests: int = Field(default=1024, ge=1)
    max_body_bytes: Bytes = Field(default=8 * 2**20, ge=1024)
    request_timeout_s: float = Field(default=600.0, gt=0)
    drain_s: float = Field(default=1.0, ge=0, le=3600)  # on stop, what runs may end by itself for so long
    max_attempts: int = Field(default=3, ge=1, le=10)
    local_prefill_max_tokens: int = Field(default=0, ge=0)  # uncached prompts up to this long skip the prefill worker
    trace_capacity: int = Field(default=1000, ge=1)  # finished requests that `baton trace` can show


class ClusterSection(_Section):
    """Where processes run."""

    launcher: Literal["ray", "local"] = "ray"
    address: str | None = None  # an existing Ray cluster ("auto" or host:port); None: an embedded one
    startup_timeout_s: float = Field(default=120.0, gt=0)
    stop_grace_s: float = Field(default=5.0, gt=0)
    secret_file: str | None = None
    encryption: Literal["none", "tls"] = "none"  # of all that crosses between workers, and between them and routers


class Config(_Section):
    """Everything that `baton serve` can be told."""

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    sim: SimSection = SimSection()
    topology: TopologySection = TopologySection()
    transfer: TransferSection = TransferSection()
    router: RouterSection = RouterSection()
    cluster: ClusterSection = ClusterSection()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def is_encrypted(self) -> bool:
        """Do processes of the cluster speak TLS with each other?"""
        return self.cluster.encryption == "tls"

    @property
    def kv_transports(self) -> tuple[str, ...]:
        """How KV may travel, in order of preference, as kvtransfer names it. Out of a device's pool only cuda_ipc does."""
        if self.engine.device == "cuda":
            return ("cuda_ipc",)
        return tuple("tcp+tls" if name == "tcp" and self.is_encrypted else name for name in self.transfer.transports)

    @model_validator(mode="after")
    def _supported(self) -> Config:
        if self.engine.device == "cuda":
            self._check_cuda()
        elif self.engine.kv_dtype == "fp8":
            raise ValueError("engine.kv_dtype: fp8 is computed on a GPU only; leave it out, or add --device cuda")
        elif self.model.quantization == "fp8":
            raise ValueError("model.quantization: fp8 is computed on a GPU only; take int8, or add --device cuda")
        if self.model.quantization is not None and self.engine.kind == "sim":
            raise ValueError("model.quantization: the simulated engine has no weights to quantize")
        if self.engine.prompt_attention != "auto" and self.engine.device != "cuda":
            raise ValueError(
                "engine.prompt_attention: there is a choice on CUDA only; leave it out, or add --device cuda"
            )
        if "cuda_ipc" in self.transfer.transports and (self.engine.device == "cpu" or self.engine.kind == "sim"):
            raise ValueError("transfer.transports: cuda_ipc needs an engine whose KV pool is on a CUDA device")
        if self.is_encrypted and "nixl" in self.transfer.transports:
            raise ValueError(
                "transfer.transports: nixl does not encrypt; leave it out, or set cluster.encryption: none"
            )
        if self.cluster.address is not None and self.cluster.launcher != "ray":
            raise ValueError("cluster.address needs cluster.launcher: ray")
        if self.router.host == "node" and self.cluster.address is None:
            raise ValueError("router.host: node needs cluster.address; without a Ray cluster, name an address")
        return self

    def _check_cuda(self) -> None:
        """Whether a device is there, only the process that computes can say."""
        if self.engine.kind == "sim":
            raise ValueError("engine.device: the simulated engine has no device; leave cuda out")
        if self.model.quantization == "int8":
            raise ValueError("model.quantization: int8 is computed on the CPU only, not on cuda; cuda has fp8")
        if "transports" in self.transfer.model_fields_set and self.transfer.transports != ("cuda_ipc",):
            raise ValueError("transfer.transports: out of a CUDA device KV travels by cuda_ipc alone")
        is_float32 = self.model.dtype == "float32"
        if self.model.quantization == "fp8" and is_float32:
            raise ValueError("model.quantization: fp8 goes with model.dtype bfloat16, not float32")
        if self.engine.prompt_attention == "flash" and (is_float32 or self.engine.kv_dtype == "fp8"):
            what = "model.dtype float32" if is_float32 else "engine.kv_dtype fp8"
            raise ValueError(f"engine.prompt_attention: flash does not compute with {what}; take auto or triton")


def load_config(path: str | None = None, settings: dict[str, Any] | None = None) -> Config:
    """The defaults, overlaid by a YAML file, overlaid by dotted settings ("engine.block_size" -> value).

    String values of settings are read as YAML scalars.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown, a value is out of range. Names the key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"{path}: not a mapping")
        tree = loaded or {}
    for key, value in (settings or {}).items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {section} is not a section")
            node = child
        try:
            node[leaf] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} is not a YAML value") from error
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: no such key{_similar(where)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {message}" if where else message) from error


def _similar(wrong: str) -> str:
    """What may have been meant, as the end of a sentence: the key in its own section, or one nearly of this name."""
    keys = list(Config.model_fields)
    for name, field in Config.model_fields.items():
        if isinstance(field.default, _Section):
            keys += [f"{name}.{key}" for key in type(field.default).model_fields]
    section, _, leaf = wrong.rpartition(".")
    found = [key for key in keys if key.endswith(f".{leaf}")]
    if not found:  # within a section its name is no likeness
        near = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
        found = [near[name] for name in difflib.get_close_matches(leaf, near, 1)]
    return f"; did you mean {found[0]}" if found else ""
