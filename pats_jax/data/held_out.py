"""Rows that are held out of the training data, where there is no validation data."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pats_jax.errors import InputError


def held_out_rows(
    labels: Sequence[Any] | np.ndarray, fraction: float, seed: int, *, stratified: bool, otherwise: str
) -> np.ndarray:
    """Draws the rows to hold out: a pure function of the labels, the fraction and the seed.

    So many rows are drawn: the fraction of all, rounded up. Stratified, each class has its part of them, rounded by
    scikit-learn's rule; a class with one row alone keeps it for training. What the classes are called, and how they
    are numbered, does not matter.

    Args:
      labels: class of each row, (rows,); not stratified, anything of as many rows.
      fraction: in (0, 1).
      seed: any whole number of at least 0; its last 32 bits count.
      stratified: whether each class is in proportion.
      otherwise: what to do if there are too few rows, for the message.

    Returns:
      Row numbers in increasing order.

    Raises:
      InputError: if there are too few rows.

    Examples:
      >>> labels = ["spam"] * 10 + ["ham"] * 30
      >>> np.bincount(held_out_rows(labels, 0.2, 0, stratified=True, otherwise="") < 10).tolist()
      [6, 2]
    """
    from sklearn.model_selection import train_test_split

    rows, size, state = np.arange(len(labels)), math.ceil(fraction * len(labels)), seed % 2**32
    if not stratified:
        if size >= len(rows):
            raise InputError(f"n_samples={len(rows)} (rows): too few to hold some out; {otherwise}")
        return np.sort(train_test_split(rows, test_size=size, random_state=state)[1])
    _, first, of_row, counts = np.unique(np.asarray(labels), return_index=True, return_inverse=True, return_counts=True)
    of_row = np.argsort(np.argsort(first))[of_row]  # numbered by first row
    counts = counts[np.argsort(first)]
    common, kinds = np.flatnonzero(counts[of_row] > 1), int((counts > 1).sum())
    size = max(size, kinds)
    if not kinds or len(common) - size < kinds:
        what = f"n_samples={len(rows)} (rows) of {len(counts)} classes"
        raise InputError(f"{what}: too few to hold some of each class out; {otherwise}")
    return np.sort(train_test_split(common, test_size=size, random_state=state, stratify=of_row[common])[1])
