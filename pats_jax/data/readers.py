"""From files, folders and the hub to texts and labels.

``read_glue`` reads the TSV folders of the GLUE distribution, each task with its own quirks; ``read_hub`` the same
tasks from ``nyu-mll/glue``; ``load_task`` chooses between them and the built-in data.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pats_jax.data.tables import INDEX_COLUMNS, Table, listed, read_tsv
from pats_jax.data.tasks import Task, get_task
from pats_jax.errors import InputError

logger = logging.getLogger(__name__)

# The first release of QQP has some twenty lines broken in two; as its own authors do, we leave the pieces out.
_BROKEN_ROWS = {"qqp": 1e-3}


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of their file.

    Attributes:
        sentence1: First (or only) text of each row.
        sentence2: Second text of each row; None for single texts.
        labels: int32 class indices or float32 scores, (rows,); None without labels.
        ids: The official index of each row, else row numbers from "0".
        label_names: Names of the classes by index; None where labels are scores or not known.
    """

    sentence1: list[str]
    sentence2: list[str] | None
    labels: np.ndarray | None
    ids: list[str]
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.sentence1)

    def first(self, rows: int | None) -> "Split":
        """The first ``rows`` rows, as ``--max_train_samples`` of the run_glue examples means it; None keeps all."""
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
        task: A row of the task table, or its name.
        data_dir: ``"builtin"`` for the built-in data, a folder of GLUE's TSV files, or None for the hub.
        splits: Splits to read, see ``read_glue``.
        seed: Seed of the built-in data.
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
        task: A row of the task table, or its name.
        data_dir: The folder that holds the task's folder (``CoLA`` ...), or the task's folder itself.
        splits: Any of "train", "validation" and "test", all of which must be there. MNLI's "validation" and "test"
            bring "validation_mismatched" and "test_mismatched" along where those files exist.

    Returns:
        Split name -> rows. A test split without a label column has ``labels=None``.

    Raises:
        InputError: One line with the file, and the line where it applies.
    """
    task = get_task(task) if isinstance(task, str) else task
    _check_splits(task, splits)
    folder = _task_folder(task, Path(data_dir))
    found = {}
    for split in splits:
        found[split] = _read_glue_file(task, _split_file(task, folder, split), labelled=split != "test")
        mismatched = f"{split}_mismatched"
        if mismatched in task.files and (folder / task.files[mismatched][0]).exists():
            found[mismatched] = _read_glue_file(task, folder / task.files[mismatched][0], labelled=split != "test")
    return found


def _check_splits(task: Task, splits: Sequence[str]) -> None:
    for split in splits:
        if split not in task.files:
            hint = " (a model trained on mnli answers ax)" if task.name == "ax" else ""
            raise InputError(f"{task.name} has no split {split!r}; it has {', '.join(task.files)}{hint}")


def _task_folder(task: Task, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise InputError(
            f"--data_dir {data_dir}: no such folder; give one with GLUE's TSV files, or builtin for the built-in data"
        )
    return data_dir / task.folder if (data_dir / task.folder).is_dir() else data_dir


def _split_file(task: Task, folder: Path, split: str) -> Path:
    names = task.files[split]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise InputError(f"{folder / names[0]}: no such file; the {split} split of {task.name} is read from there")


def _read_glue_file(task: Task, path: Path, *, labelled: bool) -> Split:
    header = task.headerless.get(path.name)
    wanted = {*task.tsv_texts, task.tsv_label, *INDEX_COLUMNS}
    table, broken = read_tsv(path, wanted, header=header, broken_rows=_BROKEN_ROWS.get(task.name, 0.0))
    if broken:
        logger.warning("%s: %d broken rows left out, the first at line %d", path, len(broken), broken[0])
    required = [*task.tsv_texts, *([task.tsv_label] if labelled else [])]
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise InputError(
            f"{path}:1: no column {missing[0]!r}, which {task.name} needs; the header has {listed(table.header)}"
        )
    return Split(
        sentence1=table.columns[task.tsv_texts[0]],
        sentence2=table.columns[task.tsv_texts[1]] if len(task.tsv_texts) == 2 else None,
        labels=_glue_labels(task, table),
        ids=table.ids(),
        label_names=task.labels,
    )


def _glue_labels(task: Task, table: Table) -> np.ndarray | None:
    if task.tsv_label not in table.columns:
        return None
    if task.labels is None:
        return table.scores(task.tsv_label)
    written = task.labels if task.tsv_label_is_name else [str(index) for index in range(len(task.labels))]
    return table.classes(task.tsv_label, written)


def read_hub(task: Task | str, *, splits: Sequence[str] = ("train", "validation")) -> dict[str, Split]:
    """Reads a task from ``nyu-mll/glue`` on the hub, or from the local cache that ``datasets`` keeps of it.

    Args:
        task: A row of the task table, or its name.
        splits: As for ``read_glue``.

    Raises:
        InputError: The hub cannot be reached and the cache does not hold the task.
    """
    import datasets

    task = get_task(task) if isinstance(task, str) else task
    _check_splits(task, splits)
    try:
        rows = datasets.load_dataset("nyu-mll/glue", task.name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"nyu-mll/glue could not be loaded from the hub ({reason}); to work offline, give --data_dir builtin, "
            "--data_dir with a folder of GLUE's TSV files, or HF_HUB_OFFLINE=1 with a filled cache"
        ) from error
    wanted = [name for split in splits for name in (split, f"{split}_mismatched") if name in task.hub_splits]
    return {name: _hub_split(task, rows[task.hub_splits[name]][:]) for name in wanted}


def _hub_split(task: Task, columns: dict[str, list]) -> Split:
    """A split from the columns of a hub dataset, where the label -1 (or none at all) stands for a hidden one."""
    labels = np.asarray(columns.get("label", []), np.float32 if task.is_regression else np.int32)
    return Split(
        sentence1=columns[task.hub_texts[0]],
        sentence2=columns[task.hub_texts[1]] if len(task.hub_texts) == 2 else None,
        labels=None if np.all(labels == -1) else labels,
        ids=[str(index) for index in columns["idx"]],
        label_names=task.labels,
    )
