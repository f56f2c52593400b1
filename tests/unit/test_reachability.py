"""What a router remembers of paths that KV did not take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router import reachability
from router.placement import KVPath, WorkerKey
from router.reachability import MOST_LEASES, Reachability

LEASE_S = 10.0


def path(prefill: str, decode: str) -> KVPath:
    return KVPath(WorkerKey(prefill, "1"), WorkerKey(decode, "1"))


P0_D0, P0_D1 = path("p0", "d0"), path("p0", "d1")


def test_a_path_that_failed_is_avoided_for_a_while_and_no_other_is() -> None:
    known = Reachability(LEASE_S)
    assert known.failed(100.0, P0_D0)
    assert known.avoided(100.0) == {P0_D0}
    assert known.avoided(100.0 + 0.99 * LEASE_S) == {P0_D0}
    assert known.avoided(100.0 + LEASE_S) == frozenset()


def test_kv_that_arrives_ends_it_at_once() -> None:
    known = Reachability(LEASE_S)
    known.failed(0.0, P0_D0)
    assert known.worked(P0_D0)
    assert known.avoided(0.0) == frozenset()
    assert not known.worked(P0_D0), "it was not taken for broken any more"
    known.failed(1.0, P0_D0)
    assert known.avoided(1.0 + LEASE_S) == frozenset(), "the next time is a first time"


def test_one_attempt_tries_a_path_again_and_others_wait_for_it() -> None:
    known = Reachability(LEASE_S)
    known.failed(0.0, P0_D0)
    known.trying(LEASE_S, P0_D0)
    assert known.avoided(LEASE_S) == {P0_D0}
    assert known.avoided(2.9 * LEASE_S) == {P0_D0}, "for longer than at first"
    known.worked(P0_D0)
    assert known.avoided(LEASE_S) == frozenset()


def test_attempts_that_took_the_path_before_it_was_known_do_not_lengthen_the_period() -> None:
    known = Reachability(LEASE_S)
    assert [known.failed(when, P0_D0) for when in (0.0, 0.1, 0.2, 5.0)] == [True, False, False, False]
    assert known.avoided(5.0 + LEASE_S) == frozenset()
    assert known.num_failures == 4


def test_taking_a_path_that_never_failed_changes_nothing() -> None:
    known = Reachability(LEASE_S)
    known.trying(0.0, P0_D0)
    assert known.avoided(0.0) == frozenset()
    assert len(known) == 0


def test_a_worker_that_left_takes_its_paths_along() -> None:
    known = Reachability(LEASE_S)
    for each in (P0_D0, P0_D1, path("p1", "d0")):
        known.failed(0.0, each)
    known.keep(lambda key: key.worker_id != "d0")
    assert known.avoided(0.0) == {P0_D1}


def test_the_oldest_is_forgotten_when_there_are_too_many() -> None:
    known = Reachability(LEASE_S)
    for number in range(reachability._CAPACITY + 1):
        known.failed(0.0, path("p", f"d{number}"))
    assert len(known) == reachability._CAPACITY
    assert path("p", "d0") not in known.avoided(0.0)


steps = st.tuples(
    st.floats(0.0, 30.0), st.sampled_from(["failed", "trying", "worked"]), st.sampled_from([P0_D0, P0_D1])
)


@given(st.lists(steps, max_size=40))
def test_no_path_is_avoided_for_longer_than_the_most_after_the_last_attempt(
    history: list[tuple[float, str, KVPath]],
) -> None:
    known, now = Reachability(LEASE_S), 0.0
    for pause_s, event, which in history:
        now += pause_s
        before = known.avoided(now)
        if event == "failed":
            known.failed(now, which)
            assert which in known.avoided(now)
        elif event == "trying":
            known.trying(now, which)
            assert known.avoided(now) >= before
        else:
            known.worked(which)
            assert which not in known.avoided(now)
        assert known.avoided(now) - {which} == before - {which}, "paths do not know of each other"
    assert known.avoided(now + MOST_LEASES * LEASE_S) == frozenset()


@given(num_trials=st.integers(1, 20))
def test_a_path_that_stays_cut_costs_fewer_and_fewer_attempts(num_trials: int) -> None:
    known, now = Reachability(LEASE_S), 0.0
    known.failed(now, P0_D0)
    pauses = []
    for _ in range(num_trials):
        began = now
        while P0_D0 in known.avoided(now):
            now += 1.0
        pauses.append(now - began)
        known.trying(now, P0_D0)
        known.failed(now, P0_D0)
    assert pauses == sorted(pauses)
    assert pauses[0] == LEASE_S
    assert max(pauses) <= MOST_LEASES * LEASE_S
    if num_trials > 3:
        assert pauses[-1] == MOST_LEASES * LEASE_S
