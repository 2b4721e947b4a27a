"""The loop: steps, logging that does not stall the device, evaluation, checkpoints, early stopping.

The loop knows nothing of tasks or texts: the step, the measurements and the destination of lines are arguments.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.errors import InputError, Preempted
from pats_jax.models.layout import separate_names
from pats_jax.train_state import Batch, Metrics, TrainState
from pats_jax.training.preemption import Preemption

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """When to log, evaluate, save and stop, in optimizer steps; the last step is always logged and evaluated.

    Attributes:
      total_steps: length of the training.
      logging_steps: steps between logged lines.
      eval_steps: steps between evaluations.
      save_steps: steps between checkpoints; a longer run also saves after its last step. With 0, only a run that is
        asked to stop saves.
      save_best: whether to save after every evaluation that is the best so far.
      patience: stop after this many evaluations without a better score; None: never before the last step.
      max_nonfinite_steps: number of steps with a non-finite loss or gradient to skip; one more is an error.
    """

    total_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int = 0
    save_best: bool = False
    patience: int | None = None
    max_nonfinite_steps: int = 0

    @property
    def evaluations(self) -> int:
        """The number of evaluations, unless training stops early."""
        return -(-self.total_steps // self.eval_steps)

    def logs_at(self, step: int) -> bool:
        """Whether a line is logged after this step (counted from 1)."""
        return step % self.logging_steps == 0 or step == self.total_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after this step (counted from 1)."""
        return step % self.eval_steps == 0 or step == self.total_steps

    def saves_at(self, step: int, ended: bool) -> bool:
        """Whether a checkpoint is saved after this step (counted from 1), with which training may have ended."""
        return self.save_steps > 0 and (step % self.save_steps == 0 or (ended and step > self.save_steps))


@dataclasses.dataclass
class Progress:
    """The progress of a run: everything that its future depends on, besides the `TrainState`.

    Attributes:
      step: optimizer steps made.
      records: the logged lines, those of evaluations included.
      pending: metrics of the steps since the last line, as floats.
      skipped_steps: steps up to the last line that were skipped because something was not finite.
    """

    step: int = 0
    records: list[Record] = dataclasses.field(default_factory=list)
    pending: list[dict[str, float]] = dataclasses.field(default_factory=list)
    skipped_steps: int = 0

    @property
    def evaluations(self) -> list[Record]:
        """The records that have an ``eval``."""
        return [record for record in self.records if "eval" in record]

    def best(self, metric: str) -> Record | None:
        """The first evaluation with the highest score, or None before the first."""
        return max(self.evaluations, key=lambda record: record["eval"][metric], default=None)

    def evaluations_without_gain(self, metric: str) -> int:
        """The number of evaluations since the best one."""
        best = self.best(metric)
        return 0 if best is None else len(self.evaluations) - 1 - self.evaluations.index(best)


