"""Few-shot tuning on the target tasks of a gym, from primed and unprimed starts: `pats-jax gym`.

A tuning trains one start's adapter (or the whole model) on the 16 rows of one sample of one task, keeps the parameters
with the best dev score, and scores these on the test rows. It writes a record, ``tunings/ARM/TASK-SAMPLE.json``, and is
never repeated; the report covers all records in the folder.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import rich.console

from pats_jax import models
from pats_jax.comparison import compare
from pats_jax.core import files
from pats_jax.data import load_partitioned_gym
from pats_jax.data.few_shot import FewShotTask, Sample
from pats_jax.data.partitions import source_set
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.priming import answerers, gym_report, relative_gain
from pats_jax.priming.few_shot_tuning import Tuner, TuningStart
from pats_jax.priming.first_guess import guess_seconds
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.text_answering import TEXT_HEADS
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.reporting.console import say
from pats_jax.reporting.progress import CountProgress
from pats_jax.run import compilation_cache, folder_lock, forecast, machine, pe_modules, run_folder, workers, xla_flags
from pats_jax.run.flags import read_config
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import PrimedResults, TuningRecord
from pats_jax.run.workers import Job
from pats_jax.training import preemption

# What may differ between starts of one folder: it does not change any tuning (`check_records` sees to the grid and the
# primed runs).
_FREE = frozenset(
    "output_dir primed kinds direct tasks samples jobs executor scheduler report_only grid batch_grid learning_rate "
    "per_device_eval_batch_size compilation_cache_dir num_devices parallel layers unroll".split()
)


def run(settings: GymSettings, args: Sequence[str], console: rich.console.Console) -> None:
    """Runs the missing tunings and writes the report.

    Args:
      settings: the settings; ``check`` is called first.
      args: the command line, for the processes of ``--jobs`` and the report.
      console: where to print scores and tables.

    Raises:
      InputError: if the input is invalid, mostly before any tuning; finished tunings are kept.
      Preempted: if the program was asked to stop; finished tunings are kept.
    """
    settings.check()
    folder = pathlib.Path(str(settings.output_dir))
    if not settings.report_only:
        gym, partition = load_partitioned_gym(
            settings.data.data_dir,
            settings.data.partition,
            shots=settings.data.shots,
            share_sources=settings.data.share_sources,
        )
        names = tuple(dict.fromkeys(settings.tasks)) or partition.test
        unknown = [name for name in names if name not in partition.test]
        if unknown:
            raise InputError(f"--tasks {unknown[0]}: not among the target tasks {', '.join(partition.test)}")
        tasks = [gym[name] for name in names]
        starts = find_starts(settings, names)
        check_records(settings, starts, tasks, folder)
        check_folder(folder, settings, starts)
        head = settings.tuning.head
        answerers.check_model(head, settings.model)
        answerers.check_tasks(head, tasks, settings.data.partition)
        tokenizer = models.load_tokenizer(settings.model.model_name_or_path)
        answerers.check_tokens(head, tokenizer, answerers.checkpoint_config(head, settings.model), tasks)
        wanted = [tuning for start in starts for tuning in tunings_of(settings, start, tasks, folder)]
        if folder_lock.is_handed_on(folder):  # a process of another that does the rest
            named = set(sys.stdin.read().splitlines())
            tune_all(settings, [one for one in wanted if one.name in named], console, tokenizer)
            return
        with workers.hold(folder) as lock:
            open_folder(folder, settings, starts)
            answerers.tell_about_data(console, {task.name: task for task in tasks}, partition, settings.data.partition)
            missing = [tuning for tuning in wanted if not tuning.path.exists()]
            if missing:
                say(console, say_before(settings, wanted, tokenizer))
            if settings.workers.jobs > 1 or settings.workers.executor == "dask":
                tune_in_processes(settings, args, missing, console, lock)
            else:
                tune_all(settings, missing, console, tokenizer)
    report(folder, console, f"pats-jax gym {shlex.join(args)}")


def say_before(settings: GymSettings, wanted: Sequence["Tuning"], tokenizer: Any) -> str:
    """How long those of the tunings that are missing will take; with T5 and BART only once some are finished."""
    records = [read_record(tuning.path) for tuning in wanted if tuning.path.exists()]
    finished = [spent for record in records if (spent := record.get("seconds"))]
    missing = [(one.start, one.task, one.sample) for one in wanted if not one.path.exists()]
    guess = None
    if not finished and settings.workers.executor == "local" and settings.tuning.head not in TEXT_HEADS:
        folder_of_model = models.checkpoint_folder(settings.model.model_name_or_path, check_weights=False)
        guess = guess_seconds(settings, missing, folder_of_model, tokenizer, machine.find_devices())
    return forecast.describe(len(missing), "tunings", finished, guess, settings.workers)


def find_starts(settings: GymSettings, tasks: Sequence[str]) -> list[TuningStart]:
    """The starts that the settings name: the unprimed model for each kind, then each primed model for its kinds.

    Args:
      settings: the settings that name them.
      tasks: the target tasks.

    Raises:
      InputError: if a folder is not a finished run of `pats-jax prime`, used another model or head, was trained on a
        target task, or has an adapter of another kind or size; or two folders are of the same stage.
    """
    model = settings.model.model_name_or_path
    starts = [TuningStart("direct", None, None, model, None, model, kind) for kind in settings.kinds if settings.direct]
    folders: dict[str, str] = {}
    for name in settings.primed:
        results = _read_primed(name, settings, tasks)
        folder, base = pathlib.Path(name), results["model_name_or_path"]
        encoder = base if results["train"] == "pe" else str(folder / "model")
        adapter = str(folder / "adapter") if results["peft"] else None
        for kind in settings.kinds:
            if kind != "full" and results["peft"] in (None, kind):
                stage = results["algorithm"], results["train"], results["seed"]
                start = TuningStart(*stage, encoder, adapter, base, kind, _digest(results))
                if folders.setdefault(start.name, name) != name:
                    raise InputError(f"--primed {name}: {start.name} is already {folders[start.name]}; keep one")
                starts.append(start)
    return list(dict.fromkeys(starts))


def _read_primed(name: str, settings: GymSettings, tasks: Sequence[str]) -> PrimedResults:
    """The results in a folder that tunings with these settings may start from.

    Raises:
      InputError: as from `find_starts`, for one folder.
    """
    folder, where = pathlib.Path(name), f"--primed {name}"
    found = run_folder.read_results(folder)
    if found is None:
        raise InputError(f"{where}: no results.json; use the folder of a finished `pats-jax prime` run")
    if "algorithm" not in found:
        raise InputError(f"{where}: not a run of pats-jax prime")
    results = files.read_record(folder / "results.json", PrimedResults)
    if results["head"] != settings.tuning.head and not {results["head"], settings.tuning.head} <= {*TEXT_HEADS}:
        raise InputError(f"{where}: was primed with --head {results['head']}, not {settings.tuning.head}")
    base, model = results["model_name_or_path"], settings.model.model_name_or_path
    if base != model and pathlib.Path(base).absolute() != pathlib.Path(model).absolute():
        raise InputError(f"{where}: was primed from {shown(base, quoted=False)}, not from --model_name_or_path {model}")
    learnt = {task for task in results["upstream_tasks"] if task in tasks}
    if not settings.data.share_sources:
        learnt |= {task for task in results["upstream_tasks"] if source_set(task) in map(source_set, tasks)}
    if learnt:
        raise InputError(f"{where}: was trained on {min(learnt)}, which is a target task or shares its dataset")
    kind = results["peft"]
    if kind is None and set(settings.kinds) == {"full"}:
        raise InputError(f"{where}: full tuning is never primed; add a PEFT method to --kinds")
    if kind is not None and kind not in settings.kinds:
        raise InputError(f"{where}: contains a {kind} adapter; add {kind} to --kinds")
    if kind is not None:
        theirs = read_config(str(folder / "config.json"), PrimingSettings)
        differing = pe_modules.differing_flags(settings.adapter(kind), theirs.adapter)
        if differing:
            raise InputError(f"{where}: was primed with a different {kind} adapter: {', '.join(differing)}")
    return results


def open_folder(folder: pathlib.Path, settings: GymSettings, starts: Sequence[TuningStart]) -> None:
    """Writes the folder's config.json unless it exists; raises as `check_folder` does."""
    with FolderLock(folder, name=".lock-config", patience=10.0):
        check_folder(folder, settings, starts)
        path = folder / "config.json"
        theirs = read_config(str(path), GymSettings).to_dict() if path.exists() else {}
        ours = _fixed(settings)
        if not ours.keys() <= theirs.keys():  # of kinds that were not tuned before
            files.write_json(path, theirs | ours)


