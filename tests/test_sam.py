"""SAM and ASAM: the gradient of a step against NumPy in float64, however the batch is split and with other methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import asam, make_train_step, methods, sam
from pats_jax.errors import InputError
from pats_jax.run.settings import Settings

ROWS, WORDS, HIDDEN, CLASSES, RATE = 16, 5, 4, 3, 0.1


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"layer": {"kernel": (WORDS, HIDDEN), "bias": (HIDDEN,)}, "head": {"kernel": (HIDDEN, CLASSES)}}
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))


def make_batch():
    rng = np.random.default_rng(1)
    weights = np.float32(rng.random(ROWS) * (np.arange(ROWS) < ROWS - 3))
    return {"x": np.float32(rng.normal(size=(ROWS, WORDS))), "y": rng.integers(CLASSES, size=ROWS), "weights": weights}


def loss_fn(params, batch, key):
    kept = 1.0 if key is None else jax.random.bernoulli(key, 0.5, (HIDDEN,))
    hidden = jnp.tanh(batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"]) * kept
    costs = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head"]["kernel"], batch["y"])
    return jnp.sum(batch["weights"] * costs) / jnp.maximum(jnp.sum(batch["weights"]), 1e-30), {"kept": jnp.mean(kept)}


def without_dropout(params, batch, key):
    return loss_fn(params, batch, None)[0], {}


def numpy_gradient(params, batch, kept=1.0):
    """Of the mean cross-entropy, by hand."""
    w, b, v = params["layer"]["kernel"], params["layer"]["bias"], params["head"]["kernel"]
    tanh = np.tanh(np.float64(batch["x"]) @ w + b)
    scores = np.exp(tanh * kept @ v)
    error = scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[batch["y"]]
    error *= (batch["weights"] / batch["weights"].sum())[:, None]
    below = (error @ v.T) * kept * (1 - tanh**2)
    return {
        "layer": {"kernel": batch["x"].T @ below, "bias": below.sum(0)},
        "head": {"kernel": (tanh * kept).T @ error},
    }


def numpy_ascent(params, grads, rho, eta=None):
    """The step up: SAM's, or ASAM's with T = 1 for the bias."""
    scales = jax.tree.map(np.ones_like, params)
    if eta is not None:
        scales = jax.tree.map(lambda p: np.abs(p) + eta, params)
        scales["layer"]["bias"] = np.ones(HIDDEN)
    scaled = jax.tree.map(np.multiply, scales, grads)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(scaled)))
    return jax.tree.map(lambda t, tg: rho * t * tg / norm, scales, scaled)


def numpy_sam(params, batch, rho, eta=None, kept=1.0):
    above = jax.tree.map(np.add, params, numpy_ascent(params, numpy_gradient(params, batch, kept), rho, eta))
    return numpy_gradient(above, batch, kept)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


GRADIENTS = {"sam": (sam(0.3), 0.3, None), "asam": (asam(0.7, 0.02, mask=matrices), 0.7, 0.02)}
every_gradient = pytest.mark.parametrize("name", GRADIENTS)
SGD = optax.sgd(RATE)


def make_state(tx=SGD, **options):
    return pats_jax.TrainState.create(apply_fn=None, params=make_params(), tx=tx, key=0, **options)


def wide(tree):
    return jax.tree.map(np.float64, tree)


def assert_step(state, gradient, tolerance=1e-6):
    expected = jax.tree.map(lambda p, g: p - RATE * g, wide(make_params()), gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), state.params, expected)


@every_gradient
@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_a_step_is_numpys_however_many_micro_batches(name, accumulation_steps):
    gradient, rho, eta = GRADIENTS[name]
    step = make_train_step(without_dropout, gradient=gradient, accumulation_steps=accumulation_steps)
    state, metrics = jax.jit(step)(make_state(), make_batch())
    expected = numpy_sam(wide(make_params()), make_batch(), rho, eta)
    assert_step(state, expected)
    plain = numpy_gradient(wide(make_params()), make_batch())
    assert np.abs(expected["head"]["kernel"] - plain["head"]["kernel"]).max() > 1e-3
    np.testing.assert_allclose(metrics["loss"], without_dropout(make_params(), make_batch(), None)[0], rtol=1e-5)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(expected)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


@pytest.mark.devices(8)
def test_pmap_climbs_by_the_gradient_of_the_whole_batch():
    gradient, rho, eta = GRADIENTS["asam"]
    step = make_train_step(without_dropout, gradient=gradient, axis_name="batch")
    step = jax.pmap(step, "batch", in_axes=(None, 0), out_axes=(None, None))
    state, _ = step(make_state(), {name: x.reshape(8, -1, *x.shape[1:]) for name, x in make_batch().items()})
    assert_step(state, numpy_sam(wide(make_params()), make_batch(), rho, eta))


def test_both_gradients_are_of_the_same_dropout():
    state, metrics = jax.jit(make_train_step(loss_fn, gradient=sam(0.3)))(make_state(), make_batch())
    kept = np.float64(jax.random.bernoulli(jax.random.fold_in(make_state().key, 0), 0.5, (HIDDEN,)))
    assert 0 < kept.sum() < HIDDEN and float(metrics["kept"]) == kept.mean()
    assert_step(state, numpy_sam(wide(make_params()), make_batch(), 0.3, kept=kept))


def test_frozen_parameters_are_left_out_of_the_norm():
    trainable = {"layer": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    step = jax.jit(make_train_step(without_dropout, gradient=sam(0.3)))
    state, _ = step(make_state(trainable=trainable), make_batch())
    params = wide(make_params())
    own = numpy_gradient(params, make_batch())["head"]["kernel"]
    above = params | {"head": {"kernel": params["head"]["kernel"] + 0.3 * own / np.linalg.norm(own)}}
    expected = params["head"]["kernel"] - RATE * numpy_gradient(above, make_batch())["head"]["kernel"]
    np.testing.assert_allclose(state.all_params["head"]["kernel"], expected, atol=1e-6)


@pytest.mark.parametrize("gradient", [sam(0.0), asam(0)], ids=["sam", "asam"])
def test_no_step_up_is_plain_training_bit_for_bit(gradient):
    steps = (make_train_step(loss_fn, gradient=gradient), make_train_step(loss_fn))
    ours, plain = (jax.jit(step)(make_state(), make_batch()) for step in steps)
    jax.tree.map(np.testing.assert_array_equal, (ours[0].params, ours[1]), (plain[0].params, plain[1]))


def test_a_step_without_a_finite_loss_is_skipped():
    broken = make_batch() | {"x": np.full((ROWS, WORDS), np.nan, np.float32)}
    step = jax.jit(make_train_step(without_dropout, gradient=sam(0.3), skip_nonfinite=True))
    state, metrics = step(make_state(), broken)
    assert float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, make_params())


# with other methods


def test_pats_reads_the_gradient_above_and_perturbed_moves_both():
    step = jax.jit(make_train_step(without_dropout, gradient=sam(0.3)))
    state, _ = step(make_state(pats_jax.pats(SGD, noise_scale=0.1, key=3)), make_batch())
    params = wide(make_params())
    expected = jax.tree.map(lambda p, g: np.abs(p * g), params, numpy_sam(params, make_batch(), 0.3))
    found = pats_jax.sensitivity(state.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)

    tx = pats_jax.with_raw_gradient(optax.chain(SGD, pats_jax.perturbed(0.5, key=3)))
    first, _ = step(make_state(tx), make_batch())
    second, _ = step(first, make_batch())
    noisy = wide(pats_jax.forward_params(first.opt_state, first.params))
    moved = jax.tree.map(lambda p, g: p - RATE * g, wide(first.params), numpy_sam(noisy, make_batch(), 0.3))
    assert np.abs(noisy["head"]["kernel"] - np.float64(first.params["head"]["kernel"])).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), second.params, moved)


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_the_method_is_the_function(name):
    settings = Settings(method=f"{name}+pats", **{f"{name}_rho": 0.4})
    gradient = methods.chosen_gradient(settings.methods)
    state, _ = jax.jit(make_train_step(without_dropout, gradient=gradient))(make_state(), make_batch())
    assert_step(state, numpy_sam(wide(make_params()), make_batch(), 0.4, None if name == "sam" else 0.01))
    assert methods.chosen_gradient(Settings(method="pats").methods) is None


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("sam+mixout", "the step up starts from all weights, of which the other method's forward pass uses only some"),
        ("dps-mix+asam", "the step up starts from all weights"),
        ("sam+asam", "both choose where the gradient is taken"),
    ],
)
def test_pairs_that_do_not_go_together(names, reason):
    with pytest.raises(InputError, match=f"cannot be combined: {reason}"):
        methods.get_methods(names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(sam, -0.1), "rho=-0.1 must be at least 0"),
        (functools.partial(asam, 0.5, -1), "eta=-1 must be at least 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
