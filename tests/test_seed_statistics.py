"""Statistics of a comparison: against hand-worked numbers, NumPy and SciPy."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.stats
from test_compare import FINETUNE, PATS, bca, write_grid, write_run

from pats_jax.comparison import seed_statistics
from pats_jax.comparison.arms import Arm
from pats_jax.comparison.seed_statistics import Run
from pats_jax.errors import InputError


def test_scores_and_differences_worked_out_by_hand(tmp_path):
    summary = seed_statistics.summarise(tmp_path, write_grid(tmp_path, {"finetune": FINETUNE, "pats": PATS}))
    methods = summary.tasks["mrpc"].methods
    plain = methods["finetune"]
    assert (plain.n, plain.min, plain.max) == (5, 0.80, 0.84)
    assert plain.mean == pytest.approx(0.82) and plain.difference is None
    assert plain.sd == pytest.approx(np.sqrt((4 + 0 + 1 + 1 + 4) / 4) / 100)
    found = methods["pats"].difference
    assert found.seeds == [1, 2, 3, 4, 5] and found.values == [0.02, 0.01, 0.03, 0.04, 0.05]
    assert found.mean == pytest.approx(0.03)
    assert found.p_value == pytest.approx(2 / 32) == found.smallest_p_value
    assert found.notes == []
    assert summary.missing == [] and summary.baseline == "finetune"


def test_the_bootstrap_interval_is_bca():
    values = np.round(np.random.default_rng(0).exponential(size=12), 3)  # skewed: other intervals lie elsewhere
    interval, note = seed_statistics.bootstrap_interval(values)
    low, high = bca(values)
    assert note is None and interval == [pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05)]
    assert high - values.mean() > 1.5 * (values.mean() - low)
    assert seed_statistics.bootstrap_interval(values)[0] == interval


@pytest.mark.parametrize("values", [[0.01], [0.01, 0.03], [0.02] * 5, []])
def test_where_resampling_says_nothing_a_note_does(values):
    interval, note = seed_statistics.bootstrap_interval(np.array(values))
    assert interval is None and note.startswith("no interval: ")


@pytest.mark.parametrize(
    "values",
    [[1, -2, 3, 4, 5.5], [3, -3, 1, 2, 2], [0.0, 0.0, 1, 2, -4, 7], [5.0]],
    ids=["plain", "ties", "zeros", "one"],
)
def test_wilcoxon_against_all_signs(values):
    values = np.array(values, float)
    nonzero = values[values != 0]
    ranks = scipy.stats.rankdata(np.abs(nonzero))
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product((-1, 1), repeat=len(nonzero))])
    expected = np.mean(np.abs(sums) >= abs(np.dot(ranks, np.sign(nonzero))) - 1e-9)
    p_value, note = seed_statistics.wilcoxon_p_value(values)
    assert p_value == pytest.approx(expected) and (note is None) == (len(nonzero) == len(values))


def test_rounding_breaks_no_ties():
    """0.85 - 0.84 and 0.84 - 0.83 differ in the last bit."""
    found = seed_statistics.paired_difference({1: 0.85, 2: 0.84, 3: 0.90}, {1: 0.84, 2: 0.83, 3: 0.95})
    assert found.values[0] == found.values[1] == 0.01
    assert found.p_value == pytest.approx(seed_statistics.wilcoxon_p_value(np.array([1.0, 1.0, -5.0]))[0])


def test_only_common_seeds_are_paired(tmp_path):
    runs = write_grid(tmp_path, {"finetune": FINETUNE, "pats": {4: 0.9, 9: 0.1}, "sage": {7: 0.5}})
    methods = seed_statistics.summarise(tmp_path, runs).tasks["mrpc"].methods
    assert methods["pats"].n == 2 and methods["pats"].difference.seeds == [4]
    assert methods["pats"].difference.mean == pytest.approx(0.07)
    none = methods["sage"].difference
    assert none.mean is none.interval is none.p_value is None and len(none.notes) == 2
    assert methods["sage"].sd is None


def test_equal_scores(tmp_path):
    runs = write_grid(tmp_path, {"finetune": FINETUNE, "pats": FINETUNE})
    found = seed_statistics.summarise(tmp_path, runs).tasks["mrpc"].methods["pats"].difference
    assert found.mean == 0 and found.p_value is None and found.interval is None and len(found.notes) == 2


def test_the_score_is_that_of_the_kept_model(tmp_path):
    last = write_run(tmp_path, Run("mrpc", Arm("finetune"), 1), 0.7, best=0.9)
    best = write_run(tmp_path, Run("mrpc", Arm("finetune"), 2), 0.7, best=0.9, load_best_model_at_end=True)
    assert (last.score, last.best_score) == (0.7, 0.9) and best.score == 0.9


def test_seconds_per_step_leave_out_the_line_that_compiled(tmp_path):
    assert write_run(tmp_path, Run("mrpc", Arm("pats"), 1), 0.7, seconds=3.0).seconds_per_step() == pytest.approx(0.3)
    assert write_run(tmp_path, Run("mrpc", Arm("pats"), 2), 0.7, losses=[1.0]).seconds_per_step() is None


def test_curves_are_over_the_steps_of_all_seeds(tmp_path):
    one = write_run(tmp_path, Run("mrpc", Arm("pats"), 1), 0.8, losses=(0.9, 0.5, 0.1))
    two = write_run(tmp_path, Run("mrpc", Arm("pats"), 2), 0.6, losses=(0.7, 0.6))
    (numbers,) = seed_statistics.summarise_task([one, two], {Arm("pats"): None}).methods.values()
    loss = numbers.curves["loss"]
    assert dataclasses.asdict(loss) == {
        "step": [10, 20],
        "mean": pytest.approx([0.8, 0.55]),
        "low": [0.7, 0.5],
        "high": [0.9, 0.6],
    }
    assert numbers.curves["score"].step == [15]


def test_concentration_is_averaged(tmp_path):
    runs = [write_run(tmp_path, Run("mrpc", Arm("pats"), seed), 0.8) for seed in (1, 2)]
    found = seed_statistics.mean_concentration([one.results["concentration"] for one in runs])
    raw = [one.results["concentration"] for one in runs]
    assert found.after["gini"].mean == pytest.approx(np.mean([one["after"]["all"]["gini"] for one in raw]))
    expected = np.mean([one["log10_histogram"]["after"] for one in raw], axis=0)
    np.testing.assert_allclose(found.histogram["after"], expected)
    assert seed_statistics.mean_concentration([raw[0], None]) is None
    old = {name: raw[0][name] for name in ("before", "after")}  # of a run that stored no histogram
    assert seed_statistics.mean_concentration([raw[0], old]).histogram is None


def test_runs_with_other_settings_are_not_compared(tmp_path):
    runs = write_grid(tmp_path, {"finetune": FINETUNE})
    write_run(tmp_path, Run("mrpc", Arm("pats"), 1), 0.8, learning_rate=1e-3)
    with pytest.raises(InputError, match="mrpc/pats/seed1 cannot be compared .*learning_rate was 0.001 and is 5e-05"):
        seed_statistics.summarise(tmp_path, [*runs, Run("mrpc", Arm("pats"), 1)])
