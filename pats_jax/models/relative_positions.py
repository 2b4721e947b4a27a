"""The learned bias of attention scores by relative position, as T5 and MPNet have it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def buckets(distances: np.ndarray, *, bidirectional: bool, count: int, farthest: int) -> np.ndarray:
    """The bucket of each relative position, the key's place minus the query's: int, in [0, count).

    With n buckets for a direction (half of them if there are two), distances below n/2 have a bucket each, and those
    from there to ``farthest`` share the others logarithmically::

        n/2 + floor(log(distance / (n/2)) / log(farthest / (n/2)) * (n - n/2)),   at most n - 1

    All in float32 and in this order, as in torch: near a boundary the result depends on it.
    """
    distances = np.asarray(distances)
    if bidirectional:
        count //= 2
        first, distances = np.where(distances > 0, count, 0), np.abs(distances)
    else:
        first, distances = np.zeros_like(distances), np.maximum(-distances, 0)
    exact = count // 2
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    step = ratio / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + step.astype(np.int64), count - 1)
    return first + np.where(distances < exact, distances, far)


def choose(table: Array, rows: np.ndarray) -> Array:
    """Rows of a table (rows, heads) by their numbers (positions,), (positions, heads); its gradient is a sum."""
    one_hot = np.eye(len(table), dtype=np.float32)[rows]
    return jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)


def distances(length: int) -> np.ndarray:
    """The relative positions that `spread` takes, (2 * length,): 0 ... length - 1, (none), -(length - 1) ... -1."""
    return np.concatenate([np.arange(length), [0], np.arange(1 - length, 0)])


def spread(values: Array, length: int) -> Array:
    """The bias of the scores of as many keys as queries, (1, heads, queries, keys), from that of each distance.

    Repeated n times and cut to rows of 2n - 1, the values of `distances` (2n, heads) move on by one place from row to
    row: the gradient is a sum, not a scatter.
    """
    rows = jnp.tile(values.T, (1, length))[:, : length * (2 * length - 1)]
    return rows.reshape(-1, length, 2 * length - 1)[None, :, :, :length]
