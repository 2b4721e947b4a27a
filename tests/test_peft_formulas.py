"""The forward pass of each kind of adapter against its formula in NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_parity import logits_of
from numpy_bert import NumpyBert
from test_models import inputs
from test_peft import KINDS, bare, base, trained

from pats_jax import random
from pats_jax.models import peft


def numpy_bert(name):
    """The base model in NumPy with the trained head, and the modules' tensors by their names in the model."""
    model, params, _ = trained(name)
    reference = NumpyBert(model_parity.by_tensor_name(bare(params)), model.config)
    tree = {".".join(path): np.float64(x) for path, x in flatten_dict(params["peft"]).items()}
    return reference, tree


def lora(reference, tree):
    def linear(name, x):
        y = reference.plain_linear(name, x)
        if f"{name}.lora_A.kernel" in tree:
            y = y + 6.0 / 2 * x @ (tree[f"{name}.lora_A.kernel"] @ tree[f"{name}.lora_B.kernel"])
        return y

    reference.linear = linear


def dora(reference, tree):
    """Query: alpha 2.5; the output of attention: rank 3, or 1 in layer 1, of an alpha of 6."""

    def linear(name, x):
        if f"{name}.lora_A.kernel" not in tree:
            return reference.plain_linear(name, x)
        rank = 3 if "attention.output" in name else 1 if "1.output" in name else 2
        scale = (2.5 if "query" in name else 6.0) / rank
        a, b = (tree[f"{name}.lora_{letter}.kernel"] for letter in "AB")
        assert a.shape[1] == rank
        whole = reference.tensors[f"{name}.weight"].T + scale * a @ b
        whole = whole / np.linalg.norm(whole, axis=0) * tree[f"{name}.lora_magnitude_vector"]
        return x @ whole + reference.tensors[f"{name}.bias"]

    reference.linear = linear


def adalora(reference, tree):
    def linear(name, x):
        y = reference.plain_linear(name, x)
        if f"{name}.lora_E.scale" in tree:
            a, e, b = (tree[f"{name}.{leaf}"] for leaf in ("lora_A.kernel", "lora_E.scale", "lora_B.kernel"))
            y = y + 40.0 / (3 + 1e-5) * x @ (a @ np.diag(e) @ b)
        return y

    reference.linear = linear


def bitfit(reference, tree):
    for name, added in tree.items():
        reference.tensors[name.replace("bitfit.", "")] += added


def ia3(reference, tree):
    def linear(name, x):
        y = reference.plain_linear(name, x * tree.get(f"{name}.ia3_input", 1.0))
        return y * tree.get(f"{name}.ia3_output", 1.0)

    reference.linear = linear


def bottleneck(tree, name, h, activation):
    inner = activation(h @ tree[f"{name}.adapter.down.kernel"] + tree[f"{name}.adapter.down.bias"])
    return inner @ tree[f"{name}.adapter.up.kernel"] + tree[f"{name}.adapter.up.bias"]


def adapters(reference, tree):
    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    reference.block_end = lambda name, x, residual: reference.norm(
        f"{name}.LayerNorm", residual + x + bottleneck(tree, name, x, gelu)
    )


def pfeiffer(reference, tree):
    def block_end(name, x, residual):
        total = residual + x
        if "attention" not in name:
            total = total + bottleneck(
                tree, name, reference.norm(f"{name}.LayerNorm", total), lambda h: np.maximum(h, 0)
            )
        return reference.norm(f"{name}.LayerNorm", total)

    reference.block_end = block_end


def prompt(reference, tree):
    reference.prompt = tree["prompt_embeddings"]


def prefix(reference, tree):
    parts = np.split(tree["prompt_embeddings"], 2 * reference.config.num_hidden_layers, axis=1)
    reference.prefix = list(zip(parts[::2], parts[1::2], strict=True))


@KINDS
def test_the_forward_pass_is_the_formula(name):
    model, params, batch = trained(name)
    reference, tree = numpy_bert(name)
    plain_logits = reference.logits(**inputs(batch))
    globals()[name](reference, tree)
    expected = reference.logits(**inputs(batch))
    assert np.abs(expected - plain_logits).max() > 1e-2
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_scale_of_loras_branch_and_of_what_is_merged(rank_stabilized, scale):
    rng = np.random.default_rng(0)
    kernel, a, b, x = (np.float32(rng.normal(size=size)) for size in ((5, 3), (5, 4), (4, 3), (2, 5)))
    config = peft.LoraConfig(rank=4, alpha=6.0, rank_stabilized=rank_stabilized)
    tree = {"dense": {"lora_A": {"kernel": a}, "lora_B": {"kernel": b}}}

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, use_bias=False, name="dense")(x)

    with nn.intercept_methods(config.interceptor(None, True)):
        y = One().apply({"params": {"dense": {"kernel": kernel}}, "peft": tree}, x)
    whole = np.float64(kernel) + scale * np.float64(a) @ b
    np.testing.assert_allclose(y, x @ whole, rtol=1e-4, atol=1e-4)
    merged = config.merge({("dense", "kernel"): kernel}, flatten_dict(tree))
    np.testing.assert_allclose(merged["dense", "kernel"], whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(config.unmerge(merged, flatten_dict(tree))["dense", "kernel"], kernel, atol=1e-5)


def test_dropout_is_on_the_input_of_loras_branch():
    """A and B are the identity: the branch is the dropped input, and what stands beside it stays whole."""

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(50, name="dense")(x)

    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    params = {"dense": {"kernel": np.zeros((50, 50), np.float32), "bias": np.full(50, 9.0, np.float32)}}
    tree = {"dense": {name: {"kernel": jnp.eye(50)} for name in ("lora_A", "lora_B")}}
    config = peft.LoraConfig(rank=50, alpha=100.0, dropout=0.25)

    def branch(deterministic, seed=0):
        with nn.intercept_methods(config.interceptor(None, deterministic)):
            return One().apply({"params": params, "peft": tree}, x, rngs={"dropout": random.fast_key(seed)}) - 9.0

    np.testing.assert_allclose(branch(True), 2 * x, atol=1e-5)
    kept = branch(False) != 0
    np.testing.assert_allclose(branch(False), kept * 2 * x / 0.75, atol=1e-5)
    assert abs(np.mean(kept) - 0.75) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    assert np.any((branch(False, seed=1) != 0) != kept)


def test_a_text_must_leave_room_for_virtual_tokens():
    plain, params, *_ = base()
    ids = np.full((1, 22), 7)
    for config in (peft.PromptConfig(length=3), peft.PrefixConfig(length=3)):
        model, both = peft.add_peft(plain, params, config, key=0)
        run = functools.partial(model.apply, {"params": both})
        assert jax.eval_shape(run, ids[:, :21]).shape == (1, 3)
        with pytest.raises(ValueError, match="but the model has 24 positions"):
            jax.eval_shape(run, ids)
