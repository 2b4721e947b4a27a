"""T5 (1.0, 1.1, Flan-T5) in Flax Linen.

Module names are those of the Hugging Face tensor names: ``params["decoder"]["block"]["0"]["layer"]["1"]
["EncDecAttention"]["q"]["kernel"]``. The one exception is the table of relative positions, which a file holds in block
0 and all blocks use: ``params["encoder"]["relative_attention_bias"]["embedding"]``.

References:
  Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
    (arXiv:1910.10683); Chung et al. 2022, Scaling Instruction-Finetuned Language Models (arXiv:2210.11416).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models import relative_positions
from pats_jax.models.encoder_decoder import (
    Attention,
    Chosen,
    EncoderDecoder,
    Form,
    KeysValues,
    LayerStack,
    causal_bias,
    embed,
    padding_bias,
)
from pats_jax.models.layers import ACTIVATION_FUNCTIONS
from pats_jax.models.seq2seq_config import T5Config


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the units of a token; in float32."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(self.config.initializer_factor), (self.config.d_model,))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.config.layer_norm_epsilon) * scale).astype(self.dtype)


class RelativePositions(nn.Module):
    """The learned bias of scores by relative position: one table for all blocks of a stack."""

    config: T5Config
    bidirectional: bool

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(config.initializer_factor * config.d_model**-0.5),
            (config.relative_attention_num_buckets, config.num_heads),
        )

    def of(self, distances: np.ndarray) -> Array:
        """The bias of each relative position, (positions, heads); its gradient is a sum, not a scatter."""
        config = self.config
        chosen = relative_positions.buckets(
            distances,
            bidirectional=self.bidirectional,
            count=config.relative_attention_num_buckets,
            farthest=config.relative_attention_max_distance,
        )
        return relative_positions.choose(self.embedding, chosen)

    def __call__(self, length: int) -> Array:
        """The bias of the scores of as many keys as queries, (1, heads, queries, keys)."""
        return relative_positions.spread(self.of(relative_positions.distances(length)), length)

    def of_query(self, position: Array, length: int) -> Array:
        """The bias of the scores of keys 0, 1, ... for a query at a place (): (heads, length), of a decoder."""
        values = self.of(np.concatenate([np.arange(1 - length, 1), np.arange(1, length)]))
        return jax.lax.dynamic_slice_in_dim(values, length - 1 - position, length).T


class SelfAttention(nn.Module):
    """The first sublayer of a block."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        self.SelfAttention = _attention(self.config, self.dtype)
        self.layer_norm = RMSNorm(self.config, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(self, hidden, biases, deterministic):
        normal = self.layer_norm(hidden)
        kept = self.SelfAttention.keys_values(normal)
        attended = self.SelfAttention(normal, kept, biases, deterministic=deterministic)
        return hidden + self.adapt(self.dropout(attended, deterministic=deterministic), hidden)

    def step(self, hidden, kept, position, chosen, bias):
        attended, kept = self.SelfAttention.step(self.layer_norm(hidden), kept, position, chosen, bias)
        return hidden + self.adapt(attended, hidden), kept

    def adapt(self, x, residual):
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x


class CrossAttention(nn.Module):
    """The sublayer of a decoder's block that attends to the encoder's states."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        self.EncDecAttention = _attention(self.config, self.dtype)
        self.layer_norm = RMSNorm(self.config, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(self, hidden, kept, biases, deterministic):
        attended = self.EncDecAttention(self.layer_norm(hidden), kept, biases, deterministic=deterministic)
        return hidden + self.dropout(attended, deterministic=deterministic)

    def keys_values(self, states):
        return self.EncDecAttention.keys_values(states)


class DenseReluDense(nn.Module):
    """``wo(dropout(act(wi x)))``, or gated ``wo(dropout(act(wi_0 x) * wi_1 x))``."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, deterministic: bool) -> Array:
        config, activation = self.config, ACTIVATION_FUNCTIONS[self.config.activation]

        def dense(size: int, inputs: int, name: str) -> nn.Dense:
            init = nn.initializers.normal(config.initializer_factor * inputs**-0.5)
            return nn.Dense(size, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        if config.is_gated:
            wide = activation(dense(config.d_ff, config.d_model, "wi_0")(hidden))
            wide = wide * dense(config.d_ff, config.d_model, "wi_1")(hidden)
        else:
            wide = activation(dense(config.d_ff, config.d_model, "wi")(hidden))
        wide = nn.Dropout(config.dropout_rate)(wide, deterministic=deterministic)
        return dense(config.d_model, config.d_ff, "wo")(wide)


class FeedForward(nn.Module):
    """The last sublayer of a block."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        self.DenseReluDense = DenseReluDense(self.config, self.dtype)
        self.layer_norm = RMSNorm(self.config, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(self, hidden, deterministic):
        forwarded = self.DenseReluDense(self.layer_norm(hidden), deterministic)
        return hidden + self.adapt(self.dropout(forwarded, deterministic=deterministic), hidden)

    def adapt(self, x, residual):
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x


class Sublayers(nn.Module):
    """The sublayers of a block under their numbers."""

    config: T5Config
    dtype: DTypeLike
    is_decoder: bool

    def setup(self):
        kinds = (SelfAttention, CrossAttention, FeedForward) if self.is_decoder else (SelfAttention, FeedForward)
        for number, kind in enumerate(kinds):
            setattr(self, str(number), kind(self.config, self.dtype))

    def __call__(self, hidden, own_biases, cross, deterministic):
        hidden = self._of("0")(hidden, own_biases, deterministic)
        if not self.is_decoder:
            return self._of("1")(hidden, deterministic)
        states, masked = cross
        hidden = self._of("1")(hidden, self._of("1").keys_values(states), (masked,), deterministic)
        return self._of("2")(hidden, deterministic)

    def step(self, hidden, kept, cross, position, chosen, bias, masked):
        hidden, kept = self._of("0").step(hidden, kept, position, chosen, bias)
        hidden = self._of("1")(hidden, cross, (masked,), True)
        return self._of("2")(hidden, True), kept

    def cross(self, states):
        return self._of("1").keys_values(states)

    def _of(self, number: str) -> nn.Module:
        return getattr(self, number)


class Block(nn.Module):
    """A layer of the encoder or decoder."""

    config: T5Config
    dtype: DTypeLike
    is_decoder: bool

    def setup(self):
        self.layer = Sublayers(self.config, self.dtype, self.is_decoder)

    def __call__(
        self, hidden: Array, own_biases: tuple[Array, ...], cross: tuple[Array, Array] | None, *, deterministic: bool
    ) -> Array:
        """Maps (batch, length, hidden) to the same; ``cross`` is the encoder's states and the bias of their padding."""
        return self.layer(hidden, own_biases, cross, deterministic)

    def step(
        self,
        hidden: Array,
        kept: KeysValues,
        cross: KeysValues,
        position: Array,
        chosen: Chosen,
        bias: Array,
        masked: Array,
    ) -> tuple[Array, KeysValues]:
        """One token of each beam; see `Attention.step`."""
        return self.layer.step(hidden, kept, cross, position, chosen, bias, masked)

    def cross(self, states: Array) -> KeysValues:
        """The keys and values of the encoder's states."""
        return self.layer.cross(states)


class Stack(nn.Module):
    """The encoder or the decoder."""

    config: T5Config
    dtype: DTypeLike
    form: Form
    is_decoder: bool

    def setup(self):
        config = self.config
        make = functools.partial(Block, config, self.dtype, self.is_decoder)
        count = config.num_layers_of["decoder" if self.is_decoder else "encoder"]
        self.block = LayerStack(make, count, self.form, self.dtype)
        self.relative_attention_bias = RelativePositions(config, not self.is_decoder)
        self.final_layer_norm = RMSNorm(config, self.dtype)
        self.dropout = nn.Dropout(config.dropout_rate)

    def __call__(
        self, hidden: Array, masks: tuple[Array, ...], cross: tuple[Array, Array] | None, deterministic: bool
    ) -> Array:
        hidden = self.dropout(hidden.astype(self.dtype), deterministic=deterministic)
        biases = (self.relative_attention_bias(hidden.shape[1]), *masks)
        hidden = self.block(hidden, (biases, cross), deterministic=deterministic)
        return self.dropout(self.final_layer_norm(hidden), deterministic=deterministic)


class T5(EncoderDecoder):
    """T5 with its language-model head."""

    config: T5Config

    def setup(self):
        config, factor = self.config, self.config.initializer_factor
        form = Form(self.layers, self.unroll, self.gradient_checkpointing)
        init = nn.initializers.normal(factor)
        self.shared = nn.Embed(config.vocab_size, config.d_model, embedding_init=init)
        self.encoder = Stack(config, self.dtype, form, False)
        self.decoder = Stack(config, self.dtype, form, True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)

    @property
    def stack(self) -> LayerStack:
        return self.decoder.block

    def encoded(self, source: Array, mask: Array, deterministic: bool) -> Array:
        hidden = embed(self.shared.embedding, source, mask != 0)
        return self.encoder(hidden, (padding_bias(mask),), None, deterministic)

    def decode(
        self, target: Array, felt: Array, states: Array, masks: tuple[Array | None, Array], deterministic: bool
    ) -> Array:
        own, source = masks
        biases = (causal_bias(target.shape[1]), *(() if own is None else (padding_bias(own),)))
        hidden = embed(self.shared.embedding, target, felt)
        return self.decoder(hidden, biases, (states, padding_bias(source)), deterministic)

    def started(self, tokens: Array, position: Array, length: int) -> tuple[Array, Array | None]:
        hidden = jnp.take(self.shared.embedding, tokens, axis=0).astype(self.dtype)
        return hidden, self.decoder.relative_attention_bias.of_query(position, length)

    def ended(self, hidden: Array) -> Array:
        return self.decoder.final_layer_norm(hidden)

    def logits(self, hidden: Array) -> Array:
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        words = self.shared.embedding.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, words, preferred_element_type=jnp.float32)


def _attention(config: T5Config, dtype: DTypeLike) -> Attention:
    """Without biases, and without a scale of the scores, which the initialization makes up for."""
    factor, model, width, heads = config.initializer_factor, config.d_model, config.d_kv, config.num_heads
    return Attention(
        names=("q", "k", "v", "o"),
        heads=heads,
        width=width,
        features=model,
        deviations=(
            factor * (model * width) ** -0.5,
            factor * model**-0.5,
            factor * model**-0.5,
            factor * (heads * width) ** -0.5,
        ),
        use_bias=False,
        scale=1.0,
        dropout=config.dropout_rate,
        dtype=dtype,
    )
