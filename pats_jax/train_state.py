"""The training state, and pure functions for training, loss and prediction: the same under jit, pmap and a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from flax.training import train_state

from pats_jax import random, transforms, trees
from pats_jax.errors import InputError

Batch = dict[str, Any]  # of arrays (batch, ...), NumPy's or JAX's
Metrics = dict[str, jax.Array]
IGNORED = -100  # the label of a place in a target that the loss leaves out, as in torch

LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
# like jax.value_and_grad of a LossFn with has_aux: (params, batch, key) -> ((loss, metrics), gradient)
ValueAndGrad = Callable[[Any, Batch, jax.Array], tuple[tuple[jax.Array, Metrics], Any]]
Gradient = Callable[[ValueAndGrad, Any, Batch, jax.Array], tuple[tuple[jax.Array, Metrics], Any]]
RowLoss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits (batch, num_labels), labels) -> (batch,)


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the key that the randomness of each step (dropout) is folded from.

    Attributes:
      stored_key: the run's key, which is constant; ``key`` gives it as a typed key, and ``replace(key=...)`` takes one.
      frozen: the parameters that are not trained, which have neither gradient nor optimizer state: a tree like params
        with None at trained leaves, where ``params`` has None at frozen ones. None if all parameters are trained.
    """

    stored_key: random.StoredKey
    frozen: Any = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Flax gives every subclass a `replace` that knows the fields only
        cls.replace = _replace  # type: ignore[assignment, method-assign]

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key

    @property
    def all_params(self) -> Any:
        """The whole tree of parameters, trained and frozen."""
        return trees.combine(self.params, self.frozen)

    @classmethod
    def create(  # type: ignore[override]  # key is required here
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: optax.GradientTransformation,
        key: int | jax.Array,
        trainable: Any = None,
    ):
        """Creates the state before the first step.

        Args:
          apply_fn: the model's apply function.
          params: a tree of parameters; training steps that donate the state invalidate them, so copy them if you need
            them later.
          tx: any Optax optimizer; it sees only the trainable parameters, and its ``update`` gets no extra arguments.
          key: an int (a key of the fast kind) or a typed key.
          trainable: a tree of bools like params, True at leaves to train; None trains all.

        Raises:
          TypeError: if ``tx`` is not an optimizer.
        """
        trees.check_optimizer("TrainState.create", tx)
        stored_key, frozen = random.StoredKey.of(random.as_key(key)), None
        if trainable is not None:
            params, frozen = trees.partition(trainable, params)
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, stored_key=stored_key, frozen=frozen)
        transforms.warn_of_followers(state.opt_state)
        return state.replace(step=jnp.zeros([], jnp.int32))  # an array from the start: the step compiles once


def _replace(state: TrainState, **updates: Any) -> TrainState:
    """The state with other fields, or with another ``key``."""
    if "key" in updates:
        updates["stored_key"] = random.StoredKey.of(updates.pop("key"))
    return dataclasses.replace(state, **updates)


TrainState.replace = _replace  # type: ignore[assignment, method-assign]
serialization.register_serialization_state(  # so that Flax's own files hold such states
    random.StoredKey,
    lambda stored: {"words": stored.words},
    lambda stored, saved: dataclasses.replace(stored, words=saved["words"]),
)


