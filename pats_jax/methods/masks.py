"""The parameters that a method acts on, selected by regexes over their paths."""

from typing import Any

import jax
import numpy as np

from pats_jax import trees
from pats_jax.errors import InputError, shown
from pats_jax.models.layout import separate_names
from pats_jax.models.patterns import compile_pattern


def layer_mask(params: Any, pattern: str, source: str = "noise_layers") -> Any:
    """A tree of bools like params: whether the parameter's dotted path matches the regex.

    For stacked layers, the path of each layer is matched as if the layers were separate; if only some match, the result
    is an array of bools (layers,).

    Args:
      params: a tree of parameters.
      pattern: the regex; it may match any part of the path.
      source: what to call it in error messages.

    Raises:
      InputError: if the pattern is not a valid regex, takes too long to match, or matches no parameter.
    """
    matches = compile_pattern(pattern, source)
    names: list[str] = []

    def matched(path, param):
        names.extend(own := separate_names(path, param))
        return trees.as_kept([matches(name) for name in own])

    mask = jax.tree_util.tree_map_with_path(matched, params)
    if not any(np.any(keep) for keep in jax.tree.leaves(mask)):
        raise InputError(f"{source} {shown(pattern)}: matches no parameter; one path is {names[-1]}")
    return mask
