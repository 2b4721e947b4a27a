"""What a subject is and leaves: its flags, a table on the screen, a JSON file of what was measured and on what."""

import abc
import dataclasses
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table
from typing_extensions import TypedDict

from benchmarks.names import device_folder, without_folders
from pats_jax.core import files
from pats_jax.errors import InputError
from pats_jax.run import run_folder

RESULTS = pathlib.Path(__file__).resolve().parent / "results"  # a folder for each kind of device


@dataclasses.dataclass
class Results:
    """What a subject has measured.

    Attributes:
      ratios: what the guard compares; the less the better.
      sizes: bytes, which the guard compares too; the less the better.
      measured: everything, by case: medians, all raw seconds and what belongs to them.
      tables: the same for reading.
      versions: of packages that only this subject uses.
    """

    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    tables: list[rich.table.Table] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject(abc.ABC):
    """Something to measure; its fields are its flags."""

    output_file: pathlib.Path | None = None  # the JSON; none: benchmarks/results/DEVICE/SUBJECT.json
    add: bool = False  # keep what the file holds of other cases

    @abc.abstractmethod
    def run(self) -> Results:
        """Measures."""


def table(title: str, *columns: str) -> rich.table.Table:
    """An empty table: names to the left, figures to the right."""
    made = rich.table.Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    return made


def machine() -> dict[str, Any]:
    """What this runs on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cores": usable_cores(),
        "processor": _processor(),
        "system": platform.platform(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),  # huge pages make a step on CPU shorter
    }


def results_folder() -> pathlib.Path:
    """Where results of the device that this runs on are stored."""
    return RESULTS / device_folder(jax.devices()[0].device_kind)


def usable_cores() -> int:
    """Cores that this process may run on; ``taskset`` makes them fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(described: dict[str, Any], versions: dict[str, str]) -> str:
    """The machine and the versions in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    kind = f"{described['devices']} x {described['device_kind']} ({described['platform']})"
    return f"on {kind}, {described['cores']} cores of {described['processor']}; {packages}"


def choose(subjects: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The chosen ones of the known subjects, in the latter's order; none chosen: all.

    Raises:
      InputError: if one is not known.
    """
    for name in subjects:
        if name not in known:
            raise InputError(f"--subjects {name}: none of {', '.join(known)}")
    return [name for name in known if not subjects or name in subjects]


def finish(name: str, results: Results, path: pathlib.Path | None, add: bool, console: rich.console.Console) -> None:
    """Prints the tables and writes the JSON file.

    Raises:
      InputError: if what it is to be added to comes from another machine or other versions, or cannot be written.
    """
    path = path or results_folder() / f"{name}.json"
    written: dict[str, Any] = {
        "subject": name,
        "machine": machine(),
        "versions": run_folder.versions() | results.versions,
        "command": shlex.join(["python", "-m", "benchmarks", *map(without_folders, sys.argv[1:])]),
        "ratios": results.ratios,
        "sizes": results.sizes,
        "measured": results.measured,
    }
    console.print(*results.tables)
    console.print(describe_machine(written["machine"], written["versions"]), highlight=False, soft_wrap=True)
    try:
        if add and path.exists():
            written = _joined(read(path), written, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_file {path}: cannot be written ({error.strerror})") from None
    console.print(f"written to {path}", highlight=False, soft_wrap=True)


class Machine(TypedDict):
    """What `machine` gives."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]
    platform: str
    device_kind: str
    devices: int
    cores: int
    processor: str


class Stored(TypedDict):
    """What a JSON file of results holds."""

    machine: Machine
    versions: dict[str, str]
    command: str
    ratios: dict[str, float]
    sizes: dict[str, int]
    measured: dict[str, dict[str, Any]]


def read(path: pathlib.Path) -> Stored:
    """What a JSON file of results holds.

    Raises:
      InputError: if it is missing or not one.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; `python -m benchmarks {path.stem}` writes it")
    return files.read_record(path, Stored)


def _joined(old, new, path):
    """Old results with new ones put in."""
    for what in ("machine", "versions"):
        if old[what] != new[what]:
            raise InputError(f"--add: {path} was measured with other {what}: {old[what]}, and now {new[what]}")
    together = {what: old[what] | new[what] for what in ("ratios", "sizes", "measured")}
    return new | together | {"command": f"{old['command']} && {new['command']}"}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
