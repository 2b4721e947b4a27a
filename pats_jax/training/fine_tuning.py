"""The fine-tuning of one run: setup, the loop with its logging and checkpoints, and results."""

import abc
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from pats_jax import methods, train_state, trees
from pats_jax.companions.child_tuning import fisher_mask
from pats_jax.data import batches, readers, tasks
from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError
from pats_jax.methods import layer_mask, learning_rate_schedule
from pats_jax.models.layout import unstack_layers
from pats_jax.models.peft import PeftClassifier, trainable_mask
from pats_jax.objectives import with_objectives
from pats_jax.reporting import plots
from pats_jax.reporting.progress import StepProgress
from pats_jax.run.journal import Journal
from pats_jax.run.settings import Settings, TrainingSettings
from pats_jax.training import concentration, preemption, runners, shape_costs
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.loop import Hooks, Progress, Rhythm, fit
from pats_jax.training.profiling import Profiler, seconds_since_process_start

logger = logging.getLogger(__name__)


def count_steps(settings: Settings, rows: int) -> int:
    """The number of optimizer steps.

    Raises:
      InputError: there are more than anybody could count in 32 bits.
    """
    if settings.max_steps > 0:
        return settings.max_steps
    steps = settings.num_train_epochs * math.ceil(rows / (settings.train_batch_size or 1))
    if steps >= 2**31:
        raise InputError(f"--num_train_epochs {settings.num_train_epochs:g}: gives {steps:.3g} steps, more than 2^31")
    return math.ceil(steps)


class Evaluator(Protocol):
    """Scores parameters during training."""

    def evaluate(self, params: Any) -> dict[str, float]:
        """Scores by name. May raise `Preempted`."""

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """Functions that compile what `evaluate` will run, for the shapes of parameters; another thread calls them."""


class Training(abc.ABC):
    """Everything that a training run needs, built and checked before anything is written.

    Attributes:
      examples: rows that are learnt from.
      evaluates: whether it is scored on the way.
      measures_sensitivity: whether `sensitivity` is asked for, before and after training.
      shapes: the shapes of `state`.
    """

    examples: int
    evaluates: bool
    measures_sensitivity = False

    def __init__(
        self,
        settings: TrainingSettings,
        runner: runners.MeshRunner,
        model,
        params,
        loss_fn: train_state.LossFn,
        trainable,
        *,
        metric: str,
        total_steps: int,
        eval_steps: int,
    ):
        """Builds optimizer, state and step.

        Args:
          settings: of this training.
          runner: where it runs.
          model: gives the state its ``apply_fn``.
          params: where it starts.
          loss_fn: what is minimised.
          trainable: a tree of bools like params, which are trained; None: all.
          metric: the score that picks the best evaluation.
          total_steps: its length.
          eval_steps: steps between evaluations, where the settings do not say.
        """
        self.settings, self.runner, self.metric = settings, runner, metric
        self.evaluates = "eval" in settings.phases
        self.rhythm = Rhythm(
            total_steps=total_steps,
            logging_steps=settings.logging_steps,
            eval_steps=settings.eval_steps or eval_steps,
            save_steps=settings.save_steps,
            save_best=settings.load_best_model_at_end,
            patience=settings.early_stopping_patience,
            max_nonfinite_steps=settings.max_nonfinite_steps,
        )
        self.norms_in_step = runner.platform == "cpu"
        self.schedule = learning_rate_schedule(settings, total_steps)
        self.num_parameters = sum(p.size for p in jax.tree.leaves(params))
        trained, frozen = (params, None) if trainable is None else trees.partition(trainable, params)
        self.num_trained = sum(p.size for p in jax.tree.leaves(trained))
        tx = methods.make_optimizer(settings, total_steps, trained, self.fisher_measure(trained, frozen))
        create = functools.partial(
            train_state.TrainState.create, apply_fn=model.apply, tx=tx, key=settings.seed, trainable=trainable
        )
        self.shapes = runner.state_shapes(create, params)
        self._create_state = functools.partial(runner.create_state, create, params)
        self.step = runner.compile_step(
            train_state.make_train_step(
                loss_fn,
                axis_name=runner.axis_name,
                accumulation_steps=settings.gradient_accumulation_steps,
                skip_nonfinite=True,
                norms=self.norms_in_step,
            ),
            self.shapes,
        )
        self.figures = runners.CompiledProgram(jax.jit(functools.partial(_figures, settings, self.schedule)))

    @functools.cached_property
    def state(self) -> train_state.TrainState:
        """The state before the first step, created when it is first asked for."""
        return self._create_state()

    @abc.abstractmethod
    def batches(self, first_step: int) -> Iterator[tuple[train_state.Batch, dict[str, float]]]:
        """Yields the batches from a step (counted from 0) on, as from `MeshRunner.put_ahead`, and their counts."""

    def one_of_each_shape(self, first_step: int) -> Iterator[train_state.Batch]:
        """Yields one batch of every shape from a step (counted from 0) on, in order of first use."""
        return iter(())

    def programs_for_later(self, evaluator: Evaluator) -> list[Callable[[], None]]:
        """Compile the programs besides the step: of the logged figures, and of the evaluation."""
        shapes = self.runner.view(self.shapes.all_params)
        figures = functools.partial(self.figures.compile, self.shapes.opt_state, np.int32(0))
        return [figures, *(evaluator.programs(shapes) if self.evaluates else ())]

    @abc.abstractmethod
    def describe_batch(self) -> str:
        """Describes the batch of a step in one line."""

    def fisher_measure(self, trained: Any, frozen: Any) -> Callable[[float, Any], Any] | None:
        """``fisher(keep_fraction, mask)``, see `methods.Context`; None if it cannot be measured."""
        return None

    def sensitivity(self, params: Any) -> dict[str, np.ndarray]:
        """Sensitivity of the layers that get noise, by tensor."""
        return {}


