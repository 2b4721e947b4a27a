"""What the files say, read again: straight from the documented rules, slowly, and sharing no code with the library.

Tables are lists of cells as written. `own_rows` gives what a table of people's own data must be read as, `glue_rows`
the same of a file of GLUE. Where the rules leave something open, the answer has `ANY` there.
"""

import dataclasses
import decimal
import fractions
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
    rows: list[list[str | None]] | list[list[str]]
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


def tsv_cells(data: bytes, names: Sequence[str] | None = None, *, broken: float = 0.0) -> Cells:
    """The cells of a TSV file; rows with too few of them are left out up to a share of ``broken``."""
    rows = [line.split("\t") for line in lines_of(data)]
    head = list(names) if names else rows.pop(0)
    whole = [row for row in rows if len(row) >= len(head)]
    if len(rows) - len(whole) <= broken * len(rows):
        rows = whole
    if not rows or any(len(row) != len(head) for row in rows):
        raise Wrong
    return Cells(head, rows)


def csv_cells(data: bytes) -> Cells:
    head, *rows = [record for record in csv_records(decoded(data)) if record]  # blank lines do not count
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
            run = re.compile(r"[^,\r\n]*").match(written, place)
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
    """Numbers and booleans are their JSON text, null is an empty cell; None is what no cell can be."""
    names = list(objects[0])
    added = any((one.keys() - set(names)) & KNOWN for one in objects)
    return Cells(names, [[_json_cell(one.get(name, [])) for name in names] for one in objects], added)


def _json_cell(value):
    if isinstance(value, list | dict):
        return None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise Unclear  # 1e999
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


# cells to rows


