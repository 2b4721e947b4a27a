"""The bank that every kind of adapter passes; their files and settings."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from model_parity import logits_of
from safetensors.numpy import load_file, save_file
from test_models import inputs, load

import pats_jax
from pats_jax import models, random
from pats_jax.errors import InputError
from pats_jax.models import SequenceClassifier, peft

CONFIGS = {
    "lora": peft.LoraConfig(rank=2, alpha=6.0, layers=r"self\.(query|value)$|output\.dense$|pooler"),
    "dora": peft.LoraConfig(
        rank=2,
        alpha=6.0,
        layers=r"self\.(query|value)$|output\.dense$|pooler",
        dora=True,
        rank_pattern=("attention.output.dense=3", r"1\.output\.dense=1"),
        alpha_pattern=("query=2.5",),
    ),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, alpha=40.0, total_step=9),
    "bitfit": peft.BitFitConfig(),
    "ia3": peft.Ia3Config(),
    "adapters": peft.AdapterConfig(size=3),
    "pfeiffer": peft.AdapterConfig(size=4, place="pfeiffer"),  # of 3 ReLUs, key 0 draws all of one adapter dead
    "prompt": peft.PromptConfig(length=3),
    "prefix": peft.PrefixConfig(length=3),
}
MERGING = ("lora", "dora", "adalora", "bitfit", "ia3")
KINDS = pytest.mark.parametrize("name", CONFIGS)
MORE_KINDS = ("adalora", "bitfit", "ia3", "adapters", "prompt")  # change the forward pass in ways that others have, too
SOME_KINDS = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("lora", "prompt", "prefix") else pytest.mark.slow) for name in CONFIGS],
)
FAMILIES = pytest.mark.parametrize("family", ("bert", pytest.param("roberta", marks=pytest.mark.slow)))


@functools.cache
def base(family="bert"):
    """A tiny plain model, its parameters, config and batch."""
    return load(family)[:4]


@functools.cache
def started(name, family="bert"):
    """The model with modules as they start, its parameters and the batch."""
    plain, params, _, batch = base(family)
    return *peft.add_peft(plain, params, CONFIGS[name], key=0), batch


@functools.cache
def trained(name, family="bert"):
    """The same with modules and head moved at random."""
    model, params, batch = started(name, family)
    rng = np.random.default_rng(1)

    def move(keep, p):
        return p + 0.3 * rng.normal(size=p.shape).astype(np.float32) if keep else p

    return model, jax.tree.map(move, peft.trainable_mask(model, params), params), batch


def bare(params):
    return {name: tree for name, tree in params.items() if name != "peft"}


def same(tree, other):
    return all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(other)))


def test_there_is_a_kind_for_each_of_these():
    assert set(peft.KINDS) == {config.kind for config in CONFIGS.values()}
    for kind in peft.KINDS.values():
        assert kind.summary and kind.source.startswith("https://arxiv.org/")


# the bank


@FAMILIES
@KINDS
def test_start(name, family):
    """LoRA, BitFit and IA3 start as the base model, adapters nearly so; virtual tokens change it."""
    model, params, batch = started(name, family)
    plain, plain_params, *_ = base(family)
    before = plain.apply({"params": plain_params}, **inputs(batch))
    after = model.apply({"params": params}, **inputs(batch))
    difference = np.abs(after - before).max()
    if name == "dora":  # divides by norms that are those that it multiplies by, up to rounding
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
    elif name in MERGING:
        np.testing.assert_array_equal(after, before)
    elif name in ("adapters", "pfeiffer"):
        assert 0 < difference < 1e-4
    else:
        assert difference > 1e-3


@KINDS
def test_start_is_a_function_of_the_key(name):
    plain, params, *_ = base()
    again, other = (peft.add_peft(plain, params, CONFIGS[name], key=key)[1]["peft"] for key in (0, 1))
    assert same(again, started(name)[1]["peft"])
    assert same(other, again) == (name in ("bitfit", "ia3"))


@pytest.mark.parametrize(
    "name",
    [
        *("lora", "pfeiffer", "prefix"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", *MORE_KINDS)),
    ],
)
def test_training_moves_the_modules_and_the_head_only(name):
    model, params, batch = started(name)
    mask = peft.trainable_mask(model, params)
    tx, bytes_each = optax.adamw(1e-2), 8
    if name == "lora":
        tx, bytes_each = pats_jax.pats(tx, noise_scale=1e-3, key=0), 12
    state = pats_jax.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=0, trainable=mask)
    loss_fn = pats_jax.make_loss_fn(model.apply)
    step = model_parity.quick_jit(pats_jax.make_train_step(loss_fn))
    for _ in range(3):  # A of LoRA has no gradient before B has moved
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    for path, keep in flatten_dict(mask).items():
        before, after = (flatten_dict(tree)[path] for tree in (params, state.all_params))
        assert np.array_equal(before, after) != keep, path
        assert keep == (path[0] in ("peft", "classifier"))
    count, total = peft.count_parameters(model, params)
    assert count == sum(x.size for x in jax.tree.leaves(state.params))
    assert total == sum(x.size for x in jax.tree.leaves(params))
    held = sum(
        x.nbytes for x in jax.tree.leaves(state.opt_state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    assert bytes_each * count <= held < bytes_each * count + 128  # moments (and sensitivity), float32; counters
    gradients = jax.eval_shape(
        lambda trained, frozen: jax.grad(lambda p: loss_fn(pats_jax.trees.combine(p, frozen), batch, state.key)[0])(
            trained
        ),
        state.params,
        state.frozen,
    )
    assert sum(x.size for x in jax.tree.leaves(gradients)) == count


@FAMILIES
@KINDS
def test_saved_and_loaded_is_the_same(name, family, tmp_path):
    model, params, batch = trained(name, family)
    peft.save_peft(tmp_path, model=model, params=params, base_model_name_or_path="base/of-it")
    plain, plain_params, *_ = base(family)
    loaded, again = peft.load_peft(tmp_path, plain, plain_params, base_model_name_or_path="base/of-it")
    assert jax.tree.structure(again) == jax.tree.structure(params) and same(again, params)
    assert dataclasses.replace(loaded.peft, **_layers_of(model.peft)) == model.peft
    np.testing.assert_array_equal(
        loaded.apply({"params": again}, **inputs(batch)), model.apply({"params": params}, **inputs(batch))
    )


def _layers_of(config):
    """Regexes come back as one over the layers that they matched."""
    fields = dataclasses.asdict(config)
    return {field: fields[field] for field in ("layers", "input_layers", "output_layers") if field in fields}


@pytest.mark.parametrize("name", MERGING)
def test_merging(name):
    model, params, batch = trained(name)
    logits = logits_of(model, params, batch)
    merged, merged_params = peft.merge(model, params)
    assert np.abs(logits - logits_of(*base()[:2], batch)).max() > 1e-2
    np.testing.assert_allclose(logits_of(merged, merged_params, batch), logits, rtol=0, atol=1e-5)
    plain, plain_params = peft.merge_and_unload(model, params)
    assert type(plain) is SequenceClassifier and "peft" not in plain_params
    np.testing.assert_allclose(logits_of(plain, plain_params, batch), logits, rtol=0, atol=1e-5)
    assert same(bare(merged_params), plain_params)
    with pytest.raises(ValueError, match="already merged"):
        peft.merge(merged, merged_params)
    with pytest.raises(ValueError, match="unmerge it first"):
        peft.disable(merged, merged_params)
    back, back_params = peft.unmerge(merged, merged_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), back_params, params)
    np.testing.assert_allclose(logits_of(back, back_params, batch), logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not merged"):
        peft.unmerge(back, back_params)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - MERGING))
def test_what_is_no_change_of_weights_does_not_merge(name):
    with pytest.raises(ValueError, match="cannot be merged: it does not change the weights"):
        peft.merge_and_unload(*trained(name)[:2])


def test_a_scale_of_zero_cannot_be_unmerged():
    model, params, _ = trained("ia3")
    scale = params["peft"]["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["key"]["ia3_output"]
    zeroed = flatten_dict(params) | {
        ("peft", "bert", "encoder", "layer", "0", "attention", "self", "key", "ia3_output"): scale.at[0].set(0.0)
    }
    with pytest.raises(ValueError, match="contains a zero"):
        peft.unmerge(*peft.merge(model, unflatten_dict(zeroed)))


@KINDS
def test_disabled_it_is_the_base_model(name):
    model, params, batch = trained(name)
    off, off_params = peft.disable(model, params)
    plain, plain_params, *_ = base()
    assert off == plain and same(off_params, plain_params | {"classifier": params["classifier"]})
    with_its_head = plain_params | {"classifier": params["classifier"]}
    np.testing.assert_array_equal(
        off.apply({"params": off_params}, **inputs(batch)), plain.apply({"params": with_its_head}, **inputs(batch))
    )


@FAMILIES
@SOME_KINDS
def test_word_embeddings_in_place_of_the_ids_change_nothing(name, family):
    model, params, batch = trained(name, family)
    rest = {key: x for key, x in inputs(batch).items() if key != "input_ids"}
    words = model.apply({"params": params}, batch["input_ids"], method="embed")
    options = {"deterministic": False, "rngs": {"dropout": random.fast_key(0)}}
    np.testing.assert_array_equal(
        model.apply({"params": params}, inputs_embeds=words, **rest, **options),
        model.apply({"params": params}, **inputs(batch), **options),
    )


# More tokens, and more keys and values: what a choice of tokens could get wrong.
@pytest.mark.parametrize(
    "name",
    [
        *("prompt", "prefix"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in ("prompt", "prefix")),
    ],
)
def test_first_token_only_and_gradient_checkpointing_change_nothing_but_rounding(name):
    model, params, batch = trained(name)
    other = model.clone(first_token_only=False, gradient_checkpointing=True)

    @functools.partial(model_parity.quick_jit, static_argnums=0)
    def loss_and_gradient(model, modules):
        def loss(modules):
            logits = model_parity.apply(model, params | {"peft": modules}, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        return jax.value_and_grad(loss)(modules)

    (loss, gradients), (other_loss, other_gradients) = (loss_and_gradient(m, params["peft"]) for m in (model, other))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other_gradients, gradients)


@KINDS
def test_objectives(name):
    """R3F noises word embeddings; LNSR goes on from hidden states, which have a prompt's tokens among them."""
    model, params, batch = trained(name)
    both = pats_jax.with_objectives(model.apply, pats_jax.r3f(eps=0.1), pats_jax.lnsr(1), deterministic=True)
    r3f = pats_jax.with_objectives(model.apply, pats_jax.r3f(eps=0.1), deterministic=True)
    key = random.fast_key(0)
    loss, metrics = r3f(params, batch, key)
    assert np.isfinite(loss) and metrics["r3f"] > 0
    if name == "prompt":
        with pytest.raises(ValueError, match="continue_from cannot be used with a prompt"):
            both(params, batch, key)
    else:
        assert both(params, batch, key)[1]["lnsr"] > 0


