"""The list of encoders, by the ``model_type`` of their config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pats_jax.errors import InputError, shown
from pats_jax.models.config import EncoderConfig, read_config
from pats_jax.models.encoders import bert, deberta, distilbert, electra, modernbert, mpnet
from pats_jax.models.encoders.encoder import Encoder

ENCODERS: dict[str, Encoder] = {
    "bert": bert.BERT,
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), bert.ROBERTA),
    "distilbert": distilbert.DISTILBERT,
    "electra": electra.ELECTRA,
    "mpnet": mpnet.MPNET,
    "deberta-v2": deberta.DEBERTA,
    "modernbert": modernbert.MODERNBERT,
}
_ENCODER_DECODERS = ("t5", "bart")


def encoder_of(config: EncoderConfig) -> Encoder:
    """How a model of this config is computed."""
    return ENCODERS[config.model_type]


def encoder_config(values: Mapping[str, Any], source: str = "config.json") -> EncoderConfig:
    """Reads the content of a ``config.json``.

    Args:
      values: the parsed JSON object.
      source: what to call it in error messages.

    Returns:
      The config, of the class of its model type.

    Raises:
      InputError: if the model type is not supported; or as from `EncoderConfig.from_dict`.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ENCODERS:
        why = " (an encoder-decoder: see `pats-jax text2text`)" if model_type in _ENCODER_DECODERS else ""
        raise InputError(
            f"{source}: model_type {shown(model_type)} is not supported{why}; use a checkpoint of type "
            f"{', '.join(ENCODERS)}"
        )
    return ENCODERS[model_type].config.from_dict(values, source)


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Reads ``folder/config.json``.

    Raises:
      InputError: as from `encoder_config`; or if the file is missing or damaged.
    """
    return encoder_config(*read_config(folder))
