"""PATS on tasks that are written, not chosen: MRPC and SST-2 as text, and wikisql, by a small T5.

::

    python -m benchmarks.written_tasks --model tiny_t5 --data_dir ../shared/data --output_dir written_tasks

Each run is one `pats-jax text2text`: 5 seeds of plain fine-tuning and of PATS at its default noise. A finished run is
not repeated. Sources and targets of GLUE are written as T5's authors wrote them; of wikisql, the training and dev rows
of all few-shot samples are the training set, and the test rows are what is scored. The settings were fixed before
anything was scored. Scores are those after the last epoch: no checkpoint is chosen by them.

Results are means with standard deviations over the seeds, and the mean of PATS minus plain over seeds with its 95 %
interval, by Student's t.
"""

import csv
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import rich.console
import scipy.stats
import tyro

from benchmarks import report
from pats_jax.core import files
from pats_jax.data.tables import json_lines, read_text, read_tsv
from pats_jax.errors import InputError
from pats_jax.reporting.console import say
from pats_jax.run import run_folder

Rows = list[tuple[str, str]]  # source and target
METHODS = ("finetune", "pats")
SPLITS = ("train", "validation")


def read_mrpc(folder: pathlib.Path) -> tuple[Rows, Rows]:
    """MRPC's training and dev rows as T5's authors wrote them."""
    columns = ("Quality", "#1 String", "#2 String")

    def write(label: str, first: str, second: str) -> tuple[str, str]:
        return f"mrpc sentence1: {first} sentence2: {second}", ("not_equivalent", "equivalent")[int(label)]

    train, dev = (_read_rows(folder / "glue" / "MRPC" / f"{name}.tsv", columns) for name in ("train", "dev"))
    return [write(*row) for row in train], [write(*row) for row in dev]


def read_sst2(folder: pathlib.Path) -> tuple[Rows, Rows]:
    """The same of SST-2."""

    def write(sentence: str, label: str) -> tuple[str, str]:
        return f"sst2 sentence: {sentence.strip()}", ("negative", "positive")[int(label)]

    paths = [folder / "glue" / "SST-2" / f"{name}.tsv" for name in ("train", "dev")]
    train, dev = (_read_rows(path, ("sentence", "label")) for path in paths)
    return [write(*row) for row in train], [write(*row) for row in dev]


def read_wikisql(folder: pathlib.Path) -> tuple[Rows, Rows]:
    """The few-shot gym's rows of wikisql: training and dev rows of all samples together, and the test rows."""
    home = folder / "gym" / "wikisql"
    found: dict[str, Rows] = {"train": [], "dev": [], "test": []}
    for path in sorted(home.glob("*.jsonl")):
        split = path.stem.rpartition("_")[2]
        records = [record for _, record in json_lines(path, read_text(path))]
        found[split] += [("wikisql: " + str(record["input"]), str(record["output"])) for record in records]
    if not all(found.values()):
        raise InputError(f"{home}: lacks files of train, dev or test rows")
    train = list(dict.fromkeys(found["train"] + found["dev"]))
    return train, found["test"]


def _read_rows(path: pathlib.Path, columns: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    table, _ = read_tsv(path, columns, broken_rows=0.01)
    return zip(*(table.columns[name] for name in columns), strict=True)


@dataclasses.dataclass(frozen=True)
class Written:
    """A task that is written.

    Attributes:
      read: gives its rows from the data folder.
      epochs: passes over at most ``most_rows`` training rows.
      source_length: of sources, in tokens.
      target_length: of targets.
      metrics: the scores; the first one counts.
      most_rows: of the training set.
    """

    read: Callable[[pathlib.Path], tuple[Rows, Rows]]
    epochs: int
    source_length: int
    target_length: int
    metrics: tuple[str, ...] = ("exact_match",)
    most_rows: int = 1000


TASKS = {
    "mrpc": Written(read_mrpc, 3, 128, 8),
    "sst2": Written(read_sst2, 3, 64, 4),
    "wikisql": Written(read_wikisql, 15, 64, 48, ("rouge", "token_f1", "exact_match")),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Fine-tune a small T5 on written tasks, plain and with PATS."""

    model: str  # folder of the T5
    data_dir: pathlib.Path  # folder of glue/ and gym/
    output_dir: pathlib.Path  # folder of all runs
    seeds: int = 5  # per method
    learning_rate: float = 1e-3
    batch_size: int = 32
    tasks: tuple[str, ...] = tuple(TASKS)
    lanes: int | None = None  # runs trained side by side; if unset, as `pats-jax compare` chooses
    results: pathlib.Path | None = None  # another copy of the results' JSON

    def command(self, task: str) -> list[str]:
        """The command line of a task's grid."""
        written = TASKS[task]
        flags = {
            "model_name_or_path": self.model,
            **{f"{split}_file": self.data_file(task, split) for split in SPLITS},
            "max_source_length": written.source_length,
            "max_target_length": written.target_length,
            "num_train_epochs": written.epochs,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "eval_steps": 10**6,  # after the last step alone
            "num_beams": 1,
            "sensitivity_batches": 0,
            "compilation_cache_dir": self.output_dir / "programs",
            "output_dir": self.output_dir / task,
            "lanes": self.lanes,
        }
        command = [sys.executable, "-m", "pats_jax", "compare", "--program", "text2text", "--metrics", *written.metrics]
        command += ["--methods", *METHODS, "--seeds", *map(str, range(1, self.seeds + 1))]
        for name, value in flags.items():
            command += [] if value is None else [f"--{name}", str(value)]
        return command

    def data_file(self, task: str, split: str) -> pathlib.Path:
        """The rows of a split; the grid takes its name for the task's."""
        return self.output_dir / "data" / split / f"{task}.csv"

    def results_of(self, task: str, method: str) -> list[pathlib.Path]:
        """The results of a method's runs, by seed."""
        home = self.output_dir / task / "runs" / task / method
        return [home / f"seed{seed}" / "results.json" for seed in range(1, self.seeds + 1)]


def write_data(flags: Flags, task: str) -> dict[str, int]:
    """Writes a task's rows as CSV files; returns how many there are."""
    rows = TASKS[task].read(flags.data_dir)
    drawn = np.random.default_rng(0).permutation(len(rows[0]))[: TASKS[task].most_rows]
    written = {"train": [rows[0][number] for number in sorted(drawn)], "validation": rows[1]}
    for split, own in written.items():
        path = flags.data_file(task, split)
        files.make_folder(path.parent)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("source", "target"), *own])
    return {split: len(own) for split, own in written.items()}


