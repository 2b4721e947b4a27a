"""Lanes: many trainings as one program, side by side on a leading axis that `jax.vmap` maps over, or in turns.

The lanes of a set share model, data and method. They differ in seed, in the numbers `LANE_NUMBERS` and in how noise
depends on sensitivity. Each lane has its own head, order of rows, dropout and noise, and gives the same result as its
run alone; frozen parameters are shared. Batches have the same shapes for all seeds, see
`pats_jax.data.batches.epoch_plan`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pats_jax import train_state
from pats_jax.data import batches
from pats_jax.data.prefetch import prefetch
from pats_jax.training.by_lane import ByLane, InTurns, lane_of
from pats_jax.training.compiled_lanes import CompiledLanes, fitting_lanes
from pats_jax.training.lane_program import (
    LANE,
    Arrays,
    LaneProgram,
    LaneSettings,
    LaneState,
    lane_arrays,
    rate_table,
    with_own,
)

__all__ = [
    "LANE",
    "Arrays",
    "ByLane",
    "CompiledLanes",
    "InTurns",
    "LaneProgram",
    "LaneSettings",
    "LaneState",
    "TrainedLanes",
    "fit",
    "fitting_lanes",
    "in_order",
    "lane_arrays",
    "lane_batches",
    "lane_of",
    "rate_table",
    "with_own",
]


def lane_batches(
    tokens: batches.Tokens,
    labels: np.ndarray,
    batch_size: int,
    boundaries: Sequence[int],
    seeds: Sequence[int],
    total_steps: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The batches of all lanes, step by step: each lane's own rows, in the order of its run alone.

    Args:
      tokens: the tokenised rows.
      labels: int32 classes or float32 scores, (rows,).
      batch_size: number of rows in a lane's batch.
      boundaries: bucket lengths.
      seeds: the seeds of the lanes.
      total_steps: number of batches.

    Yields:
      The padded length, and a batch whose arrays have a leading axis of lanes.
    """
    made = 0
    for epoch in itertools.count():
        plans = [batches.epoch_plan(tokens.lengths, batch_size, boundaries, seed=s, epoch=epoch) for s in seeds]
        for parts in zip(*plans, strict=True):
            if made == total_steps:
                return
            made += 1
            yield parts[0][1], _fill(tokens, labels, [rows for rows, _ in parts], batch_size, parts[0][1])


def _fill(tokens, labels, rows_of_lanes, batch_size, length):
    """As `fill_batch`, for all lanes at once."""
    filler = batch_size - len(rows_of_lanes[0])
    filled = np.stack([np.concatenate([rows, np.full(filler, rows[0])]) for rows in rows_of_lanes])
    batch = batches.fill_batch(tokens, labels, filled.ravel(), filled.size, length)
    batch = {name: x.reshape(*filled.shape, *x.shape[1:]) for name, x in batch.items()}
    batch["weights"][:, batch_size - filler :] = 0.0
    return batch


@dataclasses.dataclass
class TrainedLanes:
    """The result of `fit`.

    Attributes:
      state: the state after the last step.
      metrics: name -> values, (steps, lanes).
      logits: number of steps made -> logits of the evaluation rows, (lanes, rows, num_labels).
      diverged: whether a lane was frozen because loss or gradient was not finite too often, (lanes,) bool.
    """

    state: LaneState
    metrics: dict[str, np.ndarray]
    logits: dict[int, np.ndarray]
    diverged: np.ndarray


def fit(
    compiled: CompiledLanes,
    state: LaneState,
    lanes: Arrays,
    frozen: Any,
    rates: np.ndarray,
    data: Iterator[tuple[int, Arrays]],
    evaluation: Sequence[tuple[np.ndarray, Arrays]],
    eval_steps: int,
) -> TrainedLanes:
    """Trains all lanes on all batches; evaluates every ``eval_steps`` steps and after the last one.

    Args:
      compiled: the programs.
      state: the state to start from; it is donated.
      lanes: from `lane_arrays`.
      frozen: parameters that are not trained, or None.
      rates: from `rate_table`.
      data: from `lane_batches`.
      evaluation: from `pats_jax.data.batches.eval_batches`.
      eval_steps: number of steps between evaluations.
    """
    lanes, frozen, rates = jax.device_put((lanes, frozen, rates))
    evaluation = [(rows, jax.device_put(batch)) for rows, batch in evaluation]
    pending: list[train_state.Metrics] = []
    logits: dict[int, np.ndarray] = {}

    def evaluate():
        parts = [(rows, compiled.predict(state.params, frozen, batch)) for rows, batch in evaluation]
        logits[len(pending)] = in_order(jax.device_get(parts))

    with prefetch(jax.device_put(batch) for _, batch in data) as ready:
        for batch in ready:
            state, metrics = compiled.step(state, lanes, frozen, rates, batch)
            pending.append(metrics)
            if len(pending) % eval_steps == 0:
                evaluate()
    if len(pending) not in logits:
        evaluate()
    fetched = jax.device_get(pending)
    stacked = {name: np.stack([step[name] for step in fetched]) for name in fetched[0]}
    diverged = np.asarray(state.skipped) > compiled.program.settings.loop.max_nonfinite_steps
    return TrainedLanes(state, stacked, logits, diverged)


def in_order(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Logits (lanes, rows, num_labels) in the order of the rows, from batches of row numbers and logits."""
    order = np.concatenate([rows for rows, _ in parts])
    logits = np.concatenate([np.asarray(part)[:, : len(rows)] for rows, part in parts], axis=1)
    result = np.empty_like(logits)
    result[:, order] = logits
    return result
