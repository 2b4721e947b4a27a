"""Few-shot tuning on the target tasks of a gym, from primed and unprimed starts: `pats-jax gym`.

A tuning trains one start's adapter (or the whole model) on the 16 rows of one sample of one task, keeps the parameters
with the best dev score, and scores these on the test rows. It writes a record, ``tunings/ARM/TASK-SAMPLE.json``, and is
never repeated; the report covers all records in the folder.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import rich.console

from pats_jax import models
from pats_jax.comparison import compare
from pats_jax.core import files
from pats_jax.data import load_partitioned_gym
from pats_jax.data.few_shot import FewShotTask, Sample
from pats_jax.data.partitions import source_set
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.priming import gym_report, option_scoring, relative_gain
from pats_jax.priming.few_shot_tuning import Start, Tuner
from pats_jax.priming.gym_settings import GymSettings, parse_share
from pats_jax.priming.upstream import PrimingSettings
from pats_jax.reporting.console import say
from pats_jax.run import compilation_cache, folder_lock, pe_modules, run_folder, xla_flags
from pats_jax.run.flags import read_config
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.records import PrimedResults, TuningRecord
from pats_jax.training import preemption

# What may differ between starts of one folder: it does not change any tuning (`check_records` sees to the grid and the
# primed runs).
_FREE = frozenset(
    "output_dir primed kinds direct tasks samples jobs share report_only grid learning_rate per_device_eval_batch_size "
    "compilation_cache_dir num_devices parallel layers unroll".split()
)


def run(settings: GymSettings, args: Sequence[str], console: rich.console.Console) -> None:
    """Runs the missing tunings, and writes the report.

    Args:
      settings: the settings; ``check`` is called first.
      args: the command line, for the processes of ``--jobs`` and the report.
      console: where to print scores and tables.

    Raises:
      InputError: on invalid input, mostly before any tuning; finished tunings are kept.
      Preempted: the program was asked to stop; finished tunings are kept.
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
        missing = [name for name in names if name not in partition.test]
        if missing:
            raise InputError(f"--tasks {missing[0]}: not among the target tasks {', '.join(partition.test)}")
        tasks = [gym[name] for name in names]
        option_scoring.check_tasks(settings.tuning.head, tasks)
        starts = find_starts(settings, names)
        check_records(settings, starts, tasks, folder)
        check_folder(folder, settings, starts)
        tokenizer = models.load_tokenizer(settings.model.model_name_or_path)
        folder_of_model = models.checkpoint_folder(settings.model.model_name_or_path, check_weights=False)
        config = models.EncoderConfig.from_folder(folder_of_model)
        option_scoring.check_tokens(settings.tuning.head, tokenizer, config, tasks)
        with hold(folder, settings.share) as locks:
            open_folder(folder, settings, starts)
            if settings.jobs > 1:
                run_jobs(settings, args, locks)
            else:
                try:
                    with preemption.watch() as asked:
                        tune_all(settings, starts, tasks, folder, console, asked, tokenizer)
                except Preempted as error:
                    raise Preempted("interrupted; repeat the command to resume", error.signal_number) from None
    if settings.report_only or settings.share == "1/1":
        report(folder, console, f"pats-jax gym {shlex.join(args)}")


def find_starts(settings: GymSettings, tasks: Sequence[str]) -> list[Start]:
    """The starts of the settings: the unprimed model for each kind, then each primed model for its kinds.

    Args:
      settings: the settings that name them.
      tasks: the target tasks.

    Raises:
      InputError: a folder is not a finished run of `pats-jax prime`, used another model or head, was trained on a
        target task, or has an adapter of another kind or size; or two folders are of the same stage.
    """
    model = settings.model.model_name_or_path
    starts = [Start("direct", None, None, model, None, model, kind) for kind in settings.kinds if settings.direct]
    folders: dict[str, str] = {}
    for name in settings.primed:
        results = _read_primed(name, settings, tasks)
        folder, base = pathlib.Path(name), results["model_name_or_path"]
        encoder = base if results["train"] == "pe" else str(folder / "model")
        adapter = str(folder / "adapter") if results["peft"] else None
        for kind in settings.kinds:
            if kind != "full" and results["peft"] in (None, kind):
                stage = results["algorithm"], results["train"], results["seed"]
                start = Start(*stage, encoder, adapter, base, kind, _digest(results))
                if folders.setdefault(start.name, name) != name:
                    raise InputError(f"--primed {name}: {start.name} is already {folders[start.name]}; keep one")
                starts.append(start)
    return list(dict.fromkeys(starts))


