"""Scores of the models of a set of lanes: logits of all of them at once, or texts of one after the other."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from pats_jax import trees
from pats_jax.train_state import Batch
from pats_jax.training.by_lane import lane_of
from pats_jax.training.compiled_lanes import CompiledLanes
from pats_jax.training.evaluation import Predictor
from pats_jax.training.lanes import in_order
from pats_jax.training.runners import MeshRunner
from pats_jax.training.text_evaluation import TextWriter


class OfLanes(Protocol):
    """What the evaluators of a set share."""

    def use(self, params: Any) -> None:
        """Takes the trained parameters of the lanes."""


class LaneEvaluator(Protocol):
    """Scores one lane; its methods do not look at the parameters that they are given."""

    def evaluate(self, params: Any) -> dict[str, float]:
        """The scores by name. May raise `Preempted`."""

    def compile_ahead(self) -> None:
        """Starts to compile the programs of `evaluate`, which are those of all lanes."""


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

    def expect(self, batch: Batch) -> None:
        """Starts to compile the prediction for batches of that shape."""
        self._compiled.expect_predict(batch)

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

    def compile_ahead(self) -> None:
        """See `LaneEvaluator`."""
        assert self.of_lanes is not None
        for name in self.splits:
            if name.startswith("validation"):
                for _, batch in self.rows_and_batches(name):
                    self.of_lanes.expect(batch)


class LaneModels:
    """The parameters of each lane as those of a model alone."""

    def __init__(self, compiled: CompiledLanes, frozen: Any, runner: MeshRunner):
        """Takes no parameters yet.

        Args:
          compiled: the programs of the lanes.
          frozen: parameters that are not trained; None: all are.
          runner: one device.
        """
        self._compiled, self._frozen, self._runner = compiled, frozen, runner
        self._params: Any = None

    def use(self, params: Any) -> None:
        """Takes the trained parameters of the lanes."""
        self._params = params

    def params(self, lane: int) -> Any:
        """All parameters of a lane, on the runner's device."""
        return self._runner.place(trees.combine(lane_of(self._params, lane), self._frozen))

    def compile_ahead(self, programs: Callable[[Any], list[Callable[[], None]]]) -> None:
        """Starts to compile the programs that ``programs(shapes)`` gives for the shapes of `params`."""
        own = jax.eval_shape(lambda params: lane_of(params, 0), self._compiled.state.params)
        shapes = trees.combine(own, self._frozen)
        places = self._runner.shardings_of(shapes)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
        for compile_it in programs(shapes):
            self._compiled.compile_other(compile_it)


@dataclasses.dataclass(frozen=True)
class LaneWriter(TextWriter):
    """The writer of one lane; its methods do not look at the parameters that they are given.

    Attributes:
      of_lanes: the models of all lanes.
      lane: which one it is.
    """

    of_lanes: LaneModels | None = None
    lane: int = 0

    def texts(self, params: Any, name: str) -> list[str]:
        return super().texts(params if self.of_lanes is None else self.of_lanes.params(self.lane), name)

    def compile_ahead(self) -> None:
        """See `LaneEvaluator`."""
        assert self.of_lanes is not None
        self.of_lanes.compile_ahead(self.programs)
