"""Several labels to a text: reading, loss, scores, checkpoints, and the programs on them."""

import csv
import io
import json

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import tiny
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from pats_jax import InputError, TextClassifier, make_loss_fn, make_train_step, models
from pats_jax.data import Columns, load_files, load_set, own_task, read_file
from pats_jax.data.readers import Split
from pats_jax.models import peft
from pats_jax.programs import cli
from pats_jax.train_state import TrainState
from pats_jax.training import diagnosis, metrics
from pats_jax.training.evaluation import constant_answer, decide

NAMES = ("calm", "loud", "warm")
LISTS = [["warm"], [], ["calm", "warm"], ["loud", "calm"]]
HAS = [[0, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]]
TEXTS = ["ann is warm .", "bob is kind .", "cid is calm and warm .", "dan is loud and calm ."]


def write_csv(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def write_lists(folder):
    """The same rows in every form; CSV as JSON and as pandas write a list."""
    records = [{"text": text, "label": own} for text, own in zip(TEXTS, LISTS, strict=True)]
    tiny.write_lines(folder / "own.jsonl", records)
    (folder / "own.json").write_text(json.dumps(records))
    datasets.Dataset.from_dict({"text": TEXTS, "label": LISTS}).to_parquet(folder / "own.parquet")
    for name, written in {"own.csv": json.dumps, "pandas.csv": str}.items():
        write_csv(folder / name, ("text", "label"), zip(TEXTS, map(written, LISTS), strict=True))
    return folder


# reading


def test_lists_of_every_form_are_the_same_labels(tmp_path, caplog):
    caplog.set_level("INFO", "pats_jax")
    folder = write_lists(tmp_path)
    for name in ("own.jsonl", "own.json", "own.parquet", "own.csv", "pandas.csv"):
        split = read_file(folder / name)
        assert split.is_multi_label and split.label_names == NAMES and split.sentence1 == TEXTS
        assert split.labels.dtype == np.float32 and split.labels.tolist() == HAS, name
        assert f"{folder / name}: several labels to a text; 3 labels: calm, loud, warm" in caplog.messages
    names = datasets.ClassLabel(names=["warm", "loud", "calm"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(names)})
    places = [[names.str2int(name) for name in own] for own in LISTS]
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": places}, features=features)
    data.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    split = load_set(str(tmp_path / "set"), splits=["train"])["train"]
    assert split.label_names == ("warm", "loud", "calm") and split.labels.tolist() == [row[::-1] for row in HAS]


@pytest.mark.parametrize("yes", ["1", "1.0", "True", "true"])
def test_a_column_for_each_label(tmp_path, yes):
    no = {"1": "0", "1.0": "0.0", "True": "False", "true": "false"}[yes]
    rows = [(text, *(yes if one else no for one in row)) for text, row in zip(TEXTS, HAS, strict=True)]
    path = write_csv(tmp_path / "own.csv", ("text", *NAMES), rows)
    for order in ((0, 1, 2), (2, 0, 1)):
        names = tuple(NAMES[k] for k in order)
        split = read_file(path, columns=Columns(labels=names))
        assert split.label_names == names and split.labels.tolist() == [[row[k] for k in order] for row in HAS]
    found = load_files({"train": path, "validation": path}, columns=Columns(labels=NAMES))
    assert found["validation"].labels.tolist() == HAS


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (['["a"]', "b", '["c"]'], r"own.csv:3: 'label' has lists of labels, but here 'b' is no list"),
        (['["a"]', "", '["c"]'], r"own.csv:3: .* the cell is empty; write \[\] for no label"),
        (['["a"]', '["b", "b"]'], r"own.csv:3: a label is there twice"),
        (['["a"]', "[]"], r"own.csv: only 'a' occurs; at least two labels are needed"),
        (['["a", "b"]'] * 2, r"own.csv: every row has the same label"),
    ],
)
def test_what_is_wrong_with_lists(tmp_path, labels, message):
    path = write_csv(tmp_path / "own.csv", ("text", "label"), (("x", label) for label in labels))
    with pytest.raises(InputError, match=message) as caught:
        load_files({"train": path})
    assert "\n" not in str(caught.value)


