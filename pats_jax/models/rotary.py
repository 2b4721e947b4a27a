"""Rotary positions: queries and keys are turned by angles that grow with their token's position.

::

    angle[p, i] = p * theta^(-2 i / width)
    (x[i], x[i + width/2])  ->  (x[i] cos - x[i + width/2] sin,  x[i + width/2] cos + x[i] sin)

A score then depends on the distance between its query and key.

References:
  Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv:2104.09864).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array


def rotation(length: int, width: int, theta: float) -> Array:
    """Cosines and sines of the angles: float32 (2, length, width / 2), for heads of ``width`` units."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Array, rotation: Array) -> Array:
    """Queries or keys (batch, length, heads, width), turned by a `rotation` of that length; computed in float32."""
    cos, sin = rotation[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
