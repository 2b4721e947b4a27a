"""What is DistilBERT's, ELECTRA's and MPNet's own: against torch (tests/fixtures), NumPy and Transformers' configs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import numpy_encoders
import pytest
import test_peft_formulas
from flax.traverse_util import flatten_dict
from model_parity import assert_agrees, by_tensor_name, logits_of
from numpy_encoders import mpnet_bucket
from safetensors.numpy import load_file, save_file
from test_peft import CONFIGS

from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_mlm_head, peft, save_pretrained
from pats_jax.models.encoders.mpnet import RelativePositions
from pats_jax.models.encoders.table import encoder_config, read_encoder_config
from pats_jax.models.relative_positions import buckets

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("distilbert", "electra", "mpnet")
BATCH = ("input_ids", "attention_mask", "token_type_ids", "labels")


def load(kind: str, **options):
    """A tiny model with its stored batch and what torch made of it."""
    stored = dict(np.load(FIXTURES / f"{kind}.npz"))
    batch = {name: stored.pop(name) for name in BATCH}
    return *from_pretrained(FIXTURES / kind, num_labels=3, **options), batch, stored


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_an_adamw_step_are_torchs(kind):
    """With padding in the middle of a row, which MPNet's positions skip."""
    model, params, _, batch, expected = load(kind)
    assert_agrees(expected, model, params, batch, learning_rate=1e-3, weight_decay=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_has_the_files_tensors_and_settings_that_transformers_wrote(kind, tmp_path):
    _, params, config, *_ = load(kind)
    save_pretrained(tmp_path, params=params, config=config)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (FIXTURES / kind, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / kind, tmp_path))
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() <= {"classifier_dropout", "problem_type"}


@pytest.mark.parametrize("kind", KINDS)
def test_token_types(kind):
    """Only ELECTRA has them."""
    model, params, _, batch, expected = load(kind)
    others = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    difference = np.abs(np.asarray(logits_of(model, params, others)) - expected["logits"]).max()
    assert difference > 1e-3 if kind == "electra" else difference < 1e-5


def test_mpnets_positions_go_over_the_tokens_of_the_mask_if_words_are_given():
    model, params, _, batch, expected = load("mpnet")
    words = model.apply({"params": params}, batch["input_ids"], method="embed")
    given = {"inputs_embeds": words, "attention_mask": batch["attention_mask"]}
    np.testing.assert_allclose(logits_of(model, params, given), expected["logits"], rtol=0, atol=1e-5)


# Relative positions


def test_mpnets_buckets_are_exact():
    distances = np.arange(-600, 601)
    found = buckets(distances, bidirectional=True, count=32, farthest=128)
    np.testing.assert_array_equal(found, [mpnet_bucket(distance) for distance in distances])


def test_mpnets_bias_is_that_of_the_bucket_of_key_minus_query():
    table = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)  # eight rows more than are used
    config = encoder_config({"model_type": "mpnet", "num_attention_heads": 2, "relative_attention_num_buckets": 40})
    bias = RelativePositions(config).apply({"params": {"embedding": table}}, 140)
    rows = [[mpnet_bucket(key - query) for key in range(140)] for query in range(140)]
    np.testing.assert_allclose(bias, table[rows].transpose(2, 0, 1)[None], rtol=1e-6)


def test_mpnet_has_no_cudnn_attention():
    model, params, _, batch, _ = load("mpnet", attention="cudnn")
    with pytest.raises(InputError, match='attention="cudnn" cannot add .* relative positions; use attention="auto"'):
        model.apply({"params": params}, batch["input_ids"])


# Configs


