"""People's own files in every format, against the standard library's writers, and everything that can be wrong."""

import concurrent.futures
import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from test_readers import SHARED, needs_shared, row, write

from pats_jax.data.own_files import load_files, read_file, read_texts
from pats_jax.data.readers import read_glue
from pats_jax.errors import InputError

ROWS = [{"sentence1": 'say "no", twice', "sentence2": "a\u2028b", "label": "spam"}]
ROWS += [{"sentence1": "two", "sentence2": "", "label": "ham"}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows by the standard library's own writers."""
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    if path.suffix == ".tsv":
        return write(path, row(*rows[0]), *(row(*r.values()) for r in rows))
    return write(path, *(json.dumps(r) for r in rows))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_the_same_rows_are_read_from_every_format(tmp_path, suffix):
    split = read_file(write_rows(tmp_path / f"data.{suffix}", ROWS))
    assert split.sentence1 == ['say "no", twice', "two"] and split.sentence2 == ["a\u2028b", ""]
    assert split.label_names == ("ham", "spam") and split.labels.tolist() == [1, 0]
    assert split.labels.dtype == np.int32 and split.ids == ["0", "1"]


def test_csv_fields_may_hold_line_feeds_and_lines_are_still_counted(tmp_path):
    text = 'sentence,label\n"two\nlines",a\n\nlast,b\n'
    path = tmp_path / "train.csv"
    path.write_text(text)
    assert read_file(path).sentence1 == ["two\nlines", "last"]
    path.write_text(text + "extra,a,b\n")
    with pytest.raises(InputError, match=r"train.csv:6: expected 2 columns separated by commas, got 3"):
        read_file(path)
    path.write_text('sentence,label\na,x\n"never closed,y\nb,z\n')
    with pytest.raises(InputError, match=r"train.csv:4: not valid CSV"):
        read_file(path)


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (["premise", "hypothesis"], ("premise", "hypothesis")),
        (["hypothesis", "premise"], ("premise", "hypothesis")),
        (["question", "sentence"], ("question", "sentence")),
        (["sentence1", "sentence2"], ("sentence1", "sentence2")),
        (["text"], ("text",)),
        (["sentence"], ("sentence",)),
        (["sentence1"], ("sentence1",)),
    ],
)
def test_text_columns_are_found_by_their_usual_names(tmp_path, columns, texts):
    split = read_file(write_rows(tmp_path / "data.csv", [{name: name for name in [*columns, "other"]}]))
    assert split.sentence1 == [texts[0]]
    assert split.sentence2 == ([texts[1]] if len(texts) == 2 else None)
    assert split.labels is None and split.label_names is None


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),
        ([10, 9, 9], ("9", "10"), [1, 0, 0]),
        (["1", "x", "0.5"], ("0.5", "1", "x"), [1, 2, 0]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        ([1.5, 2, 3], None, [1.5, 2.0, 3.0]),
        (["1.0", "-2e1", "3"], None, [1.0, -20.0, 3.0]),
        ([None, None, None], None, None),
    ],
)
def test_labels_are_found_and_sorted(tmp_path, labels, names, values):
    rows = [{"text": "t", "label": label} for label in labels]
    split = read_file(write_rows(tmp_path / "data.jsonl", rows))
    assert split.label_names == names
    assert (None if split.labels is None else split.labels.tolist()) == values


def test_files_of_one_task_share_the_labels_of_the_training_file(tmp_path):
    write(tmp_path / "train.tsv", row("label", "text"), "b\tx", "a\ty", "c\tz")
    write(tmp_path / "dev.tsv", row("id", "text", "label"), "d7\tx\tc")
    write(tmp_path / "test.tsv", "text", "x")
    names = {"validation": "dev.tsv", "train": "train.tsv", "test": "test.tsv"}
    splits = load_files({name: tmp_path / file for name, file in names.items()})
    assert list(splits) == list(names)
    assert {split.label_names for split in splits.values()} == {("a", "b", "c")}
    assert splits["validation"].labels.tolist() == [2] and splits["validation"].ids == ["d7"]
    assert splits["test"].labels is None


def test_scores_in_the_training_file_make_every_file_scores(tmp_path):
    write(tmp_path / "train.tsv", row("text", "score"), "x\t0.5", "y\t1")
    write(tmp_path / "dev.tsv", row("text", "score"), "x\t1", "y\t2")
    splits = load_files({"train": tmp_path / "train.tsv", "validation": tmp_path / "dev.tsv"})
    assert splits["validation"].labels.tolist() == [1.0, 2.0] and splits["validation"].labels.dtype == np.float32
    write(tmp_path / "dev.tsv", row("text", "score"), "x\t1", "y\thigh")
    with pytest.raises(InputError, match=r"dev.tsv:3: the score 'high' is not a number"):
        load_files({"train": tmp_path / "train.tsv", "validation": tmp_path / "dev.tsv"})


