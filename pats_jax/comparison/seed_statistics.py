"""Statistics over finished runs of methods on the same seeds: scores, paired differences, curves, distributions.

Reads the folders of GLUE runs and summarizes them as plain numbers, ready for JSON. Scores are those of the model that
a run keeps: the last one, or the best one with ``--load_best_model_at_end``.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.stats

from pats_jax.core import files
from pats_jax.errors import InputError, shown
from pats_jax.run import run_folder
from pats_jax.run.flags import read_config
from pats_jax.run.records import ComparedResults, Concentration, Evaluation, Histogram, MetricsLine, Scores
from pats_jax.run.settings import Settings, resuming

CONFIDENCE = 0.95
FIGURES: tuple[Literal["gini", "entropy", "top_10_percent_share"], ...] = ("gini", "entropy", "top_10_percent_share")
_RESAMPLES = 9999
_LARGEST_LOSS = float(np.finfo(np.float32).max)
_PER_RUN = ("task_name", "method", "seed", "output_dir", "length_buckets")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid: a task, a method, a seed."""

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """``TASK/METHOD/seedSEED``, which is also its place below ``runs/``."""
        return f"{self.task}/{self.method}/seed{self.seed}"

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """The run's folder in the folder of the grid."""
        return root / "runs" / self.task / self.method / f"seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results.json, metrics.jsonl and config.json."""

    run: Run
    results: ComparedResults
    records: list[MetricsLine]
    settings: Settings

    @classmethod
    def read(cls, run: Run, root: pathlib.Path) -> "FinishedRun | None":
        """Reads the folder; None if the run is not finished.

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
        return cls(run, results, records, read_config(str(folder / "config.json"), Settings))

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
        return {r["step"]: r["eval"][self.results["main_metric"]] for r in self.records if "eval" in r}

    def seconds_per_step(self) -> float | None:
        """Median over the logged lines except the first, which includes compilation; None if there is no other."""
        lines = [record for record in self.records if "loss" in record]
        times = [
            line["timing"]["seconds"] / (line["step"] - before["step"])
            for before, line in zip(lines[:-1], lines[1:], strict=True)
            if "timing" in line and "seconds" in line["timing"]
        ]
        return float(np.median(times)) if times else None

    def _main(self, evaluation: Evaluation) -> float:
        return evaluation["metrics"][self.results["main_metric"]]


def _check_results(results: ComparedResults, path: pathlib.Path) -> None:
    """Raises InputError if the parts of results.json do not match."""
    parts: dict[str, Scores] = {
        "final": results["final"],
        "best": results["best"],
        "majority_class": results["majority_class"],
    }
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


def summarise(root: pathlib.Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Summarizes the finished runs of a comparison.

    Args:
      root: the grid's folder.
      runs: the grid. The baseline is ``finetune`` or, without it, the first method.

    Returns:
      ``baseline``, ``missing`` (names of unfinished runs), ``settings`` (shared by all runs), ``versions``
      (package -> versions that the runs used) and ``tasks``: task -> its facts and its ``methods``, see
      `summarise_task`.

    Raises:
      InputError: if no run is finished, or their settings differ.
    """
    read = {run: FinishedRun.read(run, root) for run in runs}
    finished = [one for one in read.values() if one is not None]
    if not finished:
        raise InputError(f"{root}: no run is finished yet")
    methods = list(dict.fromkeys(run.method for run in runs))
    baseline = "finetune" if "finetune" in methods else methods[0]
    tasks = dict.fromkeys(run.task for run in runs)
    return {
        "baseline": baseline,
        "missing": [run.name for run, found in read.items() if found is None],
        "settings": shared_settings(finished),
        "versions": _all_versions(finished),
        "tasks": {
            task: summarise_task([one for one in finished if one.run.task == task], methods, baseline)
            for task in tasks
            if any(one.run.task == task for one in finished)
        },
    }


def shared_settings(finished: Sequence[FinishedRun]) -> dict[str, Any]:
    """The settings that all runs share, without those that identify a run.

    Raises:
      InputError: naming a run with different settings.
    """
    first = finished[0].settings
    for one in finished[1:]:
        theirs = one.settings.flat()
        try:
            ours = first.replace(methods=one.settings.methods, **{name: theirs[name] for name in _PER_RUN})
            resuming(ours, one.settings)
        except InputError as error:
            raise InputError(f"{one.run.name} cannot be compared with {finished[0].run.name}: {error}") from None
    return {name: value for name, value in first.to_dict().items() if name not in _PER_RUN}


def summarise_task(finished: Sequence[FinishedRun], methods: Sequence[str], baseline: str) -> dict[str, Any]:
    """The numbers of one task: facts about the data, and ``methods``: method -> its numbers, if it has a finished run.

    Args:
      finished: the task's finished runs, at least one.
      methods: names in the order of the report.
      baseline: the method to compare with.
    """
    facts = finished[0].results
    by_method = {name: [one for one in finished if one.run.method == name] for name in methods}
    baseline_scores = {one.run.seed: one.score for one in by_method[baseline]}
    table = {}
    for name, runs in by_method.items():
        if not runs:
            continue
        scores = {one.run.seed: one.score for one in runs}
        seconds = [s for s in (one.seconds_per_step() for one in runs) if s is not None]
        table[name] = {
            "scores": scores,
            **describe(list(scores.values())),
            "best_mean": float(np.mean([one.best_score for one in runs])),
            "difference": None if name == baseline else paired_difference(scores, baseline_scores),
            "seconds_per_step": float(np.median(seconds)) if seconds else None,
            "curves": {
                "loss": mean_curve([one.losses() for one in runs]),
                "score": mean_curve([one.scores() for one in runs]),
            },
            "concentration": mean_concentration([one.results.get("concentration") for one in runs]),
        }
    return {
        "metric": facts["main_metric"],
        "data": facts["data"],
        "train_examples": facts["train_examples"],
        "eval_examples": facts["eval_examples"],
        "majority_class": facts["majority_class"]["metrics"][facts["main_metric"]],
        "methods": table,
    }


