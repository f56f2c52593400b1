"""Reads a model's tensors from safetensors, only the slices a rank needs. Knows names and shapes, not their meaning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.model_config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape of the full tensor."""

_HASH_PIECE_BYTES: Final = 8 * 2**20
_RACY_S: Final = 2.0
_DUMMY_STD: Final = 0.02


class WeightsMismatch(ValueError):
    """The checkpoint's tensors are not the model's; the message lists missing, unexpected and misshapen ones."""


class WeightSource(Protocol):
    """The tensors of one model."""

    def __contains__(self, name: str) -> bool:
        """Is there a tensor of this name?"""
        ...

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Part of a tensor of one or two dimensions (`columns` of a vector must be all), in the stored dtype, on CPU.

        It may be a view of the file: copy it, and keep no reference.
        """
        ...


class Checkpoint:
    """The safetensors of a model directory, mapped into memory. Holds the files open until it is collected."""

    def __init__(self, model_dir: str | Path, shapes: Shapes, optional: frozenset[str] = frozenset()) -> None:
        """Open the files and compare names and shapes with `shapes`; tensors named in `optional` may be absent.

        Raises:
            WeightsMismatch: anything missing, unexpected or misshapen, or a file that can not be read.
        """
        self._file_of: dict[str, Any] = {}
        for path in weight_files(model_dir):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsMismatch(f"{path} is not a readable safetensors file: {error}") from error
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  (safe_open is no mapping)
                if not name.endswith(".rotary_emb.inv_freq"):  # derived; old Llama checkpoints store it
                    self._file_of[name] = file
        self._check(model_dir, shapes, optional)

    def _check(self, model_dir: str | Path, shapes: Shapes, optional: frozenset[str]) -> None:
        found = self._file_of
        problems = [f"missing: {name}" for name in sorted(shapes.keys() - optional - found.keys())]
        problems += [f"unexpected: {name}" for name in sorted(found.keys() - shapes.keys())]
        for name in sorted(shapes.keys() & found.keys()):
            shape = tuple(found[name].get_slice(name).get_shape())
            if shape != shapes[name]:
                problems.append(f"shape of {name}: {list(shape)}, expected {list(shapes[name])}")
        if problems:
            more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise WeightsMismatch(
                f"the weights in {model_dir} do not fit its config.json:\n  " + "\n  ".join(problems[:20]) + more
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """See WeightSource."""
        part = self._file_of[name].get_slice(name)
        tensor: Tensor = part[rows] if columns == slice(None) else part[rows, columns]
        return tensor


class DummyWeights:
    """Random weights for benchmarks, a pure function of each tensor's name: all ranks slice the same full tensors.

    They are drawn on `device`, whose kind decides their values.
    """

    def __init__(
        self, shapes: Shapes, optional: frozenset[str] = frozenset(), device: torch.device | None = None
    ) -> None:
        self._shapes = {name: shape for name, shape in shapes.items() if name not in optional}
        self._device = device or torch.device("cpu")

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """See WeightSource. Vectors named *norm.weight are ones."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)[rows]
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        generator = torch.Generator(self._device).manual_seed(seed)
        full = torch.empty(shape, device=self._device).uniform_(
            -_DUMMY_STD * 3**0.5, _DUMMY_STD * 3**0.5, generator=generator
        )
        return full[rows] if columns == slice(None) else full[rows, columns]


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a model directory, sorted: those of its index, or model.safetensors.

    Raises:
        WeightsMismatch: there are none, or the index is malformed or names a file elsewhere.
    """
    directory = Path(model_dir)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsMismatch(f"{index} has no usable weight_map") from error
        strange = sorted(str(name) for name in names if Path(str(name)).name != name)
        if strange:
            raise WeightsMismatch(f"{index} names files outside its directory: {strange}")
        return sorted(directory / name for name in names)
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    raise WeightsMismatch(f"{directory} has neither model.safetensors nor model.safetensors.index.json")


def fingerprint(model_dir: str | Path, config: ModelConfig, dtype: str, load_format: str = "auto") -> str:
    """Hex digest of what determines the KV of a prompt: config, computing dtype and the bytes of the weights.

    Hashing a weight file reads all of it once; its digest is then cached under $XDG_CACHE_HOME/baton by the file's
    identity (path, size, mtime, ctime, inode). eos ids are left out: they end sequences, they do not change KV.
    """
    digest = hashlib.blake2b(digest_size=16)
    identity = dataclasses.replace(config, eos_token_ids=(), dtype=dtype)
    digest.update(json.dumps(dataclasses.asdict(identity), sort_keys=True).encode())
    if load_format == "dummy":
        digest.update(b"dummy")
    else:
        for path in weight_files(model_dir):
            digest.update(f"{path.name}={_file_digest(path)};".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    """xxh3-128 of a file, from the cache when the same file was hashed before."""
    stat = path.stat()
    identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
    key = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    cached = _cache_dir() / key
    try:
        digest = cached.read_text("ascii")
        if len(digest) == 32 and int(digest, 16) >= 0:
            return digest
    except (OSError, ValueError):
        pass  # absent, unreadable or damaged: hash again
    digest = _hash_file(path)
    # A file that changed this recently may change again without its timestamps moving (git calls it racily clean).
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _RACY_S * 1e9:
        _store(cached, digest)
    return digest


def _hash_file(path: Path) -> str:
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASH_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return str(state.hexdigest())


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "weights"


def _store(path: Path, digest: str) -> None:
    """Write one cache entry atomically. A cache that can not be written costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(digest)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        pass
