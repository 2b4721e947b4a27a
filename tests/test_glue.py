"""The GLUE program end to end, on a random checkpoint and tables small enough for seconds."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from pats_jax import glue, run_folder
from pats_jax.data import load_task
from pats_jax.data.tasks import get_task
from pats_jax.metrics import compute_metrics
from pats_jax.settings import Settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings of a quick run on a tiny SST-2; tests fill in the rest."""
    folder = tmp_path_factory.mktemp("glue")
    return Settings(
        model_name_or_path=str(tiny.save_checkpoint(folder / "checkpoint")),
        task_name="sst2",
        data_dir=str(tiny.write_sst2(folder / "data")),
        max_seq_length=16,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=3e-3,
        length_buckets=1,
        sensitivity_batches=1,
        num_train_epochs=2,
    )


def run(base, folder, **changes):
    return glue.run(dataclasses.replace(base, output_dir=str(folder), **changes))


def without_timing(folder):
    return [{k: v for k, v in record.items() if k != "timing"} for record in run_folder.read_metrics(folder)]


def test_a_run_leaves_its_folder_and_repeats_from_its_config(base, tmp_path):
    results = run(base, tmp_path / "a", method="pats", do_train=True, do_eval=True, do_predict=True)
    present = {path.name for path in (tmp_path / "a").iterdir()}
    assert present == set(run_folder.ENTRIES) - {"checkpoints"}
    plots = {path.name for path in (tmp_path / "a/plots").iterdir()}
    assert plots == {"loss.png", "score.png", "sensitivity.png"}
    assert json.loads((tmp_path / "a/results.json").read_text()) == results
    assert results["steps"] == 6 and 0 <= results["concentration"]["after"]["all"]["gini"] < 1
    saved = json.loads((tmp_path / "a/config.json").read_text())
    glue.run(dataclasses.replace(Settings(**saved), output_dir=str(tmp_path / "b")))
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b")
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert all((one[name] == other[name]).all() for name in one)


def test_scores_and_predictions_are_those_of_the_saved_model(base, tmp_path):
    results = run(base, tmp_path / "run", do_train=True, do_eval=True, do_predict=True)
    splits = load_task("sst2", base.data_dir, splits=("validation", "test"))
    logits = tiny.reference_logits(tmp_path / "run/model", splits["validation"].sentence1)
    expected = compute_metrics("sst2", logits.argmax(1), splits["validation"].labels)
    assert results["final"]["metrics"] == expected
    lines = (tmp_path / "run/predictions/SST-2.tsv").read_text().splitlines()
    answers = tiny.reference_logits(tmp_path / "run/model", splits["test"].sentence1).argmax(1)
    assert lines == ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(answers))]


def test_no_noise_is_plain_fine_tuning(base, tmp_path):
    run(base, tmp_path / "plain")
    run(base, tmp_path / "still", method="pats", noise_scale=0.0)
    run(base, tmp_path / "noisy", method="pats", noise_scale=0.1)
    plain, still, noisy = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "still", "noisy")
    )
    assert all((plain[name] == still[name]).all() for name in plain)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not np.allclose(plain[name], noisy[name], atol=1e-3)


def test_mnli_has_both_halves_and_answers_the_diagnostic_set(base, tmp_path):
    changes = {"task_name": "mnli", "data_dir": "builtin", "max_train_samples": 16, "max_eval_samples": 20}
    phases = {"do_train": True, "do_eval": True, "do_predict": True, "num_train_epochs": 1}
    results = run(base, tmp_path / "run", max_predict_samples=10, **changes, **phases)
    assert set(results["final"]["metrics"]) == {"accuracy", "accuracy_mm"} == set(results["majority_class"]["metrics"])
    names = set(get_task("mnli").labels)
    for file in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
        lines = (tmp_path / "run/predictions" / file).read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 11
        assert {line.split("\t")[1] for line in lines[1:]} <= names


def test_own_data_keeps_its_labels_and_an_own_model_is_evaluated_again(base, tmp_path):
    files = {}
    for seed, (name, rows) in enumerate({"train": 24, "validation": 12}.items()):
        texts, praises = tiny.sentences(rows, seed)
        labels = np.where(praises, "good", "bad")
        rows = zip(texts, labels, strict=True)
        files[f"{name}_file"] = str(
            tiny.write_table(tmp_path / f"{name}.csv", ("sentence1", "label"), *rows, separator=",")
        )
    first = run(base, tmp_path / "run", task_name=None, data_dir=None, **files)
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    assert saved["id2label"] == {"0": "bad", "1": "good"}
    again = run(
        base,
        tmp_path / "again",
        model_name_or_path=str(tmp_path / "run/model"),
        task_name=None,
        data_dir=None,
        do_eval=True,
        validation_file=files["validation_file"],
    )
    assert again["final"]["metrics"] == first["final"]["metrics"] and "steps" not in again


def test_regression_and_evaluation_every_few_steps(base, tmp_path):
    changes = {"task_name": "stsb", "data_dir": "builtin", "max_train_samples": 32, "max_eval_samples": 20}
    results = run(base, tmp_path / "run", max_steps=5, eval_steps=2, **changes)
    assert results["main_metric"] == "combined_score" and results["num_labels"] == 1
    evaluations = [r["step"] for r in run_folder.read_metrics(tmp_path / "run") if "eval" in r]
    assert evaluations == [2, 4, 5]
