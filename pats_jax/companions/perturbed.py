"""Perturbed: the noise of PATS in the forward pass only; the parameters themselves never take it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import transforms, trees
from pats_jax.trees import ForwardNoise


class PerturbedState(NamedTuple):
    """State of `perturbed`.

    Attributes:
      pats: state of the `pats_jax.pats_noise` that draws the noise, with the sensitivity.
      forward: what `forward_params` adds at the coming step.
    """

    pats: transforms.PatsNoiseState
    forward: ForwardNoise


def perturbed(
    noise_scale: optax.ScalarOrSchedule,
    *,
    key: int | jax.Array,
    decay: float | jax.Array = 0.9,
    response: str | transforms.Response = "linear",
    distribution: str = "uniform",
    mask: Any | Callable[[Any], Any] = None,
    sensitivity_dtype: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Noise of PATS's size at the forward parameters of each step, removed again after it.

    With S, w and sd as in `pats_jax.pats_noise`, at step t = 1, 2, ...::

        W_eff = W + sd_{t-1} * xi_{t-1}   in the forward pass: see `forward_params`; W at the first step
        g     = dL/dW_eff                 from which S_t, sd_t and the update of W follow

    So the noise takes part in every gradient but does not add up in the parameters. A control for PATS (ours).

    Goes last in a chain, inside `pats_jax.with_raw_gradient`; it changes no update.

    Args:
      noise_scale: as for `pats_noise`, and so all others.
      key: an int or a typed key; the draws are not those of `pats_noise` with the same key.
      decay: of the moving average of sensitivity.
      response: the share of the noise by relative sensitivity.
      distribution: "uniform" or "normal".
      mask: which leaves get noise.
      sensitivity_dtype: dtype of the stored sensitivity.
      layer_axis: the axis of the layers in leaves that hold many.

    Returns:
      A gradient transformation whose ``update`` requires params and the extra argument ``grad``. Its state holds the
      noise of the coming step: a copy of the leaves that get some.

    Raises:
      ValueError: see `pats_noise`.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
      >>> tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.perturbed(0.1, key=0, decay=0.5)))
      >>> updates, state = tx.update({"w": jnp.array([0.0, 1.0, 1.0, 1.0])}, tx.init(params), params)
      >>> print(updates["w"])
      [-0.  -0.1 -0.1 -0.1]
      >>> params = optax.apply_updates(params, updates)
      >>> print(pats_jax.forward_params(state, params)["w"] != params["w"])  # no noise above the mean sensitivity
      [ True False False  True]
    """
    noise = transforms.pats_noise(
        noise_scale,
        key=trees.own_key(key, "perturbed"),
        decay=decay,
        response=response,
        distribution=distribution,
        mask=mask,
        sensitivity_dtype=sensitivity_dtype,
        layer_axis=layer_axis,
    )

    def init(params):
        state = noise.init(params)
        return PerturbedState(state, _held(state, jax.tree.map(jnp.zeros_like, params)))

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        trees.require_raw_gradient("perturbed", params, grad)
        drawn, pats = noise.update(jax.tree.map(jnp.zeros_like, updates), state.pats, params, grad=grad)
        return updates, PerturbedState(pats, _held(pats, drawn))

    return optax.GradientTransformationExtraArgs(init, update)


def _held(state, noise):
    return ForwardNoise(trees.map_held(lambda _, drawn: drawn, state.sensitivity, noise))
