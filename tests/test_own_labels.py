"""What labels of people's own files mean: classes or scores, missing cells, what is announced and what is warned of."""

import collections
import csv
import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest

from pats_jax import glue
from pats_jax.data import load_files, read_file
from pats_jax.errors import InputError
from pats_jax.run import flags
from pats_jax.run.settings import Settings


def write(path: Path, labels, header="label") -> Path:
    """A CSV file of one text a row, with these labels."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", header), *((f"text {row}", label) for row, label in enumerate(labels))])
    return path


def told(caplog, level=None) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if level is None or r.levelno == level)


@pytest.fixture(autouse=True)
def at_info(caplog):
    caplog.set_level(logging.INFO, "pats_jax")


# --- missing cells ----------------------------------------------------------------------------------------------------

MISSING = ("", " ", "nan", "NaN", "None", "none", "NULL", "null", "NA", "N/A", "n/a", "<NA>", "#N/A", "-nan", " nan ")
NO_NUMBERS = ("inf", "-inf", "Infinity", "1e999", "-1e39")


@pytest.mark.parametrize("cell", [*MISSING, *NO_NUMBERS])
@pytest.mark.parametrize("labels", [["0.5", "1.25", "3.75"], ["0", "1", "1"]], ids=["scores", "classes"])
@pytest.mark.parametrize("regression", [None, False, True])
def test_one_missing_cell_among_numbers_is_named_with_its_line(tmp_path, labels, cell, regression):
    path = write(tmp_path / "train.csv", [*labels[:2], cell, *labels[2:]])
    with pytest.raises(InputError, match=r"train.csv:4: the (label|score) ") as caught:
        read_file(path, regression=regression)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_the_line_of_a_missing_cell_in_json(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": math.nan}]
    path = tmp_path / "train.json"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"train.json:5: the label is missing \('NaN'\)"):
        read_file(path)
    path.write_text(json.dumps([*rows[:2], {"text": "c", "label": None}], indent=2))
    with pytest.raises(InputError, match=r"train.json, row 3: the label is empty"):
        read_file(path)


@pytest.mark.parametrize("cell", ["None", "NA", "nan"])
def test_among_words_such_a_cell_is_a_class_and_warned_of(tmp_path, caplog, cell):
    split = read_file(write(tmp_path / "train.csv", ["pos", "neg", cell]))
    assert split.label_names == tuple(sorted(["pos", "neg", cell]))
    assert f"train.csv:4: the label '{cell}' is read as a class name" in told(caplog, logging.WARNING)


def test_one_word_among_numbers_is_warned_of(tmp_path, caplog):
    read_file(write(tmp_path / "train.csv", ["0.5", "1", "?", "2.5"]))
    warned = told(caplog, logging.WARNING)
    assert "train.csv:4: the label '?' is not a number, but most labels are" in warned
    assert "4 classes" in told(caplog, logging.INFO)
    with pytest.raises(InputError, match=r"train.csv:4: the score '\?' is not a number"):
        read_file(tmp_path / "train.csv", regression=True)


@pytest.mark.parametrize("word", ["1_000", "0x1", "١", "1,5", "1e", "--1", "1-2"])
def test_what_only_python_takes_for_a_number_is_a_word(tmp_path, word):
    assert read_file(write(tmp_path / "train.csv", ["a", word])).label_names == tuple(sorted(["a", word]))


# --- classes or scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "announced"),
    [
        (["0", "2", "1"], ("0", "1", "2"), "3 classes: 0, 1, 2; for scores, set do_regression"),
        (["1.0", "0.0", "1.0"], ("0.0", "1.0"), "2 classes: 0.0, 1.0; for scores, set do_regression"),
        (["5", "0", "3", "10"], ("0", "3", "5", "10"), "4 classes: 0, 3, 5, 10; for scores, set do_regression"),
        (["1", "1.0", "0"], ("0", "1"), "2 classes: 0, 1; for scores, set do_regression"),
        (["0.5", "0", "5"], None, "scores from 0 to 5; for classes, set do_regression false"),
        (["1e0", "0", "2"], None, "scores from 0 to 2; for classes, set do_regression false"),
        (["ham", "spam"], ("ham", "spam"), "2 classes: ham, spam"),
        (range(12), tuple(map(str, range(12))), "12 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more; for scores"),
    ],
)
def test_what_is_decided_is_announced_in_one_line(tmp_path, caplog, labels, names, announced):
    path = write(tmp_path / "train.csv", labels)
    split = read_file(path)
    assert split.label_names == names
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"{path}: {announced}")
    assert ("set do_regression" in line) == (names is None or names[0].replace(".", "").isdigit())


def test_what_is_said_is_done_and_not_announced(tmp_path, caplog):
    whole, real = write(tmp_path / "whole.csv", [0, 1, 2]), write(tmp_path / "real.csv", ["0.5", "2", "0.5"])
    assert read_file(whole, regression=True).labels.tolist() == [0.0, 1.0, 2.0]
    assert read_file(whole, regression=True).labels.dtype == np.float32
    assert read_file(real, regression=False).label_names == ("0.5", "2")
    assert read_file(real, regression=False).labels.tolist() == [0, 1, 0]
    assert not caplog.records


def test_random_numbers_keep_their_class_or_score(tmp_path, caplog):
    """Against the numbers that the cells were written from, in many spellings."""
    rng = random.Random(0)
    spellings = [str, "{}.0".format, "{}.".format, " {}".format, "+{}".format, "0{}".format]
    for case in range(60):
        values = [rng.randrange(rng.choice([2, 5, 100])) for _ in range(20)] + [0, 1]
        path = write(tmp_path / f"{case}.csv", [rng.choice(spellings)(value) for value in values])
        split = read_file(path)
        classes = sorted(set(values))
        assert list(map(float, split.label_names)) == classes
        assert [classes[label] for label in split.labels] == values
        scores = read_file(path, regression=True)
        assert scores.labels.tolist() == values
        assert f"{path}: {len(classes)} classes: " in told(caplog)


def test_the_files_of_one_task_agree_on_numbers_by_value(tmp_path):
    train = write(tmp_path / "train.csv", ["0", "1", "2"])
    dev = write(tmp_path / "dev.csv", ["2.0", " 0", "1.0"])
    splits = load_files({"train": train, "validation": dev})
    assert splits["validation"].labels.tolist() == [2, 0, 1] and splits["validation"].label_names == ("0", "1", "2")
    with pytest.raises(InputError, match=r"dev.csv:2: unknown label '0.5'; the labels are '0', '1', '2'"):
        load_files({"train": train, "validation": write(dev, ["0.5", "1"])})
    with pytest.raises(InputError, match=r"dev.csv:3: unknown label 'nan'"):
        load_files({"train": train, "validation": write(dev, ["1", "nan"])})
    assert read_file(write(train, ["7", "9" * 5000])).labels.tolist() == [0, 1]  # a name is as long as it is
    # Beyond 2^53 a float no longer tells whole numbers apart.
    large = ["9007199254740992", "9007199254740993"]
    splits = load_files({"train": write(train, large), "validation": write(dev, large[::-1])})
    assert splits["validation"].labels.tolist() == [1, 0]


def test_a_regression_takes_every_file_as_scores(tmp_path, caplog):
    train, dev = write(tmp_path / "train.csv", [0, 1, 2]), write(tmp_path / "dev.csv", [3, 3])
    splits = load_files({"train": train, "validation": dev}, regression=True)
    assert splits["validation"].labels.tolist() == [3.0, 3.0] and splits["train"].label_names is None
    with pytest.raises(InputError, match=r"train.csv: every row has the same label; there is nothing to learn"):
        load_files({"train": write(train, [7, 7]), "validation": dev}, regression=True)
    write(train, ["0.5", "3"])
    assert load_files({"train": train, "validation": dev}, regression=False)["train"].label_names == ("0.5", "3")
    assert load_files({"train": train, "validation": dev})["validation"].labels.tolist() == [3.0, 3.0]


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        (["-1", "0", "-1", "1"], True),
        (["-1.0", "0.0", "1.0", "-1.0"], True),
        (["-1", "0.5", "1", "-1"], True),
        (["-2", "-1", "0", "-1"], False),  # a scale
        (["0", "1", "2", "3"], False),
    ],
)
def test_labels_of_minus_one_are_warned_of(tmp_path, caplog, labels, warned):
    read_file(write(tmp_path / "train.csv", labels))
    assert ("train.csv: 2 rows have the label -1, which often means hidden" in told(caplog)) == warned
    assert bool(told(caplog, logging.WARNING)) == warned


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (["good", "good ", "bad"], "labels differ only in blanks: 'good' and 'good '"),
        (["not good", "not  good"], "labels differ only in blanks: 'not  good' and 'not good'"),
        (["Good", "good", "bad"], "labels differ only in case or blanks: 'Good' and 'good'"),
        (["Good ", "good", "bad"], "labels differ only in case or blanks: 'Good ' and 'good'"),
        (["good", "bad", "goods"], None),
    ],
)
def test_labels_that_look_alike_are_kept_and_warned_of(tmp_path, caplog, labels, what):
    assert read_file(write(tmp_path / "train.csv", labels)).label_names == tuple(sorted(labels))
    warned = told(caplog, logging.WARNING)
    assert (f"train.csv: {what}" in warned) if what else not warned


def test_long_labels_are_cut_in_messages(tmp_path, caplog):
    long = "x" * 100_000
    read_file(write(tmp_path / "train.csv", [long, long + " ", "b"]))
    assert len(told(caplog)) < 2000
    for labels, names in (([long, long], None), ([long, "a"], ("a", "b")), (["0.5", "0", "9" * 100_000], None)):
        with pytest.raises(InputError) as caught:
            read_file(write(tmp_path / "train.csv", labels), label_names=names)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


# --- the flag ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--do_regression"], True),
        (["--do_regression", "true"], True),
        (["--do_regression=TRUE"], True),
        (["--do-regression", "True", "--do_train"], True),
        (["--do_regression", "false"], False),
        (["--do_regression=False"], False),
        (["--do_regression", "FALSE", "--do_train"], False),
        (["--do_regression", "--do_train"], True),
        ([], None),
    ],
)
def test_the_flag_as_people_type_it(typed, expected):
    parsed = flags.parse(["--train_file", "x.csv", *typed], "pats-jax glue", Settings)
    assert parsed.data.do_regression is expected and parsed.do_train == ("--do_train" in typed)


@pytest.mark.parametrize("value", [True, False, None])
def test_the_flag_in_a_saved_run(tmp_path, value):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(Settings(train_file="x.csv", do_regression=value).to_dict()))
    assert flags.parse(["--config", str(config)], "pats-jax glue", Settings).data.do_regression is value
    parsed = flags.parse(["--config", str(config), "--do_regression", "false"], "pats-jax glue", Settings)
    assert parsed.data.do_regression is False
    config.write_text(json.dumps({"do_regression": "false"}))
    with pytest.raises(InputError, match="do_regression is 'false'"):
        flags.read_config(str(config), Settings)


def test_the_flag_must_not_say_otherwise_than_the_task(tmp_path):
    for task, wrong, kind in (("rte", True, "classes"), ("stsb", False, "scores")):
        with pytest.raises(InputError, match=f"--do_regression: the labels of --task_name {task} are {kind}"):
            glue.load_data(Settings(task_name=task, data_dir=str(tmp_path / "none"), do_regression=wrong))


def test_the_flag_reaches_the_readers(tmp_path):
    files = {name: str(write(tmp_path / f"{name}.csv", [0, 1, 2])) for name in ("train", "validation")}
    paths = {f"{name}_file": path for name, path in files.items()}
    kinds = collections.Counter()
    for value in (None, True, False):
        task, splits = glue.load_data(Settings(**paths, do_regression=value))
        kinds[value] = task.num_labels
        assert (splits["validation"].label_names is None) == task.is_regression == (value is True)
    assert kinds == {None: 3, True: 1, False: 3}
