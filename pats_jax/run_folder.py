"""A run's folder: what it holds and when it may be written."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from typing import Any

from pats_jax import files
from pats_jax.errors import InputError
from pats_jax.records import GlueResults, MetricsLine, PrimedResults

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
    "plots",
    "tensorboard",
    "profile",
)
_PACKAGES = ("pats-jax", "jax", "flax", "optax", "transformers")


def check_free(folder: pathlib.Path, overwrite: bool) -> None:
    """Raises InputError if the folder cannot be written, or holds something that must not be lost.

    With ``overwrite`` a folder that holds an earlier run, and nothing else, counts as free.
    """
    home = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not home.is_dir():
        raise InputError(f"--output_dir {folder}: {home} is a file; give another folder")
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: no permission to write in {home}; give another folder")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in present if not _is_ours(name)]
    if foreign and overwrite:
        raise InputError(f"--output_dir {folder}: --overwrite would lose {foreign[0]}, which no run wrote")
    if present and not overwrite:
        raise InputError(
            f"--output_dir {folder}: not empty; give another folder, --resume to go on with the run in it, "
            "or --overwrite to replace it"
        )


def start(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Empties the folder, makes it if need be, and writes config.json; `check_free` comes first.

    Raises:
      InputError: if the system refuses, for instance on a read-only disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(entry for entry in folder.iterdir() if _is_ours(entry.name))
        _write_json(folder / "config.json", settings)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes half-written files that a killed run has left."""
    _remove(entry for entry in folder.iterdir() if _is_ours(entry.name) and entry.name not in ENTRIES)


def write_metrics(folder: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl anew, one line a record."""
    (folder / METRICS).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def read_metrics(folder: pathlib.Path) -> list[MetricsLine]:
    """The lines of metrics.jsonl.

    Raises:
      InputError: naming file and line, if one is damaged, as the last one of a killed run may be: ``--resume`` writes
        the file anew.
    """
    path = folder / METRICS
    lines = files.read_bytes(path).splitlines()
    return [files.parse_record(line, MetricsLine, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_results(folder: pathlib.Path) -> dict[str, Any] | None:
    """What results.json holds, as `records.PrimedResults` or `records.GlueResults` say; None while it is not there.

    Raises:
      InputError: naming the file and the field, if it does not hold the results of a run.
    """
    path = folder / "results.json"
    if not os.path.lexists(path):
        return None
    text = files.read_bytes(path)
    found = files.parse_json(text, str(path))
    is_primed = isinstance(found, dict) and "algorithm" in found
    kind: Any = PrimedResults if is_primed else GlueResults
    return files.parse_record(text, kind, str(path))


def write_results(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json, the last file of a run and whole from the first moment on: it says that it is finished."""
    _write_json(folder / "results.json", results)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    installed = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in installed.items() if v}}


def _is_ours(name):
    """Whether a run wrote an entry of its folder, half-written ones included."""
    return name in ENTRIES or name.removesuffix(".new") in ENTRIES or name.startswith((".model-", ".adapter-"))


def _remove(entries):
    for entry in list(entries):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_json(path, values):
    made = path.with_name(f"{path.name}.new")
    made.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    made.replace(path)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
