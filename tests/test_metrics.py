"""The metrics against their definitions written out in NumPy."""

import warnings

import numpy as np
import pytest

from pats_jax.training.metrics import METRICS, compute_metrics

CLASSES = np.random.default_rng(0).integers(0, 2, (2, 200))
SCORES = np.random.default_rng(1).normal(size=(2, 100)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def counts(predictions, labels):
    """True positives, false positives, false negatives, true negatives."""
    return [np.sum((predictions == p) & (labels == t)) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0))]


def correlation(x, y):
    x, y = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
    return np.sum(x * y) / np.sqrt(np.sum(x**2) * np.sum(y**2))


def ranks(values):
    """Ranks from 1, ties sharing their mean rank."""
    return np.array([np.mean(np.flatnonzero(np.sort(values) == v)) + 1 for v in values])


def test_classification_metrics_follow_their_definitions():
    tp, fp, fn, tn = counts(*CLASSES)
    mcc = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert METRICS["accuracy"](*CLASSES) == pytest.approx((tp + tn) / 200)
    assert METRICS["f1"](*CLASSES) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert METRICS["matthews_correlation"](*CLASSES) == pytest.approx(mcc)


def test_matthews_correlation_of_three_classes_is_that_of_the_one_hot_vectors():
    predictions, labels = np.random.default_rng(2).integers(0, 3, (2, 300))
    centred = [np.eye(3)[x] - np.eye(3)[x].mean(0) for x in (predictions, labels)]
    covariances = [np.sum(a * b) for a, b in ((0, 1), (0, 0), (1, 1)) for a, b in [(centred[a], centred[b])]]
    expected = covariances[0] / np.sqrt(covariances[1] * covariances[2])
    assert METRICS["matthews_correlation"](predictions, labels) == pytest.approx(expected)


def test_correlations_follow_their_definitions():
    predictions, labels = SCORES
    assert METRICS["pearson"](predictions, labels) == pytest.approx(correlation(predictions, labels))
    tied = np.round(predictions, 1)
    assert METRICS["spearmanr"](tied, labels) == pytest.approx(correlation(ranks(tied), ranks(labels)))


def test_two_metrics_are_joined_by_their_mean():
    scores = compute_metrics("mrpc", *CLASSES)
    assert scores.keys() == {"accuracy", "f1", "combined_score"}
    assert scores["combined_score"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    assert compute_metrics("cola", *CLASSES).keys() == {"matthews_correlation"}
    assert compute_metrics(["pearson"], *SCORES).keys() == {"pearson"}


@pytest.mark.parametrize("metric", ["matthews_correlation", "f1", "pearson", "spearmanr"])
@pytest.mark.parametrize("constant", ["predictions", "labels", "both"])
def test_constant_predictions_score_zero_and_nothing_warns(metric, constant):
    same, varied = np.zeros(10, np.float32), np.arange(10) % 2
    predictions = varied if constant == "labels" else same
    labels = varied if constant == "predictions" else same
    assert METRICS[metric](predictions, labels) == 0.0


def test_float32_scores_one_rounding_step_apart_are_not_taken_for_constant():
    predictions = np.full(10, 2.5, np.float32)
    predictions[3] = np.nextafter(predictions[3], np.float32(3))
    labels = np.eye(10)[3]
    assert METRICS["pearson"](predictions, labels) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [(np.zeros(3), np.zeros(4)), (np.zeros((3, 2)), np.zeros((3, 2))), (np.zeros(0), np.zeros(0))],
)
def test_arrays_that_do_not_fit_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="equal length"):
        compute_metrics("stsb", predictions, labels)


def test_nan_is_refused_rather_than_scored():
    with pytest.raises(ValueError, match="finite"):
        compute_metrics("stsb", np.array([1.0, np.nan]), np.array([1.0, 2.0]))
