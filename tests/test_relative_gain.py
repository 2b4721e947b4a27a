"""Relative gains against hand-worked numbers and NumPy, properties of the ARG, unfinished runs, wrong records."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from pats_jax.errors import InputError
from pats_jax.priming.relative_gain import (
    Arm,
    SeedGain,
    TaskFacts,
    TuningTime,
    arg_interval,
    average_relative_gain,
    steps_to_score,
    summarise,
)


def tuning(arm, task, sample, test, *, seed=None, curve=(0.5, 0.6, 0.7), metric="accuracy", chance=0.5, **fields):
    """A record; arm is ``direct/lora`` or ``maml/plm/lora``; the curve has a point every 25 steps."""
    algorithm, *trained, peft = arm.split("/")
    best = int(np.argmax(curve))
    return {
        "algorithm": algorithm,
        "trained": trained[0] if trained else None,
        "peft": peft,
        "upstream_seed": seed,
        "task": task,
        "sample": sample,
        "metric": metric,
        "chance": chance,
        "learning_rate": 1e-3,
        "curve": {"step": [25 * i for i in range(len(curve))], "dev": list(curve)},
        "step": 25 * best,
        "dev": curve[best],
        "test": test,
        "seconds": 2.0,
    } | fields


def arm_of(arm, scores, **fields):
    """Records of an arm from task -> scores of samples 13, 21, ..."""
    return [
        tuning(arm, task, sample, test, **fields)
        for task, tests in scores.items()
        for sample, test in zip((13, 21, 42), tests, strict=False)
    ]


DIRECT = {"a": [0.5, 0.7], "b": [0.4, 0.4], "c": [0.8, 0.8]}  # means 0.6, 0.4, 0.8
PRIMED = {"a": [0.6, 0.9], "b": [0.3, 0.4], "c": [0.8, 0.8]}  # means 0.75, 0.35, 0.8: +25, -12.5 and 0 %


def random_scores(seed, tasks=7):
    return dict(zip("abcdefg"[:tasks], np.random.default_rng(seed).uniform(0.2, 0.9, tasks).tolist(), strict=True))


# the ARG


def test_the_formula():
    scores, baseline = random_scores(1), random_scores(2)
    p, p0 = np.array(list(scores.values())), np.array(list(baseline.values()))
    shuffled = dict(reversed(baseline.items()))
    found = average_relative_gain(scores, shuffled)
    assert found.value == pytest.approx(100 / 7 * np.sum((p - p0) / p0)) and found.left_out == ()
    assert found.by_task["c"] == pytest.approx(100 * (scores["c"] / baseline["c"] - 1))


def test_no_gain_over_itself_and_scale_makes_no_difference():
    scores, baseline = random_scores(3), random_scores(4)
    assert average_relative_gain(scores, scores).value == 0
    thrice = average_relative_gain({t: 3 * s for t, s in scores.items()}, {t: 3 * s for t, s in baseline.items()})
    assert thrice.value == pytest.approx(average_relative_gain(scores, baseline).value)
    better = average_relative_gain({t: 1.3 * s for t, s in baseline.items()}, baseline)
    assert better.value == pytest.approx(30) and set(np.round(list(better.by_task.values()), 9)) == {30}


def test_a_baseline_of_zero_or_below_leaves_a_task_out_by_name():
    found = average_relative_gain({"a": 0.6, "cola": 0.3, "d": -0.1}, {"a": 0.5, "cola": 0.0, "d": -0.2})
    assert found.value == pytest.approx(20) and found.left_out == ("cola", "d") and list(found.by_task) == ["a"]
    assert average_relative_gain({"cola": 0.3}, {"cola": 0.0}).value is None
    negative = average_relative_gain({"cola": -0.1}, {"cola": 0.2})
    assert negative.value == pytest.approx(-150)


@pytest.mark.parametrize(
    "scores, baseline, message",
    [
        ({}, {}, "no task"),
        ({"a": 1.0}, {"b": 1.0}, r"differ in tasks: \['a', 'b'\]"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, r"differ in tasks: \['b'\]"),
        ({"a": math.nan}, {"a": 1.0}, "a: score nan"),
        ({"a": 1.0}, {"a": math.inf}, "must be finite"),
    ],
)
def test_scores_that_cannot_be_compared(scores, baseline, message):
    with pytest.raises(ValueError, match=message) as caught:
        average_relative_gain(scores, baseline)
    assert "\n" not in str(caught.value)


# its interval


def percentiles(table, resamples=10_000):
    """The interval from its definition, draw by draw over tasks; gains of several seeds: mean of the seeds' means."""
    rng = np.random.default_rng(5)
    draws = rng.integers(table.shape[1], size=(resamples, table.shape[1]))
    return np.quantile([np.nanmean(np.nanmean(table[:, draw], 1)) for draw in draws], [0.025, 0.975])


