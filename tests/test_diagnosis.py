"""What a run says of the model that it keeps, against figures computed from its definitions."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import scipy.stats
import tiny
from sklearn.metrics import f1_score, matthews_corrcoef, mean_absolute_error, mean_squared_error

from pats_jax import glue
from pats_jax.core.files import parse_record
from pats_jax.data import load_task, tasks
from pats_jax.data.readers import Split
from pats_jax.run import replacing
from pats_jax.run.records import GlueResults
from pats_jax.training import diagnosis, metrics

NAMES = ("so\tso", "good", "bad", "never")


def table(text):
    header, *rows = csv.reader(io.StringIO(text), delimiter="\t")
    return header, rows


@pytest.fixture(scope="module")
def classified():
    """60 rows of the first three of four classes: logits, labels and their examination."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 60).astype(np.int32)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    logits[np.arange(60), labels] += 1.0
    logits[:, 3] -= 5
    texts = [f"text {row}" for row in range(60)]
    split = Split(texts, None, labels, [f"id{row}" for row in range(60)], NAMES)
    return logits, labels, diagnosis.examine_logits(logits, split, tasks.own_task(NAMES))


def test_the_figures_of_each_class_are_those_of_counts(classified):
    logits, labels, found = classified
    answers = [max(range(4), key=lambda c: row[c]) for row in logits]
    for number, one in enumerate(found.classes):
        true = {row for row in range(60) if labels[row] == number}
        given = {row for row in range(60) if answers[row] == number}
        assert (one.label, one.support, one.predicted) == (NAMES[number], len(true), len(given))
        assert one.precision == pytest.approx(len(true & given) / len(given) if given else 0)
        assert one.recall == pytest.approx(len(true & given) / len(true) if true else 0)
        assert one.f1 == pytest.approx(2 * len(true & given) / (len(true) + len(given)) if true | given else 0)
        assert found.confusion[number].tolist() == [
            sum(1 for row in true if answers[row] == other) for other in range(4)
        ]
    record = found.record()
    assert record["macro_f1"] == pytest.approx(np.mean([one.f1 for one in found.classes[:3]]))
    assert record["micro_f1"] == record["score"] == pytest.approx(np.mean(answers == labels))
    counts = [list(labels).count(number) for number in range(3)]
    assert record["majority_class"]["label"] == NAMES[int(np.argmax(counts))]
    assert record["majority_class"]["share"] == record["majority_class"]["metrics"]["accuracy"] == max(counts) / 60
    assert record["majority_class"]["metrics"]["macro_f1"] == pytest.approx(2 * max(counts) / (max(counts) + 60) / 3)


def test_losses_and_the_calibration_are_those_of_their_formulas(classified):
    logits, labels, found = classified
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    losses = -np.log(probabilities[np.arange(60), labels])
    assert found.record()["loss"] == pytest.approx(losses.mean(), rel=1e-9)
    error = 0.0
    for low in np.arange(15) / 15:
        rows = [r for r in range(60) if low < probabilities[r].max() <= low + 1 / 15]
        if rows:
            right = np.mean([probabilities[r].argmax() == labels[r] for r in rows])
            error += len(rows) / 60 * abs(right - np.mean([probabilities[r].max() for r in rows]))
    assert found.record()["calibration_error"] == pytest.approx(error, abs=1e-9) and error > 0.01
    header, rows = table(found.tables()["largest_losses.tsv"])
    worst = np.argsort(-losses)[:20]
    assert header == ["index", "label", "prediction", "loss", "probability_of_label", "sentence1"]
    assert [row[0] for row in rows] == [f"id{r}" for r in worst] and rows[0][5] == f"text {worst[0]}"
    assert [float(row[3]) for row in rows] == pytest.approx(losses[worst].tolist(), abs=1e-4)
    header, rows = table(found.tables()["validation.tsv"])
    assert header[:4] == ["index", "label", "prediction", "loss"] and header[4] == "so\\tso"
    np.testing.assert_allclose(np.array([row[4:] for row in rows], float), probabilities, atol=1e-4)


def test_probabilities_that_are_right_as_often_as_they_say_have_no_calibration_error():
    probabilities = np.tile([[0.75, 0.25]], (400, 1))
    labels = np.repeat([0, 1], [300, 100])
    assert diagnosis.calibration_error(diagnosis.confidence_bins(probabilities, labels)) == pytest.approx(0)
    assert diagnosis.calibration_error(diagnosis.confidence_bins(probabilities, 1 - labels)) == pytest.approx(0.5)
    sure = diagnosis.confidence_bins(np.eye(2)[[0, 1]], np.array([0, 1]))
    assert [one.rows for one in sure] == [0] * 14 + [2] and sure[-1].accuracy == sure[-1].confidence == 1


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews_correlation"])
def test_scores_of_counts_are_scikit_learns_with_those_weights(name):
    rng = np.random.default_rng(2)
    classes = 2 if name == "f1" else 3
    labels, answers = rng.integers(0, classes, (2, 40))
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=6)
    found = metrics.scores_of_counts(name, labels, answers, counts)
    for weights, score in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(40), weights)
        assert score == pytest.approx(metrics.METRICS[name](answers[drawn], labels[drawn]), abs=1e-12)
    always = metrics.scores_of_counts(name, labels, np.zeros_like(labels), counts)
    for weights, score in zip(counts, always, strict=True):
        drawn = np.repeat(np.arange(40), weights)
        assert score == pytest.approx(metrics.METRICS[name](np.zeros(40, int), labels[drawn]), abs=1e-12)


