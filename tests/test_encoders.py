"""The bank: what must hold for every encoder. A family that the table lists is tested without a line here.

Parity with Transformers is in `test_parity` and the fixtures; here a family is compared with itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from model_parity import quick_jit
from safetensors.numpy import load_file, save_file

from pats_jax import TrainState, make_loss_fn, make_train_step, models, random
from pats_jax.errors import InputError
from pats_jax.methods.masks import layer_mask
from pats_jax.methods.paths import MATRICES
from pats_jax.models import convert, layer_axis, peft, stack_layers, unstack_layers
from pats_jax.models.config import HEAD_PARTS, default_labels
from pats_jax.models.encoders.table import ENCODERS, encoder_of
from pats_jax.models.layout import separate_names
from pats_jax.training import runners

# One model type of each family: those that differ by their defaults alone are tested as that one.
FAMILIES = [name for number, name in enumerate(ENCODERS) if ENCODERS[name] not in list(ENCODERS.values())[:number]]
ROWS, LENGTH = 6, 12
LAYERS = dict.fromkeys(FAMILIES, 2) | {"modernbert": 4}  # global, twice local, global
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
# Where Transformers' defaults are not what checkpoints have.
OWN_SETTINGS = {
    "deberta-v2": {
        **{"relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p", "share_att_key": True},
        **{"norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu"},
    }
}
LIKE_BERT = ("roberta", "distilbert", "electra", "mpnet")  # their layers are BERT's, or nearly so
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind_of_layer = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_BERT else ()) for name in FAMILIES]
)


@functools.cache
def config_of(family):
    """A tiny config, read as from a file, so that what the file leaves out is Transformers' default."""
    kind = ENCODERS[family].config
    names = {field.name for field in dataclasses.fields(kind)}
    own = SIZES | {"num_hidden_layers": LAYERS[family]}
    sizes = {kind.file_names.get(name, name): size for name, size in own.items() if name in names}
    if kind.pad_token_id >= SIZES["vocab_size"]:  # ModernBERT's
        sizes["pad_token_id"] = 0
    return models.encoder_config({"model_type": family, "num_labels": 3, **sizes, **OWN_SETTINGS.get(family, {})})


@functools.cache
def model_of(family, **options):
    return models.SequenceClassifier(config_of(family), **options)


@functools.cache
def params_of(family):
    """Random parameters, norms and biases too; those that no file holds are as loading makes them."""
    config, rng = config_of(family), np.random.default_rng(0)
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = flatten_dict(jax.eval_shape(model_of(family).init, jax.random.key(0), ids)["params"])
    drawn = {path: (path[-1] == "scale") + 0.3 * rng.normal(size=leaf.shape) for path, leaf in shapes.items()}
    drawn |= {path: np.ones(shapes[path].shape) for path in config.unsaved}
    return unflatten_dict({path: np.asarray(x, np.float32) for path, x in drawn.items()})


@functools.cache
def batch_of(family):
    config, rng = config_of(family), np.random.default_rng(1)
    mask = (np.arange(LENGTH) < np.array([LENGTH, 3, 7, LENGTH - 1, 5, 8])[:, None]).astype(np.int32)
    ids = rng.integers(5, config.vocab_size, mask.shape)
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": rng.integers(max(config.type_vocab_size, 1), size=mask.shape, dtype=np.int32) * mask,
    }


@functools.partial(quick_jit, static_argnums=0, static_argnames="dropout")
def logits_of(model, params, batch, dropout=False):
    rngs = {"dropout": random.fast_key(3)} if dropout else None
    return model.apply({"params": params}, **batch, deterministic=not dropout, rngs=rngs)


@functools.partial(quick_jit, static_argnums=0)
def gradients_of(model, params, batch):
    """With dropout, of a sum over the logits in which each counts differently."""

    def loss(params):
        rngs = {"dropout": random.fast_key(3)}
        logits = model.apply({"params": params}, **batch, deterministic=False, rngs=rngs)
        return jnp.sum(jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * jax.nn.log_softmax(logits))

    return jax.grad(loss)(params)


