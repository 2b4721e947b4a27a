"""Separate and stacked layers: the two layouts of an encoder's parameters, and conversion between them.

Separate layers have a subtree each, ``encoder.layer.0.output.dense.kernel``; stacked ones have one subtree whose leaves
have a leading axis of layers, ``encoder.layer.output.dense.kernel``. Files always hold separate layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax import trees


def stack_layers(tree: Any) -> Any:
    """Stacks the separate layers in a tree; a tree without separate layers is returned as it is.

    Args:
      tree: parameters, or any tree that contains trees like them: gradients, the state of an optimizer. NumPy arrays
        stay NumPy arrays.

    Raises:
      ValueError: if the layers differ in their leaves or in the shapes of these.
    """
    return _map_stacks(_stack, tree)


def unstack_layers(tree: Any, num_layers: int) -> Any:
    """The inverse of `stack_layers`, for a model of ``num_layers`` layers."""
    return _map_stacks(lambda layers: _unstack(layers, num_layers), tree)


def has_stacked_layers(tree: Any) -> bool:
    """Whether an encoder's layers are stacked somewhere in a tree."""
    found = []
    _map_stacks(lambda layers: found.append(not _is_separate(layers)), tree)
    return any(found)


def layer_axis(params: Any) -> Any:
    """A tree of ints like params: 0 for the leaves of stacked layers, -1 for all others.

    Pass this function as ``layer_axis`` to `pats_jax.pats_noise` and the other transforms when you train this library's
    models: they then treat each layer of a stacked leaf as a tensor of its own. optax.MaskedNode counts as a leaf.
    """

    return jax.tree_util.tree_map_with_path(
        lambda path, _: -1 if _place_of_stack(path) is None else 0, params, is_leaf=trees.is_masked
    )


def separate_names(path: tuple, leaf: Any) -> list[str]:
    """The names of a leaf with separate layers, one per layer: ``bert.encoder.layer.0.output.dense.kernel``, ...

    Args:
      path: the leaf's path, a tuple of JAX key entries.
      leaf: the leaf, stacked or not.
    """
    place, names = _place_of_stack(path), [_name(entry) for entry in path]
    if place is None:
        return [".".join(names)]
    return [".".join((*names[:place], str(number), *names[place:])) for number in range(leaf.shape[0])]


def is_stacked(path: tuple) -> bool:
    """Whether a leaf has a leading axis of layers, by its path in any tree that holds parameters."""
    return _place_of_stack(path) is not None


def names_in_other_layout(path: tuple, leaf: Any) -> list[str]:
    """As `separate_names`; for a leaf of a separate layer, the one name that it has in stacked layers."""
    place, names = _place_of_layer(path), [_name(entry) for entry in path]
    if place is not None and names[place].isdecimal():
        return [".".join((*names[:place], *names[place + 1 :]))]
    return separate_names(path, leaf)


def layer_number(path: tuple) -> int | None:
    """The number of the separate layer that a leaf belongs to, else None."""
    place = _place_of_layer(path)
    name = None if place is None else _name(path[place])
    return int(name) if name is not None and name.isdecimal() else None


def _place_of_stack(path):
    """The place in a leaf's path where the layer's number would be; None if the path has one, or is not in a layer."""
    place = _place_of_layer(path)
    return None if place is None or _name(path[place]).isdecimal() else place


def _place_of_layer(path):
    """The place in a leaf's path that follows ``encoder.layer``; None if the path is not in a layer."""
    names = [_name(entry) for entry in path]
    return next((place for place in range(2, len(names)) if names[place - 2 : place] == ["encoder", "layer"]), None)


def _name(entry):
    return jax.tree_util.keystr((entry,), simple=True)


def _map_stacks(function: Callable[[Mapping[str, Any]], Any], tree: Any) -> Any:
    """The tree with ``function(layers)`` in place of the layers of each encoder in it."""

    def is_encoder(node):
        return isinstance(node, Mapping) and set(node) == {"layer"} and isinstance(node["layer"], Mapping)

    return jax.tree.map(lambda x: {"layer": function(x["layer"])} if is_encoder(x) else x, tree, is_leaf=is_encoder)


def _is_separate(layers):
    return all(name.isdecimal() for name in layers)


def _stack(layers):
    if not _is_separate(layers):
        return layers
    subtrees = [layers[name] for name in sorted(layers, key=int)]
    structures = {jax.tree.structure(tree) for tree in subtrees}
    shapes = {tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree)) for tree in subtrees}
    if len(structures) > 1 or len(shapes) > 1:
        raise ValueError("the layers differ in their parameters, so they cannot be stacked")
    return jax.tree.map(_stack_leaves, *subtrees)


def _stack_leaves(*leaves):
    return np.stack(leaves) if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack(leaves)


def _unstack(layers, num_layers):
    if _is_separate(layers):
        return layers
    return {str(number): jax.tree.map(lambda leaf, n=number: leaf[n], layers) for number in range(num_layers)}
