"""Stacked layers of a classifier are its separate ones: logits, hidden states, gradients, dropout, training, files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file

import pats_jax
from pats_jax import models, random
from pats_jax.models import SequenceClassifier, layer_axis, layout, stack_layers, unstack_layers
from pats_jax.models.layers import choose_row, look_up

LAYERS, ROWS, LENGTH = 3, 6, 10
BERT = dataclasses.replace(
    tiny.CONFIG, num_hidden_layers=LAYERS, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
)
CONFIGS = {
    "bert": BERT,
    "roberta": dataclasses.replace(  # with dropout in attention only, which compiles in half the time
        BERT,
        model_type="roberta",
        pad_token_id=1,
        type_vocab_size=1,
        max_position_embeddings=26,
        hidden_dropout_prob=0.0,
    ),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
# RoBERTa has what BERT has, and padding among its positions.
ROBERTA_OR_SLOW = pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "roberta"])


@functools.cache
def separate(family):
    """Parameters of moderate size, so that gradients are more than rounding."""
    return jax.tree.map(lambda p: 0.3 * p if p.ndim > 1 else p, tiny.random_params(CONFIGS[family]))


@functools.cache
def make_batch(family, number=0):
    rng, config = np.random.default_rng(number), CONFIGS[family]
    mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    ids = rng.integers(5, config.vocab_size, (ROWS, LENGTH))
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": rng.integers(config.type_vocab_size, size=(ROWS, LENGTH), dtype=np.int32),
        "labels": rng.integers(2, size=ROWS, dtype=np.int32),
    }


def inputs(family):
    return {name: x for name, x in make_batch(family).items() if name != "labels"}


@functools.partial(model_parity.quick_jit, static_argnums=0)
def outputs(model, params, inputs, key):
    """Logits, hidden states and the gradient of something of both, with dropout."""

    def loss(params):
        logits, states = model.apply(
            {"params": params}, **inputs, output_hidden_states=True, deterministic=False, rngs={"dropout": key}
        )
        return jnp.sum(logits**2) + sum(jnp.mean(jnp.sin(state)) for state in states), (logits, states)

    gradient, (logits, states) = jax.grad(loss, has_aux=True)(params)
    return logits, states, gradient


@functools.cache
def expected(family, first_token_only):
    model = SequenceClassifier(CONFIGS[family], first_token_only=first_token_only)
    return outputs(model, separate(family), inputs(family), random.fast_key(0))


def assert_close(ours, theirs, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=tolerance), ours, theirs)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("bert", {}, marks=pytest.mark.slow),
        pytest.param("bert", {"unroll": 2}, marks=pytest.mark.slow),
        pytest.param("bert", {"unroll": 0}, marks=pytest.mark.slow),
        pytest.param("bert", {"unroll": LAYERS}, marks=pytest.mark.slow),
        pytest.param("bert", {"unroll": LAYERS + 5}, marks=pytest.mark.slow),
        pytest.param("bert", {"first_token_only": False}, marks=pytest.mark.slow),
        pytest.param("bert", {"gradient_checkpointing": True, "unroll": 2}, marks=pytest.mark.slow),
        pytest.param("roberta", {"unroll": 0}, marks=pytest.mark.slow),
        ("roberta", {"gradient_checkpointing": True, "unroll": 2}),
        pytest.param("roberta", {"first_token_only": False, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logits_states_and_gradients_with_the_same_dropout(family, options):
    model = SequenceClassifier(CONFIGS[family], layers="stacked", **options)
    logits, states, gradient = outputs(model, stack_layers(separate(family)), inputs(family), random.fast_key(0))
    reference = expected(family, model.first_token_only)
    assert len(states) == LAYERS + 1
    assert_close((logits, states), reference[:2], 1e-5)
    assert_close(gradient, stack_layers(reference[2]), 1e-5)
    other, *_ = outputs(model, stack_layers(separate(family)), inputs(family), random.fast_key(1))
    assert np.abs(other - logits).max() > 1e-3  # the key matters


@pytest.mark.slow
def test_going_on_from_a_hidden_state():
    model, params = SequenceClassifier(BERT, layers="stacked", unroll=2), stack_layers(separate("bert"))
    rest = {name: x for name, x in inputs("bert").items() if name != "input_ids"}
    options = {"deterministic": False, "rngs": {"dropout": random.fast_key(0)}, "output_hidden_states": True}
    logits, states = model.apply({"params": params}, **inputs("bert"), **options)
    for k in range(LAYERS):
        again, above = model.apply({"params": params}, continue_from=(k, states[k]), **rest, **options)
        assert_close((again, above), (logits, states[k:]), 1e-6)
        noised, _ = model.apply({"params": params}, continue_from=(k, states[k] + 0.1), **rest, **options)
        assert np.abs(noised - logits).max() > 1e-5


@pytest.mark.slow
def test_bfloat16_to_its_rounding():
    def logits(layers, dtype):
        params = stack_layers(separate("bert")) if layers == "stacked" else separate("bert")
        model = SequenceClassifier(BERT, layers=layers, dtype=dtype)
        found, _, gradient = outputs(model, params, inputs("bert"), random.fast_key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient, found))} == {jnp.dtype("float32")}
        return found

    exact = logits("separate", jnp.float32)
    ours, theirs = logits("stacked", jnp.bfloat16), logits("separate", jnp.bfloat16)
    assert 1e-4 < np.abs(ours - exact).max() < 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.03)


@pytest.mark.slow  # six steps of both layouts, to the same bounds, are in test_stacked_runs.py
def test_fifteen_steps_of_adamw_with_pats():
    """To DESIGN's bounds; but key biases, whose gradient is nothing but rounding. With dropout before the head only."""
    config = dataclasses.replace(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def train(layers):
        params = stack_layers(separate("bert")) if layers == "stacked" else separate("bert")
        model = SequenceClassifier(config, layers=layers, unroll=2)
        tx = pats_jax.pats(optax.adamw(1e-3), 0.1, key=1, layer_axis=layer_axis)
        state = pats_jax.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=0)
        step = model_parity.quick_jit(pats_jax.make_train_step(pats_jax.make_loss_fn(model.apply)))
        for number in range(15):
            state, _ = step(state, make_batch("bert", number))
        return unstack_layers(state.params, LAYERS)

    ours, theirs = train("stacked"), train("separate")
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        if "key" not in [entry.key for entry in path] or path[-1].key != "bias":
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-4, err_msg=str(path))


