"""A small training set drawn from a large one, with the same proportions of labels: ``--low_resource``."""

import numpy as np

from pats_jax.errors import InputError

QUANTILES = 10  # classes that scores are sorted into


def stratified_rows(labels: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Selects the rows to keep: a pure function of labels, rows and seed.

    Of class ``c`` with ``n_c`` of the ``n`` rows, ``rows * n_c / n`` are kept, rounded by the method of largest
    remainders (on a tie the class with the lower index goes first), but at least one row, which is taken from the class
    that is furthest above its share. Rows within a class are drawn at random. Scores are divided by quantiles into ten
    classes of equal size, or into ``rows`` classes if that is fewer.

    Stratification follows the DPS paper (arXiv 2211.01642); the rounding is ours.

    Args:
      labels: integer classes or float scores, (n,).
      rows: number of rows to keep.
      seed: a whole number of at least 0.

    Returns:
      Row numbers in increasing order, (rows,).

    Raises:
      InputError: if there are fewer rows than ``rows``, or more classes.

    Examples:
      >>> labels = np.array([0] * 6 + [1] * 3 + [2])
      >>> np.bincount(labels[stratified_rows(labels, 5, seed=0)]).tolist()
      [3, 1, 1]
    """
    if rows > len(labels):
        raise InputError(f"cannot draw {rows} training rows: there are only {len(labels)}")
    if np.issubdtype(labels.dtype, np.floating):
        labels = _quantiles(labels, min(QUANTILES, rows))
    classes, counts = np.unique(labels, return_counts=True)
    if rows < len(classes):
        raise InputError(f"cannot draw {rows} training rows: there are {len(classes)} labels")
    # Seed sequences with a spawn key share no numbers with those of the batches' order, which have none.
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    chosen = [
        generator.choice(np.flatnonzero(labels == name), size, replace=False)
        for name, size in zip(classes, _shares(counts, rows), strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _shares(counts: np.ndarray, rows: int) -> np.ndarray:
    """The number of rows to take from each class, computed in integers to avoid rounding errors."""
    total = int(counts.sum())
    wanted = counts.astype(np.int64) * rows
    sizes = np.maximum(wanted // total, 1)
    while sizes.sum() < rows:
        sizes[np.argmax(wanted - sizes * total)] += 1
    while sizes.sum() > rows:
        above = np.where(sizes > 1, sizes * total - wanted, np.iinfo(np.int64).min)
        sizes[np.argmax(above)] -= 1
    return sizes


def _quantiles(scores: np.ndarray, number: int) -> np.ndarray:
    """The quantile of each score, (rows,): 0 for the lowest; ties are broken by position."""
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return ranks * number // len(scores)
