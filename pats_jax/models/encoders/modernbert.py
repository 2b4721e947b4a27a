"""ModernBERT, in Flax Linen: rotary positions, alternating global and local attention, gated feed-forward blocks.

::

    hidden += attention(norm(hidden))        the first layer has no norm there
    hidden += feed_forward(norm(hidden))     feed_forward(x) = (gelu(x W_1) * (x W_2)) W_o

Modules are named after the Hugging Face tensors. Unlike there, the first layer has the scale of a norm before
attention, which nothing reads and no file holds, so that all layers have the same parameters and can be stacked.

References:
  Warner et al. 2024, Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder (arXiv:2412.13663).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models import attention as dense_attention, local_attention, rotary
from pats_jax.models.config import EncoderConfig
from pats_jax.models.encoders.encoder import Encoder, MaskedLanguageModel
from pats_jax.models.encoders.modernbert_config import LOCAL, ModernBertConfig
from pats_jax.models.layers import (
    ACTIVATION_FUNCTIONS,
    Form,
    LayerNorm,
    LayerStack,
    dense,
    embedding_table,
    look_up,
    pad_front,
    padding_bias,
    tied_logits,
)


class Kind(NamedTuple):
    """What distinguishes layers from each other.

    Attributes:
      is_local: whether attention is local.
      is_first: whether it is the first layer, which has no norm before attention.
    """

    is_local: bool
    is_first: bool


def _norm(config: ModernBertConfig, dtype: DTypeLike, name: str) -> LayerNorm:
    return LayerNorm(config, dtype, use_bias=config.norm_bias, name=name)


class Embeddings(nn.Module):
    """Word embeddings, normalised."""

    config: ModernBertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, hidden), as (batch, length, hidden)."""
        config = self.config
        if tokens.ndim == 2:
            words = embedding_table(config, config.vocab_size, config.hidden_size, "tok_embeddings")
            tokens = look_up(words, tokens, padding=config.pad_token_id)
        hidden = _norm(config, self.dtype, "norm")(tokens)
        return nn.Dropout(config.embedding_dropout)(hidden, deterministic=deterministic)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, global or local, and its output projection."""

    config: ModernBertConfig
    dtype: DTypeLike
    attention: str
    is_local: bool

    @nn.compact
    def __call__(self, hidden: Array, residual: Array, bias: Array, rotation: Array, *, deterministic: bool) -> Array:
        """Attends from the first tokens, those of the residual, to all tokens.

        Args:
          hidden: the tokens attended to, normalised, (batch, length, hidden).
          residual: what the result will be added to, (batch, queries, hidden).
          bias: float32 (batch, 1, 1, length): 0 for tokens, `layers.MASKED` for padding.
          rotation: (2, length, width / 2), from `rotary.rotation`.
          deterministic: whether dropout is off.

        Returns:
          (batch, queries, hidden).
        """
        config, queries = self.config, residual.shape[1]
        if self.is_local:
            reach = queries + config.half_window  # the queries do not see the tokens after these
            hidden, bias, rotation = hidden[:, :reach], bias[..., :reach], rotation[:, :reach]
        together = dense(config, 3 * config.hidden_size, self.dtype, "Wqkv", use_bias=config.attention_bias)(hidden)
        heads = config.num_attention_heads
        together = together.reshape(*hidden.shape[:2], 3, heads, config.hidden_size // heads)
        query, key, value = (together[:, :, part] for part in range(3))
        query = rotary.rotate(query[:, :queries], rotation[:, :queries])
        key, value = self.attended_to(rotary.rotate(key, rotation), value)
        attended = self._attend(query, key, value, bias, deterministic).reshape(residual.shape)
        x = dense(config, config.hidden_size, self.dtype, "Wo", use_bias=config.attention_bias)(attended)
        x = nn.Dropout(config.attention_probs_dropout_prob)(x, deterministic=deterministic)
        return self.adapt(x, residual)

    def attended_to(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns keys and values, (batch, length, heads, width) each. A prefix (`pats_jax.models.peft`) acts here."""
        return key, value

    def adapt(self, x: Array, residual: Array) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x

    def _attend(self, query: Array, key: Array, value: Array, bias: Array, deterministic: bool) -> Array:
        """The attended values, (batch, queries, heads, width). Queries see the keys before the text's own, a prefix."""
        surplus, half = key.shape[1] - bias.shape[-1], self.config.half_window
        batch, length = query.shape[:2]
        if not self.is_local:
            return self._see_all(query, key, value, pad_front(bias, surplus), deterministic)
        if length < bias.shape[-1] or not local_attention.is_long(length, half):
            bias = pad_front(local_attention.window_bias(bias, length, half), surplus)
            return self._see_all(query, key, value, bias, deterministic)
        blocks = local_attention.to_blocks(query, key, value, bias, half)
        return local_attention.from_blocks(self._see_all(*blocks, deterministic), batch, length)

    def _see_all(self, query: Array, key: Array, value: Array, bias: Array, deterministic: bool) -> Array:
        """Attention over all keys, biased."""
        rate = self.config.attention_probs_dropout_prob
        dropout = 0.0 if deterministic else rate
        if dense_attention.is_fused(self.attention, query, key, dropout=dropout):
            return dense_attention.by_platform(query, key, value, bias)
        if not dropout and dense_attention.is_long(query):
            return dense_attention.in_parts(query, key, value, bias)
        weights = dense_attention.softmax_weights(query, key, bias)
        weights = nn.Dropout(rate)(weights, deterministic=deterministic)
        return dense_attention.weighted_sum(weights, value)


