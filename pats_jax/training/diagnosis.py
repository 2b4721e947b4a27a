"""Examines a model on labelled rows: figures by class, calibration, an interval, the rows with the largest loss.

`pats-jax glue` examines the model that it keeps on its validation data: `examine` returns everything, ``record`` is its
part of results.json, and ``tables`` are the files in the run's folder ``diagnosis/``.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.data.readers import Split
from pats_jax.data.tasks import Task, join_labels
from pats_jax.reporting import plots
from pats_jax.training import metrics
from pats_jax.training.evaluation import Predictor, decide, probabilities, to_tsv, true_labels

LEVEL = 0.95
RESAMPLES = 1000
BINS = 15  # of confidence, as Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), take them
COSTLIEST = 20


@dataclasses.dataclass(frozen=True)
class Interval:
    """A bootstrap interval of a score: the scores that the same model may get on other rows of the same kind.

    It says nothing about other training seeds.
    """

    low: float
    high: float
    level: float = LEVEL
    resamples: int = RESAMPLES


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """How well one class is recognised; a figure that would divide by 0 is 0.

    Attributes:
      label: its name.
      precision: the share of the rows predicted as this class that belong to it.
      recall: the share of its rows that are predicted as it.
      f1: the harmonic mean of precision and recall.
      support: the number of its rows.
      predicted: the number of rows predicted as it.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclasses.dataclass(frozen=True)
