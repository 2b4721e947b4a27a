"""ROSE: the tensors that it leaves out, and AdamW around them, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import methods
from pats_jax.models import layer_axis, stack_layers, unstack_layers
from pats_jax.run.settings import Settings

RATE, DECAY, BETAS, EPSILON = 0.1, 0.05, (0.9, 0.98), 1e-8
STEPS, WARMUP, LAYERS = 6, 2, 4


def tree(seed):
    """A model of four layers with a matrix and a bias each, and a head."""
    rng = np.random.default_rng(seed)

    def dense(scale):
        return {"kernel": np.float32(scale * rng.normal(size=(4, 3))), "bias": np.float32(rng.normal(size=3))}

    layers = {str(n): {"dense": dense(rng.uniform(0.1, 3))} for n in range(LAYERS)}
    return {"bert": {"encoder": {"layer": layers}}, "classifier": dense(1.0)}


def weights(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "bert" and path[-1].key == "kernel", params)


def numpy_rose(params, gradients, mask, quantile, warmup, decay=DECAY):
    """Parameters after all steps, and the scored tensors that each step leaves out."""
    w, masked = [list(map(np.float64, jax.tree.leaves(params))), jax.tree.leaves(mask)]
    m, v, left_out = [0 * x for x in w], [0 * x for x in w], []
    for t, grads in enumerate(gradients, 1):
        g, keep = [np.float64(x) for x in jax.tree.leaves(grads)], [True] * len(w)
        if t > max(warmup, 1):
            scores = [abs(0.1 * np.linalg.norm(a) / np.linalg.norm(b) - 1) for a, b in zip(g, m, strict=True)]
            limit = np.quantile([s for s, scored in zip(scores, masked, strict=True) if scored], quantile)
            keep = [s <= limit or not scored for s, scored in zip(scores, masked, strict=True)]
        left_out.append([i for i, k in enumerate(keep) if not k])
        for i, k in enumerate(keep):
            used = g[i] if k else m[i]
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * used
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * used**2
            step = m[i] / (1 - BETAS[0] ** t) / (np.sqrt(v[i] / (1 - BETAS[1] ** t)) + EPSILON)
            w[i] = w[i] - k * RATE * (step + decay * w[i])
    return jax.tree.unflatten(jax.tree.structure(params), w), left_out


def adamw():
    return optax.adamw(RATE, *BETAS, EPSILON, weight_decay=DECAY)


def train(tx, params, gradients):
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


GRADIENTS = [tree(seed) for seed in range(1, STEPS + 1)]


@pytest.mark.parametrize("layout", ["separate", "stacked"])
def test_parameters_are_numpys(layout):
    expected, left_out = numpy_rose(tree(0), GRADIENTS, weights(tree(0)), 0.6, WARMUP)
    assert [len(out) for out in left_out] == [0, 0, 2, 2, 2, 2] and len(set(map(tuple, left_out))) > 2
    convert = stack_layers if layout == "stacked" else lambda params: params
    tx = pats_jax.rose(adamw(), 0.6, warmup_steps=WARMUP, mask=weights, layer_axis=layer_axis)
    found, _ = train(tx, convert(tree(0)), [convert(grads) for grads in GRADIENTS])
    found = unstack_layers(found, LAYERS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_a_mask_of_some_layers():
    scored = jax.tree_util.tree_map_with_path(
        lambda path, keep: keep and path[3].key in "123", weights(tree(0)), is_leaf=lambda x: isinstance(x, bool)
    )
    expected, _ = numpy_rose(tree(0), GRADIENTS, scored, 0.5, 0)
    mask = jax.tree.map(lambda _: False, stack_layers(tree(0)))
    mask["bert"]["encoder"]["layer"]["dense"]["kernel"] = np.array([False, True, True, True])
    tx = pats_jax.rose(adamw(), 0.5, mask=mask, layer_axis=layer_axis)
    found, _ = train(tx, stack_layers(tree(0)), [stack_layers(grads) for grads in GRADIENTS])
    found = unstack_layers(found, LAYERS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_keeping_everything_is_adamw_bit_for_bit():
    plain, _ = train(adamw(), tree(0), GRADIENTS)
    found, _ = train(pats_jax.rose(adamw(), 1.0, mask=weights), tree(0), GRADIENTS)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_a_tensor_without_gradients_scores_one_and_breaks_nothing():
    nothing = jax.tree.map(np.zeros_like, tree(0))
    found, _ = train(pats_jax.rose(adamw(), 0.5), tree(0), [nothing] * 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_the_method_scores_the_clipped_gradient_after_warmup():
    norms = [np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads))) for grads in GRADIENTS]
    clipped = [jax.tree.map(lambda g, n=n: g * 3.0 / n, grads) for grads, n in zip(GRADIENTS, norms, strict=True)]
    expected, _ = numpy_rose(tree(0), clipped, weights(tree(0)), 0.6, 0, decay=0.0)
    changes = dict(learning_rate=RATE, lr_scheduler_type="constant", adam_beta2=BETAS[1], weight_decay=0.0)
    settings = Settings(method="rose", max_grad_norm=3.0, rose_quantile=0.6, **changes)
    params = jax.tree.map(jnp.asarray, tree(0))
    tx = methods.make_optimizer(settings.optimizer, settings.methods, STEPS, params)
    found, _ = train(tx, params, GRADIENTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("noisy", [False, True], ids=["rose", "pats+rose"])
def test_warmup_leaves_nothing_out_and_pats_reaches_all_tensors(noisy):
    changes = dict(method="pats+rose", noise_scale=0.1) if noisy else dict(method="rose")
    settings = Settings(learning_rate=RATE, warmup_ratio=0.3, weight_decay=DECAY, **changes)
    params = jax.tree.map(jnp.asarray, tree(0))
    tx = methods.make_optimizer(settings.optimizer, settings.methods, STEPS, params)
    state, update, still = tx.init(params), jax.jit(tx.update), []
    for grads in GRADIENTS:
        updates, state = update(grads, state, params)
        kernels = [x["dense"]["kernel"] for x in updates["bert"]["encoder"]["layer"].values()]
        still.append(sum(not np.any(kernel) for kernel in kernels))
    assert still[1:] == ([0] * 5 if noisy else [0, 2, 2, 2, 2])  # the rate of the first step is 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pats_jax.rose(adamw(), 0.0), ValueError, r"quantile=0.0 must be in \(0, 1\]"),
        (lambda: pats_jax.rose(0.1, 0.5), TypeError, "rose: 0.1 is not an optimizer"),
        (lambda: pats_jax.rose(optax.sgd(0.1), 0.5).init(tree(0)), ValueError, "rose: wraps one Adam"),
        (lambda: methods.get_methods("rose+dps-dense"), ValueError, "both select the parameters to update"),
    ],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()
