"""Local attention, in which each token attends to the tokens within half a window on either side.

Long texts are cut into blocks of half a window. The queries of a block attend to the keys of that block and of its two
neighbours, so the number of scores is proportional to the length and not to its square.

References:
  Beltagy et al. 2020, Longformer: The Long-Document Transformer (arXiv:2004.05150).
"""

import jax.numpy as jnp
from jax import Array

from pats_jax.models.layers import MASKED, pad_front

# Added to a score outside the window. A token whose window has nothing but padding then attends to that padding, and
# not to the rest of the text, in blocks and without.
_OUTSIDE = 2 * MASKED
_WORTH_BLOCKS = 4  # half windows; in shorter texts, blocks and their neighbours would be most of all scores


def is_long(length: int, half_window: int) -> bool:
    """Whether a text is so long that it pays to compute its attention in blocks."""
    return 0 < _WORTH_BLOCKS * half_window < length


def window_bias(bias: Array, queries: int, half_window: int) -> Array:
    """The bias of all scores: ``bias`` within the window, and outside it a number that masks a token.

    Args:
      bias: float32 (batch, 1, 1, length): 0 for tokens, `layers.MASKED` for padding.
      queries: the number of queries, which are the first tokens of the text.
      half_window: how far tokens see, in tokens, at either side.

    Returns:
      (batch, 1, queries, length).
    """
    distance = jnp.arange(queries)[:, None] - jnp.arange(bias.shape[-1])
    return jnp.where(jnp.abs(distance) <= half_window, bias, _OUTSIDE)


def to_blocks(
    query: Array, key: Array, value: Array, bias: Array, half_window: int
) -> tuple[Array, Array, Array, Array]:
    """Arguments of attention for the blocks of a text; each block is a row of the batch.

    Args:
      query: (batch, length, heads, width).
      key: (batch, surplus + length, heads, width). All queries see the keys before the text's own, such as a prefix.
      value: the same.
      bias: float32 (batch, 1, 1, length), as for `window_bias`.
      half_window: how far tokens see, and the length of a block.

    Returns:
      Queries (batch * blocks, half_window, heads, width); keys and values (batch * blocks, surplus + 3 * half_window,
      heads, width); and the bias of their scores.
    """
    size, surplus = half_window, key.shape[1] - query.shape[1]
    count = -(-query.shape[1] // size)

    def cut(x: Array, filler: float, neighbours: int) -> Array:
        """Blocks of x, (batch, length, ...), each with some neighbours: (batch, blocks, tokens, ...)."""
        missing = count * size - x.shape[1]
        edges = ((0, 0), (neighbours * size, missing + neighbours * size), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, edges, constant_values=filler).reshape(len(x), count + 2 * neighbours, size, *x.shape[2:])
        return jnp.concatenate([x[:, first : first + count] for first in range(2 * neighbours + 1)], axis=2)

    def rows(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def seen(x: Array) -> Array:
        prefix = jnp.repeat(x[:, :surplus], count, axis=0)
        return jnp.concatenate([prefix, rows(cut(x[:, surplus:], 0, 1))], axis=1)

    near = rows(cut(bias[:, 0, 0], _OUTSIDE, 1))[:, None, None]
    distance = jnp.arange(size)[:, None] + size - jnp.arange(3 * size)
    near = jnp.where(jnp.abs(distance) <= size, near, _OUTSIDE)
    return rows(cut(query, 0, 0)), seen(key), seen(value), pad_front(near, surplus)


def from_blocks(attended: Array, batch: int, length: int) -> Array:
    """The values attended to in blocks, (batch * blocks, half_window, ...), as (batch, length, ...)."""
    return attended.reshape(batch, -1, *attended.shape[2:])[:, :length]