def check_folder(folder: pathlib.Path, settings: GymSettings, starts: Sequence[TuningStart]) -> None:
    """Compares an existing config.json with the settings.

    Raises:
      InputError: if the folder's tunings used other settings, it is not the folder of a gym, or a link leads out of it.
    """
    for part in ("report/plots", *(f"tunings/{start.name}" for start in starts)):
        files.checked_place(folder / part / "file", folder)
    path = folder / "config.json"
    ours = _fixed(settings)
    if os.path.lexists(path):
        theirs = _fixed(read_config(str(path), GymSettings))
        differing = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        if differing:
            changes = ", ".join(f"{name} was {shown(theirs[name])} and is {shown(ours[name])}" for name in differing)
            raise InputError(f"--output_dir {folder}: contains tunings with different settings: {changes}")
        return
    for name in ("tunings", "report"):
        if os.path.lexists(folder / name):
            raise InputError(f"--output_dir {folder}: contains {name}, which no gym wrote; choose another folder")


def _fixed(settings):
    """The settings that all tunings of a folder share, as JSON has them: a list for a tuple."""
    fixed = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    return json.loads(json.dumps(fixed))


def check_records(
    settings: GymSettings, starts: Sequence[TuningStart], tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> None:
    """Raises InputError if an existing tuning used other learning rates or another start."""
    for start in starts:
        rates = list(settings.tuning.learning_rates(start.kind))
        for path in (tuning.path for tuning in tunings_of(settings, start, tasks, folder)):
            if not os.path.lexists(path):
                continue
            record = read_record(path)
            tried, digest = record.get("learning_rates") or rates, record.get("upstream_digest") or start.digest
            sizes = list(settings.tuning.batch_sizes)
            if record.get("batch_sizes", sizes) != sizes:
                raise InputError(f"--batch_grid: {path} used other batch sizes; use the same, or another --output_dir")
            if tried != rates:
                before, now = (shown(", ".join(map(str, values)), quoted=False) for values in (tried, rates))
                raise InputError(f"--grid: {path} used {before}, not {now}; use the same grid, or another --output_dir")
            if digest != start.digest:
                raise InputError(
                    f"--primed: {path} started from another run of that stage; use that run, or another --output_dir"
                )


def _digest(results: PrimedResults) -> str:
    """A digest of a finished run's results, which include times and so are unique."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One start, task and sample, and the file of its record."""

    start: TuningStart
    task: FewShotTask
    sample: Sample
    path: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.start.name}/{self.path.stem}"