def used_texts(names: Sequence[str], usual: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The columns of the texts: those of the training file if they are here, else the first of all."""
    return next((texts for texts in (usual, *TEXTS) if texts and set(texts) <= set(names)), None)


def label_column(names: Sequence[str], usual: str = "") -> str | None:
    return next((name for name in (usual, *LABELS) if name and name in names), None)


def ids_column(names: Sequence[str]) -> str | None:
    return next((name for name in IDS if name in names), None)


def own_rows(
    cells: Cells,
    *,
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    labelled: bool = True,
    usual: tuple[tuple[str, ...], str] = ((), ""),
) -> Expected:
    """What a table of people's own data is read as: texts, ids, labels and the names of their classes.

    Args:
      cells: the table.
      label_names: of the classes, if they are known beforehand.
      regression: whether the labels are scores; None: the table decides.
      labelled: whether labels are read at all.
      usual: the columns of texts and labels in the training file.
    """
    names, rows = cells.names, cells.rows
    known = KNOWN if labelled else KNOWN - set(LABELS)
    if any(names.count(name) > 1 for name in known):
        return REFUSED
    texts, label = used_texts(names, usual[0]), label_column(names, usual[1]) if labelled else None
    if texts is None:
        return REFUSED
    if label == "gold_label":
        rows = [row for row in rows if row[names.index(label)] != "-"]
        if not rows:
            return REFUSED
    column = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    accept = None if cells.doubtful else True
    for name in known & set(names):
        if not all(cell is not None and _is_text(cell) for cell in column[name]):
            if name in (*texts, label, ids_column(names)):
                return REFUSED
            accept = None
    value: dict[str, Any] = {
        "texts": [column[name] for name in texts],
        "ids": column[ids_column(names) or ""] if ids_column(names) else [str(number) for number in range(len(rows))],
        "labels": None,
        "label_names": None if label_names is None else list(label_names),
    }
    if label and not all(map(_is_missing, column[label])):
        try:
            value["labels"], value["label_names"] = read_labels(column[label], label_names, regression)
        except Wrong:
            return REFUSED
    return Expected(value, accept)


def _is_text(cell: str) -> bool:
    """Whether it has no lone surrogate."""
    return not re.search("[\ud800-\udfff]", cell)


# labels, by what is written in data/labels.py

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_VALUE = "|nan|-nan|none|null|na|n/a|<na>|#n/a|#na|1.#ind|-1.#ind|1.#qnan|-1.#qnan|#n/a n/a".split("|")


def _is_missing(cell: str) -> bool:
    return " ".join(cell.lower().split()) in _NO_VALUE


def _is_infinite(cell: str) -> bool:
    """Infinite as written, or too large."""
    return bool(re.fullmatch(r"[+-]?(inf|infinity)", cell.strip().lower()) or _NUMBER.fullmatch(cell.strip()))


def _value(cell: str) -> fractions.Fraction | None:
    """The number of a cell, exactly; None if it is none, or too large for single precision and not whole."""
    cell = cell.strip()
    if _WHOLE.fullmatch(cell):
        whole = cell.split(".")[0]
        if len(whole) < 4000:
            return fractions.Fraction(int(whole))
        return fractions.Fraction(int(decimal.Decimal(whole).scaleb(-2000))) * 10**2000
    if not _NUMBER.fullmatch(cell) or as_single(float(cell)) is None:
        return None
    return fractions.Fraction(float(cell))


def as_single(value: float) -> float | None:
    """A number in single precision; None if it is too large for that."""
    try:
        single = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return None
    return None if single in (float("inf"), float("-inf")) else single


def read_labels(
    cells: Sequence[str], label_names: Sequence[str] | None, regression: bool | None
) -> tuple[list[int] | list[float], list[str] | None]:
    """The labels of a column, and the names of the classes."""
    if label_names is not None:
        return [_place(cell, label_names) for cell in cells], list(label_names)
    if regression:
        return [as_score(cell) for cell in cells], None
    numbers = [cell for cell in cells if _value(cell) is not None]
    words = {cell for cell in cells if _value(cell) is None}
    plain = {cell for cell in words if not _is_missing(cell) and not _is_infinite(cell)}
    if any(not cell.strip() for cell in words):
        raise Wrong
    if numbers and words - plain and (not plain or 2 * len(numbers) >= len(cells)):
        raise Wrong  # a missing value must not turn numbers into names
    if words:
        names = sorted(set(cells))
    else:
        if len({_value(cell) for cell in cells}) == 1:
            raise Wrong
        if regression is None and not all(_WHOLE.fullmatch(cell.strip()) for cell in cells):
            return [as_score(cell) for cell in cells], None
        written: dict[fractions.Fraction | None, list[str]] = {}
        for cell in cells:
            written.setdefault(_value(cell), []).append(cell)
        names = [min(written[value], key=lambda cell: (len(cell), cell)) for value in sorted(written, key=_in_order)]
    if len(names) == 1:
        raise Wrong
    return [_place(cell, names) for cell in cells], names


def _in_order(value):
    assert value is not None
    return value


def _place(cell: str, names: Sequence[str]) -> int:
    """The class of a cell: by value where all names are numbers, else as written."""
    values = [_value(name) for name in names]
    if None not in values and len(set(values)) == len(values) and _value(cell) in values:
        return values.index(_value(cell))
    if cell not in names:
        raise Wrong
    return names.index(cell)


def as_score(cell: str) -> float:
    """The number of a cell in single precision; one that is too large for it is no score."""
    if not _NUMBER.fullmatch(cell.strip()):
        raise Wrong
    single = as_single(float(cell))
    if single is None:
        raise Wrong
    return single


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
    "ax": ("diagnostic", _PAIR, "label", _INFERENCE, {"diagnostic.tsv": ("index", *_PAIR)}),
}
SPLITS = {
    "train.tsv": "train",
    "dev.tsv": "validation",
    "test.tsv": "test",
    "dev_matched.tsv": "validation",
    "dev_mismatched.tsv": "validation_mismatched",
    "test_matched.tsv": "test",
    "test_mismatched.tsv": "test_mismatched",
    "diagnostic.tsv": "test",
}


def glue_rows(task: str, file: str, data: bytes) -> Expected:
    """What one file of a task of GLUE is read as."""
    _, texts, label, classes, columns = GLUE[task]
    headerless = task == "cola" and file != "test.tsv"
    try:
        own = [name or str(number) for number, name in enumerate(columns[file])] if headerless else None
        cells = tsv_cells(data, own, broken=0.001 if task == "qqp" else 0.0)
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
                else [_place(cell, classes) for cell in column[label]]
            )
    except Wrong:
        return REFUSED
    except Unclear:
        return UNKNOWN
    numbered = ids_column(names)
    ids = column[numbered] if numbered else [str(row) for row in range(len(cells.rows))]
    doubtful = len(set(names)) < len(names) or (label in names and not labelled)
    labels = ANY if label in names and not labelled else found
    value = {"texts": [column[name] for name in texts], "ids": ids, "labels": labels}
    return Expected(value, None if doubtful else True)
