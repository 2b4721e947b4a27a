"""Sensitivity and noise: PATS as Optax gradient transformations.

`pats_noise` adds noise to the incoming update, `with_raw_gradient` supplies the raw gradient that sensitivity is
measured with, and `pats` combines both around any optimizer. `sensitivity` reads the sensitivity from an optimizer
state.

The idea is that of PATS, Perturbation According To Sensitivity (EMNLP 2022, https://arxiv.org/abs/2210.12403):
parameters that matter less for the task get more noise. The paper's formulas were not available to this project, so the
exact rule below is ours, and every number in it is an argument.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import random, trees
from pats_jax.trees import check_number, choose

Response = Callable[[jax.Array], jax.Array]
Sampler = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def _linear(r: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1.0 - r)


def _constant(r: jax.Array) -> jax.Array:
    """The same noise on all entries, with the mean of w^2 that "linear" has: a control that ignores sensitivity."""
    return jnp.full_like(r, _root_mean_square(_linear(r)))


def _reversed(r: jax.Array) -> jax.Array:
    """More noise on sensitive entries, with the mean of w^2 that "linear" has: a control. "constant" if all r are 0."""
    share, of_linear = jnp.minimum(1.0, r), _root_mean_square(_linear(r))
    own = _root_mean_square(share)
    return jnp.where(own > 0, share * (of_linear / jnp.where(own > 0, own, 1.0)), of_linear)


def _root_mean_square(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)) / max(x.size, 1))


# the relative sensitivity r >= 0 of one tensor -> the share of the full noise on each entry, of r's shape
RESPONSES: dict[str, Response] = {
    "linear": _linear,
    "reciprocal": lambda r: 1.0 / (1.0 + r),
    "exponential": lambda r: jnp.exp(-r),
    "constant": _constant,
    "reversed": _reversed,
}


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform on [-sqrt(3), sqrt(3)]: a 32-bit integer with its sign, scaled.

    It takes fewer operations per entry than jax.random.uniform; benchmarks/NOTES.md has the times.
    """
    signed = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)
    return signed.astype(jnp.float32) * np.float32(math.sqrt(3) / 2**31)


# float32 draws of zero mean and unit variance
DISTRIBUTIONS: dict[str, Sampler] = {
    "uniform": _uniform,
    "normal": lambda key, shape: jax.random.normal(key, shape, jnp.float32),
}