def test_the_files_of_a_task_agree(tmp_path):
    folder = write_lists(tmp_path)
    other = write_csv(tmp_path / "dev.csv", ("text", "label"), [("x", '["odd"]')])
    with pytest.raises(InputError, match=r"dev.csv:2: unknown label 'odd'; the labels are 'calm', 'loud', 'warm'"):
        load_files({"train": folder / "own.csv", "validation": other})
    plain = write_csv(tmp_path / "plain.csv", ("text", "label"), [("x", "calm"), ("y", "warm")])
    with pytest.raises(InputError, match=r"plain.csv: has a label a row, but .*own.csv has lists of labels"):
        load_files({"train": folder / "own.csv", "validation": plain})
    with pytest.raises(InputError, match="own.csv: do_regression: a text has several labels"):
        read_file(folder / "own.csv", regression=True)
    path = write_csv(tmp_path / "columns.csv", ("text", "a", "b"), [("x", 1, 2)])
    with pytest.raises(InputError, match=r"columns.csv:2: 'b' is '2'; with several columns, 0 or 1"):
        read_file(path, columns=Columns(labels=("a", "b")))


# loss and scores


def test_a_gradient_step_is_that_of_the_sigmoid_cross_entropy():
    rng = np.random.default_rng(0)
    table, labels = rng.normal(size=(5, 3)).astype(np.float32), rng.integers(0, 2, (5, 3)).astype(np.float32)
    weights = np.array([1, 1, 1, 1, 0], np.float32)  # the last row is filler
    loss_fn = make_loss_fn(lambda v, input_ids, **_: v["params"]["table"][input_ids[:, 0]])
    state = TrainState.create(apply_fn=None, params={"table": jnp.array(table)}, tx=optax.sgd(1.0), key=0)
    batch = {"input_ids": np.arange(5)[:, None], "labels": labels, "weights": weights}
    after, found = make_train_step(loss_fn)(state, batch)
    shares = scipy.special.expit(table.astype(float))
    costs = -(labels * np.log(shares) + (1 - labels) * np.log1p(-shares))
    assert float(found["loss"]) == pytest.approx(costs[:4].mean(), rel=1e-6)
    assert float(found["loss"]) == pytest.approx(
        float(optax.sigmoid_binary_cross_entropy(table[:4], labels[:4]).mean()), rel=1e-6
    )
    expected = np.where(weights[:, None] > 0, shares - labels, 0) / 12
    np.testing.assert_allclose(table - np.asarray(after.params["table"]), expected, atol=1e-6)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth = (rng.random((200, 4)) < [0.5, 0.2, 0.9, 0.0]).astype(np.float32)  # one label never occurs
    logits = (3 * truth - 1.5 + 2 * rng.normal(size=truth.shape)).astype(np.float32)
    task = own_task(("a", "b", "c", "d"), is_multi_label=True)
    given = decide(logits, task)
    assert np.array_equal(given, (scipy.special.expit(logits) > 0.5).astype(int))
    found = metrics.compute_metrics(task, given, truth)
    micro, macro = (f1_score(truth, given, average=kind, zero_division=0.0) for kind in ("micro", "macro"))
    assert found == pytest.approx({"micro_f1": micro, "macro_f1": macro, "combined_score": (micro + macro) / 2})
    assert task.main_metric == "micro_f1"
    assert metrics.compute_metrics(task.scored_by("accuracy"), given, truth)["accuracy"] == accuracy_score(truth, given)
    assert constant_answer(truth, task).tolist() == [int(x > 0.5) for x in truth.mean(0)]


