"""Perturbed: the noise of PATS in the forward pass of each step, and in the parameters never."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import methods
from pats_jax.errors import InputError


def test_it_trains_the_weights_by_the_gradient_at_noisy_ones():
    target, rate, scale = np.float32([[1.0, -2.0], [0.5, 3.0], [2.0, 0.1]]), 0.05, 0.3
    tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(rate), pats_jax.perturbed(scale, key=4, decay=0.5)))
    params = {"w": jnp.float32([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])}
    state, average = tx.init(params), np.zeros((3, 2))
    weights = np.asarray(params["w"], np.float64)
    std = weights.std()
    for step in range(6):
        used = pats_jax.forward_params(state, params)
        noise = np.asarray(used["w"] - params["w"], np.float64)
        share = np.maximum(0, 1 - average / average.mean()) if step else np.zeros((3, 2))
        assert (np.abs(noise) <= np.sqrt(3) * scale * std * share + 1e-6).all()
        assert ((noise != 0) == (share > 0)).all()
        grads = {"w": 2 * (used["w"] - target)}
        average = 0.5 * average + 0.5 * np.abs(weights * np.asarray(grads["w"]))
        weights = weights - rate * 2 * (weights + noise - target)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], weights, atol=1e-5)
    np.testing.assert_allclose(pats_jax.sensitivity(state)["w"], average / (1 - 0.5**6), rtol=1e-4)


def test_its_noise_has_the_standard_deviation_of_the_formula():
    params = jnp.float32(np.random.default_rng(0).normal(size=(4, 5)))
    grads = jnp.float32(np.random.default_rng(1).normal(size=(4, 5)))

    def noise(seed):
        tx = pats_jax.with_raw_gradient(pats_jax.perturbed(0.5, key=seed))
        _, state = tx.update(grads, tx.init(params), params)
        return pats_jax.forward_params(state, params) - params

    draws = np.asarray(jax.jit(jax.vmap(noise))(jnp.arange(20_000)), np.float64)
    saliency = np.abs(np.float64(params) * np.float64(grads))
    expected = 0.5 * np.std(np.float64(params)) * np.maximum(0, 1 - saliency / saliency.mean())
    np.testing.assert_allclose(draws.std(0), expected, rtol=0.025, atol=1e-6)


@pytest.mark.parametrize("other", ["pats", "sift"])
def test_it_is_not_combined_with(other):
    with pytest.raises(InputError, match="cannot be combined"):
        methods.get_methods(f"{other}+perturbed")
