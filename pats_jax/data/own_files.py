"""Reads your own data: CSV, TSV, JSON and parquet files, and any data set of the hub.

``read_file`` reads a file, ``load_files`` those of one task together, ``load_set`` a data set of the hub or of a local
folder, and ``read_texts`` texts to predict on.

In your own files, columns are the `Columns` that you name, or else found by name, the first of these that exists:

* a pair of texts: ``sentence1, sentence2``; ``premise, hypothesis``; ``question1, question2``; ``question, sentence``;
  ``text1, text2``;
* one text: ``sentence``; ``text``; ``sentence1``;
* the label: ``label``; ``gold_label``; ``score``. Rows whose ``gold_label`` is ``-`` are left out: there the annotators
  of SNLI and MNLI did not agree.

The files of one task have their columns by one rule: those of the training file are looked for first. What labels mean
is told in ``labels``. CSV files quote as usual; in TSV files quotes mean nothing, as in GLUE's.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pats_jax.data import several_labels
from pats_jax.data.columns import BY_NAME, LABEL_COLUMNS, TEXT_COLUMNS, Columns
from pats_jax.data.labels import find_classes, has_labels, read_classes
from pats_jax.data.readers import NO_GOLD_LABEL, Split, leave_out_unlabelled, load_from_hub, split_of
from pats_jax.data.tables import (
    INDEX_COLUMNS,
    Table,
    listed,
    read_csv,
    read_json_rows,
    read_parquet,
    read_text,
    read_tsv,
    split_lines,
    table_of_values,
)
from pats_jax.errors import InputError, shown


def load_files(
    files: Mapping[str, str | Path],
    *,
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    columns: Columns = BY_NAME,
) -> dict[str, Split]:
    """Reads your own files: ``{"train": ..., "validation": ..., "test": ...}``, each of them optional.

    The labels of the training file are those of the task. Without a training file they are ``label_names`` or, with
    ``regression``, scores; else those of the first file. The columns of that file are used in the other files too,
    where these have them.

    Args:
      files: split name -> file.
      label_names: names of the classes by index, for instance those of a saved model.
      regression: whether the labels are scores; None: as `labels.find_classes` finds.
      columns: those of texts and labels.

    Returns:
      Split name -> rows, all with the same ``label_names``. "test" is read as ``read_texts`` does, without labels.

    Raises:
      InputError: as from `read_file`; or if labels are missing where they are needed, or one file holds pairs and
        another single texts.
    """

    def read(name: str) -> Table:
        return _read_table(Path(files[name]), columns, labelled=name != "test")

    return _load(list(files), read, label_names, regression, columns)


def load_set(
    name: str,
    config: str | None = None,
    *,
    splits: Sequence[str] = ("train", "validation"),
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    columns: Columns = BY_NAME,
) -> dict[str, Split]:
    """Reads a data set of the hub, or of a local folder that ``datasets`` loads.

    Args:
      name: its id on the hub, or a folder.
      config: its configuration; None: the only one, or its default.
      splits: any of "train", "validation" and "test"; "validation" is left out if the set has none beside "train".
      label_names: as for ``load_files``.
      regression: as for ``load_files``.
      columns: as for ``load_files``.

    Returns:
      As ``load_files``. Classes that the set names keep their order.

    Raises:
      InputError: as from `load_files`; or if the set cannot be loaded, or has no such split.
    """
    rows = set_rows(name, config)
    wanted = splits_of_set(rows, splits)

    def read(split: str) -> Table:
        return set_table(name, rows, split, _wanted(columns), _label_columns(columns))

    return _load(wanted, read, label_names, regression, columns)


def set_rows(name: str, config: str | None) -> Mapping[str, Any]:
    """The splits of a data set of the hub or of a folder; see ``readers.load_from_hub``."""
    return load_from_hub("train_file to a file of your own", path=name, name=config)


def splits_of_set(rows: Mapping[str, Any], asked: Sequence[str]) -> list[str]:
    """The splits to read: those asked for, but no "validation" that has to be held out of "train"."""
    held_out = "train" in asked and _set_split(rows, "validation") is None
    return [split for split in asked if not (held_out and split == "validation")]


def _set_split(rows: Mapping[str, Any], split: str) -> str | None:
    """The name of a split in a data set."""
    return next((own for own in _SET_SPLITS[split] if own in rows), None)


_SET_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def set_table(
    name: str, splits: Mapping[str, Any], split: str, wanted: Collection[str], lists: Collection[str] = ()
) -> Table:
    """The wanted columns of a split of a set; -1 where classes have names stands for a hidden label: an empty cell.

    Args:
      name: of the set, for messages.
      splits: of `set_rows`.
      split: "train", "validation" or "test".
      wanted: columns to keep, as far as the set has them.
      lists: columns whose values may be lists.

    Raises:
      InputError: if the set has no such split.
    """
    own = _set_split(splits, split)
    if own is None:
        raise InputError(f"{name}: has no split {split!r}; its splits are {', '.join(map(str, splits))}")
    rows = splits[own]
    if any("." in column and column not in rows.column_names for column in wanted):
        rows = rows.flatten()  # the field "en" of a column "translation" is then the column "translation.en"
    values, classes = {}, {}
    for column in rows.column_names:
        if column in wanted:
            values[column] = list(rows[column])
            feature = rows.features[column]
            names = getattr(getattr(feature, "feature", feature), "names", None)  # also of a list of classes
            if names is not None:
                classes[column] = tuple(names)
                values[column] = [_named(value, names) for value in values[column]]
    table = table_of_values(Path(f"{name} {own}"), rows.column_names, values, rows.num_rows, lists)
    return dataclasses.replace(table, class_names=classes)


def _named(value: Any, names: Sequence[str]) -> Any:
    """Class indices, one or a list, by name; None for one that is hidden."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if value is not None and value >= 0 else None


