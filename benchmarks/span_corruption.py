"""Span corruption as T5 is trained with it: spans of a text become sentinels, and the target says what stood there.

A row of tokens is cut into kept and hidden parts in turn, a kept one first and a hidden one last::

    source: kept <extra_id_0> kept <extra_id_1> ... </s>        target: <extra_id_0> hidden <extra_id_1> hidden ... </s>

References:
  Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
    (arXiv:1910.10683), section 3.1.4 and the mean length of spans in 3.3.4.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pats_jax.errors import InputError

Batch = dict[str, np.ndarray]


class Lengths(NamedTuple):
    """How many tokens a row has before and after corruption; the same for all rows, so nothing is padded.

    Attributes:
      tokens: of the text.
      hidden: of them, those that are hidden.
      spans: the parts that they are hidden in.
    """

    tokens: int
    hidden: int
    spans: int

    @property
    def source(self) -> int:
        """Tokens of the source, its sentinels and its end counted."""
        return self.tokens - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of the target, its sentinels and its end counted."""
        return self.hidden + self.spans + 1


def lengths_of(tokens: int, share: float, mean_length: float) -> Lengths:
    """The lengths for a share of tokens that is hidden in spans of a mean length."""
    hidden = min(max(round(tokens * share), 1), tokens - 1)
    spans = min(max(round(hidden / mean_length), 1), tokens - hidden)
    return Lengths(tokens, hidden, spans)


def lengths_for(source: int, share: float, mean_length: float) -> Lengths:
    """The lengths of the longest text whose source has at most so many tokens.

    Raises:
      InputError: if none has.
    """
    fitting = [n for n in range(2, 2 * source + 2) if lengths_of(n, share, mean_length).source <= source]
    if not fitting:
        raise InputError(f"--source_length {source}: must be at least {lengths_of(2, share, mean_length).source}")
    return lengths_of(fitting[-1], share, mean_length)


def corrupt(
    tokens: np.ndarray, lengths: Lengths, rng: np.random.Generator, *, first_sentinel: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts rows of tokens.

    Args:
      tokens: (rows, lengths.tokens).
      lengths: how much is hidden.
      rng: draws where.
      first_sentinel: ``<extra_id_0>``; each sentinel after it is one less.
      end: the token at the end of source and target.

    Returns:
      Sources (rows, lengths.source) and targets (rows, lengths.target).
    """
    rows = len(tokens)
    kept = _parts(rows, lengths.tokens - lengths.hidden, lengths.spans, rng)
    parts = np.stack([kept, _parts(rows, lengths.hidden, lengths.spans, rng)], axis=2).reshape(rows, -1)
    is_hidden = np.stack([np.arange(parts.shape[1]).repeat(row) % 2 == 1 for row in parts])
    begins = is_hidden & ~np.pad(is_hidden, ((0, 0), (1, 0)))[:, :-1]
    sentinels = first_sentinel + 1 - np.cumsum(begins, axis=1)

    def gathered(is_in: np.ndarray) -> np.ndarray:
        """Of each place the sentinel before its token, and the token itself, as far as they are in."""
        pairs = np.stack([sentinels, tokens], axis=2)
        return np.pad(pairs[is_in].reshape(rows, -1), ((0, 0), (0, 1)), constant_values=end).astype(np.int32)

    return gathered(np.stack([begins, ~is_hidden], axis=2)), gathered(np.stack([begins, is_hidden], axis=2))


def _parts(rows: int, total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Divides a total into positive whole numbers, all divisions being equally likely: (rows, count)."""
    cuts = np.tile(np.arange(total - 1) < count - 1, (rows, 1))
    places = np.nonzero(rng.permuted(cuts, axis=1))[1].reshape(rows, count - 1) + 1
    return np.diff(np.pad(places, ((0, 0), (1, 1)), constant_values=((0, 0), (0, total))), axis=1)


class PackedRows:
    """Texts one after the other, each with its end, cut into rows; a batch is a pure function of seed and step.

    Attributes:
      steps_per_epoch: batches of one pass over the texts.
    """

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        lengths: Lengths,
        batch_size: int,
        *,
        seed: int,
        first_sentinel: int,
        end: int,
    ):
        """Takes the texts.

        Args:
          texts: the tokens of each text, (length,), each with its end.
          lengths: those of a row.
          batch_size: rows of a batch.
          seed: draws the order of texts, anew in each epoch, and the spans.
          first_sentinel: see `corrupt`.
          end: see `corrupt`.

        Raises:
          InputError: if the texts do not fill one batch.
        """
        self._texts, self._lengths, self._batch_size, self._seed = texts, lengths, batch_size, seed
        self._corrupt: Callable[..., tuple[np.ndarray, np.ndarray]] = lambda tokens, rng: corrupt(
            tokens, lengths, rng, first_sentinel=first_sentinel, end=end
        )
        total = sum(map(len, texts))
        self.steps_per_epoch = total // (lengths.tokens * batch_size)
        if not self.steps_per_epoch:
            raise InputError(
                f"the texts have {total} tokens, fewer than a batch of {batch_size} rows of {lengths.tokens}"
            )

    def batches(self, first_step: int) -> Iterator[tuple[Batch, dict[str, float]]]:
        """Yields the batches after so many steps, with their counts for `pats_jax.training.loop.fit`."""
        for epoch in itertools.count(first_step // self.steps_per_epoch):
            begin = max(first_step - epoch * self.steps_per_epoch, 0)
            for step, tokens in self._rows_of(epoch, begin):
                source, target = self._corrupt(tokens, np.random.default_rng((self._seed, epoch, step)))
                size = float(source.size + target.size)
                counts = {"examples": float(len(source)), "tokens": size, "computed_tokens": size}
                yield {"input_ids": source, "labels": target}, counts

    def _rows_of(self, epoch: int, begin: int) -> Iterator[tuple[int, np.ndarray]]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._texts))
        tokens = np.concatenate([self._texts[number] for number in order])
        size = self._batch_size * self._lengths.tokens
        for step in range(begin, self.steps_per_epoch):
            yield step, tokens[step * size : (step + 1) * size].reshape(self._batch_size, -1)
