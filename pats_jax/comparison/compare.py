"""A grid of methods x tasks x seeds, each run by the GLUE program in its own process: `pats-jax compare`.

This process starts no JAX backend, so accelerators are free for the runs.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import rich.console
import rich.progress

from pats_jax.comparison import comparison_page, seed_statistics
from pats_jax.comparison.seed_statistics import FinishedRun, Run
from pats_jax.core import files
from pats_jax.data import tasks as glue_tasks
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.methods import SENSITIVITY_BATCHES, get_methods
from pats_jax.reporting.console import parse_flags, say
from pats_jax.reporting.report_page import aligned
from pats_jax.run import run_folder, settings as run_settings
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import GridFile
from pats_jax.run.settings import Settings, read_config
from pats_jax.training import preemption

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Grid:
    """Compare fine-tuning methods over tasks and seeds, and write a report with statistics and plots.

    All other flags are those of `pats-jax glue`, and apply to every run.
    """

    output_dir: str  # folder of the grid; repeat the same command to resume it
    methods: tuple[str, ...] = ()  # as --method of `pats-jax glue`; finetune is the baseline if listed
    tasks: tuple[str, ...] = ()  # cola sst2 mrpc stsb qqp mnli qnli rte wnli
    seeds: tuple[int, ...] = ()  # run each method on each task with each of these seeds
    jobs: int = 1  # number of parallel runs, which share the cores
    report_only: bool = False  # run nothing; report on the finished runs in output_dir

    def runs(self) -> list[Run]:
        """Seed by seed, so an unfinished grid has all methods for its first seeds."""
        return [
            Run(task, method, seed) for seed, task, method in itertools.product(self.seeds, self.tasks, self.methods)
        ]


# Flags of a run that the grid sets itself -> what to use instead.
_REFUSED = {
    "method": "use --methods",
    "task_name": "use --tasks",
    "seed": "use --seeds",
    "train_file": "a grid compares GLUE tasks; use --tasks and --data_dir",
    "validation_file": "a grid compares GLUE tasks; use --tasks and --data_dir",
    "test_file": "a grid compares GLUE tasks; use --tasks and --data_dir",
    "overwrite": "finished runs are kept; to repeat a run, delete its folder",
    "resume": "not needed; a grid always resumes",
    "coordinator_address": "a grid runs on one machine",
    "num_processes": "a grid runs on one machine; use --jobs for parallel runs",
    "process_id": "a grid runs on one machine",
}


def run(args: list[str], console: rich.console.Console) -> None:
    """Runs what is left of the grid, and writes the report.

    Args:
      args: the command line.
      console: where progress, scores and tables go.

    Raises:
      InputError: on invalid input, before anything runs; or after the report, if some runs failed.
      Preempted: if the grid was asked to stop; its runs have been saved.
    """
    grid, flags = parse(args)
    root = pathlib.Path(grid.output_dir)
    if grid.report_only:
        report(root, console)
        return
    command = f"pats-jax compare {shlex.join(args)}"
    settings = check(grid, flags)
    if settings.sensitivity_batches is None:  # the report shows it for every method
        flags = [*flags, "--sensitivity_batches", str(SENSITIVITY_BATCHES)]
        settings = dataclasses.replace(settings, sensitivity_batches=SENSITIVITY_BATCHES)
    flags = flags + check_runs_of_before(grid, settings)
    check_place(root, grid)
    with FolderLock(root) as lock:
        record_start(root, grid, command)
        failures = run_all(grid, flags, command, console, lock)
        for failed, reason in failures.items():
            logger.error("%s failed: %s; see %s", failed.name, reason, log_file(root, failed))
        if len(failures) < len(grid.runs()):
            report(root, console)
    if failures:
        raise InputError(f"{len(failures)} of {len(grid.runs())} runs failed; repeat the command to retry them")


# what to run


def parse(args: list[str]) -> tuple[Grid, list[str]]:
    """The grid, and the remaining flags for its runs.

    Raises:
      InputError: if these include a flag that the grid sets itself.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help``.
    """
    grid, flags = parse_flags(Grid, args=args, prog="pats-jax compare", return_unknown_args=True)
    grid = dataclasses.replace(grid, output_dir=run_settings.path_of_flag("--output_dir", grid.output_dir))
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name in _REFUSED:
            raise InputError(f"--{name}: {_REFUSED[name]}")
    return grid, flags


def check(grid: Grid, flags: list[str]) -> Settings:
    """Checks the grid and gives the settings of its first run.

    Raises:
      InputError: on anything wrong in the grid.
    """
    for name in ("methods", "tasks", "seeds"):
        values = getattr(grid, name)
        if not values:
            raise InputError(f"--{name} is missing")
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {shown(' '.join(map(str, values)), quoted=False)}: list each only once")
    run_settings.check_value("jobs", grid.jobs, lambda x: x >= 1, "at least 1")
    run_settings.check_value("jobs", grid.jobs, lambda x: x <= 1000, "at most 1000")
    for method in grid.methods:
        get_methods(method)
    for name in grid.tasks:
        task = glue_tasks.get_task(name, "--tasks")
        if name != task.name or "train" not in task.files:
            raise InputError(f"--tasks {name}: " + (f"write {task.name}" if name != task.name else "no training data"))
    root, runs = pathlib.Path(grid.output_dir), grid.runs()
    first = run_settings.parse([*flags, *flags_of(runs[0], root)], "pats-jax compare", Settings)
    if not {"train", "eval"} <= first.phases:
        raise InputError("--do_train and --do_eval: a comparison needs both; set both, or omit all --do_... flags")
    for run in runs:
        settings_of(run, root, first).check()
    return first


def check_runs_of_before(grid: Grid, settings: Settings) -> list[str]:
    """Checks existing runs against the settings, and returns flags that make new runs match them.

    If there are runs, new ones use the same number of rows per step, whatever the devices are now.

    Raises:
      InputError: if a run has different settings; the message names both.
    """
    root, flags = pathlib.Path(grid.output_dir), []
    for run in dict.fromkeys([*recorded_runs(root), *grid.runs()]):
        path = run.folder(root) / "config.json"
        if not path.exists():
            continue
        saved = read_config(str(path), Settings)
        try:
            settings_of(run, root, settings).resuming(saved)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from None
        if settings.train_batch_size is None:
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
                if getattr(settings, name) != getattr(saved, name):
                    raise InputError(
                        f"{run.name}: {name} was {getattr(saved, name)} and is {getattr(settings, name)}; to split "
                        f"a step differently, also set --train_batch_size {saved.train_batch_size}"
                    )
            flags = ["--train_batch_size", str(saved.train_batch_size)]
    return flags


def settings_of(run: Run, root: pathlib.Path, settings: Settings) -> Settings:
    """The settings of a run: the shared ones and its own."""
    return dataclasses.replace(
        settings, task_name=run.task, method=run.method, seed=run.seed, output_dir=str(run.folder(root))
    )


def flags_of(run: Run, root: pathlib.Path) -> list[str]:
    """The flags that are specific to a run."""
    own = {"task_name": run.task, "method": run.method, "seed": run.seed, "output_dir": run.folder(root)}
    return [part for name, value in own.items() for part in (f"--{name}", str(value))]


# the grid's folder


def check_place(root: pathlib.Path, grid: Grid) -> None:
    """Raises InputError if the folder contains files that the grid would overwrite, or links that leave the folder."""
    if not (root / "grid.json").exists():
        present = next((name for name in _OWN if os.path.lexists(root / name)), None)
        if present:
            raise InputError(f"--output_dir {root}: contains {present}, which no grid wrote; choose another folder")
    for path in (root / "plots", *(run.folder(root) for run in grid.runs())):
        files.checked_place(path / "file", root)


_OWN = ("comparison.json", "report.md", "report.html", "plots")


def report_lock(root: pathlib.Path) -> FolderLock:
    """Lock for writing the report: a grid takes it at its end, and `--report_only` while a grid is running."""
    return FolderLock(root, name=".lock-report", patience=60.0)


def record_start(root: pathlib.Path, grid: Grid, command: str) -> None:
    """Adds the grid, the command and the machine to grid.json, which records every start."""
    before: dict[str, Any] = dict(read_grid(root) or {"runs": [], "commands": [], "machines": []})
    runs = [dataclasses.asdict(run) for run in grid.runs()]
    now: dict[str, list[Any]] = {"runs": runs, "commands": [command], "machines": [describe_machine()]}
    merged = {name: old + [one for one in now[name] if one not in old] for name, old in before.items()}
    files.write_json(root / "grid.json", merged)


def read_grid(root: pathlib.Path) -> GridFile | None:
    """Reads grid.json: ``runs``, ``commands`` and ``machines`` of all starts; None if there is no such file.

    Raises:
      InputError: naming the file, if it is damaged, or contains a name that cannot be that of a folder.
    """
    path = root / "grid.json"
    if not os.path.lexists(path):
        return None
    grid = files.read_record(path, GridFile)
    for number, run in enumerate(grid["runs"]):
        task = glue_tasks.TASKS.get(run["task"])
        if task is None or "train" not in task.files:
            raise InputError(f"{path}: runs.{number}.task: {shown(run['task'])} is not a task for a grid")
        files.checked_name(run["method"], f"{path}: runs.{number}.method")  # another version may have others
    return grid


def recorded_runs(root: pathlib.Path) -> list[Run]:
    """The runs in grid.json; none if there is no such file."""
    grid = read_grid(root)
    return [Run(**run) for run in grid["runs"]] if grid else []


def describe_machine() -> dict[str, str]:
    """Describes the machine: system, processor, usable cores, and JAX's devices."""
    source = "import jax; found = jax.local_devices(); print(len(found), found[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "devices of JAX": asked.stdout.strip() or "unknown",
    }


