"""One training step against NumPy, and the same step however the batch is split: filler, micro-batches, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pats_jax
from pats_jax import make_loss_fn, make_predict_step, make_train_step, train_state
from pats_jax.errors import InputError

DEVICES = 8
ROWS, LENGTH, WORDS, HIDDEN, CLASSES = 16, 6, 20, 8, 3


def attention(variables, input_ids, attention_mask, deterministic=True, rngs=None):
    """One head of attention, its first token classified. No key bias: its gradient would be nothing but rounding."""
    params = variables["params"]
    hidden = jax.nn.one_hot(input_ids, WORDS) @ params["embedding"]
    query, key, value = (hidden @ params[name] for name in ("query", "key", "value"))
    scores = query[:, :1] @ key.swapaxes(1, 2) / HIDDEN**0.5 + jnp.where(attention_mask, 0.0, -1e30)[:, None]
    pooled = (jax.nn.softmax(scores) @ value)[:, 0]
    if not deterministic:
        pooled *= jax.random.bernoulli(rngs["dropout"], 0.5, pooled.shape) / 0.5
    return pooled @ params["head"] + params["bias"]


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (WORDS, HIDDEN), "head": (HIDDEN, CLASSES), "bias": (CLASSES,)}
    shapes |= dict.fromkeys(("query", "key", "value"), (HIDDEN, HIDDEN))
    return {name: jnp.float32(rng.normal(size=shape) / HIDDEN**0.5) for name, shape in shapes.items()}


def make_batch(seed=0, rows=ROWS):
    """A batch with padding, some filler rows and one device's share that is filler altogether."""
    rng = np.random.default_rng(seed)
    weights = (rng.random(rows) < 0.8).astype(np.float32)
    weights[6:8] = 0.0
    return {
        "input_ids": rng.integers(WORDS, size=(rows, LENGTH), dtype=np.int32),
        "attention_mask": (np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (rows, 1))).astype(np.int32),
        "labels": rng.integers(CLASSES, size=rows, dtype=np.int32),
        "weights": weights,
    }


def make_state(tx, apply_fn=attention):
    return pats_jax.TrainState.create(apply_fn=apply_fn, params=make_params(), tx=tx, key=0)


SGD, ADAMW = optax.sgd(0.1), optax.adamw(1e-3)
NOISY_SGD = pats_jax.pats(SGD, noise_scale=0.01, key=3, mask={name: name == "value" for name in make_params()})

LOSS = make_loss_fn(attention, deterministic=True)
plain_step = jax.jit(make_train_step(LOSS))
dropout_step = jax.jit(make_train_step(make_loss_fn(attention)))


def assert_close(params, expected, tolerance):
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# the step itself


def linear(variables, input_ids, deterministic, rngs):
    return input_ids @ variables["params"]["kernel"]


