"""The comparison of our models with what Transformers computed, stored or live."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from pats_jax import make_seq2seq_loss_fn
from pats_jax.models.convert import to_tensor
from pats_jax.models.layout import stack_layers
from pats_jax.models.seq2seq import tensor_name


def by_tensor_name(tree) -> dict[str, np.ndarray]:
    """A tree like params as Hugging Face names and layouts."""
    return {tensor_name(path): to_tensor(path, value) for path, value in flatten_dict(tree).items()}


def apply(model, params, batch: Mapping[str, np.ndarray], dropout_key=None) -> jax.Array:
    """The logits; with dropout if given a key for it."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    if dropout_key is None:
        return model.apply({"params": params}, **inputs)
    return model.apply({"params": params}, **inputs, deterministic=False, rngs={"dropout": dropout_key})


# Tiny models compute in no time; what costs is compilation, which this halves.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


logits_of = quick_jit(apply, static_argnums=0)


@functools.partial(quick_jit, static_argnums=0)
def loss_and_gradients(model, params, batch: Mapping[str, np.ndarray]):
    """The mean cross-entropy, the logits and the gradient with respect to the parameters."""

    def loss_fn(params):
        logits = apply(model, params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), logits

    (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, logits, gradients


@functools.partial(quick_jit, static_argnums=0)
def seq2seq_loss_and_gradients(model, params, batch: Mapping[str, np.ndarray]):
    """As `loss_and_gradients`, over the labels that are not -100; params have separate layers, whatever the model's."""
    kept = {}

    def apply_fn(*arguments, **options):
        kept["logits"] = model.apply(*arguments, **options)
        return kept["logits"]

    def loss_fn(params):
        params = stack_layers(params) if model.layers == "stacked" else params
        loss, _ = make_seq2seq_loss_fn(apply_fn, deterministic=True)(params, batch, None)
        return loss, kept["logits"]

    (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, logits, gradients


def assert_agrees(
    expected: Mapping[str, np.ndarray], model, params, batch, *, learning_rate, weight_decay, compute=loss_and_gradients
) -> None:
    """Logits within 1e-4, gradients as below, parameters after one AdamW step within 1e-6 where |gradient| > 1e-6."""
    loss, logits, tree = compute(model, params, batch)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-4)
    unread = {tensor_name(path) for path in getattr(model.config, "unsaved", ())} | {"final_logits_bias"}
    gradients = {name: value for name, value in by_tensor_name(tree).items() if name not in unread}
    assert {f"gradient/{name}" for name in gradients} == {name for name in expected if name.startswith("gradient/")}
    for name, value in gradients.items():
        assert is_close(value, expected[f"gradient/{name}"]), name
    for name, value in by_tensor_name(_adamw_step(params, tree, learning_rate, weight_decay)).items():
        if name not in gradients:  # a constant
            continue
        felt = np.abs(gradients[name]) > 1e-6
        np.testing.assert_allclose(value[felt], expected[f"after/{name}"][felt], rtol=0, atol=1e-6, err_msg=name)


@quick_jit
def _adamw_step(params, gradients, learning_rate, weight_decay):
    tx = optax.adamw(learning_rate, eps=1e-8, weight_decay=weight_decay)
    updates, _ = tx.update(gradients, tx.init(params), params)
    return optax.apply_updates(params, updates)


def is_close(gradient: np.ndarray, other: np.ndarray) -> bool:
    """Within 1e-3 of its norm or 1e-8: softmax does not see key biases, so their gradient is but rounding."""
    difference = gradient - other
    return np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(other) or np.abs(difference).max() <= 1e-8


def summary(gradient: np.ndarray) -> np.ndarray:
    """The norm and 16 entries spread over the tensor, (17,): what the fixture of a real model keeps."""
    flat = gradient.reshape(-1)
    return np.append(np.linalg.norm(flat), flat[np.linspace(0, flat.size - 1, 16).astype(int)]).astype(np.float32)
