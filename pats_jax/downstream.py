"""Few-shot tuning on the target tasks of a gym, from primed and unprimed starts: `pats-jax gym`.

A tuning trains one start's PE modules (or the whole model) on the 16 rows of one sample of one task, keeps what does
best on its dev rows and scores that on the test rows. Each leaves a record, ``tunings/ARM/TASK-SAMPLE.json``, and is
never made again; the report is on all records of the folder.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from pats_jax import (
    compare,
    gym_report,
    methods,
    metrics,
    models,
    option_scoring,
    pe_modules,
    preemption,
    relative_gain,
    run_folder,
    run_start,
)
from pats_jax.console import say
from pats_jax.data import load_gym, load_partition
from pats_jax.data.few_shot import FewShotTask, Row, Sample
from pats_jax.data.gym import SHOTS
from pats_jax.data.partitions import source_set
from pats_jax.errors import InputError, Preempted
from pats_jax.settings import TrainingSettings, read_config
from pats_jax.train_state import TrainState, make_train_step
from pats_jax.upstream import PrimingSettings

# By what is tuned: usual values, not searched for.
LEARNING_RATES = {
    "full": 5e-5,
    "lora": 1e-3,
    "adapters": 1e-3,
    "bitfit": 1e-3,
    "ia3": 1e-2,
    "prompt": 1e-2,
    "prefix": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class GymSettings(TrainingSettings):
    """Tune on few-shot tasks from primed and unprimed starts, and report what priming gains."""

    max_seq_length: int = 64  # tokens of an input; longer ones are cut
    max_steps: int = 100  # steps of a tuning
    eval_steps: int | None = 25  # steps between scores on the dev rows, of which the best is kept
    per_device_train_batch_size: int = 8  # rows of a step
    per_device_eval_batch_size: int = 32  # rows
    data_dir: str = "builtin"  # folder of few-shot tasks, or "builtin" for generated ones
    partition: str = "builtin"  # builtin, metaicl or a JSON file; its test list are the target tasks
    share_sources: bool = False  # take a partition with tasks of two lists that are built on the same source set
    shots: int = SHOTS  # the number in the files' names
    primed: tuple[str, ...] = ()  # folders of finished runs of `pats-jax prime`
    kinds: tuple[Literal["full", "lora", "bitfit", "ia3", "adapters", "prompt", "prefix"], ...] = (
        "full",
        "lora",
    )  # what is tuned; full, the whole model, is a baseline and never primed
    direct: bool = True  # tune from the unprimed model, too
    tasks: tuple[str, ...] = ()  # target tasks; none: the partition's
    samples: tuple[int, ...] = ()  # seeds of the few-shot samples; none: all
    head: Literal["embedding", "pair", "mlm", "classes"] = "embedding"  # how options are scored
    grid: tuple[str, ...] = ()  # learning rates by kind, as lora=3e-4,1e-3; the best on dev is kept; none: one each
    max_test_rows: int | None = None  # of a task, drawn once at random; none: all
    jobs: int = 1  # processes, which share the cores and the tunings
    share: str = "1/1"  # do the i-th of n equal shares of the tunings only, as 2/3, and no report; for several machines
    report_only: bool = False  # tune nothing: report on the records of the folder

    def check(self) -> None:
        super().check()
        for name, holds, expected in (
            ("max_steps", self.max_steps >= 1, "at least 1"),
            ("jobs", self.jobs >= 1, "at least 1"),
            ("kinds", len(set(self.kinds)) == len(self.kinds) > 0, "different kinds, one at least"),
            ("max_test_rows", self.max_test_rows is None or self.max_test_rows >= 1, "at least 1"),
        ):
            if not holds:
                raise InputError(f"--{name} {getattr(self, name)}: must be {expected}")
        for name in ("overwrite", "resume"):
            if getattr(self, name):
                raise InputError(f"--{name}: finished tunings are kept, and the same command makes the others")
        if self.peft:
            raise InputError("--peft: use --kinds")
        for names, instead in _NOT_HERE.items():
            for name in names.split():
                if getattr(self, name) != getattr(GymSettings, name):
                    raise InputError(f"--{name}: {instead}")
        if not (self.direct or self.primed or self.report_only):
            raise InputError("--no_direct: nothing is left to tune; give --primed")
        if not self.output_dir:
            raise InputError("--output_dir is missing")
        parse_share(self.share)
        for name in self.method.split("+"):
            method = methods.get_methods(name)[0]
            if method.objective or method.trainable or method.start:
                raise InputError(f"--method {name}: needs the GLUE program; here it must be a change of the optimizer")
        self.learning_rates("full")

    def learning_rates(self, kind: str) -> tuple[float, ...]:
        """The learning rates that are tried for what is tuned.

        Raises:
          InputError: ``--grid`` is written otherwise than as KIND=RATE,RATE.
        """
        rates: dict[str, tuple[float, ...]] = {name: (rate,) for name, rate in LEARNING_RATES.items()}
        for text in self.grid:
            name, _, values = text.partition("=")
            try:
                own = tuple(float(value) for value in values.split(","))
            except ValueError:
                own = ()
            if name not in rates or not own or not all(0 < rate < math.inf for rate in own):
                raise InputError(f"--grid {text}: write KIND=RATE,RATE with a kind of {', '.join(rates)}")
            rates[name] = own
        return rates[kind]


# Flags of all trainings that no tuning reads -> what there is in their place.
_NOT_HERE = {
    "learning_rate": "use --grid, which has the learning rates by kind",
    "train_batch_size gradient_accumulation_steps": "a step takes one batch of --per_device_train_batch_size rows",
    "early_stopping_patience load_best_model_at_end": "a tuning makes all its steps, and keeps what is best on dev",
    "fsdp coordinator_address num_processes process_id": "a tuning runs on one device; use --jobs or --share",
}

# What may differ between starts of one folder: it does not change any tuning (`check_records` sees to the grid and the
# primed runs).
_FREE = frozenset(
    "output_dir primed kinds direct tasks samples jobs share report_only grid learning_rate per_device_eval_batch_size "
    "compilation_cache_dir num_devices parallel".split()
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a tuning starts, and what it trains.

    Attributes:
      algorithm: of the upstream stage, "direct" without one.
      trained: what that trained, None without one.
      seed: the stage's, None without one.
      model: name or folder of the encoder.
      adapter: folder of primed PE modules; None: new ones.
      base: name or folder of the model with the masked-language-model head, if any.
      kind: what is tuned: a PE kind, or "full".
      digest: of the stage's results, which tells its runs apart; None without one.
    """

    algorithm: str
    trained: str | None
    seed: int | None
    model: str
    adapter: str | None
    base: str
    kind: str
    digest: str | None = None

    @property
    def name(self) -> str:
        """``direct-lora``, ``mtl-plm-seed1-lora``; names a folder of records."""
        stage = "direct" if self.trained is None else f"{self.algorithm}-{self.trained}-seed{self.seed}"
        return f"{stage}-{self.kind}"


