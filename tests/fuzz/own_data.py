"""Inputs for the readers of data: people's own files, GLUE's folders, sets out of domain, few-shot gyms, partitions."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pats_jax.data import gym, out_of_domain, own_files, partitions, readers

from . import draw, independent
from .independent import Cells, Unclear, Wrong
from .inputs import ANY, REFUSED, UNKNOWN, Expected, Input, Reader, must
from .mutate import damage_one


def split_values(split: Any) -> dict[str, Any]:
    """A `Split` as plain values."""
    return {
        "texts": [list(texts) for texts in (split.sentence1, split.sentence2) if texts is not None],
        "ids": list(split.ids),
        "labels": None if split.labels is None else split.labels.tolist(),
        "label_names": None if split.label_names is None else list(split.label_names),
    }


# people's own files


def _one_line(value: str) -> str:
    """A text as a cell of a TSV file can hold it."""
    return value.translate({ord(char): " " for char in "\t\n\r"})


def draw_table(rng: random.Random, suffix: str) -> tuple[bytes, Cells]:
    """A file of people's own data, and its cells."""
    names = draw.header(rng)
    count = rng.choice((1, 2, 3, 4, 8, 30))
    column = {name: draw.labels(rng, count) for name in names if name in independent.LABELS}
    breaks = () if suffix == ".tsv" else draw.BREAKS
    # Few texts but many columns: a name that stands there twice has two cells.
    rows = [
        [column[name][row] if name in column else draw.text(rng, breaks=breaks) for name in names]
        for row in range(count)
    ]
    if suffix == ".tsv":
        rows = [[_one_line(cell) for cell in row] for row in rows]
        while len(names) == 1 and rows and not rows[-1][0]:
            rows.pop()  # an empty line at the end is no row
        return draw.write_tsv(rng, names, rows), Cells(names, rows)
    if suffix == ".csv":
        return draw.write_csv(rng, names, rows), Cells(names, rows)
    return _draw_json(rng, suffix, names, rows)


def _draw_json(rng, suffix, names, rows):
    if len(set(names)) < len(names):
        names = [f"{name}{place}" if name in names[:place] else name for place, name in enumerate(names)]
    values = [[_json_value(rng, cell) for cell in row] for row in rows]
    if suffix == ".json" and rng.random() < 0.5:
        data = draw.write_json_array(rng, names, values)
    else:
        data = draw.write_json_lines(rng, names, values)
    return data, independent.object_cells([dict(zip(names, row, strict=True)) for row in values])


def _json_value(rng, cell):
    if rng.random() < 0.5:
        try:
            value = json.loads(cell, parse_constant=lambda _: cell)
        except ValueError:
            return cell
        return value if isinstance(value, int | float) and abs(value) < 1e300 and cell != "true" else cell
    return cell


def own_cells(path: str, data: bytes) -> Cells:
    """The cells of a file of people's own data by the independent reader."""
    suffix = Path(path).suffix
    if suffix == ".csv":
        return independent.csv_cells(data)
    if suffix == ".tsv":
        return independent.tsv_cells(data)
    return independent.json_cells(data, array=suffix == ".json")


def expect_own(path: str, data: bytes | str, **options: Any) -> Expected:
    """What the independent reader makes of a file."""
    if not isinstance(data, bytes):
        return REFUSED
    try:
        return independent.own_rows(own_cells(path, data), **options)
    except Wrong:
        return REFUSED
    except Unclear:
        return UNKNOWN


def _own_options(rng: random.Random) -> dict[str, Any]:
    names = rng.choice((None, None, None, None, ("0", "1"), ("neg", "pos"), ("entailment", "neutral", "contradiction")))
    return {"label_names": names, "regression": rng.choice((None, None, True, False)) if names is None else None}


