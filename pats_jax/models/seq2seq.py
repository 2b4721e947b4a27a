"""Loading T5 and BART checkpoints, and their parameters as tensors to save."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from pats_jax.errors import InputError, shown
from pats_jax.models import convert, weights
from pats_jax.models.bart import Bart
from pats_jax.models.config import read_config
from pats_jax.models.convert import ParameterPath, Parameters
from pats_jax.models.layers import STACKED
from pats_jax.models.layout import stack_layers, unstack_layers
from pats_jax.models.seq2seq_config import BartConfig, Seq2SeqConfig, T5Config, config_from_dict
from pats_jax.models.sources import checkpoint_folder
from pats_jax.models.t5 import T5

logger = logging.getLogger(__name__)

_LOGITS_BIAS = ("final_logits", "bias")
_IGNORED = (
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # T5's, of early versions
    "model.encoder.version",
    "model.decoder.version",
)


def from_pretrained_seq2seq(
    name_or_dir: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    layers: str = "separate",
    unroll: int = 1,
    revision: str | None = None,
) -> tuple[T5 | Bart, Parameters, T5Config | BartConfig]:
    """Loads a T5 (1.0, 1.1, Flan-T5) or BART checkpoint with its language-model head.

    Every tensor of the model must be there; unused tensors are listed in the log. ``config.tie_word_embeddings`` says
    of a T5 what its files hold: a head of its own, or the table of words alone.

    Args:
      name_or_dir: a local folder or a hub id (safetensors only).
      dtype: the dtype of computation, float32 or bfloat16. Parameters are always float32.
      dropout: replaces all of the config's rates.
      gradient_checkpointing: see `EncoderDecoder`.
      layers: ``"separate"`` or ``"stacked"``, see `EncoderDecoder`. Stacked parameters need
        ``layer_axis=pats_jax.models.layer_axis`` in the transforms that have that argument.
      unroll: see `EncoderDecoder`.
      revision: the branch, tag or commit of a hub repository.

    Returns:
      The model, its parameters (nested dicts, float32) and the config.

    Raises:
      InputError: if the checkpoint cannot be found, read or used.
      ValueError: if an argument is not one of those named here.
    """
    folder = checkpoint_folder(name_or_dir, revision=revision)
    config, source = config_from_dict(*read_config(folder)), str(folder)
    files = weights.tensor_files(folder)
    tensors = _by_own_name(files, config, source)
    _check_sizes(weights.shapes(files), tensors, config, source)
    config, tensors = _with_tables(config, tensors, files, source)
    bias = _logits_bias(tensors, config, files, source)
    form = {"gradient_checkpointing": gradient_checkpointing, "layers": layers, "unroll": unroll}
    model = _model(_with_dropout(config, dropout), bias is not None, dtype=jnp.dtype(dtype), **form)
    shapes = _parameter_shapes(config)
    sources = {path: tensors.pop(name) for path in shapes if (name := tensor_name(path)) in tensors}
    missing = [tensor_name(path) for path in shapes if path not in sources]
    if missing:
        raise convert.incomplete(convert.listing(missing), config, source)
    if surplus := [own for name, own in tensors.items() if name not in _IGNORED]:
        logger.warning("%s: not used: %s", name_or_dir, convert.listing(surplus))
    read = weights.read_tensors({name: files[name] for name in sources.values()})
    flat = {path: convert.to_parameter(path, shapes[path], read[name], source=source) for path, name in sources.items()}
    params = unflatten_dict(flat | ({} if bias is None else {_LOGITS_BIAS: bias}))
    if layers == STACKED:
        params = stack_layers(params)
    return model, jax.device_put(params, may_alias=False), model.config


def to_tensors(params: Parameters, config: Seq2SeqConfig) -> dict[str, np.ndarray]:
    """Parameters with separate or stacked layers as a checkpoint's tensors.

    Raises:
      ValueError: if ``params`` do not match ``config``.
    """
    flat = flatten_dict(unstack_layers(jax.device_get(params), config.num_layers_of))
    shapes = dict(_parameter_shapes(config))
    if isinstance(config, BartConfig):
        bias = np.asarray(flat.pop(_LOGITS_BIAS, np.zeros(config.vocab_size)), np.float32)
        flat[_LOGITS_BIAS], shapes[_LOGITS_BIAS] = bias, (config.vocab_size,)
    convert.check_shapes(flat, shapes)
    tensors = {tensor_name(path): convert.to_tensor(path, value) for path, value in flat.items()}
    return {name: value[None] if name == "final_logits_bias" else value for name, value in tensors.items()}


def tensor_name(path: ParameterPath) -> str:
    """The Hugging Face name of a parameter of T5 or BART."""
    if path == _LOGITS_BIAS:
        return "final_logits_bias"
    if path[1] == "relative_attention_bias":
        return f"{path[0]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return convert.tensor_name(path)


def _model(config: T5Config | BartConfig, has_logits_bias: bool = False, **options: Any) -> T5 | Bart:
    if isinstance(config, T5Config):
        return T5(config, **options)
    return Bart(config, has_logits_bias=has_logits_bias, **options)


@functools.lru_cache(maxsize=8)
def _parameter_shapes(config: Seq2SeqConfig) -> Mapping[ParameterPath, tuple[int, ...]]:
    """The shape of every parameter by its path, without the bias of BART's logits; computes nothing."""
    assert isinstance(config, T5Config | BartConfig)
    ids = jnp.zeros((1, 1), jnp.int32)
    return convert.shapes_of(_model(config), ids, labels=ids)


