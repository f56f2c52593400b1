"""The shared vocabulary to and from the internal protocol's messages."""

from __future__ import annotations

from baton.request import AttemptId, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from protos import worker_pb2 as pb


def event_from_proto(token: pb.Token) -> TokenEvent:
    """Raises ValueError for a finish reason that does not exist or uneven logprobs."""
    logprobs = None
    if token.HasField("logprobs"):
        wire = token.logprobs
        top = tuple(zip(wire.top_token_ids, wire.top_logprobs, strict=True))
        logprobs = TokenLogprobs(wire.logprob, wire.rank, top)
    return TokenEvent(
        AttemptId(token.attempt_id),
        token.index,
        token.token_id,
        logprobs,
        FinishReason(token.finish_reason) if token.finish_reason else None,
        token.num_cached_tokens,
    )


def sampling_to_proto(sampling: SamplingParams) -> pb.Sampling:
    """What a worker needs to choose tokens."""
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        sample_index=sampling.sample_index,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logit_bias=dict(sampling.logit_bias),
        num_logprobs=sampling.num_logprobs,
    )
