"""The difference between two predictions, row by row."""

import jax
import jax.numpy as jnp


def symmetric_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """J(p, q) = KL(p||q) + KL(q||p) of each row, (batch,) float32, from logits (batch, classes).

    It is computed as one sum of products of differences, which is accurate and not negative even where p and q nearly
    agree.

    Examples:
      >>> print(symmetric_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
      [0.27465308]
    """
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    return jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)


def squared_difference(logits: jax.Array, other: jax.Array) -> jax.Array:
    """The squared difference of two scores of each row, (batch,) float32, from logits (batch, 1)."""
    return jnp.square(logits.astype(jnp.float32) - other)[:, 0]
