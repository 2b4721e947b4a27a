"""Scores of a model on the validation data, and its predictions for the test data."""

import csv
import dataclasses
import functools
import io
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pats_jax import models
from pats_jax.core.files import JsonObject, make_folder, write_text
from pats_jax.data import batches, out_of_domain, readers, tasks
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.labels import respelled
from pats_jax.train_state import Batch
from pats_jax.training import metrics
from pats_jax.training.loop import predict_logits
from pats_jax.training.runners import CompiledProgram, MeshRunner
from pats_jax.training.shape_costs import MOST_BUCKETS


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Scores parameters on the validation splits and writes predictions for the test splits.

    Attributes:
      predict: returns logits (batch, num_labels) for parameters and this process's own rows of a batch.
      runner: distributes rows over the devices.
      task: the task, with its metrics.
      splits: the data by name.
      tokenize: returns the tokens of a split by its name; called at each use.
      batch_size: number of rows per device.
      interrupt: called after every batch; what it raises ends the prediction.
      order: for each class of the task, its place in the model's head, (classes,); None if the order is the same.
      shape_cost: see `shape_costs`, for one pass.
      evaluations: the number of times that the validation data is scored.
      last_logits: the logits of the last evaluation, by split.
    """

    predict: CompiledProgram
    runner: MeshRunner
    task: tasks.Task
    splits: dict[str, readers.Split]
    tokenize: Callable[[str], batches.Tokens]
    batch_size: int
    interrupt: Callable[[], None] = lambda: None
    order: np.ndarray | None = None
    shape_cost: float = 0.0
    evaluations: int = 1
    last_logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def logits(self, params: Any, name: str) -> np.ndarray:
        """Logits (rows, num_labels) of a split, in the order of the task's classes.

        Raises:
          InputError: if they are not finite, for instance because the model has diverged.
        """
        logits = self.raw_logits(params, name)
        check_finite(logits, "lower learning_rate" if "train" in self.splits else DAMAGED)
        return logits if self.order is None else logits[:, self.order]

    def raw_logits(self, params: Any, name: str) -> np.ndarray:
        """Logits (rows, num_labels) of a split, in the order of the model's head, finite or not."""
        return predict_logits(self._predict, params, self.rows_and_batches(name), len(self.tokenize(name)))

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """Functions that compile the programs of `evaluate`, one per shape, for the shapes of parameters."""
        names = [name for name in self.splits if name.startswith("validation")]
        shapes = {batch["input_ids"].shape: batch for name in names for _, batch in self.rows_and_batches(name)}
        return [functools.partial(self.predict.compile, params, batch) for batch in shapes.values()]

    def rows_and_batches(self, name: str) -> Iterator[tuple[np.ndarray, Batch]]:
        """Row numbers and batches of a split, with only this process's own rows."""
        tokens, devices = self.tokenize(name), self.runner.num_devices
        passes = self.evaluations if name.startswith("validation") else 1
        boundaries = batches.bucket_boundaries(tokens.lengths, MOST_BUCKETS, shape_cost=self.shape_cost / passes)
        batch_size = min(self.batch_size, -(-len(tokens) // devices)) * devices
        own = self.runner.own_rows(batch_size)
        return batches.eval_batches(tokens, None, batch_size, boundaries, own=own)

    def _predict(self, params, batch):
        self.interrupt()
        return self.predict(params, batch)

    def evaluate(self, params: Any) -> dict[str, float]:
        """The task's metrics on the validation split; those of MNLI's mismatched split end in ``_mm``."""

        def answer(name):
            self.last_logits[name] = self.logits(params, name)
            return decide(self.last_logits[name], self.task)

        return self._scores(answer)

    def evaluate_majority(self) -> dict[str, float]:
        """The metrics of a constant prediction: the most frequent class (or the mean score) of the training labels.

        Of several labels to a text, those that more than half of the texts have.
        """
        labels = true_labels(self.splits.get("train") or self.splits["validation"])
        answer = constant_answer(labels, self.task)
        return self._scores(lambda name: np.repeat(answer[None], len(self.splits[name]), axis=0))

    def evaluate_out_of_domain(self, params: Any, names: Iterable[str]) -> dict[str, JsonObject]:
        """Accuracy and number of rows on other inference sets, by name; see `fold` for sets with two classes."""
        scores = {}
        for name in names:
            split = self.splits[name]
            answers = decide(self.logits(params, name), self.task)
            names = split.label_names or ()
            folded = fold(answers, respelled(self.task.labels or (), out_of_domain.THREE_CLASSES), names)
            accuracy = metrics.compute_metrics(("accuracy",), folded, true_labels(split))
            scores[name] = {"metrics": accuracy, "examples": len(split)}
        return scores

    def _scores(self, answer: Callable[[str], np.ndarray]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, suffix in (("validation", ""), ("validation_mismatched", "_mm")):
            if name in self.splits:
                split_scores = metrics.compute_metrics(self.task, answer(name), true_labels(self.splits[name]))
                scores |= {f"{metric}{suffix}": score for metric, score in split_scores.items()}
        return scores

    def predictions(self, params: Any) -> dict[str, str]:
        """The files for the GLUE server, by name: a header, then index, tab and prediction for each row.

        Each file of classes has a counterpart ``probabilities/FILE``, with a column for each class.
        """
        files = {}
        for name in ("test", "test_mismatched", "ax"):
            if name not in self.splits:
                continue
            task = tasks.get_task("ax") if name == "ax" else self.task
            logits, ids = self.logits(params, name), self.splits[name].ids
            rows = zip(ids, map(task.format_prediction, decide(logits, task)), strict=True)
            file = task.prediction_files["test" if name == "ax" else name]
            files[file] = to_tsv(("index", "prediction"), rows)
            if task.labels is not None:
                files[f"probabilities/{file}"] = probability_table(
                    ids, logits, task.labels, is_multi_label=task.is_multi_label
                )
        return files


def probability_table(
    ids: Sequence[str],
    logits: np.ndarray,
    names: Sequence[str],
    texts: Mapping[str, Sequence[str]] | None = None,
    digits: int = 4,
    is_multi_label: bool = False,
) -> str:
    """A TSV with the columns ``index`` and ``prediction``, by name, one for the probability of each class, and texts.

    Args:
      ids: of the rows.
      logits: (rows, classes).
      names: of the classes.
      texts: further columns, each (rows,).
      digits: of the probabilities, behind the point.
      is_multi_label: whether a row may have several of the classes.
    """
    texts = texts or {}
    if is_multi_label:
        said = [tasks.join_labels(names, row) for row in logits > 0]
    else:
        said = [names[index] for index in np.argmax(logits, axis=1)]
    rows = (
        (index, answer, *(f"{p:.{digits}f}" for p in row), *further)
        for index, answer, row, *further in zip(
            ids, said, probabilities(logits, is_multi_label), *texts.values(), strict=True
        )
    )
    return to_tsv(("index", "prediction", *names, *texts), rows)


def probabilities(logits: np.ndarray, is_multi_label: bool = False) -> np.ndarray:
    """The probability of each class, or of each of several labels, (rows, num_labels), from logits of this shape."""
    import scipy.special  # the help of the program needs none

    return scipy.special.expit(logits) if is_multi_label else scipy.special.softmax(logits, axis=1)


def to_tsv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table with one line per row and tabs between cells, whatever characters ids and labels contain.

    Tabs, line feeds and carriage returns in a cell are written ``\t``, ``\n`` and ``\r``; a cell with quotes is quoted
    as in CSV.

    Examples:
      >>> to_tsv(("index", "prediction"), [("7", "so\tso"), ("8", "good")])
      'index\tprediction\n7\tso\\tso\n8\tgood\n'
    """
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writerows([cell.translate(_ESCAPES) for cell in row] for row in (header, *rows))
    return out.getvalue()


_ESCAPES = str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r"})


def check_finite(logits: np.ndarray, what_to_do: str) -> None:
    """Raises InputError if an output of the model is NaN or infinite."""
    if not np.isfinite(logits).all():
        raise InputError(f"the model's outputs are not finite; {what_to_do}")


DAMAGED = "the checkpoint is damaged, or training had diverged; use another"


def write_files(folder: pathlib.Path, texts: dict[str, str]) -> None:
    """Writes texts, by file name, to a folder; folders are created if missing."""
    for name, text in texts.items():
        make_folder((folder / name).parent)
        write_text(folder / name, text)


def true_labels(split: readers.Split) -> np.ndarray:
    """The labels (rows,) of a split that must have them."""
    if split.labels is None:
        raise InputError("the validation data has no labels; use a file with a label column")
    return split.labels


def decide(logits: np.ndarray, task: tasks.Task) -> np.ndarray:
    """Predicted scores (rows,) for regression, else class indices (rows,), from logits (rows, num_labels).

    With several labels to a text, 1 for those whose probability is above one half, else 0, (rows, num_labels).
    """
    if task.is_multi_label:
        return (logits > 0).astype(np.int32)
    return logits[:, 0] if task.is_regression else np.argmax(logits, axis=1)


def constant_answer(labels: np.ndarray, task: tasks.Task) -> np.ndarray:
    """The answer of a model that knows the labels alone, () or (labels,): see `Predictor.evaluate_majority`."""
    if task.is_multi_label:
        return (labels.mean(axis=0) > 0.5).astype(np.int32)
    return np.asarray(labels.mean() if task.is_regression else np.bincount(labels).argmax())


def fold(answers: np.ndarray, labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Converts predictions of a three-class inference model to the classes of a set that may have two.

    The model predicts the class with the largest of its three probabilities; neutral and contradiction then both become
    not_entailment if the set has that class. The probabilities of these two are not added, so an entailment of 0.4 wins
    over 0.3 and 0.3. This is the rule of the DPS paper (arXiv 2211.01642).

    Args:
      answers: class indices of the model, (rows,).
      labels: the model's classes by index.
      names: the set's classes by index.

    Returns:
      Class indices of the set, (rows,).

    Examples:
      >>> fold(np.array([0, 1, 2]), ("contradiction", "entailment", "neutral"), ("entailment", "not_entailment"))
      array([1, 0, 1])
    """
    index = [names.index(label if label in names else "not_entailment") for label in labels]
    return np.asarray(index)[answers]


def sequence_length(asked: int, model: models.SequenceClassifier) -> int:
    """``--max_seq_length``, reduced with a warning to the model's number of positions.

    Raises:
      InputError: if virtual tokens leave no room for a text.
    """
    longest = model.max_length
    if isinstance(model, peft.PeftClassifier) and longest < _SHORTEST_TEXT:
        raise InputError(
            f"prompt_length, prefix_length: too long; they leave {longest} of the model's positions for the text"
        )
    if asked > longest:
        warnings.warn(f"max_seq_length {asked} exceeds the model's {longest} positions; using {longest}", stacklevel=2)
    return min(asked, longest)


_SHORTEST_TEXT = 8  # tokens: a pair of sentences has three special ones