def run(settings: GymSettings, args: Sequence[str], console: rich.console.Console) -> None:
    """Makes the tunings that are not there yet, and writes the report.

    Args:
      settings: what to do; ``check`` is called first.
      args: the command line, for the processes of ``--jobs`` and the report.
      console: where scores and tables go.

    Raises:
      InputError: on wrong input, mostly before anything is tuned; what is finished is kept.
      Preempted: the program was asked to end; what is finished is kept.
    """
    settings.check()
    folder = pathlib.Path(str(settings.output_dir))
    if not settings.report_only:
        gym = load_gym(settings.data_dir, shots=settings.shots)
        partition = load_partition(settings.partition, gym, share_sources=settings.share_sources)
        names = tuple(dict.fromkeys(settings.tasks)) or partition.test
        missing = [name for name in names if name not in partition.test]
        if missing:
            raise InputError(f"--tasks {missing[0]}: not among the target tasks {', '.join(partition.test)}")
        tasks = [gym[name] for name in names]
        option_scoring.check_tasks(settings.head, tasks)
        starts = find_starts(settings, names)
        check_records(settings, starts, tasks, folder)
        open_folder(folder, settings)
        if settings.jobs > 1:
            run_jobs(settings, args)
        else:
            try:
                with preemption.watch() as asked:
                    tune_all(settings, starts, tasks, folder, console, asked)
            except Preempted as error:
                raise Preempted("interrupted; the same command goes on", error.signal_number) from None
    if settings.report_only or settings.share == "1/1":
        report(folder, console, f"pats-jax gym {shlex.join(args)}")


