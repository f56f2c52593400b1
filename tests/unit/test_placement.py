"""Where attempts go."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError, Unavailable
from router.placement import Group, KVPath, Placement, PrefixMemory, WorkerKey, WorkerView, place, redirect


def view(name: str, role: str = "", **fields: Any) -> WorkerView:
    roles = {"p": "prefill", "d": "decode", "m": "mixed"}
    base = WorkerView(
        key=WorkerKey(name, "1"),
        role=role or roles[name[0]],
        fingerprint="f",
        kv_dtype="float32",
        block_size=16,
        num_blocks=100,
        max_num_seqs=8,
        is_draining=False,
        num_waiting_tokens=0,
        num_seqs=0,
        num_free_blocks=100,
    )
    return dataclasses.replace(base, **fields)


def names(placement: Placement | None) -> tuple[str | None, str] | None:
    if placement is None:
        return None
    return placement.prefill and placement.prefill.worker_id, placement.decode.worker_id


def test_a_prefill_and_a_decode_worker_are_paired() -> None:
    assert names(place([view("p0"), view("d0")], 100)) == ("p0", "d0")


def test_the_shorter_prefill_queue_wins() -> None:
    fleet = [view("p0", num_waiting_tokens=500), view("p1", num_waiting_tokens=20), view("d0")]
    assert names(place(fleet, 100)) == ("p1", "d0")


def test_a_cached_prefix_outweighs_a_queue_of_its_length_and_no_longer_one() -> None:
    cached = {WorkerKey("p0", "1"): 80}
    assert names(place([view("p0", num_waiting_tokens=79), view("p1"), view("d0")], 100, cached_tokens=cached)) == (
        "p0",
        "d0",
    )
    assert names(place([view("p0", num_waiting_tokens=81), view("p1"), view("d0")], 100, cached_tokens=cached)) == (
        "p1",
        "d0",
    )


def test_idle_workers_take_turns() -> None:
    fleet = [view("p0"), view("d0", num_routed=3), view("d1", num_routed=2)]
    assert names(place(fleet, 100)) == ("p0", "d1")


def test_decode_goes_where_the_kv_fits_then_to_the_emptiest() -> None:
    full, half, crowded = (
        view("d0", num_free_blocks=6),
        view("d1", num_free_blocks=50),
        view("d2", num_free_blocks=60, num_seqs=4),
    )
    assert names(place([view("p0"), full, half, crowded], 100)) == ("p0", "d1")
    assert names(place([view("p0"), full], 100)) == ("p0", "d0"), "a full one is better than none"


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    assert names(place([view("d0")], 100)) == (None, "d0")
    assert names(place([view("d0"), view("p0", is_draining=True)], 100)) == (None, "d0")


def test_without_decode_workers_a_prefill_worker_does_both() -> None:
    assert names(place([view("p0")], 100)) == (None, "p0")


def test_nobody_is_nobody() -> None:
    assert place([], 100) is None
    assert place([view("d0", is_draining=True)], 100) is None


def test_short_and_mostly_cached_prompts_stay_on_the_decode_worker() -> None:
    fleet = [view("p0"), view("d0")]
    assert names(place(fleet, 32, local_prefill_max_tokens=32)) == (None, "d0")
    assert names(place(fleet, 33, local_prefill_max_tokens=32)) == ("p0", "d0")
    cached = {WorkerKey("d0", "1"): 96}
    assert names(place(fleet, 100, cached_tokens=cached, local_prefill_max_tokens=32)) == (None, "d0")


def test_kv_goes_only_between_workers_of_one_group() -> None:
    fleet = [view("p0"), view("d0", fingerprint="g"), view("d1", kv_dtype="bfloat16", num_free_blocks=90)]
    assert names(place(fleet, 100)) == (None, "d0")
    assert names(place([*fleet, view("d2", num_free_blocks=10)], 100)) == ("p0", "d2")


def test_a_request_stays_with_the_model_and_the_kv_that_began_it() -> None:
    fleet = [view("p0", fingerprint="g"), view("d0"), view("d1", fingerprint="g"), view("d2", kv_dtype="fp8")]
    assert names(place(fleet, 100, group=Group("g", "float32"))) == ("p0", "d1")
    assert names(place(fleet, 100, group=Group("f", "fp8"))) == (None, "d2")
    assert place(fleet, 100, group=Group("h", "float32")) is None
    assert place(fleet, 100, group=Group("g", "fp8")) is None


def test_a_mixed_worker_keeps_what_it_prefilled_unless_another_is_much_emptier() -> None:
    assert names(place([view("m0"), view("m1", num_routed=1)], 100)) == (None, "m0")
    crowded = view("m0", num_free_blocks=20, num_routed=0)
    idle = view("m1", num_waiting_tokens=1000)
    assert names(place([crowded, idle], 100)) == ("m0", "m1")


def test_avoided_workers_are_used_only_where_nobody_else_is_left() -> None:
    p0, p1, d0, d1 = view("p0"), view("p1"), view("d0"), view("d1")
    assert names(place([p0, p1, d0, d1], 100, avoid={p0.key, d0.key})) == ("p1", "d1")
    assert names(place([p0, d0], 100, avoid={d0.key})) == ("p0", "d0")
    assert names(place([p0, d0], 100, avoid={p0.key, d0.key})) == (None, "d0"), "without the transfer that failed"
    assert names(place([p0], 100, avoid={p0.key})) == (None, "p0")


def paths(*pairs: tuple[str, str]) -> set[KVPath]:
    return {KVPath(WorkerKey(prefill, "1"), WorkerKey(decode, "1")) for prefill, decode in pairs}


def test_a_broken_path_is_gone_around() -> None:
    p0, p1, d0, d1 = view("p0"), view("p1", num_waiting_tokens=500), view("d0"), view("d1", num_free_blocks=50)
    fleet = [p0, p1, d0, d1]
    assert names(place(fleet, 100)) == ("p0", "d0")
    assert names(place(fleet, 100, broken=paths(("p0", "d0")))) == ("p0", "d1")
    assert names(place(fleet, 100, broken=paths(("p0", "d0"), ("p0", "d1")))) == ("p1", "d0"), "p0 reaches nobody"
    assert names(place(fleet, 100, broken=paths(("p0", "d0"), ("p0", "d1"), ("p1", "d0")))) == ("p1", "d1")


def test_where_every_path_is_broken_the_decode_worker_prefills() -> None:
    assert names(place([view("p0"), view("d0")], 100, broken=paths(("p0", "d0")))) == (None, "d0")


def test_a_mixed_worker_that_reaches_nobody_keeps_what_it_prefills() -> None:
    full, idle = view("m0", num_free_blocks=0), view("m1", num_waiting_tokens=1000)
    assert names(place([full, idle], 100)) == ("m0", "m1")
    assert names(place([view("m0"), view("d0", num_free_blocks=0)], 100, broken=paths(("m0", "d0")))) == (None, "m0")


def test_an_open_path_to_a_full_worker_is_not_worth_a_shorter_queue() -> None:
    p0, p1, d0, d1 = view("p0"), view("p1", num_waiting_tokens=500), view("d0", num_free_blocks=0), view("d1")
    assert names(place([p0, p1, d0, d1], 100, broken=paths(("p0", "d1")))) == ("p1", "d1")


def test_an_avoided_worker_is_not_used_because_the_path_to_it_is_open() -> None:
    fleet = [view("p0"), view("d0"), view("d1")]
    assert names(place(fleet, 100, avoid={WorkerKey("d1", "1")}, broken=paths(("p0", "d0")))) == (None, "d0")


def test_refused_kv_goes_to_the_emptiest_that_has_not_refused() -> None:
    p0, d0, d1, d2 = view("p0"), view("d0"), view("d1", num_free_blocks=5), view("d2", num_free_blocks=9)
    fleet = [p0, d0, d1, d2]
    assert redirect(fleet, p0, refused={d0.key}, unreachable=()).decodes == (d2.key, d1.key)
    assert redirect(fleet, p0, refused={d2.key}, unreachable={d0.key}).decodes == (d1.key,)
    assert redirect(fleet, p0, refused=(), unreachable={d0.key}, broken=paths(("p0", "d2"))).decodes == (d1.key,)


def test_refused_by_all_who_can_be_reached_kv_waits_for_room() -> None:
    p0, d0, d1 = view("p0"), view("d0"), view("d1")
    found = redirect([p0, d0, d1], p0, refused={d0.key}, unreachable={d1.key})
    assert (found.decodes, found.error) == ((), None)
    found = redirect([p0, d0, d1], p0, refused={d0.key}, unreachable=(), broken=paths(("p0", "d1")))
    assert (found.decodes, found.error) == ((), None)


def test_x1_kv_that_reaches_nobody_is_given_up_and_its_worker_blamed() -> None:
    p0, d0, d1 = view("p0"), view("d0"), view("d1")
    for unreachable, broken in (({d0.key, d1.key}, ()), ({d0.key}, paths(("p0", "d1")))):
        found = redirect([p0, d0, d1], p0, refused=(), unreachable=unreachable, broken=broken)
        assert isinstance(found.error, TransferError)
        assert (found.decodes, found.blamed) == ((), {p0.key})


def test_without_another_decode_worker_of_the_group_the_attempt_fails() -> None:
    p0, d0 = view("p0"), view("d0", is_draining=True)
    found = redirect([p0, d0, view("d1", fingerprint="g"), view("p1")], p0, refused={d0.key}, unreachable=())
    assert isinstance(found.error, Unavailable)
    assert not isinstance(found.error, TransferError)
    assert found.blamed == {d0.key}


workers = st.builds(
    view,
    st.sampled_from(["p0", "p1", "d0", "d1", "m0", "m1"]),
    is_draining=st.booleans(),
    fingerprint=st.sampled_from("fg"),
    num_waiting_tokens=st.integers(0, 1000),
    num_seqs=st.integers(0, 10),
    num_free_blocks=st.integers(0, 100),
)


@given(fleet=st.lists(workers, unique_by=lambda v: v.key), tokens=st.integers(1, 2000), local=st.integers(0, 100))
def test_whoever_can_serve_does_and_pairs_always_match(fleet: list[WorkerView], tokens: int, local: int) -> None:
    by_key = {v.key: v for v in fleet}
    placement = place(fleet, tokens, local_prefill_max_tokens=local)
    assert (placement is None) == all(v.is_draining for v in fleet)
    if placement is not None:
        decode = by_key[placement.decode]
        assert not decode.is_draining
        if placement.prefill is not None:
            prefill = by_key[placement.prefill]
            assert not prefill.is_draining
            assert prefill.group == decode.group
            assert prefill.key != decode.key


keys = st.builds(WorkerKey, st.sampled_from(["p0", "p1", "d0", "d1", "m0", "m1"]), st.just("1"))


@given(
    fleet=st.lists(workers, unique_by=lambda v: v.key),
    tokens=st.integers(1, 2000),
    avoid=st.sets(keys, max_size=3),
    broken=st.sets(st.builds(KVPath, keys, keys)),
)
def test_broken_paths_are_never_taken_and_never_leave_nobody(
    fleet: list[WorkerView], tokens: int, avoid: set[WorkerKey], broken: set[KVPath]
) -> None:
    without, placement = place(fleet, tokens, avoid=avoid), place(fleet, tokens, avoid=avoid, broken=broken)
    assert (placement is None) == (without is None)
    if placement is None or without is None:
        return
    assert placement.prefill is None or KVPath(placement.prefill, placement.decode) not in broken
    assert (placement.decode in avoid) <= (without.decode in avoid)
    if placement.prefill is None and placement.decode.worker_id[0] == "d":
        usable = [v for v in fleet if not v.is_draining and (v.key not in avoid or placement.decode in avoid)]
        open_pairs = [
            (p.key, d.key)
            for p in usable
            for d in usable
            if p.role != "decode" and p.key not in avoid and d.role != "prefill" and p.group == d.group
            if KVPath(p.key, d.key) not in broken
        ]
        assert open_pairs == [], "it could have been given KV"


@given(
    fleet=st.lists(workers, min_size=1, unique_by=lambda v: v.key),
    refused=st.sets(keys),
    unreachable=st.sets(keys),
    broken=st.sets(st.builds(KVPath, keys, keys)),
    avoid=st.sets(keys),
)
def test_a_redirect_names_only_who_may_be_asked(
    fleet: list[WorkerView],
    refused: set[WorkerKey],
    unreachable: set[WorkerKey],
    broken: set[KVPath],
    avoid: set[WorkerKey],
) -> None:
    start = fleet[0]
    found = redirect(fleet, start, refused=refused, unreachable=unreachable, broken=broken, avoid=avoid)
    by_key = {v.key: v for v in fleet}
    for key in found.decodes:
        assert key not in refused | unreachable | {start.key}
        assert KVPath(start.key, key) not in broken
        assert not by_key[key].is_draining
        assert by_key[key].group == start.group
    assert not (found.decodes and found.error)
    again = redirect(fleet, start, refused=(), unreachable=unreachable, broken=broken, avoid=avoid)
    assert bool(again.decodes) == (found.error is None), "who waits, waits for somebody"
    anybody = redirect(fleet, start, refused=(), unreachable=unreachable, broken=broken)
    if avoid & set(found.decodes):
        assert set(anybody.decodes) <= avoid, "somebody else could have been waited for"


def test_prefixes_are_remembered_up_to_a_capacity_shared_beginnings_longest() -> None:
    memory = PrefixMemory(3)
    memory.record([b"a", b"b", b"c"])
    assert memory.match([b"a", b"b", b"c", b"d"]) == 48
    memory.record([b"a", b"x"])
    assert memory.match([b"a", b"x"]) == 32
    assert memory.match([b"a", b"b", b"c"]) == 32
