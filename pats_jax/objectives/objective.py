"""The interface of objectives, and the loss that contains them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pats_jax import trees
from pats_jax.train_state import (
    Batch,
    LossFn,
    RowLoss,
    check_labels,
    losses,
    make_loss_fn,
    model_inputs,
    weighted_mean,
)
from pats_jax.trees import check_number


@dataclasses.dataclass(frozen=True)
class View:
    """A change of what the forward passes of a training step read, such as noise on the word embeddings.

    Attributes:
      name: its name, which its draws depend on.
      change: ``change(embed, inputs, key) -> inputs``: the arguments of a pass in place of ``inputs``, which contain
        one of ``input_ids``, ``inputs_embeds`` and ``continue_from``. ``embed(ids)`` gives word embeddings, and the
        typed key is the pass's own.
    """

    name: str
    change: Callable[[Callable[[jax.Array], jax.Array], Batch, jax.Array], Batch]
    compares_classes: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step's inputs and its plain forward pass, with functions for further passes.

    Attributes:
      apply_fn: the model's apply function.
      params: the parameters.
      inputs: ids (and attention mask, token types) by name, (batch, length) each.
      rest: the inputs without the ids.
      regression: whether the model predicts scores rather than classes.
      deterministic: whether dropout is off.
      key: the key of the plain pass's dropout.
      logits: the logits of the plain pass, (batch, num_labels) float32.
      hidden_states: the hidden states of the plain pass, (batch, length, hidden) each, if an objective needs them; else
        ().
      views: what changes the inputs of every pass.
    """

    apply_fn: Callable
    params: Any
    inputs: Batch
    regression: bool
    deterministic: bool
    key: jax.Array
    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] = ()
    views: tuple[View, ...] = ()

    @property
    def rest(self) -> Batch:
        return {name: x for name, x in self.inputs.items() if name != "input_ids"}

    def embed(self) -> jax.Array:
        """The word embeddings of the ids, (batch, length, hidden)."""
        return self.apply_fn({"params": self.params}, self.inputs["input_ids"], method="embed")

    def apply(self, params: Any, key: jax.Array, **inputs: Any) -> Any:
        """Makes another pass, with its own inputs and its own key for dropout."""
        return _apply(self.apply_fn, self.views, params, key, self.deterministic, inputs)


class Term(NamedTuple):
    """What an objective returns.

    Attributes:
      values: the regulariser of each row, (batch,), without its weight.
      logits: the logits of passes that learn the task too, (batch, num_labels) each.
    """

    values: jax.Array
    logits: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """A regulariser of the loss.

    Attributes:
      name: the name of its metric.
      weight: the factor of its mean in the loss.
      term: ``term(step, key) -> Term``, with a typed key for its draws.
      needs_hidden_states: whether ``term`` uses ``step.hidden_states``.
      compares_classes: whether ``term`` uses the softmax of the logits, which is for rows with one class.
    """

    name: str
    weight: float | jax.Array
    term: Callable[[Step, jax.Array], Term]
    needs_hidden_states: bool = False
    compares_classes: bool = False


