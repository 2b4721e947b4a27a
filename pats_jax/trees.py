"""Shared by all transforms: masks, layers, a key for every leaf, states inside states, W_eff, input rows, checks.

A transform holds state for the leaves that its mask selects: a tree like params with None at the others. Where
`optax.masked` or `optax.partition` removes a leaf, params and state have an `optax.MaskedNode` in its place.
"""

import functools
import numbers
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import random


def is_masked(x: Any) -> bool:
    """Whether x stands for a leaf that Optax has removed."""
    return isinstance(x, optax.MaskedNode)


def is_absent(x: Any) -> bool:
    """Whether x stands for no leaf: None or an `optax.MaskedNode`."""
    return x is None or is_masked(x)


def resolve_mask(mask: Any, params: Any, name: str = "mask") -> Any:
    """A mask (a tree prefix of bools, a function of params, or None for every leaf) as a tree of bools like params.

    optax.MaskedNode counts as a leaf. An array of bools, one per layer of a leaf, becomes one bool if all are equal.

    Args:
      mask: the mask.
      params: the parameters.
      name: the argument's name in messages.

    Raises:
      TypeError: if one of its leaves is not of bools.
      ValueError: if its structure is not a prefix of that of params, or if the mask selects some layers of a leaf but
        not others.
    """
    resolved = resolve_layer_mask(mask, params, name)
    if any(isinstance(keep, np.ndarray) for keep in jax.tree.leaves(resolved)):
        raise ValueError(f"{name}: takes some layers of a stacked leaf and leaves others out; use separate layers")
    return resolved


def resolve_layer_mask(mask: Any, params: Any, name: str = "mask") -> Any:
    """As `resolve_mask`, but a leaf of which the mask selects some layers has an array of bools (layers,)."""

    def kept(keep):
        is_own = is_masked(keep) or isinstance(keep, bool | int | np.generic | np.ndarray | jax.Array)
        if not is_own or getattr(keep, "dtype", np.dtype(bool)).kind not in "bui":  # whole numbers count as bools
            raise TypeError(f"{name}: holds {keep!r:.60}; it must be {_A_MASK}")
        return as_kept(keep)

    resolved = True if mask is None else mask(params) if callable(mask) else mask
    return _resolve_prefix(resolved, params, kept, name, _A_MASK)


_A_MASK = "a tree of bools like the parameters, or a function of the parameters that returns one"


def as_kept(keep: Any) -> bool | np.ndarray:
    """A bool, or bools (layers,), as one bool if all are equal."""
    kept = np.asarray(keep, bool)
    return bool(kept.flat[0]) if kept.size and np.all(kept == kept.flat[0]) else kept


def _resolve_prefix(prefix, params, convert, name, expected):
    """A tree like params with the converted leaves of a tree prefix; optax.MaskedNode counts as a leaf."""
    treedef: Any  # its methods are not in JAX's type stubs
    leaves, treedef = jax.tree.flatten(prefix, is_leaf=is_masked)
    parts = parts_of(treedef, prefix, params, name, expected)
    whole = [
        jax.tree.map(lambda _, x=x: convert(x), part, is_leaf=is_masked) for x, part in zip(leaves, parts, strict=True)
    ]
    return treedef.unflatten(whole)


def parts_of(treedef: Any, prefix: Any, params: Any, name: str, expected: str) -> list[Any]:
    """The parts of params that stand at the leaves of a tree prefix.

    Args:
      treedef: the structure of the prefix.
      prefix: the prefix.
      params: the parameters.
      name: the prefix's name in messages.
      expected: what it must be.

    Raises:
      ValueError: if it is no prefix of params; the message says where.
    """
    try:
        return treedef.flatten_up_to(params)
    except (TypeError, ValueError):
        found = _misfit(prefix, params, "") or "has another structure than the parameters"
        raise ValueError(f"{name}: {found}; it must be {expected}") from None


