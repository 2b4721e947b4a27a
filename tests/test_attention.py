"""Attention by `jax.nn.dot_product_attention`: what it computes, where it is chosen, and what it compiles to.

No test runs cuDNN. Numbers are those of JAX's other implementation, called by the same function; programs for CUDA are
only lowered, as JAX can do on any machine once it believes that cuDNN is installed.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import model_parity
import numpy as np
import optax
import pytest
import tiny

from pats_jax import models, random
from pats_jax.errors import InputError
from pats_jax.models import attention, layers as of_encoders
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run.settings import Settings

ROWS, LENGTH, HEADS, WIDTH = 3, 12, 2, 8
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=140,
    attention_probs_dropout_prob=0.0,
)


def draw(queries=LENGTH, dtype=jnp.float32):
    """Query, key, value, and a bias with holes anywhere; the last row has no token at all."""
    rng = np.random.default_rng(queries)
    shape = (ROWS, LENGTH, HEADS, WIDTH)
    query, key, value = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    mask = rng.random((ROWS, LENGTH)) < 0.6
    mask[:, 0], mask[-1] = True, False
    return query[:, :queries], key, value, jnp.where(mask[:, None, None], 0.0, -1e30)


def by_loops(query, key, value, bias):
    """softmax(Q K^T / sqrt(width)) V over the tokens that are not masked, in float64; over all where none is left."""
    query, key, value, bias = (np.asarray(x, np.float64) for x in (query, key, value, bias))
    result = np.zeros_like(query)
    for row, head in np.ndindex(len(query), HEADS):
        allowed = bias[row, 0, 0] == 0
        allowed = allowed if allowed.any() else np.ones(LENGTH, bool)
        no_token = not (bias[row] == 0).any()
        for place, vector in enumerate(query[row, :, head]):
            scores = key[row, allowed, head] @ vector / np.sqrt(WIDTH)
            weights = np.ones(LENGTH) if no_token else np.exp(scores - scores.max())
            result[row, place, head] = weights / weights.sum() @ value[row, allowed, head]
    return result


def test_the_gradient_of_bfloat16_scores_multiplies_bfloat16():
    def loss(query, key, bias):
        weights = attention.softmax_weights(query, key, bias).astype(jnp.float32)
        return jnp.sum(weights * jnp.cos(jnp.arange(weights.size).reshape(weights.shape)))

    query, key, _, bias = draw(dtype=jnp.bfloat16)
    gradient = jax.grad(loss, argnums=(0, 1))
    products = [eqn for eqn in jax.make_jaxpr(gradient)(query, key, bias).eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 3 and {x.aval.dtype.name for eqn in products for x in eqn.invars} == {"bfloat16"}
    exact = gradient(*(x.astype(jnp.float32) for x in (query, key)), bias)
    for narrow, wide in zip(gradient(query, key, bias), exact, strict=True):
        assert narrow.dtype == jnp.bfloat16
        assert jnp.linalg.norm(narrow - wide) < 0.01 * jnp.linalg.norm(wide)
    twice = jax.grad(lambda q: jnp.sum(jax.grad(loss)(q, key, bias).astype(jnp.float32) ** 2))(query)
    assert jnp.isfinite(twice).all() and jnp.any(twice != 0)  # MAML differentiates it again


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """JAX believes that cuDNN is there, and we that the first device is a GPU."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="JAX has moved its cuDNN module")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(attention, "_missing_gpu", lambda: None)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("queries", [LENGTH, 4])
def test_order_of_arguments_scale_and_mask(queries, dtype, tolerance):
    arrays = draw(queries, dtype)
    found = jax.jit(functools.partial(attention.fused, implementation="xla"))(*arrays)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), by_loops(*arrays), rtol=0, atol=tolerance)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_where_both_are_traced_other_platforms_compute_by_einsum():
    arrays = draw(dtype=jnp.bfloat16)
    found = jax.jit(attention.by_platform)(*arrays)
    np.testing.assert_allclose(found.astype(jnp.float32), by_loops(*arrays), rtol=0, atol=0.02)

    def gradients(function):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(function(*qkv, arrays[-1]) ** 2), (0, 1, 2)))(*arrays[:3])

    plain = gradients(lambda q, k, v, bias: attention.weighted_sum(attention.softmax_weights(q, k, bias), v))
    for x, y in zip(gradients(attention.by_platform), plain, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=0.02, atol=0.02)


