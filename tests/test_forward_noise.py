"""NEFTune and HyPe: what they draw, and loss and gradient of a step with it, against NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import hype, lnsr, make_loss_fn, make_train_step, methods, models, neftune, r3f, with_objectives
from pats_jax.models import stack_layers
from pats_jax.random import fast_key
from pats_jax.run.settings import Settings

ROWS, LENGTH, WORDS, HIDDEN, CLASSES, LAYERS = 8, 6, 9, 40, 3, 2
KEY = fast_key(5)


def toy(variables, input_ids=None, attention_mask=None, *, record=lambda *read: None, method=None, **options):
    """Layers tanh(h W) and the mean of their tokens; ``record`` is told what each layer read."""
    params = variables["params"]
    hidden = options.get("inputs_embeds")
    if input_ids is not None:
        hidden = params["table"][input_ids]
    if method == "embed":
        return hidden
    first, hidden = options.get("continue_from", (0, hidden))
    states = [hidden]
    for number in range(first, LAYERS):
        read = options.get("perturb", lambda _, h: h)(number, states[-1])
        jax.debug.callback(functools.partial(record, number), read)
        states.append(jnp.tanh(read @ params["layers"][number]))
    pooled = (states[-1] * attention_mask[..., None]).sum(1) / attention_mask.sum(1)[:, None]
    logits = pooled @ params["head"]
    return (logits, tuple(states)) if options.get("output_hidden_states") else logits


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, HIDDEN), "layers": (LAYERS, HIDDEN, HIDDEN), "head": (HIDDEN, CLASSES)}
    return {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(HIDDEN), jnp.float32) for name, shape in shapes.items()}


def make_batch():
    """Rows of 1 to LENGTH tokens."""
    rng = np.random.default_rng(1)
    lengths = np.arange(ROWS)[:, None] % LENGTH + 1
    return {
        "input_ids": rng.integers(WORDS, size=(ROWS, LENGTH), dtype=np.int32),
        "attention_mask": (np.arange(LENGTH) < lengths).astype(np.int32),
        "labels": rng.integers(CLASSES, size=ROWS),
        "weights": np.float32(rng.random(ROWS)),
    }


def run(*parts, **options):
    """Loss, gradient, and what each layer read in each pass, in order."""
    reads = []
    apply = functools.partial(toy, record=lambda number, read: reads.append((int(number), np.float64(read))))
    loss_fn = with_objectives(apply, *parts, **options)
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(make_params(), make_batch(), KEY)
    jax.effects_barrier()
    return loss, grads, reads


def numpy_loss(params, batch, noise):
    """The loss with a given noise on the input of each layer, (layers, rows, length, hidden)."""
    mask = batch["attention_mask"]
    hidden = params["table"][batch["input_ids"]]
    for layer, added in zip(params["layers"], noise, strict=True):
        hidden = np.tanh((hidden + added) @ layer)
    logits = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None] @ params["head"]
    costs = np.log(np.exp(logits).sum(1)) - logits[np.arange(ROWS), batch["labels"]]
    return (batch["weights"] * costs).sum() / batch["weights"].sum()


def noise_of(reads):
    """The noise on what each layer read, by NumPy's own pass through the layers before."""
    params, batch = jax.tree.map(np.float64, make_params()), make_batch()
    clean, found = params["table"][batch["input_ids"]], []
    for layer, (_, read) in zip(params["layers"], reads, strict=True):
        found.append(read - clean)
        clean = np.tanh(read @ layer)
    return np.stack(found)


@pytest.mark.parametrize(
    "view", [neftune(2.0), hype(0.3), hype(0.3, "uniform")], ids=["neftune", "hype", "uniform hype"]
)
def test_loss_and_gradient_are_those_of_noise_that_is_constant(view):
    loss, grads, reads = run(view)
    assert [number for number, _ in reads] == [0, 1]
    params, batch, noise = jax.tree.map(np.float64, make_params()), make_batch(), noise_of(reads)
    np.testing.assert_allclose(loss, numpy_loss(params, batch, noise), rtol=2e-6)
    rng = np.random.default_rng(2)
    for name, values in params.items():
        direction = rng.normal(size=values.shape)
        up, down = (numpy_loss(params | {name: values + s * direction}, batch, noise) for s in (1e-5, -1e-5))
        np.testing.assert_allclose(np.sum(grads[name] * direction), (up - down) / 2e-5, rtol=1e-3, err_msg=name)


