"""Training on a table of sources and targets: its batches."""

import numpy as np

from pats_jax import train_state
from pats_jax.data.pair_batches import PairTokens, fill_pairs
from pats_jax.training import runners
from pats_jax.training.fine_tuning import Counts
from pats_jax.training.settings import BatchSettings
from pats_jax.training.table import TableSource


class PairSource(TableSource):
    """The rows of a table of sources and targets, in batches of a few source lengths.

    The targets of a batch are padded to the longest that its source length may come with, so there are no more shapes
    than source lengths.
    """

    def __init__(
        self,
        settings: BatchSettings,
        runner: runners.MeshRunner,
        pairs: PairTokens,
        boundaries: list[int],
        loss_without_dropout: train_state.LossFn,
        seed: int,
    ):
        """Plans the first epoch; the arguments are those of `TableSource`."""
        self._pairs, self._target_lengths = pairs, pairs.target_lengths(boundaries)
        super().__init__(settings, runner, pairs.sources, None, boundaries, loss_without_dropout, seed)

    def with_boundaries(self, boundaries: list[int]) -> "PairSource":
        loss = self._loss_without_dropout
        return PairSource(self._settings, self._runner, self._pairs, boundaries, loss, self._seed)

    def counts(self, rows: np.ndarray, length: int) -> Counts:
        targets = self._pairs.targets.lengths[rows].sum()
        found, computed = super().counts(rows, length), self.batch_size * self._target_lengths[length]
        return found | {
            "tokens": found["tokens"] + float(targets),
            "computed_tokens": found["computed_tokens"] + float(computed),
        }

    def fill(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        own = self._runner.own_rows(self.batch_size)
        return fill_pairs(self._pairs, rows, self.batch_size, (length, self._target_lengths[length]), own)
