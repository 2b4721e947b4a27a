"""What priming gains: the average relative gain of few-shot tunings over a baseline, task by task.

Reads records, one per tuning, as plain dicts (`records.TuningRecord`)::

    {"algorithm": "maml",            # of the upstream stage; "direct" if there was none
     "trained": "plm",               # upstream: "plm", "pe" or "plm+pe"; None for direct
     "peft": "lora",                 # what is tuned downstream; "full" (the whole model) only with direct
     "upstream_seed": 1,             # None for direct
     "task": "glue-rte", "sample": 13, "metric": "accuracy", "chance": 0.5,
     "learning_rate": 1e-3,          # the one chosen on the dev rows
     "curve": {"step": [0, 25, 50], "dev": [0.5, 0.6, 0.7]},    # with that learning rate
     "step": 50, "dev": 0.7, "test": 0.66, "seconds": 12.3}

The ARG is that of CrossFit (https://arxiv.org/abs/2104.08835), which the work on priming
(https://arxiv.org/abs/2212.01032) uses. The rule for baselines at 0, the intervals and the steps to a score are ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from pats_jax.errors import InputError, shown
from pats_jax.run.records import Curve, TuningRecord as Record

CONFIDENCE = 0.95
ALGORITHMS = ("direct", "mtl", "maml", "fomaml", "reptile")  # in the order of tables; others follow
TRAINED = (None, "plm", "pe", "plm+pe")
_RESAMPLES = 9999
_FIELDS = ("algorithm", "trained", "peft", "upstream_seed", "task", "sample", "metric", "chance", "curve", "test")


class Arm(NamedTuple):
    """One arm of the comparison: an upstream algorithm, what it trained, and what is tuned downstream."""

    algorithm: str
    trained: str | None
    peft: str

    @property
    def name(self) -> str:
        """``maml/plm/lora``, or ``direct/lora`` without an upstream stage."""
        return "/".join(part for part in self if part)


@dataclasses.dataclass(frozen=True)
class AverageRelativeGain:
    """An ARG and its parts.

    Attributes:
      value: in percent; None if every task was left out.
      by_task: task -> its relative gain in percent.
      left_out: tasks without a relative gain, because their baseline is at most 0.
    """

    value: float | None
    by_task: dict[str, float]
    left_out: tuple[str, ...]


def average_relative_gain(scores: Mapping[str, float], baseline: Mapping[str, float]) -> AverageRelativeGain:
    """ARG = 100/n · Σ_i (P_i - P0_i) / P0_i over n tasks, in percent.

    A task with P0 <= 0 to 12 decimals, such as a Matthews correlation of 0, has no relative gain. It is left out and
    listed; this rule is ours, as the paper has none.

    Args:
      scores: task -> P, its mean test score over its few-shot samples.
      baseline: task -> P0, the same for the baseline, with the same tasks.

    Returns:
      The ARG, the gains that it averages, and the tasks that were left out.

    Raises:
      ValueError: if there is no task, the tasks are not the same, or a score is not finite.

    Examples:
      >>> average_relative_gain({"a": 0.75, "b": 0.625, "c": 0.1}, {"a": 0.5, "b": 0.5, "c": 0.0})
      AverageRelativeGain(value=37.5, by_task={'a': 50.0, 'b': 25.0}, left_out=('c',))

    References:
      Ye et al., CrossFit, EMNLP 2021, https://arxiv.org/abs/2104.08835
    """
    if not scores:
        raise ValueError("no task to average over")
    if scores.keys() != baseline.keys():
        raise ValueError(f"scores and baseline differ in tasks: {sorted(scores.keys() ^ baseline.keys())}")
    for task in scores:
        if not (math.isfinite(scores[task]) and math.isfinite(baseline[task])):
            raise ValueError(f"{task}: score {scores[task]}, baseline {baseline[task]}; both must be finite")
    gains = {task: _percent(scores[task], baseline[task]) for task in scores if round(baseline[task], 12) > 0}
    value = float(np.mean(list(gains.values()))) if gains else None
    return AverageRelativeGain(value, gains, tuple(task for task in scores if task not in gains))


def arg_interval(gains: np.ndarray) -> list[float] | None:
    """The ARG's 95 % bootstrap interval over tasks (percentiles, by SciPy); None if resampling shows no spread.

    That is so for fewer than 3 tasks, or if all have the same gain: an interval without width is no evidence.

    Tasks are drawn with replacement, each with its gains for all upstream seeds. The ARG of a draw is computed like
    that of the tasks themselves: by seed, then the mean over seeds. The interval thus shows what other tasks might
    give, not what other seeds might give. The draws have a fixed seed, so the same gains give the same interval. The
    interval is ours.

    Args:
      gains: (tasks,) relative gains in percent, or (seeds, tasks) with NaN where a seed lacks a task.

    Returns:
      Low and high, in percent.
    """
    table = np.atleast_2d(gains)
    table = table[:, ~np.isnan(table).all(0)]
    if table.shape[1] < 3:
        return None

    def arg_of_draw(tasks, axis=-1):
        return _mean_of_seeds(table[:, tasks.astype(int)], axis)

    found = scipy.stats.bootstrap(
        (np.arange(table.shape[1]),),
        arg_of_draw,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=1000,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return None if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-9) else [low, high]


def steps_to_score(curve: Curve, target: float) -> int | None:
    """The first step at which the dev score is at least ``target``; None if there is none.

    Args:
      curve: ``step`` and ``dev``, non-empty lists of the same length.
      target: a dev score.

    Raises:
      ValueError: if the lists are empty or of different lengths.

    Examples:
      >>> steps_to_score({"step": [0, 25, 50], "dev": [0.5, 0.7, 0.6]}, 0.6)
      25
    """
    steps, scores = curve["step"], curve["dev"]
    if not steps or len(steps) != len(scores):
        raise ValueError(
            f"the curve has {len(steps)} steps and {len(scores)} dev scores; it needs as many of each, at least one"
        )
    return min((int(step) for step, score in zip(steps, scores, strict=True) if score >= target), default=None)


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """Metric and chance of a task, and the numbers of its samples.

    Attributes:
      metric: the name of the score.
      chance: the expected score of a guess.
      samples: the numbers of the samples.
      crossfits_sampling: whether CrossFit draws samples of these sizes; None if unknown.
      unparsable: answers that were no numbers though the score needs some, over all tunings.
    """

    metric: str
    chance: float
    samples: list[int]
    crossfits_sampling: bool | None = None
    unparsable: int = 0


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Test scores of an arm on one task.

    Attributes:
      mean: over upstream seeds of the mean over samples.
      sd_samples: the standard deviation over samples (n - 1) within a seed, averaged over the seeds that have two
        samples or more; None without such seeds.
      sd_seeds: the standard deviation of the seeds' means (n - 1); None for one seed.
      samples: the numbers of the samples.
      seeds: the upstream seeds.
    """

    mean: float
    sd_samples: float | None
    sd_seeds: float | None
    samples: list[int]
    seeds: list[int | None]


