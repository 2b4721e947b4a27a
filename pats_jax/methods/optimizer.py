"""The optimizer that combines the methods: AdamW with clipping and a schedule."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import objectives, train_state, transforms
from pats_jax.companions.lora_plus import lora_plus
from pats_jax.errors import InputError
from pats_jax.methods.masks import layer_mask
from pats_jax.methods.method import Context, Method
from pats_jax.methods.settings import OptimizerSettings
from pats_jax.methods.table import joined_names
from pats_jax.models.layout import layer_axis
from pats_jax.models.peft import PeftConfig
from pats_jax.models.settings import ModelSettings


def learning_rate_schedule(settings: OptimizerSettings, total_steps: Any, warmup_steps: Any = None) -> optax.Schedule:
    """The learning rate by step, as Transformers' schedules of these names have it.

    ::

        warmup: peak * step / W over the first W steps, ``warmup_ratio`` of them, rounded up
        linear: peak * (1 - x);   cosine: peak * (1 + cos(pi x)) / 2;   constant_with_warmup: peak
                x = (step - W) / (total_steps - W)
        constant: peak, without warmup

    Args:
      settings: the settings of the optimizer; the learning rate may be traced.
      total_steps: number of optimizer steps; with warmup_steps, both may be traced.
      warmup_steps: the W above; None: counted from the settings.
    """
    if warmup_steps is None:
        warmup_steps = count_warmup_steps(settings, total_steps)
    kind, peak = settings.lr_scheduler_type, settings.learning_rate

    def schedule(step):
        x = jnp.clip((step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1), 0, 1)
        after = {"linear": 1 - x, "cosine": (1 + jnp.cos(jnp.pi * x)) / 2}.get(kind, 1.0)
        return peak * jnp.where(step < warmup_steps, step / jnp.maximum(warmup_steps, 1), after)

    return schedule


def count_warmup_steps(settings: OptimizerSettings, total_steps: int) -> int:
    """The number of steps of warmup, as Transformers' TrainingArguments count them: rounded up."""
    return 0 if settings.lr_scheduler_type == "constant" else math.ceil(total_steps * settings.warmup_ratio)


def make_optimizer(
    settings: OptimizerSettings,
    chosen: Sequence[Method],
    total_steps: int,
    params: Any,
    *,
    seed: Any = 0,
    fisher: Callable[[float, Any], Any] | None = None,
    schedule: optax.Schedule | None = None,
    response: transforms.Response | None = None,
    adapter: PeftConfig | None = None,
) -> optax.GradientTransformation:
    """Makes AdamW with clipping and a linear schedule, with the parts that the chosen methods add.

    Weight decay applies only to weight matrices, not to biases and LayerNorm. A ``lora_plus_ratio`` scales the steps of
    AdamW, before the noise of PATS is added.

    Args:
      settings: the settings of AdamW; numbers may be traced.
      chosen: the methods; their numbers may be traced too.
      total_steps: number of optimizer steps.
      params: the trained parameters.
      seed: an int or a typed key, for the methods' random numbers.
      fisher: see `Context`; required by Child-Tuning D.
      schedule: the learning rate by step; None means `learning_rate_schedule`.
      response: see `Context`.
      adapter: the config of the adapter that is trained, which may add a transform at the end; None: no adapter.

    Raises:
      InputError: if a regex matches no parameter, a stage has less than one step, or total_steps are too few for the
        adapter.
    """
    schedule = learning_rate_schedule(settings, total_steps) if schedule is None else schedule
    warmup_steps = count_warmup_steps(settings, total_steps)
    context = Context(total_steps, schedule, settings.learning_rate, params, seed, fisher, response, warmup_steps)
    adamw = optax.chain(
        optax.scale_by_adam(settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon),
        *(method.scaling(context) for method in chosen if method.has("scaling")),
        optax.add_decayed_weights(settings.weight_decay, _is_matrix(params)),
        optax.scale_by_learning_rate(schedule),
        *([] if settings.lora_plus_ratio == 1 else [lora_plus(settings.lora_plus_ratio, layer_axis=layer_axis)]),
    )
    for method in chosen:
        adamw = method.adamw(context, adamw)
    optimizer = optax.chain(
        *(method.first(context) for method in chosen if method.has("first")),
        optax.chain(_clip_by_global_norm(settings.max_grad_norm), adamw),
        *(method.last(context) for method in chosen if method.has("last")),
    )
    for method in chosen:
        optimizer = method.around(context, optimizer)
    for method in chosen:
        optimizer = method.finish(optimizer)
    last = None if adapter is None else adapter.last(total_steps)
    if last is not None:
        optimizer = optax.chain(optimizer, last)
    return transforms.with_raw_gradient(optimizer)


