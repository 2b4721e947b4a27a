"""The loop: what is logged and evaluated when, and predictions in the order of the rows."""

import itertools
import types

import numpy as np
import pytest

from pats_jax import trainer
from pats_jax.trainer import Rhythm, fit, predict_logits


def run(rhythm, stepping=lambda: None, evaluating=lambda: None):
    """Runs a training whose state only counts steps and whose loss is that count squared; returns all that it did."""
    seen = types.SimpleNamespace(steps=[], logged=[], evaluated=[], batches=0)

    def batches():
        for seen.batches in itertools.count(1):
            yield {"weights": np.array([1.0, 1.0, 0.0])}

    def step(state, batch):
        stepping()
        return types.SimpleNamespace(params=state.params + 1), {"loss": np.float32((state.params + 1) ** 2)}

    seen.final = fit(
        types.SimpleNamespace(params=0),
        step,
        batches(),
        rhythm,
        on_step=seen.steps.append,
        on_log=lambda *record: seen.logged.append(record),
        on_evaluate=lambda *record: (evaluating(), seen.evaluated.append(record)),
    )
    return seen


def test_logging_and_evaluation_at_their_own_rhythm_and_after_the_last_step():
    seen = run(Rhythm(total_steps=11, logging_steps=4, eval_steps=5))
    assert seen.final.params == 11 and seen.batches == 11
    assert seen.steps == list(range(1, 12))
    assert [(step, means["loss"]) for step, means, _ in seen.logged] == [
        (4, pytest.approx(np.mean([1, 4, 9, 16]))),
        (8, pytest.approx(np.mean([25, 36, 49, 64]))),
        (11, pytest.approx(np.mean([81, 100, 121]))),
    ]
    assert seen.evaluated == [(5, 5), (10, 10), (11, 11)]


def test_the_last_step_is_not_logged_twice():
    seen = run(Rhythm(total_steps=4, logging_steps=2, eval_steps=2))
    assert [step for step, *_ in seen.logged] == [2, 4]
    assert seen.evaluated == [(2, 2), (4, 4)]


def test_timing_counts_neither_filler_rows_nor_evaluation(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def pass_time(seconds):
        clock.now += seconds

    seen = run(Rhythm(total_steps=4, logging_steps=2, eval_steps=3), lambda: pass_time(1.0), lambda: pass_time(100.0))
    assert [timing for *_, timing in seen.logged] == [{"seconds": 2.0, "examples_per_second": 2.0}] * 2


def test_predictions_come_back_in_the_order_of_the_rows():
    rows = np.random.default_rng(0).permutation(7)
    parts = [(rows[:3], np.append(rows[:3], 99)), (rows[3:6], np.append(rows[3:6], 99)), (rows[6:], rows[[6] * 4])]
    batches = ((index, {"x": values}) for index, values in parts)
    logits = predict_logits(lambda scale, batch: batch["x"][:, None] * np.float32([scale, 1]), 10, batches, 7)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, np.arange(7)[:, None] * [10, 1])
