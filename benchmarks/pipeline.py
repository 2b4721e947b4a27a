"""Subject `pipeline`: from texts to the device, what padding costs, and whether the device ever waits for data."""

import collections
import dataclasses
import functools
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import cases, report
from benchmarks.turns import take_turns
from pats_jax import glue, models
from pats_jax.data import batches
from pats_jax.run.settings import Settings
from pats_jax.training import fine_tuning, runners
from pats_jax.training.loop import Hooks, Rhythm, fit
from pats_jax.training.table import TableSource


@dataclasses.dataclass(frozen=True)
class Pipeline(report.Subject):
    """Rows a second of tokenising, batching and copying; padding; an epoch bucketed and padded; waiting for data."""

    data_dir: str | None = None  # folder of GLUE's TSV files; none: the built-in data
    model: str = "minilm"  # minilm, or a folder, hub id or package of a checkpoint with a tokenizer
    method: str = "finetune"  # METHOD[:CHANGE...]
    epoch_task: str = "cola"  # whose epoch is measured bucketed and padded
    waiting_task: str = "sst2"  # whose epoch is watched for a device that waits
    waiting_steps: int = 60  # steps that are watched
    batch_size: int = 32  # rows
    max_seq_length: int = 128  # tokens that the padded side has in every row
    rounds: int = 6  # timed steps of each length, and repetitions of the rest
    whole_epoch: bool = False  # also run both epochs to their end

    def run(self) -> report.Results:
        results = report.Results()
        epoch = self._prepare(self.epoch_task)
        self._throughput(epoch, results)
        self._padding(epoch, results)
        self._waiting(self._prepare(self.waiting_task), results)
        return results

    def _prepare(self, task_name: str) -> "Prepared":
        name = cases.PACKAGES.get(self.model, self.model)
        settings = cases.settings_of(
            self.method,
            data_dir=self.data_dir or "builtin",
            model_name_or_path=name,
            max_seq_length=self.max_seq_length,
            per_device_train_batch_size=self.batch_size,
        )
        settings = settings.replace(task_name=task_name)
        return Prepared(settings)

    def _throughput(self, prepared: "Prepared", results: report.Results) -> None:
        side, rows = prepared.side(), len(prepared.split)
        source, plan = side.source, side.source.plan
        made = [next_batch for next_batch, _ in itertools.islice(source.batches(0), len(plan))]
        stages: dict[str, Callable[[], Any]] = {
            "tokenise": lambda: batches.tokenize(prepared.split, prepared.tokenizer, self.max_seq_length),
            "batch": lambda: [batch for batch, _ in itertools.islice(source.batches(0), len(plan))],
            "host to device": lambda: [side.training.runner.put(batch) for batch in made],
        }
        turns = take_turns(stages, self.rounds)
        table = report.table(f"{self.epoch_task}, {rows} rows", "stage", "rows/s", "microseconds/step")
        for name in stages:
            seconds = turns.median(name)
            results.measured[name] = {"rows_per_second": rows / seconds, "seconds": turns.seconds[name]}
            table.add_row(name, f"{rows / seconds:.0f}", f"{1e6 * seconds / len(plan):.0f}")
        results.tables.append(table)

    def _padding(self, prepared: "Prepared", results: report.Results) -> None:
        sides = {"bucketed": prepared.side(), "padded": prepared.side(self.max_seq_length)}
        counts = {name: collections.Counter(length for _, length in side.source.plan) for name, side in sides.items()}
        lengths = sorted(counts["bucketed"] | counts["padded"])
        run = step_by_length(sides["padded"])
        turns = take_turns({str(length): functools.partial(run, length) for length in lengths}, self.rounds)
        table = report.table(f"An epoch of {self.epoch_task}", "", "padding", "seconds, from its steps", "seconds, run")
        for name, side in sides.items():
            parts = [number * np.array(turns.seconds[str(length)]) for length, number in counts[name].items()]
            planned = np.sum(parts, axis=0).tolist()
            figures: dict[str, Any] = {"padding_share": padding_share(side), "epoch_seconds": planned}
            figures["median_epoch_seconds"] = statistics.median(planned)
            figures["steps_by_length"] = dict(sorted(counts[name].items()))
            if self.whole_epoch:
                figures["whole_epoch_seconds"] = run_epoch(side, len(side.source.plan))[0]
            results.measured[f"{self.epoch_task} {name}"] = figures
            whole = f"{figures['whole_epoch_seconds']:.1f}" if self.whole_epoch else "-"
            shown = (f"{figures['padding_share']:.1%}", f"{figures['median_epoch_seconds']:.1f}", whole)
            table.add_row(name, *shown)
        pairs = (results.measured[f"{self.epoch_task} {name}"]["epoch_seconds"] for name in sides)
        ratio = statistics.median(short / long for short, long in zip(*pairs, strict=True))
        results.ratios[f"{self.epoch_task} epoch bucketed / padded"] = ratio
        table.add_row("bucketed / padded", "", f"{ratio:.3f}", "")
        results.tables.append(table)

    def _waiting(self, prepared: "Prepared", results: report.Results) -> None:
        side = prepared.side()
        run_epoch(side, self.waiting_steps, warm_up=True)
        seconds, waited = run_epoch(side, self.waiting_steps)
        figures = {"steps": self.waiting_steps, "seconds": seconds, "waiting_seconds": waited}
        figures["waiting_share"] = waited / seconds
        results.measured[f"{self.waiting_task} waiting"] = figures
        table = report.table(f"Device idle, {self.waiting_task}", "steps", "seconds", "of them idle", "share")
        table.add_row(str(self.waiting_steps), f"{seconds:.2f}", f"{waited:.4f}", f"{waited / seconds:.2%}")
        results.tables.append(table)


