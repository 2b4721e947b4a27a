"""Class weights, label smoothing, schedules and the score that picks a model, against their formulas."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight

from pats_jax import InputError, TextClassifier, TextRegressor, glue, make_loss_fn, make_train_step
from pats_jax.data import get_task, own_task
from pats_jax.methods import OptimizerSettings
from pats_jax.methods.optimizer import learning_rate_schedule
from pats_jax.objectives.row_losses import smoothed_cross_entropy
from pats_jax.programs import cli
from pats_jax.train_state import TrainState
from pats_jax.training.metrics import compute_metrics
from pats_jax.training.task_loss import balanced_weights


def log_softmax(logits):
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def torch_cross_entropy(logits, labels, weights, smoothing):
    """Its documented formula, in float64: both sums are divided by the sum of the rows' weights."""
    costs = -log_softmax(logits.astype(float))
    own = weights[labels]
    plain = np.sum(own * costs[np.arange(len(labels)), labels]) / own.sum()
    spread = np.sum(weights * costs) / own.sum() / logits.shape[1]
    return (1 - smoothing) * plain + smoothing * spread


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [1, 1, 1, 0], [3, 0, 3, 3, 3]])
def test_balanced_weights_are_scikit_learns_and_its_formula(labels):
    labels, occur = np.array(labels), np.unique(labels)
    found = balanced_weights(labels, 4)
    np.testing.assert_allclose(found[occur], compute_class_weight("balanced", classes=occur, y=labels), rtol=1e-6)
    for label in range(4):
        count = int(np.sum(labels == label))
        assert found[label] == pytest.approx(len(labels) / (len(occur) * count) if count else 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_the_step_is_that_of_torchs_formula(smoothing, weighted, accumulation_steps):
    """Loss and gradient of a step, in micro-batches too, by finite differences of the formula."""
    rng = np.random.default_rng(0)
    table, labels = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 2, 1, 0, 0, 2])
    weights = np.array([0.5, 3.0, 1.25]) if weighted else np.ones(3)
    row_loss = smoothed_cross_entropy(smoothing, weights if weighted else None) if smoothing else None
    loss_fn = make_loss_fn(lambda v, input_ids, **_: v["params"]["table"][input_ids[:, 0]], row_loss=row_loss)
    params = {"table": jnp.array(table)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0), key=0)
    batch = {"input_ids": np.arange(6)[:, None], "labels": labels, "weights": weights[labels].astype(np.float32)}
    after, metrics = make_train_step(loss_fn, accumulation_steps=accumulation_steps)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(torch_cross_entropy(table, labels, weights, smoothing), rel=1e-5)
    gradient = table - np.asarray(after.params["table"])
    for place in np.ndindex(table.shape):
        step = np.zeros(table.shape)
        step[place] = 1e-5
        ends = [torch_cross_entropy(table + sign * step, labels, weights, smoothing) for sign in (1, -1)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-6)


def test_smoothing_has_a_range():
    with pytest.raises(ValueError, match="smoothing"):
        smoothed_cross_entropy(1.5)


# schedules

PEAK, TOTAL = 2e-3, 20


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.11, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_the_closed_formulas(kind, warmup_ratio):
    settings = OptimizerSettings(learning_rate=PEAK, warmup_ratio=warmup_ratio, lr_scheduler_type=kind)
    schedule, warmup = learning_rate_schedule(settings, TOTAL), math.ceil(TOTAL * warmup_ratio)
    for step in range(TOTAL):
        if kind == "constant":
            expected = PEAK
        elif step < warmup:
            expected = PEAK * step / warmup
        else:
            x = (step - warmup) / (TOTAL - warmup)
            after = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant_with_warmup": 1.0}
            expected = PEAK * after[kind]
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5, abs=1e-9), step


# the score that picks a model


def test_the_score_that_picks_a_model_need_not_be_one_of_the_task():
    truth, given = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 0, 0, 1])
    own = own_task(("a", "b")).scored_by("macro_f1")
    expected = f1_score(truth, given, average="macro")
    assert own.main_metric == "macro_f1"
    assert compute_metrics(own, given, truth) == {"accuracy": pytest.approx(4 / 6), "macro_f1": pytest.approx(expected)}
    mrpc = get_task("mrpc")
    plain, found = compute_metrics(mrpc, given, truth), compute_metrics(mrpc.scored_by("macro_f1"), given, truth)
    assert found == plain | {"macro_f1": pytest.approx(expected)}  # the mean of the task's two is what it was
    assert compute_metrics(mrpc.scored_by("eval_f1"), given, truth) == plain
    assert mrpc.scored_by("eval_f1").main_metric == "f1"


@pytest.mark.parametrize(
    ("task", "name", "choices"),
    [
        (own_task(("a", "b")), "loss", "accuracy, macro_f1, matthews_correlation"),
        (own_task(None), "accuracy", "pearson, spearmanr, combined_score"),
        (own_task(("a", "b"), is_multi_label=True), "f1", "micro_f1, macro_f1, combined_score, accuracy"),
    ],
)
def test_scores_that_there_are_not(task, name, choices):
    with pytest.raises(InputError, match=f"--metric_for_best_model {name}: choose one of {choices}$"):
        task.scored_by(name)