def _load(
    names: Sequence[str],
    read: Callable[[str], Table],
    label_names: Sequence[str] | None,
    regression: bool | None,
    columns: Columns,
) -> dict[str, Split]:
    """The splits of one task from its tables; see ``load_files``."""
    found: dict[str, Split] = {}
    paths: dict[str, Path] = {}
    usual = columns
    for name in sorted(names, key=lambda name: {"train": 0, "test": 2}.get(name, 1)):
        table = read(name)
        paths[name] = path = table.path
        if name == "test":
            split, usual = _unlabelled(table, columns, usual)
            split = dataclasses.replace(split, label_names=None if label_names is None else tuple(label_names))
        else:
            split, usual = _labelled(table, columns, usual, label_names, regression)
            if split.labels is None:
                told = " or ".join(LABEL_COLUMNS)
                raise InputError(f"{path}: no labels for the {name} data; name their column {told}{_OR_SET_LABEL}")
            if name == "train" and len(np.unique(split.labels, axis=0)) == 1:
                raise InputError(f"{path}: every row has the same label; there is nothing to learn")
            label_names, regression = split.label_names, split.label_names is None
        other = next(iter(found), name)
        if (split.sentence2 is None) != (found.get(other, split).sentence2 is None):
            raise InputError(f"{path}: has {_kind(split)}, but {paths[other]} has {_kind(found[other])}")
        if split.labels is not None and split.is_multi_label != found.get(other, split).is_multi_label:
            one, several = ("a label a row", "lists of labels")[:: -1 if split.is_multi_label else 1]
            raise InputError(f"{path}: has {one}, but {paths[other]} has {several}")
        found[name] = split
    return {name: found[name] for name in names}


_OR_SET_LABEL = ", or set label_column_name"


def _kind(split: Split) -> str:
    return "single texts" if split.sentence2 is None else "pairs of texts"


def read_file(
    path: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    columns: Columns = BY_NAME,
) -> Split:
    """Reads your own file.

    Args:
      path: a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, or a ``.json`` file of JSON lines or one array of
        objects.
      label_names: names of the classes by index.
      regression: whether the labels are scores. Without it, and without ``label_names``, that and the classes are found
          in the file, see `labels.find_classes`.
      columns: those of texts and labels.

    Returns:
      The rows; ``labels`` is None if there is no label column, or it is empty.

    Raises:
      InputError: if the file is invalid; the message names the file and, if possible, the line.
    """
    table = _read_table(Path(path), columns, labelled=True)
    return _labelled(table, columns, columns, label_names, regression)[0]