def _misfit(prefix, tree, path):
    """Where a tree prefix of dicts differs from a tree; None if its dicts do not tell."""
    at = f" at {path}" if path else ""
    if isinstance(prefix, Mapping) and isinstance(tree, Mapping):
        unknown, missing = ([*(key for key in a if key not in b)] for a, b in ((prefix, tree), (tree, prefix)))
        if unknown:
            return f"has {unknown[0]!r:.60}{at}, which the parameters do not have"
        if missing:
            return f"lacks {missing[0]!r:.60}{at}"
        below = (_misfit(prefix[key], tree[key], f"{path}/{key}".lstrip("/")) for key in prefix)
        return next(filter(None, below), None)
    if isinstance(prefix, Mapping | list | tuple) and type(prefix) is not type(tree):
        kind = "an array" if hasattr(tree, "shape") else f"a {type(tree).__name__}"
        return f"is a {type(prefix).__name__}{at}, where the parameters have {kind}"
    return None


def cut_to(mask: Any, params: Any) -> Any:
    """Params with None at the leaves where a tree of bools is False; optax.MaskedNode stays."""
    return jax.tree.map(lambda keep, p: p if np.any(keep) or is_masked(p) else None, mask, params)


def partition(mask: Any, params: Any) -> tuple[Any, Any]:
    """Two trees like params: the leaves where a tree of bools is True, and the others; None elsewhere."""
    taken = jax.tree.map(lambda keep, p: p if keep else None, mask, params)
    left = jax.tree.map(lambda keep, p: None if keep else p, mask, params)
    return taken, left


def combine(taken: Any, left: Any) -> Any:
    """The inverse of `partition`; ``left=None`` stands for a tree without leaves."""
    if left is None:
        return taken
    return jax.tree.map(lambda a, b: b if a is None else a, taken, left, is_leaf=lambda x: x is None)


def map_held(function: Callable, held: Any, *rest: Any) -> Any:
    """``function(leaf, *leaves of rest)`` at every leaf of ``held``; None and optax.MaskedNode stay."""
    return jax.tree.map(lambda h, *r: h if is_absent(h) else function(h, *r), held, *rest, is_leaf=is_absent)


def replace_held(function: Callable, tree: Any, held: Any, *rest: Any) -> Any:
    """``function(leaf of tree, held leaf, *leaves of rest)`` where ``held`` has a leaf; elsewhere the leaf of ``tree``.

    ``tree`` is a tree of updates or params. Where ``held`` has an optax.MaskedNode, ``tree`` may have a leaf.
    """
    return jax.tree.map(
        lambda h, x, *r: x if is_absent(h) else function(x, h, *r), held, tree, *rest, is_leaf=is_absent
    )


def entry_name(entry: Any) -> str:
    """The name of one entry of a leaf's path."""
    return jax.tree_util.keystr((entry,), simple=True)


def own_key(key: int | jax.Array, method: str) -> jax.Array:
    """An argument named ``key`` as a typed key, folded with a method's name.

    Methods that share a seed thus draw independently.
    """
    return jax.random.fold_in(random.as_key(key), _number(method))


