"""Small training sets drawn by label, and sets from other domains: their readers, their scores, one run end to end."""

import collections
import csv
import fractions
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny

from pats_jax import glue
from pats_jax.data import read_file, readers, stratified_rows
from pats_jax.data.out_of_domain import NAMES, load_out_of_domain
from pats_jax.errors import InputError
from pats_jax.programs import cli
from pats_jax.run import flags, settings
from pats_jax.run.settings import Settings
from pats_jax.training.evaluation import fold

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "ood_nli").is_dir(), reason=f"the real files are not in {SHARED}")
THREE, TWO = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def tabs(*cells):
    return "\t".join(map(str, cells))


# a small training set


@pytest.mark.parametrize(
    "counts, rows, expected",
    [
        ((50, 30, 20), 10, (5, 3, 2)),
        ((5, 3, 3), 4, (2, 1, 1)),  # shares 1.82, 1.09, 1.09
        ((46, 34, 20), 7, (3, 2, 2)),  # shares 3.22, 2.38, 1.4
        ((1, 1, 1, 1), 4, (1, 1, 1, 1)),
        ((3, 3), 3, (2, 1)),  # a tie: the lower index
        ((98, 1, 1), 10, (8, 1, 1)),  # shares 9.8, 0.1, 0.1: each label keeps a row
        ((7, 4), 11, (7, 4)),
    ],
)
def test_each_label_gives_its_share_by_largest_remainders(counts, rows, expected):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    chosen = stratified_rows(labels, rows, seed=3)
    assert tuple(collections.Counter(labels[chosen].tolist())[c] for c in range(len(counts))) == expected
    assert len(set(chosen.tolist())) == rows and (np.diff(chosen) > 0).all()


def test_shares_against_exact_fractions():
    rng = np.random.default_rng(1)
    for _ in range(50):
        counts = rng.integers(20, 60, size=rng.integers(2, 7))
        rows = int(rng.integers(20, counts.sum()))  # so every share is above 1
        shares = [fractions.Fraction(int(count) * rows, int(counts.sum())) for count in counts]
        order = sorted(range(len(counts)), key=lambda c: (int(shares[c]) - shares[c], c))
        left = rows - sum(map(int, shares))
        expected = [int(share) + (c in order[:left]) for c, share in enumerate(shares)]
        labels = np.repeat(np.arange(len(counts)), counts)
        assert np.bincount(labels[stratified_rows(labels, rows, seed=0)]).tolist() == expected


def test_scores_are_drawn_from_their_quantiles():
    scores = np.random.default_rng(2).normal(size=100).astype(np.float32)
    scores[::3] = 0.5  # many equal ones
    place = {int(row): rank for rank, row in enumerate(np.argsort(scores, kind="stable"))}
    for rows, quantiles in ((30, 10), (7, 7)):
        chosen = [place[row] for row in stratified_rows(scores, rows, seed=5).tolist()]
        assert len(set(chosen)) == rows
        sizes = np.histogram(chosen, np.ceil(np.arange(quantiles + 1) * 100 / quantiles))[0]
        assert set(sizes.tolist()) == {rows // quantiles}


def test_the_draw_is_a_function_of_the_seed_and_fair():
    labels = np.arange(12) % 3
    assert stratified_rows(labels, 6, seed=4).tolist() == stratified_rows(labels, 6, seed=4).tolist()
    draws = np.array([np.isin(np.arange(12), stratified_rows(labels, 6, seed)) for seed in range(400)])
    assert len({tuple(draw) for draw in draws}) > 100
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.1)  # four standard deviations


@pytest.mark.parametrize(
    "labels, rows, message",
    [
        (np.arange(9) % 3, 10, "cannot draw 10 training rows: there are only 9"),
        (np.arange(9) % 3, 2, "cannot draw 2 training rows: there are 3 labels"),
    ],
)
def test_draws_that_cannot_be_made(labels, rows, message):
    with pytest.raises(InputError) as caught:
        stratified_rows(labels, rows, seed=0)
    assert str(caught.value) == message


