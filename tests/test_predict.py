"""`pats-jax predict`: labels, probabilities and scores for new texts, against one plain batch through the model."""

import copy
import csv
import dataclasses
import io
import json
import os
import stat

import numpy as np
import pytest
import scipy.special
import tiny
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.programs import cli

NAMES = ("so so", "good", "bad")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a classifier of three named classes."""
    folder = tmp_path_factory.mktemp("classifier")
    config = dataclasses.replace(tiny.CONFIG, id2label=dict(enumerate(NAMES)))
    models.save_pretrained(folder, params=tiny.random_params(config), config=config, tokenizer=tiny.tokenizer())
    return folder


def table(text):
    header, *rows = csv.reader(io.StringIO(text), delimiter="\t")
    return header, rows


def test_labels_and_probabilities_in_the_order_of_the_rows(model, tmp_path, capsys):
    texts = [*tiny.sentences(9, 5)[0], "ann", "", "zoe is warm"]
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in texts))
    cli.main(["predict", str(model), "--file", str(file), "--batch_size", "5", "--max_seq_length", "16"])
    out, error = capsys.readouterr()
    header, rows = table(out)
    assert header == ["index", "prediction", *NAMES, "sentence1"] and error == ""
    assert [row[0] for row in rows] == [str(index) for index in range(len(texts))]
    probabilities = np.array([row[2:5] for row in rows], float)
    expected = scipy.special.softmax(tiny.reference_logits(model, texts), axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert [row[5] for row in rows] == texts
    assert [row[1] for row in rows] == [NAMES[index] for index in expected.argmax(1)]


def test_pairs_with_their_own_index_into_a_file(model, tmp_path, capsys):
    first, second = tiny.sentences(6, 6)[0], tiny.sentences(6, 7)[0]
    file, target = tmp_path / "pairs.jsonl", tmp_path / "out.tsv"
    records = (
        {"id": f"q{n}", "premise": a, "hypothesis": b} for n, (a, b) in enumerate(zip(first, second, strict=True))
    )
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(UserWarning, match="max_seq_length 128 exceeds the model's 24 positions; using 24"):
        cli.predict([str(model), "--file", str(file), "--output_file", str(target), "--max_seq_length", "128"])
    assert capsys.readouterr().out == ""
    header, rows = table(target.read_text())
    assert [row[0] for row in rows] == [f"q{n}" for n in range(6)]
    expected = scipy.special.softmax(tiny.reference_logits(model, first, second), axis=1)
    np.testing.assert_allclose(np.array([row[2:5] for row in rows], float), expected, atol=1e-4)


def test_what_is_read_is_not_written_over(model, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("ann is warm\n")
    (tmp_path / "link").symlink_to(file)
    for target in (file, tmp_path / "link", model / "config.json"):
        before = target.read_bytes()
        with pytest.raises(SystemExit):
            cli.main(["predict", str(model), "--file", str(file), "--output_file", str(target)])
        assert f"--output_file {target}: is " in capsys.readouterr().err and target.read_bytes() == before


def test_scores_of_a_regression(tmp_path, capsys):
    model = tiny.save_checkpoint(tmp_path / "model", 1)
    texts = tiny.sentences(3, 8)[0]
    file = tiny.write_table(tmp_path / "texts.csv", ("sentence",), *zip(texts), separator=",")
    cli.main(["predict", str(model), "--file", str(file), "--max_seq_length", "24"])
    header, rows = table(capsys.readouterr().out)
    assert header == ["index", "prediction", "sentence1"]
    np.testing.assert_allclose([float(row[1]) for row in rows], tiny.reference_logits(model, texts)[:, 0], atol=1e-4)


# lengths


def saved(folder, tokenizer=None, **changes):
    """A folder with a random classifier, its tokenizer altered."""
    config = dataclasses.replace(tiny.CONFIG, id2label=dict(enumerate(NAMES)))
    tokenizer = copy.deepcopy(tokenizer or tiny.tokenizer())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    models.save_pretrained(folder, params=tiny.random_params(config), config=config, tokenizer=tokenizer)
    return folder


def predicted(model, texts, tmp_path, capsys, *flags):
    """The probabilities that `pats-jax predict` writes, and what it says."""
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in texts))
    cli.main(["predict", str(model), "--file", str(file), *flags])
    out, error = capsys.readouterr()
    return np.array([row[2:5] for row in table(out)[1]], float), error


LONG = ["ann is warm and bob is cold .", "ann is warm .", "bob and cid and dan and eve and fay is rude and loud ."]


@pytest.mark.parametrize("own, flags, length", [(8, (), 8), (8, ("--max_seq_length", "12"), 12), (10**30, (), 24)])
def test_the_length_is_the_model_folders_and_what_is_cut_is_said(own, flags, length, tmp_path, capsys, caplog):
    folder = saved(tmp_path / "model", model_max_length=own)
    found, _ = predicted(folder, LONG, tmp_path, capsys, *flags)
    expected = scipy.special.softmax(tiny.reference_logits(folder, LONG, max_length=length), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    cut = {8: 2, 12: 1, 24: 0}[length]  # of 10, 6 and 14 tokens
    verb = "is longer than 12 tokens and was" if cut == 1 else f"are longer than {length} tokens and were"
    lines = [f"{cut} of 3 texts {verb} truncated; to keep more, set max_seq_length"] if cut else []
    assert [line for line in caplog.messages if "truncated" in line] == lines


def test_a_text_beyond_the_models_positions_is_said_to_be_so(tmp_path, capsys, caplog):
    predicted(saved(tmp_path / "model"), ["ann is warm . " * 9], tmp_path, capsys)
    assert "1 of 1 texts is longer than 24 tokens and was truncated; the model has no more positions" in caplog.text


# ids and answers that are none


def with_words(*words, pad=None):
    """The tokenizer with words that the model's table has no rows for."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(list(words))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


