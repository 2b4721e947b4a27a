"""Makes the zip for the GLUE server from the predictions of finished runs: `pats-jax submission`.

The server reads one archive with eleven TSV files at its top level, one for each test set and one for the diagnostic
set AX. Its error messages are terse, so every file is checked here, byte for byte, before anything is written.
"""

import collections
import io
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import rich.console
import rich.table
import rich.text
import tyro

from pats_jax.core import files
from pats_jax.core.files import write_bytes
from pats_jax.data.builtin import OTHER_ROWS
from pats_jax.data.tables import listed
from pats_jax.data.tasks import TASKS, Task
from pats_jax.errors import InputError, shown
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import SubmittedConfig

logger = logging.getLogger(__name__)

HEADER = "index\tprediction"
# File of the archive -> the task and the test split that it answers, in the archive's order.
FILES = {file: (task, split) for task in TASKS.values() for split, file in task.prediction_files.items()}
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class PredictedRun:
    """A finished run.

    Attributes:
      folder: the run's folder, as given.
      task: what it was trained on.
      is_builtin: whether its data is the built-in data, not GLUE.
      files: its prediction files; none if it was made without ``--do_predict``.
    """

    folder: pathlib.Path
    task: Task
    is_builtin: bool
    files: list[pathlib.Path]


@dataclass(frozen=True)
class Entry:
    """One file of the archive.

    Attributes:
      file: its name.
      task: the task that it answers.
      answers: the prediction of each row, as the server reads it.
      run: the folder it comes from; None for a placeholder.
    """

    file: str
    task: Task
    answers: list[str]
    run: pathlib.Path | None

    @property
    def text(self) -> str:
        lines = [HEADER, *(f"{index}\t{answer}" for index, answer in enumerate(self.answers))]
        return "\n".join(lines) + "\n"


def write_submission(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    *,
    output_dir: str,
    placeholders: bool = False,
) -> None:
    """Writes submission.zip, the archive for the GLUE server, and prints its contents.

    Args:
      runs: folders of finished runs made with --do_predict, one for each task; the MNLI run also covers AX
      output_dir: folder to write submission.zip to
      placeholders: fill files that no run provides with one constant prediction
    """
    target = pathlib.Path(output_dir) / "submission.zip"
    _check_free(target)
    found = read_runs(runs)
    _check_outside(target.parent, found)
    entries = collect(found, placeholders)
    with FolderLock(target.parent):
        _check_free(target)
        write_bytes(target, archive(entries))

    is_builtin = found[0].is_builtin
    console = rich.console.Console()
    console.print(contents(entries, "built-in data, not GLUE" if is_builtin else "GLUE"))
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
    constant = [entry.file for entry in entries if entry.run is None]
    if constant:
        logger.warning("placeholders, not predictions of a model: %s; ignore their scores", ", ".join(constant))
    if is_builtin:
        logger.warning("do not submit this zip: its runs used the built-in data, which is not GLUE")


# runs


def read_runs(folders: Sequence[str]) -> list[PredictedRun]:
    """The runs in some folders, all on GLUE or all on the built-in data; skips folders that are not runs on a task.

    Raises:
      InputError: if no run is left, `read_run` rejects one, or the runs mix the two kinds of data.
    """
    found = [(name, read_run(pathlib.Path(name))) for name in folders]
    reasons = {
        "these are not runs on a GLUE task": [name for name, run in found if run is None],
        "these have no predictions (made by --do_predict)": [name for name, run in found if run and not run.files],
    }
    for reason, names in reasons.items():
        if names:
            logger.warning("skipped, for %s: %s", reason, ", ".join(names))
    runs = [run for _, run in found if run and run.files]
    if not runs:
        raise InputError("no runs: name the folders of finished runs on GLUE tasks, made with --do_predict")
    other = next((run for run in runs if run.is_builtin != runs[0].is_builtin), None)
    if other:
        builtin, real = (runs[0], other) if runs[0].is_builtin else (other, runs[0])
        raise InputError(
            f"{builtin.folder} used the built-in data, {real.folder} did not; a submission cannot mix them"
        )
    return runs


def read_run(folder: pathlib.Path) -> PredictedRun | None:
    """Reads the run in a folder; None if it is not a run on a GLUE task, but a grid or gym, for example.

    Raises:
      InputError: if the folder is not that of a run, or the run used data other than GLUE's tasks, has not finished,
        has no predictions, or contains a file that is not its own.
    """
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; name the folders of finished runs")
    task_name, data_dir = _read_config(folder)
    if task_name is None:
        return None
    task = TASKS.get(task_name.lower())
    if task is None:
        raise InputError(f"{folder}: config.json: there is no GLUE task {shown(task_name)}")
    if not (folder / "results.json").is_file():
        raise InputError(f"{folder}: unfinished: it has no results.json; finish the run first")
    found = sorted((folder / "predictions").glob("*.tsv"))
    own = {*task.prediction_files.values(), *(TASKS["ax"].prediction_files.values() if task.name == "mnli" else ())}
    foreign = next((file for file in found if file.name not in own), None)
    if foreign:
        raise InputError(
            f"{shown(str(foreign), 400, quoted=False)}: a run on {task.name} writes no such file; remove it"
        )
    return PredictedRun(folder, task, data_dir == "builtin", found)


