"""The meaning of labels in your own files: scores or classes, and which classes.

Numbers can be either. Whole numbers, also written as ``1.0``, are read as classes, others as scores; the log says
which, and how to change it: ``--do_regression`` or ``--do_regression false``, in Python ``regression``. Classes that
are numbers are compared by value, so that ``1`` and ``1.0`` are the same: pandas writes whole numbers with a decimal
point if a value in their column is missing.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np

from pats_jax.data.tables import NUMBER, Table, finite_number
from pats_jax.errors import InputError, shown

logger = logging.getLogger(__name__)

# How programs write a cell that has no value (what pandas reads as one, in any case).
_MISSING = {"", "#n/a n/a", *"nan -nan none null na n/a <na> #n/a #na 1.#ind -1.#ind 1.#qnan -1.#qnan".split()}
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)

Number = Decimal | float


def has_labels(cells: Iterable[str]) -> bool:
    """Whether any cell of a label column has a value."""
    return not all(_is_missing(cell) for cell in set(cells))


def find_classes(table: Table, column: str, regression: bool | None = None) -> tuple[str, ...] | None:
    """The class names of a label column by index, or None if the labels are scores.

    If all labels are numbers, whole numbers are classes in numerical order; if any has a fraction or an exponent, they
    are scores. All other labels are class names in alphabetical order.

    Args:
      table: the file that decides, usually the training file.
      column: its label column.
      regression: whether the labels are scores; None: as above, and the log says so.

    Raises:
      InputError: if a label is missing (with file and line), or there is only one class.
    """
    cells = list(dict.fromkeys(table.columns[column]))
    values = {cell: value for cell in cells if (value := _number(cell)) is not None}
    _check_cells(table, column, [cell for cell in cells if cell not in values], values, regression)
    names = class_names(cells)
    if len(names) == 1 and not regression:
        raise InputError(f"{table.path}: every row has the label {shown(names[0])}; there is nothing to learn")
    all_numbers = len(values) == len(cells)
    if regression is None and all_numbers:
        regression = not all(_WHOLE.fullmatch(cell.strip()) for cell in cells)
        _announce(table, names, regression)
    elif regression is None:
        logger.info("%s: %s", table.path, told_of_classes(names))
    if all_numbers:
        _warn_of_hidden(table, column, values)
    if not regression:
        _warn_of_blanks(table, cells)
    return None if regression else names


def read_classes(table: Table, column: str, names: Sequence[str]) -> np.ndarray:
    """Class indices int32 (rows,) of a label column; see `find_classes` for how labels are compared.

    Raises:
      InputError: if a label is not one of the names; the message names file and line.
    """
    values = {value: name for name in names if (value := _number(name)) is not None}
    if len(values) < len(names):  # not all of them numbers, or two that are equal
        return table.classes(column, names)
    numbers = {cell: _number(cell) for cell in set(table.columns[column])}
    named = {cell: cell if value is None else values.get(value, cell) for cell, value in numbers.items()}
    cells = [named[cell] for cell in table.columns[column]]
    return dataclasses.replace(table, columns={column: cells}).classes(column, names)


def _number(cell: str) -> Number | None:
    """The value of a cell, exact for whole numbers, which may name classes; None if it is not a finite number."""
    return Decimal(cell.strip()) if _WHOLE.fullmatch(cell.strip()) else finite_number(cell)


def _is_infinite(cell: str) -> bool:
    """Whether a cell without a finite value is infinite, or a number that is too large."""
    return bool(_INFINITE.fullmatch(cell.strip()) or NUMBER.fullmatch(cell.strip()))


def _is_missing(cell: str) -> bool:
    return " ".join(cell.lower().split()) in _MISSING


def class_names(cells: Iterable[str]) -> tuple[str, ...]:
    """The class names that labels stand for, by index.

    Of equal numbers, the shortest spelling is the name.

    Examples:
      >>> class_names(["10", "9", "9.0"]), class_names(["10", "9", "x"])
      (('9', '10'), ('10', '9', 'x'))
    """
    names: dict[Number, str] = {}
    for cell in sorted(set(cells), key=lambda cell: (len(cell), cell)):
        value = _number(cell)
        if value is None:
            return tuple(sorted(set(cells)))
        names.setdefault(value, cell)
    return tuple(names[value] for value in sorted(names))


def _check_cells(
    table: Table, column: str, words: Sequence[str], values: dict[str, Number], regression: bool | None
) -> None:
    """Rejects missing values among numbers, and empty cells anywhere; all other words may be classes."""

    def place(cell: str) -> str:
        return table.place(table.columns[column].index(cell))

    others = dict.fromkeys(cell for cell in words if not (_is_missing(cell) or _is_infinite(cell)))
    mostly_numbers = 2 * sum(cell in values for cell in table.columns[column]) >= len(table)
    for cell in words:
        if not cell.strip():
            raise InputError(f"{place(cell)}: the label is empty; fill it in, or remove the row")
        if cell not in others and values and (mostly_numbers or not others):
            what = "is missing" if _is_missing(cell) else "is not a finite number"
            raise InputError(f"{place(cell)}: the label {what} ({shown(cell)}); correct it, or remove the row")
    if regression is None and others and mostly_numbers:
        told = "is not a number, but most labels are; all labels are read as class names"
        first = next(iter(others))
        logger.warning("%s: the label %s %s", place(first), shown(first), told)
    for cell in filter(_is_missing, () if regression else words):
        told = "is read as a class name; remove the row if the label is missing"
        logger.warning("%s: the label %s %s", place(cell), shown(cell), told)


def _announce(table: Table, names: Sequence[str], regression: bool) -> None:
    if regression:
        told = f"scores from {shown(names[0], quoted=False)} to {shown(names[-1], quoted=False)}"
        logger.info("%s: %s; for classes, set do_regression false", table.path, told)
    else:
        logger.info("%s: %s; for scores, set do_regression", table.path, told_of_classes(names))


def told_of_classes(names: Sequence[str], noun: str = "classes") -> str:
    """The classes as text, ``3 classes: a, b, c``; at most the first ten."""
    told = ", ".join(shown(name.strip(), 40, quoted=False) for name in names[:10])
    return f"{len(names)} {noun}: {told}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"


def _warn_of_hidden(table: Table, column: str, values: dict[str, Number]) -> None:
    """Warns of -1, which marks hidden labels in many datasets, unless there are other negative numbers."""
    if min(values.values()) == -1:
        rows = sum(values[cell] == -1 for cell in table.columns[column])
        logger.warning("%s: %d rows have the label -1, which often means hidden; if so, remove them", table.path, rows)


def _warn_of_blanks(table: Table, cells: Sequence[str]) -> None:
    """Warns of labels that differ only in case or blanks, because they rarely mean different classes."""
    for what, key in (("blanks", _without_blanks), ("case or blanks", lambda cell: _without_blanks(cell).casefold())):
        groups: dict[str, list[str]] = {}
        for cell in cells:
            groups.setdefault(key(cell), []).append(cell)
        alike = next((sorted(group) for group in groups.values() if len(group) > 1), None)
        if alike:
            logger.warning("%s: labels differ only in %s: %s", table.path, what, " and ".join(map(shown, alike[:5])))
            return


def _without_blanks(cell: str) -> str:
    return "".join(cell.split())