def find_starts(settings: GymSettings, tasks: Sequence[str]) -> list[Start]:
    """The starts of the settings: the unprimed model by kind, then every primed one by the kinds that it goes with.

    Args:
      settings: name them.
      tasks: the target tasks.

    Raises:
      InputError: a folder is no finished run of `pats-jax prime`, of another model or head, has learnt a target task,
        or holds PE modules of no kind asked or of other sizes; two folders are of the same stage.
    """
    model = settings.model_name_or_path
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
                    raise InputError(f"--primed {name}: {start.name} is {folders[start.name]} already; keep one")
                starts.append(start)
    return list(dict.fromkeys(starts))


def _read_primed(name, settings, tasks):
    """The results of a folder that tunings of these settings may start from."""
    folder, where = pathlib.Path(name), f"--primed {name}"
    results = run_folder.read_results(folder)
    if results is None:
        raise InputError(f"{where}: no results.json there; give the folder of a finished pats-jax prime")
    if "algorithm" not in results:
        raise InputError(f"{where}: not a run of pats-jax prime")
    if results["head"] != settings.head:
        raise InputError(f"{where}: was primed with --head {results['head']}, not {settings.head}")
    base, model = results["model_name_or_path"], settings.model_name_or_path
    if base != model and pathlib.Path(base).absolute() != pathlib.Path(model).absolute():
        raise InputError(f"{where}: was primed from {base}, not from --model_name_or_path {model}")
    learnt = {task for task in results["upstream_tasks"] if task in tasks}
    if not settings.share_sources:
        learnt |= {task for task in results["upstream_tasks"] if source_set(task) in map(source_set, tasks)}
    if learnt:
        raise InputError(f"{where}: has learnt {min(learnt)}, which is a target task or built on the sources of one")
    kind = results["peft"]
    if kind is None and set(settings.kinds) == {"full"}:
        raise InputError(f"{where}: full tuning is never primed; put a PE kind among --kinds")
    if kind is not None and kind not in settings.kinds:
        raise InputError(f"{where}: holds {kind} modules; put {kind} among --kinds")
    if kind is not None:
        theirs = pe_modules.chosen_config(read_config(str(folder / "config.json"), PrimingSettings))
        ours = pe_modules.chosen_config(_with_peft(settings, kind))
        if ours != theirs:
            raise InputError(f"{where}: holds {theirs}, and other tunings would have {ours}")
    return results


