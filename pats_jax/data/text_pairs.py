"""Rows of two texts, one to read and one to write: from files, or from a data set of the hub."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from pats_jax.data import own_files
from pats_jax.data.columns import PAIR_COLUMNS, PairColumns
from pats_jax.data.tables import INDEX_COLUMNS, Table
from pats_jax.errors import InputError, shown


@dataclasses.dataclass(frozen=True)
class TextPairs:
    """The rows of one split, in the order of their file.

    Attributes:
      sources: the text to read of each row.
      targets: the text to write of each row; None if they are not known.
      ids: the index of each row, else row numbers from "0".
    """

    sources: list[str]
    targets: list[str] | None
    ids: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The rows of these numbers, in this order."""
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        return type(self)([self.sources[row] for row in rows], targets, [self.ids[row] for row in rows])

    def first(self, rows: int | None) -> Self:
        """The first ``rows`` rows; None keeps all."""
        return self if rows is None else self.take(range(min(rows, len(self))))


def load_pair_files(files: Mapping[str, str], columns: PairColumns) -> dict[str, TextPairs]:
    """Reads files of sources and targets: ``{"train": ..., "validation": ..., "test": ...}``, each of them optional.

    Args:
      files: split name -> file; for "test" also a ``.txt`` with one source per line.
      columns: those of sources and targets.

    Returns:
      Split name -> rows; those of "test" may have no targets.

    Raises:
      InputError: if a file is invalid, lacks a column, or has an empty target; the message names the file and, if
        possible, the line.
    """

    def read(name: str) -> Table:
        lines_as = (columns.source or PAIR_COLUMNS[0][0]) if name == "test" else None
        return own_files.read_table(Path(files[name]), _wanted(columns), (), columns.delimiter, lines_as)

    return _load(list(files), read, columns)


def load_pair_set(name: str, config: str | None, splits: Sequence[str], columns: PairColumns) -> dict[str, TextPairs]:
    """Reads sources and targets from a data set of the hub, or of a folder that ``datasets`` loads.

    Args:
      name: its id on the hub, or a folder.
      config: its configuration; None: the only one, or its default.
      splits: any of "train", "validation" and "test"; "validation" is left out if the set has none beside "train".
      columns: those of sources and targets.

    Raises:
      InputError: as from `load_pair_files`; or if the set cannot be loaded, or has no such split.
    """
    rows = own_files.set_rows(name, config)

    def read(split: str) -> Table:
        return own_files.set_table(name, rows, split, _wanted(columns))

    return _load(own_files.splits_of_set(rows, splits), read, columns)


def _wanted(columns: PairColumns) -> set[str]:
    named = {name for name in (columns.source, columns.target) if name}
    return {*INDEX_COLUMNS, *(named or {name for pair in PAIR_COLUMNS for name in pair})}


def _load(names: Sequence[str], read: Callable[[str], Table], columns: PairColumns) -> dict[str, TextPairs]:
    found, usual = {}, None
    for name in names:
        table = read(name)
        source, target = _columns_of(table, columns, usual, needs_target=name != "test")
        if name != "test":
            usual = usual or (source, target)
        found[name] = TextPairs(table.columns[source], _targets(table, target, name), table.ids())
    return found


def _columns_of(
    table: Table, asked: PairColumns, usual: tuple[str, str] | None, *, needs_target: bool
) -> tuple[str, str]:
    """The columns of sources and targets; the latter may be missing if it is not needed."""
    if asked.source and asked.target:
        own_files.present(table, (asked.source,), "source_column")
        if needs_target:
            own_files.present(table, (asked.target,), "target_column")
        return asked.source, asked.target
    pairs = [*([usual] if usual else []), *PAIR_COLUMNS]
    for source, target in pairs:
        if source in table.columns and target in table.columns:
            return source, target
    if not needs_target:
        for source, target in pairs:
            if source in table.columns:
                return source, target
    hint = "name them source and target, or set source_column and target_column"
    raise own_files.no_column(table, "no columns of sources and targets", hint)


def _targets(table: Table, column: str, name: str) -> list[str] | None:
    """The targets; None if those of a test split are missing or all empty.

    Raises:
      InputError: if one is empty.
    """
    targets = table.columns.get(column)
    if name == "test" and not any(target.strip() for target in targets or ()):
        return None
    assert targets is not None
    empty = next((row for row, target in enumerate(targets) if not target.strip()), None)
    if empty is not None:
        raise InputError(f"{table.place(empty)}: the target ({shown(column)}) is empty; remove the row")
    return targets