class FeedForward(nn.Module):
    """The gated feed-forward block: one half of the wide layer, activated, times the other half, projected back."""

    config: ModernBertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, residual: Array, *, deterministic: bool) -> Array:
        """Maps (batch, length, hidden) to the same shape; the residual is what the result will be added to."""
        config = self.config
        wide = dense(config, 2 * config.intermediate_size, self.dtype, "Wi", use_bias=config.mlp_bias)(hidden)
        inner, gate = jnp.split(wide, 2, axis=-1)
        gated = ACTIVATION_FUNCTIONS[config.hidden_act](inner) * gate
        gated = nn.Dropout(config.hidden_dropout_prob)(gated, deterministic=deterministic)
        x = dense(config, config.hidden_size, self.dtype, "Wo", use_bias=config.mlp_bias)(gated)
        return self.adapt(x, residual)

    def adapt(self, x: Array, residual: Array) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward, each after a norm and added to what it reads."""

    config: ModernBertConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        bias: Array,
        global_rotation: Array,
        local_rotation: Array,
        *,
        kind: Kind,
        deterministic: bool,
        first_token_only: bool,
    ) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        config = self.config
        normed = _norm(config, self.dtype, "attn_norm")(hidden)
        attended_to = hidden if kind.is_first else normed
        hidden = hidden[:, :1] if first_token_only else hidden
        attention = Attention(config, self.dtype, self.attention, kind.is_local, name="attn")
        rotation = local_rotation if kind.is_local else global_rotation
        hidden = hidden + attention(attended_to, hidden, bias, rotation, deterministic=deterministic)
        normed = _norm(config, self.dtype, "mlp_norm")(hidden)
        return hidden + FeedForward(config, self.dtype, name="mlp")(normed, hidden, deterministic=deterministic)


class ModernBertModel(nn.Module):
    """Embeddings, layers and the last norm."""

    config: ModernBertConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        attention_mask: Array,
        token_type_ids: Array,
        *,
        hidden_state: int | None,
        deterministic: bool,
        **options: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the last hidden state, (batch, length or 1, hidden), and all hidden states; the last one is normed.

        ``tokens`` are ids, word embeddings or, if ``hidden_state`` is a number, the hidden state of that number. There
        are no token types.
        """
        config = self.config
        if hidden_state is None:
            tokens = Embeddings(config, self.dtype, name="embeddings")(tokens, deterministic=deterministic)
        width = config.hidden_size // config.num_attention_heads
        thetas = (config.global_rope_theta, config.local_rope_theta)
        rotations = [rotary.rotation(tokens.shape[1], width, theta) for theta in thetas]
        kinds = tuple(Kind(kind == LOCAL, number == 0) for number, kind in enumerate(config.types_of_layers))
        *inner, last = LayerStack(Layer, config, self.dtype, self.form, kinds, name="layers")(
            tokens,
            padding_bias(attention_mask),
            *rotations,
            first_layer=hidden_state or 0,
            deterministic=deterministic,
            **options,
        )
        last = _norm(config, self.dtype, "final_norm")(last)
        return last, (*inner, last)


def _transformed(config: ModernBertConfig, dtype: DTypeLike, hidden: Array) -> Array:
    """What both heads begin with, in the module that calls: a dense layer, an activation and a norm."""
    hidden = dense(config, config.hidden_size, dtype, "dense", use_bias=config.classifier_bias)(hidden)
    return _norm(config, dtype, "norm")(ACTIVATION_FUNCTIONS[config.classifier_activation](hidden))


class PredictionHead(nn.Module):
    """The part of the classifier that a masked language model has too: dense layer, activation and norm."""

    config: ModernBertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return _transformed(self.config, self.dtype, hidden)


class MaskedLanguageModelHead(nn.Module):
    """The `PredictionHead`, and a decoder tied to the word embeddings, with its own bias if ``decoder_bias``."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array, word_embeddings: Array) -> Array:
        config = self.config
        assert isinstance(config, ModernBertConfig)
        hidden = _transformed(config, hidden.dtype, hidden)
        logits = tied_logits(hidden, word_embeddings)
        if config.decoder_bias:
            logits += self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        return logits


def _classify(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """Logits from the first token, or from the mean of all tokens."""
    assert isinstance(config, ModernBertConfig)
    if config.reads_first_token:
        pooled = features[:, 0]
    else:
        weights = (attention_mask != 0).astype(jnp.float32)[..., None]
        total = jnp.maximum(jnp.sum(weights, axis=1), 1)  # a row without tokens must not give NaN
        pooled = (jnp.sum(features * weights, axis=1) / total).astype(features.dtype)
    hidden = PredictionHead(config, dtype, name="head")(pooled)
    hidden = nn.Dropout(config.head_dropout)(hidden, deterministic=deterministic)
    return dense(config, config.num_labels, dtype, "classifier")(hidden)


MODERNBERT = Encoder(
    config=ModernBertConfig,
    model=ModernBertModel,
    head=_classify,
    masked_lm=MaskedLanguageModel(
        MaskedLanguageModelHead,
        prefix=(),
        own_names={("bias",): ("decoder", "bias"), (): ("head",)},
        decoder=("decoder",),
    ),
)