def _read_config(folder):
    """Task and data of a run, from its config.json, which saved models and other programs' runs have too."""
    path = folder / "config.json"
    config = files.read_record(path, SubmittedConfig) if os.path.lexists(path) else SubmittedConfig()
    return config.get("task_name"), config.get("data_dir")


# files


def collect(runs: Sequence[PredictedRun], placeholders: bool) -> list[Entry]:
    """Collects and checks the eleven files of the archive.

    Args:
      runs: the runs, from `read_runs`.
      placeholders: whether to fill a file that no run provides with one constant prediction; otherwise it is an error.

    Raises:
      InputError: if two runs provide a file, or none does, or the server would reject it.
    """
    offered: dict[str, tuple[PredictedRun, pathlib.Path]] = {}
    for run in runs:
        for file in run.files:
            if file.name in offered:
                raise InputError(f"{offered[file.name][0].folder} and {run.folder} both have {file.name}; drop one")
            offered[file.name] = (run, file)
    missing = [file for file in FILES if file not in offered]
    if missing and not placeholders:
        raise InputError(
            f"no run provides {', '.join(missing)}; add runs that do (AX comes with mnli), or use --placeholders"
        )
    entries = {}
    for name, (run, path) in offered.items():
        entries[name] = Entry(name, FILES[name][0], read_answers(path, name, run.is_builtin), run.folder)
    for name in missing:
        task = FILES[name][0]
        constant = [task.format_prediction(0)] * expected_rows(name, runs[0].is_builtin)
        entries[name] = Entry(name, task, constant, None)
    return [entries[name] for name in FILES]


def expected_rows(name: str, is_builtin: bool) -> int:
    """The number of rows of the test set that a file answers."""
    task, split = FILES[name]
    return OTHER_ROWS if is_builtin else task.test_rows[split]


def read_answers(path: pathlib.Path, name: str, is_builtin: bool) -> list[str]:
    """Reads the predictions in a file that goes into the archive as ``name``.

    The file must match, byte for byte, what the program writes: header, rows numbered from 0 without a gap, line feeds,
    no blanks, predictions that the server knows, and as many rows as the test set.

    Raises:
      InputError: if the file differs; the message names the file and the line.
    """
    text = files.read_bytes(path).decode("utf-8", "replace")  # a wrong byte is no part of any prediction
    if "\r" in text:
        raise InputError(f"{path}: lines end with carriage returns; use the file as the run wrote it")
    header, *lines = text.split("\n")
    if header != HEADER:
        raise InputError(f"{path}:1: the header is {header[:80]!r}, not {HEADER!r}")
    if not lines or lines.pop():
        raise InputError(f"{path}: the last line is incomplete; the file was truncated")
    answers = []
    for index, line in enumerate(lines):
        number, _, answer = line.partition("\t")
        if number != str(index):
            raise InputError(f"{path}:{index + 2}: {line[:80]!r}: expected the row with index {index}")
        answers.append(answer)
    _check_answers(path, FILES[name][0], answers)
    rows = expected_rows(name, is_builtin)
    if len(answers) != rows:
        raise InputError(
            f"{path}: {len(answers)} rows, but the {'built-in' if is_builtin else 'GLUE'} test set has {rows}; "
            "predict all of it, without --max_predict_samples"
        )
    return answers


def _check_answers(path, task, answers):
    low, high = task.score_range or (0, 0)
    written = class_names(task)
    expected = f"one of {listed(written)}" if written else f"a number from {low:g} to {high:g}"
    for line, answer in enumerate(answers, 2):
        right = answer in written if written else _NUMBER.fullmatch(answer) and low <= float(answer) <= high
        if not right:
            raise InputError(f"{path}:{line}: the prediction {answer[:80]!r} is not {expected}")


def class_names(task: Task) -> list[str]:
    """The classes of a task as the server spells them, by index; empty for scores."""
    return [] if task.labels is None else [task.format_prediction(index) for index in range(task.num_labels)]


# archive and report


def archive(entries: Sequence[Entry]) -> bytes:
    """The zip of the files; the same predictions always give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as out:
        for entry in entries:
            info = zipfile.ZipInfo(entry.file)  # dated 1980
            info.create_system = 3  # Unix, on Windows too
            info.external_attr = 0o644 << 16
            out.writestr(info, entry.text)
    return packed.getvalue()


def _check_free(target):
    if os.path.lexists(target):
        raise InputError(f"{target}: already exists; remove it, or choose another --output_dir")


def _check_outside(folder, runs):
    """Raises InputError if the archive would be in the folder of a run, which holds only what the run wrote."""
    inside = next((run.folder for run in runs if folder.resolve().is_relative_to(run.folder.resolve())), None)
    if inside:
        raise InputError(f"--output_dir {folder}: is inside the run {inside}; choose another folder")


def contents(entries: Sequence[Entry], data: str) -> rich.table.Table:
    """A table of the contents, which marks the placeholders."""
    table = rich.table.Table(title=f"submission ({data})")
    table.add_column("file", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("answers")
    for entry in entries:
        run = "placeholder" if entry.run is None else str(entry.run)
        table.add_row(entry.file, str(len(entry.answers)), rich.text.Text(run), _shares(entry))
    return table


def _shares(entry):
    """The share of each class, or the mean of the scores."""
    if entry.task.is_regression:
        return f"mean {sum(map(float, entry.answers)) / len(entry.answers):.3f}"
    counts = collections.Counter(entry.answers)
    return ", ".join(f"{name} {counts[name] / len(entry.answers):.1%}" for name in class_names(entry.task))
