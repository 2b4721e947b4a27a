"""Lanes against the same runs alone, and one that diverges among others."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import methods, models, objectives, train_state
from pats_jax.data import batches, readers
from pats_jax.errors import InputError
from pats_jax.models.layout import unstack_layers
from pats_jax.training import lanes

BATCH = 8
BOUNDARIES = [7, 11]
RATES = {"hidden_dropout": 0.0, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    tiny.save_checkpoint(folder / "model")
    tiny.write_sst2(folder / "data")
    return folder


@pytest.fixture(scope="module")
def data(home):
    splits = readers.load_task("sst2", home / "data")
    return {name: (batches.tokenize(split, tiny.tokenizer(), 16), split.labels) for name, split in splits.items()}


def load(home, seed, layers="separate"):
    """A model with dropout in attention and before the head, or everywhere."""
    return models.from_pretrained(home / "model", num_labels=2, key=seed, layers=layers, **RATES)


def settings(home, **changes):
    return tiny.Settings(model_name_or_path=str(home / "model"), task_name="sst2", learning_rate=1e-3, **changes)


def in_lanes(
    home,
    data,
    runs,
    steps,
    eval_steps=100,
    layers="separate",
    boundaries=BOUNDARIES,
    kind=lanes.LaneProgram,
    **program,
):
    """Trains all runs in lanes."""
    model, params, config = load(home, 0, layers)
    own = models.new_layers(home / "model", config, keys=[run.seed for run in runs])
    arrays, rates = lanes.lane_arrays(runs), lanes.rate_table(runs[0].optimizer, steps, 64)
    lane_program = kind(model.apply, runs[0], steps, **program)
    frozen = lane_program.split(params)[1]
    train = lanes.lane_batches(*data["train"], BATCH, boundaries, [run.seed for run in runs], steps)
    dev = list(batches.eval_batches(data["dev_tokens"], None, BATCH, boundaries))
    with contextlib.closing(lanes.CompiledLanes(lane_program, params, own, arrays, rates)) as compiled:
        state = compiled.init(params, own, arrays, rates)
        return lanes.fit(compiled, state, arrays, frozen, rates, train, dev, eval_steps)


@pytest.fixture(scope="module")
def dataset(data):
    return {"train": data["train"], "dev_tokens": data["validation"][0]}


def alone(home, data, run, steps, boundaries=BOUNDARIES, make_optimizer=methods.make_optimizer):
    """The same run by the library's own parts: the parameters at the end, losses, logits of the dev rows."""
    model, params, _ = load(home, run.seed)
    tx = make_optimizer(run.optimizer, run.methods, steps, params, seed=run.seed)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=run.seed)
    loss_fn = objectives.with_objectives(model.apply, *methods.chosen_objectives(run.methods))
    gradient = methods.chosen_gradient(run.methods)
    step = jax.jit(train_state.make_train_step(loss_fn, skip_nonfinite=True, gradient=gradient))
    found, epoch = [], 0
    while len(found) < steps:
        for batch in batches.train_batches(*data["train"], BATCH, boundaries, seed=run.seed, epoch=epoch):
            if len(found) < steps:
                state, metrics = step(state, batch)
                found.append(float(metrics["loss"]))
        epoch += 1
    everything = batches.fill_batch(data["dev_tokens"], None, np.arange(10), 10, 11)
    return state.params, found, jax.jit(train_state.make_predict_step(model.apply))(state.params, everything)


def assert_close(params, of_run, lane, atol=2e-4):
    """Key biases are left out: their gradient is zero in exact arithmetic, and Adam magnifies rounding there."""
    of_lane = jax.tree_util.tree_leaves_with_path(lanes.lane_of(params, lane))
    for (path, ours), theirs in zip(of_lane, jax.tree.leaves(of_run), strict=True):
        if not train_state.parameter_name(path).endswith("self.key.bias"):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.slow  # test_glue_lanes.py has a run of two methods
