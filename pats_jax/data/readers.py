"""Reads texts and labels from files, folders and the hub.

``read_glue`` reads the TSV folders of the GLUE distribution, each task with its own quirks; ``read_hub`` the same
tasks from ``nyu-mll/glue``; ``load_task`` chooses between them and the built-in data. Your own data is read by
`own_files`.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pats_jax.data.labels import read_classes
from pats_jax.data.tables import (
    INDEX_COLUMNS,
    Table,
    listed,
    read_tsv,
)
from pats_jax.data.tasks import Task, get_task
from pats_jax.errors import InputError

logger = logging.getLogger(__name__)

NO_GOLD_LABEL = "-"

# The first release of QQP has some lines broken in two (nyu-mll/GLUE-baselines issue 5); the pieces are left out.
_BROKEN_ROWS = {"qqp": 1e-3}


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of their file.

    Attributes:
      sentence1: first (or only) text of each row.
      sentence2: second text of each row; None for single texts.
      labels: int32 class indices or float32 scores, (rows,); where a text may have several labels, float32 0 or 1,
        (rows, labels); None without labels.
      ids: the official index of each row, else row numbers from "0".
      label_names: names of the classes by index; None where labels are scores or not known.
    """

    sentence1: list[str]
    sentence2: list[str] | None
    labels: np.ndarray | None
    ids: list[str]
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.sentence1)

    @property
    def is_multi_label(self) -> bool:
        """Whether a text may have several labels."""
        return self.labels is not None and self.labels.ndim == 2

    @property
    def texts(self) -> dict[str, list[str]]:
        """Column -> texts, of the one or two of each row."""
        first = {"sentence1": self.sentence1}
        return first if self.sentence2 is None else first | {"sentence2": self.sentence2}

    def take(self, rows: Sequence[int] | np.ndarray) -> "Split":
        """The rows of these numbers, in this order."""
        return Split(
            [self.sentence1[row] for row in rows],
            None if self.sentence2 is None else [self.sentence2[row] for row in rows],
            None if self.labels is None else self.labels[np.asarray(rows)],
            [self.ids[row] for row in rows],
            self.label_names,
        )

    def first(self, rows: int | None) -> "Split":
        """The first ``rows`` rows, as for ``--max_train_samples`` in the run_glue examples; None keeps all."""
        if rows is not None and rows <= 0:
            raise ValueError(f"rows must be positive, got {rows}")
        return Split(
            self.sentence1[:rows],
            None if self.sentence2 is None else self.sentence2[:rows],
            None if self.labels is None else self.labels[:rows],
            self.ids[:rows],
            self.label_names,
        )


def load_task(
    task: Task | str,
    data_dir: str | Path | None = None,
    *,
    splits: Sequence[str] = ("train", "validation"),
    seed: int = 0,
) -> dict[str, Split]:
    """Reads a GLUE task from wherever ``--data_dir`` points.

    Args:
      task: a row of the task table, or its name.
      data_dir: ``"builtin"`` for the built-in data, a folder of GLUE's TSV files, or None for the hub.
      splits: splits to read, see ``read_glue``.
      seed: seed of the built-in data.
    """
    task = get_task(task) if isinstance(task, str) else task
    if data_dir is None:
        return read_hub(task, splits=splits)
    if str(data_dir) != "builtin":
        return read_glue(task, data_dir, splits=splits)
    from pats_jax.data.builtin import write_builtin

    with tempfile.TemporaryDirectory() as folder:
        write_builtin(folder, seed=seed, tasks=[task.name])
        return read_glue(task, folder, splits=splits)


def read_glue(
    task: Task | str, data_dir: str | Path, *, splits: Sequence[str] = ("train", "validation")
) -> dict[str, Split]:
    """Reads a task from the TSV files of the GLUE distribution.

    Args:
      task: a row of the task table, or its name.
      data_dir: the folder that holds the task's folder (``CoLA`` ...), or the task's folder itself.
      splits: any of "train", "validation" and "test", which must exist. For MNLI, "validation" and "test" include
        "validation_mismatched" and "test_mismatched" if those files exist.

    Returns:
      Split name -> rows. A test split without a label column, or with other labels than the task's (such as -1), has
      ``labels=None``.

    Raises:
      InputError: if the file is invalid; the message names the file and, if possible, the line.
    """
    task = get_task(task) if isinstance(task, str) else task
    _check_splits(task, splits)
    folder = _task_folder(task, Path(data_dir))
    found = {}
    for split in splits:
        found[split] = _read_glue_file(task, _split_file(task, folder, split), labelled=split != "test")
        mismatched = f"{split}_mismatched"
        if mismatched in task.files and os.path.exists(folder / task.files[mismatched][0]):
            found[mismatched] = _read_glue_file(task, folder / task.files[mismatched][0], labelled=split != "test")
    return found


def _check_splits(task: Task, splits: Sequence[str]) -> None:
    for split in splits:
        if split not in task.files:
            hint = " (a model trained on mnli answers ax)" if task.name == "ax" else ""
            raise InputError(f"{task.name} has no split {split!r}; it has {', '.join(task.files)}{hint}")


def _task_folder(task: Task, data_dir: Path) -> Path:
    if not os.path.isdir(data_dir):
        raise InputError(
            f"data_dir {data_dir}: no such folder; use one with GLUE's TSV files, or builtin for the built-in data"
        )
    return data_dir / task.folder if os.path.isdir(data_dir / task.folder) else data_dir


