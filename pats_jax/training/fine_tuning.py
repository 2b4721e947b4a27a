"""Builds and checks a training before anything is written: its batches, its optimizer and its step."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import optax

from pats_jax import methods, train_state, trees
from pats_jax.core.files import JsonObject
from pats_jax.core.settings import Flat
from pats_jax.methods import Method, OptimizerSettings
from pats_jax.models.peft import PeftConfig
from pats_jax.training import concentration, runners
from pats_jax.training.loop import Rhythm
from pats_jax.training.settings import LANE_NUMBERS, LoopSettings, SavingSettings

logger = logging.getLogger(__name__)

Counts = dict[str, float]  # examples and tokens that are real, and computed_tokens
Numbers = dict[str, Any]  # by flag


class Evaluator(Protocol):
    """Scores parameters during training."""

    def evaluate(self, params: Any) -> dict[str, float]:
        """The scores by name. May raise `Preempted`."""

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """Functions that compile the programs of `evaluate` for the shapes of parameters; another thread calls them."""


class Source(Protocol):
    """The batches of a training: a pure function of its seed and the step number.

    Attributes:
      examples: the number of rows.
    """

    examples: int

    def batches(self, first_step: int) -> Iterator[tuple[train_state.Batch, Counts]]:
        """Yields the batches after ``first_step`` steps, as from `MeshRunner.put_ahead`, with their counts."""

    def one_of_each_shape(self, first_step: int, last_step: int) -> Iterator[train_state.Batch]:
        """Yields one batch of every shape of these steps (counted from 0), in order of first use."""

    def describe_batch(self) -> str:
        """Describes the batch of a step in one line."""

    def fisher_measure(self, trained: Any, frozen: Any) -> Callable[[float, Any], Any] | None:
        """``fisher(keep_fraction, mask)``, see `methods.Context`; None if it cannot be measured."""


class Recipe(Protocol):
    """The settings that a training is built from; a program's own have them, among others."""

    @property
    def seed(self) -> int:
        """The seed of the head, the order of rows, dropout and noise."""

    @property
    def optimizer(self) -> OptimizerSettings: ...

    @property
    def methods(self) -> Sequence[Method]:
        """The methods that add to it."""

    @property
    def adapter(self) -> PeftConfig | None:
        """The config of the adapter that is trained; None without one."""

    @property
    def loop(self) -> LoopSettings: ...

    @property
    def saving(self) -> SavingSettings: ...

    def flat(self) -> Flat:
        """Every setting by its flag."""

    def replace(self, **changes: Any) -> Self:
        """A copy with changed settings, by their flags."""


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that a training run needs.

    Attributes:
      settings: see `Recipe`.
      source: its batches.
      runner: where it runs.
      rhythm: when to log, evaluate, save and stop.
      metric: the score that selects the best evaluation.
      evaluates: whether the model is scored during training.
      numbers: what the programs get as arguments, from `step_numbers`.
      num_parameters: the number of the model's parameters.
      num_trained: the number of trained parameters.
      shapes: the shapes of `state`.
      step: the compiled step.
      create_state: makes the state before the first step.
      measure: ``measure(params)`` returns sensitivity by tensor, for before and after training; None if not requested.
    """

    settings: Recipe
    source: Source
    runner: runners.MeshRunner
    rhythm: Rhythm
    metric: str
    evaluates: bool
    numbers: Numbers
    num_parameters: int
    num_trained: int
    shapes: train_state.TrainState
    step: runners.CompiledStep
    create_state: Callable[[], train_state.TrainState]
    measure: Callable[[Any], dict[str, np.ndarray]] | None = None

    @functools.cached_property
    def state(self) -> train_state.TrainState:
        """The state before the first step, created when it is first asked for."""
        return self.create_state()

    @functools.cached_property
    def figures(self) -> runners.CompiledProgram:
        """A program for the learning rate of the last step, given the steps before it, and for the methods' figures.

        Its arguments are the optimizer's state, the number of steps, int32, and `numbers`.
        """

        def figures(opt_state, made, numbers):
            settings, schedule = with_numbers(self.settings, numbers)
            did = methods.statistics(settings.methods, schedule, settings.optimizer.learning_rate, opt_state)
            return {"learning_rate": schedule(made), **did}

        return runners.CompiledProgram(jax.jit(figures))

    @property
    def norms_in_step(self) -> bool:
        """Whether each step measures the norms of parameters and update; otherwise only logged steps do."""
        return self.runner.platform == "cpu"

    def one_of_each_shape(self, first_step: int) -> Iterator[train_state.Batch]:
        """Yields one batch of every shape after ``first_step`` steps, in order of first use."""
        return self.source.one_of_each_shape(first_step, self.rhythm.total_steps)

    def programs_for_later(self, evaluator: Evaluator) -> list[Callable[[], None]]:
        """Functions that compile the programs besides the step: for the logged figures, and for the evaluation."""
        shapes = self.runner.view(self.shapes.all_params)
        figures = functools.partial(self.figures.compile, self.shapes.opt_state, np.int32(0), self.numbers)
        return [figures, *(evaluator.programs(shapes) if self.evaluates else ())]


def make_training(
    settings: Recipe,
    source: Source,
    runner: runners.MeshRunner,
    model: Any,
    params: Any,
    loss_fn: train_state.LossFn,
    trainable: Any,
    *,
    metric: str,
    evaluates: bool,
    total_steps: int,
    eval_steps: int,
    accumulation_steps: int = 1,
    measure: Callable[[Any], dict[str, np.ndarray]] | None = None,
) -> Training:
    """Builds optimizer, state and step.

    Args:
      settings: the settings.
      source: the batches.
      runner: where to run.
      model: the model, for the state's ``apply_fn``.
      params: the parameters to start from.
      loss_fn: the loss to minimise, without what the adapter adds to it.
      trainable: a tree of bools like params, True at leaves to train; None: all.
      metric: see `Training`.
      evaluates: see `Training`.
      total_steps: the number of steps.
      eval_steps: the number of steps between evaluations, if the settings do not say.
      accumulation_steps: the number of micro-batches per step.
      measure: see `Training`.
    """
    trained, frozen = (params, None) if trainable is None else trees.partition(trainable, params)
    optimizer = functools.partial(_make_optimizer, total_steps, source.fisher_measure(trained, frozen))
    tx = optimizer(settings, methods.learning_rate_schedule(settings.optimizer, total_steps), trained)
    create = functools.partial(
        train_state.TrainState.create, apply_fn=model.apply, tx=tx, key=settings.seed, trainable=trainable
    )
    shapes = runner.state_shapes(create, params)
    train_step = train_state.make_train_step(
        loss_fn if settings.adapter is None else settings.adapter.add_to_loss(loss_fn),
        axis_name=runner.axis_name,
        accumulation_steps=accumulation_steps,
        skip_nonfinite=True,
        norms=runner.platform == "cpu",
        gradient=methods.chosen_gradient(settings.methods),
    )

    numbers = step_numbers(settings, total_steps)

    def step(state, batch, numbers):
        tx = optimizer(*with_numbers(settings, numbers), state.params)
        made, metrics = train_step(state.replace(tx=tx), batch)
        return made.replace(tx=state.tx), metrics

    takes_numbers = all(method.works_in_lanes for method in settings.methods)
    return Training(
        settings=settings,
        source=source,
        runner=runner,
        rhythm=make_rhythm(settings.loop, settings.saving, total_steps, eval_steps),
        metric=metric,
        evaluates=evaluates,
        numbers=numbers,
        num_parameters=sum(p.size for p in jax.tree.leaves(params)),
        num_trained=sum(p.size for p in jax.tree.leaves(trained)),
        shapes=shapes,
        step=runner.compile_step(step, shapes, numbers) if takes_numbers else runner.compile_step(train_step, shapes),
        create_state=functools.partial(runner.create_state, create, params),
        measure=measure,
    )


def _make_optimizer(total_steps, fisher, settings, schedule, trained):
    return methods.make_optimizer(
        settings.optimizer,
        settings.methods,
        total_steps,
        trained,
        seed=settings.seed,
        fisher=fisher,
        schedule=schedule,
        adapter=settings.adapter,
    )


def step_numbers(settings: Recipe, total_steps: int) -> Numbers:
    """The numbers of a training that are arrays in its step, so trainings that differ in them share a program.

    Those of `LANE_NUMBERS`, float32 by flag, and ``total_steps`` and ``warmup_steps`` of the schedule, int32.
    """
    flat = settings.flat()
    numbers = {name: np.float32(flat[name]) for name in LANE_NUMBERS if name in flat}
    warmup_steps = methods.count_warmup_steps(settings.optimizer, total_steps)
    return numbers | {"total_steps": np.int32(total_steps), "warmup_steps": np.int32(warmup_steps)}


def with_numbers(settings: AnyRecipe, numbers: Numbers) -> tuple[AnyRecipe, optax.Schedule]:
    """The settings with numbers from `step_numbers`, which may be traced, and the learning rate by step."""
    settings = settings.replace(**{name: numbers[name] for name in LANE_NUMBERS if name in numbers})
    schedule = methods.learning_rate_schedule(settings.optimizer, numbers["total_steps"], numbers["warmup_steps"])
    return settings, schedule


def make_rhythm(loop: LoopSettings, saving: SavingSettings, total_steps: int, eval_steps: int) -> Rhythm:
    """The rhythm of a training of ``total_steps`` steps, evaluated every ``eval_steps`` if the settings do not say."""
    return Rhythm(
        total_steps=total_steps,
        logging_steps=loop.logging_steps,
        eval_steps=loop.eval_steps or eval_steps,
        save_steps=saving.save_steps,
        save_best=loop.load_best_model_at_end,
        patience=loop.early_stopping_patience,
        max_nonfinite_steps=loop.max_nonfinite_steps,
    )


def first_of_each(numbered: Iterator[tuple[Any, Callable[[], Any]]], kinds: int) -> Iterator[Any]:
    """Yields the first item of each kind, from pairs of a kind and a function that makes an item."""
    met: set[Any] = set()
    for kind, make in numbered:
        if kind not in met:
            met.add(kind)
            yield make()
        if len(met) == kinds:
            return


def measure_concentration(
    measure: Callable[[Any], dict[str, np.ndarray]], start: Any, end: Any
) -> tuple[JsonObject, list[np.ndarray]]:
    """How concentrated sensitivity is before and after training, for results.json, and its values in both, sorted."""
    both = measure(start), measure(end)
    everything = [np.sort(np.concatenate(list(tensors.values()))) for tensors in both]
    before, after = map(concentration.by_tensor, both)
    histograms = concentration.log10_histograms(*everything)
    return {"before": before, "after": after, "log10_histogram": histograms}, everything