@pytest.mark.parametrize("regression", [False, True])
def test_a_step_of_gradient_descent_by_hand(regression):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(9, 5)), rng.random(9) * (rng.random(9) < 0.7)
    kernel = rng.normal(size=(5, 1 if regression else CLASSES))
    logits = x @ kernel
    if regression:
        y = rng.normal(size=9).astype(np.float32)
        losses, error = (logits[:, 0] - y) ** 2, 2 * (logits - y[:, None])
    else:
        y = rng.integers(CLASSES, size=9).astype(np.int32)
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses, error = -np.log(probabilities[np.arange(9), y]), probabilities - np.eye(CLASSES)[y]
    gradient = x.T @ (w[:, None] * error) / w.sum()

    params = {"kernel": jnp.float32(kernel)}
    state = pats_jax.TrainState.create(apply_fn=linear, params=params, tx=optax.sgd(0.3), key=0)
    batch = {"input_ids": np.float32(x), "labels": y, "weights": np.float32(w)}
    state, metrics = jax.jit(make_train_step(make_loss_fn(linear, regression=regression)))(state, batch)
    np.testing.assert_allclose(state.params["kernel"], kernel - 0.3 * gradient, rtol=1e-5, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx((w @ losses) / w.sum(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(np.linalg.norm(kernel), rel=1e-5)
    assert float(metrics["update_norm"]) == pytest.approx(0.3 * np.linalg.norm(gradient), rel=1e-5)
    assert metrics.keys() == {"loss", "grad_norm", "param_norm", "update_norm"} and int(state.step) == 1


def test_filler_rows_change_nothing():
    batch = make_batch()
    kept = np.flatnonzero(batch["weights"])
    with_filler, metrics = plain_step(make_state(SGD), batch)
    without, expected = plain_step(make_state(SGD), {name: values[kept] for name, values in batch.items()})
    assert 0 < len(kept) < ROWS
    assert_close(with_filler.params, without.params, 1e-7)
    assert_close(metrics, expected, 1e-6)


def test_without_weights_all_rows_count():
    batch = make_batch()
    _, expected = plain_step(make_state(SGD), batch | {"weights": np.ones(ROWS, np.float32)})
    del batch["weights"]
    _, metrics = plain_step(make_state(SGD), batch)
    assert_close(metrics, expected, 1e-6)


def test_predictions_are_float32_and_without_dropout():
    params, batch = make_params(), make_batch()

    def low_precision(*args, **inputs):
        return attention(*args, **inputs).astype(jnp.bfloat16)

    logits = make_predict_step(low_precision)(params, batch)
    assert logits.dtype == jnp.float32 and logits.shape == (ROWS, CLASSES)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    np.testing.assert_array_equal(logits, low_precision({"params": params}, **inputs))


# the same, however the batch is split


def test_accumulation_is_the_whole_batch():
    batch = make_batch()
    batch["weights"][1::4] = 0.0  # a micro-batch of filler only: row i goes into micro-batch i modulo 4

    def careless_loss(params, batch, key):
        """A loss of one's own: 0/0 where there is nothing but filler."""
        logits = attention({"params": params}, batch["input_ids"], batch["attention_mask"])
        losses = train_state.losses(logits, batch["labels"], regression=False)
        return jnp.sum(batch["weights"] * losses) / jnp.sum(batch["weights"]), {}

    whole, expected = plain_step(make_state(SGD), batch)
    dealt, metrics = jax.jit(make_train_step(careless_loss, accumulation_steps=4))(make_state(SGD), batch)
    assert_close(dealt.params, whole.params, 1e-6)
    assert_close(metrics, expected, 1e-6)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(broken):
    def loss_fn(params, batch, key):
        """In a batch that is marked the loss is nan, or the gradient so large that its norm overflows."""
        loss, _ = LOSS(params, batch["good"], key)
        if broken == "loss":
            return jnp.where(batch["mark"] > 0, jnp.nan, loss), {}
        steep = 3e38 * batch["mark"] * params["bias"][0]
        return loss + steep - jax.lax.stop_gradient(steep), {}

    step = jax.jit(make_train_step(loss_fn, skip_nonfinite=True))
    tx = pats_jax.pats(ADAMW, noise_scale=0.01, key=3)
    state = expected = make_state(tx)
    skipped = []
    for number, mark in enumerate((0, 1, 0, 1, 0)):
        batch = {"good": make_batch(number), "mark": jnp.float32(mark)}
        if not mark:
            expected, _ = plain_step(expected.replace(step=state.step), make_batch(number))
        state, metrics = step(state, batch)
        skipped.append(float(metrics["skipped"]))
    assert skipped == [0, 1, 0, 1, 0] and int(state.step) == 5
    assert_close(state.params, expected.params, 1e-6)
    assert int(state.opt_state[1].count) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(pats_jax.sensitivity(state.opt_state)))


def test_a_skipped_step_changes_no_bit():
    """Not even the sign of a zero, which adding an update of 0 would change."""
    tx = pats_jax.pats(ADAMW, noise_scale=0.01, key=3)
    state = pats_jax.TrainState.create(apply_fn=None, params={"w": jnp.array([-0.0, 0.0, 1.5])}, tx=tx, key=0)
    step = jax.jit(make_train_step(lambda params, batch, key: (jnp.sum(params["w"]) / 0.0, {}), skip_nonfinite=True))
    after, metrics = step(state, {"x": np.zeros(2)})
    assert float(metrics["skipped"]) == 1 and float(metrics["update_norm"]) == 0

    def bits(tree):
        arrays = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in tree)
        return [np.asarray(x).tobytes() for x in arrays]

    assert bits(jax.tree.leaves(after.params)) == bits(jax.tree.leaves(state.params))
    assert bits(jax.tree.leaves(after.opt_state)) == bits(jax.tree.leaves(state.opt_state))


def test_a_batch_of_filler_only_gives_no_gradient():
    batch = make_batch() | {"weights": np.zeros(ROWS, np.float32)}
    for step in (plain_step, jax.jit(make_train_step(LOSS, accumulation_steps=4))):
        state, metrics = step(make_state(SGD), batch)
        assert_close(state.params, make_params(), 0)
        assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0


def train(tx, step, put=lambda batch: batch, steps=15):
    state = make_state(tx)
    for number in range(steps):
        state, metrics = step(state, put(make_batch(number)))
    return state, metrics


@pytest.fixture(scope="module", params=[(NOISY_SGD, 1e-5), (ADAMW, 2e-4)], ids=["SGD with PATS", "AdamW"])
def one_device(request):
    """An optimizer, how far its parameters may differ after 15 steps, and what one device makes of them."""
    tx, tolerance = request.param
    state, metrics = train(tx, plain_step)
    return tx, tolerance, jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.devices(8)
def test_pmap_is_one_device(one_device):
    tx, tolerance, params, metrics = one_device
    step = make_train_step(LOSS, axis_name="batch", accumulation_steps=2)
    step = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=(None, None), donate_argnums=0)

    def shard(batch):
        return {name: values.reshape(DEVICES, -1, *values.shape[1:]) for name, values in batch.items()}

    assert not np.any(shard(make_batch())["weights"][3])
    state, ours = train(tx, step, shard)
    assert_close(state.params, params, tolerance)
    assert_close(ours, metrics, 1e-4)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_mesh_is_one_device(one_device, kind):
    tx, tolerance, params, metrics = one_device
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    step = jax.jit(make_train_step(LOSS), donate_argnums=0)
    with jax.set_mesh(mesh):
        state = jax.device_put(make_state(tx), everywhere)
        for number in range(15):
            state, ours = step(state, jax.device_put(make_batch(number), rows))
    assert_close(state.params, params, tolerance)
    assert_close(ours, metrics, 1e-4)


