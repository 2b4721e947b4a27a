"""More words, or fewer: `resize_vocabulary`."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pats_jax.models.config import EncoderConfig
from pats_jax.models.convert import Parameters
from pats_jax.random import as_key

Config = TypeVar("Config", bound=EncoderConfig)


def resize_vocabulary(params: Parameters, config: Config, vocab_size: int, *, key: Any) -> tuple[Parameters, Config]:
    """Adds rows to the word embeddings of a classifier, for a tokenizer with added tokens, or cuts the last ones off.

    The rule is ours: each unit of a new row is normal, with the mean and the standard deviation that the unit has over
    the old rows.

    Args:
      params: the parameters of a `SequenceClassifier`; they stay as they are.
      config: its config.
      vocab_size: the new number of rows, such as ``len(tokenizer)``.
      key: an int or a typed key, for the new rows.

    Returns:
      The parameters, which share all other arrays, and the config, for a new `SequenceClassifier`.

    Raises:
      ValueError: if no row would be left for the padding token.

    Examples:
      >>> from pats_jax import models
      >>> config = models.EncoderConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
      >>> params = models.SequenceClassifier(config).init(jax.random.key(0), jnp.ones((1, 3), int))["params"]
      >>> params, config = models.resize_vocabulary(params, config, 12, key=0)
      >>> config.vocab_size, config.word_embeddings(params).shape
      (12, (12, 4))
    """
    if vocab_size <= config.pad_token_id:
        raise ValueError(f"vocab_size {vocab_size}: must be above pad_token_id {config.pad_token_id}")
    old = jnp.asarray(config.word_embeddings(params))
    noise = jax.random.normal(as_key(key), (max(vocab_size - len(old), 0), old.shape[1]), old.dtype)
    new = jnp.concatenate([old[:vocab_size], jnp.mean(old, axis=0) + jnp.std(old, axis=0) * noise])
    path = (config.base_prefix, *config.words_path, "embedding")
    return _replaced(params, path, new), dataclasses.replace(config, vocab_size=vocab_size)


def _replaced(tree: Parameters, path: tuple[str, ...], value: Any) -> Parameters:
    """The tree with another leaf at a path."""
    name, *rest = path
    return {**tree, name: _replaced(tree[name], tuple(rest), value) if rest else value}
