"""Adapters of T5 and BART: their formulas in NumPy, training, files, generation, and what does not fit."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpy_seq2seq
import optax
import pytest
from flax.traverse_util import flatten_dict
from model_parity import quick_jit
from numpy_seq2seq import tanh_gelu
from safetensors.numpy import load_file

import pats_jax
from pats_jax import models
from pats_jax.errors import InputError
from pats_jax.models import peft, save_pretrained, stack_layers
from pats_jax.models.peft.model import draw

CONFIGS = {
    # of two layers; heads of as many units as the model has, as PEFT's prefixes need
    "t5": models.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        scale_decoder_outputs=False,
    ),
    "bart": models.BartConfig(
        vocab_size=40,
        d_model=16,
        max_position_embeddings=24,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=20,
        scale_embedding=True,
    ),
}
METHODS = {
    "lora": peft.LoraConfig(rank=2, alpha=6.0),
    "dora": peft.LoraConfig(
        rank=2,
        layers=r"\.(q|v|q_proj|v_proj|wo|fc2)$",
        dora=True,
        rank_pattern=("(wo|fc2)=3",),
        alpha_pattern=(r".*\.1\..*(q|q_proj)=5",),
    ),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9),
    "ia3": peft.Ia3Config(),
    "bitfit": peft.BitFitConfig(),
    "adapters": peft.AdapterConfig(size=3),
    "pfeiffer": peft.AdapterConfig(size=4, place="pfeiffer"),
    "prompt": peft.PromptConfig(length=3),
    "prefix": peft.PrefixConfig(length=3),
    "decoder prefix": peft.PrefixConfig(length=3, place="decoder"),
}
FITTING = [(name, kind) for name in METHODS for kind in CONFIGS if (name, kind) != ("bitfit", "t5")]


def cases(*quick):
    """All methods and models that fit each other; those that are not named are slow."""
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize(
        ("name", "kind"), [pytest.param(*case, marks=marks[case in quick]) for case in FITTING]
    )


@functools.cache
def base(kind):
    """A random model, and its parameters."""
    config = CONFIGS[kind]
    model = (models.T5 if kind == "t5" else models.Bart)(
        dataclasses.replace(config, **dict.fromkeys(config.rates, 0.0))
    )
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]
    rng = np.random.default_rng(0)

    def draw_leaf(path, leaf):
        return (0.4 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw_leaf, shapes)


@functools.cache
def moved(name, kind, layers="separate"):
    """The same with an adapter that has moved at random, in a layout of layers."""
    model, params = base(kind)
    if layers == "stacked":
        model, params = model.clone(layers=layers), stack_layers(params)
    model, params = peft.add_peft(model, params, METHODS[name], key=0)
    small = models.unstack_layers(params["peft"], model.config.num_layers_of)
    rng = np.random.default_rng(1)
    small = jax.tree.map(lambda p: p + 0.4 * rng.normal(size=p.shape).astype(np.float32), small)
    return model, params | {"peft": stack_layers(small) if layers == "stacked" else small}


def batch_of(rows=3):
    rng = np.random.default_rng(2)
    mask = np.arange(7) < np.array([7, 4, 6])[:rows, None]
    labels = np.where(np.arange(5) < np.array([5, 3, 5])[:rows, None], rng.integers(4, 40, (rows, 5)), -100)
    ids = np.where(mask, rng.integers(4, 40, (rows, 7)), 1)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def logits_of(model, params, batch=None):
    batch = batch_of() if batch is None else batch
    return np.asarray(quick_jit(lambda params: model.apply({"params": params}, **batch))(params))


# the formulas


def lora(reference, tree, config):
    plain = reference.linear

    def linear(name, x):
        if f"{name}.lora_A.kernel" not in tree:
            return plain(name, x)
        return plain(name, x) + 6.0 / 2 * x @ tree[f"{name}.lora_A.kernel"] @ tree[f"{name}.lora_B.kernel"]

    reference.linear = linear


def dora(reference, tree, config):
    """Alphas differ by layer, which no layout of layers minds."""
    plain = reference.linear

    def linear(name, x):
        if f"{name}.lora_A.kernel" not in tree:
            return plain(name, x)
        a, b = (tree[f"{name}.lora_{letter}.kernel"] for letter in "AB")
        alpha = 5.0 if ".1." in name and name.endswith(("q", "q_proj")) else 16.0
        whole = reference.p[f"{name}.kernel"] + alpha / a.shape[1] * a @ b
        whole = whole / np.linalg.norm(whole, axis=0) * tree[f"{name}.lora_magnitude_vector"]
        return x @ whole + reference.p.get(f"{name}.bias", 0)

    reference.linear = linear


def adalora(reference, tree, config):
    plain = reference.linear

    def linear(name, x):
        if f"{name}.lora_E.scale" not in tree:
            return plain(name, x)
        a, e, b = (tree[f"{name}.{leaf}"] for leaf in ("lora_A.kernel", "lora_E.scale", "lora_B.kernel"))
        return plain(name, x) + 16.0 / (3 + 1e-5) * x @ a * e @ b

    reference.linear = linear


def ia3(reference, tree, config):
    plain = reference.linear
    reference.linear = lambda name, x: (
        plain(name, x * tree.get(f"{name}.ia3_input", 1)) * tree.get(f"{name}.ia3_output", 1)
    )


def bitfit(reference, tree, config):
    for name, offset in tree.items():
        reference.p[name.replace(".bitfit", "")] = reference.p[name.replace(".bitfit", "")] + offset


def adapters(reference, tree, config):
    names = {"self_attn": "attention_adapter", "output": "output_adapter"}  # BART's

    def adapt(name, x, residual, norm):
        start, _, last = name.rpartition(".")
        own = f"{start}.{names.get(last)}" if config.model_type == "bart" else f"{name}.adapter"
        if f"{own}.down.kernel" not in tree:
            return x
        h, f = (x, tanh_gelu) if METHOD.place == "houlsby" else (norm(residual + x), lambda y: np.maximum(y, 0))
        inner = f(h @ tree[f"{own}.down.kernel"] + tree[f"{own}.down.bias"])
        return x + inner @ tree[f"{own}.up.kernel"] + tree[f"{own}.up.bias"]

    METHOD = METHODS["adapters" if any(".layer.0." in n or "attention_adapter" in n for n in tree) else "pfeiffer"]
    reference.adapt = adapt


def prompt(reference, tree, config):
    reference.prompt = tree["prompt_embeddings"]


def prefix(reference, tree, config):
    reference.prefix = lambda name: (tree[f"{name}.prefix.key"], tree[f"{name}.prefix.value"])


def decoder_prefix(reference, tree, config):
    """The view, the doubling and the chunks of four as PEFT has them."""
    layers = config.num_layers_of["decoder"]
    slots = np.moveaxis(tree["prompt_embeddings"].reshape(3, 2 * layers, config.d_model), 1, 0)
    chunks = np.concatenate([slots, slots]).reshape(layers, 4, 3, config.d_model)
    start = "decoder.block" if config.model_type == "t5" else "model.decoder.layers"
    names = [
        f"{start}.{number}.{'layer.0.SelfAttention' if config.model_type == 't5' else 'self_attn'}"
        for number in range(layers)
    ]
    by_name = {name: (chunk[0], chunk[1]) for name, chunk in zip(names, chunks, strict=True)}
    reference.prefix = by_name.get
    reference.first_position = lambda side: 3 if side == "decoder" else 0
    if config.model_type == "t5":
        plain = reference.own_bias

        def own_bias(side, length, bias):
            if side == "encoder":
                return plain(side, length, bias)
            masked = np.concatenate([np.zeros((1, 1, length, 3)), bias], axis=3)
            return reference.relative(side, length, length + 3) + masked

        reference.own_bias = own_bias


FORMULAS = {name: globals()[name.replace("pfeiffer", "adapters").replace(" ", "_")] for name in METHODS}
QUICK = [("lora", "t5"), ("dora", "t5"), ("adapters", "bart"), ("pfeiffer", "t5"), ("prompt", "bart"), ("prefix", "t5")]
QUICK += [("decoder prefix", "t5"), ("decoder prefix", "bart")]


@cases(*QUICK)
def test_the_forward_pass_is_the_formula(name, kind):
    """Of T5 with stacked layers."""
    model, params = moved(name, kind, "stacked" if kind == "t5" else "separate")
    plain_params = {part: tree for part, tree in params.items() if part != "peft"}
    count = model.config.num_layers_of
    reference = numpy_seq2seq.of(models.unstack_layers(plain_params, count), model.config)
    plain = reference.logits(batch_of())
    small = flatten_dict(models.unstack_layers(params["peft"], count))
    FORMULAS[name](reference, {".".join(path): np.asarray(x, np.float64) for path, x in small.items()}, model.config)
    expected = reference.logits(batch_of())
    np.testing.assert_allclose(logits_of(model, params), expected, rtol=0, atol=2e-4)
    assert np.abs(expected - plain).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_reference_is_the_model(kind):
    model, params = base(kind)
    expected = numpy_seq2seq.of(params, model.config).logits(batch_of())
    np.testing.assert_allclose(logits_of(model, params), expected, rtol=0, atol=1e-4)


@cases()
def test_both_layouts_are_one_model(name, kind):
    separate, stacked = (logits_of(*moved(name, kind, layers)) for layers in ("separate", "stacked"))
    np.testing.assert_allclose(stacked, separate, rtol=0, atol=2e-5)


# generation


BEAMS = models.GenerationConfig(
    num_beams=2, max_new_tokens=4, eos_token_id=(39,), pad_token_id=1, decoder_start_token_id=2
)


def generated(model, params, settings):
    batch = {name: batch_of()[name] for name in ("input_ids", "attention_mask")}
    return jax.device_get(quick_jit(models.make_generate_step(model, settings))(params, batch))


@cases(("prompt", "t5"), ("prefix", "t5"), ("decoder prefix", "bart"))
def test_scores_of_generated_texts_are_those_of_the_forward_pass(name, kind):
    """Of beam search, whose cache the prefixes are in: log-probabilities over length, of the whole text at once."""
    model, params = moved(name, kind, "stacked" if name == "prefix" else "separate")
    found = generated(model, params, BEAMS)
    sequences = found.sequences[:, 0, : int(found.length)]
    batch = {name: values for name, values in batch_of().items() if name != "labels"}
    logits = logits_of(model, params, batch | {"decoder_input_ids": sequences[:, :-1]})
    chosen = np.take_along_axis(jax.nn.log_softmax(logits), sequences[:, 1:, None], axis=2)[..., 0]
    ended = np.cumsum(np.pad(sequences[:, 1:] == 39, ((0, 0), (1, 0)))[:, :-1], axis=1) > 0
    scores = np.where(ended, 0, chosen).sum(axis=1) / (~ended).sum(axis=1)
    np.testing.assert_allclose(found.scores[:, 0], scores, rtol=0, atol=1e-4)


# training and files


@cases(("lora", "t5"))
def test_training_moves_the_adapter_only(name, kind):
    model, params = moved(name, kind)
    mask = peft.trainable_mask(model, params)
    state = pats_jax.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2), key=0, trainable=mask)
    step = quick_jit(pats_jax.make_train_step(pats_jax.make_seq2seq_loss_fn(model.apply)))
    state, metrics = step(state, batch_of())
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert {path[0] for path, keep in flatten_dict(mask).items() if keep} == {"peft"}
    for path, value in flatten_dict(state.all_params).items():
        assert np.array_equal(value, flatten_dict(params)[path]) or path[0] == "peft", path


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_saved_and_loaded_is_the_same(name, kind, tmp_path):
    model, params = moved(name, kind, "stacked")
    peft.save_peft(tmp_path, model=model, params=params)
    loaded, again = peft.load_peft(tmp_path, *base(kind))
    back = models.stack_layers(again["peft"])
    assert jax.tree.structure(back) == jax.tree.structure(params["peft"])
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params["peft"])))
    assert loaded.peft.kind == METHODS[name].kind
    if name not in ("lora", "dora", "adalora", "ia3"):  # whose regexes are then lists of names
        assert loaded.peft == METHODS[name]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_the_prompt_of_a_file_is_as_long_as_pefts(tmp_path):
    model, params = moved("prompt", "t5")
    peft.save_peft(tmp_path, model=model, params=params)
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    np.testing.assert_array_equal(saved[:3], params["peft"]["prompt_embeddings"])
    np.testing.assert_array_equal(saved[3:], np.zeros((3, 16)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", "t5"), ("dora", "bart"))),
        ("ia3", "t5"),
        ("bitfit", "bart"),
    ],
)
def test_merging(name, kind):
    """T5 has no biases that IA3 could rescale."""
    model, params = moved(name, kind)
    merged, weights = peft.merge_and_unload(model, params)
    assert type(merged) is type(base(kind)[0])
    np.testing.assert_allclose(logits_of(merged, weights), logits_of(model, params), rtol=0, atol=2e-4)
    back = peft.unmerge(*peft.merge(model, params))[1]
    for path, value in flatten_dict(back).items():
        np.testing.assert_allclose(value, flatten_dict(params)[path], rtol=0, atol=1e-5)


# Counted by PEFT and Transformers; the biases of BART by hand.
@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ("bart", peft.LoraConfig(), 442_368),
        ("bart", peft.Ia3Config(), 64_512),
        ("bart", peft.BitFitConfig(), 125_952),
        ("t5", peft.LoraConfig(), 884_736),
        ("t5", peft.Ia3Config(), 104_448),
        # two prefixes of 20 x 768 in each of the 36 attentions
        ("t5", peft.PrefixConfig(), 36 * 2 * 20 * 768),
        ("bart", peft.AdapterConfig(size=48, place="pfeiffer"), 12 * (2 * 48 * 768 + 48 + 768)),
    ],
)
def test_parameters_of_the_base_sizes(config, settings, expected):
    t5 = models.T5Config(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12)
    t5 = dataclasses.replace(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    bart = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in BASE.items()}
    model = models.T5(t5) if config == "t5" else models.Bart(models.BartConfig(d_model=768, **bart))
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, labels=ids))["params"]
    tree = jax.eval_shape(lambda params: draw(model, params, settings, jax.random.key(0)), params)
    assert sum(x.size for x in tree.values()) == expected


BASE = {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}


# what does not fit


def refused(make, *parts):
    with pytest.raises((InputError, ValueError)) as caught:
        make()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_settings_that_do_not_fit():
    t5, bart = base("t5"), base("bart")
    narrow = types.SimpleNamespace(config=dataclasses.replace(CONFIGS["t5"], d_kv=6))
    uneven = types.SimpleNamespace(config=dataclasses.replace(CONFIGS["bart"], decoder_layers=2))
    as_peft = METHODS["decoder prefix"]
    for make, *parts in (
        (lambda: peft.add_peft(*t5, peft.BitFitConfig(), key=0), "t5", "no biases", "ia3 or lora"),
        (lambda: peft.add_peft(*t5, peft.LoraConfig(train_pooler=True), key=0), "no pooler"),
        (lambda: peft.add_peft(*t5, peft.LoraConfig(layers="query"), key=0), "query", "matches no linear layer"),
        (lambda: as_peft.draw({}, narrow.config, jax.random.key(0)), "24 units", "16", "everywhere"),
        (lambda: as_peft.draw({}, uneven.config, jax.random.key(0)), "differ in layers", "everywhere"),
        (lambda: logits_of(*peft.add_peft(*bart, peft.PromptConfig(length=18), key=0)), "7 tokens", "18", "24"),
        (lambda: logits_of(*peft.add_peft(*bart, peft.PrefixConfig(length=20, place="decoder"), key=0)), "5 tokens"),
        (
            lambda: generated(*moved("decoder prefix", "bart"), dataclasses.replace(BEAMS, max_new_tokens=23)),
            "23 tokens and the prefix 3",
        ),
    ):
        refused(make, *parts)


def test_some_layers_alone_need_separate_layers():
    model, params = base("t5")
    stacked = model.clone(layers="stacked"), stack_layers(params)
    settings = peft.LoraConfig(layers=r"decoder\.block\.1\..*SelfAttention\.q$")
    assert settings.differs_by_layer and not peft.LoraConfig().differs_by_layer
    assert set(peft.add_peft(model, params, settings, key=0)[1]["peft"]) == {"decoder"}
    refused(lambda: peft.add_peft(*stacked, settings, key=0), "1 of 2 decoder layers", "separate")
    of_one_side = peft.LoraConfig(layers=r"^decoder.*SelfAttention\.q$")
    assert set(peft.add_peft(*stacked, of_one_side, key=0)[1]["peft"]) == {"decoder"}


def test_folders_that_do_not_fit(tmp_path):
    model, params = moved("lora", "t5")
    save_pretrained(tmp_path / "base", params=base("t5")[1], config=model.config)
    folder = tmp_path / "adapter"
    peft.save_peft(folder, model=model, params=params, base_model_name_or_path=str(tmp_path / "base"))
    loaded, again, config = peft.load_peft_seq2seq(folder)
    assert isinstance(loaded, peft.PeftT5) and config.model_type == "t5"
    refused(lambda: peft.load_peft_model(folder), "encoder-decoder", "load_peft_seq2seq")
    refused(lambda: peft.load_peft(folder, *base("bart")), "another base model")

    def edited(**changes):
        path = folder / "adapter_config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        try:
            refused(lambda: peft.load_peft(folder, *base("t5")), *changes, str(path))
        finally:
            path.write_text(before)

    edited(task_type="SEQ_CLS")
    edited(modules_to_save=["lm_head"])
    edited(target_modules=["q"])
    other = tmp_path / "prefix"
    peft.save_peft(other, model=moved("prefix", "t5")[0], params=moved("prefix", "t5")[1])
    refused(lambda: peft.load_peft(other, *base("bart")), "another base model")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_checkpointing_changes_nothing_and_bfloat16_little(name, kind):
    """Gradients of the adapter with stacked layers."""
    model, params = moved(name, kind, "stacked")

    def gradients(model):
        def loss(small):
            return pats_jax.make_seq2seq_loss_fn(model.apply, deterministic=True)(params | small, batch_of(), None)[0]

        return jax.tree.leaves(quick_jit(jax.grad(loss))({"peft": params["peft"]}))

    plain = gradients(model)
    assert np.sum([np.sum(np.square(x)) for x in plain]) > 1e-8
    for ours, expected in zip(gradients(model.clone(gradient_checkpointing=True)), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max() + 1e-7)
    rounded = logits_of(model.clone(dtype=jnp.bfloat16), params)
    assert rounded.dtype == np.float32
    exact = logits_of(model, params)
    assert 0.98 < np.corrcoef(rounded.ravel(), exact.ravel())[0, 1] < 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_dropout_is_drawn_from_the_key(name, kind):
    model, params = moved(name, kind)
    model = model.clone(config=CONFIGS[kind])
    if name == "lora":
        model = model.clone(peft=dataclasses.replace(model.peft, dropout=0.3))
    run = quick_jit(
        lambda key: model.apply({"params": params}, **batch_of(), deterministic=False, rngs={"dropout": key})
    )
    once, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.isfinite(once).all() and np.abs(once - other).max() > 1e-3