# embeddings


@ROBERTA_OR_SLOW
def test_gradients_of_the_tables_are_sums_over_their_rows(family):
    """In NumPy, from the gradient of hidden state 0; rows of padding get none, as in torch (``padding_idx``)."""
    config, params = CONFIGS[family], separate(family)
    model, tables = SequenceClassifier(config), params[config.base_prefix]["embeddings"]
    rest = {"attention_mask": np.ones((ROWS, LENGTH), int), "token_type_ids": inputs(family)["token_type_ids"]}
    ids, padding = inputs(family)["input_ids"], config.pad_token_id  # padding is seen: it would have a gradient
    weights = np.random.default_rng(3).normal(size=(ROWS, 2))

    def loss(params, **start):
        return jnp.sum(weights * model.apply({"params": params}, **start, **rest))

    found = jax.jit(jax.grad(functools.partial(loss, input_ids=ids)))(params)[config.base_prefix]["embeddings"]
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    if config.is_roberta:
        positions = np.cumsum(ids != padding, axis=1) * (ids != padding) + padding
    rows = {"word": ids, "token_type": rest["token_type_ids"], "position": positions}
    total = sum(np.float64(tables[f"{name}_embeddings"]["embedding"])[chosen] for name, chosen in rows.items())
    centred = total - total.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
    normal = centred * scale
    above = jax.jit(jax.grad(lambda hidden: loss(params, continue_from=(0, hidden))))(np.float32(normal))
    above = np.float64(above) * tables["LayerNorm"]["scale"]
    of_total = scale * (above - above.mean(-1, keepdims=True) - normal * (above * normal).mean(-1, keepdims=True))
    frozen = {"word": padding} | ({"position": padding} if config.is_roberta else {})
    for name, chosen in rows.items():
        expected = np.zeros(tables[f"{name}_embeddings"]["embedding"].shape)
        np.add.at(expected, chosen, of_total)
        if name in frozen:
            assert np.abs(expected[frozen[name]]).max() > 1e-3
            expected[frozen[name]] = 0
        ours = found[f"{name}_embeddings"]["embedding"]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_id_that_a_table_does_not_have_is_nan():
    table = jnp.ones((3, 2))
    assert np.isnan(look_up(table, jnp.array([0, 3]), padding=2)).tolist() == [[False] * 2, [True] * 2]
    assert np.isnan(choose_row(table, jnp.array([2, 3]))).tolist() == [[False] * 2, [True] * 2]


# layouts and files


def test_the_layouts_convert_into_each_other():
    params = separate("bert")
    stacked = stack_layers(params)
    assert not layout.has_stacked_layers(params) and layout.has_stacked_layers(stacked)
    layer = stacked["bert"]["encoder"]["layer"]
    for number in range(LAYERS):
        own = params["bert"]["encoder"]["layer"][str(number)]
        jax.tree.map(lambda x, y, n=number: np.testing.assert_array_equal(x[n], y), layer, own)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked, LAYERS), params)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(stacked), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(params, LAYERS), params)
    names = {
        name for path, x in jax.tree_util.tree_leaves_with_path(stacked) for name in layout.separate_names(path, x)
    }
    assert names == {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    del params["bert"]["encoder"]["layer"]["1"]["output"]["dense"]["bias"]
    separate.cache_clear()
    with pytest.raises(ValueError, match="the layers differ in their parameters"):
        stack_layers(params)


@ROBERTA_OR_SLOW
def test_new_parameters_are_the_same(family):
    ids = jnp.ones((1, 2), jnp.int32)
    own, stacked = (
        jax.jit(SequenceClassifier(CONFIGS[family], layers=layers).init)(random.fast_key(0), ids)["params"]
        for layers in ("separate", "stacked")
    )
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(own))


@FAMILIES
def test_files_hold_separate_layers(family, tmp_path):
    config, params = CONFIGS[family], separate(family)
    models.save_pretrained(tmp_path / "separate", params=params, config=config)
    models.save_pretrained(tmp_path / "stacked", params=stack_layers(params), config=config)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("stacked", "separate"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert f"{config.base_prefix}.encoder.layer.{LAYERS - 1}.output.dense.weight" in load_file(ours)
    model, loaded, _ = models.from_pretrained(tmp_path / "stacked", num_labels=2, layers="stacked", unroll=2)
    assert (model.layers, model.unroll) == ("stacked", 2)
    jax.tree.map(np.testing.assert_array_equal, loaded, stack_layers(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "piled"}, "layers='piled' is not one of 'separate', 'stacked'"),
        ({"layers": "stacked", "unroll": -1}, "unroll=-1 must be at least 0"),
    ],
)
def test_other_layouts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(BERT, **options)