def make_train_step(
    loss_fn: LossFn,
    *,
    axis_name: str | None = None,
    accumulation_steps: int = 1,
    skip_nonfinite: bool = False,
    norms: bool = True,
    gradient: Gradient | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a pure training step; wrap it in ``jax.jit`` or ``jax.pmap`` and donate the state.

    Micro-batches and the shards of a named axis are weighted by the sum of their ``batch["weights"]``, or by their
    number of rows without weights, so the result is the mean over the global batch however it is split.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (mean loss, metrics)``, with a loss () float32 and a dict of metrics (),
        all (weighted) means over the rows of the batch; the key is for dropout.
      axis_name: the name of the axis that `jax.pmap` maps over; None under jit, on one device or a mesh.
      accumulation_steps: number of micro-batches per batch; rows are dealt to them in turn, so on a mesh every device
        keeps its own rows.
      skip_nonfinite: whether a step with a non-finite loss or gradient norm leaves parameters and optimizer state
        unchanged; only ``state.step`` advances.
      norms: whether to measure ``param_norm`` and ``update_norm``. An accelerator then reads and writes every parameter
        once more: BERT-base's step took 10.7 ms with them and 10.0 ms without, in two calls on an H100. Use
        `global_norms` to measure them occasionally.
      gradient: ``gradient(value_and_grad, params, batch, key) -> ((loss, metrics), gradient)``, in place of one call
        ``value_and_grad(params, batch, key)`` with the same result; see `pats_jax.sam`. Each call gives the means over
        the global batch.

    Returns:
      ``step(state, batch) -> (state, metrics)``, where batch is a dict of arrays (batch, ...). The metrics, () each,
      are those of loss_fn, ``loss`` and ``grad_norm``, the global norm of the raw gradient; with ``norms``, also
      ``param_norm``, that of the trained parameters before the step, and ``update_norm``, that of the update; with
      ``skip_nonfinite``, also ``skipped``, 1 for a skipped step. Loss and gradient are computed at
      `pats_jax.forward_params`: the parameters themselves, unless the optimizer contains Mixout, DPS Mix or Perturbed.

    Raises:
      ValueError: if accumulation_steps < 1; from the step, if it does not divide the number of rows.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps} must be at least 1")

    means = _means_of(loss_fn)

    def weighted_sums(params, frozen, batch, key):
        weight = _total_weight(batch)
        # filler alone has no mean: its sum is 0 even where the loss divides 0 by 0
        return jax.tree.map(lambda x: jnp.where(weight > 0, x * weight, 0), means(params, frozen, batch, key)), weight

    def global_means(params, frozen, batch, key):
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        elif accumulation_steps == 1:
            return means(params, frozen, batch, key)
        totals, weight = _accumulate(functools.partial(weighted_sums, params, frozen), batch, key, accumulation_steps)
        if axis_name is not None:
            totals, weight = jax.lax.psum((totals, weight), axis_name)
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-30).astype(x.dtype), totals)

    metrics_and_grads = _means_by(gradient, global_means)

    def step(state, batch):
        params = trees.forward_params(state.opt_state, state.params)
        key = jax.random.fold_in(state.key, state.step)
        metrics, grads = metrics_and_grads(params, state.frozen, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if norms:
            metrics["param_norm"] = optax.tree.norm(state.params)
        if skip_nonfinite:
            metrics["skipped"] = 1.0 - _are_finite(metrics)
        params, opt_state, update_norm = _update_unless(metrics.get("skipped"), state, grads)
        if norms:
            metrics["update_norm"] = update_norm
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def _means_of(loss_fn):
    """``means(params, frozen, batch, key) -> (metrics with the loss, gradient of the trained parameters)``."""

    def loss_of_trained(params, frozen, batch, key):
        return loss_fn(trees.combine(params, frozen), batch, key)

    value_and_grad = jax.value_and_grad(loss_of_trained, has_aux=True)

    def means(params, frozen, batch, key):
        (loss, metrics), grads = value_and_grad(params, frozen, batch, key)
        return {"loss": loss, **metrics}, grads

    return means


def _means_by(gradient, means):
    """As ``means``, see `_means_of`, but through ``gradient`` if there is one."""
    if gradient is None:
        return means

    def through_gradient(params, frozen, batch, key):
        def value_and_grad(params, batch, key):
            metrics, grads = means(params, frozen, batch, key)
            loss = metrics.pop("loss")
            return (loss, metrics), grads

        (loss, metrics), grads = gradient(value_and_grad, params, batch, key)
        return {"loss": loss, **metrics}, grads

    return through_gradient


def _update_unless(skipped, state, grads):
    """As `_update`, but unchanged where ``skipped`` is 1."""
    return _update(state, grads) if skipped is None else _update_if(skipped == 0, state, grads)


def _are_finite(metrics):
    """Whether loss and norms are finite.

    Parameters that are not finite make the loss non-finite anyway. Their norm is included so that XLA computes it
    before they are overwritten, and need not copy them.
    """
    return jnp.all(jnp.isfinite(jnp.stack([metrics[n] for n in ("loss", "grad_norm", "param_norm") if n in metrics])))


def _accumulate(sums, batch, key, accumulation_steps):
    """The sum of ``sums(micro_batch, key)`` over the micro-batches of a batch, each with its own key."""
    if accumulation_steps == 1:
        return sums(batch, key)

    def add(total, numbered):
        index, micro_batch = numbered
        return jax.tree.map(jnp.add, total, sums(micro_batch, jax.random.fold_in(key, index))), None

    micro_batches = jax.tree.map(lambda x: _deal(x, accumulation_steps), batch)
    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], micro_batches), key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(accumulation_steps), micro_batches))[0]