def _by_own_name(files: Mapping[str, Path], config: Seq2SeqConfig, source: str) -> dict[str, str]:
    """Today's name of each tensor with the checkpoint's own: a file of BART without head lacks ``model.``."""
    found: dict[str, str] = {}
    for own in sorted(files):
        is_bare = config.model_type == "bart" and own.startswith(("shared.", "encoder.", "decoder."))
        other = found.setdefault(f"model.{own}" if is_bare else own, own)
        if other != own:
            raise InputError(f"{source}: tensors {other} and {own} fill the same parameter; keep one of them")
    return found


def _check_sizes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, str], config: Seq2SeqConfig, source: str
) -> None:
    """Compares the numbers of layers and the width with a checkpoint's, before a model of these sizes is made."""
    prefix, layers = ("model.", "layers") if isinstance(config, BartConfig) else ("", "block")
    for side, count in config.num_layers_of.items():
        start = f"{prefix}{side}.{layers}."
        found = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})
        if found < count:
            raise InputError(
                f"{source}: the checkpoint has {found} {side} layers, but config.json says {shown(count)}; "
                f"it is incomplete or not a {config.model_type} model"
            )
    for name in _tables(config):
        expected = (config.vocab_size, config.d_model)
        if name in tensors and shapes[tensors[name]] != expected:
            raise convert.other_shape(name, shapes[tensors[name]], expected, source)


def _tables(config: Seq2SeqConfig) -> tuple[str, ...]:
    """Under which names a checkpoint may have the table of words, the first that it has being that table."""
    prefix = "model." if config.model_type == "bart" else ""
    sides = (f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
    return (f"{prefix}shared.weight", *sides, "lm_head.weight")


def _with_tables(
    config: T5Config | BartConfig, tensors: Mapping[str, str], files: Mapping[str, Path], source: str
) -> tuple[T5Config | BartConfig, dict[str, str]]:
    """The config with what the files say of T5's head, and the tensors without copies of the table of words."""
    names = [name for name in _tables(config) if name in tensors]
    if not names:
        raise convert.incomplete(_tables(config)[0], config, source)
    read = weights.read_tensors({tensors[name]: files[tensors[name]] for name in names})
    others = [name for name in names[1:] if not np.array_equal(read[tensors[name]], read[tensors[names[0]]])]
    has_head = isinstance(config, T5Config) and "lm_head.weight" in others
    for name in others:
        if not (has_head and name == "lm_head.weight"):
            raise InputError(f"{source}: tensor {name} differs from {names[0]}; several tables are not supported")
    rest = {name: own for name, own in tensors.items() if name not in names}
    rest[_tables(config)[0]] = tensors[names[0]]
    if has_head:
        rest["lm_head.weight"] = tensors["lm_head.weight"]
    if isinstance(config, T5Config):
        config = dataclasses.replace(config, tie_word_embeddings=not has_head)
    return config, rest


def _logits_bias(
    tensors: dict[str, str], config: Seq2SeqConfig, files: Mapping[str, Path], source: str
) -> np.ndarray | None:
    """BART's constant for every word, taken out of the tensors; None where it is zero, as it mostly is."""
    own = tensors.pop("final_logits_bias", None) if isinstance(config, BartConfig) else None
    if own is None:
        return None
    value = weights.read_tensors({own: files[own]})[own]
    if value.shape != (1, config.vocab_size):
        raise convert.other_shape(own, value.shape, (1, config.vocab_size), source)
    bias = convert.to_parameter(("bias",), (config.vocab_size,), value[0], source=source)
    return bias if bias.any() else None


def _with_dropout(config: T5Config | BartConfig, dropout: float | None) -> T5Config | BartConfig:
    if dropout is None:
        return config
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    rates: dict[str, Any] = dict.fromkeys(config.rates, dropout)
    return dataclasses.replace(config, **rates)
