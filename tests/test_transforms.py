"""PATS against an independent float64 computation in NumPy, and inside every wrapper that Optax has for it."""

import functools
import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import transforms
from pats_jax.transforms import PatsNoiseState

PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(2).normal(size=(8,)), jnp.float32),
}


def gradients(seed, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def run(tx, params=PARAMS, steps=5):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# the rule


def test_sensitivity_follows_the_rule_over_50_steps():
    tx = pats_jax.pats(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)), 1e-2, key=0, decay=0.8)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    expected = {name: np.zeros(p.shape) for name, p in PARAMS.items()}
    for step in range(50):
        grads = gradients(step)
        for name in expected:
            saliency = np.abs(np.float64(params[name]) * np.float64(grads[name]))
            expected[name] = 0.8 * expected[name] + 0.2 * saliency
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    (noise_state,) = [s for s in state if isinstance(s, PatsNoiseState)]
    corrected = pats_jax.sensitivity(state)
    for name in expected:
        np.testing.assert_allclose(noise_state.sensitivity[name], expected[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(corrected[name], expected[name] / (1 - 0.8**50), rtol=2e-6, atol=1e-6)


def energy(w):
    return np.sqrt(np.mean(w**2))


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_controls_have_the_energy_of_linear(axis):
    rng = np.random.default_rng(0)
    params = jnp.float32(rng.normal(size=(3, 40, 50)))
    grads = jnp.float32(rng.standard_t(2, size=params.shape) * np.array([1.0, 100.0, 0.01])[:, None, None])

    def noise_norm(response):
        tx = pats_jax.with_raw_gradient(pats_jax.pats_noise(0.1, key=0, response=response, layer_axis=axis))
        _, state = tx.update(grads, tx.init(params), params)
        return float(pats_jax.transforms.noise_statistics(state, 0.1, response, layer_axis=axis)["noise_norm"])

    of_linear = noise_norm("linear")
    assert noise_norm("constant") == pytest.approx(of_linear, rel=1e-5)
    assert noise_norm("reversed") == pytest.approx(of_linear, rel=1e-5)


def test_the_controls_without_any_sensitivity():
    for response in ("constant", "reversed"):
        tx = pats_jax.pats(optax.sgd(0.1), 0.1, key=0, response=response)
        nothing = jnp.zeros_like(PARAMS["w"])
        updates, _ = tx.update({"w": nothing}, tx.init({"w": PARAMS["w"]}), {"w": PARAMS["w"]})
        assert np.isfinite(updates["w"]).all() and (updates["w"] != 0).all()


RESPONSES = ("linear", "reciprocal", "exponential", "square", "constant", "reversed")


@pytest.mark.parametrize(
    "response, distribution",
    [
        *((response, "uniform") for response in RESPONSES),
        ("linear", "normal"),
        *(pytest.param(response, "normal", marks=pytest.mark.slow) for response in RESPONSES[1:]),
    ],
)
def test_noise_has_the_standard_deviation_of_the_formula(response, distribution):
    formulas = {
        "linear": lambda r: np.maximum(0, 1 - r),
        "reciprocal": lambda r: 1 / (1 + r),
        "exponential": lambda r: np.exp(-r),
        "square": lambda r: np.maximum(0, 1 - r) ** 2,
        "constant": lambda r: np.full(r.shape, energy(np.maximum(0, 1 - r))),
        "reversed": lambda r: np.minimum(1, r) * energy(np.maximum(0, 1 - r)) / energy(np.minimum(1, r)),
    }
    params = {"w": PARAMS["w"].at[0, 0].set(0.0)}
    grads = gradients(7, params)
    argument = (lambda r: jnp.maximum(0, 1 - r) ** 2) if response == "square" else response

    def noise(seed):
        tx = pats_jax.pats(optax.sgd(0.0), 0.5, key=seed, response=argument, distribution=distribution)
        return tx.update(grads, tx.init(params), params)[0]["w"]

    draws = np.asarray(jax.jit(jax.vmap(noise))(jnp.arange(20_000)), np.float64)
    saliency = np.abs(np.float64(params["w"]) * np.float64(grads["w"]))
    expected = 0.5 * np.std(np.float64(params["w"])) * formulas[response](saliency / saliency.mean())
    big = expected > 1e-3
    np.testing.assert_allclose(draws.std(0)[big], expected[big], rtol=0.025)
    assert np.sqrt((draws.var(0)[big] / expected[big] ** 2).mean()) == pytest.approx(1, abs=0.002)
    assert np.abs(draws.mean(0)[big] / expected[big]).max() < 5 / np.sqrt(len(draws))
    if response == "linear":
        assert (draws[:, saliency >= saliency.mean()] == 0).all()
    bound = np.sqrt(3) * expected * (1 + 1e-5) + 1e-9
    assert (np.abs(draws) <= bound).all() == (distribution == "uniform")


def test_zero_scale_is_bitwise_the_inner_optimizer():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    plain, _ = run(inner)
    noisy, _ = run(pats_jax.pats(inner, 0.0, key=0))
    jax.tree.map(np.testing.assert_array_equal, plain, noisy)


def test_pats_is_with_raw_gradient_around_the_chain():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    short, _ = run(pats_jax.pats(inner, 1e-2, key=3))
    long, _ = run(pats_jax.with_raw_gradient(optax.chain(inner, pats_jax.pats_noise(1e-2, key=3))))
    jax.tree.map(np.testing.assert_array_equal, short, long)


def test_noise_scale_schedule_is_of_the_updates_made_so_far():
    tx = pats_jax.pats(optax.sgd(0.0), lambda count: jnp.where(count == 2, 1.0, 0.0), key=0)
    state, moved = tx.init(PARAMS), []
    for step in range(4):
        updates, state = tx.update(gradients(step), state, PARAMS)
        moved.append(bool(jnp.any(updates["w"] != 0)))
    assert moved == [False, False, True, False]


def test_draws_differ_between_leaves_steps_and_seeds_and_do_not_depend_on_the_neighbours():
    def draws(seed, params, steps=1):
        tx = pats_jax.pats(optax.sgd(0.0), 1.0, key=seed)
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return np.asarray(updates["w"])

    same = {"w": PARAMS["w"], "v": PARAMS["w"]}
    tx = pats_jax.pats(optax.sgd(0.0), 1.0, key=0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, same), tx.init(same), same)
    others = [updates["v"], draws(0, PARAMS, steps=2), draws(1, PARAMS)]
    for other in others:
        correlation = np.corrcoef(np.ravel(updates["w"]), np.ravel(other))[0, 1]
        assert abs(correlation) < 4 / np.sqrt(updates["w"].size)
    np.testing.assert_array_equal(updates["w"], draws(0, PARAMS))


def test_where_the_gradient_is_not_finite_sensitivity_stays():
    tx = pats_jax.pats_noise(1.0, key=0)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, before = tx.update(zeros, tx.init(PARAMS), PARAMS, grad=gradients(0))
    bad = gradients(1) | {"w": gradients(1)["w"].at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)}
    updates, after = tx.update(zeros, before, PARAMS, grad=bad)
    kept = np.asarray(after.sensitivity["w"] == before.sensitivity["w"])
    assert kept[0, :2].all() and kept.sum() == 2
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


