"""`pats-jax predict`: labels, probabilities and scores for new texts, against one plain batch through the model."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import scipy.special
import tiny

from pats_jax import cli, models

NAMES = ("so so", "good", "bad")


pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    assert header == ["index", "prediction", *NAMES] and error == ""
    assert [row[0] for row in rows] == [str(index) for index in range(len(texts))]
    probabilities = np.array([row[2:] for row in rows], float)
    expected = scipy.special.softmax(tiny.reference_logits(model, texts), axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, atol=2e-4)
    assert [row[1] for row in rows] == [NAMES[index] for index in expected.argmax(1)]


def test_pairs_with_their_own_index_into_a_file(model, tmp_path, capsys):
    first, second = tiny.sentences(6, 6)[0], tiny.sentences(6, 7)[0]
    file, target = tmp_path / "pairs.jsonl", tmp_path / "out.tsv"
    records = (
        {"id": f"q{n}", "premise": a, "hypothesis": b} for n, (a, b) in enumerate(zip(first, second, strict=True))
    )
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(UserWarning, match="--max_seq_length 128 is above the model's 24 positions; using 24"):
        cli.predict([str(model), "--file", str(file), "--output_file", str(target)])
    assert capsys.readouterr().out == ""
    header, rows = table(target.read_text())
    assert [row[0] for row in rows] == [f"q{n}" for n in range(6)]
    expected = scipy.special.softmax(tiny.reference_logits(model, first, second), axis=1)
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), expected, atol=1e-4)


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
    assert header == ["index", "prediction"]
    np.testing.assert_allclose([float(row[1]) for row in rows], tiny.reference_logits(model, texts)[:, 0], atol=1e-4)
