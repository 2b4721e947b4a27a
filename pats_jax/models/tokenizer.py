"""The checkpoint's own fast tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pats_jax.core.files import read_record
from pats_jax.errors import InputError
from pats_jax.models.config import EncoderConfig
from pats_jax.models.sources import checkpoint_folder

# The classes that AutoTokenizer would choose; to import one of them is 3 s quicker than to import AutoTokenizer.
_BY_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
_SENTENCEPIECE = "sentencepiece.bpe.model"
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", _SENTENCEPIECE)


class _Settings(TypedDict, total=False):
    """What we read of ``tokenizer_config.json``."""

    tokenizer_class: str | None


def load_tokenizer(name_or_dir: str | Path, *, revision: str | None = None) -> Any:
    """Loads a checkpoint's own fast tokenizer, of the class that Transformers' ``AutoTokenizer`` chooses.

    Args:
        name_or_dir: As for :func:`pats_jax.models.from_pretrained`.
        revision: The branch, tag or commit of a hub repository.

    Raises:
        InputError: The checkpoint has no tokenizer, or none that Transformers can load as a fast one.
    """
    folder = checkpoint_folder(name_or_dir, revision=revision, check_weights=False)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputError(
            f"{folder}: has no tokenizer ({' or '.join(_VOCABULARIES)}); copy the checkpoint's tokenizer there"
        )
    if not (folder / "tokenizer.json").is_file() and (folder / _SENTENCEPIECE).is_file():
        _check_sentencepiece(folder)
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files: the tokenizers library itself raises bare Exceptions
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer; add a tokenizer.json")
    return tokenizer


def _check_sentencepiece(folder: Path) -> None:
    if importlib.util.find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder}: has no tokenizer.json, and reading its {_SENTENCEPIECE} requires the package sentencepiece; "
            "run: pip install 'pats-jax[sentencepiece]'"
        )


def _tokenizer_class(folder: Path) -> Any:
    """The class named in ``tokenizer_config.json``, else the one of the model type."""
    import transformers

    path = folder / "tokenizer_config.json"
    settings = read_record(path, _Settings) if path.exists() else {}
    named = settings.get("tokenizer_class")
    if named is None:
        named = _BY_MODEL_TYPE[EncoderConfig.from_folder(folder).model_type]
    name = named.removesuffix("Fast")
    return getattr(transformers, name if name in _BY_MODEL_TYPE.values() else "AutoTokenizer")