# beside other methods


def test_methods_given_the_same_seed_draw_apart():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=4096), jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    noise = pats_jax.pats_noise(1.0, key=0)
    thin = pats_jax.child_tuning_f(0.5, key=0)
    draws = [
        noise.update(zeros, noise.init(params), params, grad=zeros)[0]["w"],
        pats_jax.noisy_tune(params, key=0)["w"] - params["w"],
        thin.update(params, thin.init(params))[0]["w"] != 0,
        pats_jax.mixout(0.5, key=0).init(params).forward.kept["w"],
        pats_jax.dps_mix(0.5, 2, key=0).init(params).rows["w"],
    ]
    assert np.abs(np.corrcoef(np.float64(draws)) - np.eye(5)).max() < 4 / np.sqrt(4096)


# trees


def test_scalar_empty_none_and_bfloat16_leaves():
    params = {
        "scalar": jnp.float32(2.0),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "half": jnp.ones((4, 4), jnp.bfloat16).at[0].set(0),
    }
    with pytest.warns(UserWarning, match="bfloat16 parameters: noise below half a unit"):
        tx = pats_jax.pats(optax.sgd(0.1), 0.5, key=0)
        state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    assert float(updates["scalar"]) == pytest.approx(-0.1)  # a single number has no spread: no noise
    assert updates["none"] is None and updates["empty"].shape == (0, 3)
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(updates))


