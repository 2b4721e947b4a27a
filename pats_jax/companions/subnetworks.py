"""Which parameters move: DPS and Child-Tuning, as Optax gradient transformations.

`dps_dense`, `dps_mix`, `child_tuning_f` and `child_tuning_d` change the gradient and go first in a chain, before
clipping and the optimizer. A weight whose gradient they hold back is still moved by momentum and weight decay, as in
the authors' code; `freeze_unselected` around the whole optimizer keeps it where it is.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import random, trees
from pats_jax.companions.anchors import draw_rows, input_rows
from pats_jax.companions.ranking import kth_largest, rank
from pats_jax.trees import ForwardMix, check_number, is_plainly


class DpsDenseState(NamedTuple):
    """State of `dps_dense`.

    Attributes:
      count: () int32, number of updates made.
      scores: a tree like params, float32, the squared gradients summed over the last stage I; None where masked.
      threshold: a tree like params, () float32 each, the least score of a selected entry; 0 in stage I, when every
        entry is selected.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    scores: Any
    threshold: Any


class DpsMixState(NamedTuple):
    """State of `dps_mix`.

    Attributes:
      count: () int32, number of updates made.
      stored_key: the same at every step; the rows of a step are folded from it and `count`.
      pretrained: a tree like params, the parameters at init; None where masked.
      scores: as in `DpsDenseState`; in stage II the scores of the selection.
      appearances: a tree like params, float32, one number for each input feature: how often it was kept in the last
        stage I.
      threshold: as in `DpsDenseState`.
      rows: a tree like params, bool, one for each input feature: the draw of the coming step; True in stage II.
      forward: what `pats_jax.forward_params` mixes at the coming step.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey
    pretrained: Any
    scores: Any
    appearances: Any
    threshold: Any
    rows: Any
    forward: ForwardMix

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


class ChildTuningFState(NamedTuple):
    """State of `child_tuning_f`.

    Attributes:
      count: () int32, number of updates made.
      stored_key: the same at every step; the draws of a step are folded from it and `count`.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


class ChildTuningDState(NamedTuple):
    """State of `child_tuning_d`.

    Attributes:
      keep: a tree like params, bool, of the leaf's shape or (); None at leaves that are trained as a whole.
    """

    keep: Any


def dps_dense(
    keep_fraction: float | jax.Array, stage_steps: int | jax.Array, *, mask: Any = None
) -> optax.GradientTransformation:
    r"""DPS Dense: find the weights with large gradients for a stage, then train only those for a stage, and again.

    Stages of us = ``stage_steps`` steps take turns; step t = 1, 2, ... is in stage I when ceil(t/us) is odd. For each
    matrix of N entries::

        stage I                    GAM += g * g             starting from 0; the gradient passes as it is
        first step of stage II     M = GAM >= threshold     threshold the ceil(N * keep_fraction)-th largest of GAM
        stage II                   g <- g * M               no rescaling

    The rule is that of the authors' code (*code*). Entries that tie with the threshold are kept. Momentum and weight
    decay still move the weights that are left out; see `freeze_unselected`. A squared gradient that is not finite
    counts as 0 (ours).

    Goes first in a chain, before clipping and the optimizer. The threshold is computed at the first step of stage II
    only. With ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: share of the entries that stage II trains, in (0, 1]; the authors' ``reserve_p`` is the share that
        it drops, so their 0.3 is 0.7 here.
      stage_steps: length of a stage, >= 1; theirs is 5 % of all steps.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside are trained as usual and
        hold no state. None is every leaf. The authors take the weight matrices of attention, feed-forward blocks,
        pooler and classifier.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if keep_fraction is outside (0, 1] or stage_steps is not a whole number >= 1. Traced numbers are not
        checked.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.zeros(4)}
      >>> tx = optax.chain(pats_jax.dps_dense(0.5, stage_steps=1), optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.array([1.0, -3.0, 2.0, 0.5])}, state, params)
      ...     print(updates["w"])
      [-1.   3.  -2.  -0.5]
      [-0.  3. -2. -0.]

    References:
      Zhang et al., `Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks Adaptively
      <https://arxiv.org/abs/2211.01642>`_, 2022
    """
    _check_keep_fraction(keep_fraction)
    _check_stage_steps(stage_steps)
    mask = False if is_plainly(keep_fraction, 1) else mask

    def init(params):
        chosen = trees.cut_to(trees.resolve_mask(mask, params), params)
        return DpsDenseState(
            count=jnp.zeros([], jnp.int32),
            scores=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), chosen),
            threshold=jax.tree.map(lambda p: jnp.zeros([], jnp.float32), chosen),
        )

    def update(updates, state, params=None):
        del params
        second, start = _stage(state.count, stage_steps)
        scores = trees.map_held(lambda s, g: _sum_of_stage(s, _square(g), second, start), state.scores, updates)
        threshold = _threshold_of_stage(scores, state.threshold, keep_fraction, second, start)
        selected = _selected(scores, threshold)
        updates = trees.replace_held(jnp.multiply, updates, selected)
        return updates, DpsDenseState(optax.safe_increment(state.count), scores, threshold)

    return optax.GradientTransformation(init, update)


