"""The masked-language-model head of checkpoints: its parameters and its logits.

References:
  Devlin et al. 2019, BERT (arXiv:1810.04805); Liu et al. 2019, RoBERTa (arXiv:1907.11692).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.typing import ArrayLike

from pats_jax.errors import InputError
from pats_jax.models import convert, weights
from pats_jax.models.config import EncoderConfig
from pats_jax.models.convert import Parameters
from pats_jax.models.encoders.encoder import MaskedLanguageModel
from pats_jax.models.encoders.table import encoder_of
from pats_jax.models.sources import checkpoint_folder


def load_mlm_head(name_or_dir: str | Path, config: EncoderConfig, *, revision: str | None = None) -> Parameters:
    """Loads the masked-language-model head of a checkpoint, for `mlm_logits`.

    The decoder's matrix is not among the parameters: it is the encoder's word embeddings.

    Args:
      name_or_dir: as for `pats_jax.models.from_pretrained`.
      config: the checkpoint's config, as ``from_pretrained`` returns it.
      revision: the branch, tag or commit of a hub repository.

    Returns:
      The parameters for ``params["mlm"]``, float32: ``dense`` with ``kernel`` (hidden, embedding_size) and ``bias``
      (embedding_size,), ``LayerNorm`` (ModernBERT: ``norm``) with ``scale`` and ``bias`` (embedding_size,), and
      ``bias`` (vocab_size,). ModernBERT has only the biases that its config says.

    Raises:
      InputError: if the checkpoint cannot be found or read, lacks such a head or a part of it, has a tensor whose shape
        does not match the config, or has a decoder that is not tied to the word embeddings.
    """
    folder = checkpoint_folder(name_or_dir, revision=revision)
    source = str(folder)
    files = weights.tensor_files(folder)
    own_names = convert.by_canonical_name(files, config, source=source)
    masked_lm = _masked_lm(config, source)
    shapes = _parameter_shapes(masked_lm, config)
    if masked_lm.other is not None and convert.tensor_name(masked_lm.checkpoint_path(("bias",))) not in own_names:
        masked_lm = masked_lm.other
    in_checkpoint = {path: masked_lm.checkpoint_path(path) for path in shapes}
    names = {path: convert.tensor_name(there) for path, there in in_checkpoint.items()}
    missing = [name for name in names.values() if name not in own_names]
    if len(missing) == len(names):
        raise InputError(
            f"{source}: the checkpoint has no masked-language-model head ({min(names.values())}); use the head pair "
            "instead"
        )
    if missing:
        raise InputError(f"{source}: the masked-language-model head is incomplete: it lacks {', '.join(missing)}")
    _check_tied(files, own_names, config, masked_lm, source)
    tensors = weights.read_tensors({own_names[name]: files[own_names[name]] for name in names.values()})
    loaded = {
        path: convert.to_parameter(there, shapes[path], tensors[own_names[names[path]]], source=source)
        for path, there in in_checkpoint.items()
    }
    return jax.device_put(unflatten_dict(loaded), may_alias=False)


def mlm_logits(head: Mapping[str, Any], config: EncoderConfig, hidden: ArrayLike, word_embeddings: ArrayLike) -> Array:
    """The logits of every word of the vocabulary at each given token::

        logits = LayerNorm(activation(hidden W + b)) E^T + c

    with the head's ``W``, ``b``, LayerNorm and ``c``, and the word embeddings ``E``. The activation of BERT,
    DistilBERT and DeBERTa is the config's ``hidden_act``, that of ModernBERT its ``classifier_activation``, and that of
    RoBERTa, ELECTRA and MPNet always the exact GELU. ModernBERT may lack the biases. A softmax over
    the last axis gives the probability of each word at that token. The computation is in the dtype of ``hidden``; the
    last product is summed in float32.

    Args:
      head: the head's parameters, from `load_mlm_head`.
      config: the config of the encoder.
      hidden: the last of the hidden states of a model with ``first_token_only=False``, (..., hidden): at all tokens or,
        which is cheaper, only at the masked ones.
      word_embeddings: the encoder's, (vocab_size, embedding_size): ``config.word_embeddings(params)``.

    Returns:
      Logits, float32 (..., vocab_size).

    Raises:
      ValueError: if the shape of the word embeddings does not match the config.
    """
    words = jnp.asarray(word_embeddings)
    if words.shape != (config.vocab_size, config.embedding_size):
        raise ValueError(
            f"word_embeddings have shape {words.shape}; the config says {(config.vocab_size, config.embedding_size)}"
        )
    logits = _masked_lm(config, "config").head(config).apply({"params": head}, jnp.asarray(hidden), words)
    assert isinstance(logits, Array)
    return logits


def _masked_lm(config: EncoderConfig, source: str) -> MaskedLanguageModel:
    """The masked-language-model head of a config's family.

    Raises:
      InputError: if it has none.
    """
    found = encoder_of(config).masked_lm
    if found is None:
        raise InputError(f"{source}: a {config.model_type} model has no masked-language-model head")
    return found


def _parameter_shapes(
    masked_lm: MaskedLanguageModel, config: EncoderConfig
) -> Mapping[convert.ParameterPath, tuple[int, ...]]:
    """The shape of each of the head's parameters by its path; computes nothing."""
    hidden, words = jnp.zeros((1, config.hidden_size)), jnp.zeros((1, config.embedding_size))
    return convert.shapes_of(masked_lm.head(config), hidden, words)


def _check_tied(
    files: Mapping[str, Path],
    own_names: Mapping[str, str],
    config: EncoderConfig,
    masked_lm: MaskedLanguageModel,
    source: str,
) -> None:
    """Raises InputError if the decoder's own matrix or bias, which some checkpoints hold, differs from the tied one."""
    decoder = masked_lm.decoder_path
    words = (config.base_prefix, *config.words_path, "embedding")
    twins = {
        (*decoder, "kernel"): words,
        (*decoder, "bias"): masked_lm.checkpoint_path(("bias",)),
    }
    for path, twin_path in twins.items():
        own, twin = convert.tensor_name(path), convert.tensor_name(twin_path)
        if own == twin or own not in own_names or twin not in own_names:
            continue
        pair = (own_names[own], own_names[twin])
        tensors = weights.read_tensors({name: files[name] for name in pair})
        if not np.array_equal(tensors[pair[0]], tensors[pair[1]]):
            raise InputError(
                f"{source}: tensor {own} differs from {twin}; only heads tied to the word embeddings are supported"
            )