@functools.cache
def separate_gradients(family):
    return flatten_dict(jax.device_get(gradients_of(model_of(family), params_of(family), batch_of(family))))


def assert_close(left, right, atol=2e-5):
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(left[path], right[path], rtol=1e-4, atol=atol, err_msg="/".join(path))


@every_family
def test_saved_and_loaded(family, tmp_path):
    """The same parameters and config; the names of the tensors begin as Transformers' do."""
    config, params = config_of(family), params_of(family)
    models.save_pretrained(tmp_path, params=params, config=config)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} <= {config.base_prefix, *HEAD_PARTS}
    assert len(tensors) == len(flatten_dict(params)) - len(config.unsaved)
    _, loaded, again = models.from_pretrained(tmp_path)
    for path, value in flatten_dict(params).items():
        np.testing.assert_array_equal(flatten_dict(loaded)[path], value, err_msg="/".join(path))
    expected = dataclasses.replace(config, problem_type="single_label_classification", extra=again.extra)
    assert again == expected
    assert models.read_encoder_config(tmp_path).to_dict() == again.to_dict() | {"problem_type": config.problem_type}


@every_family
def test_encoder_alone(family, tmp_path):
    """A checkpoint without prefix and head, as of Transformers' base class: the head is new, all else is read."""
    config, params = config_of(family), params_of(family)
    models.save_pretrained(tmp_path, params=params, config=config)
    start = f"{config.base_prefix}."
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    save_file(bare, tmp_path / "model.safetensors")
    _, loaded, new_config = models.from_pretrained(tmp_path, num_labels=5)
    assert new_config.num_labels == 5
    for path, value in flatten_dict(loaded).items():
        if path[0] == config.base_prefix:
            np.testing.assert_array_equal(value, flatten_dict(params)[path], err_msg="/".join(path))
        elif path[-1] == "kernel":
            assert 0 < np.std(value) < 2 * config.initializer_range
        else:
            assert np.all(np.asarray(value) == (path[-1] == "scale"))


@every_family
def test_damaged_checkpoints_are_refused(family, tmp_path):
    config = config_of(family)
    models.save_pretrained(tmp_path, params=params_of(family), config=config)
    tensors = load_file(tmp_path / "model.safetensors")
    words = ".".join((config.base_prefix, *config.words_path, "weight"))
    save_file(tensors | {words: tensors[words][:-1]}, tmp_path / "model.safetensors")
    width = config.embedding_size
    with pytest.raises(InputError, match=rf"{words} has shape \(39, {width}\), but config.json .* \(40, {width}\)"):
        models.from_pretrained(tmp_path)
    last = ".".join((config.base_prefix, *config.stack_path, f"{LAYERS[family] - 1}", ""))
    fewer = {name: x for name, x in tensors.items() if not name.startswith(last)}
    save_file(fewer, tmp_path / "model.safetensors")
    count = LAYERS[family]
    with pytest.raises(InputError, match=f"has {count - 1} encoder layers, but config.json .*says {count}"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in FAMILIES]
)  # gradients of the others are torch's by their own tests
def test_every_parameter_learns(family):
    """Each has a gradient but those that nothing reads, and key biases, which softmax does not see."""
    config, still = config_of(family), set()
    for path, gradient in separate_gradients(family).items():
        assert np.isfinite(gradient).all()
        if np.abs(gradient).max() < 1e-6:
            still.add(path)
    assert {path for path in still if path[-1] != "bias"} <= config.unsaved
    assert all("key" in path[-2] or path[-2].startswith("k") for path in still - config.unsaved)