def dps_mix(
    keep_fraction: float | jax.Array,
    stage_steps: int | jax.Array,
    *,
    key: int | jax.Array,
    mask: Any = None,
    input_axis: int = 0,
) -> optax.GradientTransformation:
    r"""DPS Mix: DPS whose forward pass mixes in older weights, as Mixout does.

    Stages of us = ``stage_steps`` steps take turns; step t = 1, 2, ... is in stage I when ceil(t/us) is odd. With
    p = 1 - ``keep_fraction``, for each matrix W of N entries::

        always                     W_eff = ((1-m) * target + m * W - p * target) / (1-p)   see `pats_jax.forward_params`
                                   g     = dL/dW_eff * m                                   not divided by 1-p
        stage I                    target = W at init
                                   m ~ Bernoulli(1-p), new at each step, one draw for each input feature
                                   GAM += g * g,  FAM += m                                 starting from 0
        first step of stage II     target = W now
                                   F = max(FAM, 1);  score = GAM / F, times exp(-F/us) when us >= 50
                                   M = score >= threshold     the ceil(N * keep_fraction)-th largest score
        stage II                   m = M

    The rule is that of the authors' code (*code*). Entries that tie with the threshold are kept. Momentum and weight
    decay still move the weights that are left out; see `freeze_unselected`. A squared gradient that is not finite
    counts as 0, and a scalar or 1-D leaf, which has no input features, gets one draw for each entry (ours). The
    authors train without dropout.

    Goes first in a chain, before clipping and the optimizer. The state takes 13 bytes a float32 parameter. With
    ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: 1-p in (0, 1], the share of the input features that stage I keeps and of the entries that stage II
        trains.
      stage_steps: length of a stage, >= 1; theirs is 5 % of all steps.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: as for `dps_dense`.
      input_axis: the axis of input features, 0 in Flax's kernels.

    Returns:
      A gradient transformation whose ``update`` requires params and expects the gradient at
      `pats_jax.forward_params`, which `pats_jax.make_train_step` gives it.

    Raises:
      ValueError: if keep_fraction is outside (0, 1] or stage_steps is not a whole number >= 1 (traced numbers are not
        checked); from ``init``, if a leaf of two or more dimensions has no axis ``input_axis``; from ``update``
        without params.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, pats_jax
      >>> params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
      >>> tx = optax.chain(pats_jax.dps_mix(0.5, stage_steps=2, key=0), optax.sgd(0.5))
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     used = pats_jax.forward_params(state, params)
      ...     grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2) / 2)(used)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["kernel"][:, 0])
      [0.5  1.   0.75 1.  ]

    References:
      Zhang et al., `Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks Adaptively
      <https://arxiv.org/abs/2211.01642>`_, 2022
    """
    _check_keep_fraction(keep_fraction)
    _check_stage_steps(stage_steps)
    mask = False if is_plainly(keep_fraction, 1) else mask
    key = trees.own_key(key, "dps_mix")

    def init(params):
        mixed = trees.cut_to(trees.resolve_mask(mask, params), params)
        rows = draw_rows(key, 0, input_rows(mixed, input_axis), keep_fraction)
        return DpsMixState(
            count=jnp.zeros([], jnp.int32),
            stored_key=random.StoredKey.of(key),
            pretrained=jax.tree.map(jnp.copy, mixed),
            scores=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), mixed),
            appearances=jax.tree.map(lambda row: jnp.zeros_like(row, jnp.float32), rows),
            threshold=jax.tree.map(lambda p: jnp.zeros([], jnp.float32), mixed),
            rows=rows,
            forward=ForwardMix(
                target=jax.tree.map(jnp.copy, mixed),
                kept=jax.tree.map(lambda p, row: jnp.ones_like(p, bool) & row, mixed, rows),
                keep_fraction=jnp.asarray(keep_fraction, jnp.float32),
            ),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("dps_mix needs the parameters: call tx.update(grads, opt_state, params)")
        second, start = _stage(state.count, stage_steps)

        def sum_up(old, g, row):
            return _sum_of_stage(old, _square(g) * row, second, start)

        def score(gradients, appearances):
            frequency = jnp.maximum(appearances, 1.0)
            penalty = jnp.where(stage_steps < 50, 1.0, jnp.exp(-frequency / stage_steps))
            return jnp.where(second & start, gradients / frequency * penalty, gradients)

        appearances = trees.map_held(lambda f, m: _sum_of_stage(f, m, second, start), state.appearances, state.rows)
        scores = trees.map_held(score, trees.map_held(sum_up, state.scores, updates, state.rows), appearances)
        threshold = _threshold_of_stage(scores, state.threshold, keep_fraction, second, start)
        selected = _selected(scores, threshold)
        updates = trees.replace_held(lambda g, m, row: g * (m & row), updates, selected, state.rows)

        # What the coming step needs. At the first step of stage II the target is W itself, and so is W_eff whatever m:
        # a mix that keeps everything.
        count = optax.safe_increment(state.count)
        next_second, next_start = _stage(count, stage_steps)

        def target(old, pretrained, now):
            return jnp.where(next_second, jnp.where(second & start, now, old), pretrained)

        drawn = draw_rows(state.key, count, state.rows, keep_fraction)
        forward = ForwardMix(
            target=trees.map_held(target, state.forward.target, state.pretrained, params),
            kept=trees.map_held(lambda m, row: jnp.where(next_second, m, row), selected, drawn),
            keep_fraction=jnp.where(next_second & next_start, 1.0, jnp.asarray(keep_fraction, jnp.float32)),
        )
        new_state = state._replace(
            count=count,
            scores=scores,
            appearances=appearances,
            threshold=threshold,
            rows=trees.map_held(lambda row: row | next_second, drawn),
            forward=forward,
        )
        return updates, new_state

    return optax.GradientTransformation(init, update)


