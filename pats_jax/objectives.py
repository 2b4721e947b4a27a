"""Regularisers of the loss: what R3F, R-Drop, SMART and LNSR add to it.

An `Objective` gives one number a row from the forward passes of a step; `with_objectives` adds any of them, weighted,
to the task loss::

    loss_fn = with_objectives(model.apply, r3f())
    loss_fn = with_objectives(model.apply, r3f(lam=0.5), lnsr(2))   # both terms, one plain forward pass for the two
    step = make_train_step(loss_fn)

An objective changes the loss and nothing else, so it goes with any optimizer: PATS, DPS, Mixout and the others.

Notation: f(x) are the logits of a row for its word embeddings x, p = softmax(f(x)), q the same of a second pass, and
J(p, q) = KL(p||q) + KL(q||p) = sum over classes of (p - q) (log p - log q). Every pass draws its own dropout, but for
LNSR's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pats_jax import trees
from pats_jax.train_state import Batch, LossFn, losses, make_loss_fn, model_inputs, weighted_mean
from pats_jax.trees import check_number, is_plainly


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step's inputs and its plain forward pass, and the means to make further passes.

    Attributes:
      apply_fn: the model's apply function.
      params: the parameters.
      inputs: ids (and attention mask, token types) by name, (batch, length).
      rest: the inputs but for the ids.
      regression: whether the model gives scores rather than classes.
      deterministic: whether dropout is off.
      key: the key of the plain pass's dropout.
      logits: of the plain pass, (batch, num_labels) float32.
      hidden_states: of the plain pass, (batch, length, hidden) each, if an objective asked for them; else ().
    """

    apply_fn: Callable
    params: Any
    inputs: dict[str, Any]
    regression: bool
    deterministic: bool
    key: jax.Array
    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] = ()

    @property
    def rest(self) -> dict[str, Any]:
        return {name: x for name, x in self.inputs.items() if name != "input_ids"}

    def embed(self) -> jax.Array:
        """The word embeddings of the ids, (batch, length, hidden)."""
        return self.apply_fn({"params": self.params}, self.inputs["input_ids"], method="embed")

    def apply(self, params: Any, key: jax.Array, **inputs: Any) -> Any:
        """Another pass, by its own inputs and the key of its dropout."""
        return _apply(self.apply_fn, params, key, self.deterministic, inputs)


class Term(NamedTuple):
    """What an objective gives.

    Attributes:
      values: the regulariser of each row, (batch,), before it is weighted.
      logits: of passes that are to learn the task as well as the plain one, (batch, num_labels) each.
    """

    values: jax.Array
    logits: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """A regulariser of the loss.

    Attributes:
      name: its name among the metrics.
      weight: what its mean is multiplied by in the loss.
      term: ``term(step, key)``: key for what it draws.
      needs_hidden_states: whether ``step.hidden_states`` must be there.
    """

    name: str
    weight: float | jax.Array
    term: Callable[[Step, jax.Array], Term]
    needs_hidden_states: bool = False


