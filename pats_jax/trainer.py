"""The loop: steps, logging that does not stall the device, evaluation, predictions in the order of the rows."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pats_jax.train_state import Batch, Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """When the loop stops and looks up, in optimizer steps; the last step is always logged and evaluated.

    Attributes:
      total_steps: length of the training.
      logging_steps: steps between logged lines.
      eval_steps: steps between evaluations.
    """

    total_steps: int
    logging_steps: int
    eval_steps: int

    def logs_at(self, step: int) -> bool:
        """Whether a line is logged after this step (counted from 1)."""
        return step % self.logging_steps == 0 or step == self.total_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after this step (counted from 1)."""
        return step % self.eval_steps == 0 or step == self.total_steps


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    rhythm: Rhythm,
    *,
    on_step: Callable[[int], None],
    on_log: Callable[[int, dict[str, float], dict[str, float]], None],
    on_evaluate: Callable[[int, Any], None],
) -> TrainState:
    """Trains for ``rhythm.total_steps`` steps.

    The device runs ahead of Python: metrics are fetched at logging steps only.

    Args:
      state: where to start; its buffers are given away if train_step donates them.
      train_step: a compiled step.
      batches: at least as many batches as steps.
      rhythm: when to log and evaluate.
      on_step: called with the number of each step once it is dispatched.
      on_log: called with the step, the means of its metrics since the last call and the timing of that stretch
        (``seconds``, ``examples_per_second``).
      on_evaluate: called with the step and the parameters.

    Returns:
      The state after the last step.
    """
    pending: list[Metrics] = []
    examples, started = 0.0, time.perf_counter()
    for step, batch in zip(range(1, rhythm.total_steps + 1), batches, strict=False):
        examples += float(np.sum(batch["weights"]))
        state, metrics = train_step(state, batch)
        pending.append(metrics)
        on_step(step)
        if rhythm.logs_at(step):
            means = _means(jax.device_get(pending))
            seconds = time.perf_counter() - started
            on_log(step, means, {"seconds": seconds, "examples_per_second": examples / seconds})
            pending, examples, started = [], 0.0, time.perf_counter()
        if rhythm.evaluates_at(step):
            paused = time.perf_counter()
            on_evaluate(step, state.params)
            started += time.perf_counter() - paused
    return state


def predict_logits(
    predict_step: Callable[[Any, Batch], jax.Array], params: Any, batches: Iterator[tuple[np.ndarray, Batch]], rows: int
) -> np.ndarray:
    """Logits of every row, in the order of the rows.

    Args:
      predict_step: a compiled step that gives logits (batch, num_labels).
      params: the model's parameters.
      batches: pairs of row numbers (n,) and a batch whose first n rows are theirs; the rest is filler.
      rows: number of rows in all.

    Returns:
      (rows, num_labels) float32.
    """
    parts = [(index, predict_step(params, batch)) for index, batch in batches]
    order = np.concatenate([index for index, _ in parts])
    logits = np.concatenate([np.asarray(part)[: len(index)] for index, part in parts])
    result = np.empty((rows, logits.shape[1]), np.float32)
    result[order] = logits
    return result


def _means(metrics):
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
