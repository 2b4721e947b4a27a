"""Schedule, AdamW, decay mask, noise and its layers against computations of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from pats_jax import methods
from pats_jax.errors import InputError
from pats_jax.settings import Settings

SETTINGS = Settings(learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1, max_grad_norm=0.5)


def layer(seed, shape=(6, 4)):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=shape).astype(np.float32), "bias": rng.normal(size=shape[1]).astype(np.float32)}


def tree(seed, shape=(6, 4)):
    """Parameters of an encoder layer, a LayerNorm and a head."""
    scale = np.random.default_rng(seed).normal(1, 0.1, 4).astype(np.float32)
    return {
        "encoder": {"layer": {"0": {"dense": layer(seed, shape), "LayerNorm": {"scale": scale, "bias": scale - 1}}}},
        "classifier": layer(seed + 100),
    }


def updates_of(settings, params, gradients, total_steps):
    """The updates of each step, parameters held still."""
    tx = methods.make_optimizer(settings, total_steps, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        yield updates


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.37, 1.0])
def test_schedule_is_the_closed_formula(warmup_ratio):
    total = 50
    schedule = methods.learning_rate_schedule(Settings(learning_rate=3e-4, warmup_ratio=warmup_ratio), total)
    warmup = int(warmup_ratio * total)
    for step in (0, 1, 4, 5, 6, 18, 19, 30, 49):
        share = step / warmup if step < warmup else (total - step) / (total - warmup)
        assert float(schedule(step)) == pytest.approx(3e-4 * share, rel=1e-5, abs=1e-12)


def adamw(params, gradients, rates):
    """The updates that AdamW makes by its definition in float64, with clipping at 0.5 and decay 0.1 of matrices."""
    m = v = 0.0
    for step, (grad, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        clipped = grad * min(1.0, 0.5 / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        yield -rate * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + 0.1 * params)


def test_plain_fine_tuning_is_adamw_with_clipping():
    params = {"kernel": layer(0)["kernel"]}
    gradients = [{"kernel": layer(seed)["kernel"]} for seed in range(1, 7)]
    rates = [1e-2 * (step / 2 if step < 2 else (10 - step) / 8) for step in range(6)]
    expected = adamw(np.float64(params["kernel"]), [np.float64(grads["kernel"]) for grads in gradients], rates)
    for ours, theirs in zip(updates_of(SETTINGS, params, gradients, 10), expected, strict=True):
        np.testing.assert_allclose(ours["kernel"], theirs, rtol=1e-4, atol=1e-7)


def test_biases_and_layer_norm_do_not_decay():
    params = tiny.random_params(tiny.CONFIG)
    settings = dataclasses.replace(SETTINGS, warmup_ratio=0.0)
    (updates,) = updates_of(settings, params, [jax.tree.map(np.zeros_like, params)], 10)
    paired = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True)
    for (path, param), update in paired:
        name = methods.parameter_name(path)
        if name.endswith((".kernel", ".embedding")):
            np.testing.assert_allclose(update, -1e-2 * 0.1 * param, rtol=1e-5, err_msg=name)
        else:
            assert name.endswith((".bias", "LayerNorm.scale")) and not np.any(update), name


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_noise_follows_the_learning_rate(distribution):
    params = tree(0, shape=(200, 200))
    settings = dataclasses.replace(SETTINGS, method="pats", noise_scale=0.02, distribution=distribution)
    nothing = [jax.tree.map(np.zeros_like, params)] * 10  # zero gradients: no sensitivity, so the noise is all of it
    plain = updates_of(dataclasses.replace(settings, method="finetune"), params, nothing, 10)
    seen = []
    for step, (noisy, quiet) in enumerate(zip(updates_of(settings, params, nothing, 10), plain, strict=True)):
        noise = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), noisy, quiet)
        dense = noise["encoder"]["layer"]["0"]["dense"]
        share = step / 2 if step < 2 else (10 - step) / 8
        expected = 0.02 * share * params["encoder"]["layer"]["0"]["dense"]["kernel"].std()
        assert dense["kernel"].std() == pytest.approx(expected, rel=0.02, abs=1e-12)
        assert abs(dense["kernel"].mean()) < 4 * expected / 200 + 1e-12
        seen.append(dense["kernel"].ravel())
        dense["kernel"] = np.zeros(())
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(noise)), "noise outside --noise_layers"
    assert abs(np.corrcoef(seen[3], seen[4])[0, 1]) < 0.03


def test_noise_scale_zero_is_plain_fine_tuning_bit_by_bit():
    params = tree(0)
    gradients = [tree(seed) for seed in range(1, 6)]
    quiet = dataclasses.replace(SETTINGS, method="pats", noise_scale=0.0)
    for ours, theirs in zip(
        updates_of(quiet, params, gradients, 5), updates_of(SETTINGS, params, gradients, 5), strict=True
    ):
        assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_noise_is_on_attention_and_feed_forward_matrices(model_type):
    config = dataclasses.replace(tiny.CONFIG, model_type=model_type, num_hidden_layers=2)
    mask = methods.layer_mask(tiny.random_params(config), Settings().noise_layers)
    chosen = {methods.parameter_name(path) for path, keep in jax.tree_util.tree_leaves_with_path(mask) if keep}
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("intermediate.dense", "output.dense")
    assert chosen == {f"{model_type}.encoder.layer.{n}.{part}.kernel" for n in (0, 1) for part in parts}


def test_layers_of_ones_own_choice():
    mask = methods.layer_mask(tree(0), r"^classifier\.|LayerNorm")
    assert mask["classifier"] == {"kernel": True, "bias": True}
    assert mask["encoder"]["layer"]["0"]["LayerNorm"] == {"scale": True, "bias": True}
    assert mask["encoder"]["layer"]["0"]["dense"] == {"kernel": False, "bias": False}


@pytest.mark.parametrize(
    "pattern, message",
    [("decoder", r"matches no parameter; one is called"), ("(", "not a regular expression")],
)
def test_layers_that_do_not_exist(pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        methods.layer_mask(tree(0), pattern)
    assert str(caught.value).startswith(f"--noise_layers {pattern!r}: ") and "\n" not in str(caught.value)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(InputError, match="--method sgd: no such method; choose one of finetune, pats"):
        methods.make_optimizer(Settings(method="sgd"), 10, tree(0))


def test_every_method_trains_and_says_where_it_comes_from():
    target = tree(3)

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    for name, method in methods.METHODS.items():
        assert method.summary and method.source.startswith("https://")
        params = tree(0)
        settings = dataclasses.replace(SETTINGS, method=name, learning_rate=0.1, weight_decay=0.0)
        tx = methods.make_optimizer(settings, 60, params)

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, length=60))(
            (params, tx.init(params))
        )
        assert loss(trained) < 0.05 * loss(params), name
