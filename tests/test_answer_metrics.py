"""The scores of answers as texts, against computations of their own and by hand."""

import collections
import importlib.util
import re
import string

import numpy as np
import pytest

from pats_jax.errors import InputError
from pats_jax.training import answer_metrics
from pats_jax.training.answer_metrics import AnswerScore, score_answers

WORDS = "the a an cat dog Cat ran. ran slowly, red red blue".split()


def has(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} of the extra gym is not installed")


def texts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest))) for _ in range(count)]


def value(metric, answers, references):
    return score_answers(metric, answers, [[one] if isinstance(one, str) else one for one in references]).value


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("exact_match", "The U.S.A.", ["usa"], 1),
        ("exact_match", "  an   apple!", ["Apple"], 1),
        ("exact_match", "theatre", ["atre"], 0),  # articles are whole words
        ("exact_match", "b", ["a", "B", "c"], 1),
        ("exact_match", "", ["the"], 1),  # both are nothing once normalized
        ("accuracy", " YES ", ["yes"], 1),
        ("accuracy", "yes.", ["yes"], 0),
        ("accuracy", "the cat", ["cat"], 0),
        ("accuracy", "no", ["yes", "No"], 1),
        ("qa_f1", "the red red fox", ["red fox ran"], 2 / 3),  # red, fox of red red fox and red fox ran
        ("qa_f1", "red", ["red red red"], 0.5),
        ("qa_f1", "", ["red"], 0),
        ("qa_f1", "the", ["the"], 0),  # no word is left
        ("qa_f1", "b c", ["x", "a b c", "b"], 1),
    ],
)
def test_by_hand(metric, answer, references, expected):
    assert value(metric, [answer], [references]) == pytest.approx(expected)


