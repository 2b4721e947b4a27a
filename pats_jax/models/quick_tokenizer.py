"""A tokenizer that needs only the ``tokenizers`` package, not Transformers, which takes seconds to import.

Transformers builds its tokenizers of BERT, DistilBERT, MPNet and RoBERTa from the vocabulary and settings in a folder,
and uses only a part of ``tokenizer.json``. `load` therefore accepts a folder only if every part of its
``tokenizer.json`` is what Transformers would build, so both give the same ids. Transformers loads all other folders,
see `pats_jax.models.load_tokenizer`.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pats_jax.core import files
from pats_jax.core.files import JsonObject

NO_LENGTH = int(1e30)  # Transformers' model_max_length where a folder names none
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
_SPECIAL: dict[str, dict[str, str]] = {
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "MPNetTokenizer": _ROBERTA | {"unk": "[UNK]"},
    "RobertaTokenizer": _ROBERTA,
}
_OF_WORD_PIECES: JsonObject = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_DEFAULTS: dict[str, JsonObject] = {
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer"), _OF_WORD_PIECES),
    "RobertaTokenizer": {"add_prefix_space": False, "trim_offsets": True, "errors": "replace"},
}
_GREEDY_MASK = ("MPNetTokenizer",)  # whose mask takes the space before it
# Settings that change no ids as we encode.
_IDLE = {
    *("tokenizer_class", "model_max_length", "name_or_path", "special_tokens_map_file", "clean_up_tokenization_spaces"),
    *("backend", "is_local", "local_files_only", "do_basic_tokenize", "use_fast", "tokenizer_file", "vocab_file"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "full_tokenizer_file", "merges_file"),
}
# Settings that have to be as they mostly are.
_USUAL = {
    "never_split": None,
    "pad_token_type_id": 0,
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
}
_OPTIONS = {
    *("truncation", "max_length", "padding", "return_tensors", "add_special_tokens", "verbose"),
    *("return_attention_mask", "return_token_type_ids"),
}


class Encoding(dict):
    """The output of a tokenizer: name -> rows; ``encoding.input_ids`` is ``encoding["input_ids"]``.

    Attributes:
      encodings: the ``tokenizers.Encoding`` of each row.
    """

    encodings: list[Any]

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class QuickTokenizer:
    """The part of Transformers' interface that converts texts to ids and saves a tokenizer.

    For everything else it loads Transformers' own tokenizer (`full`), which then takes all calls.
    """

    is_fast = True

    def __init__(
        self,
        backend: Any,
        name: str,
        settings: Mapping[str, Any],
        special: Mapping[str, str],
        load_full: Callable[[], Any],
    ):
        """Creates a tokenizer from what `load` has read.

        Args:
          backend: a ``tokenizers.Tokenizer``.
          name: the name of Transformers' class.
          settings: the content of ``tokenizer_config.json``.
          special: role -> token, such as ``"mask"`` -> ``"[MASK]"``.
          load_full: a function that loads Transformers' tokenizer.
        """
        backend.no_truncation()
        backend.no_padding()
        own: dict[str, Any] = self.__dict__
        own.update(_backend=backend, _class=name, _settings=dict(settings), _full=None, _load_full=load_full)
        for role, token in special.items():
            own[f"{role}_token"], own[f"{role}_token_id"] = token, backend.token_to_id(token)
        own["model_max_length"] = int(min(settings.get("model_max_length") or NO_LENGTH, NO_LENGTH))
        own["_names"] = tuple(special)

    @property
    def full(self) -> Any:
        """Transformers' tokenizer; after the first access, all calls go to it."""
        if self._full is None:
            loaded = self._load_full()
            loaded.model_max_length = self.model_max_length
            self.__dict__["_full"] = loaded
        return self._full

    def __getattr__(self, name):
        if name.startswith("__") or "_load_full" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.full, name)

    def __setattr__(self, name, value):
        if name == "model_max_length":
            self.__dict__[name] = value
        if name != "model_max_length" or self._full is not None:
            setattr(self.full, name, value)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items()}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __deepcopy__(self, memo):
        made = object.__new__(type(self))
        load_full = self._load_full  # of a folder: not copied
        made.__dict__.update(
            {name: value if value is load_full else copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        )
        return made

    def __len__(self):
        return len(self.full) if self._full is not None else self._backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self):
        return f"{type(self).__name__}({self._class}, {len(self)} tokens)"

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary: token -> id."""
        return self._full.get_vocab() if self._full is not None else self._backend.get_vocab(with_added_tokens=True)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens that a text, or a pair of texts, gets."""
        if self._full is not None:
            return self._full.num_special_tokens_to_add(pair)
        return self._backend.num_special_tokens_to_add(pair)

    def __call__(self, text: Any = None, text_pair: Any = None, **options: Any) -> Any:
        """The ids of texts or pairs of texts; options and result are those of Transformers' tokenizers."""
        if self._full is not None or not _is_plain(text, text_pair, options):
            return self.full(text, text_pair, **options)
        length = self._length(options)
        if options.get("truncation") in (True, "longest_first") and length < NO_LENGTH:
            self._backend.enable_truncation(length, strategy="longest_first")
        else:
            self._backend.no_truncation()
        if (padding := options.get("padding")) and padding != "do_not_pad":
            fixed = length if padding == "max_length" and length < NO_LENGTH else None
            pad = {"pad_id": self.pad_token_id, "pad_token": self.pad_token}
            self._backend.enable_padding(length=fixed, **pad)
        else:
            self._backend.no_padding()
        alone = isinstance(text, str)
        rows = [text] if alone else list(text)
        if text_pair is not None:
            rows = list(zip(rows, [text_pair] if alone else list(text_pair), strict=True))
        encodings = self._backend.encode_batch(rows, add_special_tokens=options.get("add_special_tokens", True))
        return self._as_encoding(encodings, options, alone)

    def _length(self, options):
        asked = options.get("max_length")
        return self.model_max_length if asked is None else asked

    def _as_encoding(self, encodings, options, alone):
        has_types = options.get("return_token_type_ids")
        columns: dict[str, Any] = {"input_ids": [one.ids for one in encodings]}
        if has_types or (has_types is None and self._class == "BertTokenizer"):
            columns["token_type_ids"] = [one.type_ids for one in encodings]
        if options.get("return_attention_mask") is not False:
            columns["attention_mask"] = [one.attention_mask for one in encodings]
        if options.get("return_tensors") == "np":
            columns = {name: np.array(rows) for name, rows in columns.items()}
        elif alone:
            columns = {name: rows[0] for name, rows in columns.items()}
        made = Encoding(columns)
        made.__dict__["encodings"] = encodings
        return made

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which Transformers reads too.

        Raises:
          InputError: if the files cannot be written.
        """
        if self._full is not None or options:
            self.full.save_pretrained(save_directory, **options)
            return
        folder = files.make_folder(Path(save_directory))
        self._backend.no_truncation()
        self._backend.no_padding()
        tokens = {f"{role}_token": getattr(self, f"{role}_token") for role in self._names}
        kept = {name: value for name, value in self._settings.items() if name not in _OF_A_FOLDER}
        changed = {"tokenizer_class": self._class, "model_max_length": self.model_max_length}
        files.write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", kept | tokens | changed)


_OF_A_FOLDER = {
    *("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file", "full_tokenizer_file"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"),
}


def load(folder: Path, name: str, settings: Mapping[str, Any], load_full: Callable[[], Any]) -> QuickTokenizer | None:
    """The tokenizer of a folder; None unless it is certainly the one that Transformers would build.

    Args:
      folder: a folder with a ``tokenizer.json``.
      name: the name of Transformers' class.
      settings: the content of ``tokenizer_config.json``.
      load_full: a function that loads Transformers' tokenizer.
    """
    if name not in _SPECIAL:
        return None
    try:
        found = json.loads((folder / "tokenizer.json").read_bytes())
        special = _special_tokens(folder, name, settings)
        if special is None or not _is_built(found, name, settings, special):
            return None
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # a damaged file: Transformers, which is asked next, says how
        return None
    return QuickTokenizer(backend, name, settings, special, load_full)


def _special_tokens(folder, name, settings):
    """Role -> token; None if the folder's files disagree."""
    path = folder / "special_tokens_map.json"
    listed = json.loads(path.read_bytes()) if path.exists() else {}
    if name in _GREEDY_MASK and not all(_is_greedy(of.get("mask_token")) for of in (settings, listed)):
        return None
    special = {}
    for role, usual in _SPECIAL[name].items():
        given = {_content(of.get(f"{role}_token")) for of in (settings, listed)} - {None}
        if len(given) > 1:
            return None
        special[role] = given.pop() if given else usual
    known = {f"{role}_token" for role in special}
    if set(listed) - known:
        return None
    return special


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _is_greedy(token):
    """Whether Transformers lets a mask take the space before it, unless its flags say otherwise."""
    return not isinstance(token, dict) or token.get("lstrip") is True


