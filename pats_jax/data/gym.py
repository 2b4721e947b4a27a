"""A few-shot gym: a folder of tasks in CrossFit's files, or the built-in one.

A task's files are ``<task>_<shots>_<seed>_<split>`` with the splits train, dev and test, in a folder of the task's name
or beside those of other tasks. Two kinds of files are read:

* ``.jsonl``: one object per line with the strings ``task``, ``input`` and ``output`` and the list ``options``, as in
  MetaICL. If all lists are empty, the task is text to text.
* ``.tsv``: input, tab, output, without a header, as CrossFit writes them; further outputs are other right answers. If
  all inputs of a task end in `` (A) one (B) other``, perhaps with a context behind, these are the options; else the
  options are the outputs in the task's files, in alphabetical order. A task that CrossFit scores by its texts, or with
  several right answers in a row, or with too many outputs for classes, is text to text.

CrossFit's own files of text-to-text tasks have 32 shots; they are read together with those of 16.

Every seed has a train and a dev file. A seed's test rows come from its own test file or, if a task has only one test
file, from that one. Hidden files are ignored.
"""

import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pats_jax.core.files import checked_name
from pats_jax.data.crossfit import crossfit_tasks
from pats_jax.data.few_shot import SPLITS, FewShotTask, Row, Sample, build_task, chosen_names
from pats_jax.data.tables import check_characters, json_lines, listed, read_text, tsv_rows
from pats_jax.errors import InputError, shown

SHOTS = 16
# More outputs than this are no classes; the most that a classification task of CrossFit has are discovery's 174.
MAX_CLASSES = 200

_FILE_NAME = re.compile(r"(.+)_(\d+)_(\d+)_(train|dev|test)")
_SUFFIXES = (".jsonl", ".tsv")
_KEYS = ("task", "input", "output", "options")
# CrossFit's quail has no blanks around the marks.
_OPTION_MARKS = tuple(re.compile(rf" ?\(([A-Z]|[1-9])\){end}") for end in (" ", ""))
_SEPARATOR = " [SEP] "


class _Line(NamedTuple):
    """The content of one line of a file; without options if the file lists none."""

    place: str
    input: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()
    whole: str | None = None


# The lines of the files of one task.
_Files = dict[Path, list[_Line]]


def load_gym(
    source: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    shots: int = SHOTS,
    seeds: Sequence[int] | None = None,
) -> dict[str, FewShotTask]:
    """Reads a few-shot gym.

    Args:
      source: a folder, see above, or ``"builtin"`` for the generated gym.
      tasks: names of the tasks to read; other files are ignored; None reads all.
      shots: the number in the file names; in CrossFit, the rows of each class.
      seeds: seeds of the samples to read; None reads all.

    Returns:
      Task name -> task, in alphabetical order.

    Raises:
      InputError: if a file is invalid; the message names the file and, if possible, the line.
    """
    if str(source) == "builtin":
        from pats_jax.data.builtin_gym import SHOTS as BUILTIN_SHOTS, generate_gym

        if shots != BUILTIN_SHOTS:
            raise InputError(f"builtin: has only samples of {BUILTIN_SHOTS} shots, not {shots}")
        return generate_gym(tasks=tasks, seeds=seeds)
    found = _find_files(Path(source), shots, tasks)
    names = chosen_names(found, tasks, str(source))
    # All samples are read: which options a task has, and their order, must not depend on those that are asked for.
    return {name: _read_task(name, found[name]).choose(seeds) for name in names}


def task_names(source: str | Path, *, shots: int = SHOTS) -> list[str]:
    """Names of the tasks of a gym in alphabetical order, without reading their files.

    Raises:
      InputError: if there is no such folder, or no task in it.
    """
    if str(source) == "builtin":
        from pats_jax.data.builtin_gym import GRAMMARS

        return sorted(GRAMMARS)
    return sorted(_find_files(Path(source), shots, ()))


