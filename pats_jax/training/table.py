"""Training on one table of rows: its batches, its length, and how sensitive parameters are on it."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pats_jax import train_state, trees
from pats_jax.companions.child_tuning import fisher_mask
from pats_jax.data import batches
from pats_jax.errors import InputError
from pats_jax.models.layout import unstack_layers
from pats_jax.training import concentration, runners, shape_costs
from pats_jax.training.fine_tuning import Counts, first_of_each
from pats_jax.training.settings import BatchSettings, LengthSettings


def count_steps(length: LengthSettings, train_batch_size: int | None, rows: int) -> int:
    """The number of optimizer steps.

    Raises:
      InputError: if there are more steps than 32 bits can count.
    """
    if length.max_steps > 0:
        return length.max_steps
    steps = length.num_train_epochs * math.ceil(rows / (train_batch_size or 1))
    if steps >= 2**31:
        raise InputError(f"num_train_epochs {length.num_train_epochs:g}: gives {steps:.3g} steps, more than 2^31")
    return math.ceil(steps)


def bucket_boundaries(settings: BatchSettings, platform: str, params: Any, lengths: np.ndarray, rows: int) -> list[int]:
    """The bucket lengths: as many as are set, else as many as are worth compiling for ``rows`` rows."""
    if settings.length_buckets is not None:
        return batches.bucket_boundaries(lengths, settings.length_buckets)
    cost = shape_costs.shape_cost(params, platform, rows / len(lengths), training=True)
    return batches.bucket_boundaries(lengths, shape_costs.MOST_BUCKETS, shape_cost=cost)


class TableSource:
    """The rows of a table in batches of a few lengths, one epoch after another.

    Attributes:
      examples: number of rows.
      boundaries: the lengths of batches.
      plan: (rows, length) of each step of the first epoch.
    """

    def __init__(
        self,
        settings: BatchSettings,
        runner: runners.MeshRunner,
        tokens: batches.Tokens,
        labels: np.ndarray | None,
        boundaries: list[int],
        loss_without_dropout: train_state.LossFn,
        seed: int,
        row_weights: np.ndarray | None = None,
    ):
        """Plans the first epoch.

        Args:
          settings: the batch sizes, filled in.
          runner: puts the batches on the devices.
          tokens: the texts.
          labels: their labels.
          boundaries: see `bucket_boundaries`.
          loss_without_dropout: the loss to measure sensitivity and Fisher information with.
          seed: the seed of the order of rows.
          row_weights: the weight of each row, float32 (rows,); None: all are 1.
        """
        self._settings, self._runner, self._tokens, self._labels = settings, runner, tokens, labels
        self._loss_without_dropout, self._seed, self._row_weights = loss_without_dropout, seed, row_weights
        self.boundaries, self.examples = boundaries, len(tokens)
        self.batch_size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.batch_size *= runner.num_devices
        self.plan = self._plan(epoch=0)

    @property
    def platform(self) -> str:
        """JAX's name for the kind of the devices, see `MeshRunner.platform`."""
        return self._runner.platform

    def with_boundaries(self, boundaries: list[int]) -> "TableSource":
        """The same rows in batches of other lengths."""
        return TableSource(
            self._settings,
            self._runner,
            self._tokens,
            self._labels,
            boundaries,
            self._loss_without_dropout,
            self._seed,
            self._row_weights,
        )

    def batches(self, first_step: int) -> Iterator[tuple[train_state.Batch, Counts]]:
        """See `Source`."""
        for rows, length in self.planned(first_step):
            yield self._runner.put_ahead(self.fill(rows, length)), self.counts(rows, length)

    def counts(self, rows: np.ndarray, length: int) -> Counts:
        """See `Source`, of one step."""
        tokens, computed = self._tokens.lengths[rows].sum(), self.batch_size * length
        return {"examples": float(len(rows)), "tokens": float(tokens), "computed_tokens": float(computed)}

    def one_of_each_shape(self, first_step: int, last_step: int) -> Iterator[train_state.Batch]:
        """See `Source`."""
        steps = itertools.islice(self.planned(first_step), last_step - first_step)
        makers = ((length, lambda r=rows, n=length: self._runner.put_ahead(self.fill(r, n))) for rows, length in steps)
        return first_of_each(makers, len(self.boundaries))

    def sensitivity_measure(
        self, num_batches: int, num_layers: int | Mapping[str, int], mask: Any
    ) -> Callable[[Any], dict[str, np.ndarray]] | None:
        """``measure(params)``: sensitivity by tensor on some batches of the first epoch, all of one shape.

        Args:
          num_batches: number of batches; with 0, the result is None.
          num_layers: the model's number of layers, see `unstack_layers`.
          mask: the tensors to describe, as separate layers.
        """
        if not num_batches:
            return None
        runner = self._runner
        common, _ = collections.Counter(length for _, length in self.plan).most_common(1)[0]
        chosen = [rows for rows, length in self.plan if length == common][:num_batches]

        def measure(params):
            sample = (runner.put(self.fill(rows, common)) for rows in chosen)
            found = concentration.measure_sensitivity(self._loss_without_dropout, params, sample, runner.in_turn)
            return concentration.selected(unstack_layers(runner.to_host(found), num_layers), mask)

        return measure

    def fisher_measure(self, trained: Any, frozen: Any) -> Callable[[float, Any], Any]:
        """``fisher(keep_fraction, mask)``: the mask of Child-Tuning D, from one pass over the training data."""

        def loss_fn(params, batch, key):
            return self._loss_without_dropout(trees.combine(params, frozen), batch, key)

        def measure(keep_fraction, mask):
            everything = (self._runner.put(self.fill(rows, length)) for rows, length in self.plan)
            return fisher_mask(loss_fn, trained, everything, keep_fraction, mask=mask)

        return measure

    def describe_batch(self) -> str:
        """See `Source`."""
        settings, micro_batches = self._settings, self._settings.gradient_accumulation_steps
        return (
            f"{settings.train_batch_size} rows per step: {settings.per_device_train_batch_size} "
            f"x {self._runner.num_devices} devices of {jax.process_count()} processes"
            + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        )

    def planned(self, first_step: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields rows and length of every step after ``first_step`` steps, without end."""
        epoch, done = divmod(first_step, len(self.plan))
        for number in itertools.count(epoch):
            yield from self._plan(number)[done:]
            done = 0

    def _plan(self, epoch):
        lengths = self._tokens.lengths
        return batches.epoch_plan(lengths, self.batch_size, self.boundaries, seed=self._seed, epoch=epoch)

    def fill(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """The batch of these rows, this process's own ones of them."""
        own = self._runner.own_rows(self.batch_size)
        return batches.fill_batch(
            self._tokens, self._labels, rows, self.batch_size, length, own, row_weights=self._row_weights
        )
