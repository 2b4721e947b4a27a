"""Perturbed: the noise of PATS in the forward pass only; it is never added to the parameters."""

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
      pats: the state of the `pats_jax.pats_noise` that draws the noise, with the sensitivity.
      forward: what `pats_jax.forward_params` adds at the next step.
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
    r"""Adds noise of the size of PATS to the parameters of each forward pass, and removes it after the step.

    With S, w and sd as in `pats_jax.pats_noise`, at step t = 1, 2, ...::

        W_eff = W + sd_{t-1} * xi_{t-1}   in the forward pass: see `forward_params`; W at the first step
        g     = dL/dW_eff                 from which S_t, sd_t and the update of W follow

    So the noise affects every gradient but does not accumulate in the parameters. A control for PATS (*ours*).

    Place it last in a chain, inside `pats_jax.with_raw_gradient`; it changes no update.

    Args:
      noise_scale: standard deviation of the noise on a parameter of zero sensitivity, in units of its tensor's standard
        deviation; `pats_jax.pats_noise` has details of this and the following arguments.
      key: an int or a typed key; the draws differ from those of `pats_noise` with the same key.
      decay: decay of the moving average of sensitivity, in [0, 1).
      response: how the noise depends on relative sensitivity.
      distribution: "uniform" or "normal".
      mask: which leaves get noise.
      sensitivity_dtype: dtype of the stored sensitivity.
      layer_axis: the axis of the layers in leaves that hold many.

    Returns:
      A gradient transformation whose ``update`` requires params and the extra argument ``grad``. Its state holds the
      noise of the next step, which is as large as the leaves that get noise.

    Raises:
      ValueError: as from `pats_jax.pats_noise`.

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
