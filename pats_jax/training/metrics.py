"""The scores of the GLUE and few-shot tasks, from scikit-learn and SciPy, under the names that ``evaluate`` uses.

Each metric is a function ``(predictions, labels) -> float`` of two arrays (rows,); accuracy, micro and macro F1 also of
two arrays of 0 and 1, (rows, labels), where a row may have several labels. A metric that is undefined because all
predictions are the same is 0.0: a model that has learned nothing scores nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pats_jax.data.tasks import Task, get_task


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of rows with the right class, or with exactly the right labels."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1, for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of F1 over the classes that occur, each as the positive one: CrossFit's "Classification-F1".

    Of several labels to a row, the mean over all labels.
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all decisions together; of one class a row it is accuracy."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="micro", zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of predicted and true classes, between -1 and 1 (Matthews 1975; Gorodkin 2004 beyond two classes)."""
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions) or _constant(labels) else float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation of scores."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearmanr(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks of scores."""
    from scipy.stats import spearmanr as scipy_spearmanr

    return _correlation(scipy_spearmanr, predictions, labels)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, macro_f1, micro_f1, matthews_correlation, pearson, spearmanr)
}


_OF_SEVERAL = {"accuracy", "macro_f1", "micro_f1"}  # labels to a row


def compute_metrics(
    metrics: Task | str | Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Scores predictions by a task's metrics.

    Args:
      metrics: a task, its name, or names of metrics.
      predictions: class indices or scores, (rows,); with several labels per row, 0 or 1, (rows, labels).
      labels: the true ones, of the same shape.

    Returns:
      Metric name -> value, and, if there are several, their mean as ``combined_score``, as in ``run_glue``.
      The score that picks a task's best model is among them.

    Raises:
      ValueError: if the arrays differ in shape, are empty, or contain NaN or infinity.
    """
    task = get_task(metrics) if isinstance(metrics, str) else metrics
    names = task.metrics if isinstance(task, Task) else task
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    several = predictions.ndim == 2 and {*names} <= _OF_SEVERAL
    if predictions.shape != labels.shape or not (predictions.ndim == 1 or several) or len(labels) == 0:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be vectors of equal length")
    if not (np.all(np.isfinite(predictions)) and np.all(np.isfinite(labels))):
        raise ValueError("predictions and labels must be finite")
    scores = {name: METRICS[name](predictions, labels) for name in names}
    if len(scores) > 1:
        scores["combined_score"] = float(np.mean(list(scores.values())))
    if isinstance(task, Task) and task.main_metric not in scores:
        scores[task.main_metric] = METRICS[task.main_metric](predictions, labels)
    return scores


def bootstrap_interval(
    names: Sequence[str], predictions: np.ndarray, labels: np.ndarray, level: float, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a score, or of the mean of several: rows are drawn with replacement.

    A score of classes depends only on the number of rows with each pair of label and prediction, which is multinomial;
    so these numbers are drawn.

    Args:
      names: names of metrics.
      predictions: class indices or scores, (rows,); with several labels per row, 0 or 1, (rows, labels).
      labels: the true ones, of the same shape.
      level: the share of the resamples' scores inside the interval.
      resamples: the number of resamples.
      seed: the seed of the draws.

    Returns:
      The two ends of the interval; both are the score itself if there is only one row.
    """
    rng = np.random.default_rng(seed)
    if len(labels) == 1:
        score = float(np.mean([METRICS[name](predictions, labels) for name in names]))
        return score, score
    if labels.ndim == 2:
        drawn = _resampled_several(names, predictions, labels, resamples, rng)
    elif set(names) <= _CORRELATIONS.keys():
        drawn = _resampled_correlations(names, predictions, labels, resamples, rng)
    else:
        pairs, rows = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
        counts = rng.multinomial(len(labels), rows / len(labels), size=resamples)
        drawn = np.mean([scores_of_counts(name, pairs[0], pairs[1], counts) for name in names], axis=0)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scores_of_counts(name: str, labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A score of classes, for many tables of counts at once.

    Args:
      name: name of the metric.
      labels: the true class of each cell, (cells,).
      predictions: predicted class of each cell, (cells,).
      counts: rows in each cell, (tables, cells).

    Returns:
      The scores, (tables,); 0 where the metric is undefined.
    """
    classes = np.arange(max(labels.max(), predictions.max(), 1) + 1)
    hit = (labels == predictions)[:, None]
    true, given = labels[:, None] == classes, predictions[:, None] == classes
    hits, true, given = (counts @ cells.astype(float) for cells in (hit & true, true, given))  # (tables, classes)
    total, right = counts.sum(1), hits.sum(1)
    if name == "accuracy":
        return right / total
    if name == "matthews_correlation":
        squares = (total**2 - (true**2).sum(1)) * (total**2 - (given**2).sum(1))
        return _quotient(right * total - (true * given).sum(1), np.sqrt(squares))
    by_class = _quotient(2 * hits, true + given)
    if name == "f1":
        return by_class[:, 1]
    if name == "macro_f1":
        return by_class.sum(1) / (true + given > 0).sum(1)
    raise ValueError(f"{name} is not a score of classes")


def _resampled_several(names, predictions, labels, resamples, rng):
    """The mean of scores of several labels to a row, (resamples,); a resample counts how often each row is drawn."""
    rows, number = labels.shape
    given, true = predictions.astype(float), labels.astype(float)
    exact = np.all(given == true, axis=1, keepdims=True)
    columns = np.concatenate([given * true, given, true, exact], axis=1)  # (rows, 3 labels + 1)
    size = max(1, _MOST_VALUES // rows)  # resamples at a time
    parts = []
    for start in range(0, resamples, size):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(size, resamples - start))
        sums = counts @ columns
        hits, both = sums[:, :number], sums[:, number : 2 * number] + sums[:, 2 * number : -1]
        scores = {
            "micro_f1": _quotient(2 * hits.sum(1), both.sum(1)),
            "macro_f1": _quotient(2 * hits, both).mean(1),
            "accuracy": sums[:, -1] / rows,
        }
        parts.append(np.mean([scores[name] for name in names], axis=0))
    return np.concatenate(parts)


def _resampled_correlations(names, predictions, labels, resamples, rng):
    """The mean of correlations, (resamples,); an undefined one counts as 0."""
    pairs = np.stack([predictions, labels]).astype(np.float64)
    size = max(1, _MOST_VALUES // len(labels))  # resamples at a time
    parts = []
    for start in range(0, resamples, size):
        drawn = pairs[:, rng.integers(len(labels), size=(min(size, resamples - start), len(labels)))]
        parts.append(np.mean([_CORRELATIONS[name](*drawn) for name in names], axis=0))
    return np.concatenate(parts)


_MOST_VALUES = 2**22


def _pearson_rows(a, b):
    """Linear correlation of each row of two arrays (resamples, rows)."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    return _quotient((a * b).sum(1), np.sqrt((a**2).sum(1) * (b**2).sum(1)))


def _spearman_rows(a, b):
    """The same of ranks."""
    from scipy.stats import rankdata

    return _pearson_rows(rankdata(a, axis=1), rankdata(b, axis=1))


_CORRELATIONS = {"pearson": _pearson_rows, "spearmanr": _spearman_rows}


def _quotient(above, below):
    """The quotient above / below; 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)


def _correlation(correlate: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(correlate(np.asarray(predictions, np.float64), np.asarray(labels, np.float64)).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[0]))
