"""DoRA, ranks and alphas by patterns, and all linear layers, each against a computation of its own."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_parity import logits_of, quick_jit
from test_peft import bare, base, same, started, trained

from pats_jax import random
from pats_jax.errors import InputError
from pats_jax.models import peft, stack_layers, unstack_layers
from pats_jax.models.peft.layer_numbers import LayerNumbers


class One(nn.Module):
    """One linear layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x)


def one_layer(rank=2):
    """Kernel, bias, A, B, m and an input."""
    rng = np.random.default_rng(0)
    return (np.float32(rng.normal(size=size)) for size in ((5, 3), (3,), (5, rank), (rank, 3), (3,), (4, 5)))


def run(config, kernel, bias, a, b, m, x, *, deterministic=True, seed=0):
    tree = {"lora_A": {"kernel": a}, "lora_B": {"kernel": b}, "lora_magnitude_vector": m}
    variables = {"params": {"dense": {"kernel": kernel, "bias": bias}}, "peft": {"dense": tree}}
    with nn.intercept_methods(config.interceptor(None, deterministic)):
        return One().apply(variables, x, rngs={"dropout": random.fast_key(seed)})


def test_gradients_of_dora_take_the_norm_as_a_constant():
    kernel, bias, a, b, m, x = one_layer()
    config = peft.LoraConfig(rank=2, alpha=3.0, dora=True)
    weights = np.random.default_rng(1).normal(size=(4, 3))

    def loss(a, b, m):
        return jnp.sum(weights * run(config, kernel, bias, a, b, m, x))

    found = quick_jit(jax.grad(loss, (0, 1, 2)))(a, b, m)
    whole = np.float64(kernel) + 1.5 * a @ b
    norms = np.linalg.norm(whole, axis=0)
    scaled = weights * m / norms  # the gradient of x (W + s A B)
    expected = 1.5 * x.T @ scaled @ b.T, 1.5 * (x @ a).T @ scaled, np.sum(weights * (x @ whole), axis=0) / norms
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_of_dora_is_on_the_input_of_what_it_adds():
    """That is x' (W' - W), with the dropped x'; x W + b stays whole."""
    kernel, bias, a, b, m, x = one_layer()
    config = peft.LoraConfig(rank=2, alpha=3.0, dropout=0.5, dora=True)
    found = run(config, kernel, bias, a, b, m, x, deterministic=False)
    whole = np.float64(kernel) + 1.5 * a @ b
    added = whole / np.linalg.norm(whole, axis=0) * m - kernel
    kept = np.stack(np.meshgrid(*[[0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)  # every way to drop inputs
    for row, y in zip(x, found, strict=True):
        possible = row @ kernel + bias + (2 * kept * row) @ added
        assert np.abs(possible - y).max(axis=1).min() < 1e-4
    assert np.abs(found - run(config, kernel, bias, a, b, m, x, deterministic=False, seed=1)).max() > 1e-2
    plain = run(config, kernel, bias, a, b, m, x)
    np.testing.assert_allclose(plain, x @ kernel + bias + x @ added, rtol=1e-4, atol=1e-4)


def test_magnitudes_start_as_norms_in_both_layouts():
    model, params, _ = started("dora")
    plain, plain_params, *_ = base()
    tree, weights = flatten_dict(params["peft"]), flatten_dict(plain_params)
    magnitudes = {path: m for path, m in tree.items() if path[-1] == "lora_magnitude_vector"}
    for path, m in magnitudes.items():
        np.testing.assert_allclose(m, np.linalg.norm(weights[*path[:-1], "kernel"], axis=0), rtol=1e-6)
    assert len(magnitudes) == len({path[:-2] for path in tree if "lora_A" in path})
    stacked = plain.clone(layers="stacked"), stack_layers(plain_params)
    settings = peft.LoraConfig(dora=True)
    separate = peft.add_peft(plain, plain_params, settings, key=0)[1]["peft"]
    assert same(unstack_layers(peft.add_peft(*stacked, settings, key=0)[1]["peft"], 2), separate)


def test_a_column_without_length_is_not_divided_by():
    kernel, bias, a, b, m, x = one_layer()
    kernel[:, 1] = b[:, 1] = m[1] = 0.0
    assert np.isfinite(run(peft.LoraConfig(rank=2, dora=True), kernel, bias, a, b, m, x)).all()


def test_dora_is_unmerged_by_norms_that_it_keeps():
    """The merged weights alone have lost them; with a magnitude of 0 there is no way back."""
    model, params, batch = trained("dora")
    merged, merged_params = peft.merge(model, params)
    added = flatten_dict(merged_params["peft"]).keys() - flatten_dict(params["peft"]).keys()
    assert {path[-1] for path in added} == {"lora_weight_norm"} and len(added) == 9
    back = peft.unmerge(merged, merged_params)[1]
    assert jax.tree.structure(back) == jax.tree.structure(params)
    layer = params["peft"]["bert"]["pooler"]["dense"]
    layer = layer | {"lora_magnitude_vector": layer["lora_magnitude_vector"].at[0].set(0.0)}
    zeroed = params | {"peft": {"bert": params["peft"]["bert"] | {"pooler": {"dense": layer}}}}
    with pytest.raises(ValueError, match="pooler.dense.lora_magnitude_vector contains a zero"):
        peft.unmerge(*peft.merge(model, zeroed))


# patterns


def number_by_re(patterns, default, name):
    """PEFT's rule, by the standard library."""
    return next((n for key, n in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


PATTERNS = {
    "query": 3,
    r"^bert.encoder.layer.1.attention.self.key": 4,
    "key": 5,
    r"layer\.\d+\.output\.dense": 6,
    "output.dense": 7,
    r"1\..*": 9,
    "tion": 11,
    r".*\.0\.(attention|x)\.self\.value": 12,
}
NAMES = [
    f"bert.encoder.layer.{number}.{part}"
    for number in (0, 1, 11)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    + ("intermediate.dense", "output.dense")
] + ["bert.pooler.dense"]


def test_patterns_match_as_in_peft():
    orders = [PATTERNS, dict(reversed(PATTERNS.items())), *({key: n} for key, n in PATTERNS.items())]
    found = set()
    for patterns in orders:
        numbers = LayerNumbers([f"{key}={n}" for key, n in patterns.items()], 2, "flag", int)
        for name in NAMES:
            assert numbers(name) == number_by_re(patterns, 2, name), (patterns, name)
            found.add(numbers(name))
    assert found == {2, 3, 4, 5, 6, 7, 9, 12}


def test_ranks_and_scales_by_patterns():
    settings = peft.LoraConfig(
        rank=2, alpha=4.0, layers="all-linear", rank_pattern=("query=3", "dense=5"), alpha_pattern=(r"0\..*dense=10",)
    )
    tree = peft.add_peft(*base()[:2], settings, key=0)[1]["peft"]
    ranks = {path[:-2]: x.shape[1] for path, x in flatten_dict(tree).items() if "lora_A" in path}
    assert set(ranks.values()) == {2, 3, 5}
    for path, rank in ranks.items():
        assert rank == {"query": 3, "dense": 5}.get(path[-1], 2)
        scale = settings.scales()(".".join(path))
        assert scale == (10 if path[-1] == "dense" and "0" in path else 4) / rank
    stabilized = dataclasses.replace(settings, rank_stabilized=True).scales()
    assert stabilized("bert.encoder.layer.0.output.dense") == pytest.approx(10 / 5**0.5)


def test_ranks_that_differ_by_layer_need_separate_layers_and_alphas_do_not():
    plain, params, _, batch = base()
    stacked = plain.clone(layers="stacked"), stack_layers(params)
    by_layer = peft.LoraConfig(rank_pattern=(r"0\.attention\.self\.query=3",))
    assert by_layer.differs_by_layer
    with pytest.raises(InputError, match="changes some layers differently from others: load the model with separate"):
        peft.add_peft(*stacked, by_layer, key=0)
    for pattern in ("query=3", r"\d+\..*query=3", r"layer\.\d\d?\.attention\.self\.query=3"):
        assert not peft.LoraConfig(rank_pattern=(pattern,)).differs_by_layer
    assert not peft.LoraConfig(rank_pattern=(r"0\.output\.dense=3",)).differs_by_layer  # which is not adapted

    alphas = peft.LoraConfig(rank=2, rank_pattern=("query=3",), alpha_pattern=(r"0\.attention.*=3", r"1\..*query=90"))
    assert not alphas.differs_by_layer
    model, both = peft.add_peft(*stacked, alphas, key=0)
    rng = np.random.default_rng(0)
    both["peft"] = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), both["peft"])
    separate = peft.add_peft(plain, params, alphas, key=0)[0]
    found = logits_of(model, both, batch)
    np.testing.assert_allclose(found, logits_of(separate, unstack_layers(both, 2), batch), rtol=0, atol=2e-5)
    merged = logits_of(*peft.merge_and_unload(model, both), batch)
    np.testing.assert_allclose(found, merged, rtol=0, atol=2e-5)
    assert np.abs(found - logits_of(model.clone(peft=peft.LoraConfig(rank=2)), both, batch)).max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": ("query",)}, "lora_rank_pattern 'query': must be REGEX=NUMBER, with a whole number from 1"),
        ({"rank_pattern": ("query=0",)}, "lora_rank_pattern 'query=0': must be REGEX=NUMBER, with a whole number from"),
        ({"rank_pattern": ("query=2.5",)}, "lora_rank_pattern 'query=2.5': must be"),
        ({"rank_pattern": ("query=65537",)}, "with a whole number from 1 to 65536"),
        ({"rank_pattern": ("=4",)}, "lora_rank_pattern '=4': must be"),
        ({"rank_pattern": "query=4"}, "lora_rank_pattern query=4: must be a list, each a string"),
        ({"rank_pattern": ("query=4", "query=8")}, "lora_rank_pattern 'query=8': 'query' occurs twice"),
        ({"rank_pattern": ("(=4",)}, r"lora_rank_pattern '\(': not a regular expression"),
        ({"rank_pattern": ("(?|a)=4",)}, r"not a regular expression of Python's re: unknown extension"),
        (
            {"alpha_pattern": ("query=-1",)},
            "lora_alpha_pattern 'query=-1': must be REGEX=NUMBER, with a number greater",
        ),
        ({"alpha_pattern": ("query=inf",)}, "lora_alpha_pattern 'query=inf': must be"),
        ({"alpha_pattern": ("query=nan",)}, "lora_alpha_pattern 'query=nan': must be"),
    ],
)
def test_patterns_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        peft.LoraConfig(**settings)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_sets_nothing_is_refused():
    add = functools.partial(peft.add_peft, *base()[:2], key=0)
    with pytest.raises(
        InputError, match="lora_rank_pattern 'uery': matches the end of no adapted layer's name; one is"
    ):
        add(peft.LoraConfig(rank_pattern=("uery=4",)))
    with pytest.raises(InputError, match="lora_alpha_pattern 'query': matches .* name that no earlier one matches"):
        add(peft.LoraConfig(alpha_pattern=(".*self.*=4", "query=4")))
    with pytest.raises(InputError, match="lora_rank_pattern 'key': matches the end of no adapted layer's name"):
        add(peft.LoraConfig(rank_pattern=("key=4",)))


# all linear layers


@pytest.mark.parametrize("word", ("all-linear", "All-Linear"))
def test_all_linear_is_all_but_the_head(word):
    plain, params, *_ = base()
    settings = peft.LoraConfig(rank=1, layers=word)
    tree = peft.add_peft(plain, params, settings, key=0)[1]["peft"]
    adapted = {path[:-2] for path in flatten_dict(tree) if "lora_A" in path}
    linear = {path[:-1] for path, x in flatten_dict(params).items() if path[-1] == "kernel" and x.ndim == 2}
    assert adapted == linear - {("classifier",)} and len(adapted) == 2 * 6 + 1 and not settings.differs_by_layer
    with_pooler = dataclasses.replace(settings, train_pooler=True)
    tree = peft.add_peft(plain, params, with_pooler, key=0)[1]["peft"]
    assert not any("pooler" in path for path in flatten_dict(tree))  # trained whole, with the head


# lanes


def test_lanes_of_dora_are_the_models_alone():
    model, params, batch = trained("dora")
    moved = jax.tree.map(lambda p: 1.1 * p, params["peft"])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params["peft"], moved)

    def logits(tree):
        ids = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        return model.apply({"params": bare(params) | {"peft": tree}}, **ids)

    found = quick_jit(jax.vmap(logits))(both)
    for lane, tree in zip(found, (params["peft"], moved), strict=True):
        np.testing.assert_allclose(lane, quick_jit(logits)(tree), rtol=0, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
