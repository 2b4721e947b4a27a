"""Child-Tuning: keeps only a part of the gradient, drawn anew at each step (F) or chosen once before training (D).

Both variants change the gradient. Place them first in a chain, before clipping and the optimizer.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import random, trees
from pats_jax.companions.ranking import check_keep_fraction, finite_square, kth_largest, rank
from pats_jax.trees import is_plainly


class ChildTuningFState(NamedTuple):
    """State of `child_tuning_f`.

    Attributes:
      count: number of updates so far, () int32.
      stored_key: the key, the same at every step; each step's draws are folded from it and ``count``.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


class ChildTuningDState(NamedTuple):
    """State of `child_tuning_d`.

    Attributes:
      keep: a tree like params of bools, of the leaf's shape or (); None at leaves that are trained whole.
    """

    keep: Any


def child_tuning_f(
    keep_fraction: float | jax.Array, *, key: int | jax.Array, mask: Any = None, layer_axis: trees.LayerAxis = None
) -> optax.GradientTransformation:
    r"""Child-Tuning F: keeps a random share of the gradient at each step, scaled up to keep its mean.

    ``g <- g * Bernoulli(p) / p`` with p = ``keep_fraction``, drawn for every entry at every step (*code*; the authors
    use it on every parameter).

    Place it first in a chain, before clipping and the optimizer. With ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: p in (0, 1]; the authors' 0.3 keeps 30 %.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside keep their gradient. None
        means every leaf.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own draws, and a mask may have an array of bools (layers,) for such a leaf.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if keep_fraction is outside (0, 1]; traced numbers are not checked.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> tx = pats_jax.child_tuning_f(0.5, key=0)
      >>> grads, _ = tx.update(jnp.ones(6), tx.init(jnp.zeros(6)))
      >>> print(grads)
      [2. 0. 2. 2. 2. 2.]

    References:
      Xu et al., `Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning
      <https://arxiv.org/abs/2109.05687>`_, 2021
    """
    check_keep_fraction(keep_fraction)
    mask = False if is_plainly(keep_fraction, 1) else mask
    key = trees.own_key(key, "child_tuning_f")

    def init(params):
        del params
        return ChildTuningFState(jnp.zeros([], jnp.int32), random.StoredKey.of(key))

    def update(updates, state, params=None):
        del params
        chosen = trees.resolve_layer_mask(mask, updates)
        thinned = trees.cut_to(chosen, updates)
        axes = trees.held_layer_axes(layer_axis, updates, thinned)
        keys = trees.leaf_keys(jax.random.fold_in(state.key, state.count), thinned, axes)

        def thin(g, tensor_key):
            kept = jax.random.bernoulli(tensor_key, keep_fraction, g.shape)
            return (g * kept / keep_fraction).astype(g.dtype)

        def thin_leaf(g, _, axis, chosen, leaf_keys):
            new = trees.each_layer(thin, axis, g, per_layer=(leaf_keys,))
            return trees.where_chosen(chosen, axis, new, g)

        updates = trees.replace_held(thin_leaf, updates, thinned, axes, chosen, keys)
        return updates, ChildTuningFState(optax.safe_increment(state.count), state.stored_key)

    return optax.GradientTransformation(init, update)


def child_tuning_d(keep_mask: Any) -> optax.GradientTransformation:
    r"""Child-Tuning D: keeps the gradient of only a part of the parameters, chosen once before training.

    ``g <- g * keep_mask``, not rescaled (*code*). `fisher_mask` makes the mask. Momentum and weight decay still move
    the weights that are left out; see `freeze_unselected`.

    Place it first in a chain, before clipping and the optimizer.

    Args:
      keep_mask: a tree prefix of bool arrays of the parameters' shapes; a single bool stands for a whole subtree, and
        None means True.

    Returns:
      A gradient transformation; its state holds a copy of the mask.

    Raises:
      ValueError: from ``init``, on a mask that is not of bools, or whose structure or shapes are not those of the
        parameters.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> tx = pats_jax.child_tuning_d({"encoder": jnp.array([True, False]), "head": True})
      >>> grads = {"encoder": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
      >>> grads, _ = tx.update(grads, tx.init(grads))
      >>> print(grads["encoder"], grads["head"])
      [1. 0.] [3.]

    References:
      Xu et al., `Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning
      <https://arxiv.org/abs/2109.05687>`_, 2021
    """

    def init(params):
        def hold(keep, part):
            return jax.tree.map(functools.partial(_hold_mask, keep), part, is_leaf=trees.is_masked)

        treedef: Any  # its methods are not in JAX's type stubs
        leaves, treedef = jax.tree.flatten(keep_mask, is_leaf=trees.is_absent)
        expected = "a tree prefix of bools, or of arrays of bools of the parameters' shapes"
        parts = trees.parts_of(treedef, keep_mask, params, "keep_mask", expected)
        return ChildTuningDState(treedef.unflatten(map(hold, leaves, parts)))

    def update(updates, state, params=None):
        del params
        return trees.replace_held(jnp.multiply, updates, state.keep), state

    return optax.GradientTransformation(init, update)


