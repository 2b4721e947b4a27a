"""Which runs of a grid are trained side by side, in lanes of one process, and which ones alone.

Runs that share their programs differ in seed and in numbers that are arrays in the step, see
`pats_jax.training.settings.LANE_NUMBERS`. A set that was begun is resumed as it was, whatever is asked for now: its
checkpoints hold all of its lanes, in ``lanes/NAME/``.
"""

import dataclasses
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pats_jax.comparison.seed_statistics import Run
from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.run import run_folder
from pats_jax.run.records import LaneSetFile
from pats_jax.run.settings import FineTuningSettings
from pats_jax.training.settings import LANES_ON_CPU, OF_A_LANE

logger = logging.getLogger(__name__)

FOLDER, FILE = "lanes", "lanes.json"
_OF_A_RUN = {*OF_A_LANE, "task_name"} - {"response"}


@dataclasses.dataclass(frozen=True)
class RunSet:
    """Runs of one child process.

    Attributes:
      runs: several in lanes, or one alone.
      name: of the set's folder and log, below ``lanes/``; None: a run alone.
    """

    runs: tuple[Run, ...]
    name: str | None = None

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        rest = len(self.runs) - 1
        return self.runs[0].name + (f" and {rest} more" if rest else "")

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """The set's folder in the folder of the grid."""
        return root / FOLDER / str(self.name)

    def log_file(self, root: pathlib.Path) -> pathlib.Path:
        """The file for the output of its process."""
        return log_file(root, self.runs[0]) if self.name is None else root / FOLDER / f"{self.name}.log"


def log_file(root: pathlib.Path, run: Run) -> pathlib.Path:
    """The file for a run's output, or for why it failed, next to its folder."""
    folder = run.folder(root)
    return folder.with_name(f"{folder.name}.log")


def check_lanes(settings: FineTuningSettings, lanes: int | None) -> None:
    """Raises InputError, naming the flag, if the settings of a grid exclude lanes."""
    if lanes == 1:
        return
    for flag, value, without in (
        ("fsdp", settings.devices.fsdp, 1),
        ("parallel", settings.devices.parallel, "jit"),
    ):
        if value != without:
            raise InputError(f"--{flag} {value}: not available in lanes; set --lanes 1")
    if settings.model.asked_attention == "cudnn":
        raise InputError("--attention cudnn: not available in lanes; set --lanes 1, or omit it")


def why_alone(settings: FineTuningSettings) -> str | None:
    """Why a run cannot be a lane; None if it can."""
    for method in settings.methods:
        if not method.works_in_lanes:
            return f"--method {method.name}"
    given = settings.flat()
    flags = ["profile", "push_to_hub", *_ALONE.get(settings.program, ())]
    if not settings.data.validation_file:
        flags.append("validation_split_percentage")  # each seed holds out other rows
    return next((f"--{flag}" for flag in flags if given[flag]), None)


# Settings of the runs of a program that are not those of lanes.
_ALONE = {"glue": ("ignore_mismatched_sizes", "class_weights", "label_smoothing_factor")}


def default_lanes(machines: Iterable[dict[str, str]]) -> int | None:
    """`LANES_ON_CPU`; None, for as many as fit into memory, if a machine has accelerators."""
    kinds = {machine.get("devices of JAX", "").partition(" ")[2] for machine in machines}
    return LANES_ON_CPU if kinds <= {"", "cpu"} else None


def in_sets(
    runs: Sequence[Run], settings_of: Callable[[Run], FineTuningSettings | None], root: pathlib.Path, lanes: int | None
) -> list[RunSet]:
    """The sets of the runs that are not finished.

    Args:
      runs: all runs of the grid, in order.
      settings_of: the settings of a run; None if the grid does not know them.
      root: the grid's folder.
      lanes: how many runs at most; None: any number.
    """
    missing = [run for run in runs if not is_finished(run, root)]
    if lanes == 1:
        return [RunSet((run,)) for run in missing]
    begun = [one for one in _begun(root) if set(one.runs) & set(missing) and all(map(settings_of, one.runs))]
    taken = {run for one in begun for run in one.runs}
    names = _free_names(root)
    sets = list(begun)
    groups: dict[Any, list[Run]] = {}
    for run in missing:
        if run in taken:
            continue
        settings = settings_of(run)
        if settings is None or os.path.lexists(run.folder(root) / "checkpoints"):  # begun alone
            sets.append(RunSet((run,)))
        elif reason := why_alone(settings):
            logger.info("%s is trained alone: %s is not available in lanes", run.name, reason)
            sets.append(RunSet((run,)))
        else:
            groups.setdefault(program_of(run, settings), []).append(run)
    for group in groups.values():
        size = lanes or len(group)
        for first in range(0, len(group), size):
            part = tuple(group[first : first + size])
            sets.append(RunSet(part, next(names) if len(part) > 1 else None))
    order = {run: number for number, run in enumerate(runs)}
    return sorted(sets, key=lambda one: min(order.get(run, len(runs)) for run in one.runs))


def program_of(run: Run, settings: FineTuningSettings) -> tuple[Any, ...]:
    """What runs of one program have in common."""
    shared = ((flag, value) for flag, value in settings.flat().items() if flag not in _OF_A_RUN)
    return run.task, *((flag, tuple(value) if isinstance(value, list) else value) for flag, value in shared)


def is_finished(run: Run, root: pathlib.Path) -> bool:
    """Whether the run has written its results.json, the last of its files."""
    return run_folder.read_results(run.folder(root)) is not None


def _begun(root: pathlib.Path) -> list[RunSet]:
    """The sets that have been begun and are not finished; folders of finished ones are removed."""
    found = []
    for path in sorted((root / FOLDER).glob(f"*/{FILE}")):
        files.checked_place(path, root)
        runs = tuple(Run.from_record(record) for record in files.read_record(path, LaneSetFile)["runs"])
        if all(is_finished(run, root) for run in runs):
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            found.append(RunSet(runs, path.parent.name))
    return found


def _free_names(root):
    number = 0
    while True:
        number += 1
        if not os.path.lexists(root / FOLDER / f"set{number}" / FILE):
            yield f"set{number}"