class Bin:
    """The rows whose largest probability is in (low, high]: its mean, and the share that is right; 0 without rows."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Scored:
    """What every examination starts from.

    Attributes:
      split: the rows.
      scores: the values of the task's metrics.
      main_metric: the name of the main metric.
      interval: the interval of the main metric.
    """

    split: Split
    scores: dict[str, float]
    main_metric: str
    interval: Interval

    def _summary(self, loss: float) -> JsonObject:
        """The entries that all records begin with."""
        return {
            "rows": len(self.split),
            "metric": self.main_metric,
            "score": self.scores[self.main_metric],
            "interval": dataclasses.asdict(self.interval),
            "loss": loss,
        }


@dataclasses.dataclass(frozen=True)
class Classification(Scored):
    """The examination of a classifier.

    Attributes:
      names: the names of the classes.
      logits: the logits, (rows, classes) float32.
    """

    names: tuple[str, ...]
    logits: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Class indices, (rows,)."""
        return true_labels(self.split)

    @property
    def answers(self) -> np.ndarray:
        """The class with the largest logit, (rows,)."""
        return np.argmax(self.logits, axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits, (rows, classes) float64."""
        import scipy.special

        return scipy.special.softmax(self.logits.astype(np.float64), axis=1)

    @property
    def losses(self) -> np.ndarray:
        """The cross-entropy of each row, (rows,) float64."""
        import scipy.special

        log = scipy.special.log_softmax(self.logits.astype(np.float64), axis=1)
        return -log[np.arange(len(log)), self.labels]

    @property
    def confusion(self) -> np.ndarray:
        """The number of rows by true and predicted class, (classes, classes)."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.labels, self.answers, labels=np.arange(len(self.names)))

    @property
    def classes(self) -> list[ClassFigures]:
        """The figures of each class."""
        from sklearn.metrics import precision_recall_fscore_support

        every = np.arange(len(self.names))
        columns = precision_recall_fscore_support(self.labels, self.answers, labels=every, zero_division=0.0)
        predicted = np.bincount(self.answers, minlength=len(every))
        return [
            ClassFigures(name, float(p), float(r), float(f), int(s), int(n))
            for name, p, r, f, s, n in zip(self.names, *columns, predicted, strict=True)
        ]

    @property
    def bins(self) -> list[Bin]:
        """The rows by confidence."""
        return confidence_bins(self.probabilities, self.labels)

    def record(self) -> JsonObject:
        """As `records.ClassificationDiagnosis`."""
        from sklearn.metrics import f1_score

        most_frequent = int(np.argmax(np.bincount(self.labels)))
        constant = np.full(len(self.labels), most_frequent)
        names = list(self.scores)
        always = {name: metrics.METRICS[name](constant, self.labels) for name in names if name in metrics.METRICS}
        if "combined_score" in names:  # the mean of those before it
            averaged = names[: names.index("combined_score")]
            always["combined_score"] = float(np.mean([always[name] for name in averaged]))
        return self._summary(float(np.mean(self.losses))) | {
            "macro_f1": metrics.macro_f1(self.answers, self.labels),
            "micro_f1": float(f1_score(self.labels, self.answers, average="micro")),
            "calibration_error": calibration_error(self.bins),
            "classes": [dataclasses.asdict(one) for one in self.classes],
            "majority_class": {
                "label": self.names[most_frequent],
                "share": float(np.mean(self.labels == most_frequent)),
                "metrics": always | {"macro_f1": metrics.macro_f1(constant, self.labels)},
            },
        }

    def draw(self, folder: pathlib.Path) -> None:
        """Draws the confusion matrix and the reliability of probabilities."""
        plots.plot_confusion(folder / "confusion.png", self.confusion, self.names)
        bins = [(one.confidence, one.accuracy, one.rows) for one in self.bins if one.rows]
        plots.plot_reliability(folder / "reliability.png", *map(np.array, zip(*bins, strict=True)))

    def tables(self) -> dict[str, str]:
        """The files of ``diagnosis/`` by name."""
        label_of = [self.names[label] for label in self.labels]
        answer_of = [self.names[answer] for answer in self.answers]
        losses, probabilities = self.losses, self.probabilities
        worst = np.argsort(-losses, kind="stable")[:COSTLIEST]
        texts = self.split.texts
        return {
            "classes.tsv": to_tsv(
                [field.name for field in dataclasses.fields(ClassFigures)],
                ([_cell(value) for value in dataclasses.astuple(one)] for one in self.classes),
            ),
            "confusion.tsv": to_tsv(
                ("label", *(f"predicted {name}" for name in self.names)),
                ([name, *map(str, counts)] for name, counts in zip(self.names, self.confusion, strict=True)),
            ),
            "reliability.tsv": to_tsv(
                [field.name for field in dataclasses.fields(Bin)],
                ([_cell(value) for value in dataclasses.astuple(one)] for one in self.bins),
            ),
            "largest_losses.tsv": to_tsv(
                ("index", "label", "prediction", "loss", "probability_of_label", *texts),
                (
                    [self.split.ids[row], label_of[row], answer_of[row], f"{losses[row]:.4f}"]
                    + [f"{probabilities[row, self.labels[row]]:.4f}", *(column[row] for column in texts.values())]
                    for row in worst
                ),
            ),
            "validation.tsv": to_tsv(
                ("index", "label", "prediction", "loss", *self.names),
                (
                    [id, label, answer, f"{loss:.4f}", *(f"{p:.4f}" for p in row)]
                    for id, label, answer, loss, row in zip(
                        self.split.ids, label_of, answer_of, losses, probabilities, strict=True
                    )
                ),
            ),
        }


@dataclasses.dataclass(frozen=True)
class Regression(Scored):
    """The examination of a model that predicts scores.

    Attributes:
      answers: the predicted scores, (rows,) float32.
    """

    answers: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The true scores, (rows,)."""
        return true_labels(self.split)

    @property
    def residuals(self) -> np.ndarray:
        """Predicted minus true score, (rows,) float64."""
        return self.answers.astype(np.float64) - self.labels

    def record(self) -> JsonObject:
        """As `records.RegressionDiagnosis`."""
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        labels, answers = self.labels.astype(np.float64), self.answers.astype(np.float64)
        mean = np.full(len(labels), labels.mean())
        return self._summary(float(mean_squared_error(labels, answers))) | {
            "mean_absolute_error": float(mean_absolute_error(labels, answers)),
            "explained_variance": float(r2_score(labels, answers)) if np.ptp(labels) else 0.0,
            "mean_answer": {
                "value": float(mean[0]),
                "loss": float(mean_squared_error(labels, mean)),
                "mean_absolute_error": float(mean_absolute_error(labels, mean)),
            },
        }

    def draw(self, folder: pathlib.Path) -> None:
        """Draws the residuals."""
        plots.plot_residuals(folder / "residuals.png", self.labels, self.residuals)

    def tables(self) -> dict[str, str]:
        """The files of ``diagnosis/`` by name."""
        residuals, texts = self.residuals, self.split.texts
        worst = np.argsort(-np.abs(residuals), kind="stable")[:COSTLIEST]
        header = ("index", "label", "prediction", "residual")

        def line(row):
            values = (self.labels[row], self.answers[row], residuals[row])
            return [self.split.ids[row], *(f"{value:.4f}" for value in values)]

        return {
            "largest_residuals.tsv": to_tsv(
                (*header, *texts), ([*line(row), *(column[row] for column in texts.values())] for row in worst)
            ),
            "validation.tsv": to_tsv(header, map(line, range(len(residuals)))),
        }


@dataclasses.dataclass(frozen=True)
class SeveralLabels(Scored):
    """The examination of a model that may give a text several labels.

    Attributes:
      names: the names of the labels.
      logits: the logits, (rows, labels) float32.
    """

    names: tuple[str, ...]
    logits: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """0 or 1, (rows, labels)."""
        return true_labels(self.split).astype(np.int32)

    @property
    def answers(self) -> np.ndarray:
        """1 where the probability is above one half, else 0, (rows, labels)."""
        return (self.logits > 0).astype(np.int32)

    @property
    def losses(self) -> np.ndarray:
        """Mean over the labels of the sigmoid cross-entropy of each row, float64 (rows,)."""
        logits = self.logits.astype(np.float64)
        return np.mean(np.logaddexp(0.0, logits) - self.labels * logits, axis=1)

    @property
    def classes(self) -> list[ClassFigures]:
        """The figures of each label."""
        from sklearn.metrics import precision_recall_fscore_support

        columns = precision_recall_fscore_support(self.labels, self.answers, zero_division=0.0)
        return [
            ClassFigures(name, float(p), float(r), float(f), int(s), int(n))
            for name, p, r, f, s, n in zip(self.names, *columns, self.answers.sum(axis=0), strict=True)
        ]

    def record(self) -> JsonObject:
        """As `records.SeveralLabelsDiagnosis`."""
        return self._summary(float(np.mean(self.losses))) | {
            "macro_f1": metrics.macro_f1(self.answers, self.labels),
            "micro_f1": metrics.micro_f1(self.answers, self.labels),
            "exact_match": metrics.accuracy(self.answers, self.labels),
            "classes": [dataclasses.asdict(one) for one in self.classes],
        }

    def draw(self, folder: pathlib.Path) -> None:
        """There is no picture of several labels."""

    def tables(self) -> dict[str, str]:
        """The files of ``diagnosis/`` by name."""
        losses, texts = self.losses, self.split.texts
        right, given = ([join_labels(self.names, row) for row in rows] for rows in (self.labels, self.answers))
        worst = np.argsort(-losses, kind="stable")[:COSTLIEST]

        def line(row):
            return [self.split.ids[row], right[row], given[row], f"{losses[row]:.4f}"]

        shares = probabilities(self.logits.astype(np.float64), is_multi_label=True)
        header = ("index", "labels", "prediction", "loss")
        return {
            "classes.tsv": to_tsv(
                [field.name for field in dataclasses.fields(ClassFigures)],
                ([_cell(value) for value in dataclasses.astuple(one)] for one in self.classes),
            ),
            "largest_losses.tsv": to_tsv(
                (*header, *texts), ([*line(row), *(column[row] for column in texts.values())] for row in worst)
            ),
            "validation.tsv": to_tsv(
                (*header, *self.names), ([*line(row), *(f"{p:.4f}" for p in shares[row])] for row in range(len(losses)))
            ),
        }


Examination = Classification | Regression | SeveralLabels


def examine(predictor: Predictor, params: Any, *, model_step: int | None, evaluated_step: int) -> Examination:
    """Examines a model on the split ``validation``.

    Args:
      predictor: has the task and the splits.
      params: the parameters that the run keeps.
      model_step: their step; None if they were not trained.
      evaluated_step: the step of the last evaluation; if it is the same, its logits are reused.
    """
    split, task = predictor.splits["validation"], predictor.task
    logits = predictor.last_logits.get("validation") if model_step in (None, evaluated_step) else None
    return examine_logits(predictor.logits(params, "validation") if logits is None else logits, split, task)


def examine_logits(logits: np.ndarray, split: Split, task: Task) -> Examination:
    """Examines a model by its logits, (rows, num_labels), on labelled rows.

    Raises:
      InputError: if the rows have no labels.
    """
    answers, labels = decide(logits, task), true_labels(split)
    scores, main = metrics.compute_metrics(task, answers, labels), task.main_metric
    names = task.metrics if main == "combined_score" else (main,)
    interval = Interval(*metrics.bootstrap_interval(names, answers, labels, LEVEL, RESAMPLES))
    if task.labels is None:
        return Regression(split, scores, main, interval, answers)
    kind = SeveralLabels if task.is_multi_label else Classification
    return kind(split, scores, main, interval, task.labels, logits)


def confidence_bins(probabilities: np.ndarray, labels: np.ndarray, count: int = BINS) -> list[Bin]:
    """Groups rows by their largest probability, in bins of equal width.

    Args:
      probabilities: the probabilities, (rows, classes).
      labels: class indices, (rows,).
      count: number of bins.
    """
    confidence, right = probabilities.max(axis=1), np.argmax(probabilities, axis=1) == labels
    edges = np.linspace(0.0, 1.0, count + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, count - 1)
    rows = np.bincount(place, minlength=count)
    means = [np.bincount(place, values, count) / np.maximum(rows, 1) for values in (confidence, right)]
    table = zip(edges[:-1], edges[1:], rows, *means, strict=True)
    return [Bin(float(low), float(high), int(n), float(c), float(a)) for low, high, n, c, a in table]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: the mean over rows of |accuracy - confidence| of the row's bin."""
    return sum(one.rows * abs(one.accuracy - one.confidence) for one in bins) / sum(one.rows for one in bins)


def _cell(value):
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
