"""NoisyTune: adds a little noise to the pretrained parameters, once, before training."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pats_jax import trees
from pats_jax.trees import check_number


def noisy_tune(
    params: Any,
    intensity: float | jax.Array = 0.15,
    *,
    key: int | jax.Array,
    mask: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> Any:
    r"""NoisyTune: adds a little uniform noise to the pretrained parameters, once, before training.

    ``W + U(-intensity/2, intensity/2) * std(W)`` for every tensor (*secondary*: taken from later work, not from the
    authors' code). It is the population standard deviation, so a single number gets no noise (*ours*).

    Args:
      params: a tree of parameters.
      intensity: width of the noise, >= 0, in units of the tensor's standard deviation; the paper uses 0.15 on GLUE.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside stay as they are. None
        means every leaf.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own standard deviation and draws, and a mask may have an array of bools (layers,) for such a leaf.

    Returns:
      A tree like params, of the same dtypes.

    Raises:
      ValueError: if intensity is negative; traced numbers are not checked.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> noisy = pats_jax.noisy_tune({"w": jnp.array([0.0, 2.0]), "scalar": jnp.array(5.0)}, 0.5, key=0)
      >>> print(jnp.max(jnp.abs(noisy["w"] - jnp.array([0.0, 2.0]))) < 0.25, noisy["scalar"])
      True 5.0

    References:
      Wu et al., `NoisyTune: A Little Noise Can Help You Finetune Pretrained Language Models Better
      <https://arxiv.org/abs/2202.12024>`_, 2022
    """
    check_number("intensity", intensity, lambda x: 0 <= x < math.inf, "a finite number >= 0")
    chosen = trees.resolve_layer_mask(mask, params)
    noisy = trees.cut_to(chosen, params)
    axes = trees.held_layer_axes(layer_axis, params, noisy)
    keys = trees.leaf_keys(trees.own_key(key, "noisy_tune"), noisy, axes)

    def add_noise(param, key):
        noise = jax.random.uniform(key, param.shape, jnp.float32, -0.5, 0.5)
        return (param + intensity * trees.std(param) * noise).astype(param.dtype)

    def add_to_leaf(param, _, axis, chosen, leaf_keys):
        return trees.where_chosen(chosen, axis, trees.each_layer(add_noise, axis, param, per_layer=(leaf_keys,)), param)

    return trees.replace_held(add_to_leaf, params, noisy, axes, chosen, keys)