def logits_and_gradient(model, params, batch):
    def loss(params):
        logits = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": random.fast_key(0)})
        return jnp.sum(logits[:-1] ** 2), logits  # a filler row has no weight

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradient


def make_batch(length=128):
    rng = np.random.default_rng(0)
    mask = (rng.random((4, length)) < 0.7).astype(np.int32)
    mask[-1] = 0  # a filler row
    return {"input_ids": rng.integers(5, CONFIG.vocab_size, (4, length)).astype(np.int32), "attention_mask": mask}


@pytest.mark.parametrize("layers", [pytest.param("separate", marks=pytest.mark.slow), "stacked"])
def test_a_model_computes_the_same_to_the_rounding_of_bfloat16(layers, monkeypatch):
    monkeypatch.setattr(attention, "_missing_gpu", lambda: None)
    calls = []

    def fused(*arrays):
        calls.append(arrays[0].shape)
        return attention.fused(*arrays, implementation="xla")

    monkeypatch.setattr(of_encoders, "by_platform", fused)
    params = jax.tree.map(lambda p: 0.3 * p if p.ndim > 1 else p, tiny.random_params(CONFIG))
    params = models.stack_layers(params) if layers == "stacked" else params

    def compute(dtype, chosen):
        model = models.SequenceClassifier(CONFIG, dtype=dtype, layers=layers, attention=chosen)
        return model_parity.quick_jit(functools.partial(logits_and_gradient, model))(params, make_batch())

    exact, exact_gradient = compute(jnp.float32, "einsum")
    theirs, their_gradient = compute(jnp.bfloat16, "einsum")
    assert not calls
    ours, gradient = compute(jnp.bfloat16, "auto")
    assert set(calls) == {(4, 128, 4, 8)}  # but not the one query of the last layer
    assert np.isfinite(ours).all() and np.abs(exact).max() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05)

    def error(gradient):
        return optax.tree.norm(jax.tree.map(jnp.subtract, gradient, exact_gradient))

    assert 0 < error(gradient) < 1.2 * error(their_gradient)


# what is compiled


def kernels(platform, length=128, config=CONFIG, dtype=jnp.bfloat16, **options):
    """How often the program of a gradient runs cuDNN's forward and backward kernels."""
    model = models.SequenceClassifier(config, dtype=dtype, **{"attention": "auto"} | options)
    params = jax.eval_shape(model.init, random.fast_key(0), jnp.ones((1, 2), jnp.int32))["params"]
    traced = jax.jit(functools.partial(logits_and_gradient, model)).trace(params, make_batch(length))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("__cudnn$fmha") == text.count("@__cudnn$fmhaScaleBiasSoftmax")
    return runs_of("@__cudnn$fmhaScaleBiasSoftmax(", text), runs_of("@__cudnn$fmhaScaleBiasSoftmaxBackward(", text)


def runs_of(operation, text):
    """How often an operation is run, where a function that is called twice runs what is in it twice."""
    name = r'@("[^"]+"|[\w.$]+)\('
    bodies = {re.match(name, part)[1]: part for part in re.split(r"func\.func (?:public|private) (?=@)", text)[1:]}

    def runs(function):
        called = re.findall(rf"(?<!custom_)call {name}", bodies[function])
        return bodies[function].count(operation) + sum(map(runs, called))

    return runs("main")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_programs_for_cuda_call_cudnn_and_no_others_do():
    assert kernels("cuda") == (2, 2)  # the last layer has one query
    assert kernels("cpu") == kernels("tpu") == (0, 0)
    assert kernels("cuda", first_token_only=False) == (3, 3)
    assert kernels("cuda", layers="stacked") == (2, 1)  # a loop keeps products only
    assert kernels("cuda", layers="stacked", gradient_checkpointing=True) == (2, 1)  # computed again
    assert kernels("cuda", attention="cudnn", length=16) == (2, 2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "einsum"},
        {"length": 126},  # shorter than what was measured
        {"length": 129},
        {"dtype": jnp.float32},
        {"config": dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.1)},
        {"config": dataclasses.replace(CONFIG, num_attention_heads=8)},  # 4 units each
    ],
    ids=str,
)
def test_auto_leaves_to_einsum_what_cudnn_cannot_do_or_does_slower(options):
    assert kernels("cuda", **options) == (0, 0)