def _read_primed(name: str, settings: GymSettings, tasks: Sequence[str]) -> PrimedResults:
    """The results of a folder that tunings of these settings may start from."""
    folder, where = pathlib.Path(name), f"--primed {name}"
    found = run_folder.read_results(folder)
    if found is None:
        raise InputError(f"{where}: no results.json; use the folder of a finished `pats-jax prime` run")
    if "algorithm" not in found:
        raise InputError(f"{where}: not a run of pats-jax prime")
    results = files.read_record(folder / "results.json", PrimedResults)
    if results["head"] != settings.tuning.head:
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


def open_folder(folder: pathlib.Path, settings: GymSettings, starts: Sequence[Start]) -> None:
    """Writes the folder's config.json, unless another share already has; raises like `check_folder`."""
    with FolderLock(folder, name=".lock-config", patience=10.0):
        check_folder(folder, settings, starts)
        path = folder / "config.json"
        theirs = read_config(str(path), GymSettings).to_dict() if path.exists() else {}
        ours = _fixed(settings)
        if not ours.keys() <= theirs.keys():  # of kinds that were not tuned before
            files.write_json(path, theirs | ours)


def check_folder(folder: pathlib.Path, settings: GymSettings, starts: Sequence[Start]) -> None:
    """Compares an existing config.json with the settings.

    Raises:
      InputError: its tunings used other settings, the folder is not a gym's, or a link leads out of it.
    """
    for part in ("report/plots", *(f"tunings/{start.name}" for start in starts)):
        files.checked_place(folder / part / "file", folder)
    path = folder / "config.json"
    ours = _fixed(settings)
    if os.path.lexists(path):
        theirs = read_config(str(path), GymSettings).to_dict()
        differing = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        if differing:
            changes = ", ".join(f"{name} was {shown(theirs[name])} and is {shown(ours[name])}" for name in differing)
            raise InputError(f"--output_dir {folder}: contains tunings with different settings: {changes}")
        return
    for name in ("tunings", "report"):
        if os.path.lexists(folder / name):
            raise InputError(f"--output_dir {folder}: contains {name}, which no gym wrote; choose another folder")


def _fixed(settings):
    """The settings that all tunings of a folder share, as read back from config.json."""
    fixed = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    return json.loads(json.dumps(fixed))


