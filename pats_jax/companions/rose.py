"""ROSE: an optimizer that updates only the tensors whose gradient agrees with its own average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.companions.ranking import layers_shape
from pats_jax.trees import check_number, is_plainly

_TINY = float(jnp.finfo(jnp.float32).tiny)


class RoseState(NamedTuple):
    """State of `rose`.

    Attributes:
      count: number of updates so far, () int32.
      inner: the inner optimizer's state, which contains Adam's.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    inner: Any


def rose(
    inner: optax.GradientTransformation,
    quantile: float | jax.Array,
    *,
    warmup_steps: int | jax.Array = 0,
    mask: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Second-order ROSE: AdamW that leaves out the tensors with the highest scores.

    For each tensor with gradient g and Adam's first moment m of the step before::

        score = |0.1 ||g|| / ||m|| - 1|
        M = 1 if score <= the q-quantile of the scores of all tensors, else 0      q = ``quantile``
        g <- M g + (1 - M) m      so that m stays as it is where M = 0
        AdamW's step and decay times M

    The rule is that of the authors' code (*code*), second-order form: 0.1 is fixed, the quantile interpolates linearly,
    as torch's and NumPy's do, and nothing is left out in the first step and during warmup. Adam's second moment of a
    tensor that is left out averages m * m, as there. The code can leave out the lowest scores too, and mix this mask
    with one from the gradients of two dropout passes; this does not. *Ours*: a score with ||m|| = 0 is finite, so a
    tensor without gradients scores 1.

    It wraps AdamW, after clipping: ``optax.chain(optax.clip_by_global_norm(1.0), rose(optax.adamw(2e-5), 0.6))``. Noise
    that follows it, such as PATS's, reaches all tensors. With ``quantile=1`` it changes no bit.

    Args:
      inner: an optimizer that contains `optax.scale_by_adam`, such as `optax.adamw`.
      quantile: q in (0, 1], the share of the tensors that are updated; the authors use 0.3 to 0.9.
      warmup_steps: number of first steps in which all tensors are updated.
      mask: a tree prefix of bools, or a function of params that returns one: the tensors that may be left out. The
        authors use the weights of the encoder's layers. None means every leaf.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own score, and a mask may have an array of bools (layers,) for such a leaf.

    Returns:
      A gradient transformation whose ``update`` requires params.

    Raises:
      TypeError: if ``inner`` is not an optimizer.
      ValueError: if quantile is outside (0, 1] (traced numbers are not checked); from ``init``, if ``inner`` has no
        Adam, or more than one.

    Examples:
      The second gradient of ``b`` is far from its average.

      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> tx = pats_jax.rose(optax.adam(0.5), 0.5)
      >>> state = tx.init(params)
      >>> for scale in (1.0, 9.0):
      ...     updates, state = tx.update({"a": jnp.ones(2), "b": scale * jnp.ones(2)}, state, params)
      ...     print(updates["a"].round(3), updates["b"].round(3))
      [-0.5 -0.5] [-0.5 -0.5]
      [-0.5 -0.5] [0. 0.]

    References:
      Jiang et al., `ROSE: Robust Selective Fine-tuning for Pre-trained Language Models
      <https://arxiv.org/abs/2210.09658>`_, 2022
    """
    check_number("quantile", quantile, lambda x: 0 < x <= 1, "in (0, 1]")
    mask = False if is_plainly(quantile, 1) else mask
    inner = trees.as_extra_args_transform("rose", inner)

    def init(params):
        state = inner.init(params)
        if len(trees.find_states(state, optax.ScaleByAdamState)) != 1:
            raise ValueError("rose: wraps one Adam; give optax.adamw, or a chain with optax.scale_by_adam in it")
        return RoseState(jnp.zeros([], jnp.int32), state)

    def update(updates, state, params=None, **extra_args):
        trees.require_params("rose", params)
        (adam,) = trees.find_states(state.inner, optax.ScaleByAdamState)
        chosen = trees.resolve_layer_mask(mask, updates)
        scored = trees.cut_to(chosen, updates)
        axes = trees.held_layer_axes(layer_axis, updates, scored)
        all_count = state.count < jnp.maximum(warmup_steps, 1)
        kept = _kept_tensors(scored, adam.mu, axes, chosen, quantile, all_count)
        updates = trees.replace_held(lambda g, keep, m: jnp.where(keep, g, m).astype(g.dtype), updates, kept, adam.mu)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        updates = trees.replace_held(lambda u, keep: jnp.where(keep, u, 0), updates, kept)
        return updates, RoseState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _kept_tensors(grads, moments, axes, chosen, quantile, all_count):
    """Bools that broadcast to the leaves, one per tensor or layer: whether it is updated."""

    def score(g, m, axis):
        norms = [trees.each_layer(_norm, axis, x, out_axis=0) for x in (g, m)]
        return jnp.abs(0.1 * norms[0] / jnp.maximum(norms[1], _TINY) - 1)

    scores = trees.map_held(score, grads, moments, axes)
    counted = [s[keep] for s, keep in zip(jax.tree.leaves(scores), _masks(grads, chosen), strict=True)]
    if not counted:
        return grads
    threshold = jnp.quantile(jnp.concatenate([jnp.atleast_1d(s).ravel() for s in counted]), quantile)

    def keep(g, s, axis, may_go):
        kept = (s <= threshold) | all_count | ~jnp.asarray(may_go)
        return kept.reshape(layers_shape(g, axis))

    return trees.map_held(keep, grads, scores, axes, chosen)


def _masks(grads, chosen):
    """For each leaf of ``grads``, which of its layers may be left out, as an index."""
    held = trees.map_held(lambda _, keep: keep, grads, chosen)
    return [Ellipsis if keep is True else keep for keep in jax.tree.leaves(held)]


def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