def test_the_examination_is_scikit_learns_and_its_interval_that_of_drawn_rows():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, (60, 3)).astype(np.float32)
    logits = (2 * truth - 1 + rng.normal(size=truth.shape)).astype(np.float32)
    split = Split(["x"] * 60, None, truth, [str(row) for row in range(60)], NAMES)
    found = diagnosis.examine_logits(logits, split, own_task(NAMES, is_multi_label=True))
    record, given = found.record(), (logits > 0).astype(int)
    for one, *figures in zip(record["classes"], *precision_recall_fscore_support(truth, given), strict=True):
        assert [one[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(figures)
    assert record["exact_match"] == accuracy_score(truth, given)
    assert record["loss"] == pytest.approx(float(optax.sigmoid_binary_cross_entropy(logits, truth).mean()), rel=1e-5)
    rows = rng.integers(0, 60, (2000, 60))  # resamples by their definition
    hits, both = ((x[rows]).sum(axis=1) for x in (truth * given, truth + given))  # (resamples, labels)
    drawn = {"micro_f1": 2 * hits.sum(1) / both.sum(1), "macro_f1": (2 * hits / both).mean(1)}
    for name, scores in drawn.items():
        low, high = metrics.bootstrap_interval((name,), given, truth, 0.95, 2000)
        np.testing.assert_allclose([low, high], np.quantile(scores, [0.025, 0.975]), atol=0.015)
    assert record["interval"]["low"] < record["score"] == record["micro_f1"] < record["interval"]["high"]
    worst = list(csv.DictReader(io.StringIO(found.tables()["largest_losses.tsv"]), delimiter="\t"))
    assert [int(row["index"]) for row in worst] == np.argsort(-found.losses, kind="stable")[:20].tolist()


# the programs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on texts with several labels: the words that are in them."""
    home = tmp_path_factory.mktemp("run")
    tiny.save_checkpoint(home / "checkpoint")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(48):
        own = [str(word) for word in rng.permutation(NAMES)[: rng.integers(0, 3)]]
        rows.append({"text": f"{rng.choice(tiny.NAMES)} is {' and '.join(own or ['kind'])} .", "label": own})
    tiny.write_lines(home / "train.jsonl", rows)
    (home / "new.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    flags = {"max_seq_length": 16, "learning_rate": 2e-2, "num_devices": 1, "length_buckets": 1, "num_train_epochs": 12}
    flags |= {"per_device_train_batch_size": 16, "save_steps": 0, "validation_split_percentage": 25}
    files = {"train_file": home / "train.jsonl", "test_file": home / "new.txt", "output_dir": home / "out"}
    cli.main(["train", *tiny.flags(**flags, **files, model_name_or_path=home / "checkpoint")])
    return home


def table(text):
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def test_it_learns_and_is_saved_as_what_it_is(run):
    results = json.loads((run / "out" / "results.json").read_text())
    assert results["final"]["metrics"].keys() == {"micro_f1", "macro_f1", "combined_score"}
    assert results["final"]["metrics"]["micro_f1"] > results["majority_class"]["metrics"]["micro_f1"] + 0.3
    config = json.loads((run / "out" / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    assert config["label2id"] == {name: index for index, name in enumerate(NAMES)}


def test_predictions_are_the_labels_above_one_half(run, capsys):
    capsys.readouterr()
    cli.main(["predict", str(run / "out"), "--file", str(run / "new.txt")])
    rows = table(capsys.readouterr().out)
    expected = scipy.special.expit(tiny.reference_logits(run / "out" / "model", TEXTS, max_length=16))
    np.testing.assert_allclose([[float(row[name]) for name in NAMES] for row in rows], expected, atol=1e-5)
    assert [row["sentence1"] for row in rows] == TEXTS
    said = [", ".join(np.array(NAMES)[shares > 0.5]) for shares in expected]
    assert [row["prediction"] for row in rows] == said
    assert [row["prediction"] for row in table((run / "out" / "predictions" / "test.tsv").read_text())] == said
    shares = table((run / "out" / "predictions" / "probabilities" / "test.tsv").read_text())
    np.testing.assert_allclose([[float(row[name]) for name in NAMES] for row in shares], expected, atol=1e-4)


def quick(run, **changes):
    flags = {"max_seq_length": 16, "num_devices": 1, "length_buckets": 1, "max_steps": 1, "learning_rate": 1e-30}
    flags |= {"model_name_or_path": run / "out" / "model", "per_device_train_batch_size": 16, "save_steps": 0}
    return tiny.flags(**flags | changes)


def test_a_checkpoint_goes_on_with_its_head_in_its_order(run, tmp_path):
    """A new training keeps head and order, whatever order the new data has; evaluation alone gives the same scores."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    order = NAMES[::-1]
    rows = [(line["text"], *(int(name in line["label"]) for name in order)) for line in lines]
    path = write_csv(tmp_path / "own.csv", ("text", *order), rows)
    files = {"train_file": path, "validation_file": path, "label_column_name": order, "output_dir": tmp_path / "again"}
    cli.main(["train", *quick(run, **files)])
    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (run / "out", tmp_path / "again"))
    np.testing.assert_allclose(new["classifier.weight"], old["classifier.weight"], atol=1e-6)
    cli.main(["train", *quick(run, **files | {"train_file": None, "output_dir": tmp_path / "scored"}), "--do_eval"])
    trained, scored = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("again", "scored"))
    assert trained["final"]["metrics"] == pytest.approx(scored["final"]["metrics"])
    assert scored["final"]["metrics"]["micro_f1"] > scored["majority_class"]["metrics"]["micro_f1"] + 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"class_weights": "balanced"}, "--class_weights: is for classes, but a text has several labels"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: is for classes, but a text has several labels"),
        ({"method": "r3f"}, "--method r3f: compares probabilities of classes, but a text has several labels"),
        ({"low_resource": 8}, "--low_resource: is for one label a text"),
        ({"metric_for_best_model": "f1"}, "--metric_for_best_model f1: choose one of micro_f1, macro_f1"),
    ],
)
def test_what_is_for_one_label_is_refused(flags, message, run, tmp_path, capsys):
    files = {"train_file": run / "train.jsonl", "output_dir": tmp_path / "run"}
    assert message in tiny.refused(capsys, "train", *quick(run, **files | flags))


def test_heads_for_one_label_and_for_several_are_not_mixed(run, tmp_path, capsys):
    one = tiny.save_checkpoint(tmp_path / "one", 3)
    line = tiny.refused(capsys, "train", *quick(run, model_name_or_path=one, train_file=run / "train.jsonl"))
    assert "its head predicts one label to a text, but several are needed; start a new one with" in line
    plain = write_csv(tmp_path / "own.csv", ("text", "label"), [(t, NAMES[n % 3]) for n, t in enumerate(TEXTS * 6)])
    line = tiny.refused(capsys, "train", *quick(run, train_file=plain))
    assert "predicts several labels to a text cannot be used here" in line


def test_the_estimator_takes_lists_of_labels(run, tmp_path):
    """It loads a run's model, and trains on lists as the program does on a file with the same rows."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    texts, lists = [line["text"] for line in lines], [line["label"] for line in lines]
    loaded = TextClassifier.load(run / "out" / "model")
    shares = scipy.special.expit(tiny.reference_logits(run / "out" / "model", texts, max_length=16))
    np.testing.assert_allclose(loaded.predict_proba(texts), shares, atol=1e-5)
    assert loaded.predict(texts) == [[NAMES[k] for k in np.flatnonzero(row > 0.5)] for row in shares]
    truth, given = ([[name in own for name in NAMES] for own in rows] for rows in (lists, loaded.predict(texts)))
    assert loaded.score(texts, lists) == accuracy_score(truth, given)
    scores = loaded.evaluate(texts, [set(own) for own in lists])
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, given, average="macro"))

    quick = {"max_seq_length": 16, "num_devices": 1, "max_steps": 2, "per_device_train_batch_size": 16}
    ours = TextClassifier(str(run / "checkpoint"), **quick).fit(texts, lists)
    files = {"train_file": run / "train.jsonl", "output_dir": tmp_path / "run"}
    cli.main(["train", *tiny.flags(**quick, **files, model_name_or_path=run / "checkpoint")])
    theirs = load_file(tmp_path / "run" / "model" / "model.safetensors")
    mine = load_file(ours.model_folder_.path / "model.safetensors")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert ours.classes_.tolist() == list(NAMES)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([["a"], "b"], "labels, row 1: 'b': must be a list of labels, as row 0 is"),
        ([["a"], [0.5]], r"labels, row 1: \[0.5\]: must be a list of strings or whole numbers"),
        ([["a"], ["b", "b"]], "labels, row 1: .* a label is there twice"),
        ([["a"], []], "labels: only one class, 'a'"),
    ],
)
def test_lists_that_are_none(lists, message):
    with pytest.raises(InputError, match=message):
        TextClassifier().fit(["x", "y"], lists)


def test_adapters_are_saved_and_loaded_with_several_labels(run, tmp_path):
    model, params, config = models.from_pretrained(run / "out" / "model", num_labels=None)
    assert config.is_multi_label
    model, params = peft.add_peft(model, params, peft.LoraConfig(rank=1), key=0)
    peft.save_peft(tmp_path / "adapter", model=model, params=params, base_model_name_or_path=str(run / "out" / "model"))
    again, of_again, config = peft.load_peft_model(tmp_path / "adapter")
    assert config.is_multi_label and config.id2label == dict(enumerate(NAMES))
    encoded = dict(tiny.tokenizer()(TEXTS, padding=True, return_tensors="np"))
    first, second = (
        jax.jit(lambda p, network=network: network.apply({"params": p}, **encoded))(p)
        for network, p in ((model, params), (again, of_again))
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
