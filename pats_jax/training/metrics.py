"""The scores of the GLUE and few-shot tasks, by scikit-learn and SciPy, under the names that ``evaluate`` gives them.

Each metric is a function ``(predictions, labels) -> float`` of two arrays (rows,). Where one is not defined because
the predictions are all the same, it is 0.0: a model that has learned nothing scores nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pats_jax.data.tasks import Task, get_task


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of rows with the right class."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1, for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of F1 over the classes that occur, each as the positive one: CrossFit's "Classification-F1"."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


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
    metric.__name__: metric for metric in (accuracy, f1, macro_f1, matthews_correlation, pearson, spearmanr)
}


def compute_metrics(
    metrics: Task | str | Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Scores predictions by a task's metrics.

    Args:
      metrics: A task, its name, or names of metrics.
      predictions: Class indices or scores, (rows,).
      labels: The true ones, (rows,).

    Returns:
      Metric name -> value, and their mean as ``combined_score`` where there are several, as in ``run_glue``.

    Raises:
      ValueError: The arrays differ in shape, are empty or hold nan or infinity.
    """
    task = get_task(metrics) if isinstance(metrics, str) else metrics
    names = task.metrics if isinstance(task, Task) else task
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or len(labels) == 0:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be vectors of equal length")
    if not (np.all(np.isfinite(predictions)) and np.all(np.isfinite(labels))):
        raise ValueError("predictions and labels must be finite")
    scores = {name: METRICS[name](predictions, labels) for name in names}
    if len(scores) > 1:
        scores["combined_score"] = float(np.mean(list(scores.values())))
    return scores


def _correlation(correlate: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(correlate(np.asarray(predictions, np.float64), np.asarray(labels, np.float64)).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[0]))