def open_folder(folder: pathlib.Path, settings: GymSettings) -> None:
    """Makes the folder and its config.json, or holds the one that is there against the settings.

    Raises:
      InputError: its tunings were made with other settings.
    """
    path, made = folder / "config.json", folder / "config.json.new"
    ours = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    ours = json.loads(json.dumps(ours))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in ours if ours[name] != theirs.get(name)]
        if differing:
            changes = ", ".join(f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in differing)
            raise InputError(f"--output_dir {folder}: holds tunings with other settings: {changes}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        made.replace(path)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None


def check_records(
    settings: GymSettings, starts: Sequence[Start], tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> None:
    """Raises InputError if a tuning that is there already has tried other learning rates or had another start."""
    for start in starts:
        rates = list(settings.learning_rates(start.kind))
        for _, _, path in places(settings, start, tasks, folder):
            record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            tried, digest = record.get("learning_rates") or rates, record.get("upstream_digest") or start.digest
            if tried != rates:
                raise InputError(
                    f"--grid: {path} has tried {', '.join(map(str, tried))}, not {', '.join(map(str, rates))}; "
                    "give the same grid or another --output_dir"
                )
            if digest != start.digest:
                raise InputError(
                    f"--primed: {path} started from another run of that stage; give that run or another --output_dir"
                )


def _digest(results):
    """Of a finished run: no other has its results, times included."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def places(
    settings: GymSettings, start: Start, tasks: Sequence[FewShotTask], folder: pathlib.Path
) -> list[tuple[FewShotTask, Sample, pathlib.Path]]:
    """The tunings of a start: task, sample and the file of the record.

    Raises:
      InputError: a task lacks a sample that is asked for.
    """
    samples = [(task, sample) for task in tasks for sample in task.choose(settings.samples or None).samples]
    records = folder / "tunings" / start.name
    return [(task, sample, records / f"{task.name}-{sample.seed}.json") for task, sample in samples]


def parse_share(text: str) -> tuple[int, int]:
    """``2/3`` as (2, 3).

    Raises:
      InputError: it is written otherwise.
    """
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--share {text}: write I/N with 1 <= I <= N")
    return int(first), int(last)


# many processes


def run_jobs(settings: GymSettings, args: Sequence[str]) -> None:
    """Runs the same command in processes of one share each, and waits.

    Raises:
      InputError: one of them failed; its last line says why.
      Preempted: this process was asked to end; they have been asked, too.
    """
    folder, first, last = pathlib.Path(str(settings.output_dir)), *parse_share(settings.share)
    command = [sys.executable, "-m", "pats_jax.cli", "gym", *args, "--jobs", "1", "--share"]
    logs = [folder / f"job{number + 1}.log" for number in range(settings.jobs)]
    processes: list[subprocess.Popen] = []
    failed: list[int] = []
    with compare.note_signals() as asked:
        try:
            for number, cores in enumerate(compare.shares_of_cores(settings.jobs)):
                share = f"{(first - 1) * settings.jobs + number + 1}/{last * settings.jobs}"
                with logs[number].open("wb") as output:
                    process = subprocess.Popen([*command, share], stdout=output, stderr=output, process_group=0)
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
        raise Preempted("interrupted; the same command goes on", asked.signal_number)
    for number in failed:  # the others have been told to end
        text = logs[number].read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
        raise InputError(f"{logs[number]}: {text.splitlines()[-1].removeprefix('pats-jax: error: ')}")


# one process


def tune_all(
    settings: GymSettings,
    starts: Iterable[Start],
    tasks: Sequence[FewShotTask],
    folder: pathlib.Path,
    console: rich.console.Console,
    asked: preemption.Preemption,
) -> None:
    """Makes this process's share of the tunings that are not there yet, start by start."""
    run_start.keep_compiled_programs(settings.compilation_cache_dir or str(folder / "compiled"))
    number, count = parse_share(settings.share)
    tokenizer = None
    for start in starts:
        own = places(settings, start, tasks, folder)[number - 1 :: count]
        wanted = [(task, sample, path) for task, sample, path in own if not path.exists()]
        if not wanted:
            continue
        tokenizer = tokenizer or models.load_tokenizer(settings.model_name_or_path)
        tuner = Tuner(settings, start, tokenizer)
        for task, sample, path in wanted:
            asked.check()
            record = tuner.tune(task, sample, asked)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = path.with_suffix(".new")
            made.write_text(json.dumps(record) + "\n", encoding="utf-8")
            made.replace(path)
            text = f"{start.name} {task.name}-{sample.seed}: dev {record['dev']:.3f} test {record['test']:.3f}"
            lost = "".join(f", no finite loss at {rate}" for rate in record["diverged"])
            say(console, f"{text} ({record['seconds']:.0f} s){lost}")


class Tuner:
    """Tunes one start on any task and sample: model, optimizers and compiled programs are the same for all."""

    def __init__(self, settings: GymSettings, start: Start, tokenizer: Any):
        """Loads the start.

        Args:
          settings: of all tunings.
          start: where they start and what they train.
          tokenizer: the model's.

        Raises:
          InputError: its files are not there or do not fit together.
        """
        self._settings, self._start, self._tokenizer = settings, start, tokenizer
        self._head = option_scoring.get_head(settings.head)
        self._model, self._params = load_start(settings, start)
        self._max_length = option_scoring.text_length(settings.max_seq_length, self._model)
        if start.kind != "full":
            pe_modules.check_methods(_with_peft(settings, start.kind), self._params)
        part = "plm" if start.kind == "full" else "pe"
        self._trainable = option_scoring.trainable_mask(self._params, part, settings.head)
        trained = jax.tree.map(lambda keep, p: p if keep else None, self._trainable, self._params)
        loss_fn = option_scoring.make_option_loss(self._head, self._model)
        self._step = jax.jit(make_train_step(loss_fn))
        self._scores = jax.jit(functools.partial(option_scoring.option_scores, self._head, self._model))
        self._optimizers = {
            rate: methods.make_optimizer(dataclasses.replace(settings, learning_rate=rate), settings.max_steps, trained)
            for rate in settings.learning_rates(start.kind)
        }

    def tune(self, task: FewShotTask, sample: Sample, asked: preemption.Preemption) -> dict[str, Any]:
        """The record of a tuning, as `relative_gain.summarise` takes it."""
        since = time.perf_counter()
        shapes = self._shapes(task)
        tried = [self._tune(rate, task, sample, shapes, asked) for rate in self._optimizers]
        best = max(tried, key=lambda one: one["place"])
        diverged = [one["learning_rate"] for one in tried if one["diverged"]]
        rows = self._test_rows(task, sample)
        chosen = option_scoring.choose(
            self._scores,
            self._head,
            best.pop("params"),
            rows,
            self._tokenizer,
            self._max_length,
            self._settings.per_device_eval_batch_size,
            share_options=task.options is not None,
        )
        start = self._start
        return {
            "algorithm": start.algorithm,
            "trained": start.trained,
            "upstream_seed": start.seed,
            "upstream_digest": start.digest,
            "peft": start.kind,
            "task": task.name,
            "sample": sample.seed,
            "metric": task.metric,
            "chance": chance(task),
            "learning_rates": list(self._optimizers),
            "diverged": diverged,
            **{name: best[name] for name in ("learning_rate", "curve", "step", "dev")},
            "test": metrics.METRICS[task.metric](chosen, np.array([row.answer for row in rows])),
            "test_rows": len(rows),
            "seconds": time.perf_counter() - since,
        }

    def _tune(self, rate, task, sample, shapes, asked):
        """One learning rate: the curve on the dev rows and what does best there.

        Of equal scores that with the lower loss on the dev rows is kept, for 16 rows have many ties (ours). A rate
        whose loss is not finite any more ends there, with what did best before (ours).
        """
        settings = self._settings
        state = TrainState.create(
            apply_fn=self._model.apply,
            params=self._params,
            tx=self._optimizers[rate],
            key=settings.seed,
            trainable=self._trainable,
        )
        dev = self._encode(task, sample.dev, shapes)
        answers = np.array([row.answer for row in sample.dev])
        steps, scores, best, diverged = [], [], None, False
        for step, rows in enumerate(self._batches(task, sample)):
            if step % (settings.eval_steps or settings.max_steps) == 0 or step == settings.max_steps:
                asked.check()
                found = np.asarray(self._scores(state.all_params, dev))
                loss = float(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(found), answers).mean())
                diverged = not math.isfinite(loss)
                if diverged:
                    break
                score = metrics.METRICS[task.metric](np.argmax(found, axis=1), answers)
                steps.append(step)
                scores.append(score)
                if best is None or (score, -loss) > best["place"]:
                    best = {"place": (score, -loss), "params": state.all_params, "step": step, "dev": score}
            if step < settings.max_steps:
                state, _ = self._step(state, self._encode(task, rows, shapes))
        if best is None:
            raise InputError(f"{task.name}: the loss of {self._start.name} is not finite before any step")
        return best | {"learning_rate": rate, "diverged": diverged, "curve": {"step": steps, "dev": scores}}

    def _batches(self, task, sample) -> Iterator[list[Row]]:
        """The rows of every step and one more, epoch by epoch in an order of the seed, the task and the sample."""
        settings = self._settings
        rng = np.random.default_rng([settings.seed, zlib.crc32(task.name.encode()), sample.seed])
        size, order = min(settings.per_device_train_batch_size, len(sample.train)), np.array([], np.int64)
        for _ in range(settings.max_steps + 1):
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(len(sample.train))])
            yield [sample.train[index] for index in order[:size]]
            order = order[size:]

    def _encode(self, task, rows, shapes):
        encoded = option_scoring.encode_rows(
            self._head, rows, self._tokenizer, self._max_length, share_options=task.options is not None
        )
        return option_scoring.pad_to(encoded, shapes)

    def _shapes(self, task):
        """The shapes that all rows of the task's samples have room in, without the rows' axis."""
        rows = [row for sample in task.samples for row in (*sample.train, *sample.dev)]
        return option_scoring.row_shapes(self._head, rows, self._tokenizer, self._max_length)

    def _test_rows(self, task, sample):
        most = self._settings.max_test_rows
        if most is None or most >= len(sample.test):
            return sample.test
        rng = np.random.default_rng(zlib.crc32(task.name.encode()))
        return [sample.test[index] for index in sorted(rng.choice(len(sample.test), most, replace=False))]


