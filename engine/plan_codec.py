"""Step plans as bytes, for the way from a leader rank to its followers. msgpack arrays, no names, no pickle."""

from __future__ import annotations

from typing import Any

import msgpack

from baton.request import AttemptId, SamplingParams
from engine.types import BatchEntry, SampleSpec, StepPlan

_DEFAULT_PARAMS = SamplingParams()


def encode_plan(plan: StepPlan, *, for_followers: bool = False) -> bytes:
    """`plan` as bytes; `decode_plan` gives an equal one (its sequences as tuples).

    With `for_followers` of each SampleSpec only its presence and position are kept: followers do not sample.
    """
    entries = [_pack_entry(entry, for_followers) for entry in plan.entries]
    packed: bytes = msgpack.packb((plan.step_id, entries))
    return packed


def decode_plan(data: bytes) -> StepPlan:
    """The plan that `encode_plan` encoded; `data` is from a rank of the same replica, so of the same version."""
    step_id, entries = msgpack.unpackb(data, use_list=False, strict_map_key=False)
    return StepPlan(step_id, tuple(_unpack_entry(entry) for entry in entries))


def _pack_entry(entry: BatchEntry, for_followers: bool) -> tuple[Any, ...]:
    sample: tuple[Any, ...] | None = None
    if entry.sample is not None:
        sample = (entry.sample.position,) if for_followers else _pack_sample(entry.sample)
    return (
        entry.attempt_id,
        entry.start,
        tuple(entry.token_ids),
        tuple(entry.block_table),
        sample,
        entry.tenant,
        entry.salt,
    )


def _unpack_entry(packed: tuple[Any, ...]) -> BatchEntry:
    attempt, start, token_ids, block_table, sample, tenant, salt = packed
    spec = None if sample is None else _unpack_sample(sample)
    return BatchEntry(AttemptId(attempt), start, token_ids, block_table, spec, tenant, salt)


def _pack_sample(spec: SampleSpec) -> tuple[Any, ...]:
    params = spec.params
    return (
        spec.position,
        tuple(spec.prompt_token_ids),
        tuple(spec.output_token_ids),
        tuple(spec.banned_token_ids),
        (
            params.max_tokens,
            params.min_tokens,
            params.temperature,
            params.top_p,
            params.top_k,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            params.seed,
            params.sample_index,
            tuple(params.stop_token_ids),
            params.ignore_eos,
            dict(params.logit_bias),
            params.num_logprobs,
        ),
    )


def _unpack_sample(packed: tuple[Any, ...]) -> SampleSpec:
    if len(packed) == 1:
        return SampleSpec(_DEFAULT_PARAMS, packed[0])
    position, prompt, output, banned, params = packed
    return SampleSpec(SamplingParams(*params), position, prompt, output, banned)
