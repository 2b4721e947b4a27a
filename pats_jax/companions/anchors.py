"""Holding on to the pretrained weights: Mixout and L2-SP, as Optax gradient transformations.

Both go first in a chain, before clipping and the optimizer. Under Mixout (and under DPS Mix, which works with the same
formula) the forward pass of a training step does not use the parameters themselves but those of `forward_params`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import random, trees
from pats_jax.trees import ForwardMix, check_number, is_plainly


class MixoutState(NamedTuple):
    """State of `mixout`.

    Attributes:
      count: () int32, number of updates made.
      stored_key: the same at every step; the masks of a step are folded from it and `count`.
      forward: what `forward_params` mixes at the coming step; its target is the parameters at init.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey
    forward: ForwardMix

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


class L2SpState(NamedTuple):
    """State of `l2_sp`.

    Attributes:
      pretrained: a tree like params, the parameters at init; None at the new head.
    """

    pretrained: Any


def mixout(
    drop_fraction: float | jax.Array, *, key: int | jax.Array, mask: Any = None, input_axis: int = 0
) -> optax.GradientTransformation:
    r"""Mixout: at every training step, a random share of the input features works with the pretrained weights.

    At each step, for every matrix W with pretrained W_0 and p = ``drop_fraction``::

        m     ~ Bernoulli(1-p)                               one draw for each input feature, shared by all outputs
        W_eff = ((1-m) * W_0 + m * W - p * W_0) / (1-p)      in the forward pass: see `forward_params`
        g     = dL/dW_eff * m                                not divided by 1-p

    The rule is that of the authors' code (*code*). What it does to leaves without rows is ours: a scalar or 1-D leaf
    gets one draw for each entry. Mixout takes the place of dropout on the layers that it is used on.

    Goes first in a chain, before clipping and the optimizer. With ``drop_fraction=0`` it changes no bit.

    Args:
      drop_fraction: p in [0, 1); 0.7 to 0.9 is usual.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside are used as they are and
        hold no state. None is every leaf.
      input_axis: the axis of input features, 0 in Flax's kernels.

    Returns:
      A gradient transformation; its state holds a copy of the parameters given to ``init``.

    Raises:
      ValueError: if drop_fraction is outside [0, 1) (traced numbers are not checked); from ``init``, if a leaf of two
        or more dimensions has no such axis.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> tx = optax.chain(pats_jax.mixout(0.5, key=0), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> now = {"kernel": jnp.full((4, 2), 3.0)}  # training has moved every weight by 2
      >>> print(pats_jax.forward_params(state, now)["kernel"][:, 0])  # pretrained, or moved by 2 / (1 - 0.5)
      [1. 1. 1. 5.]
      >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, state, now)
      >>> print(updates["kernel"][:, 0])
      [-0.  -0.  -0.  -0.1]

    References:
      Lee et al., `Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models
      <https://arxiv.org/abs/1909.11299>`_, 2020
    """
    check_number("drop_fraction", drop_fraction, lambda x: 0 <= x < 1, "in [0, 1)")
    mask = False if is_plainly(drop_fraction, 0) else mask
    keep_fraction = 1 - drop_fraction
    key = trees.own_key(key, "mixout")

    def init(params):
        mixed = trees.cut_to(trees.resolve_mask(mask, params), params)
        kept = draw_rows(key, 0, input_rows(mixed, input_axis), keep_fraction)
        forward = ForwardMix(jax.tree.map(jnp.copy, mixed), kept, jnp.asarray(keep_fraction, jnp.float32))
        return MixoutState(jnp.zeros([], jnp.int32), random.StoredKey.of(key), forward)

    def update(updates, state, params=None):
        del params
        kept = state.forward.kept
        updates = trees.replace_held(jnp.multiply, updates, kept)
        count = optax.safe_increment(state.count)
        forward = state.forward._replace(
            kept=draw_rows(state.key, count, kept, keep_fraction),
            keep_fraction=jnp.asarray(keep_fraction, jnp.float32),
        )
        return updates, MixoutState(count, state.stored_key, forward)

    return optax.GradientTransformation(init, update)


