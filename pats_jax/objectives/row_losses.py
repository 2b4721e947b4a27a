"""Losses of rows for `pats_jax.make_loss_fn`, besides plain cross-entropy."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.train_state import RowLoss
from pats_jax.trees import check_number


def smoothed_cross_entropy(smoothing: float, class_weights: Sequence[float] | np.ndarray | None = None) -> RowLoss:
    r"""Cross-entropy with label smoothing, as torch's ``cross_entropy`` has it.

    ::

        l_i = (1 - smoothing) * -log p_i[y_i] + smoothing / K * sum over classes c of w_c / w_{y_i} * -log p_i[c]

    The loss of a batch is the mean of l_i, in which row i weighs w_{y_i}: with class weights, put these into
    ``batch["weights"]``. This is ``cross_entropy(logits, labels, weight=w, label_smoothing=smoothing)``.

    Args:
      smoothing: in [0, 1].
      class_weights: w, (K,); None: all 1. A class without rows may have 0.

    Returns:
      ``row_loss(logits (batch, K), labels (batch,)) -> (batch,)``.

    Raises:
      ValueError: if smoothing is not in [0, 1].

    Examples:
      >>> row_loss = smoothed_cross_entropy(0.1)
      >>> print(row_loss(jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([0])).round(4))
      [0.2925]
    """
    check_number("smoothing", smoothing, lambda x: 0 <= x <= 1, "in [0, 1]")
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def row_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        costs = -jax.nn.log_softmax(logits.astype(jnp.float32))
        own = jnp.take_along_axis(costs, labels[:, None], axis=1)[:, 0]
        if weights is None:
            spread = jnp.mean(costs, axis=1)
        else:
            spread = jnp.mean(costs * weights, axis=1) / weights[labels]
        return (1 - smoothing) * own + smoothing * spread

    return row_loss
