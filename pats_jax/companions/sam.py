"""SAM and ASAM: the gradient at a point to which the loss rises, a function for `pats_jax.make_train_step`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.trees import check_number, is_plainly

_TINY = 1e-16  # the authors'; their norms are never 0


def sam(rho: float | jax.Array = 0.05) -> Callable[..., Any]:
    r"""SAM: the gradient a short step up the loss, so that training prefers flat minima.

    ::

        g = dL/dw at w;   e = rho * g / (||g|| + 1e-16), with the norm over all trained parameters
        the optimizer gets dL/dw at w + e, and moves w

    The rule is that of ASAM's code (*code*). Loss and metrics are those at w. *Ours*: both gradients are of the same
    dropout, and both are of the whole batch, however it is split over micro-batches and devices; other programs climb
    for each device alone, which is another method (m-sharpness). A step takes two forward and backward passes. With
    `pats_jax.perturbed` both gradients are at the noisy parameters. Mixout and DPS Mix do not combine with it: the
    pass that they differentiate does not use all of w, from which SAM climbs.

    Args:
      rho: length of the step up, >= 0. 0 is plain training, bit for bit.

    Returns:
      A function for the argument ``gradient`` of `pats_jax.make_train_step`.

    Raises:
      ValueError: if rho < 0 (traced numbers are not checked).

    Examples:
      >>> import jax, jax.numpy as jnp, pats_jax
      >>> slope = jax.value_and_grad(lambda params, batch, key: (jnp.sum(params**2), {}), has_aux=True)
      >>> (loss, _), grad = pats_jax.sam(rho=0.5)(slope, jnp.array([3.0, 4.0]), None, None)
      >>> print(loss, grad)
      25.0 [6.6 8.8]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    _check_not_negative("rho", rho)

    def step_up(params, grads):
        del params
        scale = rho / (optax.tree.norm(grads) + _TINY)
        return jax.tree.map(lambda g: scale * g, grads)

    return _gradient_above(step_up, is_off=is_plainly(rho, 0))


def asam(rho: float | jax.Array = 0.5, eta: float | jax.Array = 0.01, *, mask: Any = None) -> Callable[..., Any]:
    r"""ASAM: SAM with a step up that is longer where weights are larger, so that rescaling them changes nothing.

    ::

        T = |w| + eta at the leaves of ``mask``, 1 at others
        e = rho * T^2 g / (||T g|| + 1e-16);   the optimizer gets dL/dw at w + e, and moves w

    The rule is that of the authors' code (*code*), which has T = 1 for biases. Everything else is as for `sam`.

    Args:
      rho: length of the step up, >= 0. 0 is plain training, bit for bit.
      eta: added to the weights' magnitudes, >= 0.
      mask: a tree prefix of bools, or a function of params that returns one: the leaves with T = |w| + eta. None means
        every leaf.

    Returns:
      A function for the argument ``gradient`` of `pats_jax.make_train_step`.

    Raises:
      ValueError: if rho or eta is negative (traced numbers are not checked).

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks
      <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    _check_not_negative("rho", rho)
    _check_not_negative("eta", eta)

    def step_up(params, grads):
        adapted = trees.cut_to(trees.resolve_layer_mask(mask, params), params)
        scales = trees.replace_held(lambda p, own: jnp.abs(own) + eta, jax.tree.map(jnp.ones_like, params), adapted)
        rescaled = jax.tree.map(jnp.multiply, scales, grads)
        factor = rho / (optax.tree.norm(rescaled) + _TINY)
        return jax.tree.map(lambda t, tg: factor * t * tg, scales, rescaled)

    return _gradient_above(step_up, is_off=is_plainly(rho, 0))


def _gradient_above(step_up, *, is_off):
    """``gradient(value_and_grad, params, batch, key)``: the value at params, the gradient at params + step_up."""

    def gradient(value_and_grad, params, batch, key):
        value, grads = value_and_grad(params, batch, key)
        if is_off:
            return value, grads
        above = jax.tree.map(lambda p, e: (p + e).astype(p.dtype), params, step_up(params, grads))
        return value, value_and_grad(above, batch, key)[1]

    return gradient


def _check_not_negative(argument, value):
    check_number(argument, value, lambda x: 0 <= x < math.inf, "at least 0")
