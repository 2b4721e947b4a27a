"""Statistics over finished runs of methods on the same seeds: scores, paired differences, curves, distributions.

Reads the folders of runs and summarizes them; `dataclasses.asdict` makes the numbers ready for JSON. Scores are those
of the model that a run keeps: the last one, or the best one with ``--load_best_model_at_end``. They are at most 1; BLEU
is divided by 100.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import scipy.stats

from pats_jax.comparison.arms import Arm, baselines
from pats_jax.core import files
from pats_jax.errors import InputError, shown
from pats_jax.run import run_folder
from pats_jax.run.flags import read_config
from pats_jax.run.records import (
    ComparedResults,
    Concentration,
    Evaluation,
    Figures,
    GridRun,
    Histogram,
    MetricsLine,
    Scores,
)
from pats_jax.run.settings import FineTuningSettings, Settings, resuming

CONFIDENCE = 0.95
FIGURES: tuple[Literal["gini", "entropy", "top_10_percent_share"], ...] = ("gini", "entropy", "top_10_percent_share")
_RESAMPLES = 9999
_POOLED_RESAMPLES = 20_000
_LARGEST_LOSS = float(np.finfo(np.float32).max)
LARGEST = {"bleu": 100.0}  # metric -> its highest value, where that is not 1
_PER_RUN = ("task_name", "method", "seed", "output_dir", "length_buckets")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid: a task, or the name of one's own data; an arm; a seed."""

    task: str
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """``TASK/ARM/seedSEED``, which is also its place below ``runs/``."""
        return f"{self.task}/{self.arm.folder}/seed{self.seed}"

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """The run's folder in the folder of the grid."""
        return root / "runs" / self.task / self.arm.folder / f"seed{self.seed}"

    def record(self) -> GridRun:
        """It as grid.json holds it; a plain method has no overrides there, as in earlier versions."""
        found: GridRun = {"task": self.task, "method": self.arm.method, "seed": self.seed}
        if self.arm.overrides:
            found["overrides"] = dict(self.arm.overrides)
        return found

    @classmethod
    def from_record(cls, record: GridRun) -> "Run":
        """The inverse of `record`."""
        return cls(record["task"], Arm(record["method"], tuple(record.get("overrides", {}).items())), record["seed"])


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results.json, metrics.jsonl and config.json."""

    run: Run
    results: ComparedResults
    records: list[MetricsLine]
    settings: FineTuningSettings

    @classmethod
    def read(cls, run: Run, root: pathlib.Path, kind: type[FineTuningSettings] = Settings) -> "FinishedRun | None":
        """Reads the folder; None if the run is not finished.

        Args:
          run: the run.
          root: the folder of the grid.
          kind: the settings of its program.

        Raises:
          InputError: if the run was not trained and evaluated, or one of the files is damaged; the message names it.
        """
        folder = run.folder(root)
        found = run_folder.read_results(folder)
        if found is None:
            return None
        if "final" not in found or "steps" not in found:
            raise InputError(f"{folder}: the run was not trained, or not evaluated; compare runs that were")
        results = files.read_record(folder / "results.json", ComparedResults)
        records = run_folder.read_metrics(folder)
        _check_results(results, folder / "results.json")
        _check_records(records, results["main_metric"], folder / run_folder.METRICS)
        return cls(run, results, records, read_config(str(folder / "config.json"), kind))

    @property
    def score(self) -> float:
        """The main metric of the model that the run kept; of the last model if an early version did not record it."""
        final = self.results["final"]
        kept = self.results.get("model_step", final["step"])
        return self._main(final if kept == final["step"] else self.results["best"])

    @property
    def best_score(self) -> float:
        """The highest score of any evaluation."""
        return self._main(self.results["best"])

    def losses(self) -> dict[int, float]:
        """The logged losses by step, without those that are not finite in float32."""
        return {r["step"]: r["loss"] for r in self.records if "loss" in r and abs(r["loss"]) <= _LARGEST_LOSS}

    def scores(self) -> dict[int, float]:
        """The main metric of the evaluations by step."""
        return {r["step"]: self._share(r["eval"]) for r in self.records if "eval" in r}

    def seconds_per_step(self) -> float | None:
        """Median over the logged lines except the first, which includes compilation; None if there is no other.

        Of runs in lanes, the share of one lane.
        """
        lines = [record for record in self.records if "loss" in record]
        times = [
            line["timing"]["seconds"] / (line["step"] - before["step"]) / line["timing"].get("lanes", 1)
            for before, line in zip(lines[:-1], lines[1:], strict=True)
            if "timing" in line and "seconds" in line["timing"]
        ]
        return float(np.median(times)) if times else None

    def _main(self, evaluation: Evaluation) -> float:
        return self._share(evaluation["metrics"])

    def _share(self, scores: Mapping[str, float]) -> float:
        metric = self.results["main_metric"]
        return scores[metric] / LARGEST.get(metric, 1.0)


def _check_results(results: ComparedResults, path: pathlib.Path) -> None:
    """Raises InputError if the parts of results.json do not match."""
    parts: dict[str, Scores] = {"final": results["final"], "best": results["best"]}
    if "majority_class" in results:
        parts["majority_class"] = results["majority_class"]
    for name, part in parts.items():
        if results["main_metric"] not in part["metrics"]:
            raise InputError(f"{path}: {name}.metrics: lacks the main metric {shown(results['main_metric'])}")
    measured = results.get("concentration")
    histogram = measured.get("log10_histogram") if measured else None
    if histogram is not None and {len(histogram["before"]), len(histogram["after"])} != {len(histogram["edges"]) - 1}:
        raise InputError(f"{path}: concentration.log10_histogram: needs one share fewer than edges")


def _check_records(records: Sequence[MetricsLine], main_metric: str, path: pathlib.Path) -> None:
    """Raises InputError if a line of metrics.jsonl lacks the score, or the steps of the losses do not ascend."""
    last = -1
    for number, record in enumerate(records, 1):
        if "eval" in record and main_metric not in record["eval"]:
            raise InputError(f"{path}:{number}: eval: lacks the main metric {shown(main_metric)}")
        if "loss" in record:
            if record["step"] <= last:
                raise InputError(f"{path}:{number}: step {record['step']} follows step {last}; steps must ascend")
            last = record["step"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """``n`` values: mean, sd (of the sample, with n - 1; None for one value), lowest and highest."""

    n: int
    mean: float
    sd: float | None
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(len(values), float(np.mean(values)), sd, float(np.min(values)), float(np.max(values)))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences from the baseline, seed by seed, see `paired_difference`."""

    seeds: list[int]
    values: list[float]
    mean: float | None  # None without a common seed
    interval: list[float] | None  # low and high: the mean's bootstrap interval, BCa, at 95 %
    p_value: float | None  # Wilcoxon's signed-rank test, two-sided
    holm_p_value: float | None  # the same, corrected for all comparisons of the report
    smallest_p_value: float  # that so many differences allow
    notes: list[str]  # what is missing, and why


