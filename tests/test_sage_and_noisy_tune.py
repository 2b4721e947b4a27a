"""SAGE and NoisyTune against independent computations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transforms import PARAMS, gradients

import pats_jax


@pytest.mark.parametrize("form", ["adam", "adamax"])
def test_sage_is_the_rule_over_20_steps(form):
    """The AdamW form corrects A and leaves weight decay alone; the Adamax form does neither."""
    rate, decay, b1, b2, b3, eps = 0.01, 0.1, 0.9, 0.99, 0.6, 1e-6
    adam, decayed = form == "adam", optax.add_decayed_weights(decay)
    sage = pats_jax.scale_by_sage(b3, bias_correction=adam, mask={"w": True, "v": True, "b": False})
    parts = (
        (optax.scale_by_adam(b1, b2), sage, decayed) if adam else (optax.scale_by_adamax(b1, b2, 1e-8), decayed, sage)
    )
    tx = pats_jax.with_raw_gradient(
        optax.chain(optax.clip_by_global_norm(0.5), *parts, optax.scale_by_learning_rate(rate))
    )
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    expected = {name: np.float64(p) for name, p in PARAMS.items()}
    m, v, a = ({name: np.zeros(p.shape) for name, p in PARAMS.items()} for _ in range(3))
    for t in range(1, 21):
        raw = {name: np.float64(g) for name, g in gradients(t).items()}
        norm = np.sqrt(sum((g**2).sum() for g in raw.values()))
        for name, theta in expected.items():
            g = raw[name] * min(1, 0.5 / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            if adam:
                v[name] = b2 * v[name] + (1 - b2) * g**2
                step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + 1e-8)
            else:
                v[name] = np.maximum(b2 * v[name], np.abs(g) + 1e-8)
                step = m[name] / (1 - b1**t) / v[name]
            saliency = np.abs(theta * raw[name])
            a[name] = b3 * a[name] + (1 - b3) * saliency
            average = a[name] / (1 - b3**t) if adam else a[name]
            factor = np.abs(saliency - average) / (average + eps**2) if name != "b" else 1
            step = factor * step + decay * theta if adam else factor * (step + decay * theta)
            expected[name] = theta - rate * step
        updates, state = update(gradients(t), state, params)
        if t == 1 and adam:
            np.testing.assert_allclose(updates["w"], -rate * decay * PARAMS["w"], atol=1e-7)
        params = optax.apply_updates(params, updates)
    for name, theta in expected.items():
        np.testing.assert_allclose(params[name], theta, rtol=1e-5, atol=2e-6)


def test_sage_of_a_parameter_without_sensitivity_and_of_a_gradient_that_is_not_finite():
    tx = pats_jax.with_raw_gradient(optax.chain(optax.scale(-1.0), pats_jax.scale_by_sage()))
    params = {"w": jnp.array([0.0, 1.0, 1.0])}
    state = tx.init(params)
    for bad in (1.0, jnp.nan, 2.0):
        updates, state = tx.update({"w": jnp.array([1.0, 1.0, bad])}, state, params)
    assert np.isfinite(updates["w"]).all() and updates["w"][0] == 0 and updates["w"][2] != 0


@pytest.mark.parametrize(("intensity", "dtype"), [(0.15, jnp.float32), (0.5, jnp.float32), (0.5, jnp.bfloat16)])
def test_noisy_tune_adds_uniform_noise_in_standard_deviations_of_the_tensor(intensity, dtype):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(3 * rng.normal(size=(200, 100)), dtype),
        "v": jnp.asarray(rng.normal(size=(200, 100)), dtype),
        "one": jnp.ones(1),
        "none": None,
        "kept": jnp.ones((2, 2)),
    }
    mask = {"w": True, "v": True, "one": True, "none": True, "kept": False}
    noisy = pats_jax.noisy_tune(params, intensity, key=0, mask=mask)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), noisy) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    noise = {}
    for name in ("w", "v"):
        before = np.float64(params[name])
        noise[name] = (np.float64(noisy[name]) - before) / np.std(before)
        rounding = 2.0**-8 * np.abs(before).max() / np.std(before) if dtype == jnp.bfloat16 else 1e-5
        assert np.abs(noise[name]).max() <= intensity / 2 + rounding
        assert noise[name].std() == pytest.approx(intensity / np.sqrt(12), rel=0.02)
        assert abs(noise[name].mean()) < 5 * intensity / np.sqrt(12 * 20_000)
    assert abs(np.corrcoef(noise["w"].ravel(), noise["v"].ravel())[0, 1]) < 4 / np.sqrt(20_000)
    assert float(noisy["one"][0]) == 1 and noisy["none"] is None and noisy["kept"] is params["kept"]


def test_noisy_tune_draws_by_seed_and_leaf_and_nothing_at_intensity_0():
    def draw(seed):
        return pats_jax.noisy_tune(PARAMS, key=seed)["w"]

    together = jax.jit(jax.vmap(draw))(jnp.arange(3))
    for seed in range(3):
        np.testing.assert_allclose(together[seed], draw(seed), atol=1e-7)
    assert (together[0] != together[1]).any()
    alone = pats_jax.noisy_tune({"w": PARAMS["w"]}, key=1)
    np.testing.assert_array_equal(alone["w"], draw(1))
    unchanged = pats_jax.noisy_tune(PARAMS, 0.0, key=0)
    jax.tree.map(np.testing.assert_array_equal, unchanged, PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pats_jax.scale_by_sage(1.0), r"decay=1.0 must be in \(0, 1\)"),
        (lambda: pats_jax.scale_by_sage(0.0), "decay=0.0 must be"),
        (lambda: pats_jax.scale_by_sage(eps=0.0), "eps=0.0 must be a finite number > 0"),
        (lambda: pats_jax.noisy_tune(PARAMS, -0.1, key=0), "intensity=-0.1 must be a finite number >= 0"),
        (lambda: pats_jax.noisy_tune(PARAMS, key=jax.random.PRNGKey(0)), "legacy uint32 key"),
        (lambda: pats_jax.scale_by_sage().update(PARAMS, None, PARAMS), "scale_by_sage needs the raw gradient: wrap"),
        (lambda: pats_jax.scale_by_sage().update(PARAMS, None, grad=PARAMS), "scale_by_sage needs the parameters"),
    ],
)
def test_bad_arguments_of_sage_and_noisy_tune(make, message):
    with pytest.raises(ValueError, match=message):
        make()
