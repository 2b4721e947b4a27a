"""BERT and RoBERTa encoders with a sequence classification or regression head, in Flax Linen.

Modules are named after the Hugging Face tensors, so a parameter's path reads like its tensor's name:
``params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]``.

References:
  Devlin et al. 2019, BERT (arXiv:1810.04805); Liu et al. 2019, RoBERTa (arXiv:1907.11692).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models.config import EncoderConfig
from pats_jax.models.encoders.encoder import Encoder, MaskedLanguageModel
from pats_jax.models.encoders.model import EncoderModel, Layers
from pats_jax.models.layers import (
    ACTIVATION_FUNCTIONS,
    LayerNorm,
    attend,
    choose_row,
    dense,
    embedding_table,
    look_up,
    pad_front,
    positions_after_padding,
    project_to_heads,
    tied_logits,
)


def _layer_norm(config: EncoderConfig, dtype: DTypeLike) -> LayerNorm:
    return LayerNorm(config, dtype, name="LayerNorm")


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised.

    Rows are looked up and summed in float32, so their gradients are summed in float32 too. As in torch
    (``padding_idx``), the word embedding of the padding token and RoBERTa's position embedding of padding get no
    gradient.
    """

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, hidden), as (batch, length, hidden)."""
        config = self.config

        def table(count: int, name: str) -> Array:
            return embedding_table(config, count, config.embedding_size, name)

        if tokens.ndim == 2:
            words, is_token = table(config.vocab_size, "word_embeddings"), tokens != config.pad_token_id
            hidden = look_up(words, tokens, padding=config.pad_token_id)
        else:
            hidden, is_token = tokens.astype(jnp.float32), attention_mask != 0
        hidden += choose_row(table(config.type_vocab_size, "token_type_embeddings"), token_type_ids)
        hidden += self._positions(table(config.max_position_embeddings, "position_embeddings"), is_token)
        hidden = _layer_norm(config, self.dtype)(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def _positions(self, table: Array, is_token: Array) -> Array:
        """Position embeddings, (length, hidden) for BERT, (batch, length, hidden) for RoBERTa.

        BERT counts positions from 0. RoBERTa gives padding position ``pad_token_id`` and counts tokens from the next.
        """
        first, length = self.first_position(is_token.shape[1]), is_token.shape[1]
        if not self.config.is_roberta:
            return table[first : first + length]
        padding = self.config.pad_token_id
        return look_up(table, positions_after_padding(is_token, padding=padding, first=first), padding=padding)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens: 0, unless a prefix comes before it."""
        return 0


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention, softmax(Q K^T / sqrt(width)) V, with dropout on the weights."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        """Attends from the query tokens to all tokens.

        Args:
          queries_from: the tokens that attend, (batch, queries, hidden).
          hidden: the tokens attended to, (batch, length, hidden).
          bias: float32 (batch, 1, 1, length): 0 for tokens, `layers.MASKED` for padding.
          deterministic: whether dropout is off.

        Returns:
          The attended values, (batch, queries, hidden).
        """
        config = self.config

        def project(tokens: Array, name: str) -> Array:
            return project_to_heads(config, tokens, self.dtype, name)

        query = project(queries_from, "query")
        key, value = self.attended_to(project(hidden, "key"), project(hidden, "value"))
        bias = pad_front(bias, key.shape[1] - hidden.shape[1])
        return attend(config, self.attention, query, key, value, bias, deterministic=deterministic)

    def attended_to(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns keys and values, (batch, length, heads, width) each. A prefix (`pats_jax.models.peft`) acts here."""
        return key, value


class ResidualOutput(nn.Module):
    """Projects back to the hidden size and adds the residual: ``LayerNorm(residual + dropout(dense(x)))``."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        x = dense(self.config, self.config.hidden_size, self.dtype, "dense")(x)
        x = nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        norm = _layer_norm(self.config, self.dtype)
        return norm(residual + self.adapt(x, residual, norm))

    def adapt(self, x: Array, residual: Array, norm: LayerNorm) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters (`pats_jax.models.peft`) act here."""
        return x