@dataclasses.dataclass(frozen=True)
class Pooled:
    """The difference of a method from the baseline over all tasks, see `pooled_difference`."""

    mean: float | None
    interval: list[float] | None
    p_value: float | None
    counts: dict[str, int]  # task -> pairs
    baseline: str | None = None  # the arm that it is compared with
    holm_p_value: float | None = None  # corrected for the arms of the report


@dataclasses.dataclass(frozen=True)
class SeedCurve:
    """Mean, lowest and highest value over runs, at the steps that all of them share; lists of the same length."""

    step: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclasses.dataclass(frozen=True)
class MeanConcentration:
    """Concentration of sensitivity over runs: figure -> its spread; and the mean histogram if all runs have one."""

    before: dict[str, Spread]
    after: dict[str, Spread]
    histogram: Histogram | None


@dataclasses.dataclass(frozen=True)
class ArmNumbers(Spread):
    """The numbers of an arm on a task: the spread of its scores, and more."""

    scores: dict[int, float]  # seed -> score
    best_mean: float  # the mean of the best evaluations
    baseline: str | None  # the arm that it is compared with; None for the first baseline itself
    difference: Difference | None
    seconds_per_step: float | None
    curves: dict[str, SeedCurve]  # loss, score
    concentration: MeanConcentration | None