class Hooks:
    """Callbacks of the loop; each does nothing unless a subclass overrides it.

    Attributes:
      metric: the score that selects the best evaluation.
      evaluates: whether anything is evaluated.
    """

    metric: str
    evaluates: bool = False

    def before_step(self, step: int, state: TrainState) -> None:
        """Called before a step (counted from 1), which invalidates the state's buffers."""

    def on_step(self, step: int, state: TrainState) -> None:
        """Called when a step is dispatched; the device may still be running it."""

    def describe(self, progress: Progress, state: TrainState) -> dict[str, float]:
        """Additional figures for the next record."""
        return {}

    def on_record(self, record: Record) -> None:
        """Called when a record is logged."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Scores of the parameters. May raise `Preempted`."""
        return {}

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves a checkpoint."""


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[tuple[Batch, dict[str, float]]],
    rhythm: Rhythm,
    hooks: Hooks,
    *,
    progress: Progress | None = None,
    preemption: Preemption | None = None,
) -> tuple[TrainState, Progress]:
    """Trains up to ``rhythm.total_steps`` steps, or until early stopping.

    The device runs asynchronously: metrics are fetched only at logging steps and checkpoints.

    Args:
      state: the state to start from; train_step may donate its buffers.
      train_step: a compiled step.
      batches: pairs of a batch and its counts, starting after ``progress.step``; the counts are real ``examples`` and
        ``tokens``, and ``computed_tokens``.
      rhythm: when to log, evaluate and save.
      hooks: what to do then.
      progress: the progress of a resumed run; changed in place.
      preemption: says whether the run is asked to stop.

    Returns:
      The state and the progress after the last step.

    Raises:
      InputError: if more steps than allowed were not finite.
      Preempted: if the run was asked to stop; it has been saved.
    """
    loop = _Loop(state, rhythm, hooks, Progress() if progress is None else progress)
    run_to_end(loop, lambda: loop.step(train_step, batches), preemption)
    return loop.state, loop.progress


class Steps(Protocol):
    """What `run_to_end` asks of a loop, between two steps."""

    progress: Any  # with the number of the last ``step``

    def evaluate(self) -> None:
        """Evaluates after the last step, if that is due."""

    def has_ended(self) -> bool:
        """Whether no step is left; logs and saves what is due."""

    def save(self) -> None:
        """Saves a checkpoint of the last step, unless there is one."""


def run_to_end(loop: Steps, make_step: Callable[[], None], preemption: Preemption | None) -> None:
    """Makes steps until a loop has ended.

    Args:
      loop: the loop.
      make_step: makes its next step.
      preemption: says whether the run is asked to stop.

    Raises:
      Preempted: if the run was asked to stop; it has been saved.
    """
    while True:
        try:
            loop.evaluate()
            if loop.has_ended():
                return
            if preemption is not None and preemption.arrived(loop.progress.step):
                raise Preempted("asked to stop", preemption.signal_number or 0)
        except Preempted:
            loop.save()
            raise
        make_step()


class _Loop:
    """The state of `fit` between two steps."""

    def __init__(self, state, rhythm, hooks, progress):
        self.state, self.progress = state, progress
        self._rhythm, self._hooks, self._clock = rhythm, hooks, Clock()
        self._fetched = list(progress.pending)  # of the steps since the last line, those that are on the host ...
        self._pending: list[Record] = []  # ... and those that may still be on the device
        self._saved_at = progress.step

    def step(self, train_step, batches):
        """Makes a step, and logs a line if one is due."""
        with self._clock.waiting_for_data():
            batch, counts = next(batches)
        self._hooks.before_step(self.progress.step + 1, self.state)
        self.state, metrics = train_step(self.state, batch)
        self.progress.step += 1
        self._pending.append({**metrics, **counts})
        self._clock.count(counts)
        self._hooks.on_step(self.progress.step, self.state)
        if self._rhythm.logs_at(self.progress.step):
            self._log()

    def evaluate(self):
        """Evaluates after the last step, if that is due and not done."""
        step, progress = self.progress.step, self.progress
        if not (self._hooks.evaluates and step and self._rhythm.evaluates_at(step)) or was_evaluated(progress):
            return
        self._fetch()  # so that the pause is that of the evaluation alone
        with self._clock.paused():
            scores = self._hooks.evaluate(self.state)
        progress.records.append({"step": step, "eval": scores})
        self._hooks.on_record(progress.records[-1])

    def has_ended(self):
        """Whether training has ended; if so, logs what is left, and saves if that is due."""
        progress, rhythm, metric = self.progress, self._rhythm, self._hooks.metric
        ended = progress.step >= rhythm.total_steps or is_out_of_patience(progress, rhythm, metric)
        if ended and (self._fetched or self._pending):
            self._log()
        if _is_to_be_saved(progress, rhythm, metric, ended):
            self.save()
        return ended

    def save(self):
        """Saves a checkpoint of the last step, unless there is one."""
        if self.progress.step > self._saved_at:
            self._fetch()
            self.progress.pending = list(self._fetched)
            self._hooks.save(self.state, self.progress)
            self._saved_at = self.progress.step

    def _log(self):
        progress = self.progress
        self._fetch()
        record = summarise(self._fetched, progress)
        if progress.skipped_steps > self._rhythm.max_nonfinite_steps:
            raise InputError(divergence(progress, self.state.params))
        record |= self._hooks.describe(progress, self.state) | {"timing": self._clock.lap()}
        progress.records.append(record)
        progress.pending = []
        self._fetched.clear()
        self._hooks.on_record(record)

    def _fetch(self):
        _fetch(self._fetched, self._pending)


def predict_logits(
    predict_step: Callable[[Any, Batch], jax.Array], params: Any, batches: Iterator[tuple[np.ndarray, Batch]], rows: int
) -> np.ndarray:
    """Logits of all rows, in order.

    Args:
      predict_step: a compiled step that returns logits (batch, num_labels).
      params: the model's parameters.
      batches: pairs of row numbers, (n,), and a batch whose first n rows are these; the rest is filler.
      rows: total number of rows.

    Returns:
      The logits, (rows, num_labels) float32.
    """
    parts = [(index, predict_step(params, batch)) for index, batch in batches]
    order = np.concatenate([index for index, _ in parts])
    logits = np.concatenate([np.asarray(part)[: len(index)] for index, part in parts])
    result = np.empty((rows, logits.shape[1]), np.float32)
    result[order] = logits
    return result


class Clock:
    """Counts seconds, seconds of waiting for data, examples and tokens since the last record, without evaluations."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self._started, self._waited, self._examples, self._tokens = time.perf_counter(), 0.0, 0.0, 0.0

    def count(self, counts: dict[str, float]) -> None:
        """Counts a step's examples and tokens."""
        self._examples += counts["examples"]
        self._tokens += counts["tokens"]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what is done meanwhile does not count."""
        since = time.perf_counter()
        yield
        self._started += time.perf_counter() - since

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time of what is done meanwhile counts as waiting, too."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    def lap(self) -> dict[str, float]:
        """As `read`; then counts from 0."""
        found = self.read()
        self._restart()
        return found

    def read(self) -> dict[str, float]:
        """What a record's ``timing`` holds."""
        seconds = time.perf_counter() - self._started
        rates = {"examples_per_second": self._examples / seconds, "tokens_per_second": self._tokens / seconds}
        return {"seconds": seconds, "data_wait_seconds": self._waited, **rates}