def test_labels_of_a_saved_model_are_kept_in_its_order(tmp_path):
    path = write(tmp_path / "dev.tsv", row("text", "label"), "x\tgood", "y\tbad")
    splits = load_files({"validation": path}, label_names=["good", "bad"])
    assert splits["validation"].labels.tolist() == [0, 1] and splits["validation"].label_names == ("good", "bad")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("d.csv", ["body,label", "x,1"], r"d.csv:1: no text column among 'body', 'label'; name it sentence"),
        ("d.tsv", ["text\tlabel", "x\t1", "y\t1"], r"d.tsv: every row has the label '1'"),
        ("d.tsv", ["text\tlabel", "x\t1", "y\t", "z\t2"], r"d.tsv:3: the label is empty"),
        ("d.jsonl", ['{"text": "x"}', "{"], r"d.jsonl:2: not valid JSON"),
        ("d.jsonl", ['["x"]'], r"d.jsonl:1: expected a JSON object"),
        ("d.jsonl", ['{"text": "x"}', '{"label": 1}'], r"d.jsonl:2: no key 'text', but line 1 has it"),
        ("d.jsonl", ['{"text": ["x"]}'], r"d.jsonl:1: 'text' is a list, not a string"),
        ("d.xlsx", ["x"], r"d.xlsx: unknown file type '.xlsx'; use .csv, .tsv, .parquet or .jsonl"),
        ("d.csv", ["text,label"], r"d.csv: no rows below the header"),
        ("d.jsonl", [], r"d.jsonl: the file is empty"),
    ],
)
def test_a_wrong_file_of_ones_own_is_one_line(tmp_path, name, lines, message):
    path = write(tmp_path / name, *lines)
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    train = write(tmp_path / "train.tsv", row("text", "label"), "x\tyes", "y\tno")
    dev = write(tmp_path / "dev.tsv", row("text", "label"), "x\tyes", "y\tmaybe")
    with pytest.raises(InputError, match=r"dev.tsv:3: unknown label 'maybe'; the labels are 'no', 'yes'"):
        load_files({"train": train, "validation": dev})
    pairs = write(tmp_path / "dev.tsv", row("sentence1", "sentence2", "label"), "x\ty\tno")
    with pytest.raises(InputError, match=r"dev.tsv: has pairs of texts, but .*train.tsv has single texts"):
        load_files({"train": train, "validation": pairs})
    bare = write(tmp_path / "dev.tsv", "text", "x")
    with pytest.raises(InputError, match=r"dev.tsv: no labels for the validation data; name their column label"):
        load_files({"train": train, "validation": bare})
    with pytest.raises(InputError, match=r"nowhere.csv: no such file"):
        read_file(tmp_path / "nowhere.csv")


@needs_shared
def test_the_mnli_sample_is_read_as_ones_own_csv():
    splits = load_files({"train": SHARED / "MNLI/train_sample.csv", "validation": SHARED / "MNLI/dev_matched.csv"})
    assert {name: len(split) for name, split in splits.items()} == {"train": 3345, "validation": 9815}
    assert splits["train"].label_names == ("contradiction", "entailment", "neutral")
    # The published distribution of MNLI's matched development set.
    assert np.bincount(splits["validation"].labels).tolist() == [3213, 3479, 3123]


def test_texts_to_predict_on_need_no_labels_and_ignore_those_there_are(tmp_path):
    texts = read_texts(write(tmp_path / "t.txt", "one", "", 'say "x"\tand y'))
    assert texts.sentence1 == ["one", "", 'say "x"\tand y'] and texts.sentence2 is None and texts.labels is None
    pairs = read_texts(write_rows(tmp_path / "t.csv", ROWS))
    assert pairs.sentence2 == ["a\u2028b", ""] and pairs.labels is None
    with pytest.raises(InputError, match="no text column"):
        read_texts(write(tmp_path / "t.tsv", "no header here", "two"))


@pytest.mark.parametrize(
    ("name", "lines", "twice"),
    [
        ("d.csv", ["sentence,label,sentence", "a,1,b"], "1: two columns are named 'sentence'"),
        ("d.csv", ["", "sentence,label,label", "a,1,2"], "2: two columns are named 'label'"),
        ("d.csv", ["sentence,label,id,id", "a,1,2,3"], "1: two columns are named 'id'"),
        ("d.tsv", [row("label", "text", "label"), row(1, "a", 2)], "1: two columns are named 'label'"),
        ("d.jsonl", ['{"text": "a"}', '{"text": "b", "text": "c"}'], "2: two keys are named 'text'"),
        ("d.json", ['[{"text": "a", "label": 1, "label": 2}]'], ", row 1: two keys are named 'label'"),
    ],
)
def test_two_columns_of_one_name_are_an_error(tmp_path, name, lines, twice):
    path = write(tmp_path / name, *lines)
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}{'' if twice[0] == ',' else ':'}{twice}")