def _is_built(found, name, settings, special):
    """Whether a ``tokenizer.json`` is what Transformers' class builds from its vocabulary and the settings."""
    known = {*_IDLE, *_USUAL, *_DEFAULTS[name], *(f"{role}_token" for role in special), "added_tokens_decoder"}
    if any(settings[key] for key in settings.keys() - known):
        return False
    if any(settings.get(key, usual) != usual for key, usual in _USUAL.items()):
        return False
    own = {key: settings.get(key, usual) for key, usual in _DEFAULTS[name].items()}
    vocabulary = found["model"]["vocab"]
    sep, cls = [[special[role], vocabulary[special[role]]] for role in ("sep", "cls")]
    parts = _PARTS[name](special, own, sep, cls)
    of_file = {part: found[part] for part in ("normalizer", "pre_tokenizer", "post_processor")}
    of_file["model"] = {key: value for key, value in found["model"].items() if key not in ("vocab", "merges")}
    if not all(any(_agree(of_file[part], form) for form in forms) for part, forms in parts.items()):
        return False
    greedy = special["mask"] if name in _GREEDY_MASK else None
    return _has_only(found["added_tokens"], settings.get("added_tokens_decoder", {}), special, vocabulary, greedy)


def _agree(found, expected):
    """Whether a part is as expected; extra settings that are off, and missing ones that are empty, do not matter."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return found == expected
    if any(found[key] for key in found.keys() - expected.keys()):
        return False
    return all(found.get(key) == value or (not found.get(key) and value == "") for key, value in expected.items())


def _bert_parts(special, own, sep, cls) -> dict[str, list[Any]]:
    def special_token(token, type_id):
        return {"SpecialToken": {"id": token[0], "type_id": type_id}}

    single = [special_token(cls, 0), {"Sequence": {"id": "A", "type_id": 0}}, special_token(sep, 0)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, special_token(sep, 1)]
    ids = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in (cls, sep)}
    return {
        "normalizer": [
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": own["tokenize_chinese_chars"],
                "strip_accents": own["strip_accents"],
                "lowercase": own["do_lower_case"],
            }
        ],
        "pre_tokenizer": [{"type": "BertPreTokenizer"}],
        "post_processor": [
            {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": ids,
            },
            {"type": "BertProcessing", "sep": sep, "cls": cls},
        ],
        "model": [
            {
                "type": "WordPiece",
                "unk_token": special["unk"],
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            }
        ],
    }


def _mpnet_parts(special, own, sep, cls) -> dict[str, list[Any]]:
    ends = {"add_prefix_space": False, "trim_offsets": True}
    processor = {"type": "RobertaProcessing", "sep": sep, "cls": cls, **ends}
    return _bert_parts(special, own, sep, cls) | {"post_processor": [processor]}


def _roberta_parts(special, own, sep, cls) -> dict[str, list[Any]]:
    bytes_of = {"add_prefix_space": own["add_prefix_space"], "trim_offsets": True, "use_regex": True}
    ends = {"add_prefix_space": own["add_prefix_space"], "trim_offsets": own["trim_offsets"]}
    return {
        "normalizer": [None],
        "pre_tokenizer": [{"type": "ByteLevel", **bytes_of}],
        "post_processor": [{"type": "RobertaProcessing", "sep": sep, "cls": cls, **ends}],
        "model": [{"type": "BPE"}],  # everything else empty
    }


_PARTS: dict[str, Callable[..., dict[str, list[Any]]]] = {
    "BertTokenizer": _bert_parts,
    "DistilBertTokenizer": _bert_parts,
    "MPNetTokenizer": _mpnet_parts,
    "RobertaTokenizer": _roberta_parts,
}


def _has_only(added, decoder, special, vocabulary, greedy):
    """Whether the added tokens are the special ones, and ``added_tokens_decoder`` agrees.

    None may have flags, but that ``greedy``, a token or None, takes the space before it.
    """

    def is_plain(token):
        flags = {flag for flag in ("single_word", "lstrip", "rstrip", "normalized") if token.get(flag)}
        return token.get("special") and flags == ({"lstrip"} if token["content"] == greedy else set())

    if not all(is_plain(token) and vocabulary.get(token["content"]) == token["id"] for token in added):
        return False
    contents = {token["content"]: token["id"] for token in added}
    if contents.keys() != set(special.values()):
        return False
    return all(contents.get(token["content"]) == int(number) and is_plain(token) for number, token in decoder.items())


def _is_plain(text, text_pair, options):
    """Whether `QuickTokenizer` itself can carry out a call: texts or lists of texts, with options that it knows."""
    if options.keys() - _OPTIONS or options.get("return_tensors") not in (None, "np"):
        return False
    if options.get("truncation") not in (None, True, False, "longest_first", "do_not_truncate"):
        return False
    if options.get("padding") not in (None, True, False, "longest", "max_length", "do_not_pad"):
        return False
    if text_pair is not None and (not _are_texts(text_pair) or isinstance(text, str) != isinstance(text_pair, str)):
        return False
    return _are_texts(text)


def _are_texts(value):
    return isinstance(value, str) or (
        isinstance(value, Sequence) and len(value) > 0 and all(isinstance(one, str) for one in value)
    )