def test_noise_of_scale_zero_changes_no_bit():
    quiet, _ = train(pats_jax.pats(ADAMW, noise_scale=0.0, key=3), plain_step)
    plain, _ = train(ADAMW, plain_step)
    assert all(map(np.array_equal, jax.tree.leaves(quiet.params), jax.tree.leaves(plain.params)))


# parameters that are not trained


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_frozen_parameters_stay_and_the_others_move_as_if_all_were_trained(accumulation_steps):
    trainable = {name: name in ("value", "bias") for name in make_params()}
    step = jax.jit(make_train_step(LOSS, accumulation_steps=accumulation_steps))
    state = pats_jax.TrainState.create(apply_fn=attention, params=make_params(), tx=ADAMW, key=0, trainable=trainable)
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 2 + 1  # two moments of two tensors, and a count
    expected, batch = make_state(ADAMW), make_batch()
    state, metrics = step(state, batch)
    expected, whole = step(expected, batch)
    for name, value in make_params().items():
        moved = expected.params[name] if trainable[name] else value
        np.testing.assert_allclose(state.all_params[name], moved, rtol=0, atol=1e-7, err_msg=name)
    assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]))
    assert float(metrics["grad_norm"]) < float(whole["grad_norm"])


# keys, compilation, buffers


def draw(params, batch, key):
    """A loss whose metric is a random number of its key; weighted means then tell the keys of rows apart."""
    return jnp.sum(params["embedding"]) * 0, {"drawn": jax.random.uniform(key)}


