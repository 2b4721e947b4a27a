"""The readers on files laid out as each source lays them out, quirks included, and on everything that can be wrong."""

import concurrent.futures
import csv
import json
import os
import random
from pathlib import Path

import datasets
import numpy as np
import pytest

from pats_jax.data import readers
from pats_jax.data.own_files import load_files, read_file, read_texts
from pats_jax.data.readers import Split, load_task, read_glue, read_hub
from pats_jax.data.tasks import TASKS
from pats_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "glue"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real GLUE files are not at {SHARED}")


def write(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def row(*cells) -> str:
    return "\t".join(map(str, cells))


# --- the GLUE distribution --------------------------------------------------------------------------------------------

# Header and one row of each file as GLUE publishes them, and what is to be read: texts, label (None: none), index.
MNLI_TEXTS = ("promptID", "pairID", "genre", "binary1", "binary2", "parse1", "parse2")
MNLI_HEADER = row("index", *MNLI_TEXTS, "sentence1", "sentence2")
STSB_HEADER = row("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2")
NLI_HEADER = row("index", "sentence1", "sentence2")
FILES = [
    ("cola", "CoLA/train.tsv", None, row("gj04", 0, "*", "Them ran."), ("Them ran.",), 0, "0"),
    ("cola", "CoLA/test.tsv", row("index", "sentence"), row(7, "They ran."), ("They ran.",), None, "7"),
    ("sst2", "SST-2/dev.tsv", row("sentence", "label"), row("so good ", 1), ("so good ",), 1, "0"),
    ("sst2", "SST-2/test.tsv", row("index", "sentence"), row(3, "bad"), ("bad",), None, "3"),
    (
        "mrpc",
        "MRPC/train.tsv",
        "\ufeff" + row("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        row(1, 70, 71, 'He said " yes .', '" Yes , he said .'),
        ('He said " yes .', '" Yes , he said .'),
        1,
        "0",
    ),
    (
        "mrpc",
        "MRPC/test.tsv",
        row("index", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        row(4, 70, 71, "One .", "Two ."),
        ("One .", "Two ."),
        None,
        "4",
    ),
    (
        "mrpc",
        "MRPC/msr_paraphrase_test.txt",
        "\ufeff" + row("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        row(0, 70, 71, "One .", "Two ."),
        ("One .", "Two ."),
        0,
        "0",
    ),
    (
        "stsb",
        "STS-B/dev.tsv",
        row(STSB_HEADER, "score"),
        row(9, "news", "MSRpar", 2012, "0001", "none", "none", "A.", "B.", "3.800"),
        ("A.", "B."),
        np.float32(3.8),
        "9",
    ),
    (
        "stsb",
        "STS-B/test.tsv",
        STSB_HEADER,
        row(9, "news", "MSRpar", 2012, "0001", "none", "none", "A.", "B."),
        ("A.", "B."),
        None,
        "9",
    ),
    (
        "qqp",
        "QQP/train.tsv",
        row("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        row(133273, 213221, 213222, "How?", "Why?", 0),
        ("How?", "Why?"),
        0,
        "133273",
    ),
    ("qqp", "QQP/test.tsv", row("id", "question1", "question2"), row(5, "How?", ""), ("How?", ""), None, "5"),
    (
        "mnli",
        "MNLI/train.tsv",
        row(MNLI_HEADER, "label1", "gold_label"),
        row(2, *MNLI_TEXTS, "P", "H", "entailment", "neutral"),
        ("P", "H"),
        1,
        "2",
    ),
    (
        "mnli",
        "MNLI/dev_matched.tsv",
        row(MNLI_HEADER, "label1", "label2", "label3", "label4", "label5", "gold_label"),
        row(2, *MNLI_TEXTS, "P", "H", *["neutral"] * 5, "contradiction"),
        ("P", "H"),
        2,
        "2",
    ),
    ("mnli", "MNLI/test_matched.tsv", MNLI_HEADER, row(2, *MNLI_TEXTS, "P", "H"), ("P", "H"), None, "2"),
    (
        "qnli",
        "QNLI/dev.tsv",
        row("index", "question", "sentence", "label"),
        row(8, "Who?", "She.", "entailment"),
        ("Who?", "She."),
        0,
        "8",
    ),
    ("rte", "RTE/train.tsv", row(NLI_HEADER, "label"), row(0, "T", "H", "not_entailment"), ("T", "H"), 1, "0"),
    ("rte", "RTE/test.tsv", NLI_HEADER, row(0, "T", "H"), ("T", "H"), None, "0"),
    ("wnli", "WNLI/train.tsv", row(NLI_HEADER, "label"), row(0, "T", "H", "1"), ("T", "H"), 1, "0"),
    ("ax", "diagnostic/diagnostic.tsv", NLI_HEADER, row(0, "T", "H"), ("T", "H"), None, "0"),
]
SPLITS = {"train": "train", "dev": "validation", "test": "test", "diagnostic": "test", "msr": "test"}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(
    ("task", "name", "header", "line", "texts", "label", "index"), FILES, ids=[name for _, name, *_ in FILES]
)
def test_each_official_file_is_read_with_its_quirks(tmp_path, end, task, name, header, line, texts, label, index):
    path = write(tmp_path / name, *([header] if header else []), line, end=end)
    split_name = SPLITS[path.stem.split("_")[0]]
    for data_dir in (tmp_path, path.parent):
        split = read_glue(task, data_dir, splits=[split_name])[split_name]
        assert (split.sentence1, split.sentence2) == ([texts[0]], [texts[1]] if len(texts) == 2 else None)
        assert split.ids == [index]
        if label is None:
            assert split.labels is None
        else:
            assert split.labels.tolist() == [label]
            assert split.labels.dtype == (np.float32 if task == "stsb" else np.int32)


def test_mnli_brings_its_mismatched_halves_along_where_they_exist(tmp_path):
    for name in ("dev_matched", "dev_mismatched", "test_matched"):
        labelled = name.startswith("dev")
        header = row(NLI_HEADER, *(["gold_label"] if labelled else []))
        write(tmp_path / f"MNLI/{name}.tsv", header, row(0, name, "H", *(["neutral"] if labelled else [])))
    splits = read_glue("mnli", tmp_path, splits=["validation", "test"])
    assert {name: split.sentence1 for name, split in splits.items()} == {
        "validation": ["dev_matched"],
        "validation_mismatched": ["dev_mismatched"],
        "test": ["test_matched"],
    }


def test_quotes_and_exotic_line_separators_are_part_of_the_text(tmp_path):
    texts = ['"Open', 'a "b" c"', "form\x0cfeed", "next\x85line", "line\u2028separator", "tail\x1c", "lone\rreturn"]
    write(tmp_path / "train.tsv", row("sentence", "label"), *(row(text, 1) for text in texts))
    assert read_glue("sst2", tmp_path, splits=["train"])["train"].sentence1 == texts


def test_broken_rows_of_qqp_are_left_out_with_a_warning_if_they_are_few(tmp_path, caplog):
    good = [row(i, 1, 2, "How?", "Why?", i % 2) for i in range(2000)]
    header = row("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    # One row, broken in two by a line feed within question1.
    path = write(tmp_path / "train.tsv", header, *good[:50], row(50, 1, 2, '"Ho'), row('w?"', "Why?", 1), *good[51:])
    split = read_glue("qqp", tmp_path, splits=["train"])["train"]
    assert len(split) == 1999 and "50" not in split.ids
    assert f"{path}: skipped 2 malformed rows, the first at line 52" in caplog.text
    write(path, header, *good[:50], row(50, 1, 2, '"Ho'))
    with pytest.raises(InputError, match=r"train.tsv:52: expected 6 columns separated by tabs, got 4"):
        read_glue("qqp", tmp_path, splits=["train"])


@needs_shared
@pytest.mark.parametrize(
    ("task", "train_rows", "validation_rows"),
    [
        ("cola", 8551, 1043),
        ("sst2", 67349, 872),
        ("mrpc", 3668, 408),
        ("stsb", 5749, 1500),
        ("rte", 2490, 277),
        ("wnli", 635, 71),
    ],
)
def test_real_files_have_the_official_numbers_of_rows_and_what_the_csv_module_reads(task, train_rows, validation_rows):
    splits = read_glue(task, SHARED)
    assert (len(splits["train"]), len(splits["validation"])) == (train_rows, validation_rows)
    with open(SHARED / TASKS[task].folder / "dev.tsv", encoding="utf-8-sig", newline="\n") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = list(zip(*(rows if task == "cola" else rows[1:]), strict=True))
    texts = {"cola": [3], "sst2": [0], "mrpc": [3, 4], "stsb": [7, 8], "rte": [1, 2], "wnli": [1, 2]}[task]
    assert tuple(splits["validation"].sentence1) == columns[texts[0]]
    assert splits["validation"].sentence2 is None or tuple(splits["validation"].sentence2) == columns[texts[1]]
    written = columns[{"cola": 1, "sst2": 1, "mrpc": 0}.get(task, -1)]
    if task == "stsb":
        assert np.array_equal(splits["validation"].labels, np.asarray(written, np.float32))
    else:
        names = ["entailment", "not_entailment"] if task == "rte" else ["0", "1"]
        assert [names[label] for label in splits["validation"].labels] == list(written)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["sentence\ttarget", "fine\t1"],
            r"train.tsv:1: no column 'label', which sst2 requires; .* 'sentence', 'target'",
        ),
        (["sentence\tlabel", "fine\t1", "fine"], r"train.tsv:3: expected 2 columns separated by tabs, got 1"),
        (["sentence\tlabel", "fine\t1", "fi\tne\t1"], r"train.tsv:3: expected 2 columns separated by tabs, got 3"),
        (["sentence\tlabel", "fine\t1", "", "fine\t0"], r"train.tsv:3: expected 2 columns separated by tabs, got 1"),
        (["sentence\tlabel", "fine\t1", "fine\t2"], r"train.tsv:3: unknown label '2'; the labels are '0', '1'$"),
        (["sentence\tlabel"], r"train.tsv: no rows below the header"),
        ([], r"train.tsv: the file is empty"),
        (["", ""], r"train.tsv: the file is empty"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_line(tmp_path, lines, message):
    write(tmp_path / "SST-2/train.tsv", *lines)
    with pytest.raises(InputError, match=message) as caught:
        read_glue("sst2", tmp_path, splits=["train"])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_placed(tmp_path):
    path = tmp_path / "SST-2/train.tsv"
    write(path, row("sentence", "label"), row("good", 1), row("caf\xe9", 1), encoding="latin-1")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark moves the bytes, not the line
    with pytest.raises(InputError, match=r"train.tsv:3: not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_glue("sst2", tmp_path, splits=["train"])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data_dir .*nowhere: no such folder; .*builtin"):
        read_glue("rte", tmp_path / "nowhere")
    write(tmp_path / "RTE/train.tsv", row(NLI_HEADER, "label"), row(0, "T", "H", "entailment"))
    with pytest.raises(InputError, match=r"RTE/dev.tsv: no such file; it should contain the validation split of rte"):
        read_glue("rte", tmp_path)
    with pytest.raises(
        InputError, match=r"ax has no split 'train'; it has test \(a model trained on mnli answers ax\)"
    ):
        read_glue("ax", tmp_path)
    with pytest.raises(InputError, match=r"no such task"):
        read_glue("snli", tmp_path)
    (tmp_path / "RTE/dev.tsv").mkdir()
    with pytest.raises(InputError, match=r"RTE/dev.tsv: cannot be read \(Is a directory\)"):
        read_glue("rte", tmp_path)


def test_a_score_that_is_no_number_is_placed(tmp_path):
    write(tmp_path / "dev.tsv", row("sentence1", "sentence2", "score"), row("A", "B", "2.5"), row("A", "B", "nan"))
    with pytest.raises(InputError, match=r"dev.tsv:3: the score 'nan' is not a number"):
        read_glue("stsb", tmp_path, splits=["validation"])


# --- splits -----------------------------------------------------------------------------------------------------------


def test_first_cuts_every_field_and_none_keeps_all():
    split = Split(["a", "b", "c"], ["A", "B", "C"], np.arange(3), ["0", "1", "2"], ("x", "y", "z"))
    cut = split.first(2)
    assert (cut.sentence1, cut.sentence2, cut.labels.tolist(), cut.ids) == (["a", "b"], ["A", "B"], [0, 1], ["0", "1"])
    assert len(split.first(None)) == len(split.first(10)) == 3
    with pytest.raises(ValueError, match="positive"):
        split.first(0)


# --- the built-in data ------------------------------------------------------------------------------------------------


def test_built_in_data_is_written_aside_read_and_cleared_away(monkeypatch):
    calls = []

    def write_builtin(directory, seed=0, tasks=None):
        calls.append((Path(directory), seed, tasks))
        for name in ("train", "dev"):
            write(Path(directory) / f"RTE/{name}.tsv", row(NLI_HEADER, "label"), row(0, name, "H", "entailment"))

    monkeypatch.setattr("pats_jax.data.builtin.write_builtin", write_builtin, raising=False)
    splits = load_task("rte", "builtin", seed=3)
    assert {name: split.sentence1 for name, split in splits.items()} == {"train": ["train"], "validation": ["dev"]}
    [(folder, seed, tasks)] = calls
    assert (seed, tasks) == (3, ["rte"]) and not folder.exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for ``nyu-mll/glue``: real datasets of parquet files in local folders, one a configuration."""
    load_dataset = datasets.load_dataset

    def add(task, **splits):
        for split, columns in splits.items():
            names = TASKS[task].labels
            label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
            features = {name: datasets.Value("string") for name in TASKS[task].hub_texts}
            features |= {"label": label, "idx": datasets.Value("int32")}
            data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            data.to_parquet(tmp_path / task / f"{split}-00000-of-00001.parquet")

    def local(path, name):
        assert path == "nyu-mll/glue"
        files = {file.name.split("-")[0]: str(file) for file in (tmp_path / name).iterdir()}
        return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    return add


def test_the_hub_gives_the_same_shape_and_hides_test_labels_as_minus_one(hub):
    columns = {"question1": ["a", "b"], "question2": ["c", "d"], "label": [1, 0], "idx": [0, 1]}
    hub("qqp", train=columns, validation=columns, test={**columns, "label": [-1, -1], "idx": [10, 11]})
    splits = load_task("qqp", splits=["train", "test"])
    assert splits.keys() == {"train", "test"}
    assert (splits["train"].sentence1, splits["train"].sentence2) == (["a", "b"], ["c", "d"])
    assert splits["train"].labels.tolist() == [1, 0] and splits["train"].labels.dtype == np.int32
    assert splits["test"].labels is None and splits["test"].ids == ["10", "11"]


def test_the_hub_calls_the_texts_and_splits_of_mnli_otherwise(hub):
    columns = {"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]}
    hub("mnli", train=columns, validation_matched=columns, validation_mismatched={**columns, "premise": ["mm"]})
    splits = read_hub("mnli")
    assert {name: split.sentence1 for name, split in splits.items()} == {
        "train": ["p"],
        "validation": ["p"],
        "validation_mismatched": ["mm"],
    }
    assert splits["train"].sentence2 == ["h"] and splits["train"].labels.tolist() == [2]


def test_scores_and_single_texts_from_the_hub(hub):
    hub("stsb", train={"sentence1": ["a"], "sentence2": ["b"], "label": [2.5], "idx": [0]})
    hub("sst2", train={"sentence": ["a"], "label": [1], "idx": [0]})
    assert read_hub("stsb", splits=["train"])["train"].labels.tolist() == [2.5]
    assert read_hub("sst2", splits=["train"])["train"].sentence2 is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nand more"),
        ValueError("Couldn't find cache for nyu-mll/glue for config 'rte'"),
        RuntimeError(),
    ],
)
def test_without_a_network_the_ways_to_work_offline_are_named(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    with pytest.raises(InputError, match=r"data_dir to builtin .*TSV files, or set HF_HUB_OFFLINE=1") as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_asked_once_and_the_cache_is_looked_in(monkeypatch, tmp_path):
    """By the real libraries: no name is found, and neither waits to ask again."""
    import socket
    import time

    def nowhere(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    before, started = datasets.config.HF_HUB_OFFLINE, time.perf_counter()
    with pytest.raises(InputError, match=r"nyu-mll/glue could not be .* \(it does not answer, and the cache"):
        load_task("rte")
    assert time.perf_counter() - started < 10
    assert datasets.config.HF_HUB_OFFLINE == before


# --- people's own files -----------------------------------------------------------------------------------------------

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


# --- two columns of one name ------------------------------------------------------------------------------------------


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


def test_two_columns_of_one_name_in_glue_and_those_that_are_not_read(tmp_path):
    write(tmp_path / "SST-2/train.tsv", row("sentence", "label", "sentence"), row("a", 1, "b"))
    with pytest.raises(InputError, match=r"train.tsv:1: two columns are named 'sentence'; rename or remove one"):
        read_glue("sst2", tmp_path, splits=["train"])
    path = write(tmp_path / "d.csv", "note,text,note,,", "x,a,y,,")
    assert read_file(path).sentence1 == ["a"]
    path = write(tmp_path / "d.jsonl", '{"note": 1, "text": "a", "note": {"text": 1, "text": 2}}')
    assert read_file(path).sentence1 == ["a"]
    # A test file's labels are not read at all.
    path = write(tmp_path / "d.csv", "label,text,label", "x,a,y")
    assert load_files({"test": path})["test"].sentence1 == ["a"]


# --- JSON, long fields, what is no text -------------------------------------------------------------------------------


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


# --- one rule for the files of a task ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("label", ["-1", "2", ""])
def test_a_test_file_of_glue_may_have_hidden_labels(tmp_path, label):
    for name in ("test", "dev"):
        write(tmp_path / f"{name}.tsv", row("sentence", "label"), row("a", "1"), row("b", label))
    split = read_glue("sst2", tmp_path, splits=["test"])["test"]
    assert split.sentence1 == ["a", "b"] and split.labels is None
    with pytest.raises(InputError, match=r"dev.tsv:3: "):
        read_glue("sst2", tmp_path, splits=["validation"])


def test_a_hub_set_with_some_labels_hidden_is_refused(hub):
    hub("sst2", train={"sentence": ["a", "b"], "label": [1, -1], "idx": [0, 1]})
    with pytest.raises(InputError, match=r"nyu-mll/glue, sst2: row 1 has no label .-1., but others do"):
        read_hub("sst2", splits=["train"])
