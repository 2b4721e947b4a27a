"""Checkpoints of the other layout of layers, and their conversion to a state's own layout.

A state with separate layers has an array for each layer, a state with stacked layers one array for all layers; see
`pats_jax.models.layout`. The optimizer's values for each layer, such as standard deviations, are stacked like its
parameters. Keys are the same in both layouts.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pats_jax.models.layers import Layout
from pats_jax.models.layout import has_stacked_layers, layer_number, names_in_other_layout
from pats_jax.train_state import parameter_name

Arrays = dict[str, Any]


def layers_of(state: Any) -> Layout:
    """Whether a state's layers are ``"separate"`` or ``"stacked"``; separate if it has none."""
    return "stacked" if has_stacked_layers(state) else "separate"


class OtherLayout:
    """The arrays of a state as a checkpoint of the other layout holds them."""

    def __init__(self, state: Any, arrays: Arrays, is_leaf: Callable[[Any], bool]):
        """Computes nothing.

        Args:
          state: the state.
          arrays: its arrays by name.
          is_leaf: what counts as one array of the state.
        """
        leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf)
        paths = {parameter_name(path): path for path, _ in leaves}
        self._arrays = arrays
        self._numbers = {name: layer_number(paths[name]) for name in arrays}
        self._names = {name: names_in_other_layout(paths[name], x) for name, x in arrays.items()}

    def differing_name(self, saved: Collection[str]) -> str | None:
        """A name that shows that the saved arrays belong to a different state; None if they belong to this one.

        A stack in the optimizer's state may lack layers: layers that a mask leaves out have no state.
        """
        known = {name for names in self._names.values() for name in names}
        differing = set(saved) - known
        for name, names in self._names.items():
            absent = set(names) - set(saved)
            if not name.startswith("opt_state.") or len(absent) == len(names):
                differing |= absent
        return min(differing, default=None)

    def differing_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The name of a saved array whose shape does not fit this state; None if all fit."""
        layers = 1 + max((number for number in self._numbers.values() if number is not None), default=0)
        for name, x in self._arrays.items():
            if self._is_same(name):
                fits = shapes[name] == x.shape
            elif self._numbers[name] is None:
                size = x.size // x.shape[0]
                fits = all(math.prod(shapes[source]) == size for source in set(self._names[name]) & set(shapes))
            else:
                stack = shapes[self._names[name][0]]
                fits = stack[0] == layers and math.prod(stack[1:]) == x.size
            if not fits:
                return name
        return None

    def targets(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """The saved arrays as shapes, sharded over the devices like the state's own."""
        found = {}
        for name, x in self._arrays.items():
            for source in set(self._names[name]) & set(shapes):
                sharding = x.sharding if self._is_same(name) else self._sharding(name, len(shapes[source]))
                found[source] = jax.ShapeDtypeStruct(shapes[source], x.dtype, sharding=sharding)
        return found

    def convert(self, saved: Arrays) -> Arrays:
        """The state's arrays, by name, from the saved ones."""
        alike = {name: saved[name] for name in self._arrays if self._is_same(name)}
        others = {name: x for name, x in self._arrays.items() if name not in alike}
        own = {name: x.sharding for name, x in others.items()}
        converted = jax.jit(lambda saved: {name: self._one(name, saved) for name in others}, out_shardings=own)(saved)
        return alike | converted

    def _is_same(self, name):
        return self._names[name] == [name] and self._numbers[name] is None

    def _one(self, name, saved):
        shape, number = self._arrays[name].shape, self._numbers[name]
        if number is not None:
            return saved[self._names[name][0]][number].reshape(shape)
        zeros = jnp.zeros(shape[1:], self._arrays[name].dtype)
        return jnp.stack(
            [saved[source].reshape(shape[1:]) if source in saved else zeros for source in self._names[name]]
        )

    def _sharding(self, name, ndim):
        """The sharding of the state's array, with or without the axis of layers, if it is a sharding by axes."""
        own = self._arrays[name]
        if not isinstance(own.sharding, NamedSharding):
            return own.sharding
        spec = (*own.sharding.spec, *[None] * (own.ndim - len(own.sharding.spec)))
        spec = spec[1:] if self._numbers[name] is None else (None, *spec)
        return NamedSharding(own.sharding.mesh, PartitionSpec(*spec) if len(spec) == ndim else PartitionSpec())
