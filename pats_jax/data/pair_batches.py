"""Batches of sources and targets.

A batch is a dict of NumPy arrays: ``input_ids`` and ``attention_mask`` int32 (batch, source length); ``labels`` int32
(batch, target length), -100 where a target has ended; ``weights`` float32 (batch,), the number of labels of each row,
0 for filler rows. With these weights a loss is the mean over all labels, see `pats_jax.label_counts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pats_jax.data.batches import Batch, Tokens, fill_batch
from pats_jax.train_state import IGNORED


@dataclass(frozen=True)
class PairTokens:
    """The token ids of sources and targets.

    Attributes:
      sources: of each row's source.
      targets: of its target, with the token that ends it.
    """

    sources: Tokens
    targets: Tokens

    def __len__(self) -> int:
        return len(self.sources)

    def target_lengths(self, boundaries: Sequence[int]) -> dict[int, int]:
        """For each bucket length of sources, the longest target of the rows that may be in such a batch.

        Examples:
          >>> def tokens(*lengths):
          ...     return Tokens(np.ones(sum(lengths)), np.zeros(sum(lengths)), np.cumsum([0, *lengths]), 0)
          >>> PairTokens(tokens(3, 5, 9), tokens(4, 2, 6)).target_lengths([5, 9])
          {5: 4, 9: 6}
        """
        sources, targets = self.sources.lengths, self.targets.lengths
        return {length: int(targets[sources <= length].max()) for length in boundaries}


def fill_pairs(
    pairs: PairTokens,
    rows: np.ndarray,
    batch_size: int,
    lengths: tuple[int, int],
    own: np.ndarray | None = None,
) -> Batch:
    """Builds the arrays of one batch.

    Args:
      pairs: the tokenised rows.
      rows: row numbers, at least one and at most ``batch_size``.
      batch_size: rows of the batch.
      lengths: the padded lengths of sources and targets.
      own: as for `fill_batch`.
    """
    counts = pairs.targets.lengths.astype(np.float32)
    sources = fill_batch(pairs.sources, None, rows, batch_size, lengths[0], own, row_weights=counts)
    targets = fill_batch(pairs.targets, None, rows, batch_size, lengths[1], own)
    labels = np.where(targets["attention_mask"] == 1, targets["input_ids"], np.int32(IGNORED))
    return source_inputs(sources) | {"labels": labels, "weights": sources["weights"]}


def source_inputs(batch: Batch) -> Batch:
    """What an encoder-decoder reads of a batch: it has no token types."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
