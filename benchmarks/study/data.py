"""The data of the study: rows as tokens of a vocabulary that has only what they use, and scores."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pats_jax import models
from pats_jax.data import batches, low_resource, readers, tables, tasks
from pats_jax.data.tasks import Task
from pats_jax.errors import InputError
from pats_jax.models.config import EncoderConfig
from pats_jax.training import metrics

# Tasks that share programs, with the lengths that their batches are padded to: their heads have one size.
GROUPS: dict[str, dict[str, Any]] = {
    "short": {"tasks": ("cola", "sst2"), "lengths": (16, 64)},
    "long": {"tasks": ("mrpc", "rte"), "lengths": (64, 128)},
    "similarity": {"tasks": ("stsb",), "lengths": (32, 96)},
    "questions": {"tasks": ("trec",), "lengths": (16, 48)},
    "subjectivity": {"tasks": ("subj",), "lengths": (32, 64)},
}
TRAIN_ROWS = {"sst2": 4000}
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
OWN_TASKS = {"trec": tasks.own_task(TREC_CLASSES), "subj": tasks.own_task(("subjective", "objective"))}
_SCORED = 5  # SUBJ has no split of its own: each fifth row is scored


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's rows.

    Attributes:
      train: tokens of the training rows.
      train_labels: int32 classes or float32 scores, (rows,).
      dev: tokens of the rows that are scored.
      dev_labels: as those.
    """

    train: batches.Tokens
    train_labels: np.ndarray
    dev: batches.Tokens
    dev_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks that share a model's sizes, and so its programs.

    Attributes:
      lengths: that batches are padded to.
      tasks: their data by name.
      words: the ids of the checkpoint's vocabulary that occur in them, increasing.
    """

    lengths: tuple[int, ...]
    tasks: dict[str, TaskData]
    words: np.ndarray

    @property
    def task(self) -> Task:
        """One of them: all have as many labels."""
        return task_of(next(iter(self.tasks)))

    def alone(self, name: str) -> "Group":
        """The group with one of its tasks only."""
        return dataclasses.replace(self, tasks={name: self.tasks[name]})

    def with_all_words(self, vocab_size: int) -> "Group":
        """The group with all words of the checkpoint's vocabulary."""
        return self._numbered(lambda ids: self.words[ids], np.arange(vocab_size))

    def _numbered(self, number, words):
        """The group with another number for each word."""

        def of_tokens(tokens):
            ids = number(tokens.input_ids).astype(np.int32)
            return dataclasses.replace(tokens, input_ids=ids, pad_id=int(number(tokens.pad_id)))

        numbered = {
            name: dataclasses.replace(one, train=of_tokens(one.train), dev=of_tokens(one.dev))
            for name, one in self.tasks.items()
        }
        return Group(self.lengths, numbered, words)

    def shrink(self, params: Any, config: EncoderConfig) -> tuple[Any, EncoderConfig]:
        """A model whose table of words has only those of the tasks.

        The others take no part in loss or score: they have no gradient, and nothing reads them.
        """
        base = dict(params[config.base_prefix])
        table = base["embeddings"]["word_embeddings"]["embedding"]
        base["embeddings"] = {**base["embeddings"], "word_embeddings": {"embedding": np.asarray(table)[self.words]}}
        pad = int(np.searchsorted(self.words, config.pad_token_id))
        smaller = dataclasses.replace(config, vocab_size=len(self.words), pad_token_id=pad)
        return {**params, config.base_prefix: base}, smaller


def load_groups(
    data_dir: str,
    model: str,
    names: Sequence[str],
    lengths: dict[str, Sequence[int]] | None = None,
    texts_dir: str | None = None,
    train_rows: int | None = None,
) -> dict[str, Group]:
    """The groups of the named tasks.

    Args:
      data_dir: folder of GLUE's TSV files, or "builtin".
      model: folder, package or hub id of the checkpoint, whose tokenizer is used.
      names: of tasks.
      lengths: group -> lengths, in place of those of `GROUPS`.
      texts_dir: folder of the other tasks, ``TREC/`` and ``SUBJ/``.
      train_rows: training rows of each task, the same for all seeds, with the proportions of its labels.
    """
    tokenizer = models.load_tokenizer(model)
    groups = {}
    for name, group in GROUPS.items():
        of_group = tuple((lengths or {}).get(name, group["lengths"]))
        chosen = [task for task in group["tasks"] if task in names]
        loaded = {
            task: _tokenized(_load(data_dir, texts_dir, task, train_rows), tokenizer, of_group[-1]) for task in chosen
        }
        if loaded:
            groups[name] = _group(loaded, of_group)
    return groups


