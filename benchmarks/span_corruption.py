"""Span corruption as T5 is trained with it, and text infilling as BART is.

A row of tokens is cut into kept and hidden parts in turn, a kept one first and a hidden one last. T5 reads sentinels
for the hidden parts, and writes what stood there; BART reads one mask for each, and writes the whole row::

    T5:    kept <extra_id_0> kept <extra_id_1> ... </s>  ->  <extra_id_0> hidden <extra_id_1> hidden ... </s>
    BART:  [CLS] kept [MASK] kept [MASK] ... [SEP]       ->  [CLS] kept hidden kept hidden ... [SEP]

References:
  Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
    (arXiv:1910.10683), section 3.1.4 and the mean length of spans in 3.3.4; Lewis et al. 2020, BART: Denoising
    Sequence-to-Sequence Pre-training (arXiv:1910.13461), section 2.2. BART draws Poisson lengths, some of them 0; here
    all divisions into spans of at least one token are equally likely, so that all sources have one length.
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
    tokens: np.ndarray, rng: np.random.Generator, *, lengths: Lengths, first_sentinel: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts rows of tokens.

    Args:
      tokens: (rows, lengths.tokens).
      rng: draws where.
      lengths: how much is hidden.
      first_sentinel: ``<extra_id_0>``; each sentinel after it is one less.
      end: the token at the end of source and target.

    Returns:
      Sources (rows, lengths.source) and targets (rows, lengths.target).
    """
    is_hidden, begins = _draw_spans(tokens, lengths, rng)
    sentinels = first_sentinel + 1 - np.cumsum(begins, axis=1)
    source = _gathered(sentinels, tokens, begins, ~is_hidden)
    target = _gathered(sentinels, tokens, begins, is_hidden)
    return (_with_ends(source, (), (end,)), _with_ends(target, (), (end,)))


def infill(
    tokens: np.ndarray, rng: np.random.Generator, *, lengths: Lengths, mask: int, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each span of rows of tokens by one mask.

    Args:
      tokens: (rows, lengths.tokens).
      rng: draws where.
      lengths: how much is hidden.
      mask: the token for a span.
      begin: the token at the beginning of source and target.
      end: that at their end.

    Returns:
      Sources (rows, lengths.tokens - lengths.hidden + lengths.spans + 2) and targets (rows, lengths.tokens + 2).
    """
    is_hidden, begins = _draw_spans(tokens, lengths, rng)
    source = _gathered(np.full_like(tokens, mask), tokens, begins, ~is_hidden)
    return _with_ends(source, (begin,), (end,)), _with_ends(tokens, (begin,), (end,))


def _draw_spans(tokens: np.ndarray, lengths: Lengths, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are hidden, and which of them begin a span: two arrays of booleans like the tokens."""
    rows = len(tokens)
    kept = _parts(rows, lengths.tokens - lengths.hidden, lengths.spans, rng)
    parts = np.stack([kept, _parts(rows, lengths.hidden, lengths.spans, rng)], axis=2).reshape(rows, -1)
    is_hidden = np.stack([np.arange(parts.shape[1]).repeat(row) % 2 == 1 for row in parts])
    return is_hidden, is_hidden & ~np.pad(is_hidden, ((0, 0), (1, 0)))[:, :-1]


def _gathered(marks: np.ndarray, tokens: np.ndarray, has_mark: np.ndarray, has_token: np.ndarray) -> np.ndarray:
    """Of each place its mark and then its token, as far as it has them; as many in every row."""
    pairs, is_in = np.stack([marks, tokens], axis=2), np.stack([has_mark, has_token], axis=2)
    return pairs[is_in].reshape(len(tokens), -1)


def _with_ends(rows: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray:
    ends = [np.tile(np.array(part, np.int32), (len(rows), 1)) for part in (before, after)]
    return np.concatenate([ends[0], rows, ends[1]], axis=1).astype(np.int32)


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
        tokens: int,
        batch_size: int,
        *,
        seed: int,
        corrupt: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
    ):
        """Takes the texts.

        Args:
          texts: the tokens of each text, (length,), each with its end.
          tokens: of a row.
          batch_size: rows of a batch.
          seed: draws the order of texts, anew in each epoch, and the spans.
          corrupt: makes sources and targets of rows (batch_size, tokens), with the generator that it is given.

        Raises:
          InputError: if the texts do not fill one batch.
        """
        self._texts, self._tokens, self._batch_size, self._seed = texts, tokens, batch_size, seed
        self._corrupt = corrupt
        total = sum(map(len, texts))
        self.steps_per_epoch = total // (tokens * batch_size)
        if not self.steps_per_epoch:
            raise InputError(f"the texts have {total} tokens, fewer than a batch of {batch_size} rows of {tokens}")

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
        size = self._batch_size * self._tokens
        for step in range(begin, self.steps_per_epoch):
            yield step, tokens[step * size : (step + 1) * size].reshape(self._batch_size, -1)
