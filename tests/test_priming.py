"""Multi-task and meta-learning as losses: gradients against NumPy's, and their training on one device and several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import make_train_step
from pats_jax.priming import meta_losses
from pats_jax.training import runners

TASKS, ROWS, INPUTS, HIDDEN = 4, 5, 3, 4
RATE = 0.3  # large, so that the second-order term is
ONLY_BIASES = {"first": {"kernel": False, "bias": True}, "second": {"kernel": False, "bias": True}}


def loss_fn(params, batch, key):
    """The squared error of a network of two layers; its dropout is on if the batch says so."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    if "dropout" in batch:
        hidden *= jax.random.bernoulli(key, 0.7, hidden.shape)
    found = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    return jnp.mean(jnp.square(found - batch["y"])), {"mean_output": jnp.mean(found)}


def start() -> dict:
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (INPUTS, HIDDEN), "bias": (HIDDEN,)}, "second": {"kernel": (HIDDEN,), "bias": ()}}
    return jax.tree.map(lambda s: np.asarray(rng.normal(size=s)), shapes, is_leaf=lambda x: isinstance(x, tuple))


def make_batch(inner_steps: int = 1, tasks: int = TASKS, seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"support_": (tasks, inner_steps, ROWS), "query_": (tasks, ROWS)}
    return {
        prefix + name: rng.normal(size=(*shape, *own))
        for prefix, shape in shapes.items()
        for name, own in (("x", (INPUTS,)), ("y", ()))
    }


def in_float32(tree):
    return jax.tree.map(jnp.float32, tree)


# the same in NumPy


def numpy_loss(params, x, y) -> float:
    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return np.mean((hidden @ params["second"]["kernel"] + params["second"]["bias"] - y) ** 2)


def numpy_gradient(params, x, y) -> dict:
    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    error = 2 / len(y) * (hidden @ params["second"]["kernel"] + params["second"]["bias"] - y)
    before = np.outer(error, params["second"]["kernel"]) * (1 - hidden**2)
    return {
        "first": {"kernel": x.T @ before, "bias": before.sum(axis=0)},
        "second": {"kernel": error @ hidden, "bias": error.sum()},
    }


def numpy_adapt(params, batch, task, moves=None, rate=RATE) -> tuple[dict, list[float]]:
    """Parameters after SGD on a task's support batches, and the loss before each step."""
    moves, losses = moves or jax.tree.map(lambda _: True, params), []
    for x, y in zip(batch["support_x"][task], batch["support_y"][task], strict=True):
        losses.append(numpy_loss(params, x, y))
        gradient = numpy_gradient(params, x, y)
        params = jax.tree.map(lambda p, g, move: p - rate * g if move else p, params, gradient, moves)
    return params, losses


def numpy_objective(params, batch, moves=None) -> float:
    """MAML's."""
    parts = zip(batch["query_x"], batch["query_y"], strict=True)
    return np.mean([numpy_loss(numpy_adapt(params, batch, task, moves)[0], *q) for task, q in enumerate(parts)])


def central_differences(function, params, step: float = 1e-5) -> dict:
    leaves, structure = jax.tree.flatten(params)

    def slope(number, place):
        values = []
        for sign in (1, -1):
            moved = [leaf.copy() for leaf in leaves]
            moved[number][place] += sign * step
            values.append(function(structure.unflatten(moved)))
        return (values[0] - values[1]) / (2 * step)

    slopes = [
        np.array([slope(number, place) for place in np.ndindex(leaf.shape)]).reshape(leaf.shape)
        for number, leaf in enumerate(leaves)
    ]
    return structure.unflatten(slopes)


def mean_over_tasks(function):
    trees = [function(task) for task in range(TASKS)]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)


def gradient_in_float64(meta_loss, batch) -> dict:
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(meta_loss, has_aux=True))(start(), batch, jax.random.key(0))[0]
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(gradient))
        return jax.device_get(gradient)


def assert_close(found, expected, tolerance=1e-6):
    """Each leaf's distance, relative to its own size."""
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert distance < tolerance, (jax.tree_util.keystr(path), distance)


