"""Reads TSV, CSV, JSON and parquet files into columns of strings; every error names its line or row."""

import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import re
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pats_jax.core.files import parse_json, read_bytes
from pats_jax.errors import InputError, shown

INDEX_COLUMNS = ("index", "idx", "id")

# A line number and the cells of that line.
Row = tuple[int, list[str]]

# float() would also take "1_000", "infinity" and the digits of other scripts.
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Table:
    """The requested columns of a file.

    Attributes:
      path: the file, for messages.
      header: names of all columns of the file, also of those that were not kept.
      columns: column name -> one string per row.
      lines: line of the file, counted from 1, on which each row begins; elsewhere the number of the row.
      before_line: text between the path and such a number in messages.
      class_names: column -> names of its classes by index, where the data gives them.
    """

    path: Path
    header: Sequence[str]
    columns: dict[str, list[str]]
    lines: Sequence[int]
    before_line: str = ":"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """``file:line`` of a row, as error messages begin."""
        return f"{self.path}{self.before_line}{self.lines[row]}"

    def ids(self) -> list[str]:
        """The index column, or else row numbers from "0"."""
        for name in INDEX_COLUMNS:
            if name in self.columns:
                return self.columns[name]
        return [str(row) for row in range(len(self))]

    def keep(self, rows: Sequence[int]) -> "Table":
        """The table with only these rows, with their line numbers."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return dataclasses.replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def classes(self, column: str, written: Sequence[str]) -> np.ndarray:
        """Class indices int32 (rows,) of a label column.

        Args:
          column: name of the column.
          written: how the file writes each class, in the order of the indices.

        Raises:
          InputError: if a label is none of ``written``; the message names file and line.
        """
        index_of = {name: index for index, name in enumerate(written)}
        indices = np.empty(len(self), np.int32)
        for row, cell in enumerate(self.columns[column]):
            if cell not in index_of:
                found = f"unknown label {shown(cell)}" if cell.strip() else "the label is empty"
                raise InputError(f"{self.place(row)}: {found}; the labels are {listed(written)}")
            indices[row] = index_of[cell]
        return indices

    def scores(self, column: str) -> np.ndarray:
        """Scores float32 (rows,) of a label column.

        Raises:
          InputError: if a score is not a number that float32 can hold; the message names file and line.
        """
        scores = np.empty(len(self), np.float32)
        for row, cell in enumerate(self.columns[column]):
            score = finite_number(cell)
            if score is None:
                what = "is too large" if NUMBER.fullmatch(cell.strip()) else "is not a number"
                raise InputError(f"{self.place(row)}: the score {shown(cell)} {what}")
            scores[row] = score
        return scores


def finite_number(cell: str) -> float | None:
    """The number in a cell; None if there is none, or float32 cannot hold it."""
    if not NUMBER.fullmatch(cell.strip()):
        return None
    value = float(cell)
    return value if math.isfinite(value) and abs(value) <= _LARGEST else None


def listed(names: Sequence[str]) -> str:
    """Names as text for a message; at most ten, because a file may hold hundreds."""
    told = ", ".join(map(shown, names[:10]))
    return f"{told} and {len(names) - 10} more" if len(names) > 10 else told


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
      InputError: if the file is missing, not a regular file, unreadable, empty or not UTF-8 (with the line of the first
        bad byte).
    """
    return decoded(read_bytes(path), path)


def decoded(data: bytes, path: Path) -> str:
    """The text of the bytes of a file; see ``read_text``."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def check_characters(text: str, place: str) -> None:
    """Raises InputError if a text has a lone surrogate, which no tokenizer accepts and no file can hold.

    UTF-8 has none, but JSON escapes can.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InputError(f"{place}: \\u{code:04x} is a lone surrogate, which is not a character") from None


def split_lines(text: str) -> list[str]:
    """Splits a text only at line feeds; drops a carriage return before one, and empty lines at the end.

    ``str.splitlines`` would also split at form feeds and Unicode separators, which occur in GLUE's sentences.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_tsv(
    path: Path, wanted: Collection[str], *, header: Sequence[str] | None = None, broken_rows: float = 0.0
) -> tuple[Table, list[int]]:
    """Reads a tab-separated file, in which quotes have no meaning.

    Args:
      path: the file.
      wanted: columns to keep, as far as the file has them.
      header: column names of a file without a header line.
      broken_rows: largest fraction of rows with too few columns that is skipped instead of rejected.

    Returns:
      The table and the line numbers of the rows left out.

    Raises:
      InputError: as from `read_text`; or if a row has the wrong number of columns, or there are no rows.
    """
    lines = split_lines(read_text(path))
    first_line = 1 if header else 2
    names = list(header) if header else lines.pop(0).split("\t")
    broken: list[int] = []

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines, first_line):
            cells = line.split("\t")
            if len(cells) == len(names):
                yield number, cells
                continue
            broken.append(number)
            if len(cells) > len(names) or len(broken) > broken_rows * len(lines):
                raise InputError(_wrong_count(path, number, len(cells), len(names), between="tabs"))

    return _collect(path, names, rows(), wanted), broken


def tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line of a tab-separated file without header, with the line's number; quotes have no meaning.

    Raises:
      InputError: as from `read_text`.
    """
    yield from ((number, line.split("\t")) for number, line in enumerate(split_lines(read_text(path)), 1))