# the program

TEXTS, PRAISES = tiny.sentences(40, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, and a table in which one class is rare."""
    home = tmp_path_factory.mktemp("home")
    tiny.save_checkpoint(home / "checkpoint", classifier_dropout=0.0)
    rows = [(t, p) for t, p in zip(TEXTS, PRAISES, strict=True)]
    rare = [row for row in rows if row[1]][:6] + [row for row in rows if not row[1]]
    tiny.write_table(home / "own.csv", ("text", "label"), *rare, separator=",")
    tiny.write_table(home / "scores.csv", ("text", "label"), *((t, n / 7) for n, t in enumerate(TEXTS)), separator=",")
    return home


QUICK = {"max_seq_length": 16, "learning_rate": 1e-2, "num_devices": 1, "length_buckets": 1, "max_steps": 4}


def test_weights_smoothing_schedule_and_metric_reach_the_run(home, tmp_path, caplog):
    """The first logged loss, without dropout, is that of the formula at the starting parameters."""
    caplog.set_level("INFO", "pats_jax")
    given = QUICK | {"class_weights": "balanced", "label_smoothing_factor": 0.2, "lr_scheduler_type": "cosine"}
    given |= {"hidden_dropout": 0, "attention_dropout": 0, "logging_steps": 1, "per_device_train_batch_size": 64}
    given |= {"warmup_ratio": 0.25, "metric_for_best_model": "macro_f1", "load_best_model_at_end": True}
    files = {"model_name_or_path": home / "checkpoint", "train_file": home / "own.csv", "output_dir": tmp_path / "run"}
    flags = tiny.flags(**given, **files, validation_file=home / "own.csv")
    cli.main(["train", *flags])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    expected = [0.0, 1e-2, 1e-2 * (1 + math.cos(math.pi / 3)) / 2, 1e-2 * (1 + math.cos(2 * math.pi / 3)) / 2]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # at a rate of 0, and all rows are in every batch
    assert results["main_metric"] == results["diagnosis"]["metric"] == "macro_f1"
    assert {"accuracy", "macro_f1"} == results["final"]["metrics"].keys() == results["majority_class"]["metrics"].keys()
    assert "class weights: 0 0.65, 1 2.17" in caplog.messages
    settings = glue.Settings(**{k: str(v) for k, v in files.items()}, validation_file=str(home / "own.csv"))
    task, splits = glue.load_data(settings)
    model, params, _ = glue.load_model(settings, task, splits)
    encoded = tiny.tokenizer()(
        splits["train"].sentence1, padding=True, truncation=True, max_length=16, return_tensors="np"
    )
    logits = np.asarray(jax.jit(lambda p: model.apply({"params": p}, **encoded))(params))
    weights = compute_class_weight("balanced", classes=np.arange(2), y=splits["train"].labels)
    assert losses[0] == pytest.approx(torch_cross_entropy(logits, splits["train"].labels, weights, 0.2), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"class_weights": "balanced"}, "--class_weights: is for classes, but the labels are scores"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: is for classes, but the labels are scores"),
        ({"metric_for_best_model": "accuracy"}, "--metric_for_best_model accuracy: choose one of pearson, spearmanr"),
    ],
)
def test_what_is_for_classes_is_refused_for_scores(flags, message, home, tmp_path, capsys):
    files = {
        "model_name_or_path": home / "checkpoint",
        "train_file": home / "scores.csv",
        "output_dir": tmp_path / "run",
    }
    assert message in tiny.refused(capsys, "train", *tiny.flags(**QUICK, **files, **flags))
    assert not (tmp_path / "run").exists()


def test_what_nothing_reads_is_refused(home, capsys):
    given = {"model_name_or_path": home / "checkpoint", "validation_file": home / "own.csv", "do_eval": True}
    assert "--class_weights: needs --do_train" in tiny.refused(
        capsys, "train", *tiny.flags(**given), "--class_weights", "balanced"
    )
    given = {"model_name_or_path": home / "checkpoint", "train_file": home / "own.csv", "do_train": True}
    line = tiny.refused(capsys, "train", *tiny.flags(**given), "--metric_for_best_model", "accuracy")
    assert "--metric_for_best_model: needs --do_eval" in line
    line = tiny.refused(capsys, "prime", "--class_weights", "balanced")
    assert "--class_weights: is for `pats-jax train` and `pats-jax glue`; omit it" in line


def test_the_estimators_take_them_by_keyword(home):
    given = {"class_weights": "balanced", "label_smoothing_factor": 0.1, "metric_for_best_model": "macro_f1"}
    one = TextClassifier(str(home / "checkpoint"), **given, lr_scheduler_type="cosine")
    read = one._program_settings("run", {"train_file": "x", "validation_file": "y"})
    assert dataclasses.asdict(read.loss) == {"class_weights": "balanced", "label_smoothing_factor": 0.1}
    assert (read.metric_for_best_model, read.optimizer.lr_scheduler_type) == ("macro_f1", "cosine")
    with pytest.raises(InputError, match="^class_weights: is for classes, but the labels are scores"):
        TextRegressor(str(home / "checkpoint"), class_weights="balanced", num_devices=1).fit(TEXTS, np.arange(40) / 7)
