"""AdaLoRA's regulariser: the singular vectors of an adapter should be orthonormal."""

import jax
import jax.numpy as jnp

from pats_jax import trees
from pats_jax.companions.adalora import find_triplets
from pats_jax.objectives.objective import check_weight
from pats_jax.train_state import LossFn


def with_orthogonality(loss_fn: LossFn, weight: float | jax.Array = 0.5) -> LossFn:
    r"""Adds AdaLoRA's regulariser to a loss.

    ::

        loss + weight * mean over all A and B of ||A^T A - I|| and ||B B^T - I||      Frobenius norms

    A has the shape (inputs, r) and B (r, outputs), so that every term is about r singular vectors. The form is that of
    the library PEFT: a mean over matrices. The authors' weight is 0.1, PEFT's 0.5.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (loss, metrics)`` for parameters that contain adapters of AdaLoRA, found
        as `adalora_allocation` finds them.
      weight: a number >= 0.

    Returns:
      A loss function of the same kind. Its metrics have ``task_loss``, the loss without this term, unless there is one
      already, and ``orthogonality``, the mean without its weight.

    Raises:
      ValueError: if the weight is negative; traced numbers are not checked.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> params = {"lora_A": 2 * jnp.eye(2), "lora_E": jnp.ones(2), "lora_B": jnp.eye(2)}
      >>> loss_fn = pats_jax.with_orthogonality(lambda params, batch, key: (jnp.float32(1.0), {}), weight=0.1)
      >>> loss, metrics = loss_fn(params, {}, None)
      >>> print(f"{loss:.4f} = {metrics['task_loss']:.4f} + 0.1 * {metrics['orthogonality']:.4f}")
      1.2121 = 1.0000 + 0.1 * 2.1213

    References:
      Zhang et al., `Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
      <https://arxiv.org/abs/2303.10512>`_, 2023
    """
    check_weight("weight", weight)

    def regularised(params, batch, key):
        loss, metrics = loss_fn(params, batch, key)
        value = _mean_distance(params)
        return loss + weight * value, {"task_loss": loss, **metrics, "orthogonality": value}

    return regularised


def _mean_distance(params):
    leaves = jax.tree.leaves(params, is_leaf=trees.is_masked)
    distances = [
        _distances(leaves[triplet[name]], -2 if name == "lora_A" else -1).ravel()
        for triplet in find_triplets(params)
        for name in ("lora_A", "lora_B")
    ]
    return jnp.mean(jnp.concatenate(distances))


def _distances(vectors, axis):
    """How far vectors along an axis are from orthonormal: one norm for each matrix."""
    vectors = jnp.moveaxis(vectors.astype(jnp.float32), axis, -1)
    products = jnp.matmul(vectors, jnp.swapaxes(vectors, -1, -2), precision="highest")
    square = jnp.sum(jnp.square(products - jnp.eye(products.shape[-1])), axis=(-2, -1))
    positive = square > 0  # the norm has no gradient at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
