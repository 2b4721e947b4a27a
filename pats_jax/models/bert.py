"""BERT and RoBERTa encoders with a sequence classification or regression head, in Flax Linen.

Module names are those of the Hugging Face tensor names, so a parameter's path reads like its tensor's name:
``params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]``.

References:
    Devlin et al. 2019, BERT (arXiv:1810.04805); Liu et al. 2019, RoBERTa (arXiv:1907.11692).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from pats_jax.models.config import EncoderConfig

# Added to the score of a masked token. Its exponential is exactly 0 in float32, and unlike -inf it leaves a row
# without any token finite: such filler rows must not give NaN.
_MASKED = -1e30


def _gelu(x: Array) -> Array:
    """The exact GELU by erf, as Transformers computes it (JAX's own takes erfc, which is slower on CPU)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _dense(config: EncoderConfig, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(config.initializer_range), name=name)


def _layer_norm(config: EncoderConfig, dtype: DTypeLike) -> nn.LayerNorm:
    # Flax computes the statistics in float32 whatever dtype is; the two-pass variance is the accurate one.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name="LayerNorm")


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised.

    In torch the padding token's own embedding has no gradient by decree; here because a masked token reaches no head.
    """

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ``input_ids`` and ``token_type_ids``, both (batch, length), as (batch, length, hidden)."""
        config = self.config

        def embed(count: int, name: str) -> nn.Embed:
            init = nn.initializers.normal(config.initializer_range)
            return nn.Embed(count, config.hidden_size, dtype=self.dtype, embedding_init=init, name=name)

        hidden = embed(config.vocab_size, "word_embeddings")(input_ids)
        hidden += embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        hidden += embed(config.max_position_embeddings, "position_embeddings")(self._positions(input_ids))
        hidden = _layer_norm(config, self.dtype)(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def _positions(self, input_ids: Array) -> Array:
        """BERT: 0, 1, ... (1, length). RoBERTa: padding has ``pad_token_id``, the others count on from it."""
        if not self.config.is_roberta:
            return jnp.arange(input_ids.shape[1])[None]
        is_token = input_ids != self.config.pad_token_id
        return jnp.cumsum(is_token, axis=1) * is_token + self.config.pad_token_id


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention with dropout on the weights."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        """Attends from some tokens to all.

        Args:
            queries_from: The tokens that attend, (batch, queries, hidden).
            hidden: The tokens attended to, (batch, length, hidden).
            bias: float32 (batch, 1, 1, length), 0 or ``_MASKED``.
            deterministic: No dropout.

        Returns:
            (batch, queries, hidden)
        """
        config = self.config
        heads = config.num_attention_heads
        width = config.hidden_size // heads

        def project(tokens: Array, name: str) -> Array:
            projected = _dense(config, config.hidden_size, self.dtype, name)(tokens)
            return projected.reshape(*tokens.shape[:2], heads, width)

        query = project(queries_from, "query")
        key = project(hidden, "key")
        value = project(hidden, "value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * width**-0.5, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias).astype(self.dtype)
        weights = nn.Dropout(config.attention_probs_dropout_prob)(weights, deterministic=deterministic)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(queries_from.shape)


class ResidualOutput(nn.Module):
    """Projects back to the hidden size and adds the residual: ``LayerNorm(residual + dropout(dense(x)))``."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        x = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(x)
        x = nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        return _layer_norm(self.config, self.dtype)(residual + x)


class Attention(nn.Module):
    """Self-attention and its output projection."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        attended = SelfAttention(self.config, self.dtype, name="self")(
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
        wide = _dense(self.config, self.config.intermediate_size, self.dtype, "dense")(hidden)
        return _ACTIVATIONS[self.config.hidden_act](wide)


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, deterministic: bool, first_token_only: bool) -> Array:
        """Maps (batch, length, hidden) to the same, or to (batch, 1, hidden) for the first token only."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, name="attention")(
            queries_from, hidden, bias, deterministic=deterministic
        )
        wide = Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


class LayerStack(nn.Module):
    """The layers, named "0", "1", ..."""

    config: EncoderConfig
    dtype: DTypeLike
    gradient_checkpointing: bool

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, *, deterministic: bool, first_token_only: bool) -> Array:
        # the two flags are static; nn.remat counts the module itself as argument 0
        layer = nn.remat(Layer, static_argnums=(3, 4)) if self.gradient_checkpointing else Layer
        last = self.config.num_hidden_layers - 1
        for index in range(last + 1):
            only = first_token_only and index == last
            hidden = layer(self.config, self.dtype, name=str(index))(hidden, bias, deterministic, only)
        return hidden


