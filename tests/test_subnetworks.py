"""DPS, Child-Tuning and SIFT against the rules in NumPy; what all companion methods share is in test_companions.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax.companions.dps import DpsDenseState, DpsMixState
from pats_jax.companions.ranking import kth_largest

RATE, MOMENTUM, DECAY = 0.125, 0.5, 0.25
SHAPES = {"w": (6, 8), "v": (5, 4), "b": (4,)}
MASK = {"w": True, "v": True, "b": False}


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


def eighths(seed, largest=4, shapes=SHAPES):
    """Gradients in steps of 1/8: squares and sums of them are exact in float32, and many tie."""
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.integers(-largest, largest + 1, shape) / 8) for name, shape in shapes.items()}


def momentum_sgd(first, decay=DECAY):
    return optax.chain(first, optax.trace(MOMENTUM), optax.add_decayed_weights(decay), optax.sgd(RATE))


class NumpyMomentum:
    """theta <- theta - RATE * (trace + DECAY * theta), in float64."""

    def __init__(self, params):
        self.params = {name: np.float64(p) for name, p in params.items()}
        self.trace = {name: np.zeros(p.shape) for name, p in params.items()}

    def step(self, grads):
        for name, g in grads.items():
            self.trace[name] = MOMENTUM * self.trace[name] + g
            self.params[name] = self.params[name] - RATE * (self.trace[name] + DECAY * self.params[name])


def stage_of(t, us):
    """Whether step t = 1, 2, ... is in stage II, and whether it is the first of its stage: the rule's own words."""
    return math.ceil(t / us) % 2 == 0, (t - 1) % us == 0


def top(scores, keep_fraction):
    """Where a score is at least the ceil(N * keep)-th largest."""
    return scores >= np.sort(scores, axis=None)[::-1][math.ceil(scores.size * keep_fraction) - 1]


def selection(opt_state, kind):
    """The entries that the last update let through, as the state tells."""
    (state,) = [s for s in opt_state if isinstance(s, kind)]
    return {name: np.asarray(state.scores[name] >= state.threshold[name]) for name in ("w", "v")}


def assert_close(ours, expected, atol):
    for name, theirs in expected.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=atol, err_msg=name)


# DPS


@pytest.mark.parametrize(("us", "keep"), [(1, 0.7), (3, 0.7), (4, 0.25)])
def test_dps_dense_is_the_rule_over_three_cycles(us, keep):
    tx, params = momentum_sgd(pats_jax.dps_dense(keep, us, mask=MASK)), normal(0)
    state, update = tx.init(params), jax.jit(tx.update)
    reference, gam, chosen = NumpyMomentum(params), {}, {}
    ties = 0
    for t in range(1, 6 * us + 1):
        grads = eighths(t)
        second, first = stage_of(t, us)
        passed = {name: np.float64(g) for name, g in grads.items()}
        for name in ("w", "v"):
            if not second:
                gam[name] = (0 if first else gam[name]) + passed[name] ** 2
                chosen[name] = np.ones(grads[name].shape, bool)
            elif first:
                chosen[name] = top(gam[name], keep)
                ties += chosen[name].sum() - math.ceil(grads[name].size * keep)
            passed[name] = passed[name] * chosen[name]
        reference.step(passed)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, mask in selection(state, DpsDenseState).items():
            np.testing.assert_array_equal(mask, chosen[name], err_msg=f"{name} at step {t}")
        assert_close(params, reference.params, 1e-6)
    assert ties > 0 and update._cache_size() == 1
    assert not all(chosen[name].all() for name in ("w", "v"))