def distance(one, other) -> float:
    """Relative, of whole trees."""
    gap = optax.tree.norm(jax.tree.map(lambda a, b: a - b, one, other)) / optax.tree.norm(other)
    return float(gap)


def test_gradient_by_hand_is_that_of_differences():
    x, y = make_batch()["query_x"][0], make_batch()["query_y"][0]
    expected = central_differences(lambda params: numpy_loss(params, x, y), start())
    assert_close(numpy_gradient(start(), x, y), expected)


# MAML and its first-order form


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_maml_differentiates_through_the_inner_steps(inner_steps, remat):
    batch = make_batch(inner_steps)
    found = gradient_in_float64(meta_losses.maml(loss_fn, inner_learning_rate=RATE, remat=remat), batch)
    assert_close(found, central_differences(lambda params: numpy_objective(params, batch), start()))


def test_maml_moves_what_is_trainable_only():
    """The frozen leaves have the gradient of a loss that their inner steps leave them in."""
    batch = make_batch(2)
    found = gradient_in_float64(meta_losses.maml(loss_fn, inner_learning_rate=RATE, trainable=ONLY_BIASES), batch)
    expected = central_differences(lambda params: numpy_objective(params, batch, ONLY_BIASES), start())
    assert_close(found, expected)
    assert distance(found, gradient_in_float64(meta_losses.maml(loss_fn, inner_learning_rate=RATE), batch)) > 0.01


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("moves", [None, ONLY_BIASES], ids=["all", "biases"])
def test_first_order_gradient_is_the_query_gradient_at_the_adapted_parameters(moves, remat):
    batch = make_batch(3)
    meta_loss = meta_losses.make_meta_loss("fomaml", loss_fn, inner_learning_rate=RATE, trainable=moves, remat=remat)
    found = gradient_in_float64(meta_loss, batch)

    def of_task(task):
        adapted, _ = numpy_adapt(start(), batch, task, moves)
        return numpy_gradient(adapted, batch["query_x"][task], batch["query_y"][task])

    assert_close(found, mean_over_tasks(of_task))
    maml = meta_losses.make_meta_loss("maml", loss_fn, inner_learning_rate=RATE, trainable=moves)
    assert distance(found, gradient_in_float64(maml, batch)) > 0.01


def test_first_order_objective_takes_inner_gradients_for_constants():
    batch = make_batch()
    steps = [jax.tree.map(lambda p, a: p - a, start(), numpy_adapt(start(), batch, task)[0]) for task in range(TASKS)]

    def objective(params):
        moved = [jax.tree.map(lambda p, s: p - s, params, step) for step in steps]
        return np.mean(list(map(numpy_loss, moved, batch["query_x"], batch["query_y"])))

    found = gradient_in_float64(meta_losses.maml(loss_fn, inner_learning_rate=RATE, first_order=True), batch)
    assert_close(found, central_differences(objective, start()))


@pytest.mark.parametrize("algorithm", ["maml", "fomaml"])
def test_values_are_means_over_tasks(algorithm):
    batch = make_batch(2)
    meta_loss = meta_losses.make_meta_loss(algorithm, loss_fn, inner_learning_rate=RATE)
    with jax.enable_x64(True):
        loss, metrics = jax.device_get(jax.jit(meta_loss)(start(), batch, jax.random.key(0)))
    assert loss == pytest.approx(numpy_objective(start(), batch), rel=1e-9)
    adapted = [numpy_adapt(start(), batch, task) for task in range(TASKS)]
    assert metrics["support_loss"] == pytest.approx(np.mean([losses[0] for _, losses in adapted]), rel=1e-9)
    outputs = [
        np.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) @ p["second"]["kernel"] + p["second"]["bias"]
        for (p, _), x in zip(adapted, batch["query_x"], strict=True)
    ]
    assert metrics["mean_output"] == pytest.approx(np.mean(outputs), rel=1e-9)
    assert set(metrics) == {"support_loss", "mean_output"}


