"""AdaLoRA's rank allocation and its regulariser against independent computations in NumPy."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import pats_jax
from pats_jax import trees
from pats_jax.companions.adalora import AdaLoraState
from pats_jax.models import peft, stack_layers, unstack_layers

TOTAL, TINIT, TFINAL, DELTA = 36, 4, 6, 3
SETTINGS = {"tinit": TINIT, "tfinal": TFINAL, "delta_t": DELTA}
RATE = 0.05
LAYERS, RANK, TARGET = ("0", "1"), 4, 2
SIZES = {"query": (5, 6), "dense": (6, 3)}  # of each layer; beside them a head and a matrix of plain LoRA


def tree(draw, stacked=False):
    """A tree like the parameters of adapters, of ``draw(name, shape)``."""
    layers = {
        number: {
            name: {
                "lora_A": {"kernel": draw(f"{number}.{name}.A", (inputs, RANK))},
                "lora_B": {"kernel": draw(f"{number}.{name}.B", (RANK, outputs))},
                "lora_E": {"scale": draw(f"{number}.{name}.E", (RANK,))},
            }
            for name, (inputs, outputs) in SIZES.items()
        }
        for number in LAYERS
    }
    found = {"peft": {"encoder": {"layer": layers}}, "head": {"kernel": draw("head", (3, 2))}, "frozen": None}
    found["plain"] = {"lora_A": {"kernel": draw("plain", (3, 2))}}
    return stack_layers(found) if stacked else found


def drawn(seed, stacked=False, scale=1.0):
    def draw(name, shape):
        rng = np.random.default_rng([seed, *name.encode()])
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return tree(draw, stacked)


def start(stacked=False):
    """A and B at random, E at zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "lora_E" in str(path) else jnp.asarray(x), drawn(0, stacked, 0.5)
    )


def optimizer(**changes):
    allocation = pats_jax.adalora_allocation(TARGET, TOTAL, **SETTINGS | changes)
    return pats_jax.with_raw_gradient(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE), allocation))