@every_kind_of_layer
def test_stacked_layers_compute_what_separate_ones_do(family):
    model, stacked = model_of(family), model_of(family, layers="stacked")
    params, batch = params_of(family), batch_of(family)
    plain = stack_layers(params)
    place = (config_of(family).base_prefix, *config_of(family).stack_path)
    in_stack = [x for path, x in flatten_dict(plain).items() if path[: len(place)] == place]
    assert in_stack and all(len(x) == LAYERS[family] for x in in_stack)
    assert jax.tree.leaves(layer_axis(plain)).count(0) == len(in_stack)
    assert_close(flatten_dict(unstack_layers(plain, LAYERS[family])), flatten_dict(params), atol=0)
    np.testing.assert_allclose(
        logits_of(stacked, plain, batch, dropout=True), logits_of(model, params, batch, dropout=True), atol=2e-5
    )
    gradients = unstack_layers(jax.device_get(gradients_of(stacked, plain, batch)), LAYERS[family])
    assert_close(flatten_dict(gradients), separate_gradients(family))


@every_family
def test_padding_is_not_seen(family):
    """A row alone, without its padding, has the logits that it has in the batch."""
    model, params, batch = model_of(family), params_of(family), batch_of(family)
    together = logits_of(model, params, batch)
    assert np.ptp(together) > 0.01
    alone = {name: x[4:5, :5] for name, x in batch.items()}
    np.testing.assert_allclose(logits_of(model, params, alone)[0], together[4], atol=2e-5)


@every_family
def test_first_token_alone(family):
    """What the last layer leaves out does not reach the head; an empty row stays finite."""
    params, batch = params_of(family), batch_of(family)
    batch = {name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in batch.items()}
    whole = logits_of(model_of(family, first_token_only=False), params, batch)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(logits_of(model_of(family), params, batch)[:ROWS], whole[:ROWS], atol=2e-5)


@every_family
def test_words_and_hidden_states_in_place_of_ids(family):
    model, params, batch = model_of(family, first_token_only=False), params_of(family), batch_of(family)
    expected, states = quick_jit(functools.partial(model.apply, output_hidden_states=True))({"params": params}, **batch)
    assert len(states) == LAYERS[family] + 1
    words = model.apply({"params": params}, batch["input_ids"], method="embed")
    assert words.shape == (ROWS, LENGTH, config_of(family).embedding_size)
    rest = {name: x for name, x in batch.items() if name != "input_ids"}
    logits = quick_jit(model.apply)({"params": params}, inputs_embeds=words, **rest)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    again = quick_jit(lambda state: model.apply({"params": params}, continue_from=(1, state), **rest))(states[1])
    np.testing.assert_allclose(again, expected, atol=2e-5)


@every_family
def test_default_parameters_of_methods(family):
    """The noise of PATS is on all kernels of the layers, and on nothing else; a head is recognized as one."""
    config, params = config_of(family), params_of(family)
    chosen = {path for path, is_chosen in flatten_dict(layer_mask(params, MATRICES)).items() if is_chosen}
    place = (config.base_prefix, *config.stack_path)
    kernels = {path for path in flatten_dict(params) if path[: len(place)] == place and path[-1] == "kernel"}
    assert chosen == kernels
    names = jax.tree_util.tree_map_with_path(separate_names, stack_layers(params))
    dotted = {name for own in jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, list)) for name in own}
    assert dotted == {".".join(path) for path in flatten_dict(params)}


@pytest.mark.slow
@every_family
@pytest.mark.devices(8)
def test_sharded_over_devices(family):
    """A step with parameters cut over four devices and rows over two is a step on one device."""
    model, params, batch = model_of(family), params_of(family), batch_of(family)
    batch = {name: x[[0, 1, 2, 3, 4, 5, 0, 1]] for name, x in batch.items()} | {
        "labels": np.arange(8, dtype=np.int32) % 3
    }
    results = []
    for runner in (runners.make_runner(num_devices=1), runners.make_runner(fsdp=4)):
        create = functools.partial(TrainState.create, apply_fn=model.apply, tx=optax.sgd(0.1), key=0)
        state = runner.create_state(create, params)
        step = runner.compile_step(make_train_step(make_loss_fn(model.apply, deterministic=True)), state)
        state, _ = step(state, runner.put(batch))
        results.append(flatten_dict(jax.device_get(state.all_params)))
    assert_close(*results)