def test_masked_leaves_take_no_noise_and_hold_no_state():
    for mask in ({"w": True, "v": False, "b": False}, lambda params: {k: k == "w" for k in params}):
        tx = pats_jax.pats(optax.sgd(0.0), 1.0, key=0, mask=mask)
        updates, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
        assert updates["w"].any() and not updates["v"].any() and not updates["b"].any()
        assert pats_jax.sensitivity(state)["v"] is None and pats_jax.sensitivity(state)["w"].shape == (16, 8)
        float_state = [x for x in jax.tree.leaves(state) if x.ndim == 2]
        assert [x.shape for x in float_state] == [(16, 8)]


def test_a_mask_may_be_a_prefix():
    params = {"encoder": {"a": PARAMS["w"], "b": PARAMS["v"]}, "head": PARAMS["b"]}
    tx = pats_jax.pats(optax.sgd(0.0), 1.0, key=0, mask={"encoder": True, "head": False})
    updates, state = tx.update(gradients(0, params), tx.init(params), params)
    assert updates["encoder"]["a"].any() and updates["encoder"]["b"].any() and not updates["head"].any()
    assert pats_jax.sensitivity(state)["head"] is None


def test_sensitivity_may_be_stored_in_bfloat16():
    low = pats_jax.pats(optax.sgd(0.1), 0.0, key=0, sensitivity_dtype=jnp.bfloat16)
    high = pats_jax.pats(optax.sgd(0.1), 0.0, key=0)
    (_, low_state), (_, high_state) = run(low), run(high)
    stored = {x.dtype for x in jax.tree.leaves(low_state[-1].sensitivity)}
    assert stored == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.03, atol=1e-3),
        pats_jax.sensitivity(low_state),
        pats_jax.sensitivity(high_state),
    )


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_noise_is_that_of_the_sensitivity_as_stored(jit):
    def noise_of(response):
        tx = pats_jax.pats(optax.sgd(0.0), 0.5, key=0, response=response, sensitivity_dtype=jnp.bfloat16)
        state = tx.init(PARAMS)
        for seed in range(3):
            updates, state = jit(tx.update)(gradients(seed), state, PARAMS)
        return updates, state[-1].sensitivity

    full, _ = noise_of(jnp.ones_like)
    noise, stored = noise_of("linear")
    for name, s in stored.items():
        s = np.asarray(s, np.float64)
        expected = np.maximum(0, 1 - s / s.mean()) * np.asarray(full[name], np.float64)
        np.testing.assert_allclose(noise[name], expected, rtol=1e-4, atol=1e-6)


# inside and around Optax's wrappers


