"""A training run, from a built training to the run's folder: shared by all programs that train."""

import contextlib
import dataclasses
import functools
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax import train_state
from pats_jax.core.files import JsonObject
from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError, Preempted
from pats_jax.reporting import plots
from pats_jax.reporting.progress import StepProgress
from pats_jax.run import hub, run_folder
from pats_jax.run.journal import Journal
from pats_jax.run.run_start import Start
from pats_jax.training import preemption, runners, shape_costs
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.fine_tuning import Evaluator, Training, measure_concentration
from pats_jax.training.loop import Hooks, Progress, Record, fit
from pats_jax.training.profiling import Profiler, seconds_since_process_start

logger = logging.getLogger(__name__)


class TrainingFacts(TypedDict, total=False):
    """The part of results.json that describes the training."""

    train_examples: int
    trained_parameters: int
    steps: int
    model_step: int
    concentration: JsonObject
    timing: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
      params: the parameters that the run keeps.
      records: the logged lines.
      facts: the part of results.json that describes the training.
      save: saves a checkpoint of the end, unless there is one.
      draw: plots what was measured before and after training.
    """

    params: Any
    records: list[Record]
    facts: TrainingFacts = dataclasses.field(default_factory=TrainingFacts)
    save: Callable[[], None] = lambda: None
    draw: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def kept(self, checkpoints: Checkpoints) -> Iterator[None]:
        """Saves the training if what follows fails, so that a resumed run repeats only the end.

        With several processes only the last checkpoint is kept: no process knows that another has failed.
        """
        try:
            yield
        except Exception:
            if jax.process_count() == 1:
                try:
                    self.save()
                    checkpoints.wait()
                except InputError as error:
                    logger.warning("%s", error)  # the exception on its way says more
            raise


@dataclasses.dataclass(frozen=True)
class Job:
    """What a program wants to be carried out.

    Attributes:
      program: its name, for the command that resumes the run.
      training: what to train; None: nothing.
      evaluator: scores the model during training.
      params: the parameters, on the devices, of a job without training.
      use: ``use(trained)``, called in every process: what follows the training on the devices; returns its part of
        results.json. May raise `Preempted`.
      write: ``write(trained, params, results)``, called in the first process: writes the files of the run, from
        parameters on the host; results.json, which marks the end, is written after it.
    """

    program: str
    training: Training | None
    evaluator: Evaluator
    params: Any
    use: Callable[[Trained], JsonObject]
    write: Callable[[Trained, Any, JsonObject], None]


def carry_out(start: Start, job: Job, results: JsonObject, asked: preemption.Preemption) -> JsonObject:
    """Trains, uses the trained parameters, and writes the folder.

    Args:
      start: the started run, whose input has been checked.
      job: what to do.
      results: the content of results.json before training.
      asked: says whether the run is asked to stop.

    Returns:
      The content of results.json.

    Raises:
      Preempted: if the run was asked to stop; it has been saved.
    """
    folder, runner = start.folder, start.runner
    checkpoints = Checkpoints(folder / "checkpoints", start.settings.saving.save_total_limit)
    start.open_folder()
    with checkpoints:
        trained = Trained(job.params, [])
        try:
            if job.training:
                trained = train(start, job.training, job.evaluator, checkpoints, asked)
            results = results | trained.facts | job.use(trained)
        except Preempted as error:
            trained.save()
            checkpoints.wait()
            raise Preempted(_how_to_resume(job, folder), error.signal_number) from None
        params = runner.to_host(trained.params)
        with trained.kept(checkpoints):
            if runners.is_first():
                run_folder.check_links(folder)
                job.write(trained, params, results)
                start.finish(results)
    if runners.is_first():
        hub.publish(start.settings, folder, start.console)
    return results


def _how_to_resume(job, folder):
    saved = " and saved" if job.training else ""
    config = shlex.quote(str(folder / "config.json"))
    return f"interrupted{saved}; to resume, run: pats-jax {job.program} --config {config} --resume"


class TrainingHooks(Hooks):
    """The callbacks of a run: progress bar, journal, evaluation, checkpoints, profile.

    Attributes:
      seconds_to_first_step: seconds from the start of the process to the end of the first step of this start; None
        before.
    """

    def __init__(
        self,
        training: Training,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        show: Callable[..., None],
        journal: Journal | None,
        profiler: Profiler | None,
    ):
        self.metric, self.evaluates = training.metric, training.evaluates
        self._training, self._evaluator, self._checkpoints = training, evaluator, checkpoints
        self._show, self._journal, self._profiler = show, journal, profiler
        self.seconds_to_first_step: float | None = None
        self._started = time.perf_counter()
        self._before: Any = None  # the parameters before a step whose norms are logged

    def before_step(self, step, state):
        self._before = None
        if not self._training.norms_in_step and self._training.rhythm.logs_at(step):
            self._before = _copied(state.params)

    def on_step(self, step, state):
        if self.seconds_to_first_step is None:
            jax.block_until_ready(state.params)
            self.seconds_to_first_step = seconds_since_process_start()
            self._show(status="")
            logger.info("compiled and made the first step in %.1f s", time.perf_counter() - self._started)
        self._show(completed=step)
        if self._profiler:
            self._profiler.after(step, state)

    def describe(self, progress, state):
        made = progress.step - progress.skipped_steps
        training = self._training
        found = jax.device_get(training.figures(state.opt_state, np.int32(max(made - 1, 0)), training.numbers))
        figures = {name: float(x) for name, x in found.items()}
        if self._before is not None:
            figures |= {name: float(x) for name, x in _global_norms(self._before, state.params).items()}
            self._before = None
        noisy = figures.pop("noisy_parameters", None)
        return figures if noisy is None else figures | {"noise_share": noisy / training.num_parameters}

    def on_record(self, record):
        if self._journal:
            self._journal.write(record)
        if "loss" in record:
            rate = record["timing"]["examples_per_second"]
            self._show(status=f"loss {record['loss']:.4f}, {rate:.0f} examples/s")
        self._checkpoints.check()

    def evaluate(self, state):
        self._show(status="scoring the validation data")
        scores = self._evaluator.evaluate(self._training.runner.view(state.all_params))
        self._show(status=f"validation {self.metric} {scores[self.metric]:.4f}")
        return scores

    def save(self, state, progress):
        best = progress.best(self.metric) if self._training.rhythm.save_best else None
        view = self._training.runner.view(state)
        self._checkpoints.save(progress.step, view, dataclasses.asdict(progress), best and best["step"])


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_global_norms = jax.jit(train_state.global_norms)


def train(
    start: Start, training: Training, evaluator: Evaluator, checkpoints: Checkpoints, asked: preemption.Preemption
) -> Trained:
    """Trains from the last checkpoint, or from the start."""
    asked.begin()
    _describe(training)
    runner, resume = training.runner, start.settings.folder.resume
    first_batch = next(iter(training.one_of_each_shape(0)), None)
    if first_batch is not None and not resume:  # the state is created meanwhile
        training.step.begin(training.shapes, first_batch)
    before = None
    if training.measure:  # a copy: the steps take the state's own buffers
        before = jax.tree.map(np.array, runner.to_host(runner.view(training.state.all_params)))
    state, progress = training.state, Progress()
    restored = checkpoints.restore(runner.view(state), Progress) if resume else None
    if restored:
        state, progress = restored
        logger.info("resuming after step %d of %d", progress.step, training.rhythm.total_steps)
    started, first_step = time.perf_counter(), progress.step
    with _training_hooks(start, training, evaluator, checkpoints, progress) as hooks:
        others = training.programs_for_later(evaluator)
        shapes = training.one_of_each_shape(first_step)
        with (
            training.step.compiling_ahead(state, shapes, others),
            prefetch(training.source.batches(first_step)) as data,
        ):
            state, progress = fit(
                state, training.step, data, training.rhythm, hooks, progress=progress, preemption=asked
            )
    timing = _timing(progress, first_step, time.perf_counter() - started, hooks)
    params, model_step = _chosen_params(training, checkpoints, state, progress)
    facts = TrainingFacts(
        train_examples=training.source.examples,
        trained_parameters=training.num_trained,
        steps=progress.step,
        model_step=model_step,
        timing=timing,
    )
    trained = Trained(params, progress.records, facts, lambda: hooks.save(state, progress))
    if before is None or training.measure is None:
        return trained
    # both now: before the first step nobody waits for it
    facts["concentration"], everything = measure_concentration(training.measure, runner.place(before), params)
    path = start.folder / "plots" / "sensitivity.png"
    return dataclasses.replace(trained, draw=functools.partial(plots.plot_sensitivity, path, *everything))


def _describe(training):
    logger.info("%s", training.source.describe_batch())
    if training.num_trained < training.num_parameters:
        share = 100 * training.num_trained / training.num_parameters
        logger.info("training %d of %d parameters (%.2f %%)", training.num_trained, training.num_parameters, share)


@contextlib.contextmanager
def _training_hooks(start, training, evaluator, checkpoints, progress):
    """The hooks, with progress bar, journal and profiler, which are closed at the end."""
    total_steps, loop = training.rhythm.total_steps, start.settings.loop
    with contextlib.ExitStack() as stack:
        compiling = shape_costs.compile_seconds(training.shapes.all_params, training.runner.platform)
        bar = stack.enter_context(StepProgress(start.console, total_steps, progress.step, compiling))
        journal = profiler = None
        if runners.is_first():
            tensorboard = loop.report_to == "tensorboard"
            journal = stack.enter_context(Journal(start.folder, progress.records, tensorboard=tensorboard))
        if loop.profile:
            profiler = stack.enter_context(Profiler(start.folder / "profile", progress.step, total_steps))
        yield TrainingHooks(training, evaluator, checkpoints, bar.show, journal, profiler)


def _timing(progress, first_step, seconds, hooks):
    lines = (line for line in progress.records if line["step"] > first_step and "eval" not in line)
    return {
        "seconds_to_first_step": hooks.seconds_to_first_step,
        "train_seconds": seconds,
        "data_wait_seconds": sum(line["timing"]["data_wait_seconds"] for line in lines),
        "steps_per_second": (progress.step - first_step) / seconds,
    }


def _chosen_params(training, checkpoints, state, progress):
    """The parameters that the run keeps, and the step that they are from."""
    runner, best = training.runner, progress.best(training.metric)
    if training.rhythm.save_best and best is not None and best["step"] != progress.step:
        return checkpoints.restore_params(best["step"], runner.view(state)), best["step"]
    return runner.view(state.all_params), progress.step