ADAPTERS = {
    "lora": peft.LoraConfig(rank=2, layers=r".*"),
    "ia3": peft.Ia3Config(),
    "adapters": peft.AdapterConfig(size=4),
    "bitfit": peft.BitFitConfig(),
    "prompt": peft.PromptConfig(length=3),
    "prefix": peft.PrefixConfig(length=3),
}
NO_BIASES = ("modernbert",)
CASES = [
    pytest.param(family, kind, marks=() if (family, kind) == ("bert", "lora") else pytest.mark.slow)
    for family in FAMILIES
    for kind in ADAPTERS
]


@pytest.mark.parametrize("family, kind", CASES)  # `make parity` compares LoRA of each kind of layer with PEFT's
def test_adapters(family, kind, tmp_path):
    """All of an adapter learns; both layouts compute the same; saved and loaded it is the same."""
    model, params, batch = model_of(family), params_of(family), batch_of(family)
    if (family, kind) in {(name, "bitfit") for name in NO_BIASES}:
        with pytest.raises(InputError, match="has no biases"):
            peft.add_peft(model, params, ADAPTERS[kind], key=0)
        return
    adapted, start = peft.add_peft(model, params, ADAPTERS[kind], key=0)
    if kind in ("lora", "ia3", "bitfit"):
        np.testing.assert_allclose(logits_of(adapted, start, batch), logits_of(model, params, batch), atol=2e-5)
    rng = np.random.default_rng(2)
    small = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), start["peft"])
    start = {**start, "peft": small}
    gradients = flatten_dict(gradients_of(adapted, start, batch)["peft"])
    still = {path for path, x in gradients.items() if np.abs(x).max() < 1e-7}
    assert all(path[-1] == "bias" or path[0] == "prompt_embeddings" for path in still), still
    expected = logits_of(adapted, start, batch)
    assert np.abs(expected - logits_of(model, params, batch)).max() > 1e-3

    stacked = model_of(family, layers="stacked")
    in_stack = {**stack_layers(params), "peft": stack_layers(small)}
    adapted_stack, _ = peft.add_peft(stacked, stack_layers(params), ADAPTERS[kind], key=0)
    np.testing.assert_allclose(logits_of(adapted_stack, in_stack, batch), expected, atol=2e-5)

    peft.save_peft(tmp_path, model=adapted, params=start, base_model_name_or_path="base")
    again, loaded = peft.load_peft(tmp_path, model, params)
    np.testing.assert_allclose(logits_of(again, loaded, batch), expected, atol=1e-6)


@every_family
def test_masked_language_model_head(family, tmp_path):
    """The head's tensors are found under the checkpoint's names, and give logits for every word."""
    config, params = config_of(family), params_of(family)
    masked_lm = encoder_of(config).masked_lm
    models.save_pretrained(tmp_path, params=params, config=config)
    tensors = load_file(tmp_path / "model.safetensors")
    if masked_lm is None:
        with pytest.raises(InputError, match="has no masked-language-model head"):
            models.load_mlm_head(tmp_path, config)
        return
    hidden = jnp.asarray(np.random.default_rng(5).normal(size=(2, config.hidden_size)), jnp.float32)
    words = config.word_embeddings(params)
    shapes = jax.eval_shape(masked_lm.head(config).init, jax.random.key(0), hidden, words)["params"]
    rng = np.random.default_rng(4)
    head = {path: np.asarray(rng.normal(size=x.shape), np.float32) for path, x in flatten_dict(shapes).items()}
    own = {convert.tensor_name(masked_lm.checkpoint_path(path)): convert.to_tensor(path, x) for path, x in head.items()}
    save_file(tensors | own, tmp_path / "model.safetensors")
    loaded = models.load_mlm_head(tmp_path, config)
    assert_close(flatten_dict(loaded), head, atol=0)
    logits = models.mlm_logits(loaded, config, hidden, words)
    assert logits.shape == (2, config.vocab_size) and np.isfinite(logits).all()
    more = models.mlm_logits({**loaded, "bias": loaded["bias"] + 1.0}, config, hidden, words)
    np.testing.assert_allclose(more - logits, 1.0, atol=1e-4)
    save_file(tensors | dict(list(own.items())[1:]), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="incomplete"):
        models.load_mlm_head(tmp_path, config)