@dataclasses.dataclass(frozen=True)
class TaskNumbers:
    """Facts about a task's data, and the numbers of the arms that have a finished run."""

    metric: str
    data: str
    train_examples: int
    eval_examples: int
    majority_class: float | None  # None where there are no classes
    methods: dict[str, ArmNumbers]  # by the arm's label


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison."""

    baseline: str  # the first arm of the baseline method
    missing: list[str]  # names of unfinished runs
    settings: dict[str, object]  # shared by all runs
    versions: dict[str, list[str]]  # package -> versions that the runs used
    tasks: dict[str, TaskNumbers]
    pooled: dict[str, Pooled]  # arm -> its difference from its baseline over all tasks
    listed: list[str] = dataclasses.field(default_factory=list)  # the settings by which arms differ
    program: str = "glue"  # of the runs


def summarise(root: pathlib.Path, runs: Sequence[Run], kind: type[FineTuningSettings] = Settings) -> Comparison:
    """Summarizes the finished runs of a comparison.

    Args:
      root: the grid's folder.
      runs: the grid; `arms.baselines` says what each arm is compared with.
      kind: the settings of the program that made the runs.

    Raises:
      InputError: if no run is finished, or their settings differ.
    """
    read = {run: FinishedRun.read(run, root, kind) for run in runs}
    finished = [one for one in read.values() if one is not None]
    if not finished:
        raise InputError(f"{root}: no run is finished yet")
    compared_with = baselines(list(dict.fromkeys(run.arm for run in runs)))
    tasks = _with_holm(
        {
            task: summarise_task([one for one in finished if one.run.task == task], compared_with)
            for task in dict.fromkeys(run.task for run in runs)
            if any(one.run.task == task for one in finished)
        }
    )
    return Comparison(
        next(arm.label for arm, other in compared_with.items() if other is None),
        missing=[run.name for run, found in read.items() if found is None],
        settings=shared_settings(finished),
        versions=_all_versions(finished),
        tasks=tasks,
        pooled=_pool(compared_with, tasks),
        listed=list(dict.fromkeys(flag for one in finished for flag, _ in one.run.arm.overrides)),
        program=kind.program,
    )


def _with_holm(tasks: dict[str, TaskNumbers]) -> dict[str, TaskNumbers]:
    """Adds Holm's adjusted p-values, over all comparisons of all tasks."""
    p_values = {
        (task, name): method.difference.p_value
        for task, numbers in tasks.items()
        for name, method in numbers.methods.items()
        if method.difference is not None and method.difference.p_value is not None
    }
    adjusted = holm(p_values)
    return {
        task: dataclasses.replace(
            numbers,
            methods={name: _corrected(one, adjusted.get((task, name))) for name, one in numbers.methods.items()},
        )
        for task, numbers in tasks.items()
    }


def _corrected(method: ArmNumbers, p_value: float | None) -> ArmNumbers:
    if method.difference is None:
        return method
    return dataclasses.replace(method, difference=dataclasses.replace(method.difference, holm_p_value=p_value))


def _pool(compared_with: Mapping[Arm, Arm | None], tasks: dict[str, TaskNumbers]) -> dict[str, Pooled]:
    """Arm -> its difference over the tasks; with one task, that task's own interval and test."""
    found = {}
    for arm, baseline in compared_with.items():
        if baseline is None:
            continue
        name = arm.label
        by_task = {
            task: difference
            for task, numbers in tasks.items()
            if name in numbers.methods and (difference := numbers.methods[name].difference) and difference.seeds
        }
        if len(by_task) == 1:
            ((task, one),) = by_task.items()
            found[name] = Pooled(one.mean, one.interval, one.p_value, {task: len(one.seeds)}, baseline.label)
        elif by_task:
            pairs = {task: dict(zip(one.seeds, one.values, strict=True)) for task, one in by_task.items()}
            found[name] = dataclasses.replace(pooled_difference(pairs), baseline=baseline.label)
    adjusted = holm({name: one.p_value for name, one in found.items() if one.p_value is not None})
    return {name: dataclasses.replace(one, holm_p_value=adjusted.get(name)) for name, one in found.items()}


Name = TypeVar("Name")


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values (1979): in increasing order, p times the number of values left, made non-decreasing.

    Examples:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return adjusted