def read_csv(path: Path, wanted: Collection[str], delimiter: str = ",") -> Table:
    """Reads a comma-separated file with a header and optional quotes; ignores blank lines.

    Args:
      path: the file.
      wanted: columns to keep, as far as the file has them.
      delimiter: the character between cells.

    Raises:
      InputError: as from `read_tsv`; or if quotes do not match.
    """
    # newline="\n" parts lines at line feeds only, as everywhere here.
    reader = csv.reader(io.StringIO(read_text(path), newline="\n"), strict=True, delimiter=delimiter)
    between = "commas" if delimiter == "," else shown(delimiter)

    def records() -> Iterator[Row]:
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None
            if cells is None:
                return
            if cells:
                yield begin, cells

    def rows() -> Iterator[Row]:
        for line, cells in found:
            if len(cells) != len(header):
                raise InputError(_wrong_count(path, line, len(cells), len(header), between))
            yield line, cells

    with _long_fields():
        found = records()
        header_line, header = next(found)  # a text that is not blank has a record
        return _collect(path, header, rows(), wanted, header_line)


_CSV_LIMIT = threading.Lock()


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's global limit on the length of a field, 131,072 characters."""
    with _CSV_LIMIT:
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(limit)


class JsonObject(dict):
    """A JSON object.

    Attributes:
      twice: the keys that occur more than once; their last value counts.
    """

    twice: Sequence[str] = ()

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        if len(self) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            self.twice = [key for key, count in counts.items() if count > 1]

    def check(self, place: str, wanted: Collection[str]) -> None:
        """Raises InputError if the object contains one of the wanted keys twice."""
        for key in self.twice:
            if key in wanted:
                raise InputError(f"{place}: two keys are named {shown(key)}; remove one")


def json_lines(path: Path, text: str) -> Iterator[tuple[int, JsonObject]]:
    """The objects of a file of JSON lines, each with its line number; ignores blank lines.

    Raises:
      InputError: if a line is not a JSON object; the message names file and line.
    """
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            record = parse_json(line, f"{path}:{number}", JsonObject)
            if not isinstance(record, JsonObject):
                raise InputError(f"{path}:{number}: expected a JSON object on every line")
            yield number, record


def read_json_rows(path: Path, wanted: Collection[str], lists: Collection[str] = ()) -> Table:
    """Reads JSON lines, one object per line, or a ``.json`` file that is one array of objects.

    All objects must have the same wanted keys; ``a.b`` is the key "b" of the object "a". Numbers and booleans become
    their JSON text, null becomes the empty string.

    Args:
      path: the file.
      wanted: columns to keep, as far as the file has them.
      lists: columns whose values may be lists, which become their JSON text, too.

    Raises:
      InputError: as from `read_text`; or if a row is not an object, lacks a key, has a key that the first row lacks,
        has a key twice, or has a list, an object or a lone surrogate as a value.
    """
    text = read_text(path)
    is_array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    before_line = ", row " if is_array else ":"
    records = _with_inner(_array_rows(path, text) if is_array else json_lines(path, text), wanted)
    first = next(records, None)
    header = list(first[1]) if first else []
    begin = f"{'row' if is_array else 'line'} {first[0] if first else 1}"

    def rows() -> Iterator[Row]:
        for number, record in itertools.chain([first] if first else [], records):
            place = f"{path}{before_line}{number}"
            record.check(place, wanted)
            absent = next((key for key in header if key in wanted and key not in record), None)
            if absent is not None:
                raise InputError(f"{place}: no key {absent!r}, but {begin} has it")
            cells = [as_cell(place, key, record[key], lists) if key in wanted else "" for key in header]
            added = sorted(lacking.intersection(record))
            if added:
                raise InputError(f"{place}: the key {added[0]!r} is not in {begin}; add it to all rows or to none")
            yield number, cells

    lacking = set(wanted).difference(header)
    return _collect(path, header, rows(), wanted, before_line=before_line)


