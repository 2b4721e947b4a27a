"""A run's folder: its content, and whether it may be written."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Iterable
from typing import Any

from pats_jax.core import files
from pats_jax.core.files import JsonObject
from pats_jax.core.settings import Flat
from pats_jax.errors import InputError
from pats_jax.run import replacing
from pats_jax.run.records import GlueResults, MetricsLine, PrimedResults

METRICS = "metrics.jsonl"
ENTRIES = (
    "config.json",
    METRICS,
    "results.json",
    "README.md",
    "model",
    "adapter",
    "checkpoints",
    "predictions",
    "diagnosis",
    "plots",
    "tensorboard",
    "profile",
)
_PACKAGES = ("pats-jax", "jax", "flax", "optax", "transformers")


def check_free(folder: pathlib.Path, overwrite: bool) -> None:
    """Raises InputError if the folder cannot be written, or contains something that must not be lost.

    With ``overwrite``, a folder that contains only an earlier run counts as free.
    """
    home = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not home.is_dir():
        raise InputError(f"--output_dir {folder}: {home} is a file; choose another folder")
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: no permission to write to {home}; choose another folder")
    if not replacing.contents(folder):
        return
    if not overwrite:
        raise InputError(
            f"--output_dir {folder}: not empty; choose another folder, or use --resume to resume the run in it "
            "or --overwrite to replace it"
        )
    replacing.check(folder)


def start(folder: pathlib.Path, settings: Flat) -> None:
    """Creates the folder if it is missing, and writes config.json; call `check_free` first.

    Raises:
      InputError: if the folder cannot be written, for instance on a read-only disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    files.write_json(folder / "config.json", settings)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes incomplete files that a killed run left.

    Raises:
      InputError: if the folder cannot be written.
    """
    try:
        for path in folder.iterdir():
            half_written = path.name.endswith(".new") or path.name.startswith((".model-", ".adapter-"))
            if half_written and replacing.foreign(folder, [path.name]) is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    replacing.keep_for_good(folder)


def check_links(folder: pathlib.Path, entries: Iterable[str] = ENTRIES) -> None:
    """Raises InputError if one of the entries, or anything in it, is a link that leads out of the folder."""
    for entry in map(folder.joinpath, entries):
        below = entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else ()
        for path in (entry, *below):
            if path.is_symlink():
                try:
                    files.checked_place(path / "file", folder)
                except InputError:
                    raise InputError(f"{path}: this link leads out of {folder}; remove it") from None


def write_metrics(folder: pathlib.Path, records: list[JsonObject]) -> None:
    """Rewrites metrics.jsonl, one line per record."""
    files.write_text(folder / METRICS, "".join(f"{json.dumps(record)}\n" for record in records))


def read_metrics(folder: pathlib.Path) -> list[MetricsLine]:
    """The lines of metrics.jsonl.

    Raises:
      InputError: if a line is damaged, as the last line of a killed run may be; the message names file and line.
        ``--resume`` rewrites the file.
    """
    path = folder / METRICS
    lines = files.read_bytes(path).splitlines()
    return [files.parse_record(line, MetricsLine, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_results(folder: pathlib.Path) -> JsonObject | None:
    """Reads results.json as `records.PrimedResults` or `records.GlueResults`; None if it does not exist.

    Raises:
      InputError: if it does not contain the results of a run; the message names the file and the field.
    """
    path = folder / "results.json"
    if not os.path.lexists(path):
        return None
    text = files.read_bytes(path)
    found = files.parse_json(text, str(path))
    is_primed = isinstance(found, dict) and "algorithm" in found
    kind: Any = PrimedResults if is_primed else GlueResults
    return files.parse_record(text, kind, str(path))


def write_results(folder: pathlib.Path, results: JsonObject) -> None:
    """Writes results.json atomically, as the last file of a run: it marks the run as finished."""
    files.write_json(folder / "results.json", results)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    installed = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in installed.items() if v}}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