class GlueTraining(Training):
    """Training on a task that is one table of rows."""

    def __init__(
        self,
        settings: Settings,
        runner: runners.MeshRunner,
        task: tasks.Task,
        split: readers.Split,
        tokens: batches.Tokens,
        model,
        params,
    ):
        self.batch_size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.batch_size *= runner.num_devices
        self.labels, self.tokens, self.examples = split.labels, tokens, len(tokens)
        total_steps = count_steps(settings, len(tokens))
        self.boundaries = _boundaries(settings, runner, params, tokens.lengths, total_steps * self.batch_size)
        self.settings, self.runner = settings, runner
        self.plan = self._plan(epoch=0)
        self.num_layers = model.config.num_hidden_layers
        self.mask = layer_mask(jax.eval_shape(self._separate, params), settings.noise_layers)
        self.sensitivity_batches = methods.sensitivity_batches(settings)
        self.measures_sensitivity = self.sensitivity_batches > 0
        self.loss_without_dropout = train_state.make_loss_fn(
            model.apply, regression=task.is_regression, deterministic=True
        )
        params = runner.place(methods.starting_params(settings, params))
        trainable = methods.trainable_mask(settings, params)
        if isinstance(model, PeftClassifier):
            trainable = trainable_mask(model, params)
        super().__init__(
            settings,
            runner,
            model,
            params,
            with_objectives(model.apply, *methods.chosen_objectives(settings), regression=task.is_regression),
            trainable,
            metric=task.main_metric,
            total_steps=total_steps,
            eval_steps=len(self.plan),
        )

    def batches(self, first_step):
        lengths = self.tokens.lengths
        for rows, length in self._planned(first_step):
            counts = {
                "examples": float(len(rows)),
                "tokens": float(lengths[rows].sum()),
                "computed_tokens": float(self.batch_size * length),
            }
            yield self.runner.put_ahead(self._fill(rows, length)), counts

    def one_of_each_shape(self, first_step):
        met: set[int] = set()
        for rows, length in itertools.islice(self._planned(first_step), self.rhythm.total_steps - first_step):
            if length not in met:
                met.add(length)
                yield self.runner.put_ahead(self._fill(rows, length))
            if len(met) == len(self.boundaries):
                return

    def sensitivity(self, params):
        """Measures sensitivity on some batches of the first epoch, all of one shape."""
        common, _ = collections.Counter(length for _, length in self.plan).most_common(1)[0]
        chosen = [rows for rows, length in self.plan if length == common][: self.sensitivity_batches]
        sample = (self.runner.put(self._fill(rows, common)) for rows in chosen)
        in_turn = self.runner.in_turn
        measured = concentration.measure_sensitivity(self.loss_without_dropout, params, sample, in_turn)
        return concentration.selected(self._separate(self.runner.to_host(measured)), self.mask)

    def _separate(self, tree):
        return unstack_layers(tree, self.num_layers)

    def fisher_measure(self, trained, frozen):
        """The mask of Child-Tuning D, from one pass over the training data."""

        def loss_fn(params, batch, key):
            return self.loss_without_dropout(trees.combine(params, frozen), batch, key)

        def measure(keep_fraction, mask):
            everything = (self.runner.put(self._fill(rows, length)) for rows, length in self.plan)
            return fisher_mask(loss_fn, trained, everything, keep_fraction, mask=mask)

        return measure

    def describe_batch(self):
        settings, runner = self.settings, self.runner
        micro_batches = settings.gradient_accumulation_steps
        return (
            f"{settings.train_batch_size} rows per step: {settings.per_device_train_batch_size} "
            f"x {runner.num_devices} devices of {jax.process_count()} processes"
            + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        )

    def _planned(self, first_step):
        """Yields rows and length of every step from a step (counted from 0) on, without end."""
        epoch, done = divmod(first_step, len(self.plan))
        for number in itertools.count(epoch):
            yield from self._plan(number)[done:]
            done = 0

    def _plan(self, epoch):
        return batches.epoch_plan(
            self.tokens.lengths,
            self.batch_size,
            self.boundaries,
            seed=self.settings.seed,
            epoch=epoch,
        )

    def _fill(self, rows, length):
        own = self.runner.own_rows(self.batch_size)
        return batches.fill_batch(self.tokens, self.labels, rows, self.batch_size, length, own)