def random_text(rng: random.Random) -> str:
    """Text with everything that quoting and parting of lines can stumble over, now and then very long."""
    pieces = [
        '"',
        '""',
        ",",
        "\n",
        "\n\n",
        " ",
        "'",
        "\\",
        "\u2028",
        "\x85",
        "\x1c",
        "é",
        "😀",
        "\x00",
        "nan",
        "[",
        "{",
    ]
    text = "".join(rng.choice([*pieces, "word"]) for _ in range(rng.randrange(12)))
    return text + "x" * 140_000 if rng.random() < 0.02 else text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "lines.json"])
def test_random_tables_are_read_as_the_standard_library_wrote_them(tmp_path, suffix):
    rng, limit = random.Random(suffix), csv.field_size_limit()
    for case in range(25):
        rows = [
            {"id": f"q{n}", "premise": random_text(rng), "other": random_text(rng), "hypothesis": random_text(rng)}
            for n in range(rng.randrange(1, 12))
        ]
        labels = [rng.choice(["yes", "no"]) for _ in rows]
        labels[0], labels[-1] = "yes", "no" if len(rows) > 1 else "yes"
        if suffix == "tsv":
            rows = [{key: " ".join(cell.split("\n")) for key, cell in r.items()} for r in rows]
        rows = [r | {"label": label} for r, label in zip(rows, labels, strict=True)]
        path = tmp_path / f"{case}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(rows, ensure_ascii=case % 2 == 0, indent=case % 3 or None), encoding="utf-8")
        elif suffix in ("jsonl", "lines.json"):
            blank = ["\n" * rng.randrange(3) for _ in rows]
            write(path, *(before + json.dumps(r) for before, r in zip(blank, rows, strict=True)), "", " ")
        else:
            write_rows(path, rows)
        split = read_file(path, label_names=["no", "yes"])
        assert split.sentence1 == [r["premise"] for r in rows] and split.sentence2 == [r["hypothesis"] for r in rows]
        assert split.ids == [r["id"] for r in rows] and [("no", "yes")[x] for x in split.labels] == labels
        assert read_texts(path).sentence2 == split.sentence2
    assert csv.field_size_limit() == limit, "the limit is the whole process's"


def test_long_fields_in_threads_and_the_limit_after_an_error(tmp_path):
    limit = csv.field_size_limit()
    path = write_rows(tmp_path / "d.csv", [{"text": "x" * 200_000, "label": n} for n in range(3)] * 2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        splits = list(pool.map(read_file, [path] * 16))
    assert all(len(split.sentence1[0]) == 200_000 for split in splits)
    with pytest.raises(InputError, match="got 3"):
        read_file(write(tmp_path / "bad.csv", "text,label", "a,b,c"))
    assert csv.field_size_limit() == limit


DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{', r"d.jsonl:3: not valid JSON"),
        ("d.jsonl", '{"text": "a"}\n\n[1]', r"d.jsonl:3: expected a JSON object on every line"),
        ("d.jsonl", '{"text": "a"}\n{"text": ' + DEEP, r"d.jsonl:2: not valid JSON \(nested too deeply\)"),
        ("d.jsonl", '{"text": "a"}\n{"text": ' + LONG + "}", r"d.jsonl:2: not valid JSON \(a number is too long\)"),
        (
            "d.jsonl",
            '{"text": "a"}\n{"text": "a", "label": 1}',
            r"d.jsonl:2: the key 'label' is not in line 1;",
        ),
        ("d.jsonl", '{"text": "a"}\n{"text": "a\x00"}', r"d.jsonl:2: not valid JSON \(Invalid control character"),
        ("d.json", DEEP, r"d.json: not valid JSON \(nested too deeply\)"),
        ("d.json", '[{"text": "a"},\n {"text": "b"}', r"d.json: not valid JSON \(Expecting ',' delimiter, line 2\)"),
        ("d.json", '[{"text": "a"}, "b"]', r"d.json, row 2: expected a JSON object in every row"),
        ("d.json", '[{"text": "a"}, {"label": "b"}]', r"d.json, row 2: no key 'text', but row 1 has it"),
        ("d.json", '[{"text": "a"}, {"text": {}}]', r"d.json, row 2: 'text' is an object, not a string"),
        ("d.json", " [ ]", r"d.json: no rows$"),
        ("d.json", "null", r"d.json:1: expected a JSON object"),
        (
            "d.jsonl",
            '{"text": "a"}\n{"text": "b\\ud800"}',
            r"d.jsonl:2: 'text': \\ud800 is a lone surrogate, which",
        ),
        ("d.json", '[{"text": "a\\udfff", "label": 1}]', r"d.json, row 1: 'text': \\udfff is a lone surrogate"),
        ("d.jsonl", '{"text": "a", "label": "\\ud83d"}', r"d.jsonl:1: 'label': \\ud83d is a lone surrogate"),
        ("d.jsonl", '{"text": "a", "id": "\\ud83d"}', r"d.jsonl:1: 'id': \\ud83d is a lone surrogate"),
    ],
)
def test_json_that_is_wrong_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_two_halves_of_a_character_are_one(tmp_path):
    assert read_file(write(tmp_path / "d.jsonl", r'{"text": "\ud83d\ude00"}')).sentence1 == ["\U0001f600"]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.json", "d.txt"])
