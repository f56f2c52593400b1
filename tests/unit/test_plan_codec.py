"""decode(encode(plan)) == plan, for any plan."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.request import AttemptId, SamplingParams
from engine.plan_codec import decode_plan, encode_plan
from engine.types import BatchEntry, SampleSpec, StepPlan

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
floats = st.floats(allow_nan=False)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 2**40),
    min_tokens=st.integers(0, 2**40),
    temperature=floats,
    top_p=floats,
    top_k=st.integers(-1, 2**31),
    min_p=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    repetition_penalty=floats,
    seed=st.integers(-(2**63), 2**64 - 1),
    sample_index=st.integers(0, 128),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(st.integers(0, 2**31), floats, max_size=4),
    num_logprobs=st.none() | st.integers(0, 20),
)
samples = st.builds(
    SampleSpec,
    params=params,
    position=st.integers(0, 2**31),
    prompt_token_ids=token_ids,
    output_token_ids=token_ids,
    banned_token_ids=token_ids,
)
entries = st.builds(
    BatchEntry,
    attempt_id=st.text(max_size=12).map(AttemptId),
    start=st.integers(0, 2**31),
    token_ids=token_ids,
    block_table=token_ids,
    sample=st.none() | samples,
    tenant=st.text(max_size=8),
    salt=st.text(max_size=8),
)
plans = st.builds(StepPlan, step_id=st.integers(0, 2**63), entries=st.lists(entries, max_size=4).map(tuple))


@settings(max_examples=150, deadline=None)
@given(plans)
def test_a_decoded_plan_equals_the_encoded_one(plan: StepPlan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


@settings(max_examples=50, deadline=None)
@given(plans)
def test_followers_get_everything_but_how_to_sample(plan: StepPlan) -> None:
    decoded = decode_plan(encode_plan(plan, for_followers=True))
    assert decoded.step_id == plan.step_id
    for ours, theirs in zip(decoded.entries, plan.entries, strict=True):
        position = None if theirs.sample is None else theirs.sample.position
        assert (None if ours.sample is None else ours.sample.position) == position
        assert (ours.attempt_id, ours.start, ours.token_ids, ours.block_table, ours.tenant, ours.salt) == (
            theirs.attempt_id,
            theirs.start,
            theirs.token_ids,
            theirs.block_table,
            theirs.tenant,
            theirs.salt,
        )