def test_remat_recomputes():
    def remats(**options):
        meta_loss = meta_losses.maml(loss_fn, inner_learning_rate=RATE, **options)
        return str(jax.make_jaxpr(meta_loss)(start(), make_batch(2), jax.random.key(0))).count("prevent_cse")

    assert remats() == 0 and remats(remat=True) == 2  # an inner step, the query


@pytest.mark.parametrize("moves", [None, ONLY_BIASES], ids=["all", "biases"])
def test_adapted_parameters_are_those_of_plain_sgd(moves):
    batch = make_batch(3)
    rows = {name.removeprefix("support_"): x[0] for name, x in batch.items() if name.startswith("support_")}
    expected, losses = numpy_adapt(start(), batch, 0, moves)
    with jax.enable_x64(True):
        found, found_losses = jax.device_get(
            meta_losses.adapt(loss_fn, start(), rows, jax.random.key(0), learning_rate=RATE, trainable=moves)
        )
    assert_close(found, expected, 1e-12)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-12)
    if moves:
        assert np.array_equal(found["first"]["kernel"], start()["first"]["kernel"])


# Reptile


def test_reptile_gradient_is_how_far_the_parameters_have_moved():
    batch = make_batch(3)
    del batch["query_x"], batch["query_y"]
    expected = mean_over_tasks(
        lambda task: jax.tree.map(lambda p, a: (p - a) / RATE, start(), numpy_adapt(start(), batch, task)[0])
    )
    meta_loss = meta_losses.reptile(loss_fn, inner_learning_rate=RATE)
    assert_close(gradient_in_float64(meta_loss, batch), expected)
    with jax.enable_x64(True):
        loss, metrics = jax.jit(meta_loss)(start(), batch, jax.random.key(0))
    losses = np.array([numpy_adapt(start(), batch, task)[1] for task in range(TASKS)])
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-9)
    assert set(metrics) == {"support_loss"}
    assert float(metrics["support_loss"]) == pytest.approx(losses[:, 0].mean(), rel=1e-9)


def test_reptile_does_not_move_frozen_leaves():
    batch = make_batch(2)
    found = gradient_in_float64(meta_losses.reptile(loss_fn, inner_learning_rate=RATE, trainable=ONLY_BIASES), batch)
    expected = mean_over_tasks(
        lambda task: jax.tree.map(
            lambda p, a: (p - a) / RATE, start(), numpy_adapt(start(), batch, task, ONLY_BIASES)[0]
        )
    )
    for layer in ("first", "second"):
        assert not found[layer]["kernel"].any()
        np.testing.assert_allclose(found[layer]["bias"], expected[layer]["bias"], rtol=1e-6)


def test_reptile_with_sgd_goes_part_of_the_way_to_the_mean_of_the_adapted_parameters():
    batch, part = make_batch(3), 0.5
    adapted = mean_over_tasks(lambda task: numpy_adapt(start(), batch, task)[0])
    expected = jax.tree.map(lambda p, a: p + part * (a - p), start(), adapted)
    step = jax.jit(make_train_step(meta_losses.reptile(loss_fn, inner_learning_rate=RATE)))
    state, metrics = step(new_state(optax.sgd(part * RATE)), in_float32(batch))
    assert_close(jax.device_get(state.params), expected, 1e-5)
    assert float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("rate", [1.0, 1e-5, 1e-9])
def test_one_step_of_reptile_is_multi_task_learning_at_any_inner_rate(rate):
    """In float32 too, in which theta and theta - 1e-9 * gradient are the same number."""
    batch = in_float32(make_batch(1))
    same_rows = {f"query_{name}": batch[f"support_{name}"][:, 0] for name in "xy"}
    arguments = in_float32(start()), jax.random.key(0)
    reptile, mtl = (
        jax.jit(jax.grad(lambda p, key, loss=loss, rows=rows: loss(p, rows, key)[0]))(*arguments)
        for loss, rows in (
            (meta_losses.reptile(loss_fn, inner_learning_rate=rate), batch),
            (meta_losses.make_meta_loss("mtl", loss_fn), same_rows),
        )
    )
    assert_close(jax.device_get(reptile), jax.device_get(mtl), 1e-5)