def leaf_keys(key: jax.Array, tree: Any, axes: Any = None) -> Any:
    """A tree like ``tree`` with a key at every leaf, or keys (layers,) for a leaf with a layer axis.

    A key depends on the leaf's path, so a leaf draws the same numbers whatever else is in the tree, and different ones
    from every other leaf. A layer's key is folded from the name that all layers share and from the layer's number: its
    place along the layer axis, or the number in its path below one of `_LAYER_LISTS`. Stacked and separate layers thus
    draw the same numbers. optax.MaskedNode counts as a leaf.

    Args:
      key: the typed key that all keys are folded from.
      tree: the tree whose leaves get keys.
      axes: layer axes, from `resolve_layer_axis`; None means that no leaf has one.
    """
    treedef: Any  # its methods are not in JAX's type stubs
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    layer_axes = [-1] * len(leaves) if axes is None else treedef.flatten_up_to(axes)
    sizes = [_count_layers(leaf, axis) for (_, leaf), axis in zip(leaves, layer_axes, strict=True)]
    paths = [(path, None) if size else _without_layer(path) for (path, _), size in zip(leaves, sizes, strict=True)]
    # All keys are folded at once: leaf by leaf it takes XLA seconds to compile.
    fold = jax.vmap(jax.random.fold_in)
    names = jnp.array([_number(jax.tree_util.keystr(path)) for path, _ in paths], jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names)
    numbered = np.array([number is not None for _, number in paths])
    numbers = jnp.array([number or 0 for _, number in paths], jnp.uint32)
    keys = jnp.where(numbered, fold(keys, numbers), keys) if numbered.any() else keys
    found = {index: keys[index] for index, size in enumerate(sizes) if not size}
    for size in set(sizes) - {0}:
        places = np.flatnonzero(np.array(sizes) == size)
        layers = jax.vmap(fold, (None, 0), 1)
        of_layers = layers(keys[places], jnp.broadcast_to(jnp.arange(size)[:, None], (size, len(places))))
        found |= {int(place): of_layers[row] for row, place in enumerate(places)}
    return treedef.unflatten(found[index] for index in range(len(leaves)))


def _count_layers(leaf, axis):
    return 0 if is_masked(leaf) or axis < 0 else leaf.shape[axis]


_LAYER_LISTS = ("layer", "layers", "block")  # names of Hugging Face's lists of layers


def _without_layer(path):
    """A path without its layer's number, and that number or None."""
    for place, (above, entry) in enumerate(zip(path, path[1:], strict=False), 1):
        number = str(getattr(entry, "key", getattr(entry, "idx", "")))
        if getattr(above, "key", getattr(above, "name", None)) in _LAYER_LISTS and number.isdecimal():
            return path[:place] + path[place + 1 :], int(number)
    return path, None


# layers of stacked leaves

LayerAxis = Any  # None, an int, a tree prefix of ints, or a function of params that returns one


def resolve_layer_axis(layer_axis: LayerAxis, params: Any) -> Any:
    """A layer axis (None for no leaf, an int, a tree prefix of ints, or a function of params) as a tree like params.

    Each int is the axis, counted from 0, along which a leaf holds the tensors of many layers; -1 means one tensor.
    optax.MaskedNode counts as a leaf.

    Raises:
      ValueError: if a leaf has no such axis.
    """
    prefix = -1 if layer_axis is None else layer_axis(params) if callable(layer_axis) else layer_axis
    axes = _resolve_prefix(prefix, params, int, "layer_axis", "an int, or a tree of ints like the parameters")

    def check(axis, leaf):
        if not is_masked(leaf) and not -1 <= axis < leaf.ndim:
            raise ValueError(f"layer_axis={axis} is not an axis of a parameter of shape {leaf.shape}")

    jax.tree.map(check, axes, params, is_leaf=is_masked)
    return axes


def held_layer_axes(layer_axis: LayerAxis, params: Any, held: Any) -> Any:
    """As `resolve_layer_axis`, for the leaves of ``held``; None and optax.MaskedNode stay."""
    return map_held(lambda _, axis: axis, held, resolve_layer_axis(layer_axis, params))


def each_layer(function: Callable, axis: int, *leaves: Any, per_layer: tuple = (), out_axis: int | None = None) -> Any:
    """``function(*leaves, *per_layer)`` for one tensor, or for each layer of leaves with a layer axis.

    Args:
      function: a function of leaves without layer axis.
      axis: the leaves' layer axis, or -1.
      *leaves: arrays of the shape of one leaf.
      per_layer: further arguments, (layers, ...), of which each layer gets its own entry.
      out_axis: the layer axis of the results; None means that of the leaves.
    """
    if axis < 0:
        return function(*leaves, *per_layer)
    in_axes = (axis,) * len(leaves) + (0,) * len(per_layer)
    return jax.vmap(function, in_axes, axis if out_axis is None else out_axis)(*leaves, *per_layer)


