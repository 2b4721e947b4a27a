"""Checkpoints in every form that people have them in, and the one-line errors for those that cannot be used."""

import json
import logging
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from model_parity import by_tensor_name
from safetensors.numpy import load_file, save_file

from pats_jax import models, random
from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_tokenizer, save_pretrained

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("bert", "roberta")
HEADS = {"bert": "classifier.weight", "roberta": "classifier.out_proj.weight"}


def stored(kind: str) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the config of a tiny classifier."""
    config = json.loads((FIXTURES / kind / "config.json").read_text())
    return load_file(FIXTURES / kind / "model.safetensors"), config


def without_head(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("classifier.")}


def write(folder: Path, tensors, config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_tensors(params, expected, **tolerance) -> None:
    ours = by_tensor_name(params)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], **{"rtol": 0, "atol": 0, **tolerance}, err_msg=name)


def refused(name_or_dir, *parts: str, num_labels: int | None = 3, **options) -> None:
    """from_pretrained must raise an InputError of one line with all the parts in it."""
    with pytest.raises(InputError) as caught:
        from_pretrained(name_or_dir, num_labels=num_labels, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Forms of a checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_names_without_prefix(kind, tmp_path):
    tensors, config = stored(kind)
    bare = {name.removeprefix(f"{kind}."): value for name, value in tensors.items()}
    _, params, _ = from_pretrained(write(tmp_path, bare, config), num_labels=3)
    assert_same_tensors(params, tensors)


def test_old_layer_norm_names(tmp_path):
    tensors, config = stored("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    _, params, _ = from_pretrained(write(tmp_path, old, config), num_labels=3)
    assert_same_tensors(params, tensors)


@pytest.mark.parametrize(("dtype", "rounding"), ((np.float16, 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)))
def test_half_precision_becomes_float32(dtype, rounding, tmp_path):
    tensors, config = stored("bert")
    half = {name: value.astype(dtype) for name, value in tensors.items()}
    _, params, _ = from_pretrained(write(tmp_path, half, config), num_labels=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert_same_tensors(params, tensors, rtol=rounding, atol=1e-6)
    assert_same_tensors(params, {name: value.astype(np.float32) for name, value in half.items()})


def write_shards(folder: Path) -> dict[str, np.ndarray]:
    """The tiny BERT in two files with an index."""
    tensors, config = stored("bert")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    write(folder, {}, config)
    (folder / "model.safetensors").unlink()
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_shards_with_an_index(tmp_path):
    tensors = write_shards(tmp_path)
    _, params, _ = from_pretrained(tmp_path, num_labels=3)
    assert_same_tensors(params, tensors)


def test_damaged_shards(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"classifier.bias": np.zeros(3, np.float32)}, shard)
    refused(tmp_path, "model-00002-of-00002.safetensors", "lacks tensor")
    shard.unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "missing")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for text, part in (
        ("{}", "weight_map: Field required"),
        ("null", "Input should be an object"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"classifier.bias": 3}}', "weight_map.classifier.bias: Input should be a valid string"),
        (
            '{"weight_map": {"classifier.bias": "../model.safetensors"}}',
            "'../model.safetensors' cannot be part of a path",
        ),
        ('{"weight_map": ' + "[" * 100_000, "model.safetensors.index.json"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(tmp_path, "model.safetensors.index.json", part)


@pytest.mark.parametrize("model_type", ("xlm-roberta", "camembert"))
def test_model_types_read_as_roberta(model_type, tmp_path):
    tensors, config = stored("roberta")
    folder = write(tmp_path / "in", tensors, config | {"model_type": model_type})
    _, params, config = from_pretrained(folder, num_labels=3)
    assert_same_tensors(params, tensors)
    save_pretrained(tmp_path / "out", params=params, config=config)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    prefix = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert"}[model_type]
    assert saved["model_type"] == model_type
    assert saved["architectures"] == [f"{prefix}ForSequenceClassification"]


# New, missing and surplus tensors


@pytest.mark.parametrize("kind", KINDS)
def test_new_head_is_drawn_and_announced(kind, tmp_path, caplog):
    tensors, config = stored(kind)
    folder = write(tmp_path, without_head(tensors), config | {"initializer_range": 0.5})
    _, params, _ = from_pretrained(folder, num_labels=50, key=1)
    assert f"newly initialized: {', '.join(sorted(set(tensors) - set(without_head(tensors))))}" in caplog.text
    ours = by_tensor_name(params)
    assert ours[HEADS[kind]].shape == (50, 16)
    assert abs(ours[HEADS[kind]].std() - 0.5) < 0.05  # 800 draws: the standard error is 0.0125
    assert abs(ours[HEADS[kind]].mean()) < 0.08
    assert not ours[HEADS[kind].replace("weight", "bias")].any()
    assert_same_tensors(from_pretrained(folder, num_labels=50, key=random.fast_key(1))[1], ours)
    other = by_tensor_name(from_pretrained(folder, num_labels=50, key=2)[1])
    assert not np.array_equal(other[HEADS[kind]], ours[HEADS[kind]])


@pytest.mark.parametrize("kind", KINDS)
def test_known_surplus_is_ignored_quietly(kind, tmp_path, caplog):
    tensors, config = stored(kind)
    extra = {f"{kind}.embeddings.position_ids": np.arange(24)[None]}
    if kind == "bert":
        extra |= {"cls.predictions.bias": np.zeros(64), "cls.seq_relationship.weight": np.zeros((2, 16))}
    else:
        extra |= {"lm_head.bias": np.zeros(64), "roberta.pooler.dense.weight": np.zeros((16, 16))}
    _, params, _ = from_pretrained(write(tmp_path, tensors | extra, config), num_labels=3)
    assert_same_tensors(params, tensors)
    assert not caplog.records


def test_masked_language_model_gets_a_new_pooler_and_head(tmp_path, caplog):
    tensors, config = stored("bert")
    body = {name: value for name, value in without_head(tensors).items() if ".pooler." not in name}
    folder = write(tmp_path, body, config | {"architectures": ["BertForMaskedLM"]})
    _, params, _ = from_pretrained(folder, num_labels=3)
    assert "bert.pooler.dense.weight" in caplog.text and "classifier.weight" in caplog.text
    assert 0.015 < np.std(params["bert"]["pooler"]["dense"]["kernel"]) < 0.025  # initializer_range 0.02, 256 draws


def test_surplus_is_reported_by_name(tmp_path, caplog):
    tensors, config = stored("bert")
    surplus = {"qa_outputs.weight": np.zeros((2, 16)), "bert.encoder.layer.2.output.dense.bias": np.zeros(16)}
    from_pretrained(write(tmp_path, tensors | surplus, config), num_labels=3)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "not used: bert.encoder.layer.2.output.dense.bias, qa_outputs.weight" in record.getMessage()


@pytest.mark.parametrize(
    "name",
    (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.attention.self.key.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
    ),
)
def test_missing_tensor_is_an_error_by_name(name, tmp_path):
    tensors, config = stored("bert")
    del tensors[name]
    refused(write(tmp_path, tensors, config), str(tmp_path), name)


@pytest.mark.parametrize("architecture", ("BertForSequenceClassification", "BertModel"))
@pytest.mark.parametrize("head", (True, False))
def test_a_checkpoint_without_pooler_gets_a_new_one(architecture, head, tmp_path, caplog):
    tensors, config = stored("bert")
    rest = {name: x for name, x in (tensors if head else without_head(tensors)).items() if ".pooler." not in name}
    folder = write(tmp_path, rest, config | {"architectures": [architecture]})
    _, params, _ = from_pretrained(folder, num_labels=3)
    assert "newly initialized: bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text
    assert ("train the head before" in caplog.text) == head and models.lacks_pooler(folder)
    kept = {name: x for name, x in by_tensor_name(params).items() if name in rest}
    assert kept.keys() == rest.keys() and all(np.array_equal(kept[name], rest[name]) for name in rest)


def test_what_has_a_pooler_or_needs_none():
    assert not models.lacks_pooler(FIXTURES / "bert") and not models.lacks_pooler(FIXTURES / "roberta")


def test_tensor_of_the_wrong_shape_type_or_content(tmp_path):
    tensors, config = stored("bert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    refused(write(tmp_path, tensors | {name: np.zeros((16, 32), np.float32)}, config), name, "(16, 32)", "(32, 16)")
    refused(write(tmp_path, tensors | {name: np.zeros((32, 16), np.int32)}, config), name, "int32")
    refused(write(tmp_path, tensors | {name: np.full((32, 16), np.nan, np.float32)}, config), name, "non-finite values")
    twice = tensors | {name.removeprefix("bert."): tensors[name]}
    refused(write(tmp_path, twice, config), name, "same parameter")


# The head and its labels


@pytest.mark.parametrize("kind", KINDS)
def test_label_count_that_does_not_fit_the_head(kind):
    refused(FIXTURES / kind, "3 labels", "2 are needed", "set ignore_mismatched_sizes", num_labels=2)
    _, params, config = from_pretrained(FIXTURES / kind, num_labels=2, ignore_mismatched_sizes=True)
    assert by_tensor_name(params)[HEADS[kind]].shape == (2, 16) and config.num_labels == 2
    _, params, _ = from_pretrained(FIXTURES / kind, num_labels=3, ignore_mismatched_sizes=True)
    assert_same_tensors(params, stored(kind)[0])  # a head that fits is kept


@pytest.mark.parametrize("kind", KINDS)
def test_new_head_in_place_of_the_checkpoints(kind, caplog):
    _, params, config = from_pretrained(FIXTURES / kind, num_labels=2, new_head=True)
    assert by_tensor_name(params)[HEADS[kind]].shape == (2, 16)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert HEADS[kind] in caplog.text


def test_labels_of_the_checkpoints_own_head(tmp_path):
    tensors, config = stored("bert")
    named = config | {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}
    _, _, config = from_pretrained(write(tmp_path, tensors, named), num_labels=None)
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.problem_type == "single_label_classification"
    write(tmp_path, without_head(tensors), named)
    refused(tmp_path, "no classification head", num_labels=None)
    write(tmp_path, tensors, named)
    with pytest.warns(UserWarning, match="orders its classes 0 no, 1 maybe, 2 yes, not 0 YES"):
        _, params, config = from_pretrained(tmp_path, num_labels=3, id2label={0: "YES", 1: "maybe", 2: "no"})
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert_same_tensors(params, tensors)


def test_labels_that_are_not_those_of_the_head(tmp_path, caplog):
    tensors, config = stored("bert")
    asked = {0: "yes", 1: "maybe", 2: "no"}
    write(tmp_path, tensors, config | {"id2label": {"0": "a", "1": "b", "2": "maybe"}})
    with pytest.warns(UserWarning, match="labels are 0 a, 1 b, 2 maybe, but the data's are 0 yes"):
        _, params, found = from_pretrained(tmp_path, num_labels=3, id2label=asked)
    assert found.id2label == asked
    assert_same_tensors(params, tensors)
    refused(tmp_path, "0 a, 1 b, 2 maybe", "0 yes, 1 maybe, 2 no", id2label=asked, strict_labels=True)
    for names in ("LABEL_0 LABEL_1 LABEL_2", "0 1 2"):
        caplog.clear()
        write(tmp_path, tensors, config | {"id2label": dict(enumerate(names.split()))})
        _, _, found = from_pretrained(tmp_path, num_labels=3, id2label=asked, strict_labels=True)
        assert found.id2label == asked and "have no names" in caplog.text and "0 yes, 1 maybe, 2 no" in caplog.text
    refused(tmp_path, "0 0, 1 1, 2 2", id2label={0: "1", 1: "2", 2: "3"}, strict_labels=True)  # other numbers


@pytest.mark.parametrize("problem_type", ("multi_label_classification", "regression"))
def test_a_head_with_several_answers_to_a_text_is_refused_by_its_problem_type(problem_type, tmp_path):
    tensors, config = stored("bert")
    write(tmp_path, tensors, config | {"problem_type": problem_type})
    refused(tmp_path, f"problem_type is {problem_type} with 3 labels", "ignore_mismatched_sizes")
    if problem_type == "regression":
        refused(tmp_path, "problem_type", num_labels=None)
    else:
        _, _, found = from_pretrained(tmp_path, num_labels=None)
        assert found.is_multi_label and found == from_pretrained(tmp_path, num_labels=3, multi_label=True)[2]
    _, _, found = from_pretrained(tmp_path, num_labels=3, new_head=True)
    assert found.problem_type == "single_label_classification"
    _, _, found = from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert found.problem_type == "single_label_classification"
    if problem_type == "multi_label_classification":
        _, params, _ = from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
        assert not np.array_equal(by_tensor_name(params)["classifier.weight"], tensors["classifier.weight"])


def test_regression_has_one_label(tmp_path):
    tensors, config = stored("roberta")
    folder = write(tmp_path, without_head(tensors), config)
    _, params, config = from_pretrained(folder, num_labels=1)
    assert config.problem_type == "regression"
    save_pretrained(tmp_path / "saved", params=params, config=config)
    _, _, again = from_pretrained(tmp_path / "saved", num_labels=None)
    assert (again.num_labels, again.problem_type) == (1, "regression")


@pytest.mark.parametrize(
    "options",
    (
        {"num_labels": 3, "regression": True},
        {"num_labels": 0},
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        {"num_labels": 3, "hidden_dropout": 1.0},
    ),
)
def test_arguments_that_make_no_sense(options):
    with pytest.raises(ValueError) as caught:
        from_pretrained(FIXTURES / "bert", **options)
    assert not isinstance(caught.value, InputError)


# Folders that cannot be used


def test_folder_or_config_missing_or_broken(tmp_path):
    refused(tmp_path / "absent", str(tmp_path / "absent"), "no such folder")
    refused("./absent", "no such folder")
    refused(tmp_path, "no config.json")
    config = tmp_path / "config.json"
    config.write_text('{\n  "model_type": "bert",\n  "hidden_size": }')
    refused(tmp_path, f"{config}: not valid JSON", "line 3")
    for text in ("[]", "null", "3"):
        config.write_text(text)
        refused(tmp_path, str(config), "not a JSON object")
    for text, part in (("", "not valid JSON"), ("[" * 100_000, "nested too deeply"), ("9" * 5000, "too long")):
        config.write_text(text)
        refused(tmp_path, str(config), part)
    config.write_bytes(b'{"model_type": "\xff"}')
    refused(tmp_path, str(config), "not UTF-8")


@pytest.mark.parametrize(
    ("change", "parts"),
    (
        ({"model_type": "gpt2"}, ("gpt2", "bert", "roberta", "xlm-roberta", "camembert")),
        ({"model_type": None}, ("None", "not supported")),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type", "relative_key", "absolute")),
        ({"is_decoder": True}, ("is_decoder",)),
        ({"hidden_act": "silu"}, ("silu", "gelu, gelu_new, relu")),
        ({"hidden_size": 0}, ("hidden_size",)),
        ({"num_attention_heads": 3}, ("hidden_size 16", "num_attention_heads 3")),
        ({"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob", "1.5")),
        ({"layer_norm_eps": 0}, ("layer_norm_eps",)),
        ({"id2label": {"0": "a", "2": "b"}}, ("id2label", "[0, 2]")),
        ({"id2label": ["a", "b"]}, ("id2label",)),
        ({"id2label": {}}, ("id2label must number its classes 0, 1, ..., got []",)),
        ({"id2label": {"0": "a", "1": 7}}, ("id2label must map class indices to names",)),
        ({"id2label": {"0": "a", "1.0": "b"}}, ("id2label must map class indices to names",)),
        ({"id2label": {"0": "a", "9" * 5000: "b"}}, ("id2label must map class indices to names",)),
        ({"id2label": {"0": "a", "00": "b"}}, ("id2label must number its classes",)),
        ({"id2label": None, "num_labels": 10**12}, ("num_labels", "from 1 to 1000000")),
        ({"id2label": None, "num_labels": True}, ("num_labels", "True")),
        ({"id2label": None, "num_labels": "3"}, ("num_labels", "'3'")),
        ({"model_type": ["bert"]}, ("model_type ['bert'] is not supported",)),
        ({"model_type": "x" * 100_000}, ("(100000 characters) is not supported",)),
        ({"architectures": 3}, ("architectures must be a list of class names, got 3",)),
        ({"architectures": [3]}, ("architectures must be a list",)),
        ({"is_decoder": "no"}, ("is_decoder is 'no'",)),
        ({"hidden_act": {"a": 1}}, ("hidden_act {'a': 1} is not supported",)),
        ({"num_hidden_layers": True}, ("num_hidden_layers must be a positive whole number, got True",)),
        ({"num_hidden_layers": 2.0}, ("num_hidden_layers must be a positive whole number, got 2.0",)),
        ({"intermediate_size": "32"}, ("intermediate_size must be a positive whole number, got '32'",)),
        ({"type_vocab_size": 0}, ("type_vocab_size must be a positive whole number",)),
        ({"hidden_dropout_prob": False}, ("hidden_dropout_prob", "False")),
        ({"classifier_dropout": float("nan")}, ("classifier_dropout must be a rate in [0, 1), got nan",)),
        ({"layer_norm_eps": float("nan")}, ("layer_norm_eps must be a positive number, got nan",)),
        ({"layer_norm_eps": float("inf")}, ("layer_norm_eps must be a positive number, got inf",)),
        ({"layer_norm_eps": "1e-12"}, ("layer_norm_eps must be a positive number, got '1e-12'",)),
        ({"layer_norm_eps": 10**400}, ("layer_norm_eps must be a positive number",)),
        ({"initializer_range": float("nan")}, ("initializer_range must be a number, 0 or more, got nan",)),
        ({"initializer_range": -0.1}, ("initializer_range must be a number, 0 or more, got -0.1",)),
        ({"initializer_range": [0.1]}, ("initializer_range",)),
        ({"pad_token_id": 64}, ("pad_token_id must be below vocab_size 64, got 64",)),
        ({"pad_token_id": -1}, ("pad_token_id must be a whole number, 0 or more, got -1",)),
        ({"pad_token_id": 23, "model_type": "roberta"}, ("max_position_embeddings must be above pad_token_id 23 + 1",)),
        ({"problem_type": "ranking"}, ("problem_type must be one of regression, single_label", "'ranking'")),
        ({"problem_type": ["regression"]}, ("problem_type must be one of",)),
    ),
)
def test_config_that_is_not_supported(change, parts, tmp_path):
    tensors, config = stored("bert")
    refused(write(tmp_path, tensors, config | change), str(tmp_path / "config.json"), *parts)


@pytest.mark.parametrize("flag", (False, 0, None))
def test_a_config_says_the_same_in_other_words(flag, tmp_path):
    tensors, config = stored("bert")
    changes = {"is_decoder": flag, "position_embedding_type": None, "layer_norm_eps": 1, "architectures": None}
    assert from_pretrained(write(tmp_path, tensors, config | changes), num_labels=3)[2].layer_norm_eps == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    (
        ({"num_hidden_layers": 10**7}, ("has 2 encoder layers", "num_hidden_layers", "10000000")),
        ({"num_hidden_layers": 3}, ("has 2 encoder layers", "says 3")),
        ({"vocab_size": 10**12}, ("word_embeddings.weight has shape (64, 16)", "(1000000000000, 16)")),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, ("word_embeddings.weight", "(64, 1000000000)")),
        ({"hidden_size": 10**4000, "num_attention_heads": 1}, ("word_embeddings.weight", "characters)")),
        ({"intermediate_size": 10**9}, ("intermediate.dense.weight has shape (32, 16)", "(1000000000, 16)")),
        ({"max_position_embeddings": 10**10}, ("position_embeddings.weight", "(10000000000, 16)")),
        ({"type_vocab_size": 10**10}, ("token_type_embeddings.weight", "(10000000000, 16)")),
    ),
)
@pytest.mark.parametrize("prefix", ("bert.", ""))
def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_made(
    change, parts, prefix, tmp_path, monkeypatch
):
    tensors, config = stored("bert")
    bare = {prefix + name.removeprefix("bert.") if name.startswith("bert.") else name: x for name, x in tensors.items()}
    monkeypatch.setattr(jax, "eval_shape", None)
    refused(write(tmp_path, bare, config | change), str(tmp_path), "config.json", *parts)


def test_a_head_of_no_labels_is_refused(tmp_path):
    tensors, config = stored("bert")
    empty = tensors | {"classifier.weight": np.zeros((0, 16), np.float32)}
    refused(write(tmp_path, empty, config), "classifier.weight has no labels", num_labels=None)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "model.safetensors.index.json", "merges.txt"))
@pytest.mark.parametrize("kind", ("pipe", "device"))
def test_what_is_no_regular_file_is_not_opened(name, kind, tmp_path):
    tensors, config = stored("bert")
    path = write(tmp_path, tensors, config) / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(tmp_path, f"{path}: not a regular file")
    with pytest.raises(InputError, match="not a regular file"):
        load_tokenizer(tmp_path)


def test_a_linked_shard_is_read_and_a_directory_is_none(tmp_path):
    """As the hub's cache has its files: every one a link out of the snapshot."""
    tensors, config = stored("bert")
    write(tmp_path / "blobs", tensors, config)
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert_same_tensors(from_pretrained(tmp_path / "snapshot", num_labels=3)[1], tensors)
    (tmp_path / "blobs" / "model.safetensors").unlink()
    refused(tmp_path / "snapshot", "has no safetensors weights")
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    (tmp_path / "snapshot" / "model.safetensors").mkdir()
    refused(tmp_path / "snapshot", "model.safetensors: not a regular file")


