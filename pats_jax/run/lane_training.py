"""The training of a set of runs in lanes: what each run's folder gets on the way, and the checkpoints of the set."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError
from pats_jax.reporting.progress import StepProgress
from pats_jax.run.journal import Journal
from pats_jax.run.run_start import Start
from pats_jax.run.training_run import TrainingFacts
from pats_jax.training import lane_loop, shape_costs
from pats_jax.training.by_lane import lane_of
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.compiled_lanes import CompiledLanes
from pats_jax.training.fine_tuning import first_of_each
from pats_jax.training.lane_evaluation import LaneEvaluator, OfLanes
from pats_jax.training.lane_loop import Counts, LaneHooks, LanesProgress
from pats_jax.training.lane_program import Arrays, LaneProgram, LaneState
from pats_jax.training.loop import Rhythm
from pats_jax.training.preemption import Preemption
from pats_jax.training.profiling import seconds_since_process_start
from pats_jax.training.table import TableSource

logger = logging.getLogger(__name__)


class Saved(NamedTuple):
    """The arrays of a checkpoint.

    Attributes:
      state: of the lanes.
      best: the trained parameters of each lane at its best evaluation; None: they are not kept.
    """

    state: LaneState
    best: Any


@dataclasses.dataclass(frozen=True)
class LaneTraining:
    """Everything that the training of a set needs.

    Attributes:
      compiled: the programs.
      params: the parameters that the lanes share at the start.
      own: those of their own, see `LaneProgram.init`.
      arrays: from `lanes.lane_arrays`.
      rates: from `lanes.rate_table`.
      sources: the batches of each lane.
      rhythm: when to log, evaluate, save and stop.
      metric: the score that picks the best evaluation.
      evaluates: whether lanes are scored on the way.
      num_parameters: of a model.
    """

    compiled: CompiledLanes
    params: Any
    own: Any
    arrays: Arrays
    rates: np.ndarray
    sources: Sequence[TableSource]
    rhythm: Rhythm
    metric: str
    evaluates: bool
    num_parameters: int

    @property
    def program(self) -> LaneProgram:
        """What is compiled."""
        return self.compiled.program

    @functools.cached_property
    def frozen(self) -> Any:
        """Parameters that are not trained, on the devices; None: all are."""
        return self.program.place(self.program.split(self.params)[1])

    @functools.cached_property
    def placed(self) -> tuple[Arrays, Any]:
        """``arrays`` and ``rates`` on the devices."""
        return self.program.place(self.arrays, 0), self.program.place(self.rates)

    def start(self) -> LaneState:
        """The state before the first step."""
        own, arrays = self.program.place(self.own, 0), self.placed[0]
        return self.compiled.init(self.program.place(self.params), own, arrays, self.placed[1])

    def step(self, state: LaneState, ended: np.ndarray, batch: Any) -> tuple[LaneState, dict[str, jax.Array]]:
        """A step of all lanes but the ended ones, bool (lanes,)."""
        arrays, rates = self.placed
        arrays = arrays | {"ended": self.program.place(ended, 0)}
        return self.compiled.step(state, arrays, self.frozen, rates, batch)

    def batches(self, first_step: int) -> Iterator[tuple[Any, Counts]]:
        """The batches of all lanes from a step (counted from 0) on, on the devices, and their counts."""
        for parts in zip(*(source.planned(first_step) for source in self.sources), strict=True):
            length = max(longest for _, longest in parts)
            counts = [source.counts(rows, length) for source, (rows, _) in zip(self.sources, parts, strict=True)]
            yield self.program.place(self._filled(parts, length), 0), counts

    def one_of_each_shape(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        """One batch of every shape from a step (counted from 0) on, in order of first use."""
        plans = zip(*(source.planned(first_step) for source in self.sources), strict=True)
        steps = itertools.islice(plans, self.rhythm.total_steps - first_step)
        numbered = ((max(longest for _, longest in parts), parts) for parts in steps)
        kinds = len({length for source in self.sources for length in source.boundaries})
        return first_of_each(((n, functools.partial(self._filled, parts, n)) for n, parts in numbered), kinds)

    def _filled(self, parts, length):
        batches = [source.fill(rows, length) for source, (rows, _) in zip(self.sources, parts, strict=True)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


class SetHooks(LaneHooks):
    """The callbacks of a set: progress bar, journals, evaluation, checkpoints.

    Attributes:
      best: see `Saved`.
      seconds_to_first_step: from the start of the process until the first step of this start was done; None before.
    """

    def __init__(
        self,
        training: LaneTraining,
        evaluators: Sequence[LaneEvaluator],
        of_lanes: OfLanes,
        checkpoints: Checkpoints,
        show: Callable[..., None],
        journals: Sequence[Journal | None],
        best: Any,
    ):
        self.metric, self.evaluates = training.metric, training.evaluates
        self._training, self._evaluators, self._of_lanes = training, evaluators, of_lanes
        self._checkpoints, self._show, self._journals = checkpoints, show, journals
        self.best = best
        self.seconds_to_first_step: float | None = None
        self._started = time.perf_counter()

    def on_step(self, step, state):
        if self.seconds_to_first_step is None:
            jax.block_until_ready(state.step)
            self.seconds_to_first_step = seconds_since_process_start()
            self._show(status="")
            logger.info("compiled and made the first step in %.1f s", time.perf_counter() - self._started)
            self._compile_the_rest(step)
        self._show(completed=step)

    def _compile_the_rest(self, first_step):
        training = self._training
        for batch in training.one_of_each_shape(first_step):
            training.compiled.expect_step(batch)
        training.compiled.expect_figures()
        if self.evaluates:
            self._evaluators[0].compile_ahead()

    def describe(self, state):
        figures = self._training.compiled.figures(state, *self._training.placed)
        found = {name: np.asarray(values) for name, values in jax.device_get(figures).items()}
        noisy = found.pop("noisy_parameters", None)
        if noisy is not None:
            found["noise_share"] = noisy / self._training.num_parameters
        return [{name: float(values[lane]) for name, values in found.items()} for lane in range(len(self._evaluators))]

    def on_record(self, lane, record):
        journal = self._journals[lane]
        if journal is not None:
            journal.write(record)
        if "loss" in record:
            self._show(status=f"loss {record['loss']:.4f} in lane {lane + 1} of {len(self._evaluators)}")
        self._checkpoints.check()

    def evaluate(self, state, lanes):
        self._show(status="scoring the validation data")
        self._of_lanes.use(state.params)
        scores = {lane: _scores(self._evaluators[lane]) for lane in lanes}
        self._show(status="")
        return scores

    def keep(self, state, lanes):
        self.best = self._training.program.choose(self._training.program.place(lanes, 0), state.params, self.best)

    def params_of(self, state, lane):
        return lane_of(state.params, lane)

    def save(self, state, progress):
        self._checkpoints.save(progress.step, Saved(state, self.best), dataclasses.asdict(progress))


def _scores(evaluator: LaneEvaluator) -> dict[str, float] | InputError:
    try:
        return evaluator.evaluate(None)
    except InputError as error:
        return error


@dataclasses.dataclass
class TrainedSet:
    """The result of training a set.

    Attributes:
      params: the trained parameters that the runs keep; every leaf has a leading axis of lanes.
      progress: of all lanes.
      timing: what all lanes share of ``timing`` in results.json.
      save: saves a checkpoint of the end, where there is none yet.
    """

    params: Any
    progress: LanesProgress
    timing: dict[str, float | None]
    save: Callable[[], None]

    def facts(self, training: LaneTraining, lane: int) -> TrainingFacts:
        """What results.json holds of the training of a lane."""
        own, best = self.progress.lanes[lane], self.progress.lanes[lane].best(training.metric)
        keeps_best = training.rhythm.save_best and best is not None
        return TrainingFacts(
            train_examples=training.sources[lane].examples,
            trained_parameters=sum(x.size for x in jax.tree.leaves(self.params)) // len(self.progress.lanes),
            steps=own.step,
            model_step=best["step"] if keeps_best and best is not None else own.step,
            timing=self.timing,
        )


def train(
    training: LaneTraining,
    evaluators: Sequence[LaneEvaluator],
    of_lanes: OfLanes,
    starts: Sequence[Start | None],
    checkpoints: Checkpoints,
    console: rich.console.Console,
    asked: Preemption,
) -> TrainedSet:
    """Trains a set from its last checkpoint, or from the start.

    Args:
      training: the set.
      evaluators: score the lanes.
      of_lanes: what they share.
      starts: the run of each lane, whose folder is open; None: a lane of which nothing is written.
      checkpoints: of the set.
      console: for progress.
      asked: tells that the set is asked to end.

    Raises:
      Preempted: the set was asked to stop; it has been saved.
    """
    asked.begin()
    first = next(iter(training.one_of_each_shape(0)))
    training.compiled.expect_step(first)
    logger.info("%d lanes; in each of them %s", len(starts), training.sources[0].describe_batch())
    state, progress = training.start(), LanesProgress.of(len(starts))
    best = _copied(state.params) if training.rhythm.save_best else None
    restored = checkpoints.restore(Saved(state, best), LanesProgress)
    if restored:
        (state, best), progress = restored
        logger.info("resuming after step %d of %d", progress.step, training.rhythm.total_steps)
    started, first_step = time.perf_counter(), progress.step
    with contextlib.ExitStack() as stack:
        compiling = shape_costs.compile_seconds(training.params, training.sources[0].platform)
        bar = stack.enter_context(StepProgress(console, training.rhythm.total_steps, first_step, compiling))
        journals = [
            None if start is None else stack.enter_context(_journal(start, own.records))
            for start, own in zip(starts, progress.lanes, strict=True)
        ]
        hooks = SetHooks(training, evaluators, of_lanes, checkpoints, bar.show, journals, best)
        data = stack.enter_context(prefetch(training.batches(first_step)))
        state, progress = lane_loop.fit(
            state, training.step, data, training.rhythm, hooks, progress=progress, preemption=asked
        )
    seconds = time.perf_counter() - started
    lines = [line for line in progress.lanes[0].records if line["step"] > first_step and "eval" not in line]
    timing = {
        "seconds_to_first_step": hooks.seconds_to_first_step,
        "train_seconds": seconds,
        "data_wait_seconds": sum(line["timing"]["data_wait_seconds"] for line in lines),
        "steps_per_second": (progress.step - first_step) / seconds,
        "lanes": float(len(starts)),
    }
    kept = state.params if hooks.best is None else hooks.best
    return TrainedSet(kept, progress, timing, lambda: hooks.save(state, progress))


def _journal(start, records):
    return Journal(start.folder, records, tensorboard=start.settings.loop.report_to == "tensorboard")


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
