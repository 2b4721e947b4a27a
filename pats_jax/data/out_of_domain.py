"""Additional evaluation sets for a natural language inference model: ``--out_of_domain``.

Each set has two classes (entailment, not_entailment) or three (entailment, neutral, contradiction). Models are scored
on its test split as published, from a folder of the published files or from the hub; for GLUE sets, whose test labels
are secret, on the validation split.

References:
  SNLI: Bowman et al., EMNLP 2015. SICK: Marelli et al., LREC 2014. SciTail: Khot, Sabharwal and Clark, AAAI 2018.
  The protocol: H. Zhang et al., "Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks
  Adaptively", NeurIPS 2022, arXiv 2211.01642.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pats_jax.data.readers import NO_GOLD_LABEL, Split, leave_out_unlabelled, load_from_hub, load_task
from pats_jax.data.tables import INDEX_COLUMNS, Table, listed, read_csv, read_json_rows, read_tsv
from pats_jax.errors import InputError

THREE_CLASSES = ("entailment", "neutral", "contradiction")
TWO_CLASSES = ("entailment", "not_entailment")

_TEXT_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence_A", "sentence_B"))
_LABEL_COLUMNS = ("gold_label", "label", "entailment_judgment", "entailment_label")
_SPLIT_COLUMN = "SemEval_set"  # in the file that holds all of SICK
_WANTED = {*INDEX_COLUMNS, *_LABEL_COLUMNS, _SPLIT_COLUMN, *(name for names in _TEXT_COLUMNS for name in names)}


def _csv(path: Path) -> Table:
    return read_csv(path, _WANTED)


def _json_lines(path: Path) -> Table:
    return read_json_rows(path, _WANTED)


def _tsv(*header: str) -> Callable[[Path], Table]:
    """A reader of TSV files with these columns, or with those of the first line if none are given."""
    return lambda path: read_tsv(path, _WANTED, header=header or None)[0]


@dataclass(frozen=True)
class InferenceSet:
    """One set, and where its test split is.

    Attributes:
      folders: names that the set's folder may have.
      files: file in that folder -> its reader; the first file that exists is read.
      hub: the arguments of ``datasets.load_dataset``.
      labels: names of the classes by index.
      spellings: label in the files, in lower case -> the class, if they differ.
    """

    folders: tuple[str, ...]
    files: Mapping[str, Callable[[Path], Table]]
    hub: Mapping[str, str]
    labels: tuple[str, ...] = THREE_CLASSES
    spellings: Mapping[str, str] = field(default_factory=dict)


_SETS = {
    "snli": InferenceSet(
        folders=("SNLI", "snli_1.0"),
        files={
            "snli_1.0_test.jsonl": _json_lines,
            "snli_1.0_test.txt": _tsv(),
            "test.tsv": _tsv(),
            "test.csv": _csv,
            "test_1k.txt": _tsv("label", "premise", "hypothesis"),
        },
        hub={"path": "stanfordnlp/snli"},
    ),
    "sick": InferenceSet(
        folders=("SICK",),
        files={"SICK_test_annotated.txt": _tsv(), "SICK.txt": _tsv()},
        # The repository itself is a loading script, which `datasets` runs no more; the hub keeps its tables here.
        hub={"path": "RobZamp/sick", "revision": "refs/convert/parquet"},
    ),
    "scitail": InferenceSet(
        folders=("SciTail", "SciTailV1.1"),
        files={
            "tsv_format/scitail_1.0_test.tsv": _tsv("premise", "hypothesis", "label"),
            "scitail_1.0_test.tsv": _tsv("premise", "hypothesis", "label"),
            "snli_format/scitail_1.0_test.txt": _json_lines,
            "scitail_1.0_test.txt": _json_lines,
            "test.csv": _csv,
        },
        hub={"path": "allenai/scitail", "name": "snli_format"},
        labels=TWO_CLASSES,
        spellings={"entails": "entailment", "neutral": "not_entailment"},
    ),
}

# GLUE's own: task and split.
_GLUE = {
    "mnli": ("mnli", "validation"),
    "mnli_mm": ("mnli", "validation_mismatched"),
    "rte": ("rte", "validation"),
}

NAMES = (*_GLUE, *_SETS)


def load_out_of_domain(name: str, folder: str | Path | None = None, data_dir: str | Path | None = None) -> Split:
    """Reads one of ``NAMES``; rows without a gold label are left out, and the log says how many.

    Args:
      name: the set.
      folder: a folder that contains the folders of SNLI, SICK and SciTail with the authors' files, or one of them;
        None: the hub.
      data_dir: the folder of MNLI and RTE, as for `load_task`.

    Returns:
      The rows; their ``label_names`` are the set's two or three classes.

    Raises:
      InputError: if a file is missing or damaged; the message names the file and, where it applies, the line.
    """
    if name in _GLUE:
        task, split = _GLUE[name]
        found = load_task(task, data_dir, splits=["validation"])
        if split not in found:
            raise InputError(f"out_of_domain {name}: data_dir {data_dir} has no {split} file for {task}")
        return found[split]
    source = _SETS[name]
    table = _hub_table(source) if folder is None else _file_table(name, source, Path(folder))
    return _split(name, source, table)


def _file_table(name: str, source: InferenceSet, folder: Path) -> Table:
    if not os.path.isdir(folder):
        raise InputError(f"out_of_domain_dir {folder}: no such folder; omit the flag to read from the hub")
    places = [folder] if folder.name in source.folders else [folder / own for own in source.folders]
    for place in places:
        for file, read in source.files.items():
            if os.path.exists(place / file):
                return read(place / file)
    names = ", ".join(source.files)
    raise InputError(f"{places[0]}: no test file of {name}; expected one of {names}")


def _hub_table(source: InferenceSet) -> Table:
    import datasets

    rows = load_from_hub("out_of_domain_dir to the published files", **source.hub, split="test")
    columns = {column: list(rows[column]) for column in rows.column_names if column in _WANTED}
    for column, feature in rows.features.items():
        if column in columns and isinstance(feature, datasets.ClassLabel):
            columns[column] = [NO_GOLD_LABEL if row < 0 else feature.names[row] for row in columns[column]]
    return Table(Path(source.hub["path"]), rows.column_names, columns, range(1, len(rows) + 1))


def _split(name: str, source: InferenceSet, table: Table) -> Split:
    texts = next((pair for pair in _TEXT_COLUMNS if all(column in table.columns for column in pair)), None)
    label = next((column for column in _LABEL_COLUMNS if column in table.columns), None)
    if texts is None or label is None:
        raise InputError(f"{table.path}:1: no two text columns and a label of {name} among {listed(table.header)}")
    if _SPLIT_COLUMN in table.columns:
        table = table.keep([row for row, part in enumerate(table.columns[_SPLIT_COLUMN]) if part == "TEST"])
        if not len(table):
            raise InputError(f"{table.path}: no rows of the test split")
    table = leave_out_unlabelled(table, label)
    cells = [cell.lower() for cell in table.columns[label]]
    table.columns[label] = [source.spellings.get(cell, cell) for cell in cells]
    labels = table.classes(label, source.labels)
    return Split(table.columns[texts[0]], table.columns[texts[1]], labels, table.ids(), source.labels)