def global_norms(before: Any, after: Any) -> Metrics:
    """``param_norm`` and ``update_norm``, () float32, of a step, given the parameters before and after it."""
    return {"param_norm": optax.tree.norm(before), "update_norm": optax.tree.norm(optax.tree.sub(after, before))}


def make_loss_fn(
    apply_fn: Callable, *, regression: bool = False, deterministic: bool = False, row_loss: RowLoss | None = None
) -> LossFn:
    """Makes a loss function: the weighted mean of cross-entropy, or of the squared error for regression.

    Args:
      apply_fn: a model's apply function, which returns logits (batch, num_labels).
      regression: whether labels are float scores (batch,), with logits (batch, 1). Otherwise they are int32 classes
        (batch,) or, where a row may have several labels, 0 or 1, (batch, num_labels); the loss of a row is then the
        mean over its labels of the sigmoid cross-entropy.
      deterministic: whether dropout is off; the key is then unused.
      row_loss: ``row_loss(logits, labels)``, the loss of each row, (batch,); None: as above.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, {})`` for `make_train_step`. A batch is a dict of arrays: ``input_ids``,
      ``labels`` and optionally ``attention_mask``, ``token_type_ids`` and ``weights``, (batch,).

    Raises:
      InputError: from ``loss_fn``, if a batch has no labels.
    """

    costs = row_loss or functools.partial(losses, regression=regression)

    def loss_fn(params, batch, key):
        check_labels(batch)
        rngs = None if deterministic else {"dropout": key}
        logits = apply_fn({"params": params}, **model_inputs(batch), deterministic=deterministic, rngs=rngs)
        return weighted_mean(costs(logits, batch["labels"]), batch.get("weights")), {}

    return loss_fn