def _labelled(
    table: Table, asked: Columns, usual: Columns, label_names: Sequence[str] | None, regression: bool | None
) -> tuple[Split, Columns]:
    """The rows of a table, and its columns; those of the previous table are tried first."""
    texts = _text_columns(table, asked, usual)
    found = _found_labels(table, asked, usual)
    if found == ("gold_label",):
        table = leave_out_unlabelled(table, found[0])
    labels: np.ndarray | None = None
    if len(found) > 1 or (found and has_labels(table.columns[found[0]])):
        if label_names is None and regression is not True and len(found) == 1:
            label_names = table.class_names.get(found[0])
        labels, label_names = _read_labels(table, found, label_names, regression)
    return split_of(table, texts, labels, label_names), Columns(texts, found)


def _read_labels(
    table: Table, columns: tuple[str, ...], names: Sequence[str] | None, regression: bool | None
) -> tuple[np.ndarray, Sequence[str] | None]:
    """The labels in these columns, and the names of classes."""
    if len(columns) == 1 and not several_labels.has_lists(table, columns[0]):
        if names is None:
            names = find_classes(table, columns[0], regression)
        return (table.scores(columns[0]) if names is None else read_classes(table, columns[0], names)), names
    if regression:
        raise InputError(f"{table.path}: do_regression: a text has several labels; omit it")
    if len(columns) == 1:
        return several_labels.read_lists(table, columns[0], names)
    if names is not None and set(names) != set(columns):
        raise InputError(f"{table.path}: the labels are {listed(names)}, not {listed(columns)}")
    return several_labels.read_columns(table, names or columns), names or columns


def labels_in(path: str | Path, columns: Columns = BY_NAME) -> set[str]:
    """The labels in a file, as written there; empty without a label column."""
    return _labels_of(_read_table(Path(path), columns, labelled=True), columns)


def labels_in_set(name: str, config: str | None = None, columns: Columns = BY_NAME) -> set[str]:
    """The same of the validation data of a data set."""
    wanted, lists = _wanted(columns), _label_columns(columns)
    return _labels_of(set_table(name, set_rows(name, config), "validation", wanted, lists), columns)


def _labels_of(table: Table, columns: Columns) -> set[str]:
    found = _found_labels(table, columns, columns)
    if len(found) > 1:
        return set(found)
    if found and several_labels.has_lists(table, found[0]):
        return set(several_labels.read_lists(table, found[0])[1])
    return set(table.columns[found[0]]) - {"", NO_GOLD_LABEL} if found else set()


def read_texts(path: str | Path, columns: Columns = BY_NAME, usual: Columns = BY_NAME) -> Split:
    """Reads texts to predict on: a file as for ``read_file``, without labels, or a ``.txt`` with one text per line.

    Args:
      path: the file.
      columns: those of the texts.
      usual: if these are not named: which to look for first.
    """
    wanted = columns if columns.texts else dataclasses.replace(columns, texts=usual.texts)
    return _unlabelled(_read_table(Path(path), wanted, labelled=False), columns, usual)[0]


def lines_as_texts(path: Path, text: str) -> Split:
    """Texts to predict on, one a line; ``path`` is what messages call them."""
    return _unlabelled(_lines(path, text, "sentence"), BY_NAME, BY_NAME)[0]


def _unlabelled(table: Table, asked: Columns, usual: Columns) -> tuple[Split, Columns]:
    texts = _text_columns(table, asked, usual)
    return split_of(table, texts, None, None), Columns(texts)


def _lines(path: Path, text: str, name: str) -> Table:
    """A table of one text a line, under the name of the text column."""
    lines = split_lines(text)
    return Table(path, (name,), {name: lines}, range(1, len(lines) + 1))


