"""Lanes that take turns: each array of theirs is its own, and each program is that of one lane."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax

from pats_jax import random


@jax.tree_util.register_pytree_with_keys_class
class ByLane(tuple):
    """The arrays of the lanes, each its own, in the place of one array with a leading axis of lanes."""

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """See `jax.tree_util`."""
        return [(jax.tree_util.SequenceKey(lane), x) for lane, x in enumerate(self)], None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Iterable[Any]) -> Self:
        """See `jax.tree_util`."""
        return cls(arrays)


def lane_of(tree: Any, lane: int) -> Any:
    """One lane's part of a tree that has a `ByLane` or an array with a leading axis of lanes for each leaf."""
    return jax.tree.map(lambda leaf: leaf[lane], tree, is_leaf=_is_by_lane)


class InTurns:
    """A function of one lane as a function of all: it is called for one lane after the other.

    It stands for what `jax.jit` returns, and its `lower` and `compile` for theirs.

    Attributes:
      of_lane: the jitted, lowered or compiled function.
      in_axes: by argument 0, if lanes have their own, see `lane_of`; None, if they share it. A result has a `ByLane`
        for each leaf.
    """

    def __init__(self, of_lane: Any, in_axes: Sequence[int | None]):
        self.of_lane, self.in_axes = of_lane, in_axes

    def __call__(self, *arguments: Any) -> Any:
        """The results of all lanes."""
        found = [self.of_lane(*self._of(lane, arguments)) for lane in range(self._lanes(arguments))]
        return jax.tree.map(lambda *leaves: ByLane(leaves), *found, is_leaf=random.is_stored_key)

    def lower(self, *arguments: Any) -> "InTurns":
        """Lowers the function of one lane for arguments of all lanes, or their shapes."""
        shapes = jax.eval_shape(lambda *arguments: self._of(0, arguments), *arguments)
        return InTurns(self.of_lane.lower(*shapes), self.in_axes)

    def compile(self) -> "InTurns":
        """Compiles what has been lowered."""
        return InTurns(self.of_lane.compile(), self.in_axes)

    def _of(self, lane, arguments):
        pairs = zip(arguments, self.in_axes, strict=True)
        return [argument if axis is None else lane_of(argument, lane) for argument, axis in pairs]

    def _lanes(self, arguments):
        own = [argument for argument, axis in zip(arguments, self.in_axes, strict=True) if axis is not None]
        return len(jax.tree.leaves(own, is_leaf=_is_by_lane)[0])


def _is_by_lane(x):
    return isinstance(x, ByLane)