@pytest.mark.parametrize(("us", "keep", "axis"), [(1, 0.7, 0), (3, 0.7, 0), (4, 0.4, 1), (50, 0.7, 0)])
def test_dps_mix_is_the_rule_over_three_cycles(us, keep, axis):
    """Targets, frequencies and both scores; the rows that JAX draws are taken from its state."""
    p = 1 - keep
    tx, params = momentum_sgd(pats_jax.dps_mix(keep, us, key=0, mask=MASK, input_axis=axis)), normal(0)
    state, update = tx.init(params), jax.jit(tx.update)
    reference = NumpyMomentum(params)
    pretrained = {name: np.float64(p) for name, p in params.items()}
    target, gam, fam, chosen = dict(pretrained), {}, {}, {}
    ties = reordered = 0
    for t in range(1, 6 * us + 1):
        grads = eighths(t, largest=4 if us < 50 else 1)
        second, first = stage_of(t, us)
        rows = {name: np.asarray(state[0].rows[name]) for name in ("w", "v")}
        forward = jax.jit(pats_jax.forward_params)(state, params)
        effective, passed = dict(reference.params), {name: np.float64(g) for name, g in grads.items()}
        for name in ("w", "v"):
            w, g = reference.params[name], passed[name]
            if not second:
                target[name] = pretrained[name]
                m = np.broadcast_to(rows[name], w.shape)
                assert rows[name].shape == tuple(n if i == axis else 1 for i, n in enumerate(w.shape))
                gam[name] = (0 if first else gam[name]) + g**2 * m
                fam[name] = (0 if first else fam[name]) + np.float64(m)
                chosen[name] = np.ones(w.shape, bool)
            else:
                if first:
                    target[name] = w
                    frequency = np.maximum(fam[name], 1)
                    score = gam[name] / frequency * (np.exp(-frequency / us) if us >= 50 else 1)
                    chosen[name] = top(score, keep)
                    ties += chosen[name].sum() - math.ceil(w.size * keep)
                    reordered += not np.array_equal(chosen[name], top(gam[name], keep))
                m = chosen[name]
            effective[name] = ((1 - m) * target[name] + m * w - p * target[name]) / (1 - p)
            passed[name] = g * m
        assert_close(forward, effective, 1e-6)
        reference.step(passed)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, mask in selection(state, DpsMixState).items():
            np.testing.assert_array_equal(mask, chosen[name], err_msg=f"{name} at step {t}")
        assert_close(params, reference.params, 1e-6)
    assert ties > 0 and (reordered > 0 or us == 1) and update._cache_size() == 1


def test_the_frequency_penalty_starts_at_50_steps():
    """Without it the score is a mean of squares, the same for rows kept often and seldom."""
    for us in (49, 50):
        tx = pats_jax.dps_mix(0.5, us, key=1)
        params, grads = {"w": jnp.zeros((8, 2))}, {"w": jnp.ones((8, 2))}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(us + 1):
            _, state = update(grads, state, params)
        mean, often = np.asarray(state.scores["w"])[:, 0], np.asarray(state.appearances["w"])[:, 0]
        assert len(set(often)) > 1
        np.testing.assert_allclose(mean, 1 if us < 50 else np.exp(-often / us), rtol=1e-6)


@pytest.mark.parametrize("tx", [pats_jax.dps_dense(0.5, 3), pats_jax.dps_mix(0.5, 3, key=0)])
def test_the_threshold_is_searched_for_at_the_start_of_a_stage_only(tx):
    """The loop of the search stands in a branch of lax.cond, and nowhere else."""

    def loops(jaxpr, in_branch=False):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("while", "scan"):
                yield in_branch
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(part, "eqns"):
                    yield from loops(part, in_branch or equation.primitive.name == "cond")

    params = normal(0)
    assert set(loops(jax.make_jaxpr(tx.update)(params, tx.init(params), params))) == {True}


def test_dps_mix_rows_are_bernoulli_and_new_at_each_step_and_leaf():
    tx, params = pats_jax.dps_mix(0.7, 10**6, key=0), {"w": jnp.zeros((4096, 2)), "v": jnp.zeros((4096, 2))}
    before = tx.init(params)
    _, after = tx.update(params, before, params)
    draws = [np.ravel(rows) for rows in (before.rows["w"], before.rows["v"], after.rows["w"])]
    for draw in draws:
        assert draw.mean() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 4096))
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 4 / math.sqrt(4096)


def test_a_gradient_that_is_not_finite_does_not_count():
    grads = {"w": jnp.array([jnp.nan, jnp.inf, 1.0, 2.0])}
    tx = pats_jax.dps_dense(0.5, 1)
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update({"w": jnp.ones(4)}, state)
    np.testing.assert_array_equal(state.scores["w"], [0, 0, 1, 4])
    assert float(state.threshold["w"]) == 1


