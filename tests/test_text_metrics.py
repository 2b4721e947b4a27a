"""Scores of written texts, against values from their definitions."""

import sys

import numpy as np
import pytest
import tiny
import tiny_seq2seq

from pats_jax.data.batches import Tokens
from pats_jax.data.pair_batches import PairTokens, fill_pairs
from pats_jax.errors import InputError
from pats_jax.training.text_metrics import check_packages, normalized, score_texts, token_f1


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Cat.", "cat", True, 1.0),
        ("cat", "dog", False, 0.0),
        ("", "dog", False, 0.0),
        ("the", "a", True, 1.0),  # nothing is left of either
        ("the", "dog", False, 0.0),
        ("it's  42", "its 42", True, 1.0),
        ("theory of an art", "theory art", False, 0.8),  # of: 2 of 3 and 2 of 2 words
        ("b b b c", "b c c", False, 4 / 7),  # one b and one c are in both
        ("c b", "b c", False, 1.0),
    ],
)
def test_squads_rules(prediction, reference, exact, f1):
    assert (normalized(prediction) == normalized(reference)) is exact
    assert token_f1(prediction, reference) == pytest.approx(f1)
    found = score_texts(["token_f1", "exact_match"], [prediction, "same"], [reference, "same"])
    assert found == {"token_f1": pytest.approx((f1 + 1) / 2), "exact_match": (exact + 1) / 2}


def test_as_many_predictions_as_references():
    for predictions, references in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match="must be as many, not none"):
            score_texts(["exact_match"], predictions, references)


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_one_line(metric, package, monkeypatch, capsys, tmp_path):
    for name in (package, "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    message = f"--metrics {metric}: needs {package}; run: pip install 'pats-jax[text2text]'"
    with pytest.raises(InputError) as caught:
        check_packages(["exact_match", metric])
    assert str(caught.value) == message
    path = tiny_seq2seq.write_pairs(tmp_path / "own.tsv", [("a", "b")])
    given = {"train_file": path, "metrics": metric, "output_dir": tmp_path / "run", "num_devices": 1}
    assert tiny.refused(capsys, "text2text", *tiny.flags(**given, model_name_or_path=tmp_path / "none")) == message


def test_rouge_counts_ngrams_and_the_longest_common_subsequence():
    pytest.importorskip("rouge_score", reason="rouge_score is not installed: pip install 'pats-jax[text2text]'")
    found = score_texts(["rouge"], ["the dog barks loudly", "x"], ["the cat barks", "x"])
    # 2 of 4 and 2 of 3 words, in order, but no two in a row; the second text has no two words
    assert found["rouge1"] == pytest.approx((4 / 7 + 1) / 2) and found["rougeL"] == pytest.approx((4 / 7 + 1) / 2)
    assert found["rouge2"] == 0
    assert score_texts(["rouge"], ["dogs barked"], ["dog barks"])["rouge2"] == 1  # stems


def test_bleu_is_that_of_all_texts_together():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install 'pats-jax[text2text]'")
    predictions, references = ["a b c d e f", "g h i j"], ["a b c d x f", "g h i j"]
    counts = [(9, 10), (6, 8), (4, 6), (2, 4)]  # n-grams that are right, of all
    expected = 100 * np.exp(np.mean([np.log(right / of) for right, of in counts]))
    assert score_texts(["bleu"], predictions, references)["bleu"] == pytest.approx(expected)


# batches of sources and targets


def tokens(rows, pad):
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    return Tokens(ids, np.zeros(len(ids), np.uint8), np.cumsum([0, *map(len, rows)]), pad)


def test_a_batch_of_pairs():
    pairs = PairTokens(tokens([[5, 1], [6, 7, 1], [1]], 9), tokens([[8, 1], [1], [8, 8, 1]], 9))
    assert pairs.target_lengths([2, 3]) == {2: 3, 3: 3} and len(pairs) == 3
    batch = fill_pairs(pairs, np.array([1, 0]), 3, (4, 3))
    assert batch["input_ids"].tolist() == [[6, 7, 1, 9], [5, 1, 9, 9], [6, 7, 1, 9]]  # the last is filler
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[1, -100, -100], [8, 1, -100], [1, -100, -100]]
    assert batch["weights"].tolist() == [1, 2, 0] and batch.keys() == {
        "input_ids",
        "attention_mask",
        "labels",
        "weights",
    }
    own = fill_pairs(pairs, np.array([1, 0]), 3, (4, 3), own=np.array([1]))
    assert all(np.array_equal(own[name][0], batch[name][1]) for name in batch)
