"""The training of a run on a table of rows, whatever the rows are: what methods and adapters make of it."""

from collections.abc import Mapping
from typing import Any

import jax

from pats_jax import methods, train_state
from pats_jax.methods.pats import Noise, Pats
from pats_jax.models import peft
from pats_jax.models.layout import unstack_layers
from pats_jax.run.settings import FineTuningSettings
from pats_jax.training import fine_tuning, runners
from pats_jax.training.fine_tuning import Training
from pats_jax.training.table import TableSource


def train_on_table(
    settings: FineTuningSettings,
    source: TableSource,
    runner: runners.MeshRunner,
    model: Any,
    params: Any,
    loss_fn: train_state.LossFn,
    *,
    num_layers: int | Mapping[str, int],
    metric: str,
    total_steps: int,
) -> Training:
    """The training of a model, or of its adapter, on the rows of a table; it starts from what the methods make of them.

    Args:
      settings: the settings of the run.
      source: the batches.
      runner: where to run.
      model: the model.
      params: its parameters.
      loss_fn: the loss to minimise.
      num_layers: the model's number of layers, see `unstack_layers`.
      metric: the score that selects the best evaluation.
      total_steps: the number of steps.
    """
    separate = jax.eval_shape(lambda tree: unstack_layers(tree, num_layers), params)
    noisy = methods.layer_mask(separate, described_layers(settings))
    params = runner.place(methods.starting_params(settings.methods, params, settings.seed))
    if settings.adapter:
        trainable = peft.trainable_mask(model, params)
    else:
        trainable = methods.trainable_mask(settings.methods, params)
    num_batches = methods.sensitivity_batches(settings.length.sensitivity_batches, settings.methods)
    return fine_tuning.make_training(
        settings,
        source,
        runner,
        model,
        params,
        loss_fn,
        trainable,
        metric=metric,
        evaluates="eval" in settings.phases,
        total_steps=total_steps,
        eval_steps=len(source.plan),
        accumulation_steps=settings.batches.gradient_accumulation_steps,
        measure=source.sensitivity_measure(num_batches, num_layers, noisy),
    )


def described_layers(settings: FineTuningSettings) -> str:
    """The regex of the parameters whose sensitivity results.json describes: those that get, or would get, noise."""
    noisy = [method for method in settings.methods if isinstance(method, Noise)]
    return (noisy or [Pats()])[0].noise_layers