@functools.cache
def trained(stacked=False, steps=TOTAL):
    """Parameters and state after every step."""
    tx, params = optimizer(), start(stacked)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for t in range(1, steps + 1):
        updates, state = update(drawn(t, stacked), state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


def allocation_of(state):
    (found,) = trees.find_states(state, AdaLoraState)
    return found


def in_numpy():
    """Yields all parameters after every step, in float64, and the scores of the triplets by layer."""
    theta = {path: np.float64(x) for path, x in flatten_dict(start()).items() if x is not None}
    mine = [path for path in theta if path[0] == "peft"]
    layers = sorted({path[:-2] for path in mine})
    s, u = ({path: np.zeros(theta[path].shape) for path in mine} for _ in range(2))
    chosen, first, last = None, RANK * len(layers), TARGET * len(layers)
    for t in range(1, TOTAL + 1):
        g = {path: np.float64(x) for path, x in flatten_dict(drawn(t)).items() if x is not None}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for path in theta:
            theta[path] = theta[path] - RATE * g[path] / max(1.0, norm)
        if t < TOTAL - TFINAL:
            for path in mine:
                i = np.abs(theta[path] * g[path])
                s[path] = 0.85 * s[path] + 0.15 * i
                u[path] = 0.85 * u[path] + 0.15 * np.abs(i - s[path])
        score = {}
        for layer in layers:
            a, b, e = ((s[key] * u[key]) for key in ((*layer, *leaf) for leaf in LEAVES))
            score[layer] = e + a.mean(axis=0) + b.mean(axis=1)
        if TINIT < t <= TOTAL - TFINAL and (t % DELTA == 0 or t == TOTAL - TFINAL):
            share = 1 - (t - TINIT) / (TOTAL - TFINAL - TINIT)
            budget = int((first - last) * share**3 + last)
            best = sorted((x for own in score.values() for x in own), reverse=True)[:budget]
            chosen = {layer: own >= min(best) for layer, own in score.items()}
            dropped = {layer: ~own for layer, own in chosen.items()}
        else:
            dropped = {layer: ~chosen[layer] if t > TOTAL - TFINAL else np.zeros(RANK, bool) for layer in layers}
        for layer in layers:
            theta[*layer, "lora_E", "scale"][dropped[layer]] = 0.0
        yield {path: x.copy() for path, x in theta.items()}, s, u


LEAVES = (("lora_A", "kernel"), ("lora_B", "kernel"), ("lora_E", "scale"))


def ranks(params):
    return {
        ".".join(path[:-2]): np.count_nonzero(x, axis=-1)
        for path, x in flatten_dict(params).items()
        if "lora_E" in path
    }


def test_the_allocation_is_the_rule_over_36_steps():
    left = []
    for (params, state), (expected, s, u) in zip(trained(), in_numpy(), strict=True):
        found = flatten_dict(params)
        for path, theta in expected.items():
            np.testing.assert_allclose(found[path], theta, rtol=2e-5, atol=2e-6, err_msg=path)
            assert np.array_equal(found[path] == 0, theta == 0), "E is 0 exactly where it is dropped"
        own = allocation_of(state)
        for tree, reference in ((own.sensitivity, s), (own.uncertainty, u)):
            held = {path: x for path, x in flatten_dict(tree).items() if x is not None}
            assert held.keys() == reference.keys()
            for path, values in reference.items():
                np.testing.assert_allclose(held[path], values, rtol=1e-4, atol=1e-7)
        left.append(sum(ranks(params).values()))
    matrices = len(LAYERS) * len(SIZES)
    assert left[:TINIT] == [RANK * matrices] * TINIT
    assert left[TINIT] == RANK * matrices, "an allocation every third step"
    assert sorted(left[5:30:DELTA], reverse=True) == left[5:30:DELTA], "the budget falls"
    assert left[-TFINAL - 1 :] == [TARGET * matrices] * (TFINAL + 1), "and stays"
    assert len(set(ranks(trained()[-1][0]).values())) > 1, "the threshold is one for all matrices"


def test_stacked_layers_are_allocated_as_separate_ones():
    for (separate, state), (stacked, other) in zip(trained(), trained(stacked=True), strict=True):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # the norm is summed otherwise
        jax.tree.map(close, unstack_layers(stacked, 2), separate)
        jax.tree.map(
            np.testing.assert_array_equal, unstack_layers(allocation_of(other).kept, 2), allocation_of(state).kept
        )


def test_lanes_are_allocated_alone():
    """Each lane as by itself, under vmap."""
    tx, params = optimizer(tinit=0, tfinal=1, delta_t=1), start()
    lanes = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    in_lanes = jax.jit(jax.vmap(tx.update))
    state = jax.vmap(tx.init)(lanes)
    alone = [(jax.tree.map(lambda x, n=n: x[n], lanes), tx.init(params)) for n in range(2)]
    update = jax.jit(tx.update)
    for t in range(1, 5):
        grads = jax.tree.map(lambda a, b: jnp.stack([a, b]), drawn(t), drawn(100 + t))
        updates, state = in_lanes(grads, state, lanes)
        lanes = optax.apply_updates(lanes, updates)
        for n, (own, own_state) in enumerate(alone):
            updates, own_state = update(jax.tree.map(lambda x, n=n: x[n], grads), own_state, own)
            alone[n] = optax.apply_updates(own, updates), own_state
    for n, (own, _) in enumerate(alone):
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-6), lanes, own)
        assert 0 < sum(ranks(own).values()) < RANK * len(LAYERS) * len(SIZES)


def test_from_a_saved_state_it_goes_on_bit_for_bit():
    params, state = jax.device_get(trained()[16])
    update = jax.jit(optimizer().update)
    for t in range(18, TOTAL + 1):
        updates, state = update(drawn(t), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, (params, state), trained()[-1])


@pytest.mark.parametrize(
    "total, tinit, tfinal, first, last", [(9, 0, 0, 12, 8), (250, 31, 40, 864, 576), (7, 2, 4, 9, 1)]
)
def test_the_budget_is_that_of_python_s_floats(total, tinit, tfinal, first, last):
    from pats_jax.companions.adalora import _budget

    end = total - tfinal
    found = jax.vmap(lambda t: _budget(t, first, last, tinit, end))(jnp.arange(total + 1))
    for t in range(total + 1):
        share = 1 - (t - tinit) / (end - tinit)
        expected = first if t <= tinit else last if t > end else int((first - last) * share**3 + last)
        assert found[t] == expected, t