@pytest.mark.parametrize(
    "layers, boundaries, hidden_dropout, in_turns",
    [
        ("separate", BOUNDARIES[-1:], 0.0, False),
        ("separate", BOUNDARIES, 0.1, False),
        ("separate", BOUNDARIES, 0.1, True),
        ("stacked", BOUNDARIES, 0.1, False),
        ("stacked", BOUNDARIES, 0.1, True),
    ],
)
def test_a_lane_is_the_run_alone(home, dataset, layers, boundaries, hidden_dropout, in_turns, monkeypatch):
    monkeypatch.setitem(RATES, "hidden_dropout", hidden_dropout)
    shared = dict(method="pats+r-drop")
    runs = [
        settings(home, seed=3, noise_scale=0.1, **shared),
        settings(home, seed=2**40, noise_scale=0.03, response="reversed", weight_decay=0.1, decay=0.5, **shared),
        settings(home, seed=3, noise_scale=0.1, response="constant", r_drop_alpha=3.0, **shared),
    ]
    responses = ("linear", "reversed", "constant")
    of_set = {"layers": layers, "boundaries": boundaries, "responses": responses, "in_turns": in_turns}
    trained = in_lanes(home, dataset, runs, 15, eval_steps=7, **of_set)
    ended = trained.state.params
    if layers == "stacked":
        each = [unstack_layers(lanes.lane_of(ended, lane), 1) for lane in range(3)]
        ended = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    assert sorted(trained.logits) == [7, 14, 15] and not trained.diverged.any()
    for lane, run in enumerate(runs):
        params, losses, logits = alone(home, dataset, run, 15, boundaries)
        np.testing.assert_allclose(trained.metrics["loss"][:, lane], losses, rtol=1e-4)
        assert_close(ended, params, lane)
        np.testing.assert_allclose(trained.logits[15][lane], logits, rtol=0, atol=5e-3)
    kernels = ended["bert"]["encoder"]["layer"]["0"]["output"]["dense"]["kernel"]
    assert all(np.abs(kernels[a] - kernels[b]).max() > 1e-2 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pats+neftune+hype", "pats+rose+asam"])
@pytest.mark.parametrize("layers", ["separate", "stacked"])
def test_noise_in_the_forward_pass_rose_and_sam_in_lanes(home, dataset, method, layers):
    own = dict(neftune_alpha=1.0, hype_noise=0.01) if "hype" in method else dict(rose_quantile=0.5, asam_rho=0.1)
    runs = [settings(home, seed=seed, method=method, noise_scale=scale, **own) for seed, scale in ((3, 0.1), (4, 0.03))]
    trained = in_lanes(home, dataset, runs, 4, layers=layers, boundaries=BOUNDARIES[-1:])
    ended = trained.state.params
    if layers == "stacked":
        ended = jax.vmap(lambda params: unstack_layers(params, 1))(ended)
    for lane, run in enumerate(runs):
        params, losses, _ = alone(home, dataset, run, 4, BOUNDARIES[-1:])
        np.testing.assert_allclose(trained.metrics["loss"][:, lane], losses, rtol=1e-4)
        assert_close(ended, params, lane)


def sgd(settings, chosen, steps, params, *, seed, schedule=None, response=None):
    """Plain gradient descent with the noise of the settings."""
    rate = methods.learning_rate_schedule(settings, steps) if schedule is None else schedule
    (pats,) = chosen
    noise = {"noise_scale": pats.noise_scale, "decay": pats.decay, "response": response or pats.response}
    return pats_jax.pats(optax.sgd(rate), **noise, key=seed)


class SgdProgram(lanes.LaneProgram):
    def _optimizer(self, lane, rates, params):
        settings = self._settings(lane)
        rate = settings.optimizer.learning_rate
        return sgd(
            settings.optimizer,
            settings.methods,
            self.total_steps,
            params,
            seed=settings.seed,
            schedule=lambda t: rate * rates[t],
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, make_optimizer, atol", [(SgdProgram, sgd, 1e-5), (lanes.LaneProgram, methods.make_optimizer, 1e-3)]
)
def test_fifty_steps(home, dataset, kind, make_optimizer, atol):
    runs = [settings(home, seed=seed, method="pats", noise_scale=0.01 * seed) for seed in (1, 2, 3)]
    trained = in_lanes(home, dataset, runs, 50, kind=kind)
    for lane, run in enumerate(runs):
        params, losses, _ = alone(home, dataset, run, 50, make_optimizer=make_optimizer)
        np.testing.assert_allclose(trained.metrics["loss"][:, lane], losses, rtol=1e-3)
        assert_close(trained.state.params, params, lane, atol)


@pytest.mark.parametrize("bytes_of_lane, expected", [(10, 8), (30, 3), (99, 1), (1000, 1)])
def test_as_many_lanes_as_fit(bytes_of_lane, expected):
    asked = []

    def needed(number):
        asked.append(number)
        return 5 + bytes_of_lane * number

    assert lanes.fitting_lanes(8, needed, 100.0) == expected
    assert len(asked) <= 2


@pytest.mark.slow
def test_frozen_parameters_are_shared(home, dataset):
    runs = [settings(home, seed=seed, method="bitfit") for seed in (0, 1)]
    trained = in_lanes(home, dataset, runs, 4)
    layer = trained.state.params["bert"]["encoder"]["layer"]["0"]["output"]["dense"]
    assert layer["kernel"] is None and layer["bias"].shape == (2, 16)
    for lane, run in enumerate(runs):
        model, params, _ = load(home, run.seed)
        trainable = methods.trainable_mask(run.methods, params)
        moving, _ = train_state.trees.partition(trainable, params)
        tx = methods.make_optimizer(run.optimizer, run.methods, 4, moving, seed=run.seed)
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=tx, key=run.seed, trainable=trainable
        )
        step = jax.jit(train_state.make_train_step(train_state.make_loss_fn(model.apply), skip_nonfinite=True))
        train = batches.train_batches(*dataset["train"], BATCH, BOUNDARIES, seed=run.seed, epoch=0)
        for number, batch in enumerate(train):
            state, metrics = step(state, batch)
            np.testing.assert_allclose(trained.metrics["loss"][number, lane], metrics["loss"], rtol=1e-4)