@every_family
def test_another_head(family, tmp_path):
    """One label is regression; several labels per text are kept through a file."""
    config = dataclasses.replace(config_of(family), id2label=default_labels(1))
    params = flatten_dict(params_of(family))
    for path, x in params.items():
        if path[0] == "classifier" and (path[1] == "out_proj" or len(path) == 2):
            params[path] = x[..., :1]
    models.save_pretrained(tmp_path / "one", params=unflatten_dict(params), config=config)
    assert models.from_pretrained(tmp_path / "one")[2].problem_type == "regression"
    model, several, new = models.from_pretrained(tmp_path / "one", num_labels=4, multi_label=True, new_head=True)
    assert new.is_multi_label and logits_of(model, several, batch_of(family)).shape == (ROWS, 4)


@every_family
def test_more_words(family, tmp_path):
    """New rows follow the old, which stay; a text of old words has the same logits, and the file has the new size."""
    config, params, batch = config_of(family), params_of(family), batch_of(family)
    longer, new = models.resize_vocabulary(params, config, 50, key=0)
    words, old = new.word_embeddings(longer), config.word_embeddings(params)
    assert new.vocab_size == 50 and words.shape == (50, config.embedding_size)
    np.testing.assert_array_equal(words[:40], old)
    assert np.isfinite(words).all() and np.ptp(words[40:], axis=0).min() > 0
    expected = logits_of(model_of(family), params, batch)
    np.testing.assert_array_equal(logits_of(models.SequenceClassifier(new), longer, batch), expected)
    models.save_pretrained(tmp_path, params=longer, config=new)
    assert models.from_pretrained(tmp_path)[2].vocab_size == 50
    shorter, back = models.resize_vocabulary(longer, new, 40, key=0)
    np.testing.assert_array_equal(back.word_embeddings(shorter), old)


def test_new_words_are_like_the_old():
    """Each unit has the mean and the standard deviation of the old rows, up to chance; a size is refused."""
    config = models.EncoderConfig(vocab_size=4000, hidden_size=2)
    rng = np.random.default_rng(0)
    old = (np.array([3.0, -1.0]) + rng.normal(size=(4000, 2)) * np.array([0.5, 2.0])).astype(np.float32)
    params = {"bert": {"embeddings": {"word_embeddings": {"embedding": old}, "other": 1}}}
    longer, _ = models.resize_vocabulary(params, config, 8000, key=1)
    tables = longer["bert"]["embeddings"]
    assert tables["other"] == 1 and params["bert"]["embeddings"]["word_embeddings"]["embedding"] is old
    new = tables["word_embeddings"]["embedding"][4000:]
    np.testing.assert_allclose(np.mean(new, axis=0), [3.0, -1.0], atol=0.15)
    np.testing.assert_allclose(np.std(new, axis=0), [0.5, 2.0], rtol=0.05)
    with pytest.raises(ValueError, match="vocab_size 0: must be above pad_token_id 0"):
        models.resize_vocabulary(params, config, 0, key=1)


def test_other_model_types_are_refused_with_the_list():
    with pytest.raises(InputError, match=f"'gpt2' is not supported; use a checkpoint of type {', '.join(ENCODERS)}$"):
        models.encoder_config({"model_type": "gpt2"})
    with pytest.raises(InputError, match="text2text"):
        models.encoder_config({"model_type": "t5"})
