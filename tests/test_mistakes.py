"""Common mistakes in Python: each is one line that names what was given, or a warning."""

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

import pats_jax
from pats_jax.errors import InputError
from pats_jax.models import from_pretrained

PARAMS = {"encoder": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "head": jnp.ones(3)}


def create(tx):
    return pats_jax.TrainState.create(apply_fn=lambda *_: None, params=PARAMS, tx=tx, key=0)


OPTIMIZER_TAKERS = {
    "pats": lambda tx: pats_jax.pats(tx, key=0),
    "with_raw_gradient": pats_jax.with_raw_gradient,
    "sift": lambda tx: pats_jax.sift(tx, 0.5, mask=None),
    "freeze_unselected": pats_jax.freeze_unselected,
    "TrainState.create": create,
}


@pytest.mark.parametrize("name", OPTIMIZER_TAKERS)
@pytest.mark.parametrize("given, said", [(1e-3, "0.001"), (None, "None"), ("adamw", "'adamw'")])
def test_what_is_no_optimizer_is_named(name, given, said):
    message = f"{name}: {said} is not an optimizer; give an Optax one, such as optax.adamw(2e-5)"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OPTIMIZER_TAKERS[name](given)


@pytest.mark.parametrize("name", OPTIMIZER_TAKERS)
def test_an_optimizer_that_was_not_called_is_told_so(name):
    with pytest.raises(TypeError, match=r"adamw at .* is not an optimizer; give an Optax one, called"):
        OPTIMIZER_TAKERS[name](optax.adamw)


MASK_TAKERS = {
    "pats_noise": lambda mask: pats_jax.pats_noise(0.1, key=0, mask=mask).init(PARAMS),
    "perturbed": lambda mask: pats_jax.perturbed(0.1, key=0, mask=mask).init(PARAMS),
    "dps_dense": lambda mask: pats_jax.dps_dense(0.5, 2, mask=mask).init(PARAMS),
    "dps_mix": lambda mask: pats_jax.dps_mix(0.5, 2, key=0, mask=mask).init(PARAMS),
    "child_tuning_f": lambda mask: pats_jax.child_tuning_f(0.5, key=0, mask=mask).update(PARAMS, None_state()),
    "mixout": lambda mask: pats_jax.mixout(0.5, key=0, mask=mask).init(PARAMS),
    "scale_by_sage": lambda mask: pats_jax.scale_by_sage(mask=mask).init(PARAMS),
    "noisy_tune": lambda mask: pats_jax.noisy_tune(PARAMS, key=0, mask=mask),
    "sift": lambda mask: pats_jax.sift(optax.sgd(0.1), 0.5, mask=mask).init(PARAMS),
    "l2_sp": lambda mask: pats_jax.l2_sp(0.1, 0.1, head_mask=mask).init(PARAMS),
}


def None_state():
    return pats_jax.child_tuning_f(0.5, key=0).init(PARAMS)


WRONG_MASKS = [
    ([True, False], ValueError, "is a list, where the parameters have a dict"),
    ({"encoder": True}, ValueError, "lacks 'head'"),
    ({"encoder": True, "head": True, "pooler": True}, ValueError, "has 'pooler', which the parameters do not have"),
    ({"encoder": {"kernel": True}, "head": False}, ValueError, "lacks 'bias' at encoder"),
    ({"encoder": True, "head": {"kernel": True}}, ValueError, "is a dict at head, where the parameters have an array"),
    (lambda params: list(params), ValueError, "is a list, where the parameters have a dict"),
    ("encoder", TypeError, "holds 'encoder'"),
    ({"encoder": 0.5, "head": True}, TypeError, "holds 0.5"),
    ({"encoder": True, "head": jnp.ones(3)}, TypeError, "holds Array("),
]