def _split_file(task: Task, folder: Path, split: str) -> Path:
    names = task.files[split]
    for name in names:
        if os.path.exists(folder / name):
            return folder / name
    raise InputError(f"{folder / names[0]}: no such file; it should contain the {split} split of {task.name}")


def _read_glue_file(task: Task, path: Path, *, labelled: bool) -> Split:
    header = task.headerless.get(path.name)
    wanted = {*task.tsv_texts, task.tsv_label, *INDEX_COLUMNS}
    table, broken = read_tsv(path, wanted, header=header, broken_rows=_BROKEN_ROWS.get(task.name, 0.0))
    if broken:
        logger.warning("%s: skipped %d malformed rows, the first at line %d", path, len(broken), broken[0])
    required = [*task.tsv_texts, *([task.tsv_label] if labelled else [])]
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise InputError(
            f"{path}:1: no column {missing[0]!r}, which {task.name} requires; the header has {listed(table.header)}"
        )
    try:
        labels = _glue_labels(task, table)
    except InputError:
        if labelled:
            raise
        labels = None  # a test split needs none
    return split_of(table, task.tsv_texts, labels, task.labels)


def _glue_labels(task: Task, table: Table) -> np.ndarray | None:
    if task.tsv_label not in table.columns:
        return None
    if task.labels is None:
        return table.scores(task.tsv_label)
    written = task.labels if task.tsv_label_is_name else [str(index) for index in range(len(task.labels))]
    return read_classes(table, task.tsv_label, written)


def read_hub(task: Task | str, *, splits: Sequence[str] = ("train", "validation")) -> dict[str, Split]:
    """Reads a task from ``nyu-mll/glue`` on the hub, or from the local cache that ``datasets`` keeps of it.

    Args:
      task: a row of the task table, or its name.
      splits: as for ``read_glue``.

    Raises:
      InputError: if the hub cannot be reached, and the task is not in the cache.
    """
    task = get_task(task) if isinstance(task, str) else task
    _check_splits(task, splits)
    instead = "data_dir to builtin or to a folder of GLUE's TSV files"
    rows = load_from_hub(instead, path="nyu-mll/glue", name=task.name)
    wanted = [name for split in splits for name in (split, f"{split}_mismatched") if name in task.hub_splits]
    return {name: _hub_split(task, rows[task.hub_splits[name]][:]) for name in wanted}


def load_from_hub(instead: str, *, path: str, **arguments: Any) -> Any:
    """Loads a dataset by ``datasets.load_dataset``.

    Args:
      instead: the flag and value to use without a network, for the error message.
      path: the dataset's name on the hub, or a folder.
      **arguments: other arguments of ``load_dataset``.

    Raises:
      InputError: if the hub cannot be reached and the cache does not hold the set.
    """
    import datasets

    is_local = os.path.isdir(path)
    silent = not is_local and not datasets.config.HF_HUB_OFFLINE and not reaches_hub(path)
    try:
        with cache_alone_if(silent):
            return datasets.load_dataset(path=path, **arguments)
    except Exception as error:  # no network, no cache, a broken download: each layer below raises its own kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if is_local:
            raise InputError(f"{path}: this folder could not be loaded as a data set ({reason})") from error
        if silent:
            reason = "it does not answer, and the cache does not hold the set"
        raise InputError(
            f"{path} could not be loaded from the hub ({reason}); to work offline, set {instead}, or set "
            "HF_HUB_OFFLINE=1 and use a filled cache"
        ) from error


def reaches_hub(path: str) -> bool:
    """Whether the hub answers a request about a dataset, whatever the answer is; asks once."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except errors.HfHubHTTPError:
        return True
    except (errors.HTTPError, OSError):
        return False
    return True


@contextlib.contextmanager
def cache_alone_if(offline: bool) -> Iterator[None]:
    """Makes ``datasets`` use only its cache; without a network it would retry the hub for half a minute."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants) if offline else ()
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _hub_split(task: Task, columns: dict[str, list]) -> Split:
    """A split from the columns of a hub dataset, where -1 or no label means that the label is hidden."""
    labels = np.asarray(columns.get("label", []), np.float32 if task.is_regression else np.int32)
    if np.any(labels < 0) and not np.all(labels < 0):
        row = int(np.argmax(labels < 0))
        raise InputError(f"nyu-mll/glue, {task.name}: row {row} has no label ({labels[row]:g}), but others do")
    return Split(
        sentence1=columns[task.hub_texts[0]],
        sentence2=columns[task.hub_texts[1]] if len(task.hub_texts) == 2 else None,
        labels=None if np.all(labels < 0) else labels,
        ids=[str(index) for index in columns["idx"]],
        label_names=task.labels,
    )


def leave_out_unlabelled(table: Table, column: str) -> Table:
    """Keeps the rows that have a gold label (``-`` means none, as in SNLI), and logs how many rows do not.

    Raises:
      InputError: if no row has a gold label.
    """
    rows = [row for row, cell in enumerate(table.columns[column]) if cell != NO_GOLD_LABEL]
    if not rows:
        raise InputError(f"{table.path}: no row has a gold label")
    if len(rows) < len(table):
        logger.warning("%s: skipped %d rows without a gold label", table.path, len(table) - len(rows))
        table = table.keep(rows)
    return table


def split_of(table: Table, texts: Sequence[str], labels: np.ndarray | None, label_names: Sequence[str] | None) -> Split:
    """The rows of a table, with the columns of its one or two texts."""
    return Split(
        sentence1=table.columns[texts[0]],
        sentence2=table.columns[texts[1]] if len(texts) == 2 else None,
        labels=labels,
        ids=table.ids(),
        label_names=None if label_names is None else tuple(label_names),
    )