def log_file(root: pathlib.Path, run: Run) -> pathlib.Path:
    """The file for a run's output, next to its folder."""
    folder = run.folder(root)
    return folder.with_name(f"{folder.name}.log")


def report(root: pathlib.Path, console: rich.console.Console) -> None:
    """Writes the report on the finished runs, and prints its tables.

    Raises:
      InputError: if there is no grid or no finished run, or if runs have different settings.
    """
    known = read_grid(root)
    if known is None:
        raise InputError(f"--output_dir {root}: no grid was started there; it has no grid.json")
    summary = seed_statistics.summarise(root, recorded_runs(root))
    files.checked_place(root / "plots" / "file", root)
    with report_lock(root):
        comparison_page.write_report(root, summary, known["commands"], known["machines"])
    for task, numbers in summary["tasks"].items():
        header, rows = comparison_page.score_table(numbers, summary["baseline"])
        say(console, f"{task}, {numbers['metric']} x 100")
        for line in aligned([header, *rows]):
            say(console, f"  {line}")
    say(console, f"report: {root / 'report.html'}")


# running


@dataclasses.dataclass(frozen=True)
class Job:
    """A running process, its cores (None: all), and its start time by `time.perf_counter`."""

    run: Run
    process: subprocess.Popen
    cores: set[int] | None
    since: float