def pooled_difference(by_task: Mapping[str, Mapping[int, float]]) -> Pooled:
    """The mean over tasks of the mean difference, stratified by task.

    The 95 % interval comes from a percentile bootstrap that resamples seeds within each task. There is none if a task
    has only one pair, or if the differences of each task are equal: resampling then shows no spread, which is no
    evidence. The two-sided p-value
    comes from a test that flips the signs of differences at random. Draws have a fixed seed.

    Args:
      by_task: task -> seed -> difference.
    """
    values = [np.array(list(found.values())) for found in by_task.values()]
    if not values:
        return Pooled(None, None, None, {})
    rng, mean = np.random.default_rng(0), float(np.mean([one.mean() for one in values]))
    resampled, flipped = np.zeros(_POOLED_RESAMPLES), np.zeros(_POOLED_RESAMPLES)
    for one in values:
        resampled += one[rng.integers(len(one), size=(_POOLED_RESAMPLES, len(one)))].mean(1) / len(values)
        flipped += (rng.choice((-1.0, 1.0), (_POOLED_RESAMPLES, len(one))) * one).mean(1) / len(values)
    extreme = np.sum(np.abs(flipped) >= abs(mean) - 1e-12)
    low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
    has_spread = min(map(len, values)) > 1 and not math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12)
    p_value, counts = float((extreme + 1) / (_POOLED_RESAMPLES + 1)), {task: len(x) for task, x in by_task.items()}
    return Pooled(mean, [low, high] if has_spread else None, p_value, counts)


def shared_settings(finished: Sequence[FinishedRun]) -> dict[str, object]:
    """The settings that all runs share, without those that identify a run.

    Raises:
      InputError: if a run has different settings; the message names it.
    """
    first, listed = finished[0].settings, {flag for one in finished for flag, _ in one.run.arm.overrides}
    found: dict[str, object] = {}
    like: dict[object, FineTuningSettings] = {}  # method, PEFT kind or arm -> the first run's settings
    for one in finished:
        theirs, arm = one.settings.flat(), one.run.arm
        of_method, of_kind = (like.setdefault((name, theirs[name]), one.settings) for name in ("method", "peft"))
        of_arm = like.setdefault(arm, one.settings).flat()
        own = {name: theirs[name] for name in _PER_RUN if name in theirs and name != "method"}
        own |= {name: of_arm[name] for name in listed & of_arm.keys() - {"peft"}} | dict(arm.overrides)
        adapters = (of_kind if "peft" in listed else first).adapters
        found = one.settings.to_dict() | found
        try:
            resuming(first.replace(methods=of_method.methods, adapters=adapters, **own), one.settings)
        except InputError as error:
            raise InputError(f"{one.run.name} cannot be compared with {finished[0].run.name}: {error}") from None
    return {name: value for name, value in found.items() if name not in {*_PER_RUN, *listed}}


def summarise_task(finished: Sequence[FinishedRun], compared_with: Mapping[Arm, Arm | None]) -> TaskNumbers:
    """The numbers of one task.

    Args:
      finished: the task's finished runs, at least one.
      compared_with: arm -> its baseline, in the order of the report.
    """
    facts, majority = finished[0].results, finished[0].results.get("majority_class")
    by_arm = {arm: [one for one in finished if one.run.arm == arm] for arm in compared_with}
    scores_of = {arm: {one.run.seed: one.score for one in runs} for arm, runs in by_arm.items()}
    table = {}
    for arm, runs in by_arm.items():
        if not runs:
            continue
        scores, baseline = scores_of[arm], compared_with[arm]
        seconds = [s for s in (one.seconds_per_step() for one in runs) if s is not None]
        table[arm.label] = ArmNumbers(
            **dataclasses.asdict(Spread.of(list(scores.values()))),
            scores=scores,
            best_mean=float(np.mean([one.best_score for one in runs])),
            baseline=baseline.label if baseline else None,
            difference=paired_difference(scores, scores_of[baseline]) if baseline else None,
            seconds_per_step=float(np.median(seconds)) if seconds else None,
            curves={
                "loss": mean_curve([one.losses() for one in runs]),
                "score": mean_curve([one.scores() for one in runs]),
            },
            concentration=mean_concentration([one.results.get("concentration") for one in runs]),
        )
    return TaskNumbers(
        metric=facts["main_metric"],
        data=facts["data"],
        train_examples=facts["train_examples"],
        eval_examples=facts["eval_examples"],
        majority_class=majority and majority["metrics"][facts["main_metric"]],
        methods=table,
    )


