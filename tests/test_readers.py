"""GLUE's own files, as they are published, quirks included, and everything that can be wrong with them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pats_jax.data.own_files import load_files, read_file
from pats_jax.data.readers import Split, load_task, read_glue
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


# --- two columns of one name ------------------------------------------------------------------------------------------


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


# --- hidden labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["-1", "2", ""])
def test_a_test_file_of_glue_may_have_hidden_labels(tmp_path, label):
    for name in ("test", "dev"):
        write(tmp_path / f"{name}.tsv", row("sentence", "label"), row("a", "1"), row("b", label))
    split = read_glue("sst2", tmp_path, splits=["test"])["test"]
    assert split.sentence1 == ["a", "b"] and split.labels is None
    with pytest.raises(InputError, match=r"dev.tsv:3: "):
        read_glue("sst2", tmp_path, splits=["validation"])