# multi-task learning


def test_multi_task_learning_is_the_mean_of_the_tasks_gradients():
    batch = make_batch()
    found = gradient_in_float64(meta_losses.make_meta_loss("mtl", loss_fn, inner_learning_rate=RATE), batch)
    assert_close(
        found, mean_over_tasks(lambda task: numpy_gradient(start(), batch["query_x"][task], batch["query_y"][task]))
    )


def test_multi_task_learning_on_one_task_is_plain_training():
    batch = in_float32(make_batch(tasks=1))
    plain = {"x": batch["query_x"][0], "y": batch["query_y"][0]}
    found, metrics = jax.jit(make_train_step(meta_losses.multi_task(loss_fn)))(new_state(optax.adamw(0.1)), batch)
    expected, own = jax.jit(make_train_step(loss_fn))(new_state(optax.adamw(0.1)), plain)
    assert set(metrics) == set(own)
    for ours, theirs in zip(jax.tree.leaves((found, metrics)), jax.tree.leaves((expected, own)), strict=True):
        assert np.array_equal(as_numbers(ours), as_numbers(theirs))


def as_numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


# training


def new_state(tx, trainable=None):
    return pats_jax.TrainState.create(apply_fn=None, params=in_float32(start()), tx=tx, key=0, trainable=trainable)


def noisy(noise_scale=0.05):
    """PATS on the kernel of the first layer."""
    mask = {"first": {"kernel": True, "bias": False}, "second": {"kernel": False, "bias": False}}
    return pats_jax.pats(optax.adamw(1e-2), noise_scale=noise_scale, key=3, mask=mask)


def with_dropout(batch):
    return batch | {f"{prefix}dropout": np.ones(batch[f"{prefix}y"].shape) for prefix in ("support_", "query_")}


def train(algorithm, devices=1, steps=4, **options):
    meta_loss = meta_losses.make_meta_loss(algorithm, loss_fn, inner_learning_rate=RATE)
    runner = runners.make_runner(num_devices=devices)

    create = functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=noisy(), key=0)
    state = runner.create_state(create, in_float32(start()))
    step = runner.compile_step(make_train_step(meta_loss, **options), state)
    for number in range(steps):
        batch = make_batch(2, seed=number)
        batch = batch if options else with_dropout(batch)  # micro-batches have dropout of their own
        state, metrics = step(state, {name: np.float32(x) for name, x in batch.items()})
    return runner.to_host(state.params), jax.device_get(metrics)