# the authors' files

PAIRS = [("A man, asleep", 'He "rests"', 0), ("Two dogs", "A cat", 2), ("a b", "c d", 1), ("e", "f", 0)]
SNLI_TSV = tabs(
    *("gold_label", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"),
    *("sentence1", "sentence2", "captionID", "pairID", "label1", "label2", "label3", "label4", "label5"),
)
SICK_TSV = tabs("pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
SICK_ALL = tabs(
    *("pair_ID", "sentence_A", "sentence_B", "entailment_label", "relatedness_score", "entailment_AB"),
    *("entailment_BA", "sentence_A_original", "sentence_B_original", "sentence_A_dataset", "sentence_B_dataset"),
    "SemEval_set",
)


def snli_json(first, second, label):
    given = {"annotator_labels": [label], "captionID": "1.jpg#0", "gold_label": label, "pairID": "1.jpg#0r1n"}
    return json.dumps(given | {"sentence1": first, "sentence1_binary_parse": "( x )", "sentence2": second})


def snli_row(first, second, label):
    return tabs(label, "(p)", "(h)", "(p)", "(h)", first, second, "1.jpg#0", "1.jpg#0r1n", label, "", "", "", "")


def sick_row(first, second, label, part):
    return tabs(7, first, second, label, 3.5, "A_x_B", "B_x_A", first, second, "FLICKR", "FLICKR", part)


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


def write_all_formats(folder):
    """The rows of PAIRS in every format, with rows that do not count; file -> name of the set."""
    three = [(a, b, THREE[label]) for a, b, label in PAIRS]
    two = [(a, b, "entails" if label == 0 else "neutral") for a, b, label in PAIRS]
    unclear = ("g", "h", "-")
    files = {
        "a/SNLI/snli_1.0_test.jsonl": [snli_json(*row) for row in (unclear, *three, unclear)],
        "b/snli_1.0/snli_1.0_test.txt": [SNLI_TSV, *(snli_row(*row) for row in (*three, unclear))],
        "c/SNLI/test_1k.txt": [tabs(c, a, b) for a, b, c in three],
        "d/SNLI/test.csv": ["premise,hypothesis,label", *(f"{quoted(a)},{quoted(b)},{c}" for a, b, c in three)],
        "a/SICK/SICK_test_annotated.txt": [SICK_TSV, *(tabs(9, a, b, 4.5, c.upper()) for a, b, c in three)],
        "b/SICK/SICK.txt": [
            SICK_ALL,
            sick_row("x", "y", "NEUTRAL", "TRAIN"),
            *(sick_row(a, b, c.upper(), "TEST") for a, b, c in three),
            sick_row("x", "y", "NEUTRAL", "TRIAL"),
        ],
        "a/SciTailV1.1/tsv_format/scitail_1.0_test.tsv": [tabs(*row) for row in two],
        "b/SciTail/snli_format/scitail_1.0_test.txt": [
            snli_json(a, b, c.replace("entails", "entailment")) for a, b, c in two
        ],
        "c/SciTail/test.csv": [
            "premise,hypothesis,label",
            *(f"{quoted(a)},{quoted(b)},{'entailment' if c == 'entails' else 'not_entailment'}" for a, b, c in two),
        ],
    }
    names = {}
    for path, lines in files.items():
        write(folder / path, *lines)
        names[path] = next(name for name in NAMES if name in path.split("/")[1].lower())
    return names


def check_pairs(split, name):
    assert list(zip(split.sentence1, split.sentence2, strict=True)) == [(a, b) for a, b, _ in PAIRS]
    assert split.label_names == (TWO if name == "scitail" else THREE) and split.labels.dtype == np.int32
    labels = [label for _, _, label in PAIRS]
    assert split.labels.tolist() == ([min(label, 1) for label in labels] if name == "scitail" else labels)
    assert len(split.ids) == len(PAIRS)


def test_every_format_of_the_authors_is_read(tmp_path, caplog):
    for path, name in write_all_formats(tmp_path).items():
        above = tmp_path / path.split("/")[0]
        check_pairs(load_out_of_domain(name, above), name)
        own = above / path.split("/")[1]
        check_pairs(load_out_of_domain(name, own), name)  # the set's own folder is taken as well
    log = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{tmp_path}/a/SNLI/snli_1.0_test.jsonl: skipped 2 rows without a gold label" in log
    assert len(log) == 4, "twice each of the two files that have such rows"


@pytest.mark.parametrize(
    "name, path, lines, message",
    [
        ("snli", "SNLI/test_1k.txt", ["neutral\ta\tb", "maybe\ta\tb"], "test_1k.txt:2: unknown label 'maybe'"),
        ("snli", "SNLI/snli_1.0_test.jsonl", [snli_json("a", "b", "-")], "test.jsonl: no row has a gold label"),
        (
            "snli",
            "SNLI/snli_1.0_test.jsonl",
            [snli_json("a", "b", "-"), snli_json("a", "b", "-"), snli_json("a", "b", "maybe")],
            "snli_1.0_test.jsonl:3: unknown label 'maybe'",  # the line of the file, not that of the rows kept
        ),
        (
            "sick",
            "SICK/SICK_test_annotated.txt",
            ["a\tb", "c\td"],
            "SICK_test_annotated.txt:1: no two text columns and a label",
        ),
        (
            "sick",
            "SICK/SICK.txt",
            [SICK_ALL, sick_row("a", "b", "NEUTRAL", "TRAIN")],
            "SICK.txt: no rows of the test split",
        ),
        (
            "scitail",
            "SciTail/scitail_1.0_test.tsv",
            ["a\tb\tentails", "a\tb"],
            "scitail_1.0_test.tsv:2: expected 3 columns separated by tabs, got 2",
        ),
        ("scitail", "SciTail/other.txt", ["a"], "SciTail: no test file of scitail; expected one of tsv_format/"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, path, lines, message):
    write(tmp_path / path, *lines)
    with pytest.raises(InputError) as caught:
        load_out_of_domain(name, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="out_of_domain_dir .*none: no such folder; omit the flag"):
        load_out_of_domain("snli", tmp_path / "none")
    write(tmp_path / "MNLI" / "dev_matched.tsv", tabs("sentence1", "sentence2", "gold_label"), "a\tb\tneutral")
    assert load_out_of_domain("mnli", None, tmp_path).labels.tolist() == [1]
    with pytest.raises(InputError, match="out_of_domain mnli_mm: .* has no validation_mismatched file"):
        load_out_of_domain("mnli_mm", None, tmp_path)


def test_training_files_of_snli_are_read_without_the_rows_that_nobody_agreed_on(tmp_path):
    rows = [("a", "b", "neutral"), ("c", "d", "-"), ("e", "f", "entailment"), ("g", "h", "contradiction")]
    split = read_file(write(tmp_path / "snli_1.0_train.jsonl", *(snli_json(*row) for row in rows)))
    assert split.sentence1 == ["a", "e", "g"] and split.label_names == ("contradiction", "entailment", "neutral")
    assert split.labels.tolist() == [2, 1, 0]


# the hub

CLASSES = datasets.ClassLabel(names=list(THREE))
HUB = {
    "snli": ({"path": "stanfordnlp/snli"}, ("premise", "hypothesis", "label"), CLASSES),
    "sick": (
        {"path": "RobZamp/sick", "revision": "refs/convert/parquet"},
        ("sentence_A", "sentence_B", "label"),
        CLASSES,
    ),
    "scitail": (
        {"path": "allenai/scitail", "name": "snli_format"},
        ("sentence1", "sentence2", "gold_label"),
        datasets.Value("string"),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_gives_the_same_rows(monkeypatch, name):
    source, (first, second, label), kind = HUB[name]
    labels = [index for _, _, index in PAIRS]
    if name == "scitail":
        labels = ["entailment" if index == 0 else "neutral" for index in labels]
    texts = {first: [a for a, _, _ in PAIRS], second: [b for _, b, _ in PAIRS]}
    if name == "snli":
        texts, labels = {column: [*cells, "unclear"] for column, cells in texts.items()}, [*labels, -1]
    string = datasets.Value("string")
    features = datasets.Features({first: string, second: string, label: kind, "parse": string})
    rows = datasets.Dataset.from_dict({**texts, label: labels, "parse": ["()"] * len(labels)}, features=features)

    def load_dataset(**arguments):
        assert arguments == {**source, "split": "test"}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    check_pairs(load_out_of_domain(name), name)


def test_without_a_network_the_ways_to_work_offline_are_named(monkeypatch):
    def fail(**arguments):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(readers, "reaches_hub", lambda path: True)
    with pytest.raises(InputError, match=r"RobZamp/sick .*\(Couldn't reach the Hub\); .*out_of_domain_dir") as caught:
        load_out_of_domain("sick")
    assert "\n" not in str(caught.value)


# scores


def test_folding_by_hand():
    # Rows by largest probability: entailment, neutral, contradiction, and entailment with less than a half.
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]])
    answers = probabilities.argmax(1)
    assert fold(answers, THREE, TWO).tolist() == [0, 1, 1, 0]
    assert fold(answers, THREE, THREE).tolist() == [0, 1, 2, 0]
    alphabetical = ("contradiction", "entailment", "neutral")
    reordered = probabilities[:, [2, 0, 1]].argmax(1)
    assert fold(reordered, alphabetical, TWO).tolist() == [0, 1, 1, 0]
    assert fold(reordered, alphabetical, THREE).tolist() == [0, 1, 2, 0]


# settings


@pytest.mark.parametrize(
    "typed, message",
    [
        (["--low_resource", "0"], "--low_resource 0: must be at least 1"),
        (
            ["--low_resource", "5", "--max_train_samples", "9"],
            "--low_resource and --max_train_samples cannot be used together",
        ),
        (["--low_resource", "5", "--do_eval"], "--low_resource: needs --do_train"),
        (["--out_of_domain", "snli", "--do_predict"], "--out_of_domain: needs --do_eval"),
        (
            ["--out_of_domain", "snli", "mnli_mm"],
            "--out_of_domain mnli_mm: is the set of --task_name itself; choose another",
        ),
    ],
)
def test_settings_that_make_no_sense(typed, message):
    with pytest.raises(InputError) as caught:
        flags.parse(["--task_name", "MNLI", *typed], "x", settings.Settings)
    assert str(caught.value) == message


def test_the_list_is_kept_in_the_saved_settings(tmp_path):
    given = flags.parse(
        ["--task_name", "mnli", "--out_of_domain", "snli", "rte", "--low_resource", "8"], "x", settings.Settings
    )
    assert given.data.out_of_domain == ["snli", "rte"]
    path = write(tmp_path / "config.json", json.dumps(given.to_dict()))
    assert flags.read_config(str(path), settings.Settings) == given
    path = write(tmp_path / "config.json", json.dumps({**given.to_dict(), "out_of_domain": ["snli", "cola"]}))
    with pytest.raises(InputError, match=r'out_of_domain is \["snli", "cola"\]; it must be a list'):
        flags.read_config(str(path), settings.Settings)


# a run


def write_inference(folder):
    """A CSV file to train on and one to validate on, and SNLI, SciTail and RTE, all of the tiny model's words."""

    def rows(number, seed, labels):
        first, second = tiny.sentences(number, seed)[0], tiny.sentences(number, seed + 50)[0]
        return list(zip(first, second, np.resize(labels, number).tolist(), strict=True))

    for seed, (name, number) in enumerate({"train": 30, "validation": 9}.items()):
        lines = (",".join(row) for row in rows(number, seed, THREE))
        write(folder / f"{name}.csv", "premise,hypothesis,label", *lines)
    sets = {"snli": rows(13, 2, THREE), "scitail": rows(11, 3, TWO), "rte": rows(12, 4, TWO)}
    lines = (snli_json(*row) for row in (*sets["snli"], ("ann", "bob", "-")))
    write(folder / "SNLI" / "snli_1.0_test.jsonl", *lines)
    spelled = {"entailment": "entails", "not_entailment": "neutral"}
    lines = (tabs(a, b, spelled[label]) for a, b, label in sets["scitail"])
    write(folder / "SciTail" / "scitail_1.0_test.tsv", *lines)
    lines = (tabs(number, *row) for number, row in enumerate(sets["rte"]))
    write(folder / "RTE" / "dev.tsv", tabs("index", "sentence1", "sentence2", "label"), *lines)
    return sets


def test_a_run_on_few_rows_is_scored_out_of_its_domain(tmp_path, capsys):
    sets = write_inference(tmp_path / "data")
    model, data, run = tiny.save_checkpoint(tmp_path / "model", 3), tmp_path / "data", tmp_path / "run"
    flags = f"""--model_name_or_path {model} --train_file {data}/train.csv --validation_file {data}/validation.csv
        --data_dir {data} --out_of_domain_dir {data} --out_of_domain snli scitail rte --low_resource 12 --max_steps 2
        --output_dir {run} --max_seq_length 16 --per_device_train_batch_size 6 --per_device_eval_batch_size 8
        --length_buckets 1 --sensitivity_batches 0 --num_devices 1 --save_steps 0 --learning_rate 1e-2"""
    cli.main(["glue", *flags.split()])
    results = json.loads((run / "results.json").read_text())
    assert results["train_examples"] == 12 and results["eval_examples"] == 9
    assert list(results["out_of_domain"]) == ["snli", "scitail", "rte"]
    answered = set()
    for name, rows in sets.items():
        first, second, labels = zip(*rows, strict=True)
        answers = tiny.reference_logits(run / "model", list(first), list(second), max_length=16).argmax(1)
        answers = [("contradiction", "entailment", "neutral")[answer] for answer in answers]
        answered |= set(answers)
        if name != "snli":
            answers = ["entailment" if answer == "entailment" else "not_entailment" for answer in answers]
        accuracy = np.mean([answer == label for answer, label in zip(answers, labels, strict=True)])
        assert results["out_of_domain"][name] == {
            "metrics": {"accuracy": pytest.approx(accuracy)},
            "examples": len(rows),
        }
        assert f"| {name} | {len(rows)} | {accuracy:.4f} |" in (run / "README.md").read_text()
        assert f"{name} {accuracy:.4f}" in capsys.readouterr().out or name != "snli"
    assert len(answered) > 1, "a model that always says the same proves nothing"

    again = Settings(
        model_name_or_path=str(run / "model"),
        validation_file=str(data / "validation.csv"),
        data_dir=str(data),
        out_of_domain=["rte"],
        do_eval=True,
        output_dir=str(tmp_path / "again"),
        max_seq_length=16,
        per_device_eval_batch_size=8,
        num_devices=1,
    )
    assert glue.run(again)["out_of_domain"] == {"rte": results["out_of_domain"]["rte"]}


def test_the_rows_trained_on_are_those_drawn(tmp_path):
    write_inference(tmp_path)
    given = Settings(
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "validation.csv"),
        low_resource=12,
        seed=9,
        max_eval_samples=4,
        out_of_domain=["rte"],
        data_dir=str(tmp_path),
    )
    _, splits = glue.load_data(given)
    everything = read_file(tmp_path / "train.csv")
    rows = stratified_rows(everything.labels, 12, seed=9)
    assert splits["train"].sentence1 == [everything.sentence1[row] for row in rows]
    assert splits["train"].sentence2 == [everything.sentence2[row] for row in rows]
    assert np.bincount(splits["train"].labels).tolist() == [4, 4, 4]
    assert len(splits["validation"]) == len(splits["rte"]) == 4


def test_another_kind_of_task_has_no_out_of_domain_sets(tmp_path):
    given = Settings(task_name="sst2", data_dir=str(tiny.write_sst2(tmp_path)), out_of_domain=["snli"])
    with pytest.raises(InputError, match="--out_of_domain: needs a model with the classes entailment, neutral"):
        glue.load_data(given)


# the real files


@needs_shared
def test_the_real_files():
    folder = SHARED / "ood_nli"
    splits = {name: load_out_of_domain(name, folder) for name in ("snli", "sick", "scitail")}
    counts = {name: np.bincount(split.labels).tolist() for name, split in splits.items()}
    assert counts == {"snli": [367, 322, 311], "sick": [1414, 2793, 720], "scitail": [842, 1284]}
    with open(folder / "SciTail" / "test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert splits["scitail"].sentence1 == [row["premise"] for row in rows]
    assert splits["scitail"].sentence2 == [row["hypothesis"] for row in rows]
    assert splits["sick"].sentence1[0] == "There is no boy playing outdoors and there is no man smiling"
    rte = load_out_of_domain("rte", None, SHARED / "glue")
    assert len(rte) == 277 and rte.label_names == TWO


@needs_shared
def test_the_real_sample_of_mnli_trains_with_a_draw():
    mnli = SHARED / "glue" / "MNLI"
    given = Settings(
        train_file=str(mnli / "train_sample.csv"),
        validation_file=str(mnli / "dev_matched.csv"),
        data_dir=str(SHARED / "glue"),
        low_resource=500,
        out_of_domain=["snli", "sick", "scitail", "rte"],
        out_of_domain_dir=str(SHARED / "ood_nli"),
    )
    task, splits = glue.load_data(given)
    assert task.labels == ("contradiction", "entailment", "neutral")
    # 1153, 1108 and 1084 of 3345 rows: shares 172.3, 165.6 and 162.0
    assert np.bincount(splits["train"].labels).tolist() == [172, 166, 162]
    assert {name: len(split) for name, split in splits.items()} == {
        **{"train": 500, "validation": 9815, "snli": 1000, "sick": 4927, "scitail": 2126, "rte": 277}
    }


# files that are wrong


def test_two_columns_of_one_name_pipes_and_surrogates(tmp_path):
    write(tmp_path / "SNLI/test.csv", "premise,hypothesis,label,label", "a,b,neutral,entailment")
    with pytest.raises(InputError, match=r"test.csv:1: two columns are named 'label'"):
        load_out_of_domain("snli", tmp_path)
    write(
        tmp_path / "SNLI/snli_1.0_test.jsonl", snli_json("a", "b", "neutral"), "", snli_json("a\ud800", "b", "neutral")
    )
    with pytest.raises(InputError, match=r"snli_1.0_test.jsonl:3: 'sentence1': \\ud800 is a lone surrogate"):
        load_out_of_domain("snli", tmp_path)
    write(tmp_path / "SNLI/snli_1.0_test.jsonl", snli_json("a", "b", "neutral"), "", snli_json("c", "d", "neutral"))
    assert load_out_of_domain("snli", tmp_path).sentence1 == ["a", "c"]
    (tmp_path / "SNLI/snli_1.0_test.jsonl").unlink()
    os.mkfifo(tmp_path / "SNLI/snli_1.0_test.jsonl")
    with pytest.raises(InputError, match=r"snli_1.0_test.jsonl: not a regular file"):
        load_out_of_domain("snli", tmp_path)