class Prepared:
    """A task's training rows, tokenised, and a model for it."""

    def __init__(self, settings: Settings):
        self.runner = runners.make_runner()
        self.settings = settings.over(self.runner.num_devices)
        self.task, splits = glue.load_data(self.settings)
        self.split = splits["train"]
        self.tokenizer = models.load_tokenizer(settings.model.model_name_or_path)
        layers, unroll = runners.default_form(self.runner.platform)
        self.model, params, _ = models.from_pretrained(
            settings.model.model_name_or_path,
            num_labels=self.task.num_labels,
            regression=self.task.is_regression,
            layers=layers,
            unroll=unroll,
        )
        self.params = jax.device_get(params)
        self.tokens = batches.tokenize(self.split, self.tokenizer, settings.model.max_seq_length)

    def side(self, padded_to: int | None = None) -> "Side":
        """The GLUE program's training of it, bucketed, or with every row padded to one length."""
        training, source = glue.make_training(
            self.settings, self.runner, self.task, self.split, self.tokens, self.model, self.params
        )
        if padded_to:
            source = source.with_boundaries([padded_to])
        return Side(training, source, training.create_state(), self.tokens, self.split.labels)


@dataclasses.dataclass
class Side:
    """A training and where it is."""

    training: fine_tuning.Training
    source: TableSource
    state: Any
    tokens: batches.Tokens
    labels: np.ndarray


def step_by_length(side: Side) -> Callable[[int], Any]:
    """A function that makes one step on a batch of real rows padded to a length."""

    @functools.cache
    def batch(length):
        lengths, size = side.tokens.lengths, side.source.batch_size
        rows = np.flatnonzero(lengths <= length)
        rows = rows[np.argsort(lengths[rows])][-size:]
        return batches.fill_batch(side.tokens, side.labels, rows, size, length)

    def run(length):
        side.state, metrics = side.training.step(side.state, batch(length))
        return metrics

    return run


def padding_share(side: Side) -> float:
    """Share of the computed tokens of an epoch that are padding or filler."""
    computed = sum(side.source.batch_size * length for _, length in side.source.plan)
    return 1 - int(side.tokens.lengths.sum()) / computed


def run_epoch(side: Side, steps: int, warm_up: bool = False) -> tuple[float, float]:
    """Trains by the program's own loop, without evaluation.

    Args:
      side: its state moves on.
      steps: how many.
      warm_up: whether only one step of each shape is made, so that all is compiled.

    Returns:
      Seconds, and those of them in which the device had nothing to do between two steps.
    """
    training, source = side.training, side.source.batches(0)
    if warm_up:
        source = one_of_each_shape(itertools.islice(source, steps))
        steps = len({length for _, length in side.source.plan[:steps]})
    watched = Watched(training.step)
    rhythm = Rhythm(total_steps=steps, logging_steps=training.settings.loop.logging_steps, eval_steps=steps)
    started = time.perf_counter()
    side.state, _ = fit(side.state, watched, source, rhythm, _Silent())
    jax.block_until_ready(side.state)
    seconds = time.perf_counter() - started
    return seconds, watched.waiting_seconds()


def one_of_each_shape(source: Iterator[Any]) -> Iterator[Any]:
    """The first batch of each shape."""
    seen = set()
    for batch, counts in source:
        shape = batch["input_ids"].shape
        if shape not in seen:
            seen.add(shape)
            yield batch, counts


class _Silent(Hooks):
    """Nothing but the steps and their log."""

    metric = "none"


class Watched:
    """A training step, and when each call of it was given to the device and was done."""

    def __init__(self, step: Callable[..., Any]):
        self._step, self._given, self._done = step, [], []
        self._results: queue.Queue = queue.Queue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __call__(self, state: Any, batch: Any) -> Any:
        self._given.append(time.perf_counter())
        state, metrics = self._step(state, batch)
        self._results.put(metrics["loss"])
        return state, metrics

    def waiting_seconds(self) -> float:
        """Seconds between the end of a step and the call for the next one."""
        self._results.put(None)
        self._watcher.join()
        return sum(max(0.0, given - done) for given, done in zip(self._given[1:], self._done, strict=False))

    def _watch(self):
        while (result := self._results.get()) is not None:
            jax.block_until_ready(result)
            self._done.append(time.perf_counter())