def test_without_a_gpu_auto_is_einsum():
    def program(chosen):
        model = models.SequenceClassifier(CONFIG, dtype=jnp.bfloat16, attention=chosen)
        params = jax.eval_shape(model.init, random.fast_key(0), jnp.ones((1, 2), jnp.int32))["params"]
        return str(jax.make_jaxpr(functools.partial(logits_and_gradient, model))(params, make_batch()))

    assert program("auto") == program("einsum")


@pytest.mark.parametrize("version, capability, fits", [("cuda 13000", "9.0", True), ("cuda 12080", "7.5", False)])
def test_only_gpus_with_the_matrix_units(version, capability, fits, monkeypatch):
    client = types.SimpleNamespace(platform_version=f"PJRT C API\n{version}")
    device = types.SimpleNamespace(client=client, compute_capability=capability, device_kind="NVIDIA T4")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    query = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    assert attention.is_fused("auto", query, query, dropout=0.0) == fits
    if not fits:
        with pytest.raises(InputError, match="needs an NVIDIA GPU, Ampere or newer; JAX runs on NVIDIA T4 here"):
            attention.is_fused("cudnn", query, query, dropout=0.0)


# errors


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "message, options",
    [
        ("needs bfloat16 or float16, not float32", {"dtype": jnp.float32}),
        ("attention dropout is 0.1", {"config": dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.1)}),
        ("not 4", {"config": dataclasses.replace(CONFIG, num_attention_heads=8)}),
        ("not 256", {"config": dataclasses.replace(CONFIG, num_attention_heads=1, hidden_size=256)}),
        ("needs even lengths, not 15 queries and 15 keys", {"length": 15}),
    ],
)
def test_what_cudnn_cannot_do_is_an_error_if_asked_for(message, options):
    with pytest.raises(InputError, match=message) as caught:
        kernels("cuda", attention="cudnn", **options)
    assert "\n" not in str(caught.value) and 'or use attention="auto"' in str(caught.value)


def test_without_a_gpu_it_is_an_error_too():
    with pytest.raises(InputError, match="needs an NVIDIA GPU, Ampere or newer; JAX runs on cpu here"):
        kernels("cpu", attention="cudnn")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_dropout_counts_in_training_only():
    config = dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.1)
    model = models.SequenceClassifier(config, dtype=jnp.bfloat16, attention="cudnn")
    params = jax.eval_shape(model.init, random.fast_key(0), jnp.ones((1, 2), jnp.int32))["params"]
    predict = jax.jit(lambda params: model.apply({"params": params}, **make_batch()))
    assert runs_of("__cudnn$fmha", predict.trace(params).lower(lowering_platforms=("cuda",)).as_text()) == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_vmap_is_refused_in_a_line():
    model = models.SequenceClassifier(CONFIG, dtype=jnp.bfloat16, attention="auto")
    params = tiny.random_params(CONFIG)
    of_all = jax.jit(jax.vmap(lambda params: logits_and_gradient(model, params, make_batch())))
    with pytest.raises(InputError, match=r'does not work under jax.vmap; make the model with attention="einsum"'):
        of_all(jax.tree.map(lambda p: p[None], params))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="attention='flash' is not one of 'auto', 'einsum', 'cudnn'"):
        models.SequenceClassifier(CONFIG, attention="flash")


@pytest.mark.parametrize(
    "settings, message",
    [
        (Settings(task_name="rte", attention="cudnn"), "--attention cudnn: needs --dtype bfloat16"),
        (Settings(task_name="rte", attention="cudnn", dtype="bfloat16", fsdp=2), "not available with --fsdp"),
        (Settings(task_name="rte", attention="cudnn", dtype="bfloat16", deterministic=True), "or --deterministic"),
        (PrimingSettings(attention="cudnn", dtype="bfloat16"), "not available for priming"),
    ],
)
def test_flags_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        settings.check()


def test_programs_use_einsum_where_cudnn_might_fail():
    chosen = [Settings(task_name="rte", **more).model_attention for more in ({}, {"fsdp": 2}, {"deterministic": True})]
    assert chosen == ["auto", "einsum", "einsum"]
