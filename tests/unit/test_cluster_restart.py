"""Back-off and giving up."""

from __future__ import annotations

from cluster.restart import RestartPolicy


def test_the_back_off_doubles_up_to_30_seconds() -> None:
    policy = RestartPolicy()
    delays = [policy.after_failure(now=100.0 * failure, uptime_s=0.0) for failure in range(9)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_good_minute_begins_the_back_off_anew() -> None:
    policy = RestartPolicy()
    policy.after_failure(0.0, 0.0)
    policy.after_failure(100.0, 5.0)
    assert policy.after_failure(200.0, 60.0) == 0.5


def test_five_failures_within_a_minute_are_enough() -> None:
    policy = RestartPolicy()
    assert [policy.after_failure(10.0 * failure, 5.0) for failure in range(5)][-1] is None


def test_five_failures_in_more_than_a_minute_are_not() -> None:
    policy = RestartPolicy()
    assert [policy.after_failure(15.0 * failure, 5.0) for failure in range(5)][-1] == 8.0