@pytest.mark.parametrize(
    "name", ["lora", "pfeiffer", "prefix", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_KINDS)]
)
def test_bfloat16_is_for_computation_only(name):
    model, params, batch = trained(name)
    rough = logits_of(model.clone(dtype=jnp.bfloat16), params, batch)
    error = np.abs(rough - logits_of(model, params, batch)).max()
    assert rough.dtype == jnp.float32 and 1e-4 < error < 0.1


def test_twice_is_an_error():
    model, params, _ = started("lora")
    with pytest.raises(ValueError, match="already has an adapter"):
        peft.add_peft(model, params, peft.Ia3Config(), key=0)


def test_a_plain_model_has_nothing_to_merge():
    for function in (peft.merge, peft.unmerge, peft.disable, peft.merge_and_unload, peft.trainable_mask):
        with pytest.raises(ValueError, match="has no adapter"):
            function(*base()[:2])


@KINDS
def test_the_pooler_is_trained_and_saved_on_request(name, tmp_path):
    plain, plain_params, *_ = base()
    config = dataclasses.replace(CONFIGS[name], train_pooler=True)
    model, params = peft.add_peft(plain, plain_params, config, key=0)
    assert not any("pooler" in path for path in flatten_dict(params["peft"])), "trained whole or by a module, not both"
    mask = flatten_dict(peft.trainable_mask(model, params))
    kept = {path for path, keep in mask.items() if keep and path[0] != "peft"}
    assert {path[:2] for path in kept} == {("bert", "pooler"), ("classifier", "kernel"), ("classifier", "bias")}
    params["bert"] = params["bert"] | {"pooler": jax.tree.map(lambda p: p + 1.0, params["bert"]["pooler"])}
    peft.save_peft(tmp_path, model=model, params=params)
    loaded, again = peft.load_peft(tmp_path, plain, plain_params)
    assert same(again, params) and loaded.peft.train_pooler
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "pooler"]