# Child-Tuning


def test_child_tuning_f_thins_out_and_rescales():
    tx = pats_jax.child_tuning_f(0.3, key=0, mask={"w": True, "v": True, "b": False})
    grads = {"w": jnp.full((64, 64), 2.0), **normal(0, {"v": (64, 64), "b": (3,)})}
    thinned, state = tx.update(grads, tx.init(grads))
    again, _ = tx.update(grads, state)
    share = np.asarray(thinned["w"] != 0)
    np.testing.assert_allclose(thinned["w"], np.where(share, 2 / 0.3, 0), rtol=1e-6)
    np.testing.assert_allclose(thinned["v"], np.where(thinned["v"] != 0, grads["v"] / 0.3, 0), rtol=1e-6)
    np.testing.assert_array_equal(thinned["b"], grads["b"])
    assert share.mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4096))
    draws = [np.ravel(g) != 0 for g in (thinned["w"], thinned["v"], again["w"])]
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 4 / 64
    alone, _ = tx.update({"w": grads["w"], "v": None, "b": None}, state._replace(count=jnp.int32(0)))
    np.testing.assert_array_equal(alone["w"], thinned["w"])


def linear_loss(params, batch, key):
    """Mean over rows of half the squared error of x @ w + x @ v, with a gradient that NumPy can have by hand."""
    assert key is None
    error = batch["x"] @ (params["w"] + params["v"]) - batch["y"]
    return jnp.mean(error**2) / 2 + jnp.sum(params["head"]) * 0, {"unused": jnp.float32(0)}


@pytest.mark.parametrize("mask", [None, {"w": True, "v": False, "head": False}])
def test_fisher_mask_is_one_threshold_over_mean_squared_batch_gradients(mask):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=20), "v": rng.normal(size=20), "head": np.ones(2)}
    params = {name: np.float32(p) for name, p in params.items()}
    scale = np.geomspace(0.1, 10, 20)
    batches = [{"x": np.float32(rng.normal(size=(n, 20)) * scale), "y": np.float32(rng.normal(size=n))} for n in (8, 3)]
    fisher = 0
    for batch in batches:
        x = np.float64(batch["x"])
        g = x.T @ (x @ np.float64(params["w"] + params["v"]) - batch["y"]) / len(x)
        fisher = fisher + g**2 / len(batches)
    keep = pats_jax.fisher_mask(linear_loss, params, iter(batches), 0.3, mask=mask)
    if mask is None:  # w and v tie, and the head, whose gradient is 0, stays out
        assert keep["head"].dtype == bool and not keep["head"].any()
        expected = top(np.concatenate([fisher, fisher, np.zeros(2)]), 0.3)
        np.testing.assert_array_equal(np.concatenate([keep["w"], keep["v"], keep["head"]]), expected)
        assert expected.sum() == 14  # ceil(42 * 0.3) = 13 and the twin of the 13th
    else:
        np.testing.assert_array_equal(keep["w"], top(fisher, 0.3))
        assert keep["v"] is True and keep["head"] is True


def test_child_tuning_d_passes_the_kept_gradients_only():
    grads, keep = normal(1), {name: g > 0 for name, g in normal(2).items()}
    tx = momentum_sgd(pats_jax.child_tuning_d({"w": keep["w"], "v": jnp.asarray(keep["v"]), "b": True}))
    params = normal(0)
    reference, state = NumpyMomentum(params), tx.init(params)
    for t in range(4):
        grads = normal(10 + t)
        reference.step({"w": grads["w"] * keep["w"], "v": grads["v"] * keep["v"], "b": grads["b"]})
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, reference.params, 1e-6)
    assert jax.tree.map(jnp.shape, state[0].keep) == {"w": (6, 8), "v": (5, 4), "b": None}


def test_child_tuning_d_masks_may_be_prefixes_and_false():
    params = {"encoder": {"a": jnp.ones(2), "b": jnp.ones(3)}, "head": jnp.ones(1)}
    for keep in ({"encoder": False, "head": True}, {"encoder": jnp.array(False), "head": None}):
        tx = pats_jax.child_tuning_d(keep)
        grads, _ = tx.update(params, tx.init(params))
        assert not grads["encoder"]["a"].any() and not grads["encoder"]["b"].any() and grads["head"].all()