def why_missing(task: str, data_dir: str, texts_dir: str | None) -> str | None:
    """Why a task's data are not there; None if they are."""
    if task in OWN_TASKS:
        return None if texts_dir else "--texts_dir is not set"
    folder = pathlib.Path(data_dir) / task_of(task).folder
    return None if data_dir in ("builtin", "hub") or folder.is_dir() else f"{folder} does not exist"


def _load(data_dir, texts_dir, task, train_rows):
    if task in OWN_TASKS:
        train, dev = {"trec": read_trec, "subj": read_subj}[task](pathlib.Path(texts_dir))
    else:
        splits = readers.load_task(task, None if data_dir == "hub" else data_dir)
        train, dev = splits["train"].first(TRAIN_ROWS.get(task)), splits["validation"]
    if train_rows is not None:
        train = train.take(low_resource.stratified_rows(train.labels, train_rows, seed=0))
    return train, dev


def read_trec(folder: pathlib.Path) -> tuple[readers.Split, readers.Split]:
    """Training and test rows of TREC's questions, by their six coarse classes: lines ``CLASS:detail question``."""
    files = (folder / "TREC" / name for name in ("TREC.train", "TREC.test"))
    train, test = (_read_lines(path, TREC_CLASSES, lambda label: label.partition(":")[0]) for path in files)
    return train, test


def read_subj(folder: pathlib.Path) -> tuple[readers.Split, readers.Split]:
    """SUBJ's sentences, lines ``0 sentence`` or ``1 sentence``: rows to train on, and each fifth one to score."""
    every = _read_lines(folder / "SUBJ" / "subj.all", ("0", "1"), str)
    scored = np.arange(len(every)) % _SCORED == _SCORED - 1
    return every.take(np.flatnonzero(~scored)), every.take(np.flatnonzero(scored))


def _read_lines(path, classes, class_of):
    texts, labels = [], []
    for number, line in enumerate(tables.split_lines(tables.read_text(path)), 1):
        label, _, text = line.partition(" ")
        if class_of(label) not in classes or not text.strip():
            raise InputError(f"{path}:{number}: must be a label ({', '.join(classes)}), a space and a text")
        texts.append(text)
        labels.append(classes.index(class_of(label)))
    return readers.Split(texts, None, np.array(labels, np.int32), [str(row) for row in range(len(texts))])


def _tokenized(splits, tokenizer, max_length):
    train, dev = splits
    tokens = [batches.tokenize(split, tokenizer, max_length) for split in splits]
    return TaskData(tokens[0], train.labels, tokens[1], dev.labels)


def _group(loaded, lengths):
    every = [tokens for one in loaded.values() for tokens in (one.train, one.dev)]
    words = np.unique(np.concatenate([[every[0].pad_id], *(tokens.input_ids for tokens in every)]))
    return Group(lengths, loaded, words)._numbered(lambda ids: np.searchsorted(words, ids), words)


def task_of(name: str) -> Task:
    """A task by its name."""
    return OWN_TASKS.get(name) or tasks.get_task(name)


def main_metric(task: str) -> str:
    """The score that the study compares."""
    return task_of(task).main_metric


def evaluated(name: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What is written of a task's predictions: ``score``, the main metric, and what it is computed from.

    Args:
      name: of the task.
      logits: (rows, num_labels).
      labels: classes or scores, (rows,).

    Returns:
      ``score`` with ``confusion`` or, of scores, with their correlations, which are 0 if a prediction is not finite.
    """
    task = task_of(name)
    if task.is_regression:
        answers = logits[:, 0] if np.all(np.isfinite(logits)) else np.zeros(len(logits))
        found = metrics.compute_metrics(task, answers, labels)
        return {"score": found.pop(task.main_metric), **found}
    counts = confusion(np.argmax(logits, axis=1), labels, task.num_labels)
    return {"confusion": counts, "score": score(name, counts)}


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> list[list[int]]:
    """How often each true class (first index) was given each answer (second index)."""
    counts = np.bincount(classes * labels + predictions, minlength=classes**2)
    return counts.reshape(classes, classes).tolist()


def score(name: str, counts: Sequence[Sequence[int]]) -> float:
    """A task's main metric from a confusion matrix; 0 where it is not defined."""
    cells = np.array(counts)
    true, given = np.indices(cells.shape).reshape(2, -1)
    scores = [metrics.scores_of_counts(metric, true, given, cells.reshape(1, -1)) for metric in task_of(name).metrics]
    return float(np.mean(scores))


def records_file(folder: str) -> pathlib.Path:
    """Where the study writes what is finished."""
    return pathlib.Path(folder) / "runs.jsonl"