def _fetch(fetched, pending):
    """Moves the metrics of all dispatched steps to the host."""
    fetched.extend({name: float(value) for name, value in step.items()} for step in jax.device_get(pending))
    pending.clear()


def summarise(steps: list[dict[str, float]], progress: Progress) -> Record:
    """Makes a record: means over the steps that were not skipped, share of padding, number of skipped steps."""
    kept = [step for step in steps if not _was_skipped(step)]
    names = [name for name in steps[0] if name not in ("skipped", "examples", "tokens", "computed_tokens")]
    means = {name: float(np.mean([step[name] for step in kept])) for name in names} if kept else {}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}  # JSON has no other numbers
    padding = 1 - sum(step["tokens"] for step in steps) / sum(step["computed_tokens"] for step in steps)
    progress.skipped_steps += len(steps) - len(kept)
    return {"step": progress.step, **means, "padding_share": padding, "skipped_steps": progress.skipped_steps}


def _was_skipped(step):
    return step["skipped"] == 1 if "skipped" in step else not math.isfinite(step["loss"])


def divergence(progress: Progress, params: Any) -> str:
    """The message when training has diverged, with the parameters that it has come to."""
    sizes: list[tuple[str, jax.Array]] = []
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        names = separate_names(path, p)
        within = None if len(names) == 1 else tuple(range(1, p.ndim))
        sizes += zip(names, jnp.atleast_1d(jnp.max(jnp.abs(p), axis=within, initial=0.0)), strict=True)
    named = [(float(x), name) for name, x in sizes]
    size, name = max(named, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
    return (
        f"training stopped at step {progress.step}: loss or gradient was not finite in {progress.skipped_steps} steps, "
        f"more than max_nonfinite_steps; the largest parameter is in {name} ({size:.3g}); lower learning_rate"
    )


def was_evaluated(progress: Progress) -> bool:
    """Whether there is an evaluation after the last step."""
    return any(record["step"] == progress.step for record in progress.evaluations)


def _is_to_be_saved(progress, rhythm, metric, ended):
    best = progress.best(metric) if rhythm.save_best else None
    is_best = best is not None and best["step"] == progress.step
    return is_best or rhythm.saves_at(progress.step, ended)


def is_out_of_patience(progress: Progress, rhythm: Rhythm, metric: str) -> bool:
    """Whether training stops because there was no better score for long enough."""
    return rhythm.patience is not None and progress.evaluations_without_gain(metric) >= rhythm.patience
