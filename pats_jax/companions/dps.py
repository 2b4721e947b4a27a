"""DPS: stages that find the weights with large gradients, and stages that train only those.

Both variants change the gradient. Place them first in a chain, before clipping and the optimizer. Momentum and weight
decay still move the weights whose gradient is held back, as in the authors' code; `pats_jax.freeze_unselected` around
the whole optimizer freezes them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pats_jax import random, trees
from pats_jax.companions.ranking import (
    check_keep_fraction,
    count_layers,
    finite_square,
    kth_largest,
    layers_shape,
    rank,
    selected_entries,
)
from pats_jax.trees import ForwardMix, check_number, is_plainly


class DpsDenseState(NamedTuple):
    """State of `dps_dense`.

    Attributes:
      count: number of updates so far, () int32.
      scores: the squared gradients summed over the last stage I, a tree like params, float32; None where masked.
      threshold: the lowest score of a selected entry, a tree like params, float32; 0 in stage I, when every entry is
        selected. It is (), or one number per layer, in a shape that broadcasts to the leaf.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    scores: Any
    threshold: Any


class DpsMixState(NamedTuple):
    """State of `dps_mix`.

    Attributes:
      count: number of updates so far, () int32.
      stored_key: the key, the same at every step; each step's rows are folded from it and ``count``.
      pretrained: the parameters at init, a tree like params; None where masked.
      scores: as in `DpsDenseState`; in stage II the scores of the selection.
      appearances: how often each input feature was kept in the last stage I, a tree like params, float32, with one
        number per input feature.
      threshold: as in `DpsDenseState`.
      rows: the draw of the next step, a tree like params of bools, one per input feature; True in stage II.
      forward: what `pats_jax.forward_params` mixes at the next step.
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


def dps_dense(
    keep_fraction: float | jax.Array,
    stage_steps: int | jax.Array,
    *,
    mask: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformation:
    r"""DPS Dense: alternates a stage that finds the weights with large gradients and a stage that trains only those.

    Stages of us = ``stage_steps`` steps alternate; step t = 1, 2, ... is in stage I if ceil(t/us) is odd. For each
    tensor of N entries::

        stage I                    GAM += g * g             starting from 0; the gradient stays as it is
        first step of stage II     M = GAM >= threshold     threshold the ceil(N * keep_fraction)-th largest of GAM
        stage II                   g <- g * M               no rescaling

    The rule is that of the authors' code (*code*). Entries that tie with the threshold are kept. Momentum and weight
    decay still move the weights that are left out; see `freeze_unselected`. A squared gradient that is not finite
    counts as 0 (*ours*).

    Place it first in a chain, before clipping and the optimizer. The threshold is computed only at the first step of
    stage II. With ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: share of the entries that stage II trains, in (0, 1]; the authors' ``reserve_p`` is the share that
        it drops, so their 0.3 is 0.7 here.
      stage_steps: number of steps in a stage, >= 1; the authors use 5 % of all steps.
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside are trained as usual and
        hold no state. None means every leaf. The authors use the weight matrices of attention, feed-forward blocks,
        pooler and classifier.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own threshold.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if keep_fraction is outside (0, 1], or stage_steps is not a whole number >= 1 (traced numbers are not
        checked).

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
    check_keep_fraction(keep_fraction)
    _check_stage_steps(stage_steps)
    mask = False if is_plainly(keep_fraction, 1) else mask

    def init(params):
        chosen = trees.cut_to(trees.resolve_mask(mask, params), params)
        return DpsDenseState(
            count=jnp.zeros([], jnp.int32),
            scores=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), chosen),
            threshold=_no_threshold(chosen, trees.held_layer_axes(layer_axis, params, chosen)),
        )

    def update(updates, state, params=None):
        del params
        second, start = _stage(state.count, stage_steps)
        scores = trees.map_held(lambda s, g: _sum_of_stage(s, finite_square(g), second, start), state.scores, updates)
        axes = trees.held_layer_axes(layer_axis, updates, scores)
        threshold = _threshold_of_stage(scores, axes, state.threshold, keep_fraction, second, start)
        selected = selected_entries(scores, threshold)
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
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformation:
    r"""DPS Mix: DPS with older weights mixed into the forward pass, as in Mixout.

    Stages of us = ``stage_steps`` steps alternate; step t = 1, 2, ... is in stage I if ceil(t/us) is odd. With p = 1 -
    ``keep_fraction``, for each tensor W of N entries::

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
    decay still move the weights that are left out; see `freeze_unselected`. *Ours*: a squared gradient that is not
    finite counts as 0, and a scalar or 1-D leaf, which has no input features, gets one draw per entry. The authors
    train without dropout.

    Place it first in a chain, before clipping and the optimizer. The state takes 13 bytes per float32 parameter. With
    ``keep_fraction=1`` it changes no bit.

    Args:
      keep_fraction: 1-p in (0, 1], the share of the input features that stage I keeps and of the entries that stage II
        trains.
      stage_steps: number of steps in a stage, >= 1; the authors use 5 % of all steps.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      mask: as for `dps_dense`.
      input_axis: the axis of input features, 0 in Flax's kernels; counted within a layer's own tensor.
      layer_axis: the axis of the layers in leaves that hold many, as for `pats_jax.pats_noise`; each layer then has its
        own draws and threshold.

    Returns:
      A gradient transformation whose ``update`` requires params and expects the gradient at `pats_jax.forward_params`,
      as `pats_jax.make_train_step` computes it.

    Raises:
      ValueError: if keep_fraction is outside (0, 1], or stage_steps is not a whole number >= 1 (traced numbers are not
        checked); from ``init``, if a leaf of two or more dimensions has no axis ``input_axis``; from ``update`` without
        params.

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
    check_keep_fraction(keep_fraction)
    _check_stage_steps(stage_steps)
    mask = False if is_plainly(keep_fraction, 1) else mask
    key = trees.own_key(key, "dps_mix")

    def init(params):
        mixed = trees.cut_to(trees.resolve_mask(mask, params), params)
        axes = trees.held_layer_axes(layer_axis, params, mixed)
        rows = trees.draw_rows(key, 0, trees.input_rows(mixed, input_axis, axes), keep_fraction, axes)
        return DpsMixState(
            count=jnp.zeros([], jnp.int32),
            stored_key=random.StoredKey.of(key),
            pretrained=jax.tree.map(jnp.copy, mixed),
            scores=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), mixed),
            appearances=jax.tree.map(lambda row: jnp.zeros_like(row, jnp.float32), rows),
            threshold=_no_threshold(mixed, axes),
            rows=rows,
            forward=ForwardMix(
                target=jax.tree.map(jnp.copy, mixed),
                kept=jax.tree.map(lambda p, row: jnp.ones_like(p, bool) & row, mixed, rows),
                keep_fraction=jnp.asarray(keep_fraction, jnp.float32),
            ),
        )

    def update(updates, state, params=None):
        trees.require_params("dps_mix", params)
        second, start = _stage(state.count, stage_steps)
        scores, appearances = _mix_scores(state, updates, stage_steps)
        axes = trees.held_layer_axes(layer_axis, updates, scores)
        threshold = _threshold_of_stage(scores, axes, state.threshold, keep_fraction, second, start)
        selected = selected_entries(scores, threshold)
        updates = trees.replace_held(lambda g, m, row: g * (m & row), updates, selected, state.rows)
        count = optax.safe_increment(state.count)
        drawn = trees.draw_rows(state.key, count, state.rows, keep_fraction, axes)
        next_second, _ = _stage(count, stage_steps)
        new_state = state._replace(
            count=count,
            scores=scores,
            appearances=appearances,
            threshold=threshold,
            rows=trees.map_held(lambda row: row | next_second, drawn),
            forward=_next_mix(state, params, selected, drawn, stage_steps, keep_fraction),
        )
        return updates, new_state

    return optax.GradientTransformation(init, update)


def _mix_scores(state, updates, stage_steps):
    """The scores of DPS Mix, sums of squared gradients until the first step of stage II, and the appearances."""
    second, start = _stage(state.count, stage_steps)

    def sum_up(old, g, row):
        return _sum_of_stage(old, finite_square(g) * row, second, start)

    def score(gradients, appearances):
        frequency = jnp.maximum(appearances, 1.0)
        penalty = jnp.where(stage_steps < 50, 1.0, jnp.exp(-frequency / stage_steps))
        return jnp.where(second & start, gradients / frequency * penalty, gradients)

    appearances = trees.map_held(lambda f, m: _sum_of_stage(f, m, second, start), state.appearances, state.rows)
    return trees.map_held(score, trees.map_held(sum_up, state.scores, updates, state.rows), appearances), appearances


def _next_mix(state, params, selected, drawn, stage_steps, keep_fraction):
    """What the forward pass of the next step mixes.

    At the first step of stage II the target is W itself, so W_eff is W whatever m is: a mix that keeps everything.
    """
    second, start = _stage(state.count, stage_steps)
    next_second, next_start = _stage(optax.safe_increment(state.count), stage_steps)

    def target(old, pretrained, now):
        return jnp.where(next_second, jnp.where(second & start, now, old), pretrained)

    return ForwardMix(
        target=trees.map_held(target, state.forward.target, state.pretrained, params),
        kept=trees.map_held(lambda m, row: jnp.where(next_second, m, row), selected, drawn),
        keep_fraction=jnp.where(next_second & next_start, 1.0, jnp.asarray(keep_fraction, jnp.float32)),
    )


def _stage(count, stage_steps):
    """Whether the step after ``count`` updates is in stage II, and whether it is the first of its stage; () bool."""
    return (count // stage_steps) % 2 == 1, count % stage_steps == 0


def _sum_of_stage(old, new, second, start):
    """The sum over the steps of stage I, from 0 at its first step; unchanged in stage II."""
    return jnp.where(second, old, jnp.where(start, 0.0, old) + new)


def _no_threshold(held, axes):
    return trees.map_held(lambda leaf, axis: jnp.zeros(layers_shape(leaf, axis), jnp.float32), held, axes)


def _threshold_of_stage(scores, axes, old, keep_fraction, second, start):
    """The thresholds of a step: computed at the first step of stage II, kept until its end, 0 in stage I."""

    def keep():
        return jax.tree.map(lambda t: jnp.where(second, t, 0.0), old)

    def work_out():
        treedef: Any  # its methods are not in JAX's type stubs
        leaves, treedef = jax.tree.flatten(scores)
        layer_axes = treedef.flatten_up_to(axes)
        sizes = [leaf.size // count_layers(leaf, axis) for leaf, axis in zip(leaves, layer_axes, strict=True)]
        ranks = [rank(size, keep_fraction) for size in sizes]
        return treedef.unflatten(kth_largest([[leaf] for leaf in leaves], ranks, layer_axes))

    return jax.lax.cond(second & start, work_out, keep)


def _check_stage_steps(stage_steps):
    check_number(
        "stage_steps",
        stage_steps,
        lambda x: x >= 1 and x == int(x),
        "a whole number of steps >= 1: train longer or make the stages a larger share",
    )