def test_in_masked_and_partition_it_is_as_with_a_mask():
    alone = pats_jax.pats(optax.sgd(0.1), 0.5, key=0, mask={"w": True, "v": False, "b": False})
    noise = pats_jax.pats_noise(0.5, key=0)
    in_masked = pats_jax.with_raw_gradient(
        optax.chain(optax.sgd(0.1), optax.masked(noise, {"w": True, "v": False, "b": False}))
    )
    labels = {"w": "noisy", "v": "plain", "b": "plain"}
    around = {"noisy": optax.chain(optax.sgd(0.1), noise), "plain": optax.sgd(0.1)}
    in_partition = pats_jax.with_raw_gradient(optax.partition(around, labels))
    partition_of_pats = optax.partition(
        {"noisy": pats_jax.pats(optax.sgd(0.1), 0.5, key=0), "plain": optax.sgd(0.1)}, labels
    )
    expected, state = run(alone)
    assert not np.allclose(expected["w"], run(optax.sgd(0.1))[0]["w"])
    for tx in (in_masked, in_partition, partition_of_pats):
        params, other_state = run(tx)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        found = pats_jax.sensitivity(other_state)
        assert found["v"] is None
        np.testing.assert_array_equal(found["w"], pats_jax.sensitivity(state)["w"])


def test_two_groups_of_a_partition_are_put_together_and_draw_apart():
    groups = {name: pats_jax.pats(optax.sgd(0.0), 1.0, key=0) for name in "ab"}
    params = {"w": PARAMS["w"], "v": PARAMS["w"]}
    tx = optax.partition(groups, {"w": "a", "v": "b"})
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert set(pats_jax.sensitivity(state)) == {"w", "v"} and pats_jax.sensitivity(state)["v"].shape == (16, 8)
    assert abs(np.corrcoef(np.ravel(updates["w"]), np.ravel(updates["v"]))[0, 1]) < 0.4


@pytest.mark.parametrize(
    "arrange",
    [
        lambda: optax.MultiSteps(pats_jax.pats(optax.adam(1e-2), 0.1, key=0), 4).gradient_transformation(),
        lambda: pats_jax.pats(optax.MultiSteps(optax.adam(1e-2), 4), 0.1, key=0),
        lambda: pats_jax.with_raw_gradient(
            optax.MultiSteps(optax.chain(optax.adam(1e-2), pats_jax.pats_noise(0.1, key=0)), 4)
        ),
    ],
    ids=["inside", "pats around", "with_raw_gradient around"],
)
def test_multi_steps_measures_the_accumulated_gradient(arrange):
    once = pats_jax.pats(optax.adam(1e-2), 0.1, key=0)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *[gradients(i) for i in range(4)])
    updates, state = once.update(mean, once.init(PARAMS), PARAMS)
    expected = optax.apply_updates(PARAMS, updates)
    params, accumulated = run(arrange(), steps=4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
        pats_jax.sensitivity(accumulated),
        pats_jax.sensitivity(state),
    )


def test_accumulation_hidden_inside_is_refused():
    hidden = optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation()
    with pytest.raises(ValueError, match="put optax.MultiSteps around it"):
        pats_jax.pats(hidden, 0.1, key=0).init(PARAMS)


def test_inject_hyperparams_inside_and_around():
    plain, _ = run(pats_jax.pats(optax.adam(1e-2), 0.1, key=5))
    inside = pats_jax.pats(optax.inject_hyperparams(optax.adam)(1e-2), 0.1, key=5)
    around = optax.inject_hyperparams(pats_jax.pats_noise)(noise_scale=0.1, key=5)
    scheduled = optax.inject_hyperparams(pats_jax.pats_noise)(noise_scale=lambda count: 0.1, key=5)
    for tx in (
        inside,
        pats_jax.with_raw_gradient(optax.chain(optax.adam(1e-2), around)),
        pats_jax.with_raw_gradient(optax.chain(optax.adam(1e-2), scheduled)),
    ):
        params, state = run(tx)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, plain)
        assert pats_jax.sensitivity(state)["w"].any()


