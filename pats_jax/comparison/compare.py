"""A grid of methods x tasks x seeds, each run by the GLUE program in its own process: `pats-jax compare`.

This process starts no JAX backend, so accelerators are free for the runs.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import rich.console

from pats_jax.comparison import comparison_page, seed_statistics
from pats_jax.comparison.seed_statistics import FinishedRun, Run
from pats_jax.core import files
from pats_jax.core.settings import Composed, entries, setting
from pats_jax.data import tasks as glue_tasks
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.methods import SENSITIVITY_BATCHES, get_methods
from pats_jax.reporting.console import say
from pats_jax.reporting.progress import CountProgress
from pats_jax.reporting.report_page import aligned
from pats_jax.run import flags, run_folder, workers
from pats_jax.run.flags import read_config
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import GridFile
from pats_jax.run.settings import Settings, resuming
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.run.workers import Ended, Job, Workers

logger = logging.getLogger(__name__)


_ONE_PROCESS = "each run is one process; use --jobs for parallel runs, or --executor dask for several machines"


@dataclasses.dataclass(frozen=True, init=False)
class Grid(Composed):
    """Compare fine-tuning methods over tasks and seeds, and write a report with statistics and plots.

    All other flags are those of `pats-jax glue`, and apply to every run.
    """

    title: ClassVar[str] = "grid"
    elsewhere: ClassVar[Mapping[str, str]] = {
        "method": "use --methods",
        "task_name": "use --tasks",
        "seed": "use --seeds",
        **dict.fromkeys(
            ("train_file", "validation_file", "test_file"), "a grid compares GLUE tasks; use --tasks and --data_dir"
        ),
        "overwrite": "finished runs are kept; to repeat a run, delete its folder",
        "resume": "not needed; a grid always resumes",
        **dict.fromkeys(("coordinator_address", "num_processes", "process_id"), _ONE_PROCESS),
    }

    output_dir: str | None = setting(
        None, "folder of the grid; repeat the same command to resume it", is_path=True, is_basic=True
    )
    methods: tuple[str, ...] = setting(
        (),
        "methods, named as in `pats-jax glue --method`; finetune is the baseline if listed",
        is_basic=True,
    )
    tasks: tuple[str, ...] = setting((), "cola sst2 mrpc stsb qqp mnli qnli rte wnli", is_basic=True)
    seeds: tuple[int, ...] = setting((), "run each method on each task with each of these seeds", is_basic=True)
    report_only: bool = setting(False, "run nothing; report on the finished runs in output_dir", is_basic=True)
    workers: WorkerSettings = WorkerSettings()

    def check(self) -> None:
        super().check()
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        for name in () if self.report_only else ("methods", "tasks", "seeds"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"--{name} is missing")
            if len(set(values)) < len(values):
                raise InputError(f"--{name} {shown(' '.join(map(str, values)), quoted=False)}: list each only once")

    def runs(self) -> list[Run]:
        """Seed by seed, so an unfinished grid has all methods for its first seeds."""
        return [
            Run(task, method, seed) for seed, task, method in itertools.product(self.seeds, self.tasks, self.methods)
        ]


def run(args: list[str], console: rich.console.Console) -> None:
    """Runs the unfinished runs of the grid, and writes the report.

    Args:
      args: the command line.
      console: where to print progress, scores and tables.

    Raises:
      InputError: if the input is invalid, before anything runs; or, after the report, if some runs failed.
      Preempted: if the grid was asked to stop; its runs have been saved.
    """
    grid, others = parse(args)
    root = pathlib.Path(str(grid.output_dir))
    if grid.report_only:
        report(root, console)
        return
    command = f"pats-jax compare {shlex.join(args)}"
    shared = as_before(grid, check(grid, others))
    check_place(root, grid)
    with workers.hold(root) as lock, workers.connect(grid.workers, lock) as fleet:
        record_start(root, grid, command, fleet.machines())
        failures = run_all(grid, shared, command, console, fleet)
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
      InputError: if the arguments include a flag that the grid sets itself.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help`` and ``--help_all``.
    """
    return flags.parse_part(args, "pats-jax compare", Grid, Settings)


Shared = dict[str, Settings]  # method -> the settings of its runs, but for task, seed and folder


def check(grid: Grid, others: list[str]) -> Shared:
    """Checks the grid, and gives the settings that its runs share.

    Raises:
      InputError: if anything in the grid is wrong.
    """
    for name in grid.tasks:
        task = glue_tasks.get_task(name, "--tasks")
        if name != task.name or "train" not in task.files:
            raise InputError(f"--tasks {name}: " + (f"write {task.name}" if name != task.name else "no training data"))
    of_any = frozenset(flag for names in grid.methods for kind in get_methods(names) for flag in entries(kind))
    shared = {}
    for method in grid.methods:
        own = ["--task_name", grid.tasks[0], "--method", method, "--seed", str(grid.seeds[0])]
        settings = flags.parse([*others, *own], "pats-jax compare", Settings, of_any)
        if not {"train", "eval"} <= settings.phases:
            raise InputError("--do_train and --do_eval: a comparison needs both; set both, or omit all --do_... flags")
        if settings.length.sensitivity_batches is None:  # the report shows it for every method
            settings = settings.replace(sensitivity_batches=SENSITIVITY_BATCHES)
        shared[method] = settings
    for run in grid.runs():
        settings_of(run, pathlib.Path(str(grid.output_dir)), shared).check()
    return shared


