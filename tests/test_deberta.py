"""What is DeBERTa's own: against torch (tests/fixtures), NumPy and Transformers' config."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import numpy_deberta
import pytest
from flax.traverse_util import flatten_dict
from model_parity import logits_of, quick_jit
from safetensors.numpy import load_file, save_file

from pats_jax import random
from pats_jax.data.batches import check_types
from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_mlm_head, peft, save_pretrained, stack_layers
from pats_jax.models.encoders import deberta
from pats_jax.models.encoders.deberta_attention import buckets, rows_of_distances, shifted_products
from pats_jax.models.encoders.deberta_config import DebertaConfig
from pats_jax.models.encoders.table import encoder_config

FIXTURES = Path(__file__).parent / "fixtures"
BATCH = ("input_ids", "attention_mask", "token_type_ids", "labels")
KINDS = ("deberta-v2", "deberta-unshared")


def load(kind: str, **options):
    """A tiny model with its stored batch and what torch made of it."""
    stored = dict(np.load(FIXTURES / f"{kind}.npz"))
    batch = {name: stored.pop(name) for name in BATCH}
    return *from_pretrained(FIXTURES / kind, num_labels=3, **options), batch, stored


def inputs(batch):
    return {name: values for name, values in batch.items() if name != "labels"}


# The whole model


def test_logits_gradients_and_an_adamw_step_are_torchs():
    """With buckets, a convolution, and padding in the middle of a row."""
    model, params, _, batch, expected = load("deberta-v2")
    model_parity.assert_agrees(expected, model, params, batch, learning_rate=1e-3, weight_decay=0.01)


def test_logits_and_gradients_are_torchs_with_projections_of_their_own():
    """Without buckets, in one layer, with position and token type embeddings of another width, in groups."""
    model, params, _, batch, expected = load("deberta-unshared")
    loss, logits, tree = model_parity.loss_and_gradients(model, params, batch)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-4)
    gradients = model_parity.by_tensor_name(tree)
    assert {f"gradient/{name}" for name in gradients} == {name for name in expected if name.startswith("gradient/")}
    for name, value in gradients.items():
        assert model_parity.is_close(model_parity.summary(value), expected[f"gradient/{name}"]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_alone_and_stacked_layers_change_nothing_but_rounding(kind):
    model, params, _, batch, expected = load(kind)
    full = logits_of(model.clone(first_token_only=False), params, batch)
    np.testing.assert_allclose(full, expected["logits"], rtol=0, atol=1e-5)
    stacked, stack, *_ = load(kind, layers="stacked")
    jax.tree.map(np.testing.assert_array_equal, stack, stack_layers(params))
    np.testing.assert_allclose(logits_of(stacked, stack, batch), expected["logits"], rtol=0, atol=1e-5)


@functools.partial(quick_jit, static_argnums=0)
def with_dropout(model, params, options):
    return model.apply(
        {"params": params}, **options, output_hidden_states=True, deterministic=False, rngs={"dropout": _KEY}
    )


_KEY = random.fast_key(3)


def test_going_on_after_the_convolution_has_the_dropout_of_a_whole_pass():
    model, params, _, batch, _ = load("deberta-v2")
    logits, states = with_dropout(model, params, inputs(batch))
    given = {"attention_mask": batch["attention_mask"]}

    @quick_jit
    def rest(params, state):
        return model.apply(
            {"params": params}, continue_from=(1, state), **given, deterministic=False, rngs={"dropout": _KEY}
        )

    assert not states[1][batch["attention_mask"] == 0].any(), "the convolution ends with 0 at padding"
    np.testing.assert_allclose(rest(params, states[1]), logits, rtol=0, atol=1e-6)
    stacked, stack, *_ = load("deberta-v2", layers="stacked")
    np.testing.assert_allclose(with_dropout(stacked, stack, inputs(batch))[0], logits, rtol=0, atol=1e-5)


def test_cudnn_attention_is_refused():
    model, params, _, batch, _ = load("deberta-v2", attention="cudnn")
    with pytest.raises(InputError, match='attention="cudnn" cannot add .* use attention="auto"'):
        model.apply({"params": params}, batch["input_ids"])


def test_token_types_without_a_table():
    """Transformers' tokenizer gives them to every model."""
    model, params, config, batch, expected = load("deberta-v2")
    assert config.type_vocab_size == 0
    types = batch | {"token_type_ids": np.ones_like(batch["input_ids"])}
    np.testing.assert_array_equal(logits_of(model, params, types), logits_of(model, params, batch))
    check_types(1, config.type_vocab_size)
    with pytest.raises(InputError, match="token types up to 1, but the model's table has 1 rows"):
        check_types(1, 1)