def test_equal_scores_at_the_boundary_all_go_and_a_whole_budget_keeps_all():
    params = {"lora_A": jnp.ones((3, 3)), "lora_E": jnp.array([1.0, 1.0, 2.0]), "lora_B": jnp.ones((3, 2))}
    grads = jax.tree.map(lambda x: jnp.zeros_like(x), params) | {"lora_E": jnp.ones(3)}
    for target, expected in ((2, [0, 0, 2]), (3, [1, 1, 2])):
        tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.0), pats_jax.adalora_allocation(target, 1)))
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        np.testing.assert_array_equal(optax.apply_updates(params, updates)["lora_E"], expected)


def test_a_gradient_that_is_not_finite_leaves_the_scores_as_they_are():
    params = {"lora_A": jnp.ones((3, 2)), "lora_E": jnp.ones(2), "lora_B": jnp.ones((2, 3))}
    tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.adalora_allocation(1, 9)))
    update, grads = jax.jit(tx.update), jax.tree.map(lambda x: 2 * x, params)
    _, state = update(grads, tx.init(params), params)
    _, after = update(grads | {"lora_E": jnp.array([np.nan, 2.0])}, state, params)
    for held in ("sensitivity", "uncertainty"):
        old, new = (getattr(allocation_of(x), held)["lora_E"] for x in (state, after))
        assert new[0] == old[0] and new[1] != old[1]


def small():
    """One adapter of rank 3, and something else."""
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (4, 3), "lora_E": (3,), "lora_B": (3, 2), "head": (2,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_inside_other_optimizers():
    """Masked, with accumulated gradients, with bfloat16."""
    params, allocation = small(), pats_jax.adalora_allocation(1, 1)
    plain = pats_jax.with_raw_gradient(optax.chain(optax.sgd(RATE), allocation))
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    assert np.count_nonzero(expected["lora_E"] + params["lora_E"]) == 1
    only = {name: name != "head" for name in params}
    masked = pats_jax.with_raw_gradient(optax.chain(optax.sgd(RATE), optax.masked(allocation, only)))
    updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    every = optax.MultiSteps(plain, 2)
    state, update = every.init(params), jax.jit(every.update)
    for factor in (0.5, 1.5):
        updates, state = update(jax.tree.map(lambda g, f=factor: f * g, params), state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    rough = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    updates, _ = jax.jit(plain.update)(rough, plain.init(rough), rough)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert np.count_nonzero(optax.apply_updates(rough, updates)["lora_E"]) == 1


@pytest.mark.devices(8)
def test_sharded_over_eight_devices_as_on_one():
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (16, 8), "lora_E": (8,), "lora_B": (8, 16)}
    params, grads = ({name: np.float32(rng.normal(size=s)) for name, s in shapes.items()} for _ in range(2))
    tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.adalora_allocation(3, 1)))
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("shard"))))
    updates, _ = jax.jit(tx.update)(place(grads), jax.jit(tx.init)(place(params)), place(params))
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
    assert np.count_nonzero(params["lora_E"] + np.asarray(updates["lora_E"])) == 3


