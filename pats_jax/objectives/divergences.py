"""How far two answers are apart, row by row."""

import jax
import jax.numpy as jnp


def symmetric_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """J(p, q) = KL(p||q) + KL(q||p) of each row, (batch,), from logits (batch, classes).

    As one sum over products of differences it is accurate, and not negative, where p and q nearly agree.

    Examples:
      >>> print(symmetric_kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))))
      [0.27465308]
    """
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    return jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)


def squared_difference(logits: jax.Array, other: jax.Array) -> jax.Array:
    """The squared difference of two scores of each row, (batch,), from logits (batch, 1)."""
    return jnp.square(logits.astype(jnp.float32) - other)[:, 0]