@pytest.mark.parametrize(
    "algorithm", ["mtl", "maml", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fomaml", "reptile"))]
)
def test_several_devices_train_as_one_does(algorithm):
    """With dropout, whose draws are the tasks' own wherever they are, and PATS on AdamW."""
    params, metrics = train(algorithm)
    assert np.abs(params["first"]["kernel"] - start()["first"]["kernel"]).max() > 0.01
    for devices in (2, 4):
        found, own = train(algorithm, devices)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        assert own.keys() == metrics.keys()
        assert float(own["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", meta_losses.ALGORITHMS)
def test_micro_batches_of_tasks_are_the_whole_batch(algorithm):
    found, expected = (train(algorithm, accumulation_steps=parts)[0] for parts in (2, 1))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", meta_losses.ALGORITHMS)
def test_noise_changes_its_own_leaves_only(algorithm):
    step = jax.jit(make_train_step(meta_losses.make_meta_loss(algorithm, loss_fn, inner_learning_rate=RATE)))
    states = [step(new_state(noisy(scale)), in_float32(make_batch()))[0] for scale in (0.05, 0.0)]
    with_noise, without = (jax.device_get(state.params) for state in states)
    assert (with_noise["first"]["kernel"] != without["first"]["kernel"]).mean() > 0.25  # those of low sensitivity
    without["first"]["kernel"] = with_noise["first"]["kernel"]
    assert all(map(np.array_equal, jax.tree.leaves(with_noise), jax.tree.leaves(without)))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", meta_losses.ALGORITHMS)
def test_frozen_leaves_stay_in_training(algorithm):
    meta_loss = meta_losses.make_meta_loss(algorithm, loss_fn, inner_learning_rate=RATE, trainable=ONLY_BIASES)
    state, metrics = jax.jit(make_train_step(meta_loss))(
        new_state(optax.adamw(0.1), ONLY_BIASES), in_float32(make_batch(2))
    )
    before = in_float32(start())
    for layer in ("first", "second"):
        assert state.params[layer]["kernel"] is None
        assert np.array_equal(state.all_params[layer]["kernel"], before[layer]["kernel"])
        assert not np.any(state.all_params[layer]["bias"] == before[layer]["bias"])
    assert np.isfinite(float(metrics["grad_norm"]))


# dropout


def drawn_loss(params, batch, key):
    """Its gradient at the task's own parameter is what it draws."""
    return params[batch["task"][0]] * jax.random.uniform(key), {}


@pytest.mark.parametrize("key", [jax.random.key(5), pats_jax.random.as_key(5)], ids=["JAX", "fast"])
def test_every_inner_step_draws_anew(key):
    rows = {"task": np.zeros((6, 1), int)}
    _, losses = meta_losses.adapt(drawn_loss, jnp.ones(1), rows, key, learning_rate=1e-9)
    assert len(set(losses.tolist())) == 6
    assert np.ptp(losses) > 0.1


@pytest.mark.parametrize("algorithm", meta_losses.ALGORITHMS)
@pytest.mark.parametrize("key", [jax.random.key(5), pats_jax.random.as_key(5)], ids=["JAX", "fast"])
def test_every_task_draws_anew_and_the_query_too(algorithm, key):
    tasks = np.arange(6)[:, None]
    batch = {"query_task": tasks, "support_task": tasks[:, None]}
    meta_loss = meta_losses.make_meta_loss(algorithm, drawn_loss, inner_learning_rate=1e-9)
    (loss, metrics), draws = jax.value_and_grad(meta_loss, has_aux=True)(jnp.ones(6), batch, key)
    assert len(set(draws.tolist())) == 6
    assert np.ptp(6 * draws) > 0.1
    if algorithm in ("maml", "fomaml"):
        assert abs(float(loss - metrics["support_loss"])) > 1e-3


# mistakes


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
@pytest.mark.parametrize("rate", [0, -1e-5, float("nan"), "1e-5", None])
def test_inner_learning_rates_that_are_none(algorithm, rate):
    with pytest.raises(ValueError) as caught:
        meta_losses.make_meta_loss(algorithm, loss_fn, inner_learning_rate=rate)
    assert str(caught.value) == f"inner_learning_rate={rate!r} must be greater than 0"


def test_an_algorithm_that_there_is_not():
    with pytest.raises(ValueError) as caught:
        meta_losses.make_meta_loss("anil", loss_fn)
    assert str(caught.value) == "algorithm='anil' is not one of 'mtl', 'maml', 'fomaml', 'reptile'"


def test_every_algorithm_has_a_line():
    for algorithm, summary in meta_losses.ALGORITHMS.items():
        meta_losses.make_meta_loss(algorithm, loss_fn)
        assert summary and "\n" not in summary


@pytest.mark.parametrize(
    "algorithm, there, missing",
    [
        ("mtl", "support_", "query_"),
        ("maml", "query_", "support_"),
        ("fomaml", "support_", "query_"),
        ("reptile", "query_", "support_"),
        ("reptile", "", "support_"),
    ],
)
def test_batches_without_what_the_algorithm_reads(algorithm, there, missing):
    batch = {name.replace("query_", there): x for name, x in make_batch().items() if name.startswith("query_")}
    with pytest.raises(ValueError) as caught:
        meta_losses.make_meta_loss(algorithm, loss_fn)(in_float32(start()), batch, jax.random.key(0))
    assert str(caught.value) == f"the batch has no arrays named {missing}...; it has {there}x, {there}y"