class Encoder(nn.Module):
    """Holds the layers under the name ``layer``."""

    config: EncoderConfig
    dtype: DTypeLike
    gradient_checkpointing: bool

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, **options: bool) -> Array:
        return LayerStack(self.config, self.dtype, self.gradient_checkpointing, name="layer")(hidden, bias, **options)


class Pooler(nn.Module):
    """BERT's pooler: a tanh layer on the first token."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return jnp.tanh(_dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden[:, 0]))


class EncoderModel(nn.Module):
    """Embeddings, encoder and, for BERT, the pooler."""

    config: EncoderConfig
    dtype: DTypeLike
    gradient_checkpointing: bool

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array,
        *,
        deterministic: bool,
        first_token_only: bool,
    ) -> Array:
        """Returns BERT's pooled output or RoBERTa's first hidden state, (batch, hidden)."""
        bias = jnp.where(attention_mask[:, None, None, :] != 0, 0.0, _MASKED)
        hidden = Embeddings(self.config, self.dtype, name="embeddings")(
            input_ids, token_type_ids, deterministic=deterministic
        )
        hidden = Encoder(self.config, self.dtype, self.gradient_checkpointing, name="encoder")(
            hidden, bias, deterministic=deterministic, first_token_only=first_token_only
        )
        if self.config.is_roberta:
            return hidden[:, 0]
        return Pooler(self.config, self.dtype, name="pooler")(hidden)


class RobertaHead(nn.Module):
    """RoBERTa's classification head, which has its own tanh layer in the pooler's place."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Array, *, deterministic: bool) -> Array:
        dropout = nn.Dropout(self.config.head_dropout, deterministic=deterministic)
        features = _dense(self.config, self.config.hidden_size, self.dtype, "dense")(dropout(features))
        return _dense(self.config, self.config.num_labels, self.dtype, "out_proj")(dropout(jnp.tanh(features)))


class SequenceClassifier(nn.Module):
    """A BERT or RoBERTa encoder with a classification or regression head.

    Attributes:
        config: Sizes, rates and labels.
        dtype: The dtype of computation; parameters are float32 always.
        first_token_only: In the last layer, compute only the first token's query, attention output and feed-forward:
            nothing else reaches the head. Logits and gradients are the same but for rounding; ``False`` is for
            comparison.
        gradient_checkpointing: Keep only what goes from layer to layer for the backward pass, and compute the rest
            again: less memory, about a third more work. Logits and gradients are the same but for rounding.
    """

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32
    first_token_only: bool = True
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Computes float32 logits, (batch, num_labels).

        Args:
            input_ids: Token ids, (batch, length).
            attention_mask: 1 for tokens and 0 for padding, (batch, length); all tokens if absent.
            token_type_ids: 0 for the first sentence, 1 for the second, (batch, length); zeros if absent.
            deterministic: No dropout. Otherwise ``apply`` needs ``rngs={"dropout": key}``.

        Raises:
            ValueError: The sequences are longer than the model has positions.
        """
        config = self.config
        input_ids = jnp.asarray(input_ids)
        if input_ids.shape[1] > config.max_length:
            raise ValueError(f"sequences of {input_ids.shape[1]} tokens, but the model ends at {config.max_length}")
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        features = EncoderModel(config, self.dtype, self.gradient_checkpointing, name=config.base_prefix)(
            input_ids,
            jnp.asarray(attention_mask),
            jnp.asarray(token_type_ids),
            deterministic=deterministic,
            first_token_only=self.first_token_only,
        )
        if config.is_roberta:
            logits = RobertaHead(config, self.dtype, name="classifier")(features, deterministic=deterministic)
        else:
            features = nn.Dropout(config.head_dropout)(features, deterministic=deterministic)
            logits = _dense(config, config.num_labels, self.dtype, "classifier")(features)
        return logits.astype(jnp.float32)