def child_tuning_f(
    keep_fraction: float | jax.Array, *, key: int | jax.Array, mask: Any = None
) -> optax.GradientTransformation:
    r"""Child-Tuning F: at every step a random share of the gradient passes, scaled up to keep its mean.

    ``g <- g * Bernoulli(p) / p`` with p = ``keep_fraction``, drawn for every entry at every step (*code*; the authors
    take every parameter).

    Goes first in a chain, before clipping and the optimizer. With ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: p in (0, 1]; the authors' 0.3 keeps 30 %.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: a tree prefix of bools, or a function of params that returns one; outside, the gradient passes as it is.
        None is every leaf.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if keep_fraction is outside (0, 1]; traced numbers are not checked.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> tx = pats_jax.child_tuning_f(0.5, key=0)
      >>> grads, _ = tx.update(jnp.ones(6), tx.init(jnp.zeros(6)))
      >>> print(grads)
      [2. 0. 2. 2. 2. 2.]

    References:
      Xu et al., `Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning
      <https://arxiv.org/abs/2109.05687>`_, 2021
    """
    _check_keep_fraction(keep_fraction)
    mask = False if is_plainly(keep_fraction, 1) else mask
    key = trees.own_key(key, "child_tuning_f")

    def init(params):
        del params
        return ChildTuningFState(jnp.zeros([], jnp.int32), random.StoredKey.of(key))

    def update(updates, state, params=None):
        del params
        thinned = trees.cut_to(trees.resolve_mask(mask, updates), updates)
        keys = trees.leaf_keys(jax.random.fold_in(state.key, state.count), thinned)

        def thin(g, _, leaf_key):
            kept = jax.random.bernoulli(leaf_key, keep_fraction, g.shape)
            return (g * kept / keep_fraction).astype(g.dtype)

        updates = trees.replace_held(thin, updates, thinned, keys)
        return updates, ChildTuningFState(optax.safe_increment(state.count), state.stored_key)

    return optax.GradientTransformation(init, update)