@dataclasses.dataclass(frozen=True)
class SeedGain:
    """The ARG of an upstream seed, and the number of tasks it is over."""

    seed: int | None
    arg: float | None
    tasks: int


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gains of an arm over a baseline, in percent, see `compare_with`.

    Attributes:
      arg: the mean over seeds of the ARG.
      interval: see `arg_interval`.
      sd_seeds: the standard deviation of the ARG over seeds (n - 1); None for one seed.
      seeds: the ARG by seed.
      gains: task -> relative gain, the mean over seeds.
      tasks: the number of tasks.
      left_out: names of tasks whose baseline is at most 0 (for at least one seed, if seeds share different samples with
        the baseline).
      wins: number of tasks with a higher mean score, including the tasks left out.
      ties: number of tasks with an equal mean score.
      losses: number of tasks with a lower mean score.
      shared: the number of tunings that had a partner in the baseline.
    """

    arg: float | None
    interval: list[float] | None
    sd_seeds: float | None
    seeds: list[SeedGain]
    gains: dict[str, float]
    tasks: int
    left_out: list[str]
    wins: int
    ties: int
    losses: int
    shared: int


@dataclasses.dataclass(frozen=True)
class StepsToDirect:
    """The steps in which an arm's tunings reach the best dev score of direct tuning; see `steps_to_direct`."""

    first: list[int | None]  # step of each tuning; None: never
    reached: float  # share of the tunings
    median: float | None  # step of those that did
    median_direct: float  # of direct tuning on the same tasks and samples
    last: int  # step of any curve


@dataclasses.dataclass(frozen=True)
class TuningTime:
    """Seconds of the tunings that recorded them."""

    median: float
    total: float
    tunings: int


@dataclasses.dataclass(frozen=True)
class ArmNumbers:
    """The numbers of one arm; the comparisons are None without tunings to compare with."""

    algorithm: str
    trained: str | None
    peft: str
    seeds: list[int | None]  # upstream
    tasks: dict[str, TaskScores]
    mean_test: float  # over tasks
    mean_chance: float
    against_direct: Gain | None
    against_full: Gain | None
    steps: StepsToDirect | None
    seconds: TuningTime | None


@dataclasses.dataclass(frozen=True)
class GymSummary:
    """All numbers of a report on priming: the number of tunings, facts by task, and numbers by the name of an arm."""

    tunings: int
    tasks: dict[str, TaskFacts]
    arms: dict[str, ArmNumbers]