def run_all(
    grid: Grid, flags: list[str], command: str, console: rich.console.Console, lock: FolderLock
) -> dict[Run, str]:
    """Runs what is not finished, and returns why each failed run failed.

    Args:
      grid: what to run.
      flags: those of all runs.
      command: the command that resumes the grid.
      console: for progress.
      lock: the grid's; its runs hold it too, as they may outlive this process.

    Raises:
      Preempted: if this process was asked to stop; its runs have been stopped too.
    """
    root, runs = pathlib.Path(grid.output_dir), grid.runs()
    waiting = collections.deque(run for run in runs if not is_finished(run, root))
    slots, jobs = collections.deque(shares_of_cores(grid.jobs)), list[Job]()
    failures: dict[Run, str] = {}
    if len(waiting) < len(runs):
        say(console, f"{len(runs) - len(waiting)} of {len(runs)} runs are already finished")
    with note_signals() as asked, progress(console, len(waiting)) as show:
        try:
            while (waiting or jobs) and asked.signal_number is None:
                while waiting and slots:
                    jobs.append(start(waiting.popleft(), root, flags, slots.popleft(), lock))
                    show(jobs, 0)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    jobs.remove(job)
                    slots.append(job.cores)
                    reason = failure(job.run, root, job.process.returncode)
                    if reason:
                        failures[job.run] = reason
                    say(console, f"{outcome(job.run, root)} ({time.perf_counter() - job.since:.0f} s)")
                    show(jobs, 1)
                time.sleep(_POLL_SECONDS)
        finally:
            end([job.process for job in jobs])
    if asked.signal_number is not None:
        done = sum(is_finished(run, root) for run in runs)
        raise Preempted(
            f"interrupted; {done} of {len(runs)} runs are finished; to resume, run: {command}", asked.signal_number
        )
    return failures


