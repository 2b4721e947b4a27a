"""From texts to batches: tokenise once, choose a few lengths, fill rectangular arrays.

XLA compiles a program for every shape. Batches are therefore padded to one of a few *bucket* lengths, which are chosen
from the data's own lengths to minimise the number of padding tokens, and a batch with too few rows is filled up with
rows of weight 0.

A batch is a dict of NumPy arrays: ``input_ids``, ``attention_mask`` and ``token_type_ids`` int32 (batch, length);
``labels`` int32 classes or float32 scores (batch,) or, where a row may have several labels, float32 0 or 1 (batch,
labels), absent for unlabelled rows; ``weights`` float32 (batch,), 0 for filler rows and 1, or the weight of their
class, for all others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pats_jax.data.readers import Split
from pats_jax.data.tables import check_characters
from pats_jax.errors import InputError, shown

Batch = dict[str, np.ndarray]
Plan = list[tuple[np.ndarray, int]]

# Rows that the tokenizer gets at once: its result is a list of Python ints, some 70 times the size of our arrays.
_CHUNK = 4096


@dataclass(frozen=True)
class Tokens:
    """The token ids of many rows, one after another.

    Attributes:
      input_ids: int32 (tokens,); row ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``.
      token_type_ids: uint8 (tokens,), 1 in the second text of a pair where the model tells them apart.
      offsets: int64 (rows + 1,).
      pad_id: id of the padding token.
      cut: number of rows that were longer than ``max_length`` tokens.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    pad_id: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, special tokens included, int64 (rows,)."""
        return np.diff(self.offsets)


def tokenize(split: Split, tokenizer: Any, max_length: int, setting: str = "max_seq_length") -> Tokens:
    """Tokenises every row once; in pairs, the longer text is truncated first.

    Args:
      split: the rows.
      tokenizer: a fast tokenizer of Transformers, the checkpoint's own.
      max_length: longest row in tokens, special tokens included.
      setting: what sets it, for messages.

    Raises:
      InputError: if ``max_length`` leaves no room for a token of each text, the tokenizer has no padding token, or it
        cannot encode a text.
    """
    check_room(split, tokenizer, max_length, setting)
    cut = 0
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(split), _CHUNK):
        encoded = _encode(split, slice(start, start + _CHUNK), tokenizer, max_length)
        lengths.extend(map(len, encoded["input_ids"]))
        full = (i for i, row in enumerate(encoded["input_ids"]) if len(row) == max_length)
        cut += sum(bool(encoded.encodings[i].overflowing) for i in full)
        ids.append(np.concatenate(encoded["input_ids"], dtype=np.int32, casting="same_kind"))
        types.append(np.concatenate(encoded["token_type_ids"], dtype=np.uint8, casting="unsafe"))
    return Tokens(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        pad_id=tokenizer.pad_token_id,
        cut=cut,
    )


def _encode(split: Split, rows: slice, tokenizer, max_length: int):
    try:
        return tokenizer(
            split.sentence1[rows],
            split.sentence2[rows] if split.sentence2 is not None else None,
            truncation="longest_first",
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
    except Exception as error:  # the tokenizers library itself raises bare Exceptions
        numbers = range(len(split))[rows]
        if len(numbers) > 1:
            for row in numbers:  # finds the one
                _encode(split, slice(row, row + 1), tokenizer, max_length)
        index, text, reason = split.ids[numbers[0]], split.sentence1[numbers[0]], " ".join(str(error).split())
        raise InputError(f"the tokenizer cannot encode row {shown(index)}, {shown(text)} ({reason})") from None


# What hardly any vocabulary holds: the last code point, an emoji, a rare character, a long word.
_UNKNOWN = ("\U0010ffff", "\U0001fae8", "\u9f98", "q" * 300)


def takes_any_text(tokenizer) -> bool:
    """Whether a tokenizer accepts text outside its vocabulary; one without an unknown token fails on it."""
    try:
        return bool(tokenizer(list(_UNKNOWN)))
    except Exception:  # the tokenizers library itself raises bare Exceptions
        return False


def check_room(split: Split, tokenizer, max_length: int, setting: str = "max_seq_length") -> None:
    """Raises InputError if the texts cannot be tokenised to padded rows.

    It does so if ``max_length`` leaves no room for a token of each text, a text has a lone surrogate, or there is no
    padding token.
    """
    for column in (split.sentence1, split.sentence2 or ()):
        for row, text in enumerate(column):
            if not text.isascii():
                check_characters(text, f"row {shown(split.ids[row])}")
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token; set pad_token in its tokenizer_config.json")
    pair = split.sentence2 is not None
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length < special + 1 + pair:
        raise InputError(f"{setting} {max_length}: too short: special tokens take {special} of them")


def check_ids(tokens: Tokens, vocab_size: int, type_vocab_size: int) -> None:
    """Raises InputError if a token, the padding token or a token type has no row in the model's embedding tables.

    A look-up beyond a table gives NaN, not an error.
    """
    largest, of_types = int(tokens.input_ids.max(initial=0)), int(tokens.token_type_ids.max(initial=0))
    check_vocabulary(max(largest, tokens.pad_id), vocab_size)
    check_types(of_types, type_vocab_size)


def check_types(largest: int, type_vocab_size: int) -> None:
    """Raises InputError if the largest token type that a tokenizer gives is beyond the model's embedding table."""
    if largest >= type_vocab_size:
        raise InputError(
            f"the tokenizer gives token types up to {largest}, but the model's table has {type_vocab_size} rows; use "
            "single texts, or the checkpoint's own tokenizer"
        )


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Raises InputError if the largest id that a tokenizer gives is beyond the model's embedding table."""
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives ids up to {largest}, but the model's embedding table has {vocab_size} rows (ids up "
            f"to {vocab_size - 1}); resize the table to the tokenizer (pats_jax.models.resize_vocabulary), or "
            "use the checkpoint's own tokenizer"
        )