def child_tuning_d(keep_mask: Any) -> optax.GradientTransformation:
    r"""Child-Tuning D: only a part of the parameters, chosen once before training, receives its gradient.

    ``g <- g * keep_mask``, not rescaled (*code*). `fisher_mask` makes the mask. Momentum and weight decay still move
    the weights that are left out; see `freeze_unselected`.

    Goes first in a chain, before clipping and the optimizer.

    Args:
      keep_mask: a tree prefix of bool arrays of the parameters' shapes; a single bool stands for a whole subtree, and
        None is True.

    Returns:
      A gradient transformation; its state holds a copy of the mask.

    Raises:
      ValueError: from ``init``, on a mask that is not of bools or not of its parameter's shape.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> tx = pats_jax.child_tuning_d({"encoder": jnp.array([True, False]), "head": True})
      >>> grads = {"encoder": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
      >>> grads, _ = tx.update(grads, tx.init(grads))
      >>> print(grads["encoder"], grads["head"])
      [1. 0.] [3.]

    References:
      Xu et al., `Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning
      <https://arxiv.org/abs/2109.05687>`_, 2021
    """

    def init(params):
        def hold(keep, part):
            return jax.tree.map(functools.partial(_hold_mask, keep), part, is_leaf=trees.is_masked)

        return ChildTuningDState(jax.tree.map(hold, keep_mask, params, is_leaf=trees.is_absent))

    def update(updates, state, params=None):
        del params
        return trees.replace_held(jnp.multiply, updates, state.keep), state

    return optax.GradientTransformation(init, update)


def fisher_mask(loss_fn: Any, params: Any, batches: Iterable[Any], keep_fraction: float, *, mask: Any = None) -> Any:
    r"""The mask of Child-Tuning D: where the Fisher information, estimated on training batches, is largest.

    ``F = mean over batches of g * g`` with g the gradient of a batch's mean loss, at fixed parameters; an entry is kept
    where F is at least the ceil(N * ``keep_fraction``)-th largest of all N entries together: one GLOBAL threshold
    (*code*). Entries that tie with it are kept. A squared gradient that is not finite counts as 0 (ours).

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (mean loss, metrics)`` as for `pats_jax.make_train_step`, without
        dropout: it gets no key.
      params: the parameters before training.
      batches: at least one batch; the authors go once through the training set. Compiled once for each loss_fn and
        shape.
      keep_fraction: share of the entries that is kept, in (0, 1]; the authors' is 0.3.
      mask: a tree prefix of bools, or a function of params that returns one: which leaves are measured and thinned out,
        the encoder's layers in the authors' code. None is every leaf.

    Returns:
      A tree like params for `child_tuning_d`: bool arrays of the parameters' shapes, and True outside ``mask``.

    Raises:
      ValueError: if keep_fraction is outside (0, 1], or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, pats_jax
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> def loss_fn(params, batch, key):
      ...     return jnp.sum(params["a"] * batch) + jnp.sum(params["b"] ** 2), {}
      >>> keep = pats_jax.fisher_mask(loss_fn, params, [jnp.array([9.0, 1.0]), jnp.array([0.0, 1.0])], 0.5)
      >>> print(keep["a"], keep["b"])
      [ True False] [False  True]
    """
    _check_keep_fraction(keep_fraction)
    measured = trees.cut_to(trees.resolve_mask(mask, params), params)
    total, count = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), measured), 0
    for batch in batches:
        total, count = _add_squares(loss_fn, total, params, batch), count + 1
    if not count:
        raise ValueError("fisher_mask needs at least one batch")
    everything = jax.tree.map(lambda p: True, params)
    if is_plainly(keep_fraction, 1):
        return everything
    return trees.replace_held(lambda _, kept: kept, everything, _keep_largest(total, keep_fraction))