def tunings_of(
    settings: GymSettings, start: TuningStart, tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> list[Tuning]:
    """The tunings of a start.

    Raises:
      InputError: if a task lacks a requested sample.
    """
    samples = [(task, sample) for task in tasks for sample in task.choose(settings.samples or None).samples]
    records = folder / "tunings" / start.name
    return [Tuning(start, task, sample, records / f"{task.name}-{sample.seed}.json") for task, sample in samples]


# many processes

_TUNINGS_OF_A_JOB = 16  # at most, on the workers of a cluster


def tune_in_processes(
    settings: GymSettings,
    args: Sequence[str],
    tunings: Sequence[Tuning],
    console: rich.console.Console,
    lock: FolderLock,
) -> None:
    """Distributes tunings over processes of the same command, and waits for them.

    Raises:
      InputError: if a process failed; the message has its last line. The others have been stopped.
      Preempted: if this process was asked to stop; the others have been stopped too.
    """
    folder = pathlib.Path(str(settings.output_dir))
    jobs = jobs_of(settings, args, tunings)
    for job in jobs:
        pathlib.Path(job.log).unlink(missing_ok=True)
    made = 0

    def show(running: Sequence[Job] = ()) -> None:
        nonlocal made
        before, made = made, sum(tuning.path.exists() for tuning in tunings)
        progress.show(", ".join(job.name for job in running), made - before)

    with (
        workers.connect(settings.workers, lock) as fleet,
        workers.note_signals() as asked,
        CountProgress(console, len(tunings), "tunings") as progress,
    ):
        with contextlib.closing(workers.run_jobs(jobs, fleet, folder, asked, show)) as all_ended:
            for number, (job, ended) in enumerate(all_ended, 1):
                why = workers.reason(job, ended)
                if why:
                    raise InputError(f"{job.log}: {why}")
                say(console, f"{number} of {len(jobs)} sets of tunings finished ({ended.seconds:.0f} s)")
    if asked.signal_number is not None:
        raise Preempted("interrupted; repeat the command to resume", asked.signal_number)


def jobs_of(settings: GymSettings, args: Sequence[str], tunings: Sequence[Tuning]) -> list[Job]:
    """A job for each of ``--jobs``; on a cluster, each job has a few tunings of one start."""
    if settings.workers.executor == "local":
        sets = [tunings[number :: settings.workers.jobs] for number in range(settings.workers.jobs)]
    else:
        groups = [list(group) for _, group in itertools.groupby(tunings, lambda tuning: tuning.start)]
        sets = [of[i : i + _TUNINGS_OF_A_JOB] for of in groups for i in range(0, len(of), _TUNINGS_OF_A_JOB)]
    folder = pathlib.Path(str(settings.output_dir)).absolute()
    arguments = ("-m", "pats_jax", "gym", *args)
    return [
        Job(
            name=f"job{number}",
            arguments=arguments,
            log=str(folder / f"job{number}.log"),
            results=tuple(str(tuning.path.absolute()) for tuning in part),
            stdin="\n".join(tuning.name for tuning in part),
        )
        for number, part in enumerate(filter(None, sets), 1)
    ]


# one process


def tune_all(settings: GymSettings, tunings: Sequence[Tuning], console: rich.console.Console, tokenizer: Any) -> None:
    """Runs the unfinished tunings in this process, one start after another.

    Raises:
      Preempted: if the program was asked to stop; finished tunings are kept.
    """
    xla_flags.set_defaults(settings.compiler.deterministic)
    compilation_cache.keep_compiled_programs(settings.compiler.compilation_cache_dir)
    missing = [tuning for tuning in tunings if not tuning.path.exists()]
    try:
        with preemption.watch() as asked, CountProgress(console, len(missing), "tunings") as progress:
            for start, group in itertools.groupby(missing, lambda tuning: tuning.start):
                tuner = Tuner(settings, start, tokenizer)
                for tuning in group:
                    asked.check()
                    progress.show(tuning.name)
                    record = tuner.tune(tuning.task, tuning.sample, asked)
                    files.make_folder(tuning.path.parent)
                    files.write_text(tuning.path, json.dumps(record) + "\n")
                    text = f"{start.name} {tuning.path.stem}: dev {record['dev']:.3f} test {record['test']:.3f}"
                    lost = "".join(f", no finite loss at {rate}" for rate in record["diverged"])
                    say(console, f"{text} ({record['seconds']:.0f} s){lost}")
                    progress.show(ended=1)
    except Preempted as error:
        raise Preempted("interrupted; repeat the command to resume", error.signal_number) from None


def read_record(path: pathlib.Path) -> TuningRecord:
    """The record of a finished tuning.

    Raises:
      InputError: if the file does not hold one; the message names it.
    """
    record = files.read_record(path, TuningRecord)
    files.checked_name(record["task"], f"{path}: task")
    return record


def read_records(folder: pathlib.Path) -> dict[str, TuningRecord]:
    """File -> the record of each finished tuning."""
    return {str(path): read_record(path) for path in sorted(folder.glob("tunings/*/*.json"))}


def report(folder: pathlib.Path, console: rich.console.Console, command: str) -> None:
    """Writes the report on the folder's records and prints its tables.

    Raises:
      InputError: if there are no records, or a file in the folder is damaged; the message names it.
    """
    records = read_records(folder)
    if not records:
        raise InputError(f"--output_dir {folder}: has no finished tunings")
    config, settings = folder / "config.json", ""
    if os.path.lexists(config):
        read_config(str(config), GymSettings)
        settings = files.read_bytes(config).decode()
    summary = relative_gain.summarise(list(records.values()), sources=list(records))
    described = ", ".join(f"{name}: {value}" for name, value in workers.describe_machine().items())
    files.checked_place(folder / "report" / "plots" / "file", folder)
    with compare.report_lock(folder):
        gym_report.write_report(
            folder / "report", summary, title="Priming: relative gains", about=[command, described, settings]
        )
    for line in gym_report.table_lines(summary):
        say(console, line)
    say(console, f"report: {folder / 'report' / 'report.html'}")