def scores_of(flags: Flags, task: str, console: rich.console.Console) -> dict[str, list[dict[str, float]]]:
    """Method -> the scores of its runs by seed; runs that are not there are trained.

    Raises:
      InputError: if a run fails.
    """
    paths = {method: flags.results_of(task, method) for method in METHODS}
    if not all(path.exists() for of_method in paths.values() for path in of_method):
        say(console, task)
        if subprocess.run(flags.command(task)).returncode:
            raise InputError(f"{task}: failed; see above, and repeat the command")
    return {
        method: [json.loads(path.read_text(encoding="utf-8"))["final"]["metrics"] for path in of_method]
        for method, of_method in paths.items()
    }


def compared(plain: list[float], noisy: list[float]) -> dict[str, float | list[float]]:
    """Means, standard deviations, and the mean difference over seeds with its 95 % interval."""
    difference = np.subtract(noisy, plain)
    mean, error = float(difference.mean()), float(scipy.stats.sem(difference)) if len(difference) > 1 else float("nan")
    half = float(scipy.stats.t.ppf(0.975, max(len(difference) - 1, 1))) * error
    return {
        "plain": float(np.mean(plain)),
        "plain_sd": float(np.std(plain, ddof=1)) if len(plain) > 1 else float("nan"),
        "pats": float(np.mean(noisy)),
        "pats_sd": float(np.std(noisy, ddof=1)) if len(noisy) > 1 else float("nan"),
        "difference": mean,
        "interval": [mean - half, mean + half],
    }


def constant_scores(flags: Flags, task: str) -> float:
    """The share of validation targets that equal the most frequent training target."""
    with flags.data_file(task, "train").open(encoding="utf-8", newline="") as file:
        targets = [target for _, target in list(csv.reader(file))[1:]]
    commonest = max(sorted(set(targets)), key=targets.count)
    with flags.data_file(task, "validation").open(encoding="utf-8", newline="") as file:
        return float(np.mean([target == commonest for _, target in list(csv.reader(file))[1:]]))


def main(args: list[str] | None = None) -> None:
    """Runs the program; exits with code 2 and one line on stderr when the input is wrong."""
    flags = tyro.cli(Flags, args=args, use_underscores=True)
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        unknown = [task for task in flags.tasks if task not in TASKS]
        if unknown:
            raise InputError(f"--tasks {unknown[0]}: choose from {', '.join(TASKS)}")
        run(flags, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(flags: Flags, console: rich.console.Console) -> None:
    """Trains what is missing; prints and writes the results after each task."""
    found: dict[str, Any] = {}
    for task in flags.tasks:
        rows = write_data(flags, task)
        by_method = scores_of(flags, task, console)
        names = list(by_method["finetune"][0])
        own = {
            name: compared(*([scores[name] for scores in by_method[method]] for method in METHODS)) for name in names
        }
        found[task] = {"rows": rows, "constant_exact_match": constant_scores(flags, task), "scores": own}
        _write(flags, found)
    table = report.table("Written tasks, %", "task", "score", "plain", "PATS", "PATS - plain")
    for task, facts in found.items():
        for name, own in facts["scores"].items():
            low, high = (100 * bound for bound in own["interval"])
            table.add_row(
                task,
                name,
                *(f"{100 * own[method]:.1f} ± {100 * own[f'{method}_sd']:.1f}" for method in ("plain", "pats")),
                f"{100 * own['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            )
    console.print(table)


def _write(flags: Flags, found: dict[str, Any]) -> None:
    written = {
        "model": pathlib.Path(flags.model).name,
        "settings": {"learning_rate": flags.learning_rate, "batch_size": flags.batch_size, "seeds": flags.seeds},
        "tasks": found,
        "machine": report.machine(),
        "versions": run_folder.versions(),
    }
    for path in (flags.output_dir / "written_tasks.json", *([flags.results] if flags.results else [])):
        files.make_folder(path.parent)
        files.write_json(path, written)


if __name__ == "__main__":
    main()
