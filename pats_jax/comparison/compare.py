"""A grid of arms x tasks x seeds, in lanes of one process or a process each: `pats-jax compare`.

The runs are those of `pats-jax glue`, or of another program in `PROGRAMS`.

This process starts no JAX backend, so accelerators are free for the runs.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import shlex
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import rich.console

from pats_jax.comparison import comparison_page, first_guess, seed_statistics
from pats_jax.comparison.arms import Arm, make_arms, split_lists
from pats_jax.comparison.grid_file import (
    PROGRAMS,
    check_place,
    check_program,
    program_of_grid,
    read_grid,
    record_start,
    recorded_runs,
)
from pats_jax.comparison.run_sets import RunSet, check_lanes, default_lanes, in_sets, is_finished, log_file
from pats_jax.comparison.seed_statistics import FinishedRun, Run
from pats_jax.core import files
from pats_jax.core.settings import Composed, at_least, setting
from pats_jax.data import tasks as glue_tasks
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.methods import SENSITIVITY_BATCHES
from pats_jax.reporting.console import say
from pats_jax.reporting.progress import CountProgress
from pats_jax.reporting.report_page import aligned
from pats_jax.run import flags, forecast, machine, own_data, run_folder, workers
from pats_jax.run.flags import read_config
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import GridProgram
from pats_jax.run.settings import OF_TEXT_TO_TEXT, FineTuningSettings, Settings, resuming
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.run.workers import Ended, Job, Workers

logger = logging.getLogger(__name__)


_ONE_PROCESS = "each run is one process; use --jobs for parallel runs, or --executor dask for several machines"


@dataclasses.dataclass(frozen=True, init=False)
class Grid(Composed):
    """Compare fine-tuning methods over tasks and seeds, and write a report with statistics and plots.

    All other flags are those of `pats-jax glue`, or of `--program`, and apply to every run. Several values of one,
    such as `--learning_rate 1e-4 2e-4` or `--peft lora bitfit`, are compared, too.
    """

    title: ClassVar[str] = "grid"
    elsewhere: ClassVar[Mapping[str, str]] = {
        "method": "use --methods",
        "task_name": "use --tasks",
        "seed": "use --seeds",
        "overwrite": "finished runs are kept; to repeat a run, delete its folder",
        "resume": "not needed; a grid always resumes",
        **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo"), "upload one run, trained by itself"),
        **dict.fromkeys(("coordinator_address", "num_processes", "process_id"), _ONE_PROCESS),
    }

    output_dir: str | None = setting(
        None, "folder of the grid; repeat the same command to resume it", is_path=True, is_basic=True
    )
    program: GridProgram = setting(
        "glue", "glue: classifiers; text2text: T5 or BART, by the flags of `pats-jax text2text`", is_basic=True
    )
    methods: tuple[str, ...] = setting(
        (),
        "methods, named as in `pats-jax glue --method`; finetune is the baseline if listed",
        is_basic=True,
    )
    tasks: tuple[str, ...] = setting(
        (), "cola sst2 mrpc stsb qqp mnli qnli rte wnli; for your own data use --train_file", is_basic=True
    )
    seeds: tuple[int, ...] = setting((), "run each method on each task with each of these seeds", is_basic=True)
    lanes: int | None = setting(
        None,
        "runs trained side by side in one process; if unset, 4 on a CPU, else as many as fit; 1: a process each",
        at_least(1, 100_000),
        is_basic=True,
    )
    keep_models: Literal["none", "best", "all"] = setting(
        "all", "which runs keep their model; best: of each task and arm, the run with the best score"
    )
    report_only: bool = setting(False, "run nothing; report on the finished runs in output_dir", is_basic=True)
    workers: WorkerSettings = WorkerSettings()

    def check(self) -> None:
        super().check()
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        for name in () if self.report_only else ("methods", "tasks", "seeds"):
            values = getattr(self, name)
            if not values and name != "tasks":
                raise InputError(f"--{name} is missing")
            if len(set(values)) < len(values):
                raise InputError(f"--{name} {shown(' '.join(map(str, values)), quoted=False)}: list each only once")
        if self.tasks and self.program != "glue" and not self.report_only:
            raise InputError("--tasks: is for GLUE; for --program text2text, set --train_file or --dataset_name")

    @property
    def kind(self) -> type[FineTuningSettings]:
        """The settings of its runs."""
        return PROGRAMS[self.program]

    def runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Seed by seed, so an unfinished grid has all arms for its first seeds."""
        return [Run(task, arm, seed) for seed, task, arm in itertools.product(self.seeds, self.tasks, arms)]


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
    check_program(root, grid.program)
    grid = name_data(grid, others)
    shared = as_before(grid, check(grid, others))
    runs = grid.runs(shared)
    check_place(root, runs)
    check_files(shared)
    with workers.hold(root) as lock, workers.connect(grid.workers, lock) as fleet:
        machines = fleet.machines()
        record_start(root, grid.program, runs, command, machines)
        if grid.lanes is None:
            grid = grid.replace(lanes=default_lanes(machines))
        failures = run_all(grid, shared, command, console, fleet)
        for failed, (reason, log) in failures.items():
            logger.error("%s failed: %s; see %s", failed.name, reason, log)
        if len(failures) < len(runs):
            report(root, console)
    if failures:
        raise InputError(f"{len(failures)} of {len(runs)} runs failed; repeat the command to retry them")