def _find_files(folder: Path, shots: int, tasks: Sequence[str] | None) -> dict[str, dict[tuple[int, str], Path]]:
    """The files of every task by seed and split; wrong names matter only for the requested tasks.

    Raises:
      InputError: if there is no such folder, a name of a file is not valid, or two files are of one split.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; choose one with files of few-shot tasks, or builtin")
    found: dict[str, dict[tuple[int, str], Path]] = {}
    other_shots = set()
    for path in sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern)):
        if path.suffix not in _SUFFIXES or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        place = str(path) if str(path).isprintable() else shown(str(path), 4096)
        match = _FILE_NAME.fullmatch(path.stem)
        if match is None:
            if tasks is None or any(path.parent.name == task or path.stem.startswith(f"{task}_") for task in tasks):
                raise InputError(f"{place}: not named like a few-shot file, <task>_<shots>_<seed>_<{'|'.join(SPLITS)}>")
            continue
        name, own_shots, seed, split = match.groups()
        if int(own_shots) != shots and not (shots == SHOTS and int(own_shots) == _crossfit_shots(name)):
            other_shots.add(int(own_shots))
            continue
        if tasks is None or name in tasks:
            checked_name(name, place)
        files = found.setdefault(name, {})
        if (int(seed), split) in files and (tasks is None or name in tasks):
            raise InputError(f"{place}: the same split as {files[int(seed), split]}; remove one of them")
        files[int(seed), split] = path
    if not found:
        others = f" (there are files of {', '.join(map(str, sorted(other_shots)))} shots)" if other_shots else ""
        raise InputError(f"{folder}: no few-shot task: no file <task>_{shots}_<seed>_train.jsonl or .tsv{others}")
    return found


def _crossfit_shots(name: str) -> int | None:
    known = crossfit_tasks().get(name)
    return known.shots if known else None


def _read_task(name: str, files: Mapping[tuple[int, str], Path]) -> FewShotTask:
    """Reads the files of one task."""
    seeds = _seeds(name, files)
    tests = [path for (_, split), path in files.items() if split == "test"]
    if len(tests) == 1:
        files = {**files, **{(seed, "test"): tests[0] for seed in seeds}}
    files = {(seed, split): files[seed, split] for seed in seeds for split in SPLITS if (seed, split) in files}
    paths = list(dict.fromkeys(files.values()))
    other = next((path for path in paths if path.suffix != paths[0].suffix), None)
    if other is not None:
        raise InputError(f"{other}: {name} also has {paths[0].suffix} files; all files of a task must be of one kind")
    if paths[0].suffix == ".jsonl":
        lines = {path: list(_json_lines(name, path)) for path in paths}
        _check_alike(lines)
    else:
        lines = _with_options(name, {path: list(_tsv_lines(path)) for path in paths})
    rows = {path: tuple(map(_row, own)) for path, own in lines.items()}
    splits = {key: rows[path] for key, path in files.items()}
    return build_task(
        name, (Sample(s, splits[s, "train"], splits[s, "dev"], splits.get((s, "test"), ())) for s in seeds)
    )


def _seeds(name: str, files: Mapping[tuple[int, str], Path]) -> list[int]:
    """The seeds; each must have a train and a dev file, and a test file if the task has several of these."""
    seeds = sorted({seed for seed, split in files if split != "test"})
    place = next(iter(files.values())).parent
    if not seeds:
        raise InputError(f"{place}: {name} has only a test file; it also needs train and dev files")
    needed = SPLITS if sum(split == "test" for _, split in files) > 1 else SPLITS[:2]
    for seed in seeds:
        for split in needed:
            if (seed, split) not in files:
                raise InputError(f"{place}: {name} has files of seed {seed}, but no {split} file")
    return seeds


def _json_lines(task: str, path: Path) -> Iterator[_Line]:
    for number, record in json_lines(path, read_text(path)):
        place = f"{path}:{number}"
        record.check(place, _KEYS)
        missing = [key for key in _KEYS if key not in record]
        if missing:
            raise InputError(f"{place}: no field {listed(missing)}; each row needs {listed(_KEYS)}")
        name, given, output, options = (record[key] for key in _KEYS)
        if not (isinstance(options, list) and all(isinstance(text, str) for text in (name, given, output, *options))):
            raise InputError(f"{place}: 'options' must be a list of strings, and all other fields strings")
        for text in (given, output, *options):
            check_characters(text, place)
        if name != task:
            raise InputError(f"{place}: a row of task {shown(name)} in a file of {task}")
        if len(set(options)) == 1:
            raise InputError(f"{place}: a row needs at least two different options; it has {listed(options)}")
        yield _Line(place, given, (output,), tuple(options))


def _check_alike(files: _Files) -> None:
    """Raises InputError if some rows of a task have options and others have none."""
    lines = [line for own in files.values() for line in own]
    other = next((line for line in lines if bool(line.options) != bool(lines[0].options)), None)
    if other is not None:
        without, with_some = sorted((lines[0], other), key=lambda line: bool(line.options))
        raise InputError(
            f"{without.place}: the row has no options, but {with_some.place} has {len(with_some.options)}; give "
            "options to all rows of a task or to none"
        )


def _tsv_lines(path: Path) -> Iterator[_Line]:
    for number, cells in tsv_rows(path):
        if len(cells) < 2:
            raise InputError(f"{path}:{number}: expected 2 columns separated by tabs, got 1")
        yield _Line(f"{path}:{number}", cells[0], tuple(cells[1:]))


def _with_options(name: str, files: _Files) -> _Files:
    """Gives the lines of TSV files their options: those that end all inputs, else the outputs of the whole task.

    A task that is text to text gets none.
    """
    known = crossfit_tasks().get(name)
    lines = [line for own in files.values() for line in own]
    several = next((line for line in lines if len(line.outputs) > 1), None)
    if several and known and not known.has_several_references:
        count = len(several.outputs)
        raise InputError(f"{several.place}: {count} answers, but {name} has one in a row; remove the tabs within it")
    if several or (known and known.is_text_to_text):
        return files
    parted = {path: [_parted(line) for line in own] for path, own in files.items()}
    if all(line.options for own in parted.values() for line in own):
        return parted
    classes = tuple(sorted({line.outputs[0] for line in lines}))
    if len(classes) < 2:
        raise InputError(f"{lines[0].place}: {name} has only one output, {shown(classes[0])}; nothing to choose")
    if len(classes) > min(MAX_CLASSES, len(lines) / 2):
        return files
    return {path: [line._replace(options=classes) for line in own] for path, own in files.items()}


def _parted(line: _Line) -> _Line:
    """Separates the input from the options that CrossFit appends: " (A) one (B) other" or " (1) one (2) other".

    A context behind the options, " [SEP] context", stays with the input.
    """
    for mark in _OPTION_MARKS:
        question, *rest = mark.split(line.input)
        marks, texts = "".join(rest[::2]), rest[1::2]
        if not texts or not any(order.startswith(marks) for order in (string.ascii_uppercase, string.digits[1:])):
            continue
        texts[-1], separator, context = texts[-1].partition(_SEPARATOR)
        options = tuple(text.strip() for text in texts)
        if len(set(options)) > 1:
            return line._replace(input=question + separator + context, options=options, whole=line.input)
    return line


def _row(line: _Line) -> Row:
    if not line.options:
        if not all(output.strip() for output in line.outputs):
            raise InputError(f"{line.place}: an answer is empty; every right answer needs text")
        return Row(line.input, (), 0, line.outputs)
    (output,) = line.outputs
    if output not in line.options:
        raise InputError(f"{line.place}: the output {shown(output)} is not among its options {listed(line.options)}")
    return Row(line.input, line.options, line.options.index(output), whole=line.whole)