def with_objectives(
    apply_fn: Callable, *objectives: Objective, regression: bool = False, deterministic: bool = False
) -> LossFn:
    r"""The loss of a task with regularisers added to it.

    ::

        loss = task_loss + sum over objectives of weight * mean over rows of values

    The task loss is that of `pats_jax.make_loss_fn`; if an objective makes passes that learn the task too (R-Drop), it
    is the mean over these and the plain pass. All means weigh the rows by ``batch["weights"]``. Dropout of the plain
    pass is that of `make_loss_fn`, and what an objective draws does not depend on which others there are. Of two
    objectives of one kind both are added, under one name among the metrics.

    Args:
      apply_fn: a model's apply function that gives logits (batch, num_labels), such as `SequenceClassifier.apply`. R3F
        and SMART need ``apply_fn({"params": params}, ids, method="embed")`` and its ``inputs_embeds``, LNSR its
        ``output_hidden_states`` and ``continue_from``.
      *objectives: any of `r3f`, `r_drop`, `smart`, `lnsr`; without any, the result is `make_loss_fn`'s.
      regression: whether labels are float scores (batch,), for logits (batch, 1), or classes int32 (batch,).
      deterministic: whether dropout is off; noise is drawn all the same.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, metrics)`` for `make_train_step`; metrics are ``task_loss`` and, by the
      name of each objective, its mean before it is weighted.

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
        return make_loss_fn(apply_fn, regression=regression, deterministic=deterministic)
    wants_states = any(objective.needs_hidden_states for objective in objectives)

    def loss_fn(params: Any, batch: Batch, key: jax.Array):
        inputs = model_inputs(batch)
        states: tuple = ()
        if wants_states:
            output = _apply(apply_fn, params, key, deterministic, inputs | {"output_hidden_states": True})
            logits, states = output
        else:
            logits = _apply(apply_fn, params, key, deterministic, inputs)
        step = Step(apply_fn, params, inputs, regression, deterministic, key, logits.astype(jnp.float32), states)

        def mean(values):
            return weighted_mean(values, batch.get("weights"))

        terms = [objective.term(step, trees.own_key(key, objective.name)) for objective in objectives]
        learners = [logits, *(extra for term in terms for extra in term.logits)]
        task_loss = mean(sum(losses(x, batch["labels"], regression) for x in learners) / len(learners))
        loss, metrics = task_loss, {"task_loss": task_loss}
        for objective, term in zip(objectives, terms, strict=True):
            value = mean(term.values)
            loss += objective.weight * value
            metrics[objective.name] = metrics.get(objective.name, 0.0) + value
        return loss, metrics

    return loss_fn


def r3f(lam: float | jax.Array = 1.0, eps: float | jax.Array = 1e-5) -> Objective:
    r"""R3F: the answer should not change when the word embeddings shift a little at random.

    ::

        z ~ U(-eps, eps) for each entry;   q = softmax(f(stop_gradient(x) + z))
        loss = task_loss + lam * mean over rows of J(p, q)

    The rule is that of the authors' code (*code*): KL divergences are summed over classes and averaged over the batch,
    gradients pass through both p and q, the noised branch starts from detached embeddings, each pass draws its own
    dropout, and regression has no regulariser. Two forward passes (one on regression).

    Args:
      lam: weight of the regulariser, not negative.
      eps: half the width of the noise, in units of the embeddings' entries; above 0. In bfloat16, 1e-5 is lost in
        rounding.

    Raises:
      ValueError: if lam < 0 or eps <= 0 (traced numbers are not checked).

    References:
      Aghajanyan et al., `Better Fine-Tuning by Reducing Representational Collapse <https://arxiv.org/abs/2008.03156>`_,
      2021
    """
    _check_weight("lam", lam)
    _check_positive("eps", eps)

    def term(step: Step, key: jax.Array) -> Term:
        if step.regression or is_plainly(lam, 0):
            return Term(jnp.zeros(len(step.logits)))
        noise_key, dropout_key = jax.random.split(key)
        embeddings = jax.lax.stop_gradient(step.embed())
        noise = jax.random.uniform(noise_key, embeddings.shape, embeddings.dtype, -eps, eps)
        noised = step.apply(step.params, dropout_key, inputs_embeds=embeddings + noise, **step.rest)
        return Term(symmetric_kl(step.logits, noised))

    return Objective("r3f", lam, term)


def r_drop(alpha: float | jax.Array = 1.0) -> Objective:
    r"""R-Drop: two passes with different dropout learn the task, and should agree.

    ::

        loss = (task_loss_1 + task_loss_2) / 2 + alpha * mean over rows of J(p, q) / 2
        loss = (task_loss_1 + task_loss_2) / 2 + alpha * mean over rows of (f_1(x) - f_2(x))^2     on regression

    The rule is the authors' description of their code (*readme*); gradients pass through both p and q. The mean over
    the rows, as of R3F, and the default alpha are *ours*. Two forward passes. Without dropout the regulariser is 0.

    Args:
      alpha: weight of the regulariser, not negative.

    Raises:
      ValueError: if alpha < 0 (traced numbers are not checked).

    References:
      Liang et al., `R-Drop: Regularized Dropout for Neural Networks <https://arxiv.org/abs/2106.14448>`_, 2021
    """
    _check_weight("alpha", alpha)

    def term(step: Step, key: jax.Array) -> Term:
        second = step.apply(step.params, key, **step.inputs)
        if step.regression:
            return Term(squared_difference(step.logits, second), (second,))
        return Term(symmetric_kl(step.logits, second) / 2, (second,))

    return Objective("r_drop", alpha, term)


def smart(
    alpha: float | jax.Array = 1.0,
    step_size: float | jax.Array = 1e-5,
    noise_std: float | jax.Array = 1e-5,
    eps: float | jax.Array = 1e-6,
) -> Objective:
    r"""SMART's regulariser: the answer should not change when the word embeddings shift where it changes most.

    ::

        l(x, x') = J(softmax(f(x)), softmax(f(x')));   (f(x) - f(x'))^2 on regression
        d_0 ~ N(0, noise_std^2) for each entry
        g    = gradient of l(x, x + d_0) with respect to d_0
        d    = d_0 + step_size * g / (max |g| + eps)      max over the entries of each token's embedding
        loss = task_loss + alpha * mean over rows of l(x, x + d)

    Numbers, l, the norm and what is held fixed are those of the authors' code (*code*): d is a constant; in the loss
    each KL holds the distribution fixed that it expects under, so that of the logits those of x are moved by p - q and
    those of x + d by q - p; gradients pass through x on both sides. Each pass draws its own dropout. *Ours* is to add
    the normalised step to d_0: of two releases of that code the earlier drops d_0, and the later divides
    d_0 + step_size * g by its own largest entry, which makes d of size 1 whatever the step; and g is that of l itself,
    theirs of a one-sided KL or an approximation. Three forward passes, and besides the loss's backward pass one to the
    embeddings alone. The paper's second part, Bregman proximal point optimisation, is not here.

    Args:
      alpha: weight of the regulariser, not negative.
      step_size: largest entry of the step, in units of the embeddings' entries; above 0. In bfloat16, 1e-5 is lost in
        rounding.
      noise_std: standard deviation of where it starts, in the same units; above 0, for at d_0 = 0 there is no gradient.
      eps: keeps a gradient of 0 from being divided by 0; above 0.

    Raises:
      ValueError: if alpha < 0 or another number is not above 0 (traced numbers are not checked).

    References:
      Jiang et al., `SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled
      Regularized Optimization <https://arxiv.org/abs/1911.03437>`_, 2020
    """
    _check_weight("alpha", alpha)
    for name, value in {"step_size": step_size, "noise_std": noise_std, "eps": eps}.items():
        _check_positive(name, value)

    def worst_shift(step: Step, embeddings: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, dropout_key = jax.random.split(key)
        # Held fixed before the inner gradient, so that the outer one neither sees nor keeps anything of it.
        params, embeddings, logits = jax.lax.stop_gradient((step.params, embeddings, step.logits))
        difference = squared_difference if step.regression else symmetric_kl

        def change(shift):
            moved = step.apply(params, dropout_key, inputs_embeds=embeddings + shift, **step.rest)
            return jnp.sum(difference(logits, moved))  # rows do not meet: each has its own gradient

        start = noise_std * jax.random.normal(noise_key, embeddings.shape, embeddings.dtype)
        gradient = jax.grad(change)(start)
        return start + step_size * gradient / (jnp.max(jnp.abs(gradient), axis=-1, keepdims=True) + eps)

    def term(step: Step, key: jax.Array) -> Term:
        if is_plainly(alpha, 0):
            return Term(jnp.zeros(len(step.logits)))
        shift_key, dropout_key = jax.random.split(key)
        embeddings = step.embed()
        shifted = embeddings + worst_shift(step, embeddings, shift_key)
        logits = step.apply(step.params, dropout_key, inputs_embeds=shifted, **step.rest)
        difference = squared_difference if step.regression else _symmetric_kl_of_fixed_targets
        return Term(difference(step.logits, logits))

    return Objective("smart", alpha, term)


def lnsr(layer: int, lam: float | jax.Array = 1.0, noise_std: float | jax.Array = 0.05) -> Objective:
    r"""LNSR: what noise on the output of one layer changes in the outputs of the layers above should be small.

    ::

        h_r: output of layer r;   k = ``layer``;   z ~ N(0, noise_std^2) for each entry
        h'_k = h_k + z, and h'_r for r > k what the layers above make of it
        change = sum over layers r > k of the mean over tokens and units of (h'_r - h_r)^2
        loss   = task_loss + lam * mean over rows of change

    That Gaussian noise goes into one layer and that the change above is penalised is the paper's (*abstract*). *Ours*:
    the squared difference and its mean over tokens (padding left out) and units, the numbers, that both passes have the
    same dropout, so that noise is all that differs, and gradients through both. With the model's ``first_token_only``
    the last layer counts by its first token alone, as that is all there is of it. Layers up to k are computed once.

    Args:
      layer: k; 0 is the output of the embeddings, the last but one the highest that has a layer above.
      lam: weight of the regulariser, not negative.
      noise_std: standard deviation of the noise, in units of the hidden states' entries, which LayerNorm leaves at
        around 1; above 0.

    Raises:
      ValueError: if layer or lam is negative or noise_std not above 0 (traced numbers are not checked); from the loss,
        if the model has no layer above.

    References:
      Hua et al., `Noise Stability Regularization for Improving BERT Fine-tuning <https://arxiv.org/abs/2107.04835>`_,
      2021, and `Fine-tuning Pre-trained Language Models with Noise Stability Regularization
      <https://arxiv.org/abs/2206.05658>`_, 2022
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer={layer!r} must be a number of a layer, from 0 (the embeddings)")
    _check_weight("lam", lam)
    _check_positive("noise_std", noise_std)

    def term(step: Step, key: jax.Array) -> Term:
        if is_plainly(lam, 0):
            return Term(jnp.zeros(len(step.logits)))
        if layer + 1 >= len(step.hidden_states):
            raise ValueError(f"lnsr: layer={layer} has no layer above, of {len(step.hidden_states) - 1}")
        hidden = step.hidden_states[layer]
        noised = hidden + noise_std * jax.random.normal(key, hidden.shape, hidden.dtype)
        _, above = step.apply(
            step.params, step.key, continue_from=(layer, noised), output_hidden_states=True, **step.rest
        )
        mask = step.inputs.get("attention_mask", jnp.ones(hidden.shape[:2]))
        pairs = zip(above[1:], step.hidden_states[layer + 1 :], strict=True)
        changes = [_mean_over_tokens(jnp.square(a.astype(jnp.float32) - b), mask) for a, b in pairs]
        return Term(sum(changes, start=jnp.zeros(len(hidden))))

    return Objective("lnsr", lam, term, needs_hidden_states=not is_plainly(lam, 0))


def symmetric_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """J(p, q) = KL(p||q) + KL(q||p) of each row, (batch,), from logits (batch, classes).

    As one sum over products of differences it is accurate, and not negative, where p and q nearly agree.

    Examples:
      >>> print(symmetric_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
      [0.27465308]
    """
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    return jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)


def squared_difference(logits: jax.Array, other: jax.Array) -> jax.Array:
    """The squared difference of two scores of each row, (batch,), from logits (batch, 1)."""
    return jnp.square(logits.astype(jnp.float32) - other)[:, 0]


def _symmetric_kl_of_fixed_targets(logits, other):
    """J(p, q), but differentiated as KL(fixed p||q) + KL(fixed q||p): its gradient is p - q and q - p of the logits."""
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)


def _mean_over_tokens(values, mask):
    """Means (batch,) over units and the mask's tokens, from (batch, length, units), or its first token alone."""
    mask = mask[:, : values.shape[1], None]
    return jnp.sum(values * mask, axis=(1, 2)) / jnp.maximum(values.shape[2] * jnp.sum(mask, axis=(1, 2)), 1)


def _apply(apply_fn, params, key, deterministic, inputs):
    rngs = None if deterministic else {"dropout": key}
    return apply_fn({"params": params}, **inputs, deterministic=deterministic, rngs=rngs)


def _check_weight(argument, value):
    check_number(argument, value, lambda x: x >= 0, "at least 0")


def _check_positive(argument, value):
    check_number(argument, value, lambda x: 0 < x < float("inf"), "above 0")