@pytest.mark.slow
def test_noise_of_scale_0_is_no_noise(home, dataset):
    runs = [settings(home, seed=5, method="pats", noise_scale=scale) for scale in (0.0, 0.1)]
    plain, _, _ = alone(home, dataset, dataclasses.replace(runs[0], method="finetune"), 15)
    trained = in_lanes(home, dataset, runs, 15)
    assert_close(trained.state.params, plain, 0)


@pytest.mark.slow
@pytest.mark.parametrize("in_turns", [False, True])
def test_a_diverging_lane_is_frozen_and_reported(home, dataset, in_turns):
    def trained(rate):
        runs = [settings(home, seed=seed, method="pats", noise_scale=0.01) for seed in range(8)]
        runs[2] = dataclasses.replace(runs[2], learning_rate=rate)
        return in_lanes(home, dataset, runs, 45, in_turns=in_turns)

    good, bad = trained(1e-4), trained(1e3)
    assert not good.diverged.any() and bad.diverged.tolist() == [lane == 2 for lane in range(8)]
    others = np.arange(8) != 2
    for lane in np.flatnonzero(others):
        pair = (jax.tree.leaves(lanes.lane_of(ended.state, int(lane))) for ended in (good, bad))
        assert all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bad.state.params))
    skipped = bad.metrics["skipped"][:, 2]
    sixth = np.flatnonzero(skipped)[5]
    assert skipped[sixth:].all() and len(skipped) == 45  # after max_nonfinite_steps it is frozen for good
    assert not bad.metrics["skipped"][:, others].any()


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_shapes_do_not_depend_on_the_seed_but_rows_do(epoch):
    lengths = np.random.default_rng(0).integers(3, 40, 333)
    plan = functools.partial(batches.epoch_plan, lengths, 16, [10, 20, 40], epoch=epoch)
    plans = [plan(seed=seed) for seed in range(5)]
    shapes = {tuple((len(rows), length) for rows, length in plan) for plan in plans}
    assert len(shapes) == 1 and len({length for _, length in plans[0]}) == 3
    assert len({tuple(plan[0][0]) for plan in plans}) == 5


def test_lanes_that_differ_in_more_are_refused(home):
    runs = [settings(home, seed=0), settings(home, seed=0, max_grad_norm=2.0)]
    with pytest.raises(InputError, match="lanes cannot differ in max_grad_norm"):
        lanes.lane_arrays(runs)
