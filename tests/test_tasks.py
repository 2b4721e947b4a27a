"""The GLUE table: what each task's files, classes and predictions are called."""

import pytest

from pats_jax.data.tasks import TASKS, get_task, own_task
from pats_jax.errors import InputError
from pats_jax.training import metrics

# From the GLUE paper's table 1 (metrics) and the server's list of files; rows of the test sets from the data's card.
OFFICIAL = {
    "cola": (2, {"matthews_correlation"}, ["CoLA.tsv"], [1063]),
    "sst2": (2, {"accuracy"}, ["SST-2.tsv"], [1821]),
    "mrpc": (2, {"accuracy", "f1"}, ["MRPC.tsv"], [1725]),
    "stsb": (1, {"pearson", "spearmanr"}, ["STS-B.tsv"], [1379]),
    "qqp": (2, {"accuracy", "f1"}, ["QQP.tsv"], [390965]),
    "mnli": (3, {"accuracy"}, ["MNLI-m.tsv", "MNLI-mm.tsv"], [9796, 9847]),
    "qnli": (2, {"accuracy"}, ["QNLI.tsv"], [5463]),
    "rte": (2, {"accuracy"}, ["RTE.tsv"], [3000]),
    "wnli": (2, {"accuracy"}, ["WNLI.tsv"], [146]),
    "ax": (3, {"matthews_correlation"}, ["AX.tsv"], [1104]),
}


def test_the_table_holds_the_ten_official_sets():
    found = {
        t.name: (t.num_labels, set(t.metrics), list(t.prediction_files.values()), list(t.test_rows.values()))
        for t in TASKS.values()
    }
    assert found == OFFICIAL
    assert list(TASKS) == [task.name for task in TASKS.values()]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_the_fields_of_a_row_fit_together(task):
    assert len(task.tsv_texts) == len(task.hub_texts) in (1, 2)
    assert task.files.keys() == task.hub_splits.keys()
    test_splits = {split for split in task.files if split.startswith("test")}
    assert task.prediction_files.keys() == task.test_rows.keys() == test_splits
    assert set(task.metrics) <= metrics.METRICS.keys()
    assert task.is_regression == (task.score_range is not None)


def test_the_best_model_is_chosen_by_the_only_metric_or_the_mean_of_two():
    assert TASKS["cola"].main_metric == "matthews_correlation"
    assert TASKS["mrpc"].main_metric == TASKS["stsb"].main_metric == "combined_score"


@pytest.mark.parametrize(
    ("name", "prediction", "written"),
    [
        ("cola", 1, "1"),
        ("wnli", 0, "0"),
        ("rte", 0, "entailment"),
        ("qnli", 1, "not_entailment"),
        ("mnli", 2, "contradiction"),
        ("ax", 1, "neutral"),
        ("stsb", 3.14159, "3.142"),
        ("stsb", 5.2, "5.000"),
        ("stsb", -0.1, "0.000"),
    ],
)
def test_predictions_are_written_as_the_server_reads_them(name, prediction, written):
    assert TASKS[name].format_prediction(prediction) == written


def test_names_are_found_in_any_case_and_an_unknown_one_is_told_the_others():
    assert get_task("MNLI") is TASKS["mnli"]
    with pytest.raises(InputError, match=r"mnli2: no such task; choose one of cola, sst2, .*, ax$"):
        get_task("mnli2")


def test_own_data_is_scored_by_accuracy_or_correlation_and_predicted_by_name():
    classes, scores = own_task(("ham", "spam")), own_task(None)
    assert (classes.num_labels, classes.main_metric, classes.format_prediction(1)) == (2, "accuracy", "spam")
    assert (scores.num_labels, scores.main_metric, scores.format_prediction(-7.5)) == (1, "combined_score", "-7.500")