def is_finished(run: Run, root: pathlib.Path) -> bool:
    """Whether the run has written its results.json, the last of its files."""
    return run_folder.read_results(run.folder(root)) is not None


def start(run: Run, root: pathlib.Path, flags: list[str], cores: set[int] | None, lock: FolderLock) -> "Job":
    """Starts a run in its own process group: Ctrl-C then reaches only this process, which passes it on once."""
    log = log_file(root, run)
    files.make_folder(log.parent)
    in_order = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the log ends with the last line written
    with open_log(log) as file:
        process = subprocess.Popen(
            glue_command(run, root, flags),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=in_order,
            process_group=0,
            pass_fds=lock.descriptors,
        )
    if cores is not None:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, cores)
    return Job(run, process, cores, time.perf_counter())


def open_log(path: pathlib.Path, *, fresh: bool = False) -> BinaryIO:
    """Opens a file for output of processes, which is appended or replaces the content; no link is followed.

    Raises:
      InputError: the system refuses.
    """
    try:
        how = os.O_TRUNC if fresh else os.O_APPEND
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, 0o666), "wb")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def glue_command(run: Run, root: pathlib.Path, flags: list[str]) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "pats_jax", "glue", *flags, *flags_of(run, root), "--resume"]


def outcome(run: Run, root: pathlib.Path) -> str:
    """The run's name and its score."""
    finished = FinishedRun.read(run, root)
    return f"{run.name}: " + (f"{finished.results['main_metric']} {finished.score:.4f}" if finished else "failed")


def failure(run: Run, root: pathlib.Path, code: int) -> str | None:
    """Why a run failed, from the last line of its log; None if it succeeded."""
    if code == 0 and is_finished(run, root):
        return None
    lines = log_file(root, run).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    how = f"killed by signal {-code}: " if code < 0 else ""
    return how + last.removeprefix("pats-jax: error: ")


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Asks processes to stop and waits until they have saved; kills them if the wait is interrupted."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()


def shares_of_cores(jobs: int) -> list[set[int] | None]:
    """A set of cores for each job; None if there are fewer cores than jobs, or the system cannot pin processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [None] * jobs
    return [{int(core) for core in share} for share in np.array_split(cores, jobs)]


@contextlib.contextmanager
def note_signals() -> Iterator[preemption.Preemption]:
    """Notes Ctrl-C, SIGTERM and a closed terminal (unless `nohup` ignores it)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    asked = preemption.Preemption()
    with preemption.noting(asked, numbers):
        yield asked


@contextlib.contextmanager
def progress(console: rich.console.Console, total: int) -> Iterator[Callable[[Sequence["Job"], int], None]]:
    """Shows a progress bar with the time left, on a terminal; yields ``show(running jobs, number just ended)``.

    The time left is known once a run has ended.
    """
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
    )
    whole_grid = 1e9  # seconds: the speed is that of all runs, not of the last half minute
    with rich.progress.Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=whole_grid
    ) as bar:
        number = bar.add_task("runs", total=total, status="")
        bar.advance(number, 0)  # the speed counts from here
        yield lambda jobs, ended: bar.update(number, advance=ended, status=", ".join(job.run.name for job in jobs))


def _processor():
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
