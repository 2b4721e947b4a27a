"""Each objective, value and gradient, against NumPy in float64; and the same however the batch is split."""

import functools

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_models import load

import pats_jax
from pats_jax import lnsr, make_loss_fn, make_train_step, objectives, r3f, r_drop, smart, with_objectives
from pats_jax.random import fast_key

DEVICES = 8
ROWS, LENGTH, WORDS, HIDDEN, CLASSES = 16, 4, 6, 3, 3


def toy(variables, input_ids=None, attention_mask=None, *, record=lambda **draws: None, method=None, **options):
    """Two layers without biases and the mean of their tokens, with dropout; ``record`` is told what a pass was given.

    Hidden state 0 is the word embeddings; every pass reports its embeddings, its hidden state and what dropout left.
    """
    params = variables["params"]
    if method == "embed":
        return params["table"][input_ids]
    states = [params["table"][input_ids] if input_ids is not None else options.get("inputs_embeds")]
    first, states[0] = options.get("continue_from", (0, states[0]))
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
