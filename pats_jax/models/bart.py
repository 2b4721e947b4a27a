"""BART in Flax Linen.

Module names are those of the Hugging Face tensor names:
``params["model"]["decoder"]["layers"]["0"]["encoder_attn"]["q_proj"]["kernel"]``.

References:
  Lewis et al. 2020, BART: Denoising Sequence-to-Sequence Pre-training (arXiv:1910.13461).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

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
from pats_jax.models.seq2seq_config import BartConfig

_EPS = 1e-5  # of all normalizations
_FIRST_POSITION = 2  # the row of the first token in the tables of positions


class LayerNorm(nn.Module):
    """Normalises each token over its units, with learned scale and bias; in float32."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + _EPS) * scale + bias).astype(self.dtype)


class Layer(nn.Module):
    """A layer of the encoder or decoder: every sublayer's output is added to its input, then normalised."""

    config: BartConfig
    dtype: DTypeLike
    is_decoder: bool

    def setup(self):
        config, side = self.config, "decoder" if self.is_decoder else "encoder"
        self.self_attn = _attention(config, side, self.dtype)
        self.self_attn_layer_norm = LayerNorm(self.dtype)
        if self.is_decoder:
            self.encoder_attn = _attention(config, side, self.dtype)
            self.encoder_attn_layer_norm = LayerNorm(self.dtype)
        init = nn.initializers.normal(config.init_std)
        wide = config.decoder_ffn_dim if self.is_decoder else config.encoder_ffn_dim
        self.fc1 = nn.Dense(wide, dtype=self.dtype, kernel_init=init)
        self.fc2 = nn.Dense(config.d_model, dtype=self.dtype, kernel_init=init)
        self.final_layer_norm = LayerNorm(self.dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def __call__(
        self, hidden: Array, own_biases: tuple[Array, ...], cross: tuple[Array, Array] | None, *, deterministic: bool
    ) -> Array:
        """Maps (batch, length, hidden) to the same; ``cross`` is the encoder's states and the bias of their padding."""
        kept = self.self_attn.keys_values(hidden)
        attended = self.self_attn(hidden, kept, own_biases, deterministic=deterministic)
        attended = self.adapt_attention(self.dropout(attended, deterministic=deterministic), hidden)
        hidden = self.self_attn_layer_norm(hidden + attended)
        if cross is not None:
            states, masked = cross
            hidden = self._attend_to_source(hidden, self.cross(states), masked, deterministic)
        return self._feed_forward(hidden, deterministic)

    def step(
        self,
        hidden: Array,
        kept: KeysValues,
        cross: KeysValues,
        position: Array,
        chosen: Chosen,
        bias: Array | None,
        masked: Array,
    ) -> tuple[Array, KeysValues]:
        """One token of each beam; see `Attention.step`."""
        attended, kept = self.self_attn.step(hidden, kept, position, chosen, bias)
        hidden = self.self_attn_layer_norm(hidden + self.adapt_attention(attended, hidden))
        return self._feed_forward(self._attend_to_source(hidden, cross, masked, True), True), kept

    def cross(self, states: Array) -> KeysValues:
        """The keys and values of the encoder's states."""
        return self.encoder_attn.keys_values(states)

    def _attend_to_source(self, hidden, kept, masked, deterministic):
        attended = self.encoder_attn(hidden, kept, (masked,), deterministic=deterministic)
        return self.encoder_attn_layer_norm(hidden + self.dropout(attended, deterministic=deterministic))

    def _feed_forward(self, hidden, deterministic):
        wide = ACTIVATION_FUNCTIONS[self.config.activation_function](self.fc1(hidden))
        forwarded = self.fc2(self.activation_dropout(wide, deterministic=deterministic))
        forwarded = self.adapt_output(self.dropout(forwarded, deterministic=deterministic), hidden)
        return self.final_layer_norm(hidden + forwarded)

    def adapt_attention(self, x: Array, residual: Array) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x

    def adapt_output(self, x: Array, residual: Array) -> Array:
        """As `adapt_attention`, after the feed-forward block."""
        return x


class Stack(nn.Module):
    """The encoder or the decoder, with its positions."""

    config: BartConfig
    dtype: DTypeLike
    form: Form
    is_decoder: bool

    def setup(self):
        config = self.config
        make = functools.partial(Layer, config, self.dtype, self.is_decoder)
        count = config.num_layers_of["decoder" if self.is_decoder else "encoder"]
        self.embed_positions = nn.Embed(
            config.max_position_embeddings + _FIRST_POSITION,
            config.d_model,
            embedding_init=nn.initializers.normal(config.init_std),
        )
        self.layernorm_embedding = LayerNorm(self.dtype)
        self.layers = LayerStack(make, count, self.form, self.dtype)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self, words: Array, biases: tuple[Array, ...], cross: tuple[Array, Array] | None, deterministic: bool
    ) -> Array:
        """The states (batch, length, hidden) from embedded words of that shape."""
        first = self.first_position()
        positions = self.embed_positions.embedding[first : first + words.shape[1]]
        hidden = self.dropout(self.layernorm_embedding(words + positions), deterministic=deterministic)
        return self.layers(hidden, (biases, cross), deterministic=deterministic)

    def started(self, words: Array, position: Array) -> Array:
        """What goes into the first layer for words (batch, beams, hidden) that all have one position."""
        table = self.embed_positions.embedding
        return self.layernorm_embedding(
            words + jax.lax.dynamic_slice_in_dim(table, position + self.first_position(), 1)
        )

    def first_position(self) -> int:
        """The row of the first token in the table of positions. Prefixes (`pats_jax.models.peft`) act here."""
        return _FIRST_POSITION