@pytest.mark.devices(8)
def test_dropout_keys_differ_by_step_device_and_micro_batch():
    step = make_train_step(draw, axis_name="batch", accumulation_steps=2)
    step = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=(None, None))
    state, drawn = make_state(SGD), []
    for _ in range(2):
        for row in range(ROWS):  # a device's two rows are its two micro-batches
            weights = np.zeros(ROWS, np.float32)
            weights[row] = 1.0
            new_state, metrics = step(state, {"weights": weights.reshape(DEVICES, 2)})
            drawn.append(float(metrics["drawn"]))
        state = new_state
    assert len(set(drawn)) == 2 * ROWS
    _, metrics = step(make_state(SGD), {"weights": np.ones((DEVICES, 2), np.float32)})
    assert float(metrics["drawn"]) == pytest.approx(np.mean(drawn[:ROWS]), rel=1e-5)


def test_dropout_differs_from_step_to_step_and_follows_the_seed():
    def loss(state):
        return float(dropout_step(state, make_batch())[1]["loss"])

    state = make_state(SGD)
    assert loss(state) == loss(make_state(SGD))
    assert loss(state) != loss(state.replace(step=state.step + 1))
    assert loss(state) != loss(state.replace(key=pats_jax.random.fast_key(1)))


def test_training_compiles_once():
    step = jax.jit(make_train_step(make_loss_fn(attention)), donate_argnums=0)
    state, _ = train(SGD, step, steps=4)
    assert step._cache_size() == 1 and int(state.step) == 4


def test_the_callers_key_survives_donation():
    key = jax.random.key(5)
    state = pats_jax.TrainState.create(apply_fn=attention, params=make_params(), tx=SGD, key=key)
    jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)(state)
    assert state.stored_key.words.is_deleted() and not key.is_deleted()


# mistakes


def test_accumulation_that_does_not_fit():
    with pytest.raises(ValueError, match="accumulation_steps=0 must be at least 1"):
        make_train_step(LOSS, accumulation_steps=0)
    with pytest.raises(ValueError, match="accumulation_steps=3 does not divide the batch of 16 rows"):
        make_train_step(LOSS, accumulation_steps=3)(make_state(SGD), make_batch())


def test_weighted_mean():
    values = jnp.arange(4.0)
    assert float(train_state.weighted_mean(values, None)) == 1.5
    assert float(train_state.weighted_mean(values, jnp.array([0.0, 1.0, 0.0, 3.0]))) == 2.5
    assert float(train_state.weighted_mean(values, jnp.zeros(4))) == 0.0


def test_norms_of_a_step_are_those_of_its_parameters():
    params = {"w": jnp.array([3.0, 4.0])}
    state = pats_jax.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.5), key=0)

    def loss_fn(params, batch, key):
        return jnp.sum(params["w"] * batch["x"]), {}

    batch = {"x": jnp.array([6.0, 8.0])}
    _, measured = pats_jax.make_train_step(loss_fn)(state, batch)
    after, plain = pats_jax.make_train_step(loss_fn, norms=False)(state, batch)
    assert plain.keys() == {"loss", "grad_norm"}
    norms = train_state.global_norms(params, after.params)
    assert float(norms["param_norm"]) == 5.0 == float(measured["param_norm"])
    assert float(norms["update_norm"]) == 5.0 == float(measured["update_norm"])


@pytest.mark.parametrize("objectives", [(), (pats_jax.r_drop(1.0),)], ids=["plain", "with objectives"])
def test_a_batch_without_labels_is_told_so(objectives):
    """What a tokenizer gives has none."""
    loss_fn = pats_jax.with_objectives(lambda variables, input_ids, **unused: input_ids, *objectives)
    batch = {"input_ids": jnp.ones((2, 3)), "attention_mask": jnp.ones((2, 3))}
    with pytest.raises(InputError, match="the batch has no labels, only input_ids, attention_mask; add the classes"):
        loss_fn({}, batch, jax.random.key(0))
