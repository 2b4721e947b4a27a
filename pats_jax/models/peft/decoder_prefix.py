"""Prefixes in the attentions of T5 and BART, in training and in generation; `pats_jax.models.peft.prefix` has the rule.

In generation the cache of the decoder's self-attention begins with the prefix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pats_jax.errors import InputError
from pats_jax.models import bart, t5
from pats_jax.models.convert import ParameterPath, Parameters
from pats_jax.models.encoder_decoder import Attention, Cache, EncoderDecoder
from pats_jax.models.peft.config import COLLECTION, own_variable
from pats_jax.models.seq2seq_config import Seq2SeqConfig, T5Config

PARTS = ("key", "value")


def attention_paths(config: Seq2SeqConfig) -> dict[ParameterPath, int]:
    """The path of every attention, and the units of all its heads."""
    paths: dict[ParameterPath, int] = {}
    for side, count in config.num_layers_of.items():
        size = config.heads_of[side] * (config.head_width if side == "decoder" else _encoder_width(config))
        for number in range(count):
            paths |= dict.fromkeys((_layer(config, side, number, name) for name in _names(config, side)), size)
    return paths


def check(config: Seq2SeqConfig) -> None:
    """Raises InputError if PEFT's form does not fit the model."""
    layers, heads = config.num_layers_of, config.heads_of
    if layers["encoder"] != layers["decoder"] or heads["encoder"] != heads["decoder"]:
        raise InputError("prefix_place decoder: encoder and decoder differ in layers or heads; take everywhere")
    if heads["decoder"] * config.head_width != config.d_model:
        raise InputError(
            f"prefix_place decoder: the heads have {heads['decoder'] * config.head_width} units, which must be as many "
            f"as d_model, {config.d_model}; take everywhere"
        )


def variables(matrix: jax.Array, config: Seq2SeqConfig, stacked: bool, leaf: str) -> Parameters:
    """What the layers of the decoder read of PEFT's matrix (length, 2 * layers * hidden), at the attentions' paths."""
    count = config.num_layers_of["decoder"]
    slots = matrix.reshape(len(matrix), 2 * count, config.d_model)
    by_layer = [
        {part: slots[:, (4 * number + place) % (2 * count)] for place, part in enumerate(PARTS)}
        for number in range(count)
    ]
    if stacked:
        leaves = jax.tree.map(lambda *layers: jnp.stack(layers), *by_layer)
        return nested((*_stack(config, "decoder"), *_names(config, "decoder")[0], leaf), leaves)
    layers = {str(number): nested((*_names(config, "decoder")[0], leaf), own) for number, own in enumerate(by_layer)}
    return nested(_stack(config, "decoder"), layers)


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Puts prefixes before keys and values.

    Attributes:
      length: of the prefixes.
      config: the model's.
      as_in_peft: whether positions count the prefix.
      leaf: the name of an attention's prefix in the small tree.
    """

    length: int
    config: Seq2SeqConfig
    as_in_peft: bool
    leaf: str

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """The interceptor; see `flax.linen.intercept_methods`."""
        module, method = context.module, context.method_name
        changed = None
        if isinstance(module, Attention):
            changed = {"__call__": self._attend, "step": self._attend_in_step}.get(method)
        elif isinstance(module, EncoderDecoder):
            changed = {"start_cache": self._start_cache, "decode": self._decode}.get(method)
        elif isinstance(module, t5.RelativePositions) and not module.bidirectional:
            changed = {"__call__": self._relative, "of_query": self._relative_of_query}.get(method)
        elif isinstance(module, bart.Stack) and module.is_decoder:
            changed = {"first_position": self._first_position}.get(method)
        return next_fun(*args, **kwargs) if changed is None else changed(module, next_fun, args, kwargs)

    def _attend(self, attention, next_fun, args, kwargs):
        prefix = own_variable(attention, self.leaf)
        if prefix is None:
            return next_fun(*args, **kwargs)
        hidden, (key, value), biases = args
        key, value = _before(prefix["key"], key, attention.heads), _before(prefix["value"], value, attention.heads)
        return next_fun(hidden, (key, value), tuple(_padded(bias, key.shape[2]) for bias in biases), **kwargs)

    def _attend_in_step(self, attention, next_fun, args, kwargs):
        hidden, kept, position, chosen, bias = args
        own = jnp.eye(chosen.shape[1], dtype=bool)[:, :, None]
        own = jnp.broadcast_to(own, (*chosen.shape[:3], self.length))
        return next_fun(hidden, kept, position + self.length, jnp.concatenate([own, chosen], axis=3), bias)

    def _start_cache(self, model, next_fun, args, kwargs):
        self._check_room(args[2])
        cache, own = next_fun(*args), []
        for number, (key, value) in enumerate(cache.own):
            prefix = _at(model.variables[COLLECTION], (*_layer_path(self.config, number), self.leaf))
            heads = self.config.heads_of["decoder"]
            own.append((_before_slots(prefix["key"], key, heads), _before_slots(prefix["value"], value, heads)))
        return Cache(tuple(own), cache.cross)

    def _decode(self, model, next_fun, args, kwargs):
        self._check_room(args[0].shape[1])
        return next_fun(*args, **kwargs)

    def _relative(self, module, next_fun, args, kwargs):
        """The bias of a whole target: (1, heads, queries, keys), of PEFT's form with the prefix among the keys."""
        (tokens,) = args
        return next_fun(tokens + self.length)[:, :, self.length :] if self.as_in_peft else next_fun(tokens)

    def _relative_of_query(self, module, next_fun, args, kwargs):
        """The bias of one query, (heads, keys), with the prefix among the keys, as it is in the cache."""
        position, keys = args
        if self.as_in_peft:
            return next_fun(position + self.length, keys)
        return jnp.pad(next_fun(position, keys - self.length), ((0, 0), (self.length, 0)))

    def _first_position(self, module, next_fun, args, kwargs):
        return next_fun() + (self.length if self.as_in_peft else 0)

    def _check_room(self, tokens):
        longest = self.config.max_length
        if self.as_in_peft and longest is not None and tokens + self.length > longest:
            raise ValueError(
                f"sequences have {tokens} tokens and the prefix {self.length}, but the model has {longest} positions"
            )