class Stacks(nn.Module):
    """The table of words, the encoder and the decoder."""

    config: BartConfig
    dtype: DTypeLike
    form: Form

    def setup(self):
        config = self.config
        self.shared = nn.Embed(config.vocab_size, config.d_model, embedding_init=self._draw_words)
        self.encoder = Stack(config, self.dtype, self.form, False)
        self.decoder = Stack(config, self.dtype, self.form, True)

    def _draw_words(self, key, shape, dtype):
        drawn = nn.initializers.normal(self.config.init_std)(key, shape, dtype)
        return drawn.at[self.config.pad_token_id].set(0)

    def words(self, ids: Array, felt: Array) -> Array:
        """The embedded words; as in torch (``padding_idx``), padding's gets no gradient."""
        words = embed(self.shared.embedding, ids, felt & (ids != self.config.pad_token_id))
        return words * self.config.d_model**0.5 if self.config.scale_embedding else words


class Bart(EncoderDecoder):
    """BART with its language-model head, whose matrix is the table of words.

    A checkpoint whose ``final_logits_bias`` is not zero has it in ``params["final_logits"]["bias"]``. It is a constant,
    as in torch: it has no gradient, so leave it out of what you train (``TrainState.create(trainable=...)``).
    """

    config: BartConfig
    has_logits_bias: bool = False

    def setup(self):
        config = self.config
        self.model = Stacks(config, self.dtype, Form(self.layers, self.unroll, self.gradient_checkpointing))
        if self.has_logits_bias:
            self.final_logits = Bias(config.vocab_size)

    @property
    def stack(self) -> LayerStack:
        return self.model.decoder.layers

    def encoded(self, source: Array, mask: Array, deterministic: bool) -> Array:
        words = self.model.words(source, mask != 0)
        return self.model.encoder(words, (padding_bias(mask),), None, deterministic)

    def decode(
        self, target: Array, felt: Array, states: Array, masks: tuple[Array | None, Array], deterministic: bool
    ) -> Array:
        own, source = masks
        biases = (causal_bias(target.shape[1]), *(() if own is None else (padding_bias(own),)))
        words = self.model.words(target, felt)
        return self.model.decoder(words, biases, (states, padding_bias(source)), deterministic)

    def started(self, tokens: Array, position: Array, length: int) -> tuple[Array, Array | None]:
        words = self.model.words(tokens, jnp.ones(tokens.shape, bool))
        return self.model.decoder.started(words, position), None

    def ended(self, hidden: Array) -> Array:
        return hidden

    def logits(self, hidden: Array) -> Array:
        words = self.model.shared.embedding.astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, words, preferred_element_type=jnp.float32)
        return logits + self.final_logits() if self.has_logits_bias else logits


class Bias(nn.Module):
    """A constant for every word."""

    count: int

    @nn.compact
    def __call__(self) -> Array:
        return jax.lax.stop_gradient(self.param("bias", nn.initializers.zeros, (self.count,)))


def _attention(config: BartConfig, side: str, dtype: DTypeLike) -> Attention:
    heads = config.heads_of[side]
    width = config.d_model // heads
    return Attention(
        names=("q_proj", "k_proj", "v_proj", "out_proj"),
        heads=heads,
        width=width,
        features=config.d_model,
        deviations=(config.init_std,) * 4,
        use_bias=True,
        scale=width**-0.5,
        dropout=config.attention_dropout,
        dtype=dtype,
    )
