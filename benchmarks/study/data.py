"""The data of the study: rows as tokens of a vocabulary that has only what they use, and scores by confusion matrix."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pats_jax import models
from pats_jax.data import batches, readers, tasks
from pats_jax.models.config import EncoderConfig

# Tasks that share programs: the lengths that their batches are padded to.
GROUPS: dict[str, dict[str, Any]] = {
    "short": {"tasks": ("cola", "sst2"), "lengths": (16, 64)},
    "long": {"tasks": ("mrpc", "rte"), "lengths": (64, 128)},
}
TASKS = ("mrpc", "rte", "sst2", "cola")  # in the order in which they are trained
TRAIN_ROWS = {"sst2": 4000}


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's rows.

    Attributes:
      train: tokens of the training rows.
      train_labels: int32 (rows,).
      dev: tokens of the rows that are scored.
      dev_labels: int32 (rows,).
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
    data_dir: str, model: str, names: Sequence[str], lengths: dict[str, Sequence[int]] | None = None
) -> dict[str, Group]:
    """The groups of the named tasks.

    Args:
      data_dir: folder of GLUE's TSV files, or "builtin".
      model: folder, package or hub id of the checkpoint, whose tokenizer is used.
      names: of tasks.
      lengths: group -> lengths, in place of those of `GROUPS`.
    """
    tokenizer = models.load_tokenizer(model)
    groups = {}
    for name, group in GROUPS.items():
        of_group = tuple((lengths or {}).get(name, group["lengths"]))
        chosen = [task for task in group["tasks"] if task in names]
        if chosen:
            groups[name] = _group([(task, _load(data_dir, task, tokenizer, of_group[-1])) for task in chosen], of_group)
    return groups


def _load(data_dir, task, tokenizer, max_length):
    splits = readers.load_task(task, None if data_dir == "hub" else data_dir)
    train, dev = splits["train"].first(TRAIN_ROWS.get(task)), splits["validation"]
    tokens = [batches.tokenize(split, tokenizer, max_length) for split in (train, dev)]
    return TaskData(tokens[0], train.labels, tokens[1], dev.labels)


def _group(loaded, lengths):
    every = [tokens for _, data in loaded for tokens in (data.train, data.dev)]
    words = np.unique(np.concatenate([[every[0].pad_id], *(tokens.input_ids for tokens in every)]))

    def renumber(tokens):
        ids = np.searchsorted(words, tokens.input_ids).astype(np.int32)
        return dataclasses.replace(tokens, input_ids=ids, pad_id=int(np.searchsorted(words, tokens.pad_id)))

    tasks_ = {
        name: dataclasses.replace(data, train=renumber(data.train), dev=renumber(data.dev)) for name, data in loaded
    }
    return Group(lengths, tasks_, words)


@functools.cache
def main_metric(task: str) -> str:
    """The score that the study compares."""
    return tasks.get_task(task).main_metric


def confusion(predictions: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """How often each true class (first index) was given each answer (second index), of two classes."""
    return np.bincount(2 * labels + predictions, minlength=4).reshape(2, 2).tolist()


def score(task: str, counts: Sequence[Sequence[int]]) -> float:
    """The task's main metric from a confusion matrix; 0 where it is not defined, as in `pats_jax.metrics`."""
    (a, b), (c, d) = counts  # true 0: answered 0, 1; true 1: answered 0, 1
    accuracy = (a + d) / (a + b + c + d)
    if main_metric(task) == "accuracy":
        return accuracy
    if main_metric(task) == "combined_score":
        return (accuracy + (2 * d / (2 * d + b + c) if d else 0.0)) / 2
    product = float(a + b) * (c + d) * (a + c) * (b + d)
    return (a * d - b * c) / product**0.5 if product else 0.0


def records_file(folder: str) -> pathlib.Path:
    """Where the study writes what is finished."""
    return pathlib.Path(folder) / "runs.jsonl"