@pytest.mark.parametrize(
    "values",
    (
        {"model_type": "distilbert"},
        {"model_type": "distilbert", "dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 9, "activation": "relu"},
        {"model_type": "distilbert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        {"model_type": "distilbert", "dropout": 0.3, "attention_dropout": 0.4, "seq_classif_dropout": 0.5},
        {"model_type": "distilbert", "hidden_act": "relu", "intermediate_size": 9, "layer_norm_eps": 0.1},
        {"model_type": "distilbert", "hidden_dropout_prob": 0.3, "classifier_dropout": 0.4, "type_vocab_size": 9},
        {"model_type": "distilbert", "sinusoidal_pos_embds": True, "tie_weights_": True, "output_past": True},
        {"model_type": "electra"},
        {"model_type": "electra", "embedding_size": 64, "hidden_size": 64, "num_attention_heads": 1},
        {"model_type": "electra", "summary_type": "mean", "summary_use_proj": False, "summary_last_dropout": 0.5},
        {"model_type": "electra", "classifier_dropout": 0.5, "position_embedding_type": "absolute"},
        {"model_type": "mpnet"},
        {"model_type": "mpnet", "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "vocab_size": 40},
        {"model_type": "mpnet", "relative_attention_num_buckets": 40, "hidden_act": "gelu_new"},
    ),
)
def test_configs_are_read_as_transformers_reads_them(values):
    from transformers import AutoConfig

    rest = {name: value for name, value in values.items() if name != "model_type"}
    theirs, ours = AutoConfig.for_model(values["model_type"], **rest), encoder_config(values)
    own_names = ours.file_names
    lacking = {"distilbert": {"layer_norm_eps", "type_vocab_size"}, "mpnet": {"type_vocab_size", "classifier_dropout"}}
    names = {entry.name for entry in dataclasses.fields(ours)} - {"id2label", "extra", "problem_type", "model_type"}
    for name in names - lacking.get(ours.model_type, set()):
        assert getattr(ours, name) == getattr(theirs, own_names.get(name, name)), name
    assert ours.layer_norm_eps == (1e-12 if ours.model_type == "distilbert" else theirs.layer_norm_eps)
    again = AutoConfig.for_model(**ours.to_dict()).to_dict()
    expected = theirs.to_dict()
    assert {name: again[name] for name in expected.keys() - {"architectures", "dtype"}} == {
        name: value for name, value in expected.items() if name not in ("architectures", "dtype")
    }
    assert encoder_config(ours.to_dict()) == dataclasses.replace(ours, extra=encoder_config(ours.to_dict()).extra)


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"model_type": "distilbert", "dim": 10, "n_heads": 4}, "dim 10 is not a multiple of n_heads 4"),
        ({"model_type": "distilbert", "activation": "silu"}, "activation 'silu' is not supported; use gelu, "),
        ({"model_type": "distilbert", "hidden_dim": 0}, "hidden_dim must be a positive whole number, got 0"),
        ({"model_type": "distilbert", "seq_classif_dropout": 1}, r"seq_classif_dropout must be a rate in \[0, 1\)"),
        ({"model_type": "electra", "embedding_size": 0}, "embedding_size must be a positive whole number, got 0"),
        ({"model_type": "electra", "embedding_size": "8"}, "embedding_size must be a positive whole number, got '8'"),
        ({"model_type": "electra", "is_decoder": True}, "is_decoder is True; only encoders"),
        (
            {"model_type": "electra", "position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key'",
        ),
        ({"model_type": "mpnet", "relative_attention_num_buckets": 31}, "relative_attention_num_buckets must be at l"),
        ({"model_type": "mpnet", "relative_attention_num_buckets": None, "pad_token_id": 0}, "pad_token_id must be 1"),
        ({"model_type": "mpnet", "max_position_embeddings": 2}, "max_position_embeddings must be above"),
    ),
)
def test_configs_that_are_refused(values, message):
    with pytest.raises(InputError, match=f"^config.json: .*{message}") as caught:
        encoder_config(values)
    assert "\n" not in str(caught.value)


def test_the_longest_text():
    longest = {kind: read_encoder_config(FIXTURES / kind).max_length for kind in KINDS}
    assert longest == {"distilbert": 24, "electra": 24, "mpnet": 22}  # positions 0 and 1 of MPNet are never a token's
    model, params, *_ = load("mpnet")
    with pytest.raises(ValueError, match="23 tokens, but the model has 22 positions"):
        model.apply({"params": params}, np.full((1, 23), 5))


# Checkpoints of other classes


def write_as(folder: Path, kind: str, tensors) -> Path:
    shutil.copy(FIXTURES / kind / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "surplus"),
    (
        ("distilbert", ("vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.bias")),
        ("electra", ("discriminator_predictions.dense_prediction.weight", "electra.embeddings.position_ids")),
        ("electra", ("generator_predictions.dense.weight", "generator_lm_head.bias")),
        ("mpnet", ("lm_head.dense.weight", "lm_head.decoder.bias", "mpnet.pooler.dense.weight")),
    ),
)
@pytest.mark.parametrize("bare", (False, True))
def test_a_pretrained_checkpoint_gets_a_new_head_quietly(kind, surplus, bare, tmp_path, caplog):
    """Under the encoder's prefix or without it; nothing but the head is new, and the pretraining heads are expected."""
    stored = load_file(FIXTURES / kind / "model.safetensors")
    encoder = {name: tensor for name, tensor in stored.items() if name.startswith(f"{kind}.")}
    tensors = {name.removeprefix(f"{kind}.") if bare else name: tensor for name, tensor in encoder.items()}
    tensors |= {name: np.ones((2, 2), np.float32) for name in surplus if not (bare and name.startswith(kind))}
    _, params, config = from_pretrained(write_as(tmp_path, kind, tensors), num_labels=2)
    message = "".join(record.getMessage() for record in caplog.records)
    assert "newly initialized: " in message and "not used" not in message
    head = {"pre_classifier", "classifier"} if kind == "distilbert" else {"classifier"}
    assert set(params) == {kind, *head}
    kept = {name: tensor for name, tensor in stored.items() if name.startswith(f"{kind}.")}
    save_pretrained(tmp_path / "saved", params=params, config=config)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, {name: saved[name] for name in kept}, kept)


def test_an_electra_whose_embeddings_have_another_width_than_its_config_says(tmp_path):
    values = json.loads((FIXTURES / "electra" / "config.json").read_text())
    shutil.copy(FIXTURES / "electra" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"embedding_size": 16}))
    with pytest.raises(InputError, match=r"electra.embeddings.word_embeddings.weight has shape \(64, 12\).*\(64, 16\)"):
        from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_has_no_masked_language_model_head(kind):
    with pytest.raises(InputError, match="no masked-language-model head"):
        load_mlm_head(FIXTURES / kind, load(kind)[2])