def paired_difference(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Differences from the baseline, seed by seed, over the seeds that both have.

    Differences are rounded to 12 decimals, so equal differences of scores such as 0.85 and 0.84 are ties.

    Args:
      scores: seed -> score.
      baseline: seed -> score.
    """
    seeds = [seed for seed in scores if seed in baseline]
    values = np.round([scores[seed] - baseline[seed] for seed in seeds], 12)
    interval, on_interval = bootstrap_interval(values)
    p_value, on_test = wilcoxon_p_value(values)
    return Difference(
        seeds=seeds,
        values=values.tolist(),
        mean=float(values.mean()) if len(seeds) else None,
        interval=interval,
        p_value=p_value,
        holm_p_value=None,
        smallest_p_value=smallest_p_value(len(seeds)),
        notes=[note for note in (on_interval, on_test) if note],
    )


def smallest_p_value(count: int) -> float:
    """The smallest two-sided p-value of Wilcoxon's test on ``count`` pairs: 2 / 2^count."""
    return min(1.0, 2.0 / 2**count)


def bootstrap_interval(values: np.ndarray) -> tuple[list[float] | None, str | None]:
    """The mean's 95 % bootstrap interval (BCa, Efron 1987; by SciPy), or None and a note that says why.

    Resampling has a fixed seed, so the same values give the same interval.

    Args:
      values: (n,).
    """
    if len(values) < 3:
        return None, f"no interval: {len(values)} difference(s) are too few to resample"
    if np.all(values == values[0]):
        return None, "no interval: all differences are equal, so resampling shows no spread"
    found = scipy.stats.bootstrap(
        (values,),
        np.mean,
        method="BCa",
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    if not np.all(np.isfinite(found)):
        return None, "no interval: BCa is not defined for these differences"
    return [float(found.low), float(found.high)], None


def wilcoxon_p_value(values: np.ndarray) -> tuple[float | None, str | None]:
    """The two-sided p-value of Wilcoxon's signed-rank test that differences are centred at 0, and a note on zeros.

    Zeros are left out, as in Wilcoxon (1945).

    Args:
      values: (n,).
    """
    nonzero = values[values != 0]
    if not len(nonzero):
        return None, "no test: all differences are 0" if len(values) else "no test: no common seed"
    zeros = len(values) - len(nonzero)
    p_value = float(scipy.stats.wilcoxon(nonzero).pvalue)
    return p_value, f"the test omits {zeros} difference(s) of 0" if zeros else None


def mean_curve(series: Sequence[dict[int, float]]) -> SeedCurve:
    """Mean, lowest and highest value over runs, at the steps that all of them share.

    Args:
      series: step -> value, for each run.
    """
    steps = sorted(set.intersection(*(set(values) for values in series)))
    table = np.array([[values[step] for step in steps] for values in series], np.float64)
    return SeedCurve(steps, table.mean(0).tolist(), table.min(0).tolist(), table.max(0).tolist())


def mean_concentration(measured: Sequence[Concentration | None]) -> MeanConcentration | None:
    """Means over runs of the concentration of sensitivity, and of its histogram if all runs have one.

    Args:
      measured: the ``concentration`` of every run's results.json, or None.

    Returns:
      The means; None if a run was not measured.
    """
    known = [one for one in measured if one is not None]
    if len(known) < len(measured):
        return None
    histograms = [one["log10_histogram"] for one in known if "log10_histogram" in one]
    all_alike = len(histograms) == len(known) and all(one["edges"] == histograms[0]["edges"] for one in histograms)
    return MeanConcentration(
        before=_spreads([one["before"]["all"] for one in known]),
        after=_spreads([one["after"]["all"] for one in known]),
        histogram=_mean_histogram(histograms) if all_alike else None,
    )


def _spreads(figures: Sequence[Figures]) -> dict[str, Spread]:
    return {name: Spread.of([one[name] for one in figures]) for name in FIGURES}


def _mean_histogram(histograms: Sequence[Histogram]) -> Histogram:
    before = np.mean([one["before"] for one in histograms], axis=0).tolist()
    after = np.mean([one["after"] for one in histograms], axis=0).tolist()
    return {"edges": histograms[0]["edges"], "before": before, "after": after}


def _all_versions(finished):
    names = dict.fromkeys(name for one in finished for name in one.results["versions"])
    return {
        name: list(dict.fromkeys(v for v in (one.results["versions"].get(name) for one in finished) if v))
        for name in names
    }