def summarise(records: Sequence[Record], sources: Sequence[str] | None = None) -> GymSummary:
    """All numbers of a report on priming; `dataclasses.asdict` makes them ready for JSON.

    Args:
      records: one per tuning, in any order; an unfinished run has only some.
      sources: what to call each record in error messages, such as its file; None: its number.

    Raises:
      InputError: if there is no record, or a record lacks a field, contradicts itself or another one, or occurs twice.
    """
    _check(records, sources or [f"record {number}" for number in range(1, len(records) + 1)])
    by_arm: dict[Arm, list[Record]] = {}
    for record in records:
        by_arm.setdefault(_arm(record), []).append(record)
    full = by_arm.get(Arm("direct", None, "full"))
    tasks = {}
    for task in sorted({record["task"] for record in records}):
        of_task = [record for record in records if record["task"] == task]
        samples = sorted({record["sample"] for record in of_task})
        unparsable = sum(record.get("unparsable", 0) for record in of_task)
        sampling = of_task[0].get("crossfits_sampling")
        tasks[task] = TaskFacts(of_task[0]["metric"], of_task[0]["chance"], samples, sampling, unparsable)
    arms = {
        arm.name: summarise_arm(arm, by_arm[arm], by_arm.get(Arm("direct", None, arm.peft)), full)
        for arm in sorted(by_arm, key=_place)
    }
    return GymSummary(len(records), tasks, arms)


def summarise_arm(
    arm: Arm, records: Sequence[Record], direct: Sequence[Record] | None, full: Sequence[Record] | None
) -> ArmNumbers:
    """The numbers of one arm.

    Args:
      arm: the arm.
      records: its tunings, at least one.
      direct: the tunings with the same PEFT method without an upstream stage, or None.
      full: the tunings of the whole model without an upstream stage, or None.
    """
    tasks = {
        task: task_scores([record for record in records if record["task"] == task])
        for task in sorted({record["task"] for record in records})
    }
    chance = {record["task"]: record["chance"] for record in records}
    seconds = [spent for record in records if (spent := record.get("seconds")) is not None]
    return ArmNumbers(
        **arm._asdict(),
        seeds=_seeds(records),
        tasks=tasks,
        mean_test=float(np.mean([one.mean for one in tasks.values()])),
        mean_chance=float(np.mean([chance[task] for task in tasks])),
        against_direct=compare_with(records, direct or []),
        against_full=compare_with(records, full or []),
        steps=steps_to_direct(records, direct or []),
        seconds=TuningTime(float(np.median(seconds)), float(np.sum(seconds)), len(seconds)) if seconds else None,
    )


def task_scores(records: Sequence[Record]) -> TaskScores:
    """Test scores of an arm on one task.

    Args:
      records: the arm's tunings on that task, at least one.
    """
    by_seed = [np.array([r["test"] for r in records if r["upstream_seed"] == seed]) for seed in _seeds(records)]
    spreads = [np.std(scores, ddof=1) for scores in by_seed if len(scores) > 1]
    return TaskScores(
        mean=float(np.mean([scores.mean() for scores in by_seed])),
        sd_samples=float(np.mean(spreads)) if spreads else None,
        sd_seeds=_sd([float(scores.mean()) for scores in by_seed]),
        samples=sorted({record["sample"] for record in records}),
        seeds=_seeds(records),
    )


def compare_with(records: Sequence[Record], baseline: Sequence[Record]) -> Gain | None:
    """The ARG of an arm's tunings against a baseline's, over the tasks and samples that both have.

    An ARG is computed for every upstream seed, on what that seed and the baseline share; ``arg`` is their mean.

    Args:
      records: the arm's tunings.
      baseline: the tunings of an arm without an upstream stage.

    Returns:
      The gains; None if arm and baseline have no tuning in common.
    """
    reference = {(record["task"], record["sample"]): record["test"] for record in baseline}
    shared = [record for record in records if (record["task"], record["sample"]) in reference]
    if not shared:
        return None
    seeds = _seeds(shared)
    found, differences = [], dict[str, list[float]]()
    for seed in seeds:
        of_seed = [record for record in shared if record["upstream_seed"] == seed]
        scores = _task_means([(r["task"], r["test"]) for r in of_seed])
        before = _task_means([(r["task"], reference[r["task"], r["sample"]]) for r in of_seed])
        found.append(average_relative_gain(scores, before))
        for task, score in scores.items():
            differences.setdefault(task, []).append(score - before[task])
    tasks = sorted({task for one in found for task in one.by_task})
    gains = np.array([[one.by_task.get(task, np.nan) for task in tasks] for one in found])
    args = [one.value for one in found if one.value is not None]
    signs = [np.sign(np.round(np.mean(values), 12)) for values in differences.values()]
    return Gain(
        arg=float(np.mean(args)) if args else None,
        interval=arg_interval(gains),
        sd_seeds=_sd(args),
        seeds=[SeedGain(seed, one.value, len(one.by_task)) for seed, one in zip(seeds, found, strict=True)],
        gains={task: float(np.nanmean(column)) for task, column in zip(tasks, gains.T, strict=True)},
        tasks=len(tasks),
        left_out=sorted({task for one in found for task in one.left_out}),
        wins=signs.count(1),
        ties=signs.count(0),
        losses=signs.count(-1),
        shared=len(shared),
    )