def fisher_mask(loss_fn: Any, params: Any, batches: Iterable[Any], keep_fraction: float, *, mask: Any = None) -> Any:
    r"""Computes the mask of Child-Tuning D: where the Fisher information, estimated on training batches, is largest.

    ``F = mean over batches of g * g``, with g the gradient of a batch's mean loss at fixed parameters. An entry is kept
    if F is at least the ceil(N * ``keep_fraction``)-th largest of all N entries together: one GLOBAL threshold
    (*code*). Entries that tie with it are kept. A squared gradient that is not finite counts as 0 (*ours*).

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (mean loss, metrics)`` as for `pats_jax.make_train_step`, without
        dropout: its key is None.
      params: the parameters before training.
      batches: at least one batch; the authors use the whole training set once. Compiled once per loss_fn and shape.
      keep_fraction: share of the entries to keep, in (0, 1]; the authors use 0.3.
      mask: a tree prefix of bools, or a function of params that returns one: the leaves to select entries from, the
        encoder's layers in the authors' code. None means every leaf.

    Returns:
      A tree like params for `child_tuning_d`: bool arrays of the parameters' shapes, True outside ``mask``.

    Raises:
      ValueError: if keep_fraction is outside (0, 1], or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> def loss_fn(params, batch, key):
      ...     return jnp.sum(params["a"] * batch) + jnp.sum(params["b"] ** 2), {}
      >>> keep = pats_jax.fisher_mask(loss_fn, params, [jnp.array([9.0, 1.0]), jnp.array([0.0, 1.0])], 0.5)
      >>> print(keep["a"], keep["b"])
      [ True False] [False  True]
    """
    check_keep_fraction(keep_fraction)
    measured = trees.cut_to(trees.resolve_mask(mask, params), params)
    total, count = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), measured), 0
    for batch in batches:
        total, count = _add_squares(loss_fn, total, params, batch), count + 1
    if not count:
        raise ValueError("fisher_mask needs at least one batch")
    everything = jax.tree.map(lambda p: True, params)
    if is_plainly(keep_fraction, 1):
        return everything
    return trees.replace_held(lambda _, kept: kept, everything, _keep_largest(total, keep_fraction))


@functools.partial(jax.jit, static_argnums=1)
def _keep_largest(scores, keep_fraction):
    """Bools at a tree's scores: whether they are among the largest share of all scores together."""
    leaves = jax.tree.leaves(scores)
    (threshold,) = kth_largest([leaves], [rank(sum(leaf.size for leaf in leaves), keep_fraction)])
    return jax.tree.map(lambda s: s >= threshold, scores)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_squares(loss_fn, total, params, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch, None)
    return trees.map_held(lambda t, g: t + finite_square(g), total, grads)


def _hold_mask(keep, param):
    """One leaf of a mask as state: a copy, or None where everything is kept.

    Raises:
      ValueError: if it does not have bools or the parameter's shape.
    """
    if trees.is_masked(param):
        return param
    if keep is None or keep is True:
        return None
    if not isinstance(keep, bool | np.bool_ | np.ndarray | jax.Array) or jnp.asarray(keep).dtype != bool:
        raise ValueError(f"keep_mask must be of bools, got {keep!r:.60}")
    if np.shape(keep) not in ((), param.shape):
        raise ValueError(f"keep_mask of shape {np.shape(keep)} does not fit a parameter of shape {param.shape}")
    return jnp.array(keep)