def load_start(settings: GymSettings, start: Start) -> tuple[Any, Any]:
    """The scorer of a start and its parameters."""
    config, dropout = None, dict[str, Any](methods.dropout_rates(settings, settings.max_steps))
    if start.adapter is None and start.kind != "full":
        config = pe_modules.chosen_config(_with_peft(settings, start.kind))
    return option_scoring.load_scorer(
        start.model,
        settings.head,
        config,
        key=settings.seed,
        adapter=start.adapter,
        mlm_head_from=start.base,
        dtype=settings.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        **dropout,
    )


def _with_peft(settings, kind):
    """The settings of a program that has one kind, for the rooms that read ``--peft``."""
    return dataclasses.replace(settings, peft=kind)


def chance(task: FewShotTask) -> float:
    """The expected score of a guess among the options: 0 for a correlation, else the mean of 1 / options."""
    if task.metric == "matthews_correlation":
        return 0.0
    return float(np.mean([1 / len(row.options) for row in task.samples[0].train]))


def read_records(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of all finished tunings."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("tunings/*/*.json"))]


def report(folder: pathlib.Path, console: rich.console.Console, command: str) -> None:
    """Writes the report on the folder's records, and prints its tables.

    Raises:
      InputError: there are none.
    """
    records = read_records(folder)
    if not records:
        raise InputError(f"--output_dir {folder}: no tuning is finished there")
    summary = relative_gain.summarise(records)
    machine = ", ".join(f"{name}: {value}" for name, value in compare.describe_machine().items())
    settings = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").exists() else ""
    gym_report.write_report(
        folder / "report", summary, title="Priming: relative gains", about=[command, machine, settings]
    )
    for line in gym_report.table_lines(summary):
        say(console, line)
    say(console, f"report in {folder / 'report' / 'report.html'}")