def steps_to_direct(records: Sequence[Record], direct: Sequence[Record]) -> StepsToDirect | None:
    """The steps in which an arm's tunings reach the best dev score of direct tuning on the same task and sample.

    The curves are those of the chosen learning rates, which were chosen by score, not by speed.

    Args:
      records: the arm's tunings.
      direct: the tunings with the same PEFT method without an upstream stage.

    Returns:
      The steps; None if both have no task and sample in common.
    """
    partners = {(record["task"], record["sample"]): record["curve"] for record in direct}
    curves = [
        (record["curve"], partners[record["task"], record["sample"]])
        for record in records
        if (record["task"], record["sample"]) in partners
    ]
    if not curves:
        return None
    first = [steps_to_score(curve, max(partner["dev"])) for curve, partner in curves]
    of_direct = [partner["step"][int(np.argmax(partner["dev"]))] for _, partner in curves]
    reached = [step for step in first if step is not None]
    return StepsToDirect(
        first=first,
        reached=len(reached) / len(first),
        median=float(np.median(reached)) if reached else None,
        median_direct=float(np.median(of_direct)),
        last=max(max(curve["step"]) for pair in curves for curve in pair),
    )


def stage_place(algorithm: str, trained: str | None) -> tuple[int, str, int]:
    """A sort key of upstream stages: by algorithm, unknown ones last, then by what was trained."""
    known = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else len(ALGORITHMS)
    return known, algorithm, TRAINED.index(trained)


def _check(records, sources):
    if not records:
        raise InputError("nothing to report: there are no records")
    seen, facts = set(), dict[str, tuple[str, float]]()
    for source, record in zip(sources, records, strict=True):
        missing = [field for field in _FIELDS if field not in record]
        if missing:
            raise InputError(f"{source}: lacks {', '.join(missing)}")
        _check_one(source, record)
        key = (_arm(record), record["upstream_seed"], record["task"], record["sample"])
        if key in seen:
            raise InputError(f"{source}: {key[0].name}, seed {key[1]}, {key[2]}, sample {key[3]} occurs twice")
        seen.add(key)
        own = (record["metric"], record["chance"])
        known = facts.setdefault(record["task"], own)
        if own != known:
            task = record["task"]
            raise InputError(f"{source}: {task} has metric and chance {shown(own)}, but earlier {shown(known)}")


def _check_one(source, record):
    is_direct = record["algorithm"] == "direct"
    if is_direct and (record["trained"] is not None or record["upstream_seed"] is not None):
        raise InputError(f"{source}: direct tuning has no upstream stage, so trained and upstream_seed must be null")
    if not is_direct and record["trained"] not in TRAINED[1:]:
        raise InputError(f"{source}: trained {shown(record['trained'])}; must be plm, pe or plm+pe")
    if not is_direct and record["peft"] == "full":
        raise InputError(f"{source}: peft 'full' after {record['algorithm']}; it is only valid for direct")
    curve = record["curve"]
    if not curve.get("step") or len(curve["step"]) != len(curve.get("dev", ())):
        raise InputError(f"{source}: its curve needs as many steps as dev scores, at least one")
    if list(curve["step"]) != sorted(set(curve["step"])):
        raise InputError(f"{source}: the steps of its curve must ascend")
    if not all(map(math.isfinite, (record["test"], record["chance"], *curve["dev"]))):
        raise InputError(f"{source}: test, chance and the dev scores of the curve must be finite")


def _arm(record):
    return Arm(record["algorithm"], record["trained"], record["peft"])


def _place(arm):
    """Sort key of an arm: by PEFT method, the whole model first, then by upstream stage."""
    return arm.peft != "full", arm.peft, stage_place(arm.algorithm, arm.trained)


def _seeds(records):
    return sorted({record["upstream_seed"] for record in records}, key=lambda seed: (seed is not None, seed or 0))


def _task_means(scores):
    tasks = sorted({task for task, _ in scores})
    return {task: float(np.mean([score for name, score in scores if name == task])) for task in tasks}


def _mean_of_seeds(gains, axis):
    """Means over tasks by seed, then over the seeds (the first axis); NaN marks what a seed lacks."""
    known = ~np.isnan(gains)
    count = known.sum(axis)
    means = np.where(known, gains, 0.0).sum(axis) / np.maximum(count, 1)
    return means.sum(0) / (count > 0).sum(0)


def _percent(score, baseline):
    return 100.0 * (score - baseline) / baseline


def _sd(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