@pytest.mark.parametrize("name", MASK_TAKERS)
@pytest.mark.parametrize("mask, kind, said", WRONG_MASKS, ids=[said for _, _, said in WRONG_MASKS])
def test_a_wrong_mask_is_named(name, mask, kind, said):
    argument = "head_mask" if name == "l2_sp" else "mask"
    with pytest.raises(kind, match=f"^{argument}: {re.escape(said)}.*; it must be a tree of bools like the") as caught:
        MASK_TAKERS[name](mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask, kind, said", WRONG_MASKS[:5], ids=[said for _, _, said in WRONG_MASKS[:5]])
def test_a_wrong_keep_mask_is_named(mask, kind, said):
    with pytest.raises(kind, match=f"^keep_mask: {re.escape(said)}"):
        pats_jax.child_tuning_d(mask).init(PARAMS)


def test_right_masks_are_taken():
    for mask in (
        1,
        None,
        True,
        {"encoder": {"kernel": True, "bias": False}, "head": False},
        {"encoder": True, "head": 1 > 2},
    ):
        for name, take in MASK_TAKERS.items():
            if not (mask is None and name == "l2_sp"):
                take(mask)
    state = MASK_TAKERS["pats_noise"](lambda params: {"encoder": True, "head": False})
    assert pats_jax.sensitivity(state)["head"] is None


# what stands after the noise


NOISE = pats_jax.pats_noise(0.1, key=0)
FOLLOWED = {
    "ScaleByAdamState": optax.chain(NOISE, optax.adamw(1e-3)),
    "TraceState": optax.chain(optax.clip(1.0), optax.chain(NOISE), optax.sgd(1e-3, momentum=0.9)),
    "ScaleByScheduleState": optax.chain(NOISE, optax.sgd(optax.linear_schedule(1e-3, 0.0, 9))),
    "MaskedState": optax.chain(NOISE, optax.masked(optax.scale_by_adam(), {"encoder": True, "head": False})),
}


def warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_optimizer_after_the_noise_is_warned_of(name):
    said = f"pats_noise stands before {name} in the chain, which changes the noise, too; put pats_noise last"
    assert warned(lambda: pats_jax.with_raw_gradient(FOLLOWED[name]).init(PARAMS)) == [said]
    outside = optax.chain(pats_jax.pats(optax.sgd(1e-3), key=0), optax.scale_by_adam())
    assert warned(lambda: create(outside)) == [said.replace(name, "ScaleByAdamState")]
    assert len(warned(lambda: jax.eval_shape(pats_jax.with_raw_gradient(FOLLOWED[name]).init, PARAMS))) == 1


@pytest.mark.parametrize(
    "tx",
    [
        pats_jax.pats(optax.adamw(1e-3), key=0),
        pats_jax.pats(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), key=0),
        pats_jax.with_raw_gradient(optax.chain(optax.adam(1e-3), NOISE, optax.zero_nans())),
        pats_jax.with_raw_gradient(optax.chain(optax.adam(1e-3), NOISE, pats_jax.perturbed(0.1, key=0))),
        pats_jax.with_raw_gradient(
            optax.chain(optax.adam(1e-3), NOISE, optax.masked(optax.set_to_zero(), {"encoder": False, "head": True}))
        ),
        pats_jax.with_raw_gradient(
            optax.partition(
                {"a": optax.chain(optax.adam(1e-3), NOISE), "b": optax.adam(1e-3)}, {"encoder": "a", "head": "b"}
            )
        ),
        optax.MultiSteps(pats_jax.pats(optax.adamw(1e-3), key=0), 2).gradient_transformation(),
        optax.adamw(1e-3),
    ],
)
def test_noise_in_its_place_is_not_warned_of(tx):
    assert warned(lambda: create(tx)) == []


def test_a_program_shows_the_warning_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        create(pats_jax.with_raw_gradient(FOLLOWED["ScaleByAdamState"]))
    assert len(caught) == 1


# checkpoints


def test_a_fine_tuned_checkpoint_says_its_own_labels(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    with pytest.raises(
        InputError, match="has no classification head; train one first, or in Python set num_labels for a new one"
    ):
        from_pretrained(base)
    names = {0: "no", 1: "maybe", 2: "yes"}
    _, params, config = from_pretrained(base, id2label=names)
    assert config.id2label == names and params["classifier"]["kernel"].shape[-1] == 3
    pats_jax.models.save_pretrained(tmp_path / "tuned", params=params, config=config)
    _, again, read = from_pretrained(tmp_path / "tuned")
    assert read.id2label == names
    assert all(map(jnp.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))
