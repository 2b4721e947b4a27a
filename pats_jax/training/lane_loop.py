"""The loop of a set of lanes: like `loop`, but each lane has its own records, early stop and end.

A lane ends when it runs out of patience or fails. The others continue until all have ended or the last step is made.
A lane records what the same run records alone, except for ``timing``.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pats_jax.errors import InputError
from pats_jax.training.loop import (
    Clock,
    Progress,
    Record,
    Rhythm,
    divergence,
    is_out_of_patience,
    run_to_end,
    summarise,
    was_evaluated,
)
from pats_jax.training.preemption import Preemption

Counts = Sequence[dict[str, float]]  # for each lane those of its batch


@dataclasses.dataclass
class LanesProgress:
    """The progress of a set of lanes: all that its future depends on, besides the arrays.

    Attributes:
      step: steps that the set has made.
      lanes: the progress of each lane; an ended one keeps its last step.
      failures: for each lane why it has failed; None: it has not.
    """

    step: int
    lanes: list[Progress]
    failures: list[str | None]

    @classmethod
    def of(cls, lanes: int) -> "LanesProgress":
        """Before the first step."""
        return cls(0, [Progress() for _ in range(lanes)], [None] * lanes)

    def running(self, rhythm: Rhythm, metric: str) -> list[int]:
        """The numbers of the lanes that have not ended."""
        return [
            lane
            for lane, own in enumerate(self.lanes)
            if self.failures[lane] is None and not is_out_of_patience(own, rhythm, metric)
        ]


class LaneHooks:
    """Callbacks of the loop; each does nothing unless a subclass overrides it.

    Attributes:
      metric: the score that picks the best evaluation.
      evaluates: whether anything is evaluated.
    """

    metric: str
    evaluates: bool = False

    def on_step(self, step: int, state: Any) -> None:
        """Called when a step is dispatched; the devices may still be running it."""

    def describe(self, state: Any) -> list[dict[str, float]]:
        """Additional figures for the next record of each lane."""
        raise NotImplementedError

    def on_record(self, lane: int, record: Record) -> None:
        """Called when a lane logs a record."""

    def evaluate(self, state: Any, lanes: Sequence[int]) -> dict[int, dict[str, float] | InputError]:
        """Scores of these lanes, or why one has none. May raise `Preempted`."""
        raise NotImplementedError

    def keep(self, state: Any, lanes: np.ndarray) -> None:
        """Called when some lanes, bool (lanes,), have their best evaluation so far."""

    def params_of(self, state: Any, lane: int) -> Any:
        """The trained parameters of one lane."""
        raise NotImplementedError

    def save(self, state: Any, progress: LanesProgress) -> None:
        """Saves a checkpoint."""


def fit(
    state: Any,
    train_step: Callable[[Any, np.ndarray, Any], tuple[Any, dict[str, jax.Array]]],
    batches: Iterator[tuple[Any, Counts]],
    rhythm: Rhythm,
    hooks: LaneHooks,
    *,
    progress: LanesProgress,
    preemption: Preemption | None = None,
) -> tuple[Any, LanesProgress]:
    """Trains all lanes up to ``rhythm.total_steps`` steps, or until every lane has ended.

    Args:
      state: where to start; its buffers are given away.
      train_step: ``train_step(state, ended, batch) -> (state, metrics)``, ended bool (lanes,): lanes to leave as they
        are; metrics (lanes,) by name.
      batches: from the step after ``progress.step`` on, see `loop.fit`.
      rhythm: when to log, evaluate and save.
      hooks: what to do then.
      progress: where to start; changed in place.
      preemption: tells that the run is asked to end.

    Returns:
      The state and the progress after the last step.

    Raises:
      Preempted: if the run was asked to end; it has been saved then.
    """
    loop = _Loop(state, rhythm, hooks, progress)
    run_to_end(loop, lambda: loop.step(train_step, batches), preemption)
    return loop.state, loop.progress


class _Loop:
    """The state of `fit` between two steps."""

    def __init__(self, state, rhythm, hooks, progress):
        self.state, self.progress = state, progress
        self._rhythm, self._hooks, self._clock = rhythm, hooks, Clock()
        self._fetched = [list(own.pending) for own in progress.lanes]  # of the steps since a lane's last line
        self._pending: list[tuple[dict[str, jax.Array], Counts]] = []  # may still be on the devices
        self._saved_at = progress.step
        self._running = progress.running(rhythm, hooks.metric)

    def step(self, train_step, batches):
        """Makes a step, and logs if lines are due."""
        with self._clock.waiting_for_data():
            batch, counts = next(batches)
        ended = np.ones(len(self.progress.lanes), bool)
        ended[self._running] = False
        self.state, metrics = train_step(self.state, ended, batch)
        self.progress.step += 1
        for lane in self._running:
            self.progress.lanes[lane].step += 1
            self._clock.count(counts[lane])
        self._pending.append((metrics, counts))
        self._hooks.on_step(self.progress.step, self.state)
        if self._rhythm.logs_at(self.progress.step):
            self._log(self._running, self._clock.lap)

    def evaluate(self):
        """Evaluates after the last step, if that is due and not done."""
        step, lanes = self.progress.step, self.progress.lanes
        due = [lane for lane in self._running if not was_evaluated(lanes[lane])]
        if not (self._hooks.evaluates and step and self._rhythm.evaluates_at(step) and due):
            return
        self._fetch()  # so that the pause is that of the evaluation alone
        with self._clock.paused():
            found = self._hooks.evaluate(self.state, due)
        for lane in due:
            scores = found[lane]
            if isinstance(scores, InputError):
                self.progress.failures[lane] = str(scores)
                continue
            lanes[lane].records.append({"step": step, "eval": scores})
            self._hooks.on_record(lane, lanes[lane].records[-1])
        if self._rhythm.save_best:
            best = [own.best(self._hooks.metric) for own in lanes]
            gained = np.array([lane in due and of is not None and of["step"] == step for lane, of in enumerate(best)])
            if gained.any():
                self._hooks.keep(self.state, gained)

    def has_ended(self):
        """Whether every lane has ended; those that just have log what is left, and all are saved if that is due."""
        before, self._running = self._running, self.progress.running(self._rhythm, self._hooks.metric)
        is_last = self.progress.step >= self._rhythm.total_steps
        self._log([lane for lane in before if is_last or lane not in self._running], self._clock.read)
        self._running = self.progress.running(self._rhythm, self._hooks.metric)
        ended = is_last or not self._running
        if self._rhythm.saves_at(self.progress.step, ended):
            self.save()
        return ended

    def save(self):
        """Saves a checkpoint of the last step, unless there is one."""
        if self.progress.step > self._saved_at:
            self._fetch()
            for own, fetched in zip(self.progress.lanes, self._fetched, strict=True):
                own.pending = list(fetched)
            self._hooks.save(self.state, self.progress)
            self._saved_at = self.progress.step

    def _log(self, lanes, read):
        """Logs a record for each of these lanes that has made steps since its last one."""
        if not lanes:
            return
        self._fetch()
        due = [lane for lane in lanes if self._fetched[lane] and self.progress.failures[lane] is None]
        if not due:
            return
        figures, timing = self._hooks.describe(self.state), read()
        running, number = max(len(self._running), 1), len(self.progress.lanes)
        rates = {name: timing[name] / running for name in ("examples_per_second", "tokens_per_second")}
        for lane in due:
            own = self.progress.lanes[lane]
            record = summarise(self._fetched[lane], own)
            if own.skipped_steps > self._rhythm.max_nonfinite_steps:
                self.progress.failures[lane] = divergence(own, self._hooks.params_of(self.state, lane))
                continue
            record |= figures[lane] | {"timing": {**timing, **rates, "lanes": number}}
            own.records.append(record)
            own.pending = []
            self._fetched[lane].clear()
            self._hooks.on_record(lane, record)

    def _fetch(self):
        """Moves the metrics of all dispatched steps to the host."""
        for metrics, counts in jax.device_get(self._pending):
            for lane in self._running:
                own = {name: float(values[lane]) for name, values in metrics.items()}
                self._fetched[lane].append(own | counts[lane])
        self._pending.clear()