def largest_id(tokenizer) -> int:
    """The largest id that a tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def largest_type(split: Split, tokenizer) -> int:
    """The largest token type that a tokenizer gives to such texts, single ones or pairs."""
    second = None if split.sentence2 is None else ""  # special tokens alone: not every tokenizer takes every text
    return max(tokenizer("", second, return_token_type_ids=True)["token_type_ids"])


def describe_cut(
    tokens: Tokens, max_length: int, longest: int | None, setting: str = "max_seq_length", texts: str = "texts"
) -> str | None:
    """Says in one line how many texts were truncated; None if none were.

    Args:
      tokens: the tokenised rows.
      max_length: length to which they were truncated.
      longest: number of positions of the model; None: any.
      setting: what sets the length.
      texts: what to call them.
    """
    if not tokens.cut:
        return None
    has_more = longest is None or max_length < longest
    hint = f"to keep more, set {setting}" if has_more else "the model has no more positions"
    verbs = ("is", "was") if tokens.cut == 1 else ("are", "were")
    rows = f"{tokens.cut} of {len(tokens)} {texts}"
    return f"{rows} {verbs[0]} longer than {max_length} tokens and {verbs[1]} truncated; {hint}"


def bucket_boundaries(
    lengths: np.ndarray, max_buckets: int = 7, multiple: int = 1, shape_cost: float = 0.0
) -> list[int]:
    """The bucket lengths that leave the fewest padding tokens, by exact dynamic programming.

    Every row is padded to the smallest boundary that holds it. With ``n_l`` rows of length ``l``, the boundaries
    ``b_1 < ... < b_K`` minimise ``K c + sum_l n_l b(l)``, where ``b(l)`` is the smallest of them that is at least ``l``
    and ``c`` the cost of a shape; the last one is the longest length. An optimal boundary is always one of the
    candidate lengths, of which there are at most as many as the maximal length: ``K m^2`` additions for ``m``
    candidates.

    Args:
      lengths: tokens of each row, (rows,).
      max_buckets: the maximum number of boundaries, and so of shapes.
      multiple: boundaries are multiples of this, but none is above the longest row. On XLA CPU, lengths of 24 or 32
        take no less time per token than 25 or 31, so rounding up only adds padding there.
      shape_cost: the cost of one more shape, in tokens of ``lengths``; with 0, there are as many shapes as are allowed
        and useful.

    Returns:
      The boundaries, in increasing order.

    Raises:
      ValueError: if there is no length, or another argument is out of range.
    """
    if len(lengths) == 0 or max_buckets < 1 or multiple < 1 or not shape_cost >= 0:
        raise ValueError(
            "bucket_boundaries needs at least one length, one bucket, a multiple of at least 1 and a shape_cost of at "
            "least 0"
        )
    rounded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, np.max(lengths))
    candidates, counts = np.unique(rounded, return_counts=True)
    rows_up_to = np.concatenate([[0], np.cumsum(counts)])
    # step[i, j]: tokens of the rows of candidates i..j when all are padded to candidate j; no cost where i > j.
    step = (rows_up_to[None, 1:] - rows_up_to[:-1, None]) * candidates[None, :].astype(float)
    step[np.tril_indices_from(step, -1)] = np.inf
    # total[j]: fewest tokens of the candidates below j, with as many buckets as there have been rounds.
    total = np.concatenate([[0.0], np.full(len(candidates), np.inf)])
    origins, costs = [], []
    for number in range(1, min(max_buckets, len(candidates)) + 1):
        reached = total[:-1, None] + step
        origins.append(np.argmin(reached, axis=0))
        total = np.concatenate([[np.inf], np.min(reached, axis=0)])
        costs.append(total[-1] + number * shape_cost)
    boundaries = []
    end = len(candidates)
    for origin in reversed(origins[: int(np.argmin(costs)) + 1]):
        boundaries.append(int(candidates[end - 1]))
        end = origin[end - 1]
    return boundaries[::-1]


def padded_tokens(lengths: np.ndarray, boundaries: Sequence[int]) -> int:
    """The number of tokens if each row is padded to the smallest boundary that holds it, or to the longest row."""
    return int(np.asarray(boundaries)[_bucket_of(lengths, boundaries)].sum())


def epoch_plan(lengths: np.ndarray, batch_size: int, boundaries: Sequence[int], *, seed: int, epoch: int) -> Plan:
    """Which rows form which batch of an epoch: a pure function of (seed, epoch).

    The rows are shuffled, gathered by bucket and cut into ``ceil(rows / batch_size)`` batches, so that at most one
    batch straddles each boundary; one batch, at a random place, takes the remainder. The batches are shuffled too.
    Every row occurs exactly once, and every epoch has the same number of steps. The number of rows and the length of
    each batch depend only on data and epoch, so runs with different seeds can run step by step in one program; the seed
    determines only which rows are in it.

    Args:
      lengths: tokens of each row, (rows,).
      batch_size: rows of a full batch.
      boundaries: bucket lengths, from ``bucket_boundaries``.
      seed: the run's seed.
      epoch: counted from 0.

    Returns:
      One ``(rows, length)`` per step: at most ``batch_size`` row numbers, and the padded length.

    Raises:
      InputError: if there are fewer rows than ``batch_size``.
    """
    if batch_size > len(lengths):
        raise InputError(
            f"per_device_train_batch_size: a batch has {batch_size} rows, more than the {len(lengths)} training rows"
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    order = order[np.argsort(_bucket_of(lengths, boundaries)[order], kind="stable")]
    # Seed sequences with a spawn key share no numbers with those of any seed, which have none.
    of_all_seeds = np.random.default_rng(np.random.SeedSequence(epoch, spawn_key=(1,)))
    steps = -(-len(lengths) // batch_size)
    sizes = np.full(steps, batch_size)
    sizes[of_all_seeds.integers(steps)] -= steps * batch_size - len(lengths)
    plan = _cut(order, sizes, lengths, boundaries)
    return [plan[step] for step in of_all_seeds.permutation(steps)]


def train_batches(
    tokens: Tokens,
    labels: np.ndarray,
    batch_size: int,
    boundaries: Sequence[int],
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch, in the order of ``epoch_plan``.

    Args:
      tokens: the tokenised rows.
      labels: int32 classes or float32 scores, (rows,).
      batch_size: rows of a batch, over all devices.
      boundaries: bucket lengths, from ``bucket_boundaries``.
      seed: the run's seed.
      epoch: counted from 0.
      first_step: number of steps of this epoch to skip, for a resumed run.
    """
    plan = epoch_plan(tokens.lengths, batch_size, boundaries, seed=seed, epoch=epoch)
    for rows, length in plan[first_step:]:
        yield fill_batch(tokens, labels, rows, batch_size, length)


