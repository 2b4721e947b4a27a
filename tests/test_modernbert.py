"""What is ModernBERT's own: against torch (tests/fixtures), NumPy and Transformers' configs."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict, unflatten_dict
from model_parity import assert_agrees, by_tensor_name, logits_of, quick_jit
from numpy_modernbert import NumpyModernbert, turned
from safetensors.numpy import load_file, save_file

from pats_jax import random
from pats_jax.errors import InputError
from pats_jax.models import (
    SequenceClassifier,
    attention as dense_attention,
    from_pretrained,
    load_mlm_head,
    load_tokenizer,
    local_attention,
    mlm_logits,
    peft,
    rotary,
    save_pretrained,
)
from pats_jax.models.config import default_labels
from pats_jax.models.encoders.modernbert_config import GLOBAL, LOCAL, ModernBertConfig
from pats_jax.models.encoders.table import encoder_config
from pats_jax.models.layers import MASKED, pad_front, padding_bias

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("modernbert", "modernbert-biases")
BATCH = ("input_ids", "attention_mask", "token_type_ids", "labels")
# config.json of answerdotai/ModernBERT-base, as Transformers 4 wrote it
OF_THE_HUB = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}


def load(kind: str, **options):
    """A tiny model with its stored batch and what torch made of it."""
    stored = dict(np.load(FIXTURES / f"{kind}.npz"))
    batch = {name: stored.pop(name) for name in BATCH}
    return *from_pretrained(FIXTURES / kind, num_labels=3, **options), batch, stored


def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_an_adamw_step_are_torchs(kind):
    """In blocks: rows have 21 tokens, and half a window has 4. There is padding in the middle of a row."""
    model, params, config, batch, expected = load(kind)
    assert local_attention.is_long(batch["input_ids"].shape[1], config.half_window)
    assert_agrees(expected, model, params, batch, learning_rate=1e-3, weight_decay=0.01)


def test_the_first_token_alone():
    """The last layer is local: for the first token it computes only what that token sees. Both are torch's."""
    model, params, _, batch, expected = load("modernbert", layers="stacked")
    for form in (model, model.clone(first_token_only=False)):
        np.testing.assert_allclose(logits_of(form, params, batch), expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_has_the_files_tensors_and_settings_that_transformers_wrote(kind, tmp_path):
    _, params, config, *_ = load(kind)
    save_pretrained(tmp_path, params=params, config=config)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (FIXTURES / kind, tmp_path))
    assert "model.layers.0.attn_norm.weight" not in ours
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / kind, tmp_path))
    assert {name: ours[name] for name in theirs} == theirs
    of_version_4 = {"global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"}
    assert ours.keys() - theirs.keys() == of_version_4 | {"problem_type"}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_for_words_and_a_new_classifier(kind, tmp_path, caplog):
    """A classifier made from a pretrained checkpoint keeps the head that the masked language model has."""
    stored, tensors = np.load(FIXTURES / f"{kind}.npz"), load_file(FIXTURES / kind / "model.safetensors")
    pretrained = {name: x for name, x in tensors.items() if not name.startswith("classifier.")}
    pretrained |= {"decoder.bias": stored["word_bias"]}
    pretrained["decoder.weight"] = pretrained["model.embeddings.tok_embeddings.weight"].copy()
    shutil.copy(FIXTURES / kind / "config.json", tmp_path)
    save_file(pretrained, tmp_path / "model.safetensors")
    model, params, config = from_pretrained(tmp_path, num_labels=2)
    (record,) = caplog.records
    assert record.getMessage().endswith("newly initialized: classifier.bias, classifier.weight")
    np.testing.assert_array_equal(params["head"]["dense"]["kernel"].T, tensors["head.dense.weight"])

    head = load_mlm_head(tmp_path, config)
    compute = quick_jit(functools.partial(model.clone(first_token_only=False).apply, output_hidden_states=True))
    _, states = compute({"params": params}, **inputs(stored))
    logits = mlm_logits(head, config, states[-1], config.word_embeddings(params))
    is_token = stored["attention_mask"] != 0
    np.testing.assert_allclose(logits[is_token], stored["word_logits"][is_token], rtol=0, atol=1e-4)

    save_file({**pretrained, "decoder.weight": 1 + pretrained["decoder.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="decoder.weight differs from model.embeddings.tok_embeddings.weight"):
        load_mlm_head(tmp_path, config)


def test_a_head_without_biases():
    config = tiny_config(decoder_bias=False)
    tables = encoder_config({**config.to_dict()})
    words, hidden = np.eye(48, 12, dtype=np.float32), np.ones((1, 12), np.float32)
    head = {"dense": {"kernel": np.eye(12, dtype=np.float32)}, "norm": {"scale": np.arange(12, dtype=np.float32)}}
    assert not tables.decoder_bias
    np.testing.assert_allclose(mlm_logits(head, config, hidden * np.arange(12), words)[0, 12:], 0)


# The model in NumPy, and with adapters


def tiny_config(**changes):
    sizes = {
        **{"vocab_size": 48, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8},
        **{"num_hidden_layers": 5, "local_attention": 8, "pad_token_id": 0, "max_position_embeddings": 600},
    }
    labels = default_labels(3)
    return ModernBertConfig(
        **sizes | {"local_rope_theta": 40.0, "global_rope_theta": 90.0, "id2label": labels} | changes
    )


@functools.cache
def model_and_params(**changes):
    model = SequenceClassifier(tiny_config(**changes))
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    rng = np.random.default_rng(3)
    drawn = {path: (path[-1] == "scale") + 0.4 * rng.normal(size=leaf.shape) for path, leaf in shapes.items()}
    return model, unflatten_dict({path: np.asarray(x, np.float32) for path, x in drawn.items()})


def texts(length: int, rows: int = 4):
    """Rows of different lengths. The last has a gap as wide as a window, and its end is padding."""
    rng = np.random.default_rng(length)
    lengths = np.array([length, 2, length // 2, length - 3])[:rows]
    mask = np.arange(length) < lengths[:, None]
    mask[-1, 3:14] = False
    ids = rng.integers(1, 48, mask.shape)
    return {"input_ids": np.where(mask, ids, 0).astype(np.int32), "attention_mask": mask.astype(np.int32)}


@pytest.mark.parametrize(("length", "pooling"), ((9, "mean"), (30, "cls"), (520, "cls")))
def test_logits_are_numpys(length, pooling):
    """Plain, with local attention in blocks, and with global attention in parts."""
    model, params = model_and_params(classifier_pooling=pooling)
    batch = texts(length)
    expected = NumpyModernbert(by_tensor_name(params), model.config).logits(**batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)


def lora(reference, tree):
    def linear(name, x):
        y = reference.plain_linear(name, x)
        if f"{name}.lora_A.kernel" in tree:
            y = y + 2.0 * x @ tree[f"{name}.lora_A.kernel"] @ tree[f"{name}.lora_B.kernel"]
        return y

    reference.linear = linear


def ia3(reference, tree):
    reference.linear = lambda name, x: (
        reference.plain_linear(name, x * tree.get(f"{name}.ia3_input", 1.0)) * tree.get(f"{name}.ia3_output", 1.0)
    )


def prompt(reference, tree):
    reference.prompt = tree["prompt_embeddings"]


def prefix(reference, tree):
    layers = tree["prompt_embeddings"].reshape(3, 5, 2, 12)
    reference.prefix = [(layers[:, number, 0], layers[:, number, 1]) for number in range(5)]


def adapters(reference, tree, pfeiffer=False):
    def block_end(name, x, residual):
        own = f"{name}.adapter"
        if f"{own}.down.kernel" not in tree:
            return residual + x
        h = (residual + x if pfeiffer else x) @ tree[f"{own}.down.kernel"] + tree[f"{own}.down.bias"]
        tanh = np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))
        inner = np.maximum(h, 0) if pfeiffer else 0.5 * h * (1 + tanh)
        return residual + x + inner @ tree[f"{own}.up.kernel"] + tree[f"{own}.up.bias"]

    reference.block_end = block_end


ADAPTERS = {
    "lora": (peft.LoraConfig(rank=2, alpha=4.0), lora),
    "lora everywhere": (peft.LoraConfig(rank=2, alpha=4.0, layers="Wqkv|Wo|Wi"), lora),
    "ia3": (peft.Ia3Config(), ia3),
    "prompt": (peft.PromptConfig(length=3), prompt),
    "prefix": (peft.PrefixConfig(length=3), prefix),
    "houlsby": (peft.AdapterConfig(size=2), adapters),
    "pfeiffer": (peft.AdapterConfig(size=2, place="pfeiffer"), functools.partial(adapters, pfeiffer=True)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_numpys(kind):
    """All queries see a prefix, also in the blocks of local layers, and it is not turned."""
    config, change = ADAPTERS[kind]
    model, params = model_and_params()
    adapted, start = peft.add_peft(model, params, config, key=0)
    rng = np.random.default_rng(5)
    small = jax.tree.map(lambda x: np.float32(x + 0.4 * rng.normal(size=x.shape)), start["peft"])
    reference = NumpyModernbert(by_tensor_name(params), model.config)
    change(reference, {".".join(path): np.float64(x) for path, x in flatten_dict(small).items()})
    batch = texts(30)
    logits = logits_of(adapted, {**params, "peft": small}, batch)
    np.testing.assert_allclose(logits, reference.logits(**batch), rtol=0, atol=1e-4)
    assert np.abs(logits - logits_of(model, params, batch)).max() > 1e-3


def test_the_layers_that_adapters_change_by_default():
    model, params = model_and_params()
    names = {
        kind: {".".join(path[3:-1]) for path in flatten_dict(peft.add_peft(model, params, config, key=0)[1]["peft"])}
        for kind, config in (("lora", peft.LoraConfig()), ("ia3", peft.Ia3Config()))
    }
    assert names == {"lora": {"attn.Wqkv.lora_A", "attn.Wqkv.lora_B"}, "ia3": {"attn.Wqkv", "mlp.Wo"}}


def test_bitfit_needs_biases():
    model, params = model_and_params()
    with pytest.raises(InputError, match="^bitfit: a modernbert model has no biases; take ia3 or lora$"):
        peft.add_peft(model, params, peft.BitFitConfig(), key=0)
    model, params = model_and_params(mlp_bias=True)
    _, adapted = peft.add_peft(model, params, peft.BitFitConfig(), key=0)
    assert {path[-3] for path in flatten_dict(adapted["peft"])} == {"Wi", "Wo"}


# Local attention


def drawn(length, surplus=0, rows=3):
    """Queries, keys, values and the bias of padding, of which the last row has a gap wider than a window."""
    rng = np.random.default_rng(length)
    query, key, value = (
        rng.normal(size=(rows, count, 2, 4)).astype(np.float32) for count in (length, *2 * (length + surplus,))
    )
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    mask[-1, length // 3 : length // 3 + 13] = False
    return query, key, value, padding_bias(jnp.asarray(mask))


def in_blocks(half, query, key, value, bias):
    blocks = local_attention.to_blocks(query, key, value, bias, half)
    return local_attention.from_blocks(attend(*blocks), len(query), query.shape[1])


def masked(half, query, key, value, bias):
    surplus = key.shape[1] - query.shape[1]
    return attend(query, key, value, pad_front(local_attention.window_bias(bias, query.shape[1], half), surplus))


def attend(query, key, value, bias):
    return dense_attention.weighted_sum(dense_attention.softmax_weights(query, key, bias), value)


def value_and_gradients(attention, half, arrays, bias, weights):
    def loss(query, key, value):
        out = attention(half, query, key, value, bias)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, *gradients


@pytest.mark.parametrize(("length", "half", "surplus"), ((23, 4, 0), (24, 4, 3), (5, 4, 0), (40, 3, 2), (9, 12, 1)))
def test_blocks_compute_what_a_mask_does(length, half, surplus):
    """Results and gradients, where the last block is not full too, and where a window has nothing but padding."""
    *arrays, bias = drawn(length, surplus)
    weights = np.random.default_rng(1).normal(size=arrays[0].shape)
    run = quick_jit(value_and_gradients, static_argnums=(0, 1))
    for ours, expected in zip(
        run(in_blocks, half, arrays, bias, weights), run(masked, half, arrays, bias, weights), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("attention", (in_blocks, masked))
def test_a_window_by_its_definition(attention):
    """Token by token: softmax over the tokens at most half a window away that are no padding, and over the prefix."""
    half, surplus, length = 4, 2, 21
    query, key, value, bias = drawn(length, surplus)
    arrays = (query, key, value, bias)
    found, bias = jax.device_get((quick_jit(attention, static_argnums=0)(half, *arrays), bias))
    for row, place, head in np.ndindex(3, length, 2):
        near = [other for other in range(length) if abs(other - place) <= half and bias[row, 0, 0, other] == 0]
        seen = [*range(surplus), *(surplus + other for other in near)]
        weights = scipy.special.softmax(key[row, seen, head] @ query[row, place, head] / 2)
        np.testing.assert_allclose(found[row, place, head], weights @ value[row, seen, head], rtol=0, atol=1e-5)


def flops(length, kind):
    """Operations of a model with one layer."""
    config = tiny_config(num_hidden_layers=1, layer_types=(kind,), max_position_embeddings=2048)
    model = SequenceClassifier(config, first_token_only=False)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return jax.jit(lambda params, ids: model.apply({"params": params}, ids)).lower(params, ids).cost_analysis()["flops"]


def test_local_attention_costs_by_the_length_and_not_by_its_square():
    local, everywhere = ([flops(length, kind) for length in (200, 400)] for kind in (LOCAL, GLOBAL))
    assert local[1] < 2.02 * local[0]
    assert everywhere[1] > 3 * everywhere[0] and everywhere[0] > 3 * local[0]


@pytest.mark.parametrize("heads", (2, 3))
def test_attention_in_parts_is_attention(heads):
    rng = np.random.default_rng(heads)
    query, key, value = (rng.normal(size=(2, count, heads, 4)).astype(np.float32) for count in (7, 9, 9))
    bias = jnp.where(rng.random((2, 1, 1, 9)) < 0.7, 0, MASKED)
    weights = rng.normal(size=query.shape)
    run = quick_jit(value_and_gradients, static_argnums=(0, 1))
    parts, whole = (lambda _, *arguments, own=own: own(*arguments) for own in (dense_attention.in_parts, attend))
    arrays = (query, key, value)
    for ours, expected in zip(run(parts, 0, arrays, bias, weights), run(whole, 0, arrays, bias, weights), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


# Rotary positions


def test_rotation():
    x = np.random.default_rng(0).normal(size=(2, 11, 3, 8)).astype(np.float32)
    expected = turned(np.float64(x).swapaxes(1, 2), 50.0).swapaxes(1, 2)
    np.testing.assert_allclose(rotary.rotate(x, rotary.rotation(11, 8, 50.0)), expected, rtol=0, atol=1e-5)


def test_rotated_scores_depend_on_the_distance_alone():
    query, key = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rows = (np.broadcast_to(x, (1, 12, 1, 8)) for x in (query, key))
    query, key = (rotary.rotate(jnp.asarray(x), rotary.rotation(12, 8, 10_000.0))[0, :, 0] for x in rows)
    scores = query @ key.T
    for shift in (-5, 0, 3):
        np.testing.assert_allclose(np.diagonal(scores, shift), scores[max(-shift, 0), max(shift, 0)], atol=1e-5)
    assert np.ptp(scores[0]) > 0.1


def test_angles_of_the_last_of_8192_tokens():
    frequencies = 160_000.0 ** (-np.arange(32) / 32)
    found = rotary.rotation(8192, 64, 160_000.0)[:, -1]
    np.testing.assert_allclose(found, [np.cos(8191 * frequencies), np.sin(8191 * frequencies)], rtol=0, atol=2e-3)


# Dropout


@pytest.mark.parametrize(
    "rate", ("embedding_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
)
def test_every_rate_of_dropout_is_used(rate):
    """Without rates there is none, also in a training step; the bank shows that both layouts drop alike."""
    (without, params), batch = model_and_params(num_hidden_layers=1), texts(9)
    expected, key = logits_of(without, params, batch), random.fast_key(1)
    np.testing.assert_allclose(logits_of(without, params, batch, key), expected, rtol=0, atol=1e-6)
    model, _ = model_and_params(num_hidden_layers=1, **{rate: 0.5})
    assert np.abs(logits_of(model, params, batch, key) - expected).max() > 1e-3


# Configs


@pytest.mark.parametrize(
    "values",
    (
        {},
        OF_THE_HUB,
        {"global_rope_theta": 100, "local_rope_theta": 50.0, "global_attn_every_n_layers": 2},
        {"rope_parameters": {GLOBAL: {"rope_theta": 7.0}}, "global_rope_theta": 9.0, "local_rope_theta": 3.0},
        {"rope_parameters": None, "layer_types": None, "rope_theta": 5.0},
        {"num_hidden_layers": 2, "layer_types": [LOCAL, GLOBAL], "global_attn_every_n_layers": 2},
        {"layer_norm_eps": 0.1, "position_embedding_type": "relative_key", "hidden_activation": "relu"},
        {"attention_dropout": 0.1, "mlp_dropout": 0.2, "embedding_dropout": 0.3, "classifier_dropout": 0.4},
        {"classifier_pooling": "mean", "classifier_activation": "relu", "norm_eps": 1e-3, "local_attention": 9},
        {name: True for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")}
        | {"decoder_bias": False},
    ),
)
def test_configs_are_read_as_transformers_reads_them(values):
    from transformers import AutoConfig

    values = {"model_type": "modernbert", **values}
    theirs, ours = AutoConfig.for_model(**json.loads(json.dumps(values))), encoder_config(values)
    own = {"model_type", "id2label", "extra", "problem_type", "type_vocab_size", "layer_types"}
    own |= {"global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"}
    for name in {entry.name for entry in dataclasses.fields(ours)} - own:
        assert getattr(ours, name) == getattr(theirs, ours.file_names.get(name, name)), name
    assert list(ours.types_of_layers) == theirs.layer_types
    assert ours.half_window == theirs.sliding_window
    thetas = {kind: theirs.rope_parameters[kind]["rope_theta"] for kind in (GLOBAL, LOCAL)}
    assert thetas == {GLOBAL: ours.global_rope_theta, LOCAL: ours.local_rope_theta}
    again, expected = (one.to_dict() for one in (AutoConfig.for_model(**ours.to_dict()), theirs))
    for name in expected.keys() - {"architectures", "dtype", "layer_norm_eps"}:  # nothing reads that eps
        assert again[name] == expected[name], name
    assert encoder_config(ours.to_dict()) == dataclasses.replace(ours, extra=encoder_config(ours.to_dict()).extra)
    assert hash(ours) == hash(encoder_config(values))


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling .* is not supported"),
        ({"rope_parameters": {GLOBAL: {"rope_type": "linear"}}}, "rope_type 'linear' is not supported, only 'default'"),
        ({"rope_parameters": {"rope_theta": 3.0}}, f"must have an object for each of {GLOBAL} and {LOCAL}"),
        ({"rope_parameters": {"chunked_attention": {}}}, "'chunked_attention' is not one of"),
        ({"rope_parameters": {LOCAL: {"rope_theta": -1}}}, "local_rope_theta must be a positive number, got -1"),
        ({"local_rope_theta": None}, "local_rope_theta is null"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be a positive whole number"),
        ({"layer_types": GLOBAL}, "layer_types must be a list"),
        ({"layer_types": [GLOBAL]}, "layer_types must be a list of num_hidden_layers 22 types"),
        ({"layer_types": ["chunked_attention"] * 22}, f"layer_types must be a list of {GLOBAL} and {LOCAL}"),
        ({"layer_types": [{}] * 22}, f"layer_types must be a list of {GLOBAL} and {LOCAL}"),
        ({"local_attention": 0}, "local_attention must be a positive whole number, got 0"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported; use gelu, "),
        ({"classifier_activation": "silu"}, "classifier_activation must be one of gelu, "),
        ({"classifier_pooling": "max"}, "classifier_pooling must be one of cls, mean, got 'max'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ({"mlp_dropout": 1}, r"mlp_dropout must be a rate in \[0, 1\), got 1"),
        ({"embedding_dropout": "0"}, r"embedding_dropout must be a rate in \[0, 1\), got '0'"),
        ({"norm_eps": 0}, "norm_eps must be a positive number, got 0"),
        ({"hidden_size": 36, "num_attention_heads": 12}, "so that a head has an even number of units"),
        ({"vocab_size": 100}, "pad_token_id must be below vocab_size 100, got 50283"),
    ),
)
def test_configs_that_are_refused(values, message):
    with pytest.raises(InputError, match=f"^config.json: .*{message}") as caught:
        encoder_config({"model_type": "modernbert", **values})
    assert "\n" not in str(caught.value)


def test_the_longest_text():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="601 tokens, but the model has 600 positions"):
        model.apply({"params": params}, np.full((1, 601), 5))


def test_a_tokenizer_of_any_kind(tmp_path):
    """The class that the Hub's files name, which takes all from tokenizer.json; also where no file names it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "rain", "falls"))}
    built = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    built.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(OF_THE_HUB))
    assert load_tokenizer(tmp_path)(["rain falls"])["input_ids"] == [[2, 4, 5, 3]]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "pad_token": "[PAD]"}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    encoded = tokenizer(["rain falls", "rain"], ["rain", "snow"], padding=True)
    assert dict(encoded) == {
        "input_ids": [[2, 4, 5, 3, 4, 3], [2, 4, 3, 1, 3, 0]],
        "attention_mask": [[1] * 6, [1] * 5 + [0]],
    }
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")(["rain"])["input_ids"] == [[2, 4, 3]]
    assert tokenizer.model_max_length == 8192


def test_token_types_are_ignored():
    model, params, _, batch, expected = load("modernbert")
    others = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    np.testing.assert_array_equal(logits_of(model, params, others), logits_of(model, params, batch))