class PatsNoiseState(NamedTuple):
    """State of `pats_noise`.

    Attributes:
      count: t, the number of updates so far, () int32.
      stored_key: the key of the noise, the same at every step; each step's draws are folded from it and ``count``.
      decay_power: decay**t, () float32, for the bias correction in `sensitivity`.
      sensitivity: S_t before bias correction, a tree like params; None where masked.
      initial_std: std(W_0), a tree like params, () float32, or (layers,) for a leaf with a layer axis; None where
        masked.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    stored_key: random.StoredKey
    decay_power: jax.Array
    sensitivity: Any
    initial_std: Any

    @property
    def key(self) -> jax.Array:
        """The typed key."""
        return self.stored_key.key


def pats_noise(
    noise_scale: optax.ScalarOrSchedule,
    *,
    key: int | np.integer | jax.Array,
    decay: float | jax.Array = 0.9,
    response: str | Response = "linear",
    distribution: str = "uniform",
    mask: Any | Callable[[Any], Any] = None,
    sensitivity_dtype: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds noise to the update: most on parameters of low sensitivity, none on those of high sensitivity.

    With parameters theta, raw gradient g and incoming update u, at step t = 1, 2, ...::

        s_t  = |theta * g|                          change of the loss, to first order, if the parameter became 0
        S_t  = decay * S_{t-1} + (1 - decay) * s_t  S_0 = 0
        r_t  = S_t / mean(S_t over the tensor)      relative sensitivity (bias correction cancels); 0 if the mean is 0
        w_t  = response(r_t)
        sd_t = noise_scale * std(W_0) * w_t         W_0 the tensor at init, population standard deviation
        update = u + sd_t * xi_t                    xi_t independent, zero mean, unit variance, new at every step

    ``noise_scale`` is thus the standard deviation of the noise on a parameter of zero sensitivity, in units of its
    tensor's standard deviation. The noise stays in the parameters: over T steps it grows like sqrt(T). A parameter
    whose s_t is not finite keeps its S. The idea is the paper's; the formulas are ours.

    Goes last in a chain: what stands after it would change the noise, too. `with_raw_gradient` and `TrainState.create`
    warn where the optimizer's state shows that something does, such as Adam's moments; parts without a state, such as
    `optax.sgd` without momentum, cannot be seen. The raw gradient comes in by Optax's extra argument ``grad``, which
    `with_raw_gradient` supplies; inside `optax.masked` and `optax.partition` it is cut to the leaves that the update
    has.

    Args:
      noise_scale: a number >= 0, or a schedule of the number of updates so far, t-1.
      key: an int or a typed key; an int becomes a key of the project's fast kind, see `pats_jax.random`.
      decay: decay of the moving average of sensitivity, in [0, 1).
      response: "linear" max(0, 1-r), "reciprocal" 1/(1+r), "exponential" exp(-r), or a function of the r >= 0 of one
        tensor (float32, any shape) that gives w of its shape: non-increasing, 1 at 0, in [0, 1]. Two controls have
        the mean of w^2 over the tensor that "linear" has: "constant", the same w for all entries, and "reversed",
        w in proportion to min(1, r).
      distribution: "uniform" on [-sqrt(3), sqrt(3)], or "normal".
      mask: a tree prefix of bools, or a function of params that returns one; leaves outside get no noise and hold no
        state. None means every leaf.
      sensitivity_dtype: dtype in which S_t is stored, float32 if None. r_t is computed from the stored values, in
        float32.
      layer_axis: the axis of the layers in leaves that hold the tensors of many layers, as `flax.linen.scan` creates
        them: an int for all leaves, a tree prefix of ints with -1 for leaves without layers, or a function of params
        that returns one. Each layer is then treated as a tensor of its own, with its own mean, standard deviation and
        draws, and a mask may have an array of bools (layers,) for such a leaf. None means that each leaf is one tensor.
        For this library's own models, pass `pats_jax.models.layer_axis`.

    Returns:
      A gradient transformation whose ``update`` requires params and the extra argument ``grad``.

    Raises:
      ValueError: on a negative scale, a decay outside [0, 1), an unknown response or distribution; from ``update``
        without params or ``grad``. Traced numbers are not checked.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
      >>> noise = pats_jax.pats_noise(0.1, key=0, decay=0.5)
      >>> tx = pats_jax.with_raw_gradient(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1), noise))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.0, 1.0, 1.0, 1.0])}, state, params)
      >>> print(pats_jax.sensitivity(state)["w"])
      [0. 3. 2. 1.]
      >>> print(updates["w"][1:3].round(4))  # above the mean of 1.5: plain gradient descent
      [-0.0577 -0.0577]
      >>> bool(updates["w"][0] != 0)  # no gradient, no sensitivity: noise
      True

    References:
      Zhang et al., `PATS: Sensitivity-aware Noisy Learning for Pretrained Language Models
      <https://arxiv.org/abs/2210.12403>`_, 2022
    """
    if not callable(noise_scale):
        check_number("noise_scale", noise_scale, lambda x: 0 <= x < math.inf, "a finite number >= 0")
    check_number("decay", decay, lambda x: 0 <= x < 1, "in [0, 1)")
    respond = _response(response)
    draw = choose("distribution", distribution, DISTRIBUTIONS)
    silent = not isinstance(noise_scale, jax.core.Tracer) and not callable(noise_scale) and float(noise_scale) == 0
    key = random.as_key(key)
    sensitivity_dtype = jnp.dtype(jnp.float32 if sensitivity_dtype is None else sensitivity_dtype)

    def init(params):
        kept, axes = trees.resolve_layer_mask(mask, params), trees.resolve_layer_axis(layer_axis, params)
        return _first_state(params, kept, axes, key, sensitivity_dtype)

    @jax.jit  # tensors of one shape share their program
    def update_tensor(u, p, g, old, std, tensor_key, scale):
        new = _stored(trees.moving_average(old, trees.saliency(p, g), decay), sensitivity_dtype)
        if silent:  # adding zeros could still change how XLA fuses, and so rounds, what comes before
            return u, new
        noise = scale * std * respond(_relative(new)) * draw(tensor_key, u.shape)
        return (u + noise).astype(u.dtype), new

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        trees.require_raw_gradient("pats_noise", params, grad)
        scale = noise_scale(state.count) if callable(noise_scale) else noise_scale
        treedef: Any  # its methods are not in JAX's type stubs
        leaves, treedef = jax.tree.flatten(updates, is_leaf=trees.is_masked)
        axes = trees.resolve_layer_axis(layer_axis, updates)
        keys = trees.leaf_keys(jax.random.fold_in(state.key, state.count), updates, axes)

        def update_leaf(u, axis, leaf_key, p, g, old, std):
            if old is None or trees.is_masked(u):
                return u, old
            of_tensor = functools.partial(update_tensor, scale=scale)
            return trees.each_layer(of_tensor, axis, u, p, g, old, per_layer=(std, leaf_key))

        trees_of_leaves = (axes, keys, params, grad, state.sensitivity, state.initial_std)
        columns = [treedef.flatten_up_to(tree) for tree in trees_of_leaves]
        results = [update_leaf(*row) for row in zip(leaves, *columns, strict=True)]
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            decay_power=state.decay_power * decay,
            sensitivity=treedef.unflatten(new for _, new in results),
        )
        return treedef.unflatten(u for u, _ in results), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _first_state(params, kept, axes, key, sensitivity_dtype):
    noisy = trees.cut_to(kept, params)
    _warn_of_rounding(noisy)
    return PatsNoiseState(
        count=jnp.zeros([], jnp.int32),
        stored_key=random.StoredKey.of(key),
        decay_power=jnp.ones([], jnp.float32),
        sensitivity=jax.tree.map(lambda p: jnp.zeros_like(p, sensitivity_dtype), noisy),
        initial_std=trees.map_held(_initial_std, noisy, axes, kept),
    )