def with_objectives(
    apply_fn: Callable,
    *objectives: Objective | View,
    regression: bool = False,
    deterministic: bool = False,
    row_loss: RowLoss | None = None,
) -> LossFn:
    r"""Makes a loss function: the task loss plus regularisers, computed on noisy inputs where a view adds noise.

    ::

        loss = task_loss + sum over objectives of weight * mean over rows of values

    The task loss is that of `pats_jax.make_loss_fn`; if an objective makes passes that learn the task too (R-Drop), it
    is the mean over these and the plain pass. All means weight the rows by ``batch["weights"]``. The plain pass has the
    dropout of `make_loss_fn`, and the draws of an objective do not depend on the others. Two objectives of one kind are
    both added, and share one metric.

    Args:
      apply_fn: a model's apply function, which returns logits (batch, num_labels), such as `SequenceClassifier.apply`.
        For R3F and SMART it must support ``apply_fn({"params": params}, ids, method="embed")`` and ``inputs_embeds``,
        for NEFTune too; for LNSR ``output_hidden_states`` and ``continue_from``, for HyPe ``perturb``.
      *objectives: any of `r3f`, `r_drop`, `smart`, `lnsr`, and of the views `neftune` and `hype`; without any, the
        result is `make_loss_fn`'s.
      regression: whether labels are float scores (batch,), with logits (batch, 1), instead of int32 classes (batch,).
      deterministic: whether dropout is off; objectives still draw noise.
      row_loss: see `pats_jax.make_loss_fn`.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, metrics)`` for `pats_jax.make_train_step`. The metrics are ``task_loss``
      and, under the name of each objective, its mean without its weight; views have none.

    Raises:
      InputError: from ``loss_fn``, if a batch has no labels.

    Examples:
      A model whose logits are its first word's embedding.

      >>> import jax, jax.numpy as jnp, pats_jax
      >>> def apply(variables, input_ids=None, inputs_embeds=None, method=None, **unused):
      ...     table = variables["params"]["table"]
      ...     embeddings = table[input_ids] if inputs_embeds is None else inputs_embeds
      ...     return embeddings if method == "embed" else embeddings[:, 0]
      >>> params = {"table": jnp.eye(2)}
      >>> batch = {"input_ids": jnp.array([[0], [1]]), "labels": jnp.array([0, 1])}
      >>> loss_fn = pats_jax.with_objectives(apply, pats_jax.r3f(lam=2.0, eps=0.5))
      >>> loss, metrics = loss_fn(params, batch, pats_jax.random.fast_key(0))
      >>> print(f"{loss:.4f} = {metrics['task_loss']:.4f} + 2 * {metrics['r3f']:.4f}")
      0.3497 = 0.3133 + 2 * 0.0182
    """
    if not objectives:
        return make_loss_fn(apply_fn, regression=regression, deterministic=deterministic, row_loss=row_loss)
    costs = row_loss or functools.partial(losses, regression=regression)
    views = tuple(part for part in objectives if isinstance(part, View))
    regularisers = [part for part in objectives if isinstance(part, Objective)]
    wants_states = any(objective.needs_hidden_states for objective in regularisers)

    def loss_fn(params: Any, batch: Batch, key: jax.Array):
        check_labels(batch)
        inputs = model_inputs(batch)
        states: tuple = ()
        if wants_states:
            output = _apply(apply_fn, views, params, key, deterministic, inputs | {"output_hidden_states": True})
            logits, states = output
        else:
            logits = _apply(apply_fn, views, params, key, deterministic, inputs)
        plain = logits.astype(jnp.float32)
        step = Step(apply_fn, params, inputs, regression, deterministic, key, plain, states, views)

        def mean(values):
            return weighted_mean(values, batch.get("weights"))

        terms = [objective.term(step, trees.own_key(key, objective.name)) for objective in regularisers]
        learners = [logits, *(extra for term in terms for extra in term.logits)]
        task_loss = mean(sum(costs(x, batch["labels"]) for x in learners) / len(learners))
        loss, metrics = task_loss, {"task_loss": task_loss} if regularisers else {}
        for objective, term in zip(regularisers, terms, strict=True):
            value = mean(term.values)
            loss += objective.weight * value
            metrics[objective.name] = metrics.get(objective.name, 0.0) + value
        return loss, metrics

    return loss_fn


def check_weight(argument: str, value: float | jax.Array) -> None:
    """Raises ValueError if the weight of an objective is negative; traced numbers are not checked."""
    check_number(argument, value, lambda x: x >= 0, "at least 0")


def check_positive(argument: str, value: float | jax.Array) -> None:
    """Raises ValueError if a number is not positive and finite; traced numbers are not checked."""
    check_number(argument, value, lambda x: 0 < x < float("inf"), "above 0")


def _apply(apply_fn, views, params, key, deterministic, inputs):
    def embed(ids):
        return apply_fn({"params": params}, ids, method="embed")

    for view in views:
        inputs = view.change(embed, inputs, trees.own_key(key, view.name))
    rngs = None if deterministic else {"dropout": key}
    return apply_fn({"params": params}, **inputs, deterministic=deterministic, rngs=rngs)