@pytest.mark.parametrize(
    ("names", "statistic"),
    [
        (["accuracy"], lambda a, b: np.mean(a == b)),
        (["accuracy", "f1"], lambda a, b: (np.mean(a == b) + f1_score(b, a)) / 2),
        (["matthews_correlation"], lambda a, b: matthews_corrcoef(b, a)),
        (["pearson", "spearmanr"], None),
    ],
)
def test_the_interval_is_that_of_scipy(names, statistic):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 150)
    answers = np.where(rng.random(150) < 0.8, labels, 1 - labels)
    if statistic is None:
        labels, answers = labels + rng.normal(size=150), labels + rng.normal(size=150)

        def statistic(a, b):
            return (scipy.stats.pearsonr(a, b).statistic + scipy.stats.spearmanr(a, b).statistic) / 2

    found = metrics.bootstrap_interval(names, answers, labels, 0.95, 2000)
    expected = scipy.stats.bootstrap(
        (answers, labels), statistic, paired=True, vectorized=False, n_resamples=600, method="percentile", rng=1
    ).confidence_interval
    width = expected.high - expected.low
    assert found == pytest.approx(tuple(expected), abs=0.15 * width), "both are random: ends may differ by that much"
    assert found == metrics.bootstrap_interval(names, answers, labels, 0.95, 2000)
    assert found != metrics.bootstrap_interval(names, answers, labels, 0.95, 2000, seed=1)
    assert found[0] < statistic(answers, labels) < found[1]


def test_the_interval_of_a_single_row_is_its_score():
    assert metrics.bootstrap_interval(["accuracy"], np.array([1]), np.array([1]), 0.95, 10) == (1.0, 1.0)


def test_a_regression_is_told_by_its_residuals():
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 5, 30).astype(np.float32)
    answers = (labels + rng.normal(size=30)).astype(np.float32)
    split = Split(["a"] * 30, ["b"] * 30, labels, list(map(str, range(30))))
    found = diagnosis.examine_logits(answers[:, None], split, tasks.own_task(None))
    record, tables = found.record(), found.tables()
    assert record["loss"] == pytest.approx(mean_squared_error(labels, answers), rel=1e-5)
    assert record["mean_absolute_error"] == pytest.approx(mean_absolute_error(labels, answers), rel=1e-5)
    assert record["mean_answer"]["loss"] == pytest.approx(labels.var(), rel=1e-5)
    assert record["explained_variance"] == pytest.approx(1 - record["loss"] / record["mean_answer"]["loss"], rel=1e-5)
    assert record["interval"]["low"] < record["score"] < record["interval"]["high"]
    header, rows = table(tables["largest_residuals.tsv"])
    assert header == ["index", "label", "prediction", "residual", "sentence1", "sentence2"] and len(rows) == 20
    assert int(rows[0][0]) == np.argmax(np.abs(answers - labels))


# of a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("diagnosis")
    settings = tiny.quick_settings(home, max_steps=4, do_train=True, do_eval=True, do_predict=True)
    glue.run(dataclasses.replace(settings, output_dir=str(home / "run")))
    return home


def test_a_run_examines_the_model_that_it_saves(folder):
    split = load_task("sst2", str(folder / "data"), splits=("validation", "test"))
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    found = parse_record((run / "results.json").read_bytes(), GlueResults, "results")["diagnosis"]
    logits = tiny.reference_logits(run / "model", split["validation"].sentence1, max_length=16)
    expected = diagnosis.examine_logits(logits, split["validation"], tasks.get_task("sst2")).record()
    assert found["score"] == results["final"]["metrics"]["accuracy"] == expected["score"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4) and found["classes"] == expected["classes"]
    assert {path.name for path in (run / "diagnosis").iterdir()} == {
        *("classes.tsv", "confusion.tsv", "reliability.tsv", "largest_losses.tsv", "validation.tsv")
    }
    assert replacing.foreign(run) is None
    header, rows = table((run / "predictions" / "probabilities" / "SST-2.tsv").read_text())
    logits = tiny.reference_logits(run / "model", split["test"].sentence1, max_length=16)
    assert header == ["index", "prediction", "negative", "positive"]
    assert [row[1] for row in rows] == [header[2:][answer] for answer in logits.argmax(1)]
    np.testing.assert_allclose(
        np.array([row[2:] for row in rows], float), scipy.special.softmax(logits, axis=1), atol=2e-4
    )


@pytest.mark.slow
def test_logits_of_the_last_evaluation_are_used_again_only_for_its_model(folder, tmp_path, monkeypatch):
    """One pass over the validation data an evaluation; one more where the model kept is that of an earlier step."""
    from pats_jax.training.evaluation import Predictor

    passes, real = [], Predictor.logits
    monkeypatch.setattr(Predictor, "logits", lambda self, params, name: passes.append(name) or real(self, params, name))
    settings = tiny.quick_settings(tmp_path, max_steps=4, eval_steps=2, do_train=True, do_eval=True)
    results = glue.run(dataclasses.replace(settings, output_dir=str(tmp_path / "run")))
    assert passes == ["validation"] * 2
    assert results["diagnosis"]["score"] == results["final"]["metrics"]["accuracy"]
    passes.clear()
    best = dataclasses.replace(
        settings, load_best_model_at_end=True, learning_rate=1e-9, output_dir=str(tmp_path / "best")
    )
    results = glue.run(best)  # the first is kept: no later one is better
    assert results["model_step"] == 2 and passes == ["validation"] * 3