def check_records(
    settings: GymSettings, starts: Sequence[Start], tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> None:
    """Raises InputError if an existing tuning used other learning rates or another start."""
    for start in starts:
        rates = list(settings.tuning.learning_rates(start.kind))
        for _, _, path in places(settings, start, tasks, folder):
            if not os.path.lexists(path):
                continue
            record = read_record(path)
            tried, digest = record.get("learning_rates") or rates, record.get("upstream_digest") or start.digest
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


def places(
    settings: GymSettings, start: Start, tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> list[tuple[FewShotTask, Sample, pathlib.Path]]:
    """The tunings of a start: task, sample and the file of the record.

    Raises:
      InputError: a task lacks a requested sample.
    """
    samples = [(task, sample) for task in tasks for sample in task.choose(settings.samples or None).samples]
    records = folder / "tunings" / start.name
    return [(task, sample, records / f"{task.name}-{sample.seed}.json") for task, sample in samples]


# many processes


@contextlib.contextmanager
def hold(folder: pathlib.Path, share: str) -> Iterator[list[FolderLock]]:
    """Locks the folder against other programs and overlapping shares; yields the locks.

    Other shares may use it at the same time. A process of ``--jobs`` inherits the locks, and takes none.

    Raises:
      InputError: another program is using the folder.
    """
    if folder_lock.is_handed_on(folder):
        yield []
        return
    first, last = parse_share(share)
    with FolderLock(folder, shared=True) as lock, FolderLock(folder, name=f".lock-{first}-of-{last}") as own:
        for path in folder.glob(".lock-*-of-*"):
            named = re.fullmatch(r"\.lock-([0-9]+)-of-([1-9][0-9]*)", path.name)
            other, count = map(int, named.groups()) if named else (first, last)
            overlaps = (first - other) % math.gcd(last, count) == 0
            if path != own.path and overlaps and folder_lock.is_taken(path):
                raise InputError(f"--share {share}: a pats-jax gym with --share {other}/{count} is running in {folder}")
        yield [lock, own]


def run_jobs(settings: GymSettings, args: Sequence[str], locks: Sequence[FolderLock]) -> None:
    """Runs the same command in one process per share, which also hold the locks, and waits.

    Raises:
      InputError: one of them failed; the message has its last line.
      Preempted: this process was asked to stop; the others were stopped too.
    """
    folder, first, last = pathlib.Path(str(settings.output_dir)), *parse_share(settings.share)
    command = [sys.executable, "-m", "pats_jax", "gym", *args, "--jobs", "1", "--share"]
    logs = [folder / f"job{number + 1}.log" for number in range(settings.jobs)]
    processes: list[subprocess.Popen] = []
    failed: list[int] = []
    with compare.note_signals() as asked:
        try:
            for number, cores in enumerate(compare.shares_of_cores(settings.jobs)):
                share = f"{(first - 1) * settings.jobs + number + 1}/{last * settings.jobs}"
                with compare.open_log(logs[number], fresh=True) as output:
                    process = subprocess.Popen(
                        [*command, share],
                        stdout=output,
                        stderr=output,
                        process_group=0,
                        env=os.environ | folder_lock.handed_on(locks[0]),
                        pass_fds=[number for lock in locks for number in lock.descriptors],
                    )
                if cores is not None:
                    os.sched_setaffinity(process.pid, cores)
                processes.append(process)
            while asked.signal_number is None and not failed:
                codes = [process.poll() for process in processes]
                failed = [number for number, code in enumerate(codes) if code]
                if None not in codes:
                    break
                time.sleep(0.1)
        finally:
            compare.end([process for process in processes if process.poll() is None])
    if asked.signal_number is not None:
        raise Preempted("interrupted; repeat the command to resume", asked.signal_number)
    for number in failed:  # the others have been told to end
        text = logs[number].read_text(encoding="utf-8", errors="replace").strip() or "no output"
        raise InputError(f"{logs[number]}: {text.splitlines()[-1].removeprefix('pats-jax: error: ')}")


# one process


def tune_all(
    settings: GymSettings,
    starts: Iterable[Start],
    tasks: Sequence[FewShotTask],
    folder: pathlib.Path,
    console: rich.console.Console,
    asked: preemption.Preemption,
    tokenizer: Any,
) -> None:
    """Runs this process's share of the missing tunings, start by start."""
    xla_flags.set_defaults(settings.compiler.deterministic)
    compilation_cache.keep_compiled_programs(settings.compiler.compilation_cache_dir)
    number, count = parse_share(settings.share)
    for start in starts:
        own = places(settings, start, tasks, folder)[number - 1 :: count]
        wanted = [(task, sample, path) for task, sample, path in own if not path.exists()]
        if not wanted:
            continue
        tuner = Tuner(settings, start, tokenizer)
        for task, sample, path in wanted:
            asked.check()
            record = tuner.tune(task, sample, asked)
            files.make_folder(path.parent)
            files.write_text(path, json.dumps(record) + "\n")
            text = f"{start.name} {task.name}-{sample.seed}: dev {record['dev']:.3f} test {record['test']:.3f}"
            lost = "".join(f", no finite loss at {rate}" for rate in record["diverged"])
            say(console, f"{text} ({record['seconds']:.0f} s){lost}")


def read_record(path: pathlib.Path) -> TuningRecord:
    """The record of a finished tuning.

    Raises:
      InputError: naming the file, if it does not hold one.
    """
    record = files.read_record(path, TuningRecord)
    files.checked_name(record["task"], f"{path}: task")
    return record


def read_records(folder: pathlib.Path) -> dict[str, TuningRecord]:
    """File -> the record of each finished tuning."""
    return {str(path): read_record(path) for path in sorted(folder.glob("tunings/*/*.json"))}


def report(folder: pathlib.Path, console: rich.console.Console, command: str) -> None:
    """Writes the report on the folder's records, and prints its tables.

    Raises:
      InputError: there are none, or a file of the folder is damaged; the message names it.
    """
    records = read_records(folder)
    if not records:
        raise InputError(f"--output_dir {folder}: has no finished tunings")
    config, settings = folder / "config.json", ""
    if os.path.lexists(config):
        read_config(str(config), GymSettings)
        settings = files.read_bytes(config).decode()
    summary = relative_gain.summarise(list(records.values()), sources=list(records))
    machine = ", ".join(f"{name}: {value}" for name, value in compare.describe_machine().items())
    files.checked_place(folder / "report" / "plots" / "file", folder)
    with compare.report_lock(folder):
        gym_report.write_report(
            folder / "report", summary, title="Priming: relative gains", about=[command, machine, settings]
        )
    for line in gym_report.table_lines(summary):
        say(console, line)
    say(console, f"report: {folder / 'report' / 'report.html'}")
