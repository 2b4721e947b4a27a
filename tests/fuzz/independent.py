"""What the files say, read again: straight from the documented rules, slowly, and sharing no code with the library.

Tables are lists of cells as written. `own_rows` gives what a table of people's own data must be read as, `glue_rows`
the same of a file of GLUE. Where the rules leave something open, the answer has `ANY` there.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Sequence
from typing import Any

from .inputs import ANY, REFUSED, UNKNOWN, Expected

TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
    ("sentence1",),
)
LABELS = ("label", "gold_label", "score")
IDS = ("index", "idx", "id")
KNOWN = {*LABELS, *IDS, *(name for names in TEXTS for name in names)}


class Wrong(Exception):
    """The file must be refused."""


class Unclear(Exception):
    """The rules do not say."""


@dataclasses.dataclass
class Cells:
    """A table as written; ``doubtful``: it may be refused for something in a column that is not used."""

    names: list[str]
    rows: list[list[str]]
    doubtful: bool = False


# files to cells


def decoded(data: bytes) -> str:
    try:
        found = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Wrong from None
    found = found[1:] if found[:1] == "\ufeff" else found
    if not found.strip():
        raise Wrong
    return found


def lines_of(data: bytes) -> list[str]:
    """Lines end at line feeds alone; empty ones at the end do not count."""
    lines = [line[:-1] if line[-1:] == "\r" else line for line in (decoded(data) + "\n").split("\n")]
    if not decoded(data).endswith("\n") and decoded(data).endswith("\r"):
        raise Unclear  # a carriage return at the very end, without a line feed
    while lines and not lines[-1]:
        lines.pop()
    return lines


def tsv_cells(data: bytes, names: Sequence[str] | None = None) -> Cells:
    rows = [line.split("\t") for line in lines_of(data)]
    head = list(names) if names else rows.pop(0)
    if not rows or any(len(row) != len(head) for row in rows):
        raise Wrong
    return Cells(head, rows)


def csv_cells(data: bytes) -> Cells:
    records = list(csv_records(decoded(data)))
    head = records.pop(0)
    rows = [row for row in records if row]
    if not head:
        raise Unclear  # a blank line before the header
    if not rows or any(len(row) != len(head) for row in rows):
        raise Wrong
    return Cells(head, rows)


def csv_records(written: str) -> list[list[str]]:
    """Character by character; a blank line is an empty record."""
    records, record, cell, place, begun = [], [], "", 0, False
    while place < len(written):
        char = written[place]
        if char == '"' and not cell and not begun:
            place, cell = quoted(written, place)
            begun = True
            if written[place : place + 1] not in (",", "\r", "\n", ""):
                raise Wrong
            continue
        place += 1
        if char == ",":
            record, cell, begun = [*record, cell], "", False
        elif char in "\r\n":
            while char == "\r" and written[place : place + 1] == "\r":
                place += 1
            if char == "\r" and place < len(written):
                if written[place] != "\n":
                    raise Wrong  # neither in quotes nor at the end of a line
                place += 1
            records.append([*record, cell] if record or cell or begun else [])
            record, cell, begun = [], "", False
        else:
            cell += char
            # a long field is read in one piece
            run = re.compile(r'[^,\r\n]*').match(written, place)
            assert run is not None
            cell, place = cell + run.group(), run.end()
    if record or cell or begun:
        records.append([*record, cell])
    return records


def quoted(written: str, place: int) -> tuple[int, str]:
    """What stands in quotes that open at a place, and the place after them."""
    parts = []
    while True:
        end = written.find('"', place + 1)
        if end < 0:
            raise Wrong
        parts.append(written[place + 1 : end])
        if written[end + 1 : end + 2] != '"':
            return end + 1, '"'.join(parts)
        place = end + 1


def json_cells(data: bytes, *, array: bool) -> Cells:
    """JSON lines or, if ``array`` says that it may be, one array of objects."""
    written = decoded(data)
    if array and written.lstrip()[:1] == "[":
        objects = parsed(written)
        if not isinstance(objects, list):
            raise Wrong
    else:
        lines = [line for line in written.split("\n") if line.strip()]
        objects = [parsed(line) for line in lines]
    if not objects or not all(isinstance(one, dict) for one in objects):
        raise Wrong
    return object_cells(objects)


def parsed(written: str) -> Any:
    def no_constant(_):
        raise Unclear  # NaN and Infinity, which are no JSON, but Python reads them

    def pairs(items):
        if len({key for key, _ in items}) < len(items):
            raise Unclear
        return dict(items)

    try:
        return json.loads(written, parse_constant=no_constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        raise Wrong from None


def object_cells(objects: list[dict[str, Any]]) -> Cells:
    names = list(objects[0])
    used = {*(used_texts(names) or ()), *(label_column(names) or "",), *ids_column(names)}
    doubtful, rows = False, []
    for one in objects:
        row = []
        for name in names:
            value = one.get(name, [])
            if isinstance(value, list | dict):
                if name in used:
                    raise Wrong
                doubtful, value = doubtful or name in KNOWN, ""
            if isinstance(value, float) and value in (float("inf"), float("-inf")):
                raise Unclear  # 1e999
            row.append("" if value is None else value if isinstance(value, str) else json.dumps(value))
        doubtful = doubtful or bool((one.keys() ^ set(names)) & KNOWN)
        rows.append(row)
    return Cells(names, rows, doubtful)


# cells to rows


def used_texts(names: Sequence[str]) -> tuple[str, ...] | None:
    return next((texts for texts in TEXTS if set(texts) <= set(names)), None)


def label_column(names: Sequence[str]) -> tuple[str, ...]:
    return next(((name,) for name in LABELS if name in names), ())


def ids_column(names: Sequence[str]) -> tuple[str, ...]:
    return next(((name,) for name in IDS if name in names), ())


def own_rows(
    cells: Cells, *, label_names: Sequence[str] | None = None, regression: bool | None = None, labelled: bool = True
) -> Expected:
    """What a table of people's own data is read as: texts, ids, labels and the names of their classes.

    Args:
      cells: the table.
      label_names: of the classes, if they are known beforehand.
      regression: whether the labels are scores; None: the table decides.
      labelled: whether labels are read at all.
    """
    names, rows = cells.names, cells.rows
    if any(names.count(name) > 1 for name in KNOWN):
        return REFUSED
    texts = used_texts(names)
    if texts is None:
        return REFUSED
    label = label_column(names) if labelled else ()
    if label == ("gold_label",):
        rows = [row for row in rows if row[names.index("gold_label")] != "-"]
        if not rows:
            return REFUSED
    column = {name: [row[names.index(name)] for row in rows] for name in names}
    value: dict[str, Any] = {
        "texts": [column[name] for name in texts],
        "ids": column[ids_column(names)[0]] if ids_column(names) else [str(number) for number in range(len(rows))],
        "labels": None,
        "label_names": None if label_names is None else list(label_names),
    }
    accept: bool | None = True
    if label and any(column[label[0]]):
        try:
            value["labels"], value["label_names"] = read_labels(column[label[0]], label_names, regression)
        except Wrong:
            return REFUSED
        except Unclear:
            value["labels"] = value["label_names"] = ANY
            accept = None
    has_surrogate = any("\ud800" <= char <= "\udfff" for texts in column.values() for text in texts for char in text)
    if cells.doubtful or has_surrogate or len(set(names)) < len(names):
        accept = None
    return Expected(value, accept)


_WHOLE = re.compile(r"-?[0-9]{1,15}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_MISSING = ("nan", "none", "null")


def read_labels(
    cells: Sequence[str], label_names: Sequence[str] | None, regression: bool | None
) -> tuple[list[int] | list[float], list[str] | None]:
    """The labels of a column, and the names of the classes."""
    if label_names is not None:
        if any(cell not in label_names for cell in cells):
            raise Wrong
        return [label_names.index(cell) for cell in cells], list(label_names)
    if regression:
        return [as_score(cell) for cell in cells], None
    if "" in cells:
        raise Wrong
    others = [cell for cell in cells if cell.lower() not in _MISSING]
    if len(others) < len(cells):
        if all(_NUMBER.fullmatch(cell) for cell in others):
            raise Wrong  # one missing cell must not turn numbers into names
        raise Unclear
    if len(set(cells)) == 1:
        raise Wrong
    if all(_WHOLE.fullmatch(cell) for cell in cells):
        if len({int(cell) for cell in cells}) < len(set(cells)):
            raise Unclear  # "1" and "01"
        names = sorted(set(cells), key=int)
        return [names.index(cell) for cell in cells], names
    if all(_NUMBER.fullmatch(cell) for cell in cells):
        if all(float(cell) == int(float(cell)) for cell in cells if abs(float(cell)) < 1e300):
            raise Unclear  # 0.0 and 1.0
        return [as_score(cell) for cell in cells], None
    if any(_NUMBER.fullmatch(cell.strip()) or cell != cell.strip() or not cell.isascii() for cell in cells):
        raise Unclear
    names = sorted(set(cells))
    if any(name in ("inf", "-inf", "infinity") or "_" in name for name in map(str.lower, names)):
        raise Unclear
    return [names.index(cell) for cell in cells], names


def as_score(cell: str) -> float:
    """The number of a cell in single precision; one that is too large for it is no score."""
    if not _NUMBER.fullmatch(cell):
        if cell.strip().isascii() and not re.search(r"[0-9]", cell):
            raise Wrong
        raise Unclear
    value = float(cell)
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        raise Wrong from None


# GLUE

_PAIR = ("sentence1", "sentence2")
_INFERENCE = ["entailment", "neutral", "contradiction"]
_TWO = ["entailment", "not_entailment"]
_BITS = ["0", "1"]
_NAMES = ("index", "promptID", "genre", *_PAIR)
# Task -> folder, texts, label, the classes as written (None: scores), columns of train, dev and test (None: no header).
GLUE: dict[str, tuple[str, tuple[str, ...], str, list[str] | None, dict[str, tuple[str, ...]]]] = {
    "cola": (
        "CoLA",
        ("sentence",),
        "label",
        _BITS,
        {
            "train.tsv": ("", "label", "", "sentence"),
            "dev.tsv": ("", "label", "", "sentence"),
            "test.tsv": ("index", "sentence"),
        },
    ),
    "sst2": (
        "SST-2",
        ("sentence",),
        "label",
        _BITS,
        {"train.tsv": ("sentence", "label"), "dev.tsv": ("sentence", "label"), "test.tsv": ("index", "sentence")},
    ),
    "mrpc": (
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        _BITS,
        {name: ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String") for name in ("train.tsv", "dev.tsv")}
        | {"test.tsv": ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")},
    ),
    "stsb": (
        "STS-B",
        _PAIR,
        "score",
        None,
        {name: (*_NAMES, "score") for name in ("train.tsv", "dev.tsv")} | {"test.tsv": _NAMES},
    ),
    "qqp": (
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        _BITS,
        {name: ("id", "qid1", "question1", "question2", "is_duplicate") for name in ("train.tsv", "dev.tsv")}
        | {"test.tsv": ("id", "question1", "question2")},
    ),
    "mnli": (
        "MNLI",
        _PAIR,
        "gold_label",
        _INFERENCE,
        {name: (*_NAMES, "label1", "gold_label") for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")}
        | {"test_matched.tsv": _NAMES, "test_mismatched.tsv": _NAMES},
    ),
    "qnli": (
        "QNLI",
        ("question", "sentence"),
        "label",
        _TWO,
        {name: ("index", "question", "sentence", "label") for name in ("train.tsv", "dev.tsv")}
        | {"test.tsv": ("index", "question", "sentence")},
    ),
    "rte": (
        "RTE",
        _PAIR,
        "label",
        _TWO,
        {name: ("index", *_PAIR, "label") for name in ("train.tsv", "dev.tsv")} | {"test.tsv": ("index", *_PAIR)},
    ),
    "wnli": (
        "WNLI",
        _PAIR,
        "label",
        _BITS,
        {name: ("index", *_PAIR, "label") for name in ("train.tsv", "dev.tsv")} | {"test.tsv": ("index", *_PAIR)},
    ),
}
SPLITS = {
    "train.tsv": "train",
    "dev.tsv": "validation",
    "test.tsv": "test",
    "dev_matched.tsv": "validation",
    "dev_mismatched.tsv": "validation_mismatched",
    "test_matched.tsv": "test",
    "test_mismatched.tsv": "test_mismatched",
}


def glue_rows(task: str, file: str, data: bytes) -> Expected:
    """What one file of a task of GLUE is read as."""
    _, texts, label, classes, columns = GLUE[task]
    headerless = task == "cola" and file != "test.tsv"
    try:
        cells = tsv_cells(data, [name or str(number) for number, name in enumerate(columns[file])] if headerless else None)
        names = cells.names
        labelled = SPLITS[file].split("_")[0] != "test"
        needed = [*texts, *([label] if labelled else [])]
        if not set(needed) <= set(names):
            raise Wrong
        if any(names.count(name) > 1 for name in (*needed, *IDS)):
            raise Wrong
        column = {name: [row[names.index(name)] for row in cells.rows] for name in names}
        found: list[int] | list[float] | None = None
        if label in names and (labelled or any(column[label])):
            found = (
                [as_score(cell) for cell in column[label]]
                if classes is None
                else read_labels(column[label], classes, False)[0]
            )
    except Wrong:
        return REFUSED
    except Unclear:
        return UNKNOWN
    ids = column[ids_column(names)[0]] if ids_column(names) else [str(row) for row in range(len(cells.rows))]
    doubtful = len(set(names)) < len(names) or (label in names and not labelled)
    labels = ANY if label in names and not labelled else found
    value = {"texts": [column[name] for name in texts], "ids": ids, "labels": labels}
    return Expected(value, None if doubtful else True)