# files


LAYER = "base_model.model.bert.encoder.layer.0"
HEAD = {"base_model.model.classifier.weight": (3, 16), "base_model.model.classifier.bias": (3,)}
PROMPT_HEAD = {name.replace("model.model", "model"): shape for name, shape in HEAD.items()}


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            peft.LoraConfig(rank=4, layers=r"0\.attention\.self\.query"),
            {
                f"{LAYER}.attention.self.query.lora_A.weight": (4, 16),
                f"{LAYER}.attention.self.query.lora_B.weight": (16, 4),
            },
        ),
        (
            peft.AdaLoraConfig(init_r=4, target_r=2, layers=r"0\.attention\.self\.query"),
            {
                f"{LAYER}.attention.self.query.lora_A": (4, 16),
                f"{LAYER}.attention.self.query.lora_B": (16, 4),
                f"{LAYER}.attention.self.query.lora_E": (4, 1),
            },
        ),
        (
            peft.Ia3Config(output_layers=r"0.*key$", input_layers=r"layer\.0\.output\.dense$"),
            {f"{LAYER}.attention.self.key.ia3_l": (16, 1), f"{LAYER}.output.dense.ia3_l": (1, 32)},
        ),
        (peft.PromptConfig(length=5), {"prompt_embeddings": (5, 16)}),
        (peft.PrefixConfig(length=5), {"prompt_embeddings": (5, 64)}),
    ],
)
def test_tensors_have_the_names_and_shapes_of_pefts_files(config, expected, tmp_path):
    model, params = peft.add_peft(*base()[:2], config, key=0)
    peft.save_peft(tmp_path, model=model, params=params)
    found = {name: x.shape for name, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert found == expected | (PROMPT_HEAD if "prompt_embeddings" in expected else HEAD)


def saved(folder, name="lora"):
    model, params, _ = trained(name)
    peft.save_peft(folder, model=model, params=params, base_model_name_or_path="base/of-it")
    return folder


def refused(folder, *parts, plain=None, **options):
    model, params = plain or base()[:2]
    with pytest.raises(InputError) as caught:
        peft.load_peft(folder, model, params, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@KINDS
def test_modules_of_another_base_model_are_refused(name, tmp_path):
    saved(tmp_path, name)
    model, *_ = base()
    for changes in ({"hidden_size": 8}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        other = SequenceClassifier(dataclasses.replace(model.config, **changes))
        shapes = jax.eval_shape(other.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
        if name in ("lora", "dora", "adalora", "ia3") and changes == {"num_hidden_layers": 3}:
            continue  # any layers may be chosen
        if name == "prompt" and "hidden_size" not in changes:
            continue  # a prompt is before all layers
        refused(
            tmp_path, "another base model", plain=(other, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
        )
    refused(tmp_path, "base/of-it", "not for other/name", base_model_name_or_path="other/name")
    refused(
        tmp_path, "another base model", plain=base("roberta")[:2]
    ) if name != "prompt" and name != "prefix" else None


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA' is not supported"),
        ({"use_dora": True}, f"lacks {LAYER[17:]}.attention.output.dense.lora_magnitude_vector, which use_dora of"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"query": 4}}, f"rank_pattern 'query' is 4, but tensor {LAYER[17:]}.attention.self.query"),
        ({"r": "eight"}, "adapter_config.json: r: Input should be a valid integer"),
        ({"r": 3}, "r is 3, but tensor bert.encoder.layer.0.attention.output.dense.lora_A.weight has shape (2, 16)"),
        ({"lora_alpha": "x"}, "adapter_config.json: lora_alpha: Input should be a valid number"),
    ],
)
def test_what_a_config_may_not_say(changes, part, tmp_path):
    edit(saved(tmp_path), **changes)
    refused(tmp_path, part)


def test_damaged_folders(tmp_path):
    refused(tmp_path, "no adapter_config.json")
    saved(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    refused(tmp_path / "a", "not valid JSON")
    saved(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    headless = {name: x for name, x in tensors.items() if "classifier" not in name}
    save_file(headless, tmp_path / "b" / "adapter_model.safetensors")
    refused(tmp_path / "b", "lacks the head's tensor base_model.model.classifier")
    broken = tensors | {f"{LAYER}.output.dense.lora_A.weight": np.full((2, 32), np.nan, np.float32)}
    save_file(broken, tmp_path / "b" / "adapter_model.safetensors")
    refused(tmp_path / "b", "non-finite values")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"x")
    refused(tmp_path / "b", "truncated or not a safetensors file")


def test_merged_modules_are_not_saved(tmp_path):
    model, params = peft.merge(*trained("lora")[:2])
    with pytest.raises(ValueError, match="unmerge it first"):
        peft.save_peft(tmp_path, model=model, params=params)


def test_a_saved_folder_finds_its_base_model(tmp_path):
    plain, plain_params, config, batch = base()
    named = dataclasses.replace(config, id2label={0: "no", 1: "maybe", 2: "yes"})
    models.save_pretrained(tmp_path / "base", params=plain_params, config=named)
    plain = SequenceClassifier(named)
    model, params = peft.add_peft(plain, plain_params, CONFIGS["prefix"], key=0)
    peft.save_peft(tmp_path / "own", model=model, params=params, base_model_name_or_path=str(tmp_path / "base"))
    loaded, again, config = peft.load_peft_model(tmp_path / "own")
    assert dict(config.id2label) == {0: "no", 1: "maybe", 2: "yes"} and same(again, params)
    np.testing.assert_array_equal(logits_of(loaded, again, batch), logits_of(model, params, batch))
    (tmp_path / "own" / "config.json").unlink()  # as PEFT writes it
    assert same(peft.load_peft_model(tmp_path / "own")[1], params)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="no such folder"):
        peft.load_peft_model(tmp_path / "own")
    edit(tmp_path / "own", base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model"):
        peft.load_peft_model(tmp_path / "own")


# settings


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: peft.LoraConfig(rank=0), "lora_rank 0: must be at least 1"),
        (lambda: peft.LoraConfig(alpha=-1.0), "lora_alpha -1.0: must be greater than 0"),
        (lambda: peft.LoraConfig(dropout=1.0), r"lora_dropout 1.0: must be in \[0, 1\)"),
        (lambda: peft.AdapterConfig(size=0), "adapter_size 0"),
        (lambda: peft.AdapterConfig(place="mid"), "adapter_place mid: must be 'houlsby' or 'pfeiffer'"),
        (lambda: peft.PromptConfig(length=0), "prompt_length 0"),
        (lambda: peft.PrefixConfig(length=0), "prefix_length 0"),
        (
            lambda: peft.add_peft(*base()[:2], peft.LoraConfig(layers="nose"), 0),
            "lora_layers 'nose': matches no linear",
        ),
        (lambda: peft.add_peft(*base()[:2], peft.LoraConfig(layers="("), 0), r"lora_layers '\(': not a regular expr"),
        (lambda: peft.add_peft(*base()[:2], peft.Ia3Config(input_layers="nose"), 0), "ia3_input_layers 'nose'"),
        (
            lambda: peft.add_peft(*base("roberta")[:2], peft.LoraConfig(train_pooler=True), 0),
            "a roberta model has no pooler",
        ),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, expected",
    [
        (peft.LoraConfig(), 2 * 8 * 6 * (384 + 384)),
        (peft.AdaLoraConfig(), 2 * 6 * 12 * (384 + 384 + 1)),
        (peft.BitFitConfig(), 384 + 6 * (7 * 384 + 1536) + 384),
        (peft.Ia3Config(), 6 * (384 + 384 + 1536)),
        (peft.AdapterConfig(), 2 * 6 * (2 * 384 * 64 + 64 + 384)),
        (peft.AdapterConfig(place="pfeiffer"), 6 * (2 * 384 * 64 + 64 + 384)),
        (peft.PromptConfig(), 20 * 384),
        (peft.PrefixConfig(), 20 * 6 * 2 * 384),
    ],
)
def test_parameters_of_minilm(config, expected):
    """The counts that docs/peft.md gives; with the head under 3 % of the model, and so is AdamW's state."""
    sizes = models.EncoderConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = SequenceClassifier(sizes)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    flat = flatten_dict(params)
    held = {path: leaf for path, leaf in flat.items() if not config.trains_whole(path)}
    tree = jax.eval_shape(lambda base: config.draw(base, sizes, jax.random.key(0)), held)
    assert sum(leaf.size for leaf in tree.values()) == expected
    assert expected + 770 < 0.03 * sum(leaf.size for leaf in flat.values())
