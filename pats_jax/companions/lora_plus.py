"""LoRA+: a larger learning rate for one of the two matrices of LoRA."""

import math

import jax
import optax

from pats_jax import trees
from pats_jax.trees import LayerAxis, check_number


def lora_plus(ratio: float | jax.Array, *, layer_axis: LayerAxis = None) -> optax.GradientTransformation:
    r"""LoRA+: multiplies the updates of LoRA's B, and of all 1-D parameters, by a ratio.

    Placed after an optimizer with decoupled weight decay, such as AdamW, this is the same as a learning rate ``ratio``
    times as large for them::

        update = ratio * u      leaves below ``lora_B``, and 1-D leaves: biases, the magnitudes of DoRA
        update = u              all others: A, the weights of the head

    The groups are those of PEFT's ``create_loraplus_optimizer`` (*code*); the paper has only A and B. That function has
    a third group for LoRA on embeddings, which this library does not have, and no weight decay by default.

    Place it right after the optimizer, before noise: ``optax.chain(optax.adamw(1e-4), pats_jax.lora_plus(16))``. Scaled
    before Adam, updates would not change.

    Args:
      ratio: a number > 0; the authors use 16, with a learning rate lower than LoRA's.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; it is not counted among
        the axes of a 1-D parameter.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: if ratio is not positive (traced numbers are not checked).

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"lora_A": {"kernel": jnp.ones((2, 1))}, "lora_B": {"kernel": jnp.ones((1, 2))}}
      >>> tx = optax.chain(optax.sgd(0.5), pats_jax.lora_plus(4))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["lora_A"]["kernel"].ravel(), updates["lora_B"]["kernel"].ravel())
      [-0.5 -0.5] [-2. -2.]

    References:
      Hayou et al., `LoRA+: Efficient Low Rank Adaptation of Large Models <https://arxiv.org/abs/2402.12354>`_, 2024
    """
    check_number("ratio", ratio, lambda x: 0 < x < math.inf, "a finite number > 0")

    def update(updates, state, params=None):
        del params

        def scale(path, u, axis):
            if trees.is_absent(u):
                return u
            is_faster = "lora_B" in map(trees.entry_name, path) or u.ndim - (axis >= 0) == 1
            return (ratio * u).astype(u.dtype) if is_faster else u

        axes = trees.held_layer_axes(layer_axis, updates, updates)
        return jax.tree_util.tree_map_with_path(scale, updates, axes, is_leaf=trees.is_absent), state

    return optax.GradientTransformation(optax.init_empty_state, update)
