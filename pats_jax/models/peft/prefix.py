r"""Prefix tuning: trained keys and values before the text's own, in every layer.

::

    keys   = [k_1, ..., k_length, keys of the text]        k_i, v_i (heads * width,), different in each layer
    values = [v_1, ..., v_length, values of the text]      all queries attend to both

Entries start normal, with standard deviation ``initializer_range`` in an encoder and 0.02 in an encoder-decoder, and
are trained directly: the network through which Li and Liang train them (PEFT's ``prefix_projection``) is not supported.
PEFT saves the resulting keys and values, so its files load in either case.

**Encoders.** The small tree is one matrix, (length, 2 * layers * hidden): for each virtual token, its key and value in
layer 0, then in layer 1, and so on. As in PEFT, position embeddings of the text start after the prefix. Relative and
rotary positions, which PEFT cannot extend, are those of the text alone, and a prefix has none.

**Encoder-decoders** with ``place="everywhere"``, as in the authors' code for BART: encoder and decoder have prefixes in
self-attention, and the decoder in cross-attention, too. Positions of the text stay, and T5 adds no relative bias to the
scores of a prefix.

With ``place="decoder"`` the computation is that of PEFT 0.21, and so is the file. Only the decoder's self-attention has
prefixes. Of the matrix, (length, 2 * layers * hidden), layer l reads vector ``4 l mod 2 layers`` as keys and the one
after it as values: if the number of layers is even, two layers share a prefix, and half of the matrix is never read.
Positions of the target start after the prefix, and T5's relative bias counts it.

References:
  Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv:2101.00190); Liu et al. 2021,
  P-Tuning v2 (arXiv:2110.07602), for encoders.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.errors import InputError
from pats_jax.models.convert import Parameters
from pats_jax.models.peft import decoder_prefix
from pats_jax.models.peft.config import FlatTree, Interceptor, own_variable
from pats_jax.models.peft.saved import ModelConfig, SavedModules
from pats_jax.models.peft.virtual_tokens import EMBEDDINGS, VirtualTokensConfig, sizes_of
from pats_jax.models.seq2seq_config import Seq2SeqConfig

_PARTS = decoder_prefix.PARTS
_PREFIX = "prefix"
_STANDARD_DEVIATION = 0.02  # in an encoder-decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig(VirtualTokensConfig):
    """The settings of prefix tuning.

    Attributes:
      length: number of virtual tokens; in an encoder, and with ``place="decoder"``, each takes one position from the
        text.
      place: of an encoder-decoder, ``"everywhere"`` for every attention, or ``"decoder"`` for PEFT's form.
    """

    length: int = setting(
        20,
        "prefix tuning: number of virtual tokens; each takes one position from the text",
        at_least(1, 8192),
        flag="prefix_length",
    )
    place: Literal["everywhere", "decoder"] = setting(
        "everywhere",
        "prefix tuning of T5 and BART: in every attention, or, as PEFT does, in the decoder's self-attention alone",
        flag="prefix_place",
    )

    kind: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "trained keys and values before the text's own, in every layer"
    source: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    own_type: ClassVar[str] = "PATS_JAX_PREFIX"

    def file_type(self, config: ModelConfig) -> str:
        return self.own_type if self._is_everywhere(config) else self.peft_type

    @classmethod
    def file_types(cls) -> tuple[str, ...]:
        return cls.peft_type, cls.own_type

    def _is_everywhere(self, config: ModelConfig) -> bool:
        """Whether it is of the form that PEFT does not have."""
        return isinstance(config, Seq2SeqConfig) and self.place == "everywhere"

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        if isinstance(config, Seq2SeqConfig):
            shapes = self._shapes(config)
            keys = jax.random.split(key, len(shapes))
            return {
                path: _STANDARD_DEVIATION * jax.random.normal(own, shape)
                for own, (path, shape) in zip(keys, shapes.items(), strict=True)
            }
        if self.place == "decoder":
            raise InputError("prefix_place decoder: the model is an encoder; omit it")
        shape = (self.length, config.num_hidden_layers * 2 * config.hidden_size)
        return {EMBEDDINGS: config.initializer_range * jax.random.normal(key, shape)}

    def _shapes(self, config: Seq2SeqConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shapes of the small tree of an encoder-decoder."""
        if self.place == "everywhere":
            paths = decoder_prefix.attention_paths(config)
            return {(*path, _PREFIX, part): (self.length, size) for path, size in paths.items() for part in _PARTS}
        decoder_prefix.check(config)
        return {EMBEDDINGS: (self.length, config.num_layers_of["encoder"] * 2 * config.d_model)}

    def variables(self, tree: Parameters, config: ModelConfig, stacked: bool) -> Parameters:
        if isinstance(config, Seq2SeqConfig):
            if self.place == "everywhere":
                return tree
            return decoder_prefix.variables(tree[EMBEDDINGS[0]], config, stacked, _PREFIX)
        matrix = tree[EMBEDDINGS[0]].reshape(self.length, config.num_hidden_layers, len(_PARTS), config.hidden_size)

        def of_layer(vectors):  # (..., length, parts, hidden)
            parts = {part: vectors[..., number, :] for number, part in enumerate(_PARTS)}
            return decoder_prefix.nested(config.attention_path, {_PREFIX: parts})

        by_layer = matrix.swapaxes(0, 1)
        numbers = range(config.num_hidden_layers)
        layers = of_layer(by_layer) if stacked else {str(number): of_layer(by_layer[number]) for number in numbers}
        return decoder_prefix.nested((config.base_prefix, *config.stack_path), layers)

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        if isinstance(config, Seq2SeqConfig):
            return decoder_prefix.Prefixes(self.length, config, self.place == "decoder", _PREFIX)

        def prepend(next_fun, args, kwargs, context):
            if context.method_name == "first_position":
                (length,) = args
                if length + self.length > config.max_length:
                    raise ValueError(
                        f"sequences have {length} tokens and the prefix {self.length}, "
                        f"but the model has {config.max_length} positions"
                    )
                return next_fun(length) + self.length
            if context.method_name != "attended_to":
                return next_fun(*args, **kwargs)
            prefix = own_variable(context.module, _PREFIX)
            key, value = (_before(prefix[part], own) for part, own in zip(_PARTS, args, strict=True))
            return next_fun(key, value)

        return prepend

    @classmethod
    def sizes(cls, model: ModelConfig) -> dict[str, int]:
        return sizes_of(model)

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        if self._is_everywhere(config):
            return {"num_virtual_tokens": self.length}
        plain = {"encoder_hidden_size": sizes_of(config)["token_dim"], "prefix_projection": False}
        return super().to_dict(tree, config) | plain

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "PrefixConfig":
        is_seq2seq = isinstance(saved.model, Seq2SeqConfig)
        if saved.fields["peft_type"] == cls.own_type:
            if not is_seq2seq:
                raise InputError(f"{saved.source}: peft_type {cls.own_type} is for T5 and BART, not for an encoder")
            length = saved.get("num_virtual_tokens", 0)
            saved.check_size("num_virtual_tokens", length, f".{_PREFIX}.{_PARTS[0]}", 0)
            return cls(length=length)
        if isinstance(saved.model, Seq2SeqConfig):
            decoder_prefix.check(saved.model)
        config = super().from_saved(saved)
        return cls(length=config.length, place="decoder" if is_seq2seq else "everywhere")

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        if not self._is_everywhere(config):
            return super().to_tensors(tree, config)
        return {f"{self.prefix}model.{'.'.join(path)}": np.asarray(x, np.float32) for path, x in tree.items()}

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        if not self._is_everywhere(config):
            return super().from_tensors(tensors, config)
        start = f"{self.prefix}model."
        return {tuple(name.removeprefix(start).split(".")): x for name, x in tensors.items()}


def _before(vectors: jax.Array, tokens: jax.Array) -> jax.Array:
    """A prefix (length, heads * width) before keys or values (batch, tokens, heads, width)."""
    own = vectors.reshape(len(vectors), *tokens.shape[2:]).astype(tokens.dtype)
    return jnp.concatenate([jnp.broadcast_to(own, (len(tokens), *own.shape)), tokens], axis=1)