@pytest.mark.parametrize("tokenizer", [with_words("zoe"), with_words(pad="[FILL]")], ids=["word", "padding"])
def test_ids_beyond_the_table_are_refused_with_both_sizes(tokenizer, tmp_path, capsys):
    folder, size = saved(tmp_path / "model", tokenizer), len(tiny.VOCABULARY)
    file, target = tmp_path / "texts.txt", tmp_path / "out.tsv"
    file.write_text("zoe is warm .\nann is cold\n")
    line = tiny.refused(capsys, "predict", folder, "--file", file, "--output_file", target)
    assert f"gives ids up to {size}, but the model's embedding table has {size} rows" in line
    assert not target.exists()


def test_words_that_no_text_has_are_no_matter(tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("ann is warm .\n")
    cli.main(["predict", str(saved(tmp_path / "model", with_words("zoe"))), "--file", str(file)])
    assert len(table(capsys.readouterr().out)[1]) == 1


def test_answers_that_are_not_finite_are_never_written(tmp_path, capsys):
    folder = saved(tmp_path / "model")
    weights = folder / "model.safetensors"
    save_file(
        {n: np.full_like(x, 3e38) if n == "classifier.weight" else x for n, x in load_file(weights).items()}, weights
    )
    file, target = tmp_path / "texts.txt", tmp_path / "out.tsv"
    file.write_text("ann is warm .\n")
    line = tiny.refused(capsys, "predict", folder, "--file", file, "--output_file", target)
    assert "the model's outputs are not finite" in line and not target.exists()


# what ids and labels may hold


def test_a_row_is_a_line_whatever_ids_and_labels_hold(tmp_path, capsys):
    names = ('so\tso\n"really"', "good\r", "bad")
    config = dataclasses.replace(tiny.CONFIG, id2label=dict(enumerate(names)))
    params = tiny.random_params(config)
    models.save_pretrained(tmp_path / "model", params=params, config=config, tokenizer=tiny.tokenizer())
    texts, ids = tiny.sentences(6, 6)[0], ["a\tb", "c\nd", "e\r", "", "f", "\\t"]
    file, target = tmp_path / "texts.jsonl", tmp_path / "out.tsv"
    tiny.write_lines(file, ({"id": id, "sentence": text} for id, text in zip(ids, texts, strict=True)))
    cli.main(["predict", str(tmp_path / "model"), "--file", str(file), "--output_file", str(target)])
    text = target.read_bytes().decode()
    assert text.count("\n") == 7 and "\r" not in text and all(line.count("\t") == 5 for line in text.splitlines())
    header, rows = table(text)
    escaped = ['so\\tso\\n"really"', "good\\r", "bad"]
    assert header == ["index", "prediction", *escaped, "sentence1"]
    assert [row[0] for row in rows] == ["a\\tb", "c\\nd", "e\\r", "", "f", "\\t"]
    answers = tiny.reference_logits(tmp_path / "model", texts).argmax(1)
    assert [row[1] for row in rows] == [escaped[answer] for answer in answers]


def test_a_pipe_is_written_to_not_replaced(model, tmp_path):
    file, pipe = tmp_path / "texts.txt", tmp_path / "pipe"
    file.write_text("ann is warm .\n")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cli.main(["predict", str(model), "--file", str(file), "--output_file", str(pipe)])
    assert os.read(reader, 5) == b"index" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


# where texts come from


@pytest.fixture
def standard_input(monkeypatch):
    def give(text, is_terminal=False):
        stream = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="ascii")
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr("sys.stdin", stream)

    return give


