"""What a rank computes with: a native model or the simulated one, as the spec says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from baton.kv_layout import KVGeometry, KVLayout, LayerSpec, ModelKV, stored_dtype
from baton.specs import RankSpec
from engine.types import OverlappingRunner, Runner

if TYPE_CHECKING:
    from engine.comm import Comm  # brings torch, which the simulated engine does without

_DEFAULT_POOL_BYTES = 2**30
_DEFAULT_POOL_CONTEXTS = 64


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and the facts about its model that scheduling needs."""

    runner: Runner
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    overlapping: OverlappingRunner | None = None
    """The runner, as one whose steps overlap; None where they do not."""


def num_blocks(spec: RankSpec, model: ModelKV, max_model_len: int) -> int:
    """How many blocks fit: in kv_cache_bytes, or by default 64 full contexts but at most 1 GiB per rank.

    Raises:
        ValueError: the pool could not hold one sequence of max_model_len tokens.
    """
    one = KVLayout(model, KVGeometry(spec.tp_size, spec.block_size, 1), spec.tp_rank).bytes_per_block
    blocks_per_context = -(-max_model_len // spec.block_size)
    if spec.kv_cache_bytes is not None:
        count = spec.kv_cache_bytes // one
    else:
        count = min(_DEFAULT_POOL_CONTEXTS * blocks_per_context, _DEFAULT_POOL_BYTES // one)
    if count < blocks_per_context + 1:
        raise ValueError(
            f"engine.kv_cache_bytes gives {count} blocks of {spec.block_size} tokens ({one} bytes each), but one sequence "
            f"of {max_model_len} tokens needs {blocks_per_context + 1}; raise it or lower --max-model-len"
        )
    return count


def load_model(spec: RankSpec) -> LoadedModel:
    """Load this rank's part of the model and take its KV pool. Collective over the worker's ranks.

    Raises:
        ValueError: the model, the dtype or a size can not be used; the message says which and why.
        OSError: files are missing.
    """
    return _load_sim(spec) if spec.model.kind == "sim" else _load_native(spec)


def _load_native(spec: RankSpec) -> LoadedModel:
    from engine.model_config import read_model_config
    from engine.native import NativeRunner

    config = read_model_config(spec.model.path)
    device = _device(spec)
    dtype = config.dtype if spec.model.dtype == "auto" else spec.model.dtype
    max_model_len = _context(spec.model.max_model_len, config.max_position_embeddings)
    layers = (LayerSpec(config.num_kv_heads, config.head_dim),) * config.num_layers
    runner = NativeRunner(
        spec.model.path,
        dtype=dtype,
        comm=_open_comm(spec, device),
        block_size=spec.block_size,
        num_blocks=num_blocks(spec, ModelKV(layers, stored_dtype(spec.kv_dtype, dtype), ""), max_model_len),
        kv_dtype=spec.kv_dtype,
        load_format=spec.model.load_format,
        num_threads=spec.threads,
        cores=spec.cores,
        quantization=spec.model.quantization,
        device=device,
        max_num_seqs=spec.max_num_seqs,
        prompt_attention=spec.prompt_attention,
    )
    return LoadedModel(runner, max_model_len, config.vocab_size, config.eos_token_ids, runner.overlapping)


def _device(spec: RankSpec) -> str:
    """cpu, or one of the GPUs that this process sees: a launcher that places ranks shows each its own."""
    if spec.device == "cpu":
        return "cpu"
    import torch

    return f"cuda:{spec.tp_rank % max(1, torch.cuda.device_count())}"


def _open_comm(spec: RankSpec, device: str) -> Comm:
    from engine.comm import ShmComm, SingleComm

    if spec.tp_size == 1:
        return SingleComm()
    comm = ShmComm(f"{spec.worker_dir}/tp.sock", rank=spec.tp_rank, size=spec.tp_size)
    if device == "cpu":
        return comm
    from engine.cuda.comm import nccl_comm

    return nccl_comm(comm, Path(spec.worker_dir) / "nccl", device)


def _context(asked: int | None, possible: int) -> int:
    if asked is not None and asked > possible:
        raise ValueError(f"--max-model-len {asked} is more than the model's {possible} positions")
    return asked or possible


_SIM_CONTEXT = 4096


def _load_sim(spec: RankSpec) -> LoadedModel:
    from engine.sim import CostModel, SimRunner, sim_model

    settings = dict(spec.model.sim)
    vocab_size, verify_all = settings.pop("vocab_size"), settings.pop("verify_all")
    model = sim_model()
    max_model_len = _context(spec.model.max_model_len, _SIM_CONTEXT)
    geometry = KVGeometry(spec.tp_size, spec.block_size, num_blocks(spec, model, max_model_len))
    layout = KVLayout(model, geometry, spec.tp_rank)
    runner = SimRunner(layout, vocab_size, cost=CostModel(**settings), verify_all=verify_all)
    return LoadedModel(runner, max_model_len, vocab_size, ())
