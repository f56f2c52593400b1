"""The transfer code under seeded faults, in virtual time: seeds, every seed that once failed, and the detectors."""

from __future__ import annotations

import itertools
import os
import random
import time
from typing import Final

import pytest

from tests.simulation import history
from tests.simulation.checker import check
from tests.simulation.faults import LANDING, NONE, SOURCE, WIRE
from tests.simulation.run import committed_seeds, reproducer
from tests.simulation.world import CORRUPTION, LIVENESS, MODES, SAFETY, Options, World, simulate

FRESH_S: Final = 24.0
"""How long each mode looks for seeds that fail: a slow machine tries fewer of them."""
LEAST_SEEDS: Final = 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(180)
def test_seeds_that_nobody_has_seen_break_no_invariant(mode: str) -> None:
    began = time.monotonic()
    first = int.from_bytes(os.urandom(4), "little")
    for number in itertools.count():
        if number >= LEAST_SEEDS and time.monotonic() - began > FRESH_S:
            break
        report = simulate(first + number, mode)
        assert not report.violations, f"{reproducer(report)}\n" + "\n".join(map(str, report.violations))
    print(f"{mode}: seeds {first}..{first + number - 1}")  # noqa: T201


def test_seeds_that_once_failed_break_no_invariant() -> None:
    for seed, mode in committed_seeds():
        report = simulate(seed, mode)
        assert not report.violations, f"{reproducer(report)}\n" + "\n".join(map(str, report.violations))


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_always_gives_the_same_run(mode: str) -> None:
    seed = random.Random(mode).randrange(10**6)
    assert simulate(seed, mode).fingerprint == simulate(seed, mode).fingerprint


def test_without_faults_every_request_ends_with_its_tokens() -> None:
    for seed in range(4):
        report = simulate(seed, SAFETY, Options(only_fault=NONE))
        assert report.outcomes == {"length": report.num_requests}
        assert not report.violations
        assert not report.injections


# The detectors: a simulation that can not fail proves nothing.


@pytest.mark.parametrize("fault", [LANDING, WIRE])
def test_corruption_is_reported_when_digests_are_switched_off(fault: str) -> None:
    found: set[str] = set()
    for seed in range(40):
        report = simulate(seed, CORRUPTION, Options(only_fault=fault, verify=False))
        found |= {violation.invariant for violation in report.violations}
        if {"INV-7", "INV-10"} <= found:
            break
    assert {"INV-7", "INV-10"} <= found  # wrong bytes were accepted, and a tell-tale met them


@pytest.mark.parametrize("fault", [LANDING, WIRE])
def test_digests_and_tags_refuse_every_corruption_below_them(fault: str) -> None:
    num_detected = 0
    for seed in range(5):
        report = simulate(seed, CORRUPTION, Options(only_fault=fault))
        assert not report.violations, report.violations
        num_detected += sum(n for name, n in report.injections.items() if name.endswith("detected"))
    assert num_detected > 30


def test_the_tell_tale_catches_what_was_wrong_before_the_digest() -> None:
    num_mismatches = 0
    for seed in range(6):
        report = simulate(seed, CORRUPTION, Options(only_fault=SOURCE))
        assert not report.violations, report.violations
        num_mismatches += report.injections["tell-tale"]
    assert num_mismatches > 5


def test_a_leaked_block_is_reported() -> None:
    world = World(1, SAFETY, Options(num_requests=3, only_fault=NONE))
    start = world.start_worker

    def leaky(shape):  # type: ignore[no-untyped-def]
        worker = start(shape)
        worker.engine.quiesced = lambda attempt_id: None  # type: ignore[method-assign]
        worker.engine.release = lambda attempt_id: None  # type: ignore[method-assign]
        return worker

    world.start_worker = leaky  # type: ignore[method-assign]
    assert "INV-2" in {violation.invariant for violation in world.run().violations}


def submitted(name: str = "r", expected: tuple[int, ...] | None = (5, 6)) -> history.Submitted:
    """A request of two tokens, due at 10 s."""
    return history.Submitted(0.0, name, expected, 2, 10.0)