def l2_sp(
    pretrained_strength: float | jax.Array, head_strength: float | jax.Array, *, head_mask: Any
) -> optax.GradientTransformation:
    r"""L2-SP: weight decay towards the pretrained weights, and towards zero on the new head.

    The gradient of ``loss + a/2 * ||w - w_0||^2`` over the pretrained parameters ``+ b/2 * ||w||^2`` over the head::

        g + a * (w - w_0)       pretrained, w_0 the parameters at init
        g + b * w               head

    with a = ``pretrained_strength`` and b = ``head_strength`` (*paper*). As part of the loss, the penalty passes
    through clipping and the optimizer, unlike AdamW's decoupled decay, which then belongs at 0.

    Goes first in a chain, before clipping and the optimizer. A strength of 0 changes no bit.

    Args:
      pretrained_strength: a >= 0.
      head_strength: b >= 0.
      head_mask: a tree prefix of bools, or a function of params that returns one: which leaves are new. ``False`` if
        there are none.

    Returns:
      A gradient transformation whose ``update`` requires params; its state holds a copy of the pretrained parameters.

    Raises:
      ValueError: on a negative strength (traced numbers are not checked) or no head_mask; from ``update`` without
        params.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"encoder": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
      >>> tx = pats_jax.l2_sp(0.5, 0.1, head_mask={"encoder": False, "head": True})
      >>> state = tx.init(params)
      >>> now = {"encoder": jnp.array([2.0, 2.0]), "head": jnp.array([4.0])}
      >>> grads, state = tx.update({"encoder": jnp.zeros(2), "head": jnp.zeros(1)}, state, now)
      >>> print(grads["encoder"], grads["head"])
      [0.5 0. ] [0.4]

    References:
      Li et al., `Explicit Inductive Bias for Transfer Learning with Convolutional Networks
      <https://arxiv.org/abs/1802.01483>`_, 2018
    """
    for name, strength in (("pretrained_strength", pretrained_strength), ("head_strength", head_strength)):
        check_number(name, strength, lambda x: 0 <= x < math.inf, "a finite number >= 0")
    if head_mask is None:
        raise ValueError("head_mask=None: say which leaves are the new head, or False if there are none")

    def init(params):
        pretrained = jax.tree.map(lambda is_head: not is_head, trees.resolve_mask(head_mask, params))
        return L2SpState(jax.tree.map(jnp.copy, trees.cut_to(pretrained, params)))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("l2_sp needs the parameters: call tx.update(grads, opt_state, params)")

        def pull(anchor, g, w):
            strength = head_strength if anchor is None else pretrained_strength
            if g is None or trees.is_masked(anchor) or is_plainly(strength, 0):
                return g
            away = w.astype(jnp.float32) - (0.0 if anchor is None else anchor.astype(jnp.float32))
            return (g + strength * away).astype(g.dtype)

        return jax.tree.map(pull, state.pretrained, updates, params, is_leaf=trees.is_absent), state

    return optax.GradientTransformation(init, update)


def input_rows(tree: Any, input_axis: int) -> Any:
    """For every leaf an array of bools with one entry for each of its input features, that broadcasts to the leaf.

    A scalar or 1-D leaf has no rows: one entry for each of its own.

    Raises:
      ValueError: if a leaf of two or more dimensions has no such axis.
    """

    def rows(leaf):
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, bool)
        if not -leaf.ndim <= input_axis < leaf.ndim:
            raise ValueError(f"input_axis={input_axis} is not an axis of a parameter of shape {leaf.shape}")
        return jnp.ones([n if axis == input_axis % leaf.ndim else 1 for axis, n in enumerate(leaf.shape)], bool)

    return jax.tree.map(rows, tree)


def draw_rows(key: jax.Array, count: jax.Array | int, rows: Any, keep_fraction: float | jax.Array) -> Any:
    """Bools of the shapes of ``rows``, True with probability keep_fraction, drawn anew for every ``count``."""
    keys = trees.leaf_keys(jax.random.fold_in(key, count), rows)
    return trees.map_held(lambda row, k: jax.random.bernoulli(k, keep_fraction, row.shape), rows, keys)
