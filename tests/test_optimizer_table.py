"""The kinds of test that Optax puts every optimizer through, for PATS around a table of them and for its companions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax

# Noise that fades with the steps, as the training program anneals it: the minimum can be reached.
FADING = optax.exponential_decay(1e-2, transition_steps=100, decay_rate=0.5)

OPTIMIZERS = {
    "adamw": lambda rate: pats_jax.pats(optax.adamw(rate, weight_decay=0.0), FADING, key=0),
    "adamw, exponential": lambda rate: pats_jax.pats(optax.adamw(rate), FADING, key=0, response="exponential"),
    "adamw, normal": lambda rate: pats_jax.pats(optax.adamw(rate), FADING, key=0, distribution="normal"),
    "adamw, clipped": lambda rate: pats_jax.pats(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)), FADING, key=0, response="reciprocal"
    ),
    "lion": lambda rate: pats_jax.pats(optax.lion(rate / 10), FADING, key=0),
    "sgd": lambda rate: pats_jax.pats(optax.sgd(rate / 10, momentum=0.9), FADING, key=0),
}
adamw = OPTIMIZERS["adamw"]


def plus_adamw(transform, rate):
    return optax.with_extra_args_support(optax.chain(transform, optax.adamw(rate, weight_decay=0.0)))


def sage(rate):
    """The Adamax form; the first step of the other one is 0."""
    scale = pats_jax.scale_by_sage(bias_correction=False)
    parts = (optax.scale_by_adamax(), scale, optax.scale_by_learning_rate(rate))
    return pats_jax.with_raw_gradient(optax.chain(*parts))


COMPANIONS = {
    "dps_dense": lambda rate: plus_adamw(pats_jax.dps_dense(0.7, 2), rate),
    "dps_mix": lambda rate: plus_adamw(pats_jax.dps_mix(0.7, 2, key=0), rate),
    "child_tuning_f": lambda rate: plus_adamw(pats_jax.child_tuning_f(0.9, key=0), rate),
    "child_tuning_d": lambda rate: plus_adamw(pats_jax.child_tuning_d(True), rate),
    "mixout": lambda rate: plus_adamw(pats_jax.mixout(0.3, key=0), rate),
    "l2_sp": lambda rate: plus_adamw(pats_jax.l2_sp(0.01, 0.01, head_mask=False), rate),
    "sift": lambda rate: pats_jax.sift(optax.adamw(rate, weight_decay=0.0), 0.5, mask=None),
    "sage": sage,
    "lora_plus": lambda rate: optax.with_extra_args_support(
        optax.chain(optax.adamw(rate / 2, weight_decay=0.0), pats_jax.lora_plus(2))
    ),
}
EVERY = OPTIMIZERS | COMPANIONS
# The others are anchored, hold a part of the coordinates, or, as SAGE, stand still where nothing is uncertain.
REACH_THE_MINIMUM = OPTIMIZERS | {
    name: COMPANIONS[name] for name in ("dps_dense", "child_tuning_f", "child_tuning_d", "lora_plus")
}
every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
# What test_companions asks of each companion by itself.
every_pats = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parabola(x):
    return jnp.sum(jnp.square(x["x"] - jnp.array([1.0, -1.0, 1.0])))


def rosenbrock(x):
    a, b = x["x"][0], x["x"][1]
    return jnp.square(1.0 - a) + 100.0 * jnp.square(b - a**2)


def minimize(tx, objective, start, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(pats_jax.forward_params(state, params)), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(start)


@pytest.mark.parametrize("make", REACH_THE_MINIMUM.values(), ids=REACH_THE_MINIMUM)
def test_parabola(make):
    found = minimize(make(1e-1), parabola, {"x": jnp.array([-1.0, 10.0, 1.0])}, 1500)
    np.testing.assert_allclose(found["x"], [1.0, -1.0, 1.0], atol=3e-2)


def test_rosenbrock():
    found = minimize(adamw(1e-2), rosenbrock, {"x": jnp.array([0.0, 0.0])}, 8000)
    np.testing.assert_allclose(found["x"], [1.0, 1.0], atol=3e-2)


@every_optimizer
def test_accepts_extra_arguments_and_jit_changes_nothing(make):
    tx, params = make(1e-2), {"x": jnp.array([1.0, 2.0, 4.0])}
    grads = jax.grad(parabola)(params)
    plain, _ = tx.update(grads, tx.init(params), params)
    extra, _ = tx.update(grads, tx.init(params), params, value=1.0, loss=2.0)
    jitted, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(plain["x"], extra["x"])
    np.testing.assert_allclose(plain["x"], jitted["x"], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:pats_noise on bfloat16")
@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_keeps_the_dtype_of_params(make, dtype):
    tx, params = make(1e-2), {"x": jnp.arange(6, dtype=dtype), "y": jnp.ones((), dtype)}
    updates, state = tx.update(params, tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    updates, _ = tx.update(params, state, optax.apply_updates(params, updates))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@every_pats
def test_state_is_stable_in_structure_shape_and_dtype_and_compiles_once(make):
    tx, params = make(1e-2), {"x": jnp.arange(6.0), "m": jnp.ones((3, 2))}
    update = jax.jit(tx.update)
    state = tx.init(params)
    signature = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, state) == signature
    assert update._cache_size() == 1


@every_optimizer
def test_inside_inject_hyperparams(make):
    params = {"x": jnp.array([1.0, 2.0, 4.0])}
    injected = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=1e-2)
    state, plain = injected.init(params), make(1e-2)
    updates, state = injected.update(params, state, params)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(updates["x"], expected["x"], rtol=1e-5)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, state = injected.update(params, state, params)
    assert np.isfinite(updates["x"]).all()


@every_pats
def test_inside_multi_steps(make):
    params = {"x": jnp.array([1.0, 2.0, 4.0])}
    tx = optax.MultiSteps(make(1e-2), every_k_schedule=3)
    state = tx.init(params)
    for i in range(3):
        updates, state = jax.jit(tx.update)({"x": jnp.array([3.0, 2.0, 1.0]) * (i + 1)}, state, params)
        assert bool(jnp.any(updates["x"] != 0)) == (i == 2)
    expected, _ = make(1e-2).update({"x": jnp.array([6.0, 4.0, 2.0])}, make(1e-2).init(params), params)
    np.testing.assert_allclose(updates["x"], expected["x"], rtol=1e-5)


@pytest.mark.devices(8)
@every_pats
def test_sharded_over_eight_devices_as_on_one(make):
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"x": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    grads = {"x": jnp.cos(jnp.arange(64.0)).reshape(8, 8)}
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("shard", None))))
    tx = make(1e-2)
    updates, state = jax.jit(tx.update)(place(grads), jax.jit(tx.init)(place(params)), place(params))
    expected, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["x"], expected["x"], rtol=1e-5, atol=1e-7)
    assert len(updates["x"].sharding.device_set) == 8
    whole = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 8)]
    assert all(leaf.addressable_shards[0].data.shape == (1, 8) for leaf in whole)


def test_tree_map_params_reaches_sensitivity():
    tx, params = adamw(1e-2), {"x": jnp.ones((4, 2)), "y": jnp.ones(3)}
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    np.testing.assert_array_equal(pats_jax.sensitivity(state)["x"], np.ones((4, 2)))