def draw_own(suffix: str) -> Callable[[random.Random], Input]:
    """Inputs of one kind of file for `read_file`."""

    def draw_input(rng: random.Random) -> Input:
        options, name = _own_options(rng), f"data{suffix}"
        data, cells = draw_table(rng, suffix)
        if rng.random() < 0.5:
            known = independent.own_rows(cells, **options) if cells.rows else REFUSED
            return Input({name: data}, f"sound {suffix}", known, options)
        files, told = damage_one(rng, {name: data})
        return Input(files, told, expect_own(name, files[name], **options), options)

    return draw_input


def read_own(folder: Path, given: Input) -> Any:
    (name,) = given.files
    return split_values(own_files.read_file(folder / name, **given.options))


def draw_texts(rng: random.Random) -> Input:
    """Inputs for `read_texts`: a table, its labels ignored, or a text a line."""
    suffix = rng.choice((".csv", ".tsv", ".jsonl", ".json", ".txt"))
    name = f"texts{suffix}"
    if suffix == ".txt":
        lines = [_one_line(draw.text(rng)) for _ in range(rng.choice((1, 2, 5)))]
        files = {name: draw.write_tsv(rng, None, [[line] for line in lines])}
    else:
        files = {name: draw_table(rng, suffix)[0]}
    told = f"sound {suffix}"
    if rng.random() < 0.5:
        files, told = damage_one(rng, files)
    if suffix != ".txt":
        return Input(files, told, expect_own(name, files[name], labelled=False))
    if not isinstance(files[name], bytes):
        return Input(files, told, REFUSED)
    try:
        lines = independent.lines_of(files[name])
    except (Wrong, Unclear):
        return Input(files, told)
    ids = [str(number) for number in range(len(lines))]
    value = {"texts": [lines], "ids": ids, "labels": None, "label_names": None}
    return Input(files, told, Expected(value, True if lines else False))


def read_texts(folder: Path, given: Input) -> Any:
    (name,) = given.files
    return split_values(own_files.read_texts(folder / name))


def draw_splits(rng: random.Random) -> Input:
    """Inputs for `load_files`: a training, a validation and a test file of one task."""
    texts = rng.choice((("sentence1", "sentence2"), ("sentence",), ("premise", "hypothesis")))
    kind = rng.choice((("0", "1"), ("no", "yes"), ("0.5", "1.5", "2"), ("3", "1", "2")))
    files: dict[str, bytes | str] = {}
    for split in ("train", "validation", "test")[: rng.choice((1, 2, 2, 3, 3))]:
        suffix = rng.choice((".csv", ".tsv", ".jsonl"))
        names = [*texts, *(("label",) if split != "test" or rng.random() < 0.5 else ())]
        cells = [rng.choice(kind) for _ in range(rng.randint(2, 12))]
        cells[: len(kind)] = kind
        rows = [[*(_one_line(draw.text(rng)) for _ in texts), *([cell] if "label" in names else [])] for cell in cells]
        if rng.random() < 0.1 and "label" in names:
            rows[-1][-1] = rng.choice(("4", "maybe", "", "nan"))
        write = {".csv": draw.write_csv, ".tsv": draw.write_tsv, ".jsonl": draw.write_json_lines}[suffix]
        rows = [[f"{row[0]}.", *row[1:]] for row in rows]  # not an empty line
        files[f"{split}{suffix}"] = write(rng, names, rows)
    told = "sound files"
    if rng.random() < 0.4:
        files, told = damage_one(rng, files)
    return Input(files, told, expect_splits(files))