# what to run


def parse(args: list[str]) -> tuple[Grid, list[str]]:
    """The grid, and the remaining flags for its runs.

    Raises:
      InputError: if the arguments include a flag that the grid sets itself.
      SystemExit: from the parser itself, with code 2, or 0 after ``--help`` and ``--help_all``.
    """
    kind = PROGRAMS.get(flags.value_of("--program", args) or Grid.program, Settings)
    given = set(flags.flag_names(args))
    if kind is Settings and (others := [name for name in OF_TEXT_TO_TEXT if name in given]):
        raise InputError(f"--{others[0]}: is for text to text; set --program text2text, or omit it")
    return flags.parse_part(args, "pats-jax compare", Grid, kind)


def name_data(grid: Grid, others: list[str]) -> Grid:
    """The grid with a name for one's own data in place of a task: that of the training file or of the data set.

    Raises:
      InputError: if there are both, or neither.
    """
    given = flags.flag_names(others)
    if grid.tasks:
        for name in (*_OWN_DATA, "validation_file", "test_file"):
            if name in given:
                raise InputError(f"--{name}: cannot be used with --tasks")
        return grid
    own = next((name for name in _OWN_DATA if name in given), None)
    if own is None:
        if grid.program != "glue":
            raise InputError("no data: set --train_file or --dataset_name")
        raise InputError("--tasks is missing; for your own data, set --train_file or --dataset_name instead")
    path = pathlib.Path(str(flags.value_of(f"--{own}", others)))
    return grid.replace(tasks=(files.checked_name(path.stem if own == "train_file" else path.name, f"--{own}"),))


_OWN_DATA = ("train_file", "dataset_name")  # the one or the other


Shared = dict[Arm, FineTuningSettings]  # arm -> the settings of its runs, but for task, seed and folder


def check(grid: Grid, others: list[str]) -> Shared:
    """Checks the grid, and gives the settings that its runs share.

    Raises:
      InputError: if anything in the grid is wrong.
    """
    is_own = not set(_OWN_DATA).isdisjoint(flags.flag_names(others))
    for name in () if is_own else grid.tasks:
        task = glue_tasks.get_task(name, "--tasks")
        if name != task.name or "train" not in task.files:
            raise InputError(f"--tasks {name}: " + (f"write {task.name}" if name != task.name else "no training data"))
    lists, others = split_lists(others, grid.kind)
    own = [*([] if is_own else ["--task_name", grid.tasks[0]]), "--seed", str(grid.seeds[0])]
    kind = grid.kind
    some = flags.parse([*others, *own], "pats-jax compare", kind, frozenset(kind.all_entries()))
    arms = make_arms(grid.methods, lists, some.peft, kind)
    of_any = frozenset(flag for arm in arms for flag in flags.read_by(kind, {"peft": some.peft, **arm.settings()}))
    shared = {}
    for arm in arms:
        settings = flags.parse([*others, *own, *arm.flags()], "pats-jax compare", kind, of_any)
        if not {"train", "eval"} <= settings.phases:
            raise InputError("--do_train and --do_eval: a comparison needs both; set both, or omit all --do_... flags")
        if settings.data.train_file:
            own_data.own_paths(settings.data, ["train", "validation"])
        if settings.length.sensitivity_batches is None:  # the report shows it for every method
            settings = settings.replace(sensitivity_batches=SENSITIVITY_BATCHES)
        check_lanes(settings, grid.lanes)
        shared[arm] = settings
        for method in settings.methods:
            reason = settings.peft and method.why_not_with(settings.peft)
            if reason:
                raise InputError(f"--peft {settings.peft} --method {method.name}: {reason}")
    for run in grid.runs(shared):
        settings_of(run, pathlib.Path(str(grid.output_dir)), shared).check()
    return shared


def check_files(shared: Shared) -> None:
    """Reads the files that the runs share, or each run would say what is wrong with them; raises InputError."""
    settings = next(iter(shared.values()))
    if settings.data.train_file:
        own_data.check_files(settings)