def with_raw_gradient(inner: optax.GradientTransformation | optax.MultiSteps) -> optax.GradientTransformationExtraArgs:
    """Passes the incoming gradient to every transform inside, as Optax's extra argument ``grad``.

    Clipping, Adam and weight decay change the gradient on its way through a chain; a transform that measures
    sensitivity, such as `pats_noise`, needs the original. A ``grad`` that a caller passes is overwritten.

    `optax.MultiSteps` belongs outside, so that the incoming gradient is the accumulated one; if ``inner`` is an
    `optax.MultiSteps` object, this function wraps the optimizer inside it.

    Args:
      inner: any gradient transformation.

    Returns:
      The same transformation with ``grad`` supplied; its state is ``inner``'s.

    Raises:
      TypeError: if ``inner`` is not an optimizer.
      ValueError: from ``init``, if gradients are accumulated inside (by
        ``optax.MultiSteps(...).gradient_transformation()``), where the raw gradient is not known.
    """
    trees.check_optimizer("with_raw_gradient", inner)
    if isinstance(inner, optax.MultiSteps):
        return _inside_multi_steps(inner, with_raw_gradient)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        if trees.find_states(state, optax.MultiStepsState):
            raise ValueError(
                "with_raw_gradient: gradients are accumulated inside; put optax.MultiSteps around it instead"
            )
        warn_of_followers(state)
        return state

    def update(updates, state, params=None, **extra_args):
        return inner.update(updates, state, params, **{**extra_args, "grad": updates})

    return optax.GradientTransformationExtraArgs(init, update)


