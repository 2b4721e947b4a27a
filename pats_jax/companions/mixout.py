"""Mixout: at each training step, a random share of the input features uses the pretrained weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import random, trees
from pats_jax.trees import ForwardMix, check_number, is_plainly


class MixoutState(NamedTuple):
    """State of `mixout`.

    Attributes:
      count: number of updates so far, () int32.
      stored_key: the key, the same at every step; each step's masks are folded from it and ``count``.
      forward: what `pats_jax.forward_params` mixes at the next step; its target is the parameters at init.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey
    forward: ForwardMix

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


def mixout(
    drop_fraction: float | jax.Array,
    *,
    key: int | jax.Array,
    mask: Any = None,
    input_axis: int = 0,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformation:
    r"""Mixout: at each training step, a random share of the input features uses the pretrained weights.

    At each step, for every tensor W with pretrained W_0, and with p = ``drop_fraction``::

        m     ~ Bernoulli(1-p)                               one draw per input feature, shared by all outputs
        W_eff = ((1-m) * W_0 + m * W - p * W_0) / (1-p)      in the forward pass: see `pats_jax.forward_params`
        g     = dL/dW_eff * m                                not divided by 1-p

    The rule is that of the authors' code (*code*). *Ours*: a scalar or 1-D leaf, which has no input features, gets one
    draw per entry. Mixout replaces dropout on the layers that it is used on.

    Place it first in a chain, before clipping and the optimizer. With ``drop_fraction=0`` it changes no bit.

    Args:
      drop_fraction: p in [0, 1), usually 0.7 to 0.9.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside are used as they are and
        hold no state. None means every leaf.
      input_axis: the axis of input features, 0 in Flax's kernels; counted within a layer's own tensor.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own draws.

    Returns:
      A gradient transformation; its state holds a copy of the parameters given to ``init``.

    Raises:
      ValueError: if drop_fraction is outside [0, 1) (traced numbers are not checked); from ``init``, if a leaf of two
        or more dimensions has no axis ``input_axis``.

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
        axes = trees.held_layer_axes(layer_axis, params, mixed)
        kept = trees.draw_rows(key, 0, trees.input_rows(mixed, input_axis, axes), keep_fraction, axes)
        forward = ForwardMix(jax.tree.map(jnp.copy, mixed), kept, jnp.asarray(keep_fraction, jnp.float32))
        return MixoutState(jnp.zeros([], jnp.int32), random.StoredKey.of(key), forward)

    def update(updates, state, params=None):
        del params
        kept = state.forward.kept
        axes = trees.held_layer_axes(layer_axis, updates, kept)
        updates = trees.replace_held(jnp.multiply, updates, kept)
        count = optax.safe_increment(state.count)
        forward = state.forward._replace(
            kept=trees.draw_rows(state.key, count, kept, keep_fraction, axes),
            keep_fraction=jnp.asarray(keep_fraction, jnp.float32),
        )
        return updates, MixoutState(count, state.stored_key, forward)

    return optax.GradientTransformation(init, update)
