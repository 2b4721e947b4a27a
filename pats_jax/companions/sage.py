"""SAGE: scales updates by how uncertain the sensitivity of their parameters is."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.trees import check_number


class SageState(NamedTuple):
    """State of `scale_by_sage`.

    Attributes:
      count: t, the number of updates so far, () int32.
      sensitivity: A_t before bias correction, a tree like params, float32; None where masked.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    sensitivity: Any


def scale_by_sage(
    decay: float | jax.Array = 0.75, eps: float = 1e-6, *, bias_correction: bool = True, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""SAGE: multiplies each update by the uncertainty of its parameter's sensitivity, relative to the sensitivity.

    With parameters theta, raw gradient g and incoming update u, at step t = 1, 2, ...::

        I = |theta * g|
        A = decay * A + (1 - decay) * I         A starts from 0
        A^ = A / (1 - decay^t)                  A itself without ``bias_correction``
        update = u * |I - A^| / (A^ + eps^2)    0 at the first step, where A^ = I

    The rule is that of the authors' code (*code*), which has two forms. With AdamW, weight decay is not multiplied;
    with Adamax, it is, and A is not bias-corrected. Learning rates are 2 to 5 times those of plain fine-tuning. *Ours*:
    I is measured before clipping, where the authors measure it after, so that the raw gradient means the same in every
    chain; and an I that is not finite leaves A unchanged.

    Place it between Adam and weight decay (AdamW), or after weight decay (Adamax), inside `with_raw_gradient`::

        pats_jax.with_raw_gradient(optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(), pats_jax.scale_by_sage(),
            optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(1e-4)))
        pats_jax.with_raw_gradient(optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adamax(), optax.add_decayed_weights(0.01),
            pats_jax.scale_by_sage(bias_correction=False), optax.scale_by_learning_rate(1e-4)))

    Args:
      decay: decay of the moving average of sensitivity, in (0, 1), usually 0.6 to 0.9. With 0, all updates would be 0.
      eps: a number > 0 whose square keeps the ratio finite where a parameter has no sensitivity.
      bias_correction: whether to correct the bias of A: True for the AdamW form, False for the Adamax form.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside keep their updates. None
        means every leaf; the authors use the weights and biases of attention and feed-forward blocks.

    Returns:
      A gradient transformation whose ``update`` requires params and the extra argument ``grad``.

    Raises:
      ValueError: if decay is outside (0, 1), or eps is not positive (traced numbers are not checked); from ``update``
        without params or ``grad``.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(1.0), pats_jax.scale_by_sage(decay=0.5)))
      >>> state = tx.init(params)
      >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([1.0, 2.5])):
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates)
      [-0. -0.]
      [-0.    -0.625]

    References:
      Liang et al., `No Parameters Left Behind: Sensitivity Guided Adaptive Learning Rate for Training Large Transformer
      Models <https://arxiv.org/abs/2202.02664>`_, 2022
    """
    check_number("decay", decay, lambda x: 0 < x < 1, "in (0, 1)")
    check_number("eps", eps, lambda x: 0 < x < math.inf, "a finite number > 0")

    def init(params):
        scaled = trees.cut_to(trees.resolve_mask(mask, params), params)
        return SageState(jnp.zeros([], jnp.int32), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), scaled))

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        trees.require_raw_gradient("scale_by_sage", params, grad)
        count = optax.safe_increment(state.count)
        weight = 1 - jnp.float32(decay) ** count if bias_correction else 1.0
        saliency = trees.map_held(lambda _, p, g: trees.saliency(p, g), state.sensitivity, params, grad)
        average = trees.map_held(lambda a, i: trees.moving_average(a, i, decay), state.sensitivity, saliency)

        def scale(u, a, i):
            corrected = a / weight
            return (u * (jnp.abs(i - corrected) / (corrected + eps**2))).astype(u.dtype)

        return trees.replace_held(scale, updates, average, saliency), SageState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)