def make_seq2seq_loss_fn(apply_fn: Callable, *, label_smoothing: float = 0.0, deterministic: bool = False) -> LossFn:
    """Mean cross-entropy of the labels' words, over all labels that are not -100.

    With smoothing, as Transformers' Trainer has it, a label costs::

        (1 - label_smoothing) * -log p(label) + label_smoothing * mean over all words of -log p(word)

    Args:
      apply_fn: an encoder-decoder's apply function that gives logits (batch, length, vocab_size), such as that of
        `pats_jax.models.T5`.
      label_smoothing: at least 0, below 1.
      deterministic: whether dropout is off; the key is not used then.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, {})`` for `make_train_step`. A batch is a dict of arrays: ``input_ids``
      and ``labels`` (batch, length), and where there are any, ``attention_mask`` and ``weights`` of the rows: then each
      row counts with the mean of its labels, times its weight. With the weights `label_counts` this is the mean over
      all labels, also of a batch that is split over micro-batches or devices.

    Raises:
      ValueError: if label_smoothing is out of range.
      InputError: from `loss_fn`, if a batch has no labels.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")

    def loss_fn(params, batch, key):
        check_labels(batch)
        labels, rngs = batch["labels"], None if deterministic else {"dropout": key}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits = apply_fn({"params": params}, **inputs, labels=labels, deterministic=deterministic, rngs=rngs)
        losses, counts = jnp.sum(_word_losses(logits, labels, label_smoothing), axis=1), label_counts(labels)
        if "weights" not in batch:
            return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1), {}
        return weighted_mean(losses / jnp.maximum(counts, 1), batch["weights"]), {}

    return loss_fn


def label_counts(labels: Any) -> jax.Array:
    """How many labels (batch, length) each row has that are not -100: float32 (batch,)."""
    return jnp.sum(labels != IGNORED, axis=1, dtype=jnp.float32)


def _word_losses(logits, labels, label_smoothing):
    """The cost of each label, (batch, length) float32; 0 of those that are ignored."""
    logits, is_label = logits.astype(jnp.float32), labels != IGNORED
    total = jax.nn.logsumexp(logits, axis=-1)
    # chosen by comparison: the gradient is then no scatter
    chosen = jnp.arange(logits.shape[-1]) == jnp.where(is_label, labels, 0)[..., None]
    losses = total - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (total - jnp.mean(logits, axis=-1))
    return jnp.where(is_label, losses, 0)


def make_predict_step(apply_fn: Callable) -> Callable[[Any, Batch], jax.Array]:
    """Makes ``predict(params, batch) -> logits``, (batch, num_labels) float32, without dropout."""

    def predict(params, batch):
        return apply_fn({"params": params}, **model_inputs(batch), deterministic=True).astype(jnp.float32)

    return predict


def losses(logits: jax.Array, labels: jax.Array, regression: bool) -> jax.Array:
    """The cross-entropy or squared error of each row, (batch,) float32, from logits (batch, num_labels).

    With labels (batch, num_labels) of 0 and 1, it is the mean over them of the sigmoid cross-entropy.
    """
    logits = logits.astype(jnp.float32)
    if regression:
        return jnp.square(logits[:, 0] - labels)
    if labels.ndim == 2:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """sum(weights * values) / sum(weights), () float32; the plain mean without weights, 0 if all weights are 0."""
    if weights is None:
        return jnp.mean(values)
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-30)


def parameter_name(path: tuple) -> str:
    """A parameter's path in the tree as a dotted name: ``bert.encoder.layer.0.output.dense.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def check_labels(batch: Batch) -> None:
    """Raises InputError if a batch has no labels to learn from."""
    if "labels" not in batch:
        raise InputError(
            f"the batch has no labels, only {', '.join(batch) or 'nothing'}; add the classes or scores of its rows: "
            'batch | {"labels": labels}'
        )


def model_inputs(batch: Batch) -> Batch:
    """The entries of a batch that are a model's inputs."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def _update(state, grads):
    """The new parameters and optimizer state, and the norm of the update."""
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, optax.tree.norm(updates)


def _update_if(finite, state, grads):
    """As `_update` if ``finite``; else params and state unchanged, and a norm of 0."""
    return jax.lax.platform_dependent(finite, state, grads, cpu=_update_in_branch, default=_update_and_select)


def _update_and_select(finite, state, grads):
    """Selects entry by entry, in the kernels that compute the update, which read the old values anyway."""
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.asarray(-0.0, u.dtype)), updates)  # x + -0 is x
    opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state)
    return optax.apply_updates(state.params, updates), opt_state, optax.tree.norm(updates)


def _update_in_branch(finite, state, grads):
    """Runs the optimizer inside a branch: if it selected afterwards, XLA's CPU compiler would copy the old state first.

    The updates are returned from the branch and added outside. Otherwise XLA would compute them, noise included, twice:
    once to add them, once for the norm.
    """
    arguments = (grads, state.opt_state, state.params)
    shapes = jax.eval_shape(state.tx.update, *arguments)[0]

    def keep(grads, opt_state, params):
        return jax.tree.map(lambda s: jnp.full(s.shape, -0.0, s.dtype), shapes), opt_state  # x + -0 is x, 0 or -0 too

    updates, opt_state = jax.lax.cond(finite, state.tx.update, keep, *arguments)
    return optax.apply_updates(state.params, updates), opt_state, optax.tree.norm(updates)


def _total_weight(batch):
    if "weights" in batch:
        return jnp.sum(batch["weights"]).astype(jnp.float32)
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def _deal(x, parts):
    if x.shape[0] % parts:
        raise ValueError(f"accumulation_steps={parts} does not divide the batch of {x.shape[0]} rows")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
