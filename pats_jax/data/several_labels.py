"""Labels of which a text may have several: a list of names in one column, or a column of 0 and 1 for each name.

In JSON and parquet a list is a list; in CSV and TSV it is the text of one, in JSON (``["a", "b"]``) or as Python
prints it (``['a', 'b']``), which is what pandas writes.
"""

import ast
import functools
import json
import logging
from collections.abc import Sequence

import numpy as np

from pats_jax.data.labels import class_names, told_of_classes
from pats_jax.data.tables import Table, check_characters, finite_number, listed
from pats_jax.errors import InputError, shown

logger = logging.getLogger(__name__)


def has_lists(table: Table, column: str) -> bool:
    """Whether the cells of a label column are lists.

    Raises:
      InputError: if some are, and others are not; the message names file and line.
    """
    cells = table.columns[column]
    are_lists = [_names_in(cell) is not None for cell in cells]
    if any(are_lists) and not all(are_lists):
        row = are_lists.index(False)
        cell = cells[row]
        found = f"{shown(cell)} is no list" if cell.strip() else "the cell is empty; write [] for no label"
        raise InputError(f"{table.place(row)}: {column!r} has lists of labels, but here {found}")
    return any(are_lists)


def read_lists(table: Table, column: str, names: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of a column of lists.

    Args:
      table: the table.
      column: its label column.
      names: names of the labels by index; None: all that occur, in the order of `labels.class_names`, which is logged.

    Returns:
      float32 (rows, labels), 1 where a row has the label, else 0; and the names.

    Raises:
      InputError: if a label is not one of the names, or is there twice; there are fewer than two labels.
    """
    rows = [_names_in(cell) or () for cell in table.columns[column]]
    for row, own in enumerate(rows):
        for name in own:
            check_characters(name, f"{table.place(row)}: {column!r}")
        if len(set(own)) < len(own):
            raise InputError(f"{table.place(row)}: a label is there twice; the labels are {listed(own)}")
    if names is None:
        names = class_names({name for own in rows for name in own})
        _check_count(table, names)
        logger.info("%s: several labels to a text; %s", table.path, told_of_classes(names, "labels"))
    index = {name: number for number, name in enumerate(names)}
    labels = np.zeros((len(rows), len(names)), np.float32)
    for row, own in enumerate(rows):
        for name in own:
            if name not in index:
                raise InputError(f"{table.place(row)}: unknown label {shown(name)}; the labels are {listed(names)}")
            labels[row, index[name]] = 1.0
    return labels, tuple(names)


def read_columns(table: Table, columns: Sequence[str]) -> np.ndarray:
    """The labels of a table with a column of 0 and 1 (or true and false) for each: float32 (rows, labels).

    Raises:
      InputError: if a cell is neither; the message names file and line.
    """
    labels = np.empty((len(table), len(columns)), np.float32)
    for index, column in enumerate(columns):
        for row, cell in enumerate(table.columns[column]):
            value = _YES_OR_NO.get(cell.strip().lower(), finite_number(cell))
            if value not in (0.0, 1.0):
                raise InputError(f"{table.place(row)}: {column!r} is {shown(cell)}; with several columns, 0 or 1")
            labels[row, index] = value
    return labels


_YES_OR_NO = {"true": 1.0, "false": 0.0}


def _check_count(table: Table, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError(f"{table.path}: only {listed(names) or 'no label'} occurs; at least two labels are needed")


@functools.lru_cache(maxsize=4096)
def _names_in(cell: str) -> tuple[str, ...] | None:
    """The names in the text of a list; None if it is none."""
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    values = None
    for parse in (json.loads, ast.literal_eval):
        try:
            values = parse(text)
            break
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        return None
    return tuple(value if isinstance(value, str) else json.dumps(value) for value in values)