def _with_inner(records: Iterable[tuple[int, JsonObject]], wanted: Collection[str]) -> Iterator[tuple[int, JsonObject]]:
    """The records, with ``translation.en`` for the key "en" of the object "translation", if that is wanted."""
    for number, record in records:
        for name in wanted:
            outer, _, inner = name.partition(".")
            if inner and name not in record and isinstance(found := record.get(outer), dict) and inner in found:
                record[name] = found[inner]
        yield number, record


def _array_rows(path: Path, text: str) -> Iterator[tuple[int, JsonObject]]:
    """The objects of a JSON array, numbered from 1."""
    for number, record in enumerate(parse_json(text, str(path), JsonObject), 1):
        if not isinstance(record, JsonObject):
            raise InputError(f"{path}, row {number}: expected a JSON object in every row")
        yield number, record


def as_cell(place: str, column: str, value: Any, lists: Collection[str] = ()) -> str:
    """A value of JSON, parquet or a set of `datasets` as the text of a cell.

    Args:
      place: where it stands, for messages.
      column: the name of its column.
      value: the value.
      lists: columns whose values may be lists.

    Raises:
      InputError: if it is not a string, a number, true or false, or null.
    """
    if isinstance(value, list) and column in lists:
        return json.dumps(value)
    if not isinstance(value, str | int | float | None):
        kinds = {"a list": list, "an object": dict}
        kind = next((name for name, one in kinds.items() if isinstance(value, one)), type(value).__name__)
        raise InputError(f"{place}: {column!r} is {kind}, not a string")
    if value is None:
        return ""
    cell = value if isinstance(value, str) else json.dumps(value)
    check_characters(cell, f"{place}: {column!r}")
    return cell


def read_parquet(path: Path, wanted: Collection[str], lists: Collection[str] = ()) -> Table:
    """Reads a parquet file; values become text as those of JSON do.

    Args:
      path: the file.
      wanted: columns to keep, as far as the file has them.
      lists: columns whose values may be lists.

    Raises:
      InputError: if the file is no parquet file, or has no rows, two wanted columns of one name, or a value of another
        kind.
    """
    import pyarrow
    from pyarrow import parquet

    data = read_bytes(path)
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        header = list(file.schema_arrow.names)
        _check_names(path, header, wanted)
        kept = [name for name in header if name in wanted]
        read = file.read(columns=kept)
        columns = {name: read.column(name).to_pylist() for name in kept}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a parquet file, or a damaged one ({reason})") from None
    return table_of_values(path, header, columns, file.metadata.num_rows, lists)


def table_of_values(
    path: Path, header: Sequence[str], columns: Mapping[str, Sequence[Any]], rows: int, lists: Collection[str] = ()
) -> Table:
    """A table from columns of values, see ``as_cell``; ``path`` is what messages call it.

    Raises:
      InputError: if there are no rows, or a value is of another kind.
    """
    if not rows:
        raise InputError(f"{path}: no rows")
    cells = {
        name: [as_cell(f"{path}, row {number}", name, value, lists) for number, value in enumerate(values, 1)]
        for name, values in columns.items()
    }
    return Table(path, header, cells, range(1, rows + 1), ", row ")


def _wrong_count(path: Path, line: int, found: int, expected: int, between: str) -> str:
    return f"{path}:{line}: expected {expected} columns separated by {between}, got {found}"


def _collect(
    path: Path,
    header: Sequence[str],
    rows: Iterable[Row],
    wanted: Collection[str],
    header_line: int = 1,
    before_line: str = ":",
) -> Table:
    """Keeps the wanted columns row by row, so MNLI's parse trees, most of its files, are never all in memory."""
    _check_names(f"{path}:{header_line}", header, wanted)
    kept = {name: position for position, name in enumerate(header) if name in wanted}
    columns: dict[str, list[str]] = {name: [] for name in kept}
    lines = []
    for number, cells in rows:
        lines.append(number)
        for name, position in kept.items():
            columns[name].append(cells[position])
    if not lines:
        raise InputError(f"{path}: no rows{'' if before_line == ', row ' else ' below the header'}")
    return Table(path, header, columns, lines, before_line)


def _check_names(place: object, header: Sequence[str], wanted: Collection[str]) -> None:
    for position, name in enumerate(header):
        if name in wanted and name in header[:position]:
            raise InputError(f"{place}: two columns are named {name!r}; rename or remove one")