def as_before(grid: Grid, shared: Shared) -> Shared:
    """The settings that make new runs match those that exist.

    If there are runs, new ones use the same number of rows per step, whatever the devices are now.

    Raises:
      InputError: if a run has different settings; the message names both.
    """
    root, rows = pathlib.Path(str(grid.output_dir)), None
    for run in dict.fromkeys([*recorded_runs(root), *grid.runs()]):
        path = run.folder(root) / "config.json"
        if not path.exists():
            continue
        saved = read_config(str(path), Settings)
        settings = settings_of(run, root, shared | {run.method: shared.get(run.method) or _alike(shared, saved)})
        try:
            resuming(settings, saved)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from None
        if settings.batches.train_batch_size is None:
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
                before, now = getattr(saved.batches, name), getattr(settings.batches, name)
                if before != now:
                    raise InputError(
                        f"{run.name}: {name} was {before} and is {now}; to split "
                        f"a step differently, also set --train_batch_size {saved.batches.train_batch_size}"
                    )
            rows = saved.batches.train_batch_size
    return shared if rows is None else {name: one.replace(train_batch_size=rows) for name, one in shared.items()}


def _alike(shared, saved):
    """The shared settings with the methods of a saved run, which the grid no longer lists."""
    return next(iter(shared.values())).replace(methods=saved.methods)


def settings_of(run: Run, root: pathlib.Path, shared: Shared) -> Settings:
    """The settings of a run: the shared ones of its method and its own."""
    return shared[run.method].replace(task_name=run.task, seed=run.seed, output_dir=str(run.folder(root)))


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


def record_start(root: pathlib.Path, grid: Grid, command: str, machines: list[dict[str, str]]) -> None:
    """Adds the grid, the command and the machines to grid.json, which records every start."""
    before: dict[str, Any] = dict(read_grid(root) or {"runs": [], "commands": [], "machines": []})
    runs = [dataclasses.asdict(run) for run in grid.runs()]
    now: dict[str, list[Any]] = {"runs": runs, "commands": [command], "machines": machines}
    merged = {name: old + [one for one in now[name] if one not in old] for name, old in before.items()}
    files.write_json(root / "grid.json", merged)


def read_grid(root: pathlib.Path) -> GridFile | None:
    """Reads grid.json: ``runs``, ``commands`` and ``machines`` of all starts; None if there is no such file.

    Raises:
      InputError: if the file is damaged, or contains a name that cannot be that of a folder; the message names it.
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


def log_file(root: pathlib.Path, run: Run) -> pathlib.Path:
    """The file for a run's output, next to its folder."""
    folder = run.folder(root)
    return folder.with_name(f"{folder.name}.log")


def report(root: pathlib.Path, console: rich.console.Console) -> None:
    """Writes the report on the finished runs and prints its tables.

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
    for task, numbers in summary.tasks.items():
        header, rows = comparison_page.score_table(numbers, summary.baseline)
        say(console, f"{task}, {numbers.metric} x 100")
        for line in aligned([header, *rows]):
            say(console, f"  {line}")
    say(console, f"report: {root / 'report.html'}")


# running


def run_all(grid: Grid, shared: Shared, command: str, console: rich.console.Console, fleet: Workers) -> dict[Run, str]:
    """Runs what is not finished, and returns why each failed run failed.

    Args:
      grid: what to run.
      shared: the settings of the runs.
      command: the command that resumes the grid.
      console: for progress.
      fleet: the workers, which start the runs.

    Raises:
      Preempted: if this process was asked to stop; its runs have been stopped too.
    """
    root, runs = pathlib.Path(str(grid.output_dir)), grid.runs()
    run_of = {job_of(run, root, shared): run for run in runs if not is_finished(run, root)}
    failures: dict[Run, str] = {}
    if len(run_of) < len(runs):
        say(console, f"{len(runs) - len(run_of)} of {len(runs)} runs are already finished")
    with workers.note_signals() as asked, CountProgress(console, len(run_of), "runs") as progress:

        def show(jobs: Sequence[Job]) -> None:
            progress.show(", ".join(map(workers.how_far, jobs)))

        with contextlib.closing(workers.run_jobs(list(run_of), fleet, root, asked, show)) as all_ended:
            for job, ended in all_ended:
                run = run_of[job]
                why = failure(run, root, job, ended)
                if why:
                    failures[run] = why
                say(console, f"{outcome(run, root)} ({ended.seconds:.0f} s)")
                progress.show(ended=1)
    if asked.signal_number is not None:
        done = sum(is_finished(run, root) for run in runs)
        raise Preempted(
            f"interrupted; {done} of {len(runs)} runs are finished; to resume, run: {command}", asked.signal_number
        )
    return failures


def is_finished(run: Run, root: pathlib.Path) -> bool:
    """Whether the run has written its results.json, the last of its files."""
    return run_folder.read_results(run.folder(root)) is not None


def job_of(run: Run, root: pathlib.Path, shared: Shared) -> Job:
    """The process of a run."""
    results = run.folder(root) / "results.json"
    log = log_file(root, run)
    return Job(run.name, tuple(glue_arguments(run, root, shared)), str(log.absolute()), (str(results.absolute()),))


def glue_arguments(run: Run, root: pathlib.Path, shared: Shared) -> list[str]:
    """The command line of a run, after the name of Python."""
    return ["-m", "pats_jax", "glue", *flags.as_flags(settings_of(run, root, shared)), "--resume"]


def outcome(run: Run, root: pathlib.Path) -> str:
    """The run's name and its score."""
    finished = FinishedRun.read(run, root)
    return f"{run.name}: " + (f"{finished.results['main_metric']} {finished.score:.4f}" if finished else "failed")


def failure(run: Run, root: pathlib.Path, job: Job, ended: Ended) -> str | None:
    """Why a run failed; None if it succeeded."""
    why = workers.reason(job, ended)
    return why if why or is_finished(run, root) else workers.last_line(log_file(root, run))