def _figures(settings, schedule, opt_state, made):
    """The learning rate of the last step, before which so many were made, and what the methods did in it."""
    return {"learning_rate": schedule(made), **methods.statistics(settings, schedule, opt_state)}


def _boundaries(settings, runner, params, lengths, rows):
    """As many bucket lengths as were asked for; else as many as are worth their compilation when so many rows pass."""
    if settings.length_buckets is not None:
        return batches.bucket_boundaries(lengths, settings.length_buckets)
    cost = shape_costs.shape_cost(params, runner.platform, rows / len(lengths), training=True)
    return batches.bucket_boundaries(lengths, shape_costs.MOST_BUCKETS, shape_cost=cost)


@dataclasses.dataclass
class Trained:
    """The result of training.

    Attributes:
      params: the parameters that the run keeps.
      records: the logged lines.
      save: saves a checkpoint of the end, where there is none yet.
      draw: draws what was measured before and after.
    """

    params: Any
    records: list[dict[str, Any]]
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


class TrainingHooks(Hooks):
    """The callbacks of a run: progress bar, journal, evaluation, checkpoints, profile.

    Attributes:
      seconds_to_first_step: from the start of the process until the first step of this start was done; None before.
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
        found = jax.device_get(self._training.figures(state.opt_state, np.int32(max(made - 1, 0))))
        figures = {name: float(x) for name, x in found.items()}
        if self._before is not None:
            figures |= {name: float(x) for name, x in _global_norms(self._before, state.params).items()}
            self._before = None
        noisy = figures.pop("noisy_parameters", None)
        return figures if noisy is None else figures | {"noise_share": noisy / self._training.num_parameters}

    def on_record(self, record):
        if self._journal:
            self._journal.write(record)
        if "loss" in record:
            rate = record["timing"]["examples_per_second"]
            self._show(status=f"loss {record['loss']:.4f}, {rate:.0f} examples/s")
        self._checkpoints.check()

    def evaluate(self, state):
        self._show(status="scoring the validation data")
        return self._evaluator.evaluate(self._training.runner.view(state.all_params))

    def save(self, state, progress):
        best = progress.best(self.metric) if self._training.rhythm.save_best else None
        view = self._training.runner.view(state)
        self._checkpoints.save(progress.step, view, dataclasses.asdict(progress), best and best["step"])


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_global_norms = jax.jit(train_state.global_norms)


def train(
    training: Training,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    folder: pathlib.Path,
    results: dict[str, Any],
    console: rich.console.Console,
    asked: preemption.Preemption,
) -> Trained:
    """Trains from the last checkpoint, or from the start, and adds to results."""
    asked.begin()
    settings, rhythm, runner = training.settings, training.rhythm, training.runner
    results |= {
        "train_examples": training.examples,
        "steps": rhythm.total_steps,
        "trained_parameters": training.num_trained,
    }
    logger.info("%s", training.describe_batch())
    if training.num_trained < training.num_parameters:
        share = 100 * training.num_trained / training.num_parameters
        logger.info("training %d of %d parameters (%.2f %%)", training.num_trained, training.num_parameters, share)
    first_batch = next(iter(training.one_of_each_shape(0)), None)
    if first_batch is not None and not settings.resume:  # the state is created meanwhile
        training.step.begin(training.shapes, first_batch)
    start = None
    if training.measures_sensitivity:  # a copy: the steps take the state's own buffers
        start = jax.tree.map(np.array, runner.to_host(runner.view(training.state.all_params)))
    state, progress = training.state, Progress()
    restored = checkpoints.restore(runner.view(state), Progress) if settings.resume else None
    if restored:
        state, progress = restored
        logger.info("resuming after step %d of %d", progress.step, rhythm.total_steps)
    started, first_step = time.perf_counter(), progress.step
    with contextlib.ExitStack() as stack:
        others = training.programs_for_later(evaluator)
        stack.enter_context(training.step.compiling_ahead(state, training.one_of_each_shape(first_step), others))
        data = stack.enter_context(prefetch(training.batches(first_step)))
        compile_seconds = shape_costs.compile_seconds(training.shapes.all_params, runner.platform)
        bar = stack.enter_context(StepProgress(console, rhythm.total_steps, first_step, compile_seconds))
        journal = profiler = None
        if runners.is_first():
            tensorboard = settings.report_to == "tensorboard"
            journal = stack.enter_context(Journal(folder, progress.records, tensorboard=tensorboard))
        if settings.profile:
            profiler = stack.enter_context(Profiler(folder / "profile", first_step, rhythm.total_steps))
        hooks = TrainingHooks(training, evaluator, checkpoints, bar.show, journal, profiler)
        state, progress = fit(
            state,
            training.step,
            data,
            rhythm,
            hooks,
            progress=progress,
            preemption=asked,
        )
    seconds = time.perf_counter() - started
    results["steps"] = progress.step
    lines = (line for line in progress.records if line["step"] > first_step and "eval" not in line)
    results["timing"] |= {
        "seconds_to_first_step": hooks.seconds_to_first_step,
        "train_seconds": seconds,
        "data_wait_seconds": sum(line["timing"]["data_wait_seconds"] for line in lines),
        "steps_per_second": (progress.step - first_step) / seconds,
    }
    params, results["model_step"] = runner.view(state.all_params), progress.step
    best = progress.best(training.metric) if settings.load_best_model_at_end else None
    if best is not None and best["step"] != progress.step:
        params, results["model_step"] = checkpoints.restore_params(best["step"], runner.view(state)), best["step"]
    trained = Trained(params, progress.records, lambda: hooks.save(state, progress))
    if start is not None:  # both now: before the first step nobody waits for it
        results["concentration"], everything = measure_concentration(training, runner.place(start), params)
        trained.draw = functools.partial(plots.plot_sensitivity, folder / "plots" / "sensitivity.png", *everything)
    return trained


def measure_concentration(training: Training, start: Any, end: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """How concentrated sensitivity is before and after training, for results.json, and all of its values in both."""
    before, after = training.sensitivity(start), training.sensitivity(end)
    everything = [np.concatenate(list(tensors.values())) for tensors in (before, after)]
    found = {
        "before": concentration.by_tensor(before),
        "after": concentration.by_tensor(after),
        "log10_histogram": concentration.log10_histograms(*everything),
    }
    return found, everything