@pytest.mark.parametrize("flags", [(), ("--file", "-")])
def test_standard_input_has_a_text_a_line(model, standard_input, capsys, flags):
    texts = ["ann is warm .", "", "café \u2028 is cold"]
    standard_input("".join(f"{text}\r\n" for text in texts))
    cli.main(["predict", str(model), *flags])
    rows = table(capsys.readouterr().out)[1]
    assert [row[5] for row in rows] == texts and [row[0] for row in rows] == ["0", "1", "2"]
    expected = scipy.special.softmax(tiny.reference_logits(model, texts), axis=1)
    np.testing.assert_allclose(np.array([row[2:5] for row in rows], float), expected, atol=1e-5)


def test_one_text_or_a_pair(model, capsys):
    for pair in (None, "bob is cold"):
        cli.main(["predict", str(model), *tiny.flags(text="ann is warm", text_pair=pair)])
        header, [row] = table(capsys.readouterr().out)
        second = None if pair is None else [pair]
        expected = scipy.special.softmax(tiny.reference_logits(model, ["ann is warm"], second), axis=1)
        np.testing.assert_allclose(np.array(row[2:5], float), expected[0], atol=1e-5)
        assert row[5:] == ["ann is warm", *(second or ())]


def test_what_is_no_text(model, standard_input, capsys, tmp_path):
    standard_input("", is_terminal=True)
    assert "no texts: set --file or --text, or pipe texts in" in tiny.refused(capsys, "predict", model)
    standard_input("\n")
    assert "standard input: the file is empty" in tiny.refused(capsys, "predict", model)
    standard_input(b"ann\n\xff\n")
    assert "standard input:2: not UTF-8" in tiny.refused(capsys, "predict", model)
    standard_input("ann\n")
    line = tiny.refused(capsys, "predict", model, "--delimiter", ";")
    assert "--text_column_names, --delimiter: standard input has one text per line" in line
    line = tiny.refused(capsys, "predict", model, "--text", "ann", "--file", "a.csv")
    assert "--text: cannot be used with --file" in line
    assert "--text_pair: needs --text" in tiny.refused(capsys, "predict", model, "--text_pair", "ann")


def test_the_folder_of_a_run_is_its_model_and_knows_its_columns(model, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "model").parent.mkdir()
    (run / "model").symlink_to(model)
    path = tiny.write_table(tmp_path / "texts.csv", ("text", "body"), ("x", "ann is warm"), separator=",")
    (run / "config.json").write_text(json.dumps({"text_column_names": ["body"]}))
    for folder in (run, run / "model"):
        cli.main(["predict", str(folder), "--file", str(path)])
        assert table(capsys.readouterr().out)[1][0][5] == "ann is warm"
    cli.main(["predict", str(run), "--file", str(path), "--text_column_names", "text"])
    assert table(capsys.readouterr().out)[1][0][5] == "x"
    other = tiny.write_table(tmp_path / "other.csv", ("sentence",), ("bob",), separator=";")
    cli.main(["predict", str(run), "--file", str(other)])  # it has no such column
    assert table(capsys.readouterr().out)[1][0][5] == "bob"
    pair = tiny.write_table(tmp_path / "pair.csv", ("a", "b"), ("bob", "cid"), separator=";")
    cli.main(["predict", str(run), "--file", str(pair), *tiny.flags(text_column_names=("a", "b"), delimiter=";")])
    assert table(capsys.readouterr().out)[1][0][5:] == ["bob", "cid"]