def as_before(grid: Grid, shared: Shared) -> Shared:
    """The settings that make new runs match those that exist.

    If there are runs, new ones use the same number of rows per step, whatever the devices are now.

    Raises:
      InputError: if a run has different settings; the message names both.
    """
    root, rows = pathlib.Path(str(grid.output_dir)), None
    for run in dict.fromkeys([*recorded_runs(root), *grid.runs(shared)]):
        path = run.folder(root) / "config.json"
        if not path.exists():
            continue
        saved = read_config(str(path), grid.kind)
        settings = settings_of(run, root, shared | {run.arm: shared.get(run.arm) or _alike(shared, run.arm, saved)})
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
    return {
        arm: one if rows is None or one.batches.train_batch_size else one.replace(train_batch_size=rows)
        for arm, one in shared.items()
    }


def _alike(shared, arm, saved):
    """The settings of an arm that the grid no longer lists: as a saved run has those by which arms differ."""
    listed = {flag for each in (arm, *shared) for flag, _ in each.overrides} - {"peft"}
    theirs = saved.flat()
    kept = {flag: theirs[flag] for flag in listed & theirs.keys()}
    return next(iter(shared.values())).replace(methods=saved.methods, adapters=saved.adapters, **kept)


def settings_of(run: Run, root: pathlib.Path, shared: Shared) -> FineTuningSettings:
    """The settings of a run: the shared ones of its arm and its own."""
    settings = shared[run.arm]
    task = {} if settings.data.own_name else {"task_name": run.task}
    return settings.replace(seed=run.seed, output_dir=str(run.folder(root)), **task)


# the grid's report


def report_lock(root: pathlib.Path) -> FolderLock:
    """Lock for writing the report: a grid takes it at its end, and `--report_only` while a grid is running."""
    return FolderLock(root, name=".lock-report", patience=60.0)


def report(root: pathlib.Path, console: rich.console.Console) -> None:
    """Writes the report on the finished runs and prints its tables.

    Raises:
      InputError: if there is no grid or no finished run, or if runs have different settings.
    """
    known = read_grid(root)
    if known is None:
        raise InputError(f"--output_dir {root}: no grid was started there; it has no grid.json")
    summary = seed_statistics.summarise(root, recorded_runs(root), PROGRAMS[str(program_of_grid(known))])
    files.checked_place(root / "plots" / "file", root)
    with report_lock(root):
        comparison_page.write_report(root, summary, known["commands"], known["machines"])
    for task, numbers in summary.tasks.items():
        header, rows = comparison_page.score_table(numbers, summary.baseline)
        times = "" if numbers.metric in seed_statistics.LARGEST else " x 100"
        say(console, f"{task}, {numbers.metric}{times}")
        for line in aligned([header, *rows]):
            say(console, f"  {line}")
    say(console, f"report: {root / 'report.html'}")


# running

Failures = dict[Run, tuple[str, pathlib.Path]]  # why a run failed, and the log that says more


def run_all(grid: Grid, shared: Shared, command: str, console: rich.console.Console, fleet: Workers) -> Failures:
    """Runs the unfinished runs; returns failed run -> reason.

    Args:
      grid: what to run.
      shared: the settings of the runs.
      command: the command that resumes the grid.
      console: for progress.
      fleet: the workers, which start the runs.

    Raises:
      Preempted: if this process was asked to stop; its runs have been stopped too.
    """
    root, runs = pathlib.Path(str(grid.output_dir)), grid.runs(shared)

    def known_settings(run: Run) -> FineTuningSettings | None:
        return settings_of(run, root, shared) if run.arm in shared else None

    sets = in_sets(runs, known_settings, root, grid.lanes)
    set_of = {job_of(one, root, shared, grid): one for one in sets}
    failures: Failures = {}
    if finished := sum(is_finished(run, root) for run in runs):
        say(console, f"{finished} of {len(runs)} runs are already finished")
    total = sum(len(one.runs) for one in sets)
    if sets:
        say(console, say_before(sets, known_settings, total, root, grid))
    with workers.note_signals() as asked, CountProgress(console, total, "runs") as progress:

        def show(jobs: Sequence[Job]) -> None:
            under_way = sum(len(set_of[job].runs) * workers.share_done(job) for job in jobs)
            progress.show(", ".join(map(workers.how_far, jobs)), under_way=under_way)

        with contextlib.closing(workers.run_jobs(list(set_of), fleet, root, asked, show)) as all_ended:
            for job, ended in all_ended:
                ended_runs = set_of[job].runs
                for run in ended_runs:
                    why = failure(run, root, job, ended)
                    if why:
                        failures[run] = why
                    say(console, f"{outcome(run, root, grid.kind)} ({seconds_of(ended, len(ended_runs))})")
                drop_models(grid, {(run.task, run.arm) for run in ended_runs}, runs, root)
                progress.show(ended=len(ended_runs))
    if asked.signal_number is not None:
        done = sum(is_finished(run, root) for run in runs)
        raise Preempted(
            f"interrupted; {done} of {len(runs)} runs are finished; to resume, run: {command}", asked.signal_number
        )
    return failures