# PEFT

LINEAR = {
    "distilbert": "distilbert.transformer.layer.{}",
    "electra": "electra.encoder.layer.{}",
    "mpnet": "mpnet.encoder.layer.{}",
}
QUERY_VALUE = {
    "distilbert": ("attention.q_lin", "attention.v_lin"),
    "electra": ("attention.self.query", "attention.self.value"),
    "mpnet": ("attention.attn.q", "attention.attn.v"),
}
RESCALED = {
    "distilbert": ("attention.k_lin", "attention.v_lin", "ffn.lin2"),
    "electra": ("attention.self.key", "attention.self.value", "output.dense"),
    "mpnet": ("attention.attn.k", "attention.attn.v", "output.dense"),
}


def changed_modules(kind, config, leaves):
    model, params, *_ = load(kind)
    _, params = peft.add_peft(model, params, config, key=0)
    return {".".join(path[:-leaves]) for path in flatten_dict(params["peft"])}


@pytest.mark.parametrize("kind", KINDS)
def test_default_layers_of_lora_and_ia3(kind):
    def named(layers):
        return {f"{LINEAR[kind].format(number)}.{layer}" for number in range(2) for layer in layers}

    assert changed_modules(kind, peft.LoraConfig(), 2) == named(QUERY_VALUE[kind])
    assert changed_modules(kind, peft.Ia3Config(), 1) == named(RESCALED[kind])


ADAPTERS = CONFIGS | {
    "lora": peft.LoraConfig(rank=2, alpha=6.0, layers="."),
    "dora": peft.LoraConfig(  # the layers to which that formula gives one rank and alpha
        rank=2, alpha=6.0, layers=r"\.(key|value|[kv](_lin)?|lin1|intermediate\.dense)$", dora=True
    ),
}
# What the families' own modules do; with the others `make slow` tests that a family's layers have their names.
QUICK = {
    *(("adapters", "distilbert"), ("pfeiffer", "distilbert"), ("prefix", "distilbert")),
    *(("prompt", "electra"), ("adapters", "mpnet"), ("prefix", "mpnet"), ("prompt", "mpnet")),
}
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
    for name in ADAPTERS
    for kind in KINDS
]


def moved(params, mask):
    """The parameters with those that are trained moved at random, far enough to be felt."""
    random = np.random.default_rng(1)

    def move(keep, x):
        return x + 0.3 * random.normal(size=x.shape).astype(np.float32) if keep else x

    return jax.tree.map(move, mask, params)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_forward_pass_with_an_adapter_is_the_formula_and_files_hold_it(name, kind, tmp_path):
    """Saved from separate layers, loaded into stacked ones."""
    base, params, config, batch, _ = load(kind)
    model, params = peft.add_peft(base, params, ADAPTERS[name], key=0)
    params = moved(params, peft.trainable_mask(model, params))
    plain = {part: tree for part, tree in params.items() if part != "peft"}
    reference = numpy_encoders.CLASSES[kind](by_tensor_name(plain), config)
    tree = {".".join(path): np.float64(x) for path, x in flatten_dict(params["peft"]).items()}
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    without = reference.logits(**inputs)
    getattr(test_peft_formulas, name)(reference, tree)
    expected = reference.logits(**inputs)
    assert np.abs(expected - without).max() > 1e-2

    peft.save_peft(tmp_path, model=model, params=params)
    stacked, stacked_params, *_ = load(kind, layers="stacked")
    model, params = peft.load_peft(tmp_path, stacked, stacked_params)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("is_in_base", (True, False))
def test_the_first_part_of_distilberts_head_is_the_base_models_if_the_adapter_lacks_it(is_in_base, tmp_path):
    """PEFT saves the second part alone, unless it is told to save both. One that was drawn anew is then lost."""
    stored = load_file(FIXTURES / "distilbert" / "model.safetensors")
    kept = {name: x for name, x in stored.items() if is_in_base or not name.startswith("pre_classifier.")}
    (tmp_path / "base").mkdir()
    base, base_params, _ = from_pretrained(write_as(tmp_path / "base", "distilbert", kept), num_labels=3)
    model, params = peft.add_peft(base, base_params, peft.LoraConfig(), key=0)
    folder, name = tmp_path / "adapter", str(tmp_path / "base")
    peft.save_peft(folder, model=model, params=params, base_model_name_or_path=name)
    tensors = load_file(folder / "adapter_model.safetensors")
    fewer = {name: x for name, x in tensors.items() if "pre_classifier" not in name}
    assert len(fewer) == len(tensors) - 2
    save_file(fewer, folder / "adapter_model.safetensors")
    if not is_in_base:
        with pytest.raises(
            InputError, match=r"lacks pre_classifier, .*; train again with modules_to_save=\['pre_class"
        ):
            peft.load_peft_model(folder)
        return
    _, loaded, _ = peft.load_peft_model(folder)
    np.testing.assert_array_equal(loaded["pre_classifier"]["kernel"].T, stored["pre_classifier.weight"])
