"""Transforms on separate and on stacked layers of a classifier: one meaning, and the same noise and masks."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import methods, trees
from pats_jax.errors import InputError
from pats_jax.models import layer_axis, stack_layers, unstack_layers
from pats_jax.models.layout import separate_names
from pats_jax.transforms import PatsNoiseState

LAYERS, STEPS = 3, 5
CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=LAYERS)


@functools.cache
def separate():
    return tiny.random_params(CONFIG)


def in_encoder(params):
    return jax.tree_util.tree_map_with_path(lambda path, x: "encoder" in separate_names(path, x)[0], params)


# name -> a function of (layer axis, mask) that makes the transform; stages of one or two steps, so that they change
TRANSFORMS = {
    "dps_dense": lambda axis, mask: pats_jax.dps_dense(0.6, 1, mask=mask, layer_axis=axis),
    "dps_mix": lambda axis, mask: pats_jax.dps_mix(0.6, 2, key=3, mask=mask, layer_axis=axis),
    "child_tuning_f": lambda axis, mask: pats_jax.child_tuning_f(0.4, key=3, mask=mask, layer_axis=axis),
    "mixout": lambda axis, mask: pats_jax.mixout(0.6, key=3, mask=mask, layer_axis=axis),
    "sift": lambda axis, mask: pats_jax.sift(optax.sgd(0.25, momentum=0.5), 0.1, mask=mask, layer_axis=axis),
    "rose": lambda axis, mask: pats_jax.rose(optax.scale_by_adam(0.5), 0.6, mask=mask, layer_axis=axis),
    "freeze_unselected": lambda axis, mask: pats_jax.freeze_unselected(
        optax.chain(pats_jax.dps_dense(0.6, 1, mask=mask, layer_axis=axis), optax.trace(0.5))
    ),
}


def gradients(number, params):
    """Something like a gradient, in quarters, so that many entries tie and sums of squares are exact."""

    def wave(path, leaf):
        name = zlib.crc32(jax.tree_util.keystr(path).encode()) % 100
        values = (4 + name % 7) * np.cos((number + 2) * np.arange(leaf.size) + name)
        return np.float32(np.round(values) / 4).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(wave, params)


def run(transform, params, convert, like=None):
    """Parameters, forward parameters and state after some steps; gradients are those of separate layers, converted."""
    tx = pats_jax.with_raw_gradient(transform)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, grads):
        forward = pats_jax.forward_params(state, params)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - 0.25 * u, params, updates), forward, state

    for number in range(STEPS):
        params, forward, state = step(params, state, convert(gradients(number, separate() if like is None else like)))
    return jax.tree.map(np.asarray, (params, forward, state))  # what follows is compiled for no shape


def assert_same(ours, expected):
    """The same bits; of one shape but for axes of size 1, which thresholds have more of if layers are stacked."""
    columns = jax.tree.leaves(ours), jax.tree.leaves(expected)
    for x, y in zip(*columns, strict=True):
        np.testing.assert_array_equal(x, np.reshape(y, np.shape(x)))


# That None is a mask of everything is the same line for all; their twins are slow.
OF_ALL = [pytest.param(name, None, marks=() if name == "child_tuning_f" else pytest.mark.slow) for name in TRANSFORMS]


@pytest.mark.parametrize("name, mask", [*((name, in_encoder) for name in TRANSFORMS), *OF_ALL])
def test_stacked_layers_are_separate_ones_bit_for_bit(name, mask):
    one = run(TRANSFORMS[name](None, mask), separate(), lambda tree: tree)
    other = run(TRANSFORMS[name](layer_axis, mask), stack_layers(separate()), stack_layers)
    assert_same(other, stack_layers(one))
    assert_same(unstack_layers(other[0], LAYERS), one[0])


QUICK = ("dps_mix", "child_tuning_f")  # both draw, and one has thresholds


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMS if name not in QUICK)]
)
def test_the_layer_axis_matters(name):
    """Taken for one tensor, a stack has other draws, thresholds or entries."""
    mask = jax.tree.map(lambda p: p.ndim == 3, stack_layers(separate()))
    one = run(TRANSFORMS[name](layer_axis, mask), stack_layers(separate()), stack_layers)[0]
    other = run(TRANSFORMS[name](None, mask), stack_layers(separate()), stack_layers)[0]
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


WIDE = {
    "kernels": np.float32(np.random.default_rng(0).normal(size=(4, 6, 5))),
    "head": np.ones((5, 2), np.float32),
}


@pytest.mark.parametrize("axis", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_axis_may_hold_the_layers(name, axis):
    """An int, a prefix and a function; and where the axis stands changes no bit."""

    def moved(tree):
        return tree | {"kernels": np.moveaxis(tree["kernels"], 0, axis)}

    first = run(TRANSFORMS[name]({"kernels": 0, "head": -1}, None), WIDE, lambda tree: tree, WIDE)[0]
    other = run(TRANSFORMS[name](lambda params: {"kernels": axis, "head": -1}, None), moved(WIDE), moved, WIDE)[0]
    assert_same(other, moved(first))
    if name not in ("freeze_unselected", "rose"):  # ROSE's quantile is over all tensors
        within = optax.masked(TRANSFORMS[name](0, None), {"kernels": True, "head": False})
        kernels = run(within, WIDE, lambda tree: tree, WIDE)[0]["kernels"]
        np.testing.assert_array_equal(kernels, first["kernels"])


def test_rows_are_counted_within_a_layer():
    params = {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 4))}
    for input_axis, shape in ((0, (3, 4, 1)), (1, (3, 1, 5)), (-1, (3, 1, 5))):
        state = pats_jax.mixout(0.5, key=0, input_axis=input_axis, layer_axis=0).init(params)
        assert state.forward.kept["kernel"].shape == shape and state.forward.kept["bias"].shape == (3, 4)
    with pytest.raises(ValueError, match=r"input_axis=2 is not an axis of a parameter of shape \(4, 5\)"):
        pats_jax.mixout(0.5, key=0, input_axis=2, layer_axis=0).init(params)


def test_noisy_tune_has_a_standard_deviation_for_each_layer():
    params = {"w": jnp.arange(12.0).reshape(3, 4) ** 2}
    noisy = pats_jax.noisy_tune(params, 0.5, key=0, layer_axis=0)
    for layer, std in enumerate(np.std(np.float64(params["w"]), axis=1)):
        share = (np.float64(noisy["w"]) - params["w"])[layer] / (0.5 * std)
        assert np.all(np.abs(share) <= 0.5 + 1e-6) and np.ptp(share) > 0.1
    own = jax.jit(lambda params: pats_jax.noisy_tune(params, 0.5, key=0))(separate())
    stacked = jax.jit(lambda params: pats_jax.noisy_tune(params, 0.5, key=0, layer_axis=layer_axis))(
        stack_layers(separate())
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), stacked, stack_layers(own))


def test_a_mask_may_take_some_layers():
    """The others pass as they are, and draw nothing from those that it takes."""
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(3, 4, 5)))}
    some, grads = {"w": np.array([True, False, True])}, {"w": jnp.ones((3, 4, 5))}
    whole = pats_jax.noisy_tune(params, 0.5, key=0, layer_axis=0)["w"]
    partly = pats_jax.noisy_tune(params, 0.5, key=0, layer_axis=0, mask=some)["w"]
    np.testing.assert_array_equal(partly[1], params["w"][1])
    np.testing.assert_array_equal(partly[::2], whole[::2])
    assert (whole != params["w"]).all()

    def thinned(mask):
        tx = pats_jax.child_tuning_f(0.5, key=0, layer_axis=0, mask=mask)
        return tx.update(grads, tx.init(params))[0]["w"]

    np.testing.assert_array_equal(thinned(some)[1], grads["w"][1])
    np.testing.assert_array_equal(thinned(some)[::2], thinned(None)[::2])
    for name in ("dps_dense", "dps_mix", "mixout", "sift"):
        with pytest.raises(ValueError, match="mask: takes some layers of a stacked leaf and leaves others out"):
            TRANSFORMS[name](0, some).init(params)


def test_the_noise_of_pats_is_that_of_separate_layers_bit_for_bit():
    """Where the sensitivity is zero and the standard deviation is 1, nothing is rounded."""
    params = jax.tree.map(lambda p: np.float32(np.arange(p.size) % 2 * 2 - 1).reshape(p.shape), separate())
    params = jax.tree.map(lambda p: p[: p.size // 2 * 2] if p.ndim == 1 else p, params)

    def noise(params, axis):
        tx = pats_jax.pats_noise(0.5, key=1, layer_axis=axis)
        state, zeros = jax.jit(tx.init)(params), jax.tree.map(np.zeros_like, params)
        noise = jax.jit(lambda state: tx.update(zeros, state, params, grad=zeros)[0])(state)
        return jax.tree.map(np.asarray, noise), state

    (one, _), (other, state) = noise(params, None), noise(stack_layers(params), layer_axis)
    assert_same(other, stack_layers(one))
    assert isinstance(state, PatsNoiseState)
    stds = trees.map_held(lambda std: std.shape, state.initial_std)
    assert stds["bert"]["encoder"]["layer"]["output"]["dense"]["kernel"] == (LAYERS,)


@pytest.mark.parametrize("axis", [3, -2])
def test_an_axis_that_a_leaf_lacks(axis):
    with pytest.raises(ValueError, match=rf"layer_axis={axis} is not an axis of a parameter of shape \(4, 6, 5\)"):
        pats_jax.dps_dense(0.5, 1, layer_axis={"kernels": axis, "head": -1}).init(WIDE)


def test_a_regex_of_one_layer_gives_noise_there_only():
    settings = tiny.Settings(task_name="sst2", method="pats", noise_layers=r"encoder\.layer\.1\.", learning_rate=1.0)
    params = stack_layers(separate())
    tx = methods.make_optimizer(settings.optimizer, settings.methods, 10, params, seed=settings.seed)
    zeros = jax.tree.map(np.zeros_like, params)

    def second_updates(tx):  # the learning rate, and with it the noise, starts from 0
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(zeros, state, params)
        return jax.tree.map(np.asarray, updates)

    plain = methods.make_optimizer(settings.optimizer, (), 10, params)
    updates, expected = second_updates(tx), second_updates(plain)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(expected), strict=True
    ):
        changed = np.asarray(ours != theirs)
        if len(separate_names(path, ours)) == 1:
            assert not changed.any(), path
        else:
            assert not changed[[0, 2]].any(), path
            if path[-1].key == "kernel":
                assert changed[1].all(), path


def test_a_method_that_trains_some_layers_only_needs_separate_ones(monkeypatch):
    """Trained and frozen parameters are cut apart leaf by leaf."""
    monkeypatch.setattr(methods.METHODS["bitfit"], "trainable", r"layer\.1\..*bias$|^classifier\.")
    settings = tiny.Settings(task_name="sst2", method="bitfit")
    mask = methods.trainable_mask(settings.methods, separate())
    layer = mask["bert"]["encoder"]["layer"]
    assert layer["1"]["output"]["dense"]["bias"] is True and layer["0"]["output"]["dense"]["bias"] is False
    with pytest.raises(InputError, match="^method bitfit: trains some layers only; set layers separate$"):
        methods.trainable_mask(settings.methods, stack_layers(separate()))