def test_the_interval_is_that_of_percentiles():
    gains = np.array([0.0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 90])  # skewed: other intervals lie elsewhere
    low, high = arg_interval(gains)
    assert [low, high] == pytest.approx(percentiles(gains[None]), abs=0.6)
    assert high - gains.mean() > 1.5 * (gains.mean() - low)
    of_bca = scipy.stats.bootstrap((gains,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    assert of_bca.high > high + 3
    assert arg_interval(gains) == [low, high], "deterministic"
    assert arg_interval(2 * gains) == pytest.approx([2 * low, 2 * high])


def test_the_interval_keeps_the_seeds_of_a_task_together():
    rng = np.random.default_rng(7)
    by_task = rng.normal(10, 20, 10)
    alike = np.stack([by_task, by_task])
    assert arg_interval(alike) == pytest.approx(arg_interval(by_task))
    opposed = np.stack([by_task, 20 - by_task])  # every task has 10 in the mean over seeds
    assert arg_interval(opposed) is None, "no spread over tasks"


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # of the computation here
def test_the_interval_of_an_unfinished_seed():
    gains = np.random.default_rng(8).normal(10, 3, (2, 8))
    gains[1] += 200
    gains[1, 1:] = np.nan  # a third of the draws have no task of this seed: they have the ARG of the other
    assert arg_interval(gains) == pytest.approx(percentiles(gains), abs=0.5)
    of_three = np.full((1, 8), np.nan)
    of_three[0, :3] = [1.0, 2.0, 3.0]
    assert arg_interval(of_three) == arg_interval(np.array([1.0, 2.0, 3.0]))


def test_fewer_than_three_tasks_have_no_interval():
    assert arg_interval(np.array([1.0, 2.0])) is None and arg_interval(np.zeros((2, 0))) is None
    low, high = arg_interval(np.array([1.0, 2.0, 3.0]))
    assert 1 <= low < 2 < high <= 3


@pytest.mark.parametrize("gains", [np.full(5, 20.0), np.full((2, 5), -0.1), np.array([0.1 + 0.2, 0.3, 0.3])])
def test_equal_gains_have_no_interval(gains):
    assert arg_interval(gains) is None


# steps


def test_steps_to_a_score():
    curve = {"step": [0, 25, 50, 75], "dev": [0.5, 0.7, 0.6, 0.8]}
    assert [steps_to_score(curve, target) for target in (0.4, 0.6, 0.7, 0.75, 0.81)] == [0, 25, 25, 75, None]


@pytest.mark.parametrize("steps, scores", [([], []), ([0, 25], [0.5])])
def test_a_curve_that_is_none(steps, scores):
    with pytest.raises(ValueError, match=f"the curve has {len(steps)} steps and {len(scores)} dev scores"):
        steps_to_score({"step": steps, "dev": scores}, 0.5)


def test_steps_are_compared_with_direct_tuning_of_the_same_task_and_sample():
    records = [
        tuning("direct/lora", "a", 13, 0.5, curve=(0.5, 0.6, 0.7, 0.7)),  # best from 50 on
        tuning("direct/lora", "a", 21, 0.5, curve=(0.5, 0.9, 0.6, 0.6)),  # best at 25
        tuning("direct/lora", "b", 13, 0.5, curve=(0.2, 0.2, 0.2, 0.3)),  # best at 75
        tuning("mtl/pe/lora", "a", 13, 0.5, curve=(0.5, 0.8, 0.7, 0.7), seed=1),  # at 25
        tuning("mtl/pe/lora", "a", 21, 0.5, curve=(0.8, 0.8, 0.8, 0.8), seed=1),  # never
        tuning("mtl/pe/lora", "b", 13, 0.5, curve=(0.3, 0.2, 0.2, 0.2), seed=1),  # at 0
        tuning("mtl/pe/lora", "b", 21, 0.5, curve=(0.9, 0.9, 0.9, 0.9), seed=1),  # no partner
        tuning("mtl/pe/prompt", "b", 13, 0.5, seed=1),  # no direct tuning of its kind
    ]
    arms = summarise(records).arms
    found = arms["mtl/pe/lora"].steps
    assert found.first == [25, None, 0] and found.reached == pytest.approx(2 / 3)
    assert (found.median, found.median_direct, found.last) == (12.5, 50, 75)
    own = arms["direct/lora"].steps
    assert own.first == [50, 25, 75] and own.reached == 1 and own.median == own.median_direct == 50
    assert arms["mtl/pe/prompt"].steps is None
    never = summarise([records[1], records[4]]).arms["mtl/pe/lora"].steps
    assert never.reached == 0 and never.median is None


# summaries


def test_an_arm_worked_out_by_hand():
    records = [*arm_of("maml/plm/lora", PRIMED, seed=1), *arm_of("direct/lora", DIRECT)]
    records += arm_of("direct/full", {"a": [0.8, 0.7], "b": [0.5, 0.5], "c": [0.64, 0.64]})  # means 0.75, 0.5, 0.64
    summary = summarise(records)
    assert summary.tunings == 18 and list(summary.arms) == ["direct/full", "direct/lora", "maml/plm/lora"]
    assert summary.tasks["b"] == TaskFacts("accuracy", 0.5, [13, 21])
    arm = summary.arms["maml/plm/lora"]
    assert (arm.algorithm, arm.trained, arm.peft, arm.seeds) == ("maml", "plm", "lora", [1])
    found = arm.against_direct
    assert found.gains == pytest.approx({"a": 25, "b": -12.5, "c": 0}) and found.arg == pytest.approx(12.5 / 3)
    assert found.interval == pytest.approx(arg_interval(np.array([25, -12.5, 0])))
    assert (found.wins, found.ties, found.losses, found.shared, found.tasks) == (1, 1, 1, 6, 3)
    assert found.sd_seeds is None and found.left_out == []
    assert arm.against_full.gains == pytest.approx({"a": 0, "b": -30, "c": 25})
    assert arm.tasks["a"].mean == pytest.approx(0.75)
    assert arm.tasks["a"].sd_samples == pytest.approx(0.3 / np.sqrt(2)) and arm.tasks["a"].sd_seeds is None
    assert arm.mean_test == pytest.approx(1.9 / 3) and arm.mean_chance == 0.5
    assert arm.seconds == TuningTime(2.0, 12.0, 6)
    direct = summary.arms["direct/lora"]
    assert direct.against_direct.arg == 0 and direct.against_direct.interval is None
    assert direct.against_full.arg == pytest.approx(np.mean([-20, -20, 25]))
    as_dict = dataclasses.asdict(summary)
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict


def test_gains_are_computed_by_upstream_seed():
    again = {"a": [0.9, 0.9], "b": [0.4, 0.4], "c": [0.8, 0.8]}  # +50, 0, 0 %
    records = [*arm_of("direct/lora", DIRECT), *arm_of("maml/plm/lora", again, seed=9)]
    arm = summarise([*records, *arm_of("maml/plm/lora", PRIMED, seed=2)]).arms["maml/plm/lora"]
    found = arm.against_direct
    assert [one.seed for one in found.seeds] == arm.seeds == [2, 9]
    args = [12.5 / 3, 50 / 3]
    assert [one.arg for one in found.seeds] == pytest.approx(args)
    assert found.arg == pytest.approx(np.mean(args)) and found.sd_seeds == pytest.approx(np.std(args, ddof=1))
    assert found.gains == pytest.approx({"a": 37.5, "b": -6.25, "c": 0})
    assert found.interval == pytest.approx(arg_interval(np.array([37.5, -6.25, 0])))
    task = arm.tasks["a"]
    assert task.mean == pytest.approx((0.75 + 0.9) / 2) and task.seeds == [2, 9] and task.samples == [13, 21]
    assert task.sd_seeds == pytest.approx(0.15 / np.sqrt(2)) and task.sd_samples == pytest.approx(0.15 / np.sqrt(2))


def test_only_tasks_and_samples_that_both_have_are_compared():
    primed = {"a": [0.6, 0.9, 0.0], "b": [0.8], "z": [0.9]}  # a: a sample more; b: one less; z: not in the baseline
    records = [*arm_of("direct/lora", {"a": [0.5, 0.7], "b": [0.4, 0.1], "c": [0.8]})]
    arm = summarise([*records, *arm_of("mtl/pe/lora", primed, seed=1)]).arms["mtl/pe/lora"]
    found = arm.against_direct
    assert found.gains == pytest.approx({"a": 25, "b": 100}) and found.shared == 3 and found.tasks == 2
    assert found.interval is None and arm.against_full is None
    assert arm.tasks["a"].mean == pytest.approx(0.5) and "z" in arm.tasks, "its own scores are all there"


def test_seeds_that_have_come_to_different_tasks():
    records = arm_of("direct/lora", DIRECT)
    records += [*arm_of("mtl/pe/lora", PRIMED, seed=1), *arm_of("mtl/pe/lora", {"b": [0.6, 0.6]}, seed=2)]  # +50 %
    found = summarise(records).arms["mtl/pe/lora"].against_direct
    assert [one.tasks for one in found.seeds] == [3, 1]
    assert found.arg == pytest.approx((12.5 / 3 + 50) / 2)
    assert found.gains["b"] == pytest.approx((50 - 12.5) / 2)
    assert found.wins == 2, "b is better in the mean over seeds"


def test_tasks_left_out_are_named_and_still_won():
    records = [*arm_of("direct/lora", {"a": [0.5], "cola": [0.0]}), *arm_of("direct/ia3", {"cola": [0.0]})]
    records += [*arm_of("mtl/pe/lora", {"a": [0.6], "cola": [0.2]}, seed=1), *arm_of("mtl/pe/ia3", {"cola": [0.1]})]
    arms = summarise(records).arms
    found = arms["mtl/pe/lora"].against_direct
    assert found.arg == pytest.approx(20) and found.left_out == ["cola"] and found.tasks == 1
    assert (found.wins, found.losses) == (2, 0)
    nothing = arms["mtl/pe/ia3"].against_direct
    assert nothing.arg is None and nothing.interval is None and nothing.gains == {} and nothing.wins == 1
    assert nothing.seeds == [SeedGain(None, None, 0)]


def test_equal_arms_tie_in_spite_of_rounding():
    shuffled = {task: tests[::-1] for task, tests in {"a": [0.1, 0.2, 0.3], "b": [0.7, 0.1, 0.3]}.items()}
    plain = {"a": [0.1, 0.2, 0.3], "b": [0.7, 0.1, 0.3]}
    assert sum([0.7, 0.1, 0.3]) != sum([0.3, 0.1, 0.7]), "the case in question"
    records = [*arm_of("direct/lora", plain), *arm_of("mtl/pe/lora", shuffled, seed=1)]
    found = summarise(records).arms["mtl/pe/lora"].against_direct
    assert found.ties == 2 and found.arg == pytest.approx(0)


def test_direct_tuning_alone():
    arms = summarise(arm_of("direct/lora", DIRECT)).arms
    assert list(arms) == ["direct/lora"] and arms["direct/lora"].against_full is None
    assert arms["direct/lora"].seeds == [None] and arms["direct/lora"].mean_test == pytest.approx(0.6)


def test_order_of_records_and_arms():
    names = ["direct/full", "direct/adapters", "mtl/pe/adapters", "maml/plm/adapters", "maml/pe/adapters"]
    names += ["maml/plm+pe/adapters", "reptile/pe/adapters", "own/pe/adapters", "direct/lora"]
    records = [record for name in names for record in arm_of(name, DIRECT)]
    assert list(summarise(records).arms) == names
    assert summarise(records[::-1]).arms.keys() == set(names) and list(summarise(records[::-1]).arms) == names
    assert Arm("maml", "plm", "lora").name == "maml/plm/lora" and Arm("direct", None, "lora").name == "direct/lora"


def test_records_without_time():
    records = [tuning("direct/lora", "a", 13, 0.5)]
    del records[0]["seconds"]
    assert summarise(records).arms["direct/lora"].seconds is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trained": "plm"}, "record 2: direct tuning has no upstream stage"),
        ({"upstream_seed": 1}, "record 2: direct tuning has no upstream stage"),
        ({"algorithm": "maml"}, "record 2: trained None; must be plm, pe or plm"),
        ({"algorithm": "maml", "trained": "plm", "peft": "full"}, "record 2: peft 'full' after maml"),
        ({"sample": 13}, "record 2: direct/lora, seed None, a, sample 13 occurs twice"),
        ({"metric": "macro_f1"}, "record 2: a has metric and chance .*'macro_f1', 0.5.*, but earlier"),
        ({"test": math.nan}, "record 2: test, chance and the dev scores"),
        ({"curve": {"step": [], "dev": []}}, "record 2: its curve needs"),
        ({"curve": {"step": [0, 25], "dev": [0.5]}}, "record 2: its curve needs"),
        ({"curve": {"step": [25, 0], "dev": [0.5, 0.5]}}, "record 2: the steps of its curve must ascend"),
    ],
)
def test_wrong_records_are_refused_by_number(change, message):
    records = [tuning("direct/lora", "a", 13, 0.5), tuning("direct/lora", "a", 21, 0.5)]
    summarise(records)
    with pytest.raises(InputError, match=message) as caught:
        summarise([records[0], records[1] | change])
    assert "\n" not in str(caught.value)


def test_missing_records_and_fields_are_refused():
    with pytest.raises(InputError, match="there are no records"):
        summarise([])
    record = tuning("direct/lora", "a", 13, 0.5)
    del record["test"], record["curve"]
    with pytest.raises(InputError, match="record 1: lacks curve, test"):
        summarise([record])
