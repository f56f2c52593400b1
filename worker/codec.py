"""Requests and events as msgpack-ready values, and as messages of protos/worker.proto. Both directions, nothing else."""

from __future__ import annotations

from typing import Any

from baton.request import (
    AttemptId,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from kvtransfer.api import PeerRank, PeerWorker
from protos import worker_pb2 as pb

_SAMPLING_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "sample_index",
    "ignore_eos",
)


def pack_request(request: GenerateRequest) -> list[Any]:
    """For `unpack_request` in another process of the cluster."""
    sampling = request.sampling
    return [
        request.attempt_id,
        list(request.token_ids),
        request.num_prompt_tokens,
        [getattr(sampling, name) for name in _SAMPLING_FIELDS],
        list(sampling.stop_token_ids),
        list(sampling.logit_bias.items()),
        sampling.num_logprobs,
        request.tenant,
        request.cache_salt,
        request.priority,
        request.deadline_s,
    ]


def unpack_request(packed: list[Any]) -> GenerateRequest:
    """Raises ValueError or TypeError for anything that `pack_request` did not make."""
    attempt, tokens, num_prompt, values, stops, bias, num_logprobs, tenant, salt, priority, deadline = packed
    return GenerateRequest(
        attempt_id=AttemptId(attempt),
        token_ids=tuple(tokens),
        num_prompt_tokens=num_prompt,
        sampling=SamplingParams(
            **dict(zip(_SAMPLING_FIELDS, values, strict=True)),
            stop_token_ids=tuple(stops),
            logit_bias=dict(bias),
            num_logprobs=num_logprobs,
        ),
        tenant=tenant,
        cache_salt=salt,
        priority=priority,
        deadline_s=deadline,
    )


def request_from_proto(start: pb.StartAttempt) -> GenerateRequest:
    """The router's message as the engine's request."""
    sampling = start.sampling
    return GenerateRequest(
        attempt_id=AttemptId(start.attempt_id),
        token_ids=tuple(start.token_ids),
        num_prompt_tokens=start.num_prompt_tokens,
        sampling=SamplingParams(
            **{name: getattr(sampling, name) for name in _SAMPLING_FIELDS},
            stop_token_ids=tuple(sampling.stop_token_ids),
            logit_bias=dict(sampling.logit_bias),
            num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
        ),
        tenant=start.tenant,
        cache_salt=start.cache_salt,
        priority=start.priority,
        deadline_s=start.deadline_s if start.HasField("deadline_s") else None,
    )


def pack_peer(peer: PeerWorker) -> list[Any]:
    """For `unpack_peer`."""
    ranks = [[rank.tp_rank, rank.host, rank.port, rank.unix_path] for rank in peer.ranks]
    return [peer.worker_id, peer.incarnation, ranks]


def unpack_peer(packed: list[Any]) -> PeerWorker:
    """Back from `pack_peer`."""
    worker_id, incarnation, ranks = packed
    return PeerWorker(worker_id, incarnation, tuple(PeerRank(*rank) for rank in ranks))


def peer_from_proto(peer: pb.DecodePeer) -> PeerWorker:
    """The router's message as the transfer layer's peer."""
    return PeerWorker(
        peer.worker_id,
        peer.incarnation,
        tuple(PeerRank(rank.tp_rank, rank.host, rank.port, rank.unix_path) for rank in peer.ranks),
    )


def pack_token(event: TokenEvent) -> list[Any]:
    """For `unpack_token` (the manifest of a transfer) and `token_to_proto` (the front)."""
    logprobs = event.logprobs
    return [
        event.attempt_id,
        event.index,
        event.token_id,
        event.finish_reason or "",
        None if logprobs is None else [logprobs.logprob, logprobs.rank, [list(pair) for pair in logprobs.top]],
        event.num_cached_tokens,
    ]


def unpack_token(packed: list[Any]) -> TokenEvent:
    """Back from `pack_token`."""
    attempt, index, token_id, finish, logprobs, num_cached = packed
    return TokenEvent(
        attempt_id=AttemptId(attempt),
        index=index,
        token_id=token_id,
        logprobs=None
        if logprobs is None
        else TokenLogprobs(logprobs[0], logprobs[1], tuple((i, p) for i, p in logprobs[2])),
        finish_reason=FinishReason(finish) if finish else None,
        num_cached_tokens=num_cached,
    )


def token_to_proto(packed: list[Any]) -> pb.Token:
    """A token that `pack_token` packed, as the router reads it."""
    attempt, index, token_id, finish, logprobs, num_cached = packed
    token = pb.Token(
        attempt_id=attempt, index=index, token_id=token_id, finish_reason=finish, num_cached_tokens=num_cached
    )
    if logprobs is not None:
        token.logprobs.logprob, token.logprobs.rank = logprobs[0], logprobs[1]
        token.logprobs.top_token_ids.extend(pair[0] for pair in logprobs[2])
        token.logprobs.top_logprobs.extend(pair[1] for pair in logprobs[2])
    return token