@pytest.mark.parametrize(
    ("tx", "step_counts"),
    [
        (optax.apply_if_finite(pats_jax.pats(optax.adam(1e-2), 0.1, key=0), 3), False),
        (pats_jax.pats(optax.apply_if_finite(optax.adam(1e-2), 3), 0.1, key=0), True),
    ],
    ids=["inside", "around"],
)
def test_apply_if_finite_inside_and_around(tx, step_counts):
    _, state = run(tx, steps=2)
    before = pats_jax.sensitivity(state)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    skipped, state = tx.update(bad, state, PARAMS)
    # S stays; inside apply_if_finite the step does not count, around it the bias is corrected for one step more
    correction = (1 - 0.9**2) / (1 - 0.9**3) if step_counts else 1.0
    kept = jax.tree.map(lambda s: s * correction, before)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), pats_jax.sensitivity(state), kept)
    updates, state = tx.update(gradients(3), state, PARAMS)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves((skipped, updates, pats_jax.sensitivity(state))))
    assert updates["w"].any()


# JAX's transformations


def test_vmap_over_seeds_and_scan():
    def train(seed):
        tx = pats_jax.pats(optax.sgd(0.1), 0.1, key=seed)

        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        grads = jax.tree.map(lambda *g: jnp.stack(g), *[gradients(i) for i in range(3)])
        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), grads)[0][0]

    together = jax.jit(jax.vmap(train))(jnp.arange(3))
    for seed in range(3):
        alone, _ = run(pats_jax.pats(optax.sgd(0.1), 0.1, key=seed), steps=3)
        mine = jax.tree.map(operator.itemgetter(seed), together)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mine, alone)


@pytest.mark.devices(8)
def test_pmap_gives_every_device_the_same_noise():
    tx = pats_jax.pats(optax.sgd(0.1), 0.1, key=0)
    devices = jax.local_device_count()
    assert devices == 8

    def step(params, state, grads):
        updates, state = tx.update(jax.lax.pmean(grads, "batch"), state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda *g: jnp.stack(g), *[gradients(i) for i in range(devices)])
    stepped, state = jax.pmap(step, "batch", in_axes=(None, None, 0), out_axes=0)(PARAMS, tx.init(PARAMS), grads)
    for leaf in jax.tree.leaves((stepped, pats_jax.sensitivity(state))):
        assert all((np.asarray(leaf[i]) == np.asarray(leaf[0])).all() for i in range(devices))
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    updates, _ = tx.update(mean, tx.init(PARAMS), PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-6), stepped, optax.apply_updates(PARAMS, updates)
    )


@pytest.mark.devices(8)
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_sharded_mesh_gives_the_numbers_of_one_device(axis_type):
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(axis_type,))
    tx = pats_jax.pats(optax.adam(1e-2), 0.1, key=0)
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("shard"))))
    expected, _ = run(tx)
    with jax.set_mesh(mesh):
        params = place(PARAMS)
        state = jax.jit(tx.init)(params)
        for step in range(5):
            updates, state = jax.jit(tx.update)(place(gradients(step)), state, params)
            params = optax.apply_updates(params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected)
    assert params["w"].addressable_shards[0].data.shape == (2, 8)


def test_state_can_be_donated_and_is_stable_without_recompilation():
    tx = pats_jax.pats(optax.adamw(1e-2), 0.1, key=jax.random.key(4))
    params = jax.tree.map(jnp.copy, PARAMS)
    shapes = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        params, state = step(params, state, gradients(i))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert jax.random.key_impl(state[-1].key) == jax.random.key_impl(jax.random.key(0))  # a typed key keeps its kind


