"""Separate and stacked layers: the two layouts of a model's parameters, and conversion between them.

Separate layers have a subtree each, ``encoder.layer.0.output.dense.kernel``; stacked ones have one subtree whose leaves
have a leading axis of layers, ``encoder.layer.output.dense.kernel``. Files always hold separate layers. Other encoders
call them ``transformer.layer`` or ``model.layers``. An encoder-decoder has two stacks, ``encoder.layers`` and
``decoder.layers`` in BART, ``block`` in T5.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax import trees

# Where the layers are, by the last two names (BART, T5; BERT, DistilBERT, ModernBERT) -> the side of the model.
_STACKS = {(side, name): side for side in ("encoder", "decoder") for name in ("layers", "block")} | dict.fromkeys(
    (("encoder", "layer"), ("transformer", "layer"), ("model", "layers")), "encoder"
)
_NAMES = ("layer", "layers", "block")


def stack_layers(tree: Any) -> Any:
    """Stacks the separate layers in a tree; a tree without separate layers is returned as it is.

    Args:
      tree: parameters, or any tree that contains trees like them: gradients, the state of an optimizer. NumPy arrays
        stay NumPy arrays.

    Raises:
      ValueError: if the layers differ in their leaves or in the shapes of these.
    """
    return _map_stacks(lambda layers, _: _stack(layers), tree)


def unstack_layers(tree: Any, num_layers: int | Mapping[str, int]) -> Any:
    """The inverse of `stack_layers`.

    Args:
      tree: as for `stack_layers`.
      num_layers: the number of layers; for an encoder-decoder ``config.num_layers_of``, which is
        ``{"encoder": ..., "decoder": ...}``.
    """
    depths = num_layers if isinstance(num_layers, Mapping) else {"encoder": num_layers, "decoder": num_layers}
    return _map_stacks(lambda layers, side: _unstack(layers, depths[side]), tree)


def has_stacked_layers(tree: Any) -> bool:
    """Whether the layers of a model are stacked somewhere in a tree."""
    found = []
    _map_stacks(lambda layers, _: found.append(not _is_separate(layers)), tree)
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
    place, names = _place_of_stack(path), [trees.entry_name(entry) for entry in path]
    if place is None:
        return [".".join(names)]
    return [".".join((*names[:place], str(number), *names[place:])) for number in range(leaf.shape[0])]


def is_stacked(path: tuple) -> bool:
    """Whether a leaf has a leading axis of layers, by its path in any tree that holds parameters."""
    return _place_of_stack(path) is not None


def names_in_other_layout(path: tuple, leaf: Any) -> list[str]:
    """As `separate_names`; for a leaf of a separate layer, the one name that it has in stacked layers."""
    place, names = _place_of_layer(path), [trees.entry_name(entry) for entry in path]
    if place is not None and names[place].isdecimal():
        return [".".join((*names[:place], *names[place + 1 :]))]
    return separate_names(path, leaf)


def layer_number(path: tuple) -> int | None:
    """The number of the separate layer that a leaf belongs to, else None."""
    place = _place_of_layer(path)
    name = None if place is None else trees.entry_name(path[place])
    return int(name) if name is not None and name.isdecimal() else None


def side_and_layer(path: tuple[str, ...]) -> tuple[str, int] | None:
    """The side ("encoder" or "decoder") and the number of the separate layer that a leaf belongs to, by its path."""
    for side, stack, number in zip(path, path[1:], path[2:], strict=False):
        if (side, stack) in _STACKS and number.isdecimal():
            return _STACKS[side, stack], int(number)
    return None


def _place_of_stack(path):
    """The place in a leaf's path where the layer's number would be; None if the path has one, or is not in a layer."""
    place = _place_of_layer(path)
    return None if place is None or trees.entry_name(path[place]).isdecimal() else place


def _place_of_layer(path):
    """The place in a leaf's path that follows, for instance, ``encoder.layer``; None if it is not in a layer."""
    names = [trees.entry_name(entry) for entry in path]
    return next((place for place in range(2, len(names)) if tuple(names[place - 2 : place]) in _STACKS), None)


def _map_stacks(function: Callable[[Mapping[str, Any], str], Any], tree: Any) -> Any:
    """The tree with ``function(layers, side)`` in place of the layers of each encoder and decoder in it."""

    def replaced(path, node):
        name = _name_of_layers(path, node)
        return node if name is None else {**node, name: function(node[name], _STACKS[_parent(path), name])}

    return jax.tree_util.tree_map_with_path(
        replaced, tree, is_leaf=lambda path, node: _name_of_layers(path, node) is not None, is_leaf_takes_path=True
    )


def _name_of_layers(path, node):
    """Under which name a node holds layers; None if it is no encoder or decoder."""
    if not isinstance(node, Mapping):
        return None
    names = [name for name in _NAMES if (_parent(path), name) in _STACKS and isinstance(node.get(name), Mapping)]
    return names[0] if names else None


def _parent(path):
    """The last name of a path; ``"encoder"`` without one, as of an encoder alone."""
    return trees.entry_name(path[-1]) if path else "encoder"


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