def test_noise_before_it_leaves_what_is_dropped_at_zero_and_warns_of_nothing():
    parts = optax.sgd(RATE), pats_jax.pats_noise(0.5, key=0), pats_jax.adalora_allocation(2, 2, tfinal=1)
    tx, params = pats_jax.with_raw_gradient(optax.chain(*parts)), small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        assert np.any(np.abs(updates["lora_A"] + RATE * params["lora_A"]) > 0.01), "there was noise"
        params = optax.apply_updates(params, updates)
        assert np.count_nonzero(params["lora_E"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_r": 0}, "target_r=0 must be at least 1"),
        ({"tinit": -1}, "tinit=-1 must be a number of steps >= 0"),
        ({"tfinal": -1}, "tfinal=-1 must be"),
        ({"delta_t": 0}, "delta_t=0 must be at least 1"),
        ({"beta1": 1.0}, r"beta1=1.0 must be in \(0, 1\)"),
        ({"beta2": 0.0}, r"beta2=0.0 must be in \(0, 1\)"),
        ({"tinit": 4, "tfinal": 5}, "tinit=4 and tfinal=5 leave none of 9 steps for the allocation"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        pats_jax.adalora_allocation(**{"target_r": 2, "total_steps": 9} | arguments)


def test_parameters_that_it_cannot_allocate():
    good = {"lora_A": jnp.ones((3, 2)), "lora_E": jnp.zeros(2), "lora_B": jnp.ones((2, 3))}
    tx = pats_jax.adalora_allocation(1, 9)
    with pytest.raises(ValueError, match="no parameters named lora_A, lora_B and lora_E"):
        tx.init({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="q has lora_E, but no lora_B"):
        tx.init({"q": {name: good[name] for name in ("lora_A", "lora_E")}})
    with pytest.raises(ValueError, match=r"shapes \(3, 2\), \(3, 3\) and \(2,\) are not"):
        tx.init(good | {"lora_B": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="target_r=3 is above the mean rank 2"):
        pats_jax.adalora_allocation(3, 9).init(good)
    with pytest.raises(ValueError, match="adalora_allocation needs the raw gradient: wrap the whole optimizer"):
        tx.update(good, tx.init(good), good)


# the regulariser


@pytest.mark.parametrize("stacked", [False, True])
def test_orthogonality_is_the_mean_distance_from_orthonormal(stacked):
    params = drawn(3, stacked)

    def plain(params, batch, key):
        return jnp.float32(2.0), {"other": jnp.float32(1.0)}

    loss, metrics = pats_jax.with_orthogonality(plain, 0.25)(params, {}, None)
    distances = []
    for path, x in flatten_dict(drawn(3)).items():
        if path[0] == "peft" and "lora_E" not in path:
            vectors = np.float64(x).T if "lora_A" in path else np.float64(x)
            distances.append(np.linalg.norm(vectors @ vectors.T - np.eye(RANK)))
    np.testing.assert_allclose(metrics["orthogonality"], np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(loss, 2 + 0.25 * np.mean(distances), rtol=1e-5)
    assert (metrics["task_loss"], metrics["other"], len(distances)) == (2, 1, 8)


def test_orthonormal_vectors_have_a_gradient_of_zero():
    params = {"lora_A": jnp.eye(3), "lora_E": jnp.ones(3), "lora_B": jnp.eye(3)}
    loss_fn = pats_jax.with_orthogonality(lambda params, batch, key: (jnp.float32(0), {}))
    grads = jax.grad(lambda params: loss_fn(params, {}, None)[0])(params)
    assert all(np.array_equal(g, np.zeros_like(g)) for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="weight=-1 must be at least 0"):
        pats_jax.with_orthogonality(loss_fn, -1)


# the adapter


def test_default_layers_are_pefts():
    shapes = {
        "bert.encoder.layer.0.attention.self.query": True,
        "bert.encoder.layer.0.attention.self.key": False,
        "bert.encoder.layer.0.output.dense": False,
        "bert.pooler.dense": False,
        "roberta.encoder.layer.11.attention.self.key": True,
        "roberta.encoder.layer.11.intermediate.dense": True,
        "encoder.block.0.layer.0.SelfAttention.o": True,
        "decoder.block.0.layer.2.DenseReluDense.wi": True,
        "decoder.block.0.layer.2.DenseReluDense.wi_0": False,
        "decoder.block.0.layer.1.EncDecAttention.k": True,
        "model.decoder.layers.0.encoder_attn.out_proj": True,
        "model.encoder.layers.0.fc2": True,
    }
    from pats_jax.models.patterns import compile_pattern

    matches = compile_pattern(peft.AdaLoraConfig().layers, "layers")
    assert {name: bool(matches(name)) for name in shapes} == shapes
    assert not peft.AdaLoraConfig().differs_by_layer


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"init_r": 4}, "adalora_target_r 8: must be at most adalora_init_r 4"),
        ({"total_step": 9, "tinit": 4, "tfinal": 5}, "adalora_tinit 4, adalora_tfinal 5: leave none of 9 steps"),
        ({"beta1": 1.0}, r"adalora_beta1 1.0: must be in \(0, 1\)"),
        ({"delta_t": 0}, "adalora_delta_t 0: must be at least 1"),
        ({"orth_reg_weight": -0.5}, "adalora_orth_reg_weight -0.5: must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(pats_jax.InputError, match=message):
        peft.AdaLoraConfig(**arguments)
    with pytest.raises(pats_jax.InputError, match="leave none of 2 steps"):
        peft.AdaLoraConfig(tinit=2).last(2)
