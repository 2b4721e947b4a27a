"""States of ours are saved and restored by a user's own Orbax, by nothing but its public API."""

import copy

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import pats_jax
from pats_jax.training import runners

PARAMS = {"w": np.float32(np.arange(12).reshape(4, 3) / 7), "b": np.zeros(3, np.float32)}
GRADS = {"w": np.float32(np.sin(np.arange(12)).reshape(4, 3)), "b": np.ones(3, np.float32)}

OPTIMIZERS = {
    "adamw": lambda key: optax.adamw(1e-2),
    "pats": lambda key: pats_jax.pats(optax.adamw(1e-2), 0.1, key=key),
    "dps_mix": lambda key: optax.chain(pats_jax.dps_mix(0.5, 1, key=key), optax.sgd(0.1)),
    "mixout": lambda key: optax.chain(pats_jax.mixout(0.5, key=key), optax.sgd(0.1)),
    "child_tuning_f": lambda key: optax.chain(pats_jax.child_tuning_f(0.5, key=key), optax.sgd(0.1)),
    "sift": lambda key: pats_jax.sift(
        pats_jax.pats(optax.adamw(1e-2), 0.1, key=key), 0.5, mask={"w": True, "b": False}
    ),
    "multi_steps": lambda key: optax.MultiSteps(pats_jax.pats(optax.adamw(1e-2), 0.1, key=key), 2),
}
KEYS = {"int": lambda seed: seed, "typed": jax.random.key, "rbg": lambda seed: jax.random.key(seed, impl="rbg")}


def make_state(optimizer, key, tx=None):
    tx = tx or OPTIMIZERS[optimizer](key)
    return pats_jax.TrainState.create(apply_fn=None, params=jax.tree.map(jnp.array, PARAMS), tx=tx, key=key)


def after(state, steps):
    for _ in range(steps):
        state = state.apply_gradients(grads=jax.tree.map(jnp.array, GRADS))
    return state


def assert_same(ours, theirs):
    assert jax.tree.structure(ours.replace(tx=None)) == jax.tree.structure(theirs.replace(tx=None))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))
    assert ours.key == theirs.key
    jax.tree.map(np.testing.assert_array_equal, after(ours, 1).params, after(theirs, 1).params)


def standard(folder, state, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "standard", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "standard", target)


def pytree(folder, state, target):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "pytree", state)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        return checkpointer.restore(folder / "pytree", item=target, restore_args=arguments)


def manager(folder, state, target):
    with ocp.CheckpointManager(folder / "manager", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))


@pytest.mark.parametrize(
    ("optimizer", "key", "way"),
    [(name, "int", standard) for name in ("pats", "dps_mix", "sift", "multi_steps")]
    + [pytest.param(name, "int", standard, marks=pytest.mark.slow) for name in ("adamw", "mixout", "child_tuning_f")]
    + [("pats", "int", way) for way in (pytree, manager)]
    + [pytest.param("adamw", "int", way, marks=pytest.mark.slow) for way in (pytree, manager)]
    + [("pats", key, standard) for key in ("typed", "rbg")],
)
def test_a_state_goes_through_orbax(tmp_path, optimizer, key, way):
    """It is restored into the shapes of a state of another seed, and goes on as if nothing had happened."""
    state = after(make_state(optimizer, KEYS[key](3)), 2)
    other = OPTIMIZERS[optimizer](KEYS[key](4))
    target = jax.eval_shape(lambda: make_state(optimizer, KEYS[key](4), other))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state.step.sharding), target)
    assert_same(way(tmp_path, state, target), state)


def test_without_a_target_the_words_are_plain_arrays(tmp_path):
    state = make_state("pats", 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "c")
    np.testing.assert_array_equal(found["stored_key"]["words"], jax.random.key_data(state.key))


def test_a_state_on_a_mesh_and_one_of_many_seeds(tmp_path):
    runner = runners.make_runner(fsdp=2)

    tx = OPTIMIZERS["pats"](3)

    def create(params):
        return pats_jax.TrainState.create(apply_fn=None, params=params, tx=tx, key=3)

    state = runner.create_state(create, PARAMS)
    restored = standard(tmp_path, state, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    assert_same(restored, state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("moved"), restored, state)

    many = jax.vmap(OPTIMIZERS["pats"](0).init, axis_size=3, in_axes=None)(PARAMS)
    seeds = jax.vmap(lambda seed: OPTIMIZERS["pats"](seed).init(PARAMS))(jnp.arange(3))
    assert jax.tree.structure(seeds) == jax.tree.structure(many)
    restored = manager(tmp_path, seeds, jax.tree.map(ocp.utils.to_shape_dtype_struct, many))
    assert restored[-1].key.shape == (3,) and (restored[-1].key == seeds[-1].key).all()
    assert (restored[-1].key == jax.vmap(pats_jax.random.fast_key)(jnp.arange(3))).all()


@pytest.mark.parametrize("optimizer", ["adamw", "pats"])
def test_an_nnx_optimizer_goes_through_orbax(tmp_path, optimizer):
    def make(seed):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, OPTIMIZERS[optimizer](seed), wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3))) ** 2))(model))

    pair = make(0)
    step(*pair)
    _, state = nnx.split(pair)
    graph, other = nnx.split(make(1))
    restored = standard(tmp_path, state, jax.tree.map(ocp.utils.to_shape_dtype_struct, other))
    again = nnx.merge(graph, copy.copy(restored))
    step(*again)
    step(*pair)
    np.testing.assert_array_equal(again[0].kernel[...], pair[0].kernel[...])


def test_flax_serialises_a_state_too():
    state = after(make_state("pats", 3), 2)
    assert_same(flax.serialization.from_bytes(make_state("pats", 4), flax.serialization.to_bytes(state)), state)


# the node itself


def test_a_typed_key_of_any_kind_keeps_it():
    for key in (jax.random.key(0), jax.random.key(0, impl="rbg"), pats_jax.random.fast_key(0)):
        state = make_state("pats", key)
        assert jax.random.key_impl(state.key) == jax.random.key_impl(key) and state.key == key
        assert state.opt_state[-1].key == key
        assert all(not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


def test_the_key_of_an_abstract_state_is_its_shape():
    state = jax.eval_shape(lambda: make_state("pats", 3))
    assert state.key.shape == () and state.key.dtype == pats_jax.random.fast_key(3).dtype


def test_a_key_is_replaced_in_states_and_their_subclasses():
    class Averaged(pats_jax.TrainState):
        average: float = 0.0

    for cls in (pats_jax.TrainState, Averaged):
        state = cls.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1), key=3)
        assert state.replace(key=jax.random.key(5)).key == jax.random.key(5)
        assert state.replace(step=7).key == state.key and isinstance(state.replace(step=7), cls)
        with pytest.raises(TypeError, match="kye"):
            state.replace(kye=3)


def test_two_kinds_are_two_structures():
    """So a state with one cannot be taken for one with the other."""
    keys = jax.random.key(0), pats_jax.random.fast_key(0)
    threefry, fast = (jax.tree.structure(pats_jax.random.StoredKey.of(key)) for key in keys)
    assert fast != threefry
