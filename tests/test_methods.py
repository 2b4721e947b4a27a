"""Schedule, AdamW, decay mask, noise and its layers against computations of their own."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tiny

import pats_jax
from pats_jax import methods, train_state, trees
from pats_jax.companions.dps import DpsDenseState, DpsMixState
from pats_jax.core.settings import entries
from pats_jax.errors import InputError
from pats_jax.run.settings import Settings

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
    tx = make_optimizer(settings, total_steps, params)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        yield updates


@pytest.mark.parametrize("total, ratio, steps", [(3, 0.2, 1), (10, 0.1, 1), (11, 0.1, 2), (100, 0.07, 8), (5, 0.0, 0)])
def test_warmup_has_as_many_steps_as_in_transformers(total, ratio, steps):
    """Rounded up. (100 * 0.07 is a little above 7 in floating point: 8 there, too.)"""
    schedule = methods.learning_rate_schedule(Settings(learning_rate=1.0, warmup_ratio=ratio).optimizer, total)
    rates = [float(schedule(step)) for step in range(total)]
    assert rates.index(max(rates)) == steps


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.37, 1.0])
def test_schedule_is_the_closed_formula(warmup_ratio):
    total = 50
    schedule = methods.learning_rate_schedule(Settings(learning_rate=3e-4, warmup_ratio=warmup_ratio).optimizer, total)
    warmup = -int(-total * warmup_ratio // 1)  # rounded up
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
        name = train_state.parameter_name(path)
        if name.endswith((".kernel", ".embedding")):
            np.testing.assert_allclose(update, -1e-2 * 0.1 * param, rtol=1e-5, err_msg=name)
        else:
            assert name.endswith((".bias", "LayerNorm.scale")) and not np.any(update), name


@pytest.mark.parametrize(
    "schedule, distribution", [("learning_rate", "uniform"), ("learning_rate", "normal"), ("constant", "uniform")]
)
def test_noise_follows_its_schedule(schedule, distribution):
    params = tree(0, shape=(200, 200))
    own = {"method": "pats", "noise_scale": 0.02, "noise_schedule": schedule, "distribution": distribution}
    settings = dataclasses.replace(SETTINGS, **own)
    nothing = [jax.tree.map(np.zeros_like, params)] * 10  # zero gradients: no sensitivity, so the noise is all of it
    plain = updates_of(dataclasses.replace(settings, method="finetune"), params, nothing, 10)
    seen = []
    for step, (noisy, quiet) in enumerate(zip(updates_of(settings, params, nothing, 10), plain, strict=True)):
        noise = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), noisy, quiet)
        dense = noise["encoder"]["layer"]["0"]["dense"]
        share = step / 2 if step < 2 else (10 - step) / 8
        share = 1 if schedule == "constant" else share
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
    mask = methods.layer_mask(tiny.random_params(config), methods.METHODS["pats"]().noise_layers)
    chosen = {train_state.parameter_name(path) for path, keep in jax.tree_util.tree_leaves_with_path(mask) if keep}
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
    [("decoder", r"matches no parameter; one path is"), ("(", "not a regular expression")],
)
def test_layers_that_do_not_exist(pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        methods.layer_mask(tree(0), pattern)
    assert str(caught.value).startswith(f"noise_layers {pattern!r}: ") and "\n" not in str(caught.value)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(
        InputError, match="method sgd: no such method; choose one of finetune, pats, perturbed, dps-dense"
    ):
        make_optimizer(Settings(method="sgd"), 10, tree(0))


# the companions


MODEL = tiny.random_params(tiny.CONFIG)
TARGET = jax.tree.map(lambda p: p + np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32), MODEL)


def quadratic(params, batch=0.0, key=None):
    del key
    pairs = zip(*map(jax.tree.leaves, (params, TARGET)), strict=True)
    return sum(jnp.sum((1 + jnp.sum(batch)) * (p - t) ** 2) for p, t in pairs), {}


def fisher(keep_fraction, mask):
    return pats_jax.fisher_mask(quadratic, MODEL, [0.0, 1.0], keep_fraction, mask=mask)


def make_optimizer(settings, total_steps, params):
    """The optimizer that the program makes for some settings."""
    return methods.make_optimizer(settings.optimizer, settings.methods, total_steps, params, seed=settings.seed)


def make_state(**changes):
    """The state that the program makes of a small BERT for some settings."""
    settings = Settings(**{"learning_rate": 0.05, "warmup_ratio": 0.0, "weight_decay": 0.0} | changes)
    params = methods.starting_params(settings.methods, MODEL, settings.seed)
    trainable = methods.trainable_mask(settings.methods, params)
    trained = params if trainable is None else trees.partition(trainable, params)[0]
    tx = methods.make_optimizer(settings.optimizer, settings.methods, 60, trained, seed=settings.seed, fisher=fisher)
    create = functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=tx, key=0, trainable=trainable)
    return jax.jit(lambda params: create(params=params))(params)


def moved(state, steps=1):
    """Names of the parameters that differ from the pretrained ones after some steps; the state; the compiled step."""
    step = jax.jit(pats_jax.make_train_step(quadratic))
    for number in range(steps):  # gradients change from step to step: SAGE stands still where they do not
        state, _ = step(state, jnp.full(1, float(number)))
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.all_params), jax.tree.leaves(MODEL), strict=True)
    names = {train_state.parameter_name(path) for (path, p), old in pairs if np.any(np.asarray(p) != old)}
    return names, state, step


NAMES = {train_state.parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(MODEL)}
ATTENTION = ("self.query.kernel", "self.key.kernel", "self.value.kernel", "attention.output.dense.kernel")


def expected_to_move(name):
    """Which parameters a step of a method moves, by the papers' own words."""
    if name == "bitfit":
        return {n for n in NAMES if n.endswith(".bias") or n.startswith("classifier")}
    if name == "sift":
        return {n for n in NAMES if n.endswith(ATTENTION) or n.startswith(("classifier", "bert.pooler"))}
    if name == "sage":  # at t = 1 sensitivity is certain: what the method touches stays where it is
        return {n for n in NAMES if "encoder.layer" not in n or "LayerNorm" in n}
    return NAMES


