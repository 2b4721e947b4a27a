"""Reads texts and labels from Python objects: lists, pairs, data frames and Hugging Face datasets."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pats_jax.data.readers import Split
from pats_jax.errors import InputError, shown


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where texts and labels are in a table.

    Attributes:
      texts: the one or two columns of the texts; None: all but the label column, which must leave one or two.
      label: the column of the labels.
    """

    texts: Sequence[str] | str | None
    label: str

    def of_texts(self, names: Sequence[str]) -> list[str]:
        """The columns of the texts, of a table's columns ``names``.

        Raises:
          InputError: if a column is missing, or there are not one or two of them.
        """
        given = [self.texts] if isinstance(self.texts, str) else self.texts
        chosen = [name for name in names if name != self.label] if given is None else list(given)
        missing = [name for name in chosen if name not in names]
        if missing:
            raise InputError(f"text_columns: no column {missing[0]!r}; there are {', '.join(map(str, names))}")
        if len(chosen) not in (1, 2):
            raise InputError(f"text_columns: choose one or two of the columns {', '.join(map(str, names))}")
        return chosen


def read_split(texts: Any, columns: Columns) -> Split:
    """Reads rows of texts, without labels.

    Args:
      texts: a list or array of strings or of pairs, a DataFrame, or a `datasets.Dataset`.
      columns: the columns of a table.

    Raises:
      InputError: if they are not texts; the message names the row.
    """
    if isinstance(texts, str):
        raise InputError("texts: one string; give a list of texts")
    if hasattr(texts, "toarray"):
        raise InputError("texts: a sparse matrix; give a list of texts, not features")
    if _is_table(texts):
        rows = list(zip(*(list(texts[name]) for name in columns.of_texts(_names(texts))), strict=True))
        rows = [row[0] if len(row) == 1 else row for row in rows]
    else:
        try:
            rows = list(texts)
        except TypeError:
            raise InputError(f"texts: {shown(texts)}: give a list of texts") from None
    if not rows:
        raise InputError("texts: there are 0 samples (rows); at least 1 is needed")
    is_pair = not isinstance(rows[0], str)
    for number, row in enumerate(rows):
        _check_row(number, row, is_pair)
    ids = [str(number) for number in range(len(rows))]
    if is_pair:
        return Split([str(row[0]) for row in rows], [str(row[1]) for row in rows], None, ids)
    return Split([str(row) for row in rows], None, None, ids)


def _check_row(number, row, is_pair):
    if is_pair and isinstance(row, (tuple, list, np.ndarray)) and len(row) == 2:
        if all(isinstance(text, str) for text in row):
            return
    elif not is_pair and isinstance(row, str):
        return
    wanted = "a pair of texts, as row 0 is" if is_pair and number else "a text, or a pair of texts"
    raise InputError(f"texts, row {number}: {shown(row)}: must be {'a text, as row 0 is' if not is_pair else wanted}")


def labels_of(texts: Any, labels: Any, columns: Columns) -> np.ndarray:
    """The given labels, (rows,), or those in the label column of a table.

    Where a text may have several labels, they are tuples; see `are_lists`.

    Raises:
      InputError: if there are no labels, or one is missing.
    """
    if labels is None:
        if not _is_table(texts):
            raise InputError("requires y to be passed, but the target y is None: give labels, one for each text")
        if columns.label not in _names(texts):
            names = ", ".join(map(str, _names(texts)))
            raise InputError(f"label_column: no column {columns.label!r}; there are {names}")
        labels = _column(texts, columns.label)
    if _has_lists(labels):
        return _as_tuples(labels)
    if isinstance(labels, (list, tuple)):
        kinds = {isinstance(label, str) for label in labels if label is not None}
        if len(kinds) == 2:
            raise InputError("labels: some are strings and others are not; use one kind")
    found = np.asarray(labels)
    if found.ndim != 1:
        raise InputError(f"labels: must be one for each text, (rows,); they are {found.shape}")
    for number, label in enumerate(found.tolist()):
        if label is None or (isinstance(label, float) and not math.isfinite(label)) or label == "":
            raise InputError(f"labels, row {number}: the label is missing or not finite ({shown(label)}: NaN or inf)")
    if found.dtype == object and all(isinstance(label, str) for label in found):
        found = found.astype(str)
    return found


def are_lists(labels: np.ndarray) -> bool:
    """Whether labels of `labels_of` are tuples, of a text's several labels."""
    return labels.dtype == object and len(labels) > 0 and isinstance(labels[0], tuple)


def _has_lists(labels):
    """Whether labels are given as lists, sets or tuples of names."""
    if isinstance(labels, str) or not hasattr(labels, "__iter__") or getattr(labels, "ndim", 1) != 1:
        return False
    first = next(iter(labels), None)
    return isinstance(first, (list, tuple, set, frozenset)) or getattr(first, "ndim", 0) == 1


def _as_tuples(labels):
    """Lists of labels as tuples, object (rows,)."""
    found = np.empty(len(labels), object)
    for row, own in enumerate(labels):
        if isinstance(own, str) or not hasattr(own, "__iter__"):
            raise InputError(f"labels, row {row}: {shown(own)}: must be a list of labels, as row 0 is")
        found[row] = tuple(own)
        if not all(isinstance(label, str | int | np.integer) for label in found[row]):
            raise InputError(f"labels, row {row}: {shown(own)}: must be a list of strings or whole numbers")
        if len(set(found[row])) < len(found[row]):
            raise InputError(f"labels, row {row}: {shown(own)}: a label is there twice")
    return found


def _column(table, name):
    """The labels in a table; if a `datasets.Dataset` has class names, these are the labels."""
    feature: Any = table.features.get(name) if hasattr(table, "column_names") else None
    values = list(table[name])
    if hasattr(feature, "int2str"):
        return feature.int2str(values)
    of_list: Any = getattr(feature, "feature", None)  # a list of classes
    return [of_list.int2str(own) for own in values] if hasattr(of_list, "int2str") else values


def _is_table(texts):
    return hasattr(texts, "column_names") or hasattr(texts, "columns")


def _names(table):
    return list(table.column_names if hasattr(table, "column_names") else table.columns)


def write_rows(path: pathlib.Path, split: Split, labels: Sequence[str | float | list[str]]) -> None:
    """Writes texts with labels as JSON lines, which `pats-jax glue` reads."""
    with path.open("w", encoding="utf-8") as file:
        for row, label in enumerate(labels):
            if split.sentence2 is None:
                record: dict[str, Any] = {"sentence": split.sentence1[row]}
            else:
                record = {"sentence1": split.sentence1[row], "sentence2": split.sentence2[row]}
            file.write(json.dumps(record | {"label": label}) + "\n")
