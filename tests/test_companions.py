"""What every companion method must do: one bank of tests that each goes through, inside a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pats_jax

DEVICES, ROWS, STEPS = 8, 16, 9
MASK = {"layer": {"kernel": True, "bias": False}, "head": True}
HEAD = {"layer": False, "head": True}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"layer": {"kernel": (8, 16), "bias": (16,)}, "head": (16, 8)}
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s) / 4), shapes, is_leaf=lambda s: isinstance(s, tuple))


def make_batch(seed):
    rng = np.random.default_rng(100 + seed)
    return {"x": np.float32(rng.normal(size=(ROWS, 8))), "y": np.float32(rng.normal(size=(ROWS, 8)))}


def loss_fn(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"])
    return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2), {}


def random_mask():
    return jax.tree.map(lambda p: p > 0, make_params())


OPTIMIZER = optax.sgd(0.05, momentum=0.9)  # quick to compile, and unlike Adam it does not magnify rounding
CLIPPED_ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def sage(inner_decay=0.75, **sage_args):
    scale = pats_jax.scale_by_sage(inner_decay, **sage_args)
    parts = (optax.scale_by_adam(), scale, optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(1e-2))
    return pats_jax.with_raw_gradient(optax.chain(*parts))


# name -> a function of the seed that makes the whole optimizer; stages of two steps, so that they change
METHODS = {
    "dps_dense": lambda seed: optax.chain(pats_jax.dps_dense(0.6, 2, mask=MASK), OPTIMIZER),
    "dps_mix": lambda seed: optax.chain(pats_jax.dps_mix(0.6, 2, key=seed, mask=MASK), OPTIMIZER),
    "child_tuning_f": lambda seed: optax.chain(pats_jax.child_tuning_f(0.4, key=seed, mask=MASK), OPTIMIZER),
    "child_tuning_d": lambda seed: optax.chain(pats_jax.child_tuning_d(random_mask()), OPTIMIZER),
    "sift": lambda seed: pats_jax.sift(OPTIMIZER, 0.2, mask=MASK),
    "rose": lambda seed: pats_jax.rose(CLIPPED_ADAMW, 0.5),
    "mixout": lambda seed: optax.chain(pats_jax.mixout(0.6, key=seed, mask=MASK), OPTIMIZER),
    "perturbed": lambda seed: pats_jax.with_raw_gradient(
        optax.chain(OPTIMIZER, pats_jax.perturbed(0.1, key=seed, mask=MASK))
    ),
    "l2_sp": lambda seed: optax.chain(pats_jax.l2_sp(0.1, 0.2, head_mask=HEAD), OPTIMIZER),
    "scale_by_sage": lambda seed: pats_jax.with_raw_gradient(
        optax.chain(optax.trace(0.9), pats_jax.scale_by_sage(mask=MASK), optax.scale_by_learning_rate(0.05))
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_drawing_method = pytest.mark.parametrize("name", ["dps_mix", "child_tuning_f", "mixout", "perturbed"])
step_on_one_device = jax.jit(pats_jax.make_train_step(loss_fn))


@functools.cache
def optimizer(name, seed=0):
    """Made once, so that its training step compiles once in this file."""
    return METHODS[name](seed)


def make_state(tx):
    return jax.jit(lambda params: pats_jax.TrainState.create(apply_fn=None, params=params, tx=tx, key=0))(make_params())


def train(tx, step=step_on_one_device, put=lambda batch: batch, steps=STEPS, state=None):
    state = make_state(tx) if state is None else state
    for _ in range(steps):
        state, _ = step(state, put(make_batch(int(state.step))))
    return state


def assert_same(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def assert_close(ours, expected, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), ours, expected)


def signature(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# nothing left out, nothing changed


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(pats_jax.dps_dense(1.0, 2), CLIPPED_ADAMW),
        optax.chain(pats_jax.dps_mix(1, 2, key=0), CLIPPED_ADAMW),
        optax.chain(pats_jax.child_tuning_f(1.0, key=0), CLIPPED_ADAMW),
        optax.chain(
            pats_jax.child_tuning_d(pats_jax.fisher_mask(loss_fn, make_params(), [make_batch(0)], 1.0)), CLIPPED_ADAMW
        ),
        pats_jax.sift(CLIPPED_ADAMW, 1.0, mask=None),
        pats_jax.rose(CLIPPED_ADAMW, 1.0),
        optax.chain(pats_jax.mixout(0.0, key=0), CLIPPED_ADAMW),
        optax.chain(pats_jax.l2_sp(0.0, 0, head_mask=HEAD), CLIPPED_ADAMW),
        pats_jax.freeze_unselected(optax.chain(pats_jax.dps_dense(1.0, 2), CLIPPED_ADAMW)),
    ],
    ids=[
        "dps_dense",
        "dps_mix",
        "child_tuning_f",
        "child_tuning_d",
        "sift",
        "rose",
        "mixout",
        "l2_sp",
        "freeze_unselected",
    ],
)
def test_keeping_everything_is_bitwise_plain_fine_tuning(tx):
    assert_same(train(tx).params, train(CLIPPED_ADAMW).params)


@every_method
def test_it_does_something(name):
    trained, plain = train(optimizer(name)).params, train(OPTIMIZER).params
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(plain), strict=True))


# one program, one state


@every_method
def test_it_compiles_once_gives_up_its_buffers_only_and_its_state_keeps_its_form(name):
    tx, params = optimizer(name), make_params()
    state = pats_jax.TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=tx, key=0)
    assert signature(jax.eval_shape(tx.init, params)) == signature(state.opt_state)
    form = jax.tree.map(jax.typeof, state)
    step = jax.jit(pats_jax.make_train_step(loss_fn), donate_argnums=0)
    state = train(tx, step, state=state)
    assert step._cache_size() == 1 and jax.tree.map(jax.typeof, state) == form
    assert_same(state.params, train(tx).params)  # a second run: no key, mask or buffer of the first is gone


@every_method
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name):
    """The state goes through NumPy, typed keys by their data, as a checkpoint stores it."""
    tx = optimizer(name)
    whole, half = train(tx), train(tx, steps=3)

    def reload(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data, kind = pats_jax.random.key_to_data(x)
            return pats_jax.random.key_from_data(np.array(data), kind)
        return jnp.array(np.array(x))

    fresh = make_state(tx)
    assert jax.tree.structure(fresh) == jax.tree.structure(half)
    reloaded = jax.tree.unflatten(jax.tree.structure(fresh), map(reload, jax.tree.leaves(half)))
    assert_same(train(tx, steps=STEPS - 3, state=reloaded).params, whole.params)


# devices


@pytest.mark.devices(8)
@every_method
def test_pmap_is_one_device(name):
    step = pats_jax.make_train_step(loss_fn, axis_name="batch")
    step = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=(None, None), donate_argnums=0)

    def shard(batch):
        return {name: values.reshape(DEVICES, -1, *values.shape[1:]) for name, values in batch.items()}

    tx = optimizer(name)
    assert_close(train(tx, step, shard).params, train(tx).params, 1e-5)


@pytest.mark.devices(8)
@every_method
def test_a_mesh_is_one_device_with_parameters_and_state_sharded(name):
    """Explicit axes; Auto ones are in test_optimizer_table.py."""
    mesh = jax.make_mesh((DEVICES,), ("shard",), axis_types=(AxisType.Explicit,))
    specs = {"layer": {"kernel": (None, "shard"), "bias": ("shard",)}, "head": ("shard",)}
    tx = optimizer(name)

    def place(tree):
        def put(spec, x):
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(put, specs, tree, is_leaf=lambda s: isinstance(s, tuple))

    @jax.jit
    def step(params, state, grads):
        pulled = jax.tree.map(lambda g, p: g + p, grads, pats_jax.forward_params(state, params))
        updates, state = tx.update(pulled, state, params)
        return optax.apply_updates(params, updates), state

    def run(place):
        params, state = place(make_params()), jax.jit(tx.init)(place(make_params()))
        for i in range(4):
            params, state = step(params, state, place(jax.tree.map(functools.partial(waves, i), make_params())))
        return params

    with jax.set_mesh(mesh):
        sharded = run(place)
    assert_close(sharded, run(lambda tree: tree), 1e-5)
    assert sharded["head"].addressable_shards[0].data.shape == (2, 8)


def waves(number, leaf):
    """Something like a gradient."""
    return jnp.cos((number + 2) * leaf)


@every_drawing_method
def test_vmap_over_seeds(name):
    def run(seed):
        tx, params = METHODS[name](seed), make_params()

        def body(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: loss_fn(p, batch, None)[0])(pats_jax.forward_params(state, params))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = jax.tree.map(lambda *x: jnp.stack(x), *[make_batch(i) for i in range(STEPS)])
        return jax.lax.scan(body, (params, tx.init(params)), batches)[0][0]

    together = jax.jit(jax.vmap(run))(jnp.arange(2))
    assert_close(jax.tree.map(lambda x: x[0], together), train(optimizer(name)).params, 1e-5)
    assert (together["head"][0] != together["head"][1]).any()


# any tree


@pytest.mark.parametrize("name", ["dps_dense", "dps_mix", "child_tuning_f", "mixout", "sift", "scale_by_sage"])
def test_multi_steps_around_it_updates_with_the_mean_gradient(name):
    tx, params = optimizer(name), make_params()
    grads = [jax.tree.map(functools.partial(waves, i), params) for i in range(2)]
    multi = optax.MultiSteps(tx, 2).gradient_transformation()
    state, once = jax.jit(multi.init)(params), jax.jit(tx.init)(params)
    accumulate, update = jax.jit(multi.update), jax.jit(tx.update)
    for _ in range(3):  # more than a stage
        for g in grads:
            updates, state = accumulate(g, state, params)
        expected, once = update(jax.tree.map(lambda a, b: (a + b) / 2, *grads), once, params)
    assert_close(updates, expected, 1e-6)


LEAVES = {
    "scalar": jnp.float32(2.0),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    "half": jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(4, 3),
    "cube": jnp.ones((2, 3, 4)),
}
ANY_TREE = {
    "dps_dense": optax.chain(pats_jax.dps_dense(0.5, 1), optax.sgd(0.1)),
    "dps_mix": optax.chain(pats_jax.dps_mix(0.5, 1, key=0), optax.sgd(0.1)),
    "child_tuning_f": optax.chain(pats_jax.child_tuning_f(0.5, key=0), optax.sgd(0.1)),
    "child_tuning_d": optax.chain(pats_jax.child_tuning_d(jax.tree.map(lambda p: p > 0, LEAVES)), optax.sgd(0.1)),
    "sift": pats_jax.sift(optax.sgd(0.1), 0.5, mask=None),
    "mixout": optax.chain(pats_jax.mixout(0.5, key=0), optax.sgd(0.1)),
    "l2_sp": optax.chain(
        pats_jax.l2_sp(0.1, 0.1, head_mask=lambda params: jax.tree.map(jnp.ndim, params)), optax.sgd(1)
    ),
    "scale_by_sage": pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.scale_by_sage())),
    "freeze_unselected": pats_jax.freeze_unselected(optax.chain(pats_jax.dps_mix(0.5, 1, key=0), optax.sgd(0.1))),
}


@pytest.mark.parametrize("tx", ANY_TREE.values(), ids=ANY_TREE)
def test_scalar_empty_none_and_bfloat16_leaves(tx):
    @jax.jit
    def step(params, state):
        forward = pats_jax.forward_params(state, params)
        updates, state = tx.update(forward, state, params)
        return forward, updates, optax.apply_updates(params, updates), state

    params, state = LEAVES, jax.jit(tx.init)(LEAVES)
    for _ in range(3):
        forward, updates, params, state = step(params, state)
        for tree in (forward, updates, params):
            assert signature(tree) == signature(LEAVES)
            assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("tx", ANY_TREE.values(), ids=ANY_TREE)
def test_a_tree_without_leaves(tx):
    nothing = dict.fromkeys(LEAVES)
    updates, _ = jax.jit(tx.update)(nothing, tx.init(nothing), nothing)
    assert updates == nothing


IN_OPTAX = {
    "dps_dense": lambda mask: pats_jax.dps_dense(0.5, 1, mask=mask),
    "dps_mix": lambda mask: pats_jax.dps_mix(0.5, 1, key=0, mask=mask),
    "child_tuning_f": lambda mask: pats_jax.child_tuning_f(0.5, key=0, mask=mask),
    "mixout": lambda mask: pats_jax.mixout(0.5, key=0, mask=mask),
    "sift": lambda mask: pats_jax.sift(optax.identity(), 0.5, mask=mask),
    "scale_by_sage": lambda mask: pats_jax.scale_by_sage(mask=mask),
}


@pytest.mark.parametrize("make", IN_OPTAX.values(), ids=IN_OPTAX)
def test_masked_and_partition_are_as_its_own_mask(make):
    """A mask of its own as a tree, a prefix or a function, and Optax's two ways to cut leaves out."""
    whole, prefix = {"layer": {"kernel": True, "bias": True}, "head": False}, {"layer": True, "head": False}
    ways = [
        make(whole),
        make(prefix),
        make(lambda params: prefix),
        optax.masked(make(None), whole),
        optax.masked(make(None), prefix),
        optax.partition({"some": make(None), "rest": optax.identity()}, {"layer": "some", "head": "rest"}),
    ]

    def run(tx):
        tx, params = pats_jax.with_raw_gradient(tx), make_params()
        state = tx.init(params)
        for i in range(3):
            forward = pats_jax.forward_params(state, params)
            updates, state = tx.update(jax.tree.map(functools.partial(waves, i), forward), state, params)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return params, forward

    (first, forward), *others = [jax.jit(run, static_argnums=0)(tx) for tx in ways]
    for other, _ in others:
        assert_close(other, first, 1e-6)
    alone = {"head": make_params()["head"]}
    for i in range(3):
        before, alone = alone, {"head": alone["head"] - 0.1 * waves(i, alone["head"])}
    assert_close({"head": first["head"]}, alone, 1e-6)
    assert_close({"head": forward["head"]}, before, 1e-6)