def words(text):
    """The normal form, word by word instead of by regular expressions."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def test_exact_match_and_f1_of_random_texts():
    answers, references = texts(300, 5), [texts(3, 5, seed=seed) for seed in range(300)]

    def f1(one, other):
        left, common = list(words(other)), 0
        for word in words(one):
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / max(len(words(one)), 1), common / max(len(words(other)), 1)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    pairs = list(zip(answers, references, strict=True))
    exact = np.mean([any(words(one) == words(other) for other in right) for one, right in pairs])
    assert 0.05 < exact < 0.95 and value("exact_match", answers, references) == pytest.approx(exact)
    expected = np.mean([max(f1(one, other) for other in right) for one, right in pairs])
    assert value("qa_f1", answers, references) == pytest.approx(expected)


def test_an_answer_that_is_no_class_is_a_class_of_its_own():
    answers, references = ["yes", "yes", "No", "perhaps", "no"], ["yes", "no", "no", "yes", "no"]
    # yes: 1 of 2 and 2; no: 1 of 1 and 3; No and perhaps: never right
    assert value("macro_f1", answers, references) == pytest.approx((2 * 1 / 4 + 2 * 1 / 4 + 0 + 0) / 4)
    rng = np.random.default_rng(0)
    answers, references = rng.choice(["a", "b", "c", "?"], 200), rng.choice(["a", "b", "c", "d"], 200)
    scores = []
    for name in {*answers, *references}:
        hits = np.sum((answers == name) & (references == name))
        scores.append(2 * hits / (np.sum(answers == name) + np.sum(references == name)))
    assert len(scores) == 5 and value("macro_f1", list(answers), list(references)) == pytest.approx(np.mean(scores))
    # only the first right answer is looked at
    assert value("macro_f1", ["b", "b"], [["a", "b"], ["b", "a"]]) == pytest.approx((0 + 2 / 3) / 2)


def test_matthews_correlation_of_acceptable_and_the_rest():
    rng = np.random.default_rng(1)
    answers = rng.choice(["acceptable", "unacceptable", "Acceptable", " acceptable "], 100)
    references = rng.choice(["acceptable", "unacceptable"], 100)
    given, right = np.char.strip(answers) == "acceptable", references == "acceptable"
    expected = np.corrcoef(given, right)[0, 1]
    assert value("matthews_correlation", list(answers), list(references)) == pytest.approx(expected)
    assert value("matthews_correlation", ["?"] * 4, list(references[:4])) == 0


def test_answers_that_are_no_numbers_are_counted():
    references, answers = ["1", "2", "3.5", "5"], [" 1.5", "2", "three", "4 "]
    found = score_answers("pearson", answers, [[one] for one in references])
    mean = np.mean([1, 2, 3.5, 5])
    assert found == AnswerScore(pytest.approx(np.corrcoef([1.5, 2, mean, 4], [1, 2, 3.5, 5])[0, 1]), 1)
    for odd in ("nan", "inf", "", "1,5"):
        assert score_answers("pearson", [odd, "2", "3"], [["1"], ["2"], ["3"]]).unparsable == 1
    assert score_answers("pearson", ["x", "y", "z"], [["1"], ["2"], ["3"]]) == AnswerScore(0.0, 3)
    with pytest.raises(InputError, match="the right answer 'high' must be a number"):
        score_answers("pearson", ["1", "2"], [["1"], ["high"]])


# Rouge-L


def union_of_subsequences(answer, reference):
    """Rouge-L of the rouge package from its definition: distinct words of longest common subsequences of sentences."""
    given, right = ([sentence.split() for sentence in text.split(".") if sentence] for text in (answer, reference))

    def common(one, other):
        best = [[[] for _ in range(len(other) + 1)] for _ in range(len(one) + 1)]
        for i, word in enumerate(one):
            for j, its in enumerate(other):
                longer = best[i][j + 1] if len(best[i][j + 1]) > len(best[i + 1][j]) else best[i + 1][j]
                best[i + 1][j + 1] = [*best[i][j], word] if word == its else longer
        return best[-1][-1]

    union = {word for sentence in right for other in given for word in common(sentence, other)}
    sizes = [len({word for sentence in text for word in sentence}) for text in (given, right)]
    if not union:
        return 0.0
    precision, recall = len(union) / sizes[0], len(union) / sizes[1]
    return 2 * precision * recall / (precision + recall)


@has("rouge")
def test_rouge_l_is_that_of_the_rouge_package():
    assert value("rouge_l", ["the cat the cat"], ["the cat"]) == pytest.approx(1, abs=1e-6)  # sets of words
    assert value("rouge_l", ["A b"], ["a b"]) == pytest.approx(1 / 2, abs=1e-6)  # case is kept
    assert value("rouge_l", ["a b"], [["x", "a b. c d"]]) == pytest.approx(2 / 3, abs=1e-6)  # the best reference
    for nothing in ("", "...", "?!", "."):
        assert value("rouge_l", [nothing], ["a b"]) == 0
    assert value("rouge_l", ["a"], ["."]) == 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        one, other = (" ".join(rng.choice(["a", "b", "c", "d.", "e"], rng.integers(1, 7))) for _ in range(2))
        assert value("rouge_l", [one], [other]) == pytest.approx(union_of_subsequences(one, other), abs=1e-6), (
            one,
            other,
        )


@has("rouge_score")
def test_rouge_score_has_a_name_of_its_own():
    def longest(one, other):
        best = collections.defaultdict(int)
        for i, word in enumerate(one):
            for j, its in enumerate(other):
                best[i, j] = best[i - 1, j - 1] + 1 if word == its else max(best[i - 1, j], best[i, j - 1])
        return best[len(one) - 1, len(other) - 1] if one and other else 0

    answers, references = texts(40, 8), texts(40, 8, seed=1)
    expected = []
    for one, other in zip(answers, references, strict=True):
        given, right = (re.findall("[a-z0-9]+", text.lower()) for text in (one, other))
        length = longest(given, right)
        expected.append(2 * length / (len(given) + len(right)) if length else 0.0)
    assert value("rouge_score_l", answers, references) == pytest.approx(np.mean(expected))
    assert value("rouge_score_l", ["red red blue"], ["blue red"]) == pytest.approx(2 / 5)


@pytest.mark.parametrize(("metric", "package"), [("rouge_l", "rouge"), ("rouge_score_l", "rouge_score")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, metric, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"needs the package rouge.*; run: pip install 'pats-jax\[gym\]'$"):
        answer_metrics.check_packages(metric)


def test_rows_without_right_answers_are_refused():
    for answers, references in ([], []), (["a"], [[]]), (["a"], [["a"], ["b"]]):
        with pytest.raises(ValueError, match="each row needs one, and a right answer"):
            score_answers("accuracy", answers, references)