def test_a_tensor_that_numpy_cannot_hold_is_named(tmp_path):
    tensors, config = stored("bert")
    path = write(tmp_path, tensors, config) / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["bert.pooler.dense.bias"]["dtype"] = "F8_E4M3"  # one byte each for 16
    header["bert.pooler.dense.bias"]["shape"] = [64]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    refused(tmp_path, "tensor bert.pooler.dense.bias of type F8_E4M3 and shape (64,) cannot be read")


def test_truncated_or_altered_safetensors(tmp_path):
    tensors, config = stored("bert")
    weights = write(tmp_path, tensors, config) / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", whole + b"x", b"<html>" + whole[6:], whole[:8] + b"?" + whole[9:]):
        weights.write_bytes(damaged)
        refused(tmp_path, str(weights), "download it again")


def test_pickled_weights_are_refused(tmp_path):
    _, config = stored("bert")
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, str(tmp_path), "has no safetensors weights", "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(tmp_path, "only pickled weights", "pytorch_model.bin", "safetensors")


def test_loading_compiles_one_program_for_the_head_not_one_for_every_tensor(tmp_path, caplog):
    """Of a size that no other test has, or programs would be there already."""
    tensors, config = stored("bert")
    wider = {name: np.pad(x, [(0, 4)] * x.ndim) for name, x in without_head(tensors).items()}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size")
    folder = write(tmp_path, wider, config | {name: config[name] + 4 for name in sizes})
    with jax.log_compiles():
        from_pretrained(folder, num_labels=3)
    compiled = [line for line in caplog.messages if line.startswith("Finished XLA compilation of")]
    assert len(compiled) <= 4, compiled  # two scalars, the key, and what is drawn by it