def expect_splits(files: dict[str, bytes | str]) -> Expected:
    """By the rules of `load_files`: the first file says what the labels are, and the others have to fit."""
    usual: tuple[tuple[str, ...], str] = ((), "")
    label_names, regression, values, accept = None, None, {}, True
    for path, data in files.items():
        split = path.split(".")[0]
        if not isinstance(data, bytes):
            return REFUSED
        try:
            cells = own_cells(path, data)
        except Wrong:
            return REFUSED
        except Unclear:
            return UNKNOWN
        labelled = split != "test"
        known = independent.own_rows(
            cells, label_names=label_names, regression=regression, labelled=labelled, usual=usual
        )
        if known.accept is False:
            return REFUSED
        accept, value = accept and known.accept, known.value
        usual = independent.used_texts(cells.names, usual[0]) or (), usual[1]
        if labelled:
            if value["labels"] is None or (split == "train" and len(set(value["labels"])) == 1):
                return REFUSED
            label_names = value["label_names"]
            usual, regression = (usual[0], independent.label_column(cells.names, usual[1]) or ""), label_names is None
        values[split] = value
    if len({len(value["texts"]) for value in values.values()}) > 1:
        return REFUSED
    return Expected(values, accept)


def read_splits(folder: Path, given: Input) -> Any:
    found = own_files.load_files({name.split(".")[0]: folder / name for name in given.files})
    return {name: split_values(split) for name, split in found.items()}


# GLUE


def draw_glue(rng: random.Random) -> Input:
    """A task's folder with a file or several."""
    task = rng.choice(sorted(independent.GLUE))
    place, texts, label, classes, columns = independent.GLUE[task]
    files: dict[str, bytes | str] = {}
    for file, names in columns.items():
        rows = []
        for number in range(rng.choice((1, 2, 5))):
            cells = {name: _one_line(draw.text(rng)) or "." for name in texts}
            cells |= {
                label: rng.choice(classes or ("0", "5.000", "2.5", "1e0")),
                "index": str(number),
                "id": f"i{number}",
            }
            rows.append([cells.get(name, f"{name or 'x'}{number}") for name in names])
        if task == "qqp" and rng.random() < 0.1:  # its first release has lines that are broken in two
            rows = [*rows, *([str(number), *"abc0"[5 - len(names) :]] for number in range(2000))]
            for number in range(rng.randint(0, 3)):
                rows.insert(number * 7 % len(rows), ["broken"])
        headerless = task == "cola" and file != "test.tsv"
        files[f"{place}/{file}"] = draw.write_tsv(rng, None if headerless else names, rows)
    told = f"sound {task}"
    if rng.random() < 0.6:
        files, told = damage_one(rng, files)
    value, accept = {}, True
    for path, data in files.items():
        file = Path(path).name
        known = independent.glue_rows(task, file, data) if isinstance(data, bytes) else REFUSED
        if known.accept is False and data == "no file" and "mismatched" in file:
            continue
        if known.accept is False:
            return Input(files, told, REFUSED, {"task": task})
        accept = None if known.accept is None else accept
        value[independent.SPLITS[file]] = known.value
    return Input(files, told, Expected(value, accept), {"task": task})


def read_glue(folder: Path, given: Input) -> Any:
    splits = ("test",) if given.options["task"] == "ax" else ("train", "validation", "test")
    found = readers.read_glue(given.options["task"], folder, splits=splits)
    values = {name: split_values(split) for name, split in found.items()}
    return {name: {key: value[key] for key in ("texts", "ids", "labels")} for name, value in values.items()}


# out of domain

_SPELT = {"scitail": {"entails": 0, "neutral": 1}, "sick": {"ENTAILMENT": 0, "NEUTRAL": 1, "CONTRADICTION": 2}}
_SNLI = {"entailment": 0, "neutral": 1, "contradiction": 2}
# Set, file, columns (None: no header), kind of file.
_OUTSIDE = (
    ("snli", "SNLI/snli_1.0_test.jsonl", ("gold_label", "sentence1", "sentence2", "pairID"), ".jsonl"),
    ("snli", "snli_1.0/snli_1.0_test.txt", ("gold_label", "sentence1", "sentence2", "label1"), ".tsv"),
    ("snli", "SNLI/test.csv", ("premise", "hypothesis", "label"), ".csv"),
    ("sick", "SICK/SICK.txt", ("pair_ID", "sentence_A", "sentence_B", "entailment_label", "SemEval_set"), ".tsv"),
    ("scitail", "SciTailV1.1/tsv_format/scitail_1.0_test.tsv", ("premise", "hypothesis", "label"), "headerless"),
    ("scitail", "SciTail/snli_format/scitail_1.0_test.txt", ("sentence1", "sentence2", "gold_label"), ".jsonl"),
)