# SIFT


def numpy_adam(param, grads, rate):
    m = v = 0
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        param = param - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return param


def test_sift_is_adam_on_the_chosen_entries():
    tx = pats_jax.sift(optax.adam(0.01), 0.2, mask=MASK)
    params = start = normal(0)
    grads = [eighths(i + 1) for i in range(5)]
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    for name, p in start.items():
        size = np.abs(grads[0][name]).ravel()
        k = math.ceil(p.size * 0.2) if MASK[name] else p.size
        chosen = np.zeros(p.size, bool)
        chosen[np.argsort(-size, kind="stable")[:k]] = True  # of those that tie the first
        expected = np.where(
            chosen.reshape(p.shape), numpy_adam(np.float64(p), [np.float64(g[name]) for g in grads], 0.01), p
        )
        np.testing.assert_allclose(params[name], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(params[name] == p)[~chosen.reshape(p.shape)], True)
    assert update._cache_size() == 1


def test_sift_holds_little():
    params = {"w": jnp.zeros((200, 300)), "v": jnp.zeros((150, 70))}

    def size(tx):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))

    assert size(pats_jax.sift(optax.adamw(1e-3), 0.01, mask=None)) < 0.03 * size(optax.adamw(1e-3))


def test_sift_starts_its_optimizer_with_the_values_of_the_chosen_entries():
    """Schedule-free SGD keeps a copy of the parameters; entries chosen later than init must be in it."""
    inner = optax.contrib.schedule_free_sgd(0.1)
    params, grads = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"w": jnp.array([0.0, 0.0, 1.0, -1.0])}
    tx = pats_jax.sift(inner, 0.5, mask=None)
    updates, state = tx.update(grads, tx.init(params), params)
    chosen = {"w": params["w"][2:]}
    expected, _ = inner.update({"w": grads["w"][2:]}, inner.init(chosen), chosen)
    np.testing.assert_array_equal(state.indices["w"], [2, 3])
    np.testing.assert_allclose(updates["w"], np.concatenate([np.zeros(2), expected["w"]]))