def _before(vectors: jax.Array, kept: jax.Array, heads: int) -> jax.Array:
    """A prefix (length, heads * width) before keys or values (batch, heads, tokens, width)."""
    own = vectors.reshape(len(vectors), heads, -1).swapaxes(0, 1).astype(kept.dtype)
    return jnp.concatenate([jnp.broadcast_to(own, (len(kept), *own.shape)), kept], axis=2)


def _before_slots(vectors: jax.Array, kept: jax.Array, heads: int) -> jax.Array:
    """The same before the slots of a cache (batch, heads, beams, tokens, width): each beam's has the prefix."""
    batch, _, beams, _, width = kept.shape
    own = vectors.reshape(len(vectors), heads, -1).swapaxes(0, 1).astype(kept.dtype)[None, :, None]
    return jnp.concatenate([jnp.broadcast_to(own, (batch, heads, beams, len(vectors), width)), kept], axis=3)


def _padded(bias: jax.Array, length: int) -> jax.Array:
    """A bias of scores (..., tokens) with 0 for a prefix, if it is for the tokens after it only."""
    return jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (length - bias.shape[-1], 0)))


def _encoder_width(config: Seq2SeqConfig) -> int:
    return config.head_width if isinstance(config, T5Config) else config.d_model // config.heads_of["encoder"]


def _stack(config: Seq2SeqConfig, side: str) -> ParameterPath:
    return (side, "block") if isinstance(config, T5Config) else ("model", side, "layers")


def _names(config: Seq2SeqConfig, side: str) -> tuple[ParameterPath, ...]:
    """The paths of a layer's attentions, self-attention first."""
    names: tuple[ParameterPath, ...] = (("self_attn",), ("encoder_attn",))
    if isinstance(config, T5Config):
        names = (("layer", "0", "SelfAttention"), ("layer", "1", "EncDecAttention"))
    return names if side == "decoder" else names[:1]


def _layer(config: Seq2SeqConfig, side: str, number: int, name: ParameterPath) -> ParameterPath:
    return (*_stack(config, side), str(number), *name)


def _layer_path(config: Seq2SeqConfig, number: int) -> ParameterPath:
    """The path of the self-attention of a layer of the decoder."""
    return _layer(config, "decoder", number, _names(config, "decoder")[0])


def _at(tree: Any, path: ParameterPath) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def nested(path: ParameterPath, leaf: Any) -> Any:
    """A tree of dicts with one leaf, or subtree, at a path."""
    for name in reversed(path):
        leaf = {name: leaf}
    return leaf