def describe(values: Sequence[float]) -> dict[str, float | int | None]:
    """``n``, ``mean``, ``sd`` (of the sample, with n - 1; None for one value), ``min`` and ``max``."""
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def paired_difference(scores: dict[int, float], baseline: dict[int, float]) -> dict[str, Any]:
    """Differences from the baseline, seed by seed, over the seeds that both have.

    Differences are rounded to 12 decimals, so that equal differences of scores such as 0.85 and 0.84 are ties.

    Args:
      scores: seed -> score.
      baseline: seed -> score.

    Returns:
      ``seeds``, ``values``, ``mean`` (None without a common seed), ``interval`` (low, high: the mean's bootstrap
      interval, BCa, at 95 %) or None, ``p_value`` (Wilcoxon's signed-rank test, two-sided) or None,
      ``smallest_p_value`` that so many differences allow, and ``notes`` on what is missing and why.
    """
    seeds = [seed for seed in scores if seed in baseline]
    values = np.round([scores[seed] - baseline[seed] for seed in seeds], 12)
    interval, on_interval = bootstrap_interval(values)
    p_value, on_test = wilcoxon_p_value(values)
    return {
        "seeds": seeds,
        "values": values.tolist(),
        "mean": float(values.mean()) if len(seeds) else None,
        "interval": interval,
        "p_value": p_value,
        "smallest_p_value": smallest_p_value(len(seeds)),
        "notes": [note for note in (on_interval, on_test) if note],
    }


def smallest_p_value(count: int) -> float:
    """The smallest two-sided p-value of Wilcoxon's test on ``count`` pairs: 2 / 2^count."""
    return min(1.0, 2.0 / 2**count)


def bootstrap_interval(values: np.ndarray) -> tuple[list[float] | None, str | None]:
    """The mean's 95 % bootstrap interval (BCa, Efron 1987; by SciPy), or None and a note that says why.

    The resampling starts from a fixed seed: the same values give the same interval.

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
    """The two-sided p-value of Wilcoxon's signed-rank test that differences lie around 0, and a note on zeros.

    Zeros are left out, as Wilcoxon (1945) does.

    Args:
      values: (n,).
    """
    nonzero = values[values != 0]
    if not len(nonzero):
        return None, "no test: all differences are 0" if len(values) else "no test: no common seed"
    zeros = len(values) - len(nonzero)
    p_value = float(scipy.stats.wilcoxon(nonzero).pvalue)
    return p_value, f"the test omits {zeros} difference(s) of 0" if zeros else None


def mean_curve(series: Sequence[dict[int, float]]) -> dict[str, list[float]]:
    """Mean, lowest and highest value over runs, at the steps that all of them share.

    Args:
      series: step -> value, for each run.

    Returns:
      ``step``, ``mean``, ``low`` and ``high``, lists of one length.
    """
    steps = sorted(set.intersection(*(set(values) for values in series)))
    table = np.array([[values[step] for step in steps] for values in series], np.float64)
    return {
        "step": steps,
        "mean": table.mean(0).tolist(),
        "low": table.min(0).tolist(),
        "high": table.max(0).tolist(),
    }


def mean_concentration(measured: Sequence[Concentration | None]) -> dict[str, Any] | None:
    """Means over runs of the concentration of sensitivity, and of its histogram if all runs have one.

    Args:
      measured: the ``concentration`` of every run's results.json, or None.

    Returns:
      ``before`` and ``after`` training: name of a figure -> `describe` of it over the runs; ``histogram``: ``edges``
      (powers of 10), and the mean shares ``before`` and ``after``, or None. None if a run was not measured.
    """
    known = [one for one in measured if one is not None]
    if len(known) < len(measured):
        return None
    histograms = [one["log10_histogram"] for one in known if "log10_histogram" in one]
    all_alike = len(histograms) == len(known) and all(one["edges"] == histograms[0]["edges"] for one in histograms)
    parts = {"before": [one["before"]["all"] for one in known], "after": [one["after"]["all"] for one in known]}
    return {
        **{
            when: {figure: describe([one[figure] for one in figures]) for figure in FIGURES}
            for when, figures in parts.items()
        },
        "histogram": _mean_histogram(histograms) if all_alike else None,
    }


def _mean_histogram(histograms: Sequence[Histogram]) -> dict[str, list[float]]:
    before, after = (np.mean([one[when] for one in histograms], axis=0).tolist() for when in ("before", "after"))
    return {"edges": histograms[0]["edges"], "before": before, "after": after}


def _all_versions(finished):
    names = dict.fromkeys(name for one in finished for name in one.results["versions"])
    return {
        name: list(dict.fromkeys(v for v in (one.results["versions"].get(name) for one in finished) if v))
        for name in names
    }
