"""How hard the built-in data is: word counting against fine-tuned models, for each task.

    python benchmarks/builtin_difficulty.py [RUN ...]

The baselines are scikit-learn's logistic regression (ridge regression for STS-B) on the single words and pairs of
neighbouring words that a text holds: of both texts together, of each text separately, of one text alone, and of each
with counts of what the two texts share. Each is tried at several strengths of regularisation, and the table shows the
best of all as measured on the dev rows themselves, which flatters the baseline. RUN are folders of ``pats-jax glue
--data_dir builtin``; of several runs of a task the table shows the mean of their best scores.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from pats_jax.core import files
from pats_jax.data.readers import Split, load_task
from pats_jax.data.tasks import TASKS, Task
from pats_jax.errors import InputError
from pats_jax.run.records import Scores
from pats_jax.training.metrics import compute_metrics

STRENGTHS = (0.03, 0.3, 3.0)  # C of the logistic regression: the inverse of its regularisation
NINE = [name for name in TASKS if name != "ax"]
MARGIN = 10.0  # points between word counting and a fine-tuned model that make a task worth solving
PAIR_FEATURES = ("together", "separately", "first only", "second only", "separately with overlap")


class Scored(TypedDict):
    """What is read of a run's results.json."""

    task_name: str
    best: Scores


def overlap(split: Split) -> np.ndarray:
    """Counts what the texts of each pair share: words, neighbouring words, words in one text only; (rows, 6)."""
    rows = []
    for first, second in zip(split.sentence1, split.sentence2 or (), strict=True):
        one, other = first.lower().strip(".?").split(), second.lower().strip(".?").split()
        neighbours, other_neighbours = set(itertools.pairwise(one)), set(itertools.pairwise(other))
        shared, union = set(one) & set(other), set(one) | set(other)
        only_first, only_second = set(one) - set(other), set(other) - set(one)
        shared_pairs = neighbours & other_neighbours
        rows.append(
            [len(shared), len(shared) / len(union), len(only_first), len(only_second), len(shared_pairs), one == other]
        )
    return np.array(rows, float)


def word_features(train: Split, dev: Split, kind: str) -> tuple[Any, Any]:
    """Which words and pairs of neighbouring words each row holds.

    Args:
      train: rows that the vocabulary is taken from.
      dev: other rows.
      kind: one of `PAIR_FEATURES`, or "one text".

    Returns:
      Two sparse matrices (rows, features) of zeros and ones, the overlap counts standardised.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import StandardScaler

    def count(train_texts, dev_texts):
        vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b|[,.?]", binary=True)
        return vectorizer.fit_transform(train_texts), vectorizer.transform(dev_texts)

    if kind in ("one text", "first only"):
        return count(train.sentence1, dev.sentence1)
    if kind == "second only":
        return count(train.sentence2, dev.sentence2)
    if kind == "together":
        return count(*([f"{a} {b}" for a, b in zip(s.sentence1, s.sentence2, strict=True)] for s in (train, dev)))
    parts = [count(train.sentence1, dev.sentence1), count(train.sentence2, dev.sentence2)]
    if kind == "separately with overlap":
        scaler = StandardScaler().fit(overlap(train))
        parts.append((scaler.transform(overlap(train)), scaler.transform(overlap(dev))))
    return tuple(scipy.sparse.hstack(matrices).tocsr() for matrices in zip(*parts, strict=True))


def word_scores(task: Task, train: Split, dev: Split) -> Iterator[tuple[float, str]]:
    """The main score (0 to 100) of each baseline on the dev rows, with the kind of its features."""
    from sklearn.linear_model import LogisticRegression, Ridge

    for kind in PAIR_FEATURES if train.sentence2 else ("one text",):
        train_features, dev_features = word_features(train, dev, kind)
        for strength in STRENGTHS:
            model = Ridge(1 / strength) if task.is_regression else LogisticRegression(C=strength, max_iter=2000)
            model.fit(train_features, train.labels)
            yield 100 * main_score(task, model.predict(dev_features), dev), kind


def main_score(task: Task, predictions: np.ndarray, dev: Split) -> float:
    """The task's main metric of predictions."""
    return compute_metrics(task, predictions, dev.labels)[task.main_metric]


def constant_score(task: Task, dev: Split) -> float:
    """The best main score (0 to 100) of giving every row the same answer."""
    answers = range(task.num_labels)
    return 100 * max(main_score(task, np.full(len(dev), answer), dev) for answer in answers)


def run_scores(folders: list[pathlib.Path]) -> dict[str, list[float]]:
    """Task name -> the best main scores (0 to 100) of its runs.

    Raises:
      InputError: naming the file, if a folder is not that of an evaluated run.
    """
    scores: dict[str, list[float]] = {}
    for folder in folders:
        path = folder / "results.json"
        results = files.read_record(path, Scored)
        task = TASKS.get(results["task_name"])
        if task is None or task.main_metric not in results["best"]["metrics"]:
            raise InputError(f"{path}: not the results of a run on a GLUE task")
        scores.setdefault(task.name, []).append(100 * results["best"]["metrics"][task.main_metric])
    return scores


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, metavar="RUN", help="run folders on the built-in data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the built-in data")
    parser.add_argument(
        "--tasks", nargs="+", default=[name for name in TASKS if name != "ax"], help="default: all nine"
    )
    arguments = parser.parse_args()

    tuned = run_scores(arguments.runs)
    print("| task | metric | constant answer | words, best of all | its features | fine-tuned | margin |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: |")
    margins = []
    for name in arguments.tasks:
        task, splits = TASKS[name], load_task(name, "builtin", seed=arguments.seed)
        words, kind = max(word_scores(task, splits["train"], splits["validation"]))
        row = [name, task.main_metric, f"{constant_score(task, splits['validation']):.1f}", f"{words:.1f}", kind]
        if name in tuned:
            margins.append(float(np.mean(tuned[name])) - words)
            row += [f"{np.mean(tuned[name]):.1f}", f"{margins[-1]:.1f}"]
        print("| " + " | ".join([*row, *["-"] * (7 - len(row))]) + " |", flush=True)
    if margins:
        print(f"\nMargin of {MARGIN:.0f} points or more: {sum(m >= MARGIN for m in margins)} of {len(margins)} tasks.")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
