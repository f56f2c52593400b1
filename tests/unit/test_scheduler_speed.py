"""The engine's own time per step. The bounds are generous: `python -m bench.scheduler` prints the numbers."""

from __future__ import annotations

import statistics

from bench.scheduler import engine_with, step_times_s


def test_bookkeeping_is_short_and_does_not_grow_with_the_queue() -> None:
    few, many = engine_with(256, 10), engine_with(256, 10_000)
    medians_s = [statistics.median(step_times_s(engine, 60)) for engine in (few, many)]
    assert max(medians_s) < 3e-3
    assert medians_s[1] < 2 * medians_s[0]


def test_adding_and_aborting_do_not_grow_with_the_queue() -> None:
    engine = engine_with(1, 10_000, prompt_tokens=20)
    assert engine.stats().seqs_by_state["waiting"] == 10_000
    for attempt_id in [attempt_id for attempt_id in engine._seqs if engine._seqs[attempt_id].state == "waiting"]:
        engine.abort(attempt_id)
    assert engine.stats().seqs_by_state["waiting"] == 0
    assert len(engine._scheduler._waiting._heap) < 100
