"""The GLUE tasks, one row each: where their texts and labels are, how they are scored, what the server expects.

Three sources agree on the tasks but not on their details, and the table holds all three:

* the TSV folders of the GLUE distribution (Wang et al., ICLR 2019, gluebenchmark.com);
* the hub's ``nyu-mll/glue``, whose order of labels is the order of the class indices here too;
* the files that the GLUE server reads: header ``index<TAB>prediction``, one file per test set, with as many rows as the
  test set (the card of ``nyu-mll/glue`` counts them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pats_jax.errors import InputError, shown

_CLASSES, _SCORES = ("accuracy", "macro_f1", "matthews_correlation"), ("pearson", "spearmanr")
_SEVERAL = ("micro_f1", "macro_f1", "accuracy")
_FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
_NLI = ("entailment", "neutral", "contradiction")
_TWO_WAY_NLI = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_COLA_COLUMNS = ("source", "label", "author_mark", "sentence")


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
      name: the name in lower case, as in the ``run_glue`` examples; also the configuration of ``nyu-mll/glue``.
      folder: folder of the GLUE distribution.
      tsv_texts: columns of the one or two texts in the TSV files.
      hub_texts: the same columns in ``nyu-mll/glue``.
      tsv_label: column of the label in the labelled TSV files.
      labels: names of the classes in the order of their indices; None for regression.
      metrics: names of functions in ``pats_jax.training.metrics``.
      prediction_files: test split -> file that the GLUE server reads.
      test_rows: test split -> rows of GLUE's test set, which the server counts; the built-in data has fewer.
      files: split -> names its TSV file in ``folder`` may have, the distribution's own first.
      hub_splits: split -> split of ``nyu-mll/glue``.
      tsv_label_is_name: whether the TSV files, and the server, write a label by name; else by class index.
      headerless: TSV file without a header line -> its columns.
      score_range: lowest and highest score of a regression task.
      is_multi_label: whether a text may have several of the labels.
      best_by: the score that picks the best model, if it is not the one of ``main_metric``'s rule.
    """

    name: str
    folder: str
    tsv_texts: tuple[str, ...]
    hub_texts: tuple[str, ...]
    tsv_label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    prediction_files: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]
    hub_splits: Mapping[str, str]
    test_rows: Mapping[str, int] = field(default_factory=dict)
    tsv_label_is_name: bool = False
    headerless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    is_multi_label: bool = False
    best_by: str | None = None

    @property
    def num_labels(self) -> int:
        """Width of the model's head: the number of classes, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def main_metric(self) -> str:
        """The score that picks the best model: the only metric, or the mean of two as on the GLUE leaderboard."""
        if self.best_by:
            return self.best_by
        return self.metrics[0] if len(self.metrics) == 1 else "combined_score"

    def scored_by(self, name: str) -> "Task":
        """The same task, the best model of which is picked by a score, which may be none of its metrics.

        Raises:
          InputError: if it is not a score of such labels; the message lists those that are.
        """
        kind = _SEVERAL if self.is_multi_label else _SCORES if self.is_regression else _CLASSES
        own = (*self.metrics, "combined_score") if len(self.metrics) > 1 else self.metrics
        choices = tuple(dict.fromkeys((*own, *kind)))
        plain = name.removeprefix("eval_")
        if plain not in choices:
            told = ", ".join(choices)
            raise InputError(f"--metric_for_best_model {shown(name, quoted=False)}: choose one of {told}")
        return replace(self, best_by=plain)

    def format_prediction(self, prediction: Any) -> str:
        """Writes one prediction as the GLUE server reads it.

        Args:
          prediction: a class index, or a score, which is clipped to the task's range and written with three decimals;
            with several labels, 0 or 1 for each of them, (labels,).
        """
        if self.is_multi_label:
            return join_labels(self.labels or (), prediction)
        if self.labels is None:
            low, high = self.score_range or (float("-inf"), float("inf"))
            return f"{min(max(float(prediction), low), high):.3f}"
        index = int(prediction)
        return self.labels[index] if self.tsv_label_is_name else str(index)


def _task(name: str, folder: str, tsv_texts: tuple[str, ...], *, labels: tuple[str, ...] | None, **other) -> Task:
    """A row whose unnamed fields are those of an ordinary GLUE task."""
    fields = {
        "hub_texts": tsv_texts,
        "tsv_label": "label",
        "metrics": ("accuracy",),
        "prediction_files": {"test": f"{folder}.tsv"},
        "files": _FILES,
        "hub_splits": {split: split for split in _FILES},
    }
    return Task(name=name, folder=folder, tsv_texts=tsv_texts, labels=labels, **(fields | other))


_ROWS = (
    _task(
        "cola",
        "CoLA",
        ("sentence",),
        labels=("unacceptable", "acceptable"),
        test_rows={"test": 1063},
        metrics=("matthews_correlation",),
        headerless={"train.tsv": _COLA_COLUMNS, "dev.tsv": _COLA_COLUMNS},
    ),
    _task("sst2", "SST-2", ("sentence",), labels=("negative", "positive"), test_rows={"test": 1821}),
    _task(
        "mrpc",
        "MRPC",
        ("#1 String", "#2 String"),
        hub_texts=_PAIR,
        tsv_label="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        test_rows={"test": 1725},
        # GLUE's test.tsv is made from the corpus' own test file, which has the labels.
        files={**_FILES, "test": ("test.tsv", "msr_paraphrase_test.txt")},
    ),
    _task(
        "stsb",
        "STS-B",
        _PAIR,
        tsv_label="score",
        labels=None,
        metrics=("pearson", "spearmanr"),
        score_range=(0.0, 5.0),
        test_rows={"test": 1379},
    ),
    _task(
        "qqp",
        "QQP",
        ("question1", "question2"),
        tsv_label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        test_rows={"test": 390965},
    ),
    _task(
        "mnli",
        "MNLI",
        _PAIR,
        hub_texts=("premise", "hypothesis"),
        tsv_label="gold_label",
        tsv_label_is_name=True,
        labels=_NLI,
        files={
            "train": ("train.tsv",),
            "validation": ("dev_matched.tsv",),
            "validation_mismatched": ("dev_mismatched.tsv",),
            "test": ("test_matched.tsv",),
            "test_mismatched": ("test_mismatched.tsv",),
        },
        hub_splits={
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
            "test": "test_matched",
            "test_mismatched": "test_mismatched",
        },
        prediction_files={"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        test_rows={"test": 9796, "test_mismatched": 9847},
    ),
    _task(
        "qnli", "QNLI", ("question", "sentence"), tsv_label_is_name=True, labels=_TWO_WAY_NLI, test_rows={"test": 5463}
    ),
    _task("rte", "RTE", _PAIR, tsv_label_is_name=True, labels=_TWO_WAY_NLI, test_rows={"test": 3000}),
    _task("wnli", "WNLI", _PAIR, labels=("not_entailment", "entailment"), test_rows={"test": 146}),
    # The diagnostic set has no training data and no public labels: a model trained on MNLI answers it.
    _task(
        "ax",
        "diagnostic",
        _PAIR,
        hub_texts=("premise", "hypothesis"),
        tsv_label_is_name=True,
        labels=_NLI,
        metrics=("matthews_correlation",),
        files={"test": ("diagnostic.tsv", "AX.tsv")},
        hub_splits={"test": "test"},
        prediction_files={"test": "AX.tsv"},
        test_rows={"test": 1104},
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def get_task(name: str, flag: str = "task_name") -> Task:
    """Looks a task up by its name, in upper or lower case; the flag is for the error message.

    Raises:
      InputError: if there is no such task; the message lists all tasks.
    """
    if name.lower() not in TASKS:
        raise InputError(f"{flag} {shown(name, quoted=False)}: no such task; choose one of {', '.join(TASKS)}")
    return TASKS[name.lower()]


def join_labels(names: Sequence[str], has: Sequence[float]) -> str:
    """The labels that a text has, ``a, b``.

    Examples:
      >>> join_labels(("a", "b", "c"), (1, 0, 1))
      'a, c'
    """
    return ", ".join(name for name, one in zip(names, has, strict=True) if one)


def own_task(labels: tuple[str, ...] | None, *, is_multi_label: bool = False) -> Task:
    """The row for your own data.

    Classes are scored by accuracy; F1 is left out, because nothing says which of two classes is the positive one.
    Scores are scored by their correlations, and several labels to a text by micro and macro F1, of which the first
    counts.

    Args:
      labels: names of the classes in the order of their indices, as written in predictions; None for scores.
      is_multi_label: whether a text may have several of them.
    """
    metrics = ("pearson", "spearmanr") if labels is None else ("accuracy",)
    if is_multi_label:
        metrics = ("micro_f1", "macro_f1")
    files = {"test": "test.tsv"}
    own = _task("own", "own", (), labels=labels, metrics=metrics, tsv_label_is_name=True, prediction_files=files)
    return replace(own, is_multi_label=is_multi_label, best_by="micro_f1" if is_multi_label else None)
