"""Loads a checkpoint's own fast tokenizer."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pats_jax.core.files import JsonObject, read_json, read_record
from pats_jax.errors import InputError
from pats_jax.models import quick_tokenizer
from pats_jax.models.config import read_config
from pats_jax.models.encoders.table import read_encoder_config
from pats_jax.models.sources import checkpoint_folder

# The classes that AutoTokenizer would choose; to import one of them is 3 s quicker than to import AutoTokenizer.
_BY_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "modernbert": "PreTrainedTokenizerFast",
    "t5": "T5Tokenizer",
    "bart": "BartTokenizer",
}
_ALSO_KNOWN = ("DistilBertTokenizer",)  # a BertTokenizer that gives no token types
_BY_OLD_NAME = {"ElectraTokenizer": "BertTokenizer"}
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spm.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_SENTENCEPIECE)


class _Settings(TypedDict, total=False):
    """The fields that are read from ``tokenizer_config.json``."""

    tokenizer_class: str | None


def load_tokenizer(name_or_dir: str | Path, *, revision: str | None = None) -> Any:
    """Loads a checkpoint's own fast tokenizer; it gives the same ids as Transformers' ``AutoTokenizer``.

    If the checkpoint's ``tokenizer.json`` is complete, the result is a `QuickTokenizer`, which converts texts to ids
    without Transformers. Its attribute ``full`` is Transformers' own tokenizer, which serves all other calls.

    Args:
      name_or_dir: as for `pats_jax.models.from_pretrained`.
      revision: the branch, tag or commit of a hub repository.

    Raises:
      InputError: if the checkpoint has no tokenizer, or none that Transformers can load as a fast one.
    """
    folder = checkpoint_folder(name_or_dir, revision=revision, check_weights=False)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputError(
            f"{folder}: has no tokenizer ({' or '.join(_VOCABULARIES)}); save the model with one, as in "
            "pats_jax.models.save_pretrained(..., tokenizer=tokenizer), or copy the checkpoint's tokenizer files there"
        )
    if not (folder / "tokenizer.json").is_file():
        for vocabulary in _SENTENCEPIECE:
            if (folder / vocabulary).is_file():
                _check_sentencepiece(folder, vocabulary)
    name, settings = _class_and_settings(folder)
    load_full = functools.partial(_load_full, folder, name)
    if (folder / "tokenizer.json").is_file():
        quick = quick_tokenizer.load(folder, name, settings, load_full)
        if quick is not None:
            return quick
    return load_full()


def _load_full(folder: Path, name: str) -> Any:
    """Transformers' tokenizer of a folder, by the name of its class.

    Raises:
      InputError: if it cannot be loaded, or is not a fast one.
    """
    try:
        with _without_advice():
            import transformers

            known = name in (*_BY_MODEL_TYPE.values(), *_ALSO_KNOWN)
            kind = getattr(transformers, name if known else "AutoTokenizer")
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files: the tokenizers library itself raises bare Exceptions
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer; add a tokenizer.json")
    return tokenizer


def _check_sentencepiece(folder: Path, vocabulary: str) -> None:
    if importlib.util.find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder}: has no tokenizer.json, and reading its {vocabulary} requires the package sentencepiece; "
            "run: pip install 'pats-jax[sentencepiece]'"
        )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps Transformers from warning, on import, that torch is missing: it is not needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _class_and_settings(folder: Path) -> tuple[str, JsonObject]:
    """The class named in ``tokenizer_config.json``, else that of the model type; and the content of that file."""
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {}
    named = None
    if path.exists():
        named = read_record(path, _Settings).get("tokenizer_class")
        settings = read_json(path)
    if named is None:
        named = _BY_MODEL_TYPE.get(str(read_config(folder)[0].get("model_type")))
    if named is None:
        named = _BY_MODEL_TYPE[read_encoder_config(folder).model_type]
    name = named.removesuffix("Fast")
    return _BY_OLD_NAME.get(name, name), settings