def pats(
    inner: optax.GradientTransformation | optax.MultiSteps,
    noise_scale: optax.ScalarOrSchedule = 1e-2,
    *,
    key: int | np.integer | jax.Array,
    decay: float | jax.Array = 0.9,
    response: str | Response = "linear",
    distribution: str = "uniform",
    mask: Any | Callable[[Any], Any] = None,
    sensitivity_dtype: Any = None,
    layer_axis: trees.LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds sensitivity-aware noise to the updates of any optimizer.

    ``pats(inner, ...)`` is ``with_raw_gradient(optax.chain(inner, pats_noise(...)))``; `pats_noise` has the formula.

    Args:
      inner: the optimizer, for instance ``optax.adamw(2e-5)``.
      noise_scale: standard deviation of the noise on a parameter of zero sensitivity, in units of its tensor's standard
        deviation; `pats_noise` has details of this and the following arguments. The default is ours: of the scales that
        we tried, annealed with the learning rate, the largest that does little harm (docs/results.md).
      key: an int or a typed key.
      decay: decay of the moving average of sensitivity, in [0, 1).
      response: how the noise depends on relative sensitivity.
      distribution: ``"uniform"`` or ``"normal"``.
      mask: which leaves get noise.
      sensitivity_dtype: dtype of the stored sensitivity.
      layer_axis: the axis of the layers in leaves that hold many.

    Returns:
      A gradient transformation whose ``update`` requires params.

    Raises:
      TypeError: if ``inner`` is not an optimizer.
      ValueError: see `pats_noise` and `with_raw_gradient`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, pats_jax
      >>> tx = pats_jax.pats(optax.adam(0.05), noise_scale=1e-2, key=0)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(lambda x: jnp.sum(x**2))(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.max(jnp.abs(params)) < 0.1)
      True
    """
    trees.check_optimizer("pats", inner)
    noise = pats_noise(
        noise_scale,
        key=key,
        decay=decay,
        response=response,
        distribution=distribution,
        mask=mask,
        sensitivity_dtype=sensitivity_dtype,
        layer_axis=layer_axis,
    )
    if isinstance(inner, optax.MultiSteps):
        return _inside_multi_steps(inner, lambda optimizer: with_raw_gradient(optax.chain(optimizer, noise)))
    return with_raw_gradient(optax.chain(inner, noise))


def sensitivity(opt_state: Any) -> Any:
    """Reads the bias-corrected sensitivity, S^_t = S_t / (1 - decay**t), from an optimizer state.

    Args:
      opt_state: the state of any optimizer that contains `pats_noise`.

    Returns:
      A tree like params, float32, with None where masked; zeros before the first step. Under `optax.partition`, the
      groups that have noise are combined.

    Raises:
      ValueError: if there is no `PatsNoiseState` in the state.
      TypeError: if its leaves are not arrays, as in Flax NNX before ``nnx.as_pure``.
    """
    states = _noise_states(opt_state, "sensitivity")

    def corrected(state):
        weight = jnp.where(state.decay_power < 1, 1 - state.decay_power, 1.0)
        shown = jax.tree.map(lambda s: None if trees.is_masked(s) else s, state.sensitivity, is_leaf=trees.is_masked)
        return jax.tree.map(lambda s: s.astype(jnp.float32) / weight, shown)

    def first_present(*leaves):
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first_present, *map(corrected, states), is_leaf=lambda x: x is None)


def noise_statistics(
    opt_state: Any,
    noise_scale: optax.ScalarOrSchedule,
    response: str | Response = "linear",
    *,
    layer_axis: trees.LayerAxis = None,
) -> dict[str, jax.Array]:
    """Measures how much noise the last update had, from the optimizer state alone, without drawing it again.

    Args:
      opt_state: the state of an optimizer that contains `pats_noise`, after an update.
      noise_scale: as given to `pats_noise`.
      response: as given to `pats_noise`.
      layer_axis: as given to `pats_noise`.

    Returns:
      A dict of () float32: ``noise_norm``, sqrt(sum of sd_t^2), the root of the expected squared norm of the noise; and
      ``noisy_parameters``, the number of parameters with sd_t > 0. Both are 0 before the first update.

    Raises:
      ValueError: if there is no `PatsNoiseState` in the state.
    """
    respond = _response(response)
    square, noisy = jnp.float32(0), jnp.float32(0)
    for state in _noise_states(opt_state, "noise_statistics"):
        scale = noise_scale(jnp.maximum(state.count - 1, 0)) if callable(noise_scale) else noise_scale
        scale = jnp.where(state.count > 0, scale, 0.0)
        axes = jax.tree.leaves(trees.resolve_layer_axis(layer_axis, state.sensitivity))
        stds = jax.tree.leaves(state.initial_std)
        for s, std, axis in zip(jax.tree.leaves(state.sensitivity), stds, axes, strict=True):
            share = trees.each_layer(lambda s, std: std * respond(_relative(s)), axis, s, per_layer=(std,))
            sd = scale * share
            square, noisy = square + jnp.sum(sd**2), noisy + jnp.sum(sd > 0)
    return {"noise_norm": jnp.sqrt(square), "noisy_parameters": noisy}


def _noise_states(opt_state, caller):
    states = trees.find_states(opt_state, PatsNoiseState)
    if not states:
        raise ValueError(f"{caller}: this optimizer state holds no PatsNoiseState; chain pats_noise into the optimizer")
    wrapped = next((s for s in states if not isinstance(s.count, jax.Array | np.ndarray)), None)
    if wrapped is not None:
        raise TypeError(
            f"{caller}: the optimizer state holds {type(wrapped.count).__name__} in place of arrays; with Flax NNX "
            "pass nnx.as_pure(optimizer.opt_state)"
        )
    return states


def _response(response):
    return response if callable(response) else choose("response", response, RESPONSES)


def _initial_std(param, axis, kept):
    """The standard deviation of each tensor of a leaf; 0 for layers that the mask leaves out, so they get no noise."""
    std = trees.each_layer(trees.std, axis, param, out_axis=0)
    return jnp.where(kept, std, 0.0) if isinstance(kept, np.ndarray) else std


def _stored(sensitivity, dtype):
    """S of one leaf as stored. The noise uses the rounded values, so XLA keeps no others in memory."""
    return sensitivity if dtype == jnp.float32 else jax.lax.optimization_barrier(sensitivity.astype(dtype))


def _relative(sensitivity):
    """r = S / mean(S) of one leaf, float32; 0 where the mean is 0 or subnormal in float32."""
    mean = jnp.sum(sensitivity, dtype=jnp.float32) / max(sensitivity.size, 1)
    positive = mean >= jnp.finfo(jnp.float32).tiny
    if sensitivity.dtype != jnp.float32:  # read again after the mean: XLA would keep it in float32 in between
        sensitivity = jax.lax.optimization_barrier(sensitivity)
    # one division for the leaf, not one for each entry
    return sensitivity.astype(jnp.float32) * jnp.where(positive, 1.0 / jnp.where(positive, mean, 1.0), 0.0)


def _warn_of_rounding(params):
    low = {str(p.dtype) for p in jax.tree.leaves(params) if jnp.finfo(p.dtype).bits < 32}
    if low:
        warnings.warn(
            f"pats_noise on {', '.join(sorted(low))} parameters: noise below half a unit in the last place rounds "
            "away; keep the parameters in float32 and compute in bfloat16",
            stacklevel=3,
        )


def warn_of_followers(opt_state: Any) -> None:
    """Warns if a chain has `pats_noise` before a part with a state, which then changes the noise, too.

    Seen in the state alone: a part without one, and one hidden in a wrapper's state, is not noticed.

    Args:
      opt_state: the state of any optimizer.
    """
    chains = jax.tree.leaves(opt_state, is_leaf=lambda x: type(x) is tuple)
    for chain in (x for x in chains if type(x) is tuple):
        noisy = [bool(trees.find_states(part, PatsNoiseState)) for part in chain]
        for before, part in enumerate(chain):
            if any(noisy[:before]) and not noisy[before] and (name := _changing(part)):
                warnings.warn(
                    f"pats_noise stands before {name} in the chain, which changes the noise, too; put pats_noise last",
                    stacklevel=1,  # one place for all callers: Python then shows it once
                )
                return
        for part in chain:
            warn_of_followers(part)


def _changing(part):
    """The name of the first state in a part of a chain that holds arrays, and does not only watch; else None."""

    def is_own(x):
        return isinstance(x, tuple) and hasattr(x, "_fields")

    states = [x for x in jax.tree.leaves(part, is_leaf=is_own) if is_own(x) and jax.tree.leaves(x)]
    return next((name for name in (type(x).__name__ for x in states) if name not in _WATCHING), None)


# States of parts that leave the noise as it is: those of Optax change no finite update, AdaLoRA only entries without
_WATCHING = {"MonitorState", "SnapshotState", "ZeroNansState", "AdaLoraState"}


def _inside_multi_steps(multi_steps, wrap):
    """The same MultiSteps around ``wrap(its optimizer)``, which then gets the accumulated gradient."""
    outside = copy.copy(multi_steps)
    outside._opt = wrap(multi_steps.inner_opt)
    return outside.gradient_transformation()
