"""Scores of the models of a set of lanes: predictions are made for all of them at once."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pats_jax.train_state import Batch
from pats_jax.training.evaluation import Predictor
from pats_jax.training.lanes import CompiledLanes, in_order


class LaneLogits:
    """The logits of all lanes, predicted when one of them is asked for, and kept until the parameters change."""

    def __init__(self, compiled: CompiledLanes, frozen: Any):
        """Predicts nothing.

        Args:
          compiled: the programs.
          frozen: parameters that are not trained, on the devices; None: all are.
        """
        self._compiled, self._frozen = compiled, frozen
        self._params: Any = None
        self._found: dict[str, np.ndarray] = {}

    def use(self, params: Any) -> None:
        """Takes the trained parameters of the lanes."""
        self._params, self._found = params, {}

    def of_split(
        self, name: str, batches: Iterator[tuple[np.ndarray, Batch]], interrupt: Callable[[], None]
    ) -> np.ndarray:
        """(lanes, rows, num_labels) float32, of a split by its name."""
        if name not in self._found:
            parts = []
            for rows, batch in batches:
                interrupt()
                batch = self._compiled.program.place(batch)
                parts.append((rows, self._compiled.predict(self._params, self._frozen, batch)))
            self._found[name] = in_order(jax.device_get(parts))
        return self._found[name]


@dataclasses.dataclass(frozen=True)
class LanePredictor(Predictor):
    """The predictor of one lane; its methods do not look at the parameters that they are given.

    Attributes:
      of_lanes: the logits of all lanes.
      lane: which one it is.
    """

    of_lanes: LaneLogits | None = None
    lane: int = 0

    def raw_logits(self, params: Any, name: str) -> np.ndarray:
        if self.of_lanes is None:
            return super().raw_logits(params, name)
        return self.of_lanes.of_split(name, self.rows_and_batches(name), self.interrupt)[self.lane]
