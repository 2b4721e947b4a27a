"""Disentangled attention (DeBERTa-v2 and v3): its relative positions and the products with them.

The score of key j for query i, with d heads' width and n the number of terms::

    (q_i k_j + q_i pk_{b(i-j)} + k_j pq_{b(i-j)}) / sqrt(d n)

``pk`` and ``pq`` are projections of a table of relative embeddings, and ``b`` gives a distance its row. As a row
depends on i - j alone, the terms are matrix products with the rows of all distances, whose lines are then shifted:
nothing is gathered for each pair of tokens, and the gradient scatters nothing for each pair.

References:
  He et al. 2021, DeBERTa: Decoding-enhanced BERT with Disentangled Attention (arXiv:2006.03654); He et al. 2023,
  DeBERTaV3 (arXiv:2111.09543).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

_BLOCK = 32  # tokens whose products share one table; each takes ``_BLOCK - 1`` columns more than it needs


def buckets(distances: np.ndarray, position_buckets: int, max_distance: int) -> np.ndarray:
    """The buckets of distances: up to half of ``position_buckets`` each has its own, further ones are on a log scale.

    With ``m = position_buckets // 2``, for a distance x with ``|x| > m``::

        sign(x) * (m + ceil(log(|x| / m) / log((max_distance - 1) / m) * (m - 1)))

    Args:
      distances: int (...).
      position_buckets: at least 2; 0 or less means that every distance has its own bucket.
      max_distance: the distance of the last bucket.

    Returns:
      Int32 (...), odd in the distance. Computed in float32 as in torch, so the bounds are the same.
    """
    distances = np.asarray(distances, np.int32)
    if position_buckets <= 0:
        return distances
    middle = position_buckets // 2
    ratio = np.maximum(np.abs(distances), middle).astype(np.float32) / np.float32(middle)
    longest = np.log(np.float32((max_distance - 1) / middle))
    far = np.ceil(np.log(ratio) / longest * np.float32(middle - 1)) + middle
    return np.where(np.abs(distances) <= middle, distances, np.sign(distances) * far).astype(np.int32)


@functools.lru_cache(maxsize=64)
def rows_of_distances(
    queries: int, length: int, position_buckets: int, max_distance: int
) -> tuple[int, int, tuple[int, ...] | None]:
    """Which rows of the relative embeddings the first ``queries`` tokens of a text need.

    Returns:
      The first row that is needed, the one after the last, and for each distance i - j from ``1 - length`` to
      ``queries - 1`` its place among these; None if each place is needed once, in order.
    """
    span = position_buckets if position_buckets > 0 else max_distance
    distances = buckets(np.arange(1 - length, queries), position_buckets, max_distance)
    rows = np.clip(distances + span, 0, 2 * span - 1)
    places = rows - rows[0]
    one_each = np.array_equal(places, np.arange(len(places)))
    return int(rows[0]), int(rows[-1]) + 1, None if one_each else tuple(places.tolist())


def shifted_products(x: Array, table: Array) -> Array:
    """Products with the rows of distances: ``out[b, h, m, n] = x[b, m, h] . table[n - m + M - 1, h]``.

    Args:
      x: (batch, M, heads, width).
      table: (M + N - 1, heads, width).

    Returns:
      (batch, heads, M, N) in the dtype of x.
    """
    batch, count, heads, width = x.shape
    others = len(table) - count + 1
    block = min(_BLOCK, count, others)
    surplus = -count % block
    x, table = jnp.pad(x, ((0, 0), (0, surplus), (0, 0), (0, 0))), jnp.pad(table, ((surplus, 0), (0, 0), (0, 0)))
    starts = range(count + surplus - block, -1, -block)
    columns = others + block - 1
    tables = jnp.stack([table[start : start + columns] for start in starts])
    # The order of axes in which a product comes; another would copy these, which are larger than the result.
    products = jnp.einsum("bcmhd,cthd->chbmt", x.reshape(batch, -1, block, heads, width), tables)
    # Row m of a block begins block - 1 - m columns too early. With one column more, the rows read as one line are all
    # off by the same number.
    line = jnp.pad(products, (*((0, 0),) * 4, (0, 1))).reshape(*products.shape[:3], -1)
    line = line[..., block - 1 : block - 1 + block * columns].reshape(products.shape)
    rows = line[..., :others].transpose(2, 1, 0, 3, 4)
    return rows.reshape(batch, heads, -1, others)[:, :, :count]