# Attention


def test_buckets_are_torchs():
    """Float32 decides at a bound, as distance 2047 of 2048 is one."""
    stored = np.load(FIXTURES / "deberta-buckets.npz")
    for name, expected in stored.items():
        few, longest = map(int, name.split("-"))
        distances = np.arange(len(expected))
        np.testing.assert_array_equal(buckets(distances, few, longest), expected, err_msg=name)
        np.testing.assert_array_equal(buckets(-distances, few, longest), -expected, err_msg=name)
    np.testing.assert_array_equal(buckets(np.arange(-600, 600), -1, 512), np.arange(-600, 600))


@pytest.mark.parametrize(("rows", "columns"), ((70, 70), (1, 9), (9, 1), (33, 50), (40, 3)))
def test_shifted_products(rows, columns):
    """In blocks that do not fit the number of rows, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, rows, 3, 4)).astype(np.float32)
    table = rng.normal(size=(rows + columns - 1, 3, 4)).astype(np.float32)
    own = np.arange(columns)[None] - np.arange(rows)[:, None] + rows - 1
    expected = np.einsum("bmhd,mnhd->bhmn", np.float64(x), table[own])
    np.testing.assert_allclose(shifted_products(x, table), expected, rtol=0, atol=1e-5)


def test_only_the_rows_of_distances_that_occur_are_used():
    assert rows_of_distances(4, 4, 256, 512) == (253, 260, None)
    first, end, places = rows_of_distances(1, 400, 256, 512)  # of the first token: nothing lies before it
    assert (end, places[-3:]) == (257, (end - first - 3, end - first - 2, end - first - 1))
    assert first == 256 + buckets(np.array(-399), 256, 512) > 0


ATTENTIONS = {
    "shared": {"share_att_key": True, "position_buckets": 8, "pos_att_type": "p2c|c2p"},
    "own": {"position_buckets": 6, "max_relative_positions": 17, "pos_att_type": ["c2p", "p2c"]},
    "every distance": {"max_relative_positions": 9, "pos_att_type": ["p2c"]},
}


@functools.cache
def attention_of(name: str):
    """One attention of a long text: the module, its parameters and inputs, its relative embeddings."""
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "max_position_embeddings": 64, "relative_attention": True}
    config = encoder_config({"model_type": "deberta-v2", **sizes, **ATTENTIONS[name]})
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 45, 12)).astype(np.float32)
    mask = np.arange(45) < np.array([[45], [31]])
    relative = rng.normal(size=(2 * config.relative_span, 12)).astype(np.float32)
    module = deberta.DisentangledSelfAttention(config, jnp.float32)
    bias = jnp.where(mask[:, None, None], 0.0, -1e30)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), hidden, hidden, bias, relative, deterministic=True))[
        "params"
    ]
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return module, params, hidden, mask, bias, relative


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_numpys(name):
    """At a length beyond all bounds of buckets; for the first tokens alone, too."""
    module, params, hidden, mask, bias, relative = attention_of(name)
    expected = numpy_deberta.attend(params, module.config, hidden, mask, relative)
    for queries in (45, 1):
        found = module.apply({"params": params}, hidden[:, :queries], hidden, bias, relative, deterministic=True)
        np.testing.assert_allclose(found, expected[:, :queries], rtol=0, atol=2e-5)


def test_a_prefix_has_no_position():
    module, params, hidden, mask, bias, relative = attention_of("shared")
    prefix = np.random.default_rng(1).normal(size=(2, 4, 12)).astype(np.float32)
    expected = numpy_deberta.attend(params, module.config, hidden, mask, relative, prefix=prefix)

    def prepend(next_fun, args, kwargs, context):
        if context.method_name != "attended_to":
            return next_fun(*args, **kwargs)
        before = (jnp.broadcast_to(part.reshape(4, 3, 4), (2, 4, 3, 4)) for part in prefix)
        return next_fun(*(jnp.concatenate(pair, axis=1) for pair in zip(before, args, strict=True)))

    with nn.intercept_methods(prepend):
        found = module.apply({"params": params}, hidden, hidden, bias, relative, deterministic=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_has_the_files_tensors_and_settings_that_transformers_wrote(kind, tmp_path):
    _, params, config, *_ = load(kind)
    save_pretrained(tmp_path, params=params, config=config)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (FIXTURES / kind, tmp_path))
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / kind, tmp_path))
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("bare", (False, True))
def test_a_pretrained_checkpoint_gets_a_new_head_quietly(bare, tmp_path, caplog):
    """As Microsoft's: with pretraining heads, and position embeddings that the model does not use."""
    stored = load_file(FIXTURES / "deberta-v2" / "model.safetensors")
    encoder = {name: tensor for name, tensor in stored.items() if name.startswith("deberta.")}
    tensors = {name.removeprefix("deberta.") if bare else name: tensor for name, tensor in encoder.items()}
    heads = ("lm_predictions.lm_head.dense.weight", "mask_predictions.classifier.weight", "cls.predictions.bias")
    positions = "embeddings.position_embeddings.weight"
    for name in (*heads, positions if bare else f"deberta.{positions}"):
        tensors[name] = np.ones((2, 2), np.float32)
    shutil.copy(FIXTURES / "deberta-v2" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    _, params, _ = from_pretrained(tmp_path, num_labels=2)
    message = "".join(record.getMessage() for record in caplog.records)
    assert "not used" not in message
    new = "classifier.bias, classifier.weight, pooler.dense.bias, pooler.dense.weight"
    assert message.endswith(f"newly initialized: {new}")
    assert set(params) == {"deberta", "pooler", "classifier"}


@pytest.mark.parametrize("form", ("cls.predictions", "lm_predictions.lm_head"))
def test_both_names_of_the_masked_language_model_head(form, tmp_path):
    """The former has the names of BERT's head; Microsoft's checkpoints have the latter."""
    *_, config, _, _ = load("deberta-v2")
    below = f"{form}.transform" if form == "cls.predictions" else form
    shapes = {
        f"{below}.dense.weight": (16, 16),
        f"{below}.dense.bias": (16,),
        f"{below}.LayerNorm.weight": (16,),
        f"{below}.LayerNorm.bias": (16,),
        f"{form}.bias": (64,),
    }
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shutil.copy(FIXTURES / "deberta-v2" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    head = load_mlm_head(tmp_path, config)
    np.testing.assert_array_equal(head["dense"]["kernel"], tensors[f"{below}.dense.weight"].T)
    np.testing.assert_array_equal(head["LayerNorm"]["bias"], tensors[f"{below}.LayerNorm.bias"])
    np.testing.assert_array_equal(head["bias"], tensors[f"{form}.bias"])
    with pytest.raises(InputError, match="no masked-language-model head"):
        load_mlm_head(FIXTURES / "deberta-v2", config)


# Configs

V3 = {
    "model_type": "deberta-v2",
    **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    **{"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **{"pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1},
    **{"position_biased_input": False, "type_vocab_size": 0, "vocab_size": 128100},
}
V2_XLARGE = V3 | {
    **{"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 24, "num_hidden_layers": 24},
    **{"attention_head_size": 64, "conv_kernel_size": 3, "conv_act": "gelu"},
}


@pytest.mark.parametrize(
    "values",
    (
        {"model_type": "deberta-v2"},
        V3,
        V2_XLARGE,
        V3 | {"cls_dropout": 0.15, "pooler_dropout": 0.2, "pooler_hidden_act": "tanh", "pooler_hidden_size": 768},
        V3 | {"pos_att_type": " P2C | c2p ", "legacy": False},
        V3 | {"pos_att_type": ["c2p"], "type_vocab_size": 2, "max_relative_positions": 300},
    ),
)
def test_configs_are_read_as_transformers_reads_them(values):
    from transformers import AutoConfig

    theirs, ours = AutoConfig.for_model(**values), encoder_config(values)
    own = {entry.name for entry in dataclasses.fields(ours)} - {"id2label", "extra", "problem_type", "model_type"}
    for name in own & theirs.to_dict().keys() - {"pos_att_type"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.position_terms == {*(theirs.pos_att_type or ())}
    assert ours.head_dropout == values.get("cls_dropout", theirs.hidden_dropout_prob)
    again, expected = AutoConfig.for_model(**ours.to_dict()).to_dict(), theirs.to_dict()
    for name in expected.keys() - {"architectures", "dtype"}:
        assert again[name] == expected[name], name
    assert hash(encoder_config(json.loads(json.dumps(ours.to_dict())))) == hash(dataclasses.replace(ours))


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"pos_att_type": "p2p|c2p"}, "pos_att_type must be c2p, p2c, both or neither, got 'p2p|c2p'"),
        ({"pos_att_type": 3}, "pos_att_type must be c2p, p2c, both or neither, got 3"),
        ({"relative_attention": "yes"}, "relative_attention must be true or false, got 'yes'"),
        ({"relative_attention": False}, "norm_rel_ebd must be 'none' without relative_attention"),
        ({"position_buckets": 2}, "position_buckets must be 4 or more"),
        ({"position_buckets": 1022}, "position_buckets must be 4 or more, and less than twice 512 - 1, got 1022"),
        ({"position_buckets": 1.5}, "position_buckets must be a whole number, got 1.5"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be an odd number, or 0 for no convolution, got 4"),
        ({"conv_kernel_size": 3, "conv_groups": 5}, "conv_groups must be a divisor of 768, got 5"),
        ({"conv_act": "elu"}, "conv_act must be one of gelu, gelu_new, relu, tanh, got 'elu'"),
        ({"pooler_dropout": 1}, "pooler_dropout must be a rate"),
        ({"cls_dropout": -1}, "cls_dropout must be a rate"),
        ({"type_vocab_size": -1}, "type_vocab_size must be a whole number, 0 or more, got -1"),
        ({"attention_head_size": 32}, "attention_head_size 32 is not supported, only 64"),
        ({"pooler_hidden_size": 1}, "pooler_hidden_size 1 is not supported, only 768"),
        ({"embedding_size": 0}, "embedding_size must be a positive whole number, got 0"),
        ({"model_type": "deberta"}, "model_type 'deberta' is not supported"),
    ),
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(InputError) as caught:
        encoder_config(V3 | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# PEFT

LAYER = "deberta.encoder.layer.0"
DEFAULTS = {
    "lora": (f"{LAYER}.attention.self.query_proj", f"{LAYER}.attention.self.value_proj"),
    "ia3": (f"{LAYER}.attention.self.key_proj", f"{LAYER}.attention.self.value_proj", f"{LAYER}.output.dense"),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_layers_that_adapters_change_by_default(kind):
    model, params, *_ = load("deberta-v2")
    _, adapted = peft.add_peft(model, params, peft.KINDS[kind](), key=0)
    changed = {".".join(path).split(".lora")[0].split(".ia3")[0] for path in flatten_dict(adapted["peft"])}
    assert changed == {*DEFAULTS[kind], *(name.replace("layer.0", "layer.1") for name in DEFAULTS[kind])}


def test_no_adapter_takes_the_convolution_for_a_linear_layer():
    model, params, *_ = load("deberta-v2")
    with pytest.raises(InputError, match="matches no linear layer"):
        peft.add_peft(model, params, peft.LoraConfig(layers="conv"), key=0)


def test_bitfit_trains_the_bias_of_the_convolution():
    model, params, _, batch, _ = load("deberta-v2")
    adapted, moved = peft.add_peft(model, params, peft.BitFitConfig(), key=0)
    offset = moved["peft"]["deberta"]["encoder"]["conv"]["conv"]["bitfit"]["bias"]
    moved["peft"]["deberta"]["encoder"]["conv"]["conv"]["bitfit"]["bias"] = offset + 0.5
    own = load("deberta-v2")[1]  # not the same dicts
    own["deberta"]["encoder"]["conv"]["conv"]["bias"] += 0.5
    found, expected = logits_of(adapted, moved, batch), logits_of(model, own, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(expected - load("deberta-v2")[-1]["logits"]).max() > 1e-3


def test_head_of_an_adapter_is_pooler_and_classifier(tmp_path):
    model, params, config, *_ = load("deberta-v2")
    assert isinstance(config, DebertaConfig)
    adapted, params = peft.add_peft(model, params, peft.LoraConfig(rank=2), key=0)
    mask = flatten_dict(peft.trainable_mask(adapted, params))
    assert {path[0] for path, trained in mask.items() if trained} == {"pooler", "classifier", "peft"}
    peft.save_peft(tmp_path, model=adapted, params=params)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "pooler"]
    again = peft.load_peft(tmp_path, *load("deberta-v2")[:2])[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