def test_only_regular_files_are_read_and_links_to_them(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        read_texts(path)  # would wait for a writer
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        read_texts(path)
    path.unlink()
    there = write_rows(tmp_path / f"there{path.suffix}", [{"text": "a"}]) if name != "d.txt" else tmp_path / "there.txt"
    there.exists() or there.write_text("a\n")
    path.symlink_to(there)
    assert read_texts(path).sentence1 == ["a"]


def test_paths_that_no_system_has(tmp_path):
    for path in ("x" * 300 + ".csv", "a\0b.csv"):
        with pytest.raises(InputError):
            read_file(path)
        with pytest.raises(InputError):
            read_glue("rte", path)
    (tmp_path / "RTE").mkdir()
    os.mkfifo(tmp_path / "RTE/train.tsv")
    with pytest.raises(InputError, match="RTE/train.tsv: not a regular file"):
        read_glue("rte", tmp_path, splits=["train"])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize(
    "labels",
    [{}, {"label": "maybe"}, {"label": ""}, {"label": "-1"}, {"gold_label": "-"}, {"score": "0.5"}, {"target": "x"}],
    ids=str,
)
def test_a_test_file_may_have_any_label_column_or_none(tmp_path, suffix, labels):
    train = write_rows(tmp_path / "train.csv", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    test = write_rows(tmp_path / f"test.{suffix}", [{"text": t, "id": t} | labels for t in ("c", "d")])
    split = load_files({"train": train, "test": test})["test"]
    assert split.sentence1 == split.ids == ["c", "d"]  # every row, that of the label "-" too: each gets a prediction
    assert split.labels is None and split.label_names == ("no", "yes")
    assert load_files({"test": test}, label_names=("a", "b"))["test"].label_names == ("a", "b")


def test_some_rows_of_a_test_file_may_have_labels(tmp_path):
    path = write(tmp_path / "test.jsonl", '{"text": "a"}', '{"text": "b", "label": ["x"]}', '{"text": "c", "score": 1}')
    assert load_files({"test": path})["test"].sentence1 == ["a", "b", "c"]


def test_a_test_file_may_have_one_text_a_line_as_for_predict(tmp_path):
    train = write_rows(tmp_path / "train.csv", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    test = write(tmp_path / "test.txt", "one", "two")
    split = load_files({"train": train, "test": test})["test"]
    assert split.sentence1 == ["one", "two"] and split.label_names == ("no", "yes")
    with pytest.raises(InputError, match=r"test.txt: unknown file type '.txt'; use .csv, .tsv, .parquet or .jsonl"):
        load_files({"train": test})
    with pytest.raises(InputError, match=r"x.xls: unknown file type '.xls'; use .csv, .tsv, .txt, .parquet or .jsonl"):
        load_files({"test": tmp_path / "x.xls"})


def test_all_files_of_a_task_have_the_columns_of_the_training_file(tmp_path):
    train = write_rows(tmp_path / "train.csv", [{"text": "a", "score": "yes"}, {"text": "b", "score": "no"}])
    other = [{"sentence": "wrong", "text": "c", "label": "0.5", "score": "no"}]
    splits = load_files(
        {
            "train": train,
            "validation": write_rows(tmp_path / "dev.jsonl", other),
            "test": write_rows(tmp_path / "test.tsv", other),
        }
    )
    assert splits["validation"].sentence1 == splits["test"].sentence1 == ["c"]
    assert splits["validation"].labels.tolist() == [0]
    # Where they have not, by the names that are usual.
    test = write_rows(tmp_path / "test.tsv", [{"sentence": "d"}])
    assert load_files({"train": train, "test": test})["test"].sentence1 == ["d"]
