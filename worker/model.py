"""What a rank computes with: a native model or the simulated one, as the spec says."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kv_layout import KVGeometry, KVLayout, ModelKV
from baton.specs import RankSpec
from engine.types import Runner

_DEFAULT_POOL_BYTES = 2**30
_DEFAULT_POOL_CONTEXTS = 64


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and the facts about its model that scheduling needs."""

    runner: Runner
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


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