class Attention(nn.Module):
    """Self-attention and its output projection."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        attended = SelfAttention(self.config, self.dtype, self.attention, name="self")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        output = ResidualOutput(self.config, self.dtype, name="output")
        return output(attended, queries_from, deterministic=deterministic)


class Intermediate(nn.Module):
    """The wide half of the feed-forward block."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        wide = dense(self.config, self.config.intermediate_size, self.dtype, "dense")(hidden)
        return ACTIVATION_FUNCTIONS[self.config.hidden_act](wide)


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward."""

    config: EncoderConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, *, deterministic: bool, first_token_only: bool) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, self.attention, name="attention")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        wide = Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


class BertLayers(Layers):
    """BERT's layers."""

    layer = Layer


class Pooler(nn.Module):
    """BERT's pooler: a tanh layer on the first token."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return jnp.tanh(dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden[:, 0]))


class BertModel(EncoderModel):
    """Embeddings, encoder and, for BERT, the pooler, whose output its head reads."""

    embeddings = Embeddings
    layers = BertLayers

    def features(self, hidden: Array) -> Array:
        if self.config.is_roberta:
            return super().features(hidden)
        return Pooler(self.config, self.dtype, name="pooler")(hidden)


class RobertaHead(nn.Module):
    """RoBERTa's classification head, which has a tanh layer instead of BERT's pooler.

    Attributes:
      config: the encoder's config.
      dtype: the dtype of computation.
      activation: the activation of the first layer; ELECTRA has another.
    """

    config: EncoderConfig
    dtype: DTypeLike
    activation: Callable[[Array], Array] = jnp.tanh

    @nn.compact
    def __call__(self, features: Array, *, deterministic: bool) -> Array:
        dropout = nn.Dropout(self.config.head_dropout, deterministic=deterministic)
        features = dense(self.config, self.config.hidden_size, self.dtype, "dense")(dropout(features))
        return dense(self.config, self.config.num_labels, self.dtype, "out_proj")(dropout(self.activation(features)))


class MaskedLanguageModelHead(nn.Module):
    """A dense layer with activation and LayerNorm, and a decoder tied to the word embeddings, with its own bias.

    The formula is that of `pats_jax.models.mlm_logits`.

    Attributes:
      config: the encoder's config.
      activation: its activation function; None: the config's ``hidden_act``.
    """

    config: EncoderConfig
    activation: str | None = None

    @nn.compact
    def __call__(self, hidden: Array, word_embeddings: Array) -> Array:
        config, dtype = self.config, hidden.dtype
        activation = ACTIVATION_FUNCTIONS[self.activation or config.hidden_act]
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        hidden = activation(nn.Dense(config.embedding_size, dtype=dtype, name="dense")(hidden))
        hidden = LayerNorm(config, dtype, name="LayerNorm")(hidden)
        return tied_logits(hidden, word_embeddings) + bias


def _bert_head(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """BERT's logits: dropout and a linear layer on the pooled output."""
    features = nn.Dropout(config.head_dropout)(features, deterministic=deterministic)
    return dense(config, config.num_labels, dtype, "classifier")(features)


def _roberta_head(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """RoBERTa's logits, from the first token."""
    return RobertaHead(config, dtype, name="classifier")(features, deterministic=deterministic)


BERT = Encoder(
    config=EncoderConfig,
    model=BertModel,
    head=_bert_head,
    masked_lm=MaskedLanguageModel(
        MaskedLanguageModelHead,
        prefix=("cls", "predictions"),
        own_names={("dense",): ("transform", "dense"), ("LayerNorm",): ("transform", "LayerNorm")},
    ),
)
ROBERTA = BERT._replace(
    head=_roberta_head,
    masked_lm=MaskedLanguageModel(
        functools.partial(MaskedLanguageModelHead, activation="gelu"),
        prefix=("lm_head",),
        own_names={("LayerNorm",): ("layer_norm",)},
    ),
)