def test_sift_cuts_the_raw_gradient_to_the_chosen_entries():
    inside = pats_jax.sift(pats_jax.pats(optax.sgd(0.1), 0.1, key=0), 0.5, mask=None)
    around = pats_jax.with_raw_gradient(
        pats_jax.sift(optax.chain(optax.sgd(0.1), pats_jax.pats_noise(0.1, key=0)), 0.5, mask=None)
    )
    params, grads = normal(0), normal(1)
    expected, state = inside.update(grads, inside.init(params), params)
    updates, _ = around.update(grads, around.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert pats_jax.sensitivity(state)["w"].shape == (24,) and (updates["w"] == 0).sum() == 24


# freezing


def test_frozen_weights_stay_and_the_others_move_as_before():
    def train(wrap, first):
        tx, params = wrap(momentum_sgd(first)), normal(0)
        state, history = tx.init(params), []
        for t in range(12):
            updates, state = jax.jit(tx.update)(normal(t), state, params)
            params = optax.apply_updates(params, updates)
            history.append((params, state))
        return history

    for first, kind in (
        (pats_jax.dps_dense(0.5, 3, mask=MASK), DpsDenseState),
        (pats_jax.dps_mix(0.5, 3, key=0, mask=MASK), DpsMixState),
    ):
        plain, frozen = train(lambda tx: tx, first), train(pats_jax.freeze_unselected, first)
        for t in range(1, 12):
            second = stage_of(t + 1, 3)[0]
            for name, chosen in selection(frozen[t][1], kind).items():
                still = np.asarray(frozen[t][0][name] == frozen[t - 1][0][name])
                moves = np.asarray(plain[t][0][name] != plain[t - 1][0][name])
                np.testing.assert_array_equal(still, ~chosen if second else np.zeros_like(chosen))
                assert moves.all()  # by momentum and decay
            assert (frozen[t][0]["b"] == plain[t][0]["b"]).all()


def test_freezing_holds_through_noise_and_accumulation():
    keep = {name: g > 0 for name, g in normal(2).items()}
    chain = optax.chain(pats_jax.child_tuning_d(keep), optax.adamw(0.1), pats_jax.pats_noise(0.5, key=0))
    tx = pats_jax.freeze_unselected(optax.MultiSteps(pats_jax.with_raw_gradient(chain), 2))
    params = start = normal(0)
    state = tx.init(params)
    for t in range(4):
        updates, state = tx.update(normal(t), state, params)
        params = optax.apply_updates(params, updates)
    for name, p in start.items():
        np.testing.assert_array_equal(np.asarray(params[name] != p), keep[name])


# ranks


@pytest.mark.parametrize("values", ["normal", "ties", "zeros", "infinite", "tiny"])
def test_kth_largest_is_that_of_a_sort(values):
    rng = np.random.default_rng(0)
    numbers = {
        "normal": rng.normal(size=1000) ** 2,
        "ties": rng.integers(0, 4, 1000) / 8,
        "zeros": np.zeros(1000),
        "infinite": np.where(rng.random(1000) < 0.3, np.inf, rng.random(1000)),
        "tiny": rng.random(1000) * 1e-36,
    }[values].astype(np.float32)
    ordered = np.sort(numbers)[::-1]
    find = jax.jit(
        lambda k: kth_largest([[jnp.asarray(numbers)], [numbers[:300].reshape(3, 100), numbers[300:]]], [k, k])
    )
    for k in (1, 2, 299, 300, 999, 1000):
        whole, in_parts = find(k)
        assert float(whole) == float(in_parts) == ordered[k - 1]


# wrong use


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pats_jax.dps_dense(0.0, 5), r"keep_fraction=0.0 must be in \(0, 1\]"),
        (lambda: pats_jax.dps_dense(1.5, 5), "keep_fraction=1.5 must be"),
        (lambda: pats_jax.dps_dense(0.7, 0), "stage_steps=0 must be a whole number of steps >= 1: train longer"),
        (lambda: pats_jax.dps_dense(0.7, 2.5), "stage_steps=2.5 must be"),
        (lambda: pats_jax.dps_mix(-0.1, 5, key=0), "keep_fraction=-0.1 must be"),
        (lambda: pats_jax.dps_mix(0.7, 0.9, key=0), "stage_steps=0.9 must be"),
        (lambda: pats_jax.dps_mix(0.7, 5, key=jax.random.PRNGKey(0)), "legacy uint32 key"),
        (lambda: pats_jax.dps_mix(0.7, 5, key=0, input_axis=2).init(normal(0)), "input_axis=2 is not an axis"),
        (lambda: pats_jax.child_tuning_f(float("nan"), key=0), "keep_fraction=nan must be"),
        (lambda: pats_jax.fisher_mask(linear_loss, normal(0), [], 0.3), "at least one batch"),
        (lambda: pats_jax.fisher_mask(linear_loss, normal(0), [], 0), "keep_fraction=0 must be"),
        (lambda: pats_jax.child_tuning_d({"w": jnp.ones(3)}).init({"w": jnp.ones(3)}), "keep_mask must be of bools"),
        (lambda: pats_jax.child_tuning_d(jnp.ones(3, bool)).init(jnp.ones(4)), r"shape \(3,\) does not fit .* \(4,\)"),
        (lambda: pats_jax.sift(optax.sgd(0.1), 0.0, mask=None), r"rate=0.0 must be in \(0, 1\]"),
        (lambda: pats_jax.freeze_unselected(optax.adam(0.1)).init(normal(0)), "nothing inside selects parameters"),
    ],
)
def test_wrong_arguments_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("tx", [pats_jax.dps_mix(0.7, 5, key=0), pats_jax.sift(optax.sgd(0.1), 0.1, mask=None)])
def test_params_are_required_where_they_are_used(tx):
    with pytest.raises(ValueError, match="needs the parameters: call tx.update"):
        tx.update(normal(1), tx.init(normal(0)))


def test_a_key_is_required():
    with pytest.raises(TypeError, match="key"):
        pats_jax.dps_mix(0.7, 5)
    with pytest.raises(TypeError, match="key"):
        pats_jax.child_tuning_f(0.7)