def test_no_noise_buffer_outlives_the_fused_update():
    params = {f"layer{i}": jnp.ones((256, 1024)) for i in range(8)}
    size = sum(p.nbytes for p in jax.tree.leaves(params))

    def temporaries(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adamw = optax.adamw(1e-2)
    assert temporaries(pats_jax.pats(adamw, 0.1, key=0)) - temporaries(adamw) < 0.01 * size


# wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_scale": -1.0}, "noise_scale=-1.0 must be a finite number >= 0"),
        ({"noise_scale": float("nan")}, "noise_scale=nan must be"),
        ({"decay": 1.0}, r"decay=1.0 must be in \[0, 1\)"),
        (
            {"response": "cubic"},
            "response='cubic' is not one of 'linear', 'reciprocal', 'exponential', 'constant', 'reversed'",
        ),
        ({"distribution": "cauchy"}, "distribution='cauchy' is not one of"),
        ({"key": jax.random.PRNGKey(0)}, "key"),
    ],
)
def test_bad_arguments_are_refused_when_the_transform_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        pats_jax.pats_noise(**{"noise_scale": 0.1, "key": 0, **arguments})


def test_wrong_calls_say_what_to_do():
    noise = pats_jax.pats_noise(0.1, key=0)
    with pytest.raises(ValueError, match="with_raw_gradient"):
        noise.update(PARAMS, noise.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        noise.update(PARAMS, noise.init(PARAMS), grad=PARAMS)
    with pytest.raises(ValueError, match="holds no PatsNoiseState"):
        pats_jax.sensitivity(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(TypeError, match="key"):
        pats_jax.pats(optax.sgd(0.1), 0.1)


def test_before_the_first_step_sensitivity_is_zero():
    found = pats_jax.sensitivity(pats_jax.pats(optax.sgd(0.1), 0.1, key=0).init(PARAMS))
    assert not any(leaf.any() for leaf in jax.tree.leaves(found)) and set(found) == set(PARAMS)


def test_a_gradient_passed_by_hand_is_overwritten():
    tx = pats_jax.pats(optax.sgd(0.1), 0.1, key=0)
    expected, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS, grad=gradients(1))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


# what the log says of it


@pytest.mark.parametrize("response", ["linear", "exponential"])
def test_noise_statistics_are_those_of_the_noise_that_was_added(response):
    def scale(count):
        return 0.5 / (1 + count)

    mask = {"w": True, "v": True, "b": False}
    tx = pats_jax.pats(optax.identity(), noise_scale=scale, key=0, response=response, mask=mask)
    _, state = run(tx, steps=3)
    squares, noisy = [], None
    for seed in range(400):  # the noise of a fourth step by 400 keys
        chained = (state[0], state[1]._replace(stored_key=pats_jax.random.StoredKey.of(pats_jax.random.fast_key(seed))))
        updates, new_state = jax.jit(tx.update)(gradients(3), chained, PARAMS)
        noise = jax.tree.map(lambda u, g: np.asarray(u - g), updates, gradients(3))
        squares.append(sum(np.sum(x**2) for x in noise.values()))
        noisy = sum(np.sum(np.abs(x) > 1e-7) for x in noise.values())
    found = transforms.noise_statistics(new_state, scale, response)
    assert float(found["noise_norm"]) == pytest.approx(np.sqrt(np.mean(squares)), rel=0.02)
    assert abs(float(found["noisy_parameters"]) - noisy) <= 2 and (noisy < 256) == (response == "linear")


def test_noise_statistics_before_the_first_step_are_zero():
    state = pats_jax.pats(optax.sgd(0.1), 0.5, key=0).init(PARAMS)
    assert {name: float(x) for name, x in transforms.noise_statistics(state, 0.5).items()} == {
        "noise_norm": 0.0,
        "noisy_parameters": 0.0,
    }


def test_states_that_hold_no_arrays_are_an_error_that_says_what_to_do():
    from flax import nnx

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pats_jax.pats(optax.sgd(0.1), key=0), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"with Flax NNX pass nnx.as_pure\(optimizer.opt_state\)"):
        pats_jax.sensitivity(optimizer.opt_state)
    assert jax.tree.leaves(pats_jax.sensitivity(nnx.as_pure(optimizer.opt_state)))
