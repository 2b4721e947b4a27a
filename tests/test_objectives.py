"""Each objective, value and gradient, against NumPy in float64; and the same however the batch is split."""

import functools

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pats_jax
from pats_jax import lnsr, make_loss_fn, make_train_step, models, objectives, r3f, r_drop, smart, with_objectives
from pats_jax.random import fast_key

DEVICES = 8
ROWS, LENGTH, WORDS, HIDDEN, CLASSES = 16, 4, 6, 3, 3


def toy(variables, input_ids=None, attention_mask=None, *, record=lambda **draws: None, method=None, **options):
    """Two layers without biases and the mean of their tokens, with dropout; ``record`` is told what a pass was given.

    Hidden state 0 is the word embeddings; every pass reports its embeddings, its hidden state and what dropout left.
    """
    params = variables["params"]
    start = options.get("inputs_embeds")
    if input_ids is not None:
        start = jax.nn.one_hot(input_ids, WORDS) @ params["table"]
    if method == "embed":
        return start
    first, start = options.get("continue_from", (0, start))
    states = [start]
    for layer in ("first", "second")[first:]:
        states.append(jnp.tanh(states[-1] @ params[layer]))
    pooled = mean_of_tokens(states[-1], attention_mask)
    kept = jnp.ones(pooled.shape)
    if not options["deterministic"]:
        kept = jax.random.bernoulli(options["rngs"]["dropout"], 0.5, pooled.shape) / 0.5
    jax.debug.callback(record, start=states[0], kept=kept)
    logits = (pooled * kept) @ params["head"]
    return (logits, tuple(states)) if options.get("output_hidden_states") else logits


def mean_of_tokens(hidden, mask):
    return (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def make_params(regression=False):
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, HIDDEN), "first": (HIDDEN, HIDDEN), "second": (HIDDEN, HIDDEN)}
    shapes["head"] = (HIDDEN, 1 if regression else CLASSES)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


