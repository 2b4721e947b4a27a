"""METHODS: a name -> what it adds to plain fine-tuning, and which layers it touches."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from pats_jax import transforms
from pats_jax.errors import InputError
from pats_jax.settings import Settings
from pats_jax.train_state import parameter_name

Wrap = Callable[[optax.GradientTransformation, optax.Schedule, Any, Settings], optax.GradientTransformation]
Statistics = Callable[[Any, optax.Schedule, Settings], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
      summary: what it does, in a line.
      source: where it comes from.
      wrap: ``wrap(optimizer, learning-rate schedule, params, settings)``: the optimizer of plain fine-tuning with the
        method added.
      statistics: ``statistics(optimizer state, learning-rate schedule, settings)``: figures, () each, of what the
        method did in the last step, for the log.
    """

    summary: str
    source: str
    wrap: Wrap
    statistics: Statistics = lambda opt_state, schedule, settings: {}


def get_method(name: str) -> Method:
    """Looks a method up by its name.

    Raises:
      InputError: no such method; the message names those that exist.
    """
    if name not in METHODS:
        raise InputError(f"--method {name}: no such method; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def learning_rate_schedule(settings: Settings, total_steps: int) -> optax.Schedule:
    """Linear warmup from 0 over ``warmup_ratio`` of the steps, then linear decay to 0 at the end of training."""
    warmup_steps = int(settings.warmup_ratio * total_steps)
    peak = settings.learning_rate
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    decay = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay


def make_optimizer(settings: Settings, total_steps: int, params: Any) -> optax.GradientTransformation:
    """AdamW with clipping and the linear schedule, and what ``settings.method`` adds to it.

    Weight decay is applied to the weight matrices only, not to biases and LayerNorm.

    Raises:
      InputError: on an unknown method, or a ``noise_layers`` that matches no parameter.
    """
    method = get_method(settings.method)
    schedule = learning_rate_schedule(settings, total_steps)
    adamw = optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            schedule,
            b1=settings.adam_beta1,
            b2=settings.adam_beta2,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            mask=jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
    return method.wrap(adamw, schedule, params, settings)


def layer_mask(params: Any, pattern: str, flag: str = "--noise_layers") -> Any:
    """A tree of bools like params: whether the parameter's path, its names joined by dots, matches the regex.

    Raises:
      InputError: if the pattern is no regex, or matches no parameter.
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"{flag} {pattern!r}: not a regular expression: {error}") from error
    paths = jax.tree_util.tree_map_with_path(lambda path, _: parameter_name(path), params)
    mask = jax.tree.map(lambda name: matches(name) is not None, paths)
    if not any(jax.tree.leaves(mask)):
        raise InputError(f"{flag} {pattern!r}: matches no parameter; one is called {jax.tree.leaves(paths)[-1]}")
    return mask


def _finetune(optimizer, schedule, params, settings):
    del schedule, params, settings
    return optimizer


def _noise_scale(schedule, settings):
    """The noise's scale follows the learning rate, so that training ends quietly."""
    return lambda count: settings.noise_scale * schedule(count) / settings.learning_rate


def _pats(optimizer, schedule, params, settings):
    return transforms.pats(
        optimizer,
        _noise_scale(schedule, settings) if settings.noise_scale else 0.0,
        key=settings.seed,
        decay=settings.decay,
        response=settings.response,
        distribution=settings.distribution,
        mask=layer_mask(params, settings.noise_layers),
        sensitivity_dtype=settings.sensitivity_dtype,
    )


def _noise_statistics(opt_state, schedule, settings):
    return transforms.noise_statistics(opt_state, _noise_scale(schedule, settings), settings.response)


METHODS = {
    "finetune": Method("plain fine-tuning: AdamW on every parameter", "https://arxiv.org/abs/1810.04805", _finetune),
    "pats": Method(
        "noise on the encoder's weight matrices, most where sensitivity is least",
        "https://arxiv.org/abs/2210.12403",
        _pats,
        _noise_statistics,
    ),
}
