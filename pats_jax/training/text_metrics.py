"""Scores of written texts: exact match, token F1, ROUGE and BLEU.

Exact match and token F1 compare texts as SQuAD's evaluation does: in lower case, without punctuation and the words "a",
"an" and "the", words apart by single blanks. ROUGE is that of the package rouge_score, with its stemmer, BLEU that of
sacrebleu. All are between 0 and 1 but BLEU, which is between 0 and 100.

References:
  Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, arXiv 1606.05250; Lin, ROUGE: A
  Package for Automatic Evaluation of Summaries, 2004; Post, A Call for Clarity in Reporting BLEU Scores, 2018, arXiv
  1804.08771.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from pats_jax.errors import InputError

TextMetric = Literal["exact_match", "token_f1", "rouge", "bleu"]
Scorer = Callable[[Sequence[str], Sequence[str]], dict[str, float]]

# The scores of each metric, that which picks the best model first.
SCORES: Mapping[TextMetric, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "token_f1": ("token_f1",),
    "rouge": ("rougeL", "rouge1", "rouge2"),
    "bleu": ("bleu",),
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score_texts(
    metrics: Sequence[TextMetric], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Scores texts against references, one for each.

    Args:
      metrics: any of ``SCORES``.
      predictions: the texts, at least one.
      references: what they should be.

    Returns:
      Score -> value, the mean over the texts; BLEU is that of all of them together.

    Raises:
      InputError: if a package is missing.
      ValueError: if the numbers of texts differ, or there are none.

    Examples:
      >>> score_texts(["exact_match", "token_f1"], ["The cat!", "a red dog"], ["cat", "big red dog"])
      {'exact_match': 0.5, 'token_f1': 0.9}
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references must be as many, not none")
    found: dict[str, float] = {}
    for name in metrics:
        found |= _SCORERS[name](predictions, references)
    return found


def check_packages(metrics: Sequence[TextMetric]) -> None:
    """Raises InputError, with what to install, if a package that one of the metrics needs is missing."""
    for name in metrics:
        if name in _LOADERS:
            _LOADERS[name]()


def normalized(text: str) -> str:
    """A text as SQuAD compares it.

    Examples:
      >>> normalized("The  U.S. Army,  an army")
      'us army army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    pairs = zip(map(normalized, predictions), map(normalized, references), strict=True)
    return {"exact_match": float(np.mean([one == other for one, other in pairs]))}


def _token_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"token_f1": float(np.mean([token_f1(*pair) for pair in zip(predictions, references, strict=True)]))}


def token_f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words, each as often as it occurs.

    If one of the texts has no words after normalisation, it is 1 if neither has any, else 0, as in SQuAD 2.0.

    Examples:
      >>> token_f1("the dog dog barks", "a dog barks loudly")
      0.6666666666666666
    """
    ours, theirs = normalized(prediction).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    names = sorted(SCORES["rouge"])
    scorer = _load_rouge()(names, use_stemmer=True)
    scored = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: float(np.mean([one[name].fmeasure for one in scored])) for name in names}


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"bleu": float(_load_bleu()(list(predictions), [list(references)]).score)}


def _load_rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge", "rouge_score") from None
    return RougeScorer


def _load_bleu():
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise _missing("bleu", "sacrebleu") from None
    return corpus_bleu


def _missing(metric: str, package: str) -> InputError:
    return InputError(f"--metrics {metric}: needs {package}; run: pip install 'pats-jax[text2text]'")


_SCORERS: Mapping[TextMetric, Scorer] = {
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "rouge": _rouge,
    "bleu": _bleu,
}
_LOADERS: Mapping[TextMetric, Callable] = {"rouge": _load_rouge, "bleu": _load_bleu}