# Objectives change the loss and SAM the step, which here are the test's own: plain fine-tuning for each.
TRAINED = [
    pytest.param(name, marks=pytest.mark.slow if kind.kind in ("objective", "ascent") else ())
    for name, kind in methods.METHODS.items()
]


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_what_it_should(name):
    start = make_state(method=name)
    seen, state, step = moved(start)
    assert seen == expected_to_move(name)
    if name == "sift":
        kernel = np.asarray(state.all_params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"])
        before = MODEL["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
        assert np.sum(kernel != before) == np.ceil(0.008 * before.size)
    for _ in range(60):
        state, _ = step(state, jnp.zeros(1))
    # SIFT trains a handful of entries; SAGE stands still where gradients are as regular as here
    share = 0.99 if name in ("sift", "sage", "bitfit") else 0.6
    assert float(quadratic(state.all_params)[0]) < share * float(quadratic(start.all_params)[0])


def test_every_method_says_where_it_comes_from_and_what_it_reads():
    for method in methods.METHODS.values():
        assert method.summary and "https://" in method.source
        assert all(entry.about.help for entry in entries(method).values())


def test_the_table_of_methods_has_all_of_them():
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(methods.as_table())
    shown = console.file.getvalue()
    assert all(f" {name} " in shown and method.source in shown for name, method in methods.METHODS.items())
    assert "--noise_scale 0.01" in shown and "--keep_fraction None" in shown


@pytest.mark.parametrize("name", ["dps-dense", "dps-mix"])
def test_dps_takes_the_matrices_of_encoder_pooler_and_head(name):
    state = make_state(method=name)
    (found,) = trees.find_states(state.opt_state, (DpsDenseState, DpsMixState))
    held = {train_state.parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(found.scores)}
    assert held == {n for n in NAMES if n.endswith(".kernel")}


def share_moved(state):
    """Share of the encoder's entries that differ from the pretrained ones."""
    pairs = zip(*map(jax.tree.leaves, (state.params["bert"]["encoder"], MODEL["bert"]["encoder"])), strict=True)
    changed = np.concatenate([np.ravel(a != b) for a, b in pairs])
    return changed.mean()


def test_child_tuning_d_keeps_its_share_of_the_encoder():
    assert share_moved(moved(make_state(method="child-d", keep_fraction=0.25))[1]) == pytest.approx(0.25, abs=1e-3)


def test_methods_compose():
    both = moved(make_state(method="pats+dps-dense", noise_scale=0.1), 3)[1]
    one = moved(make_state(method="dps-dense"), 3)[1]
    kernel = ("bert", "encoder", "layer", "0", "intermediate", "dense", "kernel")
    noisy, quiet = (functools.reduce(lambda node, key: node[key], kernel, s.params) for s in (both, one))
    assert np.any(noisy != quiet) and trees.find_states(both.opt_state, pats_jax.PatsNoiseState)
    assert (
        methods.statistics(
            Settings(method="pats+dps-dense").methods,
            lambda count: 5e-5,
            Settings(method="pats+dps-dense").optimizer.learning_rate,
            both.opt_state,
        )["noise_norm"]
        > 0
    )
    order = [moved(make_state(method=names, noise_scale=0.1), 2)[1].params for names in ("pats+sage", "sage+pats")]
    assert all(map(np.array_equal, *map(jax.tree.leaves, order)))


@pytest.mark.parametrize(
    "names, reason",
    [
        ("dps-dense+child-f", "both select the parameters to update"),
        ("mixout+l2-sp", "both pull weights back to their pretrained values"),
        ("mixout+dps-mix", "both replace the weights of the forward pass"),
        ("pats+pats", "they are the same"),
        ("finetune+pats", "finetune adds nothing"),
        ("sift+pats", "SIFT updates single entries"),
        ("mixout+sift", "SIFT updates single entries"),
        ("r3f+pats+r3f", "they are the same"),
    ],
)
def test_pairs_that_do_not_go_together(names, reason):
    with pytest.raises(InputError, match=f"cannot be combined: {reason}") as caught:
        methods.get_methods(names)
    assert str(caught.value).startswith(f"method {names}: ")


@pytest.mark.parametrize("other", ["sage", "l2-sp", "noisytune"])
def test_sift_goes_with_what_works_entry_by_entry(other):
    start = make_state(method=f"sift+{other}", **({"noise_intensity": 0.0} if other == "noisytune" else {}))
    _, state, _ = moved(start, 3)
    for part in ("query", "key", "value"):
        kernel, before = (
            np.asarray(params["bert"]["encoder"]["layer"]["0"]["attention"]["self"][part]["kernel"])
            for params in (state.all_params, MODEL)
        )
        assert np.sum(kernel != before) == np.ceil(0.008 * before.size)


def test_objectives_go_with_everything_and_have_their_settings():
    for name in methods.METHODS:
        if name != "finetune":
            others = {"r3f", "r-drop", "smart", "lnsr", "neftune", "hype"} - {name}
            methods.get_methods("+".join([name, *others]))
    chosen = methods.chosen_objectives(
        Settings(method="lnsr+dps-dense+r-drop", lnsr_lambda=0.3, r_drop_alpha=4.0).methods
    )
    assert [(objective.name, objective.weight) for objective in chosen] == [("lnsr", 0.3), ("r_drop", 4.0)]
    assert methods.chosen_objectives(Settings(method="pats").methods) == []


def test_noisytune_changes_every_tensor_once_before_training():
    settings = Settings(method="noisytune+pats", noise_intensity=0.2, seed=3)
    started = methods.starting_params(settings.methods, MODEL, settings.seed)
    for before, after in zip(*map(jax.tree.leaves, (MODEL, started)), strict=True):
        assert np.abs(after - before).max() <= 0.1 * before.std() + 1e-6
    assert all(
        map(
            np.array_equal,
            *map(jax.tree.leaves, (started, methods.starting_params(settings.methods, MODEL, settings.seed))),
        )
    )
    assert methods.starting_params((), MODEL, 0) is MODEL


def test_a_stage_without_a_step_is_an_error():
    with pytest.raises(InputError, match=r"^update_ratio 0.05: gives stages of 0 steps; increase it"):
        make_optimizer(Settings(method="dps-dense"), 10, MODEL)


@pytest.mark.parametrize("freeze", [False, True])
def test_weight_decay_moves_what_is_left_out_unless_it_is_frozen(freeze):
    state = make_state(method="child-d", keep_fraction=0.25, freeze_unselected=freeze, weight_decay=0.1)
    matrices = [p.size for p in jax.tree.leaves(MODEL["bert"]["encoder"]) if p.ndim > 1]
    found = share_moved(moved(state)[1])
    if freeze:
        assert found == pytest.approx(0.25, abs=1e-3)
    else:  # decay is on matrices only
        assert found > sum(matrices) / sum(p.size for p in jax.tree.leaves(MODEL["bert"]["encoder"])) - 1e-3


@pytest.mark.parametrize("name", ["finetune", "pats", "child-f"])
def test_freezing_where_nothing_is_left_out(name):
    with pytest.raises(InputError, match="--freeze_unselected: "):
        make_optimizer(Settings(method=name, freeze_unselected=True), 60, MODEL)


def test_who_turns_dropout_off():
    without = {name for name in methods.METHODS if methods.turns_dropout_off(Settings(method=name).methods, 100)}
    assert without == {"dps-dense", "dps-mix", "mixout", "hype"}
    assert not methods.turns_dropout_off(Settings(method="dps-dense").methods, 2000)
    assert methods.turns_dropout_off(Settings(method="pats+mixout").methods, 2000)
