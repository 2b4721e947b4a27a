"""Mixout and L2-SP against the rules in NumPy, and the forward pass that training steps use."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax

RATE, STEPS = 0.125, 9


def normal(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


PARAMS = normal(0, w=(6, 3), b=(3,))
HEAD = {"w": False, "b": True}


def batch(seed):
    return {name: np.float32(x) for name, x in normal(100 + seed, x=(10, 6), y=(10, 3)).items()}


def loss_fn(params, batch, key):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(jnp.sum(error**2, 1)) / 2, {}


def gradient(params, batch):
    """The gradient of loss_fn by hand, float64."""
    error = np.float64(batch["x"]) @ params["w"] + params["b"] - batch["y"]
    return {"w": batch["x"].T @ error / len(error), "b": error.mean(0)}


def train(tx, steps=STEPS, **step_args):
    """The states before every step and after the last."""
    state = pats_jax.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, key=0)
    step = jax.jit(pats_jax.make_train_step(loss_fn, **step_args))
    states = [state]
    for i in range(steps):
        states.append(step(states[-1], batch(i))[0])
    assert step._cache_size() == 1
    return states


def assert_close(ours, expected, atol):
    for name, theirs in expected.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=atol, err_msg=name)


# Mixout


@pytest.mark.parametrize("axis", [0, -1])
def test_mixout_is_the_rule_in_the_training_step(axis):
    p = 0.4
    tx = optax.chain(pats_jax.mixout(p, key=0, mask={"w": True, "b": False}, input_axis=axis), optax.sgd(RATE))
    states = train(tx)
    pretrained = np.float64(PARAMS["w"])
    params = {name: np.float64(leaf) for name, leaf in PARAMS.items()}
    for i, state in enumerate(states[:-1]):
        m = np.asarray(state.opt_state[0].forward.kept["w"])
        assert m.shape == ((6, 1) if axis == 0 else (1, 3)) and m.dtype == bool
        w = params["w"]
        effective = params | {"w": ((1 - m) * pretrained + m * w - p * pretrained) / (1 - p)}
        assert_close(pats_jax.forward_params(state.opt_state, state.params), effective, 1e-6)
        g = gradient(effective, batch(i))
        params = {"w": w - RATE * g["w"] * m, "b": params["b"] - RATE * g["b"]}
        assert_close(states[i + 1].params, params, 1e-6)
    kept = np.array([state.opt_state[0].forward.kept["w"] for state in states])
    assert kept.any(0).all() and not kept.all(0).any()


def test_dps_mix_is_differentiated_at_its_forward_params():
    p, us = 0.3, 2
    tx = optax.chain(pats_jax.dps_mix(1 - p, us, key=0, mask={"w": True, "b": False}), optax.sgd(RATE))
    params = {name: np.float64(leaf) for name, leaf in PARAMS.items()}
    pretrained, states = params["w"], train(tx, 6 * us)
    gam = fam = 0.0
    for i, state in enumerate(states[:-1]):
        w = params["w"]
        if (i // us) % 2 == 0:
            target = pretrained
            m = np.float64(state.opt_state[0].rows["w"]) * np.ones(w.shape)
            gam, fam = (0, 0) if i % us == 0 else (gam, fam)
        elif i % us == 0:
            target, score = w, gam / np.maximum(fam, 1)
            m = score >= np.sort(score, axis=None)[::-1][math.ceil(score.size * (1 - p)) - 1]
        effective = params | {"w": ((1 - m) * target + m * w - p * target) / (1 - p)}
        assert_close(pats_jax.forward_params(state.opt_state, state.params), effective, 1e-6)
        g = gradient(effective, batch(i))
        if (i // us) % 2 == 0:
            gam, fam = gam + g["w"] ** 2 * m, fam + m
        params = {"w": w - RATE * g["w"] * m, "b": params["b"] - RATE * g["b"]}
        assert_close(states[i + 1].params, params, 1e-6)


def test_the_mean_of_the_forward_params_is_the_params():
    now = normal(1, w=(6, 3), b=(3,))

    def forward(seed):
        return pats_jax.forward_params(pats_jax.mixout(0.6, key=seed).init(PARAMS), now)

    draws = jax.jit(jax.vmap(forward))(jnp.arange(20_000))
    for name, mean in jax.tree.map(lambda x: x.mean(0), draws).items():
        spread = np.abs(now[name] - PARAMS[name]) * math.sqrt(0.6 / 0.4)
        assert (np.abs(mean - now[name]) < 5 * spread / math.sqrt(20_000) + 1e-5).all()


def test_every_entry_of_a_vector_is_drawn_and_all_outputs_of_a_feature_together():
    tx = pats_jax.mixout(0.5, key=0)
    params = {"kernel": jnp.zeros((512, 4, 2)), "bias": jnp.zeros(512), "scalar": jnp.float32(0)}
    state = tx.init(params)
    shapes = jax.tree.map(jnp.shape, state.forward.kept)
    assert shapes == {"kernel": (512, 1, 1), "bias": (512,), "scalar": ()}
    grads, after = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    dropped = np.asarray(grads["kernel"] == 0)
    assert (dropped == dropped[:, :1, :1]).all()
    draws = [np.ravel(state.forward.kept[name]) for name in ("kernel", "bias")] + [after.forward.kept["bias"]]
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 4 / math.sqrt(512)


def test_gradient_accumulation_keeps_the_mask_of_its_step():
    """Micro-batches of one step, and the steps of MultiSteps, all use the mask that the update then uses."""
    tx = optax.chain(pats_jax.mixout(0.5, key=0), optax.sgd(RATE))
    whole, parts = train(tx, 4), train(tx, 4, accumulation_steps=5)
    assert_close(parts[-1].params, whole[-1].params, 1e-6)
    in_steps = train(optax.MultiSteps(tx, 2).gradient_transformation(), 4)
    masks = [state.opt_state.inner_opt_state[0].forward.kept["w"] for state in in_steps]
    assert (masks[0] == masks[1]).all() and (masks[2] == masks[3]).all() and (masks[0] != masks[2]).any()


def test_forward_params_reaches_into_wrappers_and_leaves_the_rest_alone():
    mask, moved = {"w": True, "b": False}, jax.tree.map(lambda p: p + 1, PARAMS)
    method = pats_jax.mixout(0.5, key=0)
    expected = pats_jax.forward_params(pats_jax.mixout(0.5, key=0, mask=mask).init(PARAMS), moved)
    assert (expected["w"] != moved["w"]).all() and (expected["b"] == moved["b"]).all()
    wrapped = [
        optax.masked(method, mask),
        optax.partition({True: method, False: optax.identity()}, mask),
        optax.MultiSteps(optax.chain(optax.masked(method, mask), optax.adam(0.1)), 2).gradient_transformation(),
        pats_jax.pats(optax.chain(optax.masked(method, mask), optax.adam(0.1)), key=0),
        optax.apply_if_finite(optax.masked(method, mask), 3),
    ]
    for tx in wrapped:
        found = pats_jax.forward_params(tx.init(PARAMS), moved)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    same = pats_jax.forward_params(optax.adam(0.1).init(PARAMS), moved)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(same), jax.tree.leaves(moved)))
    nested = {"encoder": PARAMS, "head": None}
    found = pats_jax.forward_params(optax.masked(method, {"encoder": False, "head": True}).init(nested), nested)
    jax.tree.map(np.testing.assert_array_equal, found, nested)


def test_mixout_with_injected_hyperparameters_uses_one_fraction_for_forward_pass_and_update():
    tx = optax.inject_hyperparams(pats_jax.mixout)(drop_fraction=0.5, key=0)
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    expected = pats_jax.forward_params(pats_jax.mixout(0.5, key=0).init(PARAMS), zeros)
    jax.tree.map(np.testing.assert_array_equal, pats_jax.forward_params(state, zeros), expected)
    state.hyperparams["drop_fraction"] = jnp.float32(0.0)
    _, state = tx.update(zeros, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, pats_jax.forward_params(state, zeros), zeros)


# L2-SP


def test_l2_sp_is_the_gradient_of_the_penalised_loss():
    strength, head = 0.3, 0.2
    states = train(optax.chain(pats_jax.l2_sp(strength, head, head_mask=HEAD), optax.sgd(RATE)))
    params = start = {name: np.float64(leaf) for name, leaf in PARAMS.items()}
    for i in range(STEPS):
        g = gradient(params, batch(i))
        params = {
            "w": params["w"] - RATE * (g["w"] + strength * (params["w"] - start["w"])),
            "b": params["b"] - RATE * (g["b"] + head * params["b"]),
        }
    assert_close(states[-1].params, params, 1e-6)
    assert states[-1].opt_state[0].pretrained["b"] is None

    def penalty(params):
        """The formula itself, differentiated by JAX."""
        return strength / 2 * jnp.sum((params["w"] - PARAMS["w"]) ** 2) + head / 2 * jnp.sum(params["b"] ** 2)

    tx, now = pats_jax.l2_sp(strength, head, head_mask=HEAD), normal(5, w=(6, 3), b=(3,))
    grads, _ = tx.update(jax.tree.map(jnp.zeros_like, now), tx.init(PARAMS), now)
    assert_close(grads, jax.grad(penalty)(now), 1e-6)


def test_l2_sp_of_one_strength_only():
    zeros, now = jax.tree.map(jnp.zeros_like, PARAMS), jax.tree.map(lambda p: p + 1, PARAMS)
    for strengths, touched in (((0.5, 0), "w"), ((0, 0.5), "b")):
        tx = pats_jax.l2_sp(*strengths, head_mask=HEAD)
        grads, _ = tx.update(zeros, tx.init(PARAMS), now)
        assert {name for name, g in grads.items() if g.any()} == {touched}
    tx = pats_jax.l2_sp(0.5, 9.0, head_mask=False)
    grads, _ = tx.update(zeros, tx.init(PARAMS), now)
    assert_close(grads, jax.tree.map(lambda z: z + 0.5, zeros), 1e-6)


# wrong use


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pats_jax.mixout(1.0, key=0), r"drop_fraction=1.0 must be in \[0, 1\)"),
        (lambda: pats_jax.mixout(-0.5, key=0), "drop_fraction=-0.5 must be"),
        (lambda: pats_jax.mixout(0.5, key=jax.random.PRNGKey(0)), "legacy uint32 key"),
        (lambda: pats_jax.mixout(0.5, key=0, input_axis=-3).init(PARAMS), r"input_axis=-3 is not an axis .* \(6, 3\)"),
        (lambda: pats_jax.l2_sp(-1.0, 0.0, head_mask=HEAD), "pretrained_strength=-1.0 must be a finite number >= 0"),
        (lambda: pats_jax.l2_sp(0.0, math.inf, head_mask=HEAD), "head_strength=inf must be"),
        (lambda: pats_jax.l2_sp(0.1, 0.1, head_mask=None), "head_mask=None: say which leaves are the new head"),
    ],
)
def test_wrong_arguments_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_required():
    tx = pats_jax.l2_sp(0.1, 0.1, head_mask=HEAD)
    with pytest.raises(ValueError, match="l2_sp needs the parameters: call tx.update"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match="key"):
        pats_jax.mixout(0.5)
