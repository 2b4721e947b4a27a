"""LoRA+: `lora_plus`, and `--lora_plus_ratio` in the optimizer of the programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from model_parity import quick_jit
from test_peft import base

import pats_jax
from pats_jax import methods
from pats_jax.errors import InputError
from pats_jax.methods.settings import OptimizerSettings
from pats_jax.models import layer_axis, peft, stack_layers, unstack_layers
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run.settings import Settings

RATE, RATIO, DECAY, STEPS = 1e-2, 16.0, 0.1, 3
SETTINGS = {"learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": DECAY, "max_grad_norm": 1e9}


@functools.cache
def trained_tree():
    """Adapter and head of DoRA, at random, with gradients of three steps."""
    model, params = peft.add_peft(*base()[:2], peft.LoraConfig(rank=2, dora=True), key=0)
    trained, _ = pats_jax.trees.partition(peft.trainable_mask(model, params), params)
    rng = np.random.default_rng(0)

    def like(tree):
        return jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), tree)

    return like(trained), [like(trained) for _ in range(STEPS)]


def trained_by(tx, params, gradients):
    state, update = tx.init(params), quick_jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def numpy_adamw(path, p, gradients, ratio):
    """AdamW with a learning rate of its own: decay of matrices alone; B and vectors are the faster ones."""
    rate = RATE * ratio if "lora_B" in path or p.ndim == 1 else RATE
    m = v = np.zeros_like(p, np.float64)
    p = np.float64(p)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * np.float64(g) ** 2
        ascent = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        p = p - rate * (ascent + DECAY * p * (p.ndim > 1))
    return p


@pytest.mark.parametrize("layout", ("separate", "stacked"))
def test_it_is_adamw_with_another_learning_rate_for_b_and_vectors(layout):
    params, gradients = trained_tree()
    settings = OptimizerSettings(**SETTINGS, lora_plus_ratio=RATIO)
    own = stack_layers if layout == "stacked" else lambda tree: tree
    tx = methods.make_optimizer(settings, (), STEPS, own(params))
    found = trained_by(tx, own(params), list(map(own, gradients)))
    found = flatten_dict(unstack_layers(found, 2) if layout == "stacked" else found)
    slow = set()
    for path, p in ((path, p) for path, p in flatten_dict(params).items() if p is not None):
        expected = numpy_adamw(path, p, [flatten_dict(g)[path] for g in gradients], RATIO)
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-4, err_msg=".".join(path))
        slow |= {path[-2]} if np.abs(found[path] - p).max() < 5 * RATE * STEPS else set()
    assert slow == {"lora_A", "classifier"}  # the head's matrix


def test_a_ratio_of_one_leaves_the_optimizer_as_it_is():
    params, _ = trained_tree()
    states = [
        methods.make_optimizer(OptimizerSettings(**SETTINGS, lora_plus_ratio=ratio), (), STEPS, params).init(params)
        for ratio in (1.0, RATIO)
    ]
    plain = methods.make_optimizer(OptimizerSettings(**SETTINGS), (), STEPS, params).init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(plain) != jax.tree.structure(states[1])
    assert len(jax.tree.leaves(states[1])) == len(jax.tree.leaves(plain))  # it holds nothing


def test_the_noise_of_pats_is_not_scaled():
    params, gradients = trained_tree()

    def updates(method, ratio):
        chosen = Settings(method=method, peft="lora", **SETTINGS, lora_plus_ratio=ratio)
        tx = methods.make_optimizer(chosen.optimizer, chosen.methods, STEPS, params, seed=0)
        return quick_jit(tx.update)(gradients[0], tx.init(params), params)[0]

    def noise(ratio):
        return jax.tree.map(jnp.subtract, updates("pats", ratio), updates("finetune", ratio))

    with_ratio, without = noise(RATIO), noise(1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_ratio, without)
    assert any(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(without))


def test_leaves_that_are_not_there_stay():
    updates = {"lora_B": optax.MaskedNode(), "bias": None, "scale": jnp.ones(3), "one": jnp.ones(())}
    tx = pats_jax.lora_plus(2.0)
    found, state = tx.update(updates, tx.init(updates))
    assert isinstance(found["lora_B"], optax.MaskedNode) and found["bias"] is None
    np.testing.assert_array_equal(found["scale"], 2 * np.ones(3))
    np.testing.assert_array_equal(found["one"], 1)
    stacked = {"bert": {"encoder": {"layer": {"lora_A": {"kernel": jnp.ones((2, 3, 1))}, "bias": jnp.ones((2, 3))}}}}
    found, _ = pats_jax.lora_plus(2.0, layer_axis=layer_axis).update(stacked, state)
    np.testing.assert_array_equal(found["bert"]["encoder"]["layer"]["bias"], 2 * np.ones((2, 3)))
    np.testing.assert_array_equal(found["bert"]["encoder"]["layer"]["lora_A"]["kernel"], np.ones((2, 3, 1)))


@pytest.mark.parametrize("ratio", (0, -1.0, float("inf"), float("nan"), "16"))
def test_a_ratio_must_be_positive(ratio):
    with pytest.raises(ValueError, match="ratio=.* must be a finite number > 0"):
        pats_jax.lora_plus(ratio)


def test_the_flag_is_for_lora():
    Settings(peft="lora", lora_plus_ratio=16.0, task_name="rte").check()
    for settings, message in (
        (Settings(lora_plus_ratio=16.0, task_name="rte"), "--lora_plus_ratio: needs --peft lora"),
        (Settings(lora_plus_ratio=16.0, peft="ia3", task_name="rte"), "--lora_plus_ratio: needs --peft lora"),
        (Settings(lora_plus_ratio=0.0, peft="lora", task_name="rte"), "--lora_plus_ratio 0.0: must be greater than 0"),
        (PrimingSettings(lora_plus_ratio=4.0, peft="lora", train="plm+pe"), "--lora_plus_ratio: needs --train pe"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            settings.check()
        assert "\n" not in str(caught.value)
