"""The folder of a grid: what was started in it, by grid.json."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pats_jax.comparison.seed_statistics import Run
from pats_jax.core import files
from pats_jax.errors import InputError, shown
from pats_jax.run.records import GridFile, GridProgram
from pats_jax.run.settings import FineTuningSettings, Settings
from pats_jax.run.text2text_settings import Text2TextSettings

# The programs whose runs can be compared, by their settings.
PROGRAMS: dict[str, type[FineTuningSettings]] = {kind.program: kind for kind in (Settings, Text2TextSettings)}


def check_program(root: pathlib.Path, program: GridProgram) -> None:
    """Raises InputError if the grid that is in the folder is of another program."""
    before = program_of_grid(read_grid(root))
    if before not in (None, program):
        raise InputError(f"--output_dir {root}: holds a grid of --program {before}; set that, or another folder")


def check_place(root: pathlib.Path, runs: Sequence[Run]) -> None:
    """Raises InputError if the folder contains files that the grid would overwrite, or links that leave the folder."""
    if not (root / "grid.json").exists():
        present = next((name for name in _OWN if os.path.lexists(root / name)), None)
        if present:
            raise InputError(f"--output_dir {root}: contains {present}, which no grid wrote; choose another folder")
    for path in (root / "plots", *(run.folder(root) for run in runs)):
        files.checked_place(path / "file", root)


_OWN = ("comparison.json", "report.md", "report.html", "plots")


def record_start(
    root: pathlib.Path, program: GridProgram, runs: Sequence[Run], command: str, machines: list[dict[str, str]]
) -> None:
    """Adds the runs, the command and the machines to grid.json, which records every start."""
    before: dict[str, Any] = dict(read_grid(root) or {})
    now: dict[str, list[Any]] = {"runs": [run.record() for run in runs], "commands": [command], "machines": machines}
    merged = {name: (old := before.get(name, [])) + [one for one in new if one not in old] for name, new in now.items()}
    files.write_json(root / "grid.json", {"program": program, **merged})


def read_grid(root: pathlib.Path) -> GridFile | None:
    """Reads grid.json: program, ``runs``, ``commands`` and ``machines`` of all starts; None if there is no such file.

    Raises:
      InputError: if the file is damaged, or contains a name that cannot be that of a folder; the message names it.
    """
    path = root / "grid.json"
    if not os.path.lexists(path):
        return None
    grid = files.read_record(path, GridFile)
    kind = PROGRAMS[str(program_of_grid(grid))]
    for number, run in enumerate(grid["runs"]):
        files.checked_name(run["task"], f"{path}: runs.{number}.task")
        files.checked_name(run["method"], f"{path}: runs.{number}.method")  # another version may have others
        if run.get("overrides"):
            check_overrides(run["overrides"], f"{path}: runs.{number}.overrides", kind)
            files.checked_name(Run.from_record(run).arm.folder, f"{path}: runs.{number}.overrides")
    return grid


def program_of_grid(grid: GridFile | None) -> GridProgram | None:
    """The program of a grid's runs, which earlier versions did not write; None without a grid."""
    return None if grid is None else grid.get("program", "glue")


def check_overrides(overrides: Mapping[str, Any], source: str, kind: type[FineTuningSettings]) -> None:
    """Raises InputError if one of an arm's settings is unknown or invalid."""
    known = kind.all_entries()
    for flag, value in overrides.items():
        if flag not in known:
            raise InputError(f"{source}: {shown(flag)} is not a setting")
        expected = known[flag].fault(value)
        if expected:
            raise InputError(f"{source}.{flag}: {shown(value, quoted=False)}: must be {expected}")


def recorded_runs(root: pathlib.Path) -> list[Run]:
    """The runs in grid.json; none if there is no such file."""
    grid = read_grid(root)
    return [Run.from_record(run) for run in grid["runs"]] if grid else []