def say_before(
    sets: Sequence[RunSet],
    settings_of: Callable[[Run], FineTuningSettings | None],
    total: int,
    root: pathlib.Path,
    grid: Grid,
) -> str:
    """How long so many runs in these sets will take."""
    finished, guess = seconds_taken(root), None
    if not finished and grid.workers.executor == "local":
        guess = first_guess.guess_seconds(sets, settings_of, machine.find_devices(), grid.workers.jobs)
    return forecast.describe(total, "runs", finished, guess, grid.workers)


def seconds_taken(root: pathlib.Path) -> list[float]:
    """How long the finished runs of a grid trained; those in lanes share their seconds."""
    results = (run_folder.read_results(run.folder(root)) for run in recorded_runs(root))
    timings = (one.get("timing") for one in results if one)
    found = ((timing.get("train_seconds"), timing.get("lanes", 1)) for timing in timings if isinstance(timing, dict))
    numbers = (pair for pair in found if all(isinstance(x, int | float) and 0 < x < 1e9 for x in pair))
    return [seconds / lanes for seconds, lanes in numbers]


def job_of(one: RunSet, root: pathlib.Path, shared: Shared, grid: Grid) -> Job:
    """The process of a set of runs, or of a run alone."""
    log = str(one.log_file(root).absolute())
    results = tuple(str((run.folder(root) / "results.json").absolute()) for run in one.runs)
    if one.name is None:
        return Job(one.title, tuple(run_arguments(one.runs[0], root, shared)), log, results)
    request = {
        "folder": str(one.folder(root).absolute()),
        "runs": [
            {
                "run": run.record(),
                "arguments": run_arguments(run, root, shared)[3:],
                "log": str(log_file(root, run).absolute()),
            }
            for run in one.runs
        ],
        "lanes": grid.lanes,
        "keeps_models": grid.keep_models != "none",
    }
    return Job(one.title, ("-m", "pats_jax", f"{grid.program}-lanes"), log, results, json.dumps(request))


def run_arguments(run: Run, root: pathlib.Path, shared: Shared) -> list[str]:
    """The command line of a run, after the name of Python."""
    settings = settings_of(run, root, shared)
    return ["-m", "pats_jax", settings.program, *flags.as_flags(settings), "--resume"]


def outcome(run: Run, root: pathlib.Path, kind: type[FineTuningSettings]) -> str:
    """The run's name and its score."""
    finished = FinishedRun.read(run, root, kind)
    return f"{run.name}: " + (f"{finished.results['main_metric']} {finished.score:.4f}" if finished else "failed")


def seconds_of(ended: Ended, runs: int) -> str:
    """How long a process took."""
    return f"{ended.seconds:.0f} s" + (f" for {runs} runs" if runs > 1 else "")


def failure(run: Run, root: pathlib.Path, job: Job, ended: Ended) -> tuple[str, pathlib.Path] | None:
    """Why a run failed, and the log that says more; None if it succeeded."""
    log, own_log = pathlib.Path(job.log), log_file(root, run)
    why = workers.reason(job, ended)
    if why and not (is_finished(run, root) and log.name != own_log.name):  # the others of a set may have failed
        return why, log
    return None if is_finished(run, root) else (workers.last_line(own_log), own_log)


def drop_models(grid: Grid, arms: Container[tuple[str, Arm]], runs: Sequence[Run], root: pathlib.Path) -> None:
    """Removes the models of finished runs of these tasks and arms that are not to be kept, see ``keep_models``."""
    if grid.keep_models == "all":
        return
    found = (FinishedRun.read(run, root, grid.kind) for run in runs if (run.task, run.arm) in arms)
    best: dict[tuple[str, Arm], FinishedRun] = {}
    finished = [one for one in found if one is not None]
    for one in finished if grid.keep_models == "best" else ():
        kind = one.run.task, one.run.arm
        if kind not in best or one.score > best[kind].score:
            best[kind] = one
    kept = {one.run for one in best.values()}
    for one in finished:
        if one.run not in kept:
            folder = one.run.folder(root)
            run_folder.check_links(folder, _MODELS)
            for name in _MODELS:
                shutil.rmtree(folder / name, ignore_errors=True)


_MODELS = ("model", "adapter")
