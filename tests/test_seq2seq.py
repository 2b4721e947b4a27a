"""T5 and BART against what Transformers with torch computed (tests/fixtures), and their own properties."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
from model_parity import quick_jit, seq2seq_loss_and_gradients
from safetensors.numpy import load_file, save_file

import pats_jax
from pats_jax import models, random, trees
from pats_jax.errors import InputError
from pats_jax.models import (
    from_pretrained_seq2seq,
    layout,
    relative_positions,
    save_pretrained,
    stack_layers,
    t5,
    unstack_layers,
)
from pats_jax.models.encoder_decoder import shift_right
from pats_jax.models.seq2seq_config import config_from_dict

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("t5", "t5-1.1", "bart")
families = pytest.mark.parametrize("kind", ("t5-1.1", "bart"))


@functools.cache
def stored(kind):
    """The batch, and what torch made of it."""
    found = dict(np.load(FIXTURES / f"{kind}.npz"))
    expected = {name: found[name] for name in found if not name.startswith("generated/")}
    return {name: expected.pop(name) for name in ("input_ids", "attention_mask", "labels")}, expected


def load(kind, **options):
    return from_pretrained_seq2seq(FIXTURES / kind, **options)


def padded(batch, config):
    """The same with more padding at the end of sources and targets."""
    return {
        "input_ids": np.pad(batch["input_ids"], ((0, 0), (0, 5)), constant_values=config.pad_token_id),
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (0, 5))),
        "labels": np.pad(batch["labels"], ((0, 0), (0, 3)), constant_values=-100),
    }


@pytest.mark.parametrize(
    ("kind", "layers"),
    [pytest.param("t5", "separate", marks=pytest.mark.slow), ("t5-1.1", "stacked"), ("bart", "stacked")],
)
def test_logits_gradients_and_an_adamw_step_are_torchs(kind, layers):
    """With more padding, which changes nothing."""
    model, params, config = load(kind)
    batch, expected = stored(kind)

    def compute(model, params, batch):
        loss, logits, gradients = seq2seq_loss_and_gradients(model.clone(layers=layers), params, padded(batch, config))
        return loss, logits[:, : expected["logits"].shape[1]], gradients

    rates = {"learning_rate": 1e-3, "weight_decay": 0.01}
    model_parity.assert_agrees(expected, model, params, batch, **rates, compute=compute)


# layouts, memory, dtype


@functools.partial(quick_jit, static_argnums=0)
def trained_outputs(model, params, batch, key):
    """Loss and gradient with dropout."""
    loss_fn = pats_jax.make_seq2seq_loss_fn(model.apply)
    return jax.value_and_grad(lambda params: loss_fn(params, batch, key)[0])(params)


@functools.cache
def separate_outputs(kind):
    model, params, _ = load(kind, dropout=0.2)
    return trained_outputs(model, params, stored(kind)[0], random.fast_key(0))


@pytest.mark.slow
@families
@pytest.mark.parametrize(
    "options",
    [
        {"layers": "stacked"},
        {"layers": "stacked", "unroll": 0},
        {"layers": "stacked", "unroll": 2, "gradient_checkpointing": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_layouts_and_checkpointing_change_nothing_but_rounding(kind, options):
    """With the same dropout."""
    model, params, _ = load(kind, dropout=0.2, **options)
    loss, gradients = trained_outputs(model, params, stored(kind)[0], random.fast_key(0))
    expected_loss, expected = separate_outputs(kind)
    expected = stack_layers(expected) if model.layers == "stacked" else expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), gradients, expected)
    other, _ = trained_outputs(model, params, stored(kind)[0], random.fast_key(1))
    assert abs(other - loss) > 1e-3  # the key matters
    plain = quick_jit(model.apply)({"params": params}, **stored(kind)[0])
    assert np.abs(plain - stored(kind)[1]["logits"]).max() < 1e-4  # without dropout


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less():
    def residuals(**options):
        model, params, _ = load("bart", **options)
        loss = functools.partial(lambda params: model.apply({"params": params}, **stored("bart")[0]).sum())
        return sum(np.size(x) for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)))

    assert residuals(gradient_checkpointing=True) < 0.8 * residuals()


@families
def test_the_layouts_convert_into_each_other(kind):
    _, params, config = load(kind)
    stacked = load(kind, layers="stacked")[1]
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked, config.num_layers_of), params)
    assert layout.has_stacked_layers(stacked) and not layout.has_stacked_layers(params)

    def names(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {name for path, leaf in leaves for name in layout.separate_names(path, leaf)}

    assert names(stacked) == names(params)


@pytest.mark.slow
@families
def test_both_layouts_draw_the_same(kind):
    _, params, config = load(kind)
    stacked = stack_layers(params)
    keys = trees.leaf_keys(random.fast_key(0), params)
    of_stacked = trees.leaf_keys(random.fast_key(0), stacked, trees.resolve_layer_axis(models.layer_axis, stacked))
    again = unstack_layers(of_stacked, config.num_layers_of)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(*map(jax.random.key_data, (x, y))), again, keys)


@families
def test_new_parameters_have_the_shapes_of_a_checkpoint(kind):
    _, params, config = load(kind)
    ids = jnp.ones((1, 2), jnp.int32)
    make = models.Bart if kind == "bart" else models.T5
    for layers, expected in (("separate", params), ("stacked", stack_layers(params))):
        new = jax.eval_shape(make(config, layers=layers).init, random.fast_key(0), ids, labels=ids)["params"]
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, expected)


@pytest.mark.slow
@families
def test_new_parameters_are_the_same_in_both_layouts(kind):
    config, ids = load(kind)[2], jnp.ones((1, 2), jnp.int32)
    make = models.Bart if kind == "bart" else models.T5
    own, stacked = (
        quick_jit(make(config, layers=layers).init)(random.fast_key(0), ids, labels=ids)["params"]
        for layers in ("separate", "stacked")
    )
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(own))
    table = own["model"]["shared"]["embedding"] if kind == "bart" else own["shared"]["embedding"]
    np.testing.assert_allclose(np.std(table), 0.02 if kind == "bart" else 1.0, rtol=0.1)
    if kind == "bart":
        assert not table[config.pad_token_id].any()


@pytest.mark.slow
def test_bfloat16_is_for_computation_only():
    model, params, _ = load("t5-1.1", dtype=jnp.bfloat16)
    batch, expected = stored("t5-1.1")
    logits = quick_jit(model.apply)({"params": params}, **batch)
    loss_fn = pats_jax.make_seq2seq_loss_fn(model.apply, deterministic=True)
    gradients = jax.eval_shape(jax.grad(lambda params: loss_fn(params, batch, None)[0]), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients, logits))} == {jnp.dtype("float32")}
    assert 1e-4 < np.abs(logits - expected["logits"]).max() < 0.1 * np.abs(expected["logits"]).max()


@families
def test_only_words_are_scattered(kind):
    """The gradient of T5's positions is made of sums, and so is that of BART's."""
    model, params, _ = load(kind)
    loss_fn = pats_jax.make_seq2seq_loss_fn(model.apply, deterministic=True)
    gradient = jax.grad(lambda params: loss_fn(params, stored(kind)[0], None)[0])
    operations = str(jax.make_jaxpr(gradient)(params))
    assert operations.count("scatter-add") == 2 * 2 and "scatter[" not in operations  # on CPU, and elsewhere


_COMPILE = """
import jax, pats_jax
from pats_jax import models, random
config = models.T5Config(vocab_size=512, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_decoder_layers=1, num_heads=2)
model = models.T5(config)
ids = jax.numpy.ones((8, 32), int)
batch = {"input_ids": ids, "attention_mask": ids, "labels": jax.numpy.ones((8, 24), int)}
params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]
loss_fn = pats_jax.make_seq2seq_loss_fn(model.apply)
step = jax.jit(jax.grad(lambda params, batch, key: loss_fn(params, batch, key)[0]))
step.lower(params, batch, random.fast_key(0)).compile()
"""


@pytest.mark.slow
def test_a_step_with_dropout_compiles_with_xlas_own_settings():
    """The flags of these tests hide what users meet: XLA that does not finish."""
    own = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }
    subprocess.run([sys.executable, "-c", _COMPILE], env=own, check=True, timeout=100)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_positions_are_rows_of_the_table(bidirectional):
    config, length = load("t5")[2], 30
    module = t5.RelativePositions(config, bidirectional)
    params = module.init(jax.random.key(0), 1)
    table = np.asarray(params["params"]["embedding"])
    relative = np.arange(length)[None] - np.arange(length)[:, None]
    chosen = relative_positions.buckets(relative, bidirectional=bidirectional, count=8, farthest=12)
    assert set(chosen.flat) == set(range(8)) - ({4} if bidirectional else set())  # 4: 0 places after
    expected = table[chosen].transpose(2, 0, 1)
    np.testing.assert_allclose(module.apply(params, length)[0], expected, rtol=1e-6)
    if not bidirectional:
        row = module.apply(params, 20, length, method="of_query")
        np.testing.assert_allclose(row, expected[:, 20], rtol=1e-6)


def test_targets_are_shifted_labels():
    labels = np.array([[5, 6, -100, 7], [8, -100, -100, -100]])
    np.testing.assert_array_equal(shift_right(labels, 2, 1), [[2, 5, 6, 1], [2, 8, 1, 1]])


def test_other_inputs_are_refused():
    model, params, _ = load("bart")
    ids = np.ones((1, 3), int)
    for inputs in ({}, {"labels": ids, "decoder_input_ids": ids}):
        with pytest.raises(ValueError, match="exactly one of labels and decoder_input_ids"):
            model.apply({"params": params}, ids, **inputs)
    for source, target in ((25, 3), (3, 25)):
        with pytest.raises(ValueError, match="25 tokens, but the model has 24 positions"):
            model.apply({"params": params}, np.ones((1, source), int), labels=np.ones((1, target), int))


# loss


@functools.cache
def loss_inputs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, (6, 5))
    labels[np.arange(5) >= rng.integers(1, 6, (6, 1))] = -100
    labels[3] = -100  # a row without labels
    return rng.normal(size=(6, 5, 9)).astype(np.float32), labels


def numpy_losses(smoothing):
    logits, labels = loss_inputs()
    logits = np.float64(logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.where(labels == -100, 0, labels)[..., None], axis=-1)[..., 0]
    return ((1 - smoothing) * nll - smoothing * log_p.mean(-1)) * (labels != -100)


@pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_the_loss_is_the_mean_over_labels(smoothing):
    logits, labels = loss_inputs()
    loss_fn = pats_jax.make_seq2seq_loss_fn(
        lambda variables, input_ids, **options: variables["params"][input_ids], label_smoothing=smoothing
    )
    batch = {"input_ids": np.arange(6), "labels": labels}
    expected = numpy_losses(smoothing).sum() / (labels != -100).sum()
    np.testing.assert_allclose(loss_fn(logits, batch, None)[0], expected, rtol=1e-5)
    weighted = batch | {"weights": pats_jax.label_counts(labels)}
    np.testing.assert_allclose(loss_fn(logits, weighted, None)[0], expected, rtol=1e-5)
    state = pats_jax.TrainState.create(apply_fn=None, params=jnp.asarray(logits), tx=optax.sgd(1.0), key=0)
    step = quick_jit(pats_jax.make_train_step(loss_fn, accumulation_steps=3))
    after, metrics = step(state, weighted)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    whole = quick_jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]))(logits)
    np.testing.assert_allclose(logits - after.params, whole, atol=1e-6)
    assert not loss_fn(logits, batch | {"labels": np.full((6, 5), -100)}, None)[0]


def test_a_rate_of_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match="label_smoothing=1"):
        pats_jax.make_seq2seq_loss_fn(None, label_smoothing=1)


# configs and files

T5_VALUES = {"model_type": "t5", "d_model": 16, "num_layers": 2, "num_heads": 3, "d_kv": 6, "vocab_size": 40}
BART_VALUES = {"model_type": "bart", "vocab_size": 40, "d_model": 16}


@pytest.mark.parametrize(
    ("values", "tied", "scaled"),
    [
        ({}, True, True),
        ({"tie_word_embeddings": None}, True, True),
        ({"tie_word_embeddings": False}, False, False),  # T5 1.1 by Transformers 4
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),  # by Transformers 5
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, True),
    ],
)
def test_tying_and_scaling(values, tied, scaled):
    config = config_from_dict(T5_VALUES | values)
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (tied, scaled)
    assert config.num_decoder_layers == 2
    assert config_from_dict(config.to_dict()) == dataclasses.replace(
        config, extra=config_from_dict(config.to_dict()).extra
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mbart"}, "model_type 'mbart' is not supported .it normalizes before its blocks"),
        ({"model_type": "longt5"}, "model_type 'longt5' is not supported .its attention is local"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported .an encoder"),
        ({"model_type": 3}, "model_type 3 is not supported"),
        (BART_VALUES | {"normalize_before": True}, "normalize_before is true, as in mBART"),
        (BART_VALUES | {"add_final_layer_norm": True}, "add_final_layer_norm is true, as in mBART"),
        (BART_VALUES | {"normalize_embedding": False}, "normalize_embedding is false"),
        (BART_VALUES | {"encoder_layerdrop": 0.1}, "encoder_layerdrop 0.1 is not supported"),
        (BART_VALUES | {"d_model": 18}, "d_model 18 is not a multiple of encoder_attention_heads 16"),
        (BART_VALUES | {"activation_function": "silu"}, "activation_function 'silu' is not supported"),
        (BART_VALUES | {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        (T5_VALUES | {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not supported"),
        (T5_VALUES | {"d_kv": 0}, "d_kv must be a positive whole number, got 0"),
        (T5_VALUES | {"dropout_rate": 1.0}, r"dropout_rate must be a rate in \[0, 1\), got 1.0"),
        (T5_VALUES | {"is_decoder": True}, "is_decoder is True; only whole encoder-decoders"),
        (T5_VALUES | {"pad_token_id": 40}, "pad_token_id must be a token, from 0 to vocab_size - 1 .39., got 40"),
        (T5_VALUES | {"relative_attention_max_distance": 16}, "relative_attention_max_distance must be above 16"),
    ],
)
def test_other_configs_are_refused(values, message):
    with pytest.raises(InputError, match=f"^config.json: {message}") as raised:
        config_from_dict(values)
    assert "\n" not in str(raised.value)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="dtype=float16 is not float32 or bfloat16"):
        load("t5", dtype=jnp.float16)


def changed(kind, folder, **tensors):
    """A folder of a fixture with tensors added, replaced or (None) left out."""
    shutil.copytree(FIXTURES / kind, folder)
    found = {name: x for name, x in (load_file(folder / "model.safetensors") | tensors).items() if x is not None}
    save_file(found, folder / "model.safetensors")
    return folder


TABLE = load_file(FIXTURES / "t5" / "model.safetensors")["shared.weight"]


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("t5", {"decoder.final_layer_norm.weight": None}, "lacks decoder.final_layer_norm.weight; it is incomplete"),
        ("t5", {"shared.weight": TABLE[:-1].copy()}, r"shared.weight has shape \(39, 16\), but config.json implies"),
        ("t5", {"shared.weight": None}, "lacks shared.weight"),
        ("t5", {"encoder.embed_tokens.weight": TABLE + 1}, "encoder.embed_tokens.weight differs from shared.weight"),
        ("bart", {"lm_head.weight": TABLE + 1}, "lm_head.weight differs from model.shared.weight"),
        ("bart", {"final_logits_bias": np.ones((1, 3), np.float32)}, r"final_logits_bias has shape \(1, 3\)"),
    ],
)
def test_other_tensors_are_refused(kind, tensors, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        from_pretrained_seq2seq(changed(kind, tmp_path / "model", **tensors))
    assert "\n" not in str(raised.value)


def test_missing_layers_are_refused_before_a_model_is_made(tmp_path):
    folder = changed("bart", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text()) | {"decoder_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="has 2 decoder layers, but config.json says 1000000000"):
        from_pretrained_seq2seq(folder)


def test_copies_and_old_names_are_read(tmp_path, caplog):
    """Copies of the table of words, a table that is there under the decoder's name only, and what is never used."""
    _, params, _ = load("t5")
    copies = {f"{name}.weight": TABLE for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
    copies["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((8, 3), np.float32)
    alone = {"shared.weight": None, "decoder.embed_tokens.weight": TABLE}
    for number, tensors in enumerate([copies, alone]):
        model, again, config = from_pretrained_seq2seq(changed("t5", tmp_path / str(number), **tensors))
        jax.tree.map(np.testing.assert_array_equal, again, params)
        assert config.tie_word_embeddings
    assert caplog.messages == []
    from_pretrained_seq2seq(changed("t5", tmp_path / "more", extra=np.zeros(3, np.float32)))
    assert "not used: extra" in caplog.messages[0]


def test_a_bare_bart_and_a_bias_of_the_logits(tmp_path):
    """BartModel's tensors lack ``model.``; the bias is a constant that is saved again."""
    stored_tensors = load_file(FIXTURES / "bart" / "model.safetensors")
    bare = {name.removeprefix("model."): x for name, x in stored_tensors.items()}
    bias = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    tensors = dict.fromkeys(stored_tensors) | bare | {"final_logits_bias": bias}
    model, params, config = from_pretrained_seq2seq(changed("bart", tmp_path / "a", **tensors))
    np.testing.assert_array_equal(params["final_logits"]["bias"], bias[0])
    hidden = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)

    def logits(bias):
        return model.apply({"params": params | {"final_logits": {"bias": bias}}}, hidden, method="logits")

    found, gradient = jax.vjp(logits, params["final_logits"]["bias"])
    words = stored_tensors["model.shared.weight"]
    np.testing.assert_allclose(found, hidden @ words.T + bias, rtol=1e-5, atol=1e-5)
    assert not gradient(jnp.ones_like(found))[0].any()
    save_pretrained(tmp_path / "b", params=params, config=config)
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == stored_tensors.keys()
    np.testing.assert_array_equal(saved["final_logits_bias"], bias)


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(kind, tmp_path):
    for layers in ("separate", "stacked"):
        _, params, config = load(kind, layers=layers)
        save_pretrained(tmp_path / layers, params=params, config=config, generation=models.GenerationConfig())
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / layers, FIXTURES / kind))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        assert (tmp_path / layers / "generation_config.json").exists()
    values = json.loads((tmp_path / "stacked" / "config.json").read_text())
    assert (values["model_type"], values["dtype"]) == (kind.split("-")[0], "float32")
    if kind == "t5-1.1":
        assert values["tie_word_embeddings"] is values["scale_decoder_outputs"] is False
    with pytest.raises(ValueError, match="params do not match config at"):
        save_pretrained(tmp_path / "c", params=params, config=dataclasses.replace(config, d_model=32))


def test_dropout_of_a_checkpoint_is_replaced():
    assert load("bart", dropout=0.3)[2].activation_dropout == load("t5", dropout=0.3)[2].dropout_rate == 0.3
    with pytest.raises(ValueError, match="dropout must be"):
        load("t5", dropout=1.0)
