"""SIFT: an optimizer for a few entries of each tensor.

Unlike DPS and Child-Tuning, which change the gradient at the start of a chain, SIFT wraps an optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.companions.ranking import rank
from pats_jax.trees import check_number, is_plainly


class SiftState(NamedTuple):
    """State of `sift`.

    Attributes:
      started: whether the entries have been selected, () bool.
      indices: the selected entries, a tree like params, int32: (k,) indices into the flattened leaf, or (layers, k)
        into each layer's flattened tensor; None at leaves that are trained densely.
      inner: the inner optimizer's state, for a tree with (k,) or (layers, k) entries in place of each sifted leaf.
    """

    started: jax.Array
    indices: Any
    inner: Any


def sift(
    inner: optax.GradientTransformation | optax.MultiSteps,
    rate: float,
    *,
    mask: Any,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SIFT: optimizes only the few entries of each tensor whose first gradient is largest; the rest stays frozen.

    The first update selects, in each tensor of N entries, the ceil(N * ``rate``) entries with the largest |g|; they
    stay selected (*code*). *Ours*: at least one entry is selected, and the first ones among ties. ``inner`` gets a
    vector of these entries in place of the tensor, so its state has that size. With AdamW, the state takes 12 bytes per
    selected entry.

    ``inner`` is initialised at the first update, when the entries are known, so earlier changes to its state are lost.
    Masks that ``inner`` derives from shapes, and clipping inside it, see the vectors.

    Args:
      inner: the optimizer.
      rate: share of each tensor's entries to train, in (0, 1]; the authors use 0.008.
      mask: a tree prefix of bools, or a function of params that returns one: the tensors to select entries from. Leaves
        outside are trained densely; to freeze them, use Optax's own transforms. None means every leaf.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; entries are then
        selected in each layer, and ``inner`` gets them as (layers, k), the layers first.

    Returns:
      A gradient transformation whose ``update`` requires params. With ``rate=1`` it equals ``inner`` (on a CPU, bit for
      bit).

    Raises:
      TypeError: if ``inner`` is not an optimizer.
      ValueError: if rate is outside (0, 1]; from ``update`` without params.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> tx = pats_jax.sift(optax.sgd(1.0), rate=0.3, mask=None)
      >>> grads = {"w": jnp.array([[1.0, -5.0, 2.0], [3.0, 0.0, 1.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["w"])
      [[ 0.  5.  0.]
       [-3.  0.  0.]]

    References:
      Song et al., `Sparse is Enough in Fine-tuning Pre-trained Large Language Models
      <https://arxiv.org/abs/2312.11875>`_, 2024
    """
    check_number("rate", rate, lambda x: 0 < x <= 1, "in (0, 1]")
    mask = False if is_plainly(rate, 1) else mask
    inner = trees.as_extra_args_transform("sift", inner)

    def init(params):
        sifted = trees.cut_to(trees.resolve_mask(mask, params), params)
        axes = trees.held_layer_axes(layer_axis, params, sifted)

        def first(tensor):
            return jnp.arange(rank(tensor.size, rate), dtype=jnp.int32)

        indices = trees.map_held(lambda p, axis: trees.each_layer(first, axis, p, out_axis=0), sifted, axes)
        return SiftState(jnp.zeros([], bool), indices, inner.init(_gather(params, indices, axes)))

    def update(updates, state, params=None, **extra_args):
        trees.require_params("sift", params)
        if not jax.tree.leaves(state.indices):  # nothing to choose from
            updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
            return updates, state._replace(inner=inner_state)

        axes = trees.held_layer_axes(layer_axis, params, state.indices)

        def choose():
            def largest(i, g, axis):
                return jax.lax.top_k(_magnitude(_vectors(g, axis)), i.shape[-1])[1]

            return trees.map_held(largest, state.indices, updates, axes)

        indices = jax.lax.cond(state.started, lambda: state.indices, choose)
        # Element by element, where the choice above is made by lax.cond: it fuses into what inner does, without a copy.
        fresh = inner.init(_gather(params, indices, axes))
        inner_state = jax.tree.map(lambda old, new: jnp.where(state.started, old, new), state.inner, fresh)
        if extra_args.get("grad") is not None:  # the raw gradient of `pats_jax.with_raw_gradient`
            extra_args = extra_args | {"grad": _gather(extra_args["grad"], indices, axes)}
        sparse, inner_state = inner.update(
            _gather(updates, indices, axes), inner_state, _gather(params, indices, axes), **extra_args
        )
        updates = trees.replace_held(_scatter, sparse, indices, params, axes)
        return updates, SiftState(jnp.ones([], bool), indices, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _magnitude(grad):
    """The magnitude |g| of one leaf, float32; 0 where it is not finite."""
    size = jnp.abs(grad.astype(jnp.float32))
    return jnp.where(jnp.isfinite(size), size, 0.0)


def _gather(tree, indices, axes):
    """A tree with its selected entries, (k,) or (layers, k), in place of every sifted leaf."""

    def gather(x, i, axis):
        return trees.each_layer(lambda vector, i: vector[i], min(axis, 0), _vectors(x, axis), per_layer=(i,))

    return trees.replace_held(gather, tree, indices, axes)


def _scatter(sparse, indices, like, axis):
    """Zeros of a leaf's shape, with the selected entries at their places."""

    def scatter(like, sparse, indices):
        zeros = jnp.zeros(like.size, sparse.dtype)
        return zeros.at[indices].set(sparse, unique_indices=True).reshape(like.shape)

    full = trees.each_layer(scatter, axis, like, per_layer=(sparse, indices))
    return jax.sharding.reshard(full, jax.typeof(like).sharding) if _is_sharded(like) else full


def _vectors(x, axis):
    """The entries of a leaf as one vector, (size,), or those of each layer as (layers, size).

    If axes are sharded explicitly, every device gets all entries, because such arrays cannot be indexed.
    """
    x = jax.sharding.reshard(x, jax.P()) if _is_sharded(x) else x
    return trees.each_layer(jnp.ravel, axis, x, out_axis=0)


def _is_sharded(x):
    """Whether an array is sharded over one of a mesh's Explicit axes; XLA itself handles the Auto ones."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