def draw_outside(rng: random.Random) -> Input:
    """The test file of a set out of domain, as its authors lay it out."""
    name, path, names, kind = rng.choice(_OUTSIDE)
    spelt = _SPELT.get(name, _SNLI)
    rows, labels, kept = [], [], []
    for _ in range(rng.choice((1, 3, 9))):
        breaks = () if kind in (".tsv", "headerless") else draw.BREAKS
        texts = [draw.text(rng, breaks=breaks) for _ in range(2)]
        texts = texts if breaks else list(map(_one_line, texts))
        label = rng.choice([*spelt, "-"] if "gold_label" in names or "label" in names else list(spelt))
        part = rng.choice(("TEST", "TEST", "TRAIN"))
        places = iter(texts)
        cells = [
            label
            if "label" in n and n != "label1"
            else part
            if n == "SemEval_set"
            else next(places)
            if _is_text(n)
            else "x"
            for n in names
        ]
        rows.append(cells)
        if label != "-" and (part == "TEST" or "SemEval_set" not in names):
            kept.append([cell for cell, n in zip(cells, names, strict=True) if _is_text(n)])
            labels.append(spelt[label])
    if kind == "headerless":
        data = draw.write_tsv(rng, None, rows)
    else:
        write = {".jsonl": draw.write_json_lines, ".tsv": draw.write_tsv, ".csv": draw.write_csv}[kind]
        data = write(rng, names, rows)
    files, told, expected = {path: data}, f"sound {path}", REFUSED
    if rng.random() < 0.5:
        files, told = damage_one(rng, files)
        expected = UNKNOWN
    elif labels:
        expected = Expected({"texts": [list(part) for part in zip(*kept, strict=True)], "labels": labels}, True)
    return Input(files, told, expected, {"name": name})


def _is_text(column):
    return column in ("sentence1", "sentence2", "premise", "hypothesis", "sentence_A", "sentence_B")


def read_outside(folder: Path, given: Input) -> Any:
    values = split_values(out_of_domain.load_out_of_domain(given.options["name"], folder))
    return {"texts": values["texts"], "labels": values["labels"]}


# few-shot gyms


def draw_gym(rng: random.Random) -> Input:
    """A folder with two tasks, read whole or by a partition beside which there is a third, damaged one."""
    files: dict[str, bytes | str] = {}
    value, marked = {}, set()
    for task in ("weather", "riddle"):
        suffix, marks = rng.choice((".jsonl", ".tsv")), rng.choice(("", "ABC", "123"))
        value[task] = _draw_task(rng, task, suffix, marks, files)
        marked |= {task} if suffix == ".tsv" and marks else set()
    if rng.random() < 0.2:
        return Input(files, "sound", Expected(value, True))
    if rng.random() < 0.2:
        name = rng.choice(sorted(files))
        damaged, told = damage_one(rng, {"gym/other/other_16_13_dev" + Path(name).suffix: files[name]}, special=0.2)
        partition = json.dumps({"train": ["weather"], "dev": [], "test": ["riddle"]}).encode()
        own = {f"gym/{name}": data for name, data in files.items()}
        return Input({**own, **damaged, "partition.json": partition}, f"beside {told}", Expected(value, True))
    files, told = damage_one(rng, files)
    (name,) = (name for name in files if name in told)
    return Input(files, told, _expect_gym(value, name, files[name], marked))