def _read_table(path: Path, columns: Columns, *, labelled: bool) -> Table:
    """The wanted columns of a file; with labels, or any file of texts."""
    lists = _label_columns(columns) if labelled else ()
    name = None if labelled else columns.texts[0] if len(columns.texts) == 1 else "sentence"
    return read_table(path, _wanted(columns, labelled), lists, columns.delimiter, lines_as=name)


def read_table(
    path: Path,
    wanted: Collection[str],
    lists: Collection[str] = (),
    delimiter: str | None = None,
    lines_as: str | None = None,
) -> Table:
    """The wanted columns of a file, of whatever form its name says.

    Args:
      path: the file.
      wanted: columns to keep, as far as the file has them.
      lists: columns whose values may be lists.
      delimiter: see ``Columns``.
      lines_as: what to call the one column of a ``.txt`` file, one text a line; None: there must be none.

    Raises:
      InputError: if the file is invalid, or of another form.
    """
    suffix = path.suffix.lower()
    if delimiter is not None and suffix not in (".csv", ".tsv"):
        raise InputError(f"delimiter {shown(delimiter)}: {path} has none; it is for .csv and .tsv files")
    if suffix == ".txt" and lines_as is not None:
        return _lines(path, read_text(path), lines_as)
    if suffix == ".csv" or delimiter is not None:
        return read_csv(path, wanted, delimiter or ",")
    if suffix == ".tsv":
        return read_tsv(path, wanted)[0]
    if suffix in (".jsonl", ".json"):
        return read_json_rows(path, wanted, lists)
    if suffix == ".parquet":
        return read_parquet(path, wanted, lists)
    further = "" if lines_as is None else ", .txt"
    raise InputError(f"{path}: unknown file type {suffix!r}; use .csv, .tsv{further}, .parquet or .jsonl")


def _wanted(columns: Columns, labelled: bool = True) -> set[str]:
    texts = {name for names in (columns.texts, *TEXT_COLUMNS) for name in names}
    return {*INDEX_COLUMNS, *texts, *(_label_columns(columns) if labelled else ())}


def _label_columns(columns: Columns) -> tuple[str, ...]:
    return columns.labels or LABEL_COLUMNS


def _text_columns(table: Table, asked: Columns, usual: Columns) -> tuple[str, ...]:
    if asked.texts:
        return present(table, asked.texts, "text_column_names")
    for names in (usual.texts, *TEXT_COLUMNS):
        if names and all(name in table.columns for name in names):
            return names
    hint = "name it sentence, or name two of them sentence1 and sentence2, or set text_column_names"
    raise no_column(table, "no text column", hint)


def no_column(table: Table, what: str, hint: str) -> InputError:
    """The error that a table has no such column; a header with another delimiter gets another hint."""
    only = table.header[0] if len(table.header) == 1 else ""
    parted = next((mark for mark in ";\t|" if mark in only), None)
    if parted:
        hint = f"if {shown(parted)} separates its columns, set delimiter"
    return InputError(f"{table.path}{_first_line(table)}: {what} among {listed(table.header)}; {hint}")


def _found_labels(table: Table, asked: Columns, usual: Columns) -> tuple[str, ...]:
    """The columns of the labels; none if there are no labels."""
    if asked.labels:
        return present(table, asked.labels, "label_column_name")
    return next(((name,) for name in (*usual.labels, *LABEL_COLUMNS) if name in table.columns), ())


def present(table: Table, names: tuple[str, ...], setting: str) -> tuple[str, ...]:
    """The names, if they are all columns of the table; else an InputError that says which setting names them."""
    missing = next((name for name in names if name not in table.columns), None)
    if missing is not None:
        parts = missing.split(",")
        hint = f"; write {setting} {' '.join(parts)}" if len(parts) > 1 and set(parts) <= set(table.header) else ""
        raise InputError(
            f"{table.path}{_first_line(table)}: {setting}: no column {shown(missing)} among "
            f"{listed(table.header)}{hint}"
        )
    return names


def _first_line(table: Table) -> str:
    return ":1" if table.before_line == ":" else ""
