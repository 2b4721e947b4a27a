"""L2-SP: weight decay towards the pretrained weights."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.trees import check_number, is_plainly


class L2SpState(NamedTuple):
    """State of `l2_sp`.

    Attributes:
      pretrained: the parameters at init, a tree like params; None at the new head.
    """

    pretrained: Any


def l2_sp(
    pretrained_strength: float | jax.Array, head_strength: float | jax.Array, *, head_mask: Any
) -> optax.GradientTransformation:
    r"""L2-SP: weight decay towards the pretrained weights, and towards zero on the new head.

    The gradient of ``loss + a/2 * ||w - w_0||^2`` over the pretrained parameters ``+ b/2 * ||w||^2`` over the head::

        g + a * (w - w_0)       pretrained, w_0 the parameters at init
        g + b * w               head

    with a = ``pretrained_strength`` and b = ``head_strength`` (*paper*). As part of the loss, the penalty passes
    through clipping and the optimizer, unlike AdamW's decoupled weight decay, which you should then set to 0.

    Place it first in a chain, before clipping and the optimizer. With a strength of 0 it changes no bit.

    Args:
      pretrained_strength: a >= 0.
      head_strength: b >= 0.
      head_mask: a tree prefix of bools, or a function of params that returns one: True at the leaves of the new head.
        ``False`` if there are none.

    Returns:
      A gradient transformation whose ``update`` requires params; its state holds a copy of the pretrained parameters.

    Raises:
      ValueError: if a strength is negative (traced numbers are not checked), or head_mask is None; from ``update``
        without params.

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
        pretrained = jax.tree.map(lambda is_head: not is_head, trees.resolve_mask(head_mask, params, "head_mask"))
        return L2SpState(jax.tree.map(jnp.copy, trees.cut_to(pretrained, params)))

    def update(updates, state, params=None):
        trees.require_params("l2_sp", params)

        def pull(anchor, g, w):
            strength = head_strength if anchor is None else pretrained_strength
            if g is None or trees.is_masked(anchor) or is_plainly(strength, 0):
                return g
            away = w.astype(jnp.float32) - (0.0 if anchor is None else anchor.astype(jnp.float32))
            return (g + strength * away).astype(g.dtype)

        return jax.tree.map(pull, state.pretrained, updates, params, is_leaf=trees.is_absent), state

    return optax.GradientTransformation(init, update)