def freeze_unselected(
    inner: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the weights that a subnetwork leaves out exactly where they are.

    In the authors' code of DPS and Child-Tuning D the gradient of these weights is zero, but momentum and weight decay
    still move them. This wrapper (ours) sets their final update to zero, whatever stands behind the subnetwork in the
    chain. It touches stage II of `dps_dense` and `dps_mix`, and `child_tuning_d`. `child_tuning_f` and Mixout draw anew
    at each step and leave no weight out for longer; `sift` freezes what it leaves out by itself.

    It is a wrapper because the subnetwork stands first in the chain, and what moves the weights comes after it.

    Args:
      inner: the whole optimizer, with `dps_dense`, `dps_mix` or `child_tuning_d` in it.

    Returns:
      A gradient transformation; its state is ``inner``'s.

    Raises:
      ValueError: from ``init``, if there is no such transform inside.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> subnetwork = pats_jax.child_tuning_d({"w": jnp.array([True, False])})
      >>> tx = optax.chain(subnetwork, optax.adamw(0.5, weight_decay=0.1))
      >>> for optimizer in (tx, pats_jax.freeze_unselected(tx)):
      ...     updates, _ = optimizer.update({"w": jnp.array([1.0, 1.0])}, optimizer.init(params), params)
      ...     print(updates["w"].round(3))
      [-0.55 -0.05]
      [-0.55  0.  ]
    """
    inner = trees.as_extra_args_transform(inner)

    def init(params):
        state = inner.init(params)
        if not trees.find_states(state, *_SELECTING):
            raise ValueError(
                "freeze_unselected: nothing inside selects parameters; chain dps_dense, dps_mix or child_tuning_d"
            )
        return state

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        for selecting in trees.find_states(state, *_SELECTING):
            updates = trees.replace_held(lambda u, kept: jnp.where(kept, u, 0), updates, _selection(selecting))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


# stages


def _stage(count, stage_steps):
    """Whether the step after ``count`` updates is in stage II, and whether it is the first of its stage; () bool."""
    return (count // stage_steps) % 2 == 1, count % stage_steps == 0


def _sum_of_stage(old, new, second, start):
    """The sum over the steps of stage I, from 0 at its first step; unchanged in stage II."""
    return jnp.where(second, old, jnp.where(start, 0.0, old) + new)


def _threshold_of_stage(scores, old, keep_fraction, second, start):
    """The thresholds of a step: worked out at the first step of stage II, kept until its end, 0 in stage I."""

    def keep():
        return jax.tree.map(lambda t: jnp.where(second, t, 0.0), old)

    def work_out():
        leaves, treedef = jax.tree.flatten(scores)
        ranks = [rank(leaf.size, keep_fraction) for leaf in leaves]
        return jax.tree.unflatten(treedef, kth_largest([[leaf] for leaf in leaves], ranks))

    return jax.lax.cond(second & start, work_out, keep)


# selection

_SELECTING = (DpsDenseState, DpsMixState, ChildTuningDState)


def _square(grad):
    square = jnp.square(grad.astype(jnp.float32))
    return jnp.where(jnp.isfinite(square), square, 0.0)


def _selection(state):
    """The entries that the last update of a state in _SELECTING let through."""
    return state.keep if isinstance(state, ChildTuningDState) else _selected(state.scores, state.threshold)


def _selected(scores, threshold):
    return trees.map_held(lambda s, t: s >= t, scores, threshold)


@functools.partial(jax.jit, static_argnums=1)
def _keep_largest(scores, keep_fraction):
    """Bools where a tree's scores are among the largest share of all of them together."""
    leaves = jax.tree.leaves(scores)
    (threshold,) = kth_largest([leaves], [rank(sum(leaf.size for leaf in leaves), keep_fraction)])
    return jax.tree.map(lambda s: s >= threshold, scores)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_squares(loss_fn, total, params, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch, None)
    return trees.map_held(lambda t, g: t + _square(g), total, grads)


def _hold_mask(keep, param):
    """One leaf of a mask as state: a copy, or None where everything is kept."""
    if trees.is_masked(param):
        return param
    if keep is None or keep is True:
        return None
    if not isinstance(keep, bool | np.bool_ | np.ndarray | jax.Array) or jnp.asarray(keep).dtype != bool:
        raise ValueError(f"keep_mask must be of bools, got {keep!r:.60}")
    if np.shape(keep) not in ((), param.shape):
        raise ValueError(f"keep_mask of shape {np.shape(keep)} does not fit a parameter of shape {param.shape}")
    return jnp.array(keep)


# arguments


def _check_keep_fraction(keep_fraction):
    check_number("keep_fraction", keep_fraction, lambda x: 0 < x <= 1, "in (0, 1]")


def _check_stage_steps(stage_steps):
    check_number(
        "stage_steps",
        stage_steps,
        lambda x: x >= 1 and x == int(x),
        "a whole number of steps >= 1: train longer or make the stages a larger share",
    )