def where_chosen(chosen: bool | np.ndarray, axis: int, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new leaf, with the old values in the layers that a mask leaves out.

    Args:
      chosen: True, or bools of the layers (layers,), from `resolve_layer_mask`.
      axis: the leaf's layer axis.
      new: the new leaf.
      old: the old leaf, of the same shape.
    """
    if not isinstance(chosen, np.ndarray):
        return new
    return each_layer(lambda new, old, keep: jnp.where(keep, new, old), axis, new, old, per_layer=(chosen,))


def find_states(opt_state: Any, *kinds: type) -> list[Any]:
    """All states of the given kinds inside the state of an optimizer."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def as_extra_args_transform(
    caller: str,
    inner: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer as a gradient transformation that takes extra arguments, used or not; see `check_optimizer`."""
    check_optimizer(caller, inner)
    return optax.with_extra_args_support(
        inner.gradient_transformation() if isinstance(inner, optax.MultiSteps) else inner
    )


# the parameters of the forward pass


class ForwardMix(NamedTuple):
    """What the forward pass of the next training step uses as parameters: a mix of two trees.

    ``W_eff = ((1-m) * target + m * W - p * target) / (1-p)``, whose mean over m is W when m is 1 with probability 1-p.

    Attributes:
      target: a tree like params, the values that replace dropped weights; None where masked.
      kept: m, a tree like params of bools that broadcast to the leaf; None where masked.
      keep_fraction: 1-p, () float32.
    """

    target: Any
    kept: Any
    keep_fraction: jax.Array


class ForwardNoise(NamedTuple):
    """What the forward pass of the next training step adds to the parameters.

    Attributes:
      noise: the noise, a tree like params; None where masked.
    """

    noise: Any


def forward_params(opt_state: Any, params: Any) -> Any:
    """The parameters that the forward pass of this training step uses.

    W_eff of `ForwardMix` under `pats_jax.mixout` and `pats_jax.dps_mix`, with the noise of `ForwardNoise` added under
    `pats_jax.perturbed`, at the leaves that these methods select; params otherwise. Differentiate the loss AT these
    values, not through them, as the backward pass of the authors' code does::

        grads = jax.grad(loss)(pats_jax.forward_params(opt_state, params))
        updates, opt_state = tx.update(grads, opt_state, params)

    `pats_jax.make_train_step` does so. Evaluation uses params.

    Args:
      opt_state: the state of any optimizer, before this step's update.
      params: the parameters.

    Returns:
      A tree like params, of the same dtypes.
    """
    for forward in find_states(opt_state, ForwardMix):
        mix = functools.partial(_mix, keep_fraction=forward.keep_fraction)
        params = replace_held(mix, params, forward.target, forward.kept)
    for added in find_states(opt_state, ForwardNoise):
        params = replace_held(lambda p, noise: (p + noise).astype(p.dtype), params, added.noise)
    return params


def _mix(param, target, kept, *, keep_fraction):
    """W_eff of one leaf, computed in float32, in the leaf's dtype."""
    w, target = param.astype(jnp.float32), target.astype(jnp.float32)
    return ((jnp.where(kept, w, target) - (1 - keep_fraction) * target) / keep_fraction).astype(param.dtype)


# masks of input features


def input_rows(held: Any, input_axis: int, axes: Any) -> Any:
    """For every leaf, an array of bools with one entry per input feature, which broadcasts to the leaf.

    A scalar or 1-D tensor has no input features: it gets one bool per entry.

    Args:
      held: a tree of leaves; None and optax.MaskedNode stay.
      input_axis: the axis of input features, counted within a layer's own tensor.
      axes: layer axes, from `held_layer_axes`; the result has the same ones.

    Raises:
      ValueError: if a tensor of two or more dimensions has no axis ``input_axis``.
    """

    def rows(tensor):
        if tensor.ndim < 2:
            return jnp.ones(tensor.shape, bool)
        if not -tensor.ndim <= input_axis < tensor.ndim:
            raise ValueError(f"input_axis={input_axis} is not an axis of a parameter of shape {tensor.shape}")
        return jnp.ones([n if axis == input_axis % tensor.ndim else 1 for axis, n in enumerate(tensor.shape)], bool)

    return map_held(lambda leaf, axis: each_layer(rows, axis, leaf), held, axes)


def draw_rows(key: jax.Array, count: jax.Array | int, rows: Any, keep_fraction: float | jax.Array, axes: Any) -> Any:
    """Bools of the shapes of `input_rows`, True with probability ``keep_fraction``, drawn anew for each ``count``."""
    keys = leaf_keys(jax.random.fold_in(key, count), rows, axes)

    def draw(row, row_key):
        return jax.random.bernoulli(row_key, keep_fraction, row.shape)

    return map_held(lambda row, axis, k: each_layer(draw, axis, row, per_layer=(k,)), rows, axes, keys)


# figures of one leaf


def saliency(param: jax.Array, grad: jax.Array) -> jax.Array:
    """|theta * g| of one leaf, float32: to first order, the change of the loss if a parameter became 0."""
    return jnp.abs(param.astype(jnp.float32) * grad.astype(jnp.float32))


def moving_average(old: jax.Array, saliency: jax.Array, decay: float | jax.Array) -> jax.Array:
    """S_t = decay * S_{t-1} + (1 - decay) * s_t of one leaf, float32; unchanged where s_t is not finite."""
    old = old.astype(jnp.float32)
    return jnp.where(jnp.isfinite(saliency), decay * old + (1 - decay) * saliency, old)


def std(leaf: jax.Array) -> jax.Array:
    """Population standard deviation of a leaf, () float32; 0 for an empty one."""
    return jnp.std(leaf.astype(jnp.float32)) if leaf.size else jnp.zeros([], jnp.float32)


# arguments; each failure is a ValueError of one line


def choose(argument: str, name: Any, table: Mapping[str, Any]) -> Any:
    """The table's entry of that name.

    Raises:
      ValueError: if there is none; the message lists all names.
    """
    if name not in table:
        raise ValueError(f"{argument}={name!r} is not one of {', '.join(map(repr, table))}")
    return table[name]


def check_number(argument: str, value: Any, holds: Callable[[float], bool], expected: str) -> None:
    """Raises ValueError if a number is not as expected; traced numbers are not checked."""
    if isinstance(value, jax.core.Tracer):
        return
    if not isinstance(value, (numbers.Real, np.ndarray, jax.Array)) or not holds(float(value)):
        raise ValueError(f"{argument}={value!r} must be {expected}")


def check_optimizer(caller: str, optimizer: Any) -> None:
    """Raises TypeError if something, a learning rate for instance, is given in place of an optimizer."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        hint = ", called" if callable(optimizer) else ""
        raise TypeError(
            f"{caller}: {optimizer!r:.60} is not an optimizer; give an Optax one{hint}, such as optax.adamw(2e-5)"
        )


def is_plainly(value: Any, number: float) -> bool:
    """Whether an argument is that number as a Python or NumPy scalar; False for arrays, which may change later."""
    return isinstance(value, numbers.Real) and value == number


def require_params(transform: str, params: Any) -> None:
    """Raises ValueError if ``update`` was called without params."""
    if params is None:
        raise ValueError(f"{transform} needs the parameters: call tx.update(grads, opt_state, params)")


def require_raw_gradient(transform: str, params: Any, grad: Any) -> None:
    """Raises ValueError if ``update`` was called without params or without the extra argument ``grad``."""
    require_params(transform, params)
    if grad is None:
        raise ValueError(f"{transform} needs the raw gradient: wrap the whole optimizer in pats_jax.with_raw_gradient")
