"""DeBERTa-v2 and v3 in Flax Linen: disentangled attention, and the convolution of some checkpoints.

A layer is BERT's but for its attention, whose scores also depend on the distance of two tokens; see
`pats_jax.models.encoders.deberta_attention`.

References:
  He et al. 2021, DeBERTa: Decoding-enhanced BERT with Disentangled Attention (arXiv:2006.03654); He et al. 2023,
  DeBERTaV3 (arXiv:2111.09543).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.models.attention import EINSUM
from pats_jax.models.config import EncoderConfig
from pats_jax.models.encoders import bert
from pats_jax.models.encoders.deberta_attention import rows_of_distances, shifted_products
from pats_jax.models.encoders.deberta_config import DebertaConfig
from pats_jax.models.encoders.encoder import Encoder, MaskedLanguageModel
from pats_jax.models.encoders.model import EncoderModel
from pats_jax.models.layers import (
    ACTIVATION_FUNCTIONS,
    Form,
    LayerNorm,
    LayerStack,
    attend,
    choose_row,
    dense,
    embedding_table,
    look_up,
    pad_front,
    padding_bias,
)

_ACTIVATIONS = ACTIVATION_FUNCTIONS | {"tanh": jnp.tanh}
_PARTS = ("query", "key", "value")


class Embeddings(nn.Module):
    """Word embeddings, and position and token type embeddings where the model has them; normalised, 0 at padding."""

    config: DebertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, embedding_size), as (..., hidden)."""
        config = self.config

        def table(count: int, name: str) -> Array:
            return embedding_table(config, count, config.embedding_size, name)

        if tokens.ndim == 2:
            hidden = look_up(table(config.vocab_size, "word_embeddings"), tokens, padding=config.pad_token_id)
        else:
            hidden = tokens.astype(jnp.float32)
        if config.position_biased_input:
            length = tokens.shape[1]
            first = self.first_position(length)
            hidden += table(config.max_position_embeddings, "position_embeddings")[first : first + length]
        if config.type_vocab_size:
            hidden += choose_row(table(config.type_vocab_size, "token_type_embeddings"), token_type_ids)
        if config.embedding_size != config.hidden_size:
            hidden = dense(config, config.hidden_size, self.dtype, "embed_proj", use_bias=False)(hidden)
        hidden = LayerNorm(config, self.dtype, name="LayerNorm")(hidden)
        hidden *= _at_tokens(attention_mask, self.dtype)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens: 0, unless a prefix comes before it."""
        return 0


class DisentangledSelfAttention(nn.Module):
    """Multi-head attention whose scores also depend on the distance of the tokens, with dropout on the weights."""

    config: DebertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, queries_from: Array, hidden: Array, bias: Array, relative: Array | None, *, deterministic: bool
    ) -> Array:
        """Attends from the first tokens, or all, to all tokens.

        Args:
          queries_from: the tokens that attend, the first of a text, (batch, queries, hidden).
          hidden: the tokens attended to, (batch, length, hidden).
          bias: float32 (batch, 1, 1, length): 0 for tokens, a large negative number for padding.
          relative: relative embeddings, (rows, hidden), or None without relative attention.
          deterministic: whether dropout is off.

        Returns:
          The attended values, (batch, queries, hidden).
        """
        config = self.config
        projections = {part: dense(config, config.hidden_size, self.dtype, f"{part}_proj") for part in _PARTS}
        query = self._heads(projections["query"](queries_from))
        key, value = self._heads(projections["key"](hidden)), self._heads(projections["value"](hidden))
        if relative is not None and config.position_terms:
            bias = bias + self._position_scores(query, key, relative, projections, deterministic=deterministic)
        key, value = self.attended_to(key, value)
        bias = pad_front(bias, key.shape[1] - hidden.shape[1])
        return attend(config, EINSUM, query * config.num_terms**-0.5, key, value, bias, deterministic=deterministic)

    def attended_to(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns keys and values, (batch, length, heads, width) each. A prefix (`pats_jax.models.peft`) acts here."""
        return key, value

    def _heads(self, projected: Array) -> Array:
        """(..., hidden) as (..., heads, width)."""
        heads = self.config.num_attention_heads
        return projected.reshape(*projected.shape[:-1], heads, self.config.hidden_size // heads)

    def _position_scores(self, query, key, relative, projections, *, deterministic: bool) -> Array:
        """The terms of the scores that depend on positions, (batch, heads, queries, length).

        Only the rows of distances that occur are projected.
        """
        config = self.config
        first, end, places = rows_of_distances(
            query.shape[1], key.shape[1], config.position_buckets, config.longest_distance
        )
        relative = nn.Dropout(config.hidden_dropout_prob)(relative[first:end], deterministic=deterministic)

        def by_distance(own: str, shared: str) -> Array:
            layer = projections[shared]
            if not config.share_att_key:
                layer = dense(config, config.hidden_size, self.dtype, own)
            rows = self._heads(layer(relative)) * (query.shape[-1] * config.num_terms) ** -0.5
            if places is None:
                return rows
            return rows.at[jnp.asarray(places)].get(indices_are_sorted=True, mode="promise_in_bounds")

        scores = jnp.zeros((), query.dtype)
        if "c2p" in config.position_terms:
            scores += shifted_products(query, by_distance("pos_key_proj", "key")[::-1])
        if "p2c" in config.position_terms:
            scores += shifted_products(key, by_distance("pos_query_proj", "query")).swapaxes(-1, -2)
        return scores


class Attention(nn.Module):
    """Self-attention and its output projection."""

    config: DebertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, queries_from: Array, hidden: Array, bias: Array, relative: Array | None, *, deterministic: bool
    ) -> Array:
        values = DisentangledSelfAttention(self.config, self.dtype, name="self")(
            queries_from, hidden, bias, relative, deterministic=deterministic
        )
        output = bert.ResidualOutput(self.config, self.dtype, name="output")
        return output(values, queries_from, deterministic=deterministic)


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward."""

    config: DebertaConfig
    dtype: DTypeLike
    attention: str  # einsum, whatever it says: see `DebertaModel`

    @nn.compact
    def __call__(
        self, hidden: Array, bias: Array, relative: Array | None, *, deterministic: bool, first_token_only: bool
    ) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, name="attention")(
            queries_from, hidden, bias, relative, deterministic=deterministic
        )
        wide = bert.Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return bert.ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


class Convolution(nn.Module):
    """What some checkpoints add to the first layer's output: ``LayerNorm(output + act(dropout(conv(embeddings))))``."""

    config: DebertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, embedded: Array, output: Array, attention_mask: Array, *, deterministic: bool) -> Array:
        """Adds the convolution of the embeddings, (batch, length, hidden), to the output of their first tokens, or all.

        The result has the output's shape, (batch, tokens, hidden), and is 0 at padding.
        """
        config = self.config
        count = output.shape[1]
        conv = nn.Conv(
            config.hidden_size,
            (config.conv_kernel_size,),
            padding=config.conv_kernel_size // 2,
            feature_group_count=config.conv_groups,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
            name="conv",
        )
        at_tokens = _at_tokens(attention_mask[:, :count], self.dtype)
        near = conv(embedded[:, : count + config.conv_kernel_size // 2])[:, :count] * at_tokens
        near = nn.Dropout(config.hidden_dropout_prob)(near, deterministic=deterministic)
        return LayerNorm(config, self.dtype, name="LayerNorm")(output + _ACTIVATIONS[config.conv_act](near)) * at_tokens


def _at_tokens(attention_mask: Array, dtype: DTypeLike) -> Array:
    """1 at tokens and 0 at padding, (batch, length, 1)."""
    return (attention_mask != 0)[..., None].astype(dtype)


class Layers(nn.Module):
    """The relative embeddings, the layers, with parameters under ``layer``, and the convolution beside the first."""

    config: DebertaConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(
        self, hidden: Array, attention_mask: Array, *, first_layer: int, deterministic: bool, **options: Any
    ) -> tuple[Array, ...]:
        """As `LayerStack`; hidden state 1 has passed the convolution."""
        config = self.config
        stack = LayerStack(Layer, config, self.dtype, self.form, name="layer")
        constants = padding_bias(attention_mask), self._relative()

        def run(hidden: Array, **places: Any) -> tuple[Array, ...]:
            return stack(hidden, *constants, deterministic=deterministic, **places, **options)

        if config.conv_kernel_size <= 0:
            return run(hidden, first_layer=first_layer)
        if first_layer:
            if not deterministic and stack.has_rng("dropout"):
                stack.make_rng("dropout")  # that of the first layer, so that the others have theirs of a whole pass
            return run(hidden, first_layer=first_layer)
        embedded, output = run(hidden, end=1)
        convolution = Convolution(config, self.dtype, name="conv")
        output = convolution(embedded, output, attention_mask, deterministic=deterministic)
        if config.num_hidden_layers == 1:
            return embedded, output
        return embedded, *run(output, first_layer=1)

    def _relative(self) -> Array | None:
        """The relative embeddings, (rows, hidden), normalised if the model does so; None if it has none."""
        config = self.config
        if not config.relative_attention:
            return None
        table = embedding_table(config, 2 * config.relative_span, config.hidden_size, "rel_embeddings")
        return LayerNorm(config, self.dtype, name="LayerNorm")(table) if config.normalises_relative else table


class DebertaModel(EncoderModel):
    """Embeddings and layers."""

    embeddings = Embeddings
    layers = Layers
    positions = "the position terms of DeBERTa"


class Pooler(nn.Module):
    """The head's first part: dropout, a linear layer and an activation, on the first token."""

    config: DebertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Array, *, deterministic: bool) -> Array:
        config = self.config
        features = nn.Dropout(config.pooler_dropout)(features, deterministic=deterministic)
        return _ACTIVATIONS[config.pooler_hidden_act](dense(config, config.hidden_size, self.dtype, "dense")(features))


def _head(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """The logits: the pooler, dropout and a linear layer."""
    assert isinstance(config, DebertaConfig)
    pooled = Pooler(config, dtype, name="pooler")(features, deterministic=deterministic)
    pooled = nn.Dropout(config.head_dropout)(pooled, deterministic=deterministic)
    return dense(config, config.num_labels, dtype, "classifier")(pooled)


DEBERTA = Encoder(
    config=DebertaConfig,
    model=DebertaModel,
    head=_head,
    # The same head under two names: of models trained with Transformers, and of Microsoft's checkpoints.
    masked_lm=MaskedLanguageModel(
        bert.MaskedLanguageModelHead,
        prefix=("cls", "predictions"),
        own_names={("dense",): ("transform", "dense"), ("LayerNorm",): ("transform", "LayerNorm")},
        other=MaskedLanguageModel(bert.MaskedLanguageModelHead, prefix=("lm_predictions", "lm_head"), own_names={}),
    ),
)