def eval_batches(
    tokens: Tokens,
    labels: np.ndarray | None,
    batch_size: int,
    boundaries: Sequence[int],
    own: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows once, sorted by length, with their row numbers, which restore the order of predictions.

    Rows above the last boundary share one more bucket, with the length of the longest row.

    Args:
      tokens: the tokenised rows.
      labels: int32 classes or float32 scores, (rows,), or None.
      batch_size: rows of a batch, over all devices.
      boundaries: bucket lengths, from ``bucket_boundaries``.
      own: see ``fill_batch``.

    Yields:
      ``(rows, batch)``: entry ``i`` of the whole batch is row ``rows[i]``; the entries after these are filler. So
      ``predictions[rows] = outputs[:len(rows)]``.
    """
    order = np.argsort(tokens.lengths, kind="stable")
    steps = -(-len(order) // batch_size)
    sizes = np.full(steps, batch_size)
    sizes[-1] -= steps * batch_size - len(order)
    for rows, length in _cut(order, sizes, tokens.lengths, boundaries):
        yield rows, fill_batch(tokens, labels, rows, batch_size, length, own)


def fill_batch(
    tokens: Tokens,
    labels: np.ndarray | None,
    rows: np.ndarray,
    batch_size: int,
    length: int,
    own: np.ndarray | None = None,
    *,
    row_weights: np.ndarray | None = None,
) -> Batch:
    """Builds the arrays of one batch.

    Filler rows repeat the batch's first row with weight 0. They are not rows of padding, because attention over nothing
    is 0/0 in some models, and NaN stays NaN with weight 0.

    Args:
      tokens: the tokenised rows.
      labels: int32 classes or float32 scores, (rows,), or None.
      rows: row numbers, at least one and at most ``batch_size``.
      batch_size: rows of the batch.
      length: padded length, at least that of the longest of ``rows``.
      own: the entries of the batch to build, in this order, such as those of one process; None builds all.
      row_weights: the weight of each row of the table, float32 (rows,); None: 1.
    """
    weights = np.zeros(batch_size, np.float32)
    weights[: len(rows)] = 1.0 if row_weights is None else row_weights[rows]
    filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
    if own is not None:
        weights, filled = weights[own], filled[own]
    begins, ends = tokens.offsets[filled, None], tokens.offsets[filled + 1, None]
    positions = begins + np.arange(length)
    inside = positions < ends
    positions = np.where(inside, positions, begins)
    batch = {
        "input_ids": np.where(inside, tokens.input_ids[positions], np.int32(tokens.pad_id)),
        "attention_mask": inside.astype(np.int32),
        "token_type_ids": np.where(inside, tokens.token_type_ids[positions], 0).astype(np.int32),
        "weights": weights,
    }
    if labels is not None:
        batch["labels"] = labels[filled]
    return batch


def padding_share(batches: Iterable[Batch]) -> float:
    """The share of the computed tokens that are padding or belong to filler rows, between 0 and 1."""
    computed = real = 0
    for batch in batches:
        computed += batch["attention_mask"].size
        real += int(batch["attention_mask"][batch["weights"] > 0].sum())
    return 1.0 - real / computed


def _bucket_of(lengths: np.ndarray, boundaries: Sequence[int]) -> np.ndarray:
    """The index of the smallest boundary that holds each length; ``len(boundaries)`` if none does."""
    return np.searchsorted(np.asarray(boundaries), lengths, side="left")


def _cut(order: np.ndarray, sizes: np.ndarray, lengths: np.ndarray, boundaries: Sequence[int]) -> Plan:
    """Cuts an order of rows into batches, each padded to the boundary of its longest row."""
    padded = np.append(boundaries, max(np.max(lengths), boundaries[-1]))[_bucket_of(lengths, boundaries)]
    return [(rows, int(padded[rows].max())) for rows in np.split(order, np.cumsum(sizes)[:-1])]
