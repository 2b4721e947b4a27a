"""A checkpoint of separate layers goes on with stacked ones, and the other way round."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import methods, models
from pats_jax.errors import InputError
from pats_jax.models import layer_axis, stack_layers, unstack_layers
from pats_jax.training import runners
from pats_jax.training.checkpoints import Checkpoints

LAYERS = 2
CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=LAYERS)
PARAMS = tiny.random_params(CONFIG)
MATRICES = r"encoder\.layer\.1\..*kernel$"


def in_encoder(params):
    axes = layer_axis(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, p, axis: p.ndim - (axis >= 0) > 1 and "encoder" in jax.tree_util.keystr(path), params, axes
    )


def some_layers(params):
    """Noise in the matrices of layer 1 alone."""
    return methods.layer_mask(params, MATRICES)


OPTIMIZERS = {
    "pats": lambda: pats_jax.pats(optax.adamw(1e-2), 0.1, key=1, mask=some_layers, layer_axis=layer_axis),
    "dps_mix": lambda: optax.chain(
        pats_jax.dps_mix(0.6, 2, key=3, mask=in_encoder, layer_axis=layer_axis), optax.sgd(0.1)
    ),
    "mixout": lambda: optax.chain(pats_jax.mixout(0.6, key=3, mask=in_encoder, layer_axis=layer_axis), optax.adam(0.1)),
    "sift": lambda: pats_jax.sift(optax.adam(0.1), 0.2, mask=in_encoder, layer_axis=layer_axis),
    "perturbed": lambda: pats_jax.with_raw_gradient(
        optax.chain(optax.adamw(1e-2), pats_jax.perturbed(0.1, key=1, mask=some_layers, layer_axis=layer_axis))
    ),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
}


def make_state(runner, layers, tx, trainable=None):
    params = stack_layers(PARAMS) if layers == "stacked" else PARAMS
    create = functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=tx, key=7, trainable=trainable)
    return runner.create_state(create, params)


@functools.cache
def step(tx):
    def take(state):
        forward = pats_jax.forward_params(state.opt_state, state.params)
        return state.apply_gradients(grads=jax.tree.map(lambda p: jnp.cos(3 * p) / 8, forward))

    return jax.jit(take)


def advance(state, tx, steps):
    for _ in range(steps):
        state = step(tx)(state)
    return state


def restored(folder, state):
    found = Checkpoints(folder, keep=None).restore(state)
    assert found is not None and found[1] == {"step": 3}
    return found[0]


@pytest.mark.parametrize(
    "target", [{"num_devices": 1}, pytest.param({"fsdp": 2}, marks=pytest.mark.slow)], ids=["one device", "fsdp"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(OPTIMIZERS)]
)
@pytest.mark.parametrize("layers", ["separate", pytest.param("stacked", marks=pytest.mark.slow)])
def test_training_goes_on_in_the_other_layout(tmp_path, name, layers, target):
    """As if it had been in that layout from the start; noise, masks and chosen entries are the same."""
    tx, other = OPTIMIZERS[name](), "stacked" if layers == "separate" else "separate"
    start, runner = runners.make_runner(num_devices=1), runners.make_runner(**target)
    before = advance(make_state(start, layers, tx), tx, 3)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(3, before, {"step": 3})
    record = json.loads((tmp_path / "c" / "3" / "state" / "record.json").read_text())
    assert record["layers"] == layers and record["format"] == 1
    empty = make_state(runner, other, tx)
    state = restored(tmp_path / "c", empty)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    convert = stack_layers if layers == "separate" else functools.partial(unstack_layers, num_layers=LAYERS)
    same(state.params, convert(before.params), 0)
    np.testing.assert_array_equal(state.stored_key.words, before.stored_key.words)
    whole = advance(make_state(start, other, tx), tx, 6)
    same(advance(state, tx, 3).params, whole.params, 1e-5)


def same(ours, expected, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), ours, expected)


def test_frozen_parameters_change_their_layout_too(tmp_path):
    tx, runner = optax.adam(0.1), runners.make_runner(num_devices=1)

    def biases(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "bias", params)

    state = make_state(runner, "separate", tx, biases(PARAMS))
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(3, state, {"step": 3})
    found = restored(tmp_path / "c", make_state(runner, "stacked", tx, biases(stack_layers(PARAMS))))
    same(found.all_params, stack_layers(PARAMS), 0)
    params = Checkpoints(tmp_path / "c", keep=None).restore_params(3, found)
    same(params, stack_layers(PARAMS), 0)


def test_an_old_record_without_a_layout_has_separate_layers(tmp_path, monkeypatch):
    from pats_jax.training import checkpoints as module

    tx, runner = OPTIMIZERS["sgd"](), runners.make_runner(num_devices=1)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(3, make_state(runner, "separate", tx), {"step": 3})
    path = tmp_path / "c" / "3" / "state" / "record.json"
    record = json.loads(path.read_text())
    del record["digest"], record["layers"]
    path.write_text(json.dumps({"digest": module._digest(record), **record}))
    for layers in ("separate", "stacked"):
        assert restored(tmp_path / "c", make_state(runner, layers, tx)) is not None


@pytest.mark.parametrize(("saved", "wanted"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("layers", ["separate", "stacked"])
def test_another_number_of_layers_is_another_model(tmp_path, layers, saved, wanted):
    tx, runner = OPTIMIZERS["sgd"](), runners.make_runner(num_devices=1)

    def of(number, stacked):
        params = tiny.random_params(dataclasses.replace(CONFIG, num_hidden_layers=number))
        create = functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=tx, key=7)
        return runner.create_state(create, models.stack_layers(params) if stacked else params)

    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(3, of(saved, layers == "stacked"), {"step": 3})
    with pytest.raises(InputError, match="c/3 belongs to another model or optimizer: .*layer.* differs"):
        Checkpoints(tmp_path / "c", keep=None).restore(of(wanted, layers == "separate"))
    assert Checkpoints(tmp_path / "c", keep=None).steps == [3]