def _is_matrix(params):
    """A tree of bools like params: whether a tensor is a matrix, not counting the axis of stacked layers."""
    return jax.tree.map(lambda p, axis: p.ndim - (axis >= 0) > 1, params, layer_axis(params))


def _clip_by_global_norm(max_norm):
    """Like `optax.clip_by_global_norm` up to rounding: one factor for all entries, which XLA fuses into what follows.

    Optax divides every entry, and XLA writes the result to memory first: a copy of the gradient.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def trainable_mask(chosen: Sequence[Method], params: Any) -> Any:
    """A tree of bools like params: the parameters that the methods train; None if they train all.

    Raises:
      InputError: if the regex matches no parameter, or only some layers of a stacked one.
    """
    patterns = [method.trainable for method in chosen if method.trainable]
    mask = layer_mask(params, patterns[0], "the trained parameters") if patterns else None
    if any(isinstance(keep, np.ndarray) for keep in jax.tree.leaves(mask)):
        raise InputError(f"method {joined_names(chosen)}: trains some layers only; set layers separate")
    return mask


def starting_params(chosen: Sequence[Method], params: Any, seed: Any) -> Any:
    """The parameters that training starts from."""
    for method in chosen:
        params = method.start(params, seed)
    return params


def chosen_objectives(chosen: Sequence[Method]) -> list[objectives.Objective | objectives.View]:
    """The terms that the methods add to the loss, and the noise on what the model reads."""
    return [method.objective() for method in chosen if method.has("objective")]


def chosen_gradient(chosen: Sequence[Method]) -> train_state.Gradient | None:
    """The argument ``gradient`` of `make_train_step` for the methods; None if it is one plain gradient."""
    return next((method.gradient for method in chosen if method.has("gradient")), None)


SENSITIVITY_BATCHES = 8


def sensitivity_batches(asked: int | None, chosen: Sequence[Method]) -> int:
    """The number of batches to measure sensitivity on before and after training; if unset, 0 without PATS."""
    if asked is not None:
        return asked
    return SENSITIVITY_BATCHES if any(method.reports_sensitivity for method in chosen) else 0


def turns_dropout_off(chosen: Sequence[Method], total_steps: int) -> bool:
    """Whether the authors of one of the methods train without dropout."""
    return any(method.without_dropout(total_steps) for method in chosen)


class DropoutRates(TypedDict):
    """Dropout rates for `models.from_pretrained`; None means the checkpoint's rate."""

    hidden_dropout: float | None
    attention_dropout: float | None
    classifier_dropout: float | None


def dropout_rates(model: ModelSettings, chosen: Sequence[Method], total_steps: int | None) -> DropoutRates:
    """The rates that were set, else 0 if a method's authors train without dropout, else None.

    Args:
      model: the settings of the model, which may set the rates.
      chosen: the methods.
      total_steps: number of optimizer steps; None if nothing is trained.
    """
    authors = 0.0 if total_steps is not None and turns_dropout_off(chosen, total_steps) else None
    hidden, attention = model.hidden_dropout, model.attention_dropout
    return DropoutRates(
        hidden_dropout=authors if hidden is None else hidden,
        attention_dropout=authors if attention is None else attention,
        classifier_dropout=authors if hidden is None else None,
    )


def statistics(
    chosen: Sequence[Method], schedule: optax.Schedule, learning_rate: Any, opt_state: Any
) -> dict[str, jax.Array]:
    """Scalars that describe what the methods did in the last step."""
    context = Context(0, schedule, learning_rate, None, None)
    found: dict[str, jax.Array] = {}
    for method in chosen:
        found |= method.statistics(opt_state, context)
    return found
