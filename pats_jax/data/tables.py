"""Reading TSV, CSV and JSON-lines files into columns of strings, with a line number for every complaint."""

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pats_jax.errors import InputError

INDEX_COLUMNS = ("index", "idx", "id")

# A line number and the cells of that line.
Row = tuple[int, list[str]]


@dataclass(frozen=True)
class Table:
    """The columns of a file that were asked for.

    Attributes:
      path: The file, for messages.
      header: Names of all columns of the file, also of those that were not kept.
      columns: Column name -> one string a row.
      lines: Line of the file, counted from 1, on which each row begins.
    """

    path: Path
    header: Sequence[str]
    columns: dict[str, list[str]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """``file:line`` of a row, as error messages begin."""
        return f"{self.path}:{self.lines[row]}"

    def ids(self) -> list[str]:
        """The index column, or else row numbers from "0"."""
        for name in INDEX_COLUMNS:
            if name in self.columns:
                return self.columns[name]
        return [str(row) for row in range(len(self))]

    def keep(self, rows: Sequence[int]) -> "Table":
        """The same with these rows only, each with the line that it stands on."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return Table(self.path, self.header, columns, [self.lines[row] for row in rows])

    def classes(self, column: str, written: Sequence[str]) -> np.ndarray:
        """Class indices int32 (rows,) of a label column.

        Args:
          column: Name of the column.
          written: How the file writes each class, in the order of the indices.

        Raises:
          InputError: A label that is none of those, with file and line.
        """
        index_of = {name: index for index, name in enumerate(written)}
        indices = np.empty(len(self), np.int32)
        for row, cell in enumerate(self.columns[column]):
            if cell not in index_of:
                raise InputError(f"{self.place(row)}: unknown label {cell!r}; the labels are {listed(written)}")
            indices[row] = index_of[cell]
        return indices

    def scores(self, column: str) -> np.ndarray:
        """Scores float32 (rows,) of a label column.

        Raises:
          InputError: A score that is no finite number, with file and line.
        """
        scores = np.empty(len(self), np.float32)
        for row, cell in enumerate(self.columns[column]):
            score = finite_number(cell)
            if score is None:
                raise InputError(f"{self.place(row)}: the score {cell!r} is not a number")
            scores[row] = score
        return scores


def finite_number(cell: str) -> float | None:
    """The number that a cell holds, None if it holds none or an infinite one."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def listed(names: Sequence[str]) -> str:
    """Names for a message; at most ten, since a file may hold hundreds."""
    shown = ", ".join(repr(name) for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
      InputError: The file is missing, unreadable, empty or not UTF-8 (with the line of the first bad byte).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def split_lines(text: str) -> list[str]:
    """Lines of a text, parted at line feeds only; a carriage return before one and empty lines at the end are dropped.

    ``str.splitlines`` would also part at form feeds and Unicode separators, which do occur inside GLUE's sentences.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_tsv(
    path: Path, wanted: Collection[str], *, header: Sequence[str] | None = None, broken_rows: float = 0.0
) -> tuple[Table, list[int]]:
    """Reads a tab-separated file in which quotes mean nothing.

    Args:
      path: The file.
      wanted: Columns to keep, as far as the file has them.
      header: Column names of a file without a header line.
      broken_rows: Largest share of rows with too few columns that is left out rather than refused.

    Returns:
      The table and the line numbers of the rows left out.

    Raises:
      InputError: As ``read_text``, a row with the wrong number of columns, or no rows.
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


def read_csv(path: Path, wanted: Collection[str]) -> Table:
    """Reads a comma-separated file with a header; quotes protect what they hold, blank lines do not count.

    Raises:
      InputError: As ``read_tsv``, or quotes that do not match.
    """
    # newline="\n" parts lines at line feeds only, as everywhere here.
    reader = csv.reader(io.StringIO(read_text(path), newline="\n"), strict=True)
    header = _next_record(path, reader) or []

    def rows() -> Iterator[Row]:
        begin = reader.line_num + 1
        while (cells := _next_record(path, reader)) is not None:
            if cells and len(cells) != len(header):
                raise InputError(_wrong_count(path, begin, len(cells), len(header), between="commas"))
            if cells:
                yield begin, cells
            begin = reader.line_num + 1

    return _collect(path, header, rows(), wanted)


def _next_record(path: Path, reader) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from None


def read_json_lines(path: Path, wanted: Collection[str]) -> Table:
    """Reads JSON lines: one object a line, all with the keys of the first one that are wanted.

    Numbers and booleans become their JSON text, null becomes the empty string.

    Raises:
      InputError: As ``read_text``; a line that is no JSON object, lacks a key or has a list or object as a value.
    """
    lines = split_lines(read_text(path))
    header = list(json_object(path, 1, lines[0]))

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines, 1):
            record = json_object(path, number, line)
            yield number, [_json_cell(path, number, record, key) if key in wanted else "" for key in header]

    return _collect(path, header, rows(), wanted)


def json_object(path: Path, number: int, line: str) -> dict:
    """One line of a file of JSON lines, which must be an object; the number is for the error message."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not readable as JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: a JSON object is expected on every line")
    return record


def _json_cell(path: Path, number: int, record: dict, key: str) -> str:
    if key not in record:
        raise InputError(f"{path}:{number}: no key {key!r}, which line 1 has")
    value = record[key]
    if isinstance(value, dict | list):
        raise InputError(
            f"{path}:{number}: {key!r} holds a {'list' if isinstance(value, list) else 'object'}, not a text"
        )
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _wrong_count(path: Path, line: int, found: int, expected: int, between: str) -> str:
    return f"{path}:{line}: {found} columns where {expected} are expected (separated by {between})"


def _collect(path: Path, header: Sequence[str], rows: Iterable[Row], wanted: Collection[str]) -> Table:
    """Keeps the wanted columns row by row: MNLI's parse trees, most of its files, are never held all at once."""
    kept = {name: position for position, name in enumerate(header) if name in wanted}
    columns: dict[str, list[str]] = {name: [] for name in kept}
    lines = []
    for number, cells in rows:
        lines.append(number)
        for name, position in kept.items():
            columns[name].append(cells[position])
    if not lines:
        raise InputError(f"{path}: no rows below the header")
    return Table(path, header, columns, lines)