def make_batch(seed=0, regression=False):
    """A batch with padding, fractional weights and filler at its end."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(WORDS, size=(ROWS, LENGTH), dtype=np.int32),
        "attention_mask": (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1))).astype(np.int32),
        "labels": rng.normal(size=ROWS).astype(np.float32) if regression else rng.integers(CLASSES, size=ROWS),
        "weights": np.float32(rng.random(ROWS) * (np.arange(ROWS) < ROWS - 3)),
    }


# NumPy's side, all in float64


def numpy_pass(params, start, layer, mask, kept):
    """The hidden states from ``start``, that of a layer, on, and the logits."""
    states = [start]
    for name in ("first", "second")[layer:]:
        states.append(np.tanh(states[-1] @ params[name]))
    return states, (mean_of_tokens(states[-1], mask) * kept) @ params["head"]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def numpy_losses(logits, labels):
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels) ** 2
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def two_kls(logits, other):
    """KL(p||q) + KL(q||p), as it is written."""
    p, q = log_softmax(logits), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(1) + (np.exp(q) * (q - p)).sum(1)


def difference(logits, other):
    return (logits - other)[:, 0] ** 2 if logits.shape[1] == 1 else two_kls(logits, other)


def numpy_r3f(plain, params, batch, passes, at):
    if plain.shape[1] == 1:
        return 0.0 * batch["weights"], []
    (noised,) = passes  # its embeddings are constants
    return two_kls(plain, numpy_pass(params, noised["start"], 0, batch["attention_mask"], noised["kept"])[1]), []


def numpy_r_drop(plain, params, batch, passes, at):
    start = params["table"][batch["input_ids"]]
    second = numpy_pass(params, start, 0, batch["attention_mask"], passes[0]["kept"])[1]
    return difference(plain, second) * (1 if plain.shape[1] == 1 else 0.5), [second]


def numpy_smart(plain, params, batch, passes, at):
    """The shift is a constant; in each KL the distribution it expects under is that at the parameters ``at``."""

    def run(params):
        start = params["table"][batch["input_ids"]] + passes[1]["start"] - at["table"][batch["input_ids"]]
        return numpy_pass(params, start, 0, batch["attention_mask"], passes[1]["kept"])[1]

    if plain.shape[1] == 1:
        return difference(plain, run(params)), []
    p, q = log_softmax(plain), log_softmax(run(params))
    p_at, q_at = log_softmax(at["plain"]), log_softmax(run(at))
    return (np.exp(p_at) * (p_at - q)).sum(1) + (np.exp(q_at) * (q_at - p)).sum(1), []


def numpy_lnsr(layer, plain, params, batch, passes, at):
    (noised,) = passes

    def states(params):
        start, mask = params["table"][batch["input_ids"]], batch["attention_mask"]
        return numpy_pass(params, start, 0, mask, 1.0)[0]

    moved = states(params)[layer] + noised["start"] - states(at)[layer]
    above = numpy_pass(params, moved, layer, batch["attention_mask"], 1.0)[0][1:]
    squares = [(a - b) ** 2 for a, b in zip(above, states(params)[layer + 1 :], strict=True)]
    return sum(mean_of_tokens(x, batch["attention_mask"]).mean(1) for x in squares), []


OBJECTIVES = {
    "r3f": (r3f(lam=0.7, eps=0.5), numpy_r3f, 1),
    "r_drop": (r_drop(alpha=0.7), numpy_r_drop, 1),
    "smart": (smart(alpha=0.7, step_size=0.2, noise_std=0.3), numpy_smart, 2),
    "lnsr at the embeddings": (lnsr(0, lam=0.7, noise_std=0.3), functools.partial(numpy_lnsr, 0), 1),
    "lnsr at a layer": (lnsr(1, lam=0.7, noise_std=0.3), functools.partial(numpy_lnsr, 1), 1),
}
EVERY = [OBJECTIVES[name][0] for name in ("r3f", "r_drop", "smart", "lnsr at a layer")]
KEY = fast_key(5)


def numpy_loss(params, batch, chosen, passes, at=None):
    """The loss, and the means of the task loss and each objective, from what the passes drew, the plain one first."""

    def mean(values):
        return (batch["weights"] * values).sum() / batch["weights"].sum()

    plain = numpy_pass(params, params["table"][batch["input_ids"]], 0, batch["attention_mask"], passes[0]["kept"])[1]
    at = at or params | {"plain": plain}
    learners, terms, rest = [plain], [], passes[1:]
    for _, term, count in chosen:
        values, more = term(plain, params, batch, rest[:count], at)
        terms.append(mean(values))
        learners, rest = learners + more, rest[count:]
    task_loss = np.mean([mean(numpy_losses(x, batch["labels"])) for x in learners])
    return task_loss + sum(objective.weight * t for (objective, _, _), t in zip(chosen, terms, strict=True)), [
        task_loss,
        *terms,
    ]


def run_eagerly(chosen, params, batch, regression=False, deterministic=False):
    """Loss, metrics, gradient, and what each forward pass was given, in their order."""
    passes = []

    def record(start, kept):
        passes.append({"start": np.float64(start), "kept": np.float64(kept)})

    loss_fn = with_objectives(
        functools.partial(toy, record=record),
        *(objective for objective, _, _ in chosen),
        regression=regression,
        deterministic=deterministic,
    )
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(jax.tree.map(jnp.asarray, params), batch, KEY)
    jax.effects_barrier()
    return loss, metrics, grads, passes


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "regression"])
@pytest.mark.parametrize(
    "names", [*([name] for name in OBJECTIVES), ["r_drop", "r3f", "lnsr at a layer"]], ids="+".join
)
def test_loss_and_gradient_are_numpys(names, regression):
    chosen = [OBJECTIVES[name] for name in names]
    params, batch = make_params(regression), make_batch(regression=regression)
    if regression:
        chosen = [(o, term, 0 if o.name == "r3f" else count) for o, term, count in chosen]
    loss, metrics, grads, passes = run_eagerly(chosen, params, batch, regression)
    assert len(passes) == 1 + sum(count for _, _, count in chosen)

    wide = {name: np.float64(x) for name, x in params.items()}
    expected, means = numpy_loss(wide, batch, chosen, passes)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    expected_metrics = dict(zip(["task_loss", *(o.name for o, _, _ in chosen)], means, strict=True))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    plain = numpy_pass(wide, wide["table"][batch["input_ids"]], 0, batch["attention_mask"], passes[0]["kept"])[1]
    for name, values in wide.items():
        gradient = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[index] = 1e-5
            up, down = (
                numpy_loss(wide | {name: values + s}, batch, chosen, passes, wide | {"plain": plain})[0]
                for s in (step, -step)
            )
            gradient[index] = (up - down) / 2e-5
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name)


def test_detached_embeddings_are_what_r3f_needs():
    """The gradient of the table would be another one if the noised branch went on from embeddings that can move."""
    params, batch = jax.tree.map(jnp.asarray, make_params()), make_batch()
    objective = r3f(eps=0.5)

    def attached(step, key):
        noise_key, dropout_key = jax.random.split(key)
        noise = jax.random.uniform(noise_key, (ROWS, LENGTH, HIDDEN), minval=-0.5, maxval=0.5)
        noised = step.apply(step.params, dropout_key, inputs_embeds=step.embed() + noise, **step.rest)
        return objectives.Term(objectives.symmetric_kl(step.logits, noised))

    (loss, ours), (other_loss, other) = (
        jax.value_and_grad(lambda p, o=o: with_objectives(toy, o)(p, batch, KEY)[0])(params)
        for o in (objective, objectives.Objective("r3f", 1.0, attached))
    )
    assert float(loss) == float(other_loss)
    np.testing.assert_allclose(ours["head"], other["head"], rtol=1e-6)
    assert np.abs(ours["table"] - other["table"]).max() > 0.01


# what is drawn


def test_r3f_draws_uniform_noise():
    _, _, _, (plain, noised) = run_eagerly([(r3f(eps=0.25), None, 1)], make_params(), make_batch())
    noise = noised["start"] - plain["start"]
    assert 0.2 < np.abs(noise).max() <= 0.25 + 1e-6
    assert np.std(noise) == pytest.approx(0.25 / np.sqrt(3), rel=0.15)
    assert not np.array_equal(plain["kept"], noised["kept"])


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "regression"])
def test_smart_takes_one_normalised_step_up_the_divergence(regression):
    params, batch = make_params(regression), make_batch(regression=regression)
    _, _, _, (plain, noisy, shifted) = run_eagerly(
        [(smart(step_size=0.2, noise_std=0.3, eps=1e-3), None, 2)], params, batch, regression
    )
    wide, start = {name: np.float64(x) for name, x in params.items()}, noisy["start"]
    assert np.std(start - plain["start"]) == pytest.approx(0.3, rel=0.15)

    def run(start, kept):
        return numpy_pass(wide, start, 0, batch["attention_mask"], kept)[1]

    fixed, gradient = run(plain["start"], plain["kept"]), np.zeros_like(start)
    for token, unit in np.ndindex(LENGTH, HIDDEN):  # rows do not meet: all of them at once
        step = np.zeros_like(start)
        step[:, token, unit] = 1e-5
        up, down = (difference(fixed, run(start + s, noisy["kept"])) for s in (step, -step))
        gradient[:, token, unit] = (up - down) / 2e-5
    expected = start + 0.2 * gradient / (np.abs(gradient).max(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(shifted["start"], expected, rtol=0, atol=2e-5)


def test_lnsr_leaves_dropout_and_the_layers_below_alone():
    _, metrics, _, (plain, noised) = run_eagerly([OBJECTIVES["lnsr at a layer"]], make_params(), make_batch())
    np.testing.assert_array_equal(plain["kept"], noised["kept"])
    hidden = np.tanh(plain["start"] @ make_params()["first"])
    assert np.std(noised["start"] - hidden) == pytest.approx(0.3, rel=0.15)


def test_objectives_do_not_disturb_each_other():
    params, batch = jax.tree.map(jnp.asarray, make_params()), make_batch()
    together = with_objectives(toy, *EVERY)(params, batch, KEY)[1]
    for objective in EVERY:
        alone = with_objectives(toy, objective)(params, batch, KEY)[1]
        assert float(alone[objective.name]) == float(together[objective.name])


# no more than a method needs


@pytest.mark.parametrize(
    ("objective", "passes", "regression"),
    [(r3f(lam=0), 1, False), (smart(alpha=0), 1, False), (lnsr(0, lam=0), 1, False), (r3f(), 1, True)],
    ids=["r3f", "smart", "lnsr", "r3f on regression"],
)
def test_what_does_not_count_is_not_computed_and_changes_no_bit(objective, passes, regression):
    params, batch = make_params(regression), make_batch(regression=regression)
    loss, metrics, grads, made = run_eagerly([(objective, None, 0)], params, batch, regression)
    assert len(made) == passes and float(metrics[objective.name]) == 0
    plain = make_loss_fn(toy, regression=regression)
    expected = jax.value_and_grad(lambda p: plain(p, batch, KEY)[0])(jax.tree.map(jnp.asarray, params))
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), expected)


def test_without_objectives_it_is_the_plain_loss():
    params, batch = jax.tree.map(jnp.asarray, make_params()), make_batch()
    loss, metrics = with_objectives(toy)(params, batch, KEY)
    assert float(loss) == float(make_loss_fn(toy)(params, batch, KEY)[0]) and metrics == {}


# the same, however the batch is split


SGD = optax.sgd(0.1)


def make_state(tx=SGD):
    return pats_jax.TrainState.create(apply_fn=toy, params=jax.tree.map(jnp.asarray, make_params()), tx=tx, key=0)


LOSS = with_objectives(toy, *EVERY)


@functools.cache
def one_device_step():
    return jax.jit(make_train_step(LOSS))


def assert_close(ours, expected, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, expected)


def test_what_stands_in_filler_rows_changes_nothing():
    batch = make_batch()
    other = {name: np.where(batch["weights"] > 0, x.T, make_batch(1)[name].T).T for name, x in batch.items()}
    other["weights"] = batch["weights"]
    assert np.any(other["input_ids"] != batch["input_ids"]) and np.any(other["labels"] != batch["labels"])
    (state, metrics), (expected, expected_metrics) = (one_device_step()(make_state(), b) for b in (other, batch))
    assert_close(state.params, expected.params, 1e-6)
    assert_close(metrics, expected_metrics, 2e-6)


def test_rows_without_weights_count_alike():
    batch = make_batch()
    del batch["weights"]
    params = jax.tree.map(jnp.asarray, make_params())
    expected = LOSS(params, batch | {"weights": np.full(ROWS, 0.5, np.float32)}, KEY)
    assert_close(LOSS(params, batch, KEY), expected, 1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_mesh_is_one_device(kind):
    expected, expected_metrics = one_device_step()(make_state(), make_batch())
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    with jax.set_mesh(mesh):
        state = jax.device_put(make_state(), everywhere)
        state, metrics = jax.jit(make_train_step(LOSS))(state, jax.device_put(make_batch(), rows))
    assert_close(jax.device_get(state.params), expected.params, 1e-5)
    assert_close(jax.device_get(metrics), expected_metrics, 1e-5)


@functools.cache
def value_and_grad():
    return jax.jit(jax.value_and_grad(LOSS, has_aux=True))


def combined(parts, keys):
    """The parameters after a step and the metrics, from the parts of a batch one by one, weighed by their weights."""
    state = make_state()
    total, weight = 0.0, 0.0
    for part, key in zip(parts, keys, strict=True):
        (loss, metrics), grads = value_and_grad()(state.params, part, key)
        part_weight = part["weights"].sum()
        if part_weight:
            sums = jax.tree.map(lambda x, w=part_weight: w * x, ({"loss": loss, **metrics}, grads))
            total = sums if weight == 0 else jax.tree.map(jnp.add, total, sums)
        weight += part_weight
    metrics, grads = jax.tree.map(lambda x: x / weight, total)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads), metrics


@pytest.mark.devices(8)
def test_pmap_is_the_mean_over_the_global_batch():
    """Every device draws its own noise, as it draws its own dropout: one device after the other gives the same."""
    dealt = {name: x.reshape(DEVICES, -1, *x.shape[1:]) for name, x in make_batch().items()}
    key = jax.random.fold_in(make_state().key, 0)
    parts = [{name: x[d] for name, x in dealt.items()} for d in range(DEVICES)]
    params, metrics = combined(parts, [jax.random.fold_in(key, d) for d in range(DEVICES)])
    step = jax.pmap(make_train_step(LOSS, axis_name="batch"), "batch", in_axes=(None, 0), out_axes=(None, None))
    state, ours = step(make_state(), dealt)
    assert not np.any(dealt["weights"][-1])
    assert_close(state.params, params, 1e-5)
    assert_close({name: ours[name] for name in metrics}, metrics, 1e-5)


def test_accumulation_is_the_mean_over_the_global_batch():
    batch, count = make_batch(), DEVICES
    key = jax.random.fold_in(make_state().key, 0)
    parts = [{name: x[start::count] for name, x in batch.items()} for start in range(count)]
    params, metrics = combined(parts, [jax.random.fold_in(key, index) for index in range(count)])
    state, ours = jax.jit(make_train_step(LOSS, accumulation_steps=count))(make_state(), batch)
    assert_close(state.params, params, 1e-5)
    assert_close({name: ours[name] for name in metrics}, metrics, 1e-5)


def test_with_an_optimizer_method_around_it():
    """PATS reads the gradient of the whole loss, and adds its noise to the same step."""
    step = jax.jit(make_train_step(with_objectives(toy, OBJECTIVES["r3f"][0])))
    noisy, metrics = step(make_state(pats_jax.pats(SGD, noise_scale=0.1, key=3)), make_batch())
    plain, expected = step(make_state(), make_batch())
    assert float(metrics["r3f"]) == float(expected["r3f"]) and "update_norm" in metrics
    gradient = jax.tree.map(lambda old, new: (old - new) / 0.1, make_params(), plain.params)
    sensitivity = jax.tree.map(lambda p, g: np.abs(p * g), make_params(), gradient)
    assert_close(pats_jax.sensitivity(noisy.opt_state), sensitivity, 1e-4)
    assert all(np.any(a != b) for a, b in zip(noisy.params.values(), plain.params.values(), strict=True))


# the models


@pytest.mark.parametrize(
    "chosen",
    [(r3f(eps=0.01), lnsr(0)), pytest.param((smart(step_size=0.01, noise_std=0.01), lnsr(0)), marks=pytest.mark.slow)],
    ids=["R3F", "SMART"],
)
def test_the_models_offer_what_objectives_need(chosen):
    """Under gradient checkpointing; and what stands in the padding changes nothing. R-Drop asks for no more."""
    model = models.SequenceClassifier(tiny.CONFIG, gradient_checkpointing=True)
    loss_fn = with_objectives(model.apply, *chosen, deterministic=True)  # dropout takes long to compile
    step = model_parity.quick_jit(jax.value_and_grad(loss_fn, has_aux=True))

    params, batch = tiny.random_params(tiny.CONFIG), make_batch()
    batch["labels"] %= tiny.CONFIG.num_labels
    (loss, metrics), grads = step(params, batch, KEY)
    assert all(float(metrics[objective.name]) > 0 for objective in chosen)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    batch["input_ids"] = np.where(batch["attention_mask"], batch["input_ids"], WORDS + 1)
    assert_close(step(params, batch, KEY), ((loss, metrics), grads), 1e-5)


# mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: r3f(lam=-1.0), "lam=-1.0 must be at least 0"),
        (lambda: r3f(eps=0.0), "eps=0.0 must be above 0"),
        (lambda: r_drop(alpha="much"), "alpha='much' must be at least 0"),
        (lambda: smart(alpha=-1), "alpha=-1 must be at least 0"),
        (lambda: smart(step_size=0), "step_size=0 must be above 0"),
        (lambda: smart(noise_std=0), "noise_std=0 must be above 0"),
        (lambda: smart(eps=float("nan")), "eps=nan must be above 0"),
        (lambda: lnsr(-1), "layer=-1 must be"),
        (lambda: lnsr(1.0), "layer=1.0 must be"),
        (lambda: lnsr(0, noise_std=-0.1), "noise_std=-0.1 must be above 0"),
        (lambda: with_objectives(toy, lnsr(2))(make_params(), make_batch(), KEY), "layer=2 has no layer above, of 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