def test_neftune_counts_the_tokens_of_each_row_and_leaves_padding_alone():
    first, second = noise_of(run(neftune(3.0))[2])
    mask = make_batch()["attention_mask"]
    np.testing.assert_allclose(second, 0, atol=1e-6)
    np.testing.assert_array_equal(first[mask == 0], 0)
    widths = 3.0 / np.sqrt(mask.sum(1) * HIDDEN)
    for row, width, tokens in zip(first, widths, mask, strict=True):
        entries = row[tokens == 1]
        assert 0.8 * width < np.abs(entries).max() <= width * (1 + 1e-5)
        assert entries.std() == pytest.approx(width / np.sqrt(3), rel=0.2) and abs(entries.mean()) < 0.3 * width


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_hype_draws_symmetric_noise_for_each_layer(distribution):
    noise = noise_of(run(hype(0.3, distribution))[2])
    for layer in noise:
        assert layer.std() == pytest.approx(0.3 if distribution == "normal" else 0.3 / np.sqrt(3), rel=0.05)
        assert abs(layer.mean()) < 0.03 and (np.abs(layer).max() <= 0.3 + 1e-6) == (distribution == "uniform")
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.08


@pytest.mark.parametrize("view", [neftune(0), hype(0.0)], ids=["neftune", "hype"])
def test_no_noise_is_plain_fine_tuning_bit_for_bit(view):
    plain = make_loss_fn(toy)
    expected = jax.value_and_grad(lambda p: plain(p, make_batch(), KEY)[0])(make_params())
    jax.tree.map(np.testing.assert_array_equal, run(view)[:2], expected)


def test_the_noise_of_a_view_does_not_depend_on_objectives_and_each_pass_has_its_own():
    (_, alone), _ = run(neftune())[2]
    (_, plain), (_, noised) = [read for read in run(neftune(), r3f(eps=1e-3))[2] if read[0] == 0]
    np.testing.assert_array_equal(alone, plain)
    assert np.abs(noised - plain)[make_batch()["attention_mask"] == 1].max() > 0.1  # R3F alone adds at most 1e-3


def test_lnsr_compares_passes_with_the_same_noise_in_the_layers():
    reads = run(hype(0.2), lnsr(0, noise_std=1e-6))[2]
    for (number, plain), (other, noised) in zip(reads[:LAYERS], reads[LAYERS:], strict=True):
        assert number == other
        np.testing.assert_allclose(noised, plain, atol=1e-4)


def test_a_jitted_step_with_pats_around_it():
    chosen = methods.chosen_objectives(Settings(method="pats+neftune+hype", hype_noise=0.1, neftune_alpha=2.0).methods)
    step = jax.jit(make_train_step(with_objectives(toy, *chosen)))
    tx = pats_jax.pats(optax.sgd(0.1), noise_scale=0.1, key=3)
    state = pats_jax.TrainState.create(apply_fn=toy, params=make_params(), tx=tx, key=0)
    after, metrics = step(state, make_batch())
    grads = jax.grad(lambda p: with_objectives(toy, *chosen)(p, make_batch(), jax.random.fold_in(state.key, 0))[0])
    expected = jax.tree.map(lambda p, g: np.abs(p * g), make_params(), grads(make_params()))
    found = pats_jax.sensitivity(after.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected)
    assert float(step(after, make_batch())[1]["loss"]) != float(metrics["loss"]) and "task_loss" not in metrics


@pytest.mark.parametrize(
    "form",
    [{}, {"layers": "stacked"}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_layer_of_the_models_reads_what_perturb_gives_it(form):
    """Hidden state by hidden state: each from the one before, changed from outside."""
    config = dataclasses.replace(tiny.CONFIG, num_hidden_layers=2)
    model, params = models.SequenceClassifier(config, **form), tiny.random_params(config)
    params = stack_layers(params) if "layers" in form else params
    ids = jnp.arange(8).reshape(2, 4) % 5 + 1

    def perturb(number, hidden):
        return hidden + 0.5 * (number + 1) * jnp.cos(jnp.arange(hidden.shape[-1]))

    def run(params, ids):
        return model.apply({"params": params}, ids, output_hidden_states=True, perturb=perturb)

    def from_layer(params, number, hidden):
        plain = models.SequenceClassifier(config)
        return plain.apply({"params": params}, continue_from=(number, hidden), output_hidden_states=True)

    logits, states = model_parity.quick_jit(run)(params, ids)
    _, after_first = from_layer(tiny.random_params(config), 0, perturb(0, states[0]))
    np.testing.assert_allclose(states[1], after_first[1], atol=1e-5)
    expected, _ = from_layer(tiny.random_params(config), 1, perturb(1, states[1]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: neftune(-1.0), "alpha=-1.0 must be at least 0"),
        (lambda: hype(-1e-5), "noise_scale=-1e-05 must be at least 0"),
        (lambda: hype(distribution="one-sided"), "distribution='one-sided' is not one of 'normal', 'uniform'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