def _draw_task(rng, task, suffix, marks, files):
    """Adds a task's files, in TSV with the options after the input where there are marks; gives its rows."""
    options = ["warm", "cold", draw.text(rng) if suffix == ".jsonl" else "very hot"]
    if len(set(options)) < 3:
        options[2] = "tepid"
    appended = "".join(f" ({mark}) {option}" for mark, option in zip(marks, options, strict=False))
    samples: dict[int, dict[str, list]] = {13: {}, 21: {}}
    for seed, splits in samples.items():
        for split in ("train", "dev", "test"):
            texts = [draw.text(rng, breaks=draw.BREAKS) for _ in range(rng.choice((3, 4, 8)))]
            if suffix == ".tsv":
                texts = [f"q {_one_line(text)} ." for text in texts]
            rows = splits[split] = [[text, options[number % 3]] for number, text in enumerate(texts)]
            name = f"{task}/{task}_16_{seed}_{split}{suffix}"
            if suffix == ".tsv":
                files[name] = draw.write_tsv(rng, None, [(text + appended, output) for text, output in rows])
            else:
                order = rng.sample(options, 3) if task == "riddle" else options
                written = [(task, *row, order) for row in rows]
                files[name] = draw.write_json_lines(rng, ("task", "input", "output", "options"), written)
    return samples


def _expect_gym(value, name, data, marked):
    """All files but the damaged one stay as they were; of that, the number of rows is known."""
    task, _, seed, split = Path(name).stem.split("_")
    if isinstance(data, str):
        return UNKNOWN if data == "no file" else REFUSED
    try:
        lines = independent.lines_of(data)
    except Wrong:
        return REFUSED
    except Unclear:
        return UNKNOWN
    count = len([line for line in lines if line.strip()]) if name.endswith(".jsonl") else len(lines)
    samples = {**value[task], int(seed): {**value[task][int(seed)], split: [ANY] * count}}
    if task in marked:  # if one line has no options any more, all lines are read as if they had none
        samples = {s: {split: [ANY] * len(rows) for split, rows in splits.items()} for s, splits in samples.items()}
    return Expected({**value, task: samples}, None)


def read_gym(folder: Path, given: Input) -> Any:
    if "partition.json" in given.files:
        found = partitions.load_partitioned_gym(folder / "gym", folder / "partition.json")[0]
    else:
        found = gym.load_gym(folder)
    return {
        name: {
            sample.seed: {
                split: [[row.input, row.output] for row in getattr(sample, split)] for split in ("train", "dev", "test")
            }
            for sample in task.samples
        }
        for name, task in found.items()
    }


def draw_partition(rng: random.Random) -> Input:
    """A partition's file."""
    names = rng.sample(["weather", "voice", "riddle", "manners", "a-b", "é", "x y", "glue-rte", "superglue-rte"], 6)
    value = {"train": names[:2], "dev": names[2 : 2 + rng.randint(0, 2)], "test": names[4:]}
    files = {
        "partition.json": json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5).encode()
    }
    if rng.random() < 0.2:
        return Input(files, "sound", Expected(value, True))
    files, told = damage_one(rng, files)
    return Input(files, told)


def read_partition(folder: Path, given: Input) -> Any:
    found = partitions.read_partition(folder / "partition.json")
    lists = {name: list(getattr(found, name)) for name in ("train", "dev", "test")}
    must(all(isinstance(name, str) for names in lists.values() for name in names), "a name is no text")
    return lists


READERS = {
    "csv": Reader(draw_own(".csv"), read_own),
    "tsv": Reader(draw_own(".tsv"), read_own),
    "jsonl": Reader(draw_own(".jsonl"), read_own),
    "json": Reader(draw_own(".json"), read_own),
    "splits": Reader(draw_splits, read_splits),
    "texts": Reader(draw_texts, read_texts),
    "glue": Reader(draw_glue, read_glue),
    "outside": Reader(draw_outside, read_outside),
    "gym": Reader(draw_gym, read_gym),
    "partition": Reader(draw_partition, read_partition),
}