GOOD: list[history.Event] = [
    submitted(),
    history.AttemptStarted(0.1, "r", 1),
    history.Delivered(0.2, "r", 1, 0, 5),
    history.AttemptFailed(0.3, "r", 1, "worker_lost", True),
    history.AttemptStarted(0.3, "r", 2),
    history.Delivered(0.4, "r", 2, 1, 6),
    history.Ended(0.4, "r", "length"),
    history.Landed(0.2, "w", "t", True, True, False),
    history.Rest(1.0, "w", {"free": 3, "cached": 1, "running": 0}, 4, {"running": 0}, 0, 0, 0, 0),
    history.Over(1.0),
]
REST = history.Rest(1.0, "w", {"free": 4}, 4, {}, 0, 0, 0, 0)

BROKEN: list[tuple[str, list[history.Event]]] = [
    ("INV-1", [history.Ledger(0.1, "w", {"free": 3}, 4)]),
    ("INV-2", [REST._replace(by_state={"free": 3, "quarantined": 1})]),
    ("INV-2", [REST._replace(sequences={"held": 1})]),
    ("INV-2", [REST._replace(open_transfers=1)]),
    ("INV-3", [submitted(), history.AttemptStarted(0.1, "r", 1), history.Delivered(0.2, "r", 1, 1, 5)]),
    ("INV-3", [*GOOD[:3], history.Delivered(0.2, "r", 1, 0, 5)]),
    ("INV-4", [submitted(), history.Over(1.0)]),
    ("INV-4", [*GOOD[:7], history.Ended(0.5, "r", "cancelled")]),
    ("INV-4", [*GOOD[:7], history.Delivered(0.5, "r", 2, 2, 5)]),
    ("INV-4", [submitted(), history.Ended(0.5, "r", "error")]),
    ("INV-5", [*GOOD[:2], history.Delivered(0.2, "r", 1, 0, 7)]),
    ("INV-5", [*GOOD[:3], history.Ended(0.5, "r", "length")]),
    ("INV-6", [*GOOD[:6], history.Delivered(0.5, "r", 2, 2, 5)]),
    ("INV-7", [history.Landed(0.2, "w", "t", False, True, False)]),
    ("INV-7", [history.Injected(0.2, "below", "bit flip", "missed")]),
    ("INV-8", [REST._replace(wrong_cached_blocks=1)]),
    ("INV-9", [history.Landed(0.2, "w", "t", True, False, False)]),
    ("INV-10", [history.Mismatch(0.2, "w", "rank 0, layer 0, position 3 (block 1)", False)]),
    ("INV-11", [*GOOD[:2], history.AttemptStarted(0.3, "r", 3)]),
    ("INV-11", [*GOOD[:2], history.Delivered(0.2, "r", 2, 0, 5)]),
    ("INV-11", [submitted(), *[history.AttemptFailed(0.3, "r", 1, "worker_lost", True)] * 4]),
    ("INV-13", [submitted(), history.Ended(11.5, "r", "error", "deadline_exceeded")]),
    ("INV-17", [submitted(), history.Promise(0.1, 5.0), history.Ended(0.5, "r", "error", "worker_lost")]),
    ("INV-17", [*GOOD[:6], history.Promise(0.1, 5.0), history.Ended(6.0, "r", "length"), history.Over(7.0)]),
    ("DEFECT", [history.Breach(0.1, "w", "DEFECT", "AssertionError")]),
]


def test_a_good_history_passes_also_as_json_lines() -> None:
    assert not check(GOOD)
    lines = [history.to_json(event) for event in GOOD]
    assert list(history.from_json(lines)) == GOOD


@pytest.mark.parametrize(("invariant", "events"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_each_broken_invariant_is_named(invariant: str, events: list[history.Event]) -> None:
    violations = check(events)
    assert violations
    assert invariant == violations[0].invariant


def test_the_liveness_mode_finds_a_fleet_without_a_healthy_pair_wanting() -> None:
    world = World(2, LIVENESS, Options(num_requests=6, only_fault=NONE))
    play = world._play

    def kill_all() -> None:
        world.scheduler.at(0.1, lambda: [world.bury(worker, silently=True) for worker in world.live_workers])
        play()

    world._play = kill_all  # type: ignore[method-assign]
    assert {violation.invariant for violation in world.run().violations} == {"INV-17"}
