"""The scores of the few-shot tasks' answers as texts, by CrossFit's own rules.

An answer is compared with all of a row's right answers, and the best comparison counts. Only those that take every row
together, macro F1, Matthews correlation and Pearson, compare with the first right answer. Answers lose the blanks at
both ends first. The rules are those of ``dataloader/metrics.py`` in CrossFit (commit 56285ca).
"""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pats_jax.data.crossfit import AnswerMetric
from pats_jax.errors import InputError
from pats_jax.training import metrics

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_EXTRA = "pip install 'pats-jax[gym]'"


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """A score, and what it could not read.

    Attributes:
      value: the score.
      unparsable: answers that are no number where one is needed; they count as ``pearson`` says.
    """

    value: float
    unparsable: int = 0


def normalize(text: str) -> str:
    """The text in lower case, without punctuation and the words a, an and the, with single blanks.

    Examples:
      >>> normalize(" The  state-of-the-art, a.k.a. SOTA!")
      'stateoftheart aka sota'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same once normalized, else 0."""
    return float(normalize(answer) == normalize(reference))


def accuracy(answer: str, reference: str) -> float:
    """1 if both are the same in lower case, else 0: punctuation and articles count."""
    return float(answer.lower() == reference.lower())


def qa_f1(answer: str, reference: str) -> float:
    """The F1 of the normalized words, repeated words counted as often as both have them; 0 without a common word."""
    given, right = normalize(answer).split(), normalize(reference).split()
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """Rouge-L as the package ``rouge`` 1.0.0 has it: over sentences that end in ".", of sets of words, case kept.

    0 for an answer of punctuation only, and if either has no sentence.

    Raises:
      InputError: if the package is not installed.
    """
    if not answer.translate(_PUNCTUATION) or not (answer.strip(".") and reference.strip(".")):
        return 0.0
    return float(_rouge().get_scores(answer, reference, avg=True)["rouge-l"]["f"])


def rouge_score_l(answer: str, reference: str) -> float:
    """Rouge-L as the package ``rouge_score`` has it: of lists of lower-case words, the whole text as one sentence.

    Without stemming. It can differ from `rouge_l` by several points.

    Raises:
      InputError: if the package is not installed.
    """
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> AnswerScore:
    """The mean of F1 over all texts that occur as answer or reference, each as the positive class.

    An answer that is no class is so a further class with F1 0, and lowers the mean.
    """
    return AnswerScore(metrics.macro_f1(np.array(answers, object), np.array(references, object)))


def matthews_correlation(answers: Sequence[str], references: Sequence[str]) -> AnswerScore:
    """Matthews correlation of two classes: "acceptable", and everything else."""
    given, right = (np.array([text == "acceptable" for text in texts], int) for texts in (answers, references))
    return AnswerScore(metrics.matthews_correlation(given, right))


def pearson(answers: Sequence[str], references: Sequence[str]) -> AnswerScore:
    """Linear correlation of answers and references as numbers; answers that are none are counted.

    *Ours*: such an answer counts as the mean of the references, which helps no correlation. (In CrossFit the whole
    score is then NaN and never the best; CrossTaskMoE takes 3.0.)

    Raises:
      InputError: if a reference is no finite number.
    """
    right, given = (np.array([_number(text) for text in texts]) for texts in (references, answers))
    if not np.isfinite(right).all():
        wrong = references[int(np.argmin(np.isfinite(right)))]
        raise InputError(
            f"the right answer {wrong!r} must be a number, because the task is scored by Pearson correlation"
        )
    lost = ~np.isfinite(given)
    return AnswerScore(metrics.pearson(np.where(lost, right.mean(), given), right), int(lost.sum()))


_OF_A_ROW: dict[str, Callable[[str, str], float]] = {
    one.__name__: one for one in (exact_match, accuracy, qa_f1, rouge_l, rouge_score_l)
}
_OF_ALL_ROWS: dict[str, Callable[[Sequence[str], Sequence[str]], AnswerScore]] = {
    one.__name__: one for one in (macro_f1, matthews_correlation, pearson)
}


def score_answers(metric: AnswerMetric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> AnswerScore:
    """Scores a task's answers.

    Args:
      metric: the name of one of the functions above.
      answers: a text for each row, at least one.
      references: the right answers of each row, at least one.

    Raises:
      InputError: as from the metric.
      ValueError: if there is no row, a row has no right answer, or the numbers of rows differ.

    Examples:
      >>> score_answers("exact_match", ["The cat!", "dog"], [["cat"], ["a wolf", "a fox"]])
      AnswerScore(value=0.5, unparsable=0)
      >>> score_answers("macro_f1", ["yes", "yes", "maybe"], [["yes"], ["no"], ["no"]])
      AnswerScore(value=0.2222222222222222, unparsable=0)
    """
    if len(answers) != len(references) or not answers or not all(references):
        raise ValueError(f"{len(answers)} answers to {len(references)} rows; each row needs one, and a right answer")
    given = [answer.strip() for answer in answers]
    if metric in _OF_ALL_ROWS:
        return _OF_ALL_ROWS[metric](given, [right[0] for right in references])
    compare = _OF_A_ROW[metric]
    best = [max(compare(answer, one) for one in right) for answer, right in zip(given, references, strict=True)]
    return AnswerScore(float(np.mean(best)))


def check_packages(metric: AnswerMetric) -> None:
    """Raises InputError if the metric needs a package that is not installed."""
    if metric in ("rouge_l", "rouge_score_l"):
        _OF_A_ROW[metric]("a", "a")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError:
        raise InputError(f"Rouge-L needs the package rouge; run: {_EXTRA}") from None
    return Rouge(metrics=["rouge-l"])


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError(f"rouge_score's Rouge-L needs the package rouge-score; run: {_EXTRA}") from None
    return RougeScorer(["rougeL"], use_stemmer=False)
